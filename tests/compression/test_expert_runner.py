"""Experts are run as they were when their Hessians were made: what is worked out once is what each would work out."""

from __future__ import annotations

import dataclasses

import naive
import pytest
import torch

from qmoe_lite.compression import expert_runner, layer_parts
from qmoe_lite.compression.expert_runner import ExpertRunner
from qmoe_lite.compression.layer_parts import LayerInputs
from qmoe_lite.compression.list_buffer import ListBuffer
from qmoe_lite.compression.settings import Settings
from qmoe_lite.models.blocks import MoELayer
from qmoe_lite.models.building import read_config
from qmoe_lite.models.routing import Assignment
from qmoe_lite.models.skeletons import open_checkpoint

SHAPES = {"gate_proj": (24, 32), "up_proj": (24, 32), "down_proj": (32, 24)}
TOKENS = 90


class Drawn:
    """Stands for a checkpoint."""

    def __init__(self):
        self.of = {name: torch.randn(shape) / 8 for name, shape in SHAPES.items()}

    def tensor(self, name):
        return self.of[name.split(".")[-2]]


@pytest.fixture
def runner(causal):
    torch.manual_seed(0)
    model = causal("qwen3_moe")
    return ExpertRunner(open_checkpoint(model)[0], read_config(str(model)), Drawn(), Settings())


def seen_by(experts):
    """Return inputs of which some tokens ride along, some go through the dense experts, and some enter no Hessian."""
    inputs, outputs = ListBuffer(1, TOKENS, 32), ListBuffer(1, TOKENS, 32)
    inputs.rows.normal_(generator=torch.Generator().manual_seed(1))
    outputs.zero()
    place, gates = torch.arange(TOKENS), torch.linspace(0.5, 1.5, TOKENS)[:, None]
    assigned = Assignment.group(place[:, None] % experts, gates, experts)
    flags = (place < 70) & (place % 7 > 0), (place >= 70) & (place < 80), place >= 80
    return LayerInputs(inputs, assigned, *flags, inputs.rows[:20], outputs)


@pytest.mark.parametrize(
    ("chunk", "kept_bytes", "kept"), [(1 << 14, 1 << 28, [0]), (16, 4 * 24 * 20, [0]), (16, 1, [])]
)
def test_a_hessian_and_outputs_share_what_is_in_front_of_the_last_projection(
    runner, monkeypatch, chunk, kept_bytes, kept
):
    runner.chunk = chunk
    monkeypatch.setattr(expert_runner, "GATHERED_TOKENS", 2 * chunk)
    monkeypatch.setattr(expert_runner, "KEPT_BYTES", kept_bytes)
    layer, seen, other = MoELayer("model.layers.0.mlp.experts", "drawn", 2, SHAPES), seen_by(2), seen_by(2)
    weights = {name: runner._weights(layer, 1, name) + 0.01 for name in SHAPES}
    before = runner.linears(layer, 1, {name: weights[name] for name in ("gate_proj", "up_proj")})
    rows, _ = seen.assigned.of_expert(1)
    drawn = rows[seen.eligible[rows]]
    for few in (False, True):
        expected = runner._hessians(seen, [drawn], [before], [few], 24)
        hessian, found = runner._hessian_and_inner(seen, 1, drawn, before, few, 24)
        assert list(found) == kept
        torch.testing.assert_close(hessian, expected, rtol=1e-5, atol=1e-6)
    once = runner.run(layer, 1, weights, seen, found)
    assert not found
    anew = runner.run(layer, 1, weights, other)
    assert once.tolist() == anew.tolist()
    assert once[0] > 0
    assert torch.equal(seen.hidden.rows, other.hidden.rows)
    assert seen.hidden.rows[rows].any(dim=1).all()


@pytest.mark.parametrize(
    ("tokens", "taken"), [(20, range(20)), (96, range(0, 96, 2)), (100, [i * 100 // 48 for i in range(48)]), (0, [])]
)
def test_of_the_layer_s_sample_a_last_projection_takes_two_tokens_a_column(runner, tokens, taken):
    layer, sample = MoELayer("model.layers.0.mlp.experts", "drawn", 2, SHAPES), torch.randn(tokens, 32)
    seen = dataclasses.replace(seen_by(2), sample=sample)
    before = runner.truth(layer, 1)[:-1]
    h = runner.inner(sample[list(taken)], before)
    expected = torch.from_numpy(naive.gram(h)).float() / max(len(h), 1)
    torch.testing.assert_close(runner._of_layer(seen, before, 24), expected, rtol=1e-4, atol=1e-5)
    first = torch.from_numpy(naive.gram(sample)).float() / max(tokens, 1)
    torch.testing.assert_close(runner._of_layer(seen, [], 32), first, rtol=1e-4, atol=1e-5)


def test_squares_of_many_outputs_are_summed_in_float64(monkeypatch):
    monkeypatch.setattr(layer_parts, "_COMPARED", 100)
    outputs, dense = torch.randn(37, 29), torch.randn(37, 29)
    expected = [part.double().square().sum().item() for part in (outputs - dense, outputs, dense)]
    assert layer_parts.compared(outputs, dense).tolist() == pytest.approx(expected, rel=1e-12)
    some, aims = outputs[:, ::2], dense[:, ::2]
    assert layer_parts.compared(some, aims)[1] == pytest.approx(some.double().square().sum().item())
    assert layer_parts.compared(outputs[:0], dense[:0]).tolist() == [0, 0, 0]


def test_products_in_bfloat16_round_operands_and_sums(runner):
    """Sums over columns are exact enough to be rounded once, to 8 bits."""
    layer, seen = MoELayer("model.layers.0.mlp.experts", "drawn", 2, SHAPES), seen_by(2)
    runner._settings = Settings(products="bfloat16")
    x = runner.gather(seen, torch.arange(40))
    for matrix in runner.truth(layer, 0):
        rows = x[:, : matrix.weight.shape[1]]
        exact = rows.bfloat16().double() @ matrix.weight.bfloat16().double().T
        found = matrix.of(rows)
        assert found.dtype == matrix.weight.dtype == torch.float32
        torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-6)
        assert not torch.equal(found, rows @ matrix.weight.T)
