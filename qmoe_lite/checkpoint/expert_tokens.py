"""How the calibration text fell on the experts, and what twice as much of it would bring."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from statistics import NormalDist, median
from typing import Any


@dataclass(frozen=True)
class ExpertTokens:
    """Calibration tokens behind the Hessians of some experts.

    Attributes
    ----------
    experts : int
    fewest, median, most : float
        Tokens of an expert.
    starved : int
        Experts with fewer tokens than one of their matrices has columns: that one's Hessian has not full rank.
    starved_at_twice : float
        How many are to be expected with twice the text.
    """

    experts: int
    fewest: int
    median: float
    most: int
    starved: int
    starved_at_twice: float

    @classmethod
    def of(cls, experts: Iterable[tuple[int, int]]) -> ExpertTokens:
        """Sum up experts, each given by its tokens and the columns of its widest matrix; at least one.

        Notes
        -----
        An expert that got n tokens is taken to get a Poisson number with mean n from as much text again.
        """
        known = list(experts)
        tokens = [count for count, _ in known]
        starved = sum(count < columns for count, columns in known)
        at_twice = sum(_chance_below(columns - count, count) for count, columns in known)
        return cls(len(known), min(tokens), median(tokens), max(tokens), starved, at_twice)

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return asdict(self)


def _chance_below(needed: int, mean: int) -> float:
    """Return the chance that a Poisson number is less than `needed`, by the normal distribution."""
    if mean <= 0 or needed <= 0:
        return float(needed > 0)
    return NormalDist(mean, mean**0.5).cdf(needed - 0.5)
