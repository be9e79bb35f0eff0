"""What a solve needs of the Hessians, worked out once: a group that is solved again with another step keeps it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qmoe_lite.quantization.arguments import check_settings
from qmoe_lite.quantization.hessian import added, all_finite, factorise
from qmoe_lite.quantization.uniform import column_scales

_MOST_DAMPENING = 1.0


@dataclass(frozen=True)
class Factors:
    """The factors of E Hessians, or of one that E matrices share, with what was done to have them.

    Attributes
    ----------
    factor : float32 tensor, shape (E or 1, C, C)
        As `factorise` gives it.
    classes : list of str
        "own", "dampened", "blended" or "nearest", of each.
    metric : float32 tensor, shape (E or 1, C, C)
        What the error is measured with.
    added : float32 tensor, shape (E or 1,)
        What was added to the metric's diagonal for the factor; NaN where the factor is another's.
    block_size : int
        Columns of a block of the factor.
    scales : float32 tensor, shape (E or 1, C), or None
        The factor is that of the weights with their columns divided by these.
    """

    factor: Tensor
    classes: list[str]
    metric: Tensor
    added: Tensor
    block_size: int
    scales: Tensor | None = None


def factorise_all(
    own: Tensor, layer: Tensor | None, dampening: float, block_size: int, column_steps: bool = False
) -> Factors:
    """Factorise Hessians, with more dampening or with the layer's in place of one that has no factor.

    Parameters
    ----------
    own : float32 tensor, shape (E or 1, C, C)
        X^T X of the inputs, sum or mean, without dampening.
    layer : float32 tensor, shape (1, C, C), or None
        Stands in for one that is unusable.
    dampening, block_size
        As `gptq` takes them.
    column_steps : bool, default False
        Divide the columns by scales that come from the factor, for a grid whose steps follow the columns.

    Raises
    ------
    SettingError
        `dampening` or `block_size` outside its range.
    """
    dampening, block_size = check_settings(dampening, block_size)
    known = _factorise(own, layer, dampening, block_size)
    return _scale_columns(known) if column_steps else known


def _factorise(own: Tensor, layer: Tensor | None, dampening: float, block_size: int) -> Factors:
    """Return a factor for each Hessian, the class of each, and the Hessians that the error is measured with."""
    factor, info = factorise(own, dampening, block_size)
    classes = ["own" if code == 0 else "nearest" for code in info.tolist()]
    extra = torch.where(info.to(own.device) == 0, added(own, dampening), torch.nan)
    for step in _dampening_steps(dampening):
        for index in _indices(classes, "nearest"):
            candidate, code = factorise(own[index : index + 1], step, block_size)
            if code.item() == 0:
                factor[index], classes[index], extra[index] = candidate[0], "dampened", added(own[index], step)
    if layer is not None and "nearest" in classes:
        for step in (dampening, *_dampening_steps(dampening)):
            candidate, code = factorise(layer, step, block_size)
            if code.item() == 0:
                for index in _indices(classes, "nearest"):
                    factor[index], classes[index], extra[index] = candidate[0], "blended", added(layer[0], step)
                break
    metric = own
    finite = all_finite(own).tolist()
    if "blended" in classes or not all(finite):
        metric = own.clone()
        for index, name in enumerate(classes):
            if name == "blended" and layer is not None:
                metric[index] = layer[0]
            elif not finite[index]:
                metric[index] = torch.eye(own.shape[-1], dtype=own.dtype, device=own.device)
    return Factors(factor, classes, metric, extra, block_size)


def _scale_columns(known: Factors) -> Factors:
    """Return the factor for weights whose columns are divided by scales that come from it: diag(s) M for M.

    M^-1 / s on the diagonal of blocks; above it s_i (M_ab U_bb)_ij / s_j. An error over the factor's diagonal, and what
    it costs, stay what they were. Takes the factor's memory.
    """
    factor = known.factor
    scales = column_scales(factor.diagonal(dim1=-2, dim2=-1))
    factor /= scales[:, None]
    for start in range(0, factor.shape[-1], known.block_size):
        end = start + known.block_size
        factor[:, start:end, end:] *= scales[:, start:end, None]
    return replace(known, factor=factor, scales=scales)


def _indices(classes: list[str], wanted: str) -> list[int]:
    return [index for index, name in enumerate(classes) if name == wanted]


def _dampening_steps(dampening: float) -> list[float]:
    """Return the dampening to try after `dampening` failed: ten times as much, and so on up to 1."""
    steps = []
    while dampening < _MOST_DAMPENING:
        dampening = min(max(10 * dampening, 0.01), _MOST_DAMPENING)
        steps.append(dampening)
    return steps
