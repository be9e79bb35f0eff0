"""How fast this machine does what compressing and running a model consist of: half a minute of measuring at most.

Experts are measured through `LayerCompressor` itself (drawn_experts.py), on this model's shapes, or on smaller ones
where those would take too long.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qmoe_lite.checkpoint import atomic as files
from qmoe_lite.checkpoint.weight_file import WeightFile, page_memory, room
from qmoe_lite.coding.codebook import Codebook
from qmoe_lite.coding.codec import encode
from qmoe_lite.coding.dictionary import Dictionary, count_sizes
from qmoe_lite.coding.matmul import decode_matmul
from qmoe_lite.coding.packed import PackedMatrix
from qmoe_lite.coding.windows_product import USUAL_BITS
from qmoe_lite.compression.importance import TOKENS
from qmoe_lite.compression.list_buffer import ListBuffer
from qmoe_lite.compression.rate import first_step
from qmoe_lite.compression.settings import Settings
from qmoe_lite.inspection.anatomy import Anatomy
from qmoe_lite.inspection.drawn_experts import DrawnExperts
from qmoe_lite.inspection.tries import median
from qmoe_lite.quantization.digits import count
from qmoe_lite.quantization.grid import Grid, UniformGrid
from qmoe_lite.quantization.solver import gptq

_WORK = 26e9  # operations of an expert's solve that are worth measuring
_FEW, _MORE = 32, 2048  # tokens of a small expert, and of others besides as many as what counts for outputs is seen by
_RANK = 16  # columns to a token at least: of fewer tokens, the error is computed in another way, which takes longer
_LEAST = 0.7  # share of a token's products that it takes at least: half of a Hessian's are mirrored
_TUNED = 1024  # tokens of an expert that is tuned, besides the same
_SOME, _TINY = 3, 9  # experts of a layer, of this model's shape and of small ones
_SECONDS = 1.0  # that a group of experts may take
_DISK_BYTES = 64 << 20
_PIECE = 8 << 20
_SAVED_BYTES = 16 << 20
_MATRIX_BYTES = 64 << 20  # beyond the caches
_PRODUCT_WEIGHTS = 4 << 20
_ROW_BLOCK = 64


@dataclass(frozen=True)
class Speeds:
    """What was measured.

    Attributes
    ----------
    multiply : float
        Operations a second of a float32 product of many tokens (two for each weight and token).
    start : float
        Seconds until the kernels were there.
    layer : float
        Seconds that a layer takes whatever its experts: to choose its codes, above all.
    expert_fixed : float
        Seconds that an expert takes to solve, encode and write, whatever its size.
    expert : float
        The same of one of the measured shape.
    expert_token : float
        Seconds of a token in it: its share in the Hessians, and its way through the quantised expert.
    shape : dict, projection to (rows, columns)
        Measured.
    encode : float
        Seconds a weight to encode.
    codes : float
        Seconds a weight of a product of one token from codes.
    bits : float
        Stored bits a weight of what was multiplied there, drawn digits.
    vector : float
        Bytes of dense weights a second in the product of one token.
    disk : float
        Bytes a second read, past the page cache where the file system allows it.
    disk_file : str
        What was read.
    save : float
        Bytes of activations a second, compressed and written as a run saves them.
    weight : float
        Seconds of a solve that grow with the weights, not with the operations; measured where experts are larger than
        what was.
    tuned : float
        Seconds that tuning an expert of the measured shape takes, whatever its tokens.
    tuned_token : float
        Seconds of a token that it is tuned on, its way through the dense expert among them.
    load : float
        By which share the experts that were measured took longer, by the clock, than what is said of them here.
    clock : str
        What it is said by: the "processor" where one thread does everything, or the "wall".
    """

    multiply: float
    start: float
    layer: float
    expert_fixed: float
    expert: float
    expert_token: float
    shape: dict[str, tuple[int, int]]
    encode: float
    codes: float
    bits: float
    vector: float
    disk: float
    disk_file: str
    save: float
    weight: float = 0.0
    tuned: float = 0.0
    tuned_token: float = 0.0
    load: float = 0.0
    clock: str = "wall"


def solve_work(shapes: dict[str, tuple[int, int]]) -> float:
    """Operations of an expert's solve: two for each weight and column, and those of the two factorisations."""
    of_columns = {columns for _, columns in shapes.values()}
    return sum(2.0 * r * c * c for r, c in shapes.values()) + sum(1.0 * c**3 for c in of_columns)


def token_work(shapes: dict[str, tuple[int, int]]) -> float:
    """Operations of a token of an expert: in the Hessians of both stages, and through the matrices."""
    (_, columns), *_, (rows, inner) = shapes.values()
    return 2.0 * (columns * columns + rows * inner) + inner_work(shapes)


def inner_work(shapes: dict[str, tuple[int, int]]) -> float:
    """Operations of a token through all matrices but the last, and in that one's Hessian."""
    *first, (_, inner) = shapes.values()
    return 2.0 * (inner * inner + sum(rows * columns for rows, columns in first))


def measure(anatomy: Anatomy, settings: Settings, grid: Grid, shards: list[Path], folder: Path) -> Speeds:
    """Measure for 10 to 30 seconds.

    Parameters
    ----------
    anatomy : Anatomy
        Of the dense model.
    settings, grid
        As `choice.choose` returned them.
    shards : list of Path
        Files that are read to measure the disk; none: one is written into `folder` for it, and removed.
    folder : Path
        A directory.
    """
    device = torch.device(settings.device)
    layer = max(anatomy.layers, key=lambda each: each.weights)
    names, tiny = layer.projections, {name: (64, 64) for name in layer.projections}
    shapes = _affordable(layer.shapes)
    rows, columns = layer.shapes[names[0]]
    code = _coded(max(_ROW_BLOCK, min(rows, _PRODUCT_WEIGHTS // columns)), columns, grid, settings)
    packed = code.packed
    run = DrawnExperts(anatomy, settings, grid)
    begun = time.perf_counter()
    run.seconds(tiny, 1, _FEW)  # kernels are compiled, or fetched
    start = time.perf_counter() - begun
    tokens = max(TOKENS, *(width // _RANK for _, width in shapes.values()))
    fixed = run.best(tiny, _TINY, _FEW) - run.best(tiny, 1, _FEW)
    one = run.best(shapes, 1, tokens)
    expert = max(run.seconds(shapes, _SOME, tokens) - one, 0.0) / (_SOME - 1)
    several = max(1, min(settings.group_size, int(_SECONDS / max(expert, 1e-3))))
    few = run.best(shapes, several, tokens)  # a whole group's memory is not in the caches
    many = run.best(shapes, several, tokens + _MORE) if settings.recipe != "nearest" else few
    if several > _SOME:
        expert = max(few - one, 0.0) / (several - 1)
    multiply = _multiply(min(max(anatomy.hidden, 256), 1024), device)
    counted = settings.recipe != "nearest" and settings.products == "float32"
    least = _LEAST * token_work(shapes) / multiply if counted else 0.0
    token = max((many - few) / (several * _MORE), least)
    expert = max(expert - tokens * token, 0.0)
    fixed = min(max(fixed, 0.0) / (_TINY - 1), expert)
    tuned, tuned_token = (0.0, 0.0) if settings.tune == "none" else _tuning(run, shapes, tokens, one)
    weight = 0.0 if shapes == layer.shapes else _of_weight(run, shapes, expert - fixed, fixed, token)
    choosing = len(names) * code.choosing if isinstance(grid, UniformGrid) else max(one - expert, 0.0)
    x = torch.randn(columns)
    weights = packed.shape[0] * packed.columns
    disk, disk_file = _disk(shards, folder)
    return Speeds(
        multiply,
        start,
        choosing,
        fixed,
        expert,
        token,
        shapes,
        code.encoding / weights,
        median(lambda: decode_matmul(packed, x), device) / weights,
        packed.bits_per_weight,
        _vector(anatomy.dtype, device),
        disk,
        disk_file,
        _save(folder),
        weight,
        tuned,
        tuned_token,
        run.tries.load,
        "processor" if run.tries.by_processor else "wall",
    )


def _tuning(run: DrawnExperts, shapes: dict[str, tuple[int, int]], tokens: int, untuned: float) -> tuple[float, float]:
    """Return the seconds that tuning an expert takes besides its tokens, and of each of them."""
    few = max(run.best(shapes, 1, tokens, tuned=True) - untuned, 0.0)
    many = run.best(shapes, 1, tokens + _TUNED, tuned=True) - run.best(shapes, 1, tokens + _TUNED)
    token = max(many - few, 0.0) / _TUNED
    if tokens * token > few:  # small experts, a busy machine: all of it goes with the tokens
        return 0.0, many / (tokens + _TUNED)
    return few - tokens * token, token


def _of_weight(
    run: DrawnExperts, shapes: dict[str, tuple[int, int]], solve: float, fixed: float, token: float
) -> float:
    """Return the seconds of a solve that grow with the weights: what half as wide experts take beyond an eighth."""
    half = {name: (_rounded(rows / 2), _rounded(columns / 2)) for name, (rows, columns) in shapes.items()}
    several, tokens = 2 * _SOME, max(TOKENS, *(width // _RANK for _, width in half.values()))
    small = (run.best(half, several, tokens) - run.best(half, 1, tokens)) / (several - 1) - fixed
    small -= tokens * token * token_work(half) / token_work(shapes)
    work, small_work = solve_work(shapes), solve_work(half)
    weights, few = (sum(math.prod(shape) for shape in each.values()) for each in (shapes, half))
    found = (small * work - solve * small_work) / max(few * work - weights * small_work, 1.0)
    return min(max(found, 0.0), solve / weights)


def _affordable(shapes: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Return shapes of the same proportions whose solve takes not much more than `_WORK`."""
    share = min(1.0, (_WORK / solve_work(shapes)) ** (1 / 3))
    if share == 1.0:
        return dict(shapes)
    return {name: (_rounded(rows * share), _rounded(columns * share)) for name, (rows, columns) in shapes.items()}


def _rounded(size: float) -> int:
    return max(128, round(size / 64) * 64)


@dataclass(frozen=True)
class _Code:
    """A drawn matrix in the code that the experts get, and the seconds to choose that and to write it."""

    packed: PackedMatrix
    choosing: float
    encoding: float


def _coded(rows: int, columns: int, grid: Grid, settings: Settings) -> _Code:
    drawn = torch.randn(rows, columns, generator=torch.Generator().manual_seed(2))
    if isinstance(grid, UniformGrid):
        grid = replace(grid, step=first_step(0.95 * (settings.rate or 2.0)))
    found = gptq(drawn, None, grid)
    digits = found.digits.numpy()
    levels, scales = found.levels.to(grid.level_dtype or torch.float32), found.column_scales
    bits, choosing = settings.codeword_bits or USUAL_BITS, 0.0
    if isinstance(grid, UniformGrid):
        sizes = count_sizes(digits)
        book: Any = Dictionary.fit_counts(sizes, bits)
        begun = time.perf_counter()
        Dictionary.fit_counts(sizes, bits)
        choosing = time.perf_counter() - begun
    else:
        counts = count(np.ascontiguousarray(digits), grid.alphabet).tolist()
        book = Codebook.paper() if settings.recipe == "paper" else Codebook.fit(counts, bits)
    seconds = median(lambda: encode(digits, levels, book, scales), torch.device("cpu"), 0.1)
    return _Code(encode(digits, levels, book, scales), choosing, seconds)


def _multiply(width: int, device: torch.device) -> float:
    x, weight = torch.randn(1024, width, device=device), torch.randn(width, width, device=device)
    return 2.0 * 1024 * width * width / median(lambda: x @ weight.T, device)


def _vector(dtype: torch.dtype, device: torch.device) -> float:
    rows = _MATRIX_BYTES // (2048 * dtype.itemsize)
    weight, x = (
        torch.full((rows, 2048), 0.5, dtype=dtype, device=device),
        torch.ones(1, 2048, dtype=dtype, device=device),
    )
    return _MATRIX_BYTES / median(lambda: torch.nn.functional.linear(x, weight), device)


def _disk(shards: list[Path], folder: Path) -> tuple[float, str]:
    if shards:
        largest = max(shards, key=lambda path: path.stat().st_size)
        return _read(largest), str(largest.name)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".qmoe-estimate-") as file:
        file.write(os.urandom(_PIECE) * (_DISK_BYTES // _PIECE))
        file.flush()
        os.fsync(file.fileno())
        return _read(Path(file.name)), f"a file written for it in {folder}"


def _save(folder: Path) -> float:
    buffer = ListBuffer(1, _SAVED_BYTES // 4096, 1024)
    buffer.rows.normal_()
    with tempfile.TemporaryDirectory(dir=folder, prefix=".qmoe-estimate-") as place:
        begun = time.perf_counter()
        files.write_atomically(Path(place) / "rows", buffer.save)
        return buffer.nbytes / (time.perf_counter() - begun)


def _read(path: Path) -> float:
    file = WeightFile(path)
    size = min(file.size, _DISK_BYTES)
    start = (file.size - size) // 2
    memory = page_memory(room(_PIECE))
    begun, done = time.perf_counter(), 0
    try:
        for offset in range(start, start + size, _PIECE):
            length = min(_PIECE, start + size - offset)
            file.read_into(memory, offset, length)
            done += length
            if time.perf_counter() - begun > 1.0:
                break
        return done / max(time.perf_counter() - begun, 1e-6)
    finally:
        file.close()


def scaled_tuning(speeds: Speeds, shapes: dict[str, tuple[int, int]]) -> tuple[float, float]:
    """Return the seconds of tuning an expert of another shape without tokens, and of each token."""
    grown = solve_work(shapes) / solve_work(speeds.shape), token_work(shapes) / token_work(speeds.shape)
    return speeds.tuned * grown[0], speeds.tuned_token * grown[1]


def scaled_expert(speeds: Speeds, shapes: dict[str, tuple[int, int]]) -> tuple[float, float]:
    """Return the seconds of an expert of another shape without tokens, and of each token.

    What is measured of the solve grows with its operations, what is measured of the encoder with the weights, as does
    what a solve is found to take of them.
    """
    small, full = (sum(math.prod(shape) for shape in each.values()) for each in (speeds.shape, shapes))
    weight = max(speeds.encode, speeds.weight)
    solve = speeds.expert - speeds.expert_fixed - weight * small
    solve = max(solve, 0.0) * solve_work(shapes) / solve_work(speeds.shape)
    token = speeds.expert_token * token_work(shapes) / token_work(speeds.shape)
    return speeds.expert_fixed + solve + weight * full, token
