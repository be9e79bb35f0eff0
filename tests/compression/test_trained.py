"""A trained model: what compression costs it, from the command line."""

from __future__ import annotations

import json

import pytest
from trained import train_qwen3_moe


@pytest.mark.slow
def test_on_a_trained_qwen3_moe_qmoe_loses_less_than_rounding(run, tmp_path):
    model = train_qwen3_moe(tmp_path / "model")
    text, held_out = model / "calibration.txt", model / "held_out.txt"
    length = ["--sequence-length", 64]
    code, printed, noted = run("compress", model, tmp_path / "qmoe", "--calibration", text, *length)
    assert code == 0, noted
    code, printed, noted = run("compress", model, tmp_path / "rtn", "--recipe", "nearest")
    assert code == 0, noted
    loss = {}
    for name in ("model", "qmoe", "rtn"):
        code, printed, noted = run("eval", tmp_path / name, "--text", held_out, *length, "--json")
        assert code == 0, noted
        loss[name] = json.loads(printed)["loss"]
    assert loss["model"] + 0.03 < loss["qmoe"], loss
    assert loss["qmoe"] + 0.03 < loss["rtn"], loss
