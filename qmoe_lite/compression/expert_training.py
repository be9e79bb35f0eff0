"""Training of one expert's factors, one for each row and column, while its digits stay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from qmoe_lite.compression.layer_parts import Linear
from qmoe_lite.compression.schedule import BETAS, share_of_rate
from qmoe_lite.models.blocks import MoELayer
from qmoe_lite.models.family import inner

EPOCHS, BATCH = 1, 64  # how often a token is seen, and tokens a step
RATE = 0.02  # highest change of a factor's logarithm in a step


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
        Sum over the tokens of the squares of what it lacked of the goal, and lacks.
    """

    rows: Factors
    columns: Factors
    before: float
    after: float


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
        x, gates, goal = x.clone(), gates.clone(), goal.clone()  # what inference mode made cannot be trained on
        expert = _Factored(layer, matrices, scaled)
        before = expert.lacks(x, gates, goal)
        scale = float(goal.square().mean())
        if not scale > 0:
            return expert.trained(before, before)
        optimizer = torch.optim.Adam(expert.parameters, lr=RATE, betas=BETAS)
        batches = list(_batches(len(x), seed))
        for number, part in enumerate(batches):
            optimizer.param_groups[0]["lr"] = RATE * share_of_rate(number, len(batches))
            optimizer.zero_grad()
            lost = (expert(x[part]) * gates[part] - goal[part]).square().mean() / scale
            lost.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        if settle is not None:
            expert.settle(settle)
        return expert.trained(before, expert.lacks(x, gates, goal))


class _Factored:
    """An expert with factors, which are powers, since a scale of a column has to stay above 0."""

    def __init__(self, layer: MoELayer, matrices: dict[str, Linear], scaled: bool) -> None:
        self._layer = layer
        self._matrices = {name: replace(each, weight=each.weight.clone()) for name, each in matrices.items()}
        self._rows, self._columns = dict[str, Tensor](), dict[str, Tensor]()
        for name, matrix in self._matrices.items():
            rows, columns = matrix.weight.shape
            self._rows[name] = matrix.weight.new_zeros(rows).requires_grad_()
            if scaled and layer.first_of_stage(name) == name:
                self._columns[name] = matrix.weight.new_zeros(columns).requires_grad_()

    @property
    def parameters(self) -> list[Tensor]:
        return [*self._rows.values(), *self._columns.values()]

    def __call__(self, x: Tensor) -> Tensor:
        first, (last,) = self._layer.stages
        activation = self._matrices[last].activation
        return self._multiply(last, inner(activation, [self._multiply(name, x) for name in first]))

    def _multiply(self, name: str, x: Tensor) -> Tensor:
        matrix, columns = self._matrices[name], self._columns.get(self._layer.first_of_stage(name))
        y = (x if columns is None else x * columns.exp()) @ matrix.weight.T * self._rows[name].exp()
        return y if matrix.bias is None else y + matrix.bias

    @torch.no_grad()
    def lacks(self, x: Tensor, gates: Tensor, goal: Tensor) -> float:
        return squares(self(x) * gates - goal)

    @torch.no_grad()
    def settle(self, settle: Settle) -> None:
        for factors, settled in zip((self._rows, self._columns), settle(*self._factors()), strict=True):
            for name, each in settled.items():
                factors[name].copy_(each.log())

    def trained(self, before: float, after: float) -> Trained:
        return Trained(*self._factors(), before, after)

    def _factors(self) -> tuple[Factors, Factors]:
        of_rows = {name: each.detach().exp() for name, each in self._rows.items()}
        return of_rows, {name: each.detach().exp() for name, each in self._columns.items()}


def squares(values: Tensor) -> float:
    """Return the sum of the squares of float32 (N, R): of each row in that, of all rows in float64."""
    return float(values.square().sum(dim=1).double().sum())


def _batches(tokens: int, seed: tuple[int, ...]) -> list[Tensor]:
    generator = np.random.default_rng(seed)
    orders = (torch.from_numpy(generator.permutation(tokens)) for _ in range(EPOCHS))
    return [part for order in orders for part in torch.split(order, BATCH)]
