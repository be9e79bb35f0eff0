"""Which layers get more of a model's bits: those that lose much where they alone are quantised."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from qmoe_lite.checkpoint.atomic import write_json
from qmoe_lite.errors import FormatError, SettingError
from qmoe_lite.models.blocks import MoELayer

_FOLLOWED = 0.35  # of the way to where all layers lose the same
_FURTHEST = 1.0  # octaves between a layer's step and the mean
NONE, MEASURED = "none", "measured"  # in place of what layers lose: no shares; it is measured first
_MAKE_IT = "Make it by qmoe sensitivity MODEL FILE."


@dataclass(frozen=True)
class Sensitivity:
    """What each layer's experts, quantised alone, make a model lose; see `layer_sensitivity`.

    Attributes
    ----------
    rate : float
        Stored bits a weight that they took, about.
    tokens : int
        Whose predictions were compared.
    layers : dict, experts module to float
        KL divergence from the dense model, nats a token, in the order in which layers run.
    """

    rate: float
    tokens: int
    layers: dict[str, float]

    def shares(self) -> list[float]:
        """Return by how many octaves the layers' steps will differ from the mean."""
        return octaves(list(self.layers.values()))

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return asdict(self)

    def write(self, file: str | Path) -> None:
        """Write it as JSON; raise OutputError where that cannot be done."""
        write_json(Path(file), self.to_json())

    @classmethod
    def read(cls, file: str | Path) -> Sensitivity:
        """Read what `write` wrote; raise FormatError for anything else."""
        try:
            found = json.loads(Path(file).read_text(encoding="utf-8"))
            layers = {str(name): float(each) for name, each in found["layers"].items()}
            result = cls(float(found["rate"]), int(found["tokens"]), layers)
        except OSError as error:
            raise FormatError(f"{file} cannot be read: {error.strerror}. {_MAKE_IT}") from error
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise FormatError(f"{file} holds no sensitivity. {_MAKE_IT}") from error
        _check(layers, str(file))
        return result


def layers_of(sensitivity: Sensitivity | str | Path | None) -> dict[str, float] | str | None:
    """Return what each layer loses, as given or from a file, or "none"; raise FormatError for what cannot be."""
    if sensitivity is None or sensitivity == NONE:
        return sensitivity
    found = sensitivity if isinstance(sensitivity, Sensitivity) else Sensitivity.read(sensitivity)
    layers = {name: float(each) for name, each in found.layers.items()}
    _check(layers, "what was given")
    return layers


def _check(layers: dict[str, float], where: str) -> None:
    if not layers or not all(math.isfinite(each) and each >= 0 for each in layers.values()):
        raise FormatError(f"{where} holds a sensitivity below 0 or not finite, or none. {_MAKE_IT}")


def shares_of(losses: dict[str, float] | str | None, layers: Sequence[MoELayer]) -> list[float]:
    """Return by how many octaves each layer's step is to differ from the others', none without losses.

    Parameters
    ----------
    losses : dict, experts module to float, or str or None
        What each layer alone loses at equal steps; a word where that is not known.
    layers : sequence of MoELayer
        Of the model, in the order in which they run.

    Raises
    ------
    SettingError
        The losses are of other layers.
    """
    if not isinstance(losses, dict):
        return []
    names = [layer.experts for layer in layers]
    if others := losses.keys() ^ set(names):
        raise SettingError(f"the sensitivity is of another model: {min(others)} is not in both. {_MAKE_IT}")
    return octaves([losses[name] for name in names])


def octaves(losses: Sequence[float]) -> list[float]:
    """Return by how many octaves steps are to differ for what layers lose; their mean is 0.

    Small losses add up, and each grows with the square of its step, while all bits fall alike with a step's logarithm:
    so the sum is smallest for given bits where all layers lose the same. A third of that way is gone, since what a
    layer loses alone later ones partly make up for when they are solved.
    """
    known = [each for each in losses if each > 0]
    if not known:
        return [0.0] * len(losses)
    wanted = [-0.5 * _FOLLOWED * math.log2(max(each, min(known))) for each in losses]
    near = [min(max(each - fmean(wanted), -_FURTHEST), _FURTHEST) for each in wanted]
    return [each - fmean(near) for each in near]
