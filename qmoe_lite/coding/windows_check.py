"""What a stream of windows and its exceptions must be before a kernel may walk them."""

from __future__ import annotations

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from qmoe_lite.coding.exceptions import Exceptions, check_exceptions
from qmoe_lite.coding.stream import PADDING_BYTES, load_word, row_starts
from qmoe_lite.coding.windows import LEADING_BITS, windows_bytes
from qmoe_lite.errors import FormatError

_FAULTS = {
    1: "uses a window that stands for nothing",
    2: "ends before the matrix's width",
    3: "has codewords beyond the matrix's width",
    4: "does not begin and end with class 0",
}


def check(
    codes: NDArray[np.uint8],
    row_codewords: NDArray[np.int64],
    columns: int,
    bits: int,
    clip: int,
    lengths: NDArray[np.uint8],
    first_quarters: int,
    exceptions: Exceptions,
) -> None:
    """Check that a matrix decodes to exactly its shape, so that no kernel can read or write outside its row.

    Parameters
    ----------
    codes : uint8 array, one axis
        Of any content.
    row_codewords : int64 array, shape (R,), R at least 1
        Of any content.
    columns : int
        C, 1 to 65535.
    bits, clip, lengths
        Of the dictionary.
    first_quarters : int
        Quarters of the codewords that class 0 has: `quarters[0]`.
    exceptions : Exceptions
        Of any content, but of the right dtypes and one axis.

    Raises
    ------
    FormatError
        A stream of the wrong size, nonzero bits before or behind it, a window that stands for nothing, a row that does
        not begin in class 0 or whose codewords are too few or too many for its width, exceptions outside the matrix,
        not in order, of no effect or too large.

    Notes
    -----
    Safe on any bytes.
    """
    if ((row_codewords < 1) | (row_codewords > columns)).any():
        row = int(((row_codewords < 1) | (row_codewords > columns)).nonzero()[0][0])
        raise FormatError(
            f"row {row} has {row_codewords[row]} codewords; expected 1 to {columns}, its width. "
            "The data is damaged; get it again."
        )
    starts = row_starts(row_codewords)
    total = int(starts[-1])
    if len(codes) != windows_bytes(total, bits):
        raise FormatError(
            f"codes has {len(codes)} bytes; expected {windows_bytes(total, bits)} for {total} codewords of {bits} "
            "bits. The data is truncated or damaged; get it again."
        )
    end = total * bits + LEADING_BITS
    if codes[0] & 3 or codes[end // 8] >> end % 8 or codes[-PADDING_BYTES:].any():
        raise FormatError("codes has data around its codewords; expected zeros. The data is damaged; get it again.")
    faults = _check_kernel(codes, starts, bits, lengths, first_quarters, columns)
    if faults.any():
        row = int(faults.nonzero()[0][0])
        raise FormatError(f"row {row} {_FAULTS[int(faults[row])]} ({columns}). The data is damaged; get it again.")
    check_exceptions(exceptions, len(row_codewords), columns, clip)


@njit(parallel=True, cache=True, fastmath=False, error_model="numpy")
def _check_kernel(
    codes: NDArray[np.uint8],
    starts: NDArray[np.int64],
    bits: int,
    lengths: NDArray[np.uint8],
    first_quarters: int,
    columns: int,
) -> NDArray[np.uint8]:
    """Fault of each row, (R,): a key of _FAULTS or 0."""
    mask = np.uint64(len(lengths) - 1)
    n_bits = np.uint64(bits)
    top = np.uint64(3)
    faults = np.zeros(len(starts) - 1, dtype=np.uint8)
    for row in prange(len(faults)):
        bit, end = np.uint64(starts[row]) * n_bits, np.uint64(starts[row + 1]) * n_bits
        if (load_word(codes, bit) & top) >= first_quarters or (load_word(codes, end) & top) >= first_quarters:
            faults[row] = 4
        base = np.int64(0)
        while bit < end and faults[row] == 0:
            length = np.int64(lengths[load_word(codes, bit) & mask])
            if base >= columns:
                faults[row] = 3
            elif length == 0:
                faults[row] = 1
            base += length
            bit += n_bits
        if base < columns and faults[row] == 0:
            faults[row] = 2
    return faults
