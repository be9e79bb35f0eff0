"""What the GPU tier needs of a GPU: `CudaDevice` does it by torch's streams and events, tests by lists to do."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from qmoe_lite.coding.codes import Code
from qmoe_lite.coding.dictionary import Dictionary
from qmoe_lite.errors import DeviceError, SettingError
from qmoe_lite.models.experts import PackedExperts

if TYPE_CHECKING:
    from qmoe_lite.cuda.experts import Matrices


class Repack(NamedTuple):
    """Codes on the GPU that are to be laid out in packets; as `cuda.packets.repack` or `repack_windows` takes them."""

    codes: Tensor
    offsets: Tensor
    firsts: Tensor
    starts: Tensor
    words: Tensor
    codebook: Code

    def run(self) -> None:
        """Lay them out, without waiting for the GPU."""
        from qmoe_lite.cuda.packets import repack
        from qmoe_lite.cuda.window_packets import repack_windows

        book = self.codebook
        if isinstance(book, Dictionary):
            repack_windows(*self[:5], book)
        else:
            repack(*self[:5], book)


class Call(Protocol):
    """Tokens on their way through a layer's experts; `cuda.experts.ExpertsCall` is one."""

    def turn(self, slots: dict[int, int], sizes: Sequence[int], activation: Callable[[list[Tensor]], Tensor]) -> None:
        """Send tokens through experts, each of which lies in a slot."""

    def total(self) -> Tensor:
        """Return what all experts that had their turn add up to, float32 (T, C)."""


class Device(Protocol):
    """What the tier needs of a GPU. Events are the device's own objects."""

    name: str
    device: torch.device

    def allocate(self, size: int) -> Tensor:
        """Return bytes of its memory, uint8; raise torch.OutOfMemoryError."""

    def stage(self, size: int) -> Tensor:
        """Return pinned bytes of ours."""

    def fill(self, copies: Sequence[tuple[Tensor, Tensor]], repacks: Sequence[Repack], after: Any) -> Any:
        """Begin to copy from pinned bytes, and then to lay out codes, once the event `after` (or None) has happened.

        Returns the event of its end. Whatever was begun before has ended before.
        """

    def wait(self, event: Any) -> None:
        """Let what is computed from now on wait for an event."""

    def waited(self) -> float | None:
        """Return the seconds for which what was computed waited so far; None where that is not known."""

    def finish(self, event: Any) -> None:
        """Let this thread wait for an event."""

    def mark(self) -> Any:
        """Return the event of the end of all that was given it to compute so far."""

    def begin(
        self, experts: PackedExperts, packets: dict[str, Matrices], x: Tensor, index: Tensor, weights: Tensor
    ) -> Call:
        """Begin to send tokens through a layer's experts there."""


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
            raise SettingError(f"devices has {name}; expected GPUs only, such as cuda:0.") from error
        if self.device.type != "cuda":
            raise SettingError(f"devices has {name}; expected GPUs only, such as cuda:0.")
        if (reason := launch.reason(self.device.index or 0)) is not None:
            raise DeviceError(reason)
        self.device = torch.device("cuda", self.device.index or 0)
        self.name = name
        self._copies: Any = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self._waits: deque[tuple[Any, Any]] = deque()  # events around each wait that may not have ended
        self._waited = 0.0

    def allocate(self, size: int) -> Tensor:
        memory = torch.empty(size, dtype=torch.uint8, device=self.device)
        # torch may give memory of which what it was before is still in use on its own stream
        self._copies.wait_stream(torch.cuda.current_stream(self.device))
        return memory

    def stage(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def fill(self, copies: Sequence[tuple[Tensor, Tensor]], repacks: Sequence[Repack], after: Any) -> Any:
        with torch.cuda.stream(self._copies):
            if after is not None:
                self._copies.wait_event(after)
            for source, target in copies:
                target.copy_(source, non_blocking=True)
            for each in repacks:
                each.run()
            return self._copies.record_event()

    def wait(self, event: Any) -> None:
        if event.query():
            return
        stream = torch.cuda.current_stream(self.device)
        around = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
        around[0].record(stream)
        stream.wait_event(event)
        around[1].record(stream)
        self._waits.append((around[0], around[1]))

    def waited(self) -> float | None:
        while self._waits and self._waits[0][1].query():
            before, after = self._waits.popleft()
            self._waited += before.elapsed_time(after) / 1e3
        return self._waited

    def finish(self, event: Any) -> None:
        event.synchronize()

    def mark(self) -> Any:
        return torch.cuda.current_stream(self.device).record_event()

    def begin(
        self, experts: PackedExperts, packets: dict[str, Matrices], x: Tensor, index: Tensor, weights: Tensor
    ) -> Call:
        return experts.begin_call(packets, x, index, weights)  # type: ignore[no-any-return]
