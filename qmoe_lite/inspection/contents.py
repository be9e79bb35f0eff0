"""What a compressed directory holds, by its files' headers, and what its report says.

No codes are read. Where config.json, the headers and the report differ, that is an error, not a row in a table.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from qmoe_lite.checkpoint.finding import find_model
from qmoe_lite.checkpoint.format import quantization_of
from qmoe_lite.checkpoint.report import FILE_NAME, ProjectionReport, Report, read_report, stored_bytes
from qmoe_lite.coding.codebook import Codebook
from qmoe_lite.coding.narrow import dtype_of_levels
from qmoe_lite.errors import FormatError, SettingError
from qmoe_lite.models.blocks import MoELayer
from qmoe_lite.models.building import read_config
from qmoe_lite.models.experts import PackedExperts, empty_experts
from qmoe_lite.models.skeletons import open_checkpoint

UNKNOWN = "unknown"  # what config.json does not say
_REMEDY = "Remove the report, or fetch the whole directory again."


@dataclass(frozen=True)
class StoredProjection:
    """One projection of one sparse layer, as it is stored.

    Attributes
    ----------
    layer, projection : str
        Name of the experts module; wi, wo, ..
    short : str
        The layer's name in tables: "encoder.1", "layers.12".
    experts, rows, columns : int
    part_bytes : dict, part to int
        Bytes of codes, expert_offsets, row_codewords, fewest_codewords, levels and checksums.
    level_dtype : str
        "bfloat16", ..
    codeword_bits : int
    zeros : float or None
        Share of zero digits, exact; None where the codebook was fitted to other digits, as the paper's was.
    report : ProjectionReport or None
        What `compress` said of it.
    """

    layer: str
    projection: str
    short: str
    experts: int
    rows: int
    columns: int
    part_bytes: dict[str, int]
    level_dtype: str
    codeword_bits: int
    zeros: float | None
    report: ProjectionReport | None

    @property
    def weights(self) -> int:
        return self.experts * self.rows * self.columns

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of all parts over the number of weights."""
        return 8 * sum(self.part_bytes.values()) / self.weights

    @property
    def stored_code_bits_per_weight(self) -> float:
        """Bits of the codes, with the padding behind each expert's, over the number of weights."""
        return 8 * self.part_bytes["codes"] / self.weights


@dataclass(frozen=True)
class Inspection:
    """What :func:`inspect_model` found.

    Attributes
    ----------
    directory : str
    model_type : str
    grid, recipe : str
    versions : dict
        Of qmoe-lite and what it stands on, when the model was compressed.
    expert_bytes, other_bytes : int
        Of the whole model, whatever `only` left.
    totals : dict
        bits_per_weight, zeros, expert_weights and matrices, of the whole model.
    projections : list of StoredProjection
    report : Report or None
        All of qmoe_report.json; None where there is none.
    """

    directory: str
    model_type: str
    grid: str
    recipe: str
    versions: dict[str, str]
    expert_bytes: int
    other_bytes: int
    totals: dict[str, float | None]
    projections: list[StoredProjection]
    report: Report | None

    @property
    def held_out_error(self) -> dict[str, float]:
        """Held-out error by experts module name."""
        known = self.report.held_out_error if self.report else {}
        return {p.layer: known[p.layer] for p in self.projections if p.layer in known}

    @property
    def calibrated(self) -> bool:
        """Whether any expert is known to have seen a calibration token."""
        return any(p.report is not None and any(p.report.tokens) for p in self.projections)

    def only(self, pattern: str) -> Inspection:
        """Leave the layers whose short names fit a pattern, as for files: "encoder.*", "layers.1?".

        Raises
        ------
        SettingError
            No layer fits.
        """
        chosen = [p for p in self.projections if fnmatchcase(p.short, pattern)]
        if not chosen:
            first, last = self.projections[0].short, self.projections[-1].short
            raise SettingError(f"no layer fits {pattern!r}; expected a pattern for {first} to {last}.")
        return replace(self, projections=chosen)

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        derived = ("bits_per_weight", "stored_code_bits_per_weight")
        rows = [{**asdict(p), **{name: getattr(p, name) for name in derived}} for p in self.projections]
        report = self.report and {k: v for k, v in self.report.to_json().items() if k != "projections"}
        return {**asdict(self), "projections": rows, "report": report}


def inspect_model(directory: str | Path) -> Inspection:
    """Look at a compressed model without reading its codes.

    Parameters
    ----------
    directory : path or str
        What `compress` wrote, or what save_pretrained made of it.

    Raises
    ------
    CheckpointError
        No compressed model, or a file or tensor is missing or damaged.
    FormatError
        config.json, the files' headers and qmoe_report.json contradict each other, or one is damaged.
    """
    path = find_model(directory)
    family, checkpoint = open_checkpoint(path)
    made = empty_experts(family, checkpoint, read_config(str(path)))
    settings = quantization_of(checkpoint)
    report = read_report(path)
    of_report = {(row.layer, row.projection): row for row in report.projections} if report else {}
    found: list[StoredProjection] = []
    for experts in made:
        layer = experts.layer
        for projection in layer.projections:
            found.append(_stored(layer, projection, experts, of_report.pop((layer.experts, projection), None)))
            if report is not None:
                _compare(path / FILE_NAME, found[-1])
    unknown = [".".join(pair) for pair in of_report]
    unknown += [
        layer for layer in (report.held_out_error if report else ()) if layer not in {row.layer for row in found}
    ]
    if unknown:
        raise FormatError(f"{path / FILE_NAME} reports on {unknown[0]}, which the model lacks. {_REMEDY}")
    expert_bytes, other_bytes = stored_bytes(checkpoint)
    grid, versions = (settings.get(name) for name in ("grid", "versions"))
    return Inspection(
        directory=str(path),
        model_type=family.model_type,
        grid=str(grid.get("name", UNKNOWN)) if isinstance(grid, dict) else UNKNOWN,
        recipe=str(settings.get("recipe", UNKNOWN)),
        versions=versions if isinstance(versions, dict) else {},
        expert_bytes=expert_bytes,
        other_bytes=other_bytes,
        totals=_totals(found, expert_bytes),
        projections=found,
        report=report,
    )


def _totals(rows: list[StoredProjection], expert_bytes: int) -> dict[str, float | None]:
    weights = sum(row.weights for row in rows)
    return {
        "bits_per_weight": 8 * expert_bytes / weights,
        "zeros": share_of_zeros(rows),
        "expert_weights": weights,
        "matrices": sum(row.experts for row in rows),
    }


def share_of_zeros(rows: list[StoredProjection]) -> float | None:
    """Share of zero digits in several projections; None where one does not know its own."""
    known = [row.zeros * row.weights for row in rows if row.zeros is not None]
    return sum(known) / sum(row.weights for row in rows) if len(known) == len(rows) else None


def short_name(block: str) -> str:
    """Name a block in a table: "encoder.block.1" is encoder.1, "model.layers.12" is layers.12."""
    parts = block.split(".")
    stack = next((part for part in parts if part in ("encoder", "decoder")), parts[-2])
    return f"{stack}.{parts[-1]}"


def _stored(
    layer: MoELayer, projection: str, experts: PackedExperts, report: ProjectionReport | None
) -> StoredProjection:
    rows, columns = layer.shapes[projection]
    weights = layer.count * rows * columns
    codebook = experts.codebooks[projection]
    zeros = report.zeros if report else None  # the digits' own count, where the code was fitted to them
    if isinstance(codebook, Codebook) and sum(codebook.counts) == weights:
        zeros = codebook.counts[codebook.alphabet.zero_symbol] / weights
    elif isinstance(codebook, Codebook):
        zeros = None
    parts = experts.stack(projection).parts
    return StoredProjection(
        layer=layer.experts,
        projection=projection,
        short=short_name(layer.block),
        experts=layer.count,
        rows=rows,
        columns=columns,
        part_bytes={part: tensor.nbytes for part, tensor in parts.items()},
        level_dtype=str(dtype_of_levels(parts["levels"])).removeprefix("torch."),
        codeword_bits=codebook.bits,
        zeros=zeros,
        report=report,
    )


def _compare(file: Path, stored: StoredProjection) -> None:
    """Raise FormatError where the report does not fit what is stored."""
    name, said = f"{stored.layer}.{stored.projection}", stored.report
    if said is None:
        raise FormatError(f"{file} says nothing of {name}. {_REMEDY}")
    pairs: list[tuple[str, float, float]] = [
        (what, getattr(said, what), getattr(stored, what))
        for what in ("experts", "rows", "columns", "bits_per_weight", "codeword_bits")
    ]
    pairs.append(("experts with a count of tokens", len(said.tokens), stored.experts))
    pairs.append(("experts with a Hessian class", sum(said.hessian_classes.values()), stored.experts))
    if stored.zeros is not None:
        pairs.append(("zeros", said.zeros, stored.zeros))
    for what, found, expected in pairs:
        if not math.isclose(found, expected, rel_tol=1e-9):
            raise FormatError(f"{file} says that {name} has {what} {found}; the directory has {expected}. {_REMEDY}")
