"""The kernels of the product from codes of windows: a row's codewords are walked once for some tokens.

A job is a group of tokens that go through one expert; a task is a block of a job's rows, and tasks are spread over the
threads. Window i of a row is the bits of codeword i and the two before it: the index of a table whose entry holds the
codeword's digits, int8 and zero behind the last one, and of another that holds their number.

Few tokens (`few_kernel`): an entry's digits are multiplied by the activations at the running position, of one token
after the other, and the position moves on by their number. Four windows share a load of 64 bits; what a row's last four
hold beyond the row meets the zeros behind x, so that no loop has a branch but its end. With one token and strings of up
to 8 digits, x86 takes 7 instructions a codeword: two for the index, conversion in two, product, number, position.
Many tokens (`many_kernel`): a block of rows is decoded to float32, a chunk of columns at a time, and multiplied by
panels of tokens, which lie side by side in the lanes of the sums.
Column scales are multiplied into x where it is laid out, a row's step into its sums; exceptions are added to them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from qmoe_lite.coding.vectors import address_of, code_bits, load_64_at, store
from qmoe_lite.coding.window_sums import (
    accumulate_sums,
    add_codeword,
    add_column,
    add_sums,
    digits_at,
    no_sums,
    store_totals,
)

EXPERT, CHOICE, FIRST, COUNT, PANEL = range(5)  # columns of `jobs`: expert, its place in `experts`, tokens, first panel
TASK_ROWS = 48  # a multiple of the rows that any panel width takes at a time
CHUNK = 512  # columns decoded at a time
CARRY = 64  # digits that four codewords may reach behind a chunk, 16 each
_STRIDE = CHUNK + CARRY
LONGEST = 16  # digits of a codeword at most
_COLUMNS = 64  # laid out at a time
_LARGEST = np.float32(1e33)
_LARGEST_SCALED = np.float32(1e31)  # 127 times so much in each column cannot overflow before a step makes it small


@njit(forceinline=True, error_model="numpy")
def _scaled(value: np.float32, scale: np.float32) -> tuple[np.float32, int]:
    """Return value * scale, and 1 if one of them is not finite or too large, else 0."""
    scaled = value * scale
    return scaled, np.int64(not (abs(value) <= _LARGEST and abs(scaled) <= _LARGEST_SCALED))


@njit(parallel=True, cache=True, fastmath=False, error_model="numpy", nogil=True)
def lay_rows(
    x: NDArray[np.float32], scales: NDArray[np.float32], jobs: NDArray[np.int64], out: NDArray[np.float32]
) -> bool:
    """Lay x (N, C) out for each job of few tokens: out (J, tokens, C + padding), times its expert's column scales.

    scales (E, C), or (0, C) for ones. What a job lacks in tokens, and the padding, are zeros. Returns whether all of x
    that the jobs name is finite, and not so large that sums of it might not be.
    """
    tokens, columns = out.shape[1], x.shape[1]
    spoilt = 0
    for task in prange(len(jobs) * tokens):
        job, token = jobs[task // tokens], task % tokens
        own = out[task // tokens, token]
        if token >= job[COUNT]:
            own[:] = 0
        else:
            row, one = x[job[FIRST] + token], np.float32(1)
            for column in range(columns):
                scale = scales[job[EXPERT], column] if len(scales) else one
                own[column], wrong = _scaled(row[column], scale)
                spoilt += wrong
            own[columns:] = 0
    return spoilt == 0


@njit(parallel=True, cache=True, fastmath=False, error_model="numpy", nogil=True)
def lay_panels(
    x: NDArray[np.float32], scales: NDArray[np.float32], jobs: NDArray[np.int64], out: NDArray[np.float32]
) -> bool:
    """Lay x (N, C) out for each job of many tokens: out (panels, C, lanes), tokens side by side; see `lay_rows`."""
    lanes, columns = out.shape[2], x.shape[1]
    pieces = (columns + _COLUMNS - 1) // _COLUMNS
    spoilt = 0
    for task in prange(len(jobs) * pieces):
        job, start = jobs[task // pieces], task % pieces * _COLUMNS
        end, one = min(start + _COLUMNS, columns), np.float32(1)
        for panel in range((job[COUNT] + lanes - 1) // lanes):
            own, first = out[job[PANEL] + panel], job[FIRST] + panel * lanes
            held = min(lanes, job[COUNT] - panel * lanes)
            for column in range(start, end):
                scale = scales[job[EXPERT], column] if len(scales) else one
                for token in range(held):
                    own[column, token], wrong = _scaled(x[first + token, column], scale)
                    spoilt += wrong
                own[column, held:] = 0
    return spoilt == 0


@njit(forceinline=True, error_model="numpy")
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


@njit(forceinline=True, error_model="numpy")
def _four_windows(row: np.uint64, shift: np.uint64, group: int, bits: Any) -> np.uint64:
    """Four codewords and the two bits before: group 0 or 1 of the eight that begin `shift` bits behind `row`."""
    bit = np.uint64(4 * group) * code_bits(bits)
    return load_64_at(row + (bit >> np.uint64(3))) >> (shift + (bit & np.uint64(7)))


@njit(forceinline=True, error_model="numpy")
def _window(word: np.uint64, k: int, bits: Any) -> np.uint64:
    return (word >> (np.uint64(k) * code_bits(bits))) & ((np.uint64(4) << code_bits(bits)) - np.uint64(1))


@njit(forceinline=True, error_model="numpy")
def _add_four(
    word: np.uint64,
    bits: Any,
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


@njit(forceinline=True, error_model="numpy")
def _add_row(
    stream: np.uint64,
    codeword: int,
    count: int,
    bits: Any,
    digits: np.uint64,
    width: tuple[int, ...],
    lengths: NDArray[np.uint8],
    tokens: tuple[int, ...],
    place: np.uint64,
    token_bytes: np.uint64,
    sums: np.uint64,
) -> None:
    """Write a row's sums, one a token. The last load begins within the row, so that it ends within the padding."""
    bit = np.uint64(codeword) * code_bits(bits)
    row, shift = stream + (bit >> np.uint64(3)), bit & np.uint64(7)
    groups = (count + 3) // 4
    a = b = c = d = no_sums(tokens, width)
    for _ in range(groups >> 1):
        word = _four_windows(row, shift, 0, bits)
        place, a, b, c, d = _add_four(word, bits, digits, width, lengths, place, token_bytes, a, b, c, d)
        word = _four_windows(row, shift, 1, bits)
        place, a, b, c, d = _add_four(word, bits, digits, width, lengths, place, token_bytes, a, b, c, d)
        row += code_bits(bits)
    if groups & 1:
        word = _four_windows(row, shift, 0, bits)
        place, a, b, c, d = _add_four(word, bits, digits, width, lengths, place, token_bytes, a, b, c, d)
    store_totals(sums, add_sums(add_sums(a, b), add_sums(c, d)))


@njit(forceinline=True, error_model="numpy")
def _first_at(positions: NDArray[np.uint16], first: int, end: int, least: int) -> int:
    """First place in [first, end) of sorted positions that holds `least` or more; `end` if there is none."""
    while first < end:
        middle = (first + end) // 2
        if np.int64(positions[middle]) < least:
            first = middle + 1
        else:
            end = middle
    return first


@njit(forceinline=True, error_model="numpy")
def _block_of(columns: int, row: int) -> tuple[int, int]:
    """A row's block of exceptions, and the position of its first column there."""
    block_rows = max(1, 65536 // columns)
    return row // block_rows, row % block_rows * columns


@njit(forceinline=True, error_model="numpy")
def _first_exception(starts: NDArray[np.int32], positions: NDArray[np.uint16], columns: int, row: int) -> int:
    """Place of the first exception in a row or behind it."""
    block, before = _block_of(columns, row)
    return _first_at(positions, np.int64(starts[block]), np.int64(starts[block + 1]), before)


@njit(forceinline=True, error_model="numpy")
def _end_of_exceptions(
    starts: NDArray[np.int32], positions: NDArray[np.uint16], columns: int, row: int, first: int
) -> tuple[int, int]:
    """Place behind a row's exceptions, of which the first is at `first`; the position of the row's first column."""
    block, before = _block_of(columns, row)
    last = np.int64(starts[block + 1])
    while first < last and np.int64(positions[first]) < before + columns:
        first += 1
    return first, before


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
    bits: Any,
    width: tuple[int, ...],
    tokens: tuple[int, ...],
    jobs: NDArray[np.int64],
    x: NDArray[np.float32],
    y: NDArray[np.float32],
) -> None:
    """Fill y (N, R) for jobs of up to len(tokens) tokens.

    The first eight are a `WindowStack`'s. digits (4 << bits, len(width)), lengths (4 << bits,): the dictionary's
    tables. x (J, len(tokens), C + padding) from `lay_rows`. Of the tuples only the length counts (bits: see
    `code_bits`).
    """
    firsts = _first_codewords(row_codewords, fewest, jobs)
    blocks = firsts.shape[1]
    for task in prange(len(jobs) * blocks):
        job, laid = jobs[task // blocks], x[task // blocks]
        expert, first = job[EXPERT], task % blocks * TASK_ROWS
        stream = address_of(codes) + np.uint64(offsets[expert])
        codeword = firsts[task // blocks, task % blocks]
        found = _first_exception(exception_starts[expert], exception_positions, columns, first)
        sums = np.empty(len(tokens), dtype=np.float32)
        for row in range(first, min(first + TASK_ROWS, steps.shape[1])):
            count = np.int64(row_codewords[expert, row]) + fewest[expert]
            place, token_bytes = address_of(laid), np.uint64(4 * laid.shape[1])
            own = address_of(sums)
            _add_row(stream, codeword, count, bits, address_of(digits), width, lengths, tokens, place, token_bytes, own)
            codeword += count
            end, before = _end_of_exceptions(exception_starts[expert], exception_positions, columns, row, found)
            for i in range(found, end):
                for token in range(len(tokens)):
                    column = np.int64(exception_positions[i]) - before
                    sums[token] += np.float32(exception_values[i]) * laid[token, column]
            found = end
            for token in range(job[COUNT]):
                y[job[FIRST] + token, row] = steps[expert, row] * sums[token]


@njit(forceinline=True, error_model="numpy")
def _write_four(
    word: np.uint64,
    bits: Any,
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


@njit(forceinline=True, error_model="numpy")
def _write_chunk(
    stream: np.uint64,
    bit: np.uint64,
    bits: Any,
    digits: np.uint64,
    width: tuple[int, ...],
    lengths: NDArray[np.uint8],
    place: np.uint64,
    end: np.uint64,
) -> tuple[np.uint64, np.uint64]:
    """Write a row's digits from `place` up to `end`, or up to CARRY digits more; return the next bit and place."""
    while place < end:
        word = load_64_at(stream + (bit >> np.uint64(3))) >> (bit & np.uint64(7))
        place = _write_four(word, bits, digits, width, lengths, place)
        bit += np.uint64(4) * code_bits(bits)
    return bit, place


@njit(forceinline=True, error_model="numpy")
def _multiply_chunk(
    tile: NDArray[np.float32],
    columns: int,
    rows: tuple[int, ...],
    lanes: tuple[int, ...],
    x: np.uint64,
    sums: NDArray[np.float32],
) -> None:
    """Add the product of a tile's first columns with a panel's at address `x` to sums (TASK_ROWS, lanes)."""
    row_bytes, lane_bytes = np.uint64(4 * _STRIDE), np.uint64(4 * len(lanes))
    for row in range(0, TASK_ROWS, len(rows)):
        total = no_sums(rows, lanes)
        weight, place = address_of(tile) + row_bytes * np.uint64(row), x
        for _ in range(columns):
            total = add_column(total, weight, row_bytes, place)
            weight += np.uint64(4)
            place += lane_bytes
        accumulate_sums(address_of(sums) + lane_bytes * np.uint64(row), lane_bytes, total)


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
    bits: Any,
    width: tuple[int, ...],
    rows: tuple[int, ...],
    lanes: tuple[int, ...],
    jobs: NDArray[np.int64],
    x: NDArray[np.float32],
    y: NDArray[np.float32],
) -> None:
    """Fill y (N, R) for jobs of many tokens, `rows` at a time; see `few_kernel`. x (panels, C, lanes): `lay_panels`."""
    firsts = _first_codewords(row_codewords, fewest, jobs)
    blocks = firsts.shape[1]
    for task in prange(len(jobs) * blocks):
        job = jobs[task // blocks]
        expert, first = job[EXPERT], task % blocks * TASK_ROWS
        held = min(TASK_ROWS, steps.shape[1] - first)
        panels = (job[COUNT] + len(lanes) - 1) // len(lanes)
        stream = address_of(codes) + np.uint64(offsets[expert])
        codeword = firsts[task // blocks, task % blocks]
        tile = np.zeros((TASK_ROWS, _STRIDE), dtype=np.float32)
        sums = np.zeros((panels, TASK_ROWS, len(lanes)), dtype=np.float32)
        bit, written = np.empty(held, dtype=np.uint64), np.zeros(held, dtype=np.uint64)
        for i in range(held):
            bit[i] = np.uint64(codeword) * code_bits(bits)
            codeword += np.int64(row_codewords[expert, first + i]) + fewest[expert]
        for start in range(0, columns, CHUNK):
            wide = min(CHUNK, columns - start)
            for i in range(held):
                tile[i, :CARRY] = tile[i, CHUNK:]
                place = address_of(tile) + np.uint64(4 * _STRIDE * i)
                end = place + np.uint64(4 * wide)
                bit[i], behind = _write_chunk(
                    stream, bit[i], bits, address_of(digits), width, lengths, place + written[i], end
                )
                written[i] = behind - end
            for panel in range(panels):
                own = address_of(x) + np.uint64(4 * len(lanes) * ((job[PANEL] + panel) * columns + start))
                _multiply_chunk(tile, wide, rows, lanes, own, sums[panel])
        found = _first_exception(exception_starts[expert], exception_positions, columns, first)
        for i in range(held):
            row = first + i
            last, before = _end_of_exceptions(exception_starts[expert], exception_positions, columns, row, found)
            for panel in range(panels):
                for at in range(found, last):
                    column, value = np.int64(exception_positions[at]) - before, np.float32(exception_values[at])
                    for lane in range(len(lanes)):
                        sums[panel, i, lane] += value * x[job[PANEL] + panel, column, lane]
                for lane in range(min(len(lanes), job[COUNT] - panel * len(lanes))):
                    y[job[FIRST] + panel * len(lanes) + lane, row] = steps[expert, row] * sums[panel, i, lane]
            found = last
