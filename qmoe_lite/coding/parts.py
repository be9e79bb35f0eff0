"""The tensors that a matrix is packed in, with what can be said of them unread: `PackedMatrix` without decoding."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Self

import torch

from qmoe_lite.coding.codebook import Codebook

MAX_COLUMNS = 65535  # a row's codewords, at most one a weight, are counted in 16 bits
FEWEST_BYTES = 4  # that `fewest_codewords` takes where it is stored
LEVEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class MatrixParts:
    """What `PackedMatrix` holds, which says what each of it is; a class of its own, since validation lies below it."""

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

    def to(self, device: torch.device | str) -> Self:
        """Return the same matrix on another device; dtypes stay."""
        codes, row_codewords, levels = (x.to(device) for x in (self.codes, self.row_codewords, self.levels))
        return replace(self, codes=codes, row_codewords=row_codewords, levels=levels)
