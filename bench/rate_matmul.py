"""The product from codes at a rate (uniform digits, a dictionary) against torch's dense products, in one process.

Weights come from memory, products are compared before they are timed and take turns, as in `bench/matmul.py`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import linear

from qmoe_lite.bench._parts.common import limited_threads, machine_line
from qmoe_lite.bench._parts.rated import digits_of, draw_weights, fit_step
from qmoe_lite.bench.matmul import (
    SHAPES,
    TOLERANCES,
    Contender,
    check_products,
    clone,
    dense,
    dequantised,
    ours,
    rates_of,
    rotated,
)
from qmoe_lite.coding.codec import encode
from qmoe_lite.coding.packed import PackedMatrix
from qmoe_lite.compression.rate import check_rate
from qmoe_lite.errors import SettingError

TOKENS = (1, 4, 16, 64, 512)
_DRAWN_ROWS = 2048
# rates.md of 2026-11-25: one thread of an AMD Zen 3, 14336 x 4096, 8-bit activations; bits, G weights/s
LLAMA_CPP = (("IQ1_S", 1.5625, 10.6), ("IQ2_XXS", 2.0625, 10.3), ("IQ2_S", 2.5625, 10.9), ("Q2_K", 2.625, 28.5))


@dataclass(frozen=True)
class RateSpeed:
    """Multiply-adds a second, in 10^9, of one shape, rate and number of tokens; `anew` dequantises for each product."""

    shape: str
    bits_per_weight: float
    tokens: int
    ours: float
    dense_float32: float
    dense_bfloat16: float
    anew_float32: float


@dataclass(frozen=True)
class RateReport:
    """What `measure` found, and where."""

    speeds: tuple[RateSpeed, ...]
    threads: int
    machine: str

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return asdict(self)


def measure(
    rates: tuple[float, ...],
    shapes: tuple[str, ...] = ("mixtral", "qwen3-30b-a3b"),
    tokens: tuple[int, ...] = TOKENS,
    threads: int = 1,
    seed: int = 0,
) -> RateReport:
    """Time all products.

    Parameters
    ----------
    rates : tuple of float
        Stored bits a weight, about.
    shapes : tuple of str
        Names out of `SHAPES`.
    tokens : tuple of int
        Tokens of one product.
    threads : int
        For torch and for Numba.
    seed : int
        Seed for weights and activations.

    Raises
    ------
    SettingError
        An unknown shape, a rate out of range, a number below 1, or more threads than there are.
    QMoEError
        A product is wrong: nothing is timed.
    """
    if unknown := sorted(set(shapes) - set(SHAPES)):
        raise SettingError(f"shape {unknown[0]} is unknown; expected {', '.join(SHAPES)}.")
    if not tokens or min(tokens) < 1:
        raise SettingError(f"tokens is {tokens}; expected numbers of at least 1.")
    with limited_threads(threads):
        found = [
            speed
            for shape in shapes
            for rate in map(check_rate, rates)
            for speed in _measure(shape, rate, tokens, np.random.default_rng(seed))
        ]
    return RateReport(tuple(found), threads, machine_line("torch", "numba"))


def packed_at(rate: float, rows: int, columns: int, rng: np.random.Generator) -> PackedMatrix:
    """Return a matrix of bell-shaped weights that takes about so many stored bits."""
    weights = draw_weights(min(rows, _DRAWN_ROWS), columns, rng)
    step, dictionary = fit_step(weights, rate)
    digits = np.resize(digits_of(weights, step), (rows, columns))  # rows are repeated: to draw takes longest
    steps = torch.full((rows, 1), 0.01, dtype=torch.bfloat16)
    return encode(digits, steps, dictionary, torch.full((columns,), 1.5))


def _measure(shape: str, rate: float, tokens: tuple[int, ...], rng: np.random.Generator) -> list[RateSpeed]:
    rows, columns = SHAPES[shape]
    packed = packed_at(rate, rows, columns, rng)
    exact, rounded = TOLERANCES["float32"], TOLERANCES["bfloat16"]
    full, half = packed.dense(), packed.dense(torch.bfloat16)
    copies = rotated(packed.nbytes, packed, lambda: clone(packed))
    contenders = {
        "ours": Contender(ours, copies, torch.float32, exact),
        "anew_float32": Contender(dequantised, copies, torch.float32, exact),
        "dense_float32": Contender(dense, rotated(full.nbytes, full, full.clone), torch.float32, exact),
        "dense_bfloat16": Contender(dense, rotated(half.nbytes, half, half.clone), torch.bfloat16, rounded),
    }
    found = []
    for count in tokens:
        x = torch.from_numpy(rng.standard_normal((count, columns)).astype(np.float32)).squeeze(0)
        check_products(shape, contenders, x, {"one": linear(x, full), "two": linear(x, full)})
        work = rows * columns * count / 1e9
        speeds = {name: work * per_second for name, per_second in rates_of(contenders, x).items()}
        found.append(RateSpeed(shape, packed.bits_per_weight, count, **speeds))
    return found
