"""Digits kept small while a layer waits for its codebook: five ternary ones, or four two-bit ones, to a byte."""

from __future__ import annotations

import functools

import numpy as np

from qmoe_lite.coding.alphabet import ALPHABETS

_PER_BYTE = {3: 5, 4: 4}  # alphabet size to digits in a byte


def squeeze(digits: np.ndarray, alphabet: int) -> np.ndarray:
    """Put digits five (ternary) or four (two-bit) to a byte.

    Parameters
    ----------
    digits : int8 array, any shape
        -1, 0, +1 for three digits; 0 to 3 for four.
    alphabet : int
        3 or 4.

    Returns
    -------
    uint8 array, one-dimensional
    """
    per_byte = _PER_BYTE[alphabet]
    symbols = digits.reshape(-1).view(np.uint8) + np.uint8(ALPHABETS[alphabet].zero_symbol)
    padded = np.zeros(-(-len(symbols) // per_byte) * per_byte, dtype=np.uint8)
    padded[: len(symbols)] = symbols
    columns = padded.reshape(-1, per_byte)
    out = columns[:, per_byte - 1].copy()
    for column in range(per_byte - 2, -1, -1):
        out *= np.uint8(alphabet)
        out += columns[:, column]
    return out


def unsqueeze(packed: np.ndarray, shape: tuple[int, ...], alphabet: int) -> np.ndarray:
    """Return what `squeeze` packed, int8, of the given shape."""
    size = int(np.prod(shape))
    return _table(alphabet)[packed].reshape(-1)[:size].reshape(shape)


@functools.cache
def _table(alphabet: int) -> np.ndarray:
    per_byte = _PER_BYTE[alphabet]
    values = np.arange(256)[:, None] // alphabet ** np.arange(per_byte) % alphabet
    return (values - ALPHABETS[alphabet].zero_symbol).astype(np.int8)


def count(digits: np.ndarray, alphabet: int) -> np.ndarray:
    """Count each digit, ascending; int64 array, shape (alphabet,)."""
    symbols = digits.reshape(-1).view(np.uint8) + np.uint8(ALPHABETS[alphabet].zero_symbol)
    return np.bincount(symbols, minlength=alphabet).astype(np.int64)
