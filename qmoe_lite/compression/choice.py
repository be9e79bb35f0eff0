"""Which grid and rate a compression takes where they were left open, and which go together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from qmoe_lite.checkpoint.report import ProjectionReport
from qmoe_lite.compression.settings import Settings
from qmoe_lite.errors import SettingError
from qmoe_lite.quantization.grid import Grid, MinMaxTernary, UniformGrid

TERNARY_FAMILIES = ("switch_transformers",)  # the paper's realm: .8 bits and fewer by the ternary grid
USUAL_RATE = 2.0  # stored bits a weight of other families


def grid_and_rate(grid: Grid | None, settings: Settings, model_type: str) -> tuple[Grid, Settings]:
    """Return the grid and the settings that hold, with what is chosen where nothing was asked for.

    Raises
    ------
    SettingError
        The recipe, the grid and the rate do not go together.
    """
    if settings.recipe == "paper" and (settings.rate is not None or (grid is not None and grid.alphabet != 3)):
        raise SettingError("the paper's dictionary codes ternary weights only. Use recipe default for other grids.")
    if settings.rate is not None and grid is not None and not isinstance(grid, UniformGrid):
        raise SettingError(f"rate is {settings.rate:g}, which only the uniform grid reaches. Leave the grid out.")
    if settings.stop_when_bad and (settings.recipe == "nearest" or settings.validation_samples == 0):
        raise SettingError("stop_when_bad needs validation samples. Set validation_samples, and calibrate.")
    if grid is None and settings.rate is None and (settings.recipe != "default" or model_type in TERNARY_FAMILIES):
        return MinMaxTernary(level_dtype=torch.bfloat16), settings
    if grid is None:
        settings = replace(settings, rate=settings.rate or USUAL_RATE)
        grid = UniformGrid(level_dtype=torch.bfloat16)
    if isinstance(grid, UniformGrid) and settings.codeword_bits is not None and not 9 <= settings.codeword_bits <= 12:
        raise SettingError(f"codeword_bits is {settings.codeword_bits}; the uniform grid's code takes 9 to 12.")
    return grid, settings


def with_mean_step(grid: Grid, projections: Iterable[ProjectionReport]) -> Grid:
    """Return the grid as it was used: a uniform one with the mean of its layers' steps, which follow the rate."""
    steps = [(row.step, row.weights) for row in projections if row.step is not None]
    if not isinstance(grid, UniformGrid) or not steps:
        return grid
    return replace(grid, step=sum(step * weights for step, weights in steps) / sum(weights for _, weights in steps))
