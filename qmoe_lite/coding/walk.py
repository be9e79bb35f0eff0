"""The encoder's walk: rows of digits to codes, from nonzero to nonzero, four rows at a time.

A step looks at eight digits, passes the zeros before the first nonzero as far as no codeword ends in them, and takes
one digit more; see `qmoe_lite.coding.automaton.Steps`. A row's steps wait for one another, so four rows share a loop.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from qmoe_lite.coding.alphabet import Alphabet
from qmoe_lite.coding.inlined import inlined
from qmoe_lite.coding.vectors import load_64_bits
from qmoe_lite.errors import DtypeError, ShapeError

LANES = 4  # rows at a time


def digit_bytes(digits: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Return the digits' bytes row by row, shape (R * C,), for `walk_rows`; refuse what are no rows of int8."""
    if digits.ndim != 2 or digits.size == 0:
        raise ShapeError(f"digits has shape {tuple(digits.shape)}; expected (rows, columns), at least one of each.")
    if digits.dtype != np.int8:
        raise DtypeError(f"digits is {digits.dtype}; expected int8. Convert it with digits.astype(numpy.int8).")
    return np.ascontiguousarray(digits).view(np.uint8).reshape(-1)


def check_counted(row_counts: NDArray[np.int64], digits: NDArray[np.int8], alphabet: Alphabet) -> None:
    """Refuse digits of which `walk_rows` found some outside the alphabet."""
    if row_counts.min() >= 0:
        return
    row, column = np.argwhere((digits < alphabet.lowest) | (digits > alphabet.highest))[0]
    raise alphabet.refusal(digits[row, column], row, column)


@intrinsic
def _trailing_zeros(typing: Any, word: Any) -> Any:
    """Return the number of zero bits below the lowest set bit of a uint64; 64 where none is set."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 0))

    return types.uint64(types.uint64), generate


# a lane: place in the digits, state, bits of zeros that may be passed, place in the codes; all uint64
@inlined()
def _lane(row: int, lane: int, columns: int) -> Any:
    return np.uint64(row * columns), np.uint64(0), np.uint64(0), np.uint64(lane * columns)


@inlined()
def _take(lane: Any, passed: np.uint64, entry: np.uint64, codes: NDArray[np.uint16]) -> Any:
    """Move a lane over `passed` digits; the entry's code is always written, and kept if there is one: no branch."""
    codes[lane[3]] = entry & np.uint64(0xFFFF)
    place = lane[3] + (entry >> np.uint64(24) & np.uint64(1))
    return lane[0] + passed, entry >> np.uint64(32), entry >> np.uint64(16) & np.uint64(255), place


@inlined()
def _step(lane: Any, digits: NDArray[np.uint8], entries: NDArray[np.uint64], codes: NDArray[np.uint16]) -> Any:
    """Take one to eight digits; a digit's lowest two bits are those of its byte."""
    word = load_64_bits(digits, lane[0])
    zeros = min(_trailing_zeros(word) & np.uint64(0x78), lane[2])
    entry = entries[lane[1] + (zeros >> np.uint64(1)) + (word >> zeros & np.uint64(3))]
    return _take(lane, (zeros >> np.uint64(3)) + np.uint64(1), entry, codes)


@njit(cache=True, fastmath=False)
def _finish(
    lane: Any,
    end: np.uint64,
    digits: NDArray[np.uint8],
    entries: NDArray[np.uint64],
    tails: NDArray[np.uint16],
    codes: NDArray[np.uint16],
) -> Any:
    """Take the row's remaining digits, up to `end`; return the place behind its codes."""
    while lane[0] + np.uint64(8) <= end:
        lane = _step(lane, digits, entries, codes)
    while lane[0] < end:
        entry = entries[lane[1] + (np.uint64(digits[lane[0]]) & np.uint64(3))]
        lane = _take(lane, np.uint64(1), entry, codes)
    if lane[1] == 0:
        return lane[3]
    codes[lane[3]] = tails[lane[1] >> np.uint64(2)]
    return lane[3] + np.uint64(1)


@njit(cache=True, fastmath=False)
def walk_rows(
    digits: NDArray[np.uint8],
    columns: int,
    lowest: int,
    n_digits: int,
    entries: NDArray[np.uint64],
    tails: NDArray[np.uint16],
    first: int,
    codes: NDArray[np.uint16],
    counts: NDArray[np.int64],
) -> None:
    """Encode LANES rows from `first` on; where the matrix has fewer, the last one again in their place.

    Parameters
    ----------
    digits : uint8 array, shape (R * C,)
        The bytes of int8 digits.
    columns : int
        C.
    lowest, n_digits : int
        The codebook's lowest digit and how many it has.
    entries, tails : arrays
        `Codebook.steps`.
    first : int
        Number of the first row.
    codes : uint16 array, shape (LANES * C,)
        Is modified: the codes of row `first + i` begin at i * C.
    counts : int64 array, shape (R,)
        Is modified: codewords of these rows; -1 where one of the rows holds a digit that the codebook has not.
    """
    last = len(counts) - 1
    row_a, row_b, row_c, row_d = first, min(first + 1, last), min(first + 2, last), min(first + 3, last)
    highest = np.uint8(0)
    for digit in digits[row_a * columns : row_d * columns + columns]:
        highest = max(highest, np.uint8(digit - lowest))
    a, end_a = _lane(row_a, 0, columns), np.uint64(row_a * columns + columns)
    b, end_b = _lane(row_b, 1, columns), np.uint64(row_b * columns + columns)
    c, end_c = _lane(row_c, 2, columns), np.uint64(row_c * columns + columns)
    d, end_d = _lane(row_d, 3, columns), np.uint64(row_d * columns + columns)
    word = np.uint64(8)
    while a[0] + word <= end_a and b[0] + word <= end_b and c[0] + word <= end_c and d[0] + word <= end_d:
        a = _step(a, digits, entries, codes)
        b = _step(b, digits, entries, codes)
        c = _step(c, digits, entries, codes)
        d = _step(d, digits, entries, codes)
    counts[row_a] = _finish(a, end_a, digits, entries, tails, codes)
    counts[row_b] = _finish(b, end_b, digits, entries, tails, codes) - np.uint64(columns)
    counts[row_c] = _finish(c, end_c, digits, entries, tails, codes) - np.uint64(2 * columns)
    counts[row_d] = _finish(d, end_d, digits, entries, tails, codes) - np.uint64(3 * columns)
    if highest >= n_digits:
        counts[row_a : row_d + 1] = -1
