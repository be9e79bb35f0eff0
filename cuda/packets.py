"""How a GPU holds the codes of matrices: in packets of 128 bits that a lane loads at once and decodes alone.

A packet's lowest 16 bits are the column where its first codeword begins; above them lie `codewords_each(bits)`
codewords, the first one lowest. A row begins with a packet of its own, and its last one is filled up with the
codebook's shortest codeword, which stands behind the row's end and adds nothing. So no lane needs to know what another
one decodes, as it must where codewords follow each other without a gap, and no load is ever split.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qmoe_lite.codebook import Codebook
from qmoe_lite.cuda import launch
from qmoe_lite.cuda.codec import THREADS, load_code
from qmoe_lite.cuda.launch import cuda, kernel
from qmoe_lite.errors import ShapeError
from qmoe_lite.packed import PackedMatrix

PACKET_BITS = 128
COLUMN_BITS = 16  # of the column where a packet begins; a matrix has at most 65535
_MOST_PACKETS = (1 << 31) - 1  # numbered in 32 bits


@dataclass(frozen=True, eq=False)
class Packets:
    """Matrices of one shape and codebook, side by side on a GPU: all experts of a layer's projection, or one matrix.

    Attributes
    ----------
    words : uint32 tensor, shape (packets, 4)
        Lowest bits first.
    starts : int32 tensor, shape (E * R + 1,)
        Number of each row's first packet, expert after expert.
    levels : float32, float16 or bfloat16 tensor, shape (E * R, L)
    codebook : Codebook
    rows, columns : int
        R and C.
    """

    words: Tensor
    starts: Tensor
    levels: Tensor
    codebook: Codebook
    rows: int
    columns: int

    @property
    def experts(self) -> int:
        """E."""
        return len(self.levels) // self.rows

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


def most_bytes(codebook: Codebook, codes: int, rows: int) -> int:
    """Return the bytes that a matrix's packets and their starts take at most, given those of its codes."""
    packets = 8 * codes // codebook.bits // codewords_each(codebook.bits) + rows
    return PACKET_BITS // 8 * packets + 4 * (rows + 1)


def make_packets(packed: PackedMatrix) -> Packets:
    """Return a validated matrix on a GPU as packets; waits for the GPU, which must count them."""
    counts = packed.count_codewords()
    first_bits = (torch.cumsum(counts, 0) - counts) * packed.codebook.bits
    return repack(packed.codes, first_bits, counts, packed.levels, packed.codebook, packed.columns)


def repack(
    codes: Tensor, first_bits: Tensor, counts: Tensor, levels: Tensor, codebook: Codebook, columns: int
) -> Packets:
    """Lay the codes of matrices out in packets.

    Parameters
    ----------
    codes : uint8 tensor, shape (bytes,)
        Validated streams; each is followed by 8 bytes that may be read.
    first_bits : int64 tensor, shape (N,)
        Bit of `codes` at which each row begins.
    counts : int64 tensor, shape (N,)
        Codewords of each row, at least one.
    levels : tensor, shape (R, L) of one matrix, or (E, R, L)
        N = E * R.
    codebook : Codebook
        Of all of them.
    columns : int
        C.

    Returns
    -------
    Packets

    Raises
    ------
    ShapeError
        More than 2**31 - 1 packets.
    """
    rows = levels.shape[-2]
    starts = torch.zeros(len(counts) + 1, dtype=torch.int64, device=codes.device)
    torch.cumsum((counts - 1) // codewords_each(codebook.bits) + 1, 0, out=starts[1:])
    total = int(starts[-1])
    if total > _MOST_PACKETS:
        raise ShapeError(f"the matrices take {total} packets; expected at most {_MOST_PACKETS}. Split the experts.")
    starts = starts.to(torch.int32)
    words = torch.empty((total, 4), dtype=torch.uint32, device=codes.device)
    arrays = codes, first_bits, counts, starts, device_lengths(codebook, codes.device), words
    sizes = codebook.bits, filler(codebook), len(counts)
    _repack_kernel.launch(-(-len(counts) // THREADS), THREADS, *arrays, *sizes)
    launch.finish(codes.device)  # they are kept, and may be used on another stream
    return Packets(words, starts, levels.reshape(len(counts), -1).contiguous(), codebook, rows, columns)


def stack_packets(held: dict[str, Tensor], codebook: Codebook, columns: int) -> Packets:
    """Return a projection of a layer, all its experts, as packets.

    Parameters
    ----------
    held : dict of tensors on a GPU
        "codes", "expert_offsets", "row_codewords", "fewest_codewords" and "levels" as
        :func:`qmoe_lite.experts.pack_experts` makes them; validated.
    codebook : Codebook
        Of all experts.
    columns : int
        C.
    """
    above = held["row_codewords"]
    if above.dtype == torch.uint16:  # torch knows little of it on a GPU
        above = above.view(torch.int16).to(torch.int64) & 0xFFFF
    counts = above.to(torch.int64) + held["fewest_codewords"].to(torch.int64)[:, None]
    first_bits = 8 * held["expert_offsets"][:-1, None] + (counts.cumsum(1) - counts) * codebook.bits
    return repack(held["codes"], first_bits.reshape(-1), counts.reshape(-1), held["levels"], codebook, columns)


def filler(codebook: Codebook) -> int:
    """Return the shortest codeword, which fills up a row's last packet."""
    lengths = codebook.table & np.uint64(255)
    return int(np.where(lengths > 0, lengths, 256).argmin())


@functools.cache  # as `matmul.device_words`
def device_lengths(codebook: Codebook, device: torch.device) -> Tensor:
    """Return the weights of each codeword on a GPU, uint8; kept there for the next call."""
    return torch.from_numpy((codebook.table & np.uint64(255)).astype(np.uint8)).to(device)


@kernel("uint8*, int64*, int64*, int32*, uint8*, uint32*, int32, int32, int32")
def _repack_kernel(
    codes: Any,
    first_bits: Any,
    counts: Any,
    starts: Any,
    lengths: Any,
    words: Any,
    bits: int,
    filling: int,
    rows: int,
) -> None:
    """Write the packets of each row: a thread a row, since a packet's column is known when those before are decoded."""
    row = cuda.grid(1)
    if row < rows:
        mask = np.int32((1 << bits) - 1)
        bit, left = first_bits[row], np.int32(counts[row])
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
