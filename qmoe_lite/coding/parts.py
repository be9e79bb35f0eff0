"""The tensors that a matrix is packed in, with what can be said of them unread: `PackedMatrix` without decoding."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch

from qmoe_lite.coding.codebook import Codebook
from qmoe_lite.coding.dictionary import Dictionary

MAX_COLUMNS = 65535  # a row's codewords, at most one a weight, are counted in 16 bits
FEWEST_BYTES = 4  # that `fewest_codewords` takes where it is stored
LEVEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EXCEPTION_PARTS = ("exception_starts", "exception_positions", "exception_values")
TENSORS = ("codes", "row_codewords", "levels", "column_scales", *EXCEPTION_PARTS)


@dataclass(frozen=True, eq=False)
class MatrixParts:
    """What `PackedMatrix` holds, which says what each of it is; a class of its own, since validation lies below it."""

    codes: torch.Tensor
    row_codewords: torch.Tensor
    levels: torch.Tensor
    codebook: Codebook | Dictionary
    columns: int
    fewest_codewords: int = field(default=0, kw_only=True)
    column_scales: torch.Tensor | None = field(default=None, kw_only=True)
    exception_starts: torch.Tensor | None = field(default=None, kw_only=True)
    exception_positions: torch.Tensor | None = field(default=None, kw_only=True)
    exception_values: torch.Tensor | None = field(default=None, kw_only=True)
    _validated: bool = field(default=False, repr=False)

    @property
    def shape(self) -> tuple[int, int]:
        """(R, C)."""
        return self.row_codewords.shape[0], self.columns

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that there are, by name, in the order in which a checksum takes them."""
        found = {name: getattr(self, name) for name in TENSORS}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    @property
    def nbytes(self) -> int:
        """Bytes of everything needed to decode but the codebook."""
        return FEWEST_BYTES + sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight of all tensors with their padding, everything but the codebook or dictionary.

        A model's files hold the row lengths, steps and scales of a dictionary's matrices in fewer (`coding.narrow`).
        """
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
        moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        return replace(self, **moved)


def codebook_of(packed: MatrixParts) -> Codebook:
    """Return the matrix's code, which is known to be a codebook of few digits."""
    assert isinstance(packed.codebook, Codebook)
    return packed.codebook
