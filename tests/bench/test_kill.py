"""`python bench/kill.py`: what it compares, and what it takes for wrong."""

from __future__ import annotations

import json
import os

from qmoe_lite.bench.kill import FAILED, REFUSED, Runs, everything_of, where


def test_all_is_compared_but_the_time(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"abc")

    def with_report(bits, seconds, after=0.1):
        tuning = {"seconds": seconds / 2, "after": after}
        report = {"bits": bits, "seconds": seconds, "tuning_by_block": tuning}
        (tmp_path / "qmoe_report.json").write_text(json.dumps(report))
        return everything_of(tmp_path)

    before = with_report(2.0, 3.5)
    assert with_report(2.0, 4.5) == before
    assert with_report(2.1, 3.5) != before
    assert with_report(2.0, 3.5, after=0.2) != before


def ended_with(code):
    process = os.fork()
    if process == 0:
        os._exit(code)
    return process


def test_what_is_neither_done_nor_refused_in_one_line_is_wrong(tmp_path):
    runs = Runs(tmp_path, tmp_path, tmp_path)
    assert [runs.end(ended_with(code), "kind") for code in (0, REFUSED)] == [0, REFUSED]
    assert not runs.wrong
    runs.end(ended_with(FAILED), "kind")
    (tmp_path / "said").write_text("two\nlines")
    runs.end(ended_with(REFUSED), "kind")
    assert runs.wrong == ["kind: exit code 4: ", "kind: several lines: two\nlines"]


def test_how_far_unfinished_work_is(tmp_path):
    assert where(tmp_path / "out") == "nothing written"
    (tmp_path / "out.partial").mkdir()
    for name in ("model-00001-of-00002.safetensors", "groups-1.log", ".state.json.tmp"):
        (tmp_path / "out.partial" / name).write_bytes(b"123")
    assert where(tmp_path / "out") == "1 layers and 3 bytes of groups written"
