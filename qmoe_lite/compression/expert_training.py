"""Training of one expert's factors, one for each row and column, while its digits stay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qmoe_lite.compression.layer_parts import Linear
from qmoe_lite.compression.schedule import BETAS, share_of_rate
from qmoe_lite.models.blocks import MoELayer
from qmoe_lite.models.family import inner

EPOCHS, BATCH = 1, 64  # how often a token is seen, and tokens a step
RATE = 0.02  # highest change of a factor's logarithm in a step
_MEASURED = 1024  # tokens of an expert, at most, that tell what training won


Factors = dict[str, Tensor]  # by projection
Settle = Callable[[Factors, Factors], tuple[Factors, Factors]]


@dataclass(frozen=True)
class Trained:
    """What came of an expert.

    Attributes
    ----------
    rows : dict, projection to float32 tensor (R,)
        What its rows' steps are to be multiplied by.
    columns : dict, first projection of a stage to float32 tensor (C,)
        What column scales are to be multiplied by.
    before, after : float
        Sum over the `measured` tokens of the squares of what it lacked of the goal, and lacks.
    """

    rows: Factors
    columns: Factors
    before: float
    after: float


def measured(tokens: int) -> Tensor:
    """Return which of so many tokens tell what training won, int64: all of few, some of many, evenly spread."""
    some = min(tokens, _MEASURED)
    return torch.arange(some) * tokens // max(some, 1)


def train_expert(
    layer: MoELayer,
    matrices: dict[str, Linear],
    scaled: bool,
    x: Tensor,
    gates: Tensor,
    goal: Tensor,
    seed: tuple[int, ...],
    settle: Settle | None = None,
) -> Trained:
    """Train an expert's factors until it puts out what it should, as nearly as it can.

    Parameters
    ----------
    layer : MoELayer
        The expert's.
    matrices : dict, projection to Linear
        Of the quantised expert.
    scaled : bool
        Whether columns have scales too.
    x : float32 tensor, shape (N, C)
        Its tokens.
    gates : float32 tensor, shape (N, 1)
        What its outputs are multiplied by.
    goal : float32 tensor, shape (N, R)
        What it should put out then.
    seed : tuple of int
        Of the tokens' order.
    settle : callable, optional
        Returns factors of rows and of columns that lead to what can be stored, given those that were trained.

    Returns
    -------
    Trained
    """
    with torch.inference_mode(False), torch.enable_grad():
        expert, some = _Factored(layer, matrices, scaled), measured(len(x))
        kept = x[some], gates[some], goal[some]
        before = expert.lacks(*kept)
        scale = float(goal.square().mean())
        if not scale > 0:
            return expert.trained(before, before)
        optimizer = torch.optim.Adam([expert.logarithms], lr=RATE, betas=BETAS, fused=True)
        batches = list(_batches(len(x), seed))
        for number, part in enumerate(batches):
            optimizer.param_groups[0]["lr"] = RATE * share_of_rate(number, len(batches))
            optimizer.zero_grad()
            lost = (expert(x[part]) * gates[part] - goal[part]).square().mean() / scale
            lost.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        if settle is not None:
            expert.settle(settle)
        return expert.trained(before, expert.lacks(*kept))


class _Factored:
    """An expert with factors, which are powers, since a scale of a column has to stay above 0.

    Attributes
    ----------
    logarithms : float32 tensor
        Of all factors, by stage: its rows', then its columns'. One tensor: many small ones take longer.
    """

    def __init__(self, layer: MoELayer, matrices: dict[str, Linear], scaled: bool) -> None:
        self._stages = [[matrices[name] for name in names] for names in layer.stages]
        self._names, self._scaled = layer.stages, scaled
        # matrices of the same inputs are multiplied at once; copies, since what inference mode made is not trained on
        self._weights = [torch.cat([each.weight for each in stage]) for stage in self._stages]
        self._sizes = [size for weight in self._weights for size in weight.shape[: 1 + scaled]]
        self.logarithms = self._weights[0].new_zeros(sum(self._sizes)).requires_grad_()

    def __call__(self, x: Tensor) -> Tensor:
        factors = iter(torch.split(self.logarithms.exp(), self._sizes))
        for stage, weight in zip(self._stages, self._weights, strict=True):
            rows, columns = next(factors), next(factors) if self._scaled else None
            y = (x if columns is None else x * columns) @ weight.T * rows
            own = zip(torch.split(y, [len(each.weight) for each in stage], dim=1), stage, strict=True)
            parts = [part if each.bias is None else part + each.bias for part, each in own]
            x = parts[0] if stage is self._stages[-1] else inner(stage[0].activation, parts)
        return x

    @torch.no_grad()
    def lacks(self, x: Tensor, gates: Tensor, goal: Tensor) -> float:
        return squares(self(x) * gates - goal)

    @torch.no_grad()
    def settle(self, settle: Settle) -> None:
        rows, columns = settle(*self._factors())
        settled = list[Tensor]()
        for names in self._names:
            settled += [*(rows[name] for name in names), *([columns[names[0]]] if self._scaled else [])]
        self.logarithms.copy_(torch.cat(settled).log())

    def trained(self, before: float, after: float) -> Trained:
        return Trained(*self._factors(), before, after)

    def _factors(self) -> tuple[Factors, Factors]:
        rows, columns = Factors(), Factors()
        found = iter(torch.split(self.logarithms.detach().exp(), self._sizes))
        for names, stage in zip(self._names, self._stages, strict=True):
            sizes = [len(each.weight) for each in stage]
            rows |= dict(zip(names, torch.split(next(found), sizes), strict=True))
            if self._scaled:
                columns[names[0]] = next(found)
        return rows, columns


def squares(values: Tensor) -> float:
    """Return the sum of the squares of float32 (N, R): of each row in that, of all rows in float64."""
    return float(values.square().sum(dim=1).double().sum())


def _batches(tokens: int, seed: tuple[int, ...]) -> list[Tensor]:
    generator = np.random.default_rng(seed)
    orders = (torch.from_numpy(generator.permutation(tokens)) for _ in range(EPOCHS))
    return [part for order in orders for part in torch.split(order, BATCH)]
