"""`qmoe demo`: the whole job on the model in the package."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from qmoe_lite.cli._options import JsonOption

SAMPLES, SEQUENCE, PASSES = 1536, 128, 2
SAMPLE = 'Comparisons yield boolean values: "<extra_id_0>" or "False".'


def demo(
    out: Annotated[Path | None, typer.Option(help="Keep the compressed model in this new directory.")] = None,
    json: JsonOption = False,
) -> None:
    """Compress the bundled model to nearest and by QMoE, and compare both with the dense one. No GPU, no download.

    Example: qmoe demo --out tiny-qmoe
    """
    from qmoe_lite.cli import _output
    from qmoe_lite.errors import OutputError

    if out is not None and out.exists():
        raise OutputError(f"{out} exists already. Name another directory, or remove it.")
    _output.quiet_transformers()
    with tempfile.TemporaryDirectory(prefix="qmoe-demo-") as scratch:
        result = _run(Path(scratch), show=not json)
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(Path(scratch) / "qmoe", out)
    if json:
        _output.print_json(result)
        return
    _print(result)
    if out is not None:
        _output.print_text(f"\nThe compressed model is in {out}. Try: qmoe eval {out} --text YOUR.txt")


def _run(scratch: Path, show: bool) -> dict[str, Any]:
    from qmoe_lite.cli import _output
    from qmoe_lite.cli.eval_ import open_model
    from qmoe_lite.compression import compress
    from qmoe_lite.evaluation import evaluate
    from qmoe_lite.report import stored_bytes

    text, source = data_file("text"), data_file("tiny_switch")
    started = time.perf_counter()
    settings: dict[str, Any] = {"sequence_length": SEQUENCE, "seed": 0}
    reports = {}
    for name, title, calibration in (("rtn", "rounding to nearest", None), ("qmoe", "QMoE", text / "calibration.txt")):
        chosen = {"recipe": "nearest"} if calibration is None else {"samples": SAMPLES}
        with _output.progress_shown(title, show) as progress:
            reports[name] = compress(
                source, scratch / name, calibration=calibration, progress=progress, **settings, **chosen
            )
    result: dict[str, Any] = {}
    spans = {}
    experts, others = stored_bytes(source)
    weights = reports["qmoe"].expert_weights
    for name, directory in (("dense", source), ("rtn", scratch / "rtn"), ("qmoe", scratch / "qmoe")):
        if show:
            _output.note(f"evaluating {name}")
        model, tokenizer = open_model(str(directory))
        begun = time.perf_counter()
        found = evaluate(
            model, tokenizer, text / "evaluation.txt", sequence_length=SEQUENCE, passes=PASSES, batch_size=32
        )
        report = reports.get(name)
        result[name] = {
            "loss": found.loss,
            "tokens": found.tokens,
            "zeros": report.zeros if report else 0.0,
            "bits_per_weight": report.bits_per_weight if report else 8 * experts / weights,
            "expert_megabytes": (report.sizes["expert_bytes"] if report else experts) / 1e6,
            "model_megabytes": (
                sum(report.sizes[k] for k in ("expert_bytes", "other_bytes")) if report else experts + others
            )
            / 1e6,
            "compression_seconds": report.seconds if report else 0.0,
            "evaluation_seconds": time.perf_counter() - begun,
        }
        if name != "rtn":
            spans[name] = fill(model, tokenizer)
    lost = result["rtn"]["loss"] - result["dense"]["loss"]
    result["recovered"] = (result["rtn"]["loss"] - result["qmoe"]["loss"]) / lost
    result["expert_weights"] = weights
    result["sample"] = {"text": SAMPLE, **spans}
    result["seconds"] = time.perf_counter() - started
    return result


def data_file(name: str) -> Path:
    """Find the package's data, in a checkout or an installed package."""
    from importlib.resources import files

    return Path(str(files("qmoe_lite") / "data" / name))


def fill(model: Any, tokenizer: Any) -> str:
    """Let a model put in, greedily, what stood at SAMPLE's <extra_id_0>."""
    import torch

    ids = tokenizer(SAMPLE).input_ids
    tokens = torch.tensor([[*ids, tokenizer.eos_token_id]])
    with torch.inference_mode():
        out = model.generate(input_ids=tokens, max_new_tokens=12, do_sample=False, num_beams=1)
    after = tokenizer.decode(out[0]).split("<extra_id_0>", 1)[-1]
    return after.split("<extra_id_1>")[0].split(tokenizer.eos_token)[0]


def _print(result: dict[str, Any]) -> None:
    from rich.table import Table

    from qmoe_lite.cli import _output

    table = Table(title=f"Switch Transformer, {result['expert_weights']:,} weights in experts")
    table.add_column("")
    for heading in ("dense", "round to nearest", "QMoE"):
        table.add_column(heading, justify="right")
    for label, key, form in (
        ("held-out loss", "loss", "{:.4f}"),
        ("bits per expert weight", "bits_per_weight", "{:.3f}"),
        ("zeros among them", "zeros", "{:.1%}"),
        ("experts, MB", "expert_megabytes", "{:.2f}"),
        ("whole model, MB", "model_megabytes", "{:.2f}"),
        ("compression, s", "compression_seconds", "{:.1f}"),
        ("evaluation, s", "evaluation_seconds", "{:.1f}"),
    ):
        cells = [form.format(result[name][key]) for name in ("dense", "rtn", "qmoe")]
        if key in ("zeros", "compression_seconds"):
            cells[0] = "-"
        table.add_row(label, *cells)
    _output.print_table(table)
    _output.print_text(
        f"QMoE recovers {result['recovered']:.1%} of what rounding to nearest loses "
        f"({result['dense']['tokens']:,} predicted tokens)."
    )
    sample = result["sample"]
    _output.print_text(f"\nThe gap in:  {sample['text']}")
    for name in ("dense", "qmoe"):
        _output.print_text(f"  {name:>5} puts: {sample[name]!r}")
    _output.print_text(f"\n{result['seconds']:.0f} seconds in all.")
