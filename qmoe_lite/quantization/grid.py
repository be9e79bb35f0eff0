"""Which levels the weights of a row may take. A new grid is one file and its name in `AnyGrid` and `GRIDS`.

A grid fits levels (..., R, L) to a weight (..., R, C) and says how a kernel rounds to them. Zero is always a value.
Digits: -1, 0, +1 for ternary; for two-bit 0 is the zero weight and 1 to 3 are the row's other levels, ascending; any
int16 for uniform, where the one level is the row's step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor

from qmoe_lite.errors import FormatError, SettingError, ShapeError
from qmoe_lite.quantization.minmax import MinMaxTernary as MinMaxTernary
from qmoe_lite.quantization.minmax import MinMaxTwoBit as MinMaxTwoBit
from qmoe_lite.quantization.rounding import LEVEL_DTYPES, Rounding
from qmoe_lite.quantization.uniform import UniformGrid as UniformGrid


class Grid(Protocol):
    """What the solver asks of a grid."""

    @property
    def name(self) -> str:
        """Word that stands for the grid in a file."""

    @property
    def word(self) -> str:
        """Word that stands for the grid on the command line."""

    @property
    def alphabet(self) -> int:
        """Number of different digits: 3, 4, or 65,535 for any int16 but the lowest."""

    @property
    def level_dtype(self) -> torch.dtype | None:
        """16-bit dtype that the levels are rounded to before the solver runs; None leaves them float32."""

    @property
    def column_steps(self) -> bool:
        """Whether steps follow the columns as well: the solver then divides each column by a scale of its own."""

    def fit(self, weight: Tensor) -> Tensor:
        """Return the levels (..., R, L), float32, for a weight (..., R, C)."""

    def rounding(self, levels: Tensor) -> Rounding:
        """Return how a kernel rounds to levels (..., R, L)."""

    def to_config(self) -> dict[str, Any]:
        """Return what :func:`grid_from_config` needs, as JSON values."""


@dataclass(frozen=True, eq=False)
class Quantized:
    """What a solver returns: a digit for every weight, and the levels that the digits stand for.

    Attributes
    ----------
    digits : int8 tensor, or int16 for uniform, shape (E, R, C) or (R, C), like the weight
        -1, 0, +1, or 0 to 3, or any within +-32,767 (see the module).
    levels : float32 tensor, shape (E, R, L) or (R, L)
        Ternary: value of -1, value of +1. Two-bit: values of 1, 2, 3. Uniform: the row's step.
    error : float32 tensor, shape (E,)
        tr((W - Q) H (W - Q)^T) / tr(W H W^T), H without dampening; 0 where the denominator is 0. H is the layer's for
        "blended", and the identity where there was none or the matrix's own was not finite.
    fallback : bool tensor, shape (E,)
        The Hessian was unusable, and the matrix was rounded to nearest for that reason.
    hessian_class : tuple of str, length E
        "own", "dampened" (more dampening than asked for), "blended" (the layer's Hessian) or "nearest" (none).
    column_scales : float32 tensor, shape (E, C) or (C,), or None
        Each column's share in the step, values of bfloat16; 1 where there was no usable Hessian. The same for all
        matrices that `gptq_shared` is given. None for a grid whose steps follow the rows alone.

    A two-dimensional weight has E = 1 in `error`, `fallback` and `hessian_class`.
    """

    digits: Tensor
    levels: Tensor
    error: Tensor
    fallback: Tensor
    hessian_class: tuple[str, ...]
    column_scales: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """The weights that the digits stand for, float32, the digits' shape; computed anew at each access."""
        return dequantize(self.digits, self.levels, self.column_scales)

    def weight_of(self, expert: int) -> Tensor:
        """The weights of one matrix of a group, (R, C), without those of the others."""
        scales = None if self.column_scales is None else self.column_scales[expert]
        return dequantize(self.digits[expert], self.levels[expert], scales)


def joined(parts: Sequence[Quantized]) -> Quantized:
    """Return groups, one after another, as one."""
    scales = [part.column_scales for part in parts if part.column_scales is not None]
    digits, levels, error, fallback = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("digits", "levels", "error", "fallback")
    )
    classes = tuple(name for part in parts for name in part.hessian_class)
    return Quantized(digits, levels, error, fallback, classes, torch.cat(scales) if scales else None)


AnyGrid = MinMaxTernary | MinMaxTwoBit | UniformGrid
GRIDS: tuple[type[AnyGrid], ...] = (MinMaxTernary, MinMaxTwoBit, UniformGrid)


def grid_of_word(word: str) -> type[AnyGrid]:
    """Return the grid that a word of the command line stands for.

    Raises
    ------
    SettingError
        An unknown word; the message lists the known ones.
    """
    known = {grid.word: grid for grid in GRIDS}
    if word not in known:
        raise SettingError(f"grid is {word}; expected one of {', '.join(known)}.")
    return known[word]


def grid_from_config(config: Mapping[str, Any]) -> AnyGrid:
    """Rebuild a grid from its `to_config()`.

    Parameters
    ----------
    config : mapping
        Key "name" and the grid's settings, all JSON values.

    Returns
    -------
    MinMaxTernary, MinMaxTwoBit or UniformGrid
        Equal to the grid that wrote the config.

    Raises
    ------
    FormatError
        Other keys, an unknown name or an unknown level dtype, a setting outside its range.
    """
    known = {grid.name: grid for grid in GRIDS}
    name = config.get("name")
    if not isinstance(name, str) or name not in known:
        raise FormatError(f"grid {name!r} is unknown; expected one of {sorted(known)}. Use a newer qmoe-lite.")
    expected = sorted(["name", *(field.name for field in fields(known[name]))])
    if sorted(config) != expected:
        raise FormatError(f"grid config has keys {sorted(config)}; expected {expected}. Use a newer qmoe-lite.")
    dtype = config["level_dtype"]
    if dtype is not None and (not isinstance(dtype, str) or dtype not in LEVEL_DTYPES):
        message = f"level_dtype {dtype!r} is unknown; expected null or one of {sorted(LEVEL_DTYPES)}. "
        raise FormatError(message + "Use a newer qmoe-lite.")
    settings = {key: value for key, value in config.items() if key not in ("name", "level_dtype")}
    try:
        return known[name](level_dtype=None if dtype is None else LEVEL_DTYPES[dtype], **settings)
    except SettingError as error:
        raise FormatError(str(error)) from None


def dequantize(digits: Tensor, levels: Tensor, column_scales: Tensor | None = None) -> Tensor:
    """Return the weights that digits stand for.

    Parameters
    ----------
    digits : int8 or int16 tensor, shape (..., R, C)
        Any where `levels` has one column, -1, 0, +1 where it has two, 0 to 3 where it has three; not checked.
    levels : float tensor, shape (..., R, L)
        L = 1: what the digit is multiplied by. L = 2: values of -1 and +1. L = 3: values of 1, 2 and 3.
    column_scales : float tensor, shape (..., C), or None, default None
        What each column is multiplied by.

    Returns
    -------
    tensor, shape (..., R, C), dtype of `levels`
        Digit 0 is exactly 0.

    Raises
    ------
    ShapeError
        `levels` does not have one to three columns for each row of `digits`, or `column_scales` one for each column.
    """
    if levels.ndim != digits.ndim or levels.shape[:-1] != digits.shape[:-1] or levels.shape[-1] not in (1, 2, 3):
        message = f"levels has shape {tuple(levels.shape)} for digits {tuple(digits.shape)}; "
        raise ShapeError(message + "expected the same rows and 1 to 3 columns. Pass the digits' own levels.")
    if column_scales is not None and column_scales.shape != (*digits.shape[:-2], digits.shape[-1]):
        message = f"column_scales has shape {tuple(column_scales.shape)} for digits {tuple(digits.shape)}; "
        raise ShapeError(message + "expected one for each column. Pass the digits' own scales.")
    if levels.shape[-1] == 1:  # in float32 where the levels have 16 bits: a digit may have as many
        weight = digits.to(torch.promote_types(levels.dtype, torch.float32)) * levels
    else:
        weight = torch.zeros(digits.shape, dtype=levels.dtype, device=levels.device)
        for index, digit in enumerate((-1, 1) if levels.shape[-1] == 2 else (1, 2, 3)):
            weight = torch.where(digits == digit, levels[..., index, None], weight)
    if column_scales is not None:
        weight = weight * column_scales[..., None, :]
    return weight.to(levels.dtype)
