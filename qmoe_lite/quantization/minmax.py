"""The paper's grids: the row's minimum, zero and maximum, and four evenly spaced values between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from qmoe_lite.quantization.rounding import RoundingTable, check_levels, level_dtype_name, round_levels, table


@dataclass(frozen=True)
class MinMaxTernary:
    """The paper's grid: the row's minimum, zero and the row's maximum, rounded at half of each.

    A row whose weights have one sign has level 0 for the digit of the other sign, and that digit never occurs.

    Parameters
    ----------
    level_dtype : torch.bfloat16, torch.float16 or None, default None
        Dtype that the levels are rounded to before any weight is rounded; None keeps float32.

    Raises
    ------
    SettingError
        Another `level_dtype`; in `fit`, a level outside its range.
    NotFiniteError
        In `fit`, NaN or infinity in the weight.

    Notes
    -----
    QMoE (arXiv:2310.16795), section 3.2. A weight exactly halfway becomes 0. Departs from the published code in rows of
    zeros only: levels 0 instead of -1 and +1.
    """

    level_dtype: torch.dtype | None = None
    name: ClassVar[str] = "minmax-ternary"
    word: ClassVar[str] = "minmax"
    alphabet: ClassVar[int] = 3
    column_steps: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse an unknown level dtype."""
        level_dtype_name(self.level_dtype)

    def fit(self, weight: Tensor) -> Tensor:
        """Return the levels (..., R, 2), float32: the row's minimum and maximum, clamped to either side of 0."""
        return round_levels(torch.stack(_clamped_range(weight), dim=-1), self.level_dtype)

    def rounding(self, levels: Tensor) -> RoundingTable:
        """Return the table for levels (..., R, 2): values low, 0, high."""
        check_levels(levels, 2)
        values = torch.stack((levels[..., 0], torch.zeros_like(levels[..., 0]), levels[..., 1]), dim=-1)
        digits = torch.arange(-1, 2, dtype=torch.int8, device=levels.device).expand(values.shape)
        return table(values, digits)

    def to_config(self) -> dict[str, Any]:
        """Return what :func:`grid_from_config` needs, as JSON values."""
        return {"name": self.name, "level_dtype": level_dtype_name(self.level_dtype)}


@dataclass(frozen=True)
class MinMaxTwoBit:
    """The paper's two-bit grid: four evenly spaced values from row minimum to maximum, shifted so that one is 0.

    scale = (max - min) / 3, zero_point = round(-min / scale), values = scale * (q - zero_point) for q = 0 to 3.

    Parameters
    ----------
    level_dtype : torch.bfloat16, torch.float16 or None, default None
        Dtype that the levels are rounded to before any weight is rounded; None keeps float32.

    Raises
    ------
    SettingError
        Another `level_dtype`; in `fit`, a level outside its range.
    NotFiniteError
        In `fit`, NaN or infinity in the weight.

    Notes
    -----
    QMoE (arXiv:2310.16795), section 3.2. Departs from the published code at exact ties, which go to the value nearer to
    zero (there: to the even q), and in rows of zeros, whose levels are 0.
    """

    level_dtype: torch.dtype | None = None
    name: ClassVar[str] = "minmax-two-bit"
    word: ClassVar[str] = "two-bit"
    alphabet: ClassVar[int] = 4
    column_steps: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse an unknown level dtype."""
        level_dtype_name(self.level_dtype)

    def fit(self, weight: Tensor) -> Tensor:
        """Return the levels (..., R, 3), float32: the three values that are not zero, ascending."""
        low, high = _clamped_range(weight)
        scale = ((high - low) / 3).unsqueeze(-1)
        divisor = torch.where(scale > 0, scale, torch.ones_like(scale))
        zero_point = torch.round(-low.unsqueeze(-1) / divisor).clamp_(0, 3)
        q = torch.arange(3, dtype=torch.float32, device=scale.device).expand(*scale.shape[:-1], 3)
        return round_levels(scale * (q + (q >= zero_point) - zero_point), self.level_dtype)

    def rounding(self, levels: Tensor) -> RoundingTable:
        """Return the table for levels (..., R, 3): 0 inserted where it belongs in each row."""
        check_levels(levels, 3)
        zero_point = (levels < 0).sum(dim=-1, keepdim=True)
        position = torch.arange(4, device=levels.device).expand(*levels.shape[:-1], 4)
        source = position - (position > zero_point).long()
        values = torch.gather(levels, -1, source.clamp(max=2)).masked_fill(position == zero_point, 0.0)
        digits = (source + 1).masked_fill(position == zero_point, 0).to(torch.int8)
        return table(values, digits)

    def to_config(self) -> dict[str, Any]:
        """Return what :func:`grid_from_config` needs, as JSON values."""
        return {"name": self.name, "level_dtype": level_dtype_name(self.level_dtype)}


def _clamped_range(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's minimum, at most 0, and maximum, at least 0; float32 without negative zeros."""
    weight = weight.detach().to(torch.float32)
    return weight.amin(dim=-1).clamp_(max=0) + 0.0, weight.amax(dim=-1).clamp_(min=0) + 0.0
