"""A layer of experts by the CPU's kernels: many tokens in stretches, several experts in one call a product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from qmoe_lite.coding.matmul import Stack, decode_matmul, grouped_matmul
from qmoe_lite.coding.packed import PackedMatrix
from qmoe_lite.models.architecture import Joint
from qmoe_lite.models.blocks import MoELayer
from qmoe_lite.models.family import inner
from qmoe_lite.models.routing import Assignment

STRETCH = 4096  # routed tokens that go through a layer at a time, so that memory does not grow with a prompt


class _Product(torch.autograd.Function):
    """y = W x with a gradient for x: what trains around the experts, such as LoRA, sees through them."""

    @staticmethod
    def forward(ctx: Any, packed: PackedMatrix, x: Tensor) -> Tensor:
        ctx.packed = packed
        return decode_matmul(packed, x)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        (gradient,) = gradients
        return None, (gradient.float() @ ctx.packed.dense()).to(gradient.dtype)


def product(packed: PackedMatrix, x: Tensor) -> Tensor:
    """Multiply tokens, shape (T, C), by one matrix; with a gradient for them where one is asked for."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _Product.apply(packed, x)  # type: ignore[no-any-return,no-untyped-call]
    return decode_matmul(packed, x)  # type: ignore[no-any-return]


def run_stretches(
    run: Callable[[list[int], Tensor, list[int]], Tensor], hidden_states: Tensor, assigned: Assignment, experts: int
) -> Tensor:
    """Send each token through its experts, at most `STRETCH` routed tokens at a time.

    Parameters
    ----------
    run : callable
        Sends tokens[bounds[i] : bounds[i + 1]] through expert experts[i], given (experts, tokens, bounds).
    hidden_states : float tensor, shape (T, C)
        Tokens.
    assigned : Assignment
        Which expert gets which of them.
    experts : int
        Number of experts; a number beyond the last one means none, as -1 does.

    Returns
    -------
    float32 tensor, shape (T, C)
    """
    bounds = assigned.bounds[: experts + 1]
    out = torch.zeros(hidden_states.shape, dtype=torch.float32, device=hidden_states.device)
    for start in range(bounds[0], bounds[-1], STRETCH):
        stop = min(start + STRETCH, bounds[-1])
        clipped = [min(max(bound, start), stop) - start for bound in bounds]
        chosen = [expert for expert, (first, end) in enumerate(pairwise(clipped)) if first < end]
        ends = [*(clipped[expert] for expert in chosen), stop - start]
        rows, shares = assigned.rows[start:stop], assigned.weights[start:stop, None]
        out = out.index_add(0, rows, run(chosen, hidden_states[rows], ends) * shares)
    return out


def multiply(
    layer: MoELayer,
    activation: Callable[[Tensor], Tensor] | Joint,
    bias: Callable[[int, str], Tensor | None],
    stack: Callable[[str], Stack],
    experts: list[int],
    tokens: Tensor,
    bounds: list[int],
) -> Tensor:
    """Send tokens[bounds[i] : bounds[i + 1]] through the stacks' matrices experts[i]; in float32.

    Raises
    ------
    NotFiniteError
        As `grouped_matmul`.
    """
    first, (last,) = layer.stages
    tokens = tokens.to(torch.float32).contiguous()
    sizes = [end - start for start, end in pairwise(bounds)]
    outputs = grouped_matmul([stack(name) for name in first], tokens, experts, bounds)
    # an expert at a time: torch's activations round an element at a tensor's end otherwise than one in its middle
    parts = [_biased(torch.split(y, sizes), name, experts, bias) for y, name in zip(outputs, first, strict=True)]
    inside = torch.cat([inner(activation, group) for group in zip(*parts, strict=True)])
    y = grouped_matmul([stack(last)], inside, experts, bounds)[0]
    if layer.layout is None or not layer.layout.biased:
        return y
    return torch.cat(_biased(torch.split(y, sizes), last, experts, bias))


def _biased(
    parts: Sequence[Tensor], projection: str, experts: list[int], bias: Callable[[int, str], Tensor | None]
) -> list[Tensor]:
    """Return what a projection puts out of each expert, with the expert's bias."""
    added = [bias(expert, projection) for expert in experts]
    return [y if each is None else y + each for y, each in zip(parts, added, strict=True)]
