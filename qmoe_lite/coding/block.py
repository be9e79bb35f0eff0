"""The product of many tokens: a nonzero adds its level times the tokens' values, to sums that stay in registers.

Two rows are walked at a time: the processor adds the one while it waits for the other's table entries.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import carray, njit, prange
from numpy.typing import NDArray

from qmoe_lite.coding.calls import call, compiled
from qmoe_lite.coding.inlined import inlined
from qmoe_lite.coding.jobs import (
    CHOICE,
    COUNT,
    EXPERT,
    FIRST,
    TASK_ROWS,
    entry_part,
    entry_step,
    first_codewords,
    load_codewords,
    load_entry,
)
from qmoe_lite.coding.vectors import add_multiple_at, address_of, store, zeros


@inlined(error_model="numpy")
def _add_codeword(
    code: np.uint64,
    positions: np.uint64,
    slots: np.uint64,
    fields: tuple[int, ...],
    levels: np.uint64,
    lanes: tuple[int, ...],
    place: np.uint64,
    total: Any,
) -> tuple[np.uint64, Any]:
    """Add levels times activations of a codeword's nonzeros; return the place behind the codeword, and the sums."""
    column_bytes = np.uint64(4 * len(lanes))
    entry, of_entry = load_entry(positions, code, fields), load_entry(slots, code, fields)
    for i in range(len(fields)):
        level = levels + np.uint64(4) * entry_part(of_entry, i)
        total = add_multiple_at(total, level, place + column_bytes * entry_part(entry, i))
    return place + column_bytes * entry_step(entry, fields), total


@cache
def rows_multiplier(fields: int, tokens: int) -> Any:
    """Compile the walk of a task's rows, two at a time, for entries of so many fields and so many tokens."""
    entry, lanes = (0,) * fields, (0,) * tokens

    def multiply_rows(
        pairs: np.uint64,
        codes: np.uint64,
        bits: np.uint64,
        positions: np.uint64,
        slots: np.uint64,
        starts: Any,
        values: np.uint64,
        digits: np.uint64,
        x_start: np.uint64,
        sums: np.uint64,
    ) -> np.uint64:
        """Write the sums of rows from bit starts[i] to starts[i + 1] to the lanes at `sums`; values (rows, digits)."""
        bit = carray(starts, (2 * np.int64(pairs) + 1,))
        mask = (np.uint64(1) << bits) - np.uint64(1)
        value_bytes, sum_bytes, four = np.uint64(4) * digits, np.uint64(4 * len(lanes)), np.uint64(4) * bits
        for i in range(pairs):
            bit0, end0, end1 = bit[2 * i], bit[2 * i + 1], bit[2 * i + 2]
            bit1 = end0
            levels0, levels1 = values, values + value_bytes
            place0 = place1 = x_start
            total0 = total1 = zeros(lanes)
            while bit0 + np.uint64(3) * bits < end0 and bit1 + np.uint64(3) * bits < end1:
                word0, word1 = load_codewords(codes, bit0), load_codewords(codes, bit1)
                for k in range(4):
                    code0, code1 = word0 >> (np.uint64(k) * bits) & mask, word1 >> (np.uint64(k) * bits) & mask
                    place0, total0 = _add_codeword(code0, positions, slots, entry, levels0, lanes, place0, total0)
                    place1, total1 = _add_codeword(code1, positions, slots, entry, levels1, lanes, place1, total1)
                bit0 += four
                bit1 += four
            while bit0 < end0:
                code = load_codewords(codes, bit0) & mask
                place0, total0 = _add_codeword(code, positions, slots, entry, levels0, lanes, place0, total0)
                bit0 += bits
            while bit1 < end1:
                code = load_codewords(codes, bit1) & mask
                place1, total1 = _add_codeword(code, positions, slots, entry, levels1, lanes, place1, total1)
                bit1 += bits
            store(sums, total0)
            store(sums + sum_bytes, total1)
            sums += np.uint64(2) * sum_bytes
            values += np.uint64(2) * value_bytes
        return np.uint64(0)

    whole = ", uint64" * 4
    return compiled(multiply_rows, f"uint64(uint64{whole}, CPointer(uint64){whole})")


@inlined(error_model="numpy")
def _fill_values(levels: NDArray[np.float32], choice: int, row: int, values: NDArray[np.float32], digits: int) -> None:
    """Write the weight of each slot to values (digits,), the zero slot's last; see `decode_kernels.slot_values`."""
    if levels.shape[2] == 1:
        values[0], values[1] = levels[choice, row, 0], -levels[choice, row, 0]
    elif levels.shape[2] == 2:
        values[0], values[1] = levels[choice, row, 1], levels[choice, row, 0]
    else:
        values[0], values[1], values[2] = levels[choice, row, 0], levels[choice, row, 1], levels[choice, row, 2]
    values[digits - 1] = 0


@inlined(error_model="numpy")
def _block_rows(
    codes: NDArray[np.uint8],
    offset: int,
    row_codewords: NDArray[Any],
    fewest: NDArray[np.int32],
    positions: np.uint64,
    slots: np.uint64,
    bits: np.uint64,
    multiplier: np.uint64,
    job: NDArray[np.int64],
    levels: NDArray[np.float32],
    digits: int,
    x_columns: NDArray[np.float32],
    first: int,
    codeword: int,
    y: NDArray[np.float32],
) -> None:
    """Fill y[tokens of the job, first : first + TASK_ROWS]; `codeword` is the number of the first row's first."""
    expert = job[EXPERT]
    rows = min(TASK_ROWS, levels.shape[1] - first)
    sums = np.empty((TASK_ROWS, x_columns.shape[1]), dtype=np.float32)
    values = np.empty((TASK_ROWS, digits), dtype=np.float32)
    starts = np.full(TASK_ROWS + 1, np.uint64(codeword) * bits)
    for i in range(rows):
        starts[i + 1] = starts[i] + (np.uint64(row_codewords[expert, first + i]) + np.uint64(fewest[expert])) * bits
        _fill_values(levels, job[CHOICE], first + i, values[i], digits)
    if rows % 2:  # a row of no codewords beside the last of an odd number
        starts[rows + 1] = starts[rows]
    pairs, stream = np.uint64((rows + 1) // 2), address_of(codes) + np.uint64(offset)
    tables = positions, slots, address_of(starts), address_of(values)
    call(multiplier, (pairs, stream, bits, *tables, np.uint64(digits), address_of(x_columns), address_of(sums)))
    for token in range(job[COUNT]):
        for i in range(rows):
            y[job[FIRST] + token, first + i] = sums[i, token]


@njit(parallel=True, cache=True, fastmath=False, error_model="numpy", nogil=True)
def block_kernel(
    codes: NDArray[np.uint8],
    offsets: NDArray[np.int64],
    row_codewords: NDArray[Any],
    fewest: NDArray[np.int32],
    positions: int,
    slots: int,
    bits: int,
    multiplier: int,
    jobs: NDArray[np.int64],
    levels: NDArray[np.float32],
    digits: int,
    x_columns: NDArray[np.float32],
    y: NDArray[np.float32],
) -> None:
    """Fill y (N, R) for jobs of up to so many tokens; x_columns (J, C + padding, tokens) from `expand_kernel`.

    positions, slots, multiplier: addresses of `Codebook.split_table`'s and of a `rows_multiplier`.
    """
    firsts = first_codewords(row_codewords, fewest, jobs)
    blocks = firsts.shape[1]
    for task in prange(len(jobs) * blocks):
        job = jobs[task // blocks]
        _block_rows(
            codes,
            offsets[job[EXPERT]],
            row_codewords,
            fewest,
            np.uint64(positions),
            np.uint64(slots),
            np.uint64(bits),
            np.uint64(multiplier),
            job,
            levels,
            digits,
            x_columns[task // blocks],
            task % blocks * TASK_ROWS,
            firsts[task // blocks, task % blocks],
            y,
        )
