"""The experts of a model's sparse layers: read, put into Hessians, and run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qmoe_lite.checkpoint.reader import Checkpoint
from qmoe_lite.compression.layer_parts import LayerInputs, Linear, compared, last_sample
from qmoe_lite.compression.settings import Settings
from qmoe_lite.errors import NotFiniteError
from qmoe_lite.models.blocks import MoELayer
from qmoe_lite.models.family import Family, inner
from qmoe_lite.quantization.hessian import accumulate, all_finite, blend, mean, new

GATHERED_TOKENS = 1 << 14  # that enter a Hessian at a time where no matrix stands in front of it
KEPT_BYTES = 1 << 28  # of what an expert's tokens are in front of its last projection


class ExpertRunner:
    """Reads and runs experts of one model.

    Parameters
    ----------
    family : Family
        Of the model.
    config : transformers configuration
        Of the model.
    checkpoint : Checkpoint
        Where the experts' weights are read.
    settings : Settings
        How to compress.

    Attributes
    ----------
    device : torch device
        Where experts are solved and run.
    chunk : int
        Tokens that go through an expert at a time.
    """

    def __init__(self, family: Family, config: Any, checkpoint: Checkpoint, settings: Settings) -> None:
        self._family, self._config, self._checkpoint, self._settings = family, config, checkpoint, settings
        self.device = torch.device(settings.device)
        self.chunk = settings.chunk

    def _weights(self, layer: MoELayer, expert: int, projection: str) -> Tensor:
        """Read one matrix, float32 (R, C), to where it is solved."""
        name = self._family.weight_name(layer, expert, projection)
        weight = self._checkpoint.tensor(name).to(self.device).float()
        if not all_finite(weight):
            raise NotFiniteError(f"{name} in {self._checkpoint.directory} holds NaN or infinity. Fetch it again.")
        return weight

    def linears(self, layer: MoELayer, expert: int, weights: dict[str, Tensor]) -> list[Linear]:
        """Return an expert's matrices, those given, with their biases."""
        activation = self._family.activation(self._config, layer.experts)
        products = torch.bfloat16 if self._settings.products == "bfloat16" else None
        return [
            Linear(weight, self._bias(layer, expert, name), activation, products) for name, weight in weights.items()
        ]

    def _bias(self, layer: MoELayer, expert: int, projection: str) -> Tensor | None:
        if layer.layout is None or not layer.layout.biased:
            return None
        tensor, rows = layer.layout.place(projection, layer.shapes[projection][0])
        bias = self._checkpoint.tensor(f"{layer.experts}.{tensor}_bias")[expert].to(self.device).float()
        return bias if rows is None else bias[rows]

    def truth(self, layer: MoELayer, expert: int) -> list[Linear]:
        """Return an expert's dense matrices, with their biases."""
        return self.linears(layer, expert, {name: self._weights(layer, expert, name) for name in layer.projections})

    def _group_weights(self, layer: MoELayer, group: Sequence[int], projection: str) -> Tensor:
        weights = torch.empty(len(group), *layer.shapes[projection], device=self.device)
        for place, expert in enumerate(group):  # one at a time: no second copy of all
            weights[place] = self._weights(layer, expert, projection)
        return weights

    def _hessians(
        self,
        seen: LayerInputs,
        rows_of: list[Tensor],
        before: Sequence[list[Linear]],
        starved: list[bool],
        columns: int,
        aimed: Sequence[tuple[int, Tensor]] = (),
    ) -> Tensor:
        """Return the Hessians of a group, (E, C, C), or one, (1, C, C), where all experts see the same inputs.

        `before` are the matrices in front of each expert's; `aimed` are the experts and their weights, which the tuner
        changes to what they are to be solved for.
        """
        if not before[0] and all(torch.equal(rows, rows_of[0]) for rows in rows_of[1:]):
            rows_of = rows_of[:1]
        hessians = torch.empty(len(rows_of), columns, columns, device=self.device)
        of_layer: Tensor | None = None
        for place, (rows, matrices, few) in enumerate(zip(rows_of, before, starved, strict=False)):
            hessian = new(columns, device=self.device)
            for part in torch.split(rows, self.chunk if matrices else GATHERED_TOKENS):
                x = self.gather(seen, part)
                inside = self.inner(x, matrices) if matrices else x
                accumulate(hessian, inside)
                if aimed and seen.tuner is not None:
                    seen.tuner.take(aimed[place][0], part, x, inside)
            hessian = mean(hessian, len(rows))
            if few:
                if of_layer is None or matrices:  # in front of the first projection it is the same for all
                    of_layer = self._of_layer(seen, matrices, columns)
                hessian = blend(hessian, of_layer, len(rows), self._settings.blend_tokens)
            if aimed and seen.tuner is not None:
                seen.tuner.aim(*aimed[place], hessian)
            hessians[place] = hessian
        return hessians

    def _hessian_and_inner(
        self,
        seen: LayerInputs,
        expert: int,
        drawn: Tensor,
        matrices: list[Linear],
        few: bool,
        columns: int,
        aimed: Tensor | None = None,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Return what `_hessians` does for one expert, (1, C, C), and what `run` can go on with.

        The latter is what the matrices make of chunks of its tokens, by their first one, as far as there is room.
        `aimed` are its weights, which the tuner changes to what they are to be solved for.
        """
        rows, _ = _of_samples(seen, expert, reference=False)
        kept, hessian = dict[int, Tensor](), new(columns, device=self.device)
        wanted, room = torch.isin(rows, drawn), KEPT_BYTES // (4 * columns)
        for start in range(0, len(rows), self.chunk):
            part, chosen = rows[start : start + self.chunk], wanted[start : start + self.chunk]
            if start + len(part) <= room:
                x = self.gather(seen, part)
                inside = kept[start] = self.inner(x, matrices)
                if not chosen.all():
                    x, inside = x[chosen], inside[chosen]
            else:
                x = self.gather(seen, part[chosen])
                inside = self.inner(x, matrices)
            accumulate(hessian, inside)
            if aimed is not None and seen.tuner is not None:
                seen.tuner.take(expert, part[chosen], x, inside)
        hessian = mean(hessian, len(drawn))
        if few:
            of_layer = self._of_layer(seen, matrices, columns)
            hessian = blend(hessian, of_layer, len(drawn), self._settings.blend_tokens)
        if aimed is not None and seen.tuner is not None:
            seen.tuner.aim(expert, aimed, hessian)
        return hessian[None], kept

    def _of_layer(self, seen: LayerInputs, before: list[Linear], columns: int) -> Tensor:
        """Mean over the layer's sample of x x^T, of what the matrices in front make of some of it, if there are any."""
        sample, hessian = seen.sample, new(columns, device=self.device)
        if before:
            some = last_sample(len(sample), columns)
            sample = sample[torch.arange(some) * len(sample) // some]
        for x in torch.split(sample.to(self.device), self.chunk if before else GATHERED_TOKENS):
            accumulate(hessian, self.inner(x, before) if before else x)
        return mean(hessian, len(sample))

    def run(
        self,
        layer: MoELayer,
        expert: int,
        weights_of: dict[str, Tensor],
        seen: LayerInputs,
        kept: dict[int, Tensor] | None = None,
    ) -> NDArray[np.float64]:
        """Add a quantised expert's outputs to the hidden states; return what `compared` does of validation tokens.

        `kept` is what `_hessian_and_inner` kept, and is emptied.
        """
        matrices, kept = self.linears(layer, expert, weights_of), {} if kept is None else kept
        rows, gates = _of_samples(seen, expert, reference=False)
        truth: list[Linear] = []
        found = np.zeros(3)
        for start in range(0, len(rows), self.chunk):
            part, weights = rows[start : start + self.chunk], gates[start : start + self.chunk, None]
            weights = weights.to(self.device)
            x = kept.pop(start) if start in kept else self.inner(self.gather(seen, part), matrices[:-1])
            y = matrices[-1].of(x) * weights
            seen.hidden.add(part, y.cpu())
            rides = seen.validation[part]
            if rides.any():
                truth, some = truth or self.truth(layer, expert), rides.to(self.device)
                x = self.gather(seen, part[rides])
                found += compared(y[some], self.expert(x, truth) * weights[some])
        if len(_of_samples(seen, expert, reference=True)[0]):
            self.run_reference(expert, truth or self.truth(layer, expert), seen)
        return found

    def run_reference(self, expert: int, truth: list[Linear], seen: LayerInputs) -> None:
        """Add a dense expert's outputs to the hidden states of the reference samples."""
        for rows, gates in self.chunks(*_of_samples(seen, expert, reference=True)):
            seen.hidden.add(rows, self.outputs(truth, seen, rows, gates).cpu())

    def chunks(self, rows: Tensor, gates: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield an expert's tokens, and their gates, as many as go through it at a time."""
        return zip(torch.split(rows, self.chunk), torch.split(gates, self.chunk), strict=True)

    def outputs(self, matrices: list[Linear], seen: LayerInputs, rows: Tensor, gates: Tensor) -> Tensor:
        """Return what an expert adds to some tokens."""
        return self.expert(self.gather(seen, rows), matrices) * gates[:, None].to(self.device)

    def gather(self, seen: LayerInputs, rows: Tensor) -> Tensor:
        """Return the inputs of some tokens."""
        return seen.inputs.gather(rows).to(self.device)

    def gates_of(self, seen: LayerInputs, expert: int, rows: Tensor) -> Tensor:
        """Return what an expert's outputs for some of its tokens are multiplied by."""
        own, gates = seen.assigned.of_expert(expert)
        return gates[torch.searchsorted(own, rows)].to(self.device)

    def expert(self, x: Tensor, matrices: list[Linear]) -> Tensor:
        """Send tokens through the matrices of one expert."""
        return matrices[-1].of(self.inner(x, matrices[:-1]))

    def inner(self, x: Tensor, matrices: list[Linear]) -> Tensor:
        """Return what the matrices in front of an expert's last one make of tokens."""
        return inner(matrices[0].activation, [matrix.of(x) for matrix in matrices])


def _of_samples(seen: LayerInputs, expert: int, *, reference: bool) -> tuple[Tensor, Tensor]:
    """Return the rows and routing weights of an expert's tokens: of the reference samples, or of all others."""
    rows, gates = seen.assigned.of_expert(expert)
    chosen = seen.reference[rows] == reference
    return rows[chosen], gates[chosen]
