"""A model card: README.md of a compressed directory, with the header that the Hugging Face hub reads."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from qmoe_lite.checkpoint.atomic import write_atomically
from qmoe_lite.checkpoint.config_file import read_config_file
from qmoe_lite.compression.importing import RECIPE as IMPORTED
from qmoe_lite.compression.verdict import Verdict
from qmoe_lite.errors import CheckpointError, OutputError, SettingError
from qmoe_lite.inspection.contents import UNKNOWN, Inspection, inspect_model
from qmoe_lite.models.building import auto_class
from qmoe_lite.models.family import family_of

FILE_NAME = "README.md"
_TASKS = {  # by transformers' class
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForImageTextToText": "image-text-to-text",
    "AutoModelForSeq2SeqLM": "text2text-generation",
}
_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")  # on the hub
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)")  # a directory of the hub's cache
_SETTINGS = {  # how the card words each that is known
    "samples": "{} samples",
    "sequence_length": "{} tokens each",
    "validation_samples": "{} samples for validation",
    "rate": "{} bits a weight asked for",
    "codeword_bits": "codewords of {} bits asked for",
    "dampening": "dampening {}",
    "seed": "seed {}",
}


def write_card(
    directory: str | Path, *, base_model: str | None = None, license: str | None = None, force: bool = False
) -> Path:
    """Write a compressed directory's README.md.

    Parameters
    ----------
    directory : path or str
        What `compress` or `import_qmoe` wrote.
    base_model : str, optional
        Name on the hub of the model that it was made of; by default as the report or config.json names it.
    license : str, optional
        Of that model, as the hub calls it: "apache-2.0"; by default as its own README.md says, where that is at hand.
    force : bool
        Replace a README.md that is there.

    Returns
    -------
    Path
        Of the card.

    Raises
    ------
    OutputError
        There is one already, or it cannot be written.
    SettingError
        `base_model` or `license` is no name of the hub's.
    CheckpointError, FormatError
        No compressed model, or a damaged one.
    """
    place = Path(directory)
    if not place.is_dir():
        raise CheckpointError(f"{place} is no directory. Name one that qmoe compress wrote.")
    file = place / FILE_NAME
    if (file.exists() or file.is_symlink()) and not force:
        raise OutputError(f"{file} exists already. Replace it by --force (force=True), or keep it.")
    text = make_card(inspect_model(place), base_model, license)

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomically(file, write)
    return file


def make_card(found: Inspection, base_model: str | None = None, license: str | None = None) -> str:
    """Return the text of a card; arguments and errors as for `write_card`."""
    if base_model is not None and not _NAME.fullmatch(base_model):
        raise SettingError(f"base model is {base_model!r}; expected a name on the hub, such as Qwen/Qwen3-30B-A3B.")
    if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license):
        raise SettingError(f"license is {license!r}; expected as the hub calls it, such as apache-2.0 or other.")
    base = base_model or _base_model(found)
    terms = {"license": license} if license else _license_of(found)
    lines = [*_header(found, base, terms), *_summary(found, base), *_loading(found), *_making(found, base)]
    lines += ["", "## Licence", "", _licence(base, terms.get("license"))]
    return "\n".join(lines) + "\n"


def _header(found: Inspection, base: str | None, terms: dict[str, str]) -> list[str]:
    from huggingface_hub import ModelCardData

    entries: dict[str, Any] = {} if base is None else {"base_model": base, "base_model_relation": "quantized"}
    entries |= terms
    entries |= {"library_name": "transformers", "pipeline_tag": _TASKS[_auto_class(found)]}
    entries["tags"] = ["qmoe", "moe", "mixture-of-experts", "quantized", found.model_type]
    return ["---", ModelCardData(**entries).to_yaml(original_order=list(entries)).rstrip(), "---", ""]


def _auto_class(found: Inspection) -> str:
    config = read_config_file(Path(found.directory))
    name: str = auto_class(family_of(found.model_type, auto=True), config).__name__
    return name


def _base_model(found: Inspection) -> str | None:
    """Return the base model's name on the hub, where the report or config.json has it."""
    named = [read_config_file(Path(found.directory)).get("_name_or_path")]
    if found.report is not None:
        if cached := _CACHED.search(found.report.model):
            return f"{cached[1]}/{cached[2]}"
        named.insert(0, found.report.model)
    hub = (name for name in named if isinstance(name, str) and _NAME.fullmatch(name) and not Path(name).exists())
    return next(hub, None)


def _license_of(found: Inspection) -> dict[str, str]:
    """Return what the header of the dense model's own card says of its licence, if the card is still at hand."""
    from huggingface_hub import metadata_load

    if found.report is None:
        return {}
    try:
        header = metadata_load(Path(found.report.model) / FILE_NAME) or {}
    except Exception:  # no file, no header, or a header that is no YAML: it is not known then
        return {}
    names = ("license", "license_name", "license_link")
    return {name: header[name] for name in names if isinstance(header.get(name), str)}


def _licence(base: str | None, license: str | None) -> str:
    of = f"[{base}](https://huggingface.co/{base})" if base else "the model that it was made of"
    if license:
        return f"That of {of}: {_plain(license)}."
    return f"That of {of}, which was not known where this card was written: look there before you use or pass it on."


def _summary(found: Inspection, base: str | None) -> Iterator[str]:
    report, totals = found.report, found.totals
    made_of = f"[{base}](https://huggingface.co/{base})" if base else f"a {found.model_type} model"
    yield f"# {_plain(Path(found.directory).resolve().name)}"
    yield ""
    paper = "[arXiv:2310.16795](https://arxiv.org/abs/2310.16795)"
    yield f"The experts of {made_of}, compressed to **{totals['bits_per_weight']:.2f} bits a weight** by"
    yield f"qmoe-lite after QMoE ({paper})."
    yield "All else keeps its bits. The model runs straight from the codewords, on a CPU or a GPU, by transformers."
    yield ""
    verdict = None if report is None or report.verdict is None else Verdict.from_json(report.verdict)
    before = report.sizes if report else {}
    weights = int(totals["expert_weights"] or 1)
    dense = before.get("dense_expert_bytes", 0), before.get("dense_other_bytes", 0)
    rows: list[tuple[str, str, str]] = []
    if verdict is not None:
        rows.append(("held-out loss, nats a token", f"{verdict.dense_loss:.3f}", f"{verdict.loss:.3f}"))
    rows.append(("bits an expert weight", f"{8 * dense[0] / weights:.3f}", f"{totals['bits_per_weight']:.3f}"))
    for name, old, new in (
        ("experts, MB", dense[0], found.expert_bytes),
        ("whole model, MB", sum(dense), found.expert_bytes + found.other_bytes),
    ):
        rows.append((name, f"{old / 1e6:,.1f}", f"{new / 1e6:,.1f}"))
    if totals["zeros"] is not None:
        rows.append(("zeros among the experts' digits", "", f"{totals['zeros']:.1%}"))
    yield "| | dense | compressed |" if dense[0] else "| | compressed |"
    yield "|---|---:|---:|" if dense[0] else "|---|---:|"
    for name, of_dense, of_this in rows:
        yield f"| {name} | {of_dense} | {of_this} |" if dense[0] else f"| {name} | {of_this} |"
    yield ""
    if verdict is not None:
        yield f"**Verdict:** {replace(verdict, advice='')}"
    else:
        yield "**Not judged**: what it loses against the dense model was not measured. `qmoe eval` does that."


def _loading(found: Inspection) -> list[str]:
    auto, name = _auto_class(found), Path(found.directory).resolve().name
    prompt = "The <extra_id_0> walks in the park" if auto == "AutoModelForSeq2SeqLM" else "Once upon a time"
    return [
        "",
        "## How to load it",
        "",
        "With the Python package qmoe-lite installed; without it transformers makes a model with random experts.",
        "",
        "```python",
        "import qmoe_lite  # tells transformers how to read it",
        f"from transformers import {auto}, AutoTokenizer",
        "",
        f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(name)})",
        f"model = {auto}.from_pretrained({json.dumps(name)})",
        "```",
        "",
        "```sh",
        f'qmoe generate {shlex.quote(name)} --prompt "{prompt}"',
        f"qmoe verify {shlex.quote(name)}",
        "```",
    ]


def _making(found: Inspection, base: str | None) -> Iterator[str]:
    report = found.report
    yield ""
    yield "## How it was made"
    yield ""
    if found.recipe == IMPORTED:
        yield "- Imported from the checkpoint that the authors of QMoE published; their digits and levels, unchanged."
    elif report is None:
        yield f"- Recipe {_plain(found.recipe)}. The report of the compression (qmoe_report.json) is not there."
    else:
        text = report.settings.get("calibration")
        text = f"calibrated on {_plain(text)}" if text else "not known on what text"
        text = "rounded to nearest, without text" if found.recipe == "nearest" else text
        yield f"- Recipe {_plain(found.recipe)}, {text}; {report.seconds / 60:,.1f} minutes."
        known = {name: report.settings.get(name) for name in _SETTINGS}
        worded = (_SETTINGS[name].format(_plain(value)) for name, value in known.items() if value is not None)
        yield f"- Settings: {', '.join(worded)}."
    grid = ", ".join(sorted({row.level_dtype for row in found.projections}))
    yield f"- Grid {_plain(found.grid)}, levels {grid}, codewords of {_numbers(found)} bits."
    versions = ", ".join(f"{_plain(name)} {_plain(version)}" for name, version in found.versions.items())
    yield f"- Versions: {versions or UNKNOWN}."
    for line in report.degraded if report else ():
        yield f"- Note: {_plain(line)}."
    yield ""
    yield from _layers(found)


def _numbers(found: Inspection) -> str:
    return ", ".join(map(str, sorted({row.codeword_bits for row in found.projections})))


def _layers(found: Inspection) -> Iterator[str]:
    """Yield a table of all layers, folded."""
    yield "<details><summary>Layer by layer</summary>"
    yield ""
    yield "| layer | projection | bits a weight | zeros | error | held-out error of the layer |"
    yield "|---|---|---:|---:|---:|---:|"
    for row in found.projections:
        held_out = found.held_out_error.get(row.layer)
        cells = [row.short, row.projection, f"{row.bits_per_weight:.3f}"]
        cells.append("" if row.zeros is None else f"{row.zeros:.3f}")
        cells.append(f"{row.report.error:.4f}" if row.report else "")
        cells.append("" if held_out is None else f"{held_out:.4f}")
        yield f"| {' | '.join(cells)} |"
    yield ""
    yield "</details>"


def _plain(value: Any) -> str:
    """Return a value as text that Markdown leaves alone: what a report says is shown, and not obeyed."""
    text = " ".join(str(value).split())
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", text)
