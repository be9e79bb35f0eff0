"""Which grid, rate and tuning a compression takes where they were left open, and which go together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from qmoe_lite.checkpoint.report import ProjectionReport
from qmoe_lite.coding.strings import PAPER_BITS
from qmoe_lite.compression.settings import Settings
from qmoe_lite.compression.shares import MEASURED, NONE
from qmoe_lite.errors import SettingError
from qmoe_lite.quantization.grid import Grid, MinMaxTernary, UniformGrid

TERNARY_FAMILIES = ("switch_transformers",)  # the paper's realm: .8 bits and fewer by the ternary grid
USUAL_RATE = 2.0  # stored bits a weight of other families
TRAINED_RATE = 2.75  # up to which training wins beyond targets; bench/results/tuned-by-block.txt


def choose(grid: Grid | None, settings: Settings, model_type: str, layers: int) -> tuple[Grid, Settings]:
    """Return the grid and the settings that hold for a model of so many sparse layers.

    What the recipe decides is in them, and what was left open.

    Raises
    ------
    SettingError
        The recipe, the grid and the rate do not go together.
    """
    if grid is not None and (isinstance(grid, type) or not hasattr(grid, "to_config")):
        raise SettingError(f"grid is {grid!r}; expected a UniformGrid, a MinMaxTernary or a MinMaxTwoBit. Give one.")
    if settings.recipe == "paper" and (settings.rate is not None or (grid is not None and grid.alphabet != 3)):
        raise SettingError("the paper's dictionary codes ternary weights only. Use recipe default for other grids.")
    if settings.rate is not None and grid is not None and not isinstance(grid, UniformGrid):
        raise SettingError(f"rate is {settings.rate:g}, which only the uniform grid reaches. Leave the grid out.")
    if settings.stop_when_bad and (settings.recipe == "nearest" or settings.validation_samples == 0):
        raise SettingError("stop_when_bad needs validation samples. Set validation_samples, and calibrate.")
    if settings.products != "float32" and settings.recipe == "nearest":
        raise SettingError("recipe nearest multiplies no tokens. Leave products out.")
    if settings.tune not in (None, "none") and settings.recipe == "nearest":
        raise SettingError("recipe nearest takes no text, and tuning needs one. Choose another recipe, or tune none.")
    if settings.recipe == "paper":
        settings = replace(settings, codeword_bits=PAPER_BITS, blend_tokens=0)
    ternary = grid is None and (settings.recipe != "default" or model_type in TERNARY_FAMILIES)
    if isinstance(settings.sensitivity, dict) and settings.rate is None and (ternary or grid is not None):
        raise SettingError("sensitivity shares out a rate's bits, and there is no rate. Set one.")
    if ternary and settings.rate is None:
        return MinMaxTernary(level_dtype=torch.bfloat16), _decided(settings, layers)
    if grid is None:
        settings = replace(settings, rate=settings.rate or USUAL_RATE)
        grid = UniformGrid(level_dtype=torch.bfloat16)
    if isinstance(grid, UniformGrid) and settings.codeword_bits is not None and not 9 <= settings.codeword_bits <= 12:
        raise SettingError(f"codeword_bits is {settings.codeword_bits}; the uniform grid's code takes 9 to 12.")
    return grid, _decided(settings, layers)


def _decided(settings: Settings, layers: int) -> Settings:
    """Return settings that say what is tuned and how layers share the bits, of which all else is chosen."""
    tune, shares = NONE, NONE
    if settings.recipe == "default":
        tune = "block" if settings.rate is not None and settings.rate <= TRAINED_RATE else "targets"
        shares = NONE if settings.rate is None or layers == 1 else MEASURED
    return replace(settings, tune=settings.tune or tune, sensitivity=settings.sensitivity or shares)


def as_used(grid: Grid, projections: Sequence[ProjectionReport]) -> Grid:
    """Return a uniform grid with the means of its layers' steps and dead zones, which follow rate and model."""

    def mean(name: str) -> float:
        return sum(getattr(row, name) * row.weights for row in projections) / sum(row.weights for row in projections)

    if not isinstance(grid, UniformGrid) or not projections:
        return grid
    return replace(grid, step=mean("step"), dead_zone=mean("dead_zone"))
