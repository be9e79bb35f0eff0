"""Codes to digits or weights: a table look-up a codeword, a store a nonzero. Plain arrays in, nothing is checked."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit, prange
from numpy.typing import NDArray

from qmoe_lite.coding.alphabet import Alphabet
from qmoe_lite.coding.codebook import Codebook
from qmoe_lite.coding.entry import entry_field, entry_length, field_position, field_slot
from qmoe_lite.coding.stream import load_word

_PATTERNS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes: a store copies a bit pattern


def slot_values(levels: torch.Tensor, alphabet: Alphabet, dtype: torch.dtype) -> torch.Tensor:
    """Return the weight of each slot: levels (..., L) to a tensor of `dtype` (..., digits); the last is the zero's."""
    levels = levels.to(dtype)
    # by slices: an index would be a copy from the host, which no CUDA graph may hold
    own = [levels, -levels] if levels.shape[-1] == 1 else [levels[..., i, None] for i in alphabet.level_of_slot]
    return torch.cat([*own, levels.new_zeros(*levels.shape[:-1], 1)], -1)


def decode_rows(
    codes: NDArray[np.uint8],
    codebook: Codebook,
    values: torch.Tensor,
    starts: NDArray[np.int64],
    first: int,
    out: torch.Tensor,
) -> None:
    """Write rows `first` and following of a matrix into `out`, `values[row, slot]` for each digit.

    Parameters
    ----------
    codes : uint8 array, shape (bytes,)
        Of a validated matrix.
    codebook : Codebook
        Whose table the codes refer to.
    values : tensor, shape (R, digits), contiguous
        The zero slot's value must be 0.
    starts : int64 array, shape (R + 1,)
        From `row_starts`.
    first : int
        Number of the first row.
    out : tensor of the same dtype, shape (any number of rows, C), contiguous
        Is modified.
    """
    pattern = _PATTERNS[out.element_size()]
    _decode_kernel(
        codes,
        starts[first : first + len(out) + 1],
        codebook.table,
        codebook.bits,
        codebook.digits,
        codebook.fields,
        values[first : first + len(out)].view(pattern).numpy(),
        out.view(pattern).numpy(),
    )


@njit(parallel=True, cache=True, fastmath=False)
def _decode_kernel(
    codes: NDArray[np.uint8],
    starts: NDArray[np.int64],
    table: NDArray[np.uint64],
    bits: int,
    digits: int,
    fields: tuple[int, ...],
    values: NDArray[Any],
    out: NDArray[Any],
) -> None:
    """Write out (R, C): zeros, then values[row, slot] at each nonzero; len(fields) fields an entry."""
    mask = np.uint64((1 << bits) - 1)
    n_bits = np.uint64(bits)
    columns = np.uint64(out.shape[1])
    for row in prange(out.shape[0]):
        out[row, :] = 0
        row_index = np.uint64(row)
        bit = np.uint64(starts[row]) * n_bits
        last = np.uint64(starts[row + 1]) * n_bits - n_bits
        base = np.uint64(0)
        while bit < last:
            entry = table[load_word(codes, bit) & mask]
            for i in range(len(fields) - 1, -1, -1):  # backwards: an absent field's zero never overwrites
                field = entry_field(entry, i)
                position = field_position(field, digits)
                out[row_index, base + np.uint64(position)] = values[row_index, field_slot(field, position, digits)]
            base += np.uint64(entry_length(entry))
            bit += n_bits
        entry = table[load_word(codes, last) & mask]
        for i in range(len(fields) - 1, -1, -1):
            field = entry_field(entry, i)
            position = field_position(field, digits)
            if base + np.uint64(position) < columns:
                out[row_index, base + np.uint64(position)] = values[row_index, field_slot(field, position, digits)]
