"""How many codewords digits take, without encoding them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from qmoe_lite.coding.alphabet import ALPHABETS, Alphabet
from qmoe_lite.coding.automaton import SplitTree, Steps
from qmoe_lite.coding.guards import enter_kernels
from qmoe_lite.coding.strings import split_count, tunstall_splits
from qmoe_lite.coding.walk import LANES, check_counted, digit_bytes, walk_rows


def count_codewords(digits: NDArray[np.int8], alphabet: Alphabet, steps: Steps) -> NDArray[np.int64]:
    """Count the codewords of each row of digits (R, C); int64, shape (R,). Errors as for `Codebook.rate`."""
    digits_bytes = digit_bytes(digits)
    enter_kernels()
    rows, columns = digits.shape
    counts = np.empty(rows, dtype=np.int64)
    _count_codewords_kernel(digits_bytes, columns, alphabet.lowest, alphabet.digits, *steps, counts)
    check_counted(counts, digits, alphabet)
    return counts


def count_rates(counts: tuple[int, ...], digits: NDArray[np.int8], sizes: Iterable[int]) -> dict[int, float]:
    """Return what `Codebook.rate` returns for the Tunstall codes of several sizes, whose trees are one tree that grows.

    Parameters
    ----------
    counts : tuple of int
        As for `Codebook.fit`, checked.
    digits : int8 array, shape (R, C)
        What the codes are to write.
    sizes : iterable of int
        Bits of a codeword.

    Raises
    ------
    ShapeError, DtypeError, DigitError
        As `Codebook.rate` does.
    """
    sizes, alphabet = list(sizes), ALPHABETS[len(counts)]
    splits = tunstall_splits(counts, max(sizes))
    tree = SplitTree(splits, alphabet.digits)
    found = {}
    for bits in sizes:
        steps = tree.steps(split_count(alphabet.digits, bits))
        found[bits] = bits * int(count_codewords(digits, alphabet, steps).sum()) / digits.size
    return found


@njit(parallel=True, cache=True, fastmath=False)
def _count_codewords_kernel(
    digits: NDArray[np.uint8],
    columns: int,
    lowest: int,
    n_digits: int,
    entries: NDArray[np.uint64],
    tails: NDArray[np.uint16],
    counts: NDArray[np.int64],
) -> None:
    """Write the codewords per row of digits (R * C,) to counts (R,); see `walk_rows`."""
    for group in prange((len(counts) + LANES - 1) // LANES):
        codes = np.empty(LANES * columns, dtype=np.uint16)
        walk_rows(digits, columns, lowest, n_digits, entries, tails, group * LANES, codes, counts)
