"""Bits per weight of fitted codes, the paper's dictionary and zstd: on independent digits, or on a model's own.

Every coded figure is of a stream that was decoded again and found equal.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import zstandard
from numpy.typing import NDArray

from qmoe_lite.bench._parts.common import limited_threads, machine_line
from qmoe_lite.coding.codebook import Codebook
from qmoe_lite.coding.codec import decode, encode
from qmoe_lite.errors import FormatError, SettingError
from qmoe_lite.inspection.contents import short_name
from qmoe_lite.models.experts import PackedExperts
from qmoe_lite.quantization.digits import count, squeeze

ZEROS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.885, 0.92, 0.95, 0.97)
BITS = (8, 9, 10, 11, 12, 13)
WIDTHS = (768, 2048, 2080, 6144, 14336)
WIDTH = 2048  # of the rows where one width must do
WEIGHTS = 4_300_800
SPEED_ZEROS = 0.885  # coding is timed at the share nearest to this
_TRIALS = 9
PAPER_ROW_BITS = 32 + 2 * 16  # row offset, two bfloat16 levels: what the published format stores

Digits = NDArray[np.int8]


@dataclass(frozen=True)
class WidthRates:
    """Bits per weight of rows of one width, codes only and with all that is stored of a row."""

    columns: int
    ours: float
    ours_stored: float
    paper: float
    paper_stored: float


@dataclass(frozen=True)
class Rates:
    """Bits per weight at one share of zeros: `by_bits` of a codeword, `bits` chosen; `zstd` by packing and level."""

    zeros: float
    entropy: float
    by_bits: dict[str, float]
    bits: int
    ours: float
    paper: float
    zstd: dict[str, float]
    widths: tuple[WidthRates, ...]


@dataclass(frozen=True)
class RatesReport:
    """What `measure` found, and where; speeds in 10^6 weights/s of one thread, at the share of zeros `speed_zeros`."""

    rates: tuple[Rates, ...]
    weights: int
    seed: int
    speed_zeros: float
    encode_speed: float
    decode_speed: float
    machine: str

    def to_json(self) -> dict[str, Any]:
        """Return the whole as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class ProjectionRates:
    """Bits per weight of one projection of a layer, or of all; `bits` is None where codebooks differ in it.

    `stored` counts all that the checkpoint holds of the whole projection, `paper_stored` what the published format
    would; the rest counts codes, of the `weights` that were read.
    """

    layer: str
    projection: str
    weights: int
    zeros: float
    entropy: float
    bits: int | None
    ours: float
    stored: float
    paper: float
    paper_stored: float
    zstd: dict[str, float]


@dataclass(frozen=True)
class ModelRatesReport:
    """What `measure_model` found, the projections one by one and together, and where."""

    directory: str
    projections: tuple[ProjectionRates, ...]
    total: ProjectionRates
    machine: str

    def to_json(self) -> dict[str, Any]:
        """Return the whole as JSON values."""
        return asdict(self)


def measure(weights: int = WEIGHTS, *, seed: int = 0, zeros: tuple[float, ...] = ZEROS) -> RatesReport:
    """Code the same random digits in every way.

    Parameters
    ----------
    weights : int, default 4,300,800
        Digits drawn for each share of zeros; each width takes as many whole rows of them as there are.
    seed : int
        The same seed gives the same digits.
    zeros : tuple of float
        Shares of zeros; -1 and +1 split the rest evenly.

    Raises
    ------
    SettingError
        Too few weights for a row of every width, or a share outside 0 to 1.
    FormatError
        A stream did not decode to what was encoded.
    """
    if weights < max(WIDTHS) or not all(0 < share < 1 for share in zeros):
        raise SettingError(
            f"weights is {weights}, zeros {zeros}; expected at least {max(WIDTHS)}, and shares between 0 and 1."
        )
    rates = tuple(_measure_one(_draw(weights, seed, share), share) for share in zeros)
    middle = min(zeros, key=lambda share: abs(share - SPEED_ZEROS))
    return RatesReport(rates, weights, seed, middle, *_speeds(_draw(weights, seed, middle)), _machine())


def _speeds(digits: Digits) -> tuple[float, float]:
    """Millions of weights a second that one thread encodes and decodes, the medians of some trials."""
    rows = digits[: len(digits) // WIDTH * WIDTH].reshape(-1, WIDTH)
    levels, book = torch.ones(len(rows), 2, dtype=torch.bfloat16), Codebook.choose(count(digits, 3).tolist())
    packed = encode(rows, levels, book)
    decode(packed)  # compiles
    with limited_threads(1):
        calls = (lambda: encode(rows, levels, book), lambda: decode(packed))
        encoding, decoding = (statistics.median(_seconds(call) for _ in range(_TRIALS)) for call in calls)
    return rows.size / encoding / 1e6, rows.size / decoding / 1e6


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure_model(directory: str, weights: int = WEIGHTS) -> ModelRatesReport:
    """Code the digits of a compressed model in every way.

    Parameters
    ----------
    directory : str
        What `compress` wrote.
    weights : int, default 4,300,800
        Of each projection of a layer, as many whole experts are read as have no more weights; one at least.

    Raises
    ------
    SettingError
        The model's digits are two-bit ones, which neither the paper's dictionary nor five a byte can hold.
    CheckpointError, FormatError
        No compressed model, or a damaged one.
    """
    from qmoe_lite.offload.loading import load  # transformers takes seconds, and random digits do not need it

    model = load(directory, device="cpu")
    layers = [module for module in model.modules() if isinstance(module, PackedExperts)]
    rates = tuple(_measure_projection(each, name, weights) for each in layers for name in each.layer.projections)
    return ModelRatesReport(directory, rates, _total(rates), _machine())


def _machine() -> str:
    return machine_line("numpy", "numba", "torch", "zstandard")


def _measure_one(digits: Digits, zeros: float) -> Rates:
    counts, rows = count(digits, 3).tolist(), _rows(digits, WIDTH)
    by_bits = {bits: _code_bits(rows, Codebook.fit(counts, bits)) for bits in BITS}
    chosen = Codebook.choose(counts, rows)
    shares = np.array([(1 - zeros) / 2, zeros, (1 - zeros) / 2])
    return Rates(
        zeros=zeros,
        entropy=_entropy(shares),
        by_bits={str(bits): rate for bits, rate in by_bits.items()},
        bits=chosen.bits,
        ours=by_bits[chosen.bits],
        paper=_code_bits(rows, Codebook.paper()),
        zstd=_zstd_bits(digits),
        widths=tuple(_measure_width(_rows(digits, columns), chosen) for columns in WIDTHS),
    )


def _measure_width(rows: Digits, codebook: Codebook) -> WidthRates:
    levels, columns = torch.ones(len(rows), 2, dtype=torch.bfloat16), rows.shape[1]
    paper = _code_bits(rows, Codebook.paper())
    return WidthRates(
        columns=columns,
        ours=_code_bits(rows, codebook),
        ours_stored=encode(rows, levels, codebook).bits_per_weight,
        paper=paper,
        paper_stored=paper + PAPER_ROW_BITS / columns,
    )


def _measure_projection(experts: PackedExperts, projection: str, weights: int) -> ProjectionRates:
    codebook, (rows, columns) = experts.codebooks[projection], experts.layer.shapes[projection]
    if not isinstance(codebook, Codebook) or codebook.digits != 3:
        raise SettingError(f"{experts.layer.experts} holds other digits than ternary ones. Name another model.")
    taken = min(experts.num_experts, max(1, weights // (rows * columns)))
    packed = [experts.packed(expert, projection) for expert in range(taken)]
    digits = np.concatenate([decode(each)[0].numpy() for each in packed])
    shares = count(digits, 3) / digits.size
    stored = experts.stack(projection).nbytes
    paper = _code_bits(digits, Codebook.paper())
    return ProjectionRates(
        layer=short_name(experts.layer.block),
        projection=projection,
        weights=digits.size,
        zeros=float(shares[1]),
        entropy=_entropy(shares),
        bits=codebook.bits,
        ours=_code_bits(digits, codebook),
        stored=8 * stored / (experts.num_experts * rows * columns),
        paper=paper,
        paper_stored=paper + PAPER_ROW_BITS / columns,
        zstd=_zstd_bits(digits),
    )


def _total(rates: tuple[ProjectionRates, ...]) -> ProjectionRates:
    """Return the means over all weights."""
    weights = [each.weights for each in rates]

    def mean(values: list[float]) -> float:
        return float(np.average(values, weights=weights))

    plain = ("zeros", "entropy", "ours", "stored", "paper", "paper_stored")
    bits = {each.bits for each in rates}
    return ProjectionRates(
        layer="all",
        projection="all",
        weights=sum(weights),
        bits=bits.pop() if len(bits) == 1 else None,
        zstd={name: mean([each.zstd[name] for each in rates]) for name in rates[0].zstd},
        **{name: mean([getattr(each, name) for each in rates]) for name in plain},
    )


def _draw(weights: int, seed: int, zeros: float) -> Digits:
    """Independent digits, int8, shape (weights,)."""
    places = np.random.default_rng(seed).random(weights)
    return (places >= (1 + zeros) / 2).astype(np.int8) - (places < (1 - zeros) / 2).astype(np.int8)


def _rows(digits: Digits, columns: int) -> Digits:
    return digits[: len(digits) // columns * columns].reshape(-1, columns)


def _entropy(shares: NDArray[np.float64]) -> float:
    """Bits of an independent digit; a digit that never occurs adds none."""
    some = shares[shares > 0]
    return float(-(some * np.log2(some)).sum())


def _zstd_bits(digits: Digits) -> dict[str, float]:
    """Bits per weight of zstd by packing and level, all rows as one content."""
    packings = {"2-bit": squeeze(digits & 3, 4).tobytes(), "5 a byte": squeeze(digits, 3).tobytes()}
    return {
        f"{name} -{level}": 8 * len(zstandard.ZstdCompressor(level=level).compress(content)) / digits.size
        for name, content in packings.items()
        for level in (3, 19)
    }


def _code_bits(rows: Digits, codebook: Codebook) -> float:
    """Code bits per weight of rows of digits, after a look that they come back."""
    packed = encode(rows, torch.ones(len(rows), 1, dtype=torch.bfloat16), codebook)
    if not np.array_equal(decode(packed)[0].numpy(), rows):
        raise FormatError(f"{codebook!r} did not decode to what it encoded. Report this with the machine's name.")
    return codebook.bits * int(packed.count_codewords().sum()) / rows.size
