"""y = W x straight from codes of windows, for many matrices side by side that each multiply their own tokens.

The counterpart of `qmoe_lite.coding.matmul` for a `Dictionary`; what the kernels do is said in `window_kernels`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from llvmlite import binding
from numpy.typing import NDArray

from qmoe_lite.coding import window_kernels, window_layout
from qmoe_lite.coding.dictionary import Dictionary
from qmoe_lite.coding.parts import MatrixParts
from qmoe_lite.coding.window_parts import dictionary_of, exceptions_of, scales_of
from qmoe_lite.errors import NotFiniteError

FEW_TOKENS = (1, 2, 4)  # tokens that a codeword's digits are multiplied by in one walk
JOB_TOKENS = 256  # that share a decoded tile
USUAL_BITS = 10
LAID_BYTES = 32 << 20  # of x laid out for the kernels at a time
# tokens of a panel: rows at a time, so that the sums fit the registers: 32 of 512 bits, or 16 of 256 and fewer
WIDE_PANELS, NARROW_PANELS = {8: 8, 16: 12, 32: 8}, {8: 8, 16: 4}


@dataclass(frozen=True)
class WindowStack:
    """Validated matrices of one shape and dictionary, side by side on the CPU as a checkpoint holds them.

    Attributes
    ----------
    codes : uint8 array, shape (bytes,)
    offsets : int64 array, shape (E,) or longer
        Where each matrix's codes begin.
    row_codewords : uint8 or uint16 array, shape (E, R)
    fewest : int32 array, shape (E,)
    steps : float32 array, shape (E, R)
    column_scales : float32 array, shape (E, C), or None for ones
        Stacks that share one array have x laid out once.
    dictionary : Dictionary
    columns : int
    exception_starts : int32 array, shape (E, blocks + 1)
        Where the exceptions of each block of 65536 // C rows begin.
    exception_positions : uint16 array, shape (N,)
        row_in_block * C + column, ascending within a block.
    exception_values : int8 array, shape (N,)
        What is to be added to the digit.
    """

    codes: NDArray[np.uint8]
    offsets: NDArray[np.int64]
    row_codewords: NDArray[Any]
    fewest: NDArray[np.int32]
    steps: NDArray[np.float32]
    column_scales: NDArray[np.float32] | None
    dictionary: Dictionary
    columns: int
    exception_starts: NDArray[np.int32]
    exception_positions: NDArray[np.uint16]
    exception_values: NDArray[np.int8]

    @classmethod
    def of(cls, packed: MatrixParts) -> WindowStack:
        """Return a stack of one matrix, which is on the CPU."""
        exceptions = exceptions_of(packed)
        return cls(
            packed.codes.numpy(),
            np.zeros(1, dtype=np.int64),
            packed.row_codewords.numpy()[None],
            np.array([packed.fewest_codewords], dtype=np.int32),
            packed.levels[None, :, 0].float().contiguous().numpy(),
            None if packed.column_scales is None else scales_of(packed)[None],
            dictionary_of(packed),
            packed.columns,
            exceptions.starts[None],
            exceptions.positions,
            exceptions.values,
        )


def multiply_windows(
    stacks: list[WindowStack], x: torch.Tensor, experts: list[int], bounds: list[int]
) -> list[torch.Tensor]:
    """Multiply groups of tokens by a matrix each, in every one of some stacks: gate and up projection of a layer.

    Parameters
    ----------
    stacks : list of WindowStack
        Of the same number of columns C.
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
        `x` holds NaN, infinity or a value over 1e33, or over 1e31 times its column's scale.

    Notes
    -----
    Nothing else is checked. A group's result does not depend on the other groups. Same bytes for any number of Numba
    threads.
    """
    y = [torch.empty(len(x), stack.steps.shape[1], dtype=torch.float32) for stack in stacks]
    for lanes, jobs, panels in _jobs(experts, bounds, stacks[0].columns):
        laid: dict[int, NDArray[np.float32]] = {}
        for stack, out in zip(stacks, y, strict=True):
            shared = id(stack.column_scales)
            if shared not in laid:
                laid[shared] = _lay_out(stack, x.numpy(), jobs, lanes, panels)
            _multiply(stack, jobs, lanes, laid[shared], out.numpy())
    return y


def _lay_out(
    stack: WindowStack, x: NDArray[np.float32], jobs: NDArray[np.int64], lanes: int, panels: int
) -> NDArray[np.float32]:
    """Return x times the column scales as the kernel of so many tokens reads it."""
    columns, scales = stack.columns, stack.column_scales
    if scales is None:
        scales = np.empty((0, columns), dtype=np.float32)
    if panels:
        laid = np.empty((panels, columns, lanes), dtype=np.float32)
        finite = window_layout.lay_panels(x, scales, jobs, laid)
    else:  # a row's last four codewords may all lie behind the row, and a load goes an entry further
        laid = np.empty((len(jobs), lanes, columns + 5 * window_kernels.LONGEST), dtype=np.float32)
        finite = window_layout.lay_rows(x, scales, jobs, laid)
    if not finite:
        raise NotFiniteError("x holds NaN or values over 1e33; expected activations. Use the dense matrix.")
    return laid


def _multiply(
    stack: WindowStack, jobs: NDArray[np.int64], lanes: int, x: NDArray[np.float32], y: NDArray[np.float32]
) -> None:
    book = stack.dictionary
    # the usual width is compiled in; each other one would take a second to compile
    width = book.bits if book.bits == USUAL_BITS else 0
    matrices = stack.codes, stack.offsets, stack.row_codewords, stack.fewest, stack.steps
    exceptions = stack.exception_starts, stack.exception_positions, stack.exception_values
    few = lanes in FEW_TOKENS
    table = book.heads_table if few else book.digits_table
    coded = *matrices, *exceptions, table, book.lengths, stack.columns, book.bits
    if few:
        adder = window_kernels.rows_adder(width, table.shape[1], lanes)
        window_kernels.few_kernel(*coded, adder.address, jobs, x, y)
    else:
        multiplier = window_kernels.tile_multiplier(width, table.shape[1], _panels()[lanes], lanes)
        window_kernels.many_kernel(*coded, multiplier.address, jobs, x, y)


@cache
def _panels() -> dict[int, int]:
    """Return the rows that are multiplied at a time by panels of so many tokens, on this processor."""
    return WIDE_PANELS if binding.get_host_cpu_features().get("avx512f") else NARROW_PANELS


def _jobs(experts: list[int], bounds: list[int], columns: int) -> list[tuple[int, NDArray[np.int64], int]]:
    """Cut groups into jobs of at most `JOB_TOKENS`: tokens or lanes, the jobs, and their panels, 0 of few tokens."""
    found: dict[int, list[list[tuple[int, int, int, int, int]]]] = {}
    room: dict[int, int] = {}
    panel_sizes = list(_panels())
    for choice, expert in enumerate(experts):
        first, end = bounds[choice], bounds[choice + 1]
        few = end - first <= FEW_TOKENS[-1]
        sizes = FEW_TOKENS if few else panel_sizes
        while first < end:
            count = min(end - first, JOB_TOKENS)
            lanes = next((size for size in sizes if size >= count), sizes[-1])
            panels = -(-count // lanes)
            size = 4 * columns * lanes * panels
            parts = found.setdefault(lanes, [[]])
            if parts[-1] and room[lanes] < size:
                parts.append([])
            if not parts[-1]:
                room[lanes] = LAID_BYTES
            room[lanes] -= size
            before = parts[-1][-1] if parts[-1] else (0, 0, 0, 0, 0)
            panel = before[4] + -(-before[3] // lanes)
            parts[-1].append((expert, choice, first, count, panel))
            first += count
    return [
        (lanes, np.array(part, dtype=np.int64), 0 if lanes in FEW_TOKENS else part[-1][4] + -(-part[-1][3] // lanes))
        for lanes, parts in found.items()
        for part in parts
    ]
