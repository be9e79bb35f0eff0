"""How a GPU holds codes of windows: in packets of 128 bits that a lane loads at once and decodes alone.

A packet's lowest 16 bits are the column where its first codeword begins, the next two the top of the codeword before
it; above them lie `codewords_each(bits)` codewords, the first one lowest, so that a window is `bits` + 2 bits of one
packet. A row begins with a packet of its own; zeros fill up its last one, and what they stand for lies behind the row's
end. So a lane needs nothing of another lane's packet. Exceptions are listed by row.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from qmoe_lite.coding.dictionary import Dictionary
from qmoe_lite.coding.exceptions import block_rows
from qmoe_lite.coding.packed import PackedMatrix
from qmoe_lite.coding.parts import EXCEPTION_PARTS
from qmoe_lite.cuda import launch
from qmoe_lite.cuda.codec import BLOCKS, WARPS, check_validated, load_code, warp_scan
from qmoe_lite.cuda.launch import WARP, cuda, kernel
from qmoe_lite.cuda.packets import COLUMN_BITS, PACKET_BITS, Prepared, codewords_of, start_packets

CLASS_BITS = 2  # of a window, the top of the codeword before
_ALL = 0xFFFFFFFF


@dataclass(frozen=True, eq=False)
class WindowPackets:
    """Matrices of one shape and dictionary on a GPU: all experts of a layer's projection, or one matrix.

    They lie side by side, or each in a slot of its own: what is expert e's begins at e times a stride.

    Attributes
    ----------
    words : uint32 tensor, shape (packets, 4)
        Lowest bits first.
    starts : int32 tensor, flat
        Number of each row's first packet, counted from where its expert's packets begin; then the last row's end.
    steps : float32 tensor, flat
        Of each row.
    scales : float32 tensor, flat
        Of each column; ones where a matrix has none.
    exception_starts : int32 tensor, flat
        Number of each row's first exception, counted from where its expert's begin; then the last row's end.
    exceptions : int32 tensor, flat
        The column in the lowest 16 bits, above it what is added to its digit; columns ascend in a row, and several of
        the same add up.
    dictionary : Dictionary
    experts, rows, columns : int
        E, R and C; or the slots.
    packets_each : float
        Packets of a row, on average over all experts.
    strides : tuple of int
        From one expert to the next: packets of `words`, elements of the tensors that have one for each row, of `scales`
        and of `exceptions`. With a stride of 0 packets or exceptions are counted from the first expert's on.
    launches : dict
        What launches need of these matrices, by what they are for.
    """

    words: Tensor
    starts: Tensor
    steps: Tensor
    scales: Tensor
    exception_starts: Tensor
    exceptions: Tensor
    dictionary: Dictionary
    experts: int
    rows: int
    columns: int
    packets_each: float
    strides: tuple[int, int, int, int]
    launches: dict[Any, Prepared] = field(default_factory=dict, init=False, repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes on the GPU."""
        tensors = self.words, self.starts, self.steps, self.scales, self.exception_starts, self.exceptions
        return sum(tensor.nbytes for tensor in tensors)

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.words.device


def codewords_each(bits: int) -> int:
    """Return how many codewords a packet holds."""
    return (PACKET_BITS - COLUMN_BITS - CLASS_BITS) // bits


def columns_behind(*dictionaries: Dictionary | None) -> int:
    """Return how many columns of zeros must lie behind x, so that no codeword of a last packet ends beyond them."""
    return max((codewords_each(each.bits) + 1) * each.width for each in dictionaries if each is not None)


def make_window_packets(
    codes: Tensor,
    offsets: Tensor,
    counts: Tensor,
    steps: Tensor,
    scales: Tensor | None,
    exceptions: tuple[Tensor, Tensor, Tensor],
    dictionary: Dictionary,
    columns: int,
) -> WindowPackets:
    """Lay out matrices side by side in packets; waits for the GPU, which must count them.

    Parameters
    ----------
    codes : uint8 tensor, shape (bytes,)
        Validated streams of windows; each is followed by 8 bytes that may be read.
    offsets : int64 tensor, shape (E,)
        Byte of `codes` at which each matrix begins.
    counts : integer tensor, shape (E, R)
        Codewords of each row, at least one.
    steps : float tensor, shape (E, R)
        Of the rows.
    scales : float tensor, shape (E, C), or None
        Of the columns.
    exceptions : int32 tensor (E, blocks + 1), uint16 tensor (N,), int8 tensor (N,)
        Where those of each block of rows begin, their positions and values, as in a `WindowStack`.
    dictionary : Dictionary
        Of all of them.
    columns : int
        C.

    Raises
    ------
    ShapeError
        More than 2**31 - 1 packets.
    """
    experts, rows = counts.shape
    firsts, starts, words = start_packets(counts.to(torch.int64), codewords_each(dictionary.bits))
    repack_windows(codes, offsets, firsts, starts, words, dictionary)
    if scales is None:
        scales = torch.ones((1, columns), device=codes.device)
    launch.finish(codes.device)  # they are kept, and may be used on another stream
    return WindowPackets(
        words,
        starts,
        steps.float().reshape(-1).contiguous(),
        scales.float().reshape(-1).contiguous(),
        *row_exceptions(*exceptions, rows, columns),
        dictionary,
        experts,
        rows,
        columns,
        len(words) / counts.numel(),
        strides=(0, rows, 0 if len(scales) == 1 else columns, 0),
    )


def stack_window_packets(
    held: dict[str, Tensor], dictionary: Dictionary, columns: int, first: WindowPackets | None = None
) -> WindowPackets:
    """Return a projection of a layer, all its experts, as packets; waits for the GPU.

    Parameters
    ----------
    held : dict of tensors on a GPU
        All that :func:`qmoe_lite.checkpoint.format.pack_experts` makes of a dictionary's matrices; validated.
    dictionary : Dictionary
        Of all experts.
    columns : int
        C.
    first : WindowPackets, optional
        Of the stage's first projection, whose column scales are this one's where it has none of its own.

    Raises
    ------
    ShapeError
        More than 2**31 - 1 packets.
    """
    scales = held["column_scales"]
    if first is not None and scales.shape[1] == 0:
        scales = first.scales.view(-1, columns)
    starts, positions, values = (held[name] for name in EXCEPTION_PARTS)
    return make_window_packets(
        held["codes"],
        held["expert_offsets"],
        codewords_of(held),
        held["levels"][:, :, 0],
        scales,
        (starts, positions, values),
        dictionary,
        columns,
    )


_PACKETS: WeakKeyDictionary[PackedMatrix, WindowPackets] = WeakKeyDictionary()


def matrix_packets(packed: PackedMatrix) -> WindowPackets:
    """Return a matrix on a GPU as packets: made when they are first needed, and kept with the matrix."""
    packets = _PACKETS.get(packed)
    if packets is None:
        check_validated(packed)
        assert isinstance(packed.codebook, Dictionary)
        starts, positions, values = (packed.tensors[name] for name in EXCEPTION_PARTS)
        packets = _PACKETS[packed] = make_window_packets(
            packed.codes,
            torch.zeros(1, dtype=torch.int64, device=packed.device),
            packed.count_codewords()[None],
            packed.levels[None, :, 0],
            None if packed.column_scales is None else packed.column_scales[None],
            (starts[None], positions, values),
            packed.codebook,
            packed.columns,
        )
    return packets


def repack_windows(
    codes: Tensor, offsets: Tensor, firsts: Tensor, starts: Tensor, words: Tensor, dictionary: Dictionary
) -> None:
    """Lay the codes of matrices out in packets, without waiting for the GPU.

    Parameters
    ----------
    codes, offsets, dictionary
        As for `make_window_packets`.
    firsts : int32 tensor, shape (E, R + 1)
        Number of each row's first codeword in its matrix, at least one a row; then their total.
    starts : int32 tensor, shape (E * R + 1,)
        Number of each row's first packet.
    words : uint32 tensor, shape (packets, 4)
        Is filled.
    """
    experts, rows = len(firsts), firsts.shape[1] - 1
    lengths = device_lengths(dictionary, codes.device)
    blocks = min(-(-experts * rows // WARPS), BLOCKS * launch.multiprocessors(codes.device))
    sizes = dictionary.bits, codewords_each(dictionary.bits), rows, experts * rows
    arrays = codes, offsets, firsts, starts, lengths, words.view(torch.uint64)
    _repack_windows_kernel.launch(blocks, WARPS * WARP, *arrays, *sizes)


def row_exceptions(starts: Tensor, positions: Tensor, values: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Return `exception_starts` and `exceptions` of `WindowPackets`; does not wait for the GPU.

    Parameters
    ----------
    starts : int32 tensor, shape (E, blocks + 1)
        Number of the first exception of each block of rows, then the end of the matrix's.
    positions : uint16 tensor, shape (N,)
        In their blocks.
    values : int8 tensor, shape (N,)
        What each adds.
    rows, columns : int
        Of a matrix.

    Returns
    -------
    starts : int32 tensor, shape (E * R + 1,)
    exceptions : int32 tensor, shape (N,); one zero where there are none
    """
    experts, blocks = len(starts), starts.shape[1] - 1
    place = positions.view(torch.int16).to(torch.int32) & 0xFFFF  # torch knows little of uint16 on a GPU
    numbers = torch.arange(len(place), dtype=torch.int32, device=place.device)
    block = torch.searchsorted(starts[:, 1:].reshape(-1).contiguous(), numbers, right=True)
    expert = block // blocks
    row = expert * rows + (block - expert * blocks) * block_rows(columns) + place // columns
    first = torch.searchsorted(row, torch.arange(experts * rows + 1, device=place.device))
    words = place % columns | values.to(torch.int32) << COLUMN_BITS
    return first.to(torch.int32), words if len(words) else torch.zeros(1, dtype=torch.int32, device=place.device)


@functools.cache  # of no bounded size: a graph keeps a table's address, and a model has hundreds of dictionaries
def device_lengths(dictionary: Dictionary, device: torch.device) -> Tensor:
    """Return the digits of a dictionary's windows on a GPU, uint8; kept there for the next call."""
    return torch.from_numpy(dictionary.lengths.copy()).to(device)


@kernel("uint8*, int64*, int32*, int32*, uint8*, uint64*, int32, int32, int32, int32")
def _repack_windows_kernel(
    codes: Any,
    offsets: Any,
    firsts: Any,
    starts: Any,
    lengths: Any,
    words: Any,
    bits: int,
    each: int,
    rows: int,
    all_rows: int,
) -> None:
    """Write the packets of each row: a warp a row, a lane a packet, whose column is the digits of those before."""
    lane = np.int32(cuda.threadIdx.x & 31)
    mask = np.int32((4 << bits) - 1)
    row = np.int32(cuda.grid(1) >> 5)
    while row < all_rows:
        expert = np.int32(row // rows)
        at = np.int32(row + expert)
        begin = np.int64(offsets[expert]) * 8 + np.int64(firsts[at]) * bits
        count = np.int32(firsts[at + 1] - firsts[at])
        first = starts[row]
        packets = np.int32(starts[row + 1] - first)
        base = np.int32(0)
        for chunk in range(0, packets, WARP):
            packet = np.int32(chunk + lane)
            low, high, digits = np.uint64(0), np.uint64(0), np.int32(0)
            if packet < packets:
                number = np.int32(packet * each)
                held = np.int32(18)  # bits of the packet that are filled
                for i in range(each):
                    if number + i < count:
                        window = load_code(codes, begin + np.int64(number + i) * bits, mask)
                        if i == 0:
                            low = np.uint64(np.uint64(window & 3) << np.uint64(16))
                        code = np.uint64(window >> 2)
                        digits = np.int32(digits + np.int32(lengths[window]))
                        if held < 64:
                            low = np.uint64(low | code << np.uint64(held))
                            if held + bits > 64:
                                high = np.uint64(high | code >> np.uint64(64 - held))
                        else:
                            high = np.uint64(high | code << np.uint64(held - 64))
                        held = np.int32(held + bits)
            end = warp_scan(digits, lane)
            if packet < packets:
                words[2 * (np.int64(first) + packet)] = np.uint64(low | np.uint64(np.int32(base + end - digits)))
                words[2 * (np.int64(first) + packet) + 1] = high
            base = np.int32(base + cuda.shfl_sync(_ALL, end, 31))
        row = np.int32(row + (cuda.gridsize(1) >> 5))
