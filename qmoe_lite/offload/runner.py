"""Run a model whose experts do not fit: they wait on disk or in memory, and those in use take turns in a cache.

    disk  ->  memory (`ram_cache`)  ->  GPU (`expert_cache`), where there is one

Nothing in the model's own code changes. An experts module tells its `Runner` which experts its tokens go through: the
runner begins to read the missing ones and, by the next layer's router, those that are likely next. The module then gets
its experts from the runner: those that are there are multiplied while others arrive. What is computed does not depend
on the budget, bit for bit, on the CPU.

A layer has an index among the sparse layers; an expert has a number among those of all layers, and in its layer it is
an `expert`, from 0.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qmoe_lite.checkpoint.format import quantization_of
from qmoe_lite.checkpoint.reader import Checkpoint
from qmoe_lite.checkpoint.weight_file import WeightFile
from qmoe_lite.coding.packed import PackedMatrix
from qmoe_lite.coding.tokens import count_tokens
from qmoe_lite.errors import CheckpointError, OutputError, SettingError
from qmoe_lite.models.experts import PackedExperts
from qmoe_lite.models.skeletons import open_checkpoint
from qmoe_lite.offload.cache import HALF_LIFE
from qmoe_lite.offload.gpu_device import CudaDevice, Device
from qmoe_lite.offload.gpu_tier import GpuTier, make_tiers
from qmoe_lite.offload.passes import Hook, Passes
from qmoe_lite.offload.prediction import Prediction
from qmoe_lite.offload.ram_tier import Layer, RamTier, count_slots, open_layers
from qmoe_lite.offload.readers import Readers
from qmoe_lite.offload.sizes import plan_memory
from qmoe_lite.offload.statistics import Statistics
from qmoe_lite.offload.trace import Trace, head_of
from qmoe_lite.offload.use_counts import UseCounts


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
        self._trace: Trace | None = None
        self._files = {path: WeightFile(path) for path in (checkpoint.directory / name for name in checkpoint.files)}
        self._layers = open_layers(model, checkpoint, self._files)
        self._index_of = {layer.experts.layer.experts: i for i, layer in enumerate(self._layers)}
        stacks = [layer.experts.layer.experts.split(".")[0] for layer in self._layers]
        self._openings = {stacks.index(stack) for stack in stacks}  # the first layer of the encoder, of the decoder
        self.statistics.index_bytes = sum(layer.index_bytes for layer in self._layers)
        self._ram = RamTier(self._layers, count_slots(self._layers, ram_cache), half_life)
        counts = UseCounts.of(checkpoint, self._ram.cache.uses) if remember else None
        # also when the model is forgotten, the process ends, or what follows fails; so it must not hold the model
        self._end = weakref.finalize(self, _shut, self._ram.readers, self._files, counts)
        experts, notes = len(self._ram.cache.uses), self.statistics.notes
        self._tier_of = make_tiers(devices, self._layers, budgets, experts, half_life, notes)
        self._tiers = list({id(tier): tier for tier in self._tier_of if tier is not None}.values())
        self._prediction = Prediction(
            model, self._layers, self._openings, self._ram, self._tier_of, self.statistics, prefetch
        )
        self._passes = Passes(self.statistics)
        if counts is not None and (uses := counts.load()) is not None:
            self._ram.cache.remember(uses)
            self._ram.warm_up()
        self._count()
        # last, so that what fails before leaves the model as it was
        self._hooks = [
            model.register_forward_pre_hook(Hook(self, "_begin_pass")),
            model.register_forward_hook(Hook(self, "_end_pass"), always_call=True),
        ]
        for layer in self._layers:
            layer.experts.source = self

    # what the hooks call

    def _begin_pass(self, model: nn.Module, arguments: Any) -> None:
        with self._lock:
            for cache in (self._ram.cache, *(tier.cache for tier in self._tiers)):
                cache.tick()
            self._passes.begin()

    def _end_pass(self, model: nn.Module, arguments: Any, result: Any) -> None:
        with self._lock:
            if self._passes.end():
                self._count()

    # what an experts module calls

    def begin_layer(self, module: PackedExperts, hidden_states: Tensor, index: Tensor) -> list[int]:
        """Begin to read what the layer asks for, then what the next one may; return the tokens of each expert."""
        with self._lock:
            layer_index = self._index_of[module.layer.experts]
            layer, tier = self._layers[layer_index], self._tier_of[layer_index]
            if layer_index in self._openings:
                self.statistics.tokens += len(hidden_states)
            self._write_trace(layer_index, index)
            counts = [count_tokens(index, module.num_experts)[:-1]]
            votes = None if tier is None else self._prediction.votes(layer_index + 1, hidden_states)
            if votes is not None:
                counts.append(votes.to(index.device))
            found = torch.cat(counts).tolist()  # on a GPU this waits for it: once a layer
            sizes, predicted = found[: module.num_experts], found[module.num_experts :]
            wanted = [layer.first + expert for expert, size in enumerate(sizes) if size]
            self._ram.open(layer)
            self._ram.release()
            self._ram.collect()  # a guess that has arrived is a hit
            self._prediction.end(layer_index, wanted)
            self._ram.want(self._count_uses(wanted, tier))
            # on the CPU nothing waits, and what is missing is on its way before anything is guessed
            if tier is None and (votes := self._prediction.votes(layer_index + 1, hidden_states)) is not None:
                predicted = votes.tolist()
            if predicted:
                self._prediction.begin(layer_index + 1, predicted)
            return sizes

    def _count_uses(self, wanted: list[int], tier: GpuTier | None) -> list[int]:
        """Count uses, hits and misses of the experts that a layer asks for; return those that memory must have."""
        missing = wanted if tier is None else [number for number in wanted if not tier.there(number)]
        in_memory = sum(map(self._ram.ready, missing))
        for number in wanted:
            for cache in (self._ram.cache,) if tier is None else (self._ram.cache, tier.cache):
                cache.use(number)
        hits = in_memory if tier is None else len(wanted) - len(missing)
        self.statistics.hits += hits
        self.statistics.misses += len(wanted) - hits
        if tier is not None:
            self.statistics.ram_hits += in_memory
            self.statistics.ram_misses += len(missing) - in_memory
        return missing

    def packed(self, module: PackedExperts, expert: int, projection: str) -> PackedMatrix:
        """Return an own copy of one expert's matrix, checked."""
        with self._lock:
            layer = self._layers[self._index_of[module.layer.experts]]
            self._ram.open(layer)
            found: list[PackedMatrix] = []

            def take(_: list[int]) -> None:
                view = layer.packed(expert, projection)
                found.append(replace(view, codes=view.codes.clone()))  # the slot will be another expert's

            self._ram.in_waves(layer, [layer.first + expert], take)
            return found[0]

    def run(self, module: PackedExperts, experts: list[int], tokens: Tensor, bounds: list[int]) -> Tensor:
        """Send tokens[bounds[i] : bounds[i + 1]] through expert experts[i]; float32."""
        with self._lock:
            layer = self._layers[self._index_of[module.layer.experts]]
            self._ram.open(layer)
            if tokens.device.type != "cpu":
                raise SettingError(
                    f"the model is on {tokens.device} and its experts on the CPU. Give devices, or move it."
                )
            rows = module.layer.shapes[layer.projections[-1]][0]
            out = torch.empty(len(tokens), rows, dtype=torch.float32)
            groups = {expert: slice(bounds[i], bounds[i + 1]) for i, expert in enumerate(experts)}

            def multiply(wave: list[int]) -> None:
                slices = [groups[expert] for expert in wave]
                ends = np.cumsum([0, *(s.stop - s.start for s in slices)]).tolist()
                own = tokens if len(wave) == len(experts) else torch.cat([tokens[s] for s in slices])
                result = module.multiply(layer.stack, wave, own, ends)
                for s, part in zip(slices, torch.split(result, [s.stop - s.start for s in slices]), strict=True):
                    out[s] = part

            self._ram.in_waves(layer, [layer.first + expert for expert in experts], multiply)
            return out

    def run_layer(
        self, module: PackedExperts, hidden_states: Tensor, index: Tensor, weights: Tensor, sizes: list[int]
    ) -> Tensor | None:
        """Send each token through its experts, where they are multiplied on a GPU; float32, on the tokens' device."""
        with self._lock:
            layer_index = self._index_of[module.layer.experts]
            layer, tier = self._layers[layer_index], self._tier_of[layer_index]
            if tier is None or module.in_turn:
                return None
            self._ram.open(layer)
            x, index, weights = (part.to(tier.device.device) for part in (hidden_states, index, weights))
            stretches = module.stretches(index)
            counts = [sizes]
            if len(stretches) > 1:
                counts = [count_tokens(index[some], module.num_experts)[:-1].tolist() for some in stretches]
            parts = [
                self._run_there(tier, layer, x[some], index[some], weights[some], own)
                for some, own in zip(stretches, counts, strict=True)
            ]
            self._prediction.copy_ahead()
            return (torch.cat(parts) if len(parts) > 1 else parts[0]).to(hidden_states.device)

    def _run_there(
        self, tier: GpuTier, layer: Layer, x: Tensor, index: Tensor, weights: Tensor, sizes: list[int]
    ) -> Tensor:
        """Send tokens on a GPU through its experts; with less memory for these where it runs out of it."""

        def arriving(missing: list[int], take: Callable[[list[int]], None]) -> None:
            self._ram.in_waves(layer, missing, lambda own: take([layer.first + expert for expert in own]))

        while True:
            try:
                return tier.run(layer, x, index, weights, sizes, arriving)
            except torch.OutOfMemoryError:
                pass  # until here its traceback keeps the memory that is given back next
            tier.shrink()

    # what the user calls

    def trace(self, path: str | Path) -> None:
        """Record from now on which experts each layer asks for, as JSON lines.

        The first line describes the model: {"model_type", "layers": [names], "experts", "top_k"}; each other one is
        {"pass", "layer": index, "experts": [[those of a token], ..]}. `bench offload` replays such files.

        Raises
        ------
        OutputError
            The file cannot be written, and an earlier trace goes on; or the end of that one cannot, and the new one is
            recorded.
        """
        with self._lock:
            if self._trace is not None:
                self._trace.flush()  # it may be the same file, and what it holds back would be put into the new one
            trace = Trace(path, head_of([layer.experts for layer in self._layers]))
            try:
                self._end_trace()
            finally:
                self._trace = trace

    def _write_trace(self, layer_index: int, index: Tensor) -> None:
        if self._trace is not None:
            try:
                self._trace.write(self._passes.number, layer_index, index.tolist())
            except OutputError:
                self._trace = None
                raise

    def _end_trace(self) -> None:
        trace, self._trace = self._trace, None
        if trace is not None:
            trace.close()

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


def _shut(readers: Readers, files: dict[Path, WeightFile], counts: UseCounts | None) -> None:
    readers.close()
    for file in files.values():
        file.close()
    if counts is not None:
        counts.save()


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
        Where the experts wait that do not fit where they are multiplied. "ram": each is read from disk when it is
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
    if runner_of(model) is not None:
        raise SettingError("the model has a runner already. Close it first: qmoe_lite.offload.runner_of(model).close()")
    path = Path(getattr(model, "name_or_path", "") or "")
    if not (path / "config.json").is_file():
        raise CheckpointError(f"the model's directory {path} is not there: experts are read from it. Load it again.")
    gpus = [CudaDevice(device) if isinstance(device, str) else device for device in devices or ()]
    memory, budgets = plan_memory(expert_cache, ram_cache, offload, len(gpus))
    _, checkpoint = open_checkpoint(path, variant=getattr(getattr(model, "hf_quantizer", None), "variant", None))
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
