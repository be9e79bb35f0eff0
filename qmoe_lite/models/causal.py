"""The families of causal language models: they differ in names, and in which layers are sparse."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qmoe_lite.checkpoint.reader import Checkpoint, materialise
from qmoe_lite.models.blocks import MoELayer, Stack, recorded_calls, tied_head


def _all_layers(config: Any, layer: int) -> bool:
    """Return that a layer is sparse, whichever it is."""
    return True


def _every_step(config: Any, layer: int) -> bool:
    """Return whether a layer of a Qwen is sparse, as transformers decides it."""
    return layer not in config.mlp_only_layers and (layer + 1) % config.decoder_sparse_step == 0


def _after_first(config: Any, layer: int) -> bool:
    """Return whether a layer of a DeepSeek is sparse."""
    return bool(layer >= config.first_k_dense_replace)


@dataclass(frozen=True)
class Causal:
    """A causal language model whose experts are SwiGLU, fused by transformers, and one by one in the checkpoint.

    Attributes
    ----------
    model_type : str
        In transformers.
    count, width : str
        What config.json calls the number of experts and an expert's inner width.
    on_disk : tuple of str
        What the checkpoint calls gate_proj, up_proj and down_proj.
    moe : str
        What the checkpoint calls the MoE block, which is `mlp` in the model.
    is_sparse : callable
        Returns whether the block with this index has experts.
    """

    model_type: str
    count: str = "num_experts"
    width: str = "moe_intermediate_size"
    on_disk: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    moe: str = "mlp"
    is_sparse: Callable[[Any, int], bool] = _all_layers
    seq2seq = False
    experts_class = None  # its experts are two tensors a layer
    router = "gate"

    def tied(self, config: Any) -> frozenset[str]:
        return tied_head(config)

    def canonical(self, name: str) -> str:
        return name.replace(f".{self.moe}.", ".mlp.")

    def stored(self, name: str) -> str:
        return name.replace(".mlp.", f".{self.moe}.")

    def layers(self, config: Any) -> list[MoELayer]:
        count, inside, outside = getattr(config, self.count), getattr(config, self.width), config.hidden_size
        shapes = {"gate_proj": (inside, outside), "up_proj": (inside, outside), "down_proj": (outside, inside)}
        return [
            MoELayer(f"{block}.mlp.experts", block, count, shapes, config.num_experts_per_tok)
            for block_index, block in enumerate(self.stacks(config)[0].blocks)
            if self.is_sparse(config, block_index)
        ]

    def weight_name(self, layer: MoELayer, expert: int, projection: str) -> str:
        name = self.on_disk[layer.projections.index(projection)]
        return f"{layer.experts}.{expert}.{name}.weight"

    def stacks(self, config: Any) -> list[Stack]:
        return [Stack("model", tuple(f"model.layers.{i}" for i in range(config.num_hidden_layers)))]

    def activation(self, config: Any) -> Callable[[Tensor], Tensor]:
        from transformers.activations import ACT2FN

        return ACT2FN[config.hidden_act]  # type: ignore[no-any-return]

    def routing(self, arguments: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        index, weights = arguments
        return index, weights

    def load_outside_blocks(self, model: Any, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        for name in ("model.embed_tokens", "model.norm"):  # calibration does not get as far as lm_head
            materialise(model.get_submodule(name), name, checkpoint, dtype)
        for module in model.modules():
            # rotary frequencies and the like are in no file
            if lost := [n for n in module._non_persistent_buffers_set if module.get_buffer(n).is_meta]:
                for name in lost:
                    module._buffers[name] = torch.empty_like(module.get_buffer(name), device="cpu")
                model._init_weights(module)

    def tie(self, model: nn.Module, held: Container[str]) -> None:
        pass  # transformers does it

    def enter(self, model: nn.Module, stack: Stack, tokens: Tensor, encoder_output: Tensor | None) -> Any:
        owner = model.get_submodule(stack.name)
        calls = recorded_calls(owner, "layers", lambda: owner(input_ids=tokens, use_cache=False))
        return calls[0][0][0], [(args[1:], kwargs) for args, kwargs in calls]

    def through(
        self, block: nn.Module, block_index: int, hidden: Tensor, encoder_output: Tensor | None, call: Any
    ) -> tuple[Tensor, Any]:
        args, kwargs = call[block_index]
        return block(hidden, *args, **kwargs), call

    def head(self, model: nn.Module, checkpoint: Checkpoint) -> tuple[Tensor, float]:
        if "lm_head.weight" in checkpoint:
            return checkpoint.tensor("lm_head.weight"), 1.0
        return model.get_submodule("model.embed_tokens").weight, 1.0  # type: ignore[return-value]

    def leave(self, model: nn.Module, stack: Stack, hidden: Tensor) -> Tensor:
        return model.get_submodule(f"{stack.name}.norm")(hidden)  # type: ignore[no-any-return]


_MIXTRAL: dict[str, Any] = {
    "count": "num_local_experts",
    "width": "intermediate_size",
    "moe": "block_sparse_moe",
    "on_disk": ("w1", "w3", "w2"),
}
_DEEPSEEK: dict[str, Any] = {"count": "n_routed_experts", "is_sparse": _after_first}
CAUSAL = (
    Causal("mixtral", **_MIXTRAL),
    Causal("minimax_m2", **_MIXTRAL),
    Causal("qwen2_moe", is_sparse=_every_step),
    Causal("qwen3_moe", is_sparse=_every_step),
    Causal("olmoe", width="intermediate_size"),
    Causal("deepseek_v2", **_DEEPSEEK),
    Causal("deepseek_v3", **_DEEPSEEK),
    Causal("glm4_moe", **_DEEPSEEK),
)
