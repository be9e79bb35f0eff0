"""`qmoe demo`: the whole job on the model in the package."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from qmoe_lite.bench._show.text import print_table, print_text, print_wrapped
from qmoe_lite.cli._options import DeviceOption, JsonOption, Placement

SAMPLES, SEQUENCE, PASSES = 1536, 128, 2
SHOWN = (42, 6)  # which window of the evaluation text is filled in, and which of its gaps is shown


def demo(
    out: Annotated[Path | None, typer.Option(help="Keep the compressed model in this new directory.")] = None,
    device: DeviceOption = "cpu",
    json: JsonOption = False,
) -> None:
    """Compress the bundled model by rounding and by QMoE, and compare both with the dense one. No GPU, no download.

    Example: qmoe demo --out tiny-qmoe
    """
    from qmoe_lite.cli import _output
    from qmoe_lite.errors import OutputError

    if out is not None and out.exists():
        raise OutputError(f"{out} exists already. Name another directory, or remove it.")
    _output.quiet_transformers()
    with tempfile.TemporaryDirectory(prefix="qmoe-demo-") as scratch:
        result = _run(Path(scratch), device, show=not json)
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(Path(scratch) / "qmoe", out)
    if json:
        _output.print_json(result)
        return
    _print(result)
    if out is not None:
        print_text(f"\nThe compressed model is in {out}. Try: qmoe eval {out} --text YOUR.txt")


def _run(scratch: Path, device: str, show: bool) -> dict[str, Any]:
    from qmoe_lite.checkpoint.reader import Checkpoint
    from qmoe_lite.checkpoint.report import stored_bytes
    from qmoe_lite.cli import _output
    from qmoe_lite.cli._models import open_model
    from qmoe_lite.compression.run import compress
    from qmoe_lite.text.evaluation import evaluate

    text, source = data_file("text"), data_file("tiny_switch")
    started = time.perf_counter()
    settings: dict[str, Any] = {"sequence_length": SEQUENCE, "seed": 0, "device": device}
    reports = {}
    for name, title, calibration in (("rtn", "rounding to nearest", None), ("qmoe", "QMoE", text / "calibration.txt")):
        chosen = {"recipe": "nearest"} if calibration is None else {"samples": SAMPLES}
        with _output.progress_shown(title, show) as progress:
            reports[name] = compress(
                source, scratch / name, calibration=calibration, progress=progress, **settings, **chosen
            )
    result: dict[str, Any] = {}
    spans = {}
    experts, others = stored_bytes(Checkpoint(source))
    weights = reports["qmoe"].expert_weights
    for name, directory in (("dense", source), ("rtn", scratch / "rtn"), ("qmoe", scratch / "qmoe")):
        if show:
            _output.note(f"evaluating {name}")
        model, tokenizer = open_model(str(directory), placement=Placement(device))
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
            spans[name] = fill(model, tokenizer, text / "evaluation.txt")
    lost = result["rtn"]["loss"] - result["dense"]["loss"]
    result["recovered"] = (result["rtn"]["loss"] - result["qmoe"]["loss"]) / lost if lost else 0.0
    result["expert_weights"] = weights
    result["verdict"] = reports["qmoe"].verdict
    shown, truth, dense = spans["dense"]
    result["sample"] = {"text": shown, "truth": truth, "dense": dense, "qmoe": spans["qmoe"][2]}
    result["seconds"] = time.perf_counter() - started
    return result


def data_file(name: str) -> Path:
    """Find the package's data, in a checkout or an installed package."""
    from importlib.resources import files

    return Path(str(files("qmoe_lite") / "data" / name))


def fill(model: Any, tokenizer: Any, text: Path) -> tuple[str, str, str]:
    """Fill one window's gaps by a model, greedily; return the text around one gap, the original and the model's."""
    import torch

    from qmoe_lite.compression.calibration import make_samples, read_tokens
    from qmoe_lite.compression.documents import read_text
    from qmoe_lite.models.skeletons import capacity_lifted

    tokens = read_tokens(read_text(text), tokenizer, seq2seq=True)
    samples = make_samples(tokens, tokenizer, seq2seq=True, count=None, sequence_length=SEQUENCE, seed=1)
    window, gap = SHOWN[0] % len(samples), SHOWN[1]
    with torch.inference_mode(), capacity_lifted(model):
        ids = torch.from_numpy(samples.input_ids[window : window + 1]).to(model.device)
        out = model.generate(input_ids=ids, max_new_tokens=48, do_sample=False, num_beams=1)
    assert samples.labels is not None

    def between(ids: Any) -> str:
        after = tokenizer.decode(ids).partition(f"<extra_id_{gap}>")[2]
        return after.partition("<extra_id_")[0].removesuffix(tokenizer.eos_token)

    before, _, after = tokenizer.decode(samples.input_ids[window]).partition(f"<extra_id_{gap}>")
    clip = (before.rpartition("<extra_id_")[2].partition(">")[2][-60:], after.partition("<extra_id_")[0][:60])
    shown = " ".join(f"{clip[0]}[..]{clip[1]}".split()).removesuffix(tokenizer.eos_token)
    return shown, between(samples.labels[window]), between(out[0])


def _print(result: dict[str, Any]) -> None:
    from rich.table import Table

    from qmoe_lite.compression.verdict import Verdict

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
    print_table(table)
    print_text(
        f"QMoE recovers {result['recovered']:.1%} of what rounding to nearest loses "
        f"({result['dense']['tokens']:,} predicted tokens)."
    )
    print_wrapped(f"Verdict: {Verdict.from_json(result['verdict'])}")
    sample = result["sample"]
    print_text(f"\nThe gap in:  {sample['text']}")
    for name, title in (("truth", "the text"), ("dense", "dense"), ("qmoe", "QMoE")):
        print_text(f"  {title:>8}: {sample[name]!r}")
    print_text(f"\n{result['seconds']:.0f} seconds in all.")
