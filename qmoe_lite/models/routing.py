"""Which tokens each expert of a layer gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def in_order(routing: Sequence[Tensor], named: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """Return the routing arguments of an experts module, some of which may have been given by transformers' names.

    Raises
    ------
    TypeError
        Another name.
    """
    known = [named[name] for name in ("top_k_index", "top_k_weights") if name in named]
    if len(known) < len(named):
        raise TypeError(f"experts are given {', '.join(named)}; expected top_k_index and top_k_weights")
    return (*routing, *known)


@dataclass(frozen=True)
class Assignment:
    """Which tokens each expert gets.

    Attributes
    ----------
    rows : int64 tensor
        Row numbers of the tokens, grouped by expert, ascending within an expert.
    weights : float32 tensor
        Routing weight of each of them.
    bounds : list of int, length experts + 1
        Expert e owns entries [bounds[e], bounds[e + 1]).
    """

    rows: Tensor
    weights: Tensor
    bounds: list[int]

    @classmethod
    def group(cls, top_k_index: Tensor, top_k_weights: Tensor, experts: int) -> Assignment:
        """Group tokens by expert.

        Parameters
        ----------
        top_k_index : integer tensor, shape (T, K)
            Experts of each token; -1 where a token was dropped.
        top_k_weights : float tensor, shape (T, K)
            What each expert's output is multiplied by.
        experts : int
            Number of experts.
        """
        flat = top_k_index.reshape(-1).long()
        order = torch.argsort(flat, stable=True)
        counts = torch.bincount(flat + 1, minlength=experts + 1)
        bounds = torch.cumsum(counts, 0).tolist()
        rows = torch.div(order, top_k_index.shape[1], rounding_mode="floor")
        return cls(rows, top_k_weights.reshape(-1)[order].float(), bounds)

    def without(self, left_out: Tensor) -> Assignment:
        """Leave out some tokens; `left_out` is bool, a value a row number."""
        kept = ~left_out[self.rows]
        before = torch.nn.functional.pad(torch.cumsum(kept, 0), (1, 0))  # entries that are kept of the first ones
        return Assignment(self.rows[kept], self.weights[kept], before[self.bounds].tolist())

    def of_expert(self, expert: int) -> tuple[Tensor, Tensor]:
        """Row numbers and routing weights of one expert's tokens."""
        span = slice(self.bounds[expert], self.bounds[expert + 1])
        return self.rows[span], self.weights[span]
