"""y = W x straight from the codewords: W is never written out as a whole.

One or a few tokens: a codeword costs one table look-up and one indexed load and add a nonzero, without a branch or a
multiplication. More tokens: a row's codewords are walked once for a block of up to 64 tokens, whose sums stay in vector
registers; a nonzero costs one multiply-add a vector, a zero nothing.
Floor for one token: the bytes of `packed.codes`, some 25 times fewer than bfloat16 weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit, prange
from numpy.typing import NDArray

from qmoe_lite._stream import load_word, row_starts
from qmoe_lite._vectors import add_multiple, store, zeros
from qmoe_lite._words import entry_field, entry_length
from qmoe_lite.codec import decode_rows, kernel_fields, slot_values
from qmoe_lite.codewords import MAX_WEIGHTS
from qmoe_lite.errors import DtypeError, SettingError, ShapeError
from qmoe_lite.packed import PackedMatrix
from qmoe_lite.validation import prepare

GATHERED_SUMS = 2  # up to this many sums a row (tokens x levels), one walk adds them, two as a complex number
TOKEN_BLOCKS = (8, 16, 32, 64)  # tokens whose sums stay in registers
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
    Same bytes for any number of Numba threads. Few tokens (T * L up to 2): a row's codewords are summed in four
    interleaved chains (codeword k of the row into chain k % 4, those after the last whole four into chain 0), each
    level's sum is scaled at the end. More tokens: level times activation is added nonzero by nonzero, in the row's
    order. Activations that are not finite: decoded tiles of rows and torch.matmul, so NaN spreads as in a dense one.
    QMoE (arXiv:2310.16795), section 4.3; departs from it in adding nonzeros only.
    """
    prepare(packed)
    tokens = _tokens(x, packed)
    terms = len(tokens) * packed.levels.shape[1]
    if not len(tokens) or not bool(torch.isfinite(tokens).all()):
        y = _tile_product(packed, tokens)
    elif terms <= GATHERED_SUMS:
        y = _gather_product(packed, tokens.numpy())
    else:
        y = _block_product(packed, tokens)
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


def _block_product(packed: PackedMatrix, tokens: torch.Tensor) -> torch.Tensor:
    """Product by blocks of tokens: tokens (T, C) -> (T, R)."""
    rows, columns = packed.shape
    codebook, starts = packed.codebook, row_starts(packed.row_codewords.numpy())
    values = slot_values(packed, torch.float32).numpy()
    y = torch.empty(len(tokens), rows)
    for first in range(0, len(tokens), TOKEN_BLOCKS[-1]):
        part = tokens[first : first + TOKEN_BLOCKS[-1]]
        lanes = next(block for block in TOKEN_BLOCKS if block >= len(part))
        x_columns = torch.zeros(columns + MAX_WEIGHTS[codebook.digits], lanes)
        x_columns[:columns, : len(part)] = part.T
        sums = np.empty(rows * lanes, dtype=np.float32)
        arguments = *codebook.split_table, codebook.bits, kernel_fields(codebook), values
        _block_kernel(packed.codes.numpy(), starts, *arguments, x_columns.view(-1).numpy(), (0,) * lanes, sums)
        y[first : first + len(part)] = torch.from_numpy(sums).view(rows, lanes)[:, : len(part)].T
    return y


def _gather_product(packed: PackedMatrix, tokens: NDArray[np.float32]) -> torch.Tensor:
    """Product by adding slots of x, in one walk: tokens (T, C) -> (T, R), one or two sums a row."""
    codebook, width = packed.codebook, packed.levels.shape[1]
    lanes = _slot_lanes(tokens, codebook.digits, width)
    x_slots = lanes[0] if len(lanes) == 1 else np.empty(lanes.shape[1:], dtype=np.complex64)
    if len(lanes) == 2:
        x_slots.real, x_slots.imag = lanes
    row_sums = np.empty(packed.shape[0], dtype=x_slots.dtype)
    constants = codebook.bits, (0,) * codebook.digits, kernel_fields(codebook)
    starts = row_starts(packed.row_codewords.numpy())
    _gather_kernel(packed.codes.numpy(), starts, codebook.table, *constants, x_slots.ravel(), row_sums)
    sums = torch.from_numpy(np.stack((row_sums.real, row_sums.imag)[: len(lanes)])).reshape(len(tokens), width, -1)
    levels = packed.levels.to(torch.float32).T
    return (levels * sums).sum(1)


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


@njit(forceinline=True)
def _add_codeword(
    code: np.uint64,
    table: NDArray[np.uint64],
    digits: tuple[int, ...],
    fields: tuple[int, ...],
    x_slots: NDArray[Any],
    start: np.uint64,
    total: Any,
) -> tuple[np.uint64, Any]:
    """Add a codeword's nonzeros, an absent one as the zero slot; give the slot behind the codeword, and the sum."""
    entry = table[code]
    for i in range(len(fields)):
        total += x_slots[start + np.uint64(entry_field(entry, i))]
    return start + np.uint64(len(digits)) * np.uint64(entry_length(entry)), total


@njit(forceinline=True)
def _add_four(
    codes: NDArray[np.uint8],
    bit: np.uint64,
    table: NDArray[np.uint64],
    bits: int,
    digits: tuple[int, ...],
    fields: tuple[int, ...],
    x_slots: NDArray[Any],
    start: np.uint64,
    sum0: Any,
    sum1: Any,
    sum2: Any,
    sum3: Any,
) -> tuple[np.uint64, Any, Any, Any, Any]:
    """Add four codewords, one to each sum; give the slot behind them, and the sums."""
    n_bits = np.uint64(bits)
    mask = (np.uint64(1) << n_bits) - np.uint64(1)
    word = load_word(codes, bit)  # at most 7 + 48 of its bits, or 64 where a codeword has 16
    start, sum0 = _add_codeword(word & mask, table, digits, fields, x_slots, start, sum0)
    start, sum1 = _add_codeword((word >> n_bits) & mask, table, digits, fields, x_slots, start, sum1)
    start, sum2 = _add_codeword((word >> np.uint64(2) * n_bits) & mask, table, digits, fields, x_slots, start, sum2)
    start, sum3 = _add_codeword((word >> np.uint64(3) * n_bits) & mask, table, digits, fields, x_slots, start, sum3)
    return start, sum0, sum1, sum2, sum3


@njit(forceinline=True)
def _add_rest(
    codes: NDArray[np.uint8],
    bit: np.uint64,
    end: np.uint64,
    table: NDArray[np.uint64],
    bits: int,
    digits: tuple[int, ...],
    fields: tuple[int, ...],
    x_slots: NDArray[Any],
    start: np.uint64,
    sum0: Any,
    sum1: Any,
    sum2: Any,
    sum3: Any,
) -> Any:
    """Add a row's codewords from `bit` to `end`; give the sum of all."""
    n_bits = np.uint64(bits)
    mask = (np.uint64(1) << n_bits) - np.uint64(1)
    while bit + np.uint64(3) * n_bits < end:
        start, sum0, sum1, sum2, sum3 = _add_four(
            codes, bit, table, bits, digits, fields, x_slots, start, sum0, sum1, sum2, sum3
        )
        bit += np.uint64(4) * n_bits
    while bit < end:
        start, sum0 = _add_codeword(load_word(codes, bit) & mask, table, digits, fields, x_slots, start, sum0)
        bit += n_bits
    return (sum0 + sum1) + (sum2 + sum3)


@njit(parallel=True, cache=True, fastmath=False)
def _gather_kernel(
    codes: NDArray[np.uint8],
    starts: NDArray[np.int64],
    table: NDArray[np.uint64],
    bits: int,
    digits: tuple[int, ...],
    fields: tuple[int, ...],
    x_slots: NDArray[Any],
    sums: NDArray[Any],
) -> None:
    """Fill sums (R,) from x_slots ((C + padding) * digits,), float32 or complex64 = two sums at once.

    Of the tuples only the length counts, which the compiler knows. Two rows at a time: the processor adds the one
    while it waits for the other's table entries.
    """
    n_bits = np.uint64(bits)
    rows = len(sums)
    four = np.uint64(4) * n_bits
    for pair in prange((rows + 1) // 2):
        row = 2 * pair
        bit0 = np.uint64(starts[row]) * n_bits
        end0 = np.uint64(starts[row + 1]) * n_bits
        bit1 = end0
        end1 = np.uint64(starts[min(row + 2, rows)]) * n_bits
        start0 = start1 = np.uint64(0)
        a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = x_slots[-1]  # the last slot is a zero slot
        while bit0 + four - n_bits < end0 and bit1 + four - n_bits < end1:
            start0, a0, a1, a2, a3 = _add_four(
                codes, bit0, table, bits, digits, fields, x_slots, start0, a0, a1, a2, a3
            )
            start1, b0, b1, b2, b3 = _add_four(
                codes, bit1, table, bits, digits, fields, x_slots, start1, b0, b1, b2, b3
            )
            bit0 += four
            bit1 += four
        sums[row] = _add_rest(codes, bit0, end0, table, bits, digits, fields, x_slots, start0, a0, a1, a2, a3)
        if row + 1 < rows:
            sums[row + 1] = _add_rest(codes, bit1, end1, table, bits, digits, fields, x_slots, start1, b0, b1, b2, b3)


@njit(parallel=True, cache=True, fastmath=False)
def _block_kernel(
    codes: NDArray[np.uint8],
    starts: NDArray[np.int64],
    positions: NDArray[np.uint64],
    slots: NDArray[np.uint64],
    bits: int,
    fields: tuple[int, ...],
    values: NDArray[np.float32],
    x_columns: NDArray[np.float32],
    lanes: tuple[int, ...],
    sums: NDArray[np.float32],
) -> None:
    """Fill sums (R * lanes,) from values (R, digits) of the slots and x_columns ((C + padding) * lanes,)."""
    n_bits = np.uint64(bits)
    mask = (np.uint64(1) << n_bits) - np.uint64(1)
    width = np.uint64(len(lanes))
    for row in prange(len(values)):
        index = np.uint64(row)
        bit = np.uint64(starts[row]) * n_bits
        end = np.uint64(starts[row + 1]) * n_bits
        base = np.uint64(0)
        total = zeros(lanes)
        while bit < end:
            code = load_word(codes, bit) & mask
            entry, of_entry = positions[code], slots[code]
            for i in range(len(fields)):
                column = base + np.uint64(entry_field(entry, i))
                value = values[index, np.uint64(entry_field(of_entry, i))]
                total = add_multiple(total, value, x_columns, column * width)
            base += np.uint64(entry_length(entry))
            bit += n_bits
        store(sums, index * width, total)
