"""Where an expert's matrices lie in a slot on a GPU, and in the buffer that they come through."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from qmoe_lite.coding.codebook import Codebook
from qmoe_lite.errors import SettingError
from qmoe_lite.offload.ram_tier import Layer

ALIGNMENT = 256  # bytes; of each tensor in a slot
CODES_ALIGNMENT = 16  # bytes; of each tensor in the buffers


class Layout:
    """Where a layer's experts have what in a slot, and bytes of the buffers that they come through.

    First the packets of all projections; then, in one piece that is copied as it is, row starts and levels.
    """

    def __init__(self, layer: Layer) -> None:
        from qmoe_lite.cuda.packets import PACKET_BITS, most_packets

        self.words: dict[str, int] = {}
        self.packets: dict[str, int] = {}  # most of an expert
        self.starts: dict[str, int] = {}
        self.levels: dict[str, int] = {}
        at = codes = 0
        for name in layer.projections:
            rows = layer.experts.layer.shapes[name][0]
            size = layer.part_sizes(name)[0]
            book = layer.experts.codebooks[name]
            if not isinstance(book, Codebook):
                raise SettingError(
                    "experts compressed at a rate cannot be cached on a GPU yet. Leave --devices out, or move the "
                    "whole model to the GPU with --device."
                )
            self.words[name], self.packets[name] = at, most_packets(book, size, rows)
            at = aligned(at + PACKET_BITS // 8 * self.packets[name], ALIGNMENT)
            codes += aligned(size, CODES_ALIGNMENT) + aligned(4 * (rows + 1), CODES_ALIGNMENT)
        self.tail = at
        for name in layer.projections:
            self.starts[name] = at
            self.levels[name] = aligned(at + 4 * (layer.experts.layer.shapes[name][0] + 1), ALIGNMENT)
            at = aligned(self.levels[name] + layer.part_sizes(name)[2], ALIGNMENT)
        self.size = at
        # before the codes of an expert lie the offsets of each projection's
        self.stage = aligned(8 * len(layer.projections), CODES_ALIGNMENT) + codes


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
