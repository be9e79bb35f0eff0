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
from qmoe_lite.coding.vectors import (
    add,
    add_at,
    address_of,
    load_64_at,
    prefetch_first,
    prefetch_second,
    store,
    zeros,
)

STEP_IN_BYTES = (2, 4)  # fields of an entry of `Codebook.gather_table` that leave room for the step in x in bytes


@inlined(error_model="numpy")
def _code(word: np.uint64, k: np.uint64, bits: np.uint64) -> np.uint64:
    return (word >> (k * bits)) & ((np.uint64(1) << bits) - np.uint64(1))


@inlined(error_model="numpy")
def _group(row: np.uint64, shift: np.uint64, group: int, bits: np.uint64) -> np.uint64:
    """Four codewords: group 0, 1, 2 or 3 of the sixteen that begin `shift` bits behind the address `row`."""
    bit = np.uint64(4 * group) * bits
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
    bits: np.uint64,
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


@cache
def rows_gatherer(width: int, fields: int, tokens: int, sums: int) -> Any:
    """Compile the walk of a task's rows for entries of so many fields, and so many tokens and sums of a row.

    `width` is that of the codewords, or 0 for one that the walk is told.
    """
    entry, group, lanes = (0,) * fields, (0,) * tokens, (0,) * sums

    def gather_rows(
        rows: np.uint64,
        codes: np.uint64,
        told: np.uint64,
        table: np.uint64,
        chunks: np.uint64,
        walked: Any,
        sums: np.uint64,
    ) -> np.uint64:
        """Add rows to the lanes at `sums`; walked (rows + 1, 3): first bit, groups of four codewords, place in x.

        Where a row's last group has fewer than four, what follows it in the stream is added too: it finds the zeros
        behind x. The last of `walked` is the next task's first bit.
        """
        bits = np.uint64(width) if width else told
        walks = carray(walked, (np.int64(rows) + 1, 3))
        sixteen = np.uint64(2) * bits
        # the next task's codes are asked for while these are walked: chunks read them in an order no processor guesses
        ahead = (walks[rows, 0] - walks[0, 0]) >> np.uint64(3)
        for chunk in range(chunks):
            share = (np.uint64(1) << np.uint64(16)) // (chunks - chunk)
            own = sums
            for i in range(rows):
                following = codes + (walks[i + 1, 0] >> np.uint64(3))
                prefetch_first(following)
                prefetch_first(following + np.uint64(64))
                bit, groups, place = walks[i]
                if chunk + np.uint64(1) < chunks:  # whole sixteens: so many for most rows that the processor foresees
                    groups = ((groups * share >> np.uint64(16)) + np.uint64(2)) & ~np.uint64(3)
                walks[i, 0], walks[i, 1] = bit + np.uint64(4) * groups * bits, walks[i, 1] - groups
                a = b = c = d = zeros(lanes)
                row, shift = codes + (bit >> np.uint64(3)), bit & np.uint64(7)
                end = row + sixteen * (groups >> np.uint64(2))
                while row != end:
                    prefetch_second(row + ahead)
                    four = _group(row, shift, 0, bits)
                    place, a, b, c, d = _gather_four(four, table, bits, entry, group, place, a, b, c, d)
                    four = _group(row, shift, 1, bits)
                    place, a, b, c, d = _gather_four(four, table, bits, entry, group, place, a, b, c, d)
                    four = _group(row, shift, 2, bits)
                    place, a, b, c, d = _gather_four(four, table, bits, entry, group, place, a, b, c, d)
                    four = _group(row, shift, 3, bits)
                    place, a, b, c, d = _gather_four(four, table, bits, entry, group, place, a, b, c, d)
                    row += sixteen
                for _ in range(groups & np.uint64(3)):
                    four = load_codewords(row, shift)
                    place, a, b, c, d = _gather_four(four, table, bits, entry, group, place, a, b, c, d)
                    shift += np.uint64(4) * bits
                store(own, add_at(add(add(a, b), add(c, d)), own))
                walks[i, 2] = place
                own += np.uint64(4 * len(lanes))
        return np.uint64(0)

    return compiled(gather_rows, "uint64(uint64, uint64, uint64, uint64, uint64, CPointer(uint64), uint64)")


@inlined(error_model="numpy")
def _gather_rows(
    codes: NDArray[np.uint8],
    offset: int,
    row_codewords: NDArray[Any],
    fewest: NDArray[np.int32],
    table: np.uint64,
    bits: np.uint64,
    gatherer: np.uint64,
    job: NDArray[np.int64],
    levels: NDArray[np.float32],
    tokens: int,
    slots: NDArray[np.float32],
    chunks: int,
    first: int,
    codeword: int,
    sums: NDArray[np.float32],
    y: NDArray[np.float32],
) -> None:
    """Fill y[tokens of the job, first : first + TASK_ROWS]; `codeword` is the number of the first row's first."""
    expert, rows = job[EXPERT], len(sums)
    walked = np.empty((rows + 1, 3), dtype=np.uint64)
    for i in range(rows):
        count = np.int64(row_codewords[expert, first + i]) + fewest[expert]
        walked[i, 0], walked[i, 1], walked[i, 2] = np.uint64(codeword) * bits, (count + 3) // 4, address_of(slots)
        codeword += count
    walked[rows, 0] = np.uint64(codeword) * bits
    stream = address_of(codes) + np.uint64(offset)
    call(gatherer, (np.uint64(rows), stream, bits, table, np.uint64(chunks), address_of(walked), address_of(sums)))
    choice = job[CHOICE]
    for token in range(job[COUNT]):
        for i in range(rows):
            row = first + i
            if levels.shape[2] == 1:  # symmetric: the sum holds the negated ones already
                total = levels[choice, row, 0] * sums[i, token]
            elif levels.shape[2] == 2:
                total = levels[choice, row, 0] * sums[i, token] + levels[choice, row, 1] * sums[i, token + tokens]
            else:
                total = levels[choice, row, 0] * sums[i, token + 2 * tokens]
                total += levels[choice, row, 1] * sums[i, token + tokens]
                total += levels[choice, row, 2] * sums[i, token]
            y[job[FIRST] + token, row] = total


@njit(parallel=True, cache=True, fastmath=False, error_model="numpy", nogil=True)
def gather_kernel(
    codes: NDArray[np.uint8],
    offsets: NDArray[np.int64],
    row_codewords: NDArray[Any],
    fewest: NDArray[np.int32],
    table: int,
    bits: int,
    gatherer: int,
    tokens: int,
    lanes: int,
    jobs: NDArray[np.int64],
    levels: NDArray[np.float32],
    slots: NDArray[np.float32],
    chunks: int,
    y: NDArray[np.float32],
) -> None:
    """Fill y (N, R) for jobs of up to `tokens` tokens.

    codes (bytes,), offsets (E + 1,), row_codewords (E, R), fewest (E,): the matrices. table, gatherer: addresses of
    `Codebook.gather_table` and of a `rows_gatherer`. levels (choices, R, L). slots (J, C + padding, digits * tokens)
    from `expand_kernel`: L = 1, offset 0 and negated from `tokens` on, and `lanes`, a row's sums, is at least `tokens`;
    else offset (digits - 2) * tokens, and `lanes` is at least (digits - 1) * tokens. Rows are walked in `chunks`,
    equal shares of their codewords, so that x stays in the first-level cache: all rows of a task in one, then in the
    next.
    """
    firsts = first_codewords(row_codewords, fewest, jobs)
    blocks = firsts.shape[1]
    for task in prange(len(jobs) * blocks):
        job, first = jobs[task // blocks], task % blocks * TASK_ROWS
        _gather_rows(
            codes,
            offsets[job[EXPERT]],
            row_codewords,
            fewest,
            np.uint64(table),
            np.uint64(bits),
            np.uint64(gatherer),
            job,
            levels,
            tokens,
            slots[task // blocks],
            chunks,
            first,
            firsts[task // blocks, task % blocks],
            np.zeros((min(TASK_ROWS, levels.shape[1] - first), lanes), dtype=np.float32),
            y,
        )
