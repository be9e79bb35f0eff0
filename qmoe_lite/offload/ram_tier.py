"""Experts in memory: a fixed number of slots for codes, filled from the files by threads.

Row lengths and levels of a layer (a few percent of its bytes) are read when it first runs, and stay: a cached expert is
then only codes that lie somewhere in one array, which the product's kernels take as they are, so it is never copied.
An expert is compared with its checksum when it is first read, its codes with those of that time at each later read,
and they are walked once, before the first use.

Slots are given away while nobody holds them: a read that is under way, a layer that is about to multiply, and a guess
for the next layer each pin theirs.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qmoe_lite.checkpoint.format import parts_of, tensor_name
from qmoe_lite.checkpoint.reader import Checkpoint, Place
from qmoe_lite.checkpoint.stack import ExpertStack, index_bytes
from qmoe_lite.checkpoint.weight_file import PAGE, WeightFile, page_memory, room
from qmoe_lite.coding.matmul import Stack
from qmoe_lite.coding.packed import PackedMatrix
from qmoe_lite.errors import QMoEError, SettingError
from qmoe_lite.models.experts import PackedExperts
from qmoe_lite.offload.cache import ExpertCache, Wanting
from qmoe_lite.offload.readers import Read, Readers


class Layer:
    """One sparse layer's experts, as the files hold them.

    Attributes
    ----------
    experts : PackedExperts
    first : int
        Number of its first expert among those of all layers.
    parts : dict, projection to ExpertStack
        All parts but the codes, once the layer has run.
    """

    def __init__(
        self, experts: PackedExperts, first: int, checkpoint: Checkpoint, files: dict[Path, WeightFile]
    ) -> None:
        self.experts, self.first = experts, first
        self.projections = experts.layer.projections
        self.index_bytes = 0
        self.parts: dict[str, ExpertStack] = {}
        self._starts: dict[str, NDArray[np.int64]] = {}  # where each expert's codes begin in the file's tensor
        self._files = files
        self._places: dict[str, dict[str, Place]] = {}
        for projection in self.projections:
            name, names = f"{experts.layer.experts}.{projection}", parts_of(experts.codebooks[projection])
            places = {part: checkpoint.place(tensor_name(name, part)) for part in names}
            self._places[projection] = places
            self._starts[projection] = self._read(places["expert_offsets"]).numpy()
            self.index_bytes += index_bytes(places, experts.layer.shapes[projection])
        self._stacks: dict[str, Stack] = {}  # the codes in memory, of those experts that are there
        self._sums: dict[str, NDArray[np.int64]] = {}  # CRC-32 of the codes alone; -1 before they were first read

    @property
    def codes_bytes(self) -> int:
        """Bytes of all its experts' codes."""
        return sum(places["codes"].length for places in self._places.values())

    def largest(self, projection: str) -> int:
        """Bytes of the longest codes of one expert."""
        sizes = np.diff(self._starts[projection])
        return int(sizes[(sizes >= 0) & (sizes <= self._places[projection]["codes"].length)].max(initial=0))

    def part_sizes(self, projection: str) -> tuple[int, int, int]:
        """Most bytes of one expert's codes, and its bytes of row lengths and of levels."""
        places, experts = self._places[projection], self.experts.num_experts
        others = [places[part].length // experts for part in ("row_codewords", "levels")]
        return self.largest(projection), others[0], others[1]

    def has_scales(self, projection: str) -> bool:
        """Return whether a projection of a code of windows has column scales of its own."""
        return self._places[projection]["column_scales"].length > 0

    def most_exceptions(self, projection: str) -> int:
        """Most exceptions of one expert, of a code of windows."""
        places = self._places[projection]
        starts = self._read(places["exception_starts"]).numpy().astype(np.int64)
        counts = starts[:, -1] - starts[:, 0]
        return int(counts[(counts >= 0) & (counts <= places["exception_values"].length)].max(initial=0))

    def _read(self, place: Place) -> Tensor:
        if not place.length:  # shared column scales, or no exceptions
            return torch.empty(place.shape, dtype=place.dtype)
        data = self._files[place.path].read(place.offset, place.length)
        return torch.frombuffer(data, dtype=place.dtype).view(place.shape)

    def open(self, memory: NDArray[np.uint8]) -> None:
        """Read row lengths and levels, unless that is done; codes will lie in `memory`."""
        if self._stacks:
            return
        stacks = {}
        for projection in self.projections:
            places = self._places[projection]
            held = {
                part: self._read(place) for part, place in places.items() if part not in ("codes", "expert_offsets")
            }
            held["expert_offsets"] = torch.from_numpy(self._starts[projection])
            name, layer = f"{self.experts.layer.experts}.{projection}", self.experts.layer
            book, length = self.experts.codebooks[projection], places["codes"].length
            shared = self.parts.get(layer.first_of_stage(projection))
            shape = layer.shapes[projection]
            self.parts[projection] = ExpertStack(name, layer.count, shape, book, held, length, shared)
            self._sums[projection] = np.full(layer.count, -1)
            stacks[projection] = self.parts[projection].for_product(memory, np.full(layer.count, -1, dtype=np.int64))
        self._stacks = stacks  # last, so that a read that fails is not half a layer

    def stack(self, projection: str) -> Stack:
        """The projection's matrices; only those of experts in memory have an offset that means anything."""
        return self._stacks[projection]

    def fetch(self, expert: int, projection: str, memory: NDArray[np.uint8], start: int) -> int:
        """Read one expert's codes to `memory` from `start` on, which is a page; compare the checksum.

        Returns
        -------
        int
            Bytes read.
        """
        stack = self.parts[projection]
        first, used = stack.span(expert)
        place = self._places[projection]["codes"]
        target = memory[start : start + room(used)]
        offset = start + self._files[place.path].read_into(target, place.offset + first, used)
        self._stacks[projection].offsets[expert] = offset
        crc, known = zlib.crc32(memory[offset : offset + used].data), self._sums[projection]
        if crc != known[expert]:  # the whole matrix is what the file has a checksum of: slower, so only once
            stack.check_sum(expert, self.packed(expert, projection))
            known[expert] = crc
        return used

    def packed(self, expert: int, projection: str) -> PackedMatrix:
        """Return a view of an expert in memory."""
        memory, stack = self._stacks[projection], self.parts[projection]
        start, used = int(memory.offsets[expert]), stack.span(expert)[1]
        return stack.matrix(expert, torch.from_numpy(memory.codes[start : start + used]))

    def validate(self, expert: int) -> None:
        """Walk an expert's codes, if that was never done; raise FormatError where they are not to be multiplied.

        Not by the reading threads: Numba's kernels are to be started by one thread.
        """
        for projection in self.projections:
            if not self.parts[projection].valid[expert]:
                self.parts[projection].check_codes(expert, self.packed(expert, projection))


def open_layers(model: nn.Module, checkpoint: Checkpoint, files: dict[Path, WeightFile]) -> list[Layer]:
    """Return a model's compressed layers, in the order in which they run; raise SettingError where it has none."""
    found = [module for module in model.modules() if isinstance(module, PackedExperts)]
    if not found:
        raise SettingError("the model has no compressed experts: there is nothing to offload.")
    order = {layer.experts: i for i, layer in enumerate(found[0].family.layers(model.config))}
    layers: list[Layer] = []
    first = 0
    for experts in sorted(found, key=lambda module: order.get(module.layer.experts, 0)):  # 0: a part of the model
        layers.append(Layer(experts, first, checkpoint, files))
        first += experts.num_experts
    return layers


class RamTier(Wanting):
    """Slots in memory for the experts of all layers.

    Parameters
    ----------
    layers : list of Layer
    slots : int
        At most the experts of all layers.
    half_life : float
        As `ExpertCache` takes it.

    Attributes
    ----------
    readers : Readers
        Whoever makes a tier closes them.
    read_bytes, reads : int
        Codes read so far.
    stall_seconds : float
        Time that `wait` took.
    """

    def __init__(self, layers: list[Layer], slots: int, half_life: float) -> None:
        super().__init__()
        self.layers = layers
        self.cache = ExpertCache(sum(layer.experts.num_experts for layer in layers), slots, half_life)
        starts, self.slot_bytes = slot_layout(layers)
        self.read_bytes = self.reads = 0
        self.stall_seconds = 0.0
        self._starts = starts
        self._memory = page_memory(slots * self.slot_bytes)
        self.readers = Readers()
        self._under_way: dict[int, Read] = {}
        self._guessed: set[int] = set()
        self._firsts = np.array([layer.first for layer in layers])

    def find(self, number: int) -> tuple[Layer, int]:
        """Layer of an expert, and which of its experts that is."""
        layer = self.layers[int(np.searchsorted(self._firsts, number, side="right")) - 1]
        return layer, number - layer.first

    def open(self, layer: Layer) -> None:
        self._check_open()
        layer.open(self._memory)

    def ready(self, number: int) -> bool:
        """Return whether an expert can be multiplied."""
        return self.cache.slot(number) >= 0 and number not in self._under_way

    def want(self, numbers: Sequence[int]) -> None:
        """Pin the experts that are there; begin to read the others, as far as slots can be had.

        Raises
        ------
        QMoEError
            A read of an expert that was wanted before has failed, or the readers are closed.
        """
        self._check_open()
        self.collect()
        for number in numbers:
            if self.cache.slot(number) >= 0:
                if (read := self._under_way.get(number)) is not None:
                    read.early |= number not in self._wanted
                    self.readers.hurry(read)
                self._pin(number)
        for number in numbers:
            if self.cache.slot(number) < 0:
                if not self._begin(number, urgent=True):
                    return
                self._pin(number)

    def wait(self, numbers: Sequence[int]) -> None:
        """Wait until one of some experts has arrived, or, where none of them has a slot yet, until one may have.

        Raises
        ------
        QMoEError
            Nothing is under way: it would be for ever. Or, as `want`.
        """
        start = time.perf_counter()
        reads = [self._under_way[number] for number in numbers if number in self._under_way]
        if not (reads or self._under_way):
            raise QMoEError("all slots of the experts' memory are in use. Please report this as a bug.")
        self.readers.wait(reads or list(self._under_way.values()))
        self.stall_seconds += time.perf_counter() - start
        self._check_open()
        self.collect()

    def in_waves(self, layer: Layer, numbers: list[int], compute: Callable[[list[int]], None]) -> None:
        """Call `compute` with experts of a layer, by their numbers in it, as they arrive, until all had their turn."""
        left = numbers
        self.release(but=numbers)  # what else was asked for before the layer ran may hold every slot
        try:
            while left:
                self.want(left)
                ready = [number for number in left if self.ready(number)]
                if not ready:
                    self.wait(left)
                    continue
                own = [number - layer.first for number in ready]
                for expert in own:
                    layer.validate(expert)
                compute(own)
                self.release(ready)
                done = set(ready)
                left = [number for number in left if number not in done]
        except BaseException:
            self.release()
            raise

    def guess(self, numbers: Sequence[int]) -> list[int]:
        """Begin to read experts that the next layer may want, while a quarter of the slots suffices; return which."""
        begun = []
        for number in numbers:
            if len(self._guessed) >= self.cache.slots // 4 or self.cache.unpinned <= len(self._wanted):
                break
            if self.cache.slot(number) < 0 and self._begin(number, urgent=False):
                self._guessed.add(number)
                self.cache.pin(number)
                begun.append(number)
        return begun

    def end_guess(self, wanted: Sequence[int]) -> None:
        """Let go of the guesses; forget those that are not wanted and whose reading has not begun."""
        kept = set(wanted)
        for number in list(self._guessed):
            self.cache.unpin(number)
            read = self._under_way.get(number)
            if number not in kept and read is not None and self.readers.cancel(read):
                self._forget(number)
        self._guessed.clear()

    def warm_up(self) -> None:
        """Begin to read the experts worth most, as long as there are slots."""
        for number in self.cache.hottest():
            if self.cache.slot(number) < 0:
                self.open(self.find(number)[0])
                self._begin(number, urgent=False)

    def _check_open(self) -> None:
        if self.readers.closed:
            raise QMoEError("the runner was closed while its model ran. Run the model again.")

    def _begin(self, number: int, urgent: bool) -> bool:
        given = self.cache.admit(number)
        while given is None:
            idle = (n for n, read in reversed(self._under_way.items()) if not read.urgent)
            if not urgent or not any(self.readers.cancel(self._under_way[n]) and self._forget(n) for n in idle):
                return False
            given = self.cache.admit(number)
        self.cache.pin(number)
        layer, expert = self.find(number)
        base = given[0] * self.slot_bytes

        def work() -> int:
            starts = zip(layer.projections, self._starts, strict=False)
            return sum(layer.fetch(expert, projection, self._memory, base + start) for projection, start in starts)

        read = Read(work, urgent)
        self._under_way[number] = read
        try:
            self.readers.submit(read)
        except BaseException:  # else the slot would never be filled, and never given away
            self._forget(number)
            raise
        return True

    def _forget(self, number: int) -> bool:
        self._under_way.pop(number, None)
        self._wanted.discard(number)
        self._guessed.discard(number)
        self.cache.drop(number)
        return True

    def collect(self) -> None:
        """Take note of the reads that are done; raise what a wanted one ran into.

        Not if it began before it was wanted, in a call that has failed or as a guess: it is then read anew, as the file
        may be whole again.
        """
        failed: QMoEError | None = None
        for number, read in list(self._under_way.items()):
            if not read.done:
                continue
            if read.error is not None:
                failed = read.error if number in self._wanted and not read.early else failed
                self._forget(number)
            else:
                self.reads += 1
                self.read_bytes += read.nbytes
                del self._under_way[number]
                self.cache.unpin(number)
        if failed is not None:
            raise failed


def count_slots(layers: list[Layer], budget: int | None) -> int:
    """Return the slots that a budget in bytes has room for, None for all; raise SettingError for less than one."""
    index = sum(layer.index_bytes for layer in layers)
    experts = sum(layer.experts.num_experts for layer in layers)
    _, size = slot_layout(layers)
    if budget is None:
        return experts
    slots = min((budget - index) // size, experts)
    if slots < 1:
        raise SettingError(
            f"the cache is {budget} bytes; row lengths and levels of all experts take {index}, and one expert "
            f"{size}. Give at least {index + size}."
        )
    return int(slots)


def slot_layout(layers: list[Layer]) -> tuple[list[int], int]:
    """Where in a slot each projection's codes may begin, and the bytes of a slot: as the longest codes need."""
    starts = [0]
    for i in range(max(len(layer.projections) for layer in layers)):
        longest = max(layer.largest(layer.projections[i]) for layer in layers if i < len(layer.projections))
        starts.append(starts[-1] + room(longest))
    assert starts[-1] % PAGE == 0
    return starts[:-1], starts[-1]
