"""What differs between two compressed directories of one model: sizes, losses, settings, and layer by layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from qmoe_lite.compression.shares import NONE
from qmoe_lite.errors import SettingError
from qmoe_lite.inspection.contents import Inspection

Pair = tuple[Any, Any]


@dataclass(frozen=True)
class ComparedProjection:
    """One projection of one layer in both directories; a figure that one does not know is None.

    Attributes
    ----------
    layer, projection, short : str
    bits_per_weight, codeword_bits, zeros, error, held_out_error : pair
        Of the first and the second; the last is the layer's.
    """

    layer: str
    projection: str
    short: str
    bits_per_weight: Pair
    codeword_bits: Pair
    zeros: Pair
    error: Pair
    held_out_error: Pair

    @property
    def differs(self) -> bool:
        """Whether any figure does."""
        figures = (self.bits_per_weight, self.codeword_bits, self.zeros, self.error, self.held_out_error)
        return any(first != second for first, second in figures)


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Attributes
    ----------
    directories : pair of str
    totals : dict, name to pair
        bits_per_weight, zeros, expert_bytes, other_bytes; of the verdicts dense_loss, loss, gap, standard_error, tokens
        and word, each None where it is not known.
    settings : dict, name to pair
        Those that differ, of grid, recipe, versions and the report's settings.
    projections : list of ComparedProjection
        All of them.
    """

    directories: tuple[str, str]
    totals: dict[str, Pair]
    settings: dict[str, Pair]
    projections: list[ComparedProjection]

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        rows = [{**asdict(row), "differs": row.differs} for row in self.projections]
        return {**asdict(self), "projections": rows}


def compare(first: Inspection, second: Inspection) -> Comparison:
    """Compare two compressed directories by their headers and reports.

    Parameters
    ----------
    first, second : Inspection
        What `inspect_model` returned of each.

    Raises
    ------
    SettingError
        They are of models of different layers or sizes.
    """
    both = first, second
    sizes = [{(p.layer, p.projection): (p.experts, p.rows, p.columns) for p in found.projections} for found in both]
    if sizes[0] != sizes[1]:
        differing = next(key for key in (*sizes[0], *sizes[1]) if sizes[0].get(key) != sizes[1].get(key))
        text = f"{first.directory} and {second.directory} are of different models: {'.'.join(differing)} is not alike."
        raise SettingError(f"{text} Compare two results of one model.")
    totals: dict[str, Pair] = {name: (first.totals[name], second.totals[name]) for name in ("bits_per_weight", "zeros")}
    totals |= {name: (getattr(first, name), getattr(second, name)) for name in ("expert_bytes", "other_bytes")}
    verdicts = [(found.report and found.report.verdict) or {} for found in both]
    for name in ("dense_loss", "loss", "gap", "standard_error", "tokens", "word"):
        totals[name] = (verdicts[0].get(name), verdicts[1].get(name))
    known = [_settings(found) for found in both]
    settings = {name: (known[0].get(name), known[1].get(name)) for name in dict.fromkeys((*known[0], *known[1]))}
    rows = []
    for one, other in zip(first.projections, second.projections, strict=True):
        held_out = first.held_out_error.get(one.layer), second.held_out_error.get(one.layer)
        rows.append(
            ComparedProjection(
                layer=one.layer,
                projection=one.projection,
                short=one.short,
                bits_per_weight=(one.bits_per_weight, other.bits_per_weight),
                codeword_bits=(one.codeword_bits, other.codeword_bits),
                zeros=(one.zeros, other.zeros),
                error=(one.report and one.report.error, other.report and other.report.error),
                held_out_error=held_out,
            )
        )
    differing_settings = {name: pair for name, pair in settings.items() if pair[0] != pair[1]}
    return Comparison((first.directory, second.directory), totals, differing_settings, rows)


def _settings(found: Inspection) -> dict[str, Any]:
    """Return all that is known of how a directory was made, by name."""
    known: dict[str, Any] = {"recipe": found.recipe, "grid": found.grid}
    known |= {f"version of {name}": version for name, version in found.versions.items()}
    for name, value in (found.report.settings if found.report else {}).items():
        if name == "sensitivity" and isinstance(value, dict):
            known[name] = f"of {len(value)} layers, {sum(value.values()):.6g} in all"
        elif name == "sensitivity":
            known[name] = value or NONE  # which earlier reports had no word for
        elif isinstance(value, dict):
            known |= {f"{name}.{part}": each for part, each in value.items()}
        else:
            known[name] = value
    return known
