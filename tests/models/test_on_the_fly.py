"""from_pretrained compresses a dense model that is given a QMoEConfig, as transformers' GPTQConfig does."""

from __future__ import annotations

import gc
import tempfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

import qmoe_lite as qm
from qmoe_lite.errors import CheckpointError, DeviceError, SettingError, TextError
from qmoe_lite.models import compressing

# as the fixtures' models
SMALL = {"samples": 24, "sequence_length": 32, "validation_samples": 2, "codeword_bits": 10, "tune": "none"}


def same_files(one: Path, other: Path) -> bool:
    names = [sorted(path.name for path in each.iterdir()) for each in (one, other)]
    compared = [name for name in names[0] if name != "qmoe_report.json"]  # it has the time in it
    return names[0] == names[1] and all((one / name).read_bytes() == (other / name).read_bytes() for name in compared)


def check(auto, model, written, directory):
    """The files that were written, and what is loaded of them, are those of `compress`."""
    assert same_files(written, directory)
    expected, found = auto.from_pretrained(directory), model.state_dict()
    assert expected.state_dict().keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.state_dict().items())
    assert model.config.to_dict()["quantization_config"] == expected.config.to_dict()["quantization_config"]
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.slow
def test_it_does_what_compress_does_and_without_out_the_files_go_with_the_model(
    switch, compressed, text_file, tmp_path, monkeypatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    settings = qm.QMoEConfig(dataset=[text_file.read_text()], grid=qm.MinMaxTernary(torch.bfloat16), **SMALL)
    model = AutoModelForSeq2SeqLM.from_pretrained(switch, quantization_config=settings)
    [written] = (tmp_path / "scratch").glob("qmoe-*/model")
    check(AutoModelForSeq2SeqLM, model, written, compressed[0])
    model.save_pretrained(tmp_path / "kept")
    del model
    gc.collect()
    assert not list((tmp_path / "scratch").glob("qmoe-*"))
    assert qm.load(tmp_path / "kept").config.quantization_config.quant_method == "qmoe"


@pytest.mark.slow
def test_with_out_they_stay_and_causal_models_come_in_any_dtype(causal, compressed_causal, text_file, tmp_path):
    dense, out = causal("mixtral"), tmp_path / "out"
    settings = qm.QMoEConfig(dataset=str(text_file), out=out, grid=qm.MinMaxTernary(torch.bfloat16), **SMALL)
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=settings)
    check(AutoModelForCausalLM, model, out, compressed_causal("mixtral"))
    settings = qm.QMoEConfig(dataset=str(text_file), out=tmp_path / "other", rate=2.0, **SMALL)
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=settings, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    qm.compress(dense, tmp_path / "direct", calibration=text_file, rate=2.0, **SMALL)
    assert same_files(tmp_path / "other", tmp_path / "direct")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"colour": 1}, SettingError, "has no setting colour; for a dense model it takes dataset, out and what qmoe"),
        ({"model": "a"}, SettingError, "has no setting model"),
        ({"rate": 9.0}, SettingError, "expected 0.6 to 4"),
        ({"dataset": "none.txt", "sequence_length": 32}, TextError, "none.txt does not exist"),
    ],
)
def test_what_compress_refuses_is_refused_and_leaves_nothing(switch, tmp_path, monkeypatch, settings, error, message):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(error, match=message):
        AutoModelForSeq2SeqLM.from_pretrained(switch, quantization_config=qm.QMoEConfig(**settings))
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_a_compressed_model_s_own_settings_compress_no_other(switch, compressed):
    settings = AutoModelForSeq2SeqLM.from_pretrained(compressed[0]).config.quantization_config
    with pytest.raises(SettingError, match="has no setting"):
        AutoModelForSeq2SeqLM.from_pretrained(switch, quantization_config=settings)


def test_a_device_that_is_refused_is_refused_before_the_work(switch):
    with pytest.raises(DeviceError, match="device_map asks for cuda"):
        AutoModelForSeq2SeqLM.from_pretrained(switch, quantization_config=qm.QMoEConfig(), device_map="cuda")


def test_another_revision_of_the_hub_is_not_mixed_with_the_main_one(switch, tmp_path, monkeypatch):
    model = AutoModelForSeq2SeqLM.from_pretrained(switch)
    model.config.name_or_path = "some/model"
    monkeypatch.setattr(compressing, "find_model", lambda name: tmp_path)
    with pytest.raises(
        CheckpointError, match=r"some/model was loaded from .*Compress the directory by qmoe_lite\.compr"
    ):
        compressing.compress_for(model, switch / "model.safetensors", {})
