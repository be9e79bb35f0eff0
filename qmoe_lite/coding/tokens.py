"""Which experts tokens go through, counted without waiting for the GPU that knows."""

from __future__ import annotations

import torch
from torch import Tensor


def known_experts(index: Tensor, experts: int) -> Tensor:
    """Return the experts' numbers, int64 and flat; `experts` stands for any that is no expert's."""
    flat = index.reshape(-1).long()
    return torch.where((flat >= 0) & (flat < experts), flat, experts)


def count_tokens(index: Tensor, experts: int) -> Tensor:
    """Return how many elements of an integer tensor name each expert, int64 (experts + 1,); last those that name none.

    `index` may be of any shape.
    """
    flat = known_experts(index, experts)
    counts = torch.zeros(experts + 1, dtype=torch.int64, device=index.device)
    return counts.scatter_add_(0, flat, torch.ones_like(flat))
