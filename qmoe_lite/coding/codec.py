"""Digits to codewords and back: encode, decode, decode_dense.

A row's codewords are found by one walk of the codebook's automaton, from nonzero to nonzero; how they are decoded is
said in `decode_kernels`. Floor: C bytes of digits in or out, about C/12 bytes of codes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numba import njit, prange
from numpy.typing import NDArray

from qmoe_lite.coding.codes import Code
from qmoe_lite.coding.decode_kernels import decode_rows
from qmoe_lite.coding.dictionary import Dictionary, checked_digits
from qmoe_lite.coding.guards import enter_kernels
from qmoe_lite.coding.inlined import inlined
from qmoe_lite.coding.packed import PackedMatrix
from qmoe_lite.coding.parts import LEVEL_DTYPES, MAX_COLUMNS
from qmoe_lite.coding.stream import row_starts, shorten_counts, stream_bytes
from qmoe_lite.coding.validation import prepare
from qmoe_lite.coding.walk import LANES, check_counted, digit_bytes, walk_rows
from qmoe_lite.coding.window_parts import digits_of
from qmoe_lite.coding.windows import encode as encode_rows
from qmoe_lite.errors import DtypeError, NotFiniteError, SettingError, ShapeError

_BLOCK = 4 * LANES  # rows whose codes a thread keeps together


def encode(digits: Any, levels: Any, codebook: Code, column_scales: Any = None) -> PackedMatrix:
    """Write each row of digits as a run of codewords, longest match first.

    Parameters
    ----------
    digits : int8 array or tensor, shape (R, C), R at least 1, C from 1 to 65535
        Ternary codebook: -1, 0, +1. Two-bit codebook: 0 to 3. Dictionary: any of size 32767 at most, int8 or int16.
        Each row starts on a codeword.
    levels : float32, float16 or bfloat16 array or tensor, shape (R, L)
        Ternary: L = 2, the row's value of -1 and of +1, or L = 1, symmetric: -l and l. Two-bit: L = 3, the values of
        1, 2 and 3. Dictionary: L = 1, the row's step. Digit 0 is always exactly 0. The dtype is kept.
    codebook : Codebook or Dictionary
        From `Codebook.fit`, `Codebook.paper` or `Dictionary.fit`.
    column_scales : float32, float16 or bfloat16 array or tensor, shape (C,), optional
        With a dictionary: weight = digit * step * scale. Kept as bfloat16; by default ones.

    Returns
    -------
    PackedMatrix
        On the digits' device; `packed.bits_per_weight` counts codes, row lengths and levels, not the codebook.

    Raises
    ------
    ShapeError
        `digits` is not (R, C) within those bounds, or `levels` does not match it.
    DtypeError
        `digits` is not int8, of a Dictionary no integers, `levels` is none of the three floats (float64 would lose
        precision silently), or `column_scales` are not exact in bfloat16.
    DigitError
        A digit outside the codebook's alphabet; names row, column and value.
    NotFiniteError
        A level is NaN or infinite, or a column scale not above 0 and finite.
    SettingError
        The arguments are on two devices, or `column_scales` are given with a Codebook.
    DeviceError
        They are on a GPU that the kernels cannot use; says what to install.

    Notes
    -----
    O(R C), the same bytes for any thread count. QMoE (arXiv:2310.16795), section 4.2; departs from it in the codebook
    (see `Codebook.fit`; `Codebook.paper` gives the paper's codes), and in storing row lengths (8 bits, 16 where
    they differ by 256 codewords or more) for row offsets (32 bits).

    Examples
    --------
    >>> digits = np.array([[0, 0, 1, -1, 0]], dtype=np.int8)
    >>> decode(encode(digits, np.float32([[-0.5, 0.25]]), Codebook.fit([1, 8, 1])))[0].tolist()
    [[0, 0, 1, -1, 0]]
    """
    enter_kernels()
    if isinstance(codebook, Dictionary):
        return _encode_windows(digits, levels, codebook, column_scales)
    if column_scales is not None:
        raise SettingError("column_scales go with a Dictionary's digits. Leave them out, or fit a Dictionary.")
    if isinstance(digits, torch.Tensor) and digits.is_cuda:
        from qmoe_lite.cuda import codec as twin

        return twin.encode(digits, levels, codebook)
    digits_array = _digits_array(digits)
    levels_tensor = _levels_tensor(levels)
    digits_bytes = digit_bytes(digits_array)
    rows, columns = digits_array.shape
    if columns > MAX_COLUMNS:
        raise ShapeError(f"digits has {columns} columns; expected at most {MAX_COLUMNS}. Split the matrix by columns.")
    widths = codebook.alphabet.level_counts
    if levels_tensor.ndim != 2 or len(levels_tensor) != rows or levels_tensor.shape[1] not in widths:
        raise ShapeError(
            f"levels has shape {tuple(levels_tensor.shape)} but digits has {rows} rows of {codebook.digits} digits; "
            f"expected {' or '.join(f'({rows}, {width})' for width in widths)}. Pass the digits' own levels."
        )
    _check_levels_finite(levels_tensor)
    row_counts = np.empty(rows, dtype=np.int64)
    room = -(-columns // codebook.min_weights) * _BLOCK
    indices = np.empty((-(-rows // _BLOCK), room), dtype=np.uint16)
    alphabet = codebook.alphabet
    _encode_kernel(digits_bytes, columns, alphabet.lowest, alphabet.digits, *codebook.steps, row_counts, indices)
    check_counted(row_counts, digits_array, alphabet)
    starts = row_starts(row_counts)
    total = int(starts[-1])
    words = np.zeros(-(-total // 64) * codebook.bits + 1, dtype=np.uint64)
    _pack_kernel(indices, np.append(starts[:-1:_BLOCK], total), codebook.bits, words)
    codes = words.view(np.uint8)[: stream_bytes(total, codebook.bits)]
    row_codewords, fewest = shorten_counts(torch.from_numpy(row_counts))
    return PackedMatrix(
        torch.from_numpy(codes),
        row_codewords,
        levels_tensor,
        codebook,
        columns,
        fewest_codewords=fewest,
        _validated=True,
    )


def _encode_windows(digits: Any, levels: Any, dictionary: Dictionary, column_scales: Any) -> PackedMatrix:
    """Do what `encode` says for a dictionary: on the CPU, and back to where the digits are."""
    home = digits.device if isinstance(digits, torch.Tensor) else torch.device("cpu")
    array = checked_digits(digits.cpu().numpy() if isinstance(digits, torch.Tensor) else digits)
    rows, columns = array.shape
    if columns > MAX_COLUMNS:
        raise ShapeError(f"digits has {columns} columns; expected at most {MAX_COLUMNS}. Split the matrix by columns.")
    steps = _steps_tensor(levels, rows)
    stream = encode_rows(array, dictionary.bits, dictionary.clip, *dictionary.encoder)
    row_codewords, fewest = shorten_counts(torch.from_numpy(stream.row_codewords))
    starts, positions, values = (torch.from_numpy(part) for part in stream.exceptions)
    packed = PackedMatrix(
        torch.from_numpy(stream.codes),
        row_codewords,
        steps,
        dictionary,
        columns,
        fewest_codewords=fewest,
        column_scales=None if column_scales is None else _scales_tensor(column_scales, columns),
        exception_starts=starts,
        exception_positions=positions,
        exception_values=values,
        _validated=True,
    )
    return packed if home.type == "cpu" else packed.to(home)


def with_steps(packed: PackedMatrix, levels: Any, column_scales: Any = None) -> PackedMatrix:
    """Return a dictionary's digits with other steps and column scales: what `encode` makes of them, without its work.

    Parameters
    ----------
    packed : PackedMatrix
        On the CPU.
    levels, column_scales
        As `encode` takes them.

    Raises
    ------
    ShapeError, DtypeError, NotFiniteError
        As `encode`.
    """
    rows, columns = packed.shape
    scales = None if column_scales is None else _scales_tensor(column_scales, columns)
    return replace(packed, levels=_steps_tensor(levels, rows), column_scales=scales)


def _steps_tensor(levels: Any, rows: int) -> torch.Tensor:
    """Return the steps of rows, shape (R, 1); refuse others than finite ones."""
    steps = _levels_tensor(levels.cpu() if isinstance(levels, torch.Tensor) else levels)
    if tuple(steps.shape) != (rows, 1):
        raise ShapeError(f"levels has shape {tuple(steps.shape)}; expected ({rows}, 1), the rows' steps.")
    _check_levels_finite(steps)
    return steps


def _scales_tensor(scales: Any, columns: int) -> torch.Tensor:
    """Return column scales as bfloat16, shape (C,); refuse others than finite ones above 0 that bfloat16 holds."""
    tensor = _levels_tensor(scales.cpu() if isinstance(scales, torch.Tensor) else scales)
    if tuple(tensor.shape) != (columns,):
        raise ShapeError(f"column_scales has shape {tuple(tensor.shape)}; expected ({columns},), one a column.")
    if not (torch.isfinite(tensor) & (tensor > 0)).all():
        raise NotFiniteError("column_scales holds a value that is not above 0 and finite. Check the weights.")
    rounded = tensor.to(torch.bfloat16)
    if (rounded.float() != tensor.float()).any():
        raise DtypeError("column_scales has values that bfloat16 does not hold. Round them before the digits are made.")
    return rounded


def _check_levels_finite(levels: torch.Tensor) -> None:
    if not torch.isfinite(levels).all():
        row = int((~torch.isfinite(levels)).any(1).nonzero()[0])
        raise NotFiniteError(f"levels holds NaN or infinity at row {row}; expected finite values. Check the weights.")


def decode(packed: PackedMatrix) -> tuple[torch.Tensor, torch.Tensor]:
    """Read the digits back.

    Returns
    -------
    digits : int8 tensor, or int16 where the code is a dictionary, shape (R, C)
        On the matrix's device.
    levels : tensor, shape (R, L)
        `packed.levels` itself.

    Raises
    ------
    FormatError
        The codes do not decode to exactly R rows of C digits; see `validate`.
    SettingError
        The matrix's tensors are on several devices.
    DeviceError
        It is on a GPU that the kernels cannot use; says what to install.
    """
    prepare(packed)
    if packed.codes.is_cuda:
        from qmoe_lite.cuda import codec as twin

        return twin.decode(packed)
    rows, columns = packed.shape
    codebook = packed.codebook
    if isinstance(codebook, Dictionary):
        return digits_of(packed), packed.levels
    values = torch.tensor([codebook.alphabet.slot_digits] * rows, dtype=torch.int8)
    digits = torch.empty(rows, columns, dtype=torch.int8)
    starts = row_starts(packed.count_codewords().numpy())
    decode_rows(packed.codes.numpy(), codebook, values, starts, 0, digits)
    return digits, packed.levels


def decode_dense(packed: PackedMatrix, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Dequantise: put each digit's level in its place.

    Parameters
    ----------
    packed : PackedMatrix
        On the CPU or a GPU.
    dtype : torch float dtype, default float32
        Of the result.

    Returns
    -------
    tensor of `dtype`, shape (R, C)
        On the matrix's device. Each value is its level cast to `dtype`, and 0 for digit 0.

    Raises
    ------
    DtypeError
        `dtype` is not a float of 2, 4 or 8 bytes.
    FormatError, SettingError, DeviceError
        As for `decode`.
    """
    return packed.dense(dtype)


def _digits_array(digits: Any) -> NDArray[Any]:
    if isinstance(digits, torch.Tensor):
        if digits.device.type != "cpu":
            raise SettingError(f"digits is on {digits.device}; expected the CPU or a CUDA GPU. Pass digits.cpu().")
        if digits.dtype != torch.int8:
            raise DtypeError(f"digits is {digits.dtype}; expected int8. Convert it with digits.to(torch.int8).")
        return digits.numpy()
    if not isinstance(digits, np.ndarray):
        raise DtypeError(f"digits is a {type(digits).__name__}; expected a NumPy array or torch tensor of int8.")
    return digits


def _levels_tensor(levels: Any) -> torch.Tensor:
    """Return an own contiguous copy, so that later changes of the argument do not reach the packed matrix."""
    if isinstance(levels, np.ndarray) and levels.dtype in (np.float32, np.float16):
        return torch.from_numpy(np.array(levels, order="C"))
    if not isinstance(levels, torch.Tensor) or levels.dtype not in LEVEL_DTYPES:
        found = getattr(levels, "dtype", type(levels).__name__)
        raise DtypeError(f"levels is {found}; expected float32, float16 or bfloat16. Convert it first.")
    if levels.device.type != "cpu":
        raise SettingError(f"levels is on {levels.device}, digits on the CPU; expected one device. Move one of them.")
    return levels.detach().clone(memory_format=torch.contiguous_format)


@inlined()
def _copy(source: NDArray[np.uint16], target: NDArray[np.uint16]) -> None:
    for i in range(len(source)):
        target[i] = source[i]


@njit(parallel=True, cache=True, fastmath=False)
def _encode_kernel(
    digits: NDArray[np.uint8],
    columns: int,
    lowest: int,
    n_digits: int,
    entries: NDArray[np.uint64],
    tails: NDArray[np.uint16],
    counts: NDArray[np.int64],
    indices: NDArray[np.uint16],
) -> None:
    """Write the codes of digits (R * C,) to indices, a row of it for each _BLOCK rows, and how many to counts (R,)."""
    for block in prange(indices.shape[0]):
        codes = np.empty(LANES * columns, dtype=np.uint16)
        k = 0
        last = min(block * _BLOCK + _BLOCK, len(counts))
        for first in range(block * _BLOCK, last, LANES):
            walk_rows(digits, columns, lowest, n_digits, entries, tails, first, codes, counts)
            for lane in range(min(LANES, last - first)):
                n = max(counts[first + lane], 0)
                _copy(codes[lane * columns : lane * columns + n], indices[block, k : k + n])
                k += n


@njit(parallel=True, cache=True, fastmath=False)
def _pack_kernel(indices: NDArray[np.uint16], starts: NDArray[np.int64], bits: int, words: NDArray[np.uint64]) -> None:
    """Write indices, starts[i + 1] - starts[i] of row i, as a bit stream.

    64 codewords are `bits` whole words, so no word is shared.
    """
    joined = np.zeros(len(words) // bits * 64, dtype=np.uint16)
    for block in prange(len(starts) - 1):
        _copy(indices[block, : starts[block + 1] - starts[block]], joined[starts[block] : starts[block + 1]])
    n_bits = np.uint64(bits)
    for group in prange(len(joined) // 64):
        pending = held = np.uint64(0)
        word = group * bits
        for code in joined[64 * group : 64 * group + 64]:
            pending |= np.uint64(code) << held
            held += n_bits
            if held >= np.uint64(64):
                held -= np.uint64(64)
                words[word] = pending
                pending = np.uint64(code) >> (n_bits - held)
                word += 1
