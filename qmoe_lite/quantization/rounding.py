"""How kernels round: by a table of sorted values and thresholds, or to multiples of a step. Levels' 16-bit dtypes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qmoe_lite.errors import NotFiniteError, SettingError, ShapeError

LEVEL_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
MOST_STEPS = 32767  # largest digit of a uniform grid: an int16, and its negative is one too


@dataclass(frozen=True, eq=False)
class RoundingTable:
    """What a kernel needs to round: K values a row, ascending, with K - 1 thresholds between them.

    Attributes
    ----------
    values : float32 tensor, shape (..., R, K)
        Zero among them.
    thresholds : float32 tensor, shape (..., R, K - 1)
        A number takes the value whose index is the count of thresholds strictly below it. A tie between two values goes
        to the one nearer to zero; a value equal to its neighbour nearer to zero is never taken.
    digits : int8 tensor, shape (..., R, K)
        Digit of each value.
    """

    values: Tensor
    thresholds: Tensor
    digits: Tensor
    digit_dtype: ClassVar[torch.dtype] = torch.int8

    def part(self, experts: slice) -> RoundingTable:
        """Return the table of some experts."""
        return RoundingTable(self.values[experts], self.thresholds[experts], self.digits[experts])


@dataclass(frozen=True, eq=False)
class UniformRounding:
    """What a kernel needs to round to multiples of a row's step: digit = sign(v) floor(|v| + shift), v = w / step.

    Attributes
    ----------
    steps : float32 tensor, shape (..., R)
        0 or more; where it is 0, every digit is 0.
    inverses : float32 tensor, shape (..., R)
        1 / step, or 0: a kernel multiplies where it would have to divide.
    shift : float
        Half, or less by the dead zone. Digits are clamped to +-32767.
    """

    steps: Tensor
    inverses: Tensor
    shift: float
    digit_dtype: ClassVar[torch.dtype] = torch.int16

    def part(self, experts: slice) -> UniformRounding:
        """Return the rounding of some experts."""
        return UniformRounding(self.steps[experts], self.inverses[experts], self.shift)


Rounding = RoundingTable | UniformRounding


def nearest_digits(weight: Tensor, rounding: Rounding) -> Tensor:
    """Round each weight (..., R, C) by itself; return its digit, of the rounding's digit dtype, the weight's shape."""
    if isinstance(rounding, UniformRounding):
        scaled = weight * rounding.inverses[..., None]
        sizes = scaled.abs().add_(rounding.shift).clamp_(max=MOST_STEPS).floor_()
        return sizes.copysign_(scaled).to(torch.int16)
    index = torch.zeros(weight.shape, dtype=torch.int64, device=weight.device)
    for column in range(rounding.thresholds.shape[-1]):
        index += weight > rounding.thresholds[..., column, None]
    return torch.gather(rounding.digits, -1, index)


def round_levels(levels: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Round float32 levels to `dtype` and back; refuse what it cannot hold."""
    if not torch.isfinite(levels).all():
        message = "weight holds NaN, infinity or a range beyond float32; expected finite numbers. "
        raise NotFiniteError(message + "Repair or scale the weights.")
    rounded = levels if dtype is None else levels.to(dtype).to(torch.float32)
    if not torch.isfinite(rounded).all():
        message = f"levels up to {levels.abs().max().item():.6g} overflow {dtype}; expected levels within its range. "
        raise SettingError(message + "Pass level_dtype=torch.bfloat16 or None, or scale the weights.")
    return rounded + 0.0


def table(values: Tensor, digits: Tensor) -> RoundingTable:
    """Put thresholds halfway between neighbouring `values` (..., R, K), K - 1 a row."""
    lower, upper = values[..., :-1], values[..., 1:]
    gaps = lower.shape[-1]
    zero_index = (digits == 0).int().argmax(dim=-1, keepdim=True)
    positive = torch.arange(gaps, device=values.device) >= zero_index
    middle = lower / 2 + upper / 2
    # `x > t` decides: below zero, a number exactly halfway must count as above, to go to the value nearer to zero
    thresholds = torch.where(positive, middle, torch.nextafter(middle, torch.full_like(middle, -torch.inf)))
    for columns, side, edge in ((range(gaps), ~positive, -torch.inf), (reversed(range(gaps)), positive, torch.inf)):
        outward = torch.full_like(thresholds[..., 0], edge)
        for column in columns:  # an outer value equal to its inner neighbour is jumped over
            twin = side[..., column] & (lower[..., column] == upper[..., column])
            outward = torch.where(twin, outward, thresholds[..., column])
            thresholds[..., column] = outward
    return RoundingTable(values.contiguous(), thresholds, digits.contiguous())


def check_levels(levels: Tensor, columns: int) -> None:
    """Refuse levels that are not (..., R, columns)."""
    if levels.ndim < 2 or levels.shape[-1] != columns:
        message = f"levels has shape {tuple(levels.shape)}; expected (..., R, {columns}). Pass what fit() returned."
        raise ShapeError(message)


def level_dtype_name(dtype: torch.dtype | None) -> str | None:
    """Return the name a config uses for a level dtype."""
    for name, known in LEVEL_DTYPES.items():
        if dtype == known:
            return name
    if dtype is None:
        return None
    message = f"level_dtype is {dtype}; expected torch.bfloat16, torch.float16 or None. Pass one of these."
    raise SettingError(message)
