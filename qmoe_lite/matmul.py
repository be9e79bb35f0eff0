"""y = W x straight from the codewords: W is never written out as a whole.

One or a few tokens: a codeword costs one table look-up and one indexed load and add a nonzero, without a branch or a
multiplication. More tokens: a tile of rows is decoded into a small float32 buffer and multiplied by BLAS.
Floor for one token: the bytes of `packed.codes`, some 25 times fewer than bfloat16 weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit, prange
from numpy.typing import NDArray

from qmoe_lite._stream import load_word, row_starts
from qmoe_lite._words import entry_field, entry_length
from qmoe_lite.codec import decode_rows, kernel_fields, slot_values
from qmoe_lite.codewords import MAX_WEIGHTS
from qmoe_lite.errors import DtypeError, SettingError, ShapeError
from qmoe_lite.packed import PackedMatrix
from qmoe_lite.validation import prepare

GATHERED_SUMS = 8  # up to this many sums a row (tokens x levels) the codewords are walked anew for each pair of them
TILE_VALUES = 1 << 20  # float32 values decoded at a time for many tokens: 4 MiB, 256 rows of 4096
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def decode_matmul(packed: PackedMatrix, x: Any) -> Any:
    """Multiply a packed matrix by one or more activation vectors.

    Parameters
    ----------
    packed : PackedMatrix
        (R, C), on the CPU.
    x : float16, float32, float64 or bfloat16 array or CPU tensor, shape (C,) or (T, C)
        Any strides; T may be 0.

    Returns
    -------
    y : like `x` in dtype and container, shape (R,) or (T, R)
        Computed in float32, whatever the dtype; no gradient.

    Raises
    ------
    ShapeError
        `x` does not have C columns.
    DtypeError
        `x` is no float array.
    SettingError
        `packed` or `x` is on a GPU.
    FormatError
        `packed` did not come from `encode` and does not decode; found at its first use, see `validate`.

    Notes
    -----
    Same bytes for any number of Numba threads. Few tokens (T * L up to 8): a row's codewords are summed in four
    interleaved chains (codeword k of the row into chain k % 4, those after the last whole four into chain 0), each
    level's sum is scaled at the end. More tokens, or activations that are not finite: decoded tiles of rows and
    torch.matmul, so NaN spreads as in a dense product.
    QMoE (arXiv:2310.16795), section 4.3; departs from it in adding nonzeros only.
    """
    prepare(packed)
    tokens = _tokens(x, packed)
    terms = len(tokens) * packed.levels.shape[1]
    if 0 < terms <= GATHERED_SUMS and bool(torch.isfinite(tokens).all()):
        y = _gather_product(packed, tokens.numpy())
    else:
        y = _tile_product(packed, tokens)
    y = y.reshape(*x.shape[:-1], packed.shape[0])
    return y.to(x.dtype) if isinstance(x, torch.Tensor) else y.to(getattr(torch, x.dtype.name)).numpy()


def _tokens(x: Any, packed: PackedMatrix) -> torch.Tensor:
    """Check `x` and return it as a contiguous float32 tensor, shape (T, C)."""
    rows, columns = packed.shape
    if isinstance(x, torch.Tensor):
        known = x.dtype in _FLOATS
    else:
        known = isinstance(x, np.ndarray) and x.dtype in (np.float16, np.float32, np.float64)
    if not known:
        found = getattr(x, "dtype", type(x).__name__)
        raise DtypeError(f"x is {found}; expected a float16, bfloat16, float32 or float64 array or tensor. Convert it.")
    if x.ndim not in (1, 2) or x.shape[-1] != columns:
        raise ShapeError(
            f"x has shape {tuple(x.shape)} but the packed matrix is {rows} x {columns}; expected ({columns},) or "
            f"(tokens, {columns}). Reshape x, or transpose it."
        )
    if isinstance(x, np.ndarray):
        return torch.from_numpy(np.array(x, dtype=np.float32, order="C")).reshape(-1, columns)
    if x.device.type != "cpu":
        raise SettingError(f"x is on {x.device}; this product works on the CPU. Call x.cpu() and packed.to('cpu').")
    tokens: torch.Tensor = x.detach().to(torch.float32).contiguous().reshape(-1, columns)
    return tokens


def _tile_product(packed: PackedMatrix, tokens: torch.Tensor) -> torch.Tensor:
    """Product by decoded tiles of rows: tokens (T, C) -> (T, R)."""
    rows, columns = packed.shape
    y = torch.empty(len(tokens), rows)
    if not len(tokens):
        return y
    values, starts = slot_values(packed, torch.float32), row_starts(packed.row_codewords.numpy())
    tile = torch.empty(min(rows, max(1, TILE_VALUES // columns)), columns)
    for first in range(0, rows, len(tile)):
        part = tile[: rows - first]
        decode_rows(packed, values, starts, first, part)
        y[:, first : first + len(part)] = tokens @ part.T
    return y


def _gather_product(packed: PackedMatrix, tokens: NDArray[np.float32]) -> torch.Tensor:
    """Product by adding slots of x, two sums a walk: tokens (T, C) -> (T, R)."""
    codebook, width = packed.codebook, packed.levels.shape[1]
    lanes = _slot_lanes(tokens, codebook.digits, width)
    starts = row_starts(packed.row_codewords.numpy())
    sums = np.empty((len(lanes), packed.shape[0]), dtype=np.float32)
    for i in range(0, len(lanes), 2):
        pair = len(lanes) - i > 1
        x_slots = np.empty(lanes.shape[1:], dtype=np.complex64) if pair else lanes[i]
        if pair:
            x_slots.real, x_slots.imag = lanes[i], lanes[i + 1]
        row_sums = np.empty(packed.shape[0], dtype=x_slots.dtype)
        arguments = codebook.table, codebook.bits, codebook.digits, kernel_fields(codebook), x_slots.ravel()
        _gather_kernel(packed.codes.numpy(), starts, *arguments, row_sums)
        sums[i] = row_sums.real
        if pair:
            sums[i + 1] = row_sums.imag
    terms = torch.from_numpy(sums).reshape(len(tokens), width, -1)
    levels = packed.levels.to(torch.float32).T.contiguous()
    y = levels[0] * terms[:, 0]
    for i in range(1, width):
        y += levels[i] * terms[:, i]
    return y


def _slot_lanes(tokens: NDArray[np.float32], digits: int, width: int) -> NDArray[np.float32]:
    """Lay x out as slots, one layer a token and level: (T * L, C + padding, digits); 0 where nothing is to be added."""
    n_tokens, columns = tokens.shape
    lanes = np.zeros((n_tokens, width, columns + MAX_WEIGHTS[digits], digits), dtype=np.float32)
    if width == 1:
        lanes[:, 0, :columns, 0] = tokens
        lanes[:, 0, :columns, 1] = -tokens
    else:
        for level in range(width):
            slot = 1 - level if digits == 3 else level
            lanes[:, level, :columns, slot] = tokens
    return lanes.reshape(n_tokens * width, -1, digits)


@njit(inline="always")
def _gather(x_slots: NDArray[Any], start: np.uint64, entry: np.uint64, fields: tuple[int, ...]) -> Any:
    """Sum of a codeword's nonzeros; an absent one adds the zero slot."""
    total = x_slots[start + np.uint64(entry_field(entry, 0))]
    for i in range(1, len(fields)):
        total += x_slots[start + np.uint64(entry_field(entry, i))]
    return total


@njit(parallel=True, cache=True, fastmath=False)
def _gather_kernel(
    codes: NDArray[np.uint8],
    starts: NDArray[np.int64],
    table: NDArray[np.uint64],
    bits: int,
    digits: int,
    fields: tuple[int, ...],
    x_slots: NDArray[Any],
    sums: NDArray[Any],
) -> None:
    """Fill sums (R,) from x_slots ((C + padding) * digits,), float32 or complex64 = two sums at once."""
    mask = np.uint64((1 << bits) - 1)
    n_bits = np.uint64(bits)
    stride = np.uint64(digits)
    for row in prange(len(sums)):
        bit = np.uint64(starts[row]) * n_bits
        end = np.uint64(starts[row + 1]) * n_bits
        start = np.uint64(0)
        sum0 = sum1 = sum2 = sum3 = x_slots[-1]  # the last slot is a zero slot
        while bit + np.uint64(3) * n_bits < end:
            word = load_word(codes, bit)  # 4 codewords: at most 7 + 48 of its bits, or 64 where bits is 16
            entry0 = table[word & mask]
            entry1 = table[(word >> n_bits) & mask]
            entry2 = table[(word >> np.uint64(2) * n_bits) & mask]
            entry3 = table[(word >> np.uint64(3) * n_bits) & mask]
            start1 = start + stride * entry_length(entry0)
            start2 = start1 + stride * entry_length(entry1)
            start3 = start2 + stride * entry_length(entry2)
            sum0 += _gather(x_slots, start, entry0, fields)
            sum1 += _gather(x_slots, start1, entry1, fields)
            sum2 += _gather(x_slots, start2, entry2, fields)
            sum3 += _gather(x_slots, start3, entry3, fields)
            start = start3 + stride * entry_length(entry3)
            bit += np.uint64(4) * n_bits
        while bit < end:
            entry = table[load_word(codes, bit) & mask]
            sum0 += _gather(x_slots, start, entry, fields)
            start += stride * entry_length(entry)
            bit += n_bits
        sums[row] = (sum0 + sum1) + (sum2 + sum3)
