"""The gather kernel: some lanes share a row, walk its packets and add its nonzeros, for up to four tokens at once.

CUDA twin of `qmoe_lite.coding.gather`. One kernel serves one matrix and a whole layer's experts; what it is compiled
for is a `Variant`.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from numba import njit
from torch import Tensor

from qmoe_lite.cuda import launch
from qmoe_lite.cuda.intrinsics import (
    add_multiple,
    advanced,
    bits_of_quad,
    dot_bytes,
    float_of_bits,
    load_constant,
    load_float,
    load_quad,
    origin,
    store_float,
    word_at,
)
from qmoe_lite.cuda.launch import WARP, cuda, kernel
from qmoe_lite.cuda.packets import KINDS, Packets, Prepared, bits16, codewords_each
from qmoe_lite.cuda.variants import ACTIVATIONS, Variant, choose_lanes, device_words, padded_columns

WARPS = (8, 16)  # per block, least and most: each block loads the table and x
RESIDENT_WARPS = 64  # that a multiprocessor holds
_ALL = 0xFFFFFFFF
_LARGEST = np.float32(np.finfo(np.float32).max)
_ROOT_HALF = np.float32(0.5**0.5)
_TANH_SCALE, _TANH_CUBIC = np.float32((2 / math.pi) ** 0.5), np.float32(0.044715)

Groups = tuple[Tensor, Tensor]  # int32: each group's expert (G,); its tokens' pairs (G * width,), -1 for none


def gather(
    matrices: tuple[Packets, ...],
    places: Tensor,
    variant: Variant,
    x: Tensor,
    groups: Groups,
    slots: int,
    weights: Tensor | None,
    y: Tensor,
) -> None:
    """Fill y (pairs, R) with the products of x (pairs / slots, C), group by group; see `gather_kernel`."""
    experts, members = groups
    packets = matrices[0]
    # not by how many groups there are: a token's bytes must not depend on the others
    lanes = choose_lanes(packets.packets_each, packets.rows, launch.multiprocessors(x.device))
    settings = variant, lanes, weights is not None, places.numel(), slots
    key = settings, matrices[1:]
    ready = packets.launches.get(key)
    if ready is None:
        ready = packets.launches[key] = _prepare(matrices, *settings)
    grid = share_rows(packets.rows, lanes, experts.numel(), ready.shared_bytes, WARPS, *launch.sizes(x.device))
    given = bits16(x), places, experts, members, experts if weights is None else weights, bits16(y)
    ready.launch(grid, *given)


def _prepare(
    matrices: tuple[Packets, ...], variant: Variant, lanes: int, weighted: bool, places: int, slots: int
) -> Prepared:
    packets = matrices[0]
    padded = padded_columns(tuple(each.codebook for each in matrices), packets.columns)
    arrays: list[Tensor] = []
    for each, book in zip((*matrices, *matrices), (*variant.books, *variant.books), strict=True):
        words = device_words(each.codebook, book.fields, packets.device)
        arrays += each.words, each.starts, bits16(each.levels), words
    assert all(each.strides == packets.strides for each in matrices), "gate and up projection lie alike"
    sizes = places, *packets.strides, packets.rows, packets.columns, padded, slots, lanes
    return Prepared(gather_kernel(variant, weighted), tuple(arrays[:8]), sizes, variant.shared_bytes(padded))


@functools.lru_cache(maxsize=1024)  # as `variants.choose_variant`
def share_rows(
    rows: int, lanes: int, groups: int, shared_bytes: int, warps: tuple[int, int], multiprocessors: int, limit: int
) -> tuple[tuple[int, int], int]:
    """Return the blocks that share the rows of a group of tokens, of all groups, and the threads of a block.

    Parameters
    ----------
    rows, lanes, groups : int
        Of a matrix; those that share a row; groups of tokens, each with blocks of its own.
    shared_bytes, warps : int, (int, int)
        Of a block; the least and the most of one.
    multiprocessors, limit : int
        Of the GPU, which shall be full, and the shared memory that a block may ask for.
    """
    rows_each = WARP // lanes
    chosen = min(max(-(-rows * groups // (rows_each * multiprocessors)), warps[0]), warps[1])
    resident = min(RESIDENT_WARPS // chosen, limit // max(shared_bytes, 1))
    blocks = max(1, -(-multiprocessors * max(resident, 1) // groups))
    return (min(-(-rows // (rows_each * chosen)), blocks), groups), chosen * WARP


@njit(forceinline=True)
def sum_of_lanes(value: np.float32, lanes: np.int32) -> np.float32:
    """Return the sum of `value` over each `lanes` (a power of two) neighbouring lanes, in each of them."""
    step = np.int32(lanes >> 1)
    while step > 0:
        value += cuda.shfl_xor_sync(_ALL, value, step)
        step = np.int32(step >> 1)
    return value


@njit(inline="always")
def _weight(slot: Any, own: Any, levels: int) -> Any:
    """Return the weight of a slot in bits 30 and 31, given the row's levels; with one level 2, -2 or 0, as they are."""
    if levels == 1:
        return float_of_bits(np.uint32(slot & np.uint32(0xC0000000)))
    if levels == 2:
        level = own[0] if slot & np.uint32(0x80000000) else own[1]
        return level if slot & np.uint32(0x40000000) else np.float32(0)
    low = own[0] if slot & np.uint32(0x40000000) else np.float32(0)
    high = own[2] if slot & np.uint32(0x40000000) else own[1]
    return high if slot & np.uint32(0x80000000) else low


@njit(inline="always")
def _positions(entry: Any, fields: int) -> Any:
    """Return the first word of an entry without the slots that lie in its bytes."""
    return np.uint32(entry & np.uint32(0x3F3F3F3F)) if fields == 3 else entry


@njit(inline="always")
def _slots(entries: Any, at: Any, entry: Any, bits: int, fields: int) -> Any:
    """Return the word that holds the slots."""
    if fields <= 3:
        return entry
    return word_at(entries, np.uint32(at + np.uint32((4 if fields == 4 else 8) << bits)))


@njit(inline="always")
def _slot(slots: Any, i: int, fields: int) -> Any:
    """Return the slot of nonzero i in bits 30 and 31, with others below."""
    return np.uint32(slots << np.uint32(16 - 8 * i if fields == 3 else 2 * i))


@njit(inline="always")
def _entry_place(quad: Any, number: int, table_at: Any, bits: int) -> Any:
    """Return the place of the table entry of a packet's codeword, the first one having number 0."""
    # two bits below the codeword: an entry's place is four times its code
    four_times = bits_of_quad(quad, 14 + bits * number) & np.uint32(((1 << bits) - 1) << 2)
    return np.uint32(table_at | four_times)


@njit(forceinline=True)
def _add_codeword(quad: Any, number: int, place: Any, total: Any, parts: Any, shape: Any) -> Any:
    """Add the nonzeros of a packet's codeword that begins at `place`; return the place behind it, and the sums.

    parts: table, its place, x, the row's levels; shape: bits, fields, levels, bytes of a column.
    """
    (entries, table_at, values, own), (bits, fields, levels, unit) = parts, shape
    at = _entry_place(quad, number, table_at, bits)
    entry = word_at(entries, at)
    slots, near = _slots(entries, at, entry, bits, fields), _positions(entry, fields)
    far = near
    if fields > 3:
        far = word_at(entries, np.uint32(at + np.uint32(4 << bits)))
    for i in range(fields):
        column = dot_bytes(near if i < 3 else far, np.uint32(unit << (8 * i + 8 if i < 3 else 8 * i - 24)), place)
        total = add_multiple(total, values, column, _weight(_slot(slots, i, fields), own, levels))
    return dot_bytes(near, np.uint32(unit), place), total


@njit(forceinline=True)
def _add_all_columns(quad: Any, number: int, place: Any, total: Any, parts: Any, shape: Any) -> Any:
    """As `_add_codeword`, but zero weights are multiplied too: by infinity they give NaN, as in a dense product."""
    (entries, table_at, values, own), (bits, fields, levels, unit) = parts, shape
    at = _entry_place(quad, number, table_at, bits)
    entry = word_at(entries, at)
    slots, near = _slots(entries, at, entry, bits, fields), _positions(entry, fields)
    length = np.uint32(near & np.uint32(255))
    position = np.uint32(0)
    while position < length:
        weight = np.float32(0)
        for i in range(fields):
            word = near
            if i >= 3:
                word = word_at(entries, np.uint32(at + np.uint32(4 << bits)))
            byte = np.uint32(word >> np.uint32(8 * i + 8 if i < 3 else 8 * i - 24)) & np.uint32(255)
            slot = _slot(slots, i, fields)
            if byte == position and slot >= np.uint32(0x40000000):
                weight = _weight(slot, own, levels)
        total = add_multiple(total, values, place, weight)
        place = np.uint32(place + np.uint32(unit))
        position = np.uint32(position + np.uint32(1))
    return place, total


@njit(forceinline=True)
def _row_sums(
    words: Any, index: Any, stop: Any, step: Any, first: Any, spread: Any, total: Any, parts: Any, shape: Any, each: int
) -> Any:
    """Add packets index, index + step, .. below `stop`, of `each` codewords, to the sums of a group's tokens."""
    unit = np.uint32(shape[3])
    while spread and index < stop:
        quad = load_quad(words, index)
        place = np.uint32(first + np.uint32(quad[0] & np.uint32(0xFFFF)) * unit)
        for number in range(each):
            place, total = _add_all_columns(quad, number, place, total, parts, shape)
        index = np.int32(index + step)
    quad = load_quad(words, np.int32(index if index < stop else 0))
    while index < stop:
        index = np.int32(index + step)
        after = load_quad(words, np.int32(index if index < stop else 0))  # on its way while this one is added
        place = np.uint32(first + np.uint32(quad[0] & np.uint32(0xFFFF)) * unit)
        # in two loops, since the compiler unrolls none that is longer
        for number in range(each // 2):
            place, total = _add_codeword(quad, number, place, total, parts, shape)
        for number in range(each // 2, each):
            place, total = _add_codeword(quad, number, place, total, parts, shape)
        quad = after
    return total


@njit(forceinline=True)
def _own_levels(scales: Any, at: Any, levels: int) -> Any:
    """Return a row's levels as a triple; of fewer, the first one again."""
    level = load_float(scales, np.int64(at) * levels)
    return (
        level,
        load_float(scales, np.int64(at) * levels + 1) if levels > 1 else level,
        load_float(scales, np.int64(at) * levels + 2) if levels > 2 else level,
    )


@njit(forceinline=True)
def activated(value: Any, activation: int) -> Any:
    """Return the activation, by its place in `ACTIVATIONS`, of a value."""
    if activation == 0:
        return value if value > np.float32(0) or value != value else np.float32(0)
    if activation == 1:
        return value / (np.float32(1) + np.float32(math.exp(min(-value, np.float32(80)))))
    if activation == 2:
        return np.float32(0.5) * value * (np.float32(1) + np.float32(math.erf(value * _ROOT_HALF)))
    if activation == 3:
        inner = _TANH_SCALE * (value + _TANH_CUBIC * value * value * value)
        return np.float32(0.5) * value * (np.float32(1) + np.float32(math.tanh(inner)))
    return value


@njit(forceinline=True)
def _load_table(table: Any, entries: Any, behind: Any, bits: int, planes: int, thread: Any, threads: Any) -> Any:
    """Copy a table to shared memory, to the first multiple of a plane's size from `behind` on; return its place."""
    plane = 4 << bits
    table_at = np.uint32((behind + np.uint32(plane - 1)) & np.uint32(0x100000000 - plane))
    entry_index = np.int32((table_at - origin(entries)) >> np.uint32(2))
    i = thread
    while i < planes << bits:
        entries[entry_index + i] = load_constant(table, i)
        i = np.int32(i + threads)
    return table_at


def _signatures(weighted: bool) -> list[str]:
    """Parameter types of a gather kernel, by the dtypes of the levels, of x and of y."""
    found = []
    x_and_y = [(kind, kind) for kind in KINDS.values()] + [(kind, "float32*") for kind in KINDS.values()]
    for level in KINDS.values():
        for x, y in dict.fromkeys(x_and_y):
            matrix = f"uint32*, int32*, {level}, uint32*"
            weight = "float32*" if weighted else "int32*"
            found.append(f"{matrix}, {matrix}, {x}, int32*, int32*, int32*, {weight}, {y}" + ", int32" * 9)
    return found


@functools.cache
def gather_kernel(variant: Variant, weighted: bool = False) -> launch.Kernel:
    """Return the kernel that fills y (pairs, R): a block takes some rows for a group of tokens of one expert.

    y[p] = W x[p // slots], W being the matrix of the group's expert; or the activation of that, times what a second
    matrix gives; `weighted`: times weights[p]. Rows of pairs whose expert has no place are left as they are.
    """
    levels, tokens = variant.levels, variant.tokens
    book, other = variant.books[0], variant.books[-1]
    gated = len(variant.books) == 2
    activation = -1 if variant.activation is None else ACTIVATIONS.index(variant.activation)
    bits, fields, planes, held = book.bits, book.fields, book.planes, book.held
    other_bits, other_fields, other_planes, other_held = other.bits, other.fields, other.planes, other.held
    each, other_each = codewords_each(bits), codewords_each(other_bits)
    unit = 4 * tokens  # bytes of a column
    zeros = (np.float32(0),) * tokens

    @kernel(*_signatures(weighted))
    def _gather_kernel(
        words: Any,
        starts: Any,
        scales: Any,
        table: Any,
        other_words: Any,
        other_starts: Any,
        other_scales: Any,
        other_table: Any,
        x: Any,
        places: Any,
        experts: Any,
        members: Any,
        weights: Any,
        y: Any,
        n_experts: int,
        word_stride: int,
        start_stride: int,
        level_stride: int,
        rows: int,
        columns: int,
        padded: int,
        slots: int,
        lanes: int,
    ) -> None:
        thread, threads = np.int32(cuda.threadIdx.x), np.int32(cuda.blockDim.x)
        lane = np.int32(thread & 31)
        warp = np.int32(cuda.shfl_sync(_ALL, np.int32(thread >> 5), 0))  # so that the compiler knows it for uniform
        flaws = cuda.shared.array(32, np.int32)
        dynamic_words = cuda.shared.array(0, np.uint32)
        values = cuda.shared.array(0, np.float32)
        group = np.int32(cuda.blockIdx.y)
        expert = experts[group]
        if members[group * tokens] < 0 or expert < 0 or expert >= n_experts or places[expert] < 0:
            return
        slot = np.int64(places[expert])
        at_word, at_start, at_level = slot * word_stride * 4, slot * start_stride, slot * level_stride
        words, starts, scales = advanced(words, at_word), advanced(starts, at_start), advanced(scales, at_level)
        other_words, other_starts = advanced(other_words, at_word), advanced(other_starts, at_start)
        other_scales = advanced(other_scales, at_level)
        first = origin(values)
        behind = np.uint32(first + np.uint32(unit) * np.uint32(padded))
        entries = dynamic_words if held else table
        other_entries = dynamic_words if other_held else other_table
        table_at, other_at = np.uint32(0), np.uint32(0)
        if held:
            table_at = _load_table(table, dynamic_words, behind, bits, planes, thread, threads)
            behind = np.uint32(table_at + np.uint32(4 * planes << bits))
        if gated and other_held:
            other_at = _load_table(other_table, dynamic_words, behind, other_bits, other_planes, thread, threads)
        flaw = False
        for token in range(tokens):
            pair = members[group * tokens + token]
            start = np.int64(pair // slots) * columns
            i = thread
            while i < padded:
                value = np.float32(0)
                if i < columns and pair >= 0:
                    value = load_float(x, start + i)
                flaw = flaw or not abs(value) <= _LARGEST
                values[i * tokens + token] = value * np.float32(0.5) if levels == 1 else value
                i = np.int32(i + threads)
        flaw_here = cuda.any_sync(_ALL, flaw)
        if lane == 0:
            flaws[warp] = 1 if flaw_here else 0
        cuda.syncthreads()
        spread = cuda.any_sync(_ALL, lane < threads >> 5 and flaws[lane] != 0)

        step = np.int32(lanes)
        below = np.int32(lane // step)
        member = np.int32(lane - below * step)
        rows_each = np.int32(np.int32(32) // step)
        row = np.int32((cuda.blockIdx.x * (threads >> 5) + warp) * rows_each + below)
        while row - below < rows:
            at = row if row < rows else np.int32(0)
            index = np.int32(starts[at] + member)
            stop = starts[at + 1] if row < rows else np.int32(0)
            own = _own_levels(scales, at, levels)
            parts, shape = (entries, table_at, values, own), (bits, fields, levels, unit)
            total = _row_sums(words, index, stop, step, first, spread, zeros, parts, shape, each)
            other_own, other_total = own, zeros
            if gated:
                index = np.int32(other_starts[at] + member)
                stop = other_starts[at + 1] if row < rows else np.int32(0)
                other_own = _own_levels(other_scales, at, levels)
                parts, shape = (other_entries, other_at, values, other_own), (other_bits, other_fields, levels, unit)
                other_total = _row_sums(other_words, index, stop, step, first, spread, zeros, parts, shape, other_each)
            for token in range(tokens):
                value = sum_of_lanes(total[token], step)
                value = activated(value * own[0] if levels == 1 else value, activation)
                if gated:
                    factor = sum_of_lanes(other_total[token], step)
                    value = value * (factor * other_own[0] if levels == 1 else factor)
                pair = members[group * tokens + token]
                if member == 0 and row < rows and pair >= 0:
                    if weighted:
                        value = value * weights[pair]
                    store_float(y, np.int64(pair) * rows + row, value)
            row = np.int32(row + cuda.gridDim.x * (threads >> 5) * rows_each)

    names = "_".join(f"{each.bits}_{each.fields}{'' if each.held else '_global'}" for each in variant.books)
    suffix = f"{'_' + variant.activation if variant.activation else ''}{'_weighted' if weighted else ''}"
    _gather_kernel.__name__ = f"_gather_{names}_levels{levels}_tokens{tokens}{suffix}_kernel"
    return _gather_kernel
