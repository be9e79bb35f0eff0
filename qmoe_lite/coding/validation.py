"""What a packed matrix must be before a kernel may walk it, checked once for a matrix that `encode` did not make."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit, prange
from numpy.typing import NDArray

from qmoe_lite.coding.dictionary import Dictionary
from qmoe_lite.coding.entry import entry_length
from qmoe_lite.coding.guards import enter_kernels
from qmoe_lite.coding.parts import LEVEL_DTYPES, MAX_COLUMNS, MatrixParts
from qmoe_lite.coding.stream import PADDING_BYTES, load_word, row_starts, stream_bytes
from qmoe_lite.coding.window_parts import check_windows
from qmoe_lite.errors import FormatError, SettingError

_FAULTS = {
    1: "uses a code that stands for nothing",
    2: "ends before the matrix's width",
    3: "has codewords beyond the matrix's width",
}


def prepare(packed: MatrixParts) -> None:
    """Validate a matrix unless that is done, wherever it is.

    Raises
    ------
    FormatError, SettingError
        As for `validate`.
    QMoEError
        This process was forked from one that had run kernels.
    """
    enter_kernels()
    if not packed._validated:
        validate(packed)
    _check_device(packed)


def validate(packed: MatrixParts) -> None:
    """Check that the matrix decodes to exactly its shape, so that no kernel can read or write outside its row.

    Raises
    ------
    FormatError
        A tensor of the wrong dtype or shape, a stream of the wrong size, nonzero padding, a code that stands for
        nothing, a row whose codewords are too few or too many for its width, a level that is not finite.
    SettingError
        The matrix's tensors are on several devices.

    Notes
    -----
    Safe on any bytes. `decode`, `dense` and `decode_matmul` call it once for a matrix that `encode` did not make; of
    one on a GPU a copy on the CPU is looked at.
    """
    _check_device(packed)
    enter_kernels()
    if packed.device.type != "cpu":
        validate(packed.to("cpu"))
        object.__setattr__(packed, "_validated", True)
        return
    _check_structure(packed)
    codebook = packed.codebook
    if isinstance(codebook, Dictionary):
        check_windows(packed)
        object.__setattr__(packed, "_validated", True)
        return
    starts = row_starts(packed.count_codewords().numpy())
    total = int(starts[-1])
    codes = packed.codes.numpy()
    if len(codes) != stream_bytes(total, codebook.bits):
        raise FormatError(
            f"codes has {len(codes)} bytes; expected {stream_bytes(total, codebook.bits)} for {total} codewords of "
            f"{codebook.bits} bits. The data is truncated or damaged; get it again."
        )
    spare_bits = codes[total * codebook.bits // 8] >> total * codebook.bits % 8
    if spare_bits or codes[-PADDING_BYTES:].any():
        raise FormatError("codes has data behind its last codeword; expected zeros. The data is damaged; get it again.")
    faults = _validate_kernel(codes, starts, codebook.table, codebook.bits, packed.columns)
    if faults.any():
        row = int(faults.nonzero()[0][0])
        raise FormatError(
            f"row {row} {_FAULTS[int(faults[row])]} ({packed.columns}). The data is damaged; get it again."
        )
    object.__setattr__(packed, "_validated", True)


def _check_structure(packed: MatrixParts) -> None:
    """Raise FormatError where a tensor has the wrong dtype, shape or values, before any byte of the stream is read."""
    tensors = {"codes": packed.codes, "row_codewords": packed.row_codewords, "levels": packed.levels}
    dtypes = {"codes": (torch.uint8,), "row_codewords": (torch.uint8, torch.uint16), "levels": LEVEL_DTYPES}
    for name, tensor in tensors.items():
        if tensor.dtype not in dtypes[name]:
            expected = " or ".join(str(dtype) for dtype in dtypes[name])
            raise FormatError(f"{name} is {tensor.dtype}; expected {expected}. The data is damaged; get it again.")
        if tensor.ndim != (2 if name == "levels" else 1) or not tensor.is_contiguous():
            raise FormatError(
                f"{name} has {tensor.ndim} axes or strides; expected 1 (levels: 2), contiguous. Rebuild it."
            )
    rows, width = packed.levels.shape
    widths = (1,) if isinstance(packed.codebook, Dictionary) else packed.codebook.alphabet.level_counts
    if rows != len(packed.row_codewords) or rows == 0 or width not in widths:
        raise FormatError(
            f"levels has shape {(rows, width)} beside {len(packed.row_codewords)} rows of digits. "
            "The data is damaged; get it again."
        )
    if not 1 <= packed.columns <= MAX_COLUMNS:
        raise FormatError(f"columns is {packed.columns}; expected 1 to {MAX_COLUMNS}. Get the data again.")
    fewest = packed.fewest_codewords
    if type(fewest) is not int or not 0 <= fewest <= MAX_COLUMNS:
        raise FormatError(f"fewest_codewords is {fewest!r}; expected an int, 0 to {MAX_COLUMNS}. Get the data again.")
    counts = packed.count_codewords()
    if (wrong := (counts < 1) | (counts > packed.columns)).any():
        row = int(wrong.nonzero()[0])
        raise FormatError(
            f"row {row} has {int(counts[row])} codewords; expected 1 to {packed.columns}, its width. "
            "The data is damaged; get it again."
        )
    if not torch.isfinite(packed.levels).all():
        raise FormatError("levels holds NaN or infinity; expected finite values. The data is damaged; get it again.")


def _check_device(packed: MatrixParts) -> None:
    devices = {tensor.device for tensor in packed.tensors.values()}
    if len(devices) > 1 or packed.device.type not in ("cpu", "cuda"):
        found = " and ".join(sorted(map(str, devices)))
        raise SettingError(f"the packed matrix is on {found}; expected the CPU or one CUDA GPU. Call packed.to('cpu').")


@njit(parallel=True, cache=True, fastmath=False)
def _validate_kernel(
    codes: NDArray[np.uint8], starts: NDArray[np.int64], table: NDArray[np.uint64], bits: int, columns: int
) -> NDArray[np.uint8]:
    """Fault of each row, (R,): a key of _FAULTS or 0."""
    mask = np.uint64((1 << bits) - 1)
    faults = np.zeros(len(starts) - 1, dtype=np.uint8)
    for row in prange(len(faults)):
        base = np.int64(0)
        for k in range(starts[row], starts[row + 1]):
            length = entry_length(table[load_word(codes, np.uint64(k * bits)) & mask])
            if base >= columns:
                faults[row] = 3
                break
            if length == 0:
                faults[row] = 1
                break
            base += np.int64(length)
        if base < columns and faults[row] == 0:
            faults[row] = 2
    return faults
