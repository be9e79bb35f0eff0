"""The report of a finished compression, with the notes on what came out less well than was asked for."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from statistics import fmean

from qmoe_lite.checkpoint.reader import Checkpoint
from qmoe_lite.checkpoint.report import ProjectionReport, Report, stored_bytes, versions
from qmoe_lite.compression.documents import DEFAULT_NAME, DEFAULT_TEXT
from qmoe_lite.compression.settings import Settings
from qmoe_lite.compression.state import Done
from qmoe_lite.compression.verdict import Verdict
from qmoe_lite.models.blocks import MoELayer
from qmoe_lite.quantization.grid import Grid

_NAMED = 8  # layers whose experts one note names
RATE_TOLERANCE = 0.01  # share of the rate that a model may miss it by without a note


def make_report(
    dense: Checkpoint,
    compressed: Checkpoint,
    layers: list[MoELayer],
    settings: Settings,
    grid: Grid,
    done: Done,
    degraded: list[str],
    verdict: Verdict | None,
    seconds: float,
    text: str | None = None,
) -> Report:
    """Put together what is known of a compression.

    Parameters
    ----------
    dense, compressed : Checkpoint
        The model as it was, and as it was written.
    layers : list of MoELayer
        All sparse ones.
    settings : Settings
        Those that were asked for.
    grid : Grid
        The one used, with its mean step.
    done : Done
        What the layers' compression found.
    degraded : list of str
        Notes so far; those on the result come after them.
    verdict : Verdict or None
        Of the validation samples.
    seconds : float
        That the work took.
    text : str, optional
        Name of the calibration text.
    """
    notes = list(degraded)
    if text == DEFAULT_NAME:
        notes.append(
            f"calibrated on {text}, Python's documentation and sources (PSF licence); --calibration with text of the "
            "kind that the model is to read serves better"
        )
    nearest = sum(p.hessian_classes.get("nearest", 0) for p in done.projections)
    if nearest and settings.recipe != "nearest":
        notes.append(f"{nearest} matrices had no usable Hessian and were rounded to nearest")
    if starved := _without_tokens(done.projections, layers):
        notes.append(starved)
    experts, others = stored_bytes(compressed)
    rate, bits = settings.rate, 8 * experts / sum(layer.weights for layer in layers)
    if rate is not None and abs(bits - rate) > RATE_TOLERANCE * rate:
        notes.append(f"the experts take {bits:.3f} bits a weight instead of {rate:g}")
    dense_experts, dense_others = stored_bytes(dense)
    return Report(
        model=str(dense.directory),
        settings={**asdict(settings), "grid": grid.to_config(), "calibration": text},
        projections=done.projections,
        held_out_error={k: v for k, v in done.held_out_error.items() if v is not None},
        degraded=notes,
        sizes={
            "expert_bytes": experts,
            "other_bytes": others,
            "dense_expert_bytes": dense_experts,
            "dense_other_bytes": dense_others,
        },
        seconds=seconds,
        versions=versions(),
        verdict=None if verdict is None else verdict.to_json(),
        tuning_by_block=_tuning(done) if done.tuning else None,
    )


def _tuning(done: Done) -> dict[str, float]:
    """Return the time that tuning took, and of what it was to reach what was missing, means over the layers."""
    layers = done.tuning.values()
    seconds = round(sum(each["seconds"] for each in layers), 3)
    return {"seconds": seconds, **{name: fmean(each[name] for each in layers) for name in ("before", "after")}}


def _without_tokens(projections: list[ProjectionReport], layers: list[MoELayer]) -> str | None:
    """Name the experts that no calibration token reached, where some were reached."""
    blocks = {layer.experts: layer.block for layer in layers}
    tokens = {row.layer: row.tokens for row in projections}
    if not any(map(any, tokens.values())):
        return None
    starved = {name: [expert for expert, count in enumerate(of) if count == 0] for name, of in tokens.items()}
    each = [f"{blocks[name]}: {ranges(experts)}" for name, experts in starved.items() if experts]
    more = f"; and in {len(each) - _NAMED} more layers" if len(each) > _NAMED else ""
    return f"experts that no calibration token reached, in {'; in '.join(each[:_NAMED])}{more}" if each else None


def ranges(numbers: list[int]) -> str:
    """Format ascending numbers shortly: 3, 7-9."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def name_of_text(calibration: str | Path | None) -> str | None:
    """Return what a report calls a text: a file's own name, not where it lay, or a data set's, or what it is."""
    if calibration is None:
        return None
    if calibration == DEFAULT_TEXT:
        return DEFAULT_NAME
    return Path(calibration).name if Path(calibration).exists() else str(calibration)
