"""Families that are read off transformers' own model: from a tiny dense one to its codes, and back to logits."""

from __future__ import annotations

import shutil

import pytest
import tiny
import torch
from checks import bytes_of, layers_of, logits_of
from transformers import AutoModelForCausalLM

import qmoe_lite as qm
from qmoe_lite.compression.calibration import make_samples, read_tokens
from qmoe_lite.compression.documents import read_text
from qmoe_lite.offload import attach, runner_of
from qmoe_lite.offload.ram_tier import slot_layout

SMALL = {"samples": 12, "sequence_length": 16, "validation_samples": 2, "tune": "none"}
TERNARY = {"grid": qm.MinMaxTernary(torch.bfloat16), "codeword_bits": 10, **SMALL}
UNIFORM = {"grid": qm.UniformGrid(0.7, level_dtype=torch.bfloat16), **SMALL}
QUICK = {"deepseek_v32", "gpt_oss", "granitemoehybrid", "qwen3_next"}  # no two alike; each other one takes as long
TOKENS = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}


def each_of(families):
    return pytest.mark.parametrize(
        "model_type", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in sorted(families)]
    )


@pytest.fixture(autouse=True)
def _own_tokenizer(monkeypatch):
    """Some types have a tokenizer class of their own in transformers, which makes another one of tokenizer.json."""
    monkeypatch.setattr("qmoe_lite.compression.run.open_tokenizer", lambda directory: tiny.make_tokenizer())


def dense_of(source, packed=None):
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    if packed is not None:
        tiny.fill_dense(model, packed, layers_of(packed))
    return model


def loss_of(model, text_file, tokenizer):
    """Loss of the text's end, a token, as `compress` judges by it."""
    tokens = read_tokens(read_text(text_file), tokenizer, (12 + 2) * 16)[-2 * 16 :]
    ids = torch.from_numpy(make_samples(tokens, None, seq2seq=False, count=None, sequence_length=16, seed=0).input_ids)
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()


@pytest.mark.slow
@each_of(tiny.MORE)
def test_logits_tokens_and_losses_are_those_of_the_dequantised_model(
    tmp_path, causal, text_file, tokenizer, model_type
):
    source = causal(model_type)
    report = qm.compress(source, tmp_path / "out", calibration=text_file, **TERNARY)
    packed = qm.load(tmp_path / "out", dtype=torch.float32)
    original, dense = dense_of(source), dense_of(source, packed)
    expected = logits_of(dense)
    assert (logits_of(packed) - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert (logits_of(original) - expected).abs().max() > 1e-2 * expected.abs().max(), "experts matter"
    ids = torch.randint(3, 15, (2, 9), generator=torch.Generator().manual_seed(1))
    assert torch.equal(packed.generate(ids, **TOKENS), dense.generate(ids, **TOKENS))
    packed.save_pretrained(tmp_path / "again")
    assert torch.equal(logits_of(qm.load(tmp_path / "again", dtype=torch.float32)), logits_of(packed))
    assert [finding for finding in qm.verify(tmp_path / "out") if finding.severity == "error"] == []
    assert report.verdict["dense_loss"] == pytest.approx(loss_of(original, text_file, tokenizer), abs=2e-4)
    assert report.verdict["loss"] == pytest.approx(loss_of(dense, text_file, tokenizer), abs=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(tiny.MORE))
def test_uniform_digits_resume_and_run_within_a_quarter_of_the_experts(tmp_path, causal, text_file, model_type):
    source, settings = causal(model_type), {"calibration": text_file, "batch_size": 5, **UNIFORM}

    def copy(event):
        """What a run that is killed here leaves."""
        if event.done == 1:
            shutil.copytree(tmp_path / "whole.partial", tmp_path / "out.partial")

    qm.compress(source, tmp_path / "whole", progress=copy, **settings)
    events = []
    qm.compress(source, tmp_path / "out", progress=events.append, **settings)
    assert min(event.done for event in events) >= 1, "the run goes on from the copy"
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")
    packed = qm.load(tmp_path / "out", dtype=torch.float32)
    expected = logits_of(dense_of(source, packed))
    assert (logits_of(packed) - expected).abs().max() <= 1e-4 * expected.abs().max()
    ids = torch.randint(3, 15, (2, 9), generator=torch.Generator().manual_seed(1))
    tokens = packed.generate(ids, **TOKENS)
    probe = attach(packed, remember=False)
    experts = sum(layer.experts.num_experts for layer in probe._layers)
    budget = sum(layer.index_bytes for layer in probe._layers) + -(-experts // 4) * slot_layout(probe._layers)[1]
    probe.close()
    limited = qm.load(tmp_path / "out", dtype=torch.float32)
    attach(limited, ram_cache=budget, remember=False)
    try:
        assert torch.equal(limited.generate(ids, **TOKENS), tokens)
    finally:
        runner_of(limited).close()


@pytest.mark.slow
@each_of(tiny.MORE)
def test_both_of_transformers_layouts_are_read(tmp_path, causal, model_type):
    """As checkpoints were published, and as transformers itself holds a layer's experts."""
    source = causal(model_type)
    model = AutoModelForCausalLM.from_pretrained(source)
    model.save_pretrained(tmp_path / "own", save_original_format=False)
    written = [tmp_path / "a", tmp_path / "b"]
    for directory, out in zip((source, tmp_path / "own"), written, strict=True):
        qm.compress(directory, out, recipe="nearest")
    if bytes_of(written[0]) != bytes_of(written[1]):  # dense tensors too are named as they were published, or are not
        first, second = (qm.load(out, dtype=torch.float32) for out in written)
        assert torch.equal(logits_of(first), logits_of(second))
