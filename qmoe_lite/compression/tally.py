"""One projection's digits and figures, kept until all groups of its experts are done."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from qmoe_lite.checkpoint.format import bytes_of_experts, pack_experts
from qmoe_lite.checkpoint.report import ProjectionReport
from qmoe_lite.coding.alphabet import ALPHABETS
from qmoe_lite.coding.codebook import Codebook
from qmoe_lite.coding.codec import decode, encode, with_steps
from qmoe_lite.coding.dictionary import Dictionary, count_sizes
from qmoe_lite.coding.packed import PackedMatrix
from qmoe_lite.coding.window_parts import dictionary_of
from qmoe_lite.compression.dictionaries import Dictionaries, signed
from qmoe_lite.compression.rate import entropy
from qmoe_lite.models.blocks import MoELayer
from qmoe_lite.quantization.digits import count, squeeze, unsqueeze
from qmoe_lite.quantization.grid import Grid, Quantized, UniformGrid

_SAMPLE = 1 << 22  # digits, over all experts of a projection, that choose its codebook; at least a row of each
_REWRITE = 0.005  # share of the bits from which on all experts are written again


class Solved(NamedTuple):
    """One projection of a group of experts, and the grid that it was solved with."""

    quantized: Quantized
    tokens: list[int]
    classes: list[str]
    grid: Grid | None = None

    @classmethod
    def of(cls, quantized: Quantized, rows_of: list[Tensor], starved: list[bool], grid: Grid) -> Solved:
        """Put together a projection whose experts saw these tokens; those that saw too few had the layer's as well."""
        pairs = zip(quantized.hessian_class, starved, strict=True)
        classes = ["blended" if known == "own" and few else known for known, few in pairs]
        return cls(quantized, [len(rows) for rows in rows_of], classes, grid)


class Tally(Protocol):
    """What a layer's compressor keeps of one projection until all groups of its experts are done."""

    def add(self, solved: Solved) -> None:
        """Take over a group of experts."""

    def finish(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the tensors to write, by part, and the code as config.json names it."""

    def report(self) -> ProjectionReport:
        """Return what the report says of the projection, once it is finished."""


class _Figures:
    """What both tallies count."""

    def __init__(self, layer: MoELayer, projection: str) -> None:
        self.layer, self.projection = layer, projection
        self.rows, self.columns = layer.shapes[projection]
        self.weights = layer.count * self.rows * self.columns
        self._errors: list[float] = []
        self._tokens: list[int] = []
        self._classes: dict[str, int] = {}
        self._grids: list[tuple[float, float]] = []  # step and dead zone of each expert

    def add(self, solved: Solved) -> None:
        self._errors += solved.quantized.error.tolist()
        self._tokens += solved.tokens
        if isinstance(solved.grid, UniformGrid):
            self._grids += [(solved.grid.step, solved.grid.dead_zone)] * len(solved.tokens)
        for name in solved.classes:
            self._classes[name] = self._classes.get(name, 0) + 1

    def report(
        self,
        tensors: dict[str, Tensor],
        packed: list[PackedMatrix],
        zeros: int,
        entropy: float | None = None,
        largest_digit: int | None = None,
        exceptions: float | None = None,
    ) -> ProjectionReport:
        step, dead_zone = np.mean(self._grids, axis=0).tolist() if self._grids else (None, None)
        return ProjectionReport(
            layer=self.layer.experts,
            projection=self.projection,
            experts=self.layer.count,
            rows=self.rows,
            columns=self.columns,
            bits_per_weight=8 * sum(tensor.nbytes for tensor in tensors.values()) / self.weights,
            code_bits_per_weight=sum(int(p.count_codewords().sum()) * p.codebook.bits for p in packed) / self.weights,
            codeword_bits=packed[0].codebook.bits,
            zeros=zeros / self.weights,
            error=float(np.mean(self._errors)),
            hessian_classes=self._classes,
            tokens=self._tokens,
            entropy=entropy,
            largest_digit=largest_digit,
            exceptions=exceptions,
            step=step,
            dead_zone=dead_zone,
        )


class CodebookTally:
    """Keeps digits of a small alphabet, five or four to a byte: their codebook is fitted to all of them.

    Parameters
    ----------
    layer : MoELayer
    projection : str
    grid : Grid
    choose : callable
        Returns the codebook for the counts of the digits and a sample of rows of them.
    """

    def __init__(
        self, layer: MoELayer, projection: str, grid: Grid, choose: Callable[[list[int], np.ndarray], Codebook]
    ) -> None:
        self._figures, self._grid, self._choose = _Figures(layer, projection), grid, choose
        self.counts = np.zeros(grid.alphabet, dtype=np.int64)
        self._kept: list[tuple[np.ndarray, Tensor]] = []
        self._sample: list[np.ndarray] = []
        self._report: ProjectionReport | None = None

    def add(self, solved: Solved) -> None:
        """Take over a group of experts."""
        figures, alphabet = self._figures, self._grid.alphabet
        step = min(figures.rows, max(1, figures.weights // _SAMPLE))
        all_digits, all_levels = solved.quantized.digits.cpu().numpy(), solved.quantized.levels.cpu()
        for digits, levels in zip(all_digits, all_levels, strict=True):
            self.counts += count(digits, alphabet)
            self._sample.append(digits[len(self._kept) % step :: step].copy())
            self._kept.append((squeeze(digits, alphabet), levels.clone()))
        figures.add(solved)

    def sample(self) -> np.ndarray:
        """Return rows of digits from all experts, int8 (rows, C)."""
        return np.concatenate(self._sample)

    def finish(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Fit the codebook and write all experts with it; forget the digits."""
        figures = self._figures
        book, dtype = self._choose(self.counts.tolist(), self.sample()), self._grid.level_dtype or torch.float32
        packed = []
        while self._kept:
            small, levels = self._kept.pop(0)
            digits = unsqueeze(small, (figures.rows, figures.columns), self._grid.alphabet)
            packed.append(encode(digits, levels.to(dtype), book))
        stored = pack_experts(packed)
        zeros = int(self.counts[ALPHABETS[self._grid.alphabet].zero_symbol])
        self._report = figures.report(stored, packed, zeros)
        return stored, book.to_config()

    def report(self) -> ProjectionReport:
        """Return what the report says of the projection, once it is finished."""
        assert self._report is not None
        return self._report


class WindowTally:
    """Writes digits of any size a group at a time, by a dictionary that the first group chooses.

    Parameters
    ----------
    layer : MoELayer
    projection : str
    level_dtype : torch dtype
        That steps are stored in.
    dictionaries : Dictionaries
        Of the model.
    """

    def __init__(self, layer: MoELayer, projection: str, level_dtype: torch.dtype, dictionaries: Dictionaries) -> None:
        self._figures, self._dictionaries, self._dtype = _Figures(layer, projection), dictionaries, level_dtype
        self._shares_scales = layer.first_of_stage(projection) != projection
        self.dictionary: Dictionary | None = None  # of the groups so far
        self._sizes = np.zeros(1, dtype=np.int64)
        self._groups = 0
        self._packed: list[PackedMatrix] = []
        self._latest: tuple[Solved, Dictionary, list[PackedMatrix]] | None = None
        self._report: ProjectionReport | None = None

    def encode(self, solved: Solved) -> list[PackedMatrix]:
        """Write a group of experts, which may yet be solved again."""
        digits, latest = solved.quantized.digits, self._latest
        if latest is not None and latest[0] is solved:
            return latest[2]
        levels, scales = solved.quantized.levels.cpu().to(self._dtype), solved.quantized.column_scales
        per_expert = [None] * len(levels) if scales is None else list(scales.cpu())
        if latest is not None and latest[0].quantized.digits is digits:  # training has left them
            book = latest[1]
            packed = [with_steps(*each) for each in zip(latest[2], levels, per_expert, strict=True)]
        else:
            all_digits = digits.cpu().numpy()
            book = self.dictionary or self._dictionaries.choose(count_sizes(all_digits))
            packed = [encode(d, steps, book, s) for d, steps, s in zip(all_digits, levels, per_expert, strict=True)]
        self._latest = solved, book, packed
        return packed

    def bits(self, packed: list[PackedMatrix]) -> int:
        """Return the bits that a group takes as it is stored."""
        return 8 * bytes_of_experts(packed, shares_scales=self._shares_scales)

    def keep(self, solved: Solved, packed: list[PackedMatrix]) -> None:
        """Take over a group of experts as `encode` wrote them."""
        self.dictionary = self.dictionary or dictionary_of(packed[0])
        self._dictionaries.use(self.dictionary)
        both = self._sizes, count_sizes(solved.quantized.digits.cpu().numpy())
        self._sizes = np.zeros(max(map(len, both)), dtype=np.int64)
        for sizes in both:
            self._sizes[: len(sizes)] += sizes
        self._packed += packed
        self._groups, self._latest = self._groups + 1, None
        self._figures.add(solved)

    def add(self, solved: Solved) -> None:
        """Take over a group of experts."""
        self.keep(solved, self.encode(solved))

    def give(self) -> list[PackedMatrix]:
        """Hand over the experts that were taken over, to be kept by the tally of another rank."""
        given, self._packed = self._packed, []
        return given

    def finish(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Lay all experts side by side."""
        assert self.dictionary is not None
        of_all = self.dictionary
        if self._groups > 1:  # the first may not stand for the others
            of_all = self._dictionaries.choose(self._sizes)
        if of_all.expected_bits(self._sizes) < (1 - _REWRITE) * self.dictionary.expected_bits(self._sizes):
            self._packed = [encode(decode(p)[0].numpy(), p.levels, of_all, p.column_scales) for p in self._packed]
            self.dictionary = of_all
            self._dictionaries.use(of_all)
        stored = pack_experts(self._packed, shares_scales=self._shares_scales)
        exceptions = stored["exception_values"].numel() / self._figures.weights
        figures = entropy(signed(self._sizes)), len(self._sizes) - 1, exceptions
        self._report = self._figures.report(stored, self._packed, int(self._sizes[0]), *figures)
        self._packed = []
        return stored, self.dictionary.to_config()

    def report(self) -> ProjectionReport:
        """Return what the report says of the projection, once it is finished."""
        assert self._report is not None
        return self._report


def windows_of(tallies: Mapping[str, Tally]) -> dict[str, WindowTally]:
    """Return the tallies of digits of any size."""
    return {name: tally for name, tally in tallies.items() if isinstance(tally, WindowTally)}


def add_group(tallies: Mapping[str, Tally], solved: Mapping[str, Solved], *, together: bool = False) -> None:
    """Take over all projections of a group of experts.

    Parameters
    ----------
    tallies : dict, projection to tally
        Of the layer.
    solved : dict, projection to Solved
        Of the group.
    together : bool
        Encode all of them before any of their dictionaries is taken note of, as a group does that is solved at a rate.
    """
    if not together:
        for name, result in solved.items():
            tallies[name].add(result)
        return
    windows = windows_of(tallies)
    packed = {name: tally.encode(solved[name]) for name, tally in windows.items()}
    keep_group(windows, solved, packed)


def keep_group(
    tallies: Mapping[str, Tally], solved: Mapping[str, Solved], packed: Mapping[str, list[PackedMatrix]]
) -> None:
    """Take over all projections of a group, encoded already where its digits are of any size."""
    for name, tally in tallies.items():
        if isinstance(tally, WindowTally):
            tally.keep(solved[name], packed[name])
        else:
            tally.add(solved[name])
