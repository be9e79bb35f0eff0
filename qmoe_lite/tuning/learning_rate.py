"""Training at a learning rate that is chosen by what validation samples say.

The more bits a model has, the nearer it is to the dense one, and the less its steps and scales may be moved about: at
two bits the noise of training at the rate that is right for one bit costs more than training wins.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qmoe_lite.compression.calibration import Samples
from qmoe_lite.errors import NotFiniteError
from qmoe_lite.tuning.train import Measured, Step, Tuner

HIGHEST = 0.01  # which is tried first
TRIES = 3  # each at a third of the rate before


@dataclass(frozen=True)
class Held:
    """Validation samples, and what the dense model's head was given for each, as `run_dense` returned it."""

    samples: Samples
    dense: list[Tensor]


def train_at_its_rate(
    tuner: Tuner,
    drawn: Samples,
    dense: list[Tensor],
    held: Held,
    before: float,
    *,
    rate: float | None,
    epochs: int,
    batch: int,
    seed: int,
    progress: Callable[[Step, float, int], None] | None = None,
) -> tuple[dict[str, Tensor], Measured, float]:
    """Train, and begin anew at a third of the rate where the validation samples' divergence rises.

    It is measured after half of the steps, and at the end of what is stored.

    Parameters
    ----------
    tuner : Tuner
        Nothing of it was trained.
    drawn, dense, epochs, batch, seed
        As for `Tuner.train`.
    held : Held
        To validate with.
    before : float
        Their mean divergence in nats, untrained.
    rate : float or None
        The learning rate; None tries `HIGHEST` first, and lower ones, `TRIES` in all.
    progress : callable, optional
        Called after each step with it, its learning rate, and how many steps went before in tries that were given up.

    Returns
    -------
    stored : dict
        As `Tuner.stored` returns it.
    after : Measured
        Of the validation samples, of what is stored.
    rate : float
        The learning rate of both.

    Raises
    ------
    NotFiniteError
        A divergence is NaN or infinite.
    """
    rates = [HIGHEST / 3**number for number in range(TRIES)] if rate is None else [rate]

    def better() -> bool:
        return tuner.measure(held.samples, held.dense).divergence <= before

    given_up = 0
    for tried in rates:
        last = tried == rates[-1]
        steps = _Steps(tried, given_up, progress)
        how: dict[str, Any] = {"epochs": epochs, "batch": batch, "seed": seed, "progress": steps}
        try:
            if not tuner.train(drawn, dense, rate=tried, goes_on=None if last else better, **how):
                stored = tuner.stored()  # before it is measured: what is measured is what is stored
                after = tuner.measure(held.samples, held.dense)
                if last or after.divergence < before:
                    break
        except NotFiniteError:
            if last:
                raise
        given_up += steps.made
        tuner.reset()
    return stored, after, tried


class _Steps:
    """Counts a try's steps, and tells of each."""

    def __init__(self, rate: float, given_up: int, progress: Callable[[Step, float, int], None] | None) -> None:
        self._rate, self._given_up, self._progress = rate, given_up, progress
        self.made = 0

    def __call__(self, step: Step) -> None:
        self.made = step.number
        if self._progress is not None:
            self._progress(step, self._rate, self._given_up)
