"""How a GPU holds the codes of matrices: in packets of 128 bits that a lane loads at once and decodes alone.

A packet's lowest 16 bits are the column where its first codeword begins; above them lie `codewords_each(bits)`
codewords, the first one lowest. A row begins with a packet of its own, and its last one is filled up with the
codebook's shortest codeword, which stands behind the row's end and adds nothing. So no lane needs to know what another
one decodes, as it must where codewords follow each other without a gap, and no load is ever split.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qmoe_lite.coding.codebook import Codebook
from qmoe_lite.coding.entry import entry_field, entry_length, field_position, field_slot
from qmoe_lite.coding.packed import PackedMatrix
from qmoe_lite.coding.parts import codebook_of
from qmoe_lite.cuda import launch
from qmoe_lite.cuda.codec import BLOCKS, THREADS, device_table, load_code
from qmoe_lite.cuda.intrinsics import load_float, load_quad, store_float
from qmoe_lite.cuda.launch import WARP, cuda, kernel
from qmoe_lite.errors import ShapeError

PACKET_BITS = 128
COLUMN_BITS = 16  # of the column where a packet begins; a matrix has at most 65535
KINDS = {torch.float32: "float32*", torch.bfloat16: "uint16*", torch.float16: "float16*"}  # of levels, x and y
_MOST_PACKETS = (1 << 31) - 1  # numbered in 32 bits


@dataclass(frozen=True)
class Prepared:
    """A launch but for what changes from call to call: found anew, all that would take longer than the GPU does."""

    made: launch.Kernel
    arrays: tuple[Tensor, ...]
    sizes: tuple[int, ...]
    shared_bytes: int

    def launch(self, grid: tuple[tuple[int, int], int], *arrays: Tensor) -> None:
        """Run with more arrays, behind those known; `grid`: blocks, and threads of each."""
        self.made.launch(*grid, *self.arrays, *arrays, *self.sizes, shared_bytes=self.shared_bytes)


@dataclass(frozen=True, eq=False)
class Packets:
    """Matrices of one shape and codebook on a GPU: all experts of a layer's projection, or one matrix.

    They lie side by side, or each in a slot of its own: what is expert e's begins at e times a stride.

    Attributes
    ----------
    words : uint32 tensor, shape (packets, 4)
        Lowest bits first.
    starts : int32 tensor, flat
        Number of each row's first packet, counted from where its expert's packets begin; then the last row's end.
    levels : float32, float16 or bfloat16 tensor
        L for each row.
    codebook : Codebook
    experts, rows, columns : int
        E, R and C; or the slots.
    levels_each : int
        L.
    packets_each : float
        Packets of a row, on average over all experts.
    strides : tuple of int
        From one expert to the next: packets of `words`, elements of `starts` and of `levels`. With a stride of 0 starts
        are counted from the first expert's packets on.
    launches : dict
        What launches need of these matrices, by what they are for.
    """

    words: Tensor
    starts: Tensor
    levels: Tensor
    codebook: Codebook
    experts: int
    rows: int
    columns: int
    levels_each: int
    packets_each: float
    strides: tuple[int, int, int]
    launches: dict[Any, Prepared] = field(default_factory=dict, init=False, repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes on the GPU."""
        return sum(tensor.nbytes for tensor in (self.words, self.starts, self.levels))

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.words.device


def codewords_each(bits: int) -> int:
    """Return how many codewords a packet holds."""
    return (PACKET_BITS - COLUMN_BITS) // bits


def columns_behind(codebook: Codebook) -> int:
    """Return how many columns of zeros must lie behind x, so that no codeword of a last packet ends beyond them."""
    return codebook.longest + codewords_each(codebook.bits) * codebook.min_weights


def most_packets(bits: int, each: int, codes: int, rows: int) -> int:
    """Return how many packets of `each` codewords of so many bits a matrix takes, given the bytes of its codes."""
    return (8 * codes // bits + rows * (each - 1)) // each


def packets_of(codewords: Any, each: int) -> Any:
    """Return how many packets of `each` codewords rows take, at least one a row; of an array or a tensor."""
    return (codewords - 1) // each + 1


def start_packets(counts: Tensor, each: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return `firsts`, `starts` and `words` as `repack` takes them, the last one to be filled; waits for the GPU.

    Parameters
    ----------
    counts : int64 tensor, shape (E, R)
        Codewords of the rows of matrices that lie side by side.
    each : int
        Codewords of a packet.

    Raises
    ------
    ShapeError
        More than 2**31 - 1 packets.
    """
    experts, rows = counts.shape
    starts = torch.zeros(counts.numel() + 1, dtype=torch.int64, device=counts.device)
    torch.cumsum(packets_of(counts, each).reshape(-1), 0, out=starts[1:])
    total = int(starts[-1])
    if total > _MOST_PACKETS:
        raise ShapeError(f"the matrices take {total} packets; expected at most {_MOST_PACKETS}. Split the experts.")
    firsts = torch.zeros((experts, rows + 1), dtype=torch.int32, device=counts.device)
    firsts[:, 1:] = counts.cumsum(1)
    words = torch.empty((total, 4), dtype=torch.uint32, device=counts.device)
    return firsts, starts.to(torch.int32), words


def codewords_of(held: dict[str, Tensor]) -> Tensor:
    """Return the codewords of each row of a projection, int64 (E, R), given what `stack_packets` is."""
    above = held["row_codewords"]
    if above.dtype == torch.uint16:  # torch knows little of it on a GPU
        above = above.view(torch.int16).to(torch.int64) & 0xFFFF
    return above.to(torch.int64) + held["fewest_codewords"].to(torch.int64)[:, None]


def make_packets(packed: PackedMatrix) -> Packets:
    """Return a validated matrix on a GPU as packets; waits for the GPU, which must count them."""
    offsets = torch.zeros(1, dtype=torch.int64, device=packed.device)
    counts = packed.count_codewords()[None]
    return _make(packed.codes, offsets, counts, packed.levels[None], codebook_of(packed), packed.columns)


def stack_packets(held: dict[str, Tensor], codebook: Codebook, columns: int) -> Packets:
    """Return a projection of a layer, all its experts, as packets; waits for the GPU.

    Parameters
    ----------
    held : dict of tensors on a GPU
        "codes", "expert_offsets", "row_codewords", "fewest_codewords" and "levels" as
        :func:`qmoe_lite.checkpoint.format.pack_experts` makes them; validated.
    codebook : Codebook
        Of all experts.
    columns : int
        C.

    Raises
    ------
    ShapeError
        More than 2**31 - 1 packets.
    """
    return _make(held["codes"], held["expert_offsets"], codewords_of(held), held["levels"], codebook, columns)


def _make(codes: Tensor, offsets: Tensor, counts: Tensor, levels: Tensor, codebook: Codebook, columns: int) -> Packets:
    """Lay out matrices side by side: counts (E, R) of codewords, levels (E, R, L); offsets as `repack` takes them."""
    experts, rows = counts.shape
    firsts, starts, words = start_packets(counts, codewords_each(codebook.bits))
    repack(codes, offsets, firsts, starts, words, codebook)
    launch.finish(codes.device)  # they are kept, and may be used on another stream
    width = levels.shape[-1]
    levels = levels.reshape(-1, width).contiguous()
    sizes = experts, rows, columns, width, len(words) / counts.numel()
    return Packets(words, starts, levels, codebook, *sizes, strides=(0, rows, rows * width))


def repack(codes: Tensor, offsets: Tensor, firsts: Tensor, starts: Tensor, words: Tensor, codebook: Codebook) -> None:
    """Lay the codes of matrices out in packets, without waiting for the GPU.

    Parameters
    ----------
    codes : uint8 tensor, shape (bytes,)
        Validated streams; each is followed by 8 bytes that may be read.
    offsets : int64 tensor
        Byte of `codes` at which each matrix begins, E of them at least.
    firsts : int32 tensor, shape (E, R + 1)
        Number of each row's first codeword in its matrix, at least one a row; then their total.
    starts : int32 tensor, shape (E * R + 1,)
        Number of each row's first packet.
    words : uint32 tensor, shape (packets, 4)
        Is filled.
    codebook : Codebook
        Of all of them.
    """
    experts, rows = len(firsts), firsts.shape[1] - 1
    arrays = codes, offsets, firsts, starts, device_lengths(codebook, codes.device), words
    sizes = codebook.bits, filler(codebook), rows, experts * rows
    _repack_kernel.launch(-(-experts * rows // THREADS), THREADS, *arrays, *sizes)


def decode_packets(packets: Packets, expert: int, first: int, out: Tensor) -> None:
    """Write the nonzeros of an expert's rows `first` and following into `out` (rows, C), zeros before.

    The dtype of `out` is that of the levels, or float32.
    """
    codebook, rows = packets.codebook, len(out)
    at_word, at_start, at_level = (expert * stride for stride in packets.strides)
    lanes = min(WARP, 1 << (math.ceil(packets.packets_each) - 1).bit_length())
    blocks = min(-(-rows * lanes // THREADS), BLOCKS * launch.multiprocessors(out.device))
    _unpack_kernel.launch(
        blocks,
        THREADS,
        packets.words[at_word:],
        packets.starts[at_start + first :],
        bits16(packets.levels.view(-1)[at_level + first * packets.levels_each :]),
        device_table(codebook, out.device),
        bits16(out),
        codebook.bits,
        codewords_each(codebook.bits),
        codebook.digits,
        codebook.max_nonzeros,
        packets.levels_each,
        rows,
        out.shape[1],
        lanes,
    )


def bits16(tensor: Tensor) -> Tensor:
    """Return bfloat16 as bit patterns, which kernels take."""
    return tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor


def filler(codebook: Codebook) -> int:
    """Return the shortest codeword, which fills up a row's last packet."""
    lengths = codebook.table & np.uint64(255)
    return int(np.where(lengths > 0, lengths, 256).argmin())


@functools.cache  # as `variants.device_words`
def device_lengths(codebook: Codebook, device: torch.device) -> Tensor:
    """Return the weights of each codeword on a GPU, uint8; kept there for the next call."""
    return torch.from_numpy((codebook.table & np.uint64(255)).astype(np.uint8)).to(device)


@kernel("uint8*, int64*, int32*, int32*, uint8*, uint32*, int32, int32, int32, int32")
def _repack_kernel(
    codes: Any,
    offsets: Any,
    firsts: Any,
    starts: Any,
    lengths: Any,
    words: Any,
    bits: int,
    filling: int,
    rows: int,
    all_rows: int,
) -> None:
    """Write the packets of each row: a thread a row, since a packet's column is known when those before are decoded."""
    row = np.int32(cuda.grid(1))
    if row < all_rows:
        expert = np.int32(row // rows)
        at = np.int32(row + expert)
        mask = np.int32((1 << bits) - 1)
        bit = offsets[expert] * 8 + np.int64(firsts[at]) * bits
        left = np.int32(firsts[at + 1] - firsts[at])
        column = np.uint32(0)
        for packet in range(starts[row], starts[row + 1]):
            word, held, number = np.uint32(column), np.int32(16), np.int32(0)
            begun = np.int32(16)  # bits of the packet that are filled
            while begun + bits <= 128:
                code = np.int32(filling)
                if left > 0:
                    code = load_code(codes, bit, mask)
                    bit += bits
                    left = np.int32(left - 1)
                column = np.uint32(column + np.uint32(lengths[code]))
                word = np.uint32(word | (np.uint32(code) << np.uint32(held)))
                held = np.int32(held + bits)
                begun = np.int32(begun + bits)
                if held >= 32:
                    words[np.int64(packet) * 4 + number] = word
                    number = np.int32(number + 1)
                    held = np.int32(held - 32)
                    word = np.uint32(np.uint32(code) >> np.uint32(bits - held))
            if number < 4:
                words[np.int64(packet) * 4 + number] = word


def _tile_signatures() -> list[str]:
    """Parameter types of the kernel that decodes packets, by the dtypes of the levels and of the tile."""
    pairs = dict.fromkeys(pair for kind in KINDS.values() for pair in ((kind, kind), (kind, "float32*")))
    return [f"uint32*, int32*, {level}, uint64*, {out}" + ", int32" * 8 for level, out in pairs]


@kernel(*_tile_signatures())
def _unpack_kernel(
    words: Any,
    starts: Any,
    scales: Any,
    table: Any,
    out: Any,
    bits: int,
    each: int,
    digits: int,
    fields: int,
    levels: int,
    rows: int,
    columns: int,
    lanes: int,
) -> None:
    """Write a row's levels to out (R, C) at its nonzeros: some lanes a row, a lane a packet, which says its column."""
    thread = np.int32(cuda.grid(1))
    mask, own = np.uint64((1 << bits) - 1), np.uint64(bits)
    row, member = np.int32(thread // lanes), np.int32(thread % lanes)
    while row < rows:
        index, stop = np.int32(starts[row] + member), starts[row + 1]
        while index < stop:
            quad = load_quad(words, index)
            low = np.uint64(quad[0]) | np.uint64(quad[1]) << np.uint64(32)
            high = np.uint64(quad[2]) | np.uint64(quad[3]) << np.uint64(32)
            column = np.int32(quad[0] & np.uint32(0xFFFF))
            low, high = low >> np.uint64(16) | high << np.uint64(48), high >> np.uint64(16)
            for _ in range(each):
                entry = table[np.int32(low & mask)]
                low, high = low >> own | high << (np.uint64(64) - own), high >> own
                for i in range(fields):
                    field = entry_field(entry, i)
                    position = field_position(field, digits)
                    slot = np.int32(field_slot(field, position, digits))
                    place = np.int32(column + position)
                    if slot < digits - 1 and place < columns:  # an absent field is a zero slot
                        number = slot if digits == 4 else (levels - 1) * (1 - slot)
                        value = load_float(scales, np.int64(row) * levels + number)
                        if levels == 1 and slot == 1:
                            value = -value
                        store_float(out, np.int64(row) * columns + place, value)
                column = np.int32(column + entry_length(entry))
            index = np.int32(index + lanes)
        row = np.int32(row + cuda.gridsize(1) // lanes)
