"""A packed matrix whose code is a `Dictionary`: its check, its digits, its weights."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from qmoe_lite.coding.dictionary import Dictionary
from qmoe_lite.coding.exceptions import Exceptions
from qmoe_lite.coding.parts import EXCEPTION_PARTS, MatrixParts
from qmoe_lite.coding.stream import row_starts
from qmoe_lite.coding.windows import decode_dense_rows, decode_rows
from qmoe_lite.coding.windows_check import check
from qmoe_lite.errors import FormatError

_DTYPES = {
    "exception_starts": torch.int32,
    "exception_positions": torch.uint16,
    "exception_values": torch.int8,
}


def dictionary_of(packed: MatrixParts) -> Dictionary:
    """Return the matrix's code, which is known to be a dictionary."""
    assert isinstance(packed.codebook, Dictionary)
    return packed.codebook


def exceptions_of(packed: MatrixParts) -> Exceptions:
    """Return the exceptions of a matrix on the CPU."""
    return Exceptions(*(packed.tensors[name].numpy() for name in EXCEPTION_PARTS))


def scales_of(packed: MatrixParts) -> NDArray[np.float32]:
    """Return the column scales of a matrix on the CPU, ones where there are none: float32, shape (C,)."""
    if packed.column_scales is None:
        return np.ones(packed.columns, dtype=np.float32)
    scales: NDArray[np.float32] = packed.column_scales.float().numpy()
    return scales


def check_windows(packed: MatrixParts) -> None:
    """Raise FormatError unless a matrix on the CPU, of checked codes, row lengths and levels, is sound; any bytes."""
    dictionary = dictionary_of(packed)
    for name, dtype in _DTYPES.items():
        tensor = packed.tensors.get(name)
        if tensor is None or tensor.dtype != dtype or tensor.ndim != 1 or not tensor.is_contiguous():
            found = "missing" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
            raise FormatError(f"{name} is {found}; expected a row of {dtype}. The data is damaged; get it again.")
    scales = packed.column_scales
    if scales is not None:
        if tuple(scales.shape) != (packed.columns,) or not scales.is_floating_point() or not scales.is_contiguous():
            raise FormatError(
                f"column_scales is {scales.dtype} {tuple(scales.shape)}; expected floats ({packed.columns},). "
                "The data is damaged; get it again."
            )
        if not (torch.isfinite(scales) & (scales > 0)).all():
            raise FormatError("column_scales holds a value that is not above 0 and finite. Get the data again.")
    check(
        packed.codes.numpy(),
        packed.count_codewords().numpy(),
        packed.columns,
        dictionary.bits,
        dictionary.clip,
        dictionary.lengths,
        dictionary.quarters[0],
        exceptions_of(packed),
    )


def digits_of(packed: MatrixParts) -> torch.Tensor:
    """Return the digits of a validated matrix on the CPU: int16, shape (R, C)."""
    dictionary = dictionary_of(packed)
    digits = torch.empty(packed.shape, dtype=torch.int16)
    coded = packed.codes.numpy(), row_starts(packed.count_codewords().numpy()), dictionary.bits
    decode_rows(*coded, dictionary.digits_table, dictionary.lengths, exceptions_of(packed), 0, digits.numpy())
    return digits


def weights_of(packed: MatrixParts) -> torch.Tensor:
    """Return digit * step * column scale of a validated matrix on the CPU: float32, shape (R, C)."""
    dictionary = dictionary_of(packed)
    dense = torch.empty(packed.shape, dtype=torch.float32)
    coded = packed.codes.numpy(), row_starts(packed.count_codewords().numpy()), dictionary.bits
    steps = packed.levels[:, 0].float().contiguous().numpy()
    tables = dictionary.digits_table, dictionary.lengths
    decode_dense_rows(*coded, *tables, exceptions_of(packed), steps, scales_of(packed), 0, dense.numpy())
    return dense
