"""The stream of codewords: bits from the least significant one up, rows one after another without a gap."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray

from qmoe_lite.coding.vectors import load_64_bits

PADDING_BYTES = 8  # zeros behind the stream, so that `load_word` stays inside it


def row_starts(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the number of each row's first codeword, then their total: int64, shape (R + 1,).

    `counts` is `PackedMatrix.count_codewords()` or `Codebook.count_codewords(digits)`.
    """
    starts = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=starts[1:])
    return starts


def shorten_counts(counts: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return what is stored of the rows' codeword counts: how many above the least, uint8 or uint16; the least."""
    fewest, most = (int(count) for count in counts.aminmax())
    above = counts - fewest
    if most - fewest < 256:
        return above.to(torch.uint8), fewest
    return above.to(torch.int16).view(torch.uint16), fewest


def stream_bytes(codewords: int, bits: int) -> int:
    """Return the bytes of a stream with its padding."""
    return (codewords * bits + 7) // 8 + PADDING_BYTES


@njit(inline="always")
def load_word(codes: NDArray[np.uint8], bit: np.uint64) -> np.uint64:
    """Return the stream from `bit` on: at least 57 bits of it, 64 where `bit` starts a byte."""
    return load_64_bits(codes, bit >> np.uint64(3)) >> (bit & np.uint64(7))
