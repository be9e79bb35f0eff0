"""Experts of drawn weights and tokens, compressed by the code that a run uses, to see how long it takes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qmoe_lite.coding.dictionary import Dictionary
from qmoe_lite.coding.windows_product import USUAL_BITS
from qmoe_lite.compression.block_tuning import BlockTuning
from qmoe_lite.compression.calibration import Samples
from qmoe_lite.compression.dictionaries import Dictionaries
from qmoe_lite.compression.layer import LayerCompressor
from qmoe_lite.compression.layer_parts import LayerInputs
from qmoe_lite.compression.list_buffer import ListBuffer
from qmoe_lite.compression.rate import first_step
from qmoe_lite.compression.run_samples import RunSamples
from qmoe_lite.compression.settings import Settings
from qmoe_lite.inspection.anatomy import Anatomy
from qmoe_lite.inspection.tries import Tries, one_thread
from qmoe_lite.models.blocks import MoELayer
from qmoe_lite.models.routing import Assignment
from qmoe_lite.quantization.grid import Grid, UniformGrid


class _Drawn:
    """Stands for a checkpoint whose experts' weights are drawn."""

    directory = Path("drawn")

    def __init__(self, shapes: dict[str, tuple[int, int]]) -> None:
        generator = torch.Generator().manual_seed(0)
        self._of = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}

    def tensor(self, name: str) -> Tensor:
        """Return the same matrix for each expert."""
        return self._of[name.split(".")[-2]]

    def will_need(self, names: Iterable[str]) -> None:
        """Do nothing: they are here."""


class _Chosen(Dictionaries):
    """Takes the first dictionary for all digits: choosing is measured apart."""

    def choose(self, sizes: NDArray[np.int64]) -> Dictionary:
        """Return the one that is known, or one for these digits."""
        return self.known[0] if self.known else super().choose(sizes)


class DrawnExperts:
    """Compresses drawn experts by the code that a run uses.

    Parameters
    ----------
    anatomy : Anatomy
        Of the dense model.
    settings, grid
        As `choice.choose` returned them.

    Attributes
    ----------
    tries : Tries
        That it made.
    """

    def __init__(self, anatomy: Anatomy, settings: Settings, grid: Grid) -> None:
        # one solve an expert: of a rate that is aimed at, some groups are solved several times, which is counted apart
        self._settings = replace(settings, rate=None, blend_tokens=0, validation_samples=0)
        step = first_step(0.95 * (settings.rate or 2.0))
        self._grid = replace(grid, step=step) if isinstance(grid, UniformGrid) else grid
        self._anatomy, self._dictionaries = anatomy, _Chosen(USUAL_BITS)
        self.tries = Tries(by_processor=one_thread(torch.device(settings.device)))

    def seconds(self, shapes: dict[str, tuple[int, int]], experts: int, tokens: int, *, tuned: bool = False) -> float:
        """Seconds for a layer of experts of this shape that get so many tokens each, and are tuned on them."""
        family, config = self._anatomy.family, self._anatomy.config
        layer = MoELayer(self._anatomy.layers[0].experts, "drawn", experts, shapes)  # a name that has an activation
        drawn: Any = _Drawn(shapes)
        compressor = LayerCompressor(family, config, drawn, self._grid, self._settings)
        if isinstance(self._grid, UniformGrid):
            compressor.dictionaries = self._dictionaries
        if tuned:
            ids = np.zeros((2, experts * tokens), dtype=np.int64)  # a sample, and its twin
            samples = RunSamples(Samples(ids, None, 1), 1, 1, 1)
            compressor.tuning = BlockTuning(compressor, samples, self._settings)
        seen = None if self._settings.recipe == "nearest" else _seen(shapes, experts, tokens, 1 + tuned)
        with torch.inference_mode():
            return self.tries.once(partial(compressor.compress, layer, 0, seen, lambda *progress: None))

    def best(self, shapes: dict[str, tuple[int, int]], experts: int, tokens: int, *, tuned: bool = False) -> float:
        """Do what `seconds` does a few times; return the least."""
        return self.tries.best(partial(self.seconds, shapes, experts, tokens, tuned=tuned))


def _seen(shapes: dict[str, tuple[int, int]], experts: int, tokens_of_each: int, samples: int) -> LayerInputs:
    """Return a sample of drawn tokens, or two of them, of which the other is for reference."""
    names, tokens = list(shapes), experts * tokens_of_each
    inputs = ListBuffer(samples, tokens, shapes[names[0]][1])
    inputs.rows.normal_(generator=torch.Generator().manual_seed(1))
    outputs = ListBuffer(samples, tokens, shapes[names[-1]][0])
    outputs.rows.zero_()
    count = samples * tokens
    assigned = Assignment.group(torch.arange(count)[:, None] % experts, torch.ones(count, 1), experts)
    eligible = torch.arange(count) < tokens
    return LayerInputs(inputs, assigned, eligible, torch.zeros_like(eligible), ~eligible, inputs.rows[:1], outputs)
