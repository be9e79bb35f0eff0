"""How many experts are quantised together: as many as fit into the memory that a group may take."""

from __future__ import annotations

from qmoe_lite.compression.settings import Settings
from qmoe_lite.models.blocks import MoELayer

_DIGIT = 2  # bytes
_CODES = 0.3  # bytes of a weight's code, at about two bits


def expert_bytes(layer: MoELayer, settings: Settings) -> int:
    """Return the bytes that an expert takes at most while its group is solved.

    Parameters
    ----------
    layer : MoELayer
        Whose.
    settings : Settings
        For the recipe, the rate and the device.

    Notes
    -----
    A stage's Hessian and its factor, its widest matrix in float32, and the digits of all matrices that were solved. The
    first stage's factor stays where the group may be solved again for a rate; the best solve's digits and codes do. The
    CPU factorises and solves one expert after another, whose own copies are not counted; a GPU all of them, with copies
    of the Hessians and weights.
    """
    cpu = settings.device == "cpu"
    most = kept = digits = 0
    for stage in layer.stages:
        columns = layer.shapes[stage[0]][1]
        sizes = [layer.shapes[name][0] * columns for name in stage]
        squares = columns * columns if settings.recipe != "nearest" else 0
        digits += _DIGIT * sum(sizes)
        most = max(most, kept + (8 if cpu else 12) * squares + (4 if cpu else 16) * max(sizes) + digits)
        if settings.rate is not None:
            kept = kept or 8 * squares
    again = 0 if settings.rate is None else digits + int(_CODES * digits / _DIGIT)
    return most + again


def groups_of(layer: MoELayer, settings: Settings) -> list[range]:
    """Split a layer's experts into groups that fit the memory."""
    size = max(1, min(settings.group_size, settings.group_room // expert_bytes(layer, settings)))
    return [range(start, min(start + size, layer.count)) for start in range(0, layer.count, size)]
