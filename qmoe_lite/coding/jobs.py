"""What the two kernels of the product share: their jobs, x laid out for them, and the entries of their tables.

A job is a group of tokens that go through one expert; a task is a block of a job's rows, and tasks are spread over the
threads. Few tokens are for `gather`, more of them for `block`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from qmoe_lite.coding.inlined import inlined
from qmoe_lite.coding.vectors import load_32_at, load_64_at

EXPERT, CHOICE, FIRST, COUNT = range(4)  # columns of `jobs`: expert, its place in `levels`, first token, tokens
TASK_ROWS = 64  # even
_COLUMNS = 64  # expanded at a time
_LARGEST = np.float32(1e33)  # sums of so many columns cannot overflow before a level makes them small


@njit(parallel=True, cache=True, fastmath=False, error_model="numpy", nogil=True)
def expand_kernel(
    x: NDArray[np.float32], jobs: NDArray[np.int64], offset: int, negated: int, out: NDArray[np.float32]
) -> bool:
    """Lay x (N, C) out for each job: out (J, C + padding, group), tokens side by side from `offset` on, else zeros.

    Unless `negated` is -1, -x lies from there on. Returns whether all of x that the jobs name is finite, and not so
    large that sums of it might not be.
    """
    pieces = (out.shape[1] + _COLUMNS - 1) // _COLUMNS
    spoilt = 0
    for task in prange(len(jobs) * pieces):
        job = task // pieces
        start = task % pieces * _COLUMNS
        spoilt += _expand_piece(
            x[:, start : start + _COLUMNS], jobs[job], offset, negated, out[job, start : start + _COLUMNS]
        )
    return spoilt == 0


@inlined(error_model="numpy")
def _expand_piece(
    x: NDArray[np.float32], job: NDArray[np.int64], offset: int, negated: int, out: NDArray[np.float32]
) -> int:
    first, count, columns = job[FIRST], job[COUNT], x.shape[1]
    spoilt = 0
    out[:] = 0
    for token in range(count):
        row = x[first + token]
        for column in range(columns):
            value = row[column]
            out[column, offset + token] = value
            if negated >= 0:
                out[column, negated + token] = -value
            spoilt += not abs(value) <= _LARGEST
    return spoilt


@inlined(error_model="numpy")
def load_entry(table: np.uint64, code: np.uint64, fields: tuple[int, ...]) -> np.uint64:
    """Return the table entry of a code, given the address of a table of uint32 (up to three fields) or uint64."""
    if len(fields) <= 3:
        return load_32_at(table + np.uint64(4) * code)
    return load_64_at(table + np.uint64(8) * code)


@inlined(error_model="numpy")
def entry_part(entry: np.uint64, i: int) -> np.uint64:
    """Return field i of an entry of a kernel's table."""
    return (entry >> np.uint64(8 * i)) & np.uint64(255)


@inlined(error_model="numpy")
def entry_step(entry: np.uint64, fields: tuple[int, ...]) -> np.uint64:
    """Return what lies above the fields: how far the codeword goes."""
    return entry >> np.uint64(8 * len(fields))


@inlined(error_model="numpy")
def load_codewords(codes: np.uint64, bit: np.uint64) -> np.uint64:
    """Return the stream at an address from `bit` on."""
    return load_64_at(codes + (bit >> np.uint64(3))) >> (bit & np.uint64(7))  # 57 bits: four codewords, or 16-bit ones


@inlined(error_model="numpy")
def first_codewords(row_codewords: NDArray[Any], fewest: NDArray[np.int32], jobs: NDArray[np.int64]) -> Any:
    """Return the number of each task's first codeword within its expert: (J, tasks of a job)."""
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
