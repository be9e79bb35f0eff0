"""CUDA twin of :mod:`qmoe_lite.coding.windows_product`: few tokens by a kernel that decodes packets as it multiplies.

Some lanes share a row, a lane a packet of 128 bits at a time: for each window, 8 (or 16) digits are loaded at once and
multiplied by the activations at the running column, of up to four tokens. What a string has less than its 8 digits are
zeros, and what a row's last packet holds beyond the row meets zeros behind x, so there is no branch. Column scales are
multiplied into x where it is laid out, a row's step into its sum. Many tokens meet decoded tiles of rows.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from qmoe_lite.coding.dictionary import Dictionary
from qmoe_lite.cuda import launch
from qmoe_lite.cuda.gather import RESIDENT_WARPS, WARPS, Groups, sum_of_lanes
from qmoe_lite.cuda.intrinsics import (
    add_digits,
    add_multiple,
    advanced,
    bits_of_quad,
    load_constant,
    load_float,
    load_quad,
    origin,
    pair_at,
    store_float,
)
from qmoe_lite.cuda.launch import WARP, cuda, kernel
from qmoe_lite.cuda.matmul import TILE_VALUES, groups_in_order, in_order
from qmoe_lite.cuda.packets import KINDS, bits16
from qmoe_lite.cuda.variants import WIDTHS, choose_lanes
from qmoe_lite.cuda.window_packets import WindowPackets, codewords_each, columns_behind
from qmoe_lite.cuda.windows import decode_window_rows
from qmoe_lite.errors import DtypeError, SettingError, ShapeError

# Chosen by a model, not measured: writing and reading a decoded matrix takes as long as 16 tokens do, four at a time.
PRODUCT_TOKENS = 16
_LOADED = 4  # floats that one load gives at most
_QUARTER = np.float32(0.25)
_ALL = 0xFFFFFFFF


@dataclass(frozen=True)
class WindowVariant:
    """What a kernel of the product is compiled for.

    Attributes
    ----------
    bits : int
        Of a codeword.
    width : int
        Digits of a table's row: 8 or 16.
    held : bool
        The table lies in shared memory.
    tokens : int
        Of a group: 1, 2 or 4; activations of one column lie together.
    span : int
        Columns whose activations lie together, `tokens` each: from each column on, so that one load gives them all.
    """

    bits: int
    width: int
    held: bool
    tokens: int
    span: int

    @property
    def table_bytes(self) -> int:
        """Bytes of the table of digits."""
        return self.width * 4 << self.bits

    def shared_bytes(self, columns: int) -> int:
        """Return the dynamic shared memory of a block; `columns` are those of x and of the zeros behind it."""
        return (self.table_bytes if self.held else 0) + 4 * self.tokens * self.span * columns


def choose_window_variant(dictionary: Dictionary, columns: int, tokens: int, limit: int) -> WindowVariant | None:
    """Return what to compile for, given the bytes of shared memory that a block may ask for.

    As many tokens a group as wanted or as fit, then as long loads; the table in shared memory where it fits; None where
    not one token does.
    """
    padded = columns + columns_behind(dictionary)
    for held in (True, False):
        for width in WIDTHS:
            for span in (4, 2, 1):
                variant = WindowVariant(dictionary.bits, dictionary.width, held, width, span)
                if width <= tokens and width * span <= _LOADED and variant.shared_bytes(padded) <= limit:
                    return variant
    return None


@functools.cache  # as `window_packets.device_tables`
def product_table(dictionary: Dictionary, device: torch.device) -> Tensor:
    """Return a dictionary's table as the product reads it, on a GPU: uint32, four digits each, the lowest byte first.

    A byte is 128 + four times its digit. A string's length less one lies in the two lowest bits, which that leaves, of
    the first byte, and what is above them in those of the second.
    """
    table = (128 + 4 * dictionary.digits_table.astype(np.int16)).astype(np.uint8)
    more = np.maximum(dictionary.lengths, 1) - 1
    table[:, 0] |= more & 3
    table[:, 1] |= more >> 2
    return torch.from_numpy(table.reshape(-1).view(np.uint32)).to(device)


def multiply(packets: WindowPackets, expert: int, x: Tensor) -> Tensor:
    """Return the product of x (T, C) and an expert's matrix, (T, R): float32, float16 or bfloat16 as x is.

    Up to 16 tokens: a few lanes share a row and add in a fixed order. More: tiles of rows are decoded, to the dtype of
    x, and torch.matmul multiplies, in the precision that torch is set to.

    Raises
    ------
    DtypeError, ShapeError, SettingError
        `x` has another dtype, shape or device than the matrix can be multiplied by.
    """
    if x.dtype not in KINDS:
        raise DtypeError(f"x is {x.dtype}; expected float16, bfloat16 or float32. Convert it.")
    if x.ndim != 2 or x.shape[1] != packets.columns:
        raise ShapeError(
            f"x has shape {tuple(x.shape)} but the matrix is {packets.rows} x {packets.columns}; expected "
            f"(tokens, {packets.columns}). Reshape x, or transpose it."
        )
    if x.device != packets.device:
        raise SettingError(f"x is on {x.device} but the matrix on {packets.device}; expected one GPU. Move one.")
    y = torch.empty((len(x), packets.rows), dtype=x.dtype, device=x.device)
    if len(x) == 0 or packets.rows == 0:
        return y
    if len(x) <= PRODUCT_TOKENS:
        wanted = next(width for width in reversed(WIDTHS) if width >= min(len(x), WIDTHS[0]))
        limit = launch.shared_limit(x.device)
        variant = choose_window_variant(packets.dictionary, packets.columns, wanted, limit)
        if variant is not None:
            experts, members = groups_in_order(len(x), variant.tokens, x.device)
            groups = experts + expert, members
            multiply_groups(packets, in_order(packets.experts, x.device), variant, x.contiguous(), groups, 1, y)
            return y
    return _tile_product(packets, expert, x, y)


def _tile_product(packets: WindowPackets, expert: int, x: Tensor, y: Tensor) -> Tensor:
    tile_rows = max(1, TILE_VALUES // packets.columns)
    for first in range(0, packets.rows, tile_rows):
        shape = min(tile_rows, packets.rows - first), packets.columns
        tile = torch.empty(shape, dtype=x.dtype, device=x.device)
        decode_window_rows(packets, expert, first, tile)
        y[:, first : first + len(tile)] = x @ tile.T
    return y


def multiply_groups(
    packets: WindowPackets, places: Tensor, variant: WindowVariant, x: Tensor, groups: Groups, slots: int, y: Tensor
) -> None:
    """Fill y (pairs, R) with the products of x (pairs / slots, C), group by group; see `window_kernel`."""
    experts, members = groups
    dictionary, multiprocessors = packets.dictionary, launch.multiprocessors(x.device)
    padded = packets.columns + columns_behind(dictionary)
    shared_bytes = variant.shared_bytes(padded)
    # not by how many groups there are: a token's bytes must not depend on the others
    lanes = choose_lanes(packets.packets_each, packets.rows, multiprocessors)
    rows_each = WARP // lanes
    warps = min(max(-(-packets.rows * len(experts) // (rows_each * multiprocessors)), WARPS[0]), WARPS[1])
    resident = min(RESIDENT_WARPS // warps, launch.shared_limit(x.device) // max(shared_bytes, 1))
    blocks = max(1, -(-multiprocessors * max(resident, 1) // len(experts)))
    tiles = min(-(-packets.rows // (rows_each * warps)), blocks)
    arrays = [
        packets.words,
        packets.starts,
        packets.steps,
        packets.scales,
        packets.exception_starts,
        packets.exception_columns,
        packets.exception_values,
        product_table(dictionary, x.device),
        bits16(x),
        places,
        experts,
        members,
        bits16(y),
    ]
    sizes = len(places), *packets.strides, packets.rows, packets.columns, padded, slots, lanes
    made = window_kernel(variant)
    made.launch((tiles, len(experts)), warps * WARP, *arrays, *sizes, shared_bytes=shared_bytes)


@njit(forceinline=True)
def _add_window(quad: Any, number: int, offset: Any, total: Any, parts: Any, shape: Any) -> Any:
    """Add the digits of a packet's window, the first one's column lying at `offset`; return that of the next, and sums.

    parts: table, x; shape: bits, width, bytes of a column, and a tuple as long as x has columns in such bytes.
    """
    (table, values), (bits, width, unit, span) = parts, shape
    shift = 3 if width == 8 else 4  # a window's bits times the width: where its digits lie
    at = bits_of_quad(quad, 16 - shift + bits * number) & np.uint32(((4 << bits) - 1) << shift)
    low, high = pair_at(table, at)
    more = np.uint32((low & np.uint32(3)) | (low >> np.uint32(6)) & np.uint32(12))
    total = add_digits(total, values, offset, np.uint32(low & np.uint32(0xFFFFFCFC)), span)
    total = add_digits(total, values, np.uint32(offset + np.uint32(4 * unit)), high, span)
    if width == 16 and more >= 8:  # of few strings, but where rates are low
        low, high = pair_at(table, np.uint32(at + np.uint32(8)))
        total = add_digits(total, values, np.uint32(offset + np.uint32(8 * unit)), low, span)
        total = add_digits(total, values, np.uint32(offset + np.uint32(12 * unit)), high, span)
    return np.uint32(offset + np.uint32(more * np.uint32(unit)) + np.uint32(unit)), total


@njit(forceinline=True)
def _add_two(quad: Any, number: int, offset: Any, total: Any, parts: Any, shape: Any) -> Any:
    """Add a packet's window of that number and the next one."""
    offset, total = _add_window(quad, number, offset, total, parts, shape)
    return _add_window(quad, number + 1, offset, total, parts, shape)


@njit(forceinline=True)
def _row_sums(
    words: Any, index: Any, stop: Any, step: Any, first: Any, total: Any, parts: Any, shape: Any, each: int
) -> Any:
    """Add packets index, index + step, .. below `stop`, of `each` codewords, to the sums of a group's tokens."""
    unit = np.uint32(shape[2])
    quad = load_quad(words, np.int32(index if index < stop else 0))
    while index < stop:
        index = np.int32(index + step)
        after = load_quad(words, np.int32(index if index < stop else 0))  # on its way while this one is added
        offset = np.uint32(first + np.uint32(quad[0] & np.uint32(0xFFFF)) * unit)
        # not in a loop, since the compiler unrolls none that is so long
        offset, total = _add_two(quad, 0, offset, total, parts, shape)
        offset, total = _add_two(quad, 2, offset, total, parts, shape)
        offset, total = _add_two(quad, 4, offset, total, parts, shape)
        offset, total = _add_two(quad, 6, offset, total, parts, shape)
        if each >= 10:
            offset, total = _add_two(quad, 8, offset, total, parts, shape)
        if each >= 12:
            offset, total = _add_two(quad, 10, offset, total, parts, shape)
        if each % 2 == 1:
            offset, total = _add_window(quad, each - 1, offset, total, parts, shape)
        quad = after
    return total


def _signatures() -> list[str]:
    """Parameter types of a kernel, by the dtypes of x and of y."""
    matrix = "uint32*, int32*, float32*, float32*, int32*, uint16*, int8*, uint32*"
    pairs = dict.fromkeys(pair for kind in KINDS.values() for pair in ((kind, kind), (kind, "float32*")))
    return [f"{matrix}, {x}, int32*, int32*, int32*, {y}" + ", int32" * 9 for x, y in pairs]


@functools.cache
def window_kernel(variant: WindowVariant) -> launch.Kernel:
    """Return the kernel that fills y (pairs, R): a block takes some rows for a group of tokens of one expert.

    y[p] = W x[p // slots], W being the matrix of the group's expert. Rows of pairs whose expert has no place are left
    as they are.
    """
    bits, width, held, tokens = variant.bits, variant.width, variant.held, variant.tokens
    each, table_words, spanned = codewords_each(bits), width << bits, variant.span
    unit = 4 * tokens * spanned  # bytes of a column
    zeros, span = (np.float32(0),) * tokens, (np.uint32(0),) * spanned

    @kernel(*_signatures())
    def _window_kernel(
        words: Any,
        starts: Any,
        steps: Any,
        scales: Any,
        exception_starts: Any,
        exception_columns: Any,
        exception_values: Any,
        table: Any,
        x: Any,
        places: Any,
        experts: Any,
        members: Any,
        y: Any,
        n_experts: int,
        word_stride: int,
        row_stride: int,
        scale_stride: int,
        rows: int,
        columns: int,
        padded: int,
        slots: int,
        lanes: int,
    ) -> None:
        thread, threads = np.int32(cuda.threadIdx.x), np.int32(cuda.blockDim.x)
        lane = np.int32(thread & 31)
        warp = np.int32(cuda.shfl_sync(_ALL, np.int32(thread >> 5), 0))  # so that the compiler knows it for uniform
        dynamic_words = cuda.shared.array(0, np.uint32)
        values = cuda.shared.array(0, np.float32)
        group = np.int32(cuda.blockIdx.y)
        expert = experts[group]
        if members[group * tokens] < 0 or expert < 0 or expert >= n_experts or places[expert] < 0:
            return
        slot = np.int64(places[expert])
        words, scales = advanced(words, slot * word_stride * 4), advanced(scales, slot * scale_stride)
        starts, steps = advanced(starts, slot * row_stride), advanced(steps, slot * row_stride)
        exception_starts = advanced(exception_starts, slot * row_stride)
        entries = dynamic_words if held else table
        behind = np.int32(table_words if held else 0)  # where x begins
        if held:
            i = thread
            while i < table_words:
                dynamic_words[i] = load_constant(table, i)
                i = np.int32(i + threads)
        for token in range(tokens):
            pair = members[group * tokens + token]
            start = np.int64(pair // slots) * columns
            i = thread
            while i < padded * spanned:
                column = np.int32(i // spanned + i % spanned)
                value = np.float32(0)
                if column < columns and pair >= 0:
                    value = load_float(x, start + column) * load_constant(scales, column) * _QUARTER
                values[behind + i * tokens + token] = value
                i = np.int32(i + threads)
        cuda.syncthreads()

        step = np.int32(lanes)
        below = np.int32(lane // step)
        member = np.int32(lane - below * step)
        rows_each = np.int32(np.int32(32) // step)
        row = np.int32((cuda.blockIdx.x * (threads >> 5) + warp) * rows_each + below)
        parts, shape = (entries, values), (bits, width, unit, span)
        first, place = np.uint32(4 * behind), np.uint32(origin(values) + np.uint32(4 * behind))
        while row - below < rows:
            at = row if row < rows else np.int32(0)
            index = np.int32(starts[at] + member)
            stop = starts[at + 1] if row < rows else np.int32(0)
            total = _row_sums(words, index, stop, step, first, zeros, parts, shape, each)
            index = np.int32(exception_starts[at] + member)
            stop = exception_starts[at + 1] if row < rows else np.int32(0)
            while index < stop:
                beyond = np.uint32(exception_columns[index])
                value = np.float32(np.int32(np.int32(exception_values[index]) << 2))
                total = add_multiple(total, values, np.uint32(place + beyond * np.uint32(unit)), value)
                index = np.int32(index + step)
            for token in range(tokens):
                value = sum_of_lanes(total[token], step) * steps[at]
                pair = members[group * tokens + token]
                if member == 0 and row < rows and pair >= 0:
                    store_float(y, np.int64(pair) * rows + row, value)
            row = np.int32(row + cuda.gridDim.x * (threads >> 5) * rows_each)

    suffix = "" if held else "_global"
    _window_kernel.__name__ = f"_window_{bits}_{width}{suffix}_tokens{tokens}_span{spanned}_kernel"
    return _window_kernel
