"""CUDA twin of :mod:`qmoe_lite.coding.codec`: encode in four steps (count, scan, write, pack), decode a warp a row."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from qmoe_lite.coding.codebook import Codebook
from qmoe_lite.coding.codes import Code
from qmoe_lite.coding.decode_kernels import slot_values
from qmoe_lite.coding.dictionary import Dictionary
from qmoe_lite.coding.entry import entry_field, entry_length, field_position, field_slot
from qmoe_lite.coding.packed import PackedMatrix
from qmoe_lite.coding.parts import LEVEL_DTYPES, MAX_COLUMNS, codebook_of
from qmoe_lite.coding.stream import PADDING_BYTES, shorten_counts, stream_bytes
from qmoe_lite.cuda import launch
from qmoe_lite.cuda.launch import WARP, as_tensor, cuda, kernel
from qmoe_lite.errors import DtypeError, NotFiniteError, SettingError, ShapeError

THREADS = 128  # per block where a thread has work of its own
WARPS = 4  # per block where a warp has a row
BLOCKS = 8  # per multiprocessor at most: each loads the table
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes: a store copies a bit pattern
_ALL = 0xFFFFFFFF
_TOP_BIT = np.uint64(1 << 63)


def encode(digits: Any, levels: Any, codebook: Code, column_scales: Any = None) -> PackedMatrix:
    """CUDA twin of :func:`qmoe_lite.coding.codec.encode`: the same bytes, from and to one GPU.

    One thread a row counts its codewords and, after a scan, writes them, both from nonzero to nonzero as the CPU does,
    eight digits in a word; one thread packs eight codewords. A dictionary's digits are written on the CPU.
    """
    if isinstance(codebook, Dictionary):
        raise SettingError("a dictionary's digits are written on the CPU. Call qmoe_lite.encode.")
    if column_scales is not None:
        raise SettingError("column_scales go with a Dictionary's digits. Leave them out, or fit a Dictionary.")
    digits, levels = as_tensor(digits, "digits"), as_tensor(levels, "levels").clone()
    _check_digits(digits, codebook)
    _check_levels(levels, digits, codebook)
    rows, columns = digits.shape
    walk = _digit_words(digits), *_device_steps(codebook, digits.device)
    counts = torch.empty(rows, dtype=torch.int32, device=digits.device)
    _count_codewords_kernel.launch(-(-rows // WARP), WARP, *walk, counts, rows, columns)
    starts = _scan(counts)
    total = int(starts[-1])
    groups = -(-total // 8)
    indices = torch.zeros(groups * 8, dtype=torch.int16, device=digits.device).view(torch.uint16)
    _encode_kernel.launch(-(-rows // WARP), WARP, *walk, starts, indices, rows, columns)
    codes = torch.zeros(groups * codebook.bits + PADDING_BYTES, dtype=torch.uint8, device=digits.device)
    _pack_kernel.launch(-(-groups // THREADS), THREADS, indices, codes, codebook.bits, groups)
    codes = codes[: stream_bytes(total, codebook.bits)]
    row_codewords, fewest = shorten_counts(counts)
    return PackedMatrix(codes, row_codewords, levels, codebook, columns, fewest_codewords=fewest, _validated=True)


def decode(packed: PackedMatrix) -> tuple[Tensor, Tensor]:
    """CUDA twin of :func:`qmoe_lite.coding.codec.decode`; the matrix is validated already."""
    check_validated(packed)
    if isinstance(packed.codebook, Dictionary):
        from qmoe_lite.cuda.window_packets import matrix_packets
        from qmoe_lite.cuda.windows import decode_digits

        return decode_digits(matrix_packets(packed)), packed.levels
    slots = codebook_of(packed).alphabet.slot_digits
    values = torch.tensor([slots], dtype=torch.int8, device=packed.device).repeat(packed.shape[0], 1)
    digits = torch.zeros(packed.shape, dtype=torch.int8, device=packed.device)
    decode_rows(packed, values, row_starts(packed), 0, digits)
    return digits, packed.levels


def decode_dense(packed: PackedMatrix, dtype: torch.dtype = torch.float32) -> Tensor:
    """CUDA twin of :func:`qmoe_lite.coding.codec.decode_dense`; the matrix is validated already."""
    if dtype not in (*LEVEL_DTYPES, torch.float64):
        raise DtypeError(f"dtype is {dtype}; expected float16, bfloat16, float32 or float64.")
    check_validated(packed)
    if isinstance(packed.codebook, Dictionary):
        from qmoe_lite.cuda.window_packets import matrix_packets
        from qmoe_lite.cuda.windows import DENSE_DTYPES, decode_weights

        return decode_weights(matrix_packets(packed), 0, dtype if dtype in DENSE_DTYPES else torch.float32).to(dtype)
    dense = torch.zeros(packed.shape, dtype=dtype, device=packed.device)
    decode_rows(packed, slot_values(packed.levels, codebook_of(packed).alphabet, dtype), row_starts(packed), 0, dense)
    return dense


def check_validated(packed: PackedMatrix) -> None:
    """Refuse a matrix that might make a kernel leave its row, or that is not on a GPU."""
    for tensor in (packed.codes, packed.row_codewords, packed.levels):
        as_tensor(tensor, "packed")
    if not packed._validated:
        message = "packed has not been validated; expected a checked matrix. "
        raise SettingError(message + "Call qmoe_lite.coding.validation.validate on it, once.")


def row_starts(packed: PackedMatrix) -> Tensor:
    """Return the number of each row's first codeword, then their total: int64, shape (R + 1,)."""
    return _scan(packed.count_codewords())


def decode_rows(packed: PackedMatrix, values: Tensor, starts: Tensor, first: int, out: Tensor) -> None:
    """Write the nonzeros of rows `first` and following into `out`, zeros before; as on the CPU otherwise."""
    codebook, word = codebook_of(packed), _WORDS[out.element_size()]
    rows = len(out)
    blocks = min(-(-rows // WARPS), BLOCKS * launch.multiprocessors(out.device))
    _decode_kernel.launch(
        blocks,
        WARPS * WARP,
        packed.codes,
        starts[first : first + rows + 1],
        device_table(codebook, out.device),
        values[first : first + rows].view(word),
        out.view(word),
        codebook.bits,
        codebook.digits,
        codebook.max_nonzeros,
        rows,
        out.shape[1],
    )


@functools.cache  # as `variants.device_words`
def device_table(codebook: Codebook, device: torch.device) -> Tensor:
    """Return the codebook's table on a GPU; kept there for the next call."""
    return torch.from_numpy(codebook.table.copy()).to(device)


@functools.lru_cache(maxsize=64)
def _device_steps(codebook: Codebook, device: torch.device) -> tuple[Tensor, ...]:
    return tuple(torch.from_numpy(part).to(device) for part in codebook.steps)


def _digit_words(digits: Tensor) -> Tensor:
    """Return digits (R, C) eight in a word, zeros behind each row's last: uint64, shape (R, ceil(C / 8))."""
    padded = torch.nn.functional.pad(digits, (0, -digits.shape[1] % 8))
    if padded.storage_offset() % 8 or padded.data_ptr() % 8:
        padded = padded.clone()
    return padded.view(torch.uint64)


def _scan(counts: Tensor) -> Tensor:
    starts = torch.zeros(len(counts) + 1, dtype=torch.int64, device=counts.device)
    torch.cumsum(counts, 0, out=starts[1:])
    return starts


def _check_digits(digits: Tensor, codebook: Codebook) -> None:
    if digits.ndim != 2 or digits.numel() == 0 or digits.shape[1] > MAX_COLUMNS:
        message = f"digits has shape {tuple(digits.shape)}; expected (rows, columns), 1 to {MAX_COLUMNS} columns. "
        raise ShapeError(message + "Split the matrix by columns.")
    if digits.dtype != torch.int8:
        raise DtypeError(f"digits is {digits.dtype}; expected int8. Convert it with digits.to(torch.int8).")
    alphabet = codebook.alphabet
    outside = (digits < alphabet.lowest) | (digits > alphabet.highest)
    if outside.any():
        row, column = outside.nonzero()[0].tolist()
        raise alphabet.refusal(int(digits[row, column]), row, column)


def _check_levels(levels: Tensor, digits: Tensor, codebook: Codebook) -> None:
    rows, widths = len(digits), codebook.alphabet.level_counts
    if levels.dtype not in LEVEL_DTYPES:
        raise DtypeError(f"levels is {levels.dtype}; expected float32, float16 or bfloat16. Convert it first.")
    if levels.ndim != 2 or len(levels) != rows or levels.shape[1] not in widths:
        raise ShapeError(
            f"levels has shape {tuple(levels.shape)} but digits has {rows} rows of {codebook.digits} digits; "
            f"expected {' or '.join(f'({rows}, {width})' for width in widths)}. Pass the digits' own levels."
        )
    if levels.device != digits.device:
        raise SettingError(f"levels is on {levels.device}, digits on {digits.device}; expected one GPU. Move one.")
    if not torch.isfinite(levels).all():
        row = int((~torch.isfinite(levels)).any(1).nonzero()[0])
        raise NotFiniteError(f"levels holds NaN or infinity at row {row}; expected finite values. Check the weights.")


@njit(inline="always")
def load_code(codes: Any, bit: np.int64, mask: np.int32) -> np.int32:
    """Return the code that starts at `bit` of the stream: at most 16 bits, so three bytes hold it."""
    byte = bit >> 3
    word = np.uint32(codes[byte]) | np.uint32(codes[byte + 1]) << np.uint32(8)
    word |= np.uint32(codes[byte + 2]) << np.uint32(16)
    return np.int32((word >> np.uint32(bit & 7)) & np.uint32(mask))


@njit(inline="always")
def warp_scan(value: np.int32, lane: np.int32) -> np.int32:
    """Return the sum of `value` over the warp's lanes up to this one."""
    for step in (1, 2, 4, 8, 16):
        below = cuda.shfl_up_sync(_ALL, value, step)
        if lane >= step:
            value = np.int32(value + below)
    return value


@njit(inline="always")
def _step(word: Any, left: Any, entry: Any, entries: Any) -> Any:
    """Take one to eight digits of the `left` in a word: zeros that end no codeword, and one more.

    Returns what remains of the word, how many digits that is, and the entry of the step; see
    `qmoe_lite.coding.automaton.Steps`. The state and the zeros that may be passed are the last entry's.
    """
    zeros = np.uint32(cuda.ffs(np.uint64(word | _TOP_BIT)) - 1) >> np.uint32(3)
    zeros = min(np.uint32(zeros), np.uint32(entry >> np.uint64(19)) & np.uint32(31), np.uint32(left - np.uint32(1)))
    word = np.uint64(word >> np.uint64(zeros << np.uint32(3)))
    state = np.uint32(entry >> np.uint64(32))
    entry = entries[np.uint32(state + np.uint32(zeros << np.uint32(2)) + (np.uint32(word) & np.uint32(3)))]
    return np.uint64(word >> np.uint64(8)), np.uint32(left - zeros - np.uint32(1)), entry


@njit(inline="always")
def _completes(entry: Any) -> Any:
    return np.uint32(entry >> np.uint64(24)) & np.uint32(1)


@kernel("uint64*, uint64*, uint16*, int32*, int32, int32")
def _count_codewords_kernel(words: Any, entries: Any, tails: Any, counts: Any, rows: int, columns: int) -> None:
    """Codewords per row of digits, words (R, ceil(C / 8)), into counts (R,)."""
    row = cuda.grid(1)
    if row < rows:
        width = np.int32((columns + 7) >> 3)
        start = np.int64(row) * width
        count = np.uint32(0)
        entry = np.uint64(0)
        for place in range(width):
            word = words[start + place]
            left = np.uint32(min(8, columns - 8 * place))
            while left > 0:
                word, left, entry = _step(word, left, entry, entries)
                count = np.uint32(count + _completes(entry))
        if entry >> np.uint64(32) != 0:
            count = np.uint32(count + 1)
        counts[row] = np.int32(count)


@kernel("uint64*, uint64*, uint16*, int64*, uint16*, int32, int32")
def _encode_kernel(words: Any, entries: Any, tails: Any, starts: Any, indices: Any, rows: int, columns: int) -> None:
    """Write the codes of digits, words (R, ceil(C / 8)), to indices, each row from its own start on."""
    row = cuda.grid(1)
    if row < rows:
        width = np.int32((columns + 7) >> 3)
        start = np.int64(row) * width
        k = starts[row]
        entry = np.uint64(0)
        for place in range(width):
            word = words[start + place]
            left = np.uint32(min(8, columns - 8 * place))
            while left > 0:
                word, left, entry = _step(word, left, entry, entries)
                if _completes(entry):
                    indices[k] = np.uint16(entry & np.uint64(0xFFFF))
                    k += 1
        state = np.uint32(entry >> np.uint64(32))
        if state != 0:
            indices[k] = tails[state >> np.uint32(2)]


@kernel("uint16*, uint8*, int32, int32")
def _pack_kernel(indices: Any, codes: Any, bits: int, groups: int) -> None:
    """Write indices (8 a group) as a bit stream; 8 codewords are `bits` whole bytes, so no byte is shared."""
    group = cuda.grid(1)
    if group < groups:
        pending = np.uint32(0)
        held = np.int32(0)
        byte = np.int64(group) * bits
        for k in range(8):
            pending = np.uint32(pending | np.uint32(indices[np.int64(group) * 8 + k]) << np.uint32(held))
            held = np.int32(held + bits)
            while held >= 8:
                codes[byte] = np.uint8(pending & np.uint32(255))
                pending = np.uint32(pending >> np.uint32(8))
                held = np.int32(held - 8)
                byte += 1


@kernel(
    "uint8*, int64*, uint64*, int8*, int8*, int32, int32, int32, int32, int32",
    "uint8*, int64*, uint64*, int16*, int16*, int32, int32, int32, int32, int32",
    "uint8*, int64*, uint64*, int32*, int32*, int32, int32, int32, int32, int32",
    "uint8*, int64*, uint64*, int64*, int64*, int32, int32, int32, int32, int32",
)
def _decode_kernel(
    codes: Any,
    starts: Any,
    table: Any,
    values: Any,
    out: Any,
    bits: int,
    digits: int,
    fields: int,
    rows: int,
    columns: int,
) -> None:
    """Write values[row, slot] to out (R, C) at each nonzero: a warp a row, a lane a codeword."""
    lane = np.int32(cuda.threadIdx.x & 31)
    mask = np.int32((1 << bits) - 1)
    row = np.int32(cuda.grid(1) >> 5)
    while row < rows:
        first = starts[row]
        count = np.int32(starts[row + 1] - first)
        base = np.int32(0)
        for chunk in range(0, count, WARP):
            entry = np.uint64(0)
            if chunk + lane < count:
                entry = table[load_code(codes, (first + chunk + lane) * bits, mask)]
            length = np.int32(entry_length(entry))
            end = warp_scan(length, lane)
            if chunk + lane < count:
                for i in range(fields):
                    field = entry_field(entry, i)
                    position = field_position(field, digits)
                    slot = field_slot(field, position, digits)
                    column = base + end - length + position
                    if slot < digits - 1 and column < columns:  # an absent field is a zero slot
                        out[np.int64(row) * columns + column] = values[np.int64(row) * digits + slot]
            base = np.int32(base + cuda.shfl_sync(_ALL, end, 31))
        row = np.int32(row + (cuda.gridsize(1) >> 5))
