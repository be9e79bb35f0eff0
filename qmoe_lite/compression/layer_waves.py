"""In which order the groups of a layer are solved, kept and run: in waves, a group for each rank.

What a group is solved with may follow from what those before it took: the step, where the layer decides on it, the dead
zone, the dictionary. So the ranks of a wave take turns; but until its turn comes each solves its group as it would if
nothing changed, and where nothing has, that is its solution.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from itertools import zip_longest
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qmoe_lite.checkpoint.format import tensor_name
from qmoe_lite.checkpoint.reader import Checkpoint
from qmoe_lite.coding.windows_product import USUAL_BITS
from qmoe_lite.compression.dead_zone import DeadZone
from qmoe_lite.compression.dictionaries import Dictionaries
from qmoe_lite.compression.expert_runner import ExpertRunner
from qmoe_lite.compression.freed import return_freed
from qmoe_lite.compression.groups import Group, GroupLog, read_record, record_of
from qmoe_lite.compression.layer_parts import LayerInputs, LayerResult, Taken
from qmoe_lite.compression.ranks import ALONE, Ranks
from qmoe_lite.compression.rate import RateControl
from qmoe_lite.compression.settings import Settings
from qmoe_lite.compression.tally import Solved, Tally, add_group, keep_group, windows_of
from qmoe_lite.compression.waves import give_back, lend, waves
from qmoe_lite.models.blocks import MoELayer
from qmoe_lite.models.family import Family
from qmoe_lite.quantization.grid import Grid, UniformGrid

Solver = Callable[[Grid], dict[str, Solved]]  # of a group of experts


class Tuning(Protocol):
    """What tunes the experts of a compression: see `block_tuning`; `trains` says whether once they are solved too."""

    trains: bool

    def begin(self, layer: MoELayer, number: int, seen: LayerInputs, ranks: Ranks) -> LayerInputs:
        """Return what a layer's experts are given, with what tunes them; all ranks call it together."""


class LayerWaves(ExpertRunner, ABC):
    """Compresses the groups of a layer in their order; how one group is solved is its subclass's.

    Parameters
    ----------
    family : Family
        Of the model.
    config : transformers configuration
        Of the model.
    checkpoint : Checkpoint
        Where the experts' weights are read.
    grid : Grid
        Levels that a row may take.
    settings : Settings
        How to compress.
    """

    def __init__(self, family: Family, config: Any, checkpoint: Checkpoint, grid: Grid, settings: Settings) -> None:
        super().__init__(family, config, checkpoint, settings)
        self._grid = grid
        self.rate: RateControl | None = None  # of a uniform grid that is to take so many bits
        self.dead_zone: DeadZone | None = None  # of a uniform grid whose own was not asked for
        # is entered for a group of each rank, and left when they are kept
        self.each_group: AbstractContextManager[Any] = nullcontext()
        self.tuning: Tuning | None = None
        self.dictionaries = Dictionaries(settings.codeword_bits or USUAL_BITS)

    @abstractmethod
    def groups(self, layer: MoELayer) -> list[range]:
        """Split a layer's experts into groups that fit the memory."""

    @abstractmethod
    def _solved_once(self, layer: MoELayer) -> bool:
        """Return whether a group's first solve is its last, and its experts come one after another, as on the CPU."""

    @abstractmethod
    def _tally(self, layer: MoELayer, projection: str) -> Tally:
        """Return what keeps one projection."""

    @abstractmethod
    def _solver(
        self,
        layer: MoELayer,
        number: int,
        group: Sequence[int],
        seen: LayerInputs | None,
        sums: list[NDArray[np.float64]] | None,
    ) -> Solver:
        """Return what quantises a group by a grid; with `sums` it runs its experts too, and adds what `run` returns."""

    @abstractmethod
    def _solve_group(
        self,
        layer: MoELayer,
        group: range,
        seen: LayerInputs | None,
        tallies: dict[str, Tally],
        taken: Taken,
        solve: Solver,
    ) -> dict[str, Solved]:
        """Quantise a group, and add it to the tallies."""

    def compress(
        self,
        layer: MoELayer,
        number: int,
        seen: LayerInputs | None,
        group_done: Callable[[int, float | None, bool], None],
        kept: GroupLog | None = None,
        ranks: Ranks = ALONE,
    ) -> LayerResult | None:
        """Quantise and encode all experts of a layer; add their outputs to `seen.hidden`.

        Parameters
        ----------
        layer : MoELayer
            Which one.
        number : int
            Its place among the sparse layers; with the seed, it decides which tokens are drawn.
        seen : LayerInputs or None
            None rounds to nearest.
        group_done : callable
            Called with the number of finished groups, the held-out error so far, if there is one, and whether the
            group was solved now.
        kept : GroupLog, optional
            Groups that an interrupted run solved; those that are solved now are added. Not used where weights are
            rounded to nearest, which takes no longer than to read what came of it.
        ranks : Ranks, optional
            Of the run; all of them call it together.

        Returns
        -------
        LayerResult or None
            None on all ranks but the first.
        """
        kept = None if seen is None else kept
        if seen is not None and self.tuning is not None:
            seen = self.tuning.begin(layer, number, seen, ranks)
        tallies, found, taken, done = self._tallies(layer), np.zeros(3), Taken(), 0
        all_waves = list(waves(self.groups(layer), ranks))
        for wave, following in zip_longest(all_waves, all_waves[1:], fillvalue=list[range]()):
            self._read_ahead(layer, following[ranks.rank : ranks.rank + 1])
            with nullcontext() if seen is None else self.each_group:
                if not ranks.first:  # which of them knows all groups
                    tallies = self._tallies(layer, tallies)
                known = ranks.share(partial(self._read, kept, number, wave, ranks))
                lent = None if seen is None else lend(seen, wave, ranks)
                sums = list[NDArray[np.float64]]()
                solved, taken = self._solve_wave(layer, number, wave, lent, tallies, taken, known, kept, sums, ranks)
                if seen is not None and lent is not None:
                    if solved and not sums:
                        sums += self._run_group(layer, wave[ranks.rank], solved, lent)
                    give_back(seen, lent, wave, ranks)
                now = [each is None for each in known]
                del solved, known, lent  # else they are there while the next group is solved
                return_freed()
                for of_group, solved_now in zip(ranks.gather(sums)[: len(wave)], now, strict=True):
                    found, done = sum(of_group, found), done + 1
                    group_done(done, found[0] / found[2] if found[2] else None, solved_now)
        return self._finish(layer, tallies, found, taken) if ranks.first else None

    def _read_ahead(self, layer: MoELayer, groups: Sequence[Sequence[int]]) -> None:
        """Let the disk work while a group is solved: the system reads this rank's next one."""
        names = partial(self._family.weight_name, layer)
        self._checkpoint.will_need(names(expert, each) for of in groups for expert in of for each in layer.projections)

    def _run_group(
        self, layer: MoELayer, group: Sequence[int], solved: dict[str, Solved], seen: LayerInputs
    ) -> list[NDArray[np.float64]]:
        """Run the quantised experts of a group; return what `run` does of each."""
        found = []
        for place, expert in enumerate(group):
            weights = {name: solved[name].quantized.weight_of(place) for name in layer.projections}
            found.append(self.run(layer, expert, weights, seen))
        return found

    def _tallies(self, layer: MoELayer, before: dict[str, Tally] | None = None) -> dict[str, Tally]:
        """Return empty tallies, which go on with the dictionaries of those before."""
        tallies = {name: self._tally(layer, name) for name in layer.projections}
        for name, tally in windows_of(before or {}).items():
            windows_of(tallies)[name].dictionary = tally.dictionary
        return tallies

    def _read(self, kept: GroupLog | None, number: int, wave: list[range], ranks: Ranks) -> list[Group | None]:
        """Return the groups that were kept; after the first that was not, no other was."""
        found: list[Group | None] = [None] * len(wave)
        device = self.device if ranks.count == 1 else torch.device("cpu")  # others have other devices
        for place, group in enumerate(wave):
            found[place] = None if kept is None else kept.read(number, group, device)
            if found[place] is None:
                break
        return found

    def _solve_wave(
        self,
        layer: MoELayer,
        number: int,
        wave: list[range],
        seen: LayerInputs | None,
        tallies: dict[str, Tally],
        taken: Taken,
        known: list[Group | None],
        kept: GroupLog | None,
        sums: list[NDArray[np.float64]],
        ranks: Ranks,
    ) -> tuple[dict[str, Solved], Taken]:
        """Solve the groups of a wave, and keep them; return this rank's, empty for none, and what all have taken.

        Where its experts are run as they are solved, `sums` gets what `run` returns of each.
        """
        solve: Solver | None = None
        solved, after, own = dict[str, Solved](), dict[str, Any](), ranks.rank
        if own < len(wave):
            if (before := known[own]) is not None:
                solved = before.to(self.device).solved
            else:
                once = seen is not None and self._solved_once(layer)
                solve = self._solver(layer, number, wave[own], seen, sums if once else None)
                solve = solve if ranks.count == 1 else _Latest(solve)
        for place, (group, before) in enumerate(zip(wave, known, strict=True)):
            turn = place if before is None else 0
            if turn == own and before is not None:
                taken = self._take_up(before, tallies)
            elif turn == own and solve is not None:
                solved = self._solve_group(layer, group, seen, tallies, taken, solve)
                after = self._known(taken)
            elif turn < own and solve is not None:
                self._solve_ahead(solve, wave[own], seen, tallies)
            if ranks.count > 1:
                taken = self._go_on(ranks.of(turn, self._state(taken, tallies)), tallies)
        parcel = None
        if not ranks.first and solve is not None:
            packed = {name: tally.give() for name, tally in windows_of(tallies).items()}
            parcel = record_of(wave[own], Group(solved, after)), packed
        for group, before, came in zip(wave, known, ranks.collect(parcel), strict=False):
            if came is not None:
                other = read_record(came[0], group, torch.device("cpu"))
                keep_group(tallies, other.solved, came[1])
                if kept is not None:
                    kept.append(number, came[0])
            elif before is None and kept is not None:
                kept.write(number, group, Group(solved, after))
        return solved, taken

    def _solve_ahead(self, solve: Solver, group: range, seen: LayerInputs | None, tallies: dict[str, Tally]) -> None:
        """Solve a group before its turn, with what is known until then."""
        grid = self._grid
        if self.rate is not None and isinstance(grid, UniformGrid):
            width = grid.dead_zone if self.dead_zone is None else self.dead_zone.width
            grid = replace(grid, step=self.rate.step, dead_zone=width)
        solved = solve(grid)
        if seen is not None and seen.tuner is not None:
            solved = seen.tuner.tune(group, solved, Taken())
        for name, tally in windows_of(tallies).items():
            if tally.dictionary is not None:
                tally.encode(solved[name])

    def _known(self, taken: Taken) -> dict[str, Any]:
        """Return what is known after a group, as plain values."""
        rate, zone = self.rate, self.dead_zone
        return {"taken": asdict(taken), "rate": rate and rate.to_json(), "dead_zone": zone and zone.to_json()}

    def _take_up(self, known: Group, tallies: dict[str, Tally]) -> Taken:
        """Go on after a group that was solved before, as if it had been solved now; return what the groups took."""
        add_group(tallies, known.solved, together=self.rate is not None)
        return self._recall(known.after)

    def _recall(self, after: dict[str, Any]) -> Taken:
        if self.rate is not None:
            self.rate = RateControl(**after["rate"])
        if self.dead_zone is not None:
            self.dead_zone = DeadZone(**after["dead_zone"])
        return Taken(**after["taken"])

    def _state(self, taken: Taken, tallies: dict[str, Tally]) -> dict[str, Any]:
        """Return what the next group's rank must know."""
        used = {name: tally.dictionary for name, tally in windows_of(tallies).items()}
        return {**self._known(taken), "known": self.dictionaries.known, "used": used}

    def _go_on(self, state: dict[str, Any], tallies: dict[str, Tally]) -> Taken:
        """Go on after a group of another rank; return what the groups have taken."""
        for dictionary in state["known"]:
            self.dictionaries.use(dictionary)
        for name, tally in windows_of(tallies).items():
            if tally.dictionary is None:
                tally.dictionary = state["used"][name]
        return self._recall(state)

    def _finish(
        self, layer: MoELayer, tallies: dict[str, Tally], found: NDArray[np.float64], taken: Taken
    ) -> LayerResult:
        """Put together what was found of a layer, and choose what the next one is solved with."""
        tensors: dict[str, Tensor] = {}
        codebooks: dict[str, dict[str, Any]] = {}
        for name, tally in tallies.items():
            stored, codebooks[name] = tally.finish()
            tensors |= {tensor_name(f"{layer.experts}.{name}", part): tensor for part, tensor in stored.items()}
        reports = [tally.report() for tally in tallies.values()]
        if self.rate is not None:
            stored_bits = 8 * sum(tensor.nbytes for tensor in tensors.values())
            self.rate.finish_layer(
                layer.weights, max(stored_bits, taken.bits) if taken.dead else stored_bits, taken.tells
            )
        wrong, energy, right = found.tolist()
        # experts that make up for what is missing put out more than the dense ones: that says nothing of the dead zone
        if self.dead_zone is not None and self.dead_zone.known and right and self.tuning is None:
            self.dead_zone.finish_layer(energy / right)
        return LayerResult(tensors, codebooks, reports, wrong / right if right else None, taken.tuning)


class _Latest:
    """A solver that need not solve again what it solved last."""

    def __init__(self, solve: Solver) -> None:
        self._solve = solve
        self._latest: tuple[Grid, dict[str, Solved]] | None = None

    def __call__(self, grid: Grid) -> dict[str, Solved]:
        if self._latest is None or self._latest[0] != grid:
            self._latest = None  # its memory is free before the other's is needed
            self._latest = grid, self._solve(grid)
        return self._latest[1]
