"""The product of many tokens: a nonzero adds its level times the tokens' values, to sums that stay in registers.

Two rows are walked at a time: the processor adds the one while it waits for the other's table entries.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

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


@inlined(error_model="numpy")
def _block_pair(
    stream: np.uint64,
    bit0: np.uint64,
    end0: np.uint64,
    end1: np.uint64,
    positions: np.uint64,
    slots: np.uint64,
    bits: int,
    fields: tuple[int, ...],
    values: np.uint64,
    digits: int,
    lanes: tuple[int, ...],
    x_start: np.uint64,
    sums: np.uint64,
) -> None:
    """Write the sums of two rows, bits bit0 to end0 and end0 to end1, to 2 * lanes at `sums`; values (2, digits)."""
    step = np.uint64(bits)
    mask = (np.uint64(1) << step) - np.uint64(1)
    bit1 = end0
    levels0 = values
    levels1 = values + np.uint64(4 * digits)
    place0 = place1 = x_start
    total0 = total1 = zeros(lanes)
    while bit0 + np.uint64(3) * step < end0 and bit1 + np.uint64(3) * step < end1:
        word0, word1 = load_codewords(stream, bit0), load_codewords(stream, bit1)
        for k in range(4):
            place0, total0 = _add_codeword(
                (word0 >> (np.uint64(k) * step)) & mask, positions, slots, fields, levels0, lanes, place0, total0
            )
            place1, total1 = _add_codeword(
                (word1 >> (np.uint64(k) * step)) & mask, positions, slots, fields, levels1, lanes, place1, total1
            )
        bit0 += np.uint64(4) * step
        bit1 += np.uint64(4) * step
    while bit0 < end0:
        code = load_codewords(stream, bit0) & mask
        place0, total0 = _add_codeword(code, positions, slots, fields, levels0, lanes, place0, total0)
        bit0 += step
    while bit1 < end1:
        code = load_codewords(stream, bit1) & mask
        place1, total1 = _add_codeword(code, positions, slots, fields, levels1, lanes, place1, total1)
        bit1 += step
    store(sums, total0)
    store(sums + np.uint64(4 * len(lanes)), total1)


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
    positions: NDArray[Any],
    slots: NDArray[Any],
    bits: int,
    fields: tuple[int, ...],
    lanes: tuple[int, ...],
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
    sums = np.empty((TASK_ROWS, len(lanes)), dtype=np.float32)
    values = np.empty((2, digits), dtype=np.float32)
    stream = address_of(codes) + np.uint64(offset)
    bit = np.uint64(codeword * bits)
    for i in range(0, rows, 2):
        end0 = bit + np.uint64((np.int64(row_codewords[expert, first + i]) + fewest[expert]) * bits)
        end1 = end0  # a row of no codewords beside the last of an odd number
        _fill_values(levels, job[CHOICE], first + i, values[0], digits)
        if i + 1 < rows:
            end1 += np.uint64((np.int64(row_codewords[expert, first + i + 1]) + fewest[expert]) * bits)
            _fill_values(levels, job[CHOICE], first + i + 1, values[1], digits)
        _block_pair(
            stream,
            bit,
            end0,
            end1,
            address_of(positions),
            address_of(slots),
            bits,
            fields,
            address_of(values),
            digits,
            lanes,
            address_of(x_columns),
            address_of(sums) + np.uint64(4 * len(lanes) * i),
        )
        bit = end1
    for token in range(job[COUNT]):
        for i in range(rows):
            y[job[FIRST] + token, first + i] = sums[i, token]


@njit(parallel=True, cache=True, fastmath=False, error_model="numpy", nogil=True)
def block_kernel(
    codes: NDArray[np.uint8],
    offsets: NDArray[np.int64],
    row_codewords: NDArray[Any],
    fewest: NDArray[np.int32],
    positions: NDArray[Any],
    slots: NDArray[Any],
    bits: int,
    fields: tuple[int, ...],
    lanes: tuple[int, ...],
    jobs: NDArray[np.int64],
    levels: NDArray[np.float32],
    digits: int,
    x_columns: NDArray[np.float32],
    y: NDArray[np.float32],
) -> None:
    """Fill y (N, R) for jobs of up to len(lanes) tokens; x_columns (J, C + padding, lanes) from `expand_kernel`."""
    firsts = first_codewords(row_codewords, fewest, jobs)
    blocks = firsts.shape[1]
    for task in prange(len(jobs) * blocks):
        job = jobs[task // blocks]
        _block_rows(
            codes,
            offsets[job[EXPERT]],
            row_codewords,
            fewest,
            positions,
            slots,
            bits,
            fields,
            lanes,
            job,
            levels,
            digits,
            x_columns[task // blocks],
            task % blocks * TASK_ROWS,
            firsts[task // blocks, task % blocks],
            y,
        )
