"""CUDA twin of :mod:`qmoe_lite.coding.windows_product`: few tokens by a kernel that decodes packets as it multiplies.

Some lanes share a row, a lane a packet of 128 bits at a time: for each window, 8 digits are loaded at once, more of a
longer string, and multiplied by the activations at the running column, of up to four tokens. What a string has less
than its 8 digits are zeros, and what a row's last packet holds beyond the row meets zeros behind x, so there is no
branch. Column scales are multiplied into x where it is laid out, a row's step into its sum. A layer's gate and up
projection meet x in one launch. Many tokens meet decoded tiles of rows.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from qmoe_lite.cuda import launch
from qmoe_lite.cuda.gather import WARPS, Groups, activated, share_rows, sum_of_lanes
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
from qmoe_lite.cuda.launch import cuda, kernel
from qmoe_lite.cuda.matmul import TILE_VALUES, groups_in_order, in_order, wanted_width
from qmoe_lite.cuda.packets import KINDS, Prepared, bits16
from qmoe_lite.cuda.variants import (
    ACTIVATIONS,
    WindowVariant,
    choose_lanes,
    choose_window_variant,
    product_table,
)
from qmoe_lite.cuda.window_packets import WindowPackets, codewords_each, columns_behind
from qmoe_lite.cuda.windows import decode_window_rows, length_of, load_table
from qmoe_lite.errors import DtypeError, SettingError, ShapeError

# on an H200 decoded tiles took longer for 16 tokens and less long for 64 (bench/results/nvidia-h200.txt)
PRODUCT_TOKENS = 16
_QUARTER = np.float32(0.25)
_ALL = 0xFFFFFFFF


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
    tokens = x.shape[0]
    y = torch.empty((tokens, packets.rows), dtype=x.dtype, device=x.device)
    if tokens == 0 or packets.rows == 0:
        return y
    if tokens <= PRODUCT_TOKENS:
        wanted = wanted_width(tokens)
        limit = launch.shared_limit(x.device)
        half = x.dtype == torch.bfloat16
        variant = choose_window_variant(packets.dictionary, packets.columns, wanted, limit, half=half)
        if variant is not None:
            groups = groups_in_order(tokens, variant.tokens, x.device, expert)
            multiply_groups(packets, in_order(packets.experts, x.device), variant, x.contiguous(), groups, 1, y)
            return y
    return tile_product(packets, expert, x)


def tile_product(packets: WindowPackets, expert: int, x: Tensor) -> Tensor:
    """Return the product of x (T, C) and an expert's matrix, (T, R), by tiles of rows that are decoded, as `x` is."""
    y = torch.empty((len(x), packets.rows), dtype=x.dtype, device=x.device)
    tile_rows = max(1, TILE_VALUES // packets.columns)
    for first in range(0, packets.rows, tile_rows):
        shape = min(tile_rows, packets.rows - first), packets.columns
        tile = torch.empty(shape, dtype=x.dtype, device=x.device)
        decode_window_rows(packets, expert, first, tile)
        y[:, first : first + len(tile)] = x @ tile.T
    return y


def multiply_groups(
    packets: WindowPackets,
    places: Tensor,
    variant: WindowVariant,
    x: Tensor,
    groups: Groups,
    slots: int,
    y: Tensor,
    weights: Tensor | None = None,
    other: WindowPackets | None = None,
) -> None:
    """Fill y (pairs, R) with the products of x (pairs / slots, C), group by group; see `window_kernel`.

    `other` are the second matrices: of the same shape, lying alike, with the same column scales.
    """
    experts, members = groups
    # not by how many groups there are: a token's bytes must not depend on the others
    lanes = choose_lanes(packets.packets_each, packets.rows, launch.multiprocessors(x.device))
    key = variant, lanes, weights is not None, places.numel(), slots, other
    ready = packets.launches.get(key)
    if ready is None:
        ready = packets.launches[key] = _prepare(packets, *key)
    grid = share_rows(packets.rows, lanes, experts.numel(), ready.shared_bytes, WARPS, *launch.sizes(x.device))
    ready.launch(grid, bits16(x), places, experts, members, experts if weights is None else weights, bits16(y))


def _prepare(
    packets: WindowPackets,
    variant: WindowVariant,
    lanes: int,
    weighted: bool,
    places: int,
    slots: int,
    other: WindowPackets | None,
) -> Prepared:
    second = packets if other is None else other
    padded = packets.columns + columns_behind(packets.dictionary, second.dictionary)
    arrays: list[Tensor] = []
    for each in (packets, second):
        arrays += each.words, each.starts, each.steps, each.exception_starts, each.exceptions
        arrays.append(product_table(each.dictionary, packets.device))
    assert second.strides == packets.strides, "gate and up projection lie alike"
    sizes = places, *packets.strides, packets.rows, packets.columns, padded, slots, lanes
    made = window_kernel(variant, weighted)
    return Prepared(made, (*arrays, packets.scales), sizes, variant.shared_bytes(padded))


@njit(forceinline=True)
def _add_more(table: Any, at: Any, values: Any, offset: Any, total: Any, unit: int, span: Any) -> Any:
    """Add a string's next 8 digits, which lie at `at` in the table."""
    low, high = pair_at(table, np.uint32(at))
    return add_digits(total, values, np.uint32(offset), low, high, span)


@njit(forceinline=True)
def _add_window(quad: Any, number: int, offset: Any, total: Any, parts: Any, shape: Any) -> Any:
    """Add the digits of a packet's window, the first one's column lying at `offset`; return that of the next, and sums.

    parts: table, x; shape: bits, width, bytes before the table, bytes of a column, a tuple as long as x has columns in
    such bytes, codewords of a packet.
    """
    (table, values), (bits, width, before, unit, span, _) = parts, shape
    shift = 3 if width == 8 else 4 if width == 16 else 5  # a window's bits times the width: where its digits lie
    at = bits_of_quad(quad, 16 - shift + bits * number) & np.uint32(((4 << bits) - 1) << shift)
    at = np.uint32(at + np.uint32(before))
    low, high = pair_at(table, at)
    more = np.uint32(length_of(low, width) - np.int32(1))
    total = add_digits(total, values, offset, np.uint32(low & np.uint32(0xFFFCFCFC)), high, span)
    if width >= 16 and more >= 8:  # of few strings, but where rates are low
        total = _add_more(table, at + np.uint32(8), values, offset + np.uint32(8 * unit), total, unit, span)
    if width == 32 and more >= 16:
        total = _add_more(table, at + np.uint32(16), values, offset + np.uint32(16 * unit), total, unit, span)
        if more >= 24:
            total = _add_more(table, at + np.uint32(24), values, offset + np.uint32(24 * unit), total, unit, span)
    return np.uint32(offset + np.uint32(more * np.uint32(unit)) + np.uint32(unit)), total


@njit(forceinline=True)
def _add_two(quad: Any, number: int, offset: Any, total: Any, parts: Any, shape: Any) -> Any:
    """Add a packet's window of that number and the next one."""
    offset, total = _add_window(quad, number, offset, total, parts, shape)
    return _add_window(quad, number + 1, offset, total, parts, shape)


@njit(forceinline=True)
def _packet_sums(words: Any, index: Any, stop: Any, step: Any, first: Any, total: Any, parts: Any, shape: Any) -> Any:
    """Add packets index, index + step, .. below `stop` to the sums of a group's tokens."""
    unit, each = np.uint32(shape[3]), shape[5]
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


@njit(forceinline=True)
def _row_sums(matrix: Any, at: Any, inside: Any, lanes: Any, first: Any, total: Any, parts: Any, shape: Any) -> Any:
    """Return a lane's share of a row's sums, one a token; nothing where the row is not `inside` the matrix.

    matrix: words, starts, exception starts, exceptions; lanes: how many share the row, and which of them this is.
    """
    (words, starts, exception_starts, exceptions), (step, member) = matrix, lanes
    index = np.int32(starts[at] + member)
    stop = starts[at + 1] if inside else np.int32(0)
    total = _packet_sums(words, index, stop, step, first, total, parts, shape)
    values, unit = parts[1], np.uint32(shape[3])
    index = np.int32(exception_starts[at] + member)
    stop = exception_starts[at + 1] if inside else np.int32(0)
    while index < stop:
        word = np.int32(exceptions[index])
        column = np.uint32(word & np.int32(0xFFFF))
        value = np.float32(np.int32(np.int32(word >> 16) << 2))
        total = add_multiple(total, values, np.uint32(origin(values) + first + column * unit), value)
        index = np.int32(index + step)
    return total


def _signatures(weighted: bool) -> list[str]:
    """Parameter types of a kernel, by the dtypes of x and of y."""
    matrix = "uint32*, int32*, float32*, int32*, int32*, uint32*"
    pairs = dict.fromkeys(pair for kind in KINDS.values() for pair in ((kind, kind), (kind, "float32*")))
    weight = "float32*" if weighted else "int32*"
    return [
        f"{matrix}, {matrix}, float32*, {x}, int32*, int32*, int32*, {weight}, {y}" + ", int32" * 10 for x, y in pairs
    ]


@functools.cache
def window_kernel(variant: WindowVariant, weighted: bool = False) -> launch.Kernel:
    """Return the kernel that fills y (pairs, R): a block takes some rows for a group of tokens of one expert.

    y[p] = W x[p // slots], W being the matrix of the group's expert; or the activation of that, times what a second
    matrix gives; `weighted`: times weights[p]. Rows of pairs whose expert has no place are left as they are.
    """
    bits, width, held, tokens = variant.bits, variant.width, variant.held, variant.tokens
    gated = variant.other is not None
    other_bits, other_width = variant.other or (bits, width)
    activation = -1 if variant.activation is None else ACTIVATIONS.index(variant.activation)
    (table_words, other_words_held), spanned = variant.table_words, variant.span
    tables = table_words + other_words_held if held else 0  # words before x
    kept, before_x = (np.uint16, 2 * tables) if variant.half else (np.float32, tables)
    unit = variant.column_bytes
    zeros, span = (np.float32(0),) * tokens, (np.uint32(0),) * spanned
    each, other_each = codewords_each(bits), codewords_each(other_bits)
    other_at = 4 * table_words if held else 0

    @kernel(*_signatures(weighted))
    def _window_kernel(
        words: Any,
        starts: Any,
        steps: Any,
        exception_starts: Any,
        exceptions: Any,
        table: Any,
        other_words: Any,
        other_starts: Any,
        other_steps: Any,
        other_exception_starts: Any,
        other_exceptions: Any,
        other_table: Any,
        scales: Any,
        x: Any,
        places: Any,
        experts: Any,
        members: Any,
        weights: Any,
        y: Any,
        n_experts: int,
        word_stride: int,
        row_stride: int,
        scale_stride: int,
        exception_stride: int,
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
        values = cuda.shared.array(0, kept)
        group = np.int32(cuda.blockIdx.y)
        expert = experts[group]
        if members[group * tokens] < 0 or expert < 0 or expert >= n_experts or places[expert] < 0:
            return
        slot = np.int64(places[expert])
        at_word, at_row, at_exception = slot * word_stride * 4, slot * row_stride, slot * exception_stride
        words, starts, steps = advanced(words, at_word), advanced(starts, at_row), advanced(steps, at_row)
        exception_starts, exceptions = advanced(exception_starts, at_row), advanced(exceptions, at_exception)
        other_words, other_starts = advanced(other_words, at_word), advanced(other_starts, at_row)
        other_steps, other_exception_starts = advanced(other_steps, at_row), advanced(other_exception_starts, at_row)
        other_exceptions = advanced(other_exceptions, at_exception)
        scales = advanced(scales, slot * scale_stride)
        entries = dynamic_words if held else table
        other_entries = dynamic_words if held else other_table
        if held:
            load_table(table, dynamic_words, np.int32(0), table_words, thread, threads)
            if gated:
                load_table(other_table, dynamic_words, np.int32(table_words), other_words_held, thread, threads)
        for token in range(tokens):
            pair = members[group * tokens + token]
            start = np.int64(pair // slots) * columns
            column = thread
            while column < padded:
                value = np.float32(0)
                if column < columns and pair >= 0:
                    value = load_float(x, start + column) * load_constant(scales, column) * _QUARTER
                for behind in range(spanned):  # the columns that reach as far as this one
                    if column >= behind:
                        place = before_x + ((column - behind) * spanned + behind) * tokens + token
                        store_float(values, np.int64(place), value)
                column = np.int32(column + threads)
            for behind in range(1, spanned):  # what the last columns reach behind the end
                if thread < behind:
                    place = before_x + ((padded - behind + thread) * spanned + spanned - 1 - thread) * tokens + token
                    store_float(values, np.int64(place), np.float32(0))
        cuda.syncthreads()

        step = np.int32(lanes)
        below = np.int32(lane // step)
        shared_by = step, np.int32(lane - below * step)
        rows_each = np.int32(np.int32(32) // step)
        row = np.int32((cuda.blockIdx.x * (threads >> 5) + warp) * rows_each + below)
        first = np.uint32(4 * tables)
        while row - below < rows:
            inside = row < rows
            at = row if inside else np.int32(0)
            matrix, parts = (words, starts, exception_starts, exceptions), (entries, values)
            shape = bits, width, 0, unit, span, each
            total = _row_sums(matrix, at, inside, shared_by, first, zeros, parts, shape)
            other_total = zeros
            if gated:
                other = other_words, other_starts, other_exception_starts, other_exceptions
                parts, shape = (other_entries, values), (other_bits, other_width, other_at, unit, span, other_each)
                other_total = _row_sums(other, at, inside, shared_by, first, zeros, parts, shape)
            for token in range(tokens):
                value = activated(sum_of_lanes(total[token], step) * steps[at], activation)
                if gated:
                    value = value * (sum_of_lanes(other_total[token], step) * other_steps[at])
                pair = members[group * tokens + token]
                if shared_by[1] == 0 and inside and pair >= 0:
                    if weighted:
                        value = value * weights[pair]
                    store_float(y, np.int64(pair) * rows + row, value)
            row = np.int32(row + cuda.gridDim.x * (threads >> 5) * rows_each)

    names = f"{bits}_{width}" + (f"_{other_bits}_{other_width}" if gated else "") + ("" if held else "_global")
    suffix = f"{'_' + variant.activation if variant.activation else ''}{'_weighted' if weighted else ''}"
    suffix += "_half" if variant.half else ""
    _window_kernel.__name__ = f"_window_{names}_tokens{tokens}_span{spanned}{suffix}_kernel"
    return _window_kernel
