"""What a weight takes in a grid whose bits follow from the weights: rounded to nearest, a few matrices show it."""

from __future__ import annotations

import numpy as np

from qmoe_lite.checkpoint.headers import Headers
from qmoe_lite.coding.codebook import Codebook
from qmoe_lite.coding.codec import encode
from qmoe_lite.inspection.anatomy import Anatomy
from qmoe_lite.models.skeletons import open_checkpoint
from qmoe_lite.quantization.digits import count
from qmoe_lite.quantization.grid import Grid
from qmoe_lite.quantization.solver import gptq

USUAL = {3: 0.8, 4: 1.6}  # bits by the alphabet: the paper's for Switch Transformers, and twice that
_LAYERS, _ROWS = 3, 256
_SOLVED = 1.3  # times the bits of rounding to nearest: the solver makes up for errors by digits that are not zero


def bits_of_grid(headers: Headers, anatomy: Anatomy, grid: Grid, read: list[str], assumed: list[str]) -> float:
    """Return the stored bits a weight to expect, and say where they come from.

    Parameters
    ----------
    headers, anatomy
        Of the dense model, whose shards may be elsewhere.
    grid : Grid
        With a small alphabet.
    read, assumed : list of str
        Take a line.
    """
    if not headers.shards or not headers.held:
        bits = USUAL.get(grid.alphabet, 2.0)
        assumed.append(f"{bits:g} bits a weight of grid {grid.word}, as the paper's models take: there are no files")
        return bits
    _, checkpoint = open_checkpoint(headers.directory, True)
    layers = anatomy.layers[:: max(1, len(anatomy.layers) // _LAYERS)][:_LAYERS]
    taken = weights = 0.0
    for layer in layers:
        for projection in layer.projections:
            name = anatomy.family.weight_name(layer, 0, projection)
            found = gptq(checkpoint.tensor(name)[:_ROWS].float(), None, grid)
            digits = np.ascontiguousarray(found.digits.numpy())
            book = Codebook.choose(count(digits, grid.alphabet).tolist(), digits)
            levels = found.levels if grid.level_dtype is None else found.levels.to(grid.level_dtype)
            packed = encode(digits, levels, book)
            taken += packed.bits_per_weight * digits.size
            weights += digits.size
    matrices = len(layers) * len(layers[0].projections)
    read.append(f"rows of {matrices} matrices, rounded to nearest, for the bits a weight")
    assumed.append(f"solved digits take {_SOLVED:g} times the bits of those rounded to nearest")
    return _SOLVED * taken / weights
