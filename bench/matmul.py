"""The product straight from codewords beside torch's dense products, in one process.

Weights are rotated through as many copies as do not fit the last cache, so that all of them come from memory, as they
do when a model's layers take turns. Results are compared with the dense product before anything is timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from qmoe_lite.bench._common import machine_line
from qmoe_lite.codebook import Codebook
from qmoe_lite.codec import encode
from qmoe_lite.errors import QMoEError, SettingError
from qmoe_lite.matmul import decode_matmul
from qmoe_lite.packed import PackedMatrix

SHAPES = {  # rows, columns of an expert's matrix
    "switch-base": (3072, 768),
    "switch-c2048": (6144, 2080),
    "qwen3-30b-a3b": (768, 2048),
    "mixtral": (14336, 4096),
    "mixtral-down": (4096, 14336),
}
TOKENS = (1, 4, 16, 64, 256)
ZEROS = 0.885
COLD_BYTES = 128 << 20  # rotated through, more than the caches of the machines we know hold for one core
_TRIALS, _SECONDS = 5, 0.15


@dataclass(frozen=True)
class Speed:
    """Multiply-adds a second, in 10^9, of one shape and number of tokens; ours with one and two levels a row."""

    shape: str
    tokens: int
    one_level: float
    two_levels: float
    float32: float
    bfloat16: float


@dataclass(frozen=True)
class MatmulReport:
    """What `measure` found, and where; the copy is of float32 in memory, in GB/s read and written."""

    speeds: tuple[Speed, ...]
    bits_per_weight: float
    copy_gigabytes: float
    threads: int
    machine: str

    def to_json(self) -> dict[str, Any]:
        """Give everything as JSON values."""
        return asdict(self)


def measure(
    shapes: tuple[str, ...] = tuple(SHAPES), tokens: tuple[int, ...] = TOKENS, threads: int = 1, seed: int = 0
) -> MatmulReport:
    """Time both products.

    Parameters
    ----------
    shapes : tuple of str
        Names out of `SHAPES`.
    tokens : tuple of int
        Tokens of one product.
    threads : int
        For torch and for Numba.
    seed : int
        Decides digits and activations.

    Raises
    ------
    SettingError
        An unknown shape, or a number below 1.
    QMoEError
        The two products differ: nothing is timed.
    """
    if unknown := sorted(set(shapes) - set(SHAPES)):
        raise SettingError(f"shape {unknown[0]} is unknown; expected {', '.join(SHAPES)}.")
    most = numba.config.NUMBA_NUM_THREADS
    if min(*tokens, threads) < 1 or threads > most:
        raise SettingError(f"tokens and threads must be at least 1, threads at most {most} here.")
    before = torch.get_num_threads(), numba.get_num_threads()
    torch.set_num_threads(threads)
    numba.set_num_threads(threads)
    try:
        speeds, rates = [], []
        for shape in shapes:
            found, rate = _measure_shape(shape, tokens, np.random.default_rng(seed))
            speeds += found
            rates.append(rate)
        copy = _copy_gigabytes()
    finally:
        torch.set_num_threads(before[0])
        numba.set_num_threads(before[1])
    return MatmulReport(tuple(speeds), statistics.mean(rates), copy, threads, machine_line("torch", "numba"))


def _measure_shape(shape: str, tokens: tuple[int, ...], rng: np.random.Generator) -> tuple[list[Speed], float]:
    rows, columns = SHAPES[shape]
    shares = [(1 - ZEROS) / 2, ZEROS, (1 - ZEROS) / 2]
    digits = rng.choice(np.array([-1, 0, 1], dtype=np.int8), (rows, columns), p=shares)
    book = Codebook.fit([int((digits == digit).sum()) for digit in (-1, 0, 1)])
    one = encode(digits, torch.full((rows, 1), 0.5, dtype=torch.bfloat16), book)
    two = encode(digits, torch.tensor([[-0.5, 0.375]] * rows, dtype=torch.bfloat16), book)
    packed = {"one_level": _copies(one, one.nbytes), "two_levels": _copies(two, two.nbytes)}
    dense = {
        dtype: _copies(two.dense(dtype), rows * columns * dtype.itemsize) for dtype in (torch.float32, torch.bfloat16)
    }
    found = []
    for count in tokens:
        x = torch.from_numpy(rng.standard_normal((count, columns)).astype(np.float32)).squeeze(0)
        reference = torch.nn.functional.linear(x, dense[torch.float32][0])
        error = (decode_matmul(two, x) - reference).abs().max() / reference.abs().max()
        if error > 1e-4:
            raise QMoEError(f"the products of {shape} differ by {error:.1e}; please report this as a bug.")
        speed = {name: _rate(matrices, decode_matmul, x) for name, matrices in packed.items()}
        for dtype, matrices in dense.items():
            cast = x.to(dtype)
            speed[str(dtype).removeprefix("torch.")] = _rate(
                matrices, lambda w, x: torch.nn.functional.linear(x, w), cast
            )
        work = rows * columns * count / 1e9
        found.append(Speed(shape, count, **{name: work * rate for name, rate in speed.items()}))
    return found, two.bits_per_weight


def _copies(matrix: Any, nbytes: int) -> list[Any]:
    """Give so many copies of a matrix that they do not fit the caches."""
    clone: Callable[[], Any] = matrix.clone if isinstance(matrix, Tensor) else lambda: _clone(matrix)
    return [matrix, *(clone() for _ in range(COLD_BYTES // nbytes))]


def _clone(packed: PackedMatrix) -> PackedMatrix:
    codes, row_codewords, levels = (part.clone() for part in (packed.codes, packed.row_codewords, packed.levels))
    return PackedMatrix(codes, row_codewords, levels, packed.codebook, packed.columns, packed._validated)


def _rate(matrices: list[Any], product: Callable[[Any, Tensor], Tensor], x: Tensor) -> float:
    """Products a second: the median of some trials, each over enough products to be timed."""
    product(matrices[0], x)  # compiles
    place, trials = 0, []
    for _ in range(_TRIALS):
        done, start = 0, time.perf_counter()
        while (passed := time.perf_counter() - start) < _SECONDS:
            product(matrices[place % len(matrices)], x)
            place += 1
            done += 1
        trials.append(done / passed)
    return statistics.median(trials)


def _copy_gigabytes() -> float:
    """Bytes read and written a second by torch's copy of a large tensor."""
    source = torch.ones(COLD_BYTES // 4)
    target = torch.empty_like(source)
    return 2 * source.nbytes / 1e9 * _rate([source], lambda _, x: target.copy_(x), source)
