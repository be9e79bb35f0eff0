"""Bits per weight of fitted codes, the paper's dictionary and zstd, on independent ternary digits.

Every coded figure is of a stream that was decoded again and found equal.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import zstandard
from numpy.typing import NDArray

from qmoe_lite.bench._common import machine_line
from qmoe_lite.codebook import Codebook
from qmoe_lite.codec import decode, encode
from qmoe_lite.digits import count, squeeze
from qmoe_lite.errors import FormatError, SettingError

ZEROS = (0.80, 0.85, 0.885, 0.92, 0.95)
BITS = (8, 10, 12)
WIDTHS = (768, 2048, 3072, 14336)
WIDTH = 2048  # of the rows where one width must do
UNIT = 43008  # weights: whole rows of every width
OUR_ROW_BITS = 16 + 2 * 16  # row length, two bfloat16 levels
PAPER_ROW_BITS = 32 + 2 * 16  # row offset, two bfloat16 levels


@dataclass(frozen=True)
class WidthRates:
    """Bits per weight of one width: codes only, and with what is stored for each row; ours at 10 bits."""

    columns: int
    ours: float
    ours_stored: float
    paper: float
    paper_stored: float


@dataclass(frozen=True)
class Rates:
    """Bits per weight at one share of zeros; `tunstall` by codeword bits, `zstd` by packing and level."""

    zeros: float
    entropy: float
    tunstall: dict[str, float]
    paper: float
    zstd: dict[str, float]
    widths: tuple[WidthRates, ...]


@dataclass(frozen=True)
class RatesReport:
    """What `measure` found, and where."""

    rates: tuple[Rates, ...]
    weights: int
    seed: int
    machine: str

    def to_json(self) -> dict[str, Any]:
        """Return the whole as JSON values."""
        return asdict(self)


def measure(weights: int = 100 * UNIT, *, seed: int = 0, zeros: tuple[float, ...] = ZEROS) -> RatesReport:
    """Code the same random digits in every way.

    Parameters
    ----------
    weights : int, default 4,300,800
        Digits drawn for each share of zeros; rounded up to whole rows of every width.
    seed : int
        The same seed gives the same digits.
    zeros : tuple of float
        Shares of zeros; -1 and +1 split the rest evenly.

    Raises
    ------
    SettingError
        Fewer than one weight, or a share outside 0 to 1.
    FormatError
        A stream did not decode to what was encoded.
    """
    if weights < 1 or not all(0 < share < 1 for share in zeros):
        raise SettingError(f"weights is {weights}, zeros {zeros}; expected at least 1, and shares between 0 and 1.")
    weights = -(-weights // UNIT) * UNIT
    rates = tuple(_measure_one(weights, seed, share) for share in zeros)
    return RatesReport(rates, weights, seed, machine_line("numpy", "numba", "torch", "zstandard"))


def _measure_one(weights: int, seed: int, zeros: float) -> Rates:
    digits = _draw(weights, seed, zeros)
    shares = np.array([(1 - zeros) / 2, zeros, (1 - zeros) / 2])
    counts = count(digits, 3).tolist()
    codebooks = {bits: Codebook.fit(counts, bits) for bits in BITS}
    widths = []
    for columns in WIDTHS:
        ours, paper = (_code_bits(digits, columns, codebook) for codebook in (codebooks[10], Codebook.paper()))
        stored = ours + OUR_ROW_BITS / columns, paper + PAPER_ROW_BITS / columns
        widths.append(WidthRates(columns, ours, stored[0], paper, stored[1]))
    packings = {"2-bit": squeeze(digits & 3, 4).tobytes(), "5 a byte": squeeze(digits, 3).tobytes()}
    return Rates(
        zeros=zeros,
        entropy=float(-(shares * np.log2(shares)).sum()),
        tunstall={str(bits): _code_bits(digits, WIDTH, codebook) for bits, codebook in codebooks.items()},
        paper=_code_bits(digits, WIDTH, Codebook.paper()),
        zstd={
            f"{name} -{level}": 8 * len(zstandard.ZstdCompressor(level=level).compress(content)) / weights
            for name, content in packings.items()
            for level in (3, 19)
        },
        widths=tuple(widths),
    )


def _draw(weights: int, seed: int, zeros: float) -> NDArray[np.int8]:
    """Independent digits, int8, shape (weights,)."""
    places = np.random.default_rng(seed).random(weights)
    return (places >= (1 + zeros) / 2).astype(np.int8) - (places < (1 - zeros) / 2).astype(np.int8)


def _code_bits(digits: NDArray[np.int8], columns: int, codebook: Codebook) -> float:
    """Code bits per weight of rows of `columns`, after a look that they come back."""
    rows = digits.reshape(-1, columns)
    packed = encode(rows, torch.ones(len(rows), 1, dtype=torch.bfloat16), codebook)
    if not np.array_equal(decode(packed)[0].numpy(), rows):
        raise FormatError(f"{codebook!r} did not give back what it encoded. Report this with the machine's name.")
    return codebook.bits * int(packed.row_codewords.to(torch.int64).sum()) / digits.size
