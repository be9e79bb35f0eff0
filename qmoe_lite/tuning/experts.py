"""TunedExperts: a layer of packed experts whose rows and columns are multiplied by factors that can be trained."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from qmoe_lite.checkpoint.format import checksum, tensor_name
from qmoe_lite.checkpoint.stack import ExpertStack
from qmoe_lite.coding.dictionary import Dictionary
from qmoe_lite.coding.narrow import repack_scales, unpack_scales
from qmoe_lite.models.cpu_dispatch import product, run_stretches
from qmoe_lite.models.experts import PackedExperts
from qmoe_lite.models.routing import Assignment, in_order


class TunedExperts(nn.Module):
    """Stands where a `PackedExperts` stood, and computes what it would with other steps and scales.

    Its parameters are the factors' logarithms, 0 at first: `rows` of each projection, (E, R), and, where the code is a
    dictionary, `columns` of each stage's first projection, (E, C). Digits stay as they are, and scales above 0.

    Parameters
    ----------
    experts : PackedExperts
        Not changed; factors are on its device.
    """

    def __init__(self, experts: PackedExperts) -> None:
        super().__init__()
        self._packed = [experts]  # in a list: its buffers are no part of this module
        layer = experts.layer
        device = experts.stack(layer.projections[0]).parts["codes"].device
        self.rows, self.columns = nn.ParameterDict(), nn.ParameterDict()
        for name, (rows, columns) in layer.shapes.items():
            self.rows[name] = nn.Parameter(torch.zeros(layer.count, rows, device=device))
            if layer.first_of_stage(name) == name and isinstance(experts.codebooks[name], Dictionary):
                self.columns[name] = nn.Parameter(torch.zeros(layer.count, columns, device=device))

    @property
    def packed(self) -> PackedExperts:
        """The experts as they are stored."""
        return self._packed[0]

    def forward(self, hidden_states: Tensor, *routing: Tensor, **named: Tensor) -> Tensor:
        """Send each token through its experts; arguments and result as `PackedExperts.forward`."""
        count = self.packed.layer.count
        assigned = Assignment.group(*self.packed.family.routing(in_order(routing, named)), count)
        return run_stretches(self._run, hidden_states, assigned, count).to(hidden_states.dtype)

    def _run(self, experts: list[int], tokens: Tensor, bounds: list[int]) -> Tensor:
        parts = zip(experts, pairwise(bounds), strict=True)
        return torch.cat([self._run_expert(expert, tokens[start:end]) for expert, (start, end) in parts])

    def _run_expert(self, expert: int, x: Tensor) -> Tensor:
        first, (last,) = self.packed.layer.stages
        return self._multiply(expert, last, self.packed.activate([self._multiply(expert, name, x) for name in first]))

    def _multiply(self, expert: int, projection: str, x: Tensor) -> Tensor:
        first = self.packed.layer.first_of_stage(projection)
        if first in self.columns:
            x = x * self.columns[first][expert].exp()
        y = product(self.packed.packed(expert, projection), x) * self.rows[projection][expert].exp()
        bias = self.packed.bias(expert, projection)
        return y if bias is None else (y + bias).to(y.dtype)

    @torch.no_grad()
    def stored(self) -> dict[str, Tensor]:
        """Return the tensors that the factors change, on the CPU, rounded as stored: levels, scales, checksums.

        Their names are those of the whole model's tensors. Where these take few bits, the factors become what
        leads to them: what is computed from then on is what a reader will compute.
        """
        layer = self.packed.layer
        changed: dict[str, Tensor] = {}
        stacks: dict[str, ExpertStack] = {}
        for name in layer.projections:
            stack = self.packed.stack(name)
            parts = {part: tensor.cpu() for part, tensor in stack.parts.items()}
            own = {"levels": self._rounded(stack, "levels", self.rows[name])}
            if name in self.columns:
                own["column_scales"] = self._rounded(stack, "column_scales", self.columns[name])
            first = stacks.get(layer.first_of_stage(name))
            stacks[name] = ExpertStack(stack.name, stack.experts, stack.shape, stack.codebook, parts | own, first=first)
            own["checksums"] = torch.empty_like(parts["checksums"])
            for expert in range(layer.count):
                self.packed.packed(expert, name)  # checked, if nothing has asked for it yet
                start, used = stacks[name].span(expert)
                own["checksums"][expert] = checksum(stacks[name].matrix(expert, parts["codes"][start : start + used]))
            changed |= {tensor_name(stack.name, part): tensor for part, tensor in own.items()}
        return changed

    def _rounded(self, stack: ExpertStack, part: str, factors: Tensor) -> Tensor:
        """Return steps or scales times the exponentials of factors, which may be changed, as they are stored."""
        stored, known, times = stack.parts[part].cpu(), stack.held[part].float().cpu(), factors.exp().cpu()
        if stored.dtype != torch.uint8:
            return (known * times.view(*times.shape, *[1] * (known.dim() - 2))).to(stored.dtype)
        known = known.view(times.shape)
        packed = repack_scales(stored, known * times)
        found = unpack_scales(packed, factors.shape[1]).float()
        factors.copy_(torch.where(known > 0, found / known, 1.0).log())
        return packed
