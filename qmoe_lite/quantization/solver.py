"""Batched GPTQ: round a group of experts column by column, each column making up for the ones before it.

weight (E, R, C), hessian (E, C, C). A compiled kernel runs the recursion inside a block of columns, rows in lanes;
one matrix product an expert carries the block's errors to the columns after it. Floor: R C^2 operations an expert for
the products, C^3 / 3 for the factorisation, R C^2 for the error.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from qmoe_lite.coding.guards import enter_kernels
from qmoe_lite.errors import SettingError, ShapeError
from qmoe_lite.quantization.arguments import Array, check_hessian, check_importance, check_settings, check_weight
from qmoe_lite.quantization.columns import block_kernel, lost_kernel, uniform_kernel
from qmoe_lite.quantization.factors import Factors, factorise_all
from qmoe_lite.quantization.grid import Grid, Quantized, UniformGrid, dequantize
from qmoe_lite.quantization.hessian import full_float32
from qmoe_lite.quantization.rounding import Rounding, UniformRounding, nearest_digits

_QUADRATIC_BLOCK = 192
_CANCELLATION = 32  # the error may be this many times smaller than the two sums whose difference it is
_CHUNK = 1 << 21  # weights that the CPU works on at a time, whole experts


def gptq(
    weight: Array,
    hessian: Array | None,
    grid: Grid,
    *,
    dampening: float = 0.1,
    block_size: int = 128,
    layer_hessian: Array | None = None,
    importance: Array | None = None,
) -> Quantized:
    """Quantise weights so that the outputs on the calibration inputs change little.

    Parameters
    ----------
    weight : float tensor or array, shape (E, R, C) or (R, C)
        Any float dtype, finite; computed in float32.
    hessian : float tensor or array, shape (E, C, C) or (C, C), or None
        X^T X of the inputs, sum or mean, without dampening, symmetric; (C, C) is shared by all E. None rounds to
        nearest.
    grid : Grid
        Which levels a row may take, such as `MinMaxTernary()` or `UniformGrid(1.16)`.
    dampening : float, default 0.1
        Fraction of the mean diagonal that is added to the diagonal ("percdamp" in GPTQ).
    block_size : int, default 128
        Columns between two matrix products ("blocksize"); the results differ by float32 rounding only.
    layer_hessian : float tensor or array, shape (C, C), or None, default None
        Stands in for a Hessian that is unusable.
    importance : float tensor or array, shape (E, R) or (R,), or None, default None
        How much the square of an error in each output counts beside the others of its matrix; 0 or more. For a grid
        whose steps follow the rows, `UniformGrid`, alone. None: all alike, relative to their weights.

    Returns
    -------
    Quantized
        On the weight's device. Says for each matrix how well it went and which Hessian served.

    Raises
    ------
    ShapeError
        Shapes that do not go together, or an empty weight.
    DtypeError
        `weight`, a Hessian or `importance` is not floating point.
    NotFiniteError
        NaN or infinity in `weight`; names the expert, row and column. The same in `importance`.
    SettingError
        `dampening` or `block_size` outside its range; levels that overflow the grid's level dtype; `importance` under
        0, or with a grid that has no steps.

    Notes
    -----
    GPTQ (arXiv:2210.17323), algorithm 1; QMoE (arXiv:2310.16795), section 3.2. A Hessian that cannot be factorised (not
    positive definite, not finite, no tokens at all) gets ten times the dampening up to 1 ("dampened"), then the layer's
    Hessian takes its place ("blended"), then its matrix alone is rounded to nearest ("nearest", `fallback`); the other
    matrices keep every bit. Departs from the published code, which zeroes the weights of inputs that calibration never
    saw: dampening makes their diagonal positive, so they are rounded like any weight, and held-out inputs may use them.

    A grid whose steps follow the columns works on the weights divided by its column scales, with a factor scaled alike:
    GPTQ commutes with that. The scales come from the factor, and are rounded, before any weight is. With such a grid
    the columns of the largest diagonal come first (act-order); what is returned stands in the weight's order.

    Every row is summed in one order by one thread: the number of Numba threads changes no bit.

    Examples
    --------
    >>> import torch
    >>> from qmoe_lite.quantization.grid import MinMaxTernary
    >>> gptq(torch.tensor([[0.9, 0.2, -1.0]]), torch.eye(3), MinMaxTernary()).digits.tolist()
    [[1, 0, -1]]
    """
    return gptq_shared(
        [weight],
        hessian,
        grid,
        dampening=dampening,
        block_size=block_size,
        layer_hessian=layer_hessian,
        importance=[importance],
    )[0]


def gptq_shared(
    weights: Sequence[Array],
    hessian: Array | None,
    grid: Grid,
    *,
    dampening: float = 0.1,
    block_size: int = 128,
    layer_hessian: Array | None = None,
    importance: Sequence[Array | None] | None = None,
    factors: Factors | None = None,
) -> list[Quantized]:
    """Quantise matrices that get the same inputs, such as gate_proj and up_proj, factorising the Hessian once.

    Parameters
    ----------
    weights : sequence of float tensors or arrays, shapes (E, R_i, C), or all (R_i, C)
        As `gptq` takes one.
    hessian, grid, dampening, block_size, layer_hessian
        As in `gptq`.
    importance : sequence, one for each of the weights, or None, default None
        As in `gptq`.
    factors : Factors or None, default None
        What `factorise_all` made of the Hessian for this grid: it takes the place of the other arguments but the grid.

    Returns
    -------
    list of Quantized
        What `gptq` gives for each of the weights, bit for bit.

    Raises
    ------
    As `gptq`.
    """
    check_settings(dampening, block_size)
    checked = [check_weight(weight) for weight in weights]
    for full in checked[1:]:
        if (*full.shape[:-2], full.shape[-1]) != (*checked[0].shape[:-2], checked[0].shape[-1]):
            found = " and ".join(str(tuple(each.shape)) for each in (checked[0], full))
            raise ShapeError(f"weights have shapes {found}; expected one E and one C. Quantise them apart.")
    own = check_hessian(hessian, checked[0], shared=True, name="hessian")
    layer = check_hessian(layer_hessian, checked[0], shared=False, name="layer_hessian")
    if factors is None and own is not None:
        factors = factorise_all(own, layer, dampening, block_size, grid.column_steps)
    shares = importance or [None] * len(checked)
    pairs = [(each, check_importance(share, each)) for each, share in zip(checked, shares, strict=True)]
    return [_quantise(each, factors, grid, share) for each, share in pairs]


def _quantise(full: Tensor, known: Factors | None, grid: Grid, importance: Tensor | None) -> Quantized:
    """Quantise weight (E, R, C) or (R, C) by what is known of its Hessians."""
    group = full if full.ndim == 3 else full[None]
    levels = _fit(group, grid, importance)
    rounding = grid.rounding(levels)
    lost = torch.full((len(group),), torch.nan, dtype=torch.float64, device=group.device)
    scales = None
    if known is None:
        digits, classes = nearest_digits(group, rounding), ["nearest"] * len(group)
        if grid.column_steps:
            scales = group.new_ones(len(group), group.shape[-1])
    else:
        classes = known.classes if len(known.classes) == len(group) else known.classes * len(group)
        scales = None if known.scales is None else known.scales.expand(len(group), -1)
        digits, lost = _solve(group, known, scales, levels, rounding)
        broken = torch.nonzero(lost.isinf()).flatten().tolist()
        if broken:  # its scales stay: they are those of the other matrices of this input
            whole = group if scales is None else group / scales[:, None]
            digits[broken] = nearest_digits(whole, rounding)[broken]
            classes = ["nearest" if expert in broken else name for expert, name in enumerate(classes)]
    fallback = torch.tensor([known is not None and name == "nearest" for name in classes], device=group.device)
    error = _relative_error(group, digits, levels, scales, None if known is None else known.metric, lost)
    if full.ndim == 2:
        digits, levels, scales = digits[0], levels[0], None if scales is None else scales[0]
    return Quantized(digits, levels, error, fallback, tuple(classes), scales)


def _fit(group: Tensor, grid: Grid, importance: Tensor | None) -> Tensor:
    """Return the levels (E, R, L) of weights (E, R, C); importance is (E, R)."""
    if importance is not None and not isinstance(grid, UniformGrid):
        raise SettingError(f"importance goes with a grid of steps, not with {grid.word}. Pass a UniformGrid.")
    given = (group,) if importance is None else (group, importance)
    if group.device.type == "cpu":  # float64 copies on the way are those of one matrix
        return torch.stack([grid.fit(*each) for each in zip(*given, strict=True)])
    return grid.fit(*given)


def solve_block(block: Tensor, factor: Tensor, table: Rounding) -> tuple[Tensor, Tensor]:
    """Quantise one block of B columns, each column making up for the ones before it.

    Parameters
    ----------
    block : float32 tensor, shape (E, R, B)
        Weights, already corrected for the errors of all columns before the block. Fastest where the rows of a column
        lie next to each other, as they do in the results.
    factor : float32 tensor, shape (E, B, B)
        The block's part of the upper factor of the inverse Hessian.
    table : RoundingTable or UniformRounding
        Values (E, R, K), or steps (E, R), to round to.

    Returns
    -------
    digits : int8 tensor, or int16 for steps, shape (E, R, B)
        On the block's device.
    errors : float32 tensor, shape (E, R, B)
        Each column's error over the factor's diagonal: what multiplies the factor's row for the columns that follow.
    """
    if block.is_cuda:
        from qmoe_lite.cuda import solver as twin

        return twin.solve_block(block, factor, table)
    enter_kernels()
    errors = torch.empty(block.mT.shape, dtype=torch.float32).copy_(block.mT)
    digits = torch.empty(errors.shape, dtype=table.digit_dtype)
    lower = factor.cpu().mT.contiguous().numpy()
    if isinstance(table, UniformRounding):
        steps, inverses = (part.cpu().contiguous().numpy() for part in (table.steps, table.inverses))
        uniform_kernel(errors.numpy(), digits.numpy(), lower, steps, inverses, np.float32(table.shift))
    else:
        parts = table.values, table.thresholds, table.digits
        block_kernel(errors.numpy(), digits.numpy(), lower, *(part.cpu().mT.contiguous().numpy() for part in parts))
    return digits.mT.to(block.device), errors.mT.to(block.device)


def _solve(
    weight: Tensor, known: Factors, scales: Tensor | None, levels: Tensor, rounding: Rounding
) -> tuple[Tensor, Tensor]:
    """Return the digits (E, R, C) of weight / scales (E, C), and tr(D H D^T), D = weight - quantised, float64 (E,).

    It is infinite where errors overflowed, and the expert needs another way; NaN where it has to be computed from D.
    """
    experts, rows, columns = weight.shape
    factor = known.factor.expand(experts, -1, -1)
    order = back = None
    if known.order is not None:
        order = known.order.expand(experts, -1)
        back = order.argsort(dim=1)
        scales = None if scales is None else scales.gather(1, order)
    digits = torch.empty(weight.shape, dtype=rounding.digit_dtype, device=weight.device)
    squares = torch.zeros((2, experts), dtype=torch.float64, device=weight.device)
    # memory that is written for the first time costs as much as a product: few experts on the CPU, in the same place
    some = max(1, _CHUNK // (rows * columns)) if weight.device.type == "cpu" else experts
    scratch = torch.empty((2, min(some, experts), columns, rows), dtype=torch.float32, device=weight.device)
    symbols = torch.empty(scratch.shape[1:], dtype=rounding.digit_dtype, device=weight.device)
    with full_float32():
        for first in range(0, experts, some):
            part = slice(first, first + some)
            chosen = rounding.part(part)
            whole, work = scratch[:, : len(weight[part])]  # a column's rows lie next to each other
            if order is None:
                whole.copy_(weight[part].mT)
            else:
                work.copy_(weight[part].mT)
                for own, ordered, column in zip(work, whole, order[part], strict=True):
                    torch.index_select(own, 0, column, out=ordered)
            if scales is not None:
                whole.div_(scales[part, :, None])
            work.copy_(whole)
            for start in range(0, columns, known.block_size):
                end = min(start + known.block_size, columns)
                block, upper = work[:, start:end].mT, factor[part, start:end, start:end]
                found, errors = solve_block(block, upper, chosen)
                symbols[: len(found), start:end] = found.mT
                widths = None if scales is None else scales[part, start:end]
                squares[:, part] += _lose(whole, found.mT, errors.mT, levels[part], widths, start, work)
                lost = work[:, start:end]
                _add_product(work[:, end:], factor[part, start:end, end:].mT, lost)
            for place, own in enumerate(digits[part]):
                ordered = symbols[place]
                own.copy_((ordered if back is None else ordered[back[first + place]]).mT)
    damped = squares[0]
    difference = damped - known.added * squares[1]
    difference[difference * _CANCELLATION < damped] = torch.nan
    difference[~damped.isfinite()] = torch.inf
    return digits, difference


def _lose(
    whole: Tensor, digits: Tensor, scaled: Tensor, levels: Tensor, scales: Tensor | None, start: int, out: Tensor
) -> Tensor:
    """Write weight - quantised to columns `start` and on of out (E, C, R), for digits (E, B, R) and levels (E, R, L).

    Returns the sums of squares of `scaled` (E, B, R) and of what was written, float64 (2, E); the latter times the
    columns' scales (E, B).
    """
    if whole.device.type == "cpu":
        sums = np.empty((2, *digits.shape[:2]))
        parts = (part.contiguous().numpy() for part in (whole, digits, scaled, levels.mT))
        lost_kernel(*parts, start, out.numpy(), sums)
        if scales is not None:
            sums[1] *= scales.double().square().numpy()
        return torch.from_numpy(sums.sum(axis=-1))
    return _lose_by_torch(whole, digits, scaled, levels, scales, start, out)


def _lose_by_torch(
    whole: Tensor, digits: Tensor, scaled: Tensor, levels: Tensor, scales: Tensor | None, start: int, out: Tensor
) -> Tensor:
    """Do what `_lose` says, on any device."""
    columns = digits.shape[1]
    quantised = dequantize(digits[..., None], levels[:, None].expand(-1, columns, -1, -1))[..., 0]
    lost = torch.sub(whole[:, start : start + columns], quantised, out=out[:, start : start + columns])
    sums = torch.stack([part.double().square_().sum(dim=2) for part in (scaled, lost)])
    if scales is not None:
        sums[1] *= scales.double().square()
    return sums.sum(dim=2)


def _add_product(rest: Tensor, factor: Tensor, lost: Tensor) -> None:
    """Add factor (E, rest, B) @ lost (E, B, R) to rest (E, rest, R), in place."""
    if rest.device.type == "cpu":
        for expert in range(len(rest)):  # a quarter faster here than baddbmm, and no expert's bits depend on the group
            rest[expert].addmm_(factor[expert], lost[expert])
    else:
        rest.baddbmm_(factor, lost)


def _relative_error(
    weight: Tensor, digits: Tensor, levels: Tensor, scales: Tensor | None, hessian: Tensor | None, lost: Tensor
) -> Tensor:
    """Return tr(D H D^T) / tr(W H W^T), shape (E,); D = weight - quantised (E, R, C), H (E or 1, C, C) or identity.

    `lost` is the numerator, float64 (E,); it is computed here where it is not finite.
    """
    error = torch.zeros(len(weight), dtype=torch.float32, device=weight.device)
    tiny = torch.finfo(torch.float32).tiny
    for part in _turns(len(weight), weight.device):
        metric = None if hessian is None else hessian[part if len(hessian) > 1 else 0]
        # the ratio does not feel these two factors, and without them float32 may overflow
        unit = weight[part].abs().amax(dim=(-2, -1), keepdim=True).clamp(min=tiny)
        largest = unit.new_ones(()) if metric is None else metric.diagonal(dim1=-2, dim2=-1).amax(dim=-1)
        spread = largest.clamp(min=tiny).sqrt()[..., None, None]
        scaled = weight[part] / unit / spread
        whole = _quadratic(scaled, metric)
        numerator = lost[part] / (unit.double() ** 2 * spread.double() ** 2)[..., 0, 0]
        if not torch.isfinite(lost[part]).all():
            widths = None if scales is None else scales[part]
            difference = scaled - dequantize(digits[part], levels[part], widths) / unit / spread
            numerator = torch.where(torch.isfinite(lost[part]), numerator, _quadratic(difference, metric))
        error[part] = torch.where(whole > 0, numerator / whole, 0.0).clamp(min=0)
    return error


def _turns(experts: int, device: torch.device) -> list[int] | list[slice]:
    """Return which experts are looked at together: one on the CPU, whose temporaries stay small; all on a GPU."""
    return list(range(experts)) if device.type == "cpu" else [slice(None)]


def _quadratic(rows: Tensor, hessian: Tensor | None) -> Tensor:
    """Return the sum over rows (..., R, C) of x H x^T, from the symmetric H's lower triangle of blocks; float64 (...).

    H is (C, C), or (E, C, C) for rows (E, R, C).
    """
    if hessian is None:
        return (rows.double() ** 2).sum(dim=(-2, -1))
    total = torch.zeros(rows.shape[:-2], dtype=torch.float64, device=rows.device)
    columns = rows.shape[-1]
    add_product = Tensor.addmm_ if rows.ndim == 2 else Tensor.baddbmm_
    hessian = hessian.expand(*rows.shape[:-2], -1, -1)
    with full_float32():
        for start in range(0, columns, _QUADRATIC_BLOCK):
            end = min(start + _QUADRATIC_BLOCK, columns)
            product = rows[..., start:end] @ hessian[..., start:end, start:end]
            add_product(product, rows[..., end:], hessian[..., end:, start:end], alpha=2)
            total += (rows[..., start:end] * product).sum(dim=(-2, -1), dtype=torch.float64)
    return total
