"""Exceptions: what rare digits have beyond a dictionary's clip, listed by their places in blocks of rows."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from qmoe_lite.coding.inlined import inlined
from qmoe_lite.coding.stream import row_starts
from qmoe_lite.errors import FormatError

_BLOCK_POSITIONS = 65536  # of a block of rows: a place in it takes 16 bits
_LARGEST_DIGIT = 32767
_FAULTS = {
    1: "a position outside the matrix",
    2: "positions that do not ascend",
    3: "a zero",
    4: "a digit beyond 16 bits",
}


class Exceptions(NamedTuple):
    """What is to be added to the digits of a stream, in the order of their places.

    Attributes
    ----------
    starts : int32 array, shape (blocks + 1,)
        Where the exceptions of each block of `65536 // C` rows (at least one) begin.
    positions : uint16 array, shape (N,)
        Row in the block * C + column; several of the same add up.
    values : int8 array, shape (N,)
        None is 0.
    """

    starts: NDArray[np.int32]
    positions: NDArray[np.uint16]
    values: NDArray[np.int8]


def block_rows(columns: int) -> int:
    """Return the rows of a block of exceptions."""
    return max(_BLOCK_POSITIONS // columns, 1)


def count_exceptions(digits: NDArray[np.int16], clip: int) -> int:
    """Return how many exceptions `encode` would write."""
    counts = np.zeros(len(digits), dtype=np.int64)
    _count_kernel(digits, clip, counts)
    return int(counts.sum())


def find_exceptions(digits: NDArray[np.int16], clip: int) -> Exceptions:
    """Return the exceptions of digits (R, C)."""
    rows, columns = digits.shape
    counts = np.zeros(rows, dtype=np.int64)
    _count_kernel(digits, clip, counts)
    starts = row_starts(counts)
    positions = np.empty(starts[-1], dtype=np.uint16)
    values = np.empty(starts[-1], dtype=np.int8)
    per = block_rows(columns)
    _fill_kernel(digits, clip, per, starts, positions, values)
    return Exceptions(np.append(starts[:-1:per], starts[-1]).astype(np.int32), positions, values)


def check_exceptions(exceptions: Exceptions, rows: int, columns: int, clip: int) -> None:
    """Raise FormatError unless the exceptions are a list that `add_exceptions` can trust; safe on any content."""
    starts, positions, values = exceptions
    per = block_rows(columns)
    blocks = -(-rows // per)
    if len(starts) != blocks + 1 or starts[0] != 0 or (starts[1:] < starts[:-1]).any() or starts[-1] != len(positions):
        raise FormatError(
            f"exception_starts do not divide {len(positions)} exceptions among {blocks} blocks of rows. "
            "The data is damaged; get it again."
        )
    if len(values) != len(positions):
        raise FormatError(
            f"there are {len(values)} exception_values for {len(positions)} exception_positions. "
            "The data is damaged; get it again."
        )
    faults = _check_kernel(starts, positions, values, rows, columns, per, _LARGEST_DIGIT - clip)
    if faults.any():
        block = int(faults.nonzero()[0][0])
        raise FormatError(
            f"the exceptions of block {block} have {_FAULTS[int(faults[block])]}. The data is damaged; get it again."
        )


@inlined()
def add_exceptions(
    exceptions: Exceptions,
    per: int,
    number: int,
    columns: int,
    row: NDArray[np.int16],
) -> None:
    """Add the exceptions of row `number` to its digits; `per` are the rows of a block."""
    starts, positions, values = exceptions
    low, high = np.int64(starts[number // per]), np.int64(starts[number // per + 1])
    base = number % per * columns
    end = high
    while low < high:
        middle = (low + high) >> 1
        if positions[middle] < base:
            low = middle + 1
        else:
            high = middle
    while low < end and positions[low] < base + columns:
        row[positions[low] - base] += values[low]
        low += 1


@njit(parallel=True, cache=True, fastmath=False, error_model="numpy")
def _count_kernel(digits: NDArray[np.int16], clip: int, counts: NDArray[np.int64]) -> None:
    """Add the exceptions of each row to counts (R,)."""
    for row in prange(digits.shape[0]):
        beyond = 0
        for column in range(digits.shape[1]):
            excess = max(abs(np.int32(digits[row, column])) - np.int32(clip), np.int32(0))
            beyond += int((excess + np.int32(126)) // np.int32(127))
        counts[row] += beyond


@njit(parallel=True, cache=True, fastmath=False, error_model="numpy")
def _fill_kernel(
    digits: NDArray[np.int16],
    clip: int,
    per: int,
    starts: NDArray[np.int64],
    positions: NDArray[np.uint16],
    values: NDArray[np.int8],
) -> None:
    """Write the exceptions of each row from starts[row] on."""
    columns = digits.shape[1]
    for row in prange(digits.shape[0]):
        place = starts[row]
        if place == starts[row + 1]:
            continue
        for column in range(columns):
            digit = np.int64(digits[row, column])
            excess = int(abs(digit) - clip)
            while excess > 0:
                part = min(excess, 127)
                positions[place] = row % per * columns + column
                values[place] = part if digit > 0 else -part
                excess -= part
                place += 1


@njit(parallel=True, cache=True, fastmath=False, error_model="numpy")
def _check_kernel(
    starts: NDArray[np.int32],
    positions: NDArray[np.uint16],
    values: NDArray[np.int8],
    rows: int,
    columns: int,
    per: int,
    largest: int,
) -> NDArray[np.uint8]:
    """Fault of each block, (blocks,): a key of _FAULTS or 0; `starts` are known to lie inside the list."""
    faults = np.zeros(len(starts) - 1, dtype=np.uint8)
    for i in prange(len(faults)):
        block = np.int64(i)
        end = min(int(rows - block * per), per) * columns
        before, total = np.int64(-1), np.int64(0)
        for k in range(starts[block], starts[block + 1]):
            position, value = np.int64(positions[k]), np.int64(values[k])
            total = total + value if position == before else value
            if position >= end:
                faults[i] = 1
            elif position < before:
                faults[i] = 2
            elif value == 0:
                faults[i] = 3
            elif abs(total) > largest:
                faults[i] = 4
            if faults[i] != 0:
                break
            before = position
    return faults
