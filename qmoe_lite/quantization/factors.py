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
    order : int64 tensor, shape (E or 1, C), or None
        The columns as they are rounded: `factor` follows it, `metric` and `scales` do not. None: as they stand.
    scales : float32 tensor, shape (E or 1, C), or None
        The factor is that of the weights with their columns divided by these.
    """

    factor: Tensor
    classes: list[str]
    metric: Tensor
    added: Tensor
    block_size: int
    order: Tensor | None = None
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
        Divide the columns by scales that come from the factor, for a grid whose steps follow the columns, and round
        those first that matter most.

    Raises
    ------
    SettingError
        `dampening` or `block_size` outside its range.
    """
    dampening, block_size = check_settings(dampening, block_size)
    known = _factorise(own, layer, dampening, block_size, column_steps)
    return _scale_columns(known) if column_steps else known


def _factorise(own: Tensor, layer: Tensor | None, dampening: float, block_size: int, sort: bool) -> Factors:
    """Return a factor for each Hessian, the class of each, and the Hessians that the error is measured with."""
    order = _largest_first(own) if sort else None
    factor, info = factorise(own, dampening, block_size, order)
    classes = ["own" if code == 0 else "nearest" for code in info.tolist()]
    extra = torch.where(info.to(own.device) == 0, added(own, dampening), torch.nan)
    for step in _dampening_steps(dampening):
        for index in _indices(classes, "nearest"):
            own_order = None if order is None else order[index : index + 1]
            candidate, code = factorise(own[index : index + 1], step, block_size, own_order)
            if code.item() == 0:
                factor[index], classes[index], extra[index] = candidate[0], "dampened", added(own[index], step)
    if layer is not None and "nearest" in classes:
        layer_order = _largest_first(layer) if sort else None
        for step in (dampening, *_dampening_steps(dampening)):
            candidate, code = factorise(layer, step, block_size, layer_order)
            if code.item() == 0:
                for index in _indices(classes, "nearest"):
                    factor[index], classes[index], extra[index] = candidate[0], "blended", added(layer[0], step)
                    if order is not None and layer_order is not None:
                        order[index] = layer_order[0]
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
    return Factors(factor, classes, metric, extra, block_size, order)


def _largest_first(hessian: Tensor) -> Tensor:
    """Return the columns by the Hessian's diagonal, (E, C): act-order, `desc_act` in others' settings.

    Where steps follow the columns, these come to differ less, so that columns' digits are more alike and one code suits
    them all.
    """
    return hessian.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True, stable=True)


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
    if known.order is not None:
        scales = torch.empty_like(scales).scatter_(1, known.order, scales)
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
