"""Which levels the weights of a row may take: the paper's min/max ternary grid and its two-bit one.

A grid fits levels (..., R, L) to a weight (..., R, C) and turns them into a table of sorted values and thresholds, so
that one kernel rounds on every grid. Zero is always a value. Digits: -1, 0, +1 for ternary; for two-bit 0 is the zero
weight and 1 to 3 are the row's other levels, ascending.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from qmoe_lite.errors import FormatError, NotFiniteError, SettingError, ShapeError

_LEVEL_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


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


class Grid(Protocol):
    """What the solver asks of a grid."""

    @property
    def name(self) -> str:
        """Word that stands for the grid in a file."""

    @property
    def alphabet(self) -> int:
        """Number of different digits: 3 or 4."""

    @property
    def level_dtype(self) -> torch.dtype | None:
        """16-bit dtype that the levels are rounded to before the solver runs; None leaves them float32."""

    def fit(self, weight: Tensor) -> Tensor:
        """Return the levels (..., R, L), float32, for a weight (..., R, C)."""

    def rounding(self, levels: Tensor) -> RoundingTable:
        """Return the values, thresholds and digits for levels (..., R, L)."""

    def to_config(self) -> dict[str, Any]:
        """Return what :func:`grid_from_config` needs, as JSON values."""


@dataclass(frozen=True, eq=False)
class Quantized:
    """What a solver returns: a digit for every weight, and the levels that the digits stand for.

    Attributes
    ----------
    digits : int8 tensor, shape (E, R, C) or (R, C), like the weight
        -1, 0, +1, or 0 to 3 (see the module).
    levels : float32 tensor, shape (E, R, L) or (R, L)
        Ternary: value of -1, value of +1. Two-bit: values of 1, 2, 3.
    error : float32 tensor, shape (E,)
        tr((W - Q) H (W - Q)^T) / tr(W H W^T), H without dampening; 0 where the denominator is 0. H is the layer's for
        "blended", and the identity where there was none or the matrix's own was not finite.
    fallback : bool tensor, shape (E,)
        The Hessian was unusable, and the matrix was rounded to nearest for that reason.
    hessian_class : tuple of str, length E
        "own", "dampened" (more dampening than asked for), "blended" (the layer's Hessian) or "nearest" (none).

    A two-dimensional weight has E = 1 in the last three.
    """

    digits: Tensor
    levels: Tensor
    error: Tensor
    fallback: Tensor
    hessian_class: tuple[str, ...]

    @property
    def weight(self) -> Tensor:
        """The weights that the digits stand for, float32, the digits' shape; computed anew at each access."""
        return dequantize(self.digits, self.levels)


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
    alphabet: ClassVar[int] = 3

    def __post_init__(self) -> None:
        """Refuse an unknown level dtype."""
        _level_dtype_name(self.level_dtype)

    def fit(self, weight: Tensor) -> Tensor:
        """Return the levels (..., R, 2), float32: the row's minimum and maximum, clamped to either side of 0."""
        return _round_levels(torch.stack(_clamped_range(weight), dim=-1), self.level_dtype)

    def rounding(self, levels: Tensor) -> RoundingTable:
        """Return the table for levels (..., R, 2): values low, 0, high."""
        _check_levels(levels, 2)
        values = torch.stack((levels[..., 0], torch.zeros_like(levels[..., 0]), levels[..., 1]), dim=-1)
        digits = torch.arange(-1, 2, dtype=torch.int8, device=levels.device).expand(values.shape)
        return _table(values, digits)

    def to_config(self) -> dict[str, Any]:
        """Return what :func:`grid_from_config` needs, as JSON values."""
        return {"name": self.name, "level_dtype": _level_dtype_name(self.level_dtype)}


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
    alphabet: ClassVar[int] = 4

    def __post_init__(self) -> None:
        """Refuse an unknown level dtype."""
        _level_dtype_name(self.level_dtype)

    def fit(self, weight: Tensor) -> Tensor:
        """Return the levels (..., R, 3), float32: the three values that are not zero, ascending."""
        low, high = _clamped_range(weight)
        scale = ((high - low) / 3).unsqueeze(-1)
        divisor = torch.where(scale > 0, scale, torch.ones_like(scale))
        zero_point = torch.round(-low.unsqueeze(-1) / divisor).clamp_(0, 3)
        q = torch.arange(3, dtype=torch.float32, device=scale.device).expand(*scale.shape[:-1], 3)
        return _round_levels(scale * (q + (q >= zero_point) - zero_point), self.level_dtype)

    def rounding(self, levels: Tensor) -> RoundingTable:
        """Return the table for levels (..., R, 3): 0 inserted where it belongs in each row."""
        _check_levels(levels, 3)
        zero_point = (levels < 0).sum(dim=-1, keepdim=True)
        position = torch.arange(4, device=levels.device).expand(*levels.shape[:-1], 4)
        source = position - (position > zero_point).long()
        values = torch.gather(levels, -1, source.clamp(max=2)).masked_fill(position == zero_point, 0.0)
        digits = (source + 1).masked_fill(position == zero_point, 0).to(torch.int8)
        return _table(values, digits)

    def to_config(self) -> dict[str, Any]:
        """Return what :func:`grid_from_config` needs, as JSON values."""
        return {"name": self.name, "level_dtype": _level_dtype_name(self.level_dtype)}


_GRIDS: dict[str, type[MinMaxTernary] | type[MinMaxTwoBit]] = {
    "minmax-ternary": MinMaxTernary,
    "minmax-two-bit": MinMaxTwoBit,
}


def grid_from_config(config: Mapping[str, Any]) -> MinMaxTernary | MinMaxTwoBit:
    """Rebuild a grid from its `to_config()`.

    Parameters
    ----------
    config : mapping
        Keys "name" and "level_dtype", both JSON values.

    Returns
    -------
    MinMaxTernary or MinMaxTwoBit
        Equal to the grid that wrote the config.

    Raises
    ------
    FormatError
        Other keys, an unknown name or an unknown level dtype.
    """
    if set(config) != {"name", "level_dtype"}:
        message = f"grid config has keys {sorted(config)}; expected ['level_dtype', 'name']. Use a newer qmoe-lite."
        raise FormatError(message)
    name, dtype = config["name"], config["level_dtype"]
    if not isinstance(name, str) or name not in _GRIDS:
        raise FormatError(f"grid {name!r} is unknown; expected one of {sorted(_GRIDS)}. Use a newer qmoe-lite.")
    if dtype is not None and (not isinstance(dtype, str) or dtype not in _LEVEL_DTYPES):
        message = f"level_dtype {dtype!r} is unknown; expected null or one of {sorted(_LEVEL_DTYPES)}. "
        raise FormatError(message + "Use a newer qmoe-lite.")
    return _GRIDS[name](None if dtype is None else _LEVEL_DTYPES[dtype])


def dequantize(digits: Tensor, levels: Tensor) -> Tensor:
    """Return the weights that digits stand for.

    Parameters
    ----------
    digits : int8 tensor, shape (..., R, C)
        -1, 0, +1 where `levels` has one or two columns, 0 to 3 where it has three; not checked.
    levels : float tensor, shape (..., R, L)
        L = 1: value of +1, and -1 is its negative. L = 2: values of -1 and +1. L = 3: values of 1, 2 and 3.

    Returns
    -------
    tensor, shape (..., R, C), dtype of `levels`
        Digit 0 is exactly 0.

    Raises
    ------
    ShapeError
        `levels` does not have one to three columns for each row of `digits`.
    """
    if levels.ndim != digits.ndim or levels.shape[:-1] != digits.shape[:-1] or levels.shape[-1] not in (1, 2, 3):
        message = f"levels has shape {tuple(levels.shape)} for digits {tuple(digits.shape)}; "
        raise ShapeError(message + "expected the same rows and 1 to 3 columns. Pass the digits' own levels.")
    if levels.shape[-1] == 1:
        levels = torch.cat((-levels, levels), dim=-1)
    weight = torch.zeros(digits.shape, dtype=levels.dtype, device=levels.device)
    for index, digit in enumerate((-1, 1) if levels.shape[-1] == 2 else (1, 2, 3)):
        weight = torch.where(digits == digit, levels[..., index, None], weight)
    return weight


def nearest_digits(weight: Tensor, table: RoundingTable) -> Tensor:
    """Round each weight (..., R, C) by itself; return its digit, int8, the weight's shape."""
    index = torch.zeros(weight.shape, dtype=torch.int64, device=weight.device)
    for column in range(table.thresholds.shape[-1]):
        index += weight > table.thresholds[..., column, None]
    return torch.gather(table.digits, -1, index)


def _clamped_range(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's minimum, at most 0, and maximum, at least 0; float32 without negative zeros."""
    weight = weight.detach().to(torch.float32)
    return weight.amin(dim=-1).clamp_(max=0) + 0.0, weight.amax(dim=-1).clamp_(min=0) + 0.0


def _round_levels(levels: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Round float32 levels to `dtype` and back; refuse what it cannot hold."""
    if not torch.isfinite(levels).all():
        message = "weight holds NaN, infinity or a range beyond float32; expected finite numbers. "
        raise NotFiniteError(message + "Repair or scale the weights.")
    rounded = levels if dtype is None else levels.to(dtype).to(torch.float32)
    if not torch.isfinite(rounded).all():
        message = f"levels up to {levels.abs().max().item():.6g} overflow {dtype}; expected levels within its range. "
        raise SettingError(message + "Pass level_dtype=torch.bfloat16 or None, or scale the weights.")
    return rounded + 0.0


def _table(values: Tensor, digits: Tensor) -> RoundingTable:
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


def _check_levels(levels: Tensor, columns: int) -> None:
    if levels.ndim < 2 or levels.shape[-1] != columns:
        message = f"levels has shape {tuple(levels.shape)}; expected (..., R, {columns}). Pass what fit() returned."
        raise ShapeError(message)


def _level_dtype_name(dtype: torch.dtype | None) -> str | None:
    """Return the name a config uses for a level dtype."""
    for name, known in _LEVEL_DTYPES.items():
        if dtype == known:
            return name
    if dtype is None:
        return None
    message = f"level_dtype is {dtype}; expected torch.bfloat16, torch.float16 or None. Pass one of these."
    raise SettingError(message)
