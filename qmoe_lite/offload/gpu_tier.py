"""Experts on a GPU: slots of one block of its memory, filled from ours through pinned buffers by a stream of its own.

A slot holds an expert's matrices as the kernels read them, in packets: codes come to a small buffer on the GPU and are
laid out from there by the same stream. The tier speaks to a `Device` (see gpu_device.py). A copy waits until what was
computed from its slot before is done; what is computed from a slot waits for its copy; nothing else waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qmoe_lite.errors import DeviceError, FormatError, SettingError
from qmoe_lite.offload.cache import ExpertCache, Wanting
from qmoe_lite.offload.gpu_device import Device, Repack
from qmoe_lite.offload.gpu_layout import Layout
from qmoe_lite.offload.ram_tier import Layer

if TYPE_CHECKING:
    from qmoe_lite.cuda.experts import Matrices

_STAGES = 4  # pinned buffers, and those on the GPU: copies that may be under way


@dataclass
class _Stage:
    memory: Tensor
    on_gpu: Tensor
    copied: Any = None


@dataclass
class _Slot:
    """An expert there: the event of its copy and that copy's number, and the event after what was computed from it."""

    arrived: Any = None
    copy: int = 0
    used: Any = None


class GpuTier(Wanting):
    """Slots on one GPU for the experts of some layers.

    Parameters
    ----------
    device : Device
    layers : list of Layer
        Those whose experts are multiplied there.
    experts : int
        Of all layers, which number them.
    budget : int or None
        Bytes of its memory for slots; None: as many as the layers' experts take. The codes of a few experts besides
        that are being copied are not counted.
    half_life : float
        As `ExpertCache` takes it.
    notes : list of str
        Is told what was done otherwise than asked for.

    Attributes
    ----------
    copied_bytes : int
        So far.
    guessed : set of int
        Experts that were copied because they were predicted, until `end_guess`.

    Raises
    ------
    SettingError
        The budget has no room for one expert.
    DeviceError
        The GPU has none.
    """

    def __init__(
        self,
        device: Device,
        layers: Sequence[Layer],
        experts: int,
        budget: int | None,
        half_life: float,
        notes: list[str],
    ) -> None:
        super().__init__()
        self.device, self.notes = device, notes
        self.copied_bytes = 0
        self.guessed: set[int] = set()
        self._experts, self._half_life = experts, half_life
        self._layouts = {layer.first: Layout(layer) for layer in layers}
        # a multiple of ALIGNMENT, so that it is a whole stride for every tensor of a slot
        self.slot_bytes = max(layout.size for layout in self._layouts.values())
        wanted = sum(layer.experts.num_experts for layer in layers)
        slots = wanted if budget is None else min(budget // self.slot_bytes, wanted)
        if slots < 1:
            raise SettingError(
                f"expert_cache is {budget} bytes on {device.name}, and one expert takes {self.slot_bytes}. "
                "Give more, or leave it out."
            )
        codes = max(layout.stage for layout in self._layouts.values())
        whole = codes + max(layout.size - layout.tail for layout in self._layouts.values())
        self._stages = [_Stage(device.stage(whole), self._buffer(codes)) for _ in range(_STAGES)]
        self._begun = self._waited = 0  # copies: all so far, and those that what is computed has waited for
        self._lost: str | None = None
        self._make(slots)

    def _check(self) -> None:
        if self._lost:
            raise DeviceError(self._lost)

    def _buffer(self, size: int) -> Tensor:
        try:
            return self.device.allocate(size)
        except torch.OutOfMemoryError:
            raise DeviceError(self._no_room()) from None

    def _no_room(self) -> str:
        found = f"{self.device.name} has no memory for one expert ({self.slot_bytes} bytes). "
        return found + "Free some of it, or run on the CPU."

    def _make(self, slots: int) -> None:
        asked = slots
        self._packets: dict[int, dict[str, Matrices]] = {}
        while True:
            try:
                self._memory = self.device.allocate(slots * self.slot_bytes)
                break
            except torch.OutOfMemoryError:
                slots //= 2
                if slots < 1:
                    self._lost = self._no_room()
                    raise DeviceError(self._lost) from None
        if slots < asked:
            self.notes.append(
                f"{self.device.name} was out of memory: its cache holds {slots} experts instead of {asked}."
            )
        self.cache = ExpertCache(self._experts, slots, self._half_life)
        self._held = [_Slot() for _ in range(slots)]
        self._wanted.clear()
        self.guessed.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of its slots."""
        return 0 if self._lost else self.cache.slots * self.slot_bytes

    def shrink(self) -> None:
        """Release half of the memory, and forget what was in it.

        Raises
        ------
        DeviceError
            There is no half of one expert; or not even that was to be had again, which every later call says too.
        """
        slots, uses = self.cache.slots, self.cache.uses
        if slots == 1:
            raise DeviceError(
                f"{self.device.name} is out of memory with room for one expert only. "
                "Free some of it, shorten the prompt, or run on the CPU."
            )
        for stage in self._stages:
            if stage.copied is not None:
                self.device.finish(stage.copied)
        # a new slot knows of no use, and its first copy would not wait for what is still computed from the same memory
        self.device.finish(self.device.mark())
        del self._memory, self._packets  # which are views of it
        self._make(slots // 2)
        self.cache.remember(uses)
        self.notes.append(
            f"{self.device.name} ran out of memory: its cache now holds {self.cache.slots} experts instead of {slots}."
        )

    def there(self, number: int) -> bool:
        """Return whether an expert has a slot; raise DeviceError where there are none any more."""
        self._check()
        return self.cache.slot(number) >= 0

    def guess(self, numbers: Sequence[int], layer: Layer) -> int:
        """Begin to copy experts in memory that the next layer may want, while a quarter of the slots suffices.

        Those that are there already stay until the next `run`.

        Returns
        -------
        int
            How many are new.
        """
        before = len(self.guessed)
        for number in filter(self.there, numbers):
            self._pin(number)
        for number in numbers:
            if len(self.guessed) >= self.cache.slots // 4:
                break
            if self.there(number):
                continue
            try:
                layer.validate(number - layer.first)
                if not self._put(number, layer):
                    break
            except (FormatError, torch.OutOfMemoryError):  # it is said where the expert is asked for
                break
            self.guessed.add(number)
            self.cache.pin(number)
        return len(self.guessed) - before

    def end_guess(self) -> None:
        """Let go of the guesses."""
        for number in self.guessed:
            self.cache.unpin(number)
        self.guessed.clear()

    def _put(self, number: int, layer: Layer) -> bool:
        """Begin to copy an expert, which is in memory, to a slot; return whether there was one."""
        given = self.cache.admit(number)
        if given is None:
            return False
        try:
            self._fill(given[0], number, layer)
        except BaseException:  # else it would look as if it were there
            self.cache.drop(number)
            raise
        return True

    def _fill(self, slot: int, number: int, layer: Layer) -> None:
        held, base = self._held[slot], slot * self.slot_bytes
        layout = self._layouts[layer.first]
        stage = self._stages[self._begun % _STAGES]
        if stage.copied is not None:
            self.device.finish(stage.copied)  # the buffer is filled anew only when its last copy is done
        begun = len(stage.on_gpu)
        at, coming = layout.write(number - layer.first, stage.memory.numpy(), begun)
        repacks = []
        for i, (name, (firsts_at, count)) in enumerate(coming.items()):
            size, words = 4 * (layer.experts.layer.shapes[name][0] + 1), base + layout.words[name]
            repacks.append(
                Repack(
                    stage.on_gpu,
                    stage.on_gpu[8 * i : 8 * i + 8].view(torch.int64),
                    stage.on_gpu[firsts_at : firsts_at + size].view(torch.int32)[None],
                    self._memory[base + layout.starts[name] :][:size].view(torch.int32),
                    self._memory[words : words + 16 * count].view(torch.uint32).view(-1, 4),
                    layer.experts.codebooks[name],
                )
            )
        as_it_is = stage.memory[begun : begun + layout.size - layout.tail]
        tail = self._memory[base + layout.tail : base + layout.size]
        held.arrived = stage.copied = self.device.fill(
            [(stage.memory[:at], stage.on_gpu[:at]), (as_it_is, tail)], repacks, held.used
        )
        self._begun += 1
        held.used, held.copy = None, self._begun
        self.copied_bytes += at + len(tail)

    def packets(self, layer: Layer) -> dict[str, Matrices]:
        """Return a layer's projections as the kernels read them: an expert at the number of its slot."""
        if layer.first not in self._packets:
            layout, given = self._layouts[layer.first], (self._memory, self.cache.slots, self.slot_bytes)
            self._packets[layer.first] = {name: layout.view(name, *given) for name in layer.projections}
        return self._packets[layer.first]

    def run(
        self, layer: Layer, x: Tensor, index: Tensor, weights: Tensor, sizes: Sequence[int], arriving: Any
    ) -> Tensor:
        """Send tokens through their experts: first those that are there, the others as they arrive in memory.

        Parameters
        ----------
        layer : Layer
            Whose they are.
        x, index, weights : tensors
            On the device, as `cuda.experts.ExpertsCall` takes them.
        sizes : list of int
            Tokens of each of the layer's experts.
        arriving : function
            Is called with numbers of experts among all, and a function, which it calls with those of them that are in
            memory, until all had their turn.

        Returns
        -------
        float32 tensor, shape (T, C), on the device
        """
        self._check()
        self.release()  # what was only likely to be asked for
        call = self.device.begin(layer.experts, self.packets(layer), x, index, weights)

        def finish(numbers: Sequence[int]) -> None:
            if not numbers:
                return
            slots = {number: self.cache.slot(number) for number in numbers}
            last = max((self._held[slot] for slot in slots.values()), key=lambda held: held.copy)
            if last.copy > self._waited:  # whatever was begun before has ended before
                self.device.wait(last.arrived)
                self._waited = last.copy
            call.turn({number - layer.first: slot for number, slot in slots.items()}, sizes, layer.experts.activate)
            used = self.device.mark()
            for slot in slots.values():
                self._held[slot].used = used
            self.release(numbers)

        def take(numbers: Sequence[int]) -> None:
            begun: list[int] = []
            for number in numbers:
                if not self._put(number, layer):
                    finish(begun)
                    begun = []
                    if not self._put(number, layer):
                        raise DeviceError(f"all slots of {self.device.name} are in use. Please report this as a bug.")
                self._pin(number)
                begun.append(number)
            finish(begun)

        asked = [layer.first + expert for expert, size in enumerate(sizes) if size]
        try:
            resident = [number for number in asked if self.there(number)]
            finish(resident)
            done = set(resident)
            if missing := [number for number in asked if number not in done]:
                arriving(missing, take)
        except BaseException:
            self.release()
            raise
        return call.total()


def make_tiers(
    devices: Sequence[Device],
    layers: Sequence[Layer],
    budgets: Sequence[int | None],
    experts: int,
    half_life: float,
    notes: list[str],
) -> list[GpuTier | None]:
    """Share the layers among the GPUs, in runs as long as their budgets say; return each layer's tier or None."""
    tier_of: list[GpuTier | None] = [None] * len(layers)
    if not devices:
        return tier_of
    shares = share_layers(layers, [1 if budget is None else budget for budget in budgets])
    for i, (device, budget) in enumerate(zip(devices, budgets, strict=True)):
        own = [layer_index for layer_index, share in enumerate(shares) if share == i]
        if not own:
            notes.append(f"{device.name} is left out: there are fewer layers than GPUs.")
            continue
        tier = GpuTier(device, [layers[j] for j in own], experts, budget, half_life, notes)
        for layer_index in own:
            tier_of[layer_index] = tier
    return tier_of


def share_layers(layers: Sequence[Layer], budgets: Sequence[float]) -> list[int]:
    """Number of the device of each layer: runs of layers whose experts' bytes are as the budgets."""
    sizes = [layer.codes_bytes for layer in layers]
    whole, edges = sum(sizes), [sum(budgets[: i + 1]) / sum(budgets) for i in range(len(budgets))]
    middles = [(sum(sizes[:i]) + size / 2) / max(whole, 1) for i, size in enumerate(sizes)]
    return [next(i for i, edge in enumerate(edges) if middle < edge or i == len(edges) - 1) for middle in middles]
