"""What a compression tells while it runs: a `Progress` after each group of experts, and a line of JSON in a log."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from qmoe_lite.compression.settings import Progress
from qmoe_lite.models.blocks import MoELayer

_RECENT = 16  # groups whose mean time stands for those to come


class Teller:
    """Tells of a run's events.

    Parameters
    ----------
    progress : callable or None
        Is given each `Progress`.
    log : Path or None
        File that gets one JSON object a line, as each event happens; where it cannot be written, the run goes on
        without it.
    before : callable or None
        Is given the number of calibration samples before the work begins.

    Notes
    -----
    Every line has "time", seconds since 1970, and "event": "start" (again after an interruption), "note", "group",
    "layer" when its last group is done, "end", or "stopped" with the kind of what stopped it. A group's line
    has what `Progress` has.
    """

    def __init__(
        self,
        progress: Callable[[Progress], None] | None,
        log: Path | None,
        before: Callable[[int | None], None] | None = None,
    ) -> None:
        self._progress, self._log, self._before = progress, log, before
        self._groups: list[int] = []
        self._known: list[float] = []  # seconds of groups and of what lies between two layers, of this run alone
        self._between: list[float] = []
        self._mark = time.perf_counter()
        self._tokens, self._spent = 0.0, 0.0
        self._begun = False

    def __call__(self, event: Progress) -> None:
        """Tell of something that is no finished group."""
        if self._progress is not None:
            self._progress(event)
        if self._begun:
            self.write("note", place=event.place, warning=event.warning)

    def begin(self, samples: int | None, groups: list[int]) -> None:
        """Tell that the work is about to begin, of so many samples and groups of each layer; it may yet be refused."""
        self._groups = groups
        if self._before is not None:
            self._before(samples)

    def started(self, resumed: list[str], **facts: Any) -> None:
        """Log that the work has begun; a log of other work that has this name is replaced."""
        if self._log is not None and not resumed:
            with suppress(OSError):
                self._log.unlink(missing_ok=True)
        self._begun = True
        self.write("start", resumed=len(resumed), layers=len(self._groups), groups=sum(self._groups), **facts)
        self._mark = time.perf_counter()

    def of_layers(self, event: Progress) -> None:
        """Tell how far what comes before the first group is, by an event that counts layers."""
        self(replace(event, done=0, total=sum(self._groups), place=f"{event.place} ({event.done} of {event.total})"))

    def rest(self) -> None:
        """Note that what was done until now is not what lies between two layers."""
        self._lap()

    def layer(self, number: int, layer: MoELayer, tokens: int) -> Callable[[int, float | None, bool], None]:
        """Note that the dense part that leads to a layer is done.

        Parameters
        ----------
        number : int
            Of the sparse layer.
        layer : MoELayer
            It.
        tokens : int
            That the layer's experts get, a token counted for each of its experts.

        Returns
        -------
        callable
            Tells of a finished group: to be called with their number, the held-out error so far, and whether the group
            was solved now, or before the run was interrupted.
        """
        self._between.append(self._lap())
        return partial(self._group, number, layer, tokens)

    def _group(self, number: int, layer: MoELayer, tokens: int, done: int, error: float | None, solved: bool) -> None:
        groups, seconds = self._groups[number], self._lap()
        if solved:
            self._known.append(seconds)
            self._tokens, self._spent = self._tokens + tokens / groups, self._spent + seconds
        finished = sum(self._groups[:number]) + done
        event = Progress(
            finished,
            sum(self._groups),
            f"{layer.block}, expert group {done} of {groups}{'' if solved else ', solved before'}",
            block=layer.block,
            group=done,
            groups=groups,
            tokens_per_second=self._tokens / self._spent if tokens and self._spent else None,
            seconds_left=self._left(finished, number),
            held_out_error=error,
            memory_bytes=resident_bytes(),
        )
        if self._progress is not None:
            self._progress(event)
        known = asdict(event)
        del known["warning"]
        self.write("group", seconds=round(seconds, 3), **known)
        if done == groups:
            self.write("layer", layer=layer.experts, held_out_error=error)

    def _lap(self) -> float:
        before, self._mark = self._mark, time.perf_counter()
        return self._mark - before

    def _left(self, finished: int, number: int) -> float | None:
        """Seconds that are left: as many as the recent groups took, and the blocks in between; None before any."""
        if not self._known:
            return None
        others = self._known[1:] or self._known  # the first one of a run is solved several times
        layers = len(self._groups) - number - 1
        between = mean(self._between) if self._between else 0.0
        return (sum(self._groups) - finished) * mean(others[-_RECENT:]) + layers * between

    def __enter__(self) -> Teller:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if self._begun:
            self.write("end") if kind is None else self.write("stopped", by=kind.__name__)

    def write(self, event: str, **facts: Any) -> None:
        """Add a line to the log."""
        if self._log is None:
            return
        with suppress(OSError), self._log.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": round(time.time(), 3), "event": event, **facts}) + "\n")


def resident_bytes() -> int | None:
    """Bytes of memory that this process has now and that belong to no file; None where the system does not say."""
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) << 10
    return None
