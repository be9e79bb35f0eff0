"""Compressing and tuning as one run: what it leaves, and how it goes on when it was interrupted."""

from __future__ import annotations

import shutil
from contextlib import nullcontext

import pytest

import qmoe_lite as qm
from qmoe_lite.errors import BadResultError, OutputError, ResumeError, SettingError
from qmoe_lite.tuning import compressing
from qmoe_lite.tuning.compressing import compress_and_tune

SETTINGS = {"rate": 1.6, "samples": 8, "sequence_length": 32, "validation_samples": 2, "tune": "targets"}


@pytest.fixture
def asked(causal, text_file, monkeypatch, compressed_causal):
    """The arguments of a run whose compression copies a directory; how often it was called."""
    calls = []

    def compress(model, out, **given):
        calls.append(given)
        shutil.copytree(compressed_causal("qwen3_moe"), out)

    monkeypatch.setattr(compressing, "compress", compress)
    return {"model": causal("qwen3_moe"), "calibration": text_file, "epochs": 1, **SETTINGS}, calls


def names(folder):
    return sorted(each.name for each in folder.iterdir())


@pytest.mark.slow
def test_a_full_run_that_is_interrupted_while_it_tunes_goes_on_there_to_the_same_bytes(asked, tmp_path, monkeypatch):
    given, calls = asked

    def interrupt(*arguments, **settings):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(compressing, "tune", interrupt)
        with pytest.raises(KeyboardInterrupt):
            compress_and_tune(out=tmp_path / "out", **given, each_group=nullcontext())
    assert names(tmp_path) == ["out.untuned", "out.untuned.json"]
    with pytest.raises(ResumeError, match=r"out\.untuned was compressed with rate 1\.6, not 2"):
        compress_and_tune(out=tmp_path / "out", **given | {"rate": 2})
    report = compress_and_tune(out=tmp_path / "out", **given)
    assert names(tmp_path) == ["out"]
    assert len(calls) == 1
    assert (report.tuning["epochs"], report.tuning["samples"], report.tuning["sequence_length"]) == (1, 8, 32)
    assert report.tuning["after"] < report.tuning["before"]
    with pytest.raises(OutputError, match="exists already"):
        compress_and_tune(out=tmp_path / "out", **given)
    compress_and_tune(out=tmp_path / "at_once", **given)
    for file in sorted((tmp_path / "at_once").glob("*.safetensors*")):
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes(), file.name


def test_tuning_that_wins_nothing_leaves_what_was_compressed_and_says_so(asked, tmp_path, monkeypatch):
    given, calls = asked

    def lose(*arguments, **settings):
        raise BadResultError("nothing")

    monkeypatch.setattr(compressing, "tune", lose)
    (tmp_path / "out.untuned").mkdir()
    report = compress_and_tune(out=tmp_path / "out", **given, resume=False)
    assert report.degraded[-1] == "not tuned: training won nothing on the validation samples"
    assert report.tuning is None
    assert len(calls) == 1
    assert names(tmp_path) == ["out"]
    assert not qm.verify(tmp_path / "out")


def test_what_has_no_text_is_not_tuned(tmp_path):
    with pytest.raises(SettingError, match="tuning needs one"):
        compress_and_tune("m", tmp_path / "out", epochs=1, recipe="nearest")
