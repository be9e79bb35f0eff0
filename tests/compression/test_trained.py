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
    calibrated = ["compress", model, "--calibration", text, *length]
    ternary = [*calibrated[2:], "--grid", "minmax", "--tune", "none"]
    code, printed, noted = run(*calibrated[:2], tmp_path / "qmoe", *ternary)
    assert code == 0, noted
    rates = ("1.3", "2", "3")
    for rate in rates:
        code, printed, noted = run(*calibrated[:2], tmp_path / rate, *calibrated[2:], "--rate", rate)
        assert code == 0, noted
        assert noted.splitlines()[-1].startswith("qmoe: fine: held-out loss") or rate == "1.3"
    code, printed, noted = run("compress", model, tmp_path / "rtn", "--recipe", "nearest")
    assert code == 0, noted
    loss = {}
    for name in ("model", "qmoe", "rtn", *rates):
        code, printed, noted = run("eval", tmp_path / name, "--text", held_out, *length, "--json")
        assert code == 0, noted
        loss[name] = json.loads(printed)["loss"]
    assert loss["model"] + 0.03 < loss["qmoe"], loss
    assert loss["qmoe"] + 0.03 < loss["rtn"], loss
    assert loss["model"] < loss["3"] < loss["2"] < loss["1.3"] < loss["rtn"], loss
    assert loss["3"] - loss["model"] < 0.03 * (loss["rtn"] - loss["model"]), loss
