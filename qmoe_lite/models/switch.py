"""The family of SwitchTransformers."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qmoe_lite.checkpoint.reader import Checkpoint, materialise
from qmoe_lite.checkpoint.sources import View, whole
from qmoe_lite.models.blocks import MoELayer, Stack, recorded_calls, tied_head


class SwitchTransformers:
    """SwitchTransformers: T5 with one expert of many for each token (arXiv:2101.03961)."""

    model_type = "switch_transformers"
    seq2seq = True
    experts_class = "SwitchTransformersExperts"

    def tied(self, config: Any) -> frozenset[str]:
        embeddings = frozenset({"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"})
        return embeddings | tied_head(config)

    def views(self, config: Any, checkpoint: Checkpoint) -> dict[str, View]:
        return whole(sorted(checkpoint.sources))

    def stored(self, config: Any, name: str, checkpoint: Checkpoint) -> str:
        return name

    def layers(self, config: Any) -> list[MoELayer]:
        found = []
        shapes = {"wi": (config.d_ff, config.d_model), "wo": (config.d_model, config.d_ff)}
        for name, blocks, step, part in (
            ("encoder", config.num_layers, config.encoder_sparse_step, 1),
            ("decoder", config.num_decoder_layers, config.decoder_sparse_step, 2),
        ):
            for i in range(blocks):
                if step == 1 or (step > 0 and i % step == 1):
                    block = f"{name}.block.{i}"
                    found.append(MoELayer(f"{block}.layer.{part}.mlp.experts", block, config.num_experts, shapes))
        return found

    def weight_name(self, layer: MoELayer, expert: int, projection: str) -> str:
        return f"{layer.experts}.expert_{expert}.{projection}.weight"

    def stacks(self, config: Any) -> list[Stack]:
        sizes = (("encoder", config.num_layers), ("decoder", config.num_decoder_layers))
        return [Stack(name, tuple(f"{name}.block.{i}" for i in range(size))) for name, size in sizes]

    def activation(self, config: Any, experts: str | None = None) -> Callable[[Tensor], Tensor]:
        from transformers.activations import ACT2FN

        return ACT2FN[config.dense_act_fn]  # type: ignore[no-any-return]

    def routing(self, arguments: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        one_hot, weights = arguments
        value, index = one_hot[:, 0].max(-1)
        return torch.where(value > 0, index, -1)[:, None], weights

    def load_outside_blocks(self, model: nn.Module, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        for name in ("shared", "encoder.final_layer_norm", "decoder.final_layer_norm"):
            materialise(model.get_submodule(name), name, checkpoint, dtype)
        for name in ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head"):
            if f"{name}.weight" in checkpoint:
                materialise(model.get_submodule(name), name, checkpoint, dtype)
        self.tie(model, checkpoint)

    def tie(self, model: Any, held: Container[str]) -> None:
        # transformers ties the embeddings only together with lm_head, but checkpoints hold `shared` alone either way
        shared = model.shared.weight
        for name in ("encoder.embed_tokens", "decoder.embed_tokens"):
            if f"{name}.weight" not in held:
                model.get_submodule(name).weight = shared
        if model.config.tie_word_embeddings:
            for name in ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head"):
                if not hasattr(model, name.partition(".")[0]):  # a model without its head
                    continue
                module = model.get_submodule(name)  # one that differs is kept, as transformers keeps it
                if f"{name}.weight" not in held or torch.equal(module.weight, shared):
                    module.weight = shared

    def enter(self, model: nn.Module, stack: Stack, tokens: Tensor, encoder_output: Tensor | None) -> Any:
        owner = model.get_submodule(stack.name)
        arguments = {} if encoder_output is None else {"encoder_hidden_states": encoder_output, "use_cache": False}
        calls, _ = recorded_calls(owner, "block", lambda: owner(input_ids=tokens, **arguments), marks=2)
        hidden, call = calls[0]
        mask, bias, _, encoder_mask, cross_bias = call.args
        return hidden, ((mask, bias, encoder_mask, cross_bias), call.kwargs)

    def through(
        self, block: nn.Module, block_index: int, hidden: Tensor, encoder_output: Tensor | None, call: Any
    ) -> tuple[Tensor, Any]:
        # the first block makes the position biases, the others take them over
        (mask, bias, encoder_mask, cross_bias), kwargs = call
        hidden, bias, cross_bias = block(hidden, mask, bias, encoder_output, encoder_mask, cross_bias, **kwargs)
        return hidden, ((mask, bias, encoder_mask, cross_bias), kwargs)

    def head(self, model: Any, checkpoint: Checkpoint) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        factor = model.config.d_model**-0.5 if model.config.tie_word_embeddings else 1.0
        return model.lm_head.weight, lambda products: products * factor

    def leave(self, model: nn.Module, stack: Stack, hidden: Tensor) -> Tensor:
        return model.get_submodule(f"{stack.name}.final_layer_norm")(hidden)  # type: ignore[no-any-return]
