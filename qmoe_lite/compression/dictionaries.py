"""The dictionaries of one model: few of them, since the digits of its layers are alike."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from qmoe_lite.coding.dictionary import Dictionary
from qmoe_lite.coding.fitting import least_bits

_WORSE = 0.005  # share of the bits that a known dictionary may take above what one of the digits' own would


@dataclass
class Dictionaries:
    """Chooses the dictionary of each projection; takes another one only where that pays.

    Attributes
    ----------
    bits : int
        Of a codeword.
    known : list of Dictionary
        In the order in which they were first used.
    """

    bits: int
    known: list[Dictionary] = field(default_factory=list)

    def choose(self, sizes: NDArray[np.int64]) -> Dictionary:
        """Return the dictionary for digits of these sizes, one of those that are known where it serves.

        Parameters
        ----------
        sizes : int64 array
            How many digits have the size 0, 1, 2, ..
        """
        if not self.known:
            return Dictionary.fit_counts(sizes, self.bits)
        best, bits = min(((each, each.expected_bits(sizes)) for each in self.known), key=lambda pair: pair[1])
        if (bits - least_bits(sizes)) * sizes.sum() <= 8 << self.bits:  # too few digits for any: fitting takes long
            return best
        fitted = Dictionary.fit_counts(sizes, self.bits)
        more = bits - fitted.expected_bits(sizes)
        pays = more > _WORSE * fitted.expected_bits(sizes) and more * sizes.sum() > 8 * len(fitted.kinds)
        return fitted if pays else best

    def use(self, dictionary: Dictionary) -> None:
        """Take note of a dictionary that digits were written with."""
        if dictionary not in self.known:
            self.known.append(dictionary)

    def resume(self, used: Iterable[Dictionary]) -> None:
        """Know those that the finished layers are stored with, and no others."""
        self.known = []
        for dictionary in used:
            self.use(dictionary)


def signed(sizes: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return how often each digit occurs where signs are even: 0, then each size twice, by halves."""
    rest = sizes[1:] / 2
    return np.concatenate([sizes[:1].astype(np.float64), rest, rest])
