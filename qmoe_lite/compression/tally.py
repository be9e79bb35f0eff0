"""One projection's digits and figures, kept until all groups of its experts are done."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch import Tensor

from qmoe_lite.checkpoint.report import ProjectionReport
from qmoe_lite.coding.alphabet import ALPHABETS
from qmoe_lite.coding.packed import PackedMatrix
from qmoe_lite.models.blocks import MoELayer
from qmoe_lite.quantization.digits import count, squeeze, unsqueeze
from qmoe_lite.quantization.grid import Quantized

_SAMPLE = 1 << 22  # digits, over all experts of a projection, that choose its codebook; at least a row of each


class Solved(NamedTuple):
    """One projection of a group of experts."""

    quantized: Quantized
    tokens: list[int]
    classes: list[str]


class Tally:
    """Keeps one projection's digits, five to a byte, and its figures, until all groups are done."""

    def __init__(self, layer: MoELayer, projection: str, alphabet: int) -> None:
        self._layer, self._projection, self._alphabet = layer, projection, alphabet
        self.counts = np.zeros(alphabet, dtype=np.int64)
        self._kept: list[tuple[np.ndarray, Tensor]] = []
        self._sample: list[np.ndarray] = []
        self._errors: list[float] = []
        self._tokens: list[int] = []
        self._classes: dict[str, int] = {}
        self._bytes = self._code_bits = self._codeword_bits = 0

    def add(self, solved: Solved) -> None:
        """Take over a group of experts."""
        rows, columns = self._layer.shapes[self._projection]
        step = min(rows, max(1, self._layer.count * rows * columns // _SAMPLE))
        all_digits, all_levels = solved.quantized.digits.cpu().numpy(), solved.quantized.levels.cpu()
        for digits, levels in zip(all_digits, all_levels, strict=True):
            self.counts += count(digits, self._alphabet)
            self._sample.append(digits[len(self._kept) % step :: step].copy())
            self._kept.append((squeeze(digits, self._alphabet), levels.clone()))
        self._errors += solved.quantized.error.tolist()
        self._tokens += solved.tokens
        for name in solved.classes:
            self._classes[name] = self._classes.get(name, 0) + 1

    def sample(self) -> np.ndarray:
        """Rows of digits from all experts, int8 (rows, C)."""
        return np.concatenate(self._sample)

    def matrices(self) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Return each expert's digits (R, C) and levels (R, L), and forget them."""
        while self._kept:
            small, levels = self._kept.pop(0)
            yield unsqueeze(small, self._layer.shapes[self._projection], self._alphabet), levels

    def stored(self, tensors: dict[str, Tensor], packed: list[PackedMatrix]) -> None:
        """Note what the projection takes on disk."""
        self._bytes = sum(tensor.nbytes for tensor in tensors.values())
        self._codeword_bits = packed[0].codebook.bits
        self._code_bits = sum(int(p.count_codewords().sum()) * p.codebook.bits for p in packed)

    def report(self) -> ProjectionReport:
        rows, columns = self._layer.shapes[self._projection]
        weights = self._layer.count * rows * columns
        zero = ALPHABETS[self._alphabet].zero_symbol
        return ProjectionReport(
            layer=self._layer.experts,
            projection=self._projection,
            experts=self._layer.count,
            rows=rows,
            columns=columns,
            bits_per_weight=8 * self._bytes / weights,
            code_bits_per_weight=self._code_bits / weights,
            codeword_bits=self._codeword_bits,
            zeros=int(self.counts[zero]) / weights,
            error=float(np.mean(self._errors)),
            hessian_classes=self._classes,
            tokens=self._tokens,
        )
