"""The log of a compression."""

from __future__ import annotations

import json

import pytest

import qmoe_lite as qm
from qmoe_lite.compression.telling import Teller


def read(log):
    return [json.loads(line) for line in log.read_text().splitlines()]


def test_each_event_is_a_line_and_an_interrupted_run_goes_on_in_the_same_log(tmp_path, switch):
    log = tmp_path / "out.log.jsonl"
    seen = []

    def interrupt(event):
        seen.append(event)
        if event.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        qm.compress(switch, tmp_path / "out", recipe="nearest", progress=interrupt, log=log)
    assert [event.done for event in seen] == [1, 2]
    assert [line["event"] for line in read(log)] == ["start", "group", "layer", "stopped"]
    assert read(log)[-1]["by"] == "KeyboardInterrupt"
    qm.compress(switch, tmp_path / "out", recipe="nearest", log=log)
    lines = read(log)
    assert [line["event"] for line in lines[4:]] == ["start", "group", "layer", "end"]
    assert [line["resumed"] for line in lines if line["event"] == "start"] == [0, 1]
    assert [line["done"] for line in lines if line["event"] == "group"] == [1, 2]
    assert lines[-3]["block"] == "decoder.block.1"
    assert lines[-3]["memory_bytes"] > 1e6
    assert sorted(line["time"] for line in lines) == [line["time"] for line in lines]
    qm.compress(switch, tmp_path / "other", recipe="nearest", log=log)
    assert len(read(log)) == 6, "the log of finished work is replaced"


def test_what_is_left_is_told_by_measured_groups(monkeypatch):
    clock = iter([0.0, 1.0, 3.0, 13.0, 18.0, 23.0, 24.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    events = []
    samples = []
    tell = Teller(events.append, None, samples.append)
    layer = type("Layer", (), {"block": "block.0", "experts": "block.0.experts"})()
    tell.begin(7, [3, 3])
    tell.started([])
    group_done = tell.layer(0, layer, 300)  # 2 s for the dense part
    group_done(1, None, True)  # 10 s
    group_done(2, 0.5, True)  # 5 s
    assert samples == [7]
    assert [event.seconds_left for event in events] == [5 * 10 + 2, 4 * 5 + 2]
    assert events[0].tokens_per_second == 10
    assert [event.held_out_error for event in events] == [None, 0.5]


def test_a_log_that_cannot_be_written_ends_no_run(tmp_path, switch):
    qm.compress(switch, tmp_path / "out", recipe="nearest", log=tmp_path / "none" / "log")
    assert (tmp_path / "out").is_dir()
