"""What the compressor of a layer is given, holds and returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qmoe_lite.checkpoint.report import ProjectionReport
from qmoe_lite.compression.block_runner import Caught
from qmoe_lite.compression.ranks import Ranks
from qmoe_lite.compression.tally import Solved
from qmoe_lite.models.architecture import Joint
from qmoe_lite.models.routing import Assignment

_COMPARED = 1 << 16  # values at a time on a CPU
LAYER_SAMPLE = 4096  # tokens that stand for the whole layer where an expert saw too few of its own
_SAMPLE_A_COLUMN = 2  # of them for each column of a last projection, in front of which each expert has to run them


def draw(rows: Tensor, most: int, *seed: int) -> Tensor:
    """Draw at most `most` rows at random, in ascending order."""
    if len(rows) <= most:
        return rows
    chosen = np.random.default_rng(seed).choice(len(rows), most, replace=False)
    return rows[torch.from_numpy(np.sort(chosen))]


def compared(outputs: Tensor, dense: Tensor) -> NDArray[np.float64]:
    """Return the sums of squares of the outputs' error, of the outputs and of what the dense experts put out."""
    found = np.zeros(3)
    # on a CPU float64 copies of all would be memory that is written for the first time: longer than the sums take
    size = max(outputs.numel(), 1) if outputs.is_cuda else _COMPARED
    for own, aim in zip(*(torch.split(each.reshape(-1), size) for each in (outputs, dense)), strict=True):
        parts = ((own - aim).double(), own.double(), aim.double())
        found += torch.stack([torch.dot(part, part) for part in parts]).cpu().numpy()
    return found


def last_sample(tokens: int, columns: int) -> int:
    """Return how many of the layer's sample of so many tokens enter the Hessian of an expert's last projection."""
    return min(tokens, _SAMPLE_A_COLUMN * columns)


class Inputs(Protocol):
    """Activations that experts are given, as a list buffer or as what another rank has of it."""

    def gather(self, rows: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the activations of some tokens, by row number; shape (len(rows), width)."""


class Outputs(Protocol):
    """Where the outputs of experts go."""

    def add(self, rows: Tensor, values: Tensor) -> None:
        """Add to the activations of some tokens; no row may occur twice."""


@dataclass(frozen=True)
class LayerInputs:
    """What the experts of one sparse layer get to see, and where their outputs go.

    Attributes
    ----------
    inputs : Inputs
        The experts' inputs, one row a token.
    assigned : Assignment
        Which expert gets which rows.
    eligible : bool tensor, a value a row
        May enter a Hessian.
    validation : bool tensor, a value a row
        Rides along to measure the error.
    reference : bool tensor, a value a row
        Of the validation samples once more: goes through the dense experts, to measure what the model loses.
    sample : float32 tensor, shape (tokens, C)
        Random eligible tokens, for experts that saw few of their own.
    hidden : Outputs
        The block's output so far; the quantised experts' outputs are added to it.
    adds : bool
        Whether that is all that the block does with them.
    tuner : Tuner or None
        Lets experts make up for what their block lacks: see `block_tuning`.
    """

    inputs: Inputs
    assigned: Assignment
    eligible: Tensor
    validation: Tensor
    reference: Tensor
    sample: Tensor
    hidden: Outputs
    adds: bool = True
    tuner: Tuner | None = None

    @classmethod
    def of(cls, caught: Caught, flags: tuple[Tensor, ...], *seed: int) -> LayerInputs:
        """Put together what a block's experts were given, and the flags of its tokens as they stand here."""
        eligible, validation, reference = flags
        sample = caught.inputs.everywhere(draw(torch.nonzero(eligible)[:, 0], LAYER_SAMPLE, *seed))
        where = caught.outputs, caught.adds
        return cls(caught.inputs, caught.assigned, eligible, validation, reference, sample, *where)


@dataclass(frozen=True)
class LayerResult:
    """A compressed layer: tensors to write, codebooks by projection, what to report, what tuning it did."""

    tensors: dict[str, Tensor]
    codebooks: dict[str, dict[str, Any]]
    reports: list[ProjectionReport]
    held_out_error: float | None
    tuning: dict[str, float]


@dataclass(frozen=True)
class Linear:
    """One matrix (R, C) of an expert, its bias (R,), where it has one, and the expert's activation.

    Products are in the dtype `products` where there is one; what they come to is float32 again.
    """

    weight: Tensor
    bias: Tensor | None
    activation: Callable[[Tensor], Tensor] | Joint
    products: torch.dtype | None = None

    def of(self, x: Tensor) -> Tensor:
        """Return what tokens (N, C) become, (N, R)."""
        if self.products is None:
            y = x @ self.weight.T
        else:
            y = (x.to(self.products) @ self.weight.to(self.products).T).float()
        return y if self.bias is None else y + self.bias


class MadeInTurn(Sequence[list[Linear]]):
    """The matrices of each expert of a group, made anew wherever one's are asked for: no more are in memory."""

    def __init__(self, count: int, make: Callable[[int], list[Linear]]) -> None:
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, place: Any) -> Any:
        """Return the matrices of one expert."""
        if place >= self._count:
            raise IndexError(place)
        return self._make(place)


@dataclass
class Taken:
    """What the groups of a layer have taken: bits, weights, whether their bits follow the step; and what tuning did."""

    bits: float = 0.0
    weights: int = 0
    tells: bool = False
    dead: bool = False  # a group is all zeros
    tuning_seconds: float = 0.0
    tuning_goal: float = 0.0  # sum of squares of what dense experts put out for some tokens
    tuning_before: float = 0.0  # and of what was lacking of that before tuning, and afterwards
    tuning_after: float = 0.0

    @property
    def tuning(self) -> dict[str, float]:
        """What tuning did, for the report; empty where nothing was tuned."""
        if not self.tuning_goal:
            return {}
        lacking = self.tuning_before / self.tuning_goal, self.tuning_after / self.tuning_goal
        return {"seconds": round(self.tuning_seconds, 3), "before": lacking[0], "after": lacking[1]}


class Tuner(Protocol):
    """What the compressor of a layer asks of its tuning."""

    def take(self, expert: int, rows: Tensor, x: Tensor, inside: Tensor) -> None:
        """Take some of the tokens that enter the Hessian of an expert's last projection.

        Parameters
        ----------
        expert : int
            Which one.
        rows : int64 tensor, shape (N,)
            Of the tokens.
        x : float32 tensor, shape (N, C of the first projections)
            Their activations.
        inside : float32 tensor, shape (N, C)
            What the expert's quantised first projections make of them.
        """

    def aim(self, expert: int, weights: Tensor, hessian: Tensor) -> None:
        """Change an expert's last projection to what it is to be solved for, when all its tokens were taken.

        Parameters
        ----------
        expert : int
            Which one.
        weights : float32 tensor, shape (R, C)
            Its dense ones; changed in place.
        hessian : float32 tensor, shape (C, C)
            That it is solved with.
        """

    def tune(self, group: range, solved: dict[str, Solved], taken: Taken) -> dict[str, Solved]:
        """Return a group that was solved, with other levels and column scales where they are trained.

        Parameters
        ----------
        group : range
            Its experts.
        solved : dict, projection to Solved
            Not changed.
        taken : Taken
            Gets the time, and what the experts lacked before and afterwards.
        """

    def lent(self, seen: LayerInputs, wanted: list[Tensor], ranks: Ranks) -> Tuner:
        """Return what tunes this rank's group of a wave; all ranks call it together.

        Parameters
        ----------
        seen : LayerInputs
            What the group's experts are given.
        wanted : list of int64 tensor, one a rank
            Rows of the tokens of each one's group.
        ranks : Ranks
            Of the run.
        """
