"""The uniform grid: any multiple of the row's step, and of the column's scale; nothing is clipped."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from qmoe_lite.coding.narrow import round_scales
from qmoe_lite.errors import SettingError
from qmoe_lite.quantization.rounding import MOST_STEPS, UniformRounding, check_levels, level_dtype_name, round_levels

# How far importance may move a step, and where it is cut off: neurons that calibration hardly ever saw on
_MOST_MOVED = 4.0
_LEAST_IMPORTANT = 1e-4  # of the mean

# Column scales within 1 / 1024 and 1024. A weight of 16 times its row's root mean square then still has a digit within
# int16 at a step of half of it; bfloat16 holds any of them. Dampening by .1 keeps the ratio of two columns' scales
# under sqrt(10 C), some 200 at 4,096 columns, so only next to no dampening meets these bounds.
_SCALE_BOUND = 1024.0


@dataclass(frozen=True)
class UniformGrid:
    """Every whole digit there is: weight = digit * row's step * column's scale.

    Parameters
    ----------
    step : float, default 1.16
        Step of a row in units of the root mean square of its weights. 1.16 comes to about two bits a weight.
    dead_zone : float, default 0.06
        How much farther than halfway from 0 a weight must lie, in steps, to take the next digit: at least 0, under 0.5.
    level_dtype : torch.bfloat16, torch.float16 or None, default None
        Dtype that the steps are rounded to before any weight is rounded, bfloat16 with as few bits of mantissa as
        `round_scales` leaves; None keeps float32.
    column_steps : bool, default True
        Scale the columns by what the Hessian says of them (`column_scales`). False: steps follow the rows alone.

    Raises
    ------
    SettingError
        A setting outside its range; in `fit`, a step outside the range of its dtype.
    NotFiniteError
        In `fit`, NaN or infinity in the weight.

    Notes
    -----
    Digits are int16. One beyond 32,767 is clamped, and GPTQ spreads what is missing over the columns after it. A
    small dead zone keeps what is decoded as large as what was encoded: none inflates it, a wide one shrinks it. Steps
    that follow the columns are known as WaterSIC.
    """

    step: float = 1.16
    dead_zone: float = 0.06
    level_dtype: torch.dtype | None = None
    column_steps: bool = True
    name: ClassVar[str] = "uniform"
    word: ClassVar[str] = "uniform"
    alphabet: ClassVar[int] = 2 * MOST_STEPS + 1

    def __post_init__(self) -> None:
        """Refuse settings outside their range."""
        level_dtype_name(self.level_dtype)
        if not _is_number(self.step) or not 0 < self.step < math.inf:
            raise SettingError(f"step is {self.step!r}; expected a finite number above 0. Pass 1.16 for two bits.")
        if not _is_number(self.dead_zone) or not 0 <= self.dead_zone < 0.5:
            raise SettingError(f"dead_zone is {self.dead_zone!r}; expected 0 or more, and under 0.5. Pass 0.06.")
        if not isinstance(self.column_steps, bool):
            raise SettingError(f"column_steps is {self.column_steps!r}; expected True or False. Pass one of these.")

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> Tensor:
        """Return the levels (..., R, 1), float32: the row's step; 0 for zeros, and under float32's normal numbers.

        Parameters
        ----------
        weight : float tensor, shape (..., R, C)
            What the levels are for.
        importance : float tensor, shape (..., R), or None, default None
            How much the square of an error in each output counts; finite, 0 or more. None: errors count alike that
            are as large beside their row's RMS.

        Notes
        -----
        Were all bits spent for the sum of squared errors, a step would follow importance^(-1/2) alone; were each output
        as important as it is large, its RMS alone. The steps are halfway between, in logarithms, with the geometric
        mean of the latter: models lose less there than at either end (bench/results/row-steps.txt).
        """
        length = torch.linalg.vector_norm(weight.detach(), dim=-1, keepdim=True, dtype=torch.float64)
        steps = length * (self.step / math.sqrt(weight.shape[-1]))
        if importance is not None:
            steps = steps * _moved(steps[..., 0], importance)[..., None]
        steps = steps.to(torch.float32)
        levels = round_levels(round_scales(steps) if self.level_dtype == torch.bfloat16 else steps, self.level_dtype)
        return torch.where(levels < torch.finfo(torch.float32).tiny, 0.0, levels)

    def rounding(self, levels: Tensor) -> UniformRounding:
        """Return the steps of levels (..., R, 1) and what else a kernel needs."""
        check_levels(levels, 1)
        steps = levels[..., 0].contiguous()
        inverses = torch.where(steps > 0, 1 / steps, 0.0)
        return UniformRounding(steps, inverses, 0.5 - self.dead_zone)

    def to_config(self) -> dict[str, Any]:
        """Return what :func:`grid_from_config` needs, as JSON values."""
        return {
            "name": self.name,
            "step": self.step,
            "dead_zone": self.dead_zone,
            "level_dtype": level_dtype_name(self.level_dtype),
            "column_steps": self.column_steps,
        }


def column_scales(diagonal: Tensor) -> Tensor:
    """Return how wide the steps of each column are beside its neighbours'.

    Parameters
    ----------
    diagonal : float32 tensor, shape (E, C)
        Above 0: the diagonal of the upper Cholesky factor of each inverse Hessian. An error in a column costs its
        square over this entry's square, once the columns rounded after it have made up for it as far as they can.

    Returns
    -------
    float32 tensor, shape (E, C)
        The diagonal over its geometric mean, between 1 / 1024 and 1024, rounded by `round_scales`.
    """
    logarithms = diagonal.double().log()
    bound = math.log(_SCALE_BOUND)
    ratios = (logarithms - logarithms.mean(dim=-1, keepdim=True)).clamp_(-bound, bound).exp_()
    return round_scales(ratios.to(torch.float32))


def _moved(steps: Tensor, importance: Tensor) -> Tensor:
    """Return what steps (..., R) that follow the rows' RMS are multiplied by, float64 (..., R); 1 on average."""
    counts = importance.to(steps.dtype)
    counts = torch.maximum(counts, counts.mean(dim=-1, keepdim=True) * _LEAST_IMPORTANT)
    known = (steps > 0) & (counts > 0)
    logarithms = -0.5 * torch.where(known, steps * counts.sqrt(), 1.0).log()
    mean = logarithms.sum(dim=-1, keepdim=True) / known.sum(dim=-1, keepdim=True).clamp(min=1)
    bound = math.log(_MOST_MOVED)
    return torch.where(known, (logarithms - mean).clamp(-bound, bound).exp(), 1.0)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
