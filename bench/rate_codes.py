"""Bits per weight of the code of windows at a rate: uniform digits and a dictionary, by codeword bits and columns.

Every stream was decoded again and found equal. `bench/rates.py` does the same for ternary digits.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from qmoe_lite.bench._parts.common import limited_threads, machine_line
from qmoe_lite.bench._parts.rated import Digits, digits_of, draw_weights, fit_step
from qmoe_lite.coding.codec import decode, encode
from qmoe_lite.coding.dictionary import Dictionary, count_sizes
from qmoe_lite.coding.exceptions import count_exceptions
from qmoe_lite.coding.packed import PackedMatrix
from qmoe_lite.coding.windows_product import USUAL_BITS
from qmoe_lite.compression.dictionaries import signed
from qmoe_lite.compression.rate import check_rate, entropy
from qmoe_lite.errors import FormatError, SettingError

BITS = (9, 10, 11, 12)
WIDTHS = (768, 2048, 6144)
WIDTH = 2048  # of the rows where one width must do
_TRIALS = 5


@dataclass(frozen=True)
class CodeRates:
    """Bits per weight at one rate.

    Attributes
    ----------
    rate : float
        Stored bits that the step was chosen for.
    entropy : float
        Of the digits, order 0.
    by_bits : dict
        Codewords and exceptions by bits of a codeword, rows of `WIDTH`.
    clip : int
        Largest digit of the strings of the usual dictionary.
    exceptions : float
        Share of digits beyond it.
    stored : dict
        All that is stored of matrices by their columns.
    encode_speed, decode_speed : float
        10^6 weights/s of one thread.
    """

    rate: float
    entropy: float
    by_bits: dict[str, float]
    clip: int
    exceptions: float
    stored: dict[str, float]
    encode_speed: float
    decode_speed: float


@dataclass(frozen=True)
class CodeReport:
    """What `measure` found, and where."""

    rates: tuple[CodeRates, ...]
    weights: int
    seed: int
    machine: str

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return asdict(self)


def measure(rates: tuple[float, ...], weights: int, seed: int = 0) -> CodeReport:
    """Code the same bell-shaped weights at several rates.

    Parameters
    ----------
    rates : tuple of float
        Stored bits a weight, about.
    weights : int
        Drawn once; each width takes as many whole rows of them as there are.
    seed : int
        The same seed gives the same weights.

    Raises
    ------
    SettingError
        A rate out of range, or too few weights for a row of every width.
    FormatError
        A stream did not decode to what was encoded.
    """
    if weights < max(WIDTHS):
        raise SettingError(f"weights is {weights}; expected at least {max(WIDTHS)}, a row of every width.")
    drawn = draw_weights(weights // WIDTH, WIDTH, np.random.default_rng(seed))
    with limited_threads(1):
        found = tuple(_measure_one(rate, drawn) for rate in map(check_rate, rates))
    return CodeReport(found, drawn.size, seed, machine_line("numpy", "numba", "torch"))


def _measure_one(rate: float, weights: np.ndarray) -> CodeRates:
    step, _ = fit_step(weights, rate)
    digits = digits_of(weights, step)
    sizes = count_sizes(digits)
    books = {bits: Dictionary.fit_counts(sizes, bits) for bits in BITS}
    usual = books[USUAL_BITS]
    packed = _packed(digits, usual)
    return CodeRates(
        rate=rate,
        entropy=entropy(signed(sizes)),
        by_bits={str(bits): book.rate(digits) for bits, book in books.items()},
        clip=usual.clip,
        exceptions=count_exceptions(digits, usual.clip) / digits.size,
        stored={str(width): _packed(_rows(digits, width), usual).bits_per_weight for width in WIDTHS},
        encode_speed=_speed(lambda: _encode(digits, usual), digits.size),
        decode_speed=_speed(lambda: decode(packed), digits.size),
    )


def _encode(digits: Digits, book: Dictionary) -> PackedMatrix:
    steps = torch.full((len(digits), 1), 0.01, dtype=torch.bfloat16)
    return encode(digits, steps, book, torch.ones(digits.shape[1], dtype=torch.bfloat16))


def _packed(digits: Digits, book: Dictionary) -> PackedMatrix:
    """Encode digits, after a look that they come back."""
    packed = _encode(digits, book)
    if not np.array_equal(decode(packed)[0].numpy(), digits):
        raise FormatError(f"{book!r} did not decode to what it encoded. Report this with the machine's name.")
    return packed


def _rows(digits: Digits, columns: int) -> Digits:
    flat = digits.reshape(-1)
    return flat[: len(flat) // columns * columns].reshape(-1, columns)


def _speed(call: Callable[[], object], weights: int) -> float:
    times = []
    for _ in range(_TRIALS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return weights / statistics.median(times) / 1e6
