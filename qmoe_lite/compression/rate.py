"""The knob between size and loss: which step makes the experts of a model take a given number of bits.

All layers share one step, in units of each row's RMS, so that matrices that need more bits get them, or steps differ by
what is known of the layers: see shares.py. The step is found on the first group of experts and corrected as layers
finish; the last layer is solved again until the whole model fits, but no layer's step leaves the others' by an octave
more: a missed rate is reported, a ruined layer would not be.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qmoe_lite.errors import SettingError

LEAST, MOST = 0.6, 4.0  # stored bits a weight
TOLERANCE = 0.004  # share of the bits by which a group may miss its aim before it is solved again
SMALLEST_STEP, LARGEST_STEP = 0.06, 8.0  # in units of a row's RMS: over 6 bits; hardly a digit that is not zero
GROUP_TOLERANCE = 0.02  # the same of a group that others of its layer follow
TRIES = 5  # solves of a group at most
_CHANGE = 2.0  # octaves that a step may move between two solves
MOST_APART = 1.0  # octaves between a layer's step and the mean of those before it
_SLOPE = 0.9  # bits that a weight loses when its step doubles, before two solves have shown it
_SLOPES = (0.25, 1.1)  # what it can be


def check_rate(rate: float) -> float:
    """Return a rate that can be reached, or raise SettingError."""
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not LEAST <= rate <= MOST:
        raise SettingError(f"rate is {rate}; expected {LEAST} to {MOST:g} stored bits a weight. Choose one in between.")
    return float(rate)


def entropy(counts: NDArray[Any]) -> float:
    """Return the order-0 entropy of digits, in bits, from how often each occurs."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares @ np.log2(shares)))


_BITS = np.array([0.15, 0.3, 0.6, 0.87, 1.16, 1.66, 2.15, 2.69, 3.26, 4.2, 6.2])
_OCTAVES = np.log2([8.5, 6.0, 4.0, 3.0, 2.0, 1.36, 0.95, 0.65, 0.44, 0.23, 0.0575])


def first_step(bits: float) -> float:
    """Return the step, in units of a row's RMS, at which bell-shaped weights have about so many bits of entropy.

    At high rates the entropy of a Gaussian is log2(sqrt(2 pi e) / step); at low ones the table is of real layers.
    """
    return float(2.0 ** np.interp(bits, _BITS, _OCTAVES))


def _bits_at(octaves: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return about how many bits bell-shaped weights have at steps, whose binary logarithms are given."""
    return np.interp(-octaves, -_OCTAVES, _BITS)


def bounded(step: float) -> float:
    """Return a step within those that are tried."""
    return min(max(step, SMALLEST_STEP), LARGEST_STEP)


@dataclass
class RateControl:
    """Chooses the step of each layer so that the experts of the whole model take `rate` bits a weight.

    Attributes
    ----------
    rate : float
        Stored bits a weight, over all experts of the model.
    weights : int
        Weights in experts of the whole model.
    step : float
        In units of a row's RMS: what the next group is solved with.
    slope : float
        Bits that a weight loses when the step doubles, as last seen.
    done_weights : int
        Weights of finished layers.
    done_bits : float
        Bits that they take as stored.
    level : float
        Mean octaves by which finished layers' steps are longer than those of bell-shaped weights of as many bits.
    level_weights : int
        Weights of the layers that say so.
    octave : float
        Mean binary logarithm of their steps, less their shares.
    shares : list of float
        Octaves by which the step of each layer to come is to differ from the others'; empty where none is.
    """

    rate: float
    weights: int
    step: float = 0.0
    slope: float = _SLOPE
    done_weights: int = 0
    done_bits: float = 0.0
    level: float = 0.0
    level_weights: int = 0
    octave: float = 0.0
    shares: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Begin with what bell-shaped weights would need."""
        if not self.step:
            self.step = bounded(first_step(0.95 * self.aim))

    @property
    def aim(self) -> float:
        """Bits a weight that the next layer should take, for all to come to take what is left."""
        left = self.weights - self.done_weights
        mean = (self.rate * self.weights - self.done_bits) / left if left else self.rate
        if not self.shares:
            return mean
        octaves, shares = np.linspace(-5.0, 5.0, 2001), np.array(self.shares)
        means = _bits_at(octaves[:, None] + shares).mean(axis=1)  # were the step 1 so many octaves longer
        return float(_bits_at(np.interp(-mean, -means, octaves) + shares[:1])[0])

    @property
    def first(self) -> bool:
        """Whether no finished layer has told how bits follow the step."""
        return self.level_weights == 0

    def within(self, step: float) -> float:
        """Return a step within those that are tried, and not far from those of finished layers."""
        if not self.first:
            octave = self.octave + (self.shares[0] if self.shares else 0.0)
            step = min(max(step, 2.0 ** (octave - MOST_APART)), 2.0 ** (octave + MOST_APART))
        return bounded(step)

    def corrected(self, tried: list[tuple[float, float]], aim: float, tolerance: float = TOLERANCE) -> float | None:
        """Return the step that a group should be solved with next; None where one of the tries was near enough.

        Parameters
        ----------
        tried : list of (step, bits a weight)
            Solves of this group so far.
        aim : float
            Bits a weight that it should take.
        tolerance : float
            Share of them by which it may miss.
        """
        if min(abs(bits - aim) for _, bits in tried) <= tolerance * aim or len(tried) == TRIES:
            return None
        step, bits = tried[-1]
        if len(tried) > 1:
            bits_before, moved = tried[-2][1], math.log2(step / tried[-2][0])
            if abs(moved) > 1e-3 and bits != bits_before:
                self.slope = min(max((bits_before - bits) / moved, _SLOPES[0]), _SLOPES[1])
        above = max((t for t in tried if t[1] >= aim), default=None)  # the largest step that takes too many bits
        below = min((t for t in tried if t[1] < aim), default=None)
        if above is not None and below is not None and above[0] < below[0]:
            share = (above[1] - aim) / (above[1] - below[1])
            following = above[0] * (below[0] / above[0]) ** min(max(share, 0.1), 0.9)
        else:
            octaves = min(max((bits - aim) / self.slope, -_CHANGE), _CHANGE)
            following = self.within(step * 2.0**octaves)
        return None if any(following == known for known, _ in tried) else following

    def finish_layer(self, weights: int, bits: float, tells: bool = True) -> None:
        """Take over a finished layer, solved with `step`, and choose the next one's step.

        `tells` is False of a layer whose bits do not follow the step, such as one of zeros.
        """
        share, self.shares = (self.shares[0], self.shares[1:]) if self.shares else (0.0, [])
        if tells:
            level = math.log2(self.step / first_step(bits / weights))
            self.level_weights += weights
            self.level += (level - self.level) * weights / self.level_weights
            self.octave += (math.log2(self.step) - share - self.octave) * weights / self.level_weights
        self.done_weights, self.done_bits = self.done_weights + weights, self.done_bits + bits
        if self.done_weights < self.weights and self.level_weights:
            self.step = self.within(first_step(self.aim) * 2.0**self.level)

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values: `RateControl(**values)` goes on from there."""
        return asdict(self)
