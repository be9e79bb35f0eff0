"""Codes to digits or weights: a table look-up a codeword, a store a nonzero. Plain arrays in, nothing is checked."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from numba import carray, njit, prange
from numpy.typing import NDArray

from qmoe_lite.coding.alphabet import Alphabet
from qmoe_lite.coding.calls import call, compiled
from qmoe_lite.coding.codebook import Codebook
from qmoe_lite.coding.entry import entry_field, entry_length, field_position, field_slot
from qmoe_lite.coding.jobs import load_codewords

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
    decoder = _row_decoder(len(codebook.fields), pattern.itemsize).address
    own = values[first : first + len(out)].view(pattern).numpy()
    written, starts = out.view(pattern).numpy(), starts[first : first + len(out) + 1]
    addresses = [array.ctypes.data for array in (codes, codebook.table, own, written)]
    sizes = codebook.bits, codebook.digits, out.shape[1], pattern.itemsize
    _decode_kernel(decoder, starts, *addresses, *sizes)


@cache
def _row_decoder(fields: int, element_bytes: int) -> Any:
    """Compile the decoding of a row to elements of so many bytes, for entries of so many fields."""

    def decode_row(
        codes: np.uint64,
        bit: np.uint64,
        last: np.uint64,
        bits: np.uint64,
        entries: Any,
        slots: Any,
        digits: np.uint64,
        columns: np.uint64,
        written: Any,
    ) -> np.uint64:
        """Write a row: zeros, then its slot's value at each nonzero."""
        table, values, out = carray(entries, (1 << bits,)), carray(slots, (digits,)), carray(written, (columns,))
        mask, n_digits = (np.uint64(1) << bits) - np.uint64(1), np.int64(digits)
        out[:] = 0
        base = np.uint64(0)
        while bit < last:
            entry = table[load_codewords(codes, bit) & mask]
            for i in range(fields - 1, -1, -1):  # backwards: an absent field's zero never overwrites
                field = entry_field(entry, i)
                position = field_position(field, n_digits)
                out[base + np.uint64(position)] = values[field_slot(field, position, n_digits)]
            base += np.uint64(entry_length(entry))
            bit += bits
        entry = table[load_codewords(codes, last) & mask]
        for i in range(fields - 1, -1, -1):
            field = entry_field(entry, i)
            position = field_position(field, n_digits)
            if base + np.uint64(position) < columns:
                out[base + np.uint64(position)] = values[field_slot(field, position, n_digits)]
        return np.uint64(0)

    element, sizes = f"CPointer(int{8 * element_bytes})", "uint64, uint64"
    return compiled(decode_row, f"uint64({sizes}, {sizes}, CPointer(uint64), {element}, {sizes}, {element})")


@njit(parallel=True, cache=True, fastmath=False)
def _decode_kernel(
    decoder: int,
    starts: NDArray[np.int64],
    codes: int,
    table: int,
    values: int,
    out: int,
    bits: int,
    digits: int,
    columns: int,
    element_bytes: int,
) -> None:
    """Write rows of `columns` elements at address `out` from codes, a table and rows of `digits` values."""
    for row in prange(len(starts) - 1):
        bit, last = np.uint64(starts[row] * bits), np.uint64((starts[row + 1] - 1) * bits)
        own = np.uint64(values + row * digits * element_bytes), np.uint64(digits), np.uint64(columns)
        place = np.uint64(out + row * columns * element_bytes)
        call(np.uint64(decoder), (np.uint64(codes), bit, last, np.uint64(bits), np.uint64(table), *own, place))
