"""The driver: block by block, expert group by expert group.

All samples go through one block before the next one is touched (QMoE, section 3.1): a block's dense part is loaded,
run and freed; its experts are read, quantised, and written a group at a time. Activations wait in list buffers.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qmoe_lite.checkpoint import atomic as files
from qmoe_lite.checkpoint.finding import find_model
from qmoe_lite.checkpoint.format import quantization_config
from qmoe_lite.checkpoint.reader import Checkpoint
from qmoe_lite.checkpoint.report import FILE_NAME, Report, read_report, versions
from qmoe_lite.checkpoint.writer import Writer
from qmoe_lite.compression.block_runner import BlockRunner
from qmoe_lite.compression.block_tuning import BlockTuning
from qmoe_lite.compression.calibration import Samples, check_ids, hessian_masks, open_tokenizer
from qmoe_lite.compression.choice import as_used, choose
from qmoe_lite.compression.finite import check_finite
from qmoe_lite.compression.identity import check_same, contents_of, fingerprint_of
from qmoe_lite.compression.layer import LayerCompressor
from qmoe_lite.compression.layer_parts import LayerInputs, LayerResult
from qmoe_lite.compression.layer_sensitivity import measured_by_first
from qmoe_lite.compression.list_buffer import ListBuffer
from qmoe_lite.compression.lock import check_free, locked
from qmoe_lite.compression.losses import head_on
from qmoe_lite.compression.notes import make_report, name_of_text
from qmoe_lite.compression.opening import check_family, opened
from qmoe_lite.compression.positions import check_window
from qmoe_lite.compression.ranks import ALONE, Ranks
from qmoe_lite.compression.rate import check_rate
from qmoe_lite.compression.replay import check_first_blocks
from qmoe_lite.compression.run_samples import RunSamples, samples_for, text_for, twins_for
from qmoe_lite.compression.settings import Progress, Settings
from qmoe_lite.compression.shares import MEASURED, Sensitivity, layers_of, shares_of
from qmoe_lite.compression.spill import check_folder
from qmoe_lite.compression.state import Unfinished
from qmoe_lite.compression.stored import know_layers_before, run_stored
from qmoe_lite.compression.telling import Teller
from qmoe_lite.compression.verdict import Verdict, bad_layer
from qmoe_lite.errors import BadResultError, OutputError
from qmoe_lite.models.skeletons import capacity_lifted
from qmoe_lite.quantization.grid import Grid, UniformGrid


def compress(
    model: str | Path,
    out: str | Path,
    *,
    calibration: str | Path | None = None,
    grid: Grid | None = None,
    device: str | torch.device = "auto",
    resume: bool = True,
    progress: Callable[[Progress], None] | None = None,
    recipe: str = "default",
    samples: int | None = None,
    sequence_length: int = 512,
    codeword_bits: int | None = None,
    dampening: float = 0.1,
    block_size: int = 128,
    group_size: int = 16,
    group_bytes: int | None = None,
    token_cap: float = 4.0,
    blend_tokens: int = 64,
    validation_samples: int = 8,
    batch_size: int | None = None,
    activations: str = "float32",
    products: str = "float32",
    seed: int = 0,
    rate: float | None = None,
    tune: str | None = None,
    sensitivity: Sensitivity | str | Path | None = None,
    stop_when_bad: bool = False,
    check_first: bool = False,
    family: str | None = None,
    log: str | Path | None = None,
    before: Callable[[int | None], None] | None = None,
    spill: str | Path | None = None,
    each_group: AbstractContextManager[Any] | None = None,
    ranks: Ranks = ALONE,
) -> Report:
    """Compress the experts of a Mixture-of-Experts model; `qmoe_lite.compression.Settings` says more of the settings.

    Parameters
    ----------
    model : path or str
        Hugging Face directory, or a name on the hub.
    out : path or str
        Directory to make; it appears when everything is done. Until then the work is in `OUT.partial`.
    calibration : path or str, optional
        Text file, .jsonl file of texts or messages, directory of them, or data set name; by default the package's
        own, Python's documentation and sources. None for `recipe="nearest"`.
    grid : grid, optional
        Levels that a row may take; by default `MinMaxTernary(level_dtype=torch.bfloat16)` for a Switch Transformer and
        the recipes "paper" and "nearest", and for other families a `UniformGrid` at a rate of 2.
    device : str or torch device
        Where blocks run and experts are solved: "auto" is the first usable GPU, else the CPU; see `find_device`.
    resume : bool
        Resume from `OUT.partial`; False discards it.
    progress : callable, optional
        Called with a `Progress` after each group of experts.
    recipe : str
        "default", "paper" (its code and its Hessians), or "nearest" (round to nearest, without text).
    samples : int, optional
        Calibration samples; by default 80 for each expert over the experts of a token.
    sequence_length : int
        Tokens of a sample.
    codeword_bits : int, optional
        8 to 13, at a rate 9 to 12; by default 10 at a rate, else chosen for each layer and projection.
    dampening : float
        Added to a Hessian's diagonal, as a share of its mean.
    block_size : int
        Columns that GPTQ rounds between two updates of the rest.
    group_size : int
        Experts quantised together.
    group_bytes : int, optional
        Memory for a group, by default 1 GiB, on a GPU 4; `group_size` experts that would need more are split.
    token_cap : float
        An expert's Hessian takes at most this many times the mean number of tokens, drawn at random.
    blend_tokens : int
        How strongly an expert with few tokens borrows from the layer's Hessian; 0 for not at all.
    validation_samples : int
        Samples from the text's end that measure `Report.held_out_error` and enter no Hessian.
    batch_size : int, optional
        Samples per pass through a block; by default what makes 1,024 tokens on a CPU, and 16 on a GPU.
    activations : str
        "float32", or "bfloat16" at half the memory.
    products : str
        "float32", or "bfloat16": what experts and tokens are multiplied in, faster on devices that can.
    seed : int
        Seed for samples, masked spans and drawn tokens.
    rate : float, optional
        Stored bits a weight, averaged over all experts of the model, 0.6 to 4: the step of a `UniformGrid` is chosen
        for it.
    tune : str, optional
        What experts do about what is lost: see `block_tuning`. "targets": their last projections are solved for it;
        "block": steps and scales are trained too; "none". By default "block" at a rate of up to 2.75 bits, else
        "targets", and "none" for the recipes "paper" and "nearest".
    sensitivity : Sensitivity, path or "none", optional
        Which layers lose how much, by `qmoe_lite.sensitivity` or of a file: those that lose much get more of the bits.
        By default it is measured first where there is a rate; "none" gives all layers the same step.
    stop_when_bad : bool
        End with `BadResultError` after the first layer whose held-out error says that the model will be bad.
    check_first : bool
        Search all tensors for NaN and infinity before the first layer.
    family : str, optional
        "auto" takes a model type that is not among the tested ones too, if its first blocks compute what transformers
        does.
    log : path, optional
        File for events as JSON lines; see `compression.telling`.
    before : callable, optional
        Called with the number of calibration samples before anything is written; refuses by an exception.
    spill : path, optional
        Folder on a disk, best not a network's, for the activations in place of memory; the result is the same.
    each_group : context manager, optional
        Entered for each group of experts, and left when it is kept; not for "nearest", which keeps layers alone.
    ranks : Ranks, optional
        Of several processes that compress together, this one: `with compression.ranks.Together() as ranks`.

    Returns
    -------
    Report
        Also written to `OUT/qmoe_report.json`.

    Raises
    ------
    OutputError
        `out` exists, another run is writing it, or it cannot be written; finished layers are kept for the next run.
    ResumeError
        `OUT.partial` belongs to another model, text or setting.
    BadResultError
        `stop_when_bad` was asked for, and a layer is bad; the work so far is kept.
    CheckpointError, FormatError, UnsupportedFamilyError, TextError, SettingError, DeviceError, NotFiniteError
        What is wrong with the input, before or where it is met.

    Notes
    -----
    QMoE (arXiv:2310.16795), section 3; but tokens over the cap are left out at random, the last projection's Hessian
    comes from the quantised first one, levels are rounded before the solver, and starved experts borrow a Hessian.
    """
    options = Settings(
        recipe=recipe,
        samples=samples,
        sequence_length=sequence_length,
        codeword_bits=codeword_bits,
        dampening=dampening,
        block_size=block_size,
        group_size=group_size,
        group_bytes=group_bytes,
        token_cap=token_cap,
        blend_tokens=blend_tokens,
        validation_samples=validation_samples,
        batch_size=batch_size,
        activations=activations,
        products=products,
        seed=seed,
        rate=None if rate is None else check_rate(rate),
        tune=tune,
        sensitivity=layers_of(sensitivity),
        stop_when_bad=stop_when_bad,
        check_first=check_first,
        device=str(ranks.device(device)),
    )
    options.check()
    target = Path(out)
    check_free(target)
    calibration = text_for(options.recipe, calibration)
    check_family(family)
    check_folder(spill)
    partial = target.with_name(f"{target.name}.partial")
    telling = Teller(progress, None if log is None else Path(log), before) if ranks.first else Teller(None, None)
    with locked(partial, ranks) as note, torch.inference_mode(), telling as tell:
        check_free(target)  # once more: another run may have finished it
        run = _Run(find_model(model), target, partial, grid, options, tell, auto=family == "auto")
        run.spill, run.ranks = None if spill is None else Path(spill), ranks
        run.compressor.each_group = each_group or nullcontext()
        run.degraded += [] if note is None else [note]
        return run.run(calibration, resume)


class _Run:
    """One compression, from an opened checkpoint to a written directory."""

    def __init__(
        self, model: Path, out: Path, partial: Path, grid: Grid | None, settings: Settings, tell: Teller, auto: bool
    ) -> None:
        self.started = time.perf_counter()
        self.out, self.partial = out, partial
        found = self._opened = opened(model, auto)
        self.family, self.checkpoint, self.config = found.family, found.checkpoint, found.config
        self.model, self.layers, self.degraded = found.model, found.layers, found.notes
        self.grid, self.settings = choose(grid, settings, self.family.model_type, len(self.layers))
        self.adapts = grid is None and isinstance(self.grid, UniformGrid)  # its dead zone follows the model
        shares_of(self.settings.sensitivity, self.layers)  # refuses another model's
        self.number_of = {layer.block: number for number, layer in enumerate(self.layers)}
        stored = functools.partial(self.family.stored, self.config, checkpoint=self.checkpoint)
        self.writer = Writer(self.partial, self.checkpoint, stored, len(self.layers))
        self.compressor = LayerCompressor(self.family, self.config, self.checkpoint, self.grid, self.settings)
        check_first_blocks(found, self.settings)
        self._tell = tell
        self._warning: str | None = None
        self.verdict: Verdict | None = None
        self.spill: Path | None = None
        self.ranks: Ranks = ALONE

    def run(self, calibration: str | Path | None, resume: bool) -> Report:
        if self.settings.check_first and self.ranks.first:
            check_finite(self.checkpoint, self._tell)
        if calibration is None:
            self._open_partial(None, resume, None)
            for number in range(len(self.layers)):
                self._finish_layer(number, None)
                self.unfinished.save()
        else:
            check_window(self.config, self.settings.sequence_length)
            tokenizer = open_tokenizer(self.checkpoint.directory)
            samples = self._samples(calibration, tokenizer)
            check_ids(samples.all, self.config.get_text_config().vocab_size)
            self._open_partial(samples.all, resume, samples.calibration)
            if not self.unfinished.finished:
                if self.settings.sensitivity == MEASURED:
                    self._share_bits(samples, tokenizer)
                self._calibrated(samples, hessian_masks(samples.all, tokenizer))
        return self.ranks.share(functools.partial(self._write_rest, name_of_text(calibration)))

    def _open_partial(self, samples: Samples | None, resume: bool, calibration: int | None) -> None:
        self._tell.begin(calibration, [len(self.compressor.groups(layer)) for layer in self.layers])
        fingerprint = fingerprint_of(self.checkpoint, self.settings, self.grid, samples)
        check_same(fingerprint, self.ranks)
        contents = functools.partial(contents_of, self.checkpoint, self._tell)
        places = {layer.experts: self.writer.layer_file(number) for number, layer in enumerate(self.layers)}
        what = self.partial, fingerprint, resume, self.started, contents
        self.unfinished, bad = Unfinished.open_together(self.ranks, places, *what)
        self.done = self.unfinished.done
        if bad is not None:
            self.degraded.append(bad)
            self._tell(Progress(0, 1, "unfinished work", f"{bad}."))
        self._tell.started(list(self.done.held_out_error), samples=calibration)

    def _samples(self, calibration: str | Path, tokenizer: Any) -> RunSamples:
        what = calibration, tokenizer, samples_for(self.layers, self.settings), self.family.seq2seq, self.settings
        samples, notes = RunSamples.make(*what, twins_for(self.layers, self.settings))
        self.degraded += notes
        return samples

    def _share_bits(self, samples: RunSamples, tokenizer: Any) -> None:
        """Let layers' steps follow what each layer loses alone, which is measured once."""
        if self.done.sensitivity is None:
            what = self._opened, samples, tokenizer, self.settings, self.spill
            self.done.sensitivity = measured_by_first(self.ranks, self._tell.of_layers, *what)
            self.unfinished.save()
            self._tell.rest()
        self.settings = replace(self.settings, sensitivity=self.done.sensitivity)

    def _calibrated(self, samples: RunSamples, masks: tuple[np.ndarray, np.ndarray | None]) -> None:
        self.family.load_outside_blocks(self.model, self.checkpoint, torch.float32)
        what = self.model, self.family, self.checkpoint, self.layers, self.settings
        runner = BlockRunner(*what, samples.reference, self.spill, self.ranks)
        ids = [samples.all.input_ids]
        if samples.all.labels is not None:
            ids.append(samples.decoder_input(self.config))
        if samples.twins:
            self.compressor.tuning = BlockTuning(self.compressor, samples, self.settings)
        memory: ListBuffer | None = None
        resumed, finished = self.unfinished.stack, self.unfinished.block
        with capacity_lifted(self.model):
            for number, (stack, tokens, mask) in enumerate(
                zip(self.family.stacks(self.config), ids, masks, strict=False)
            ):
                hidden = runner.buffer(tokens.shape)
                if number < resumed:
                    memory = hidden  # a finished stack: its output was saved
                    self.unfinished.load_encoder_output(memory)
                    continue
                first = finished + 1 if finished is not None and number == resumed else 0
                calls = runner.enter(stack, tokens, memory, hidden, first)
                if first:
                    self.unfinished.load_hidden(hidden)
                    runner.resume(self.unfinished.load_handed())
                assert mask is not None
                flags = samples.flags(mask)
                for i in range(first, len(stack.blocks)):
                    caught = runner.run(stack, i, hidden, memory, calls)
                    if caught is not None:
                        sparse = self.number_of[stack.blocks[i]]
                        self._finish_layer(sparse, LayerInputs.of(caught, flags, self.settings.seed, sparse))
                        caught.finish()
                        self.unfinished.keep(number, i, hidden, memory, runner.handed)
                        self.unfinished.clear_groups(sparse)
                        if self._warning is not None and self.settings.stop_when_bad:
                            raise BadResultError(f"{self._warning} The work so far is in {self.partial}.")
                    del caught  # its buffer is as large as `hidden`, and the next block makes another
                runner.leave(stack, hidden)
                memory = hidden
            assert memory is not None
            weight, finish = self.family.head(self.model, self.checkpoint)
            head = head_on(weight, self.settings.device, self.degraded), finish
            self.verdict = samples.judge(memory, *head, self.settings.rate, self.ranks)

    def _finish_layer(self, number: int, seen: LayerInputs | None) -> None:
        """Compress and write one sparse layer; or run it from its file, where it was finished before."""
        layer = self.layers[number]
        sizes = [len(self.compressor.groups(each)) for each in self.layers]
        finished = layer.experts in self.done.held_out_error
        if finished and layer.experts not in self.unfinished.lost:
            if seen is not None:
                self._tell(Progress(sum(sizes[:number]), sum(sizes), f"{layer.block}, from its file"))
                books = self.done.codebooks[layer.experts]
                run_stored(self.compressor, layer, self.writer, number, books, seen, self.ranks)
            return
        know_layers_before(number, self.layers, self.compressor, self.done, self.settings, self.adapts)
        tell_of_group = self._tell.layer(number, layer, 0 if seen is None else len(seen.assigned.rows))
        result = self.compressor.compress(layer, number, seen, tell_of_group, self.unfinished.groups, self.ranks)
        if result is not None:
            self._take(number, result)
        self.done = self.unfinished.done = self.ranks.of(0, self.done)

    def _take(self, number: int, result: LayerResult) -> None:
        """Write a layer's file, and note what was found of it."""
        layer, finished = self.layers[number], self.layers[number].experts in self.done.held_out_error
        self.done.checksums |= self.writer.write_layer(number, result.tensors)
        self.done.files[layer.experts] = files.file_sum(self.writer.layer_file(number))
        if finished:  # all else that is known of it is known already
            return
        self.done.take(layer, result, self.compressor.rate, self.compressor.dead_zone)
        if self._warning is None and (warning := bad_layer(layer.block, result.held_out_error)) is not None:
            self._warning = warning
            place = f"{layer.block} of {self.layers[-1].block}"
            sizes = [len(self.compressor.groups(each)) for each in self.layers]
            self._tell(Progress(sum(sizes[: number + 1]), sum(sizes), place, self._warning))

    def _write_rest(self, text: str | None) -> Report:
        """Write dense tensors, index, configuration and report; give the directory its name."""
        if self.unfinished.finished and (known := read_report(self.partial)) is not None:
            self.unfinished.become(self.out)
            return known
        matrices = sum(p.experts for p in self.done.projections)
        promised = sum(layer.matrices for layer in self.layers)
        if matrices != promised:
            raise OutputError(f"{matrices} matrices were compressed, {promised} promised; please report this as a bug.")
        used, dtype = as_used(self.grid, self.done.projections), self.grid.level_dtype or torch.float32
        told: dict[str, Any] = {"recipe": self.settings.recipe, "grid": used.to_config(), "level_dtype": dtype}
        settings = quantization_config(self.done.codebooks, **told, versions=versions())
        self.writer.write_rest(self.done.checksums, settings)
        found = self.done, self.degraded, self.verdict, self.unfinished.seconds, text
        report = make_report(self.checkpoint, Checkpoint(self.partial), self.layers, self.settings, used, *found)
        files.write_json(self.partial / FILE_NAME, report.to_json())
        self.unfinished.become(self.out)
        return report
