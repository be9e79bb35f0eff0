"""The cache's bookkeeping against a slow one, and the threads that read experts."""

from __future__ import annotations

import errno
import math
import os
import resource
import threading

import naive
import numpy as np
import pytest

from qmoe_lite.bench._parts.offload import memory_now
from qmoe_lite.checkpoint.weight_file import PAGE, WeightFile, page_memory, room
from qmoe_lite.errors import CheckpointError, QMoEError
from qmoe_lite.offload.cache import ExpertCache, replay
from qmoe_lite.offload.readers import Read, Readers


@pytest.mark.parametrize("half_life", [0, 1])
@pytest.mark.parametrize("slots", [1, 2, 5, 11])
def test_hits_are_those_of_a_slow_cache(slots, half_life):
    rng = np.random.default_rng(slots)
    requests = [[int(expert)] for expert in rng.zipf(1.5, 45) % 12]  # 45 steps: sums of powers of 2 stay exact
    expected = naive.fading_cache(slots, half_life, requests)
    assert 0 < expected < len(requests)
    assert replay(12, slots, half_life, [[wanted] for wanted in requests]) == expected / len(requests)


def test_an_infinite_half_life_lets_the_least_used_go():
    cache, rng = ExpertCache(20, 6, math.inf), np.random.default_rng(0)
    for expert in rng.zipf(1.3, 400) % 20:
        cache.tick()
        cache.use(expert)
        if cache.slot(expert) < 0:
            held = [e for e in range(20) if cache.slot(e) >= 0]
            _, loser = cache.admit(expert)
            if loser >= 0:
                assert cache.uses[loser] == min(cache.uses[e] for e in held)
    assert len(cache) == 6


def test_the_three_policies_differ_on_one_trace():
    """An expert used often long ago, one used now and then, one used just now."""
    trace = [[[expert]] for expert in [0] * 6 + [1, 2] * 8 + [0]]
    hits = {half_life: round(len(trace) * replay(3, 2, half_life, trace)) for half_life in (0, 1, math.inf)}
    assert hits == {0: 5 + 14, 1: 5 + 14, math.inf: 5 + 3 + 1}  # 1 and 2 push each other out while 0 stays useless


def test_pinned_experts_keep_their_slots():
    cache = ExpertCache(5, 2)
    for expert in (0, 1):
        cache.use(expert)
        cache.admit(expert)
        cache.pin(expert)
    assert cache.admit(2) is None
    cache.pin(0)
    cache.unpin(0)
    assert cache.unpinned == 0, "pinned twice, unpinned once"
    cache.unpin(1)
    assert cache.admit(2) == (1, 1)
    assert [cache.slot(expert) for expert in range(3)] == [0, -1, 1]
    cache.drop(0)
    assert cache.admit(3) == (0, -1)
    with pytest.raises(AssertionError, match="without a slot"):
        cache.unpin(0)


def test_uses_of_an_earlier_run_decide_what_is_hottest():
    cache = ExpertCache(6, 3)
    cache.remember(np.array([0, 5, 1, 0, 9, 2], dtype=float))
    assert cache.hottest() == [4, 1, 5]
    cache.use(2)
    cache.use(2)
    assert cache.hottest() == [4, 1, 2]


@pytest.mark.parametrize("direct", [True, False])
def test_any_bytes_of_a_file_are_read(tmp_path, monkeypatch, direct):
    data = np.random.default_rng(0).integers(0, 256, 3 * PAGE + 77, dtype=np.uint8)
    (tmp_path / "file").write_bytes(data.tobytes())
    file = WeightFile(tmp_path / "file")
    file.direct = file.direct and direct
    memory = page_memory(room(len(data)))
    for offset, length in ((0, 1), (0, len(data)), (PAGE - 1, 2), (PAGE, PAGE), (77, 2 * PAGE), (len(data) - 5, 5)):
        memory[:] = 0x55
        start = file.read_into(memory[: room(length)], offset, length)
        assert memory[start : start + length].tobytes() == data[offset : offset + length].tobytes()
        assert bytes(file.read(offset, length)) == data[offset : offset + length].tobytes()
    for piece in (PAGE, 5000, 1 << 20):
        monkeypatch.setattr("qmoe_lite.checkpoint.weight_file._PIECE", piece)
        assert [bytes(p) for p in file.pieces(77, 2 * PAGE)] == [
            data[start : min(start + piece, 77 + 2 * PAGE)].tobytes() for start in range(77, 77 + 2 * PAGE, piece)
        ]
        assert b"".join(file.pieces(77, 2 * PAGE, memory)) == memory[: 2 * PAGE].tobytes()
        assert memory[: 2 * PAGE].tobytes() == data[77 : 77 + 2 * PAGE].tobytes()
        assert list(file.pieces(77, 0)) == []
    with pytest.raises(CheckpointError, match=f"has {len(data)} bytes of at least {len(data) + 1}: it was truncated"):
        file.read_into(memory, len(data) - 5, 6)
    file.close()


def test_files_that_cannot_be_opened_say_what_helps(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"expert")
    opened = os.open

    def direct_fails(number):
        def call(path, flags, *args):
            if flags & os.O_DIRECT:
                raise OSError(number, os.strerror(number))
            return opened(path, flags, *args)

        monkeypatch.setattr("os.open", call)

    for number in (errno.EINVAL, errno.EOPNOTSUPP):  # a file system without it
        direct_fails(number)
        file = WeightFile(tmp_path / "file")
        assert not file.direct
        assert bytes(file.read(0, 6)) == b"expert"
    for number in (errno.EMFILE, errno.EACCES, errno.EIO):
        direct_fails(number)
        with pytest.raises(CheckpointError, match=os.strerror(number)):
            WeightFile(tmp_path / "file")
    monkeypatch.undo()
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = set(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, before)) + 1, limit[1]))
    try:
        with pytest.raises(CheckpointError, match=r"Too many open files\. Raise the limit of open files: ulimit -n"):
            [WeightFile(tmp_path / "file") for _ in range(1000)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    assert set(os.listdir("/proc/self/fd")) <= before, "what was opened before the limit was met is closed"


def test_a_file_that_is_deleted_is_read_on(tmp_path):
    (tmp_path / "file").write_bytes(b"expert" * 1000)
    file = WeightFile(tmp_path / "file")
    (tmp_path / "file").unlink()
    file.check_size()
    assert bytes(file.read(6, 6)) == b"expert"
    with pytest.raises(CheckpointError, match="cannot be opened"):
        WeightFile(tmp_path / "file")
    file.close()


def test_a_file_that_is_cut_is_one_line(tmp_path):
    (tmp_path / "file").write_bytes(b"expert" * 1000)
    file = WeightFile(tmp_path / "file")
    os.truncate(tmp_path / "file", 100)
    with pytest.raises(CheckpointError, match="had 6000 bytes and now has 100"):
        file.check_size()
    with pytest.raises(CheckpointError, match="had 6000 bytes and now has 100"):
        file.read(90, 20)
    file.close()


def test_urgent_reads_come_first_and_cancelled_ones_never():
    order, gate, readers = [], threading.Event(), Readers(threads=1)

    def read(name, urgent):
        made = Read(lambda: order.append(name) or 1, urgent)
        readers.submit(made)
        return made

    first = Read(lambda: gate.wait() and 1, True)
    readers.submit(first)
    made = {name: read(name, urgent) for name, urgent in (("a", False), ("b", True), ("c", False), ("d", False))}
    assert readers.cancel(made["a"])
    readers.hurry(made["d"])
    gate.set()
    for one in (first, *(made[name] for name in "bcd")):
        readers.wait([one])
    assert order == ["b", "d", "c"]
    assert not readers.cancel(made["b"])
    readers.close()


def test_its_memory_counts_as_anonymous():
    before = memory_now("RssAnon")
    memory = page_memory(64 << 20)
    memory[:: PAGE // 2] = 1
    assert memory_now("RssAnon") - before > 60 << 20


@pytest.mark.slow
def test_a_forked_process_is_told_to_load_the_model(forks):
    """In a process of its own, which has no other threads."""
    code = """
import os
from qmoe_lite.offload.readers import Read, Readers
from qmoe_lite.errors import QMoEError
readers = Readers()
if os.fork() == 0:
    for call in (lambda: readers.submit(Read(lambda: 1, True)), lambda: readers.wait([])):
        try:
            call()
        except QMoEError as error:
            print(error, flush=True)
    readers.close()
    os._exit(0)
os.wait()
readers.close()
"""
    done = forks.run(code)
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done.stderr
    assert all("was forked" in line and "Load the model in it" in line for line in lines)


def test_closed_readers_take_nothing_back():
    gate, readers = threading.Event(), Readers(threads=1)
    reads = [Read(lambda: gate.wait() and 1, True), Read(lambda: 1, False), Read(lambda: 1, False)]
    for read in reads:
        readers.submit(read)
    ending = threading.Thread(target=readers.close)
    ending.start()
    while not readers.closed:
        pass
    readers.hurry(reads[1])
    assert not readers.cancel(reads[2])
    gate.set()
    ending.join()
    assert [read.done for read in reads[1:]] == [False, False]


def test_what_a_read_runs_into_is_kept():
    readers = Readers(threads=2)
    errors = [CheckpointError("file x was cut."), ZeroDivisionError("no")]

    def fail(error):
        raise error

    reads = [Read(lambda error=error: fail(error), True) for error in errors]
    for one in reads:
        readers.submit(one)
        readers.wait([one])
    assert reads[0].error is errors[0]
    assert isinstance(reads[1].error, QMoEError)
    assert "report this" in str(reads[1].error)
    readers.close()


def test_a_file_that_is_left_at_the_interpreter_s_end_is_closed(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"expert")
    before = set(os.listdir("/proc/self/fd"))
    file = WeightFile(tmp_path / "file")
    monkeypatch.setattr("qmoe_lite.checkpoint.weight_file.os", None)  # as modules are emptied then
    del file
    assert set(os.listdir("/proc/self/fd")) <= before
