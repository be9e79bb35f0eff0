"""Loss and perplexity, against transformers' own loss."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import tiny
import torch
from tiny import dense_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, MixtralConfig

import qmoe_lite as qm
from qmoe_lite.compression import losses
from qmoe_lite.compression.calibration import make_samples, read_tokens
from qmoe_lite.compression.documents import read_text
from qmoe_lite.errors import SettingError
from qmoe_lite.text.evaluation import _BATCH_BYTES, _token_bytes, compare


def test_the_loss_is_the_mean_over_all_predicted_tokens(switch, tokenizer, text_file):
    model = dense_model(switch)
    tokens = read_tokens(read_text(text_file), tokenizer)
    samples = make_samples(tokens, tokenizer, seq2seq=True, count=None, sequence_length=32, seed=1, passes=2)
    with torch.no_grad():
        expected = model(
            input_ids=torch.from_numpy(samples.input_ids), labels=torch.from_numpy(samples.labels)
        ).loss.item()
    found = qm.evaluate(model, tokenizer, text_file, sequence_length=32, passes=2, batch_size=7)
    assert found.loss == pytest.approx(expected, rel=1e-5)
    assert found.tokens == samples.labels.size
    assert found.perplexity == pytest.approx(math.exp(expected), rel=1e-4)


def test_evaluation_drops_no_token_and_leaves_the_capacity_alone(switch, tokenizer, text_file):
    free = dense_model(switch)
    tight = dense_model(switch)
    routers = [m for m in tight.modules() if hasattr(m, "expert_capacity")]
    for router in routers:
        router.expert_capacity = 1
    settings = {"sequence_length": 32, "samples": 5}
    assert qm.evaluate(tight, tokenizer, text_file, **settings) == qm.evaluate(free, tokenizer, text_file, **settings)
    assert {router.expert_capacity for router in routers} == {1}


def causal_model(place, tokenizer, model_type="mixtral"):
    path = tiny.make_causal(place, tokenizer, model_type)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


class _Largest(TorchDispatchMode):
    """Remembers the largest tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        out = function(*arguments, **(options or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and not tensor._is_view():
                self.values = max(self.values, tensor.numel())
        return out


@pytest.mark.parametrize("model_type", ["mixtral", "gemma4_text", "granitemoe", "switch_transformers"])
def test_logits_are_made_a_slice_at_a_time(request, tokenizer, text_file, monkeypatch, model_type, tmp_path):
    if model_type == "switch_transformers":
        model = dense_model(request.getfixturevalue("switch"))
    else:
        model = causal_model(tmp_path / "model", tokenizer, model_type)
    settings = {"samples": 4, "sequence_length": 32}
    tokens = read_tokens(read_text(text_file), tokenizer)
    drawn = make_samples(
        tokens, tokenizer, seq2seq=model.config.is_encoder_decoder, count=4, sequence_length=32, seed=1
    )
    with torch.no_grad():
        labels = torch.from_numpy(drawn.input_ids if drawn.labels is None else drawn.labels)
        expected = model(input_ids=torch.from_numpy(drawn.input_ids), labels=labels).loss.item()
    monkeypatch.setattr(losses, "SLICE_VALUES", 3 * len(tokenizer))
    assert qm.evaluate(model, tokenizer, text_file, **settings).loss == pytest.approx(expected, rel=1e-5)


def test_memory_does_not_grow_with_the_vocabulary(tmp_path, tokenizer, text_file, monkeypatch):
    model = causal_model(tmp_path / "model", tokenizer)
    model.resize_token_embeddings(50_000)
    monkeypatch.setattr(losses, "SLICE_VALUES", 100_000)
    with _Largest() as largest:
        qm.evaluate(model, tokenizer, text_file, samples=4, sequence_length=64)
    assert largest.values <= 100_000


def test_the_default_batch_holds_a_few_hundred_megabytes():
    small, large = MixtralConfig(hidden_size=32, intermediate_size=64, num_attention_heads=4), MixtralConfig()
    assert 16 * 512 * _token_bytes(small, 512) <= _BATCH_BYTES
    assert 16 * 512 * _token_bytes(large, 512) > _BATCH_BYTES


def test_a_model_against_itself_and_against_another(tmp_path, tokenizer, text_file):
    model, other = (causal_model(tmp_path / name, tokenizer) for name in "ab")
    with torch.no_grad():
        other.lm_head.weight[3:9] += 0.2
    settings = {"samples": 6, "sequence_length": 32}
    same = compare(model, model, tokenizer, text_file, **settings)
    assert (same.gap.nats, same.agreement) == (0, 1)
    assert abs(same.divergence.nats) < 1e-7
    found = compare(model, other, tokenizer, text_file, **settings)
    assert found.model == qm.evaluate(model, tokenizer, text_file, **settings)
    assert found.reference == qm.evaluate(other, tokenizer, text_file, **settings)
    tokens = read_tokens(read_text(text_file), tokenizer)
    drawn = make_samples(tokens, tokenizer, seq2seq=False, count=6, sequence_length=32, seed=1)
    with torch.no_grad():
        ours, theirs = (
            each(torch.from_numpy(drawn.input_ids)).logits[:, :-1].log_softmax(-1) for each in (model, other)
        )
    assert found.divergence.nats == pytest.approx((theirs.exp() * (theirs - ours)).sum(-1).mean().item(), rel=1e-3)
    assert found.agreement == pytest.approx((ours.argmax(-1) == theirs.argmax(-1)).float().mean().item())
    assert found.gap.nats == pytest.approx(found.model.loss - found.reference.loss)
    assert found.divergence.standard_error > 0


def test_models_of_other_vocabularies_are_not_compared(tmp_path, tokenizer, text_file, switch):
    model = causal_model(tmp_path / "a", tokenizer)
    other = causal_model(tmp_path / "b", tokenizer)
    other.resize_token_embeddings(99)
    with pytest.raises(SettingError, match=f"among {len(tokenizer)} and 99 tokens"):
        compare(model, other, tokenizer, text_file)
    with pytest.raises(SettingError, match="encoder-decoder"):
        compare(model, dense_model(switch), tokenizer, text_file)
    with pytest.raises(SettingError, match="0 samples a batch"):
        qm.evaluate(model, tokenizer, text_file, batch_size=0)


def test_the_command_says_how_far_two_models_are_apart(run, tmp_path, switch, text_file):
    shutil.copytree(switch, tmp_path / "other")
    options = ["--text", text_file, "--sequence-length", 32, "--samples", 8, "--against", switch]
    code, printed, noted = run("eval", tmp_path / "other", *options)
    assert (code, noted) == (0, "")
    assert [line.split()[0] for line in printed.splitlines()] == ["loss", "against", "KL"]
    assert "+0.0000 +- 0.0000 nats a token" in printed
    assert "same likeliest token 100.00%" in printed
    code, printed, _ = run("eval", tmp_path / "other", *options, "--json")
    found = json.loads(printed)
    assert found["against"]["agreement"] == 1
    assert found["against"]["loss"] == found["loss"]
