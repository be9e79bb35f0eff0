"""Compiled inner loops of the solver on the CPU: a block of columns, rows in vector lanes.

The arrays are (E, C, R) or (E, B, R): the rows of a column lie next to each other. A tile of 64 rows goes through the
whole block in the first-level cache. Floor: B^2 / 2 multiplications and as many subtractions a row and block.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from qmoe_lite.coding.vectors import add_at, address_of, replace_above_at, store, subtract_multiple_at, zeros
from qmoe_lite.quantization.rounding import MOST_STEPS

_LANES = 64  # rows that a tile of the kernel holds: four registers of AVX-512, enough to hide an addition's latency
_LANE_TUPLE = (0,) * _LANES
_LINE = np.uint64(4 * _LANES)  # bytes


@njit(cache=True, parallel=True)
def block_kernel(
    block: NDArray[np.float32],
    digits: NDArray[np.int8],
    factor: NDArray[np.float32],
    values: NDArray[np.float32],
    thresholds: NDArray[np.float32],
    symbols: NDArray[np.int8],
) -> None:
    """Turn block (E, B, R) into scaled errors and write digits; factor (E, B, B) is lower, the rest (E, K, R)."""
    experts, _, rows = block.shape
    tiles = (rows + _LANES - 1) // _LANES
    for unit in prange(experts * tiles):
        expert = unit // tiles
        first = (unit - expert * tiles) * _LANES
        table = _pad_table(values[expert], thresholds[expert], symbols[expert], first)
        _solve_tile(block[expert], digits[expert], factor[expert], table, first)


@njit(cache=True)
def _pad_table(
    values: NDArray[np.float32], thresholds: NDArray[np.float32], symbols: NDArray[np.int8], first: int
) -> NDArray[np.float32]:
    """Return values, digits and thresholds of the rows of a tile, (3, K, lanes); threshold k lies below value k."""
    kinds, rows = values.shape
    table = np.zeros((3, kinds, _LANES), np.float32)
    for kind in range(kinds):
        for row in range(min(_LANES, rows - first)):
            table[0, kind, row] = values[kind, first + row]
            table[1, kind, row] = symbols[kind, first + row]
            if kind > 0:
                table[2, kind, row] = thresholds[kind - 1, first + row]
    return table


@njit(cache=True, parallel=True)
def uniform_kernel(
    block: NDArray[np.float32],
    digits: NDArray[np.int16],
    factor: NDArray[np.float32],
    steps: NDArray[np.float32],
    inverses: NDArray[np.float32],
    shift: np.float32,
) -> None:
    """Do what `block_kernel` does, on multiples of the rows' steps (E, R); inverses (E, R) are 1 / step, or 0."""
    experts, _, rows = block.shape
    tiles = (rows + _LANES - 1) // _LANES
    for unit in prange(experts * tiles):
        expert = unit // tiles
        first = (unit - expert * tiles) * _LANES
        own = np.zeros((2, _LANES), np.float32)
        for row in range(min(_LANES, rows - first)):
            own[0, row] = steps[expert, first + row]
            own[1, row] = inverses[expert, first + row]
        _solve_uniform_tile(block[expert], digits[expert], factor[expert], own, shift, first)


@njit(cache=True)
def _correct(place: Any, multiple: Any, earlier: Any, columns: int) -> Any:
    """Return the lanes at `place` less the factor's entries times the errors of the columns before, two addresses."""
    weight = add_at(zeros(_LANE_TUPLE), place)
    for _ in range(columns):
        weight = subtract_multiple_at(weight, multiple, earlier)
        multiple += np.uint64(4)
        earlier += _LINE
    return weight


@njit(cache=True)
def _solve_uniform_tile(
    block: NDArray[np.float32],
    digits: NDArray[np.int16],
    factor: NDArray[np.float32],
    own: NDArray[np.float32],
    shift: np.float32,
    first: int,
) -> None:
    """Do what `_solve_tile` does, on multiples of the lanes' steps; own (2, lanes) are the steps and their inverses."""
    columns, rows = block.shape
    width = min(_LANES, rows - first)
    tile, chosen = np.zeros((columns, _LANES), np.float32), np.empty((columns, _LANES), np.int16)
    _copy_tile(block, first, tile, False)
    start = address_of(tile)
    place = start
    steps, inverses = own[0], own[1]
    most = np.float32(MOST_STEPS)
    for column in range(columns):
        store(place, _correct(place, address_of(factor[column]), start, column))
        line, taken, pivot = tile[column], chosen[column], factor[column, column]
        for row in range(_LANES):
            weight = line[row]
            size = abs(weight * inverses[row]) + shift
            size = np.float32(np.int32(size if size < most else most))
            digit = size if weight > 0 else -size
            taken[row] = np.int16(digit)
            line[row] = (weight - digit * steps[row]) / pivot
        place += _LINE
    _copy_tile(block, first, tile, True)
    for column in range(columns):
        for row in range(width):
            digits[column, first + row] = chosen[column, row]


@njit(cache=True)
def _solve_tile(
    block: NDArray[np.float32],
    digits: NDArray[np.int8],
    factor: NDArray[np.float32],
    table: NDArray[np.float32],
    first: int,
) -> None:
    """Turn rows `first` and on of block (B, R) into scaled errors, one row a lane, and write digits (B, R).

    Each weight has its corrections subtracted in the order of the columns, each product rounded before: the bits of the
    plain loop.
    """
    columns, rows = block.shape
    width = min(_LANES, rows - first)
    tile, chosen = np.zeros((columns, _LANES), np.float32), np.empty((columns, _LANES), np.float32)
    nearest = np.empty(_LANES, np.float32)
    values, symbols, thresholds = address_of(table[0]), address_of(table[1]), address_of(table[2])
    _copy_tile(block, first, tile, False)
    start, digit_place = address_of(tile), address_of(chosen)
    place = start
    for column in range(columns):
        weight = _correct(place, address_of(factor[column]), start, column)
        value, symbol = add_at(zeros(_LANE_TUPLE), values), add_at(zeros(_LANE_TUPLE), symbols)
        for kind in range(1, table.shape[1]):
            offset = np.uint64(kind) * _LINE
            value = replace_above_at(value, weight, thresholds + offset, values + offset)
            symbol = replace_above_at(symbol, weight, thresholds + offset, symbols + offset)
        store(place, weight)
        store(digit_place, symbol)
        store(address_of(nearest), value)
        line, pivot = tile[column], factor[column, column]
        for row in range(_LANES):
            line[row] = (line[row] - nearest[row]) / pivot
        place += _LINE
        digit_place += _LINE
    _copy_tile(block, first, tile, True)
    for column in range(columns):
        for row in range(width):
            digits[column, first + row] = np.int8(chosen[column, row])


@njit(cache=True)
def _copy_tile(block: NDArray[np.float32], first: int, tile: NDArray[np.float32], back: bool) -> None:
    """Copy rows `first` and on of block (B, R) into a tile (B, lanes), or back."""
    columns, rows = block.shape
    if rows - first < _LANES:
        for column in range(columns):
            for row in range(rows - first):
                if back:
                    block[column, first + row] = tile[column, row]
                else:
                    tile[column, row] = block[column, first + row]
        return
    here, there = address_of(tile), address_of(block) + np.uint64(4 * first)
    for _ in range(columns):
        if back:
            store(there, add_at(zeros(_LANE_TUPLE), here))
        else:
            store(here, add_at(zeros(_LANE_TUPLE), there))
        here += _LINE
        there += np.uint64(4 * rows)


@njit(cache=True, parallel=True)
def lost_kernel(
    whole: NDArray[np.float32],
    digits: NDArray[np.int8] | NDArray[np.int16],
    scaled: NDArray[np.float32],
    levels: NDArray[np.float32],
    start: int,
    out: NDArray[np.float32],
    sums: NDArray[np.float64],
) -> None:
    """Write whole - quantised to columns of out, (E, C, R), and each column's two sums of squares to sums (2, E, B)."""
    experts, columns, _ = digits.shape
    for unit in prange(experts * columns):
        expert = unit // columns
        column = unit - expert * columns
        rest = out[expert, start + column]
        _subtract_levels(whole[expert, start + column], digits[expert, column], levels[expert], rest)
        sums[0, expert, column] = _sum_squares(scaled[expert, column])
        sums[1, expert, column] = _sum_squares(rest)


@njit(cache=True)
def _subtract_levels(
    weight: NDArray[np.float32],
    digits: NDArray[np.int8] | NDArray[np.int16],
    levels: NDArray[np.float32],
    rest: NDArray[np.float32],
) -> None:
    """Write to rest (R,) a column's weights less what their digits stand for; levels (L, R) as in `dequantize`."""
    kinds, rows = levels.shape
    if kinds == 1:
        for row in range(rows):
            rest[row] = weight[row] - np.float32(digits[row]) * levels[0, row]
        return
    for row in range(rows):
        rest[row] = weight[row]
    for kind in range(kinds):
        digit = 2 * kind - 1 if kinds == 2 else kind + 1
        for row in range(rows):
            rest[row] -= levels[kind, row] * np.float32(digits[row] == digit)


@njit(cache=True, fastmath={"reassoc"})  # vector lanes may add up apart: in one order for all that
def _sum_squares(values: NDArray[np.float32]) -> float:
    total = 0.0
    for value in values:
        total += np.float64(value) * np.float64(value)
    return total
