"""Tuning block by block: experts are to put out what their block lacks of the dense model's output.

What a block of the quantised model would lack of what it puts out for the samples with twins (twins.py), were its
experts dense, is shared among the experts of a token, by the squares of their gates. An expert is to put out what the
dense one does and its share. Its last projection is solved for that, on what the quantised first ones put out, in place
of the dense weights (correction.py). Then, for "block", row steps and column scales of all its projections are trained,
digits frozen (expert_training.py). One expert is in memory at a time, dense and quantised, and none depends on what
became of another.
"""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from qmoe_lite.coding.narrow import rescaled
from qmoe_lite.compression.correction import Correction, Found, Lack
from qmoe_lite.compression.expert_training import Factors, measured, squares, train_expert
from qmoe_lite.compression.layer_parts import LayerInputs, Taken, draw
from qmoe_lite.compression.layer_waves import LayerWaves
from qmoe_lite.compression.list_buffer import ListBuffer
from qmoe_lite.compression.ranks import Ranks
from qmoe_lite.compression.run_samples import TUNED_TOKENS, RunSamples
from qmoe_lite.compression.settings import Settings
from qmoe_lite.compression.tally import Solved
from qmoe_lite.compression.twins import lack_of
from qmoe_lite.compression.waves import borrow
from qmoe_lite.models.blocks import MoELayer
from qmoe_lite.quantization.grid import UniformGrid

_SCALES = torch.bfloat16  # whose values column scales are


class BlockTuning:
    """Tunes the experts of one compression.

    Parameters
    ----------
    runner : LayerWaves
        Runs experts.
    samples : RunSamples
        Some of them with twins.
    settings : Settings
        What is tuned, dampening and borrowed tokens of the Hessians, and the seed.

    Attributes
    ----------
    trains : bool
        Whether experts are trained once they are solved.
    """

    def __init__(self, runner: LayerWaves, samples: RunSamples, settings: Settings) -> None:
        self._runner, self._samples, self._settings = runner, samples, settings
        self.trains = settings.tune == "block"

    def begin(self, layer: MoELayer, number: int, seen: LayerInputs, ranks: Ranks) -> LayerInputs:
        """Send the reference samples through a layer's dense experts; return the others, with what tunes them.

        Parameters
        ----------
        layer : MoELayer
            Which one.
        number : int
            Its place among the sparse layers.
        seen : LayerInputs
            Of all samples.
        ranks : Ranks
            Of the run; all of them call it together.
        """
        begun = time.perf_counter()
        lack = lack_of(self._runner, layer, seen, self._samples, ranks)
        left = replace(seen, assigned=seen.assigned.without(seen.reference))
        tuner = LayerTuner(self._runner, layer, number, left, lack, self._settings)
        tuner.seconds = time.perf_counter() - begun
        return replace(left, tuner=tuner)


class LayerTuner:
    """Tunes the experts of one layer, or those of this rank's group.

    Parameters
    ----------
    runner : LayerWaves
        Runs experts.
    layer : MoELayer
        Whose.
    number : int
        Its place among the sparse layers.
    seen : LayerInputs
        What the experts are given.
    lack : Lack
        Of the block.
    settings : Settings
        As for `BlockTuning`.

    Attributes
    ----------
    seconds : float
        That tuning took, and no group was told.
    """

    def __init__(
        self, runner: LayerWaves, layer: MoELayer, number: int, seen: LayerInputs, lack: Lack, settings: Settings
    ) -> None:
        self._runner, self._layer, self._number, self._seen = runner, layer, number, seen
        self._lack, self._settings, self._trains = lack, settings, settings.tune == "block"
        self._begun: tuple[int, Correction] | None = None  # of the expert that is under way
        self._found = dict[int, Found]()
        self._latest: tuple[dict[str, Solved], dict[str, Solved], list[Found]] | None = None
        self._remembers = False  # what it tuned last: a rank solves and tunes its group before its turn
        self.seconds = 0.0

    def lent(self, seen: LayerInputs, wanted: list[Tensor], ranks: Ranks) -> LayerTuner:
        lack = self._lack
        if isinstance(lack.buffer, ListBuffer):
            lack = replace(lack, buffer=borrow(lack.buffer, [rows[rows < lack.rows] for rows in wanted], ranks))
        other = LayerTuner(self._runner, self._layer, self._number, seen, lack, self._settings)
        other.seconds, self.seconds, other._remembers = self.seconds, 0.0, True
        return other

    def take(self, expert: int, rows: Tensor, x: Tensor, inside: Tensor) -> None:
        begun = time.perf_counter()
        if self._begun is None or self._begun[0] != expert:
            truth = self._runner.truth(self._layer, expert)
            of_expert = self._seen.assigned.of_expert(expert)
            tells = not self._trains  # which measures it in the end
            self._begun = expert, Correction(self._runner, truth, self._lack, *of_expert, tells=tells)
        self._begun[1].take(rows, x, inside)
        self.seconds += time.perf_counter() - begun

    def aim(self, expert: int, weights: Tensor, hessian: Tensor) -> None:
        if self._begun is None or self._begun[0] != expert:  # nobody gave it tokens
            return
        begun, settings = time.perf_counter(), self._settings
        found = self._begun[1].add_to(weights, hessian, settings.dampening, settings.blend_tokens)
        self._begun = None
        if found is not None:
            self._found[expert] = found
        self.seconds += time.perf_counter() - begun

    def tune(self, group: range, solved: dict[str, Solved], taken: Taken) -> dict[str, Solved]:
        latest, self._latest = self._latest, None
        if latest is None or latest[0] is not solved:
            latest = None  # its memory is free before the other's is needed
            latest = solved, *self._tuned(group, solved)
        if self._remembers:
            self._latest = latest
        _, tuned, found = latest
        taken.tuning_seconds += self.seconds
        self.seconds = 0.0
        for one in found:
            taken.tuning_goal += one.goal
            taken.tuning_before += one.before
            taken.tuning_after += one.after
        return tuned

    def _tuned(self, group: range, solved: dict[str, Solved]) -> tuple[dict[str, Solved], list[Found]]:
        """Return a group as it is to be, and what its experts lacked."""
        if not self._trains:
            return solved, [self._found[expert] for expert in group if expert in self._found]
        begun = time.perf_counter()
        tuned = {name: _copied(each) for name, each in solved.items()}
        found = [self._tune_expert(place, expert, tuned) for place, expert in enumerate(group)]
        self.seconds += time.perf_counter() - begun
        return tuned, [one for one in found if one is not None]

    def _tune_expert(self, place: int, expert: int, solved: dict[str, Solved]) -> Found | None:
        """Change the levels and scales of one expert in place, if training it won something; None without tokens."""
        layer, seen, device = self._layer, self._seen, self._runner.device
        rows, gates = seen.assigned.of_expert(expert)
        seed = self._settings.seed, self._number, expert
        chosen = torch.nonzero((rows < self._lack.rows) & seen.eligible[rows])[:, 0]
        chosen = draw(chosen, TUNED_TOKENS, *seed)
        if not len(chosen):
            return None
        rows, gates = rows[chosen], gates[chosen]
        truth = self._runner.truth(layer, expert)
        goal = torch.cat([self._runner.outputs(truth, seen, *part) for part in self._runner.chunks(rows, gates)])
        energy = squares(goal[measured(len(goal))])  # of the dense expert's outputs alone
        if self._lack.buffer is not None:
            goal += self._lack.share(rows, gates.square()).to(device)
        weights = {name: each.quantized.weight_of(place) for name, each in solved.items()}
        linears = self._runner.linears(layer, expert, weights)
        found = train_expert(
            layer,
            dict(zip(layer.projections, linears, strict=True)),
            solved[layer.projections[0]].quantized.column_scales is not None,
            seen.inputs.gather(rows).to(device),
            gates[:, None].to(device),
            goal,
            seed,
            partial(_settled, solved, place),
        )
        better = found.after < found.before
        for name, each in solved.items() if better else ():
            quantized, first = each.quantized, layer.first_of_stage(name)
            assert each.grid is not None
            dtype = each.grid.level_dtype or torch.float32
            quantized.levels[place] = (quantized.levels[place] * found.rows[name][:, None]).to(dtype)
            if quantized.column_scales is not None:
                quantized.column_scales[place] = (quantized.column_scales[place] * found.columns[first]).to(_SCALES)
        return Found(energy, found.before, found.after if better else found.before)


def _settled(solved: dict[str, Solved], place: int, rows: Factors, columns: Factors) -> tuple[Factors, Factors]:
    """Return factors of an expert's rows and columns that lead to steps and scales as they are stored."""
    found: tuple[Factors, Factors] = {}, {}
    for name, each in solved.items():
        if not isinstance(each.grid, UniformGrid):
            return rows, columns
        dtype, scales = each.grid.level_dtype or torch.float32, each.quantized.column_scales
        found[0][name] = _stored_factors(each.quantized.levels[place, :, 0], rows[name], dtype)
        if name in columns and scales is not None:
            found[1][name] = _stored_factors(scales[place], columns[name], _SCALES)
    return found


def _stored_factors(scales: Tensor, factors: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.where(scales > 0, rescaled(scales, factors, dtype) / scales, 1.0)


def _copied(solved: Solved) -> Solved:
    """Return a projection whose levels and column scales may be changed."""
    found, scales = solved.quantized, solved.quantized.column_scales
    scales = None if scales is None else scales.clone()
    return solved._replace(quantized=replace(found, levels=found.levels.clone(), column_scales=scales))
