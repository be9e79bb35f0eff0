"""What a compression did to each layer, and what it left on disk."""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from qmoe_lite.checkpoint.expert_tokens import ExpertTokens
from qmoe_lite.checkpoint.json_file import read_json
from qmoe_lite.checkpoint.reader import Checkpoint, of_experts
from qmoe_lite.errors import FormatError, unreadable

FILE_NAME = "qmoe_report.json"
_MOST_COUNTED = 1 << 53  # tokens or columns; a float holds every number below it


@dataclass(frozen=True)
class ProjectionReport:
    """One projection of one sparse layer, all experts.

    Attributes
    ----------
    layer, projection : str
        Name of the experts module; wi, wo, ..
    experts, rows, columns : int
    bits_per_weight : float
        Codes, row lengths, levels, offsets and checksums, as stored.
    code_bits_per_weight : float
        Codes alone.
    codeword_bits : int
        Of a codeword.
    zeros : float
        Share of zero digits.
    error : float
        Mean over experts of tr((W-Q) H (W-Q)^T) / tr(W H W^T).
    hessian_classes : dict
        How many experts were rounded with their own Hessian ("own"), with more dampening ("dampened"), with the
        layer's Hessian mixed in ("blended"), or to nearest ("nearest").
    tokens : list of int
        Calibration tokens behind each expert's Hessian.
    entropy : float or None
        Of a dictionary's digits, bits each, order 0, signs even.
    largest_digit : int or None
        Of a dictionary's digits, without its sign.
    exceptions : float or None
        Entries of a dictionary's list of exceptions, a weight.
    step : float or None
        Of a uniform grid, in units of a row's RMS: the mean over experts.
    dead_zone : float or None
        Of a uniform grid, in steps: the mean over experts.
    """

    layer: str
    projection: str
    experts: int
    rows: int
    columns: int
    bits_per_weight: float
    code_bits_per_weight: float
    codeword_bits: int
    zeros: float
    error: float
    hessian_classes: dict[str, int]
    tokens: list[int]
    entropy: float | None = None
    largest_digit: int | None = None
    exceptions: float | None = None
    step: float | None = None
    dead_zone: float | None = None

    @property
    def weights(self) -> int:
        return self.experts * self.rows * self.columns


@dataclass(frozen=True)
class Report:
    """What `compress` did.

    Attributes
    ----------
    model : str
    settings : dict
        Every setting, defaults included.
    projections : list of ProjectionReport
    held_out_error : dict, experts module name to float
        Relative squared error of the experts' outputs on validation tokens, which no Hessian saw.
    degraded : list of str
        What was done less well than asked for, in words.
    sizes : dict
        expert_bytes, other_bytes, dense_expert_bytes, dense_other_bytes.
    seconds : float
    versions : dict
    verdict : dict or None
        Losses of the dense and the compressed model on the validation samples, their gap, a word for it and advice;
        None where no text was left for it, or none was given.
    tuning : dict or None
        What `tune` did afterwards: a `TuneReport`. The verdict is then that of the tuned model.
    tuning_by_block : dict or None
        What `compress(.., tune="block")` did: "seconds", and "before" and "after", what experts lacked of the outputs
        that they were tuned to, as a share of the dense experts' energy, a mean over the layers.
    """

    model: str
    settings: dict[str, Any]
    projections: list[ProjectionReport]
    held_out_error: dict[str, float]
    degraded: list[str]
    sizes: dict[str, int]
    seconds: float
    versions: dict[str, str] = field(default_factory=dict)
    verdict: dict[str, Any] | None = None
    tuning: dict[str, Any] | None = None
    tuning_by_block: dict[str, float] | None = None

    @property
    def expert_weights(self) -> int:
        return sum(p.weights for p in self.projections)

    @property
    def matrices(self) -> int:
        return sum(p.experts for p in self.projections)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of all expert tensors, read from the files, over the number of expert weights."""
        return 8 * self.sizes["expert_bytes"] / self.expert_weights

    @property
    def zeros(self) -> float:
        return sum(p.zeros * p.weights for p in self.projections) / self.expert_weights

    @property
    def tokens_of_layers(self) -> dict[str, ExpertTokens]:
        """How the calibration text fell on each layer's experts; empty where there was none."""
        return {layer: ExpertTokens.of(experts) for layer, experts in self._experts().items()}

    @property
    def tokens_of_all(self) -> ExpertTokens | None:
        """The same of all layers together."""
        experts = [each for of_layer in self._experts().values() for each in of_layer]
        return ExpertTokens.of(experts) if experts else None

    def _experts(self) -> dict[str, list[tuple[int, int]]]:
        """Return each expert's tokens and the columns of its widest matrix, by layer."""
        if not any(any(row.tokens) for row in self.projections):
            return {}
        columns: dict[str, int] = {}
        for row in self.projections:
            columns[row.layer] = max(row.columns, columns.get(row.layer, 0))
        rows = [row for row in self.projections if row.tokens]
        return {row.layer: [(count, columns[row.layer]) for count in row.tokens] for row in rows}

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        totals = {
            "bits_per_weight": self.bits_per_weight,
            "zeros": self.zeros,
            "expert_weights": self.expert_weights,
            "matrices": self.matrices,
        }
        tokens = {layer: found.to_json() for layer, found in self.tokens_of_layers.items()}
        return {"totals": totals, "tokens_per_expert": tokens, **asdict(self)}


def read_report(directory: Path) -> Report | None:
    """Read what `compress` wrote beside the model; None where there is nothing, as after save_pretrained.

    Raises
    ------
    FormatError
        It is no JSON, or not a report.
    CheckpointError
        It cannot be read.
    """
    file = directory / FILE_NAME
    if not file.exists():
        return None
    try:
        content = read_json(file)
        rows = [ProjectionReport(**_known(ProjectionReport, row)) for row in content["projections"]]
        report = Report(**{**_known(Report, content), "projections": rows})
        _check_types(report)
    except OSError as error:
        raise unreadable(file, error) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"{file} is no report of qmoe compress. Remove it, or fetch it again.") from error
    return report


def _known(kind: type[Report] | type[ProjectionReport], values: dict[str, Any]) -> dict[str, Any]:
    """Leave out what a later version may have added."""
    return {f.name: values[f.name] for f in fields(kind) if f.name in values}


def _check_types(report: Report) -> None:
    """Raise TypeError where a value that is shown is of another kind than `compress` writes."""
    numbers: list[Any] = [report.seconds, *report.held_out_error.values(), *report.sizes.values()]
    texts: list[Any] = [report.model, *report.degraded, *report.versions.values()]
    for row in report.projections:
        numbers += [row.experts, row.rows, row.columns, row.bits_per_weight, row.code_bits_per_weight, row.zeros]
        numbers += [row.codeword_bits, row.error, *row.hessian_classes.values(), *row.tokens]
        texts += [row.layer, row.projection]
    for row in report.projections:
        optional = (row.entropy, row.largest_digit, row.exceptions, row.step, row.dead_zone)
        numbers += [number for number in optional if number is not None]
    if report.verdict is not None:
        numbers += [report.verdict[name] for name in ("dense_loss", "loss", "gap", "tokens")]
        numbers += [report.verdict["standard_error"] or 0.0]
        texts += [report.verdict["word"], report.verdict["advice"]]
    if not all(isinstance(n, int | float) for n in numbers) or not all(isinstance(t, str) for t in texts):
        raise TypeError
    counted = [count for row in report.projections for count in (row.columns, *row.tokens)]
    if not all(isinstance(count, int) and 0 <= count < _MOST_COUNTED for count in counted):
        raise TypeError
    if not isinstance(report.settings, dict) or {"dense_expert_bytes", "dense_other_bytes"} - set(report.sizes):
        raise TypeError


def stored_bytes(checkpoint: Checkpoint) -> tuple[int, int]:
    """Add up the tensors of a model, without those that the checkpoint was told to forget.

    Returns
    -------
    experts, others : int
        Bytes of the expert tensors and of all others.
    """
    experts = others = 0
    for name in checkpoint.names:
        tensor = checkpoint.meta(name)
        if of_experts(name):
            experts += tensor.nbytes
        else:
            others += tensor.nbytes
    return experts, others


def versions() -> dict[str, str]:
    """Return the versions of what decides a compression's bytes, by package."""
    from qmoe_lite import __version__

    return {"qmoe-lite": __version__, **_others()}


@functools.cache  # each takes some milliseconds to read
def _others() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "numba", "numpy")}
