"""What the solver checks of its arguments, once."""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qmoe_lite.errors import DtypeError, NotFiniteError, SettingError, ShapeError
from qmoe_lite.quantization.hessian import all_finite

Array = Tensor | NDArray[Any]


def check_weight(weight: Array) -> Tensor:
    """Return a weight as finite float32 of two or three axes, or raise."""
    full = _to_float32(weight, "weight")
    if full.ndim not in (2, 3) or full.numel() == 0:
        message = f"weight has shape {tuple(full.shape)}; expected (E, R, C) or (R, C), none of them 0. "
        raise ShapeError(message + "Pass at least one weight.")
    _check_finite(full)
    return full


def check_settings(dampening: float, block_size: int) -> tuple[float, int]:
    """Return both settings as plain numbers, or raise SettingError."""
    if not (math.isfinite(dampening) and dampening >= 0):
        raise SettingError(f"dampening is {dampening}; expected a finite number, 0 or more. Pass 0.1, as in the paper.")
    if operator.index(block_size) < 1:
        raise SettingError(f"block_size is {block_size}; expected 1 or more. Pass 128, as in the paper.")
    return float(dampening), operator.index(block_size)


def _to_float32(array: Array, name: str) -> Tensor:
    """Return a float32 tensor; a copy of a NumPy array, a view of a float32 tensor."""
    if isinstance(array, np.ndarray):
        if array.dtype.kind != "f":
            raise DtypeError(f"{name} is {array.dtype}; expected a float dtype. Convert it first.")
        with np.errstate(over="ignore"):
            return torch.from_numpy(np.array(array, dtype=np.float32, order="C"))
    if not array.is_floating_point():
        raise DtypeError(f"{name} is {array.dtype}; expected a float dtype. Convert it first.")
    return array.detach().to(torch.float32)


def _check_finite(weight: Tensor) -> None:
    """Raise NotFiniteError for the first NaN or infinity in weight (E, R, C) or (R, C)."""
    if all_finite(weight).all():
        return
    *expert, row, column = torch.nonzero(~torch.isfinite(weight))[0].tolist()
    place = f"expert {expert[0] if expert else 0}, row {row}, column {column}"
    value = weight[*expert, row, column].item()
    raise NotFiniteError(f"weight is {value} at {place}; expected float32's range. Repair the checkpoint.")


def check_hessian(hessian: Array | None, full: Tensor, *, shared: bool, name: str) -> Tensor | None:
    """Return a Hessian as float32 (E, C, C) or (1, C, C) on the weight's device, or raise ShapeError."""
    if hessian is None:
        return None
    experts, columns = (full.shape[0] if full.ndim == 3 else 1), full.shape[-1]
    matrix = _to_float32(hessian, name)
    expected = [(columns, columns), *([(experts, columns, columns)] if shared else [])]
    if tuple(matrix.shape) not in expected:
        message = f"{name} has shape {tuple(matrix.shape)} for a weight of shape {tuple(full.shape)}; "
        raise ShapeError(message + f"expected {' or '.join(map(str, expected))}. Pass X^T X of this weight's inputs.")
    matrix = matrix.to(full.device)
    return matrix if matrix.ndim == 3 else matrix[None]


def check_importance(importance: Array | None, full: Tensor) -> Tensor | None:
    """Return what errors in outputs count as float32 (E, R) on the weight's device, or raise."""
    if importance is None:
        return None
    shares = _to_float32(importance, "importance")
    if shares.shape != full.shape[:-1]:
        message = f"importance has shape {tuple(shares.shape)} for a weight of shape {tuple(full.shape)}; "
        raise ShapeError(message + f"expected {tuple(full.shape[:-1])}. Pass one value for each row.")
    if not torch.isfinite(shares).all():
        raise NotFiniteError("importance has values that are not finite; expected 0 or more. Clamp them.")
    if (shares < 0).any():
        raise SettingError("importance has negative values; expected 0 or more. Clamp them.")
    return shares.to(full.device) if full.ndim == 3 else shares[None].to(full.device)
