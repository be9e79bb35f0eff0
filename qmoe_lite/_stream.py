"""The stream of codewords: bits from the least significant one up, rows one after another without a gap."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from qmoe_lite._vectors import load_64_bits

PADDING_BYTES = 8  # zeros behind the stream, so that `load_word` stays inside it


def row_starts(row_codewords: NDArray[Any]) -> NDArray[np.int64]:
    """Return the number of each row's first codeword, then their total: int64, shape (R + 1,)."""
    starts = np.zeros(len(row_codewords) + 1, dtype=np.int64)
    np.cumsum(row_codewords, out=starts[1:])
    return starts


def stream_bytes(codewords: int, bits: int) -> int:
    """Return the bytes of a stream with its padding."""
    return (codewords * bits + 7) // 8 + PADDING_BYTES


@njit(inline="always")
def load_word(codes: NDArray[np.uint8], bit: np.uint64) -> np.uint64:
    """Return the stream from `bit` on: at least 57 bits of it, 64 where `bit` starts a byte."""
    return load_64_bits(codes, bit >> np.uint64(3)) >> (bit & np.uint64(7))
