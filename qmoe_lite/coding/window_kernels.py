"""The kernels of the product from codes of windows: a row's codewords are walked once for some tokens.

A job is a group of tokens that go through one expert; a task is a block of a job's rows, and tasks are spread over the
threads. Window i of a row is the bits of codeword i and the two before it: the index of a table whose entry holds the
codeword's digits, int8 and zero behind the last one, and of another that holds their number.

Few tokens (`few_kernel`): an entry's digits are multiplied by the activations at the running position, of one token
after the other, and the position moves on by their number. Four windows share a load of 64 bits; what a row's last four
hold beyond the row meets the zeros behind x, so that no loop has a branch but its end. With one token and strings of up
to 8 digits, x86 takes 7 instructions a codeword: two for the index, conversion in two, product, number, position.
Longer strings take no more where all that they have behind 8 digits are zeros (`Dictionary.heads_table`).
Many tokens (`many_kernel`): a block of rows is decoded to float32, a chunk of columns at a time, and multiplied by
panels of tokens, which lie side by side in the lanes of the sums.
Column scales are multiplied into x where it is laid out, a row's step into its sums; exceptions are added to them.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import carray, njit, prange
from numpy.typing import NDArray

from qmoe_lite.coding.calls import call, compiled
from qmoe_lite.coding.inlined import inlined
from qmoe_lite.coding.vectors import address_of, load_64_at, store
from qmoe_lite.coding.window_layout import COUNT, EXPERT, FIRST, PANEL
from qmoe_lite.coding.window_sums import (
    accumulate_sums,
    add_codeword,
    add_column,
    add_sums,
    digits_at,
    no_sums,
    store_totals,
)

TASK_ROWS = 48  # a multiple of the rows that any panel width takes at a time
CHUNK = 512  # columns decoded at a time
LONGEST = 32  # digits of a codeword at most
CARRY = 4 * LONGEST  # digits that four codewords may reach behind a chunk
_STRIDE = CHUNK + CARRY


@inlined(error_model="numpy")
def _first_codewords(row_codewords: NDArray[Any], fewest: NDArray[np.int32], jobs: NDArray[np.int64]) -> Any:
    """Number of each task's first codeword within its expert: (J, tasks of a job)."""
    rows = row_codewords.shape[1]
    firsts = np.empty((len(jobs), (rows + TASK_ROWS - 1) // TASK_ROWS), dtype=np.int64)
    for job in range(len(jobs)):
        expert, before = jobs[job, EXPERT], np.int64(0)
        for block in range(firsts.shape[1]):
            firsts[job, block] = before
            own = row_codewords[expert, block * TASK_ROWS : (block + 1) * TASK_ROWS]
            before += np.int64(fewest[expert]) * len(own)
            for count in own:
                before += np.int64(count)
    return firsts


@inlined(error_model="numpy")
def _four_windows(row: np.uint64, shift: np.uint64, group: int, bits: np.uint64) -> np.uint64:
    """Four codewords and the two bits before: group 0 or 1 of the eight that begin `shift` bits behind `row`."""
    bit = np.uint64(4 * group) * bits
    return load_64_at(row + (bit >> np.uint64(3))) >> (shift + (bit & np.uint64(7)))


@inlined(error_model="numpy")
def _window(word: np.uint64, k: int, bits: np.uint64) -> np.uint64:
    return (word >> (np.uint64(k) * bits)) & ((np.uint64(4) << bits) - np.uint64(1))


@inlined(error_model="numpy")
def _add_four(
    word: np.uint64,
    bits: np.uint64,
    digits: np.uint64,
    width: tuple[int, ...],
    lengths: NDArray[np.uint8],
    place: np.uint64,
    token_bytes: np.uint64,
    sum0: Any,
    sum1: Any,
    sum2: Any,
    sum3: Any,
) -> tuple[np.uint64, Any, Any, Any, Any]:
    """Add four codewords, one to each sum: an addition need not wait for the one before."""
    entry_bytes, value_bytes = np.uint64(len(width)), np.uint64(4)
    window = _window(word, 0, bits)
    sum0 = add_codeword(sum0, digits + entry_bytes * window, place, token_bytes)
    place += value_bytes * lengths[window]
    window = _window(word, 1, bits)
    sum1 = add_codeword(sum1, digits + entry_bytes * window, place, token_bytes)
    place += value_bytes * lengths[window]
    window = _window(word, 2, bits)
    sum2 = add_codeword(sum2, digits + entry_bytes * window, place, token_bytes)
    place += value_bytes * lengths[window]
    window = _window(word, 3, bits)
    sum3 = add_codeword(sum3, digits + entry_bytes * window, place, token_bytes)
    place += value_bytes * lengths[window]
    return place, sum0, sum1, sum2, sum3


@cache
def rows_adder(code_bits: int, entry_bytes: int, tokens: int) -> Any:
    """Compile the walk of a task's rows for entries of so many digits and so many tokens.

    `code_bits` is the width of the codewords, or 0 for one that the walk is told.
    """
    width, group = (0,) * entry_bytes, (0,) * tokens

    def add_rows(
        rows: np.uint64,
        stream: np.uint64,
        told: np.uint64,
        digits: np.uint64,
        lengths: Any,
        walked: Any,
        x: np.uint64,
        token_bytes: np.uint64,
        sums: np.uint64,
    ) -> np.uint64:
        """Write sums (rows, tokens); walked (rows, 2): first bit, codewords.

        A row's last load begins within the row, so that it ends within the padding.
        """
        bits = np.uint64(code_bits) if code_bits else told
        known, walks = carray(lengths, (np.int64(4) << bits,)), carray(walked, (rows, 2))
        for i in range(rows):
            bit, place = walks[i, 0], x
            row, shift = stream + (bit >> np.uint64(3)), bit & np.uint64(7)
            groups = (walks[i, 1] + np.uint64(3)) >> np.uint64(2)
            a = b = c = d = no_sums(group, width)
            for _ in range(groups >> np.uint64(1)):
                word = _four_windows(row, shift, 0, bits)
                place, a, b, c, d = _add_four(word, bits, digits, width, known, place, token_bytes, a, b, c, d)
                word = _four_windows(row, shift, 1, bits)
                place, a, b, c, d = _add_four(word, bits, digits, width, known, place, token_bytes, a, b, c, d)
                row += bits
            if groups & np.uint64(1):
                word = _four_windows(row, shift, 0, bits)
                place, a, b, c, d = _add_four(word, bits, digits, width, known, place, token_bytes, a, b, c, d)
            store_totals(sums, add_sums(add_sums(a, b), add_sums(c, d)))
            sums += np.uint64(4 * len(group))
        return np.uint64(0)

    pointers = "CPointer(uint8), CPointer(uint64)"
    return compiled(add_rows, f"uint64(uint64, uint64, uint64, uint64, {pointers}, uint64, uint64, uint64)")


@inlined(error_model="numpy")
def _first_at(positions: NDArray[np.uint16], first: int, end: int, least: int) -> int:
    """First place in [first, end) of sorted positions that holds `least` or more; `end` if there is none."""
    while first < end:
        middle = (first + end) // 2
        if np.int64(positions[middle]) < least:
            first = middle + 1
        else:
            end = middle
    return first


@inlined(error_model="numpy")
def _exceptions_of(
    starts: NDArray[np.int32], positions: NDArray[np.uint16], columns: int, first: int, end: int, block: int
) -> tuple[int, int]:
    """Where the exceptions of rows [first, end) lie that belong to a block, which begins before `end`."""
    before = block * max(1, 65536 // columns)
    low, high = np.int64(starts[block]), np.int64(starts[block + 1])
    low = _first_at(positions, low, high, (first - before) * columns)
    return low, _first_at(positions, low, high, (end - before) * columns)


@njit(parallel=True, cache=True, fastmath=False, error_model="numpy", nogil=True)
def few_kernel(
    codes: NDArray[np.uint8],
    offsets: NDArray[np.int64],
    row_codewords: NDArray[Any],
    fewest: NDArray[np.int32],
    steps: NDArray[np.float32],
    exception_starts: NDArray[np.int32],
    exception_positions: NDArray[np.uint16],
    exception_values: NDArray[np.int8],
    digits: NDArray[np.int8],
    lengths: NDArray[np.uint8],
    columns: int,
    bits: int,
    adder: int,
    jobs: NDArray[np.int64],
    x: NDArray[np.float32],
    y: NDArray[np.float32],
) -> None:
    """Fill y (N, R) for jobs of up to so many tokens.

    The first eight are a `WindowStack`'s. digits (4 << bits, width), lengths (4 << bits,): the dictionary's tables.
    adder: address of a `rows_adder`. x (J, tokens, C + padding) from `lay_rows`.
    """
    firsts = _first_codewords(row_codewords, fewest, jobs)
    blocks = firsts.shape[1]
    for task in prange(len(jobs) * blocks):
        job, laid, first = jobs[task // blocks], x[task // blocks], task % blocks * TASK_ROWS
        expert, codeword = job[EXPERT], firsts[task // blocks, task % blocks]
        counts = row_codewords[expert, first : first + TASK_ROWS]
        sums = np.empty((len(counts), x.shape[1]), dtype=np.float32)
        walked = np.empty((len(counts), 2), dtype=np.uint64)
        for i in range(len(counts)):
            walked[i, 0], walked[i, 1] = codeword * bits, np.int64(counts[i]) + fewest[expert]
            codeword += np.int64(walked[i, 1])
        stream, table = address_of(codes) + np.uint64(offsets[expert]), address_of(digits)
        coded = np.uint64(len(counts)), stream, np.uint64(bits), table, address_of(lengths), address_of(walked)
        call(np.uint64(adder), (*coded, address_of(laid), np.uint64(4 * laid.shape[1]), address_of(sums)))
        own, block_rows = exception_starts[expert], max(1, 65536 // columns)
        for block in range(first // block_rows, (first + len(counts) - 1) // block_rows + 1):
            low, high = _exceptions_of(own, exception_positions, columns, first, first + len(counts), block)
            for i in range(low, high):
                row = exception_positions[i] // np.uint32(columns)
                column = exception_positions[i] - row * np.uint32(columns)
                for token in range(x.shape[1]):
                    added = np.float32(exception_values[i]) * laid[token, column]
                    sums[block * block_rows + np.int64(row) - first, token] += added
        for token in range(job[COUNT]):
            for i in range(len(counts)):
                y[job[FIRST] + token, first + i] = steps[expert, first + i] * sums[i, token]


@inlined(error_model="numpy")
def _write_four(
    word: np.uint64,
    bits: np.uint64,
    digits: np.uint64,
    width: tuple[int, ...],
    lengths: NDArray[np.uint8],
    place: np.uint64,
) -> np.uint64:
    """Write the digits of four codewords; return the place behind them, with some zeros written behind it."""
    for k in range(4):
        window = _window(word, k, bits)
        store(place, digits_at(width, digits + np.uint64(len(width)) * window))
        place += np.uint64(4) * lengths[window]
    return place


@cache
def tile_multiplier(code_bits: int, entry_bytes: int, tile_rows: int, panel: int) -> Any:
    """Compile the decoding of a task's rows and their product with panels of so many tokens, so many rows at a time.

    `code_bits` is the width of the codewords, or 0 for one that the function is told.
    """
    width, rows, lanes = (0,) * entry_bytes, (0,) * tile_rows, (0,) * panel

    def multiply_tile(
        held: np.uint64,
        stream: np.uint64,
        told: np.uint64,
        digits: np.uint64,
        lengths: Any,
        walked: Any,
        tile: Any,
        columns: np.uint64,
        panels: np.uint64,
        x: np.uint64,
        sums: np.uint64,
    ) -> np.uint64:
        """Add to sums (panels, TASK_ROWS, lanes); walked (rows, 2): next bit, bytes written behind the chunk before."""
        bits = np.uint64(code_bits) if code_bits else told
        known, walks = carray(lengths, (np.int64(4) << bits,)), carray(walked, (held, 2))
        decoded = carray(tile, (TASK_ROWS, _STRIDE))
        row_bytes, lane_bytes = np.uint64(4 * _STRIDE), np.uint64(4 * panel)
        for start in range(np.uint64(0), columns, np.uint64(CHUNK)):
            wide = min(np.uint64(CHUNK), columns - start)
            for i in range(held):
                decoded[i, :CARRY] = decoded[i, CHUNK:]
                place = address_of(decoded[i])
                end = place + np.uint64(4) * wide
                bit, place = walks[i, 0], place + walks[i, 1]
                while place < end:
                    word = load_64_at(stream + (bit >> np.uint64(3))) >> (bit & np.uint64(7))
                    place = _write_four(word, bits, digits, width, known, place)
                    bit += np.uint64(4) * bits
                walks[i, 0], walks[i, 1] = bit, place - end
            for k in range(panels):
                own, all_sums = x + (k * columns + start) * lane_bytes, sums + k * np.uint64(TASK_ROWS) * lane_bytes
                for row in range(0, TASK_ROWS, len(rows)):
                    total = no_sums(rows, lanes)
                    weight, place = address_of(decoded[row]), own
                    for _ in range(wide):
                        total = add_column(total, weight, row_bytes, place)
                        weight += np.uint64(4)
                        place += lane_bytes
                    accumulate_sums(all_sums + lane_bytes * np.uint64(row), lane_bytes, total)
        return np.uint64(0)

    pointers = "CPointer(uint8), CPointer(uint64), CPointer(float32)"
    whole = ", uint64" * 4
    return compiled(multiply_tile, f"uint64(uint64, uint64, uint64, uint64, {pointers}{whole})")


@njit(parallel=True, cache=True, fastmath=False, error_model="numpy", nogil=True)
def many_kernel(
    codes: NDArray[np.uint8],
    offsets: NDArray[np.int64],
    row_codewords: NDArray[Any],
    fewest: NDArray[np.int32],
    steps: NDArray[np.float32],
    exception_starts: NDArray[np.int32],
    exception_positions: NDArray[np.uint16],
    exception_values: NDArray[np.int8],
    digits: NDArray[np.int8],
    lengths: NDArray[np.uint8],
    columns: int,
    bits: int,
    multiplier: int,
    jobs: NDArray[np.int64],
    x: NDArray[np.float32],
    y: NDArray[np.float32],
) -> None:
    """Fill y (N, R) for jobs of many tokens; see `few_kernel`. x (panels, C, lanes): `lay_panels`.

    multiplier: address of a `tile_multiplier`.
    """
    firsts = _first_codewords(row_codewords, fewest, jobs)
    blocks, lanes = firsts.shape[1], x.shape[2]
    for task in prange(len(jobs) * blocks):
        job = jobs[task // blocks]
        expert, first = job[EXPERT], task % blocks * TASK_ROWS
        held = min(TASK_ROWS, steps.shape[1] - first)
        panels = (job[COUNT] + lanes - 1) // lanes
        codeword = firsts[task // blocks, task % blocks]
        tile = np.zeros((TASK_ROWS, _STRIDE), dtype=np.float32)
        sums = np.zeros((panels, TASK_ROWS, lanes), dtype=np.float32)
        walked = np.zeros((held, 2), dtype=np.uint64)
        for i in range(held):
            walked[i, 0] = codeword * bits
            codeword += np.int64(row_codewords[expert, first + i]) + fewest[expert]
        stream, table = address_of(codes) + np.uint64(offsets[expert]), address_of(digits)
        coded = np.uint64(held), stream, np.uint64(bits), table, address_of(lengths), address_of(walked)
        sizes = address_of(tile), np.uint64(columns), np.uint64(panels)
        call(np.uint64(multiplier), (*coded, *sizes, address_of(x[job[PANEL]]), address_of(sums)))
        exceptions, block_rows = exception_starts[expert], max(1, 65536 // columns)
        for block in range(first // block_rows, (first + held - 1) // block_rows + 1):
            low, high = _exceptions_of(exceptions, exception_positions, columns, first, first + held, block)
            for i in range(low, high):
                row = exception_positions[i] // np.uint32(columns)
                column = exception_positions[i] - row * np.uint32(columns)
                value, at = np.float32(exception_values[i]), block * block_rows + np.int64(row) - first
                for panel in range(panels):
                    for lane in range(lanes):
                        sums[panel, at, lane] += value * x[job[PANEL] + panel, column, lane]
        for panel in range(panels):
            for lane in range(min(lanes, job[COUNT] - panel * lanes)):
                for i in range(held):
                    token = job[FIRST] + panel * lanes + lane
                    y[token, first + i] = steps[expert, first + i] * sums[panel, i, lane]
