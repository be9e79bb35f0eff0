"""Tuning: factors of one change nothing, training brings the predictions nearer, and what is stored says it all."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from checks import bytes_of

import qmoe_lite as qm
from qmoe_lite.checkpoint.reader import Checkpoint
from qmoe_lite.coding.narrow import unpack_scales
from qmoe_lite.errors import BadResultError, CheckpointError, OutputError, SettingError, TextError
from qmoe_lite.inspection.verification import verify
from qmoe_lite.tuning.run import tune
from qmoe_lite.tuning.train import Tuner

SETTINGS = {"samples": 8, "sequence_length": 32, "epochs": 2, "learning_rate": 0.01}


@pytest.fixture(scope="session")
def rated(made_once, causal, text_file):
    """A compressed model with column scales."""
    given = {"samples": 16, "sequence_length": 32, "validation_samples": 2, "rate": 1.6, "tune": "none"}
    given["calibration"] = text_file
    return made_once("qwen3_moe-rated", lambda place: qm.compress(causal("qwen3_moe"), place, **given))


@pytest.fixture(scope="session")
def tuned(made_once, rated, causal, text_file):
    given = {"dense": causal("qwen3_moe"), "calibration": text_file}
    return made_once("qwen3_moe-tuned", lambda place: tune(rated, place, **given, **SETTINGS))


def logits(model):
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        return model(ids, use_cache=False).logits


@pytest.mark.parametrize("kind", ["rated", "ternary"])
def test_what_was_not_trained_computes_and_stores_the_same(kind, request, compressed_causal):
    directory = request.getfixturevalue("rated") if kind == "rated" else compressed_causal("qwen3_moe")
    model = qm.load(directory, dtype=torch.float32)
    expected = logits(model)
    tuner = Tuner(model)
    assert torch.allclose(logits(model), expected, atol=1e-5)
    checkpoint, stored = Checkpoint(directory), tuner.stored()
    assert any(name.endswith("_column_scales") for name in stored) == (kind == "rated")
    for name, tensor in stored.items():
        assert torch.equal(tensor.to(checkpoint.meta(name).dtype), checkpoint.tensor(name)), name


def test_a_tuned_model_is_nearer_and_as_large(rated, tuned, causal):
    report = json.loads((tuned / "qmoe_report.json").read_text())
    assert report["tuning"]["after"] < report["tuning"]["before"]
    assert report["verdict"]["gap"] == report["tuning"]["gap"]
    before, after = qm.load(rated, dtype=torch.float32), qm.load(tuned, dtype=torch.float32)
    assert not torch.allclose(logits(before), logits(after), atol=1e-4)
    assert not verify(tuned)
    sizes = [sum(file.stat().st_size for file in each.glob("*.safetensors")) for each in (rated, tuned)]
    assert sizes[0] == sizes[1]
    codes = [name for name in Checkpoint(rated).names if name.endswith("_codes")]
    assert codes
    for name in codes:
        assert torch.equal(Checkpoint(rated).tensor(name), Checkpoint(tuned).tensor(name))


def test_stored_factors_are_those_that_were_trained(rated):
    model = qm.load(rated, dtype=torch.float32)
    tuner = Tuner(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for experts in tuner.experts:
            for parameter in experts.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    trained = tuner.experts[0].rows["gate_proj"].detach().clone()
    name = tuner.experts[0].packed.layer.experts
    stack = tuner.experts[0].packed.stack("gate_proj")
    stored, rows, columns = tuner.stored(), tuner.experts[0].rows, tuner.experts[0].columns
    levels, scales = stored[f"{name}.gate_proj_levels"], stored[f"{name}.gate_proj_column_scales"]
    levels, scales = (unpack_scales(each, count) for each, count in zip((levels, scales), stack.shape, strict=True))
    exact = stack.held["levels"][:, :, 0].float() * rows["gate_proj"].exp()
    assert torch.equal(levels, exact.to(levels.dtype))
    assert torch.equal(scales, (stack.held["column_scales"].float() * columns["gate_proj"].exp()).to(scales.dtype))
    moved = (rows["gate_proj"] - trained).abs()  # to the nearest numbers that there are codes for
    assert moved.max() > 0
    assert moved.mean() < 0.03
    assert set(columns) == {"gate_proj", "down_proj"}


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes(rated, tuned, causal, text_file, tmp_path):
    tune(rated, tmp_path / "again", dense=causal("qwen3_moe"), calibration=text_file, **SETTINGS)
    for file in sorted(tuned.glob("*.safetensors*")):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name


@pytest.mark.slow
def test_an_encoder_decoder_is_tuned_too(compressed, switch, text_file, tmp_path):
    given = SETTINGS | {"learning_rate": 0.002}
    report = tune(compressed[0], tmp_path / "out", dense=switch, calibration=text_file, **given)
    assert report.after < report.before
    assert not verify(tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"epochs": 0}, SettingError, "at least 1"),
        ({"learning_rate": 0.5}, SettingError, "at most 0.1"),
        ({"dense": "rated"}, CheckpointError, "is compressed itself"),
        ({"dense": "mixtral"}, CheckpointError, "is another model"),
        ({"sequence_length": 100_000}, SettingError, "positions"),
        ({"calibration": ""}, TextError, "the name of the text is empty"),
    ],
    ids=["epochs", "rate", "compressed", "other", "window", "text"],
)
def test_bad_input_is_one_line_and_leaves_nothing(rated, causal, text_file, tmp_path, change, error, words):
    given = {"dense": causal("qwen3_moe"), "calibration": text_file, **SETTINGS} | change
    if given["dense"] == "rated":
        given["dense"] = rated
    elif given["dense"] == "mixtral":
        given["dense"] = causal("mixtral")
    with pytest.raises(error, match=words):
        tune(rated, tmp_path / "out", **given)
    assert not list(tmp_path.iterdir())


def test_what_is_not_compressed_and_what_exists_are_refused(causal, rated, text_file, tmp_path):
    given = {"dense": causal("qwen3_moe"), "calibration": text_file}
    with pytest.raises(CheckpointError, match="is not compressed by qmoe"):
        tune(causal("qwen3_moe"), tmp_path / "out", **given)
    (tmp_path / "begun.partial").mkdir()
    with pytest.raises(OutputError, match=r"begun\.partial exists: unfinished work"):
        tune(rated, tmp_path / "begun", **given, **SETTINGS)
    assert (tmp_path / "begun.partial").is_dir()
    (tmp_path / "there").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        tune(rated, tmp_path / "there", **given)


def test_training_that_wins_nothing_writes_nothing(rated, causal, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(Tuner, "train", lambda *_, **__: None)
    with pytest.raises(BadResultError, match="training won nothing"):
        tune(rated, tmp_path / "out", dense=causal("qwen3_moe"), calibration=text_file, **SETTINGS)
    assert not list(tmp_path.iterdir())


def test_a_model_with_other_files_keeps_them(rated, causal, text_file, tmp_path):
    shutil.copytree(rated, tmp_path / "in")
    (tmp_path / "in" / "README.md").write_text("kept\n")
    tune(tmp_path / "in", tmp_path / "out", dense=causal("qwen3_moe"), calibration=text_file, **SETTINGS)
    assert (tmp_path / "out" / "README.md").read_text() == "kept\n"
    assert {file.name for file in (tmp_path / "in").iterdir()} == {file.name for file in (tmp_path / "out").iterdir()}


def test_a_model_that_would_fill_the_gpu_is_tuned_on_the_cpu(monkeypatch, rated, tuned, causal, text_file, tmp_path):
    told = []
    monkeypatch.setattr("qmoe_lite.tuning.run.find_device", lambda device: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10_000, 20_000))
    given = {"dense": causal("qwen3_moe"), "calibration": text_file, "progress": told.append, **SETTINGS}
    report = tune(rated, tmp_path / "out", **given)
    assert report.device == "cpu"
    assert "GB are free on cuda:0: both models run on the CPU" in told[0].warning
    assert bytes_of(tmp_path / "out") == bytes_of(tuned)
