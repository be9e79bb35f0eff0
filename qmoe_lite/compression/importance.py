"""How much an error in each output of an expert's projections counts: what rows' steps follow besides their weights.

To first order an error in one output of a first projection is passed on times the activation's derivative, the gate and
the column of the last projection that it meets: little where a neuron is seldom on, or where others make little of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qmoe_lite.compression.expert_runner import ExpertRunner
from qmoe_lite.compression.layer_parts import LayerInputs, Linear, draw
from qmoe_lite.models.blocks import MoELayer
from qmoe_lite.models.family import inner

TOKENS = 512  # of an expert, that are looked at: more hardly change a step


def importance_of(
    runner: ExpertRunner, layer: MoELayer, group: Sequence[int], seen: LayerInputs, rows_of: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Return how much the outputs of a group's projections count.

    Parameters
    ----------
    runner : ExpertRunner
        Runs experts.
    layer : MoELayer
        Whose.
    group : sequence of int
        Its experts.
    seen : LayerInputs
        What they are given.
    rows_of : sequence of int64 tensor
        The tokens that enter each one's Hessian.

    Returns
    -------
    dict, projection to float32 tensor, shape (E, R)
        Mean square of what an error of 1 in an output becomes in the expert's output, over its tokens and one more for
        which all outputs of a projection count alike. The same for all outputs of the last projection; 0 in the first
        ones of an expert without tokens, or with some that overflow.
    """
    *names, last = layer.projections
    found = {name: torch.zeros(len(group), layer.shapes[name][0], device=runner.device) for name in names}
    found[last] = torch.ones(len(group), layer.shapes[last][0], device=runner.device)
    for place, (expert, rows) in enumerate(zip(group, rows_of, strict=True)):
        if not len(rows):
            continue
        counts = _of_expert(runner, layer, expert, seen, draw(rows, TOKENS, expert))
        for name, each in zip(names, counts, strict=True):
            found[name][place] = torch.where(each.isfinite().all(), each, 0.0)
    return found


def _of_expert(runner: ExpertRunner, layer: MoELayer, expert: int, seen: LayerInputs, rows: Tensor) -> list[Tensor]:
    """Return how much the outputs of an expert's first projections count, each (R,), by some of its tokens.

    By a few alone neurons that are often on may seem to be always off, and lose their digits.
    """
    *first, last = runner.truth(layer, expert)
    passed, gates = _derivatives(runner.gather(seen, rows), first), runner.gates_of(seen, expert, rows)[:, None]
    met, tokens = last.weight.square().sum(dim=0), len(rows)
    sums = [(each * gates).square().sum(dim=0) * met for each in passed]
    return [(each + each.mean() / tokens) / (tokens + 1) for each in sums]


def _derivatives(x: Tensor, first: list[Linear]) -> tuple[Tensor, ...]:
    """Return how the input of the last projection (N, C) follows its own output of each of the first ones."""
    with torch.inference_mode(False), torch.enable_grad():
        outputs = [matrix.of(x).requires_grad_() for matrix in first]
        return torch.autograd.grad(inner(first[0].activation, outputs).sum(), outputs)
