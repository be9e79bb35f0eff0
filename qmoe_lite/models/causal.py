"""The families of causal language models: everything about them is read off transformers' own model and mapping."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from qmoe_lite.checkpoint.reader import Checkpoint, materialise
from qmoe_lite.checkpoint.sources import View
from qmoe_lite.models.architecture import Architecture, Joint
from qmoe_lite.models.blocks import Calls, Mark, MoELayer, Stack, calls_of
from qmoe_lite.models.building import skeleton
from qmoe_lite.models.names import Names, weight_name


@dataclass(frozen=True)
class Causal:
    """A causal language model whose experts are as `Architecture` describes them.

    Attributes
    ----------
    model_type : str
        In transformers.
    """

    model_type: str
    seq2seq = False
    experts_class = None  # its experts are two tensors a layer

    def architecture(self, config: Any) -> Architecture:
        return _known(self, config)[0]

    def tied(self, config: Any) -> frozenset[str]:
        return self.architecture(config).tied

    def views(self, config: Any, checkpoint: Checkpoint) -> dict[str, View]:
        return _known(self, config)[1].views(checkpoint)

    def own_slice(self, config: Any, layer: MoELayer, tensor: str, expert: int, checkpoint: Checkpoint) -> Tensor:
        return _known(self, config)[1].own_slice(layer, tensor, expert, checkpoint)

    def stored(self, config: Any, name: str, checkpoint: Checkpoint) -> str:
        return _known(self, config)[1].stored(name, checkpoint)

    def layers(self, config: Any) -> list[MoELayer]:
        return list(self.architecture(config).layers)

    def weight_name(self, layer: MoELayer, expert: int, projection: str) -> str:
        return weight_name(layer.experts, expert, projection)

    def stacks(self, config: Any) -> list[Stack]:
        return [self.architecture(config).stack]

    def activation(self, config: Any, experts: str | None = None) -> Callable[[Tensor], Tensor] | Joint:
        found = self.architecture(config).activations
        return found[next(iter(found)) if experts is None else experts]

    def routing(self, arguments: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        index, weights = arguments
        return index, weights

    def load_outside_blocks(self, model: Any, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        (stack,) = self.stacks(model.config)  # calibration does not get as far as the output head
        owner = model.get_submodule(stack.name)
        for module in owner.modules():
            # rotary frequencies and the like are in no file; set before weights are there, which would be drawn anew
            if lost := [n for n in module._non_persistent_buffers_set if module.get_buffer(n).is_meta]:
                for name in lost:
                    module._buffers[name] = torch.empty_like(module.get_buffer(name), device="cpu")
                model._init_weights(module)
        materialise(owner, stack.name, checkpoint, dtype, without=f"{stack.attribute}.")

    def tie(self, model: nn.Module, held: Container[str]) -> None:
        pass  # transformers does it

    def body(self, model: Any) -> Any:
        """Return the part of a model that makes hidden states."""
        if model.base_model is not model:
            return model.base_model
        (stack,) = self.stacks(model.config)
        return model.get_submodule(stack.name)  # Llama 4's own name for it is another one

    def enter(self, model: Any, stack: Stack, tokens: Tensor, encoder_output: Tensor | None) -> Any:
        owner = model.get_submodule(stack.name)
        calls, _ = calls_of(owner, stack.attribute, lambda: self.body(model)(input_ids=tokens, use_cache=False))
        return calls[0][0], Calls([call for _, call in calls], {})

    def through(
        self, block: nn.Module, block_index: int, hidden: Tensor, encoder_output: Tensor | None, call: Calls
    ) -> tuple[Tensor, Any]:
        own = call.of_block[block_index]
        args = [call.fill(value) for value in own.args]
        kwargs = {name: call.fill(value) for name, value in own.kwargs.items()}
        out = block(hidden, *args, **kwargs)
        if isinstance(out, Tensor):
            return out, call
        hidden, *others = out
        return hidden, replace(call, handed={Mark(block_index, i): other for i, other in enumerate(others)})

    def head(self, model: Any, checkpoint: Checkpoint) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        head = model.get_output_embeddings()
        name = next(name for name, module in model.named_modules() if module is head)
        bias = checkpoint.tensor(f"{name}.bias").float() if f"{name}.bias" in checkpoint else None
        if f"{name}.weight" in checkpoint:
            weight = checkpoint.tensor(f"{name}.weight")
        else:
            weight = model.get_input_embeddings().weight
        parent, _, child = name.rpartition(".")
        return weight, functools.partial(finish, model.get_submodule(parent), child, bias)

    def leave(self, model: Any, stack: Stack, hidden: Tensor) -> Tensor:
        owner = model.get_submodule(stack.name)
        tokens = torch.zeros(hidden.shape[:2], dtype=torch.long)
        _, result = calls_of(owner, stack.attribute, lambda: owner(input_ids=tokens, use_cache=False), hidden)
        return result.last_hidden_state.as_subclass(Tensor)  # type: ignore[no-any-return]


class _Output(tuple[Tensor]):
    """What a model without its head returns; all that may be in it besides the hidden states is None."""

    def __new__(cls, hidden_states: Tensor) -> _Output:
        return super().__new__(cls, (hidden_states,))

    @property
    def last_hidden_state(self) -> Tensor:
        return self[0]

    def __getattr__(self, name: str) -> None:
        return None


class _Given(nn.Module):
    """Stands for a model or its head: returns what it was given."""

    def __init__(self, given: Any) -> None:
        super().__init__()
        self.given = given

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.given


def finish(model: Any, head: str, bias: Tensor | None, products: Tensor) -> Tensor:
    """Run what the model's own code makes of its head's products, (N, V): scaled, or capped; return logits.

    `model` holds the head itself, and what makes hidden states.
    """
    from transformers import PreTrainedModel

    logits = products if bias is None else products + bias.to(products.device)
    body = next(name for name, module in model.named_children() if isinstance(module, PreTrainedModel))
    stand_ins = {
        body: _Given(_Output(logits[None])),
        head: _Given(logits[None]),
    }
    before = {name: model.get_submodule(name) for name in stand_ins}
    for name, module in stand_ins.items():
        setattr(model, name, module)
    try:
        ids = torch.zeros((1, len(logits)), dtype=torch.long)
        found: Tensor = model.forward(input_ids=ids, use_cache=False).logits[0]  # hooks await passes of the model
    finally:
        for name, module in before.items():
            setattr(model, name, module)
    return found


def _known(family: Causal, config: Any) -> tuple[Architecture, Names]:
    """Return what is read off a configuration's model; the latest few are remembered, and the last one's settings."""
    now = {name: value for name, value in vars(config).items() if name != "quantization_config"}
    last = _LAST.get(family)
    if last is not None and last[0] is type(config) and last[1] == now:  # it is asked for each tensor of a model
        return last[2]
    settings, kind = config.to_dict(), cast(Any, type(config))
    settings.pop("quantization_config", None)
    found = _read(family, kind, json.dumps(settings, sort_keys=True, default=str))
    _LAST[family] = type(config), copy.deepcopy(now), found
    return found


_LAST: dict[Causal, tuple[type, dict[str, Any], tuple[Architecture, Names]]] = {}


@functools.lru_cache(maxsize=8)
def _read(family: Causal, kind: Any, settings: str) -> tuple[Architecture, Names]:
    model = skeleton(family, kind.from_dict(json.loads(settings)), torch.float32)
    architecture = Architecture.read(model)
    return architecture, Names(model, architecture.layers)


# tested, each by tests/tiny.py's model; of other types what is read is tried on the model's first blocks
TYPES = (
    "afmoe",
    "aria_text",
    "bailing_hybrid",
    "cohere2_moe",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "dots1",
    "ernie4_5_moe",
    "exaone_moe",
    "flex_olmo",
    "gemma4",
    "gemma4_text",
    "glm4_moe",
    "glm4_moe_lite",
    "glm_moe_dsa",
    "gpt_oss",
    "granitemoe",
    "granitemoe_swa",
    "granitemoehybrid",
    "granitemoeshared",
    "hunyuan_v1_moe",
    "hy_v3",
    "jamba",
    "kimi_linear",
    "laguna",
    "lfm2_moe",
    "llama4",
    "llama4_text",
    "longcat_flash",
    "mellum",
    "minimax",
    "minimax_m2",
    "mixtral",
    "nemotron_h",
    "olmoe",
    "phimoe",
    "qwen2_moe",
    "qwen3_5_moe",
    "qwen3_5_moe_text",
    "qwen3_moe",
    "qwen3_next",
    "qwen3_vl_moe",
    "sarvam_mla",
    "sarvam_moe",
    "solar_open",
    "step3p7",
)
CAUSAL = tuple(Causal(model_type) for model_type in TYPES)
