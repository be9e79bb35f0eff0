"""The product straight from codewords against torch's dense products, in one process.

Weights are rotated through as many copies as do not fit the last cache, so that all of them come from memory, as they
do when a model's layers take turns. Every product is compared with the dense one before anything is timed; then they
take turns, so that what else the machine does meets them all.
"""

from __future__ import annotations

import itertools
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from qmoe_lite.bench._parts.common import limited_threads, machine_line
from qmoe_lite.coding.codebook import Codebook
from qmoe_lite.coding.codec import decode_dense, encode
from qmoe_lite.coding.matmul import decode_matmul
from qmoe_lite.coding.packed import PackedMatrix
from qmoe_lite.errors import QMoEError, SettingError

SHAPES = {  # rows, columns of an expert's matrix
    "switch-base": (3072, 768),
    "switch-large": (4096, 1024),
    "switch-c2048": (6144, 2080),
    "qwen3-30b-a3b": (768, 2048),
    "mixtral": (14336, 4096),
    "mixtral-down": (4096, 14336),
}
TOKENS = (1, 4, 16, 64, 256)
ZEROS = 0.885
COLD_BYTES = 128 << 20  # rotated through, more than the caches of the machines we know hold for one core
TOLERANCES = {"int8": 0.05, "bfloat16": 0.02, "float32": 1e-4}  # largest error, over the largest result
_TRIALS, _SECONDS = 5, 0.1

Product = Callable[[Any, Tensor], Tensor]


@dataclass(frozen=True)
class Speed:
    """Multiply-adds a second, in 10^9, of one shape and number of tokens.

    Ours: x float32 with one and with two levels a row; x bfloat16 with two. torch's dense products: float32, bfloat16,
    and int8 with float32 x that is quantised for each product (None where it was left out). Dequantised: our matrix of
    two levels written out anew for each product, then torch's dense one.
    """

    shape: str
    tokens: int
    one_level: float
    two_levels: float
    bfloat16_input: float
    dense_float32: float
    dense_bfloat16: float
    dense_int8: float | None
    dequantised_float32: float
    dequantised_bfloat16: float


@dataclass(frozen=True)
class MatmulReport:
    """What `measure` found, and where; the copy is of float32 in memory, in GB/s read and written.

    `int8_left_out` says why a shape's `dense_int8` was not timed; None where it was timed for every shape.
    """

    speeds: tuple[Speed, ...]
    bits_per_weight: float
    copy_gigabytes: float
    int8_left_out: str | None
    threads: int
    machine: str

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Contender:
    """A product, the copies of the matrix that it takes in turn, the dtype of its x, and how exact it must be."""

    product: Product
    matrices: Iterator[Any]
    dtype: torch.dtype
    tolerance: float


def measure(
    shapes: tuple[str, ...] = tuple(SHAPES), tokens: tuple[int, ...] = TOKENS, threads: int = 1, seed: int = 0
) -> MatmulReport:
    """Time all products.

    Parameters
    ----------
    shapes : tuple of str
        Names out of `SHAPES`.
    tokens : tuple of int
        Tokens of one product.
    threads : int
        For torch and for Numba.
    seed : int
        Seed for digits and activations.

    Raises
    ------
    SettingError
        An unknown shape, a number below 1, or more threads than there are.
    QMoEError
        A product is wrong: nothing is timed.
    """
    if unknown := sorted(set(shapes) - set(SHAPES)):
        raise SettingError(f"shape {unknown[0]} is unknown; expected {', '.join(SHAPES)}.")
    if not tokens or min(tokens) < 1:
        raise SettingError(f"tokens is {tokens}; expected numbers of at least 1.")
    with limited_threads(threads):
        speeds, rates, left_out = [], [], None
        for shape in shapes:
            found, rate, why = _measure_shape(shape, tokens, np.random.default_rng(seed))
            speeds += found
            rates.append(rate)
            left_out = left_out or why
        copy = _copy_gigabytes()
    return MatmulReport(tuple(speeds), statistics.mean(rates), copy, left_out, threads, machine_line("torch", "numba"))


def _measure_shape(
    shape: str, tokens: tuple[int, ...], rng: np.random.Generator
) -> tuple[list[Speed], float, str | None]:
    """Return a shape's speeds, the bits of a weight, and why int8 is not among them."""
    rows, columns = SHAPES[shape]
    shares = [(1 - ZEROS) / 2, ZEROS, (1 - ZEROS) / 2]
    digits = rng.choice(np.array([-1, 0, 1], dtype=np.int8), (rows, columns), p=shares)
    book = Codebook.fit([int((digits == digit).sum()) for digit in (-1, 0, 1)])
    one = encode(digits, torch.full((rows, 1), 0.5, dtype=torch.bfloat16), book)
    two = encode(digits, torch.tensor([[-0.5, 0.375]] * rows, dtype=torch.bfloat16), book)
    inputs = [torch.from_numpy(rng.standard_normal((n, columns)).astype(np.float32)).squeeze(0) for n in tokens]
    contenders, found = _contenders(one, two), []
    if (why := _int8_flaw(two.dense(), inputs)) is not None:
        contenders.pop("dense_int8", None)
    for count, x in zip(tokens, inputs, strict=True):
        check_products(shape, contenders, x, {name: linear(x, of.dense()) for name, of in (("one", one), ("two", two))})
        work = rows * columns * count / 1e9
        speeds = {name: work * rate for name, rate in rates_of(contenders, x).items()}
        found.append(Speed(shape, count, dense_int8=speeds.pop("dense_int8", None), **speeds))
    return found, two.bits_per_weight, why


def dense(weight: Tensor, x: Tensor) -> Tensor:
    """Multiply by a dense matrix, as torch does."""
    return linear(x, weight)


def dequantised(packed: PackedMatrix, x: Tensor) -> Tensor:
    """Dequantise a matrix, and multiply by it as torch does."""
    return linear(x, decode_dense(packed, x.dtype))


def ours(packed: PackedMatrix, x: Tensor) -> Tensor:
    """Multiply straight from the codewords."""
    y: Tensor = decode_matmul(packed, x)
    return y


def _contenders(one: PackedMatrix, two: PackedMatrix) -> dict[str, Contender]:
    """Return every product by the name of its field in `Speed`."""
    full, half = torch.float32, torch.bfloat16
    exact, rounded = TOLERANCES["float32"], TOLERANCES["bfloat16"]
    copies = rotated(two.nbytes, two, lambda: clone(two))
    found = {
        "one_level": Contender(ours, rotated(one.nbytes, one, lambda: clone(one)), full, exact),
        "two_levels": Contender(ours, copies, full, exact),
        "bfloat16_input": Contender(ours, copies, half, rounded),
        "dequantised_float32": Contender(dequantised, copies, full, exact),
        "dequantised_bfloat16": Contender(dequantised, copies, half, rounded),
    }
    for name, dtype, tolerance in (("float32", full, exact), ("bfloat16", half, rounded)):
        weight = two.dense(dtype)
        found[f"dense_{name}"] = Contender(dense, rotated(weight.nbytes, weight, weight.clone), dtype, tolerance)
    weight = two.dense()
    if (packed := _pack_int8(weight)) is not None:
        copies = rotated(weight.nbytes // 4, packed, lambda: _pack_int8(weight))
        found["dense_int8"] = Contender(_int8_product, copies, full, TOLERANCES["int8"])
    return found


def rotated(nbytes: int, first: Any, clone: Callable[[], Any]) -> Iterator[Any]:
    """Yield, for ever in turn, so many copies of a matrix that they do not fit the caches."""
    return itertools.cycle([first, *(clone() for _ in range(COLD_BYTES // nbytes))])


def clone(packed: PackedMatrix) -> PackedMatrix:
    """Return a copy in memory of its own."""
    parts: dict[str, Any] = {name: tensor.clone() for name, tensor in packed.tensors.items()}
    return replace(packed, **parts)


def _pack_int8(weight: Tensor) -> Any:
    """Quantise a matrix row by row for torch's dynamic int8 product; None where this torch does not offer it."""
    rows = len(weight)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch means to remove it one day
        try:
            scale = weight.abs().amax(1).double() / 127
            packed = torch.quantize_per_channel(weight, scale, torch.zeros(rows, dtype=torch.int64), 0, torch.qint8)
            return torch.ops.quantized.linear_prepack(packed, None)
        except (RuntimeError, AttributeError):
            return None


def _int8_product(weight: Any, x: Tensor) -> Tensor:
    y: Tensor = torch.ops.quantized.linear_dynamic(x.view(-1, x.shape[-1]), weight, False)
    return y


def _int8_flaw(weight: Tensor, inputs: list[Tensor]) -> str | None:
    """Return what speaks against torch's int8 product of these inputs on this machine; None where nothing does.

    Without VNNI the processor adds pairs of int8 products in 16 bits, which cannot hold the largest sums.
    """
    packed = _pack_int8(weight)
    if packed is None:
        return "this torch has none"
    errors = [_error(_int8_product(packed, x), linear(x, weight)) for x in inputs]
    wrong = [error for error in errors if not error <= TOLERANCES["int8"]]
    return f"its error is {max(wrong):.1e} on this processor" if wrong else None


def _error(found: Tensor, reference: Tensor) -> float:
    """Return the largest difference over the largest result."""
    return float((found.float().view_as(reference) - reference).abs().max() / reference.abs().max())


def check_products(shape: str, contenders: dict[str, Contender], x: Tensor, references: dict[str, Tensor]) -> None:
    for name, of in contenders.items():
        reference = references["one" if name == "one_level" else "two"]
        error = _error(_product(of, x.to(of.dtype)), reference)
        if not error <= of.tolerance:
            raise QMoEError(f"{name} of {shape} differs by {error:.1e}; please report this as a bug.")


def rates_of(contenders: dict[str, Contender], x: Tensor) -> dict[str, float]:
    """Products a second of each: the median of some trials in turn, each over enough products to be timed."""
    inputs = {name: x.to(of.dtype) for name, of in contenders.items()}
    trials: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(_TRIALS):
        for name, of in contenders.items():
            _product(of, inputs[name])  # after another's turn: threads start anew
            done, start = 0, time.perf_counter()
            while (passed := time.perf_counter() - start) < _SECONDS:
                _product(of, inputs[name])
                done += 1
            trials[name].append(done / passed)
    return {name: statistics.median(of) for name, of in trials.items()}


def _product(of: Contender, x: Tensor) -> Tensor:
    return of.product(next(of.matrices), x)


def _copy_gigabytes() -> float:
    """Bytes read and written a second by torch's copy of a large tensor."""
    source = torch.ones(COLD_BYTES // 4)
    target = torch.empty_like(source)
    copy = Contender(lambda to, x: to.copy_(x), itertools.repeat(target), torch.float32, 0)
    return 2 * source.nbytes / 1e9 * rates_of({"copy": copy}, source)["copy"]
