"""The product of few tokens: a row's codewords are walked once for all of them, whose sums stay in registers.

x is laid out in groups of `digits * tokens` floats a column that hold zeros and once the tokens' values, so that what
lies at a nonzero's slot IS what it adds to the sums of each level and token: one load and addition a nonzero, no sign,
no multiplication. An absent nonzero points at the zero slot. Where a row has one level, the group holds the values
negated too, and there is one sum a token. Rows are walked one by one: only the place in x waits for the codeword
before, one addition, and the processor looks tens of codewords ahead. Sixteen codewords of b bits are 2 b bytes, so
that a row keeps its shift within a byte. With one token, one level and 10 bits, x86 takes 8.6 instructions a codeword,
which is 15 weights: 1.3 for its code, 4 for the entry and its parts, 2 for the nonzeros, 1 for the place.
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
from qmoe_lite.coding.vectors import (
    add,
    add_at,
    address_of,
    code_bits,
    load_64_at,
    prefetch_first,
    prefetch_second,
    store,
    zeros,
)

STEP_IN_BYTES = (2, 4)  # fields of an entry of `Codebook.gather_table` that leave room for the step in x in bytes


@inlined(error_model="numpy")
def _code(word: np.uint64, k: np.uint64, bits: Any) -> np.uint64:
    return (word >> (k * code_bits(bits))) & ((np.uint64(1) << code_bits(bits)) - np.uint64(1))


@inlined(error_model="numpy")
def _group(row: np.uint64, shift: np.uint64, group: int, bits: Any) -> np.uint64:
    """Four codewords: group 0, 1, 2 or 3 of the sixteen that begin `shift` bits behind the address `row`."""
    bit = np.uint64(4 * group) * code_bits(bits)
    return load_64_at(row + (bit >> np.uint64(3))) >> (shift + (bit & np.uint64(7)))


@inlined(error_model="numpy")
def _gather_codeword(
    code: np.uint64,
    table: np.uint64,
    fields: tuple[int, ...],
    tokens: tuple[int, ...],
    place: np.uint64,
    total: Any,
) -> tuple[np.uint64, Any]:
    """Add what lies at a codeword's slots; return the place behind the codeword, and the sums."""
    slot_bytes = np.uint64(4 * len(tokens))
    entry = load_entry(table, code, fields)
    for i in range(len(fields)):
        total = add_at(total, place + slot_bytes * entry_part(entry, i))
    if len(fields) in STEP_IN_BYTES:
        return place + entry_step(entry, fields), total
    return place + slot_bytes * entry_step(entry, fields), total


@inlined(error_model="numpy")
def _gather_four(
    word: np.uint64,
    table: np.uint64,
    bits: Any,
    fields: tuple[int, ...],
    tokens: tuple[int, ...],
    place: np.uint64,
    sum0: Any,
    sum1: Any,
    sum2: Any,
    sum3: Any,
) -> tuple[np.uint64, Any, Any, Any, Any]:
    """Add four codewords, one to each sum: an addition need not wait for the one before."""
    place, sum0 = _gather_codeword(_code(word, np.uint64(0), bits), table, fields, tokens, place, sum0)
    place, sum1 = _gather_codeword(_code(word, np.uint64(1), bits), table, fields, tokens, place, sum1)
    place, sum2 = _gather_codeword(_code(word, np.uint64(2), bits), table, fields, tokens, place, sum2)
    place, sum3 = _gather_codeword(_code(word, np.uint64(3), bits), table, fields, tokens, place, sum3)
    return place, sum0, sum1, sum2, sum3


@inlined(error_model="numpy")
def _gather_row(
    codes: np.uint64,
    bit: np.uint64,
    groups: np.uint64,
    ahead: np.uint64,
    table: np.uint64,
    bits: Any,
    fields: tuple[int, ...],
    tokens: tuple[int, ...],
    lanes: tuple[int, ...],
    place: np.uint64,
    sums: np.uint64,
) -> np.uint64:
    """Walk groups of four codewords from `bit` on; add to the lanes at `sums`, and return the place behind them.

    Where the row's last group has fewer than four, what follows it in the stream is added too: it finds the zeros
    behind x. What lies `ahead` bytes behind each codeword is asked for.
    """
    a = b = c = d = zeros(lanes)
    row, shift = codes + (bit >> np.uint64(3)), bit & np.uint64(7)
    sixteen = np.uint64(2) * code_bits(bits)
    end = row + sixteen * (groups >> np.uint64(2))
    while row != end:
        prefetch_second(row + ahead)
        place, a, b, c, d = _gather_four(_group(row, shift, 0, bits), table, bits, fields, tokens, place, a, b, c, d)
        place, a, b, c, d = _gather_four(_group(row, shift, 1, bits), table, bits, fields, tokens, place, a, b, c, d)
        place, a, b, c, d = _gather_four(_group(row, shift, 2, bits), table, bits, fields, tokens, place, a, b, c, d)
        place, a, b, c, d = _gather_four(_group(row, shift, 3, bits), table, bits, fields, tokens, place, a, b, c, d)
        row += sixteen
    bit = shift
    for _ in range(groups & np.uint64(3)):
        place, a, b, c, d = _gather_four(load_codewords(row, bit), table, bits, fields, tokens, place, a, b, c, d)
        bit += np.uint64(4) * code_bits(bits)
    store(sums, add_at(add(add(a, b), add(c, d)), sums))
    return place


@inlined(error_model="numpy")
def _gather_rows(
    codes: NDArray[np.uint8],
    offset: int,
    row_codewords: NDArray[Any],
    fewest: NDArray[np.int32],
    table: NDArray[Any],
    bits: Any,
    fields: tuple[int, ...],
    tokens: tuple[int, ...],
    lanes: tuple[int, ...],
    job: NDArray[np.int64],
    levels: NDArray[np.float32],
    slots: NDArray[np.float32],
    chunks: int,
    first: int,
    codeword: int,
    y: NDArray[np.float32],
) -> None:
    """Fill y[tokens of the job, first : first + TASK_ROWS]; `codeword` is the number of the first row's first."""
    expert = job[EXPERT]
    rows = min(TASK_ROWS, levels.shape[1] - first)
    bit, left = np.empty(rows + 1, dtype=np.uint64), np.empty(rows, dtype=np.uint64)
    place = np.full(rows, address_of(slots))
    sums = np.zeros(rows * len(lanes), dtype=np.float32)
    stream = address_of(codes) + np.uint64(offset)
    for i in range(rows):
        count = np.int64(row_codewords[expert, first + i]) + fewest[expert]
        bit[i], left[i] = np.uint64(codeword) * code_bits(bits), (count + 3) // 4
        codeword += count
    bit[rows] = np.uint64(codeword) * code_bits(bits)
    # the next task's codes are asked for while these are walked: chunks read them in an order no processor guesses
    ahead = (bit[rows] - bit[0]) >> np.uint64(3)
    for chunk in range(chunks):
        share = np.uint64((1 << 16) // (chunks - chunk))
        for i in range(rows):
            following = stream + (bit[i + 1] >> np.uint64(3))
            prefetch_first(following)
            prefetch_first(following + np.uint64(64))
            groups = left[i]
            if chunk < chunks - 1:  # whole sixteens: so many for most rows that the processor foresees the loop's end
                groups = ((groups * share >> np.uint64(16)) + np.uint64(2)) & ~np.uint64(3)
            own = address_of(sums) + np.uint64(4 * len(lanes) * i)
            place[i] = _gather_row(
                stream, bit[i], groups, ahead, address_of(table), bits, fields, tokens, lanes, place[i], own
            )
            bit[i] += np.uint64(4) * groups * code_bits(bits)
            left[i] -= groups
    width, choice = len(tokens), job[CHOICE]
    for token in range(job[COUNT]):
        for i in range(rows):
            row, at = first + i, len(lanes) * i + token
            if levels.shape[2] == 1:  # symmetric: the sum holds the negated ones already
                total = levels[choice, row, 0] * sums[at]
            elif levels.shape[2] == 2:
                total = levels[choice, row, 0] * sums[at] + levels[choice, row, 1] * sums[at + width]
            else:
                total = levels[choice, row, 0] * sums[at + 2 * width] + levels[choice, row, 1] * sums[at + width]
                total += levels[choice, row, 2] * sums[at]
            y[job[FIRST] + token, row] = total


@njit(parallel=True, cache=True, fastmath=False, error_model="numpy", nogil=True)
def gather_kernel(
    codes: NDArray[np.uint8],
    offsets: NDArray[np.int64],
    row_codewords: NDArray[Any],
    fewest: NDArray[np.int32],
    table: NDArray[Any],
    bits: Any,
    fields: tuple[int, ...],
    tokens: tuple[int, ...],
    lanes: tuple[int, ...],
    jobs: NDArray[np.int64],
    levels: NDArray[np.float32],
    slots: NDArray[np.float32],
    chunks: int,
    y: NDArray[np.float32],
) -> None:
    """Fill y (N, R) for jobs of up to len(tokens) tokens.

    codes (bytes,), offsets (E + 1,), row_codewords (E, R), fewest (E,): the matrices. table: `Codebook.gather_table`.
    levels (choices, R, L). slots (J, C + padding, digits * tokens) from `expand_kernel`: L = 1, offset 0 and negated
    from `tokens` on, and `lanes` is at least `tokens`; else offset (digits - 2) * tokens, and `lanes` is at least
    (digits - 1) * tokens. Of the tuples only the length counts (bits: see `code_bits`). Rows are walked in `chunks`,
    equal shares of their codewords, so that x stays in the first-level cache: all rows of a task in one, then in the
    next.
    """
    firsts = first_codewords(row_codewords, fewest, jobs)
    blocks = firsts.shape[1]
    for task in prange(len(jobs) * blocks):
        job = jobs[task // blocks]
        _gather_rows(
            codes,
            offsets[job[EXPERT]],
            row_codewords,
            fewest,
            table,
            bits,
            fields,
            tokens,
            lanes,
            job,
            levels,
            slots[task // blocks],
            chunks,
            task % blocks * TASK_ROWS,
            firsts[task // blocks, task % blocks],
            y,
        )
