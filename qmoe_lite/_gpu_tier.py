"""Experts on a GPU: slots of one block of its memory, filled from ours through pinned buffers by a stream of its own.

The tier speaks to a `Device`: `CudaDevice` does it by torch's streams and events, the tests' by lists of things to do.
A copy waits until what was computed from its slot before is done; what is computed from a slot waits for its copy;
nothing else waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from qmoe_lite._expert_cache import ExpertCache
from qmoe_lite._ram_tier import Layer
from qmoe_lite.codebook import Codebook
from qmoe_lite.errors import DeviceError, SettingError
from qmoe_lite.families import inner
from qmoe_lite.packed import PackedMatrix

_STAGES = 4  # pinned buffers: copies that may be under way
_ALIGNMENT = 256  # bytes; of each tensor in a slot


class Device(Protocol):
    """What the tier needs of a GPU. Events are the device's own objects."""

    name: str
    device: torch.device

    def allocate(self, size: int) -> Tensor:
        """Give bytes of its memory, uint8; raise torch.OutOfMemoryError."""

    def stage(self, size: int) -> Tensor:
        """Give pinned bytes of ours."""

    def copy(self, source: Tensor, target: Tensor, after: Any) -> Any:
        """Begin to copy, once the event `after` (or None) has happened; give the event of its end."""

    def wait(self, event: Any) -> None:
        """Let what is computed from now on wait for an event."""

    def finish(self, event: Any) -> None:
        """Let this thread wait for an event."""

    def mark(self) -> Any:
        """Give the event of the end of all that was given it to compute so far."""

    def multiply(self, packed: PackedMatrix, x: Tensor) -> Tensor:
        """Compute W x there, in float32."""

    def beside(self, codebook: Codebook, codes: int, rows: int) -> int:
        """Bytes that `multiply` keeps there at most for a matrix, while it has a slot, given those of its codes."""


class CudaDevice:
    """A GPU by torch's streams and events.

    Raises
    ------
    DeviceError
        No such GPU, or the kernels cannot be compiled for it.
    """

    def __init__(self, name: str) -> None:
        from qmoe_lite.cuda import launch

        try:
            self.device = torch.device(name)
        except RuntimeError as error:
            raise SettingError(f"device {name} is not supported; expected cpu, or a GPU such as cuda:0.") from error
        if self.device.type != "cuda":
            raise SettingError(f"device {name} is not supported; expected cpu, or a GPU such as cuda:0.")
        if (reason := launch.reason(self.device.index or 0)) is not None:
            raise DeviceError(reason)
        self.name = name
        self._copies: Any = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

    def allocate(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def stage(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def copy(self, source: Tensor, target: Tensor, after: Any) -> Any:
        with torch.cuda.stream(self._copies):
            if after is not None:
                self._copies.wait_event(after)
            target.copy_(source, non_blocking=True)
            return self._copies.record_event()

    def wait(self, event: Any) -> None:
        torch.cuda.current_stream(self.device).wait_event(event)

    def finish(self, event: Any) -> None:
        event.synchronize()

    def mark(self) -> Any:
        return torch.cuda.current_stream(self.device).record_event()

    def multiply(self, packed: PackedMatrix, x: Tensor) -> Tensor:
        from qmoe_lite.cuda.matmul import decode_matmul

        with torch.cuda.device(self.device):
            product: Tensor = decode_matmul(packed, x)
        return product

    def beside(self, codebook: Codebook, codes: int, rows: int) -> int:
        from qmoe_lite.cuda.packets import most_bytes

        return most_bytes(codebook, codes, rows)


@dataclass
class _Stage:
    memory: Tensor
    copied: Any = None


@dataclass
class _Slot:
    """An expert there: its matrices as views of the slot, and the event of its copy until somebody has waited."""

    matrices: dict[str, PackedMatrix] = field(default_factory=dict)
    arrived: Any = None
    used: Any = None


class GpuTier:
    """Slots on one GPU for the experts of some layers.

    Parameters
    ----------
    device : Device
    layers : list of Layer
        Those whose experts are multiplied there.
    experts : int
        Of all layers, which number them.
    budget : int or None
        Bytes of its memory; None: as many as the layers' experts take.
    half_life : float
        As `ExpertCache` takes it.
    notes : list of str
        Is told what was done otherwise than asked for.

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
        self.device, self.notes = device, notes
        self.copied_bytes = 0
        self._experts, self._half_life = experts, half_life
        self.slot_bytes = max(_spread(layer)[1] for layer in layers)
        self.expert_bytes = self.slot_bytes + max(map(self._beside, layers))
        wanted = sum(layer.experts.num_experts for layer in layers)
        slots = wanted if budget is None else min(budget // self.expert_bytes, wanted)
        if slots < 1:
            raise SettingError(
                f"expert_cache is {budget} bytes on {device.name}, and one expert takes {self.expert_bytes}. "
                "Give more, or leave it out."
            )
        self._stages = [_Stage(device.stage(self.slot_bytes)) for _ in range(_STAGES)]
        self._turn = 0
        self._make(slots)

    def _beside(self, layer: Layer) -> int:
        experts = layer.experts
        return sum(
            self.device.beside(experts.codebooks[name], layer.part_sizes(name)[0], experts.layer.shapes[name][0])
            for name in layer.projections
        )

    def _make(self, slots: int) -> None:
        asked = slots
        while True:
            try:
                self._memory = self.device.allocate(slots * self.slot_bytes)
                break
            except torch.OutOfMemoryError:
                slots //= 2
                if slots < 1:
                    raise DeviceError(
                        f"{self.device.name} has no memory for one expert ({self.slot_bytes} bytes). "
                        "Free some of it, or run on the CPU."
                    ) from None
        if slots < asked:
            self.notes.append(
                f"{self.device.name} was out of memory: its cache holds {slots} experts instead of {asked}."
            )
        self.cache = ExpertCache(self._experts, slots, self._half_life)
        self._held: list[_Slot] = [_Slot() for _ in range(slots)]

    def shrink(self) -> None:
        """Give back half of the memory, and forget what was in it.

        Raises
        ------
        DeviceError
            There is no half of one expert.
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
        del self._memory, self._held  # the slots' views, too, keep the block
        self._make(slots // 2)
        self.cache.remember(uses)
        self.notes.append(
            f"{self.device.name} ran out of memory: its cache now holds {self.cache.slots} experts instead of {slots}."
        )

    def there(self, number: int) -> bool:
        """Tell whether an expert has a slot."""
        return self.cache.slot(number) >= 0

    def put(self, number: int, layer: Layer) -> bool:
        """Begin to copy an expert, which is in memory, to a slot, and pin it; tell whether there was one."""
        given = self.cache.admit(number)
        if given is None:
            return False
        self.cache.pin(number)
        try:
            self._fill(given[0], number, layer)
        except BaseException:  # else it would look as if it were there
            self.cache.drop(number)
            raise
        return True

    def _fill(self, place: int, number: int, layer: Layer) -> None:
        slot, base = self._held[place], place * self.slot_bytes
        stage = self._stages[self._turn]
        self._turn = (self._turn + 1) % _STAGES
        if stage.copied is not None:
            self.device.finish(stage.copied)  # the buffer is filled anew only when its last copy is done
        places, size = _spread(layer)
        slot.matrices = {}
        for projection, starts in places.items():
            packed = layer.packed(number - layer.first, projection)
            views = []
            for part, start in zip((packed.codes, packed.row_codewords, packed.levels), starts, strict=True):
                data = part.contiguous().view(-1).view(torch.uint8)
                stage.memory[start : start + len(data)] = data
                there = self._memory[base + start : base + start + len(data)]
                views.append(there.view(part.dtype).view(part.shape))
            codes, row_codewords, levels = views
            slot.matrices[projection] = replace(packed, codes=codes, row_codewords=row_codewords, levels=levels)
        target = self._memory[base : base + size]
        slot.arrived = stage.copied = self.device.copy(stage.memory[:size], target, slot.used)
        slot.used = None
        self.copied_bytes += size

    def compute(self, number: int, layer: Layer, tokens: Tensor) -> Tensor:
        """Send tokens, on the device, through an expert that has a slot."""
        slot = self._held[self.cache.slot(number)]
        if slot.arrived is not None:
            self.device.wait(slot.arrived)
            slot.arrived = None
        experts = layer.experts
        first, (last,) = experts.layer.stages
        outputs = [self.device.multiply(slot.matrices[name], tokens) for name in first]
        result = self.device.multiply(slot.matrices[last], inner(experts.activation, outputs))
        slot.used = self.device.mark()
        return result

    def release(self, number: int) -> None:
        self.cache.unpin(number)

    def run(self, layer: Layer, groups: dict[int, Tensor], arriving: Any) -> dict[int, Tensor]:
        """Send each expert's tokens through it: first those that are there, the others as they arrive in memory.

        `groups` holds each expert's tokens, on the device, by its number among all. `arriving` is called with numbers
        and a function, which it calls with those of them that are in memory, until all had their turn.
        """
        done: dict[int, Tensor] = {}
        pinned: set[int] = set()

        def finish(numbers: Sequence[int]) -> None:
            for number in numbers:
                done[number] = self.compute(number, layer, groups[number])
                self.release(number)
                pinned.discard(number)

        def take(numbers: Sequence[int]) -> None:
            begun: list[int] = []
            for number in numbers:
                if not self.put(number, layer):
                    finish(begun)
                    begun = []
                    if not self.put(number, layer):
                        raise DeviceError(f"all slots of {self.device.name} are in use. Please report this as a bug.")
                pinned.add(number)
                begun.append(number)
            finish(begun)

        try:
            resident = [number for number in groups if self.there(number)]
            for number in resident:
                self.cache.pin(number)
                pinned.add(number)
            finish(resident)
            arriving([number for number in groups if number not in done], take)
        except BaseException:
            for number in pinned:
                self.release(number)
            raise
        return done


def _spread(layer: Layer) -> tuple[dict[str, tuple[int, int, int]], int]:
    """Where in a slot each projection's codes, row lengths and levels begin; the bytes of all."""
    places, start = {}, 0
    for projection in layer.projections:
        starts = []
        for size in layer.part_sizes(projection):
            starts.append(start)
            start += -(-size // _ALIGNMENT) * _ALIGNMENT
        places[projection] = (starts[0], starts[1], starts[2])
    return places, start


def share_layers(layers: Sequence[Layer], budgets: Sequence[float]) -> list[int]:
    """Number of the device of each layer: runs of layers whose experts' bytes are as the budgets."""
    sizes = [layer.codes_bytes for layer in layers]
    whole, edges = sum(sizes), [sum(budgets[: i + 1]) / sum(budgets) for i in range(len(budgets))]
    middles = [(sum(sizes[:i]) + size / 2) / max(whole, 1) for i, size in enumerate(sizes)]
    return [next(i for i, edge in enumerate(edges) if middle < edge or i == len(edges) - 1) for middle in middles]
