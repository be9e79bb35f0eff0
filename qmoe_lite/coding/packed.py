"""PackedMatrix: one compressed matrix as a handful of tensors. No algorithm lives here."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from qmoe_lite.coding.codebook import Codebook

MAX_COLUMNS = 65535  # a row's codewords, at most one a weight, are counted in 16 bits
FEWEST_BYTES = 4  # that `fewest_codewords` takes where it is stored
LEVEL_COUNTS = {3: (1, 2), 4: (3,)}  # levels a row, by digits of the alphabet
LEVEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class PackedMatrix:
    """A matrix of digits as codewords, with the levels of its rows; made by `encode` or read from a checkpoint.

    Attributes
    ----------
    codes : uint8 tensor, shape (ceil(codewords * bits / 8) + 8,)
        Bit stream, least significant bit first, rows one after another without a gap; then 8 zero bytes.
    row_codewords : uint8 or uint16 tensor, shape (R,)
        Codewords of each row above `fewest_codewords`; a row's last codeword may run past the row's end. `encode`
        takes uint8 where the longest and the shortest row differ by less than 256 codewords.
    levels : float32, float16 or bfloat16 tensor, shape (R, L)
        Ternary: L = 2, values of -1 and +1, or L = 1, symmetric. Two-bit: L = 3, values of 1, 2 and 3.
    codebook : Codebook
    columns : int
        C, 1 to 65535.
    fewest_codewords : int
        What `row_codewords` counts from, at most the codewords of the shortest row; keyword only.
    """

    codes: torch.Tensor
    row_codewords: torch.Tensor
    levels: torch.Tensor
    codebook: Codebook
    columns: int
    fewest_codewords: int = field(default=0, kw_only=True)
    _validated: bool = field(default=False, repr=False)

    @property
    def shape(self) -> tuple[int, int]:
        """(R, C)."""
        return len(self.row_codewords), self.columns

    @property
    def nbytes(self) -> int:
        """Bytes of everything needed to decode but the codebook."""
        return FEWEST_BYTES + sum(tensor.nbytes for tensor in (self.codes, self.row_codewords, self.levels))

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight: codes, padding, row lengths and levels, everything but the codebook."""
        rows, columns = self.shape
        return 8 * self.nbytes / (rows * columns)

    def count_codewords(self) -> torch.Tensor:
        """Return the codewords of each row: int64 tensor, shape (R,)."""
        if self.row_codewords.dtype == torch.uint8:
            return self.row_codewords.to(torch.int64) + self.fewest_codewords
        above = self.row_codewords.view(torch.int16).to(torch.int64) & 0xFFFF  # torch knows little of uint16 on a GPU
        return above + self.fewest_codewords

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.codes.device

    def to(self, device: torch.device | str) -> PackedMatrix:
        """Return the same matrix on another device; dtypes stay."""
        codes, row_codewords, levels = (x.to(device) for x in (self.codes, self.row_codewords, self.levels))
        return replace(self, codes=codes, row_codewords=row_codewords, levels=levels)

    def dense(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the dequantised matrix, shape (R, C); see :func:`qmoe_lite.coding.codec.decode_dense`."""
        from qmoe_lite.coding.codec import decode_dense

        return decode_dense(self, dtype)
