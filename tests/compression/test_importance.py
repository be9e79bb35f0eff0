"""How much errors in outputs count: against errors that are made on purpose, one output at a time."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import silu

from qmoe_lite.compression.importance import importance_of
from qmoe_lite.compression.layer_parts import Linear

ROWS, COLUMNS, TOKENS = 5, 7, 40
SMALL = 1e-5


class Runner:
    """One expert of random matrices, and its tokens."""

    device = torch.device("cpu")

    def __init__(self, first, activation):
        generator = torch.Generator().manual_seed(first)
        shapes = [(ROWS, COLUMNS)] * first + [(3, ROWS)]
        weights = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        self.matrices = [Linear(weight, torch.ones(len(weight), dtype=torch.float64), activation) for weight in weights]
        self.x = torch.randn(TOKENS, COLUMNS, generator=generator, dtype=torch.float64)
        self.gates = torch.rand(TOKENS, generator=generator)

    def truth(self, layer, expert):
        return self.matrices

    def gather(self, seen, rows):
        return self.x[rows]

    def gates_of(self, seen, expert, rows):
        return self.gates[rows]


def outputs(runner, place=None, row=None):
    """Return what the expert adds to the hidden states, with an error in one output of one projection."""
    first = [matrix.of(runner.x) for matrix in runner.matrices[:-1]]
    if place is not None:
        first[place][:, row] += SMALL
    inside = runner.matrices[0].activation(first[0])
    for other in first[1:]:
        inside = inside * other
    return runner.matrices[-1].of(inside) * runner.gates[:, None]


@pytest.mark.parametrize(("names", "activation"), [(("gate", "up", "down"), silu), (("wi", "wo"), torch.relu)])
def test_it_is_what_an_error_becomes(names, activation):
    runner = Runner(len(names) - 1, activation)
    layer = SimpleNamespace(projections=names, shapes=dict.fromkeys(names, (ROWS, COLUMNS)) | {names[-1]: (3, ROWS)})
    with torch.inference_mode():
        found = importance_of(runner, layer, range(4, 5), None, [torch.arange(TOKENS)])
    for place, name in enumerate(names[:-1]):
        moved = [(outputs(runner, place, row) - outputs(runner)) / SMALL for row in range(ROWS)]
        expected = torch.stack([each.square().sum(dim=1).mean() for each in moved])
        expected = (TOKENS * expected + expected.mean()) / (TOKENS + 1)  # of one more token they count alike
        torch.testing.assert_close(found[name][0].double(), expected, rtol=1e-3, atol=1e-9)
    assert torch.equal(found[names[-1]], torch.ones(1, 3))


def test_without_tokens_or_beyond_all_numbers_all_outputs_count_alike():
    runner = Runner(1, torch.relu)
    layer = SimpleNamespace(projections=("wi", "wo"), shapes={"wi": (ROWS, COLUMNS), "wo": (3, ROWS)})
    assert not importance_of(runner, layer, range(1), None, [torch.arange(0)])["wi"].any()
    runner.matrices[1].weight[:] = torch.inf
    assert not importance_of(runner, layer, range(1), None, [torch.arange(TOKENS)])["wi"].any()


def test_an_output_that_few_tokens_are_without_is_not_given_up():
    """A neuron that one token has off counts half as much as it would if all were on as often: not nothing."""
    runner = Runner(1, torch.relu)
    layer = SimpleNamespace(projections=("wi", "wo"), shapes={"wi": (ROWS, COLUMNS), "wo": (3, ROWS)})
    found = importance_of(runner, layer, range(1), None, [torch.arange(1)])["wi"][0]
    on = runner.matrices[0].of(runner.x[:1])[0] > 0
    assert 0 < on.sum() < ROWS
    torch.testing.assert_close(found[~on], (found.mean() / 2).expand(int((~on).sum())))
    assert (found[on] > found.mean() / 2).all()
