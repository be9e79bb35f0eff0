"""Digits like those of real layers at a rate: bell-shaped weights, columns that differ, multiples of a step."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qmoe_lite.coding.dictionary import Dictionary
from qmoe_lite.compression.rate import first_step

FREEDOM = 8  # of Student's t, whose digits are like those of real layers
_SPREAD = 0.25  # of the columns' scales, as a logarithm
_FITTED = 256  # rows that a dictionary is fitted to
_ROW_BITS = 24  # of a row's step and length
_COLUMN_BITS = 16  # of a column's scale

Digits = NDArray[np.int16]


def draw_weights(rows: int, columns: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Draw weights, float32 (rows, columns), of standard deviation 1."""
    weights = rng.standard_t(FREEDOM, size=(rows, columns)).astype(np.float32)
    weights *= np.exp(rng.normal(0, _SPREAD, columns)).astype(np.float32)
    weights /= weights.std()
    return weights


def digits_of(weights: NDArray[np.float32], step: float) -> Digits:
    """Round weights to multiples of a step."""
    return np.rint(weights / np.float32(step)).astype(np.int16)


def fit_step(weights: NDArray[np.float32], rate: float) -> tuple[float, Dictionary]:
    """Return the step at which weights take about `rate` stored bits, and the dictionary of their digits."""
    rows, columns = weights.shape
    step = first_step(0.95 * rate)
    for _ in range(3):
        digits = digits_of(weights[:_FITTED], step)
        fitted, dictionary = step, Dictionary.fit(digits)
        step *= 2 ** (dictionary.rate(digits) + _ROW_BITS / columns + _COLUMN_BITS / rows - rate)
    return fitted, dictionary
