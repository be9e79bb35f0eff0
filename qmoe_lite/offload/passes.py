"""Passes of a model: which one a thread is in, and the time in which any is under way."""

from __future__ import annotations

import threading
import time
import weakref
from typing import Any

from torch import nn

from qmoe_lite.devices import uncompiled
from qmoe_lite.offload.statistics import Statistics


class Hook:
    """A forward hook that calls a method of its owner, for as long as that lives; a copy of the model has none."""

    def __init__(self, owner: Any, name: str) -> None:
        self._owner = None if owner is None else weakref.ref(owner)
        self._name = name

    @uncompiled  # torch.compile goes around it: a compiled cache would be no cache
    def __call__(self, module: nn.Module, *arguments: Any) -> None:
        owner = None if self._owner is None else self._owner()
        if owner is not None:
            getattr(owner, self._name)(module, *arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return Hook, (None, self._name)


class Passes:
    """Passes of all threads, counted in a runner's statistics; its lock is held by whoever calls.

    Attributes
    ----------
    under_way : int
        Passes that have begun and not ended.
    """

    def __init__(self, statistics: Statistics) -> None:
        self.under_way = 0
        self._statistics = statistics
        self._own = threading.local()  # `number` of the thread's own pass, while it is under way
        self._started = 0.0  # when there came to be one

    def begin(self) -> None:
        """Note that this thread begins a pass."""
        self._statistics.passes += 1
        self._own.number = self._statistics.passes
        if self.under_way == 0:
            self._started = time.perf_counter()
        self.under_way += 1

    def end(self) -> bool:
        """Note that this thread's pass is over; return whether it was in one: what failed before it began ends too."""
        if getattr(self._own, "number", None) is None:
            return False
        self._own.number = None
        self.under_way -= 1
        if self.under_way == 0:
            self._statistics.seconds += time.perf_counter() - self._started
        return True

    @property
    def number(self) -> int:
        """Number of the pass that this thread is in, else of the last one that began."""
        return getattr(self._own, "number", None) or self._statistics.passes
