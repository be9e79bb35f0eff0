"""PackedMatrix: one compressed matrix as a handful of tensors. No algorithm lives here."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from qmoe_lite.codebook import Codebook

MAX_COLUMNS = 65535  # a row's codewords are counted in 16 bits
LEVEL_COUNTS = {3: (1, 2), 4: (3,)}  # levels a row, by digits of the alphabet
LEVEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class PackedMatrix:
    """A matrix of digits as codewords, with the levels of its rows; made by `encode` or read from a checkpoint.

    Attributes
    ----------
    codes : uint8 tensor, shape (ceil(codewords * bits / 8) + 8,)
        Bit stream, least significant bit first, rows one after another without a gap; then 8 zero bytes.
    row_codewords : uint16 tensor, shape (R,)
        Codewords of each row; the last one may run past the row's end.
    levels : float32, float16 or bfloat16 tensor, shape (R, L)
        Ternary: L = 2, values of -1 and +1, or L = 1, symmetric. Two-bit: L = 3, values of 1, 2 and 3.
    codebook : Codebook
    columns : int
        C, 1 to 65535.
    """

    codes: torch.Tensor
    row_codewords: torch.Tensor
    levels: torch.Tensor
    codebook: Codebook
    columns: int
    _validated: bool = field(default=False, repr=False)

    @property
    def shape(self) -> tuple[int, int]:
        """(R, C)."""
        return len(self.row_codewords), self.columns

    @property
    def nbytes(self) -> int:
        """Bytes of everything needed to decode but the codebook."""
        return sum(tensor.nbytes for tensor in (self.codes, self.row_codewords, self.levels))

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight: codes, padding, row lengths and levels, everything but the codebook."""
        rows, columns = self.shape
        return 8 * self.nbytes / (rows * columns)

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.codes.device

    def to(self, device: torch.device | str) -> PackedMatrix:
        """Return the same matrix on another device; dtypes stay."""
        codes, row_codewords, levels = (x.to(device) for x in (self.codes, self.row_codewords, self.levels))
        return PackedMatrix(codes, row_codewords, levels, self.codebook, self.columns, self._validated)

    def dense(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the dequantised matrix, shape (R, C); see :func:`qmoe_lite.codec.decode_dense`."""
        from qmoe_lite.codec import decode_dense

        return decode_dense(self, dtype)
