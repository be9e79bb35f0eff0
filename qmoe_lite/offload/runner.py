"""Run a model whose experts do not fit: they wait on disk or in memory, and those in use take turns in a cache.

    disk  ->  memory (`ram_cache`)  ->  GPU (`expert_cache`), where there is one

Nothing in the model's own code changes. Before an experts module runs, a forward pre-hook sees which experts its tokens
go through: it begins to read the missing ones and, by the next layer's router, those that are likely next. The module
then gets its experts from the `Runner`: those that are there are multiplied while others arrive. What is computed does
not depend on the budget, bit for bit, on the CPU.
"""

from __future__ import annotations

import json
import operator
import os
import re
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor, nn

from qmoe_lite.checkpoint.atomic import write_json
from qmoe_lite.checkpoint.format import quantization_of
from qmoe_lite.checkpoint.reader import Checkpoint
from qmoe_lite.checkpoint.weight_file import WeightFile
from qmoe_lite.coding.packed import PackedMatrix
from qmoe_lite.coding.tokens import count_tokens
from qmoe_lite.errors import CheckpointError, OutputError, QMoEError, SettingError
from qmoe_lite.models.experts import PackedExperts
from qmoe_lite.models.skeletons import open_checkpoint
from qmoe_lite.offload.cache import HALF_LIFE
from qmoe_lite.offload.gpu_device import CudaDevice, Device
from qmoe_lite.offload.gpu_tier import GpuTier, share_layers
from qmoe_lite.offload.ram_tier import Layer, RamTier, slot_layout
from qmoe_lite.offload.readers import Readers

COUNTS_FILE = "expert_counts.json"
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
_LEAST_TRUST = 0.5  # a wrong guess delays as many bytes as a right one brings early
_TRUST_GUESSES = 16.0  # layers over which that share is taken
_DOUBTED = 8  # passes, one of which is guessed for while guesses are wrong: to see whether they get better
_MOST_GUESSED_FROM = 64  # tokens; a longer prompt asks for nearly all experts of a layer anyway


def parse_size(size: int | str, name: str = "size") -> int:
    """Turn 4294967296, "4GiB" or "4.3 GB" into bytes.

    Raises
    ------
    SettingError
        It is no size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?B?)\s*", str(size).upper())
    if not found or found[2] not in _UNITS or isinstance(size, bool):
        raise SettingError(f"{name} is {size!r}; expected bytes or a size such as 4GiB or 500MB.")
    return int(float(found[1]) * _UNITS[found[2]])


def show_size(size: float) -> str:
    """Write bytes for people, in units of 10^6 or 10^9."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


@dataclass
class Statistics:
    """What a `Runner` has done since it was made.

    Attributes
    ----------
    passes, tokens : int
        Passes of the model, and positions that went through them.
    seconds : float
        Time in which a forward pass of the model was under way.
    hits, misses : int
        Experts that a layer asked for, each once a pass, and that were, or were not, where they are multiplied.
    ram_hits, ram_misses : int
        On a GPU: of its misses, those that were in memory, and those that had to come from disk.
    late : int
        Of the misses, those whose reading a guess had begun already.
    disk_bytes, copied_bytes : int
        Codes read from disk to memory; codes, places of rows and levels copied from memory to GPUs.
    stall_seconds : float
        Time in which nothing could be multiplied because no expert had arrived in memory.
    copy_stall_seconds : float or None
        Time in which GPUs computed nothing because an expert had not arrived there; None where that is not known.
    predicted, predicted_right : int
        Experts that the next layer's router named beforehand, and those of them that the layer then asked for.
    prefetched, prefetch_hits : int
        Experts that were read because they were predicted, and those of them that were asked for.
    copied_ahead, copied_ahead_hits : int
        Experts that were copied to a GPU because they were predicted, and those of them that were asked for.
    cache_bytes, ram_bytes, index_bytes : int
        Memory set aside for experts where they are multiplied; on a GPU, in memory besides; for row lengths and levels.
    direct : bool
        Reads pass the page cache by; else what was read is dropped from it.
    notes : list of str
        What had to be done otherwise than asked for.
    """

    passes: int = 0
    tokens: int = 0
    seconds: float = 0.0
    hits: int = 0
    misses: int = 0
    ram_hits: int = 0
    ram_misses: int = 0
    late: int = 0
    disk_bytes: int = 0
    copied_bytes: int = 0
    stall_seconds: float = 0.0
    copy_stall_seconds: float | None = None
    predicted: int = 0
    predicted_right: int = 0
    prefetched: int = 0
    prefetch_hits: int = 0
    copied_ahead: int = 0
    copied_ahead_hits: int = 0
    cache_bytes: int = 0
    ram_bytes: int = 0
    index_bytes: int = 0
    direct: bool = True
    notes: list[str] = field(default_factory=list)

    @property
    def hit_rate(self) -> float:
        """Share of the experts asked for that were there."""
        return self.hits / max(self.hits + self.misses, 1)

    @property
    def tokens_per_second(self) -> float:
        """Positions, those of prompts among them, over time inside the model."""
        return self.tokens / max(self.seconds, 1e-9)

    def to_json(self) -> dict[str, Any]:
        """Give everything as JSON values."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return values | {"hit_rate": self.hit_rate, "tokens_per_second": self.tokens_per_second}

    def lines(self) -> list[str]:
        """Say it in a few lines."""
        way = "past the page cache" if self.direct else "through the page cache, dropped from it after"
        found = [
            f"{self.tokens} tokens, {self.passes} passes, {self.seconds:.2f} s: {self.tokens_per_second:.1f} tokens/s",
            f"experts: {self.hits} hits, {self.misses} misses ({self.hit_rate:.1%} hits); cache "
            f"{show_size(self.cache_bytes)}, row lengths and levels {show_size(self.index_bytes)}",
        ]
        if self.ram_bytes:
            found.append(
                f"memory: {self.ram_hits} of the misses were in its {show_size(self.ram_bytes)}, "
                f"{self.ram_misses} were not; {show_size(self.copied_bytes)} copied to the GPU"
            )
            if self.copy_stall_seconds is not None:
                found[-1] += f", which waited {self.copy_stall_seconds:.2f} s for copies"
        found.append(f"disk: {show_size(self.disk_bytes)} read {way}; waited {self.stall_seconds:.2f} s for experts")
        if self.predicted:
            found.append(
                f"next layer guessed: {self.predicted_right / self.predicted:.1%} of {self.predicted} right; "
                f"{self.prefetched} read ahead, {self.prefetch_hits} of them used"
            )
            if self.ram_bytes:
                found[-1] += f"; {self.copied_ahead} copied ahead, {self.copied_ahead_hits} used"
        return found + [f"note: {note}" for note in self.notes]


class _Hook:
    """A forward hook that lives as long as its runner does; a copy of the model has none."""

    def __init__(self, runner: Runner | None, name: str) -> None:
        self._runner = None if runner is None else weakref.ref(runner)
        self._name = name

    @torch.compiler.disable  # torch.compile goes around it: a compiled cache would be no cache
    def __call__(self, module: nn.Module, *arguments: Any) -> None:
        runner = None if self._runner is None else self._runner()
        if runner is not None:
            getattr(runner, self._name)(module, *arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, (None, self._name)


class Runner:
    """Brings experts to where they are multiplied; made by `attach`.

    Attributes
    ----------
    statistics : Statistics
    """

    def __init__(
        self,
        model: nn.Module,
        checkpoint: Checkpoint,
        *,
        ram_cache: int | None,
        devices: Sequence[Device],
        budgets: Sequence[int | None],
        half_life: float,
        prefetch: bool,
        remember: bool,
    ) -> None:
        self.statistics = Statistics()
        self._lock = threading.RLock()
        self._prefetch = prefetch
        self._trace: TextIO | None = None
        self._files = {path: WeightFile(path) for path in (checkpoint.directory / name for name in checkpoint.files)}
        found = [module for module in model.modules() if isinstance(module, PackedExperts)]
        if not found:
            raise SettingError("the model has no compressed experts: there is nothing to offload.")
        family = found[0].family
        order = {layer.experts: number for number, layer in enumerate(family.layers(model.config))}
        found.sort(key=lambda module: order[module.layer.experts])
        self._layers: list[Layer] = []
        for module in found:
            first = sum(layer.experts.num_experts for layer in self._layers)
            self._layers.append(Layer(module, first, checkpoint, self._files))
        self._number_of = {layer.experts.layer.experts: number for number, layer in enumerate(self._layers)}
        stacks = [layer.experts.layer.experts.split(".")[0] for layer in self._layers]
        self._openings = {stacks.index(stack) for stack in stacks}  # the first layer of the encoder, of the decoder
        self._routers = [_router(model, layer.experts) for layer in self._layers]
        self._ram = RamTier(self._layers, self._slots(ram_cache), half_life)
        counts = _Counts.of(checkpoint, self._ram.cache.uses) if remember else None
        # also when the model is forgotten, the process ends, or what follows fails; so it must not hold the model
        self._end = weakref.finalize(self, _shut, self._ram.readers, self._files, counts)
        self._tiers: list[GpuTier] = []
        self._tier_of: list[GpuTier | None] = [None] * len(self._layers)
        if devices:
            self._share(devices, budgets, half_life)
        self._guess: tuple[int, list[int], list[int]] | None = None  # layer, predicted experts, those being read
        self._asked: tuple[Sequence[Tensor], list[int]] | None = None  # a layer's routing, and tokens of each expert
        self._passes = threading.local()  # `number` of the thread's own pass, while it is under way
        self._under_way = 0  # passes, of all threads
        self._started = 0.0  # when there came to be one
        self._trust = 1.0  # the share of guesses that were right lately
        if counts is not None and (uses := counts.load()) is not None:
            self._ram.cache.remember(uses)
            self._ram.warm_up()
        self._count()
        # last, so that what fails before leaves the model as it was
        self._hooks = [
            model.register_forward_pre_hook(_Hook(self, "_begin_pass")),
            model.register_forward_hook(_Hook(self, "_end_pass"), always_call=True),
        ]
        for module in found:
            self._hooks.append(module.register_forward_pre_hook(_Hook(self, "_before")))
            module.source = self

    def _slots(self, ram_cache: int | None) -> int:
        """Slots that a budget in bytes has room for; raise SettingError for less than one."""
        index = sum(layer.index_bytes for layer in self._layers)
        experts = sum(layer.experts.num_experts for layer in self._layers)
        _, size = slot_layout(self._layers)
        self.statistics.index_bytes = index
        if ram_cache is None:
            return experts
        slots = min((ram_cache - index) // size, experts)
        if slots < 1:
            raise SettingError(
                f"the cache is {ram_cache} bytes; row lengths and levels of all experts take {index}, and one expert "
                f"{size}. Give at least {index + size}."
            )
        return int(slots)

    def _share(self, devices: Sequence[Device], budgets: Sequence[int | None], half_life: float) -> None:
        """Give each GPU a run of layers, as long as its budget says."""
        shares = share_layers(self._layers, [1 if budget is None else budget for budget in budgets])
        for number, (device, budget) in enumerate(zip(devices, budgets, strict=True)):
            own = [layer for layer, share in zip(self._layers, shares, strict=True) if share == number]
            if not own:
                self.statistics.notes.append(f"{device.name} is left out: there are fewer layers than GPUs.")
                continue
            notes = self.statistics.notes
            self._tiers.append(GpuTier(device, own, len(self._ram.cache.uses), budget, half_life, notes))
            for layer in own:
                self._tier_of[self._layers.index(layer)] = self._tiers[-1]

    # what the hooks call

    def _begin_pass(self, model: nn.Module, arguments: Any) -> None:
        with self._lock:
            for cache in (self._ram.cache, *(tier.cache for tier in self._tiers)):
                cache.tick()
            self.statistics.passes += 1
            self._passes.number = self.statistics.passes
            if self._under_way == 0:
                self._started = time.perf_counter()
            self._under_way += 1

    def _end_pass(self, model: nn.Module, arguments: Any, result: Any) -> None:
        with self._lock:
            if self._number() is None:  # what failed before it began ends too
                return
            self._passes.number = None
            self._under_way -= 1
            if self._under_way == 0:
                self.statistics.seconds += time.perf_counter() - self._started
            self._count()

    def _number(self) -> int | None:
        """Number of the pass that this thread is in."""
        return getattr(self._passes, "number", None)

    def _before(self, module: PackedExperts, arguments: tuple[Tensor, ...]) -> None:
        """Begin to read what the layer asks for, then what the next one may."""
        hidden, *routing = arguments
        index, _ = module.family.routing(routing)
        with self._lock:
            if module.source is not self:
                return
            number = self._number_of[module.layer.experts]
            layer = self._layers[number]
            if number in self._openings:
                self.statistics.tokens += len(hidden)
            if self._trace is not None:
                self._write_trace(self._trace, number, index)
            tier, counts = self._tier_of[number], [count_tokens(index, module.num_experts)[:-1]]
            if tier is not None and (votes := self._votes(number + 1, hidden)) is not None:
                counts.append(votes.to(index.device))
            found = torch.cat(counts).tolist()  # on a GPU this waits for it: once a layer
            sizes, predicted = found[: module.num_experts], found[module.num_experts :]
            self._asked = tuple(routing), sizes
            wanted = [layer.first + expert for expert, size in enumerate(sizes) if size]
            self._ram.open(layer)
            self._ram.release()
            self._ram.collect()  # a guess that has arrived is a hit
            self._end_guess(number, wanted)
            missing = wanted if tier is None else [expert for expert in wanted if not tier.there(expert)]
            in_memory = sum(map(self._ram.ready, missing))
            for expert in wanted:
                for cache in (self._ram.cache,) if tier is None else (self._ram.cache, tier.cache):
                    cache.use(expert)
            hits = in_memory if tier is None else len(wanted) - len(missing)
            self.statistics.hits += hits
            self.statistics.misses += len(wanted) - hits
            if tier is not None:
                self.statistics.ram_hits += in_memory
                self.statistics.ram_misses += len(missing) - in_memory
            self._ram.want(missing)
            # on the CPU nothing waits, and what is missing is on its way before anything is guessed
            if tier is None and (votes := self._votes(number + 1, hidden)) is not None:
                predicted = votes.tolist()
            if predicted:
                self._predict(number + 1, predicted)

    def _end_guess(self, number: int, wanted: list[int]) -> None:
        """Count what a guess was worth; let go of what is not wanted."""
        if self._guess is not None:
            layer, predicted, begun = self._guess
            if layer == number:
                asked = set(wanted)
                self.statistics.predicted += len(predicted)
                right = len(asked.intersection(predicted))
                self.statistics.predicted_right += right
                self._trust += (right / max(len(predicted), 1) - self._trust) / _TRUST_GUESSES
                used = asked.intersection(begun)
                self.statistics.prefetch_hits += len(used)
                if (tier := self._tier_of[number]) is not None:
                    self.statistics.copied_ahead_hits += len(asked & tier.guessed)
                self.statistics.late += sum(not self._ram.ready(expert) for expert in used)
            self._guess = None
        self._ram.end_guess(wanted)
        for tier in self._tiers:
            tier.end_guess()

    def _votes(self, number: int, hidden: Tensor) -> Tensor | None:
        """Ask a layer's router about the input of the one before: how many tokens it would send to each expert."""
        # an encoder's last layer says nothing of the decoder's first
        if number >= len(self._layers) or number in self._openings or self._routers[number] is None:
            return None
        if not self._prefetch or len(hidden) > _MOST_GUESSED_FROM:
            return None
        if self._trust < _LEAST_TRUST and self.statistics.passes % _DOUBTED:
            return None
        layer = self._layers[number].experts.layer
        weight = self._routers[number].detach()  # type: ignore[union-attr]
        logits = hidden.detach().to(weight.device, weight.dtype) @ weight.T
        return count_tokens(logits.topk(layer.top_k).indices, layer.count)[:-1]

    def _predict(self, number: int, votes: list[int]) -> None:
        """Begin to read what the layer's router named."""
        layer = self._layers[number]
        order = np.argsort(-np.array(votes), kind="stable").tolist()
        predicted = [layer.first + expert for expert in order if votes[expert]]
        self._ram.open(layer)
        tier = self._tier_of[number]
        missing = predicted if tier is None else [expert for expert in predicted if not tier.there(expert)]
        begun = self._ram.guess(missing) if self._trust >= _LEAST_TRUST else []
        self.statistics.prefetched += len(begun)
        self._guess = number, predicted, begun

    def _copy_ahead(self) -> None:
        """Begin to copy what the next layer's router named, and is in memory, to where it would be multiplied."""
        if self._guess is None or self._trust < _LEAST_TRUST:
            return
        number, predicted, _ = self._guess
        if (tier := self._tier_of[number]) is not None:
            self._ram.collect()
            likely = [expert for expert in predicted if tier.there(expert) or self._ram.ready(expert)]
            self.statistics.copied_ahead += tier.guess(likely, self._layers[number])

    # what an experts module calls

    def packed(self, experts: PackedExperts, expert: int, projection: str) -> PackedMatrix:
        """Give an own copy of one expert's matrix, checked."""
        with self._lock:
            layer = self._layers[self._number_of[experts.layer.experts]]
            number = layer.first + expert
            self._ram.open(layer)
            found: list[PackedMatrix] = []

            def take(_: list[int]) -> None:
                view = layer.packed(expert, projection)
                found.append(replace(view, codes=view.codes.clone()))  # the slot will be another expert's

            self._in_waves(layer, [number], take)
            return found[0]

    def run(self, experts: PackedExperts, numbers: list[int], tokens: Tensor, bounds: list[int]) -> Tensor:
        """Send tokens[bounds[i] : bounds[i + 1]] through expert numbers[i]; float32."""
        with self._lock:
            layer = self._layers[self._number_of[experts.layer.experts]]
            self._ram.open(layer)
            if tokens.device.type != "cpu":
                raise SettingError(
                    f"the model is on {tokens.device} and its experts on the CPU. Give devices, or move it."
                )
            rows = experts.layer.shapes[layer.projections[-1]][0]
            out = torch.empty(len(tokens), rows, dtype=torch.float32)
            groups = {number: slice(bounds[i], bounds[i + 1]) for i, number in enumerate(numbers)}

            def multiply(wave: list[int]) -> None:
                slices = [groups[expert] for expert in wave]
                ends = np.cumsum([0, *(s.stop - s.start for s in slices)]).tolist()
                own = tokens if len(wave) == len(numbers) else torch.cat([tokens[s] for s in slices])
                result = experts.multiply(layer.stack, wave, own, ends)
                for s, part in zip(slices, torch.split(result, [s.stop - s.start for s in slices]), strict=True):
                    out[s] = part

            self._in_waves(layer, [layer.first + expert for expert in numbers], multiply)
            return out

    def run_layer(self, experts: PackedExperts, hidden_states: Tensor, routing: Sequence[Tensor]) -> Tensor | None:
        """Send each token through its experts, where they are multiplied on a GPU; float32, on the tokens' device."""
        with self._lock:
            number = self._number_of[experts.layer.experts]
            layer, tier = self._layers[number], self._tier_of[number]
            if tier is None:
                return None
            self._ram.open(layer)
            asked, self._asked = self._asked, None
            index, weights = experts.family.routing(routing)
            x, index, weights = (part.to(tier.device.device) for part in (hidden_states, index, weights))
            stretches = experts.stretches(index)
            if asked is None or len(stretches) > 1 or not all(map(operator.is_, asked[0], routing)):
                counts = [count_tokens(index[some], experts.num_experts)[:-1].tolist() for some in stretches]
            else:
                counts = [asked[1]]
            parts = [
                self._run_there(tier, layer, x[some], index[some], weights[some], sizes)
                for some, sizes in zip(stretches, counts, strict=True)
            ]
            self._copy_ahead()
            return (torch.cat(parts) if len(parts) > 1 else parts[0]).to(hidden_states.device)

    def _run_there(
        self, tier: GpuTier, layer: Layer, x: Tensor, index: Tensor, weights: Tensor, sizes: list[int]
    ) -> Tensor:
        """Send tokens on a GPU through its experts; with less memory for these where it runs out of it."""

        def arriving(missing: list[int], take: Callable[[list[int]], None]) -> None:
            self._in_waves(layer, missing, lambda own: take([layer.first + expert for expert in own]))

        while True:
            try:
                return tier.run(layer, x, index, weights, sizes, arriving)
            except torch.OutOfMemoryError:
                pass  # until here its traceback keeps the memory that is given back next
            tier.shrink()

    def _in_waves(self, layer: Layer, numbers: list[int], compute: Callable[[list[int]], None]) -> None:
        """Call `compute` with the layer's own numbers of experts as they arrive, until all had their turn."""
        left = numbers
        self._ram.release(but=numbers)  # what else was asked for before the layer ran may hold every slot
        try:
            while left:
                self._ram.want(left)
                ready = [number for number in left if self._ram.ready(number)]
                if not ready:
                    self._ram.wait(left)
                    continue
                own = [number - layer.first for number in ready]
                for expert in own:
                    layer.validate(expert)
                compute(own)
                self._ram.release(ready)
                done = set(ready)
                left = [number for number in left if number not in done]
        except BaseException:
            self._ram.release()
            raise

    # what the user calls

    def trace(self, path: str | Path) -> None:
        """Record from now on which experts each layer asks for, as JSON lines.

        The first line describes the model: {"model_type", "layers": [names], "experts", "top_k"}; each other one is
        {"pass", "layer": number, "experts": [[those of a token], ..]}. `bench offload` replays such files.

        Raises
        ------
        OutputError
            The file cannot be written, and an earlier trace goes on; or the end of that one cannot, and the new one is
            recorded.
        """
        layers = [layer.experts.layer for layer in self._layers]
        head = {
            "model_type": self._layers[0].experts.family.model_type,
            "layers": [layer.experts for layer in layers],
            "experts": layers[0].count,
            "top_k": layers[0].top_k,
        }
        with self._lock:
            if self._trace is not None:
                with suppress(OSError):  # said when it is closed
                    self._trace.flush()  # it may be the same file, and what it holds back would be put into the new one
            file = _opened(path, json.dumps(head) + "\n")
            try:
                self._end_trace()
            finally:
                self._trace = file

    def _write_trace(self, trace: TextIO, number: int, index: Tensor) -> None:
        line = {"pass": self._number() or self.statistics.passes, "layer": number, "experts": index.tolist()}
        try:
            trace.write(json.dumps(line) + "\n")
        except OSError as error:
            self._trace = None
            _abandon(trace)
            raise _unwritable(trace.name, error, "The trace ends here.") from error

    def _end_trace(self) -> None:
        trace, self._trace = self._trace, None
        if trace is not None:
            try:
                trace.close()
            except OSError as error:
                raise _unwritable(trace.name, error, "The end of the trace is missing.") from error

    def close(self) -> None:
        """Let the model run from its files' maps again; write the counts and the end of the trace.

        Raises
        ------
        OutputError
            The end of the trace cannot be written; all else is done.
        """
        with self._lock:
            for hook in self._hooks:
                hook.remove()
            for layer in self._layers:
                layer.experts.source = None
            try:
                self._count()
                self._end()
            finally:
                self._end_trace()

    def _count(self) -> None:
        statistics, ram = self.statistics, self._ram
        statistics.disk_bytes, statistics.stall_seconds = ram.read_bytes, ram.stall_seconds
        memory = ram.cache.slots * ram.slot_bytes
        statistics.cache_bytes, statistics.ram_bytes = memory, 0
        if self._tiers:
            statistics.cache_bytes = sum(tier.nbytes for tier in self._tiers)
            statistics.ram_bytes = memory
            waits = [tier.device.waited() for tier in self._tiers]
            known = [seconds for seconds in waits if seconds is not None]
            statistics.copy_stall_seconds = sum(known) if len(known) == len(waits) else None
            statistics.copied_bytes = sum(tier.copied_bytes for tier in self._tiers)
        statistics.direct = all(file.direct for file in self._files.values())


def _unwritable(path: Any, error: OSError, remedy: str) -> OutputError:
    return OutputError(f"{path} cannot be written: {error.strerror}. {remedy}")


def _opened(path: str | Path, head: str) -> TextIO:
    """Open a file and write its first line; nothing is left open where that fails."""
    file = None
    try:
        file = Path(path).open("w", encoding="utf-8")  # noqa: SIM115
        file.write(head)
        file.flush()
    except OSError as error:
        if file is not None:
            _abandon(file)
        raise _unwritable(path, error, "Name another file.") from error
    return file


def _abandon(file: TextIO) -> None:
    """Close a file that could not be written, once more in vain."""
    with suppress(OSError):
        file.close()


@dataclass
class _Counts:
    """Use counts that outlive the process. Names are settled at the start: the model's directory may go."""

    model: str
    files: list[Path]  # beside the model, else in the user's cache directory
    uses: np.ndarray[Any, np.dtype[np.float64]]

    @classmethod
    def of(cls, checkpoint: Checkpoint, uses: np.ndarray[Any, np.dtype[np.float64]]) -> _Counts:
        model = checkpoint.fingerprint()
        files = [checkpoint.directory / COUNTS_FILE]
        with suppress(RuntimeError):  # a user without a home, as in a container
            cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qmoe-lite"
            files.append(cache / f"{model[:32]}.{COUNTS_FILE}")
        return cls(model, files, uses)

    def load(self) -> np.ndarray[Any, np.dtype[np.float64]] | None:
        for file in self.files:
            try:
                found = json.loads(file.read_text(encoding="utf-8"))
                counts = np.array(found["counts"], dtype=np.float64)
                if found["model"] == self.model and counts.shape == self.uses.shape and (counts >= 0).all():
                    return counts
            except (OSError, ValueError, KeyError, TypeError):  # none yet, or of another model: it is only a hint
                continue
        return None

    def save(self) -> None:
        """Keep half of what was counted: older runs fade."""
        if not self.uses.any() or not self.files[0].parent.is_dir():
            return
        content = {"model": self.model, "counts": np.round(self.uses / 2, 3).tolist()}
        for file in self.files:
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                write_json(file, content)
            except (OSError, QMoEError):  # a hint is not worth an error at the end of a run
                continue
            return


def _shut(readers: Readers, files: dict[Path, WeightFile], counts: _Counts | None) -> None:
    readers.close()
    for file in files.values():
        file.close()
    if counts is not None:
        counts.save()


def _router(model: nn.Module, experts: PackedExperts) -> Tensor | None:
    """Weight of the router that stands beside an experts module, (experts, width)."""
    parent = experts.layer.experts.rpartition(".")[0]
    weight = model.get_submodule(f"{parent}.{experts.family.router}").weight
    return weight if isinstance(weight, Tensor) and len(weight) == experts.num_experts else None


def attach(
    model: Any,
    *,
    expert_cache: int | str | Sequence[int | str] | None = None,
    ram_cache: int | str | None = None,
    offload: str | None = None,
    devices: Sequence[str | Device] | None = None,
    half_life: float = HALF_LIFE,
    prefetch: bool = True,
    remember: bool = True,
) -> Runner:
    """Let a compressed model's experts come from disk as they are needed, within a budget of memory.

    Budgets hold for inference. While a model trains, copies of the experts that backward needs are held besides.

    Parameters
    ----------
    model : transformers model
        As `load` or from_pretrained gives it.
    expert_cache : int or str, or a sequence of them, optional
        Bytes, or a size such as "4GiB", for experts where they are multiplied: on the CPU that is memory, on GPUs
        theirs, one size for all or one each. By default as many as the experts take.
    ram_cache : int or str, optional
        Bytes of memory for experts. By default as many as all experts take.
    offload : "ram", "disk" or None
        Where the experts wait that have no place where they are multiplied. "ram": each is read from disk when it is
        first needed and stays in memory. "disk": memory holds as many as its budget has room for, which must be given:
        `ram_cache`, or `expert_cache` on the CPU. By default "disk" where there is such a budget, else "ram".
    devices : sequence of str, optional
        GPUs that multiply the experts, such as ["cuda:0", "cuda:1"]: each a run of layers, as long as its budget says.
        The model itself stays where it is.
    half_life : float
        Passes of the model after which the use of an expert counts half when one has to give way.
    prefetch : bool
        Read the experts that the next layer's router would choose, ahead of the layer; not while fewer than half of
        such guesses come true.
    remember : bool
        Keep the experts' use counts beside the model (in the user's cache directory where that is read-only), and
        begin with those that were used most before.

    Returns
    -------
    Runner

    Raises
    ------
    SettingError
        No compressed model, one that has a runner, sizes that exclude each other or have no room for one expert, or
        "disk" without a budget.
    CheckpointError
        The model's directory is gone.
    DeviceError
        A GPU that is not there, or has no memory for one expert.
    """
    if offload not in (None, "ram", "disk"):
        raise SettingError(f"offload is {offload!r}; expected 'ram' or 'disk'.")
    if runner_of(model) is not None:
        raise SettingError("the model has a runner already. Close it first: qmoe_lite.offload.runner_of(model).close()")
    path = Path(getattr(model, "name_or_path", "") or "")
    if not (path / "config.json").is_file():
        raise CheckpointError(f"the model's directory {path} is not there: experts are read from it. Load it again.")
    gpus = [CudaDevice(device) if isinstance(device, str) else device for device in devices or ()]
    sizes = [] if expert_cache is None else [expert_cache] if isinstance(expert_cache, int | str) else [*expert_cache]
    budgets: list[int | None] = [parse_size(size, "expert_cache") for size in sizes]
    memory = None if ram_cache is None else parse_size(ram_cache, "ram_cache")
    if len(sizes) not in (0, 1, max(len(gpus), 1)):
        raise SettingError(f"expert_cache has {len(sizes)} sizes for {max(len(gpus), 1)} devices. Give one for each.")
    if not gpus:
        if memory is not None and budgets and budgets[0] != memory:
            raise SettingError("expert_cache and ram_cache are the same memory on the CPU. Give one of them.")
        memory = memory if memory is not None or not budgets else budgets[0]
    elif len(budgets) < len(gpus):
        budgets = (budgets or [None]) * len(gpus)
    if offload == "ram" and memory is not None:
        raise SettingError("offload='ram' holds all experts in memory, a budget only some. Give one of them.")
    if offload == "disk" and memory is None:
        budget = "ram_cache" if gpus else "ram_cache or expert_cache"
        raise SettingError(f"offload='disk' needs a budget of memory, or nothing is limited. Set {budget} too.")
    _, checkpoint = open_checkpoint(path)
    quantization_of(checkpoint)
    return Runner(
        model,
        checkpoint,
        ram_cache=memory,
        devices=gpus,
        budgets=budgets,
        half_life=half_life,
        prefetch=prefetch,
        remember=remember,
    )


def runner_of(model: nn.Module) -> Runner | None:
    """The runner that a model's experts come from, or None."""
    for module in model.modules():
        if isinstance(module, PackedExperts) and isinstance(module.source, Runner):
            return module.source
    return None
