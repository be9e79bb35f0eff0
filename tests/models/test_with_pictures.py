"""Models that take pictures: their text model's experts are compressed, all else stays, and pictures still go in."""

from __future__ import annotations

import pytest
import tiny
import torch
from checks import layers_of, logits_of
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import qmoe_lite as qm
from qmoe_lite.checkpoint.reader import of_experts
from qmoe_lite.errors import CheckpointError
from qmoe_lite.models.skeletons import open_checkpoint
from qmoe_lite.offload import attach, runner_of

TERNARY = {
    "grid": qm.MinMaxTernary(torch.bfloat16),
    "samples": 12,
    "sequence_length": 16,
    "validation_samples": 2,
    "tune": "none",
    "codeword_bits": 10,
}


@pytest.fixture(autouse=True)
def _own_tokenizer(monkeypatch):
    monkeypatch.setattr("qmoe_lite.compression.run.open_tokenizer", lambda directory: tiny.make_tokenizer())


def picture(model_type: str) -> dict[str, torch.Tensor]:
    """A prompt with a picture of four patches in it."""
    if model_type in ("llama4", "step3p7"):  # make one of four, of sixteen
        size = 8 if model_type == "llama4" else 16
        pixels = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
        return {"input_ids": torch.tensor([[3, 4, 36, 5, 6, 7]]), "pixel_values": pixels}
    ids = torch.tensor([[3, 4, 38, 36, 36, 36, 36, 39, 5, 6, 7]])
    pixels = torch.randn(4, 3 * 4 * 4, generator=torch.Generator().manual_seed(0))
    grid, kinds = torch.tensor([[1, 2, 2]]), (ids == 36).int()
    return {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": kinds}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "own"),
    [
        pytest.param(each, own, marks=[pytest.mark.slow] if own else [])
        for each in sorted(tiny.WITH_PICTURES)
        for own in (False, True)
    ],
)
def test_text_and_pictures_give_what_the_dequantised_model_gives(tmp_path, tokenizer, text_file, model_type, own):
    source = tiny.make_with_pictures(tmp_path / "m", tokenizer, model_type)
    if own:
        model = AutoModelForImageTextToText.from_pretrained(source)
        model.save_pretrained(source, save_original_format=False)
    qm.compress(source, tmp_path / "out", calibration=text_file, **TERNARY)
    packed = qm.load(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(
        logits_of(packed), logits_of(AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32))
    )
    dense = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32).eval()
    before = logits_of(dense)
    tiny.fill_dense(dense, packed, layers_of(packed))
    expected = logits_of(dense)
    assert (logits_of(packed) - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert (before - expected).abs().max() > 1e-2 * expected.abs().max(), "experts matter"
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    if model_type != "gemma4":
        with torch.no_grad():
            expected, found = dense(**picture(model_type)).logits, packed(**picture(model_type)).logits
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
        given = {**picture(model_type), **options}
        assert torch.equal(packed.generate(**given), dense.generate(**given))
    ids = torch.randint(3, 15, (2, 9), generator=torch.Generator().manual_seed(1))
    assert torch.equal(packed.generate(ids, **options), dense.generate(ids, **options))
    before, after = (open_checkpoint(path)[1] for path in (source, tmp_path / "out"))
    dense = {name for name in before.names if not of_experts(name)}
    assert dense == {name for name in after.names if not of_experts(name)}
    assert all(torch.equal(after.tensor(name), before.tensor(name)) for name in dense)
    if model_type != "step3p7":  # whose files call experts otherwise, and hold the pictures' attention in one tensor
        kept = {k: v for k, v in load_file(source / "model.safetensors").items() if ".experts." not in k}
        written = {k: v for file in (tmp_path / "out").glob("*.safetensors") for k, v in load_file(file).items()}
        assert kept.keys() == {name for name in written if ".experts." not in name}
        assert all(torch.equal(written[name], tensor) for name, tensor in kept.items())
    assert [finding for finding in qm.verify(tmp_path / "out") if finding.severity == "error"] == []


def test_the_text_model_alone_of_llama_4_is_loaded(tmp_path, tokenizer):
    """As transformers does with a dense one, whose names have the text model's in front."""
    source = tiny.make_with_pictures(tmp_path / "m", tokenizer, "llama4")
    qm.compress(source, tmp_path / "out", recipe="nearest")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert type(model).__name__ == "Llama4ForCausalLM"
    expected = logits_of(qm.load(tmp_path / "out", dtype=torch.float32))
    assert torch.equal(logits_of(model), expected)
    attach(model, ram_cache="100KB", remember=False)
    assert torch.equal(logits_of(model), expected)
    runner_of(model).close()
    assert (logits_of(model.dequantize()) - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_the_text_model_alone_is_refused_by_the_class_that_loads_it(tmp_path, tokenizer):
    source = tiny.make_with_pictures(tmp_path / "m", tokenizer, "qwen3_5_moe")
    qm.compress(source, tmp_path / "out", recipe="nearest")
    with pytest.raises(CheckpointError, match="loaded by AutoModelForImageTextToText"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
