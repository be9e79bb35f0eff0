"""Whole compressions on a GPU beside the CPU's: targets, tuning, sensitivity, and a run that goes on. No conftest.

Sums in another order flip a digit here and there, and later layers see it: figures are close, never equal. Where there
is no GPU, one is pretended: nothing may be left on the other device.
"""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import tiny
import torch
from checks import Killed, bytes_of
from pretend_gpu import pretended

import qmoe_lite as qm
from qmoe_lite.compression.shares import Sensitivity
from qmoe_lite.cuda import launch
from qmoe_lite.inspection.verification import verify

DEVICE = "cuda:0"
WIDE = {"hidden_size": 64, "moe_intermediate_size": 96, "num_hidden_layers": 2}
SETTINGS = {"samples": 48, "sequence_length": 32, "validation_samples": 8, "rate": 2.0}


@pytest.fixture(autouse=True)
def device(monkeypatch):
    with nullcontext() if launch.available() else pretended(monkeypatch):
        yield


@pytest.fixture(scope="module", params=["qwen3_moe", "switch_transformers"])
def made(request, tmp_path_factory):
    """A small random model of a family, and the settings to compress it with."""
    path, tokenizer = tmp_path_factory.mktemp(request.param), tiny.make_tokenizer()
    (path / "text.txt").write_text(tiny.make_text(0, 4000), encoding="utf-8")
    if request.param == "switch_transformers":
        model = tiny.make_switch(path / "model", tokenizer)
    else:
        model = tiny.make_causal(path / "model", tokenizer, request.param, **WIDE)
    return model, SETTINGS | {"calibration": path / "text.txt"}


@pytest.mark.skipif(launch.available(), reason="of the pretended GPU alone")
@pytest.mark.parametrize(
    "mixed",
    [
        lambda gpu, cpu: gpu + cpu,
        lambda gpu, cpu: torch.nn.functional.linear(gpu, cpu),
        lambda gpu, cpu: torch.cat([gpu, cpu]),
        lambda gpu, cpu: torch.stack([gpu[0, 0], cpu[0, 0]]),
        lambda gpu, cpu: cpu[gpu > 0],
        lambda gpu, cpu: gpu.__setitem__(torch.tensor([0, 1]), cpu),
        lambda gpu, cpu: gpu.index_put_((torch.tensor([0, 1]),), cpu),
        lambda gpu, cpu: gpu.normal_(generator=torch.Generator()),
        lambda gpu, cpu: gpu.numpy(),
        lambda gpu, cpu: np.asarray(gpu),
    ],
)
def test_what_a_gpu_refuses_is_refused(mixed):
    cpu = torch.ones(2, 2)
    gpu = cpu.to(DEVICE)
    gpu[:] = cpu
    assert torch.equal((gpu * 2.0 + cpu[0, 0])[torch.tensor([0])].cpu(), torch.full((1, 2), 3.0))
    assert gpu.device == torch.zeros(1, device=DEVICE).device != cpu.device == gpu.cpu().device
    with pytest.raises((RuntimeError, TypeError)):
        mixed(gpu, cpu)


def assert_alike(found, expected):
    """Compare two reports: bits, what layers lose, and both models' losses."""
    assert found.bits_per_weight == pytest.approx(expected.bits_per_weight, rel=0.01)
    assert found.held_out_error == pytest.approx(expected.held_out_error, rel=0.3)
    assert found.verdict["dense_loss"] == pytest.approx(expected.verdict["dense_loss"], abs=1e-3)
    error = sum(each.verdict["standard_error"] for each in (found, expected))
    assert found.verdict["gap"] == pytest.approx(expected.verdict["gap"], abs=3 * error)


@pytest.mark.slow
@pytest.mark.parametrize("tune", ["none", "targets", "block"])
def test_a_compression_is_the_cpu_s(made, tmp_path, tune):
    model, given = made
    expected = qm.compress(model, tmp_path / "cpu", device="cpu", tune=tune, **given)
    found = qm.compress(model, tmp_path / "gpu", device=DEVICE, tune=tune, **given)
    assert_alike(found, expected)
    assert not verify(tmp_path / "gpu")
    if tune != "none":
        for at in ("before", "after"):
            assert found.tuning_by_block[at] == pytest.approx(expected.tuning_by_block[at], rel=0.1)


@pytest.mark.slow
def test_products_in_bfloat16_lose_no_more(made, tmp_path):
    model, given = made
    expected = qm.compress(model, tmp_path / "float32", device=DEVICE, **given)
    found = qm.compress(model, tmp_path / "bfloat16", device=DEVICE, products="bfloat16", **given)
    assert_alike(found, expected)


def test_sensitivity_is_the_cpu_s(made):
    model, given = made
    own = {"calibration": given["calibration"], "sequence_length": 32}
    found, expected = (qm.sensitivity(model, device=device, **own) for device in (DEVICE, "cpu"))
    assert found.tokens == expected.tokens
    assert found.layers == pytest.approx(expected.layers, rel=0.1)


@pytest.mark.slow
def test_bits_are_shared_out_by_sensitivity(made, tmp_path):
    model, given = made
    own = qm.sensitivity(model, device=DEVICE, calibration=given["calibration"], sequence_length=32)
    uneven = {name: 0.04 / 4**number for number, name in enumerate(own.layers)}
    shared = Sensitivity(own.rate, own.tokens, uneven)
    expected = qm.compress(model, tmp_path / "cpu", device="cpu", sensitivity=shared, **given)
    found = qm.compress(model, tmp_path / "gpu", device=DEVICE, sensitivity=shared, **given)
    assert_alike(found, expected)


@pytest.mark.slow
def test_the_whole_model_is_tuned_as_on_the_cpu(made, tmp_path):
    model, given = made
    qm.compress(model, tmp_path / "out", device=DEVICE, **given | {"rate": 1.2, "tune": "none"})
    own = {"dense": model, "calibration": given["calibration"], "samples": 16, "sequence_length": 32, "epochs": 2}
    own["learning_rate"] = 0.01
    expected = qm.tune(tmp_path / "out", tmp_path / "cpu", device="cpu", **own)
    found = qm.tune(tmp_path / "out", tmp_path / "gpu", device=DEVICE, **own)
    assert (found.device, expected.device) == (DEVICE, "cpu")
    assert found.before == pytest.approx(expected.before, rel=0.02)
    assert found.after == pytest.approx(expected.after, rel=0.1)


@pytest.mark.slow
def test_a_run_that_was_killed_ends_with_the_same_bytes(made, tmp_path):
    model, given = made

    def kill(event):
        if event.done == 1:
            raise Killed

    given = given | {"device": DEVICE, "tune": "block", "group_bytes": 1 << 16}
    with pytest.raises(Killed):
        qm.compress(model, tmp_path / "killed", progress=kill, **given)
    for name in ("killed", "whole"):
        qm.compress(model, tmp_path / name, **given)
    found, expected = (bytes_of(tmp_path / name) for name in ("killed", "whole"))
    assert found == expected
