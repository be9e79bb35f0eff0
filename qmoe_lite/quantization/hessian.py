"""Hessians of the layer-wise error: X^T X of the inputs, float32, never TF32.

A Hessian is (C, C) for one matrix or (E, C, C) for a group, symmetric. `accumulate` adds sums over tokens, so that
order and batches do not matter beyond rounding; `mean` divides by the tokens; `blend` works on means. Dampening is
relative to the mean diagonal, so the solver takes sums and means alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from qmoe_lite.errors import DtypeError, SettingError, ShapeError

NOT_FINITE = -1  # in `info`: NaN or infinity in the Hessian or in its factor
_SLAB = 256  # columns of X^T X at a time, from the diagonal down: nearly half of the products are mirrored
_PANEL = 384  # columns of a product that updates a triangle: narrow ones compute little below it, wide ones are faster
_LEAF = 32  # columns that LAPACK factorises and inverts: above, products are faster


@contextmanager
def full_float32() -> Iterator[None]:
    """Multiply float32 matrices in full precision inside the block, whatever the process allows otherwise."""
    mkldnn: Any = torch.backends.mkldnn  # its `matmul` is missing from torch's own annotations
    if not hasattr(mkldnn, "matmul"):  # torch before 2.9 knows one switch for all
        allowed = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(allowed)
        return
    backends = (torch.backends.cuda.matmul, mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def new(columns: int, *, experts: int | None = None, device: torch.device | str = "cpu") -> Tensor:
    """Return the Hessian of no tokens.

    Parameters
    ----------
    columns : int
        C, the number of inputs.
    experts : int or None, default None
        E for a group; None for one matrix.
    device : torch.device or str, default "cpu"
        Where it lives.

    Returns
    -------
    float32 tensor, shape (C, C) or (E, C, C)
        Zeros.
    """
    shape = (columns, columns) if experts is None else (experts, columns, columns)
    return torch.zeros(shape, dtype=torch.float32, device=device)


def accumulate(hessian: Tensor, x: Tensor) -> None:
    """Add X^T X to a Hessian, in place.

    Parameters
    ----------
    hessian : float32 tensor, shape (C, C)
        Sum over the tokens so far; `group[expert]` of an (E, C, C) group works. Modified by this function.
    x : float tensor, shape (N, C)
        Inputs of N tokens, any float dtype, same device; N may be 0. Converted to float32 before the product.

    Raises
    ------
    ShapeError
        The shapes do not go together.
    DtypeError
        `hessian` is not float32, or `x` not floating point.

    Notes
    -----
    QMoE (arXiv:2310.16795), section 3.1. NaN or infinity in `x` is not looked for: it makes the Hessian not finite,
    which the solver reports for this matrix alone.
    """
    if x.ndim != 2 or hessian.shape != (x.shape[-1], x.shape[-1]):
        message = f"hessian has shape {tuple(hessian.shape)} for inputs {tuple(x.shape)}; expected (C, C) and (N, C). "
        raise ShapeError(message + "Flatten the tokens and pass one expert's Hessian.")
    if hessian.dtype != torch.float32 or not x.is_floating_point():
        message = f"hessian is {hessian.dtype} and inputs are {x.dtype}; expected torch.float32 and a float dtype. "
        raise DtypeError(message + "Make the Hessian with hessian.new().")
    x = x.detach().to(torch.float32)
    columns = len(hessian)
    with full_float32():
        for start in range(0, columns, _SLAB):
            end = min(start + _SLAB, columns)
            hessian[start:, start:end].addmm_(x[:, start:].T, x[:, start:end])
            hessian[start:end, end:] = hessian[end:, start:end].T


def mean(hessian: Tensor, tokens: Tensor | int) -> Tensor:
    """Divide summed Hessians by their tokens.

    Parameters
    ----------
    hessian : float32 tensor, shape (E, C, C) or (C, C)
        Sums, as `accumulate` leaves them.
    tokens : int64 tensor, shape (E,), or int
        How many tokens each saw; no tokens give zeros.

    Returns
    -------
    float32 tensor, shape of `hessian`
        A new tensor.
    """
    return hessian / _per_matrix(tokens, hessian).clamp(min=1)


def blend(own: Tensor, layer: Tensor, tokens: Tensor | int, n0: float) -> Tensor:
    """Mix the Hessian of an expert that saw few tokens with the layer's: n / (n + n0) own + n0 / (n + n0) layer.

    Parameters
    ----------
    own : float32 tensor, shape (E, C, C) or (C, C)
        MEAN Hessians of the experts, not sums. One without tokens has no influence, whatever it holds.
    layer : float32 tensor, shape (C, C)
        Mean Hessian over all tokens of the layer.
    tokens : int64 tensor, shape (E,), or int
        n, the tokens behind each expert's own Hessian.
    n0 : float
        Tokens at which both count the same; 0 returns `own`.

    Returns
    -------
    float32 tensor, shape of `own`
        A new tensor.

    Raises
    ------
    ShapeError
        `layer` is not (C, C).
    SettingError
        `n0` is negative or not finite.

    Notes
    -----
    Departs from QMoE (arXiv:2310.16795), section 3.2, which rounds starved experts to nearest.
    """
    if layer.shape != own.shape[-2:]:
        message = f"layer Hessian has shape {tuple(layer.shape)} for experts' {tuple(own.shape)}; "
        raise ShapeError(message + f"expected {tuple(own.shape[-2:])}. Accumulate both from inputs of the same width.")
    if not 0 <= n0 < float("inf"):
        raise SettingError(f"n0 is {n0}; expected a finite number of tokens, 0 or more. Pass 0 for no blending.")
    if n0 == 0:
        return own.clone()
    count = _per_matrix(tokens, own)
    share = count / (count + n0)
    return torch.where(share > 0, share * own, 0.0) + (1 - share) * layer


def added(hessian: Tensor, dampening: float) -> Tensor:
    """Return what dampening adds to the diagonal of each matrix (..., C, C)."""
    return dampening * hessian.diagonal(dim1=-2, dim2=-1).mean(dim=-1)


def all_finite(matrices: Tensor) -> Tensor:
    """Return a bool for each matrix (..., R, C): no NaN, no infinity. No temporary of its size."""
    highest, lowest = matrices.amax(dim=-1).amax(dim=-1), matrices.amin(dim=-1).amin(dim=-1)
    return torch.isfinite(highest) & torch.isfinite(lowest)


def factorise(
    hessian: Tensor, dampening: float, block_size: int = 128, order: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Factorise each dampened Hessian as M M^T, M upper triangular, into what elimination by blocks of columns needs.

    Parameters
    ----------
    hessian : float32 tensor, shape (E, C, C)
        Without dampening; only the upper triangle is read where there is no order.
    dampening : float
        Fraction of the mean diagonal that is added to the diagonal ("percdamp" in GPTQ).
    block_size : int, default 128
        Columns of a block, the last one may be narrower.
    order : int64 tensor, shape (E, C), or None
        The columns as they are eliminated; None: as they stand.

    Returns
    -------
    factor : float32 tensor, shape (E, C, C)
        On the diagonal the blocks of U = M^-1, the upper triangular matrix whose U^T U is the inverse. Above the
        diagonal M_ab U_bb, by which the errors of block a move block b. Below it anything. The identity where `info` is
        not 0.
    info : int32 tensor, shape (E,), on the CPU
        0, or `NOT_FINITE`, or the order of the minor, counted from the last column, that is not positive definite.

    Notes
    -----
    C^3 / 3 + 2 C^2 block_size operations each, almost all in matrix products. On the CPU one matrix at a time, so that
    none depends on its neighbours; on a GPU all together, where none depends on what its neighbours hold. Departs from
    GPTQ (arXiv:2210.17323), which inverts and factorises again: errors W - Q that are not divided by the inverse's
    factor move the columns after them by M itself, so that only blocks are inverted.
    """
    if hessian.is_cuda:
        return _factorise_together(hessian, dampening, block_size, order)
    factor = torch.empty_like(hessian, memory_format=torch.contiguous_format)
    info = torch.zeros(len(hessian), dtype=torch.int32)
    turned = None if order is None else torch.empty_like(factor[0])
    with full_float32():
        for index, matrix in enumerate(hessian):
            if order is not None and turned is not None:  # rows, in the factor's own memory, then columns
                torch.index_select(matrix, 0, order[index], out=factor[index])
                matrix = torch.index_select(factor[index], 1, order[index], out=turned)
            info[index] = code = _factorise_one(matrix, dampening, block_size, factor[index])
            if code != 0:
                factor[index] = torch.eye(hessian.shape[-1], dtype=hessian.dtype, device=hessian.device)
    return factor, info


def _factorise_one(matrix: Tensor, dampening: float, block_size: int, factor: Tensor) -> int:
    """Write the factor of one (C, C) matrix, from the last block to the first; return its info."""
    if not all_finite(matrix):
        return NOT_FINITE
    columns = len(matrix)
    for start in range(0, columns, block_size):
        factor[start : start + block_size, start:] = matrix[start : start + block_size, start:]
    factor.diagonal().add_(added(matrix, dampening))
    for start in reversed(range(0, columns, block_size)):
        end = min(start + block_size, columns)
        inverse, info = _invert_cholesky(factor[start:end, start:end].flip(0, 1))
        if info != 0:
            return columns - end + info
        upper = inverse.flip(0, 1)
        above = factor[:start, start:end]
        root = above @ upper.T
        for left in range(0, start, _PANEL):
            right = min(left + _PANEL, start)
            factor[:right, left:right].addmm_(root[:right], root[left:right].T, alpha=-1)
        torch.mm(root, upper, out=above)
        factor[start:end, start:end] = upper
        if not all_finite(factor[:end, start:end]):
            return NOT_FINITE
    return 0


def _factorise_together(
    hessian: Tensor, dampening: float, block_size: int, order: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Do what `factorise` says, a block of columns of all matrices at a time; the host waits once, at the end."""
    columns = hessian.shape[-1]
    identity = torch.eye(columns, dtype=hessian.dtype, device=hessian.device)
    finite = all_finite(hessian)
    info = torch.where(finite, 0, NOT_FINITE).to(torch.int32)
    factor = torch.where(finite[:, None, None], hessian, identity)
    if order is not None:  # a matrix at a time: an index of all would take six times their memory
        for own, column in zip(factor, order, strict=True):
            own.copy_(own[column][:, column])
    factor.diagonal(dim1=1, dim2=2).add_(added(factor, dampening)[:, None])
    with full_float32():
        for start in reversed(range(0, columns, block_size)):
            end = min(start + block_size, columns)
            lower, minor = torch.linalg.cholesky_ex(factor[:, start:end, start:end].flip(1, 2))
            info = torch.where((info == 0) & (minor != 0), columns - end + minor, info)
            width = end - start
            upper = torch.linalg.solve_triangular(lower, identity[:width, :width], upper=False).flip(1, 2)
            above = factor[:, :start, start:end]
            root = above @ upper.mT
            for left in range(0, start, _PANEL):
                right = min(left + _PANEL, start)
                factor[:, :right, left:right].baddbmm_(root[:, :right], root[:, left:right].mT, alpha=-1)
            above.copy_(root @ upper)
            factor[:, start:end, start:end] = upper
            info = torch.where((info == 0) & ~all_finite(factor[:, :end, start:end]), NOT_FINITE, info)
    known = info.cpu()
    for index in known.nonzero().flatten().tolist():
        factor[index] = identity
    return factor, known


def _invert_cholesky(matrix: Tensor) -> tuple[Tensor, int]:
    """Return the inverse of the lower Cholesky factor of a matrix, by halves, and 0 or the minor that has none."""
    columns = len(matrix)
    if columns <= _LEAF:
        lower, info = torch.linalg.cholesky_ex(matrix)
        return torch.linalg.solve_triangular(
            lower, torch.eye(columns, dtype=matrix.dtype, device=matrix.device), upper=False
        ), int(info)
    half = columns // 2
    first, info = _invert_cholesky(matrix[:half, :half])
    if info != 0:
        return first, info
    side = matrix[half:, :half] @ first.T
    second, info = _invert_cholesky(torch.addmm(matrix[half:, half:], side, side.T, alpha=-1))
    if info != 0:
        return second, half + info
    inverse = torch.zeros_like(matrix)
    inverse[:half, :half], inverse[half:, half:] = first, second
    inverse[half:, :half] = (second @ side @ first).neg_()
    return inverse, 0


def _per_matrix(tokens: Tensor | int, hessian: Tensor) -> Tensor:
    """Return token counts as float32, shaped to multiply Hessians (..., C, C)."""
    count = torch.as_tensor(tokens, dtype=torch.float32, device=hessian.device)
    if count.shape != hessian.shape[:-2]:
        message = f"tokens has shape {tuple(count.shape)} for Hessians {tuple(hessian.shape)}; "
        raise ShapeError(message + f"expected {tuple(hessian.shape[:-2])}. Pass one count for each expert.")
    return count[..., None, None]
