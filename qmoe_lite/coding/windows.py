"""Rows of digits to overlapping windows of codewords and back, on plain arrays.

A stream is two zero bits and then the codewords of all rows, least significant bit first. The window of a codeword is
its bits and the two before it, which are the top of the codeword before and tell which tree its string is from. Four
rows are encoded at a time, as a row's steps wait for one another; a window is decoded by one copy of its string.
Digits beyond the dictionary's clip are clipped in the stream; a list of exceptions holds what is to be added.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from qmoe_lite.coding.exceptions import Exceptions, add_exceptions, block_rows, find_exceptions
from qmoe_lite.coding.guards import enter_kernels
from qmoe_lite.coding.inlined import inlined
from qmoe_lite.coding.stream import PADDING_BYTES, load_word, row_starts
from qmoe_lite.coding.vectors import address_of

LEADING_BITS = 2  # zeros before the first codeword: a row begins in class 0
_LANES = 4  # rows encoded at a time
_TASK = 16  # rows of a task, a multiple of _LANES
_SLACK = 32  # digits that the copy of a row's last string may run past its end


class Stream(NamedTuple):
    """What `encode` returns: codes uint8 (bytes,), the rows' codewords int64 (R,), and their exceptions."""

    codes: NDArray[np.uint8]
    row_codewords: NDArray[np.int64]
    exceptions: Exceptions


def windows_bytes(codewords: int, bits: int) -> int:
    """Return the bytes of a stream with its leading bits and its padding."""
    return (codewords * bits + LEADING_BITS + 7) // 8 + PADDING_BYTES


def encode(
    digits: NDArray[np.int16], bits: int, clip: int, entries: NDArray[np.uint64], tails: NDArray[np.uint16]
) -> Stream:
    """Write each row of digits as a run of codewords, and what is beyond the clip as exceptions.

    Parameters
    ----------
    digits : int16 array, shape (R, C), contiguous, R at least 1, C from 1 to 65535
        Of size 32767 at most.
    bits, clip, entries, tails
        Of the dictionary.

    Returns
    -------
    Stream

    Notes
    -----
    O(R C), the same bytes for any thread count.
    """
    enter_kernels()
    rows, columns = digits.shape
    counts = np.empty(rows, dtype=np.int64)
    codes = np.empty((-(-rows // _TASK), _TASK * columns), dtype=np.uint16)
    _encode_kernel(digits, clip, entries, tails, counts, codes, True)
    starts = row_starts(counts)
    total = int(starts[-1])
    words = np.zeros((total // 64 + 1) * bits + 1, dtype=np.uint64)
    _pack_kernel(codes, np.append(starts[:-1:_TASK], total), bits, words)
    stream = words.view(np.uint8)[: windows_bytes(total, bits)]
    return Stream(stream, counts, find_exceptions(digits, clip))


def count_codewords(
    digits: NDArray[np.int16], clip: int, entries: NDArray[np.uint64], tails: NDArray[np.uint16]
) -> NDArray[np.int64]:
    """Return the codewords that `encode` would write for each row: int64, shape (R,)."""
    enter_kernels()
    counts = np.empty(len(digits), dtype=np.int64)
    _encode_kernel(digits, clip, entries, tails, counts, np.empty((0, 0), dtype=np.uint16), False)
    return counts


def decode_rows(
    codes: NDArray[np.uint8],
    starts: NDArray[np.int64],
    bits: int,
    table: NDArray[np.int8],
    lengths: NDArray[np.uint8],
    exceptions: Exceptions,
    first: int,
    out: NDArray[np.int16],
) -> None:
    """Write the digits of rows `first` and following of a validated matrix into `out`.

    Parameters
    ----------
    codes : uint8 array
        The whole matrix's stream.
    starts : int64 array, shape (R + 1,)
        From `row_starts`, of the whole matrix.
    bits, table, lengths
        Of the dictionary: `table` is its `digits_table`.
    exceptions : Exceptions
        Of the whole matrix.
    first : int
        Number of the first row.
    out : int16 array, shape (any number of rows, C), contiguous
        Is modified.
    """
    width = (0,) * table.shape[1]
    _decode_kernel(codes, starts, bits, table, lengths, width, exceptions, block_rows(out.shape[1]), first, out)


def decode_dense_rows(
    codes: NDArray[np.uint8],
    starts: NDArray[np.int64],
    bits: int,
    table: NDArray[np.int8],
    lengths: NDArray[np.uint8],
    exceptions: Exceptions,
    steps: NDArray[np.float32],
    scales: NDArray[np.float32],
    first: int,
    out: NDArray[np.float32],
) -> None:
    """Write the weights, digit * step * scale, of rows `first` and following of a validated matrix into `out`.

    Parameters
    ----------
    codes, starts, bits, table, lengths, exceptions, first
        As for `decode_rows`.
    steps : float32 array, shape (R,)
        Of the whole matrix's rows.
    scales : float32 array, shape (C,)
        Of the columns; ones where there are none.
    out : float32 array, shape (any number of rows, C), contiguous
        Is modified.
    """
    per, width = block_rows(out.shape[1]), (0,) * table.shape[1]
    _decode_dense_kernel(codes, starts, bits, table, lengths, width, exceptions, per, steps, scales, first, out)


@intrinsic
def _widen(typing: Any, source: Any, target: Any, lanes: Any) -> Any:
    """Copy as many int8 at one address as int16 to another as the tuple `lanes` is long."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        narrow, wide = (ir.VectorType(ir.IntType(bits), lanes.count) for bits in (8, 16))
        digits = builder.load(builder.inttoptr(arguments[0], narrow.as_pointer()), align=8)
        builder.store(builder.sext(digits, wide), builder.inttoptr(arguments[1], wide.as_pointer()), align=2)
        return context.get_dummy_value()

    return types.void(types.uint64, types.uint64, lanes), generate


@inlined()
def _step(
    node: np.uint64,
    place: np.uint64,
    rank: np.uint8,
    entries: NDArray[np.uint64],
    codes: NDArray[np.uint16],
) -> Any:
    """Take one digit: the string goes on, or its codeword is kept; it is always written, so there is no branch."""
    entry = entries[node]
    digit = np.uint64(rank)
    ended = np.uint64(digit >= (entry >> np.uint64(16) & np.uint64(255)))
    codes[place] = entry >> np.uint64(24) & np.uint64(0xFFFF)
    following = entry >> ended * np.uint64(40) & np.uint64(0xFFFF)
    return following + digit, place + ended


@inlined()
def _rank(digit: int, clip: int) -> np.uint8:
    """Return the rank of a digit, clipped: 0, -1, +1, -2, .. have 0, 1, 2, 3, .."""
    clipped = min(max(digit, -clip), clip)
    return np.uint8(2 * abs(clipped) - (1 if clipped < 0 else 0))


@njit(parallel=True, cache=True, fastmath=False, error_model="numpy")
def _encode_kernel(
    digits: NDArray[np.int16],
    clip: int,
    entries: NDArray[np.uint64],
    tails: NDArray[np.uint16],
    counts: NDArray[np.int64],
    codes: NDArray[np.uint16],
    keep: bool,
) -> None:
    """Write how many codewords rows have to counts (R,), and where they are kept codes, a row for each _TASK rows."""
    rows, columns = digits.shape
    root = np.uint64(len(entries) - 1)
    for task in prange((rows + _TASK - 1) // _TASK):
        ranks = np.empty((_LANES, columns), dtype=np.uint8)
        own = np.empty(_LANES * columns + 1, dtype=np.uint16)
        k = 0
        for first in range(task * _TASK, min(task * _TASK + _TASK, rows), _LANES):
            lanes = min(_LANES, rows - first)
            for lane in range(_LANES):
                row = first + min(lane, lanes - 1)
                for column in range(columns):
                    ranks[lane, column] = _rank(np.int32(digits[row, column]), np.int32(clip))
            a = b = c = d = root
            i, j = np.uint64(0), np.uint64(columns)
            m, n = np.uint64(2 * columns), np.uint64(3 * columns)
            for column in range(columns):
                a, i = _step(a, i, ranks[0, column], entries, own)
                b, j = _step(b, j, ranks[1, column], entries, own)
                c, m = _step(c, m, ranks[2, column], entries, own)
                d, n = _step(d, n, ranks[3, column], entries, own)
            own[i], own[j], own[m], own[n] = tails[a], tails[b], tails[c], tails[d]
            ends = (np.int64(i), np.int64(j), np.int64(m), np.int64(n))
            for lane in range(lanes):
                count = ends[lane] + 1 - lane * columns
                counts[first + lane] = count
                if keep:
                    codes[task, k : k + count] = own[lane * columns : lane * columns + count]
                    k += count


@njit(parallel=True, cache=True, fastmath=False, error_model="numpy")
def _pack_kernel(codes: NDArray[np.uint16], starts: NDArray[np.int64], bits: int, words: NDArray[np.uint64]) -> None:
    """Write codes, starts[i + 1] - starts[i] of row i, as a stream.

    The windows of 64 codewords, without the last two bits, are `bits` whole words, so no word is shared.
    """
    groups = len(words) // bits
    joined = np.zeros(groups * 64, dtype=np.uint16)
    for task in prange(len(starts) - 1):
        joined[starts[task] : starts[task + 1]] = codes[task, : starts[task + 1] - starts[task]]
    n_bits = np.uint64(bits)
    for group in prange(groups):
        pending = np.uint64(joined[64 * group - 1]) >> (n_bits - np.uint64(2)) if group > 0 else np.uint64(0)
        held = np.uint64(2)
        word = group * bits
        for code in joined[64 * group : 64 * group + 64]:
            pending |= np.uint64(code) << held
            held += n_bits
            if held >= np.uint64(64):
                held -= np.uint64(64)
                words[word] = pending
                pending = np.uint64(code) >> (n_bits - held)
                word += 1


@inlined()
def _read_row(
    codes: NDArray[np.uint8],
    first: int,
    last: int,
    bits: int,
    table: NDArray[np.int8],
    lengths: NDArray[np.uint8],
    width: Any,
    row: NDArray[np.int16],
) -> None:
    """Write the digits of codewords `first` to `last`, and up to _SLACK digits behind them."""
    n_bits = np.uint64(bits)
    mask = np.uint64(len(lengths) - 1)
    bit = np.uint64(first) * n_bits
    strings = address_of(table)
    place = address_of(row)
    for _ in range(first, last):
        window = load_word(codes, bit) & mask
        _widen(strings + window * np.uint64(len(width)), place, width)
        place += np.uint64(lengths[window]) << np.uint64(1)
        bit += n_bits


@njit(parallel=True, cache=True, fastmath=False, error_model="numpy")
def _decode_kernel(
    codes: NDArray[np.uint8],
    starts: NDArray[np.int64],
    bits: int,
    table: NDArray[np.int8],
    lengths: NDArray[np.uint8],
    width: Any,
    exceptions: Any,
    per: int,
    first: int,
    out: NDArray[np.int16],
) -> None:
    """Write out (rows, C); `width` is a tuple as long as a row of `table`."""
    rows, columns = out.shape
    for task in prange((rows + _TASK - 1) // _TASK):
        digits = np.empty(columns + _SLACK, dtype=np.int16)
        for i in range(np.int64(task) * _TASK, min(np.int64(task) * _TASK + _TASK, rows)):
            row = first + i
            _read_row(codes, starts[row], starts[row + 1], bits, table, lengths, width, digits)
            add_exceptions(exceptions, per, row, columns, digits)
            out[i] = digits[:columns]


@njit(parallel=True, cache=True, fastmath=False, error_model="numpy")
def _decode_dense_kernel(
    codes: NDArray[np.uint8],
    starts: NDArray[np.int64],
    bits: int,
    table: NDArray[np.int8],
    lengths: NDArray[np.uint8],
    width: Any,
    exceptions: Any,
    per: int,
    steps: NDArray[np.float32],
    scales: NDArray[np.float32],
    first: int,
    out: NDArray[np.float32],
) -> None:
    """Write out (rows, C); `width` is a tuple as long as a row of `table`."""
    rows, columns = out.shape
    for task in prange((rows + _TASK - 1) // _TASK):
        digits = np.empty(columns + _SLACK, dtype=np.int16)
        for i in range(np.int64(task) * _TASK, min(np.int64(task) * _TASK + _TASK, rows)):
            row = first + i
            _read_row(codes, starts[row], starts[row + 1], bits, table, lengths, width, digits)
            add_exceptions(exceptions, per, row, columns, digits)
            step = steps[row]
            for column in range(columns):
                out[i, column] = np.float32(digits[column]) * step * scales[column]
