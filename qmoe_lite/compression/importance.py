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

_TOKENS = 2048  # of an expert, that are looked at
_CHUNK = 512  # at a time


def importance_of(
    runner: ExpertRunner, layer: MoELayer, group: range, seen: LayerInputs, rows_of: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Return how much the outputs of a group's projections count.

    Parameters
    ----------
    runner : ExpertRunner
        Runs experts.
    layer : MoELayer
        Whose.
    group : range
        Its experts.
    seen : LayerInputs
        What they are given.
    rows_of : sequence of int64 tensor
        The tokens that enter each one's Hessian.

    Returns
    -------
    dict, projection to float32 tensor, shape (E, R)
        Mean square of what an error of 1 in an output becomes in the expert's output: the same for all outputs of the
        last projection, 0 in the first ones of an expert without tokens, or with some that overflow.
    """
    *names, last = layer.projections
    found = {name: torch.zeros(len(group), layer.shapes[name][0], device=runner.device) for name in names}
    found[last] = torch.ones(len(group), layer.shapes[last][0], device=runner.device)
    for place, (expert, rows) in enumerate(zip(group, rows_of, strict=True)):
        truth, few = runner.truth(layer, expert), draw(rows, _TOKENS, expert)
        met = truth[-1].weight.square().sum(dim=0)
        for part in torch.split(few, _CHUNK) if len(few) else ():
            passed = _derivatives(runner.gather(seen, part), truth[:-1])
            gates = runner.gates_of(seen, expert, part)[:, None]
            for name, each in zip(names, passed, strict=True):
                found[name][place] += (each * gates).square().sum(dim=0) * (met / len(few))
        for name in names:
            if not found[name][place].isfinite().all():
                found[name][place] = 0.0
    return found


def _derivatives(x: Tensor, first: list[Linear]) -> tuple[Tensor, ...]:
    """Return how the input of the last projection (N, C) follows its own output of each of the first ones."""
    with torch.inference_mode(False), torch.enable_grad():
        outputs = [matrix.of(x).clone().requires_grad_() for matrix in first]
        return torch.autograd.grad(inner(first[0].activation, outputs).sum(), outputs)
