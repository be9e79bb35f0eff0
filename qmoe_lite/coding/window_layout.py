"""Activations as the windows product's kernels read them: an expert's column scales multiplied in, and checked."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from qmoe_lite.coding.inlined import inlined

EXPERT, CHOICE, FIRST, COUNT, PANEL = range(5)  # columns of `jobs`: expert, its place in `experts`, tokens, first panel
_COLUMNS = 64  # laid out at a time
_LARGEST = np.float32(1e33)
_LARGEST_SCALED = np.float32(1e31)  # 127 times so much in each column cannot overflow before a step makes it small


@inlined(error_model="numpy")
def _lay(row: NDArray[np.float32], scales: NDArray[np.float32], out: NDArray[np.float32]) -> Any:
    """Write row * scales; return 1 if a number is not finite or too large, else 0. LLVM makes vectors of this loop."""
    spoilt = np.int32(0)
    for i in range(len(row)):
        value = row[i]
        scaled = value * scales[i]
        out[i] = scaled
        spoilt |= np.int32(not (abs(value) <= _LARGEST and abs(scaled) <= _LARGEST_SCALED))
    return np.int64(spoilt)


@njit(parallel=True, cache=True, fastmath=False, error_model="numpy", nogil=True)
def lay_rows(
    x: NDArray[np.float32], scales: NDArray[np.float32], jobs: NDArray[np.int64], out: NDArray[np.float32]
) -> bool:
    """Lay x (N, C) out for each job of few tokens: out (J, tokens, C + padding), times its expert's column scales.

    scales (E, C), or (0, C) for ones. What a job lacks in tokens, and the padding, are zeros. Returns whether all of x
    that the jobs name is finite, and not so large that sums of it might not be.
    """
    tokens, columns = out.shape[1], x.shape[1]
    ones = np.ones(columns, dtype=np.float32)
    spoilt = 0
    for task in prange(len(jobs) * tokens):
        job, token = jobs[task // tokens], task % tokens
        own = out[task // tokens, token]
        if token >= job[COUNT]:
            own[:] = 0
        else:
            spoilt += _lay(x[job[FIRST] + token], scales[job[EXPERT]] if len(scales) else ones, own)
            own[columns:] = 0
    return spoilt == 0


@njit(parallel=True, cache=True, fastmath=False, error_model="numpy", nogil=True)
def lay_panels(
    x: NDArray[np.float32], scales: NDArray[np.float32], jobs: NDArray[np.int64], out: NDArray[np.float32]
) -> bool:
    """Lay x (N, C) out for each job of many tokens: out (panels, C, lanes), tokens side by side; see `lay_rows`."""
    lanes, columns = out.shape[2], x.shape[1]
    pieces = (columns + _COLUMNS - 1) // _COLUMNS
    ones = np.ones(columns, dtype=np.float32)
    spoilt = 0
    for task in prange(len(jobs) * pieces):
        job, start = jobs[task // pieces], task % pieces * _COLUMNS
        end = min(start + _COLUMNS, columns)
        scale = (scales[job[EXPERT]] if len(scales) else ones)[start:end]
        rows = np.zeros((lanes, _COLUMNS), dtype=np.float32)
        for panel in range((job[COUNT] + lanes - 1) // lanes):
            own, first = out[job[PANEL] + panel, start:end], job[FIRST] + panel * lanes
            held = min(lanes, job[COUNT] - panel * lanes)
            for token in range(held):
                spoilt += _lay(x[first + token, start:end], scale, rows[token])
            rows[held:] = 0
            for column in range(len(own)):
                for token in range(lanes):
                    own[column, token] = rows[token, column]
    return spoilt == 0
