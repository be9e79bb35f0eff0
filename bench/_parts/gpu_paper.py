"""The paper's own product (QMoE, arXiv:2310.16795, section 4.3), reimplemented: what ours is measured against.

A warp takes a row and all its lanes one codeword at a time: each lane reads the codeword's table entry, takes one digit
out of it and multiplies its activation. Entries hold the digits as published: two words, each of seven pairs of 4 bits
above the codeword's count of pairs. x lies in shared memory; a row's sums meet at its end.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import linear

from qmoe_lite.bench._parts import gpu as parts
from qmoe_lite.bench._show.text import print_rows, print_text
from qmoe_lite.coding.codebook import Codebook
from qmoe_lite.coding.codec import encode as cpu_encode
from qmoe_lite.coding.packed import PackedMatrix
from qmoe_lite.coding.strings import paper_strings
from qmoe_lite.cuda import launch, matmul
from qmoe_lite.cuda.codec import row_starts
from qmoe_lite.cuda.gather import sum_of_lanes
from qmoe_lite.cuda.intrinsics import add_multiple, load_constant, load_float, origin, store_float
from qmoe_lite.cuda.launch import WARP, cuda
from qmoe_lite.errors import ShapeError

WARPS = (4, 8, 16, 32)  # rows of a block; each shape is given the fastest
_LONGEST = 28  # weights of a codeword: so many lanes of a warp have something to do
_HALF = 14  # weights of a word of an entry
_ALL = 0xFFFFFFFF


@dataclass(frozen=True)
class PaperMatrix:
    """A matrix as the kernel reads it: codes (uint16) and each row's first one (int32), levels, the rest of shape."""

    codes: Tensor
    starts: Tensor
    levels: Tensor
    columns: int


def paper_matrix(packed: PackedMatrix) -> PaperMatrix:
    """Return a matrix coded with `Codebook.paper`, of two bfloat16 levels a row, as the kernel reads it."""
    codes, levels = packed.codes.view(torch.uint16), packed.levels.view(torch.uint16)
    return PaperMatrix(codes, row_starts(packed).to(torch.int32), levels, packed.columns)


def paper_product(matrix: PaperMatrix, x: Tensor, warps: int = 8) -> Tensor:
    """Return the product of one token by the paper's algorithm.

    Parameters
    ----------
    matrix : PaperMatrix
        From `paper_matrix`.
    x : bfloat16 tensor, shape (C,)
        On the matrix's GPU.
    warps : int
        Of a block, 1 to 32: each takes a row.

    Returns
    -------
    bfloat16 tensor, shape (R,)

    Raises
    ------
    ShapeError
        x does not fit a block's shared memory.
    """
    padded = matrix.columns + _LONGEST  # a row's last codeword may end behind it
    if 4 * padded > launch.shared_limit(x.device):
        raise ShapeError(f"x has {matrix.columns} columns, more than shared memory holds; expected fewer. Split it.")
    rows = len(matrix.levels)
    y = torch.empty(rows, dtype=torch.bfloat16, device=x.device)
    table = _device_table(x.device)
    arrays = matrix.codes, matrix.starts, matrix.levels, table, x.view(torch.uint16), y.view(torch.uint16)
    sizes = rows, matrix.columns, padded
    paper_kernel.launch(-(-rows // warps), warps * WARP, *arrays, *sizes, shared_bytes=4 * padded)
    return y


@functools.cache
def _device_table(device: torch.device) -> Tensor:
    return torch.from_numpy(published_table().reshape(-1)).to(device)


def published_table() -> NDArray[np.uint32]:
    """Return the paper's decode table as published: uint32 (65536, 2)."""
    strings = paper_strings()
    ranks = np.frombuffer(b"".join(each.ljust(_LONGEST, b"\1") for each in strings), dtype=np.uint8)
    digits = np.array([1, 0, 2], dtype=np.uint32)[ranks].reshape(len(strings), 2, _HALF)  # of -1, 0 and +1
    pairs = np.array([len(each) // 2 for each in strings], dtype=np.uint32)
    places = 4 + 2 * np.arange(_HALF, dtype=np.uint32)
    return pairs[:, None] + (digits << places).sum(-1, dtype=np.uint32)


@launch.kernel("uint16*, int32*, uint16*, uint32*, uint16*, uint16*, int32, int32, int32")
def paper_kernel(
    codes: Any, starts: Any, levels: Any, table: Any, x: Any, y: Any, rows: int, columns: int, padded: int
) -> None:
    """Fill y (R,) with W x: a warp a row, a codeword at a time, a lane a digit."""
    thread, threads = np.int32(cuda.threadIdx.x), np.int32(cuda.blockDim.x)
    values = cuda.shared.array(0, np.float32)
    i = thread
    while i < padded:
        values[i] = load_float(x, np.int64(i)) if i < columns else np.float32(0)
        i = np.int32(i + threads)
    cuda.syncthreads()
    lane = np.int32(thread & 31)
    row = np.int32(cuda.blockIdx.x * (threads >> 5) + (thread >> 5))
    if row >= rows:
        return
    low, high = load_float(levels, np.int64(row) * 2), load_float(levels, np.int64(row) * 2 + 1)
    index, stop = np.int32(starts[row]), np.int32(starts[row + 1])
    half = np.int32(1 if lane >= 14 else 0)  # which word of an entry holds the lane's digit, and where
    shift = np.uint32(np.uint32(4 + 2 * (lane - 14 * half)) & np.uint32(31))
    unit = np.uint32(4 * lane)  # places and lengths are in bytes of x
    place = np.uint32(origin(values) + unit)
    total = (np.float32(0),)
    while index < stop:
        own = np.int32(0)
        if np.int32(index + lane) < stop:  # the warp reads 32 codewords at once
            own = np.int32(load_constant(codes, np.int32(index + lane)))
        number, count = np.int32(0), np.int32(min(np.int32(stop - index), np.int32(32)))
        while number < count:
            code = cuda.shfl_sync(_ALL, own, number)
            entry = load_constant(table, np.int32(np.int32(2 * code) + half))
            length = np.uint32(np.uint32(entry & np.uint32(15)) << np.uint32(3))
            if unit < length:
                digit = np.uint32(entry >> shift)
                level = high if digit & np.uint32(2) else low
                level = level if digit & np.uint32(3) else np.float32(0)
                total = add_multiple(total, values, place, level)
            place = np.uint32(place + length)
            number = np.int32(number + 1)
        index = np.int32(index + 32)
    whole = sum_of_lanes(total[0], np.int32(32))
    if lane == 0:
        store_float(y, np.int64(row), whole)


def measure_paper(quick: bool, end: float) -> Iterator[parts.Row]:
    """One token at the paper's shapes, in a graph, in microseconds: its algorithm, our product and cuBLAS's."""
    book = Codebook.paper()
    for rows, columns in parts.SHAPES[: 2 if quick else 6]:
        if time.monotonic() > end - 5:
            yield {"skipped": f"{rows} x {columns}"}
        else:
            yield _time_shape(rows, columns, book)


def _time_shape(rows: int, columns: int, book: Codebook) -> parts.Row:
    fitted, dense = parts._matrix(rows, columns)
    digits, levels = torch.sign(dense).to(torch.int8).cpu(), fitted.levels.cpu()
    packed = cpu_encode(digits, levels, book).to(fitted.device)
    x = torch.randn(1, columns, device=fitted.device).bfloat16()
    matrix = paper_matrix(packed)
    products: dict[str, tuple[int, Any, Callable[[Any], Any], Callable[[Any], Tensor]]] = {
        "same_codes": (packed.nbytes, packed, parts._clone, lambda p: matmul.decode_matmul(p, x)),
        "fitted": (fitted.nbytes, fitted, parts._clone, lambda p: matmul.decode_matmul(p, x)),
        "cublas": (2 * dense.numel(), dense.bfloat16(), torch.clone, lambda w: linear(x, w)),
    }
    for warps in WARPS:
        kernel = functools.partial(_one_token, x=x, warps=warps)
        products[f"paper_{warps}"] = packed.nbytes, matrix, _clone, kernel
    found = {}
    for name, (nbytes, first, clone, product) in products.items():
        calls = [functools.partial(product, copy) for copy in parts._copies(nbytes, first, clone)]
        parts._compare(calls[0](), dense, x, name)
        for call in calls[1:]:
            call()  # packets are made at a matrix's first product, which a graph cannot hold
        found[name] = parts._graph_us(calls)
    warps = min(WARPS, key=lambda each: found[f"paper_{each}"])
    row = {"rows": rows, "columns": columns, "bits": fitted.bits_per_weight, "paper_bits": packed.bits_per_weight}
    times = {f"{name}_us": found[name] for name in ("same_codes", "fitted", "cublas")}
    return row | {"paper_us": found[f"paper_{warps}"], "warps": warps} | times


def _one_token(matrix: PaperMatrix, x: Tensor, warps: int) -> Tensor:
    return paper_product(matrix, x[0], warps)[None]


def _clone(matrix: PaperMatrix) -> PaperMatrix:
    arrays = {name: getattr(matrix, name).clone() for name in ("codes", "starts", "levels")}
    return replace(matrix, **arrays)


def show_paper(rows: list[parts.Row]) -> None:
    """Print microseconds of the paper's algorithm, our product and cuBLAS's."""
    cells = []
    for r, name in parts._named(rows):
        times = r["paper_us"], r["same_codes_us"], r["fitted_us"], r["cublas_us"]
        ratios = parts._times(r["same_codes_us"], times[0]), parts._times(r["fitted_us"], times[0])
        cells.append([name, *(f"{each:.1f}" for each in times), *ratios, parts._times(times[0], times[3])])
    titles = (
        "paper's\nkernel",
        "ours, its\ncodes",
        "ours,\nfitted",
        "cuBLAS\nbf16",
        "ours to\nits",
        "\nfitted",
        "its to\ncuBLAS",
    )
    print_rows("us of one token's product in a graph", ("rows x\ncolumns", *titles), cells, text=1)
    print_text(f"Bits a weight, everything counted: {rows[0]['paper_bits']:.2f} and, fitted, {rows[0]['bits']:.2f}.\n")


PART = parts.Part(measure_paper, show_paper, 20)
