"""How long work takes on a machine that others may share: the best of a few tries, and how much longer all took."""

from __future__ import annotations

import time
from collections.abc import Callable

import numba
import torch

from qmoe_lite.coding.guards import enter_kernels

_FEWEST, _MOST = 2, 4
_NEAR = 1.1  # the second best try may take so many times the best one's time; else there is one more


class Tries:
    """Times work, the same a few times.

    Parameters
    ----------
    by_processor : bool
        Go by the processor's clock, which others do not slow: right where one thread does everything.
    """

    def __init__(self, *, by_processor: bool) -> None:
        self.by_processor = by_processor
        self._latest = self._clock = self._best = 0.0

    def once(self, work: Callable[[], object]) -> float:
        """Do some work once; return its seconds."""
        begun, used = time.perf_counter(), time.process_time()
        work()
        used, self._latest = time.process_time() - used, time.perf_counter() - begun
        return used if self.by_processor else self._latest

    def best(self, attempt: Callable[[], float]) -> float:
        """Return the best of a few tries; each ends with a call of `once`, and returns what that does."""
        found: list[float] = []
        while len(found) < _FEWEST or (len(found) < _MOST and sorted(found)[1] > _NEAR * min(found)):
            found.append(attempt())
            self._clock += self._latest
        self._best += len(found) * min(found)
        return min(found)

    @property
    def load(self) -> float:
        """By which share all tries took longer, by the clock, than the best of each kind."""
        return max(self._clock / self._best - 1, 0.0) if self._best else 0.0


def one_thread(device: torch.device) -> bool:
    """Return whether one thread of the processor does everything."""
    enter_kernels()
    return device.type == "cpu" and torch.get_num_threads() == numba.get_num_threads() == 1


def median(call: Callable[[], object], device: torch.device, seconds: float = 0.3) -> float:
    """Return the median of several calls after a first one, for about so many seconds."""
    clock = time.process_time if one_thread(device) else time.perf_counter
    call()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < seconds and len(times) < 50):
        begun = clock()
        call()
        if device.type != "cpu":
            torch.cuda.synchronize(device)
        times.append(clock() - begun)
    return sorted(times)[len(times) // 2]
