"""CUDA twin of :mod:`qmoe_lite.coding.matmul`: lanes take packets of codewords, some lanes a row, some tokens a time.

One kernel serves one matrix and a whole layer's experts. A group is up to four tokens that go through one expert; all
groups of a layer are one launch, gate and up projection with their activation in between.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from qmoe_lite.coding.codebook import Codebook
from qmoe_lite.coding.packed import PackedMatrix
from qmoe_lite.coding.tokens import count_tokens, known_experts
from qmoe_lite.cuda import launch
from qmoe_lite.cuda.codec import check_validated, decode_rows, row_starts, slot_values
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
from qmoe_lite.cuda.launch import WARP, as_tensor, cuda, kernel
from qmoe_lite.cuda.packets import (
    KINDS,
    Packets,
    bits16,
    codewords_each,
    columns_behind,
    decode_packets,
    make_packets,
)
from qmoe_lite.errors import DtypeError, SettingError, ShapeError

# Chosen by the model of bench/kernels.py, not measured: with x in bfloat16, decoding a matrix to write and read it
# again takes about as long as walking its packets for 40 tokens, four at a time.
GATHERED_TOKENS = 32
WIDTHS = (4, 2, 1)  # tokens of a group
TILE_VALUES = 1 << 24  # values decoded at a time for many tokens: 64 MiB of float32
WARPS = (8, 16)  # per block, least and most: each block loads the table and x
RESIDENT_WARPS = 64  # that a multiprocessor holds
# pairs of token and expert that are all gathered, since then the host need not know how many tokens an expert has:
# beyond, by a model of the time and not measured, decoding an expert once for many tokens is worth waiting to know
GATHERED_PAIRS = 4096
SATURATING_WARPS = 16  # of a multiprocessor: with fewer it waits for memory
ACTIVATIONS = ("relu", "silu", "gelu", "gelu_tanh")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_ALL = 0xFFFFFFFF
_LARGEST = np.float32(np.finfo(np.float32).max)
_ROOT_HALF = np.float32(0.5**0.5)
_TANH_SCALE, _TANH_CUBIC = np.float32((2 / math.pi) ** 0.5), np.float32(0.044715)


@dataclass(frozen=True)
class Book:
    """What a kernel is compiled for of a codebook.

    Attributes
    ----------
    bits : int
        Of a codeword.
    fields : int
        Nonzeros of a table entry: 2, 3, 4 or 7.
    held : bool
        The table lies in shared memory.
    """

    bits: int
    fields: int
    held: bool = True

    @property
    def planes(self) -> int:
        """Words of a table entry."""
        return {2: 1, 3: 1, 4: 2, 7: 3}[self.fields]

    @property
    def shared_bytes(self) -> int:
        """Shared memory that the table takes: it begins at a multiple of a plane's size."""
        return 4 * (self.planes + 1) << self.bits if self.held else 0


@dataclass(frozen=True)
class Variant:
    """What a gather kernel is compiled for.

    Attributes
    ----------
    books : tuple of Book
        One matrix's, or gate and up projection's.
    levels : int
        Levels a row: 1 or 2 of ternary digits, 3 of two-bit ones.
    tokens : int
        Of a group: 1, 2 or 4; activations of one column lie together.
    activation : str or None
        One of `ACTIVATIONS`, of the first matrix's results.
    """

    books: tuple[Book, ...]
    levels: int
    tokens: int = 1
    activation: str | None = None

    def shared_bytes(self, columns: int) -> int:
        """Return the dynamic shared memory of a block; `columns` are those of x and of the zeros behind it."""
        return 4 * self.tokens * columns + sum(book.shared_bytes for book in self.books)


def decode_matmul(packed: PackedMatrix, x: Any) -> Any:
    """CUDA twin of :func:`qmoe_lite.coding.matmul.decode_matmul`; `x` and the matrix on one GPU, the result a tensor.

    A matrix's first product lays its codes out in packets, which are kept with it. Up to 32 tokens: a few lanes share a
    row, packet after packet, and add in a fixed order. More tokens: tiles of rows are decoded, to the dtype of `x`
    where that holds the levels exactly, and torch.matmul multiplies, in the precision that torch is set to. A matrix
    that `encode` did not make must have been validated.
    """
    check_validated(packed)
    tokens = _tokens(x, packed)
    y = None
    if 0 < len(tokens) <= GATHERED_TOKENS:
        y = _gather_product(packed, tokens)
    if y is None:
        y = _tile_product(packed, tokens)
    return y.reshape(*x.shape[:-1], packed.shape[0]).to(as_tensor(x, "x").dtype)


class ExpertsCall:
    """Tokens on their way through a layer's experts, which may take their turns as they arrive on the GPU.

    Each pair of a token and an expert has a row of its own for what it adds, and a token's rows are added at the end:
    the bytes do not depend on the turns, nor, where no expert is decoded, on the other tokens.

    Parameters
    ----------
    first : list of Packets
        The projections that take x, one or two (gate and up), of the same shape; all experts of the layer, or slots,
        which other experts may hold besides.
    last : Packets
        The projection that takes what they put out.
    activation : str or function
        One of `ACTIVATIONS`, of the first projection's results, which the second one's are multiplied by; or what makes
        one tensor of the projections' results, in a launch of its own.
    x : float32, float16 or bfloat16 tensor, shape (T, C), contiguous
        On the GPU of the packets.
    index : integer tensor, shape (T, K)
        Experts of each token; a number that is no expert's adds nothing.
    weights : float tensor, shape (T, K)
        What each expert's output is multiplied by.
    experts : int
        Of the layer: `index` goes from 0 to it.

    Attributes
    ----------
    fits : bool
        The GPU's shared memory holds a token of x and of what the first projections put out; else `gather` must not be
        called.

    Notes
    -----
    Nothing is checked, and the GPU is not waited for, so that a CUDA graph can hold what `gather` and `total` do.
    """

    def __init__(
        self,
        first: list[Packets],
        last: Packets,
        activation: str | Callable[[list[Tensor]], Tensor],
        x: Tensor,
        index: Tensor,
        weights: Tensor,
        experts: int,
    ) -> None:
        self._first, self._last, self._activation = first, last, activation
        self._x, self._index, self._experts = x, index, experts
        self._weights = weights.float().reshape(-1).contiguous()
        self._y = torch.zeros(index.numel(), last.rows, dtype=torch.float32, device=x.device)
        self._groups: Groups | None = None
        self._order: Tensor | None = None
        name = activation if isinstance(activation, str) else None
        self._stages = [tuple(first)] if name else [(each,) for each in first]
        wanted = 1 if index.numel() <= 2 * experts else WIDTHS[0]
        variants = [_variant(matrices, wanted, name) for matrices in self._stages]
        variants.append(_variant((last,), wanted, None))
        found = [variant for variant in variants if variant is not None]
        self.fits = len(found) == len(variants)
        self._width = min((variant.tokens for variant in found), default=1)
        self._variants = [replace(variant, tokens=self._width) for variant in found]

    def gather(self, places: Tensor | None = None) -> None:
        """Send tokens through experts: a launch for the first projections, one for the last.

        Parameters
        ----------
        places : int32 tensor, shape (experts,), optional
            Where each expert lies among the packets, -1 if it has no turn now. By default all have their turn, and each
            lies at its own number.
        """
        if not self._index.numel():
            return
        if self._groups is None:
            single = self._width == 1
            self._groups = _single_groups(self._index) if single else _groups(self._index, self._experts, self._width)
        if places is None:
            places = _in_order(self._experts, self._x.device)
        *before, after = self._variants
        outputs = []
        for matrices, variant in zip(self._stages, before, strict=True):
            shape = self._index.numel(), matrices[0].rows
            outputs.append(torch.empty(shape, dtype=torch.float32, device=self._x.device))
            _gather(matrices, places, variant, self._x, self._groups, self._index.shape[1], None, outputs[-1])
        inside = outputs[0] if isinstance(self._activation, str) else self._activation(outputs).contiguous()
        _gather((self._last,), places, after, inside, self._groups, 1, self._weights, self._y)

    def turn(self, places: dict[int, int], sizes: Sequence[int], activation: Callable[[list[Tensor]], Tensor]) -> None:
        """Send tokens through some experts: those of few tokens, or all where there are few pairs, without decoding.

        Parameters
        ----------
        places : dict
            Where each of them lies among the packets.
        sizes : list of int
            Tokens of each expert of the layer.
        activation : function
            As `decode` takes it.
        """
        most = GATHERED_TOKENS if self._index.numel() > GATHERED_PAIRS else self._index.numel()
        few = [expert for expert in places if self.fits and sizes[expert] <= most]
        if few:
            numbers = [-1] * self._experts
            for expert in few:
                numbers[expert] = places[expert]
            self.gather(launch.upload(numbers, self._x.device))
        for expert in [expert for expert in places if expert not in few]:
            before = sum(sizes[:expert])
            self.decode(places[expert], slice(before, before + sizes[expert]), activation)

    def decode(self, place: int, pairs: slice, activation: Callable[[list[Tensor]], Tensor]) -> None:
        """Send many tokens through the expert at a place: its matrices are decoded.

        Parameters
        ----------
        place : int
            Among the packets.
        pairs : slice
            Of the pairs in the order of their experts; those of no expert come last.
        activation : function
            Makes one tensor of the first projections' results.
        """
        if self._order is None:
            self._order = torch.argsort(known_experts(self._index, self._experts), stable=True)
        own = self._order[pairs]
        x = self._x[torch.div(own, self._index.shape[1], rounding_mode="floor")]
        inside = activation([decoded_product(each, place, x) for each in self._first])
        out = decoded_product(self._last, place, inside)
        self._y.index_copy_(0, own, out.float() * self._weights[own, None])

    def total(self) -> Tensor:
        """Return what all experts that had their turn add up to, float32 (T, rows of the last projection)."""
        return self._y.view(*self._index.shape, self._last.rows).sum(1)


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
    if packed in _PACKETS:
        return decoded_product(_PACKETS[packed], 0, tokens)
    values: dict[torch.dtype, Tensor] = {}
    starts = row_starts(packed)

    def decode(first: int, tile: Tensor) -> None:
        if tile.dtype not in values:
            values[tile.dtype] = slot_values(packed, tile.dtype)
        decode_rows(packed, values[tile.dtype], starts, first, tile)

    return _by_tiles(packed.shape[0], packed.levels.dtype, decode, tokens)


def decoded_product(packets: Packets, expert: int, tokens: Tensor) -> Tensor:
    """Return the product of tokens (T, C) and one expert's matrix, (T, R): tiles of rows are decoded and multiplied."""
    return _by_tiles(packets.rows, packets.levels.dtype, functools.partial(decode_packets, packets, expert), tokens)


def _by_tiles(rows: int, levels_dtype: torch.dtype, decode: Callable[[int, Tensor], None], tokens: Tensor) -> Tensor:
    """Multiply tokens by tiles of rows; `decode` fills a tile of zeros, given the number of its first row."""
    columns = tokens.shape[1]
    dtype = tokens.dtype if tokens.dtype == levels_dtype else torch.float32
    tokens = tokens.to(dtype)
    y = torch.empty(len(tokens), rows, dtype=dtype, device=tokens.device)
    tile_rows = max(1, TILE_VALUES // columns)
    for first in range(0, rows if len(tokens) else 0, tile_rows):
        tile = torch.zeros(min(tile_rows, rows - first), columns, dtype=dtype, device=tokens.device)
        decode(first, tile)
        y[:, first : first + len(tile)] = tokens @ tile.T
    return y


def _gather_product(packed: PackedMatrix, tokens: Tensor) -> Tensor | None:
    """Product by adding nonzeros: tokens (T, C) -> (T, R) of the same dtype; None where x is too wide."""
    wanted = next(width for width in reversed(WIDTHS) if width >= min(len(tokens), WIDTHS[0]))
    limit, levels = launch.shared_limit(tokens.device), packed.levels.shape[1]
    variant = choose_variant((packed.codebook,), levels, packed.columns, wanted, None, limit)
    if variant is None:
        return None
    y = torch.empty(len(tokens), packed.shape[0], dtype=tokens.dtype, device=tokens.device)
    groups = _groups_in_order(len(tokens), variant.tokens, tokens.device)
    _gather((_packets(packed),), _in_order(1, tokens.device), variant, tokens, groups, 1, None, y)
    return y


_PACKETS: weakref.WeakKeyDictionary[PackedMatrix, Packets] = weakref.WeakKeyDictionary()


def _packets(packed: PackedMatrix) -> Packets:
    """Return a matrix as packets; made once for a matrix, which is not changed."""
    if packed not in _PACKETS:
        _PACKETS[packed] = make_packets(packed)
    return _PACKETS[packed]


def choose_variant(
    codebooks: tuple[Codebook, ...], levels: int, columns: int, tokens: int, activation: str | None, limit: int
) -> Variant | None:
    """Return what to compile for, given the bytes of shared memory that a block may ask for.

    As many tokens a group as wanted or as fit; tables in shared memory where they fit; None where not one token does.
    """
    columns = padded_columns(codebooks, columns)
    for held in (True, False):
        books = tuple(_book(codebook, held) for codebook in codebooks)
        for width in WIDTHS:
            variant = Variant(books, levels, width, activation)
            if width <= tokens and variant.shared_bytes(columns) <= limit:
                return variant
    return None


def _book(codebook: Codebook, held: bool) -> Book:
    fields = len(codebook.fields)
    if fields == 3 and codebook.longest > 63:  # positions of six bits would not hold it
        fields = 4
    return Book(codebook.bits, fields, held)


def padded_columns(codebooks: tuple[Codebook, ...], columns: int) -> int:
    """Return the columns of x and of the zeros behind it."""
    return columns + max(map(columns_behind, codebooks))


def choose_lanes(packets_each: float, rows: int, multiprocessors: int) -> int:
    """Return how many lanes share a row: a model of what keeps most lanes busy, not measured.

    Parameters
    ----------
    packets_each : float
        Packets of a row, on average.
    rows : int
        Of a matrix.
    multiprocessors : int
        Of the GPU.
    """

    def cost(lanes: int) -> float:
        warps = -(-rows * lanes // WARP) / multiprocessors
        return max(warps, SATURATING_WARPS) * turns(packets_each, lanes)

    return min((2, 4, 8, 16, 32), key=cost)


def turns(packets_each: float, lanes: int) -> int:
    """Return how often a warp loads packets for some rows of it: rows differ, and the longest counts."""
    return math.floor(packets_each / lanes) + 1


Groups = tuple[Tensor, Tensor]  # int32: each group's expert (G,); its tokens' pairs (G * width,), -1 for none


def _single_groups(index: Tensor) -> Groups:
    """Each pair of a token and an expert is a group of its own."""
    pairs = torch.arange(index.numel(), dtype=torch.int32, device=index.device)
    return index.reshape(-1).to(torch.int32), pairs


@functools.lru_cache(maxsize=64)
def _groups_in_order(tokens: int, width: int, device: torch.device) -> Groups:
    """Tokens of one matrix, `width` at a time."""
    groups = -(-tokens // width)
    members = torch.arange(groups * width, dtype=torch.int32)
    members[tokens:] = -1
    # made on the CPU: it is there when the copy returns, whichever stream uses it, and no graph is filled with it
    return torch.zeros(groups, dtype=torch.int32).to(device), members.to(device)


@functools.cache  # as `device_words`
def _in_order(experts: int, device: torch.device) -> Tensor:
    """Places of experts that lie at their own numbers."""
    return torch.arange(experts, dtype=torch.int32).to(device)  # as `_groups_in_order`


def _groups(index: Tensor, experts: int, width: int) -> Groups:
    """Gather the pairs of each expert in groups of up to `width`, without waiting for the GPU.

    Some of the last groups may be empty: how many are needed is known on the GPU alone.
    """
    pairs = index.numel()
    expert, pair = torch.sort(known_experts(index, experts), stable=True)
    counts = count_tokens(index, experts)
    groups_each = (counts + width - 1) // width
    first_pair, first_group = counts.cumsum(0) - counts, groups_each.cumsum(0) - groups_each
    rank = torch.arange(pairs, device=index.device) - first_pair[expert]
    group = first_group[expert] + rank // width
    most = min(pairs, pairs // width + experts + 1)
    found = torch.full((most,), -1, dtype=torch.int32, device=index.device)
    members = torch.full((most * width,), -1, dtype=torch.int32, device=index.device)
    found[group] = expert.to(torch.int32)
    members[group * width + rank % width] = pair.to(torch.int32)
    return found, members


def _variant(matrices: tuple[Packets, ...], tokens: int, activation: str | None) -> Variant | None:
    packets, limit = matrices[0], launch.shared_limit(matrices[0].device)
    codebooks = tuple(each.codebook for each in matrices)
    return choose_variant(codebooks, packets.levels_each, packets.columns, tokens, activation, limit)


def _gather(
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
    packets, multiprocessors = matrices[0], launch.multiprocessors(x.device)
    padded = padded_columns(tuple(each.codebook for each in matrices), packets.columns)
    shared_bytes = variant.shared_bytes(padded)
    # not by how many groups there are: a token's bytes must not depend on the others
    lanes = choose_lanes(packets.packets_each, packets.rows, multiprocessors)
    rows_each = WARP // lanes
    warps = min(max(-(-packets.rows * len(experts) // (rows_each * multiprocessors)), WARPS[0]), WARPS[1])
    resident = min(RESIDENT_WARPS // warps, launch.shared_limit(x.device) // max(shared_bytes, 1))
    blocks = max(1, -(-multiprocessors * max(resident, 1) // len(experts)))
    tiles = min(-(-packets.rows // (rows_each * warps)), blocks)
    arrays: list[Tensor] = []
    for each, book in zip((*matrices, *matrices), (*variant.books, *variant.books), strict=True):
        arrays += each.words, each.starts, bits16(each.levels), device_words(each.codebook, book.fields, x.device)
    arrays = [*arrays[:8], bits16(x), places, experts, members, experts if weights is None else weights, bits16(y)]
    assert all(each.strides == packets.strides for each in matrices), "gate and up projection lie alike"
    sizes = len(places), *packets.strides, packets.rows, packets.columns, padded, slots, lanes
    made = gather_kernel(variant, weights is not None)
    made.launch((tiles, len(experts)), warps * WARP, *arrays, *sizes, shared_bytes=shared_bytes)


@functools.cache  # of no bounded size: a graph keeps a table's address, and a model has hundreds of codebooks
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
    planes = np.zeros((Book(codebook.bits, fields).planes, len(table)), dtype=np.uint32)
    planes[0] = table & np.uint64(255)
    for i in range(fields):
        field = table >> np.uint64(8 * i + 8) & np.uint64(255)
        place = i + 1 if i < 3 or fields <= 3 else i - 3
        planes[0 if i < 3 else 1] |= (field // digits).astype(np.uint32) << np.uint32(8 * place)
        top = 8 * i + 14 if fields == 3 else 30 - 2 * i
        planes[-1] |= code_of_slot[field % digits] << np.uint32(top)
    return planes.reshape(-1)


@njit(inline="always")
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


@njit(inline="always")
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


@njit(inline="always")
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


@njit(inline="always")
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


@njit(inline="always")
def _own_levels(scales: Any, at: Any, levels: int) -> Any:
    """Return a row's levels as a triple; of fewer, the first one again."""
    level = load_float(scales, np.int64(at) * levels)
    return (
        level,
        load_float(scales, np.int64(at) * levels + 1) if levels > 1 else level,
        load_float(scales, np.int64(at) * levels + 2) if levels > 2 else level,
    )


@njit(inline="always")
def _activated(value: Any, activation: int) -> Any:
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


@njit(inline="always")
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
                value = _activated(value * own[0] if levels == 1 else value, activation)
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
