"""Which experts hold the slots of a cache, and which one gives way: bookkeeping only, no tensor.

An expert is worth the sum over its uses of 2^(-age / half_life): frequency that fades. A half-life of 0 is LRU (the
last use decides), an infinite one is LFU (all uses count alike); `qmoe bench offload` compares them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

HALF_LIFE = 32.0  # passes of the model; the best of those that `qmoe bench offload` compares
_SHORTEST = 1e-6  # stands for 0: an older use never outweighs a younger one


class ExpertCache:
    """Slots of equal size, and the experts that hold them.

    Parameters
    ----------
    experts : int
        Experts of all layers together; each is known by its number from 0.
    slots : int
        At least 1.
    half_life : float
        In passes of the model, after which a use counts half.
    """

    def __init__(self, experts: int, slots: int, half_life: float = HALF_LIFE) -> None:
        self.slots = slots
        self.uses: NDArray[np.float64] = np.zeros(experts)
        self._slot_of = np.full(experts, -1, dtype=np.int64)
        self._owner = np.full(slots, -1, dtype=np.int64)
        self._pins = np.zeros(slots, dtype=np.int64)
        self._free = list(range(slots - 1, -1, -1))
        # log2 of the worth at time 0; it grows with time as fast for every expert, so that it is compared as it is
        self._worth = np.full(experts, -math.inf)
        self._half_life = max(half_life, _SHORTEST)
        self._now = 0

    def __len__(self) -> int:
        """Experts that hold a slot."""
        return self.slots - len(self._free)

    def slot(self, expert: int) -> int:
        """Slot of an expert, -1 if it has none."""
        return int(self._slot_of[expert])

    def tick(self) -> None:
        """Let one pass of the model go by."""
        self._now += 1

    def use(self, expert: int) -> None:
        """Count one use, now."""
        self.uses[expert] += 1
        self._worth[expert] = np.logaddexp2(self._worth[expert], self._now / self._half_life)

    def remember(self, uses: NDArray[np.float64]) -> None:
        """Start from the uses of an earlier run, as if all had been made just before this one."""
        self.uses[:] = uses
        with np.errstate(divide="ignore"):
            self._worth[:] = np.log2(uses)

    def admit(self, expert: int) -> tuple[int, int] | None:
        """Assign a slot to an expert that has none.

        Returns
        -------
        tuple or None
            The slot, and the expert that lost it or -1; None if all slots are pinned.
        """
        loser = -1
        if self._free:
            slot = self._free.pop()
        else:
            slot = int(np.argmin(np.where(self._pins > 0, math.inf, self._worth[self._owner])))
            if self._pins[slot]:
                return None
            loser = int(self._owner[slot])
            self._slot_of[loser] = -1
        self._owner[slot], self._slot_of[expert] = expert, slot
        return slot, loser

    def drop(self, expert: int) -> None:
        """Take an expert's slot away, pinned or not."""
        slot = int(self._slot_of[expert])
        self._slot_of[expert], self._owner[slot], self._pins[slot] = -1, -1, 0
        self._free.append(slot)

    def pin(self, expert: int) -> None:
        """Keep an expert in its slot until it is unpinned as often."""
        self._pins[self._slot_of[expert]] += 1

    def unpin(self, expert: int) -> None:
        """Take back one `pin`."""
        slot = self._slot_of[expert]
        assert slot >= 0, "an expert without a slot would unpin the last one's"
        self._pins[slot] -= 1

    @property
    def unpinned(self) -> int:
        """Slots that `admit` may give away."""
        return int((self._pins == 0).sum())

    def hottest(self) -> list[int]:
        """As many experts as there are slots, those worth most; none that was never used."""
        order = np.argsort(-self._worth, kind="stable")[: self.slots]
        return [int(expert) for expert in order if self._worth[expert] > -math.inf]


class Wanting:
    """Pins the experts that it wants in a cache, each once, however often they are wanted.

    Attributes
    ----------
    cache : ExpertCache
    """

    cache: ExpertCache

    def __init__(self) -> None:
        self._wanted: set[int] = set()

    def release(self, numbers: Iterable[int] | None = None, but: Iterable[int] = ()) -> None:
        """Let go of wanted experts, by default of all but some."""
        for number in self._wanted.difference(but) if numbers is None else numbers:
            if number in self._wanted:
                self._wanted.discard(number)
                self.cache.unpin(number)

    def _pin(self, number: int) -> None:
        if number not in self._wanted:
            self._wanted.add(number)
            self.cache.pin(number)


def replay(experts: int, slots: int, half_life: float, passes: Iterable[list[list[int]]]) -> float:
    """Share of hits that a cache would have had on recorded routing.

    Parameters
    ----------
    experts, slots, half_life
        As for `ExpertCache`.
    passes : iterable of list of list of int
        For each pass of the model, for each layer in turn, the experts asked for.
    """
    cache = ExpertCache(experts, slots, half_life)
    hits = asked = 0
    for layers in passes:
        cache.tick()
        for wanted in layers:
            asked += len(wanted)
            for expert in wanted:
                cache.use(expert)
            pinned = [expert for expert in wanted if cache.slot(expert) >= 0]
            hits += len(pinned)
            for expert in pinned:
                cache.pin(expert)
            for expert in wanted:
                if cache.slot(expert) < 0:
                    if cache.admit(expert) is None:
                        break
                    cache.pin(expert)
                    pinned.append(expert)
            for expert in pinned:
                cache.unpin(expert)
    return hits / max(asked, 1)
