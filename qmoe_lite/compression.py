"""The driver: block by block, expert group by expert group.

All samples go through one block before the next one is touched (QMoE, section 3.1): a block's dense part is loaded,
run and freed; its experts are read, quantised, and written a group at a time. Activations wait in list buffers.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qmoe_lite import checkpoint as files
from qmoe_lite.calibration import Samples, hessian_masks, make_samples, read_text, read_tokens, window_length
from qmoe_lite.checkpoint import EXPERTS, Checkpoint
from qmoe_lite.codebook import Codebook
from qmoe_lite.codec import encode
from qmoe_lite.digits import count, squeeze, unsqueeze
from qmoe_lite.errors import NotFiniteError, OutputError, ResumeError, SettingError
from qmoe_lite.experts import FORMAT, Placeholder, pack_experts
from qmoe_lite.families import (
    Family,
    MoELayer,
    Stack,
    capacity_lifted,
    check_promise,
    family_of,
    read_config,
    skeleton,
)
from qmoe_lite.grid import Grid, MinMaxTernary, Quantized
from qmoe_lite.hessian import accumulate, blend, mean, new
from qmoe_lite.list_buffer import Assignment, ListBuffer
from qmoe_lite.packed import PackedMatrix
from qmoe_lite.report import FILE_NAME, ProjectionReport, Report, stored_bytes
from qmoe_lite.solver import gptq

RECIPES = ("default", "nearest")
SAMPLES_PER_EXPERT = 80  # the paper's ratio: 10K samples for 128 experts, 160K for 2048
_DENSE_SHARD = 2 << 30  # bytes of dense tensors in one file
_LAYER_SAMPLE = 4096  # tokens that stand for the whole layer where an expert saw too few of its own


@dataclass(frozen=True)
class Settings:
    """How to compress; each default is the one that `qmoe compress --help` shows.

    Attributes
    ----------
    recipe : str
        "default", or "nearest": round each weight to its nearest level, with no calibration.
    samples : int or None
        Calibration samples; None takes 80 for each expert, the paper's ratio.
    sequence_length : int
        Tokens of a sample.
    codeword_bits : int
        8 to 12.
    dampening : float
        Added to the Hessian's diagonal, as a fraction of its mean ("percdamp" in GPTQ). QMoE, section 3.2: 0.1.
    block_size : int
        Columns that GPTQ rounds between two updates of the rest.
    group_size : int
        Experts quantised together. QMoE, table 1: 16.
    group_bytes : int
        Memory for a group; fewer experts are taken together when 16 would need more.
    token_cap : float
        An expert's Hessian takes at most this many times the mean number of tokens, drawn at random. QMoE: 4.
    blend_tokens : int
        An expert with n tokens, fewer than its matrix has columns, gets n/(n+n0) of its own Hessian and n0/(n+n0)
        of one from random tokens of the layer; this is n0, and 0 switches it off.
    validation_samples : int
        Samples that ride along for `Report.held_out_error` and enter no Hessian.
    batch_size : int
        Samples that go through a block at a time.
    activations : str
        "float32", or "bfloat16" at half the memory.
    seed : int
    """

    recipe: str = "default"
    samples: int | None = None
    sequence_length: int = 512
    codeword_bits: int = 10
    dampening: float = 0.1
    block_size: int = 128
    group_size: int = 16
    group_bytes: int = 4 << 30
    token_cap: float = 4.0
    blend_tokens: int = 64
    validation_samples: int = 8
    batch_size: int = 16
    activations: str = "float32"
    seed: int = 0

    def check(self) -> None:
        """Raise SettingError for a value outside its range."""
        ranges: tuple[tuple[str, bool, str], ...] = (
            ("recipe", self.recipe in RECIPES, "one of " + ", ".join(RECIPES)),
            ("samples", self.samples is None or self.samples >= 1, "at least 1"),
            ("sequence_length", self.sequence_length >= 16, "at least 16"),
            ("codeword_bits", 8 <= self.codeword_bits <= 12, "8 to 12"),
            ("dampening", 0 < self.dampening <= 1, "above 0, at most 1"),
            ("block_size", self.block_size >= 1, "at least 1"),
            ("group_size", self.group_size >= 1, "at least 1"),
            ("token_cap", self.token_cap > 0, "above 0"),
            ("blend_tokens", self.blend_tokens >= 0, "at least 0"),
            ("validation_samples", self.validation_samples >= 0, "at least 0"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("activations", self.activations in ("float32", "bfloat16"), "float32 or bfloat16"),
        )
        for name, good, expected in ranges:
            if not good:
                raise SettingError(f"{name} is {getattr(self, name)}; expected {expected}.")


@dataclass(frozen=True)
class Progress:
    """Where a compression is: `done` of `total` expert groups, and the place in words."""

    done: int
    total: int
    place: str


class _Catcher(nn.Module):
    """Stands for an experts module while the dense part runs: keeps what it is given, contributes nothing."""

    def __init__(self, family: Family) -> None:
        super().__init__()
        self._family = family
        self.caught: tuple[Tensor, Tensor, Tensor] | None = None

    def forward(self, hidden_states: Tensor, *routing: Tensor) -> Tensor:
        index, weights = self._family.routing(routing)
        self.caught = (hidden_states, index.to(torch.int32), weights.float())
        return torch.zeros_like(hidden_states)


@dataclass
class _Layer:
    """What the experts of one sparse layer get to see."""

    layer: MoELayer
    inputs: ListBuffer
    assigned: Assignment
    eligible: Tensor  # bool, a value for each row: may enter a Hessian
    validation: Tensor  # bool: rides along
    sample: Tensor  # float32 (tokens, C): random eligible tokens, for experts that saw few


@dataclass
class _Done:
    """What is known of the finished layers; saved with the state, so that a resumed run reports them too."""

    projections: list[ProjectionReport] = field(default_factory=list)
    held_out_error: dict[str, float] = field(default_factory=dict)
    codebooks: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    checksums: dict[str, int] = field(default_factory=dict)


def compress(
    model: str | Path,
    out: str | Path,
    *,
    calibration: str | Path | None = None,
    grid: Grid | None = None,
    resume: bool = True,
    progress: Callable[[Progress], None] | None = None,
    **settings: Any,
) -> Report:
    """Compress the experts of a Mixture-of-Experts model.

    Parameters
    ----------
    model : path or str
        Hugging Face directory, or a name on the hub.
    out : path or str
        Directory to make; it appears when everything is done. Until then the work is in `OUT.partial`.
    calibration : path or str, optional
        Text file, .jsonl file, directory of them, or data set name; needed unless `recipe="nearest"`.
    grid : grid, optional
        Levels that a row may take; by default `MinMaxTernary(level_dtype=torch.bfloat16)`.
    resume : bool
        Go on with what `OUT.partial` holds; False throws it away.
    progress : callable, optional
        Called with a `Progress` after each group of experts.
    **settings
        Fields of `Settings`.

    Returns
    -------
    Report
        Also written to `OUT/qmoe_report.json`.

    Raises
    ------
    OutputError
        `out` exists, or cannot be written; finished layers are kept for the next run.
    ResumeError
        `OUT.partial` belongs to another model, text or setting.
    CheckpointError, UnsupportedFamilyError, TextError, SettingError, NotFiniteError
        What is wrong with the input, before or where it is met.

    Notes
    -----
    QMoE (arXiv:2310.16795), section 3. Departs from it: tokens over the cap are left out at random instead of the last
    ones; the last projection's Hessian comes from the quantised first one; levels are rounded to 16 bits before the
    solver; experts with few tokens borrow from the layer's.
    """
    try:
        options = Settings(**settings)
    except TypeError as error:
        raise SettingError(f"{str(error).split('__init__() ')[-1]}; see help(qmoe_lite.compression.Settings).") from error
    options.check()
    target = Path(out)
    if target.exists() or target.is_symlink():
        raise OutputError(f"{target} exists already. Name another directory, or remove it.")
    if (options.recipe == "nearest") != (calibration is None):
        text = "needs no calibration text" if calibration else "needs calibration text: name a file of it"
        raise SettingError(f"recipe {options.recipe} {text}.")
    run = _Run(files.find_model(model), target, grid or MinMaxTernary(level_dtype=torch.bfloat16), options, progress)
    with torch.inference_mode():
        return run.run(calibration, resume)


class _Run:
    """One compression, from an opened checkpoint to a written directory."""

    def __init__(
        self, model: Path, out: Path, grid: Grid, settings: Settings, progress: Callable[[Progress], None] | None
    ) -> None:
        self.started = time.perf_counter()
        self.out, self.partial = out, out.with_name(out.name + ".partial")
        self.settings, self.grid = settings, grid
        self.checkpoint = Checkpoint(model)
        self.family = family_of(self.checkpoint.config.get("model_type"))
        if "quantization_config" in self.checkpoint.config:
            raise SettingError(f"{model} is quantised already. Compress the original model.")
        self.config = read_config(str(model))
        self.layers = check_promise(self.family, self.config, self.checkpoint)
        self.by_block = {layer.block: layer for layer in self.layers}
        self.dense_names = [name for name in self.checkpoint.names if EXPERTS not in name]
        self.done, self.degraded = _Done(), list[str]()
        self._report_progress = progress or (lambda event: None)
        self._groups_done = 0
        self._groups = sum(len(list(self._expert_groups(layer))) for layer in self.layers)

    # -- the whole

    def run(self, calibration: str | Path | None, resume: bool) -> Report:
        samples, tokenizer = None, None
        if calibration is not None:
            tokenizer = self._tokenizer()
            samples = self._samples(calibration, tokenizer)
        fingerprint = self._fingerprint(samples)
        state = self._open_partial(fingerprint, resume)
        if samples is None:
            for layer in self.layers[len(self.done.held_out_error) :]:
                self._finish_layer(layer, None)
                self.done.held_out_error[layer.experts] = float("nan")
                self._save_state({"fingerprint": fingerprint})
        else:
            self._calibrated(samples, tokenizer, fingerprint, state)
        return self._write_rest()

    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.checkpoint.directory)
        except Exception as error:  # tokenizers, sentencepiece and json each raise their own
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")
            raise files.CheckpointError(f"{self.checkpoint.directory} has no usable tokenizer: {reason}.") from error

    def _samples(self, calibration: str | Path, tokenizer: Any) -> tuple[Samples, int]:
        """Give all samples, the validation ones last, and how many of them are for calibration."""
        options = self.settings
        wanted = options.samples or SAMPLES_PER_EXPERT * max(layer.count for layer in self.layers)
        seq2seq, length = self.family.seq2seq, options.sequence_length
        window = window_length(length) if seq2seq else length
        tokens = read_tokens(read_text(calibration), tokenizer, (wanted + options.validation_samples) * window)
        # validation text is the end of the text, at most an eighth of it, so that no Hessian sees a word of it
        kept = min(options.validation_samples, len(tokens) // window // 8)
        cut = len(tokens) - kept * window
        make = {"seq2seq": seq2seq, "sequence_length": length, "seed": options.seed}
        main = make_samples(tokens[:cut], tokenizer, count=wanted, **make)
        if len(main) < wanted:
            self.degraded.append(f"the text gave {len(main)} calibration samples instead of {wanted}")
        elif main.windows < wanted:
            self.degraded.append(f"the text holds {main.windows} windows; their {wanted} samples differ in masked spans only")
        if kept == 0:
            return main, len(main)
        extra = make_samples(tokens[cut:], tokenizer, count=None, **make)
        labels = None if main.labels is None else np.concatenate([main.labels, extra.labels])
        both = Samples(np.concatenate([main.input_ids, extra.input_ids]), labels, main.windows)
        return both, len(main)

    def _fingerprint(self, samples: tuple[Samples, int] | None) -> str:
        digest = hashlib.sha256(self.checkpoint.fingerprint().encode())
        digest.update(json.dumps([FORMAT, asdict(self.settings), self.grid.to_config()], sort_keys=True).encode())
        if samples is not None:
            digest.update(samples[0].input_ids.tobytes())
            digest.update(b"" if samples[0].labels is None else samples[0].labels.tobytes())
        return digest.hexdigest()

    # -- unfinished work

    def _open_partial(self, fingerprint: str, resume: bool) -> dict[str, Any]:
        """Make OUT.partial, or take up what it holds."""
        state_file = self.partial / "state.json"
        if self.partial.exists():
            if resume and state_file.is_file():
                try:
                    state: dict[str, Any] = json.loads(state_file.read_text(encoding="utf-8"))
                    done = state.pop("done")
                    rows = [ProjectionReport(**row) for row in done["projections"]]
                    self.done = _Done(rows, done["held_out_error"], done["codebooks"], done["checksums"])
                except (ValueError, KeyError, TypeError) as error:
                    raise ResumeError(f"{state_file} is damaged. Begin anew with --restart.") from error
                if state.get("fingerprint") != fingerprint:
                    raise ResumeError(
                        f"{self.partial} holds unfinished work of another model, text or setting. Use the same ones, "
                        f"or begin anew with --restart."
                    )
                finished = set(self.done.held_out_error)
                self._groups_done = sum(len(list(self._expert_groups(y))) for y in self.layers if y.experts in finished)
                return state
            shutil.rmtree(self.partial)
        try:
            self.partial.mkdir(parents=True)
        except OSError as error:
            raise OutputError(f"{self.partial} cannot be made: {error.strerror}. Name another directory.") from error
        return {}

    def _save_state(self, state: dict[str, Any]) -> None:
        files.write_json(self.partial / "state.json", {**state, "done": asdict(self.done)})

    # -- with calibration

    def _calibrated(
        self, samples: tuple[Samples, int], tokenizer: Any, fingerprint: str, state: dict[str, Any]
    ) -> None:
        options, (all_samples, for_hessians) = self.settings, samples
        model = skeleton(self.family, self.config, Placeholder, torch.float32)
        self.family.load_outside_blocks(model, self.checkpoint, torch.float32)
        masks = hessian_masks(all_samples, tokenizer)
        ids = [all_samples.input_ids]
        if all_samples.labels is not None:
            start = self.config.decoder_start_token_id
            start = self.config.pad_token_id if start is None else start
            ids.append(np.concatenate([np.full_like(all_samples.labels[:, :1], start), all_samples.labels[:, :-1]], 1))
        memory: ListBuffer | None = None
        with capacity_lifted(model):
            for number, (stack, tokens, mask) in enumerate(zip(self.family.stacks(self.config), ids, masks, strict=False)):
                hidden = self._buffer(tokens.shape)
                if number < state.get("stack", 0):
                    memory = hidden  # filled from the saved state below, when its stack's turn comes
                    continue
                if memory is not None and number == state.get("stack") and state.get("memory"):
                    memory.load(self.partial / state["memory"])
                first = state.get("block", -1) + 1 if number == state.get("stack", 0) else 0
                eligible = mask.copy()
                eligible[for_hessians:] = False
                rides = np.zeros_like(mask)
                rides[for_hessians:] = True
                calls = self._enter(model, stack, tokens, memory, hidden, first)
                if first:
                    hidden.load(self.partial / state["hidden"])
                for i, block in enumerate(stack.blocks):
                    if i < first:
                        continue
                    caught = self._run_block(model, block, hidden, memory, calls)
                    if caught is None:
                        continue
                    inputs, assigned = caught
                    rows = torch.from_numpy(eligible.reshape(-1))
                    sample = inputs.gather(self._draw(torch.nonzero(rows)[:, 0], _LAYER_SAMPLE, number, i))
                    seen = _Layer(self.by_block[block], inputs, assigned, rows, torch.from_numpy(rides.reshape(-1)), sample)
                    self._finish_layer(seen.layer, seen, hidden)
                    state = self._keep(number, i, hidden, memory, fingerprint, state)
                for part in self._batches(len(hidden)):
                    hidden.write(part, self.family.leave(model, stack, hidden.read(part)))
                memory = hidden

    def _buffer(self, shape: tuple[int, ...]) -> ListBuffer:
        dtype = torch.float32 if self.settings.activations == "float32" else torch.bfloat16
        return ListBuffer(shape[0], shape[1], self.config.hidden_size, dtype)

    def _batches(self, samples: int) -> Iterator[slice]:
        for start in range(0, samples, self.settings.batch_size):
            yield slice(start, min(start + self.settings.batch_size, samples))

    def _enter(
        self, model: Any, stack: Stack, tokens: np.ndarray, memory: ListBuffer | None, hidden: ListBuffer, first: int
    ) -> dict[int, Any]:
        """Fill `hidden` with the embeddings; give the call of block `first` for each size of batch."""
        calls: dict[int, Any] = {}
        for part in self._batches(len(hidden)):
            size = part.stop - part.start
            if first and size in calls:
                continue
            recalled = None if memory is None else memory.read(part)
            (embedded, *rest), kwargs = self.family.enter(model, stack, torch.from_numpy(tokens[part]), recalled)
            hidden.write(part, embedded)
            calls[size] = ((None, *rest), kwargs)
        if first:  # a resumed run needs what the first block hands on to the others, such as its position bias
            block = model.get_submodule(stack.blocks[0])
            files.materialise(block, stack.blocks[0], self.checkpoint, torch.float32)
            if stack.blocks[0] in self.by_block:
                self._catch(model, stack.blocks[0])
            for size, call in calls.items():
                recalled = None if memory is None else memory.read(slice(0, size))
                _, calls[size] = self.family.through(block, hidden.read(slice(0, size)), recalled, call)
            block.to("meta")
        return calls

    def _catch(self, model: Any, block: str) -> _Catcher:
        parent, _, child = self.by_block[block].experts.rpartition(".")
        catcher = _Catcher(self.family)
        setattr(model.get_submodule(parent), child, catcher)
        return catcher

    def _run_block(
        self, model: Any, block: str, hidden: ListBuffer, memory: ListBuffer | None, calls: dict[int, Any]
    ) -> tuple[ListBuffer, Assignment] | None:
        """Send all samples through a block's dense part; give its experts' inputs and their tokens."""
        module = model.get_submodule(block)
        files.materialise(module, block, self.checkpoint, torch.float32)
        catcher = self._catch(model, block) if block in self.by_block else None
        inputs = self._buffer(hidden._samples.shape) if catcher else None
        routing: list[tuple[Tensor, Tensor]] = []
        following: dict[int, Any] = {}
        for part in self._batches(len(hidden)):
            size = part.stop - part.start
            recalled = None if memory is None else memory.read(part)
            out, following[size] = self.family.through(module, hidden.read(part), recalled, calls[size])
            hidden.write(part, out)
            if catcher is not None and inputs is not None:
                assert catcher.caught is not None
                given, index, weights = catcher.caught
                inputs.write(part, given.view(size, -1, given.shape[-1]))
                routing.append((index, weights))
        calls.update(following)
        module.to("meta")
        if inputs is None:
            return None
        index, weights = (torch.cat(parts) for parts in zip(*routing, strict=True))
        return inputs, Assignment.of(index, weights, self.by_block[block].count)

    def _keep(
        self, stack: int, block: int, hidden: ListBuffer, memory: ListBuffer | None, fingerprint: str, old: dict[str, Any]
    ) -> dict[str, Any]:
        """Make what is finished durable: a killed run goes on from here."""
        state: dict[str, Any] = {"fingerprint": fingerprint, "stack": stack, "block": block}
        state["hidden"] = f"hidden-{stack}-{block}.zst"
        files.write_atomically(self.partial / state["hidden"], hidden.save)
        if memory is not None:
            state["memory"] = f"memory-{stack}.zst"
            if not (self.partial / state["memory"]).exists():
                files.write_atomically(self.partial / state["memory"], memory.save)
        self._save_state(state)
        if (stale := old.get("hidden")) and stale != state["hidden"]:
            (self.partial / stale).unlink(missing_ok=True)
        return state

    # -- one layer

    def _expert_groups(self, layer: MoELayer) -> Iterator[range]:
        """Split a layer's experts into groups that fit the memory."""
        need = max(12 * columns * columns + 16 * rows * columns for rows, columns in layer.shapes.values())
        size = max(1, min(self.settings.group_size, self.settings.group_bytes // need))
        for start in range(0, layer.count, size):
            yield range(start, min(start + size, layer.count))

    def _weights(self, layer: MoELayer, group: range, projection: str) -> Tensor:
        """Read one projection of a group of experts, float32 (E, R, C)."""
        out = torch.empty(len(group), *layer.shapes[projection])
        for i, expert in enumerate(group):
            name = self.family.weight_name(layer, expert, projection)
            out[i] = self.checkpoint.tensor(name)
            if not torch.isfinite(out[i]).all():
                raise NotFiniteError(f"{name} in {self.checkpoint.directory} holds NaN or infinity. Fetch it again.")
        return out

    def _draw(self, rows: Tensor, most: int, *place: int) -> Tensor:
        """Draw at most `most` rows at random, in ascending order; the seed and the place decide which."""
        if len(rows) <= most:
            return rows
        rng = np.random.default_rng([self.settings.seed, *place])
        return rows[torch.from_numpy(np.sort(rng.choice(len(rows), most, replace=False)))]

    def _finish_layer(self, layer: MoELayer, seen: _Layer | None, hidden: ListBuffer | None = None) -> None:
        """Quantise, encode and write all experts of a layer; add their outputs to `hidden`."""
        number = self.layers.index(layer)
        kept: dict[str, list[tuple[np.ndarray, Quantized]]] = {name: [] for name in layer.projections}
        tallies = {name: _Tally(layer, name, self.grid.alphabet) for name in layer.projections}
        wrong = right = 0.0
        groups = list(self._expert_groups(layer))
        for i, group in enumerate(groups):
            results = self._quantise_group(layer, group, seen, number)
            for name, (quantized, tokens, classes) in results.items():
                kept[name].append((squeeze(quantized.digits.numpy(), self.grid.alphabet), quantized.levels))
                tallies[name].add(quantized, tokens, classes)
            if seen is not None and hidden is not None:
                more_wrong, more_right = self._run_group(layer, group, results, seen, hidden)
                wrong, right = wrong + more_wrong, right + more_right
            self._groups_done += 1
            place = f"{layer.block}, expert group {i + 1} of {len(groups)}"
            self._report_progress(Progress(self._groups_done, self._groups, place))
        tensors: dict[str, Tensor] = {}
        books: dict[str, dict[str, Any]] = {}
        for name in layer.projections:
            packed, book = self._encode(layer, name, kept.pop(name), groups, tallies[name].counts)
            stored = pack_experts(packed)
            tensors |= {f"{layer.experts}.{name}_{part}": tensor for part, tensor in stored.items()}
            books[name] = book.to_config()
            tallies[name].stored(stored, packed)
        self.done.checksums |= files.write_tensors(self.partial / self._layer_file(number), tensors)
        self.done.projections += [tally.report() for tally in tallies.values()]
        self.done.codebooks[layer.experts] = books
        if seen is not None:
            self.done.held_out_error[layer.experts] = wrong / right if right else float("nan")

    def _quantise_group(
        self, layer: MoELayer, group: range, seen: _Layer | None, number: int
    ) -> dict[str, tuple[Quantized, list[int], list[str]]]:
        options = self.settings
        solver = {"dampening": options.dampening, "block_size": options.block_size}
        first, last = layer.projections
        if seen is None:
            none = [0] * len(group)
            return {
                name: (gptq(self._weights(layer, group, name), None, self.grid, **solver), none, ["nearest"] * len(group))
                for name in layer.projections
            }
        cap = int(options.token_cap * seen.eligible.sum().item() / layer.count) + 1
        inputs = []
        for expert in group:
            rows, _ = seen.assigned.of_expert(expert)
            inputs.append(seen.inputs.gather(self._draw(rows[seen.eligible[rows]], cap, number, expert)))
        out: dict[str, tuple[Quantized, list[int], list[str]]] = {}
        activation = self.family.activation(self.config)
        samples = [seen.sample] * len(group)
        for name in layer.projections:
            hessians, starved = [], []
            for own, sample in zip(inputs, samples, strict=True):
                hessian = _mean_hessian(own)
                starved.append(options.blend_tokens > 0 and len(own) < own.shape[1])
                if starved[-1]:
                    hessian = blend(hessian, _mean_hessian(sample), len(own), options.blend_tokens)
                hessians.append(hessian)
            quantized = gptq(self._weights(layer, group, name), torch.stack(hessians), self.grid, **solver)
            pairs = zip(quantized.hessian_class, starved, strict=True)
            classes = ["blended" if known == "own" and few else known for known, few in pairs]
            out[name] = (quantized, [len(own) for own in inputs], classes)
            if name == first:
                inputs = [activation(x @ quantized.weight[i].T) for i, x in enumerate(inputs)]
                samples = [activation(x @ quantized.weight[i].T) for i, x in enumerate(samples)]
        return out

    def _run_group(
        self, layer: MoELayer, group: range, results: dict[str, Any], seen: _Layer, hidden: ListBuffer
    ) -> tuple[float, float]:
        """Add the quantised experts' outputs to `hidden`; give squared error and square on validation tokens."""
        first, last = layer.projections
        activation = self.family.activation(self.config)
        dense = {name: self._weights(layer, group, name) for name in layer.projections}
        wrong = right = 0.0
        for i, expert in enumerate(group):
            rows, gates = seen.assigned.of_expert(expert)
            for start in range(0, len(rows), 1 << 14):
                part = slice(start, start + (1 << 14))
                x = seen.inputs.gather(rows[part])
                y = activation(x @ results[first][0].weight[i].T) @ results[last][0].weight[i].T * gates[part, None]
                hidden.add(rows[part], y)
                rides = seen.validation[rows[part]]
                if rides.any():
                    truth = activation(x[rides] @ dense[first][i].T) @ dense[last][i].T * gates[part][rides][:, None]
                    wrong += (y[rides] - truth).double().square().sum().item()
                    right += truth.double().square().sum().item()
        return wrong, right

    def _encode(
        self, layer: MoELayer, name: str, kept: list[tuple[np.ndarray, Any]], groups: list[range], counts: np.ndarray
    ) -> tuple[list[PackedMatrix], Codebook]:
        """Fit a projection's codebook to its exact digit counts; encode each expert."""
        book = Codebook.fit(counts.tolist(), bits=self.settings.codeword_bits)
        packed = []
        for (small, levels), group in zip(kept, groups, strict=True):
            digits = unsqueeze(small, (len(group), *layer.shapes[name]), self.grid.alphabet)
            stored = levels.to(self.grid.level_dtype or torch.float32)
            packed += [encode(digits[i], stored[i], book) for i in range(len(group))]
        return packed, book

    # -- the rest of the directory

    def _dense_shards(self) -> list[list[str]]:
        shards: list[list[str]] = [[]]
        size = 0
        for name in self.dense_names:
            tensor = self.checkpoint.tensor(name)
            if size and size + tensor.nbytes > _DENSE_SHARD:
                shards.append([])
                size = 0
            shards[-1].append(name)
            size += tensor.nbytes
        return shards

    def _layer_file(self, number: int) -> str:
        return f"model-{number + 1:05d}-of-{self._shards:05d}.safetensors"

    @property
    def _shards(self) -> int:
        return len(self.layers) + len(self._dense_shards())

    def _write_rest(self) -> Report:
        """Write dense tensors, index, configuration and report; give the directory its name."""
        matrices = sum(p.experts for p in self.done.projections)
        promised = sum(layer.matrices for layer in self.layers)
        if matrices != promised:
            raise OutputError(f"{matrices} matrices were compressed, {promised} promised; please report this as a bug.")
        weight_map: dict[str, str] = {}
        checksums = dict(self.done.checksums)
        for number in range(len(self.layers)):
            file_name = self._layer_file(number)
            weight_map |= dict.fromkeys(files.names_in(self.partial / file_name), file_name)
        for number, shard in enumerate(self._dense_shards(), len(self.layers)):
            file_name = self._layer_file(number)
            # copies: a checkpoint's tied tensors may be views of one storage, which safetensors refuses
            tensors = {name: self.checkpoint.tensor(name).clone() for name in shard}
            checksums |= files.write_tensors(self.partial / file_name, tensors)
            weight_map |= dict.fromkeys(shard, file_name)
        self._write_config()
        files.copy_companions(self.checkpoint.directory, self.partial)
        total = sum((self.partial / f).stat().st_size for f in set(weight_map.values()))
        index = {"metadata": {"total_size": total, "crc32": checksums}, "weight_map": weight_map}
        files.write_json(self.partial / "model.safetensors.index.json", index)
        report = self._report()
        files.write_json(self.partial / FILE_NAME, report.to_json())
        for left in [*self.partial.glob("*.zst"), self.partial / "state.json"]:
            left.unlink(missing_ok=True)
        try:
            self.partial.rename(self.out)
            files.sync_directory(self.out.parent.resolve())
        except OSError as error:
            raise OutputError(f"{self.partial} is finished but cannot become {self.out}: {error.strerror}.") from error
        return report

    def _write_config(self) -> None:
        books: list[dict[str, Any]] = []
        used: dict[str, dict[str, int]] = {}
        for layer, by_projection in self.done.codebooks.items():
            used[layer] = {}
            for name, book in by_projection.items():
                if book not in books:
                    books.append(book)
                used[layer][name] = books.index(book)
        config = dict(self.checkpoint.config)
        config["quantization_config"] = {
            "quant_method": "qmoe",
            "format": FORMAT,
            "recipe": self.settings.recipe,
            "grid": self.grid.to_config(),
            "level_dtype": str(self.grid.level_dtype or torch.float32).removeprefix("torch."),
            "codebooks": books,
            "layers": used,
            "versions": _versions(),
        }
        files.write_json(self.partial / "config.json", config)

    def _report(self) -> Report:
        nearest = sum(p.hessian_classes.get("nearest", 0) for p in self.done.projections)
        if nearest and self.settings.recipe != "nearest":
            self.degraded.append(f"{nearest} matrices had no usable Hessian and were rounded to nearest")
        experts, others = stored_bytes(self.partial)
        dense_experts, dense_others = stored_bytes(self.checkpoint.directory)
        return Report(
            model=str(self.checkpoint.directory),
            settings={**asdict(self.settings), "grid": self.grid.to_config()},
            projections=self.done.projections,
            held_out_error={k: v for k, v in self.done.held_out_error.items() if v == v},
            degraded=self.degraded,
            sizes={
                "expert_bytes": experts,
                "other_bytes": others,
                "dense_expert_bytes": dense_experts,
                "dense_other_bytes": dense_others,
            },
            seconds=round(time.perf_counter() - self.started, 3),
            versions=_versions(),
        )


class _Tally:
    """Adds up one projection's figures over its groups of experts."""

    def __init__(self, layer: MoELayer, projection: str, alphabet: int) -> None:
        self.layer, self.projection, self.alphabet = layer, projection, alphabet
        self.counts = np.zeros(alphabet, dtype=np.int64)
        self.errors: list[float] = []
        self.tokens: list[int] = []
        self.classes: dict[str, int] = {}
        self.bytes = self.code_bits = 0

    def add(self, quantized: Quantized, tokens: list[int], classes: list[str]) -> None:
        self.counts += count(quantized.digits.numpy(), self.alphabet)
        self.errors += quantized.error.tolist()
        self.tokens += tokens
        for name in classes:
            self.classes[name] = self.classes.get(name, 0) + 1

    def stored(self, tensors: dict[str, Tensor], packed: list[PackedMatrix]) -> None:
        self.bytes = sum(tensor.nbytes for tensor in tensors.values())
        self.code_bits = sum(int(p.row_codewords.to(torch.int64).sum()) * p.codebook.bits for p in packed)

    def report(self) -> ProjectionReport:
        rows, columns = self.layer.shapes[self.projection]
        weights = self.layer.count * rows * columns
        zero = 1 if self.alphabet == 3 else 0
        return ProjectionReport(
            layer=self.layer.experts,
            projection=self.projection,
            experts=self.layer.count,
            rows=rows,
            columns=columns,
            bits_per_weight=8 * self.bytes / weights,
            code_bits_per_weight=self.code_bits / weights,
            zeros=int(self.counts[zero]) / weights,
            error=float(np.mean(self.errors)),
            hessian_classes=self.classes,
            tokens=self.tokens,
        )


def _mean_hessian(inputs: Tensor) -> Tensor:
    """Mean over tokens of x x^T; zeros without tokens."""
    hessian = new(inputs.shape[1])
    accumulate(hessian, inputs)
    return mean(hessian, len(inputs))


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    from qmoe_lite import __version__

    others = {name: version(name) for name in ("torch", "transformers", "numba", "numpy")}
    return {"qmoe-lite": __version__, **others}
