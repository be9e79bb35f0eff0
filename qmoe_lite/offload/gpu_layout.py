"""Where an expert's matrices lie in a slot on a GPU, and in the buffer that they come through."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from qmoe_lite.coding.codes import Code
from qmoe_lite.coding.dictionary import Dictionary
from qmoe_lite.coding.exceptions import block_rows
from qmoe_lite.coding.packed import PackedMatrix
from qmoe_lite.coding.parts import EXCEPTION_PARTS
from qmoe_lite.coding.windows_product import WindowStack
from qmoe_lite.offload.ram_tier import Layer

if TYPE_CHECKING:
    from qmoe_lite.cuda.experts import Matrices

ALIGNMENT = 256  # bytes; of each tensor in a slot
CODES_ALIGNMENT = 16  # bytes; of each tensor in the buffers


class Coming(NamedTuple):
    """Where in a buffer a projection's first codewords lie, and the packets that its codes become."""

    firsts: int
    packets: int


class Layout:
    """Where a layer's experts have what in a slot, and bytes of the buffers that they come through.

    First the packets of all projections; then, in one piece that is copied as it is, row starts and levels, of codes of
    windows column scales and exceptions too.
    """

    def __init__(self, layer: Layer) -> None:
        from qmoe_lite.cuda.packets import PACKET_BITS, most_packets

        self.layer = layer
        self.words: dict[str, int] = {}
        self.packets: dict[str, int] = {}  # most of an expert
        self.starts: dict[str, int] = {}
        self.levels: dict[str, int] = {}
        self.scales: dict[str, int] = {}  # of codes of windows, as the following
        self.exception_starts: dict[str, int] = {}
        self.exceptions: dict[str, int] = {}
        self.most_exceptions: dict[str, int] = {}  # of an expert
        self._end = codes = 0
        for name in layer.projections:
            rows, size, book = layer.experts.layer.shapes[name][0], layer.part_sizes(name)[0], self._book(name)
            self.packets[name] = most_packets(book.bits, codewords_each(book), size, rows)
            self.words[name] = self._take(PACKET_BITS // 8 * self.packets[name])
            codes += aligned(size, CODES_ALIGNMENT) + aligned(4 * (rows + 1), CODES_ALIGNMENT)
        self.tail = self._end
        for name in layer.projections:
            rows, columns = layer.experts.layer.shapes[name]
            self.starts[name] = self._take(4 * (rows + 1))
            if not isinstance(self._book(name), Dictionary):
                self.levels[name] = self._take(layer.part_sizes(name)[2])
                continue
            self.levels[name] = self._take(4 * rows)
            first = layer.experts.layer.first_of_stage(name)
            self.scales[name] = self._take(4 * columns) if layer.has_scales(name) else self.scales[first]
            self.exception_starts[name] = self._take(4 * (rows + 1))
            self.most_exceptions[name] = layer.most_exceptions(name)
            self.exceptions[name] = self._take(4 * max(self.most_exceptions[name], 1))
        self.size = self._end
        # before the codes of an expert lie the offsets of each projection's
        self.stage = aligned(8 * len(layer.projections), CODES_ALIGNMENT) + codes

    def _book(self, projection: str) -> Code:
        return self.layer.experts.codebooks[projection]

    def _take(self, size: int) -> int:
        """Return where so many bytes begin, which follow what was taken before."""
        start = self._end
        self._end = aligned(start + size, ALIGNMENT)
        return start

    def write(self, expert: int, memory: NDArray[np.uint8], tail: int) -> tuple[int, dict[str, Coming]]:
        """Fill a buffer with an expert, which is in our memory.

        Parameters
        ----------
        expert : int
            Of the layer.
        memory : uint8 array
            The buffer: offsets of the projections' codes, then each one's codes and first codewords.
        tail : int
            Where in the buffer the piece begins that is copied as it is.

        Returns
        -------
        int
            Bytes before the tail that were written.
        dict, projection to Coming
            What the codes become.
        """
        offsets = memory[: 8 * len(self.layer.projections)].view(np.int64)
        at = aligned(offsets.nbytes, CODES_ALIGNMENT)
        shift, coming = tail - self.tail, {}  # from an offset in the slot to that in the buffer
        for i, name in enumerate(self.layer.projections):
            packed = self.layer.packed(expert, name)
            rows = packed.shape[0]
            firsts_at = at + aligned(len(packed.codes), CODES_ALIGNMENT)
            memory[at : at + len(packed.codes)] = packed.codes.numpy()
            offsets[i] = at
            firsts = memory[firsts_at : firsts_at + 4 * (rows + 1)].view(np.int32)
            starts = memory[self.starts[name] + shift :][: firsts.nbytes].view(np.int32)
            each = codewords_each(self._book(name))
            start_rows(packed.row_codewords.numpy(), packed.fewest_codewords, each, firsts, starts)
            coming[name] = Coming(firsts_at, int(starts[-1]))
            assert coming[name].packets <= self.packets[name]
            if name in self.exceptions:
                self._write_window_parts(name, packed, memory, shift)
            else:
                levels = packed.levels.contiguous().view(-1).view(torch.uint8).numpy()
                memory[self.levels[name] + shift :][: len(levels)] = levels
            at = aligned(firsts_at + firsts.nbytes, CODES_ALIGNMENT)
        return at, coming

    def _write_window_parts(self, name: str, packed: PackedMatrix, memory: NDArray[np.uint8], shift: int) -> None:
        rows, columns = packed.shape
        steps = memory[self.levels[name] + shift :][: 4 * rows].view(np.float32)
        steps[:] = packed.levels[:, 0].float().numpy()
        if self.layer.has_scales(name):
            assert packed.column_scales is not None
            scales = memory[self.scales[name] + shift :][: 4 * columns].view(np.float32)
            scales[:] = packed.column_scales.float().numpy()
        listed = [packed.tensors[part].numpy() for part in EXCEPTION_PARTS]
        assert len(listed[-1]) <= self.most_exceptions[name]
        firsts = memory[self.exception_starts[name] + shift :][: 4 * (rows + 1)].view(np.int32)
        words = memory[self.exceptions[name] + shift :][: 4 * len(listed[-1])].view(np.int32)
        list_exceptions(*listed, block_rows(columns), columns, firsts, words)

    def view(self, projection: str, memory: Tensor, slots: int, slot_bytes: int) -> Matrices:
        """Return a projection as the kernels read it from slots: an expert at the number of its slot."""
        from qmoe_lite.cuda.packets import Packets, packets_of
        from qmoe_lite.cuda.window_packets import WindowPackets

        stack, book = self.layer.stack(projection), self._book(projection)
        counts = stack.row_codewords.astype(np.int64) + stack.fewest[:, None]
        # of all experts, not of those that are there: what is computed does not depend on them
        packets_each = int(packets_of(counts, codewords_each(book)).sum()) / counts.size
        words = memory[self.words[projection] :].view(torch.uint32).view(-1, 4)
        starts = memory[self.starts[projection] :].view(torch.int32)
        sizes = slots, counts.shape[1], stack.columns
        if isinstance(stack, WindowStack):
            return WindowPackets(
                words,
                starts,
                memory[self.levels[projection] :].view(torch.float32),
                memory[self.scales[projection] :].view(torch.float32),
                memory[self.exception_starts[projection] :].view(torch.int32),
                memory[self.exceptions[projection] :].view(torch.int32),
                stack.dictionary,
                *sizes,
                packets_each,
                strides=(slot_bytes // 16, slot_bytes // 4, slot_bytes // 4, slot_bytes // 4),
            )
        levels = memory[self.levels[projection] :].view(stack.levels.dtype)
        return Packets(
            words,
            starts,
            levels,
            stack.codebook,
            *sizes,
            levels_each=stack.levels.shape[2],
            packets_each=packets_each,
            strides=(slot_bytes // 16, slot_bytes // 4, slot_bytes // levels.element_size()),
        )


def codewords_each(book: Code) -> int:
    """Return how many codewords a packet holds."""
    from qmoe_lite.cuda import packets, window_packets

    return (window_packets if isinstance(book, Dictionary) else packets).codewords_each(book.bits)


def aligned(size: int, unit: int) -> int:
    """Return the least multiple of a unit that is no less than a size."""
    return -(-size // unit) * unit


@njit(cache=True)
def start_rows(
    above: NDArray[Any], fewest: int, each: int, firsts: NDArray[np.int32], starts: NDArray[np.int32]
) -> None:
    """Fill in each row's first codeword and first packet, then their totals, given the codewords above the fewest."""
    firsts[0] = starts[0] = 0
    for row in range(len(above)):
        codewords = np.int64(above[row]) + fewest
        firsts[row + 1] = firsts[row] + codewords
        starts[row + 1] = starts[row] + (codewords - 1) // each + 1


@njit(cache=True)
def list_exceptions(
    starts: NDArray[np.int32],
    positions: NDArray[np.uint16],
    values: NDArray[np.int8],
    per: int,
    columns: int,
    firsts: NDArray[np.int32],
    words: NDArray[np.int32],
) -> None:
    """Fill in each row's first exception, then their total, and the exceptions as `WindowPackets` has them.

    They are given by blocks of `per` rows.
    """
    row = 0
    for block in range(len(starts) - 1):
        for i in range(starts[block], starts[block + 1]):
            position = np.int64(positions[i])
            while row <= block * per + position // columns:
                firsts[row] = i
                row += 1
            words[i] = position % columns | np.int64(values[i]) << 16
    firsts[row:] = len(words)
