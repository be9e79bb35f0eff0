"""What a model loses at each number of stored bits: the frontier that settings are judged by.

Every variant is compressed from the same calibration text and evaluated on the same held-out samples; a gap is paired
with the dense model's losses, and its standard error is over samples. Layer errors decide nothing here.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qmoe_lite.bench._parts.common import machine_line
from qmoe_lite.checkpoint.report import read_report
from qmoe_lite.errors import BadResultError, SettingError

RATES = (0.8, 1.0, 1.3, 1.6, 2.0, 2.5, 3.0, 4.0)
DENSE, NEAREST, PAPER = "dense", "round to nearest", "paper's recipe"
# importance matrices from the calibration text; measured beside ours on 2026-11-25 on the model of bench/real_model.py,
# llama-cpp-python 0.3.36's ggml, 10 to 20 held-out windows of 1,024 tokens
LLAMA_CPP = (
    ("IQ1_S", 1.5625, 4.17),
    ("IQ1_M", 1.75, 2.75),
    ("IQ2_XXS", 2.0625, 1.60),
    ("IQ2_XS", 2.3125, 1.107),
    ("IQ2_S", 2.5625, 0.783),
    ("Q2_K", 2.625, 0.848),
    ("IQ3_XXS", 3.0625, 0.339),
    ("Q3_K", 3.4375, 0.272),
    ("Q4_0", 4.5, 0.053),
)
REAL_MODEL = (49152, 576, 30)  # vocabulary, width and blocks of that model: others have no figures of llama.cpp's


@dataclass(frozen=True)
class Point:
    """One variant of the model.

    Attributes
    ----------
    name : str
    bits : float
        Stored bits an expert weight, from the files; 16 for the dense model.
    loss : float
        Nats a token.
    gap, standard_error : float
        More than the dense model's loss, paired by sample.
    verdict : str or None
        Word in the compression's own report.
    seconds : float
        For compressing, or for tuning afterwards.
    """

    name: str
    bits: float
    loss: float
    gap: float
    standard_error: float
    verdict: str | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class AccuracyReport:
    """What `measure` found, and where; `peers` are llama.cpp's types on the same model, where it is known."""

    model: str
    points: tuple[Point, ...]
    peers: tuple[tuple[str, float, float], ...]
    calibration_samples: int | None
    sequence_length: int
    tokens: int
    machine: str

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return asdict(self)


def measure(
    model: str | Path,
    calibration: str | Path,
    text: str | Path,
    *,
    rates: Iterable[float] = RATES,
    baselines: bool = True,
    tuned: bool = False,
    tune: str | None = None,
    samples: int | None = None,
    sequence_length: int = 512,
    held_out: int | None = None,
    directory: str | Path | None = None,
    settings: dict[str, Any] | None = None,
    progress: Callable[[str], None] | None = None,
) -> AccuracyReport:
    """Compress a model at several rates and measure what each loses.

    Parameters
    ----------
    model, calibration, text : str or Path
        As `compress` and `evaluate` take them; the held-out text must share nothing with the calibration text.
    rates : iterable of float
        Stored bits an expert weight.
    baselines : bool
        Measure rounding to nearest and the paper's recipe too.
    tuned : bool
        Measure each variant that was calibrated once more after `tune` with the same text.
    tune : str, optional
        As `compress` takes it, for each variant that is calibrated.
    samples, sequence_length : int
        Of calibration; `sequence_length` of the evaluation too.
    held_out : int, optional
        Samples of the evaluation, drawn at random; all by default.
    directory : path, optional
        Where there is room for one compressed model at a time.
    settings : dict, optional
        More arguments of `compress` for the rates.
    progress : callable, optional
        Called with a line for each finished variant.

    Raises
    ------
    SettingError
        A rate out of range, and what `compress` and `evaluate` raise.
    """
    from qmoe_lite.compression.rate import check_rate
    from qmoe_lite.compression.run import compress
    from qmoe_lite.tuning.run import tune as tune_whole

    tell = progress or (lambda line: None)
    options: dict[str, Any] = {"samples": samples, "sequence_length": sequence_length, "tune": tune}
    variants: list[tuple[str, dict[str, Any]]] = []
    if baselines:
        variants.append((NEAREST, {"recipe": "nearest", "sequence_length": sequence_length}))
        variants.append((PAPER, {**options, "calibration": calibration, "recipe": "paper"}))
    for rate in rates:
        more = {**options, **(settings or {}), "calibration": calibration, "rate": check_rate(rate)}
        variants.append((f"--rate {rate:g}", more))
    if not variants:
        raise SettingError("nothing to measure: expected at least one rate, or the baselines.")
    dense, vocabulary = _evaluated(model, text, sequence_length, held_out)
    points = [Point(DENSE, 16.0, dense.loss, 0.0, 0.0)]
    tell(f"{DENSE}: loss {dense.loss:.4f} on {dense.tokens:,} tokens")

    def add(name: str, out: Path, begun: float) -> None:
        seconds, report = time.perf_counter() - begun, read_report(out)
        assert report is not None
        found, _ = _evaluated(out, text, sequence_length, held_out)
        gap = found.gap(dense)
        verdict = report.verdict["word"] if report.verdict else None
        points.append(Point(name, report.bits_per_weight, found.loss, gap.nats, gap.standard_error, verdict, seconds))
        bits = f"{report.bits_per_weight:.4f} bits"
        tell(f"{name}: {bits}, gap {gap.nats:.4f} +- {gap.standard_error:.4f}, {seconds:.0f} s")

    with tempfile.TemporaryDirectory(prefix="qmoe-accuracy-", dir=directory) as scratch:
        out, better = Path(scratch) / "model", Path(scratch) / "tuned"
        for name, chosen in variants:
            begun = time.perf_counter()
            compress(model, out, **chosen)
            add(name, out, begun)
            if tuned and "calibration" in chosen:
                begun = time.perf_counter()
                given: dict[str, Any] = {} if samples is None else {"samples": samples}
                try:
                    tune_whole(
                        out, better, dense=model, calibration=calibration, sequence_length=sequence_length, **given
                    )
                    add(f"{name}, tuned", better, begun)
                except BadResultError as error:
                    tell(f"{name}, tuned: {error}")
                shutil.rmtree(better, ignore_errors=True)
            shutil.rmtree(out)
    peers = LLAMA_CPP if vocabulary == REAL_MODEL else ()
    machine = machine_line("torch", "transformers", "numba")
    return AccuracyReport(str(model), tuple(points), peers, samples, sequence_length, dense.tokens, machine)


def _evaluated(model: str | Path, text: str | Path, sequence_length: int, held_out: int | None) -> tuple[Any, Any]:
    """Return a model's evaluation, and what tells the real model from others."""
    from transformers import AutoConfig

    from qmoe_lite.checkpoint.finding import find_model
    from qmoe_lite.compression.calibration import open_tokenizer
    from qmoe_lite.models.dense import load_dense
    from qmoe_lite.models.skeletons import open_checkpoint
    from qmoe_lite.offload.loading import load
    from qmoe_lite.text.evaluation import evaluate

    directory = find_model(model)
    family, checkpoint = open_checkpoint(directory)
    if checkpoint.config.get("quantization_config"):
        loaded = load(directory, device="cpu", dtype=torch.float32)
    else:
        loaded = load_dense(directory, family, checkpoint, torch.float32)
    found = evaluate(
        loaded, open_tokenizer(directory), text, samples=held_out, sequence_length=sequence_length, batch_size=1
    )
    config: Any = AutoConfig.from_pretrained(directory)
    return found, (config.vocab_size, config.hidden_size, config.num_hidden_layers)
