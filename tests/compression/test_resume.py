"""Runs that end in the middle of a layer: what was solved is not solved again, and every byte is the same."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
import sharing
import tiny
import torch
from checks import Killed, everything_of

import qmoe_lite as qm
from qmoe_lite.cli.compress_ import _FinishedFirst
from qmoe_lite.compression import groups
from qmoe_lite.compression.layer import LayerCompressor
from qmoe_lite.errors import OutputError, ResumeError

SMALL = {"samples": 24, "sequence_length": 32, "validation_samples": 2, "tune": "none", "group_size": 1}
SETTINGS = {
    "ternary": {**SMALL, "grid": qm.MinMaxTernary(torch.bfloat16)},
    "rate": {**SMALL, "rate": 2.0},
    "uniform": {**SMALL, "grid": qm.UniformGrid(1.0, level_dtype=torch.bfloat16)},
}


@pytest.fixture(scope="module")
def whole(made_once, switch, text_file):
    """Give a function: settings' name -> the settings, and what a run without interruption writes."""

    def get(name):
        settings = {"calibration": text_file, **SETTINGS[name]}
        made = made_once(f"resume-{name}", lambda place: qm.compress(switch, place, **settings))
        return settings, everything_of(made)

    return get


@pytest.fixture
def solves(monkeypatch):
    """The first expert of each group that is solved, in order."""
    found, solve = [], LayerCompressor._solve

    def counted(self, layer, group, *rest):
        found.append((layer.block.split(".")[0], group[0]))
        return solve(self, layer, group, *rest)

    monkeypatch.setattr(LayerCompressor, "_solve", counted)
    return found


def stop_after(groups):
    """Return a callable that ends a run when so many groups are done."""

    def kill(event):
        if event.done == groups:
            raise Killed

    return kill


@pytest.mark.parametrize("name", ["ternary", pytest.param("rate", marks=pytest.mark.slow), "uniform"])
def test_a_run_goes_on_after_the_last_finished_group(tmp_path, switch, whole, solves, name):
    settings, expected = whole(name)
    solves.clear()
    for done in (2, 7):
        with pytest.raises(Killed):
            qm.compress(switch, tmp_path / "out", progress=stop_after(done), **settings)
        assert [path.name for path in (tmp_path / "out.partial").glob("groups*")] == [f"groups-{done // 4}.log"]
    events = []
    qm.compress(switch, tmp_path / "out", progress=events.append, **settings)
    assert everything_of(tmp_path / "out") == expected
    events = [event for event in events if not event.warning]  # of random experts
    assert [event.place.endswith(", solved before") for event in events] == [True] * 3 + [False]
    assert [event.seconds_left is None for event in events] == [True] * 3 + [False]
    if name != "rate":  # which solves some groups several times
        assert solves == [(stack, expert) for stack in ("encoder", "decoder") for expert in range(4)]


def test_ctrl_c_finishes_the_group_under_way(tmp_path, switch, run, text_file, monkeypatch, compressed):
    solve, presses = LayerCompressor._solve_group, [signal.SIGINT]

    def pressed(*args):
        if presses:
            signal.raise_signal(presses.pop())
        return solve(*args)

    monkeypatch.setattr(LayerCompressor, "_solve_group", pressed)
    out, log = tmp_path / "out", tmp_path / "out.log.jsonl"
    command = ["compress", switch, out, "--calibration", text_file, "--samples", 24, "--sequence-length", 32]
    command += ["--validation-samples", 2, "--codeword-bits", 10, "--grid", "minmax", "--tune", "none"]
    code, _, noted = run(*command)
    assert code == 130
    assert "finished first; Ctrl-C once more ends at once" in noted
    assert "after encoder.block.1, expert group 1 of 1 (1 of 2 groups). Finished groups are kept: rerun" in noted
    events = [json.loads(line)["event"] for line in log.read_text().splitlines()]
    assert events == ["start", "group", "layer", "stopped"]
    assert len(list(groups._records(tmp_path / "out.partial" / "groups-0.log", 0))) == 1
    assert run(*command)[0] == 0
    assert everything_of(out) == everything_of(compressed[0])


def test_a_second_ctrl_c_ends_at_once_and_none_is_held_back_between_groups(capsys):
    reached = []

    def group():
        with _FinishedFirst():
            for press in (1, 2):
                signal.raise_signal(signal.SIGINT)
                reached.append(press)

    with pytest.raises(KeyboardInterrupt):
        group()
    assert reached == [1]
    assert capsys.readouterr().err.count("finished first") == 1
    with _FinishedFirst():
        pass
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_ignored_ctrl_c_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with _FinishedFirst():
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def flipped(data):
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]


@pytest.mark.parametrize(
    ("damage", "solved", "noted"),
    [(flipped, [1, 2, 3], True), (lambda data: data[:-1], [2, 3], False), (lambda data: data + b"abc", [3], False)],
    ids=["flipped", "half a record", "half a length"],
)
def test_groups_that_are_damaged_are_solved_again(tmp_path, switch, whole, solves, damage, solved, noted):
    """Of what was being written when a run was killed nothing is said."""
    settings, expected = whole("ternary")
    with pytest.raises(Killed):
        qm.compress(switch, tmp_path / "out", progress=stop_after(3), **settings)
    file = tmp_path / "out.partial" / "groups-0.log"
    file.write_bytes(damage(file.read_bytes()))
    solves.clear()
    report = qm.compress(switch, tmp_path / "out", **settings)
    assert [expert for stack, expert in solves if stack == "encoder"] == solved
    note = f"missing or damaged in unfinished work: {file}; groups of experts computed again"
    assert [line for line in report.degraded if "unfinished" in line] == [note] * noted
    found = everything_of(tmp_path / "out")
    assert {**found, "report": None} == {**expected, "report": None}


def test_groups_of_other_sizes_are_not_taken_for_these(tmp_path, switch, whole, solves):
    settings, expected = whole("ternary")
    with pytest.raises(Killed):
        qm.compress(switch, tmp_path / "out", progress=stop_after(3), **settings)
    solves.clear()
    qm.compress(switch, tmp_path / "out", **{**settings, "group_size": 2})
    assert [expert for stack, expert in solves if stack == "encoder"] == [0, 2]
    found = everything_of(tmp_path / "out")
    assert {**found, "report": None} == {**expected, "report": None}


def test_a_disk_that_fills_while_a_group_is_kept_is_one_line(tmp_path, switch, whole, monkeypatch):
    settings, expected = whole("ternary")
    append = groups._append

    def full(path, begin, record):
        if path.name == "groups-1.log" and begin:
            append(path, begin, record[:5])
            raise OSError(28, "No space left on device")
        append(path, begin, record)

    with monkeypatch.context() as patch:
        patch.setattr(groups, "_append", full)
        with pytest.raises(
            OutputError, match=r"groups-1.log cannot be written: No space left on device. Finished work"
        ):
            qm.compress(switch, tmp_path / "out", **settings)
    file = tmp_path / "out.partial" / "groups-1.log"
    assert len(list(groups._records(file, 0))) == 1
    assert [end for _, end in groups._records(file, 0)] == [file.stat().st_size]
    qm.compress(switch, tmp_path / "out", **settings)
    assert everything_of(tmp_path / "out") == expected


def test_a_run_that_ends_before_its_directory_has_its_name_only_gives_it(tmp_path, switch, whole, monkeypatch):
    settings, expected = whole("ternary")
    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.rename", lambda self, target: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            qm.compress(switch, tmp_path / "out", **settings)
    assert {path.name for path in (tmp_path / "out.partial").iterdir()} == {
        "state.json",
        "qmoe_report.json",
        *(name for name in expected if name != "report"),
    }
    for other in ("other", "older", "damaged"):
        shutil.copytree(tmp_path / "out.partial", tmp_path / f"{other}.partial")
    file = tmp_path / "damaged.partial" / "model-00001-of-00003.safetensors"
    file.write_bytes(flipped(file.read_bytes()))
    report = qm.compress(switch, tmp_path / "damaged", **settings)
    assert report.degraded[0].endswith(f"{file}; 1 of 2 finished layers computed again")
    assert {**everything_of(tmp_path / "damaged"), "report": None} == {**expected, "report": None}
    monkeypatch.setattr("qmoe_lite.compression.run.BlockRunner", None)
    report = qm.compress(switch, tmp_path / "out", **settings)
    assert everything_of(tmp_path / "out") == expected
    assert report.verdict is not None
    with pytest.raises(ResumeError, match=r"dampening is 0.2, and was 0.1. Use the same ones, or start over"):
        qm.compress(switch, tmp_path / "other", **{**settings, "dampening": 0.2})
    state = json.loads((tmp_path / "older.partial" / "state.json").read_text())
    (tmp_path / "older.partial" / "state.json").write_text(json.dumps({**state, "fingerprint": "0123abcd"}))
    with pytest.raises(ResumeError, match=r"or setting: it is of another version of qmoe-lite. Use"):
        qm.compress(switch, tmp_path / "older", **settings)


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"seed": 1}, "seed is 1, and was 0"),
        ({"grid": qm.MinMaxTernary()}, "grid is .*, and was .*bfloat16.*"),
        ({"samples": 23}, "samples is 23, and was 24"),
        ({"calibration": "other.txt"}, "the calibration text is another"),
        ({"model": "other"}, "the model's config.json is another"),
    ],
)
def test_the_setting_that_differs_is_named(tmp_path, switch, whole, monkeypatch, changes, difference):
    settings, _ = whole("ternary")
    begun = tmp_path / "out"
    with pytest.raises(Killed):
        qm.compress(switch, begun, progress=stop_after(1), **settings)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.txt").write_text(tiny.make_text(seed=1, words=4000), encoding="utf-8")
    model = switch
    if "model" in changes:
        model = shutil.copytree(switch, tmp_path / "other")
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, "dropout_rate": 0.2}))
    changed = {**settings, **{name: value for name, value in changes.items() if name != "model"}}
    with pytest.raises(ResumeError, match=f"of another model, text or setting: {difference}. Use the same ones"):
        qm.compress(model, begun, **changed)


KILLS = """
import os, random, signal, sys
os.environ |= {"NUMBA_THREADING_LAYER": "workqueue", "NUMBA_NUM_THREADS": "1"}  # which may be forked
import torch
import qmoe_lite as qm
from qmoe_lite.cli.compress_ import _FinishedFirst
from qmoe_lite.coding import dictionary
from qmoe_lite.compression import groups

model, text, place, seed, tests = sys.argv[1:]
sys.path.append(tests)
import sharing
sharing.fit_once(dictionary)
settings = {"samples": 24, "sequence_length": 32, "validation_samples": 2, "tune": "none", "group_size": 1, "rate": 2.0}
sync, append, calls, moment = os.fsync, groups._append, 0, None


def count():
    global calls
    calls += 1
    if calls == moment:
        os.kill(os.getpid(), signal.SIGKILL)


def counted(handle):  # of a file that has no name yet, or of a directory where one has got its name
    count()
    sync(handle)


def in_pieces(path, begin, record):
    count()
    with path.open("ab" if begin else "wb") as file:
        file.write(b"1234")
    count()
    append(path, begin, record)
    count()


def run(out, killed_at):
    global calls, moment
    child = os.fork()
    if child == 0:
        calls, moment = 0, killed_at
        qm.compress(model, out, calibration=text, **settings)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


torch.set_num_threads(1)
os.fsync, groups._append = counted, in_pieces
qm.compress(model, place + "/whole", calibration=text, **settings)  # here: the forks have its kernels
total = calls
draws = random.Random(int(seed))
moments = sorted(draws.sample(range(2, total), 5))
for number, moment in enumerate(moments):
    out = f"{place}/out{number}"
    assert run(out, moment) == -signal.SIGKILL, moment
    if number == 2:
        assert run(out, draws.randint(1, 4)) == -signal.SIGKILL
    assert run(out, None) == 0, moment
print(total, moments)
"""


@pytest.mark.slow
def test_killed_at_random_moments_and_resumed_the_files_are_the_same(tmp_path, forks, switch, text_file):
    done = forks.run(KILLS, switch, text_file, tmp_path, 11, Path(sharing.__file__).parent)
    assert done.returncode == 0, done.stderr
    expected = everything_of(tmp_path / "whole")
    for number in range(5):
        assert everything_of(tmp_path / f"out{number}") == expected, done.stdout
    assert not list(tmp_path.glob("*.partial"))
