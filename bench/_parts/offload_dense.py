"""Peers of `qmoe bench offload`: the same model with its experts in bfloat16, in memory or cached from disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qmoe_lite.checkpoint.reader import Checkpoint
from qmoe_lite.checkpoint.weight_file import WeightFile, room
from qmoe_lite.models.building import skeleton
from qmoe_lite.models.family import family_of
from qmoe_lite.offload.cache import HALF_LIFE
from qmoe_lite.offload.ram_tier import RamTier


class _DenseLayer:
    """A layer's experts in bfloat16, as `RamTier` asks for them."""

    def __init__(
        self, experts: nn.Module, place: Any, first: int, checkpoint: Checkpoint, files: dict[Path, WeightFile]
    ) -> None:
        self.experts, self.first, self.projections, self.place = experts, first, place.projections, place
        self._files, self._checkpoint = files, checkpoint
        self._memory: Any = None
        self.offsets = {name: np.zeros(place.count, dtype=np.int64) for name in place.projections}

    def open(self, memory: Any) -> None:
        self._memory = memory

    def largest(self, projection: str) -> int:
        rows, columns = self.place.shapes[projection]
        return 2 * int(rows * columns)

    def fetch(self, expert: int, projection: str, memory: Any, start: int) -> int:
        where = self._checkpoint.place(f"{self.place.experts}.{expert}.{projection}.weight")
        target = memory[start : start + room(where.length)]
        self.offsets[projection][expert] = start + self._files[where.path].read_into(target, where.offset, where.length)
        return where.length

    def matrix(self, expert: int, projection: str) -> Tensor:
        start = int(self.offsets[projection][expert])
        flat = torch.from_numpy(self._memory[start : start + self.largest(projection)])
        return flat.view(torch.bfloat16).view(self.place.shapes[projection])


class DenseCache(nn.Module):
    """Peer: bfloat16 experts from disk through a cache of the same bytes, policy and reading threads as ours."""

    def __init__(self, number: int, place: Any) -> None:
        super().__init__()
        self.num_experts, self.number, self.place = place.count, number, place
        self.tier: Any = None

    def forward(self, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        layer, out = self.tier.layers[self.number], torch.zeros_like(hidden_states)
        self.tier.open(layer)
        left = [layer.first + expert for expert in torch.unique(index).tolist()]
        for number in left:
            self.tier.cache.use(number)
        while left:
            self.tier.want(left)
            ready = [number for number in left if self.tier.ready(number)]
            if not ready:
                self.tier.wait(left)
            for number in ready:
                gate, up, down = (layer.matrix(number - layer.first, name) for name in self.place.projections)
                token, choice = torch.where(index == number - layer.first)
                x = hidden_states[token]
                inside = nn.functional.silu(x @ gate.T) * (x @ up.T)
                out.index_add_(0, token, (inside @ down.T) * weights[token, choice, None].to(out.dtype))
            self.tier.release(ready)
            left = [number for number in left if number not in ready]
        return out


def _load_dense(directory: Path, make: Callable[[int, Any, Any], nn.Module]) -> tuple[nn.Module, list[Any]]:
    """Transformers' model in bfloat16 around experts modules that `make(number, place, config)` returns."""
    from transformers import AutoConfig

    from qmoe_lite.checkpoint.reader import materialise

    config = AutoConfig.from_pretrained(directory)
    family, checkpoint = family_of("qwen3_moe"), Checkpoint(directory)
    model = skeleton(family, config, torch.bfloat16)
    modules = []
    for number, place in enumerate(family.layers(config)):
        parent, _, child = place.experts.rpartition(".")
        modules.append(make(number, place, model.config))
        setattr(model.get_submodule(parent), child, modules[-1])
    materialise(model, "", checkpoint, torch.bfloat16)
    family.load_outside_blocks(model, checkpoint, torch.bfloat16)
    return model.eval(), modules


def load_dense_in_memory(directory: Path) -> nn.Module:
    """The dense model, its experts filled with what the compressed ones decode to: no files of it are needed."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    import qmoe_lite as qm

    packed: Any = qm.load(directory, device="cpu")

    def make(number: int, place: Any, config: Any) -> nn.Module:
        with torch.device("meta"):
            experts: Any = Qwen3MoeExperts(config).to(torch.bfloat16).requires_grad_(False)
        experts.to_empty(device="cpu")
        ours = packed.model.layers[number].mlp.experts
        for expert in range(place.count):
            gate_up = [ours.dense(expert, name, torch.bfloat16) for name in ("gate_proj", "up_proj")]
            experts.gate_up_proj[expert] = torch.cat(gate_up)
            experts.down_proj[expert] = ours.dense(expert, "down_proj", torch.bfloat16)
        return experts  # type: ignore[no-any-return]

    return _load_dense(directory, make)[0]


def load_dense_cache(directory: Path, budget: int) -> nn.Module:
    """The dense model without its experts in memory."""
    checkpoint = Checkpoint(directory)
    model, modules = _load_dense(directory, lambda number, place, config: DenseCache(number, place))
    files = {directory / name: WeightFile(directory / name) for name in checkpoint.files}
    layers: Any = [_DenseLayer(m, m.place, m.place.count * m.number, checkpoint, files) for m in modules]
    size = sum(room(layers[0].largest(name)) for name in layers[0].projections)
    tier = RamTier(layers, max(1, min(budget // size, sum(m.num_experts for m in modules))), HALF_LIFE)
    for module in modules:
        module.tier = tier
    model.register_forward_pre_hook(lambda module, arguments: tier.cache.tick())
    return model
