"""The chain of kinds that a dictionary's strings end in: how many digits a codeword stands for in the long run."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

_CHAIN = 60  # steps in which the chain of kinds settles


@njit(cache=True, error_model="numpy")
def follow_chain(
    single: NDArray[np.float64],
    classes: NDArray[np.int64],
    gained: NDArray[np.float64],
    ends: NDArray[np.float64],
    arriving: NDArray[np.float64],
) -> tuple[float, NDArray[np.float64]]:
    """Follow strings from kind to kind until it settles how often each is arrived at.

    Parameters
    ----------
    single : float64 array, shape (K + 1,)
        Probability of one digit of each size.
    classes : int64 array, shape (K + 1,)
        Class of each kind.
    gained : float64 array, shape (classes, K + 1)
        Digits of a tree's string, by the size of its first digit.
    ends : float64 array, shape (classes, K + 1, K + 1)
        Its probability of ending in each kind, by the size of its first digit.
    arriving : float64 array, shape (K + 1,)
        Is modified: from a guess to how often strings end in each kind.

    Returns
    -------
    digits : float
        Of a string, on average.
    worths : float64 array, shape (K + 1,)
        Digits that ending in a kind gains in the long run, against kind 0.
    """
    kinds = len(single)
    chain = np.zeros((kinds, kinds))
    given = np.zeros(kinds)
    for t in range(kinds):
        left = 0.0
        for size in range(t, kinds):
            left += single[size] * (1 if size == 0 else 2)
        for size in range(t, kinds):
            chance = single[size] * (1 if size == 0 else 2) / left
            given[t] += chance * gained[classes[t], size]
            for u in range(kinds):
                chain[t, u] += chance * ends[classes[t], size, u]
    worths = np.zeros(kinds)
    for _ in range(_CHAIN):
        after = np.zeros(kinds)
        moved = given.copy()
        for t in range(kinds):
            for u in range(kinds):
                moved[t] += chain[t, u] * worths[u]
                after[u] += arriving[t] * chain[t, u]
        total = after.sum()
        for t in range(kinds):
            arriving[t] = after[t] / total
            worths[t] = moved[t] - moved[0]
    digits = 0.0
    for t in range(kinds):
        digits += arriving[t] * given[t]
    return digits, worths
