"""CUDA twin of :mod:`qmoe_lite.matmul`: a warp a row, a lane a codeword, the table in shared memory where it fits."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from qmoe_lite._words import entry_field, entry_length, field_position, field_slot
from qmoe_lite.cuda import launch
from qmoe_lite.cuda.codec import (
    check_validated,
    decode_rows,
    device_table,
    load_code,
    row_starts,
    slot_values,
    warp_scan,
)
from qmoe_lite.cuda.launch import WARP, as_tensor, cuda, kernel
from qmoe_lite.errors import DtypeError, SettingError, ShapeError
from qmoe_lite.packed import PackedMatrix

GATHERED_TOKENS = 4  # up to this many tokens the codewords are walked anew for each
TILE_VALUES = 1 << 24  # float32 values decoded at a time for many tokens: 64 MiB
WARPS = 4  # per block
BLOCKS = 8  # per multiprocessor at most: each loads the table
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_ALL = 0xFFFFFFFF


def decode_matmul(packed: PackedMatrix, x: Any) -> Any:
    """CUDA twin of :func:`qmoe_lite.matmul.decode_matmul`; `x` and the matrix on one GPU, the result a tensor.

    Up to four tokens: a lane adds the products of codewords lane, lane + 32, ... of its row in ascending order, then
    the lanes are added as a tree. More tokens, or activations that are not finite: decoded tiles of rows and
    torch.matmul, in the precision that torch is set to. A matrix that `encode` did not make must have been validated.
    """
    check_validated(packed)
    tokens = _tokens(x, packed)
    if 0 < len(tokens) <= GATHERED_TOKENS and bool(torch.isfinite(tokens).all()):
        y = _gather_product(packed, tokens)
    else:
        y = _tile_product(packed, tokens)
    return y.reshape(*x.shape[:-1], packed.shape[0]).to(as_tensor(x, "x").dtype)


def _tokens(x: Any, packed: PackedMatrix) -> Tensor:
    """Check `x` and return it as a contiguous float32 tensor, shape (T, C)."""
    rows, columns = packed.shape
    tokens = as_tensor(x, "x")
    if tokens.dtype not in _FLOATS:
        raise DtypeError(f"x is {tokens.dtype}; expected float16, bfloat16, float32 or float64. Convert it.")
    if tokens.ndim not in (1, 2) or tokens.shape[-1] != columns:
        raise ShapeError(
            f"x has shape {tuple(tokens.shape)} but the packed matrix is {rows} x {columns}; expected ({columns},) or "
            f"(tokens, {columns}). Reshape x, or transpose it."
        )
    if tokens.device != packed.device:
        raise SettingError(f"x is on {tokens.device} but the matrix on {packed.device}; expected one GPU. Move one.")
    return tokens.to(torch.float32).reshape(-1, columns)


def _tile_product(packed: PackedMatrix, tokens: Tensor) -> Tensor:
    """Product by decoded tiles of rows: tokens (T, C) -> (T, R)."""
    rows, columns = packed.shape
    y = torch.empty(len(tokens), rows, device=tokens.device)
    if not len(tokens):
        return y
    values, starts = slot_values(packed, torch.float32), row_starts(packed)
    tile_rows = max(1, TILE_VALUES // columns)
    for first in range(0, rows, tile_rows):
        tile = torch.zeros(min(tile_rows, rows - first), columns, device=tokens.device)
        decode_rows(packed, values, starts, first, tile)
        y[:, first : first + len(tile)] = tokens @ tile.T
    return y


def _gather_product(packed: PackedMatrix, tokens: Tensor) -> Tensor:
    """Product by adding nonzeros, one walk a token: tokens (T, C) -> (T, R)."""
    codebook, (rows, columns) = packed.codebook, packed.shape
    table, starts = device_table(codebook, tokens.device), row_starts(packed)
    values = slot_values(packed, torch.float32)
    y = torch.empty(len(tokens), rows, device=tokens.device)
    held = len(table) if table.nbytes <= launch.SHARED_BYTES else 0
    blocks = min(-(-rows // WARPS), BLOCKS * launch.multiprocessors(tokens.device))
    sizes = codebook.bits, codebook.digits, codebook.max_nonzeros, rows, columns, held
    for x, sums in zip(tokens, y, strict=True):
        arrays = packed.codes, starts, table, values, x, sums
        _gather_kernel.launch(blocks, WARPS * WARP, *arrays, *sizes, shared_bytes=8 * held)
    return y


@njit(inline="always")
def warp_sum(value: np.float32) -> np.float32:
    """Return the sum of `value` over the warp's lanes, in each of them."""
    for step in (16, 8, 4, 2, 1):
        value += cuda.shfl_xor_sync(_ALL, value, step)
    return value


@kernel("uint8*, int64*, uint64*, float32*, float32*, float32*, int32, int32, int32, int32, int32, int32")
def _gather_kernel(
    codes: Any,
    starts: Any,
    table: Any,
    values: Any,
    x: Any,
    sums: Any,
    bits: int,
    digits: int,
    fields: int,
    rows: int,
    columns: int,
    held: int,
) -> None:
    """Fill sums (R,) with the products of rows and x (C,); values (R, digits); `held` entries in shared memory."""
    entries = cuda.shared.array(0, np.uint64)
    for i in range(cuda.threadIdx.x, held, cuda.blockDim.x):
        entries[i] = table[i]
    cuda.syncthreads()
    lane = np.int32(cuda.threadIdx.x & 31)
    mask = np.int32((1 << bits) - 1)
    row = np.int32(cuda.grid(1) >> 5)
    while row < rows:
        first = starts[row]
        count = np.int32(starts[row + 1] - first)
        base = np.int32(0)
        total = np.float32(0)
        for chunk in range(0, count, WARP):
            entry = np.uint64(0)
            if chunk + lane < count:
                code = load_code(codes, (first + chunk + lane) * bits, mask)
                entry = entries[code] if held > 0 else table[code]
            length = np.int32(entry_length(entry))
            end = warp_scan(length, lane)
            if chunk + lane < count:
                for i in range(fields):
                    field = entry_field(entry, i)
                    position = field_position(field, digits)
                    slot = field_slot(field, position, digits)
                    column = base + end - length + position
                    if slot < digits - 1 and column < columns:  # an absent field is a zero slot
                        total += values[np.int64(row) * digits + slot] * x[column]
            base = np.int32(base + cuda.shfl_sync(_ALL, end, 31))
        total = warp_sum(total)
        if lane == 0:
            sums[row] = total
        row = np.int32(row + (cuda.gridsize(1) >> 5))
