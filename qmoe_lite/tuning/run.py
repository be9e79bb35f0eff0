"""`tune`: train a compressed model's steps, scales and norms against the dense model; write a new directory."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qmoe_lite.checkpoint.atomic import sync_directory
from qmoe_lite.checkpoint.finding import find_model
from qmoe_lite.checkpoint.format import codebooks_of
from qmoe_lite.checkpoint.reader import Checkpoint
from qmoe_lite.checkpoint.report import FILE_NAME, Report, read_report
from qmoe_lite.checkpoint.rewrite import rewrite
from qmoe_lite.compression.calibration import Samples, check_ids, make_samples, open_tokenizer, read_tokens
from qmoe_lite.compression.documents import DEFAULT_TEXT, read_text
from qmoe_lite.compression.lock import check_free, locked
from qmoe_lite.compression.losses import Gap, paired_gap
from qmoe_lite.compression.positions import check_window
from qmoe_lite.compression.rate import MOST
from qmoe_lite.compression.settings import Progress
from qmoe_lite.compression.verdict import judge
from qmoe_lite.devices import find_device, moved
from qmoe_lite.errors import BadResultError, CheckpointError, OutputError, SettingError
from qmoe_lite.models.building import read_config
from qmoe_lite.models.dense import load_dense
from qmoe_lite.models.skeletons import open_checkpoint
from qmoe_lite.offload.loading import load
from qmoe_lite.tuning.learning_rate import HIGHEST, Held, train_at_its_rate
from qmoe_lite.tuning.train import Step, Tuner, run_dense

VALIDATION = 8  # samples from the text's end that nothing is trained on


@dataclass(frozen=True)
class TuneReport:
    """What `tune` did.

    Attributes
    ----------
    before, after : float
        Mean KL(dense || compressed) of the predictions on validation samples, in nats, before and after training.
    loss_before, loss, dense_loss : float
        On the same samples, in nats a token.
    gap, standard_error : float
        loss - dense_loss; the error is over samples.
    samples, validation_samples, sequence_length, epochs, batch_size : int
    learning_rate : float
        As it was given, or chosen.
    device : str
        Where both models ran.
    seconds : float
    """

    before: float
    after: float
    loss_before: float
    loss: float
    dense_loss: float
    gap: float
    standard_error: float
    samples: int
    validation_samples: int
    sequence_length: int
    epochs: int
    batch_size: int
    learning_rate: float
    device: str
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return asdict(self)


def tune(
    compressed: str | Path,
    out: str | Path,
    *,
    dense: str | Path,
    calibration: str | Path | None = None,
    samples: int = 256,
    sequence_length: int = 512,
    epochs: int = 1,
    batch_size: int = 2,
    learning_rate: float | None = None,
    device: str | torch.device = "auto",
    seed: int = 0,
    progress: Callable[[Progress], None] | None = None,
) -> TuneReport:
    """Train a compressed model's row steps, column scales and norms; its digits and its size stay as they are.

    Parameters
    ----------
    compressed : path or str
        What `compress` wrote.
    out : path or str
        Directory to make; it appears when everything is done.
    dense : path or str
        The model that it was made of: a directory, or a name on the hub.
    calibration : path or str, optional
        Text, as `compress` takes it, its default too; its last samples are for validation.
    samples : int
        Samples to train on.
    sequence_length : int
        Tokens of a sample.
    epochs : int
        How often each sample is seen.
    batch_size : int
        Samples a step.
    learning_rate : float, optional
        Highest relative change of a step's size, about, in a step of training. By default .01, or a third or a ninth of
        that where the validation samples come no nearer to the dense model: then training begins anew.
    device : str or torch device
        Where both models run: "auto" is the first usable GPU, if the dense model, in float32, takes at most half of the
        memory that is free there, else the CPU, which `progress` is told; see `find_device`.
    seed : int
        Seed for samples and their order.
    progress : callable, optional
        Called with a `Progress` after each sample of the dense model and each step of training.

    Returns
    -------
    TuneReport
        Also in `OUT/qmoe_report.json`, under "tuning".

    Raises
    ------
    OutputError
        `out` exists or cannot be written, or another run is writing it.
    CheckpointError
        `compressed` is not compressed, `dense` is, or the two are not of one architecture.
    SettingError
        A number out of range, or another device.
    TextError
        The text is missing, or too short to train on and to validate with.
    NotFiniteError
        Predictions are NaN or infinite.
    BadResultError
        Training won nothing on the validation samples.
    DeviceError
        A GPU that was named cannot be used, or has too little memory.

    Notes
    -----
    The dense model's final states are kept, not its logits, and the two models are in memory one after the other, in
    float32. Where the validation samples say that nothing was won, `out` is not written: a BadResultError says so.
    On a CPU the same arguments give the same bytes, on the same machine with as many threads.
    """
    if min(samples, epochs, batch_size) < 1 or not 0 < (HIGHEST if learning_rate is None else learning_rate) <= 0.1:
        raise SettingError("samples, epochs and batch size are at least 1, the learning rate more than 0, at most 0.1.")
    begun, target, first_choice = time.perf_counter(), Path(out), find_device(device)
    check_free(target)
    source, reference = find_model(compressed), find_model(dense)
    checkpoint = _check_pair(source, reference)
    text = DEFAULT_TEXT if calibration is None else calibration
    drawn, kept = _draw(text, reference, samples, sequence_length, seed)
    partial = target.with_name(f"{target.name}.partial")
    tell = progress or (lambda event: None)
    runs = len(drawn) + len(kept)
    whole = runs + epochs * -(-len(drawn) // batch_size)

    def show(step: Step, rate: float, given_up: int) -> None:
        place = f"step {step.number} of {step.steps}: {step.divergence:.4f} nats from the dense model"
        if given_up:
            place += f", again at a learning rate of {rate:.4f}"
        tell(Progress(runs + given_up + step.number, whole + given_up, place))

    with locked(partial):
        check_free(target)
        if partial.exists() or partial.is_symlink():
            raise OutputError(
                f"{partial} exists: unfinished work, maybe of a compression. Move it, or choose another OUT."
            )
        model = load_dense(reference, *open_checkpoint(reference), torch.float32)
        where = _with_room(model, first_choice, tell) if str(device) == "auto" else first_choice
        model = moved(model, where, reference)
        states = run_dense(model, drawn, lambda done: tell(Progress(done, whole, f"dense model, sample {done}")))
        wanted = run_dense(
            model, kept, lambda done: tell(Progress(len(drawn) + done, whole, "dense model, validation"))
        )
        del model
        tuner = Tuner(load(source, device=where, dtype=torch.float32))
        before = tuner.measure(kept, wanted)
        how: dict[str, Any] = {"epochs": epochs, "batch": batch_size, "seed": seed, "progress": show}
        held = Held(kept, wanted)
        stored, after, rate = train_at_its_rate(
            tuner, drawn, states, held, before.divergence, rate=learning_rate, **how
        )
        if not after.divergence < before.divergence:
            raise BadResultError(
                f"training won nothing at a learning rate of {rate:.4g} ({before.divergence:.4f} to "
                f"{after.divergence:.4f} nats from the dense model on validation samples): {target} was not written. "
                "Use more samples, or a lower learning rate."
            )
        tokens = sum(after.tokens)
        gap = paired_gap(after.losses, after.dense_losses, after.tokens)
        dense_loss = sum(after.dense_losses) / tokens
        report = TuneReport(
            before=before.divergence,
            after=after.divergence,
            loss_before=sum(before.losses) / tokens,
            loss=dense_loss + gap.nats,
            dense_loss=dense_loss,
            gap=gap.nats,
            standard_error=gap.standard_error,
            samples=len(drawn),
            validation_samples=len(kept),
            sequence_length=drawn.input_ids.shape[1],
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=rate,
            device=str(where),
            seconds=time.perf_counter() - begun,
        )
        _write(checkpoint, partial, target, stored, report, gap, tokens)
    return report


def _with_room(model: Any, device: torch.device, tell: Callable[[Progress], None]) -> torch.device:
    """Return the device, or the CPU where a dense model would take over half of what is free there."""
    if device.type == "cpu":
        return device
    torch.cuda.empty_cache()  # what a compression left
    size, free = sum(each.nbytes for each in model.parameters()), torch.cuda.mem_get_info(device)[0]
    if 2 * size <= free:
        return device
    sizes = f"the dense model takes {size / 1e9:.1f} GB in float32, and {free / 1e9:.1f} GB are free on {device}"
    tell(Progress(0, 1, "tuning", f"{sizes}: both models run on the CPU"))
    return torch.device("cpu")


def _check_pair(source: Path, reference: Path) -> Checkpoint:
    """Return the compressed model's checkpoint; raise CheckpointError unless the other is its dense model."""
    _, checkpoint = open_checkpoint(source)
    codebooks_of(checkpoint)
    if read_config(str(reference)).to_dict().get("quantization_config", {}).get("quant_method") == "qmoe":
        raise CheckpointError(f"{reference} is compressed itself. Name the dense model that {source} was made of.")
    ours, theirs = (read_config(str(path)).to_dict() for path in (source, reference))
    skipped = {"quantization_config", "transformers_version", "dtype", "torch_dtype", "_name_or_path", "auto_map"}
    differing = sorted(name for name in {*ours, *theirs} - skipped if ours.get(name) != theirs.get(name))
    if differing:
        name = differing[0]
        found = f"{name} is {theirs.get(name)!r} there and {ours.get(name)!r} in {source}"
        raise CheckpointError(f"{reference} is another model: {found}. Name the model that was compressed.")
    return checkpoint


def _draw(
    calibration: str | Path, reference: Path, samples: int, sequence_length: int, seed: int
) -> tuple[Samples, Samples]:
    """Return samples to train on, and those of the text's end, at most an eighth of it, to validate with."""
    config, tokenizer = read_config(str(reference)), open_tokenizer(reference)
    check_window(config, sequence_length)
    seq2seq = bool(config.is_encoder_decoder)
    tokens = read_tokens(read_text(calibration), tokenizer, seq2seq=seq2seq)
    split = len(tokens) - min(len(tokens) // 8, VALIDATION * sequence_length)
    parts = []
    for some, count in ((tokens[:split], samples), (tokens[split:], VALIDATION)):
        made = make_samples(
            some,
            tokenizer,
            seq2seq=seq2seq,
            count=count,
            sequence_length=sequence_length,
            seed=seed,
        )
        check_ids(made, config.get_text_config().vocab_size)
        parts.append(made)
    return parts[0], parts[1]


def _write(
    checkpoint: Checkpoint,
    partial: Path,
    target: Path,
    changed: dict[str, Tensor],
    report: TuneReport,
    gap: Gap,
    tokens: int,
) -> None:
    contents: dict[str, Any] = {}
    if (found := read_report(checkpoint.directory)) is not None:
        contents[FILE_NAME] = _tuned(found, report, gap, tokens, checkpoint)
    partial.mkdir(parents=True)
    try:
        rewrite(checkpoint, partial, changed, contents)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync_directory(target.parent)


def _tuned(found: Report, report: TuneReport, gap: Gap, tokens: int, checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the report of the compression with the tuning and its verdict."""
    vocabulary = checkpoint.config.get("vocab_size") or checkpoint.config["text_config"]["vocab_size"]
    verdict = judge(report.dense_loss, gap, tokens, vocabulary, found.settings.get("rate"), MOST)
    return replace(found, verdict=verdict.to_json(), tuning=report.to_json()).to_json()
