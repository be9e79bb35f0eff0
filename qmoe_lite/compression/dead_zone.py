"""How wide the dead zone around 0 must be for a model: what is decoded should be as large as what was encoded.

Rounding to nearest adds its error to what experts put out, which inflates it; a dead zone takes away from it. Models
differ: trained without outliers, some shrink without any dead zone; on others none costs half a nat. So the energy of
the quantised experts' outputs over that of the dense ones' decides, on validation tokens: it is to be 1.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

USUAL = 0.06  # in steps; for a grid whose energy is not known
_WIDEST = 0.15
_GAIN = 0.5  # share of a layer's deviation that the next layer makes up for, since layers differ
_SLOPES = (1.0, 10.0)  # what the energy's logarithm loses when the dead zone grows by 1
_ENERGIES = (1e-3, 1e3)  # over the dense experts'; others are taken for these


@dataclass
class DeadZone:
    """Chooses the dead zone of each layer.

    Attributes
    ----------
    width : float
        In steps: what the next layer is solved with.
    slope : float
        What the energy's logarithm loses when the dead zone grows by 1, as seen on the first layer.
    known : bool
        Whether a layer has said.
    """

    width: float = USUAL
    slope: float = 5.0
    known: bool = False

    def begin(self, without: float, usual: float) -> None:
        """Take over the energies of one group without a dead zone and with the usual one."""
        none, some = _logarithm(without), _logarithm(usual)
        self.slope = min(max((none - some) / USUAL, _SLOPES[0]), _SLOPES[1])
        self.width, self.known = _bounded(none / self.slope), True

    def finish_layer(self, energy: float) -> None:
        """Take over the energy of a finished layer, which was solved with `width`."""
        self.width = _bounded(self.width + _GAIN * _logarithm(energy) / self.slope)

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values: `DeadZone(**values)` goes on from there."""
        return asdict(self)


def _logarithm(energy: float) -> float:
    return math.log(min(max(_ENERGIES[0], energy), _ENERGIES[1]))


def _bounded(width: float) -> float:
    return min(max(width, 0.0), _WIDEST)
