"""CUDA twin of :mod:`qmoe_lite.coding.windows`: decode packets of windows, a warp a row and a lane a codeword."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from qmoe_lite.cuda import launch
from qmoe_lite.cuda.codec import BLOCKS, WARPS, warp_scan
from qmoe_lite.cuda.intrinsics import store_float
from qmoe_lite.cuda.launch import WARP, cuda, kernel
from qmoe_lite.cuda.packets import KINDS, bits16
from qmoe_lite.cuda.window_packets import WindowPackets, codewords_each, device_tables
from qmoe_lite.errors import DtypeError

DENSE_DTYPES = tuple(KINDS)
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
    digits, lengths = device_tables(dictionary, out.device)
    blocks = min(-(-rows // WARPS), BLOCKS * launch.multiprocessors(out.device))
    arrays = [
        packets.words[at_word:],
        packets.starts[at_row + first :],
        packets.exception_starts[at_row + first :],
        packets.exceptions[at_exception:],
        digits.view(torch.int8),
        lengths.view(torch.uint8),
        packets.steps[at_row + first :],
        packets.scales[at_scale:],
        bits16(out),
    ]
    sizes = dictionary.bits, codewords_each(dictionary.bits), dictionary.width, rows, out.shape[1]
    made = _decode_digits_kernel if out.dtype == torch.int16 else _decode_weights_kernel
    made.launch(blocks, WARPS * WARP, *arrays, *sizes)


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
def _next_exception(exceptions: Any, place: Any, stop: Any) -> Any:
    """Return the column of the exception at `place`, the sum of those of that column, and the place behind them."""
    column = np.int32(exceptions[place] & 0xFFFF)
    excess = np.int32(exceptions[place] >> 16)
    place = np.int32(place + 1)
    while place < stop and np.int32(exceptions[place] & 0xFFFF) == column:
        excess = np.int32(excess + np.int32(exceptions[place] >> 16))
        place = np.int32(place + 1)
    return column, excess, place


def decode_kernel(weights: bool) -> launch.Kernel:
    """Return the kernel that fills out (R, C) with digits, or with weights; a warp takes a row, a lane a codeword."""
    kinds = KINDS.values() if weights else ("int16*",)
    arrays = "uint32*, int32*, int32*, int32*, int8*, uint8*, float32*, float32*"

    @kernel(*(f"{arrays}, {out}" + ", int32" * 5 for out in kinds))
    def _decode_windows_kernel(
        words: Any,
        starts: Any,
        exception_starts: Any,
        exceptions: Any,
        table: Any,
        lengths: Any,
        steps: Any,
        scales: Any,
        out: Any,
        bits: int,
        each: int,
        width: int,
        rows: int,
        columns: int,
    ) -> None:
        lane = np.int32(cuda.threadIdx.x & 31)
        mask = np.int32((4 << bits) - 1)
        row = np.int32(cuda.grid(1) >> 5)
        while row < rows:
            first, step, at = starts[row], steps[row], np.int64(row) * columns
            count = np.int32((starts[row + 1] - first) * each)
            beyond, stop = exception_starts[row], exception_starts[row + 1]
            base = np.int32(0)
            for chunk in range(0, count, WARP):
                window, length = np.int32(0), np.int32(0)
                if chunk + lane < count:
                    window = _window_of(words, first, np.int32(chunk + lane), bits, each, mask)
                    length = np.int32(lengths[window])
                end = np.int32(base + warp_scan(length, lane))
                begin = np.int32(end - length)
                for i in range(min(length, np.int32(columns - begin))):
                    digit = np.int32(table[np.int64(window) * width + i])
                    if weights:
                        store_float(out, at + begin + i, np.float32(digit) * step * scales[begin + i])
                    else:
                        out[at + begin + i] = np.int16(digit)
                base = cuda.shfl_sync(_ALL, end, 31)
                while beyond < stop and np.int32(exceptions[beyond] & 0xFFFF) < base:
                    column, excess, beyond = _next_exception(exceptions, beyond, stop)
                    if begin <= column < end:  # who wrote a digit adds its exceptions
                        digit = np.int32(np.int32(table[np.int64(window) * width + (column - begin)]) + excess)
                        if weights:
                            store_float(out, at + column, np.float32(digit) * step * scales[column])
                        else:
                            out[at + column] = np.int16(digit)
            row = np.int32(row + (cuda.gridsize(1) >> 5))

    _decode_windows_kernel.__name__ = f"_decode_window_{'weights' if weights else 'digits'}_kernel"
    return _decode_windows_kernel


_decode_digits_kernel, _decode_weights_kernel = decode_kernel(weights=False), decode_kernel(weights=True)
