"""CUDA twin of :mod:`qmoe_lite.matmul`: a warp walks a row, a lane takes two to four codewords at a time."""

from __future__ import annotations

import functools
import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from qmoe_lite.codebook import Codebook
from qmoe_lite.codewords import MAX_WEIGHTS
from qmoe_lite.cuda import launch
from qmoe_lite.cuda.codec import check_validated, decode_rows, load_code, row_starts, slot_values
from qmoe_lite.cuda.intrinsics import (
    add_multiple,
    aligned_words,
    dot_bytes,
    float_of_bits,
    funnel_shift,
    load_constant,
    load_float,
    misaligned_bytes,
    origin,
    scan_lanes,
    store_float,
    word_at,
)
from qmoe_lite.cuda.launch import WARP, as_tensor, cuda, kernel
from qmoe_lite.errors import DtypeError, SettingError, ShapeError
from qmoe_lite.packed import PackedMatrix

GATHERED_TOKENS = 4  # up to this many tokens are gathered, in one walk where their activations fit shared memory
TILE_VALUES = 1 << 24  # float32 values decoded at a time for many tokens: 64 MiB
WARPS = 16  # per block at most: each block loads the table and x
WARPS_RESIDENT = 64  # that a multiprocessor holds
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_ALL = 0xFFFFFFFF
_LARGEST = np.float32(np.finfo(np.float32).max)
_LONGEST = MAX_WEIGHTS[3]  # weights of a codeword
_BOTH, _X, _NEITHER = 0, 1, 2  # what lies in shared memory: table and x, x, nothing


@dataclass(frozen=True)
class Variant:
    """What a gather kernel is compiled for.

    Attributes
    ----------
    bits : int
        Of a codeword.
    fields : int
        Nonzeros of a table entry: 2, 3, 4 or 7.
    levels : int
        Levels a row: 1 or 2 of ternary digits, 3 of two-bit ones.
    tokens : int
        1, 2 or 4; activations of one column lie together.
    held : int
        What lies in shared memory: 0 table and x, 1 only x, 2 nothing (x then lies padded in global memory).
    """

    bits: int
    fields: int
    levels: int
    tokens: int = 1
    held: int = _BOTH

    @property
    def each(self) -> int:
        """Codewords that a lane takes at a time: as many as 32 bits hold."""
        return 32 // self.bits

    @property
    def planes(self) -> int:
        """Words of a table entry."""
        return {2: 1, 3: 1, 4: 2, 7: 3}[self.fields]

    @property
    def padded_columns(self) -> int:
        """Columns of zeros behind x: a lane that begins at the row's end stays inside."""
        return self.each * _LONGEST

    def shared_bytes(self, columns: int) -> int:
        """Return the dynamic shared memory of a block; the table begins at a multiple of a plane's size."""
        x_bytes = 0 if self.held == _NEITHER else 4 * self.tokens * (columns + self.padded_columns)
        return x_bytes + (4 * (self.planes + 1) << self.bits if self.held == _BOTH else 0)


def decode_matmul(packed: PackedMatrix, x: Any) -> Any:
    """CUDA twin of :func:`qmoe_lite.matmul.decode_matmul`; `x` and the matrix on one GPU, the result a tensor.

    Up to four tokens: lane i adds the products of codewords n * i to n * (i + 1) - 1 of its row, n = 32 // bits, then
    those 32 * n further on and so on, in ascending order; then the lanes are added as a tree. More tokens: decoded
    tiles of rows and torch.matmul, in the precision that torch is set to. A matrix that `encode` did not make must have
    been validated.
    """
    check_validated(packed)
    tokens = _tokens(x, packed)
    few = 0 < len(tokens) <= GATHERED_TOKENS
    y = _gather_product(packed, tokens) if few else _tile_product(packed, tokens.float())
    return y.reshape(*x.shape[:-1], packed.shape[0]).to(as_tensor(x, "x").dtype)


def _tokens(x: Any, packed: PackedMatrix) -> Tensor:
    """Check `x` and return it as a contiguous tensor of shape (T, C), float64 as float32."""
    rows, columns = packed.shape
    tokens = as_tensor(x, "x")
    if tokens.dtype not in _FLOATS:
        raise DtypeError(f"x is {tokens.dtype}; expected float16, bfloat16, float32 or float64. Convert it.")
    if tokens.ndim not in (1, 2) or tokens.shape[-1] != columns:
        raise ShapeError(
            f"x has shape {tuple(tokens.shape)} but the packed matrix is {rows} x {columns}; expected ({columns},) or "
            f"(tokens, {columns}). Reshape x, or transpose it."
        )
    if tokens.device != packed.device:
        raise SettingError(f"x is on {tokens.device} but the matrix on {packed.device}; expected one GPU. Move one.")
    return (tokens.float() if tokens.dtype == torch.float64 else tokens).reshape(-1, columns)


def _tile_product(packed: PackedMatrix, tokens: Tensor) -> Tensor:
    """Product by decoded tiles of rows: tokens (T, C) -> (T, R)."""
    rows, columns = packed.shape
    y = torch.empty(len(tokens), rows, device=tokens.device)
    if not len(tokens):
        return y
    values, starts = slot_values(packed, torch.float32), row_starts(packed)
    tile_rows = max(1, TILE_VALUES // columns)
    for first in range(0, rows, tile_rows):
        tile = torch.zeros(min(tile_rows, rows - first), columns, device=tokens.device)
        decode_rows(packed, values, starts, first, tile)
        y[:, first : first + len(tile)] = tokens @ tile.T
    return y


def _gather_product(packed: PackedMatrix, tokens: Tensor) -> Tensor:
    """Product by adding nonzeros: tokens (T, C) of float32, float16 or bfloat16 -> (T, R) of the same."""
    codebook, (rows, columns) = packed.codebook, packed.shape
    limit = launch.shared_limit(tokens.device)
    variant = choose_variant(codebook, packed.levels.shape[1], len(tokens), columns, limit)
    starts, levels = _row_parts(packed)
    y = torch.empty(len(tokens), rows, dtype=tokens.dtype, device=tokens.device)
    sizes = packed.codes.numel(), rows, columns
    multiprocessors = launch.multiprocessors(tokens.device)
    warps = min(WARPS, max(1, rows // multiprocessors))
    shared_bytes = variant.shared_bytes(columns)
    blocks_each = max(1, min(WARPS_RESIDENT // warps, limit // max(shared_bytes, 1)))
    blocks = min(-(-rows // warps), multiprocessors * blocks_each)
    table = device_words(codebook, variant.fields, tokens.device)
    for first in range(0, len(tokens), variant.tokens):
        x, out = tokens[first : first + variant.tokens], y[first : first + variant.tokens]
        count = len(x)
        if variant.held == _NEITHER:
            scale = 0.5 if variant.levels == 1 else 1.0
            x = torch.nn.functional.pad(x.float() * scale, (0, variant.padded_columns))
        if x.dtype == torch.bfloat16:
            x = x.view(torch.uint16)
        if out.dtype == torch.bfloat16:
            out = out.view(torch.uint16)
        arrays = packed.codes, starts, table, levels, x, out
        gather_kernel(variant).launch(blocks, warps * WARP, *arrays, *sizes, count, shared_bytes=shared_bytes)
    return y


def choose_variant(codebook: Codebook, levels: int, tokens: int, columns: int, limit: int) -> Variant:
    """Return what to compile for, given the bytes of shared memory that a block may ask for."""
    fields = len(codebook.fields)
    if fields == 3 and codebook.longest > 63:  # positions of six bits would not hold it
        fields = 4
    most = 1 << (tokens - 1).bit_length()
    for held in (_BOTH, _X):
        for width in (4, 2, 1):
            variant = Variant(codebook.bits, fields, levels, width, held)
            if width <= most and variant.shared_bytes(columns) <= limit:
                return variant
    return Variant(codebook.bits, fields, levels, 1, _NEITHER)


@functools.lru_cache(maxsize=64)
def device_words(codebook: Codebook, fields: int, device: torch.device) -> Tensor:
    """Return the codebook's table for a gather kernel of so many fields, on a GPU; kept there for the next call."""
    return torch.from_numpy(table_words(codebook, fields)).to(device)


def table_words(codebook: Codebook, fields: int) -> NDArray[np.uint32]:
    """Return the table as the gather kernels read it: uint32, one plane of 2**bits words after another.

    Bytes 0 to 3 of the first plane: the weights, the positions of nonzeros 0 to 2; of the second: those of 3 to 6. A
    nonzero's slot takes two bits: +1 is 1 and -1 is 3, or the two-bit digit, or 0 where there is none. From the last
    plane's highest bits down, or, of three fields in one plane, in the highest bits of their own bytes.
    """
    table, digits = codebook.table, np.uint64(codebook.digits)
    code_of_slot = np.array([1, 3, 0] if codebook.digits == 3 else [1, 2, 3, 0], dtype=np.uint32)
    planes = np.zeros((Variant(codebook.bits, fields, 1).planes, len(table)), dtype=np.uint32)
    planes[0] = table & np.uint64(255)
    for i in range(fields):
        field = table >> np.uint64(8 * i + 8) & np.uint64(255)
        place = i + 1 if i < 3 or fields <= 3 else i - 3
        planes[0 if i < 3 else 1] |= (field // digits).astype(np.uint32) << np.uint32(8 * place)
        top = 8 * i + 14 if fields == 3 else 30 - 2 * i
        planes[-1] |= code_of_slot[field % digits] << np.uint32(top)
    return planes.reshape(-1)


_PARTS: weakref.WeakKeyDictionary[PackedMatrix, tuple[Tensor, Tensor]] = weakref.WeakKeyDictionary()


def _row_parts(packed: PackedMatrix) -> tuple[Tensor, Tensor]:
    """Return where rows start and their levels as float32; made once for a matrix, which is not changed."""
    if packed not in _PARTS:
        _PARTS[packed] = row_starts(packed), packed.levels.to(torch.float32).contiguous()
    return _PARTS[packed]


@njit(inline="always")
def warp_sum(value: np.float32) -> np.float32:
    """Return the sum of `value` over the warp's lanes, in each of them."""
    for step in (16, 8, 4, 2, 1):
        value += cuda.shfl_xor_sync(_ALL, value, step)
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
def _add_codeword(
    entries: Any,
    values: Any,
    at: Any,
    entry: Any,
    place: Any,
    total: Any,
    own: Any,
    bits: int,
    fields: int,
    levels: int,
    unit: int,
) -> Any:
    """Add the nonzeros of a codeword that begins at `place`: each its weight times what lies at its position."""
    slots = _slots(entries, at, entry, bits, fields)
    near = _positions(entry, fields)
    far = near
    if fields > 3:
        far = word_at(entries, np.uint32(at + np.uint32(4 << bits)))
    for i in range(fields):
        column = dot_bytes(near if i < 3 else far, np.uint32(unit << (8 * i + 8 if i < 3 else 8 * i - 24)), place)
        weight = _weight(_slot(slots, i, fields), own, levels)
        total = add_multiple(total, values, column, weight)
    return total


@functools.cache
def gather_kernel(variant: Variant) -> launch.Kernel:
    """Return the kernel that fills y (T, R) with the products of rows and x (T, C); T up to the variant's tokens."""
    bits, fields, levels, tokens, held = variant.bits, variant.fields, variant.levels, variant.tokens, variant.held
    each, pad = variant.each, variant.padded_columns
    words, plane = variant.planes << bits, 4 << bits
    mask = ((1 << bits) - 1) << 2
    unit = 4 * tokens  # bytes of a column
    zeros = (np.float32(0),) * tokens
    table_held, x_held = held == _BOTH, held != _NEITHER

    @kernel(
        "uint8*, int64*, uint32*, float32*, float32*, float32*, int64, int32, int32, int32",
        "uint8*, int64*, uint32*, float32*, uint16*, uint16*, int64, int32, int32, int32",
        "uint8*, int64*, uint32*, float32*, float16*, float16*, int64, int32, int32, int32",
        "uint8*, int64*, uint32*, float32*, float32*, uint16*, int64, int32, int32, int32",
        "uint8*, int64*, uint32*, float32*, float32*, float16*, int64, int32, int32, int32",
    )
    def _gather_kernel(
        codes: Any,
        starts: Any,
        table: Any,
        scales: Any,
        x: Any,
        y: Any,
        size: int,
        rows: int,
        columns: int,
        count: int,
    ) -> None:
        thread, threads = np.int32(cuda.threadIdx.x), np.int32(cuda.blockDim.x)
        lane = np.int32(thread & 31)
        warp = np.int32(cuda.shfl_sync(_ALL, np.int32(thread >> 5), 0))  # so that the compiler knows it for uniform
        flaws = cuda.shared.array(32, np.int32)
        dynamic_words = cuda.shared.array(0, np.uint32)
        dynamic_floats = cuda.shared.array(0, np.float32)
        entries = dynamic_words if table_held else table
        values = dynamic_floats if x_held else x
        first = origin(values)
        table_at = origin(entries)
        if table_held:
            behind_x = np.uint32(table_at + np.uint32(unit) * np.uint32(columns + pad))
            table_at = np.uint32((behind_x + np.uint32(plane - 1)) & np.uint32(0x100000000 - plane))
            entry_index = np.int32((table_at - first) >> np.uint32(2))
            i = thread
            while i < words:
                dynamic_words[entry_index + i] = load_constant(table, i)
                i = np.int32(i + threads)
        flaw = False
        for token in range(tokens):
            i = thread
            while i < columns + pad:
                value = np.float32(0)
                if i < columns and token < count:
                    value = load_float(x, np.int64(token) * columns + i)
                flaw = flaw or not abs(value) <= _LARGEST
                if x_held:
                    dynamic_floats[i * tokens + token] = value * np.float32(0.5) if levels == 1 else value
                i = np.int32(i + threads)
        flaw_here = cuda.any_sync(_ALL, flaw)
        if lane == 0:
            flaws[warp] = 1 if flaw_here else 0
        cuda.syncthreads()
        spread = cuda.any_sync(_ALL, lane < threads >> 5 and flaws[lane] != 0)

        end = np.uint32(first + np.uint32(columns) * np.uint32(unit))
        skipped = misaligned_bytes(codes)
        available = (skipped + size) >> 2
        row = np.int32(cuda.blockIdx.x * (threads >> 5) + warp)
        while row < rows:
            level = scales[np.int64(row) * levels]
            own = (
                level,
                scales[np.int64(row) * levels + 1] if levels > 1 else level,
                scales[np.int64(row) * levels + 2] if levels > 2 else level,
            )
            total = zeros
            place = first
            if spread:  # zero weights times infinity count too: walk every column
                codeword = starts[row] + lane
                while place < end:
                    entry = np.uint32(0)
                    at = table_at
                    if codeword < starts[row + 1]:
                        code = load_code(codes, codeword * bits, np.int32(mask >> 2))
                        at = np.uint32(table_at + np.uint32(code << 2))
                        entry = word_at(entries, at)
                    codeword += WARP
                    near = _positions(entry, fields)
                    length = np.uint32(near & np.uint32(255))
                    behind = scan_lanes(length)
                    here = np.uint32(place + (behind - length) * np.uint32(unit))
                    place = np.uint32(place + np.uint32(cuda.shfl_sync(_ALL, np.int32(behind), 31)) * np.uint32(unit))
                    position = np.uint32(0)
                    while position < length:
                        weight = np.float32(0)
                        slots = _slots(entries, at, entry, bits, fields)
                        for field in range(fields):
                            word = near
                            if field >= 3:
                                word = word_at(entries, np.uint32(at + np.uint32(4 << bits)))
                            byte = np.uint32(
                                word >> np.uint32(8 * field + 8 if field < 3 else 8 * field - 24)
                            ) & np.uint32(255)
                            slot = _slot(slots, field, fields)
                            if byte == position and slot >= np.uint32(0x40000000):
                                weight = _weight(slot, own, levels)
                        total = add_multiple(total, values, here, weight)
                        here = np.uint32(here + np.uint32(unit))
                        position = np.uint32(position + np.uint32(1))
            else:
                bit = starts[row] * bits + 8 * skipped
                stream = aligned_words(codes, bit >> 5)
                last = np.int32(min(available - 2 - (bit >> 5), np.int64(1 << 30)))
                begin = np.int32(np.int32(bit & 31) + lane * (each * bits))
                shift = np.uint32(begin & 31)
                index = np.int32(begin >> 5)
                near_word = min(index, last)
                word = funnel_shift(load_constant(stream, near_word), load_constant(stream, near_word + 1), shift)
                while place < end:
                    # what is behind the row's last codeword adds nothing: it begins where x ends, or further on
                    index = np.int32(index + each * bits)
                    near_word = min(index, last)
                    low, high = load_constant(stream, near_word), load_constant(stream, near_word + 1)
                    at0 = np.uint32(table_at | ((word << np.uint32(2)) & np.uint32(mask)))
                    at1 = np.uint32(table_at | ((word >> np.uint32(bits - 2)) & np.uint32(mask)))
                    at2 = np.uint32(table_at | ((word >> np.uint32(min(2 * bits, 33) - 2)) & np.uint32(mask)))
                    at3 = np.uint32(table_at | ((word >> np.uint32(min(3 * bits, 33) - 2)) & np.uint32(mask)))
                    entry0, entry1 = word_at(entries, at0), word_at(entries, at1)
                    entry2 = word_at(entries, at2) if each > 2 else entry1
                    entry3 = word_at(entries, at3) if each > 3 else entry1
                    length = dot_bytes(_positions(entry0, fields), np.uint32(unit), np.uint32(0))
                    length = dot_bytes(_positions(entry1, fields), np.uint32(unit), length)
                    if each > 2:
                        length = dot_bytes(_positions(entry2, fields), np.uint32(unit), length)
                    if each > 3:
                        length = dot_bytes(_positions(entry3, fields), np.uint32(unit), length)
                    behind = scan_lanes(length)
                    here = min(np.uint32(place + behind - length), end)
                    place = np.uint32(place + np.uint32(cuda.shfl_sync(_ALL, np.int32(behind), 31)))
                    total = _add_codeword(entries, values, at0, entry0, here, total, own, bits, fields, levels, unit)
                    here = dot_bytes(_positions(entry0, fields), np.uint32(unit), here)
                    total = _add_codeword(entries, values, at1, entry1, here, total, own, bits, fields, levels, unit)
                    if each > 2:
                        here = dot_bytes(_positions(entry1, fields), np.uint32(unit), here)
                        total = _add_codeword(
                            entries, values, at2, entry2, here, total, own, bits, fields, levels, unit
                        )
                    if each > 3:
                        here = dot_bytes(_positions(entry2, fields), np.uint32(unit), here)
                        total = _add_codeword(
                            entries, values, at3, entry3, here, total, own, bits, fields, levels, unit
                        )
                    word = funnel_shift(low, high, shift)
            for token in range(tokens):
                whole = warp_sum(total[token])
                if lane == 0 and token < count:
                    store_float(y, np.int64(token) * rows + row, whole * own[0] if levels == 1 else whole)
            row = np.int32(row + cuda.gridDim.x * (threads >> 5))

    _gather_kernel.__name__ = f"_gather_{bits}_{fields}_{levels}_{tokens}_{held}_kernel"
    return _gather_kernel
