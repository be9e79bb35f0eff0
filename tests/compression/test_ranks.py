"""Several processes that compress together write the bytes of one alone, whatever number goes on; and how they end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sharing
import torch
from checks import everything_of

from qmoe_lite.compression.identity import check_same
from qmoe_lite.compression.list_buffer import ListBuffer
from qmoe_lite.compression.rank_buffer import RankBuffer
from qmoe_lite.compression.ranks import ALONE, Ranks, Together, ranks_of
from qmoe_lite.compression.waves import lend, waves
from qmoe_lite.errors import SettingError
from qmoe_lite.tuning.compressing import compress_and_tune

# runs in a fork: the ranks are forks of that, which has the kernels
TOGETHER = """
import json, os, signal, socket, sys, traceback
from pathlib import Path
os.environ |= {"NUMBA_THREADING_LAYER": "workqueue", "NUMBA_NUM_THREADS": "1"}  # which may be forked
import torch
import qmoe_lite as qm
from qmoe_lite.cli.main import main
from qmoe_lite.coding import dictionary
from qmoe_lite.compression.block_runner import BlockRunner
from qmoe_lite.compression.ranks import ALONE, Together
from qmoe_lite.errors import NotFiniteError

sys.path.append(sys.argv[5])
import sharing
sharing.fit_once(dictionary)
switch, causal, text, place = sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4])
small = {"samples": 24, "sequence_length": 32, "validation_samples": 2, "group_size": 1, "batch_size": 5}
ternary = {**small, "grid": qm.MinMaxTernary(torch.bfloat16)}
works = {"switch": (switch, ternary), "causal": (causal, {**small, "rate": 2.0})}
torch.set_num_threads(1)


def forked(count, work):
    children = []
    for rank in range(count):
        children.append(os.fork())
        if children[-1] == 0:
            code = 1
            try:
                work(rank)
                code = 0
            except SystemExit as stop:
                code = stop.code
            except BaseException:
                traceback.print_exc()
            sys.stderr.flush()
            os._exit(code)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def together(count, name, out, last=None):
    def tell(event):
        if event.done == last:
            os.kill(os.getpid(), signal.SIGKILL)

    def work(rank):
        with ALONE if count == 1 else Together(f"file://{out}.{count}", rank, count) as ranks:
            qm.compress(works[name][0], out, calibration=text, progress=tell, ranks=ranks, **works[name][1])

    return forked(count, work)


def by_command(name, fail, out="out"):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    def work(rank):
        os.dup2(os.open(place / f"{name}.{rank}", os.O_WRONLY | os.O_CREAT), 2)
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        if rank == 1:
            BlockRunner._check = fail
        folder = place / f"{name}{rank if out is None else ''}"
        folder.mkdir(exist_ok=True)
        sys.argv = ["qmoe", "compress", switch, str(folder / "out"), "--calibration", text, "--samples", "8"]
        sys.argv += ["--sequence-length", "32", "--batch-size", "2"]
        main()

    found = forked(2, work)
    return found, [(place / f"{name}.{rank}").read_text() for rank in (0, 1)]


def damaged(self, block, out):
    raise NotFiniteError(f"{block} holds NaN. Fetch it again.")


def killed(self, block, out):
    os.kill(os.getpid(), signal.SIGKILL)


place.mkdir()
for name, (model, settings) in works.items():
    qm.compress(model, place / f"{name}-alone", calibration=text, **settings)
said = {
    "two": [together(2, name, place / f"{name}-two") for name in works],
    "first one, then two": [together(1, "causal", place / "up", 2), together(2, "causal", place / "up")],
    "two, one, three": [together(count, "switch", place / "down", last) for count, last in ((2, 2), (1, 5), (3, None))],
    "raises": by_command("raises", damaged),
    "killed": by_command("killed", killed),
    "apart": by_command("apart", BlockRunner._check, None),
}
(place / "said.json").write_text(json.dumps(said))
"""


@pytest.fixture(scope="module")
def together(made_once, forks, switch, causal, text_file):
    """What came of the runs in TOGETHER: their directories, and what they said."""

    def make(place: Path) -> None:
        done = forks.run(TOGETHER, switch, causal("qwen3_moe"), text_file, place, Path(sharing.__file__).parent)
        assert (place / "said.json").exists(), done.stderr
        (place / "stderr").write_text(done.stderr)

    place = made_once("ranks", make)
    return place, json.loads((place / "said.json").read_text())


@pytest.mark.slow
def test_two_ranks_write_the_bytes_of_one(together):
    place, said = together
    assert said["two"] == [[0, 0], [0, 0]], (place / "stderr").read_text()
    for name in ("switch", "causal"):
        assert everything_of(place / f"{name}-two") == everything_of(place / f"{name}-alone")


@pytest.mark.slow
def test_another_number_of_ranks_goes_on_to_the_same_bytes(together):
    place, said = together
    assert said["first one, then two"] == [[-9], [0, 0]], (place / "stderr").read_text()
    assert everything_of(place / "up") == everything_of(place / "causal-alone")
    assert said["two, one, three"] == [[-9, 1], [-9], [0, 0, 0]], (place / "stderr").read_text()
    assert everything_of(place / "down") == everything_of(place / "switch-alone")


@pytest.mark.slow
def test_a_rank_that_fails_or_dies_ends_all_with_one_message(together):
    _, said = together
    codes, (first, second) = said["raises"]
    assert codes == [1, 1]
    assert "qmoe" not in first
    assert second.splitlines()[-1] == "qmoe: rank 1 of 2: encoder.block.0 holds NaN. Fetch it again."
    codes, (first, second) = said["killed"]
    assert codes == [1, -9]
    text = "rank 1 of 2 ended without a word: it was killed, perhaps for lack of memory. Finished groups are kept"
    assert first.splitlines()[-1] == f"qmoe: {text}: run the same command again."
    codes, told = said["apart"]
    assert codes == [1, 1]
    (message,) = [line for line in "".join(told).splitlines() if "qmoe" in line]
    assert "is not the folder that the first rank writes. Name an OUT on a file system that all hosts share." in message


class Pretended(Together):
    """A rank whose talk with the others is a list."""

    def __init__(self, rank: int, count: int, line: list[torch.Tensor]) -> None:
        self.rank, self.count, self._line = rank, count, line

    def send(self, pieces):
        self._line += pieces

    def receive(self, rank, shape, dtype):
        assert tuple(self._line[0].shape) == shape
        return self._line.pop(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_buffers_of_ranks_hold_what_one_holds(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr("qmoe_lite.compression.list_buffer._CHUNK", 100)  # a few rows
    whole, values, line = ListBuffer(7, 3, 5, dtype), torch.randn(7, 3, 5).to(dtype), []
    whole.write(slice(0, 7), values)
    ranks = [Pretended(rank, 3, line) for rank in range(3)]
    parts = [RankBuffer(rank, [0, 4, 4, 7], 3, 5, dtype, None) for rank in ranks]
    assert [part.own for part in parts] == [range(4), range(4, 4), range(4, 7)]
    for part in parts:
        part.zero()
        part.write(slice(part.own.start, part.own.stop), values[part.own.start : part.own.stop])
    rows = torch.tensor([12, 17, 13])
    assert torch.equal(parts[2].gather(rows), whole.gather(rows))
    for buffer in (whole, parts[2]):
        buffer.add(rows, torch.ones(3, 5))
    whole.save(tmp_path / "whole")
    for part in reversed(parts):  # the first one is sent what the others have
        part.save(tmp_path / "parts")
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()
    others = [RankBuffer(rank, [0, 1, 5, 7], 3, 5, dtype, None) for rank in ranks]
    for other in others:
        other.load(tmp_path / "whole")
        assert torch.equal(
            other.read(slice(other.own.start, other.own.stop)), whole.read(slice(other.own.start, other.own.stop))
        )


def test_one_process_shares_with_nobody():
    assert (ALONE.first, ALONE.cuts(5)) == (True, [0, 5])
    assert [ALONE.share(lambda: 1), ALONE.of(0, 2), ALONE.gather(3), ALONE.collect(4)] == [1, 2, [3], [4]]
    assert list(waves([range(2), range(2, 4)], ALONE)) == [[range(2)], [range(2, 4)]]
    seen = object()
    assert lend(seen, [range(2)], ALONE) is seen
    for environment in (
        {},
        {"WORLD_SIZE": "4"},
        dict.fromkeys(("RANK", "MASTER_ADDR", "MASTER_PORT"), "0") | {"WORLD_SIZE": "1"},
    ):
        assert ranks_of(environment) is ALONE


@pytest.mark.parametrize(("things", "expected"), [(7, [0, 3, 5, 7]), (1, [0, 1, 1, 1]), (0, [0, 0, 0, 0])])
def test_the_first_ranks_get_more_and_each_gets_what_follows(things, expected):
    assert Pretended(0, 3, []).cuts(things) == expected


def test_several_ranks_do_not_tune(tmp_path, switch):
    with pytest.raises(SettingError, match=r"tuning is the work of one process\. Compress without it, then tune"):
        compress_and_tune(switch, tmp_path / "out", epochs=1, ranks=Pretended(0, 2, []))


def test_ranks_with_other_work_are_refused(monkeypatch):
    ranks = Ranks()
    monkeypatch.setattr(ranks, "gather", lambda value: [value, {**value, "device": "cuda:1"}])
    check_same({"seed": 0, "device": "cuda:0"}, ranks)
    monkeypatch.setattr(ranks, "gather", lambda value: [value, {**value, "seed": 1}])
    with pytest.raises(SettingError, match=r"rank 1 was given other work than rank 0: seed is 1, and was 0\. Give"):
        check_same({"seed": 0, "device": "cpu"}, ranks)
