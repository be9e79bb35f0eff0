"""y = W x straight from the codewords: W is never written out as a whole.

One matrix, or many side by side that each multiply their own tokens: a mixture's experts in one call. The kernels are
`gather` (up to four tokens) and `block` (more). Floor for one token: the bytes of the codes, some 25 times fewer than
bfloat16 weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray

from qmoe_lite.coding.block import block_kernel, rows_multiplier
from qmoe_lite.coding.codebook import Codebook
from qmoe_lite.coding.decode_kernels import decode_rows, slot_values
from qmoe_lite.coding.dictionary import Dictionary
from qmoe_lite.coding.gather import gather_kernel, rows_gatherer
from qmoe_lite.coding.guards import check_recording, enter_kernels
from qmoe_lite.coding.jobs import expand_kernel
from qmoe_lite.coding.packed import PackedMatrix
from qmoe_lite.coding.parts import codebook_of
from qmoe_lite.coding.stream import row_starts
from qmoe_lite.coding.validation import prepare
from qmoe_lite.coding.window_parts import weights_of
from qmoe_lite.coding.windows_product import WindowStack, multiply_windows
from qmoe_lite.errors import DtypeError, NotFiniteError, SettingError, ShapeError

GATHER_TOKENS = (1, 2, 4)  # tokens whose sums of each level are gathered in one walk
BLOCK_TOKENS = (8, 16, 32, 64)  # tokens whose sums stay in registers, a multiplication for each nonzero
USUAL_BITS = 10
CACHE_BYTES = 28 << 10  # of a first-level cache of 32 KiB, for the table and the slots of x that are walked at a time
CHUNK_BYTES = 16 << 10  # of slots at least, whatever the table takes
CHUNK_COLUMNS = 512  # at least, or the stops cost more than the cache saves
EXPANDED_BYTES = 16 << 20  # of x laid out for the kernels at a time
TILE_VALUES = 1 << 20  # float32 values decoded at a time for many tokens: 4 MiB, 256 rows of 4096
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def decode_matmul(packed: PackedMatrix, x: Any) -> Any:
    """Multiply a packed matrix by one or more activation vectors.

    Parameters
    ----------
    packed : PackedMatrix
        (R, C).
    x : float16, float32, float64 or bfloat16 array or tensor, shape (C,) or (T, C)
        On the matrix's device; any strides; T may be 0.

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
        `packed` and `x` are on two devices; or torch.jit.trace records, or `x` has a forward-mode tangent.
    QMoEError
        This process was forked from one that had run kernels.
    DeviceError
        They are on a GPU that the kernels cannot use; says what to install.
    FormatError
        `packed` did not come from `encode` and does not decode; found at its first use, see `validate`.

    Notes
    -----
    Same bytes for any number of Numba threads. Up to four tokens: codeword k of a row is added to sum k % 4 of each
    level, of both where a row has one level, in one or more stretches of the row; each sum is multiplied at the end.
    More tokens: level times activation is added nonzero by nonzero, in the row's order, rounded once each. Activations
    that are not finite, or over 1e33: decoded tiles of rows and torch.matmul, so NaN spreads as in a dense product.
    QMoE (arXiv:2310.16795), section 4.3; departs from it in adding nonzeros only.
    """
    check_recording(x)
    if packed.codes.is_cuda:
        from qmoe_lite.cuda import matmul as twin

        prepare(packed)
        return twin.decode_matmul(packed, x)
    stack = _stack_of(packed)
    tokens = _tokens(x, packed)
    try:
        y = grouped_matmul([stack], tokens, [0], [0, len(tokens)])[0]
    except NotFiniteError:
        y = _tile_product(packed, tokens)
    y = y.reshape(*x.shape[:-1], packed.shape[0])
    return y.to(x.dtype) if isinstance(x, torch.Tensor) else y.to(getattr(torch, x.dtype.name)).numpy()


@dataclass(frozen=True)
class MatrixStack:
    """Validated matrices of one shape and codebook, side by side on the CPU as a checkpoint holds them.

    Attributes
    ----------
    codes : uint8 array, shape (bytes,)
    offsets : int64 array, shape (E,) or longer
        Where each matrix's codes begin.
    row_codewords : uint8 or uint16 array, shape (E, R)
    fewest : int32 array, shape (E,)
    levels : float tensor, shape (E, R, L)
    codebook : Codebook
    columns : int
    """

    codes: NDArray[np.uint8]
    offsets: NDArray[np.int64]
    row_codewords: NDArray[Any]
    fewest: NDArray[np.int32]
    levels: torch.Tensor
    codebook: Codebook
    columns: int

    @classmethod
    def of(cls, packed: PackedMatrix) -> MatrixStack:
        """A stack of one; its levels are a float32 copy."""
        fewest, offsets = np.array([packed.fewest_codewords], dtype=np.int32), np.zeros(1, dtype=np.int64)
        codes, row_codewords = packed.codes.numpy(), packed.row_codewords.numpy()[None]
        levels, book = packed.levels.float()[None], codebook_of(packed)
        return cls(codes, offsets, row_codewords, fewest, levels, book, packed.columns)


Stack = MatrixStack | WindowStack
_stacks: WeakKeyDictionary[PackedMatrix, Stack] = WeakKeyDictionary()


def _stack_of(packed: PackedMatrix) -> Stack:
    """Validate a matrix and return it as a stack; kept with it, since making one takes as long as a small product."""
    if (stack := _stacks.get(packed)) is None:
        prepare(packed)
        kind: type[MatrixStack] | type[WindowStack]
        kind = WindowStack if isinstance(packed.codebook, Dictionary) else MatrixStack
        stack = _stacks[packed] = kind.of(packed)
    return stack


def grouped_matmul(
    stacks: Sequence[Stack], x: torch.Tensor, experts: list[int], bounds: list[int]
) -> list[torch.Tensor]:
    """Multiply groups of tokens by a matrix each, in every one of some stacks: gate and up projection of a layer.

    Parameters
    ----------
    stacks : list of MatrixStack, or of WindowStack
        Of the same number of columns C and, where they are MatrixStacks, of digits.
    x : float32 tensor, shape (N, C), contiguous, finite
        Tokens, group after group.
    experts : list of int
        Which matrix each group goes through; ascending.
    bounds : list of int, one more
        Group i is x[bounds[i] : bounds[i + 1]].

    Returns
    -------
    list of float32 tensor, shape (N, R), one a stack

    Raises
    ------
    NotFiniteError
        `x` holds NaN, infinity or a value over 1e33.

    Notes
    -----
    Nothing else is checked. A group's result does not depend on the other groups.
    """
    enter_kernels()
    windows = [stack for stack in stacks if isinstance(stack, WindowStack)]
    if windows:
        return multiply_windows(windows, x, experts, bounds)
    return _multiply_codebooks([stack for stack in stacks if isinstance(stack, MatrixStack)], x, experts, bounds)


def _multiply_codebooks(
    stacks: list[MatrixStack], x: torch.Tensor, experts: list[int], bounds: list[int]
) -> list[torch.Tensor]:
    """Do what `grouped_matmul` says for codebooks of few digits."""
    columns = stacks[0].columns
    y = [torch.empty(len(x), stack.levels.shape[1], dtype=torch.float32) for stack in stacks]
    digits = stacks[0].codebook.digits
    symmetric = all(stack.levels.shape[2] == 1 for stack in stacks)
    levels = [_levels(stack, experts, symmetric) for stack in stacks]
    padded = columns + 4 * max(stack.codebook.longest for stack in stacks) + 4  # what a row's last codewords may reach
    for lanes, all_jobs in _jobs(experts, bounds).items():
        gathered = lanes in GATHER_TOKENS
        group, offset, negated = lanes, 0, -1
        if gathered:
            group = digits * lanes
            offset, negated = (0, lanes) if symmetric else ((digits - 2) * lanes, -1)
        step = max(1, EXPANDED_BYTES // (4 * padded * group))
        for start in range(0, len(all_jobs), step):
            jobs = all_jobs[start : start + step]
            expanded = np.empty((len(jobs), padded, group), dtype=np.float32)
            if not expand_kernel(x.numpy(), jobs, offset, negated, expanded):
                raise NotFiniteError("x holds NaN or values over 1e33; expected activations. Use the dense matrix.")
            for stack, own, out in zip(stacks, levels, y, strict=True):
                (_gather if gathered else _block)(stack, jobs, own, lanes, expanded, out.numpy())
    return y


def _levels(stack: MatrixStack, experts: list[int], symmetric: bool) -> NDArray[np.float32]:
    """Return the levels of some of a stack's matrices, both of a symmetric row's where others have two."""
    levels = stack.levels[experts] if len(stack.levels) > 1 else stack.levels  # one matrix needs no copy
    levels = levels.float()
    if levels.shape[2] == 1 and not symmetric:
        levels = torch.cat([-levels, levels], -1)
    of_experts: NDArray[np.float32] = levels.numpy()
    return of_experts


def _gather(
    stack: MatrixStack,
    jobs: NDArray[np.int64],
    levels: NDArray[np.float32],
    tokens: int,
    expanded: NDArray[np.float32],
    y: NDArray[np.float32],
) -> None:
    book = stack.codebook
    sums = tokens * (1 if levels.shape[2] == 1 else 1 << (book.digits - 2).bit_length())
    if sums > 1:
        sums = max(4, sums)  # fewer than 16 bytes take a load of their own before the addition
    table = book.gather_table(tokens)
    chunk_bytes = max(CHUNK_BYTES, CACHE_BYTES - table.nbytes)
    chunks = max(1, min(-(-4 * stack.columns * book.digits * tokens // chunk_bytes), stack.columns // CHUNK_COLUMNS))
    matrices = stack.codes, stack.offsets, stack.row_codewords, stack.fewest
    # the usual width is compiled in, which makes one token 3 to 9% faster; each other one would take time to compile
    width = book.bits if book.bits == USUAL_BITS else 0
    gatherer = rows_gatherer(width, len(book.fields), tokens, sums)
    called = table.ctypes.data, book.bits, gatherer.address
    gather_kernel(*matrices, *called, tokens, sums, jobs, levels, expanded, chunks, y)


def _block(
    stack: MatrixStack,
    jobs: NDArray[np.int64],
    levels: NDArray[np.float32],
    tokens: int,
    expanded: NDArray[np.float32],
    y: NDArray[np.float32],
) -> None:
    book = stack.codebook
    matrices = stack.codes, stack.offsets, stack.row_codewords, stack.fewest
    positions, slots = book.split_table
    multiplier = rows_multiplier(len(book.fields), tokens)
    called = positions.ctypes.data, slots.ctypes.data, book.bits, multiplier.address
    block_kernel(*matrices, *called, jobs, levels, book.digits, expanded, y)


def _jobs(experts: list[int], bounds: list[int]) -> dict[int, NDArray[np.int64]]:
    """Cut groups into jobs; by the kernel's tokens, see `jobs`."""
    jobs: dict[int, list[tuple[int, int, int, int]]] = {}
    for choice, expert in enumerate(experts):
        first, end = bounds[choice], bounds[choice + 1]
        sizes = GATHER_TOKENS if end - first <= GATHER_TOKENS[-1] else BLOCK_TOKENS
        while first < end:
            count = min(end - first, sizes[-1])
            lanes = next(size for size in sizes if size >= count)
            jobs.setdefault(lanes, []).append((expert, choice, first, count))
            first += count
    return {lanes: np.array(found, dtype=np.int64) for lanes, found in jobs.items()}


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
        raise SettingError(f"x is on {x.device} but the matrix on the CPU; expected one device. Move one of them.")
    tokens: torch.Tensor = x.detach().to(torch.float32).contiguous().reshape(-1, columns)
    return tokens


def _tile_product(packed: PackedMatrix, tokens: torch.Tensor) -> torch.Tensor:
    """Product by decoded tiles of rows: tokens (T, C) -> (T, R)."""
    rows, columns = packed.shape
    y = torch.empty(len(tokens), rows, dtype=torch.float32)
    if not len(tokens):
        return y
    if isinstance(packed.codebook, Dictionary):
        return tokens @ weights_of(packed).T
    book = codebook_of(packed)
    values = slot_values(packed.levels, book.alphabet, torch.float32)
    starts = row_starts(packed.count_codewords().numpy())
    tile = torch.empty(min(rows, max(1, TILE_VALUES // columns)), columns, dtype=torch.float32)
    for first in range(0, rows, len(tile)):
        part = tile[: rows - first]
        decode_rows(packed.codes.numpy(), book, values, starts, first, part)
        y[:, first : first + len(part)] = tokens @ part.T
    return y
