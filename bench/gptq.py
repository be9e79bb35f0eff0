"""Our CPU solver against GPTQ as in published code: a plain loop over columns in torch, one expert after another.

Both get the same weights, Hessians, dampening and grid. They take turns, a group of experts at a time, and no figure is
given unless both found the same digits.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from qmoe_lite.bench._parts.common import limited_threads, machine_line
from qmoe_lite.errors import QMoEError, SettingError
from qmoe_lite.quantization.grid import MinMaxTernary, Quantized
from qmoe_lite.quantization.hessian import factorise
from qmoe_lite.quantization.solver import gptq

SHAPES = ((768, 3072), (2048, 768))  # rows = outputs, columns = inputs: Switch base wo, Qwen3-30B-A3B down_proj
EXPERTS = 16
GROUP = 4  # experts between two turns
DAMPENING, BLOCK = 0.1, 128
SAME = 0.999  # share of digits: a sum in another order may round a weight near a threshold the other way


@dataclass(frozen=True)
class Speed:
    """Seconds an expert of one shape, the median of the groups, and the share of equal digits."""

    rows: int
    columns: int
    ours: float
    ours_factorisation: float
    torch: float
    torch_factorisation: float
    same: float


@dataclass(frozen=True)
class GptqReport:
    """What `measure` found, and where."""

    speeds: tuple[Speed, ...]
    experts: int
    threads: int
    seed: int
    machine: str

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return asdict(self)


def measure(
    experts: int = EXPERTS, threads: int = 1, seed: int = 0, shapes: tuple[tuple[int, int], ...] = SHAPES
) -> GptqReport:
    """Time both solvers on the same random experts.

    Parameters
    ----------
    experts : int, default 16
        Of each shape.
    threads : int, default 1
        For torch and for Numba.
    seed : int
        Seed for weights and Hessians.
    shapes : tuple of (rows, columns)
        Rows are outputs, columns inputs: a Hessian is columns x columns.

    Raises
    ------
    SettingError
        No experts, or more threads than there are.
    QMoEError
        The solvers found different digits.

    Notes
    -----
    Ours finds the levels and measures the error of the outputs within its time; the loop gets the levels, and sums up
    its losses as the published code does.
    """
    if experts < 1:
        raise SettingError(f"experts is {experts}; expected at least 1.")
    with limited_threads(threads):
        gptq(torch.ones(2, 3), torch.eye(3), MinMaxTernary())  # compiles
        speeds = tuple(_measure_shape(*shape, experts, torch.Generator().manual_seed(seed)) for shape in shapes)
    return GptqReport(speeds, experts, threads, seed, machine_line("torch", "numba"))


def _measure_shape(rows: int, columns: int, experts: int, generator: torch.Generator) -> Speed:
    seconds, same = [], []
    for first in range(0, experts, GROUP):
        weight, hessian = _draw(min(GROUP, experts - first), rows, columns, generator)
        times, share = _take_turns(weight, hessian)
        if share < SAME:
            message = f"the solvers agree on {share:.2%} of the digits of {rows} x {columns}; expected {SAME:.1%}. "
            raise QMoEError(message + "Please report this as a bug.")
        seconds.append([of / len(weight) for of in times])
        same += [share] * len(weight)
    ours, our_factors, loop, loop_factors = (statistics.median(of) for of in zip(*seconds, strict=True))
    return Speed(rows, columns, ours, our_factors, loop, loop_factors, statistics.mean(same))


def _take_turns(weight: Tensor, hessian: Tensor) -> tuple[tuple[float, ...], float]:
    """Time ours, its factorisation by itself, the loop and its factorisation; return the share of equal digits too."""
    grid = MinMaxTernary()
    levels = grid.fit(weight)
    start = time.perf_counter()
    ours: Quantized = gptq(weight, hessian, grid, dampening=DAMPENING, block_size=BLOCK)
    ours_end = time.perf_counter()
    factorise(hessian, DAMPENING, BLOCK)
    factorised = time.perf_counter()
    factors = [inverse_factor(matrix) for matrix in hessian]
    torch_factorised = time.perf_counter()
    plain = [column_loop(*of)[0] for of in zip(weight, factors, levels, strict=True)]
    end = time.perf_counter()
    times = ours_end - start, factorised - ours_end, end - factorised, torch_factorised - factorised
    return times, (torch.stack(plain) == ours.weight).float().mean().item()


def _draw(experts: int, rows: int, columns: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return weights (E, R, C), and Hessians (E, C, C) of inputs that differ in size and have a part in common."""
    weight = torch.randn(experts, rows, columns, generator=generator)
    hessian = torch.empty(experts, columns, columns)
    for expert in range(experts):
        size = torch.exp(torch.randn(columns, generator=generator) / 2)
        tokens = torch.randn(columns // 4 + 1, columns + 1, generator=generator)
        x = tokens[:, :-1] * size + 0.3 * tokens[:, -1:]
        torch.mm(x.T, x, out=hessian[expert])
    return weight, hessian


def inverse_factor(hessian: Tensor) -> Tensor:
    """Factorise the inverse of a dampened Hessian (C, C) as U^T U the published way: factorise, invert, factorise."""
    damped = hessian.clone()
    damped.diagonal().add_(DAMPENING * hessian.diagonal().mean())
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)


def column_loop(weight: Tensor, factor: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Round one expert's weight (R, C), a column at a time, with torch's operations on whole columns.

    Parameters
    ----------
    weight : float32 tensor, shape (R, C)
        Is not modified.
    factor : float32 tensor, shape (C, C)
        From `inverse_factor`.
    levels : float32 tensor, shape (R, 2)
        Each row's minimum and maximum.

    Returns
    -------
    rounded : float32 tensor, shape (R, C)
        The level of each weight, or 0.
    losses : float32 tensor, shape (R, C)
        What each rounding adds to the error of the outputs.

    Notes
    -----
    GPTQ (arXiv:2210.17323), algorithm 1.
    """
    low, high = levels.T
    rest, columns = weight.clone(), weight.shape[1]
    rounded, losses = torch.zeros_like(weight), torch.zeros_like(weight)
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        block, upper = rest[:, start:end].clone(), factor[start:end, start:end]
        errors = torch.zeros_like(block)
        for column in range(end - start):
            w, pivot = block[:, column], upper[column, column]
            q = (w > high / 2) * high + (w < low / 2) * low
            error = (w - q) / pivot
            block[:, column:] -= error[:, None] @ upper[None, column, column:]
            errors[:, column] = error
            rounded[:, start + column] = q
            losses[:, start + column] = error**2 / 2
        rest[:, end:] -= errors @ factor[start:end, end:]
    return rounded, losses
