"""What the products' kernels are compiled for, and the tables that they read; host code, nothing is compiled here."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qmoe_lite.coding.codebook import Codebook
from qmoe_lite.coding.dictionary import Dictionary
from qmoe_lite.cuda import window_packets
from qmoe_lite.cuda.launch import WARP
from qmoe_lite.cuda.packets import columns_behind

WIDTHS = (4, 2, 1)  # tokens of a group
SATURATING_WARPS = 16  # of a multiprocessor: with fewer it waits for memory
LONGEST_LOAD = 16  # bytes
_SPANS = (8, 4, 2, 1)
ACTIVATIONS = ("relu", "silu", "gelu", "gelu_tanh")


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


@functools.lru_cache(maxsize=1024)  # asked at each call, which takes no longer than this does
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


@functools.lru_cache(maxsize=1024)  # as `choose_variant`
def choose_lanes(packets_each: float, rows: int, multiprocessors: int) -> int:
    """Return how many lanes share a row: a model of what keeps most lanes busy.

    On an H200 its choice took at most 1.07 times as long as the best one (bench/results/nvidia-h200.txt).

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
    code_of_slot = (np.array(codebook.alphabet.slot_digits) & 3).astype(np.uint32)
    planes = np.zeros((Book(codebook.bits, fields).planes, len(table)), dtype=np.uint32)
    planes[0] = table & np.uint64(255)
    for i in range(fields):
        field = table >> np.uint64(8 * i + 8) & np.uint64(255)
        place = i + 1 if i < 3 or fields <= 3 else i - 3
        planes[0 if i < 3 else 1] |= (field // digits).astype(np.uint32) << np.uint32(8 * place)
        top = 8 * i + 14 if fields == 3 else 30 - 2 * i
        planes[-1] |= code_of_slot[field % digits] << np.uint32(top)
    return planes.reshape(-1)


@dataclass(frozen=True)
class WindowVariant:
    """What a kernel of the product from codes of windows is compiled for.

    Attributes
    ----------
    bits : int
        Of a codeword.
    width : int
        Digits of a table's row: 8, 16 or 32.
    held : bool
        The tables lie in shared memory.
    tokens : int
        Of a group: 1, 2 or 4; activations of one column lie together.
    span : int
        Columns whose activations lie together, `tokens` each: from each column on, so that one load gives them all.
    other : (int, int) or None
        Bits and width of a second matrix, the up projection, by whose results the first one's are multiplied.
    activation : str or None
        One of `ACTIVATIONS`, of the first matrix's results.
    half : bool
        Activations, times their columns' scales, are kept in bfloat16, else in float32.
    """

    bits: int
    width: int
    held: bool
    tokens: int
    span: int
    other: tuple[int, int] | None = None
    activation: str | None = None
    half: bool = False

    @property
    def table_words(self) -> tuple[int, int]:
        """Words of each matrix's table of digits."""
        bits, width = self.other or (0, 0)
        return self.width << self.bits, width << bits

    def shared_bytes(self, columns: int) -> int:
        """Return the dynamic shared memory of a block; `columns` are those of x and of the zeros behind it."""
        return 4 * self.held * sum(self.table_words) + self.column_bytes * columns

    @property
    def column_bytes(self) -> int:
        """Bytes of the activations that lie together for a column."""
        return (2 if self.half else 4) * self.tokens * self.span


@functools.lru_cache(maxsize=1024)  # asked at each call, which takes no longer than this does
def choose_window_variant(
    dictionary: Dictionary,
    columns: int,
    tokens: int,
    limit: int,
    other: Dictionary | None = None,
    activation: str | None = None,
    half: bool = False,
) -> WindowVariant | None:
    """Return what to compile for, given the bytes of shared memory that a block may ask for.

    The tables in shared memory where they fit, then as many tokens a group as wanted or as fit, then loads as long as
    leave room for a second block, if that is 8 bytes, or as fit; None where not one token does. `half`: x is bfloat16.
    `other` is the second matrix's dictionary.
    """
    padded = columns + window_packets.columns_behind(dictionary, other)
    second = None if other is None else (other.bits, other.width)
    for held in (True, False):
        for width in (each for each in WIDTHS if each <= tokens):
            spans = [span for span in _SPANS if 4 <= (2 if half else 4) * width * span <= LONGEST_LOAD]
            variants = [
                WindowVariant(dictionary.bits, dictionary.width, held, width, span, second, activation, half)
                for span in spans
            ]
            roomy = [each for each in variants if each.column_bytes >= 8 and each.shared_bytes(padded) <= limit // 2]
            for variant in (*roomy, *variants):
                if variant.shared_bytes(padded) <= limit:
                    return variant
    return None


@functools.cache  # as `window_packets.device_lengths`
def product_table(dictionary: Dictionary, device: torch.device) -> Tensor:
    """Return a dictionary's table as the product reads it, on a GPU: uint32, four digits each, the lowest byte first.

    A byte is 128 + four times its digit. A string's length less one lies in the two lowest bits, which that leaves, of
    the first byte, then of the second and of the third.
    """
    table = (128 + 4 * dictionary.digits_table.astype(np.int16)).astype(np.uint8)
    more = np.maximum(dictionary.lengths, 1) - 1
    for byte in range(3):
        table[:, byte] |= more >> 2 * byte & 3
    return torch.from_numpy(table.reshape(-1).view(np.uint32)).to(device)
