"""One sparse layer: its experts are read, quantised, run and encoded, a group at a time; see layer_waves.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qmoe_lite.coding.codebook import Codebook
from qmoe_lite.coding.packed import PackedMatrix
from qmoe_lite.compression.dead_zone import USUAL
from qmoe_lite.compression.group_sizes import groups_of
from qmoe_lite.compression.importance import importance_of
from qmoe_lite.compression.layer_parts import LayerInputs, Linear, MadeInTurn, Taken, Tuner, compared, draw
from qmoe_lite.compression.layer_waves import LayerWaves, Solver
from qmoe_lite.compression.rate import GROUP_TOLERANCE, TOLERANCE
from qmoe_lite.compression.tally import CodebookTally, Solved, Tally, WindowTally, add_group, keep_group, windows_of
from qmoe_lite.models.blocks import MoELayer
from qmoe_lite.quantization.factors import Factors, factorise_all
from qmoe_lite.quantization.grid import Grid, Quantized, UniformGrid, joined
from qmoe_lite.quantization.solver import gptq, gptq_shared

_DEAD_ZONE_TOKENS = 1 << 14  # of an expert, at most, that show what a dead zone does


class LayerCompressor(LayerWaves):
    """Compresses sparse layers of one model; made as `LayerWaves` is."""

    def groups(self, layer: MoELayer) -> list[range]:
        return groups_of(layer, self._settings)

    def _solver(
        self,
        layer: MoELayer,
        number: int,
        group: Sequence[int],
        seen: LayerInputs | None,
        sums: list[NDArray[np.float64]] | None,
    ) -> Solver:
        if seen is None:
            return partial(self._nearest, layer, group)
        eligible = seen.eligible
        cap = int(self._settings.token_cap * eligible.sum().item() * layer.top_k / layer.count) + 1
        rows_of = []
        for expert in group:
            rows, _ = seen.assigned.of_expert(expert)
            rows_of.append(draw(rows[eligible[rows]], cap, self._settings.seed, number, expert))
        uniform = isinstance(self._grid, UniformGrid)
        importance = importance_of(self, layer, group, seen, rows_of) if uniform else {}
        return partial(self._solve, layer, group, seen, rows_of, importance, {}, sums)

    def _solve_group(
        self,
        layer: MoELayer,
        group: range,
        seen: LayerInputs | None,
        tallies: dict[str, Tally],
        taken: Taken,
        solve: Solver,
    ) -> dict[str, Solved]:
        tuner = None if seen is None else seen.tuner
        if self.rate is not None:
            if seen is not None:
                self._begin_dead_zone(solve, layer, group, seen)
            return self._solve_at_rate(solve, tallies, layer, group, taken, tuner)
        solved = solve(self._grid)
        if tuner is not None:
            solved = tuner.tune(group, solved, taken)
        add_group(tallies, solved)
        return solved

    def _decides(self, layer: MoELayer) -> bool:
        """Return whether a layer's groups are solved until they take their bits: the first and the last one's are."""
        rate = self.rate
        return rate is not None and (rate.first or rate.done_weights + layer.weights == rate.weights)

    def _solved_once(self, layer: MoELayer) -> bool:
        trains = self.tuning is not None and self.tuning.trains
        return self.device.type == "cpu" and not self._decides(layer) and not trains

    def _tally(self, layer: MoELayer, projection: str) -> Tally:
        if isinstance(self._grid, UniformGrid):
            return WindowTally(layer, projection, self._grid.level_dtype or torch.float32, self.dictionaries)
        return CodebookTally(layer, projection, self._grid, self._codebook)

    def _codebook(self, counts: list[int], sample: np.ndarray) -> Codebook:
        """The recipe's codebook, for the digits of one projection."""
        bits = self._settings.codeword_bits
        if self._settings.recipe == "paper":
            return Codebook.paper()
        return Codebook.choose(counts, sample) if bits is None else Codebook.fit(counts, bits)

    def _solve_at_rate(
        self, solve: Solver, tallies: dict[str, Tally], layer: MoELayer, group: range, taken: Taken, tuner: Tuner | None
    ) -> dict[str, Solved]:
        """Solve a group with the step that makes the model take its bits; the first and the last layer decide it."""
        rate, grid = self.rate, self._grid
        assert rate is not None
        assert isinstance(grid, UniformGrid)
        if self.dead_zone is not None:
            grid = replace(grid, dead_zone=self.dead_zone.width)
        windows = windows_of(tallies)
        decides = self._decides(layer)
        weights = len(group) * layer.weights // layer.count
        left = layer.weights - taken.weights
        aim = (rate.aim * layer.weights - taken.bits) / left
        tried = list[tuple[float, float]]()
        best: tuple[float, dict[str, Solved], dict[str, list[PackedMatrix]]] | None = None
        while True:
            solved = solve(replace(grid, step=rate.step))
            packed = {name: tally.encode(solved[name]) for name, tally in windows.items()}
            bits = sum(tally.bits(packed[name]) for name, tally in windows.items()) / weights
            tried.append((rate.step, bits))
            if best is None or abs(bits - aim) < abs(best[0] - aim):
                best = bits, solved, packed
            dead = not any(each.quantized.digits.any() for each in solved.values())
            tolerance = TOLERANCE if weights == left else GROUP_TOLERANCE
            step = rate.corrected(tried, aim, tolerance) if decides and not dead else None
            if step is None:
                break
            rate.step = step
        bits, solved, packed = best
        rate.step = next(step for step, found in tried if found == bits)
        taken.tells, taken.dead = taken.tells or not dead, taken.dead or dead
        taken.weights += weights
        taken.bits += (aim if dead else bits) * weights  # zeros take no bits, whatever the step, and nobody gets theirs
        if tuner is not None:
            solved = tuner.tune(group, solved, taken)
            packed = {name: tally.encode(solved[name]) for name, tally in windows.items()}
        keep_group(windows, solved, packed)
        return solved

    def _begin_dead_zone(self, solve: Solver, layer: MoELayer, group: range, seen: LayerInputs) -> None:
        """Solve the first group without and with the usual dead zone, for what each does to its experts' outputs."""
        zone, rate = self.dead_zone, self.rate
        if zone is None or zone.known or rate is None or not rate.first or not seen.validation.any():
            return
        assert isinstance(self._grid, UniformGrid)
        energies = []
        for width in (0.0, USUAL):
            solved = solve(replace(self._grid, step=rate.step, dead_zone=width))
            found = np.zeros(3)
            for place, expert in enumerate(group):
                rows, gates = seen.assigned.of_expert(expert)
                rides = seen.validation[rows].nonzero()[:_DEAD_ZONE_TOKENS, 0]
                weights = {name: solved[name].quantized.weight_of(place) for name in layer.projections}
                both = self.linears(layer, expert, weights), self.truth(layer, expert)
                for part in self.chunks(rows[rides], gates[rides]):
                    found += compared(*(self.outputs(matrices, seen, *part) for matrices in both))
            energies.append(found[1] / found[2] if found[2] else 0.0)
        if all(energies):
            zone.begin(*energies)

    def _linears_of(self, layer: MoELayer, group: Sequence[int], solved: dict[str, Solved], place: int) -> list[Linear]:
        """Return the matrices of an expert of a group that were solved."""
        return self.linears(layer, group[place], {name: solved[name].quantized.weight_of(place) for name in solved})

    def _nearest(self, layer: MoELayer, group: Sequence[int], grid: Grid) -> dict[str, Solved]:
        def one(name: str) -> Solved:
            quantized = gptq(self._group_weights(layer, group, name), None, grid)
            return Solved(quantized, [0] * len(group), ["nearest"] * len(group), grid)

        return {name: one(name) for name in layer.projections}

    def _solve(
        self,
        layer: MoELayer,
        group: Sequence[int],
        seen: LayerInputs,
        rows_of: list[Tensor],
        importance: dict[str, Tensor],
        first: dict[str, Factors],
        sums: list[NDArray[np.float64]] | None,
        grid: Grid,
    ) -> dict[str, Solved]:
        """Quantise a group's projections, the last one for what the quantised first ones put out.

        `rows_of` are the tokens that enter each expert's Hessian, `importance` is that of outputs, by projection.
        `first` keeps the factors of the first stage, whose inputs are the same when the group is solved again. A group
        that is not has `sums`: its experts' outputs are added as they are solved, and to it what `run` returns.
        """
        options = self._settings
        solved: dict[str, Solved] = {}
        for stage in layer.stages:
            columns = layer.shapes[stage[0]][1]
            before = MadeInTurn(len(group), partial(self._linears_of, layer, group, dict(solved)))
            starved = [options.blend_tokens > 0 and len(rows) < columns for rows in rows_of]
            if solved and sums is not None:
                factors = None  # the first stage's: not needed any more, and as large as its Hessians
                solved |= self._solve_and_run(layer, group, seen, rows_of, importance, starved, solved, sums, grid)
                break
            factors, aimed = None if solved else first.get(stage[0]), dict[str, Tensor]()
            if factors is None:
                if solved and seen.tuner is not None:
                    aimed[stage[0]] = self._group_weights(layer, group, stage[0])
                each = [pair for of_all in aimed.values() for pair in zip(group, of_all, strict=True)]
                hessians = self._hessians(seen, rows_of, before, starved, columns, each)
                factors = factorise_all(hessians, None, options.dampening, options.block_size, grid.column_steps)
                del hessians
                if not solved and self.rate is not None and sums is None:
                    first[stage[0]] = factors
            for name in stage:
                weights = aimed.pop(name) if name in aimed else self._group_weights(layer, group, name)
                quantized, *_ = gptq_shared([weights], None, grid, factors=factors, importance=[importance.get(name)])
                solved[name] = Solved.of(quantized, rows_of, starved, grid)
        return solved

    def _solve_and_run(
        self,
        layer: MoELayer,
        group: Sequence[int],
        seen: LayerInputs,
        rows_of: list[Tensor],
        importance: dict[str, Tensor],
        starved: list[bool],
        solved: dict[str, Solved],
        sums: list[NDArray[np.float64]],
        grid: Grid,
    ) -> dict[str, Solved]:
        """Quantise the last projection of one expert after another, and run each.

        What an expert's tokens are in front of it is worked out once, for its Hessian and for the outputs.
        """
        options, (name,), parts = self._settings, layer.stages[-1], list[Quantized]()
        columns = layer.shapes[name][1]
        for place, expert in enumerate(group):
            weights = {each: solved[each].quantized.weight_of(place) for each in solved}
            before = self.linears(layer, expert, weights)
            last = self._group_weights(layer, group[place : place + 1], name)
            of_expert = seen, expert, rows_of[place], before, starved[place], columns
            hessian, kept = self._hessian_and_inner(*of_expert, None if seen.tuner is None else last[0])
            factors = factorise_all(hessian, None, options.dampening, options.block_size, grid.column_steps)
            counts = importance[name][place : place + 1] if name in importance else None
            parts += gptq_shared([last], None, grid, factors=factors, importance=[counts])
            weights[name] = parts[-1].weight_of(0)
            sums.append(self.run(layer, expert, weights, seen, kept))
        return {name: Solved.of(joined(parts), rows_of, starved, grid)}
