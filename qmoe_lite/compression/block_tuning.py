"""Tuning block by block: experts are solved and trained to put out what their block lacks of the dense model's output.

Some calibration samples go through the dense model too; these are their twins. What a block of the quantised model
would lack of what it puts out for the twins, were its experts dense, is shared among the experts of a token, by the
squares of their gates. An expert is to put out what the dense one does and its share. Its last projection is solved for
that, on what the quantised first ones put out, in place of the dense weights; then row steps and column scales of all
its projections are trained, digits frozen. One expert is in memory at a time, dense and quantised, and none depends
on what became of another.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qmoe_lite.compression.expert_runner import CHUNK_TOKENS, ExpertRunner
from qmoe_lite.compression.expert_training import train_expert
from qmoe_lite.compression.layer_parts import LayerInputs, Linear, Taken, draw
from qmoe_lite.compression.list_buffer import ListBuffer
from qmoe_lite.compression.run_samples import TUNED_TOKENS, RunSamples
from qmoe_lite.compression.settings import Settings
from qmoe_lite.compression.tally import Solved
from qmoe_lite.models.blocks import MoELayer
from qmoe_lite.quantization.hessian import added

_SCALES = torch.bfloat16  # whose values column scales are


class BlockTuning:
    """Tunes the experts of one compression.

    Parameters
    ----------
    runner : ExpertRunner
        Runs experts.
    samples : RunSamples
        Some of them with twins.
    settings : Settings
        Dampening and borrowed tokens of the Hessians, and the seed.
    """

    def __init__(self, runner: ExpertRunner, samples: RunSamples, settings: Settings) -> None:
        self._runner, self._samples, self._settings = runner, samples, settings

    def __call__(self, layer: MoELayer, number: int, seen: LayerInputs) -> LayerInputs:
        """Send the reference samples through a layer's dense experts; return the others, with what tunes them.

        Parameters
        ----------
        layer : MoELayer
            Which one.
        number : int
            Its place among the sparse layers.
        seen : LayerInputs
            Of all samples.
        """
        tuner = _LayerTuner(self._runner, layer, number, seen, self._samples, self._settings)
        return replace(seen, assigned=seen.assigned.without(seen.reference), tuner=tuner)


class _LayerTuner:
    """Tunes the experts of one layer; when it is made, the reference samples go through the dense ones."""

    def __init__(
        self,
        runner: ExpertRunner,
        layer: MoELayer,
        number: int,
        seen: LayerInputs,
        samples: RunSamples,
        settings: Settings,
    ) -> None:
        self._runner, self._layer, self._seen, self._settings = runner, layer, seen, settings
        self._seed = settings.seed, number
        self._rows = samples.twins * (len(seen.eligible) // len(samples.all))  # of samples with twins, the first ones
        rows, gates = seen.assigned.rows, seen.assigned.weights
        self._squares = torch.zeros(len(seen.eligible)).index_add(0, rows, gates.square())
        # where a block does more with its experts' outputs than to add them, each has its own dense output as goal
        begun = time.perf_counter()
        hidden = seen.hidden
        assert isinstance(hidden, ListBuffer)
        self._lack = hidden.another(samples.twins) if seen.adds else None
        if self._lack is not None:
            self._lack.zero()
        for expert in range(layer.count):
            self._run_dense(expert, self._lack)
        if self._lack is not None:
            for sample in range(samples.twins):
                one, twin = (slice(i, i + 1) for i in (sample, samples.first_twin + sample))
                self._lack.write(one, self._lack.read(one) + hidden.read(twin) - hidden.read(one))
        self._seconds = time.perf_counter() - begun

    def _run_dense(self, expert: int, lack: ListBuffer | None) -> None:
        """Add a dense expert's outputs to the twins, and take them off what the samples that have twins lack."""
        truth = self._runner.truth(self._layer, expert)
        self._runner.run_reference(expert, truth, self._seen)
        if lack is None:
            return
        rows, gates = self._seen.assigned.of_expert(expert)
        own = rows < self._rows
        for part, weights in _chunks(rows[own], gates[own]):
            lack.add(part, -self._runner.outputs(truth, self._seen, part, weights).cpu())

    def aim(
        self, group: range, rows_of: list[Tensor], before: Sequence[list[Linear]], weights: Tensor, hessians: Tensor
    ) -> Tensor:
        """Return the weights that a group's last projections are to be solved for.

        Parameters
        ----------
        group : range
            Its experts.
        rows_of : list of int64 tensor
            Tokens of each that enter its Hessian.
        before : sequence of list of Linear
            Each one's first projections, quantised.
        weights : float32 tensor, shape (E, R, C)
            Of the dense last projections.
        hessians : float32 tensor, shape (E, C, C)
            Of what the first projections put out.

        Notes
        -----
        W + E[missing h^T] (H + dampening)^-1, the least squares with the solver's own Hessian and dampening.
        """
        begun = time.perf_counter()
        each = zip(group, rows_of, before, weights, hessians, strict=True)
        aimed = [weight + self._correction(expert, rows, first, weight, h) for expert, rows, first, weight, h in each]
        self._seconds += time.perf_counter() - begun
        return torch.stack(aimed)

    def _correction(self, expert: int, rows: Tensor, before: list[Linear], weight: Tensor, hessian: Tensor) -> Tensor:
        """Return what one expert's last projection is to be changed by before it is solved."""
        missing, settings, columns = torch.zeros_like(weight), self._settings, len(hessian)
        if not len(rows):
            return missing
        truth = self._runner.truth(self._layer, expert)
        last = truth[-1]
        for part in torch.split(rows, CHUNK_TOKENS):
            x, inside = self._runner.inside(before, self._seen, part)
            missing += (self._runner.expert(x, truth) - last.of(inside)).T @ inside / len(rows)
        if self._lack is not None and len(own := rows[rows < self._rows]):
            all_rows, all_gates = self._seen.assigned.of_expert(expert)
            shares = all_gates[torch.searchsorted(all_rows, own)] / self._squares[own]
            for part, share in _chunks(own, shares):
                lack = (self._lack.gather(part) * share[:, None]).to(weight.device)
                missing += lack.T @ self._runner.inside(before, self._seen, part)[1] / len(own)
        if len(rows) < columns:  # its Hessian is that of some tokens more, for which nothing is known to be missing
            missing *= len(rows) / (len(rows) + settings.blend_tokens)
        dampened = hessian + added(hessian, settings.dampening) * torch.eye(columns, device=hessian.device)
        factor, info = torch.linalg.cholesky_ex(dampened)
        found = torch.cholesky_solve(missing.T, factor).T
        return found if info.item() == 0 and found.isfinite().all() else torch.zeros_like(weight)

    def tune(self, group: range, solved: dict[str, Solved], taken: Taken) -> dict[str, Solved]:
        """Return a group that was solved with other levels and column scales, rounded as they are stored.

        Parameters
        ----------
        group : range
            Its experts.
        solved : dict, projection to Solved
            Not changed.
        taken : Taken
            Gets the time, and what the experts lacked before and afterwards.
        """
        begun = time.perf_counter()
        tuned = {name: _copied(each) for name, each in solved.items()}
        for place, expert in enumerate(group):
            self._tune_expert(place, expert, tuned, taken)
        taken.tuning_seconds += time.perf_counter() - begun + self._seconds
        self._seconds = 0.0
        return tuned

    def _tune_expert(self, place: int, expert: int, solved: dict[str, Solved], taken: Taken) -> None:
        """Change the levels and scales of one expert in place, if training it won something."""
        layer, seen, device = self._layer, self._seen, self._runner.device
        rows, gates = seen.assigned.of_expert(expert)
        chosen = torch.nonzero((rows < self._rows) & seen.eligible[rows])[:, 0]
        chosen = draw(chosen, TUNED_TOKENS, *self._seed, expert)
        if not len(chosen):
            return
        rows, gates = rows[chosen], gates[chosen]
        truth = self._runner.truth(layer, expert)
        goal = torch.cat([self._runner.outputs(truth, seen, *part) for part in _chunks(rows, gates)])
        taken.tuning_goal += float(goal.double().square().sum())
        if self._lack is not None:
            share = gates.square() / self._squares[rows]
            goal += (self._lack.gather(rows) * share[:, None]).to(device)
        weights = {name: each.quantized.weight_of(place) for name, each in solved.items()}
        linears = self._runner.linears(layer, expert, weights)
        found = train_expert(
            layer,
            dict(zip(layer.projections, linears, strict=True)),
            solved[layer.projections[0]].quantized.column_scales is not None,
            seen.inputs.gather(rows).to(device),
            gates[:, None].to(device),
            goal,
            (*self._seed, expert),
        )
        better = found.after < found.before
        taken.tuning_before += found.before
        taken.tuning_after += found.after if better else found.before
        for name, each in solved.items() if better else ():
            quantized, first = each.quantized, layer.first_of_stage(name)
            assert each.grid is not None
            dtype = each.grid.level_dtype or torch.float32
            quantized.levels[place] = (quantized.levels[place] * found.rows[name][:, None]).to(dtype)
            if quantized.column_scales is not None:
                quantized.column_scales[place] = (quantized.column_scales[place] * found.columns[first]).to(_SCALES)


def _copied(solved: Solved) -> Solved:
    """Return a projection whose levels and column scales may be changed."""
    found, scales = solved.quantized, solved.quantized.column_scales
    scales = None if scales is None else scales.clone()
    return solved._replace(quantized=replace(found, levels=found.levels.clone(), column_scales=scales))


def _chunks(rows: Tensor, gates: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(torch.split(rows, CHUNK_TOKENS), torch.split(gates, CHUNK_TOKENS), strict=True)
