"""One sparse layer: its experts are read, quantised, run and encoded, a group at a time; see layer_waves.py."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qmoe_lite.checkpoint.reader import Checkpoint
from qmoe_lite.coding.codebook import Codebook
from qmoe_lite.coding.packed import PackedMatrix
from qmoe_lite.coding.windows_product import USUAL_BITS
from qmoe_lite.compression.dead_zone import USUAL
from qmoe_lite.compression.dictionaries import Dictionaries
from qmoe_lite.compression.layer_parts import LayerInputs, Linear, Taken, compared, draw
from qmoe_lite.compression.layer_waves import LayerWaves, Solver
from qmoe_lite.compression.rate import GROUP_TOLERANCE, TOLERANCE
from qmoe_lite.compression.settings import Settings
from qmoe_lite.compression.tally import CodebookTally, Solved, Tally, WindowTally, add_group, windows_of
from qmoe_lite.errors import NotFiniteError
from qmoe_lite.models.blocks import MoELayer
from qmoe_lite.models.family import Family, inner
from qmoe_lite.quantization.factors import Factors, factorise_all
from qmoe_lite.quantization.grid import Grid, UniformGrid
from qmoe_lite.quantization.hessian import accumulate, blend, mean, new
from qmoe_lite.quantization.solver import gptq, gptq_shared

CHUNK_TOKENS = 1 << 14  # tokens that go through an expert at a time


class LayerCompressor(LayerWaves):
    """Compresses sparse layers of one model.

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
        self._family, self._checkpoint, self._grid, self._settings = family, checkpoint, grid, settings
        self._config = config
        self.device = torch.device(settings.device)
        self.rate, self.dead_zone, self.each_group = None, None, nullcontext()
        bits = settings.codeword_bits or USUAL_BITS
        self.dictionaries = Dictionaries(bits)

    def groups(self, layer: MoELayer) -> list[range]:
        need = kept = 0
        for stage in layer.stages:
            rows, columns = sum(layer.shapes[name][0] for name in stage), layer.shapes[stage[0]][1]
            need = max(need, kept + 12 * columns * columns + 16 * rows * columns)
            kept = kept or 8 * columns * columns  # the first stage's factors, for another solve
        size = max(1, min(self._settings.group_size, self._settings.group_bytes // need))
        return [range(start, min(start + size, layer.count)) for start in range(0, layer.count, size)]

    def _solver(self, layer: MoELayer, number: int, group: range, seen: LayerInputs | None) -> Solver:
        if seen is None:
            return partial(self._nearest, layer, group)
        return partial(self._solve, layer, group, number, seen, {})

    def _solve_group(
        self,
        layer: MoELayer,
        group: range,
        seen: LayerInputs | None,
        tallies: dict[str, Tally],
        taken: Taken,
        solve: Solver,
    ) -> dict[str, Solved]:
        if self.rate is not None:
            if seen is not None:
                self._begin_dead_zone(solve, layer, group, seen)
            return self._solve_at_rate(solve, tallies, layer, group, taken)
        solved = solve(self._grid)
        add_group(tallies, solved)
        return solved

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
        self,
        solve: Solver,
        tallies: dict[str, Tally],
        layer: MoELayer,
        group: range,
        taken: Taken,
    ) -> dict[str, Solved]:
        """Solve a group with the step that makes the model take its bits; the first and the last layer decide it."""
        rate, grid = self.rate, self._grid
        assert rate is not None
        assert isinstance(grid, UniformGrid)
        if self.dead_zone is not None:
            grid = replace(grid, dead_zone=self.dead_zone.width)
        windows = windows_of(tallies)
        decides = rate.first or rate.done_weights + layer.weights == rate.weights
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
        for name, tally in windows.items():
            tally.keep(solved[name], packed[name])
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
                rides = seen.validation[rows].nonzero()[:CHUNK_TOKENS, 0]
                x, shares = self._gather(seen, rows[rides]), gates[rides, None].to(self.device)
                weights = {name: solved[name].quantized.weight_of(place) for name in layer.projections}
                both = self._linears(layer, expert, weights), self.truth(layer, expert)
                found += compared(*(self.expert(x, matrices) * shares for matrices in both))
            energies.append(found[1] / found[2] if found[2] else 0.0)
        if all(energies):
            zone.begin(*energies)

    def _weights(self, layer: MoELayer, expert: int, projection: str) -> Tensor:
        """Read one matrix, float32 (R, C), to where it is solved."""
        name = self._family.weight_name(layer, expert, projection)
        weight = self._checkpoint.tensor(name).to(self.device).float()
        if not torch.isfinite(weight).all():
            raise NotFiniteError(f"{name} in {self._checkpoint.directory} holds NaN or infinity. Fetch it again.")
        return weight

    def _linears(self, layer: MoELayer, expert: int, weights: dict[str, Tensor]) -> list[Linear]:
        """Return an expert's matrices, those given, with their biases."""
        activation = self._family.activation(self._config, layer.experts)
        return [Linear(weight, self._bias(layer, expert, name), activation) for name, weight in weights.items()]

    def _bias(self, layer: MoELayer, expert: int, projection: str) -> Tensor | None:
        if layer.layout is None or not layer.layout.biased:
            return None
        tensor, rows = layer.layout.place(projection, layer.shapes[projection][0])
        bias = self._checkpoint.tensor(f"{layer.experts}.{tensor}_bias")[expert].to(self.device).float()
        return bias if rows is None else bias[rows]

    def truth(self, layer: MoELayer, expert: int) -> list[Linear]:
        """Return an expert's dense matrices, with their biases."""
        return self._linears(layer, expert, {name: self._weights(layer, expert, name) for name in layer.projections})

    def _group_weights(self, layer: MoELayer, group: range, projection: str) -> Tensor:
        return torch.stack([self._weights(layer, expert, projection) for expert in group])

    def _nearest(self, layer: MoELayer, group: range, grid: Grid) -> dict[str, Solved]:
        def one(name: str) -> Solved:
            quantized = gptq(self._group_weights(layer, group, name), None, grid)
            return Solved(quantized, [0] * len(group), ["nearest"] * len(group), grid)

        return {name: one(name) for name in layer.projections}

    def _solve(
        self,
        layer: MoELayer,
        group: range,
        number: int,
        seen: LayerInputs,
        first: dict[str, Factors],
        grid: Grid,
    ) -> dict[str, Solved]:
        """Quantise a group's projections, the last one for what the quantised first ones put out.

        `first` keeps the factors of the first stage, whose inputs are the same when the group is solved again.
        """
        options = self._settings
        cap = int(options.token_cap * seen.eligible.sum().item() * layer.top_k / layer.count) + 1
        rows_of = []
        for expert in group:
            rows, _ = seen.assigned.of_expert(expert)
            rows_of.append(draw(rows[seen.eligible[rows]], cap, options.seed, number, expert))
        solved: dict[str, Solved] = {}
        for stage in layer.stages:
            columns = layer.shapes[stage[0]][1]
            before = [
                self._linears(layer, expert, {name: solved[name].quantized.weight_of(place) for name in solved})
                for place, expert in enumerate(group)
            ]
            starved = [options.blend_tokens > 0 and len(rows) < columns for rows in rows_of]
            factors = None if solved else first.get(stage[0])
            if factors is None:
                hessians = self._hessians(seen, rows_of, before, starved, columns)
                steps = grid.column_steps
                factors = factorise_all(hessians, None, options.dampening, options.block_size, steps)
                if not solved and self.rate is not None:
                    first[stage[0]] = factors
            weights = [self._group_weights(layer, group, name) for name in stage]
            results = gptq_shared(weights, None, grid, factors=factors)
            for name, quantized in zip(stage, results, strict=True):
                pairs = zip(quantized.hessian_class, starved, strict=True)
                classes = ["blended" if known == "own" and few else known for known, few in pairs]
                tokens = [len(rows) for rows in rows_of]
                solved[name] = Solved(quantized, tokens, classes, grid)
        return solved

    def _hessians(
        self,
        seen: LayerInputs,
        rows_of: list[Tensor],
        before: list[list[Linear]],
        starved: list[bool],
        columns: int,
    ) -> Tensor:
        """Return the Hessians of a group, (E, C, C), or one, (1, C, C), where all experts see the same inputs."""
        if not before[0] and all(torch.equal(rows, rows_of[0]) for rows in rows_of[1:]):
            rows_of = rows_of[:1]
        hessians = []
        of_layer: Tensor | None = None
        for rows, matrices, few in zip(rows_of, before, starved, strict=False):
            parts = (self._gather(seen, rows[i : i + CHUNK_TOKENS]) for i in range(0, len(rows), CHUNK_TOKENS))
            hessian = self._mean_hessian(parts, matrices, len(rows), columns)
            if few:
                if of_layer is None or matrices:  # in front of the first projection it is the same for all
                    sample = seen.sample.to(self.device)
                    of_layer = self._mean_hessian([sample], matrices, len(seen.sample), columns)
                hessian = blend(hessian, of_layer, len(rows), self._settings.blend_tokens)
            hessians.append(hessian)
        return torch.stack(hessians)

    def _mean_hessian(self, parts: Iterable[Tensor], before: list[Linear], tokens: int, columns: int) -> Tensor:
        """Mean over tokens of x x^T, of what the matrices in front make of the inputs; zeros without tokens."""
        hessian = new(columns, device=self.device)
        for x in parts:
            accumulate(hessian, self._inner(x, before) if before else x)
        return mean(hessian, tokens)

    def run(
        self, layer: MoELayer, expert: int, weights_of: dict[str, Tensor], seen: LayerInputs
    ) -> NDArray[np.float64]:
        """Add a quantised expert's outputs to the hidden states; return what `compared` does of validation tokens."""
        matrices = self._linears(layer, expert, weights_of)
        all_rows, all_gates = seen.assigned.of_expert(expert)
        apart = seen.reference[all_rows]
        rows, gates = all_rows[~apart], all_gates[~apart]
        truth: list[Linear] = []
        found = np.zeros(3)
        for start in range(0, len(rows), CHUNK_TOKENS):
            part, weights = rows[start : start + CHUNK_TOKENS], gates[start : start + CHUNK_TOKENS, None]
            x, weights = self._gather(seen, part), weights.to(self.device)
            y = self.expert(x, matrices) * weights
            seen.hidden.add(part, y.cpu())
            rides = seen.validation[part].to(self.device)
            if rides.any():
                truth = truth or self.truth(layer, expert)
                found += compared(y[rides], self.expert(x[rides], truth) * weights[rides])
        if apart.any():
            truth = truth or self.truth(layer, expert)
            rows, gates = all_rows[apart], all_gates[apart, None].to(self.device)
            seen.hidden.add(rows, (self.expert(self._gather(seen, rows), truth) * gates).cpu())
        return found

    def _gather(self, seen: LayerInputs, rows: Tensor) -> Tensor:
        return seen.inputs.gather(rows).to(self.device)

    def expert(self, x: Tensor, matrices: list[Linear]) -> Tensor:
        """Send tokens through the matrices of one expert."""
        return matrices[-1].of(self._inner(x, matrices[:-1]))

    def _inner(self, x: Tensor, matrices: list[Linear]) -> Tensor:
        return inner(matrices[0].activation, [matrix.of(x) for matrix in matrices])
