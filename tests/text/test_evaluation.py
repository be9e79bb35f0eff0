"""Loss and perplexity, against transformers' own loss."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import dense_model

import qmoe_lite as qm
from qmoe_lite.compression.calibration import make_samples, read_tokens
from qmoe_lite.compression.documents import read_text


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
