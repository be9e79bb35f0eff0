"""CUDA twin of :mod:`qmoe_lite.coding.windows`: decode packets of windows, a warp a row and a lane a codeword.

A lane's string goes to shared memory first, from where the warp writes a stretch of the row side by side: written where
it belongs at once, each of its digits would be a transaction of its own.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from qmoe_lite.cuda import launch
from qmoe_lite.cuda.codec import BLOCKS, warp_scan
from qmoe_lite.cuda.intrinsics import load_quad, pair_at, store_float
from qmoe_lite.cuda.launch import WARP, cuda, kernel
from qmoe_lite.cuda.packets import KINDS, bits16
from qmoe_lite.cuda.variants import product_table
from qmoe_lite.cuda.window_packets import WindowPackets, codewords_each
from qmoe_lite.errors import DtypeError

DENSE_DTYPES = tuple(KINDS)
_NO_COLUMN = (1 << 31) - 1
WARPS = 8  # per block: each loads the table
_ALL = 0xFFFFFFFF


def decode_digits(packets: WindowPackets, expert: int = 0) -> Tensor:
    """Return an expert's digits, exceptions added: int16 tensor, shape (R, C)."""
    digits = torch.empty((packets.rows, packets.columns), dtype=torch.int16, device=packets.device)
    decode_window_rows(packets, expert, 0, digits)
    return digits


def decode_weights(packets: WindowPackets, expert: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return an expert's weights, digit * step * scale: shape (R, C).

    Raises
    ------
    DtypeError
        Another dtype than float32, float16 or bfloat16.
    """
    if dtype not in DENSE_DTYPES:
        raise DtypeError(f"dtype is {dtype}; expected float16, bfloat16 or float32.")
    dense = torch.empty((packets.rows, packets.columns), dtype=dtype, device=packets.device)
    decode_window_rows(packets, expert, 0, dense)
    return dense


def decode_window_rows(packets: WindowPackets, expert: int, first: int, out: Tensor) -> None:
    """Fill `out` (rows, C) with rows `first` and following of an expert: int16 digits, or weights in floats."""
    rows = len(out)
    if rows == 0:
        return
    dictionary = packets.dictionary
    at_word, at_row, at_scale, at_exception = (expert * stride for stride in packets.strides)
    blocks = min(-(-rows // WARPS), BLOCKS * launch.multiprocessors(out.device))
    table = product_table(dictionary, out.device)
    arrays = [
        packets.words[at_word:],
        packets.starts[at_row + first :],
        packets.exception_starts[at_row + first :],
        packets.exceptions[at_exception:],
        table,
        packets.steps[at_row + first :],
        packets.scales[at_scale:],
        bits16(out),
    ]
    staged = 2 * WARPS * WARP * dictionary.width
    held = table.nbytes + staged <= launch.shared_limit(out.device)
    sizes = dictionary.bits, codewords_each(dictionary.bits), table.numel(), rows, out.shape[1]
    made = decode_kernel(dictionary.width, held, out.dtype != torch.int16, WARPS)
    made.launch(blocks, WARPS * WARP, *arrays, *sizes, shared_bytes=table.nbytes if held else 0)


@njit(inline="always")
def _window_of(words: Any, first: Any, codeword: Any, bits: Any, each: Any, mask: Any) -> Any:
    """Return the window of a row's codeword of that number, the row's packets beginning with number `first`."""
    packet = np.int32(codeword // each)
    bit = np.int32(np.int32(16) + (codeword - packet * each) * bits)
    place = np.int64(first + packet) * 4 + (bit >> 5)
    word = np.uint64(words[place])
    if (bit & 31) + bits + 2 > 32:
        word = np.uint64(word | np.uint64(words[place + 1]) << np.uint64(32))
    return np.int32(np.uint32(word >> np.uint64(bit & 31)) & np.uint32(mask))


@njit(inline="always")
def _exception_column(exceptions: Any, place: Any, stop: Any) -> Any:
    """Return the column of a row's exception, or one behind all columns where there is none."""
    return np.int32(exceptions[place] & 0xFFFF) if place < stop else np.int32(_NO_COLUMN)


@njit(inline="always")
def length_of(word: Any, width: int) -> Any:
    """Return the digits of a table's row, given its first word; see `variants.product_table`."""
    more = np.uint32((word & np.uint32(3)) | (word >> np.uint32(6)) & np.uint32(12))
    if width == 32:
        more = np.uint32(more | (word >> np.uint32(12)) & np.uint32(16))
    return np.int32(more + np.uint32(1))


@njit(forceinline=True)
def _stage(entries: Any, window: Any, width: int, stage: Any, place: Any, length: Any) -> None:
    """Write a window's digits to shared memory, from `place` on."""
    for part in range(0, length, 8):
        low, high = pair_at(entries, np.uint32(window * width + part))
        for i in range(8):  # unrolled, so that all shifts are known
            word = low if i < 4 else high
            if part + i < length:
                byte = np.int32((word >> np.uint32(8 * (i & 3))) & np.uint32(0xFC))
                stage[np.int32(place + part + i)] = np.int16((byte >> 2) - 32)


@njit(forceinline=True)
def load_table(table: Any, words: Any, first: Any, count: int, thread: Any, threads: Any) -> None:
    """Copy a table to shared memory, to the word `first` and on, 64 bytes of each thread at a time."""
    quads = np.int32(count >> 2)
    i = thread
    while i < quads:
        second, third, fourth = np.int32(i + threads), np.int32(i + 2 * threads), np.int32(i + 3 * threads)
        # all on their way before the first one is stored; what lies behind the end is loaded again and left
        loaded = (
            load_quad(table, i),
            load_quad(table, second if second < quads else i),
            load_quad(table, third if third < quads else i),
            load_quad(table, fourth if fourth < quads else i),
        )
        for k in range(4):
            words[first + 4 * i + k] = loaded[0][k]
            if second < quads:
                words[first + 4 * second + k] = loaded[1][k]
            if third < quads:
                words[first + 4 * third + k] = loaded[2][k]
            if fourth < quads:
                words[first + 4 * fourth + k] = loaded[3][k]
        i = np.int32(i + 4 * threads)


@functools.cache
def decode_kernel(width: int, held: bool, weights: bool, warps: int = WARPS) -> launch.Kernel:
    """Return the kernel that fills out (R, C) with digits, or with weights.

    `width`: digits of a table's row; `held`: the table is copied to shared memory; `warps`: of a block.
    """
    kinds = KINDS.values() if weights else ("int16*",)
    arrays = "uint32*, int32*, int32*, int32*, uint32*, float32*, float32*"
    staged = warps * WARP * width

    @kernel(*(f"{arrays}, {out}" + ", int32" * 5 for out in kinds))
    def _decode_windows_kernel(
        words: Any,
        starts: Any,
        exception_starts: Any,
        exceptions: Any,
        table: Any,
        steps: Any,
        scales: Any,
        out: Any,
        bits: int,
        each: int,
        table_words: int,
        rows: int,
        columns: int,
    ) -> None:
        thread, lane = np.int32(cuda.threadIdx.x), np.int32(cuda.threadIdx.x & 31)
        dynamic_words = cuda.shared.array(0, np.uint32)
        stage = cuda.shared.array(staged, np.int16)
        entries = dynamic_words if held else table
        if held:
            load_table(table, dynamic_words, np.int32(0), table_words, thread, np.int32(cuda.blockDim.x))
            cuda.syncthreads()
        own = np.int32((thread >> 5) * WARP * width)
        mask = np.int32((4 << bits) - 1)
        row = np.int32(cuda.grid(1) >> 5)
        while row < rows:
            first, step, at = starts[row], steps[row], np.int64(row) * columns
            count = np.int32((starts[row + 1] - first) * each)
            beyond, stop = exception_starts[row], exception_starts[row + 1]
            column_beyond = _exception_column(exceptions, beyond, stop)
            base = np.int32(0)
            for chunk in range(0, count, WARP):
                window, length = np.int32(0), np.int32(0)
                if chunk + lane < count:
                    window = _window_of(words, first, np.int32(chunk + lane), bits, each, mask)
                    length = length_of(pair_at(entries, np.uint32(window * width))[0], width)
                end = warp_scan(length, lane)
                _stage(entries, window, width, stage, np.int32(own + end - length), length)
                end = np.int32(base + cuda.shfl_sync(_ALL, end, 31))
                cuda.syncwarp()
                while column_beyond < end:
                    if lane == 0:  # one lane, since several of a column add up
                        place = np.int32(own + column_beyond - base)
                        stage[place] = np.int16(np.int32(stage[place]) + np.int32(exceptions[beyond] >> 16))
                    beyond = np.int32(beyond + 1)
                    column_beyond = _exception_column(exceptions, beyond, stop)
                cuda.syncwarp()
                column = np.int32(base + lane)
                while column < min(end, np.int32(columns)):
                    digit = stage[np.int32(own + column - base)]
                    if weights:
                        store_float(out, at + column, np.float32(digit) * step * scales[column])
                    else:
                        out[at + column] = digit
                    column = np.int32(column + WARP)
                cuda.syncwarp()
                base = end
            row = np.int32(row + (cuda.gridsize(1) >> 5))

    name = f"_window_{'weights' if weights else 'digits'}_{width}{'' if held else '_global'}_kernel"
    _decode_windows_kernel.__name__ = name
    return _decode_windows_kernel
