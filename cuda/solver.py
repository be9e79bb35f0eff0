"""CUDA twin of :mod:`qmoe_lite.quantization.solver`: recursion inside a block of columns, a group in one launch.

A thread block has 32 rows of one expert in shared memory and goes through their columns in panels of 16. One warp runs
the recursion inside a panel, a row a lane, the panel in registers; then all four warps carry the panel's errors to the
columns after it, 4 rows by 4 columns a lane. So a word read from shared memory serves four multiplications, and only
the recursion itself waits for one column after another.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from qmoe_lite.cuda.launch import Kernel, as_tensor, cuda, kernel
from qmoe_lite.errors import ShapeError
from qmoe_lite.quantization.hessian import full_float32
from qmoe_lite.quantization.rounding import MOST_STEPS, Rounding, UniformRounding

ROWS = 32  # per block
COLUMNS = 128  # solved at a time; wider blocks are walked in steps
VALUES = 4  # most values a row
_PANEL = 16
_THREADS = 128  # per block: one for each column of the tile where the factor is read
_WARPS = _THREADS // 32
_SIDE = 4  # rows, and columns, that a lane has of the columns after a panel
_SQUARE = _SIDE * _SIDE
_TILE = _THREADS * ROWS
_FACTORS = 2 * _PANEL * _THREADS + _PANEL  # two panels; a lane reads a little more than it needs
_WIDEST = 1 << 24  # pitch, so that places within a tile fit 32 bits
_ALL = 0xFFFFFFFF
_index = np.uint64  # a place without a sign: numba's test for a negative one keeps loads from being joined


def solve_block(block: Tensor, factor: Tensor, table: Rounding) -> tuple[Tensor, Tensor]:
    """CUDA twin of :func:`qmoe_lite.quantization.solver.solve_block`.

    The grid is (tiles of 32 rows, E). A block of more than 128 columns is solved in steps of 128 with a matrix product
    between, in full float32. Corrections are subtracted in the CPU's order, but a multiplication and
    a subtraction are rounded once together, so a digit near a threshold may differ. Errors are rounded as a division
    is. Columns whose rows lie next to each other, as on the CPU, and a factor whose columns do are read where they are.

    Raises
    ------
    SettingError
        An argument is not on a GPU.
    ShapeError
        Shapes that do not go together, or more than four values a row.
    """
    source, upper = (as_tensor(part, name, strided=True) for part, name in ((block, "block"), (factor, "factor")))
    parts, last = _parts_of(table)
    _check_shapes(source, upper, table, parts)
    experts, rows, columns = source.shape
    errors = torch.empty((experts, columns, rows), dtype=torch.float32, device=source.device)
    digits = torch.empty(errors.shape, dtype=table.digit_dtype, device=source.device)
    source = source.mT
    if columns > COLUMNS or (rows > 1 and source.stride(2) != 1) or source.stride(1) > _WIDEST:
        source = errors.copy_(source)
    if (columns > 1 and upper.stride(2) != 1) or upper.stride(1) > _WIDEST:
        upper = upper.contiguous()
    grid = -(-rows // ROWS), experts
    solve = _UNIFORM_KERNEL if isinstance(table, UniformRounding) else _TABLE_KERNEL
    for start in range(0, columns, COLUMNS):
        end = min(start + COLUMNS, columns)
        blocks = source[:, start:end], errors[:, start:end], digits[:, start:end], upper[:, start:end, start:end]
        steps = source.stride(0), source.stride(1), columns * rows, upper.stride(0), upper.stride(1)
        solve.launch(grid, _THREADS, *map(_flat, blocks), *parts, *steps, rows, end - start, last)
        if end < columns:
            with full_float32():
                errors[:, end:].baddbmm_(upper[:, start:end, end:].mT, errors[:, start:end], alpha=-1)
    return digits.mT, errors.mT


def _flat(part: Tensor) -> Tensor:
    """Return what memory holds from a tensor's first element to its last."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(part.shape, part.stride(), strict=True))
    return part.as_strided((span,), (1,))


def _parts_of(table: Rounding) -> tuple[tuple[Tensor, Tensor, Tensor], float]:
    """Return the arrays and the number that a kernel rounds by."""
    if isinstance(table, UniformRounding):
        inverses = as_tensor(table.inverses, "table.inverses")
        return (as_tensor(table.steps, "table.steps"), inverses, inverses), table.shift
    values, thresholds = as_tensor(table.values, "table.values"), as_tensor(table.thresholds, "table.thresholds")
    return (values, thresholds, as_tensor(table.digits, "table.digits")), values.shape[-1]


def _check_shapes(block: Tensor, factor: Tensor, table: Rounding, parts: tuple[Tensor, Tensor, Tensor]) -> None:
    if block.ndim != 3 or block.numel() == 0 or factor.shape != (len(block), block.shape[-1], block.shape[-1]):
        message = f"block has shape {tuple(block.shape)} and factor {tuple(factor.shape)}; "
        raise ShapeError(message + "expected (E, R, B) and (E, B, B), none of them 0. Pass parts of the same columns.")
    values, thresholds, _ = parts
    if isinstance(table, UniformRounding):
        if not values.shape == thresholds.shape == block.shape[:-1]:
            message = f"steps have shape {tuple(values.shape)}, inverses {tuple(thresholds.shape)}; "
            raise ShapeError(message + f"expected {tuple(block.shape[:-1])}. Use what grid.rounding() returned.")
        return
    if values.ndim != 3 or values.shape[:-1] != block.shape[:-1] or values.shape[-1] > VALUES:
        message = f"the table has values {tuple(values.shape)} for a block {tuple(block.shape)}; "
        raise ShapeError(message + f"expected the same E and R, and at most {VALUES} values. Use the block's table.")
    if thresholds.shape != (*values.shape[:-1], values.shape[-1] - 1):
        message = f"thresholds have shape {tuple(thresholds.shape)} for values {tuple(values.shape)}; "
        raise ShapeError(message + "expected one fewer a row. Use what grid.rounding() returned.")


@njit(forceinline=True)
def _load_panel(factor: Any, corner: Any, pitch: Any, first: int, width: int, factors: Any, thread: int) -> None:
    """Copy rows `first` to first + 15 of a column of the factor to shared memory; behind the last row, that one."""
    read = cuda.local.array(_PANEL, np.float32)  # all before the first is written: they are waited for once
    last = np.int32(width - 1)
    column = corner + _index(np.uint32(min(np.int32(thread), last)))
    for i in range(_PANEL):
        line = np.uint32(min(np.int32(first + i), last))
        read[i] = factor[column + _index(np.uint32(line * pitch))]
    at = _index(np.uint32((first & _PANEL) * _THREADS + thread))
    for i in range(_PANEL):
        factors[at + _index(_THREADS * i)] = read[i]


@njit(forceinline=True)
def _solve_column(held: Any, factors: Any, corner: Any, inverses: Any, table: Any, first: int, at: int) -> Any:
    """Round column first + at of a panel, of which a lane holds those from `first` on; return the digit."""
    values, thresholds, symbols = table
    weight = held[at]
    value, digit = values[0], symbols[0]
    above = weight > thresholds[0]
    value, digit = values[1] if above else value, symbols[1] if above else digit
    above = weight > thresholds[1]
    value, digit = values[2] if above else value, symbols[2] if above else digit
    above = weight > thresholds[2]
    value, digit = values[3] if above else value, symbols[3] if above else digit
    _correct(held, factors, corner, inverses, np.float32(weight - value), first, at)
    return digit


@njit(forceinline=True)
def _solve_uniform_column(
    held: Any, factors: Any, corner: Any, inverses: Any, multiple: Any, first: int, at: int
) -> Any:
    """Do what `_solve_column` does, rounding to a multiple of the lane's step: that, its inverse or 0, the shift."""
    step, inverse, shift = multiple
    weight = held[at]
    most = np.float32(MOST_STEPS)
    size = np.float32(np.float32(abs(np.float32(weight * inverse))) + shift)
    size = np.float32(np.int32(size if size < most else most))
    digit = size if weight > np.float32(0) else np.float32(-size)
    _correct(held, factors, corner, inverses, np.float32(weight - np.float32(digit * step)), first, at)
    return np.int16(np.int32(digit))


@njit(forceinline=True)
def _correct(held: Any, factors: Any, corner: Any, inverses: Any, missing: Any, first: int, at: int) -> None:
    """Put the error of column first + at, of which `missing` is left, in its place, and correct those after it.

    The quotient is that of a division: an approximate one and what it leaves, by the pivot's inverse, which was rounded
    once.
    """
    line = corner + _index(_THREADS * at)
    inverse = cuda.shfl_sync(_ALL, inverses, first + at)
    quotient = np.float32(missing * inverse)
    error = cuda.fma(cuda.fma(-quotient, factors[line + _index(at)], missing), inverse, quotient)
    held[at] = error
    for later in range(_PANEL):
        if later > at:
            held[later] -= error * factors[line + _index(later)]


@njit(forceinline=True)
def _subtract_outer(held: Any, tile: Any, error_at: Any, factors: Any, factor_at: Any) -> None:
    """Subtract 4 errors times 4 factors from the 4 by 4 that a lane holds, a column's rows side by side."""
    for column in range(_index(_SIDE)):
        for row in range(_index(_SIDE)):
            held[_index(_SIDE) * column + row] -= tile[error_at + row] * factors[factor_at + column]


def block_kernel(uniform: bool) -> Kernel:
    """Return the kernel that rounds by a table of values, or, `uniform`, to multiples of a row's step.

    The latter gets steps for values, their inverses for thresholds, anything for symbols, and the shift for n_values.
    """
    digit, symbol, last = ("int16", "float32", "float32") if uniform else ("int8", "int8", "int32")
    digit_type = np.int16 if uniform else np.int8

    @kernel(
        f"float32*, float32*, {digit}*, float32*, float32*, float32*, {symbol}*, "
        f"uint64, uint32, uint64, uint64, uint32, int32, int32, {last}",
        bounds=(_THREADS, 4),
    )
    def _block_kernel(
        source: Any,
        errors: Any,
        digits: Any,
        factor: Any,
        values: Any,
        thresholds: Any,
        symbols: Any,
        source_step: Any,
        source_pitch: Any,
        error_step: Any,
        factor_step: Any,
        factor_pitch: Any,
        rows: int,
        width: int,
        n_values: Any,
    ) -> None:
        """Write errors (E, width, rows) and digits of source (E, width, rows); factor (E, width, width) is upper.

        A step leads from one expert to the next, a pitch from one column (of the factor: row) to the next; errors and
        digits have the pitch `rows`. What lies behind the last row or column does what that one does, and is not
        written.
        """
        tile = cuda.shared.array(_TILE, np.float32, alignment=16)
        factors = cuda.shared.array(_FACTORS, np.float32, alignment=16)
        thread = np.int32(cuda.threadIdx.x)
        lane = np.int32(thread & 31)
        warp = np.int32(cuda.shfl_sync(_ALL, np.int32(thread >> 5), 0))  # so that the compiler knows it for uniform
        expert = _index(np.uint32(cuda.blockIdx.y))
        live = np.int32(cuda.blockIdx.x * ROWS + lane) < rows
        row = _index(np.uint32(min(np.int32(cuda.blockIdx.x * ROWS + lane), np.int32(rows - 1))))
        unit = expert * _index(np.uint32(rows)) + row
        source_at = expert * source_step + row
        corner = expert * factor_step
        first = np.int32(0)
        while first < width:
            read = cuda.local.array(_PANEL, np.float32)
            for i in range(_PANEL):
                column = np.uint32(min(np.int32(first + warp + _WARPS * i), np.int32(width - 1)))
                read[i] = source[source_at + _index(np.uint32(column * source_pitch))]
            own = _index(np.uint32((first + warp) * ROWS + lane))
            for i in range(_PANEL):
                tile[own + _index(ROWS * _WARPS * i)] = read[i]
            first = np.int32(first + _PANEL * _WARPS)
        first = np.int32(0)
        while first < min(width, 2 * _PANEL):
            _load_panel(factor, corner, factor_pitch, first, width, factors, thread)
            first = np.int32(first + _PANEL)
        if uniform:
            multiple = values[unit], thresholds[unit], np.float32(n_values)
        else:
            infinite = np.float32(np.inf)  # a value that a row has not is never chosen
            kept = np.int64(unit) * n_values
            gaps = np.int64(kept - np.int64(unit))
            table = (
                (
                    values[kept],
                    values[kept + 1] if n_values > 1 else np.float32(0),
                    values[kept + 2] if n_values > 2 else np.float32(0),
                    values[kept + 3] if n_values > 3 else np.float32(0),
                ),
                (
                    thresholds[gaps] if n_values > 1 else infinite,
                    thresholds[gaps + 1] if n_values > 2 else infinite,
                    thresholds[gaps + 2] if n_values > 3 else infinite,
                ),
                (
                    symbols[kept],
                    symbols[kept + 1] if n_values > 1 else np.int8(0),
                    symbols[kept + 2] if n_values > 2 else np.int8(0),
                    symbols[kept + 3] if n_values > 3 else np.int8(0),
                ),
            )
        first = np.int32(0)
        while first < width:
            cuda.syncthreads()
            buffer = np.uint32((first & _PANEL) * _THREADS)
            if warp != 0:  # the first two panels are there; of others no column of the first warp is needed
                if 0 < first < 32 * warp + 32 - _PANEL:
                    _load_panel(factor, corner, factor_pitch, np.int32(first + _PANEL), width, factors, thread)
            else:
                own = _index(np.uint32(first * ROWS + lane))
                line = _index(np.uint32(buffer + first))
                diagonal = _index(np.uint32((lane & (_PANEL - 1)) * (_THREADS + 1)))
                inverses = np.float32(np.float32(1) / factors[line + diagonal])
                place = expert * error_step + row + _index(np.uint32(first * rows))
                held = cuda.local.array(_PANEL, np.float32)
                chosen = cuda.local.array(_SIDE, digit_type)
                for i in range(_PANEL):
                    held[i] = tile[own + _index(ROWS * i)]
                step = np.int32(0)
                while step < _PANEL:
                    if uniform:
                        chosen[0] = _solve_uniform_column(held, factors, line, inverses, multiple, step, 0)
                        chosen[1] = _solve_uniform_column(held, factors, line, inverses, multiple, step, 1)
                        chosen[2] = _solve_uniform_column(held, factors, line, inverses, multiple, step, 2)
                        chosen[3] = _solve_uniform_column(held, factors, line, inverses, multiple, step, 3)
                    else:
                        chosen[0] = _solve_column(held, factors, line, inverses, table, step, 0)
                        chosen[1] = _solve_column(held, factors, line, inverses, table, step, 1)
                        chosen[2] = _solve_column(held, factors, line, inverses, table, step, 2)
                        chosen[3] = _solve_column(held, factors, line, inverses, table, step, 3)
                    for i in range(_SIDE):
                        tile[own + _index(ROWS * i)] = held[i]
                        if live and first + step + i < width:
                            errors[place] = held[i]
                            digits[place] = chosen[i]
                        place += _index(np.uint32(rows))
                    for i in range(_PANEL - _SIDE):
                        held[i] = held[i + _SIDE]
                    own += _index(ROWS * _SIDE)
                    line += _index((_THREADS + 1) * _SIDE)
                    step = np.int32(step + _SIDE)
            cuda.syncthreads()
            after = np.int32(first + _PANEL + _PANEL * warp)
            while after < width:
                error_at = _index(np.uint32((lane & 7) * _SIDE))
                factor_at = _index(np.uint32(after + (lane >> 3) * _SIDE))
                own = factor_at * _index(ROWS) + error_at
                error_at += _index(np.uint32(first * ROWS))
                factor_at += _index(buffer)
                rest = cuda.local.array(_SQUARE, np.float32)
                for there in range(_index(_SIDE)):
                    for i in range(_index(_SIDE)):
                        rest[_index(_SIDE) * there + i] = tile[own + _index(ROWS) * there + i]
                step = np.int32(0)
                while step < _PANEL:
                    _subtract_outer(rest, tile, error_at, factors, factor_at)
                    _subtract_outer(rest, tile, error_at + _index(ROWS), factors, factor_at + _index(_THREADS))
                    _subtract_outer(rest, tile, error_at + _index(2 * ROWS), factors, factor_at + _index(2 * _THREADS))
                    _subtract_outer(rest, tile, error_at + _index(3 * ROWS), factors, factor_at + _index(3 * _THREADS))
                    error_at += _index(4 * ROWS)
                    factor_at += _index(4 * _THREADS)
                    step = np.int32(step + 4)
                for there in range(_index(_SIDE)):
                    for i in range(_index(_SIDE)):
                        tile[own + _index(ROWS) * there + i] = rest[_index(_SIDE) * there + i]
                after = np.int32(after + _PANEL * _WARPS)
            first = np.int32(first + _PANEL)

    return _block_kernel


_TABLE_KERNEL, _UNIFORM_KERNEL = block_kernel(False), block_kernel(True)
