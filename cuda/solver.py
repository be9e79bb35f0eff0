"""CUDA twin of :mod:`qmoe_lite.solver`: the recursion inside a block of columns, one thread a row."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from qmoe_lite._words import level_index
from qmoe_lite.cuda.launch import as_tensor, cuda, kernel
from qmoe_lite.errors import ShapeError
from qmoe_lite.grid import RoundingTable

ROWS = 32  # per block, one thread each
COLUMNS = 128  # of a tile in shared memory; wider blocks are walked in steps
GAPS = 3  # thresholds a row: an alphabet has at most four digits
_PITCH = ROWS + 1  # a row and a column of the tile both touch each memory bank once
_TILE = COLUMNS * _PITCH


def solve_block(block: Tensor, factor: Tensor, table: RoundingTable) -> tuple[Tensor, Tensor]:
    """CUDA twin of :func:`qmoe_lite.solver.solve_block`.

    The grid is (tiles of 32 rows, E). A block of more than 128 columns is solved in steps of 128 with a matrix product
    between, which the caller keeps out of TF32. The order of subtractions is the CPU's; a multiplication and a
    subtraction are rounded once together, so a digit near a threshold may differ.

    Raises
    ------
    SettingError
        An argument is not on a GPU.
    ShapeError
        Shapes that do not go together, or more than four values a row.
    """
    errors = as_tensor(block, "block").clone()
    upper = as_tensor(factor, "factor")
    values, thresholds = as_tensor(table.values, "table.values"), as_tensor(table.thresholds, "table.thresholds")
    symbols = as_tensor(table.digits, "table.digits")
    _check_shapes(errors, upper, values, thresholds)
    experts, rows, columns = errors.shape
    padding = thresholds.new_full((experts, rows, GAPS - thresholds.shape[-1]), torch.inf)
    thresholds = torch.cat((thresholds, padding), dim=-1)
    digits = torch.empty(errors.shape, dtype=torch.int8, device=errors.device)
    grid = -(-rows // ROWS), experts
    for start in range(0, columns, COLUMNS):
        end = min(start + COLUMNS, columns)
        sizes = rows, columns, start, end - start, values.shape[-1]
        _block_kernel.launch(grid, ROWS, errors, digits, upper, values, thresholds, symbols, *sizes)
        if end < columns:
            errors[:, :, end:].baddbmm_(errors[:, :, start:end], upper[:, start:end, end:], alpha=-1)
    return digits, errors


def _check_shapes(block: Tensor, factor: Tensor, values: Tensor, thresholds: Tensor) -> None:
    if block.ndim != 3 or block.numel() == 0 or factor.shape != (len(block), block.shape[-1], block.shape[-1]):
        message = f"block has shape {tuple(block.shape)} and factor {tuple(factor.shape)}; "
        raise ShapeError(message + "expected (E, R, B) and (E, B, B), none of them 0. Pass parts of the same columns.")
    if values.ndim != 3 or values.shape[:-1] != block.shape[:-1] or thresholds.shape[-1] > GAPS:
        message = f"the table has values {tuple(values.shape)} for a block {tuple(block.shape)}; "
        raise ShapeError(message + f"expected the same E and R, and at most {GAPS + 1} values. Use the block's table.")
    if thresholds.shape != (*values.shape[:-1], values.shape[-1] - 1):
        message = f"thresholds have shape {tuple(thresholds.shape)} for values {tuple(values.shape)}; "
        raise ShapeError(message + "expected one fewer a row. Use what grid.rounding() returned.")


@kernel("float32*, int8*, float32*, float32*, float32*, int8*, int32, int32, int32, int32, int32")
def _block_kernel(
    block: Any,
    digits: Any,
    factor: Any,
    values: Any,
    thresholds: Any,
    symbols: Any,
    rows: int,
    columns: int,
    first: int,
    width: int,
    n_values: int,
) -> None:
    """Turn columns first to first + width of block (E, R, C) into errors, write their digits; factor (E, C, C)."""
    tile = cuda.shared.array(_TILE, np.float32)
    thread = cuda.threadIdx.x
    expert = cuda.blockIdx.y
    first_row = cuda.blockIdx.x * ROWS
    first_unit = np.int64(expert) * rows + first_row
    held = min(ROWS, rows - first_row)
    for row in range(held):
        start = (first_unit + row) * columns + first
        for column in range(thread, width, ROWS):
            tile[column * _PITCH + row] = block[start + column]
    cuda.syncthreads()
    if thread < held:
        unit = first_unit + thread
        gaps = thresholds[unit * GAPS], thresholds[unit * GAPS + 1], thresholds[unit * GAPS + 2]
        corner = (np.int64(expert) * columns + first) * columns + first
        for column in range(width):
            upper = corner + np.int64(column) * columns
            weight = tile[column * _PITCH + thread]
            index = level_index(weight, gaps)
            digits[unit * columns + first + column] = symbols[unit * n_values + index]
            error = (weight - values[unit * n_values + index]) / factor[upper + column]
            tile[column * _PITCH + thread] = error
            for later in range(column + 1, width):
                tile[later * _PITCH + thread] -= error * factor[upper + later]
    cuda.syncthreads()
    for row in range(held):
        start = (first_unit + row) * columns + first
        for column in range(thread, width, ROWS):
            block[start + column] = tile[column * _PITCH + row]
