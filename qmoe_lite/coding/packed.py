"""PackedMatrix: one compressed matrix as a handful of tensors, and its way back to a dense one."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qmoe_lite.coding.decode_kernels import decode_rows, slot_values
from qmoe_lite.coding.dictionary import Dictionary
from qmoe_lite.coding.parts import LEVEL_DTYPES, MatrixParts
from qmoe_lite.coding.stream import row_starts
from qmoe_lite.coding.validation import prepare
from qmoe_lite.coding.window_parts import weights_of
from qmoe_lite.errors import DtypeError


@dataclass(frozen=True, eq=False)
class PackedMatrix(MatrixParts):
    """A matrix of digits as codewords, with the levels of its rows; made by `encode` or read from a checkpoint.

    Attributes
    ----------
    codes : uint8 tensor, shape (ceil(codewords * bits / 8) + 8,)
        Bit stream, least significant bit first, rows one after another without a gap; then 8 zero bytes.
    row_codewords : uint8 or uint16 tensor, shape (R,)
        Codewords of each row above `fewest_codewords`; a row's last codeword may run past the row's end. `encode`
        takes uint8 where the longest and the shortest row differ by less than 256 codewords.
    levels : float32, float16 or bfloat16 tensor, shape (R, L)
        Ternary: L = 2, values of -1 and +1, or L = 1, symmetric. Two-bit: L = 3, values of 1, 2 and 3. Of a
        dictionary: L = 1, the row's step.
    codebook : Codebook or Dictionary
    columns : int
        C, 1 to 65535.
    fewest_codewords : int
        What `row_codewords` counts from, at most the codewords of the shortest row; keyword only.
    column_scales : float tensor, shape (C,), or None
        Of a dictionary's digits: weight = digit * step * scale; None stands for ones. Keyword only, as what follows.
    exception_starts : int32 tensor, shape (blocks + 1,), or None
    exception_positions : uint16 tensor, shape (N,), or None
    exception_values : int8 tensor, shape (N,), or None
        Of a dictionary's digits: what is to be added to those that were clipped, see :class:`Exceptions`.
    """

    def dense(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the dequantised matrix, shape (R, C); see :func:`qmoe_lite.coding.codec.decode_dense`."""
        if dtype not in (*LEVEL_DTYPES, torch.float64):
            raise DtypeError(f"dtype is {dtype}; expected float16, bfloat16, float32 or float64.")
        prepare(self)
        if self.codes.is_cuda:
            from qmoe_lite.cuda import codec as twin

            return twin.decode_dense(self, dtype)
        if isinstance(self.codebook, Dictionary):
            return weights_of(self).to(dtype)
        values = slot_values(self.levels, self.codebook.alphabet, dtype)
        starts = row_starts(self.count_codewords().numpy())
        dense = torch.empty(self.shape, dtype=dtype)
        decode_rows(self.codes.numpy(), self.codebook, values, starts, 0, dense)
        return dense
