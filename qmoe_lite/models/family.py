"""How each Hugging Face family holds, names and routes its experts.

A family is one entry of `FAMILIES`. Everything else in the library sees a model through it: which layers are sparse
and what their checkpoint tensors are called, how the stacks of blocks are run one block at a time, and what the
experts module's routing arguments mean.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qmoe_lite.checkpoint.reader import Checkpoint, materialise
from qmoe_lite.errors import UnsupportedFamilyError


@dataclass(frozen=True)
class MoELayer:
    """One sparse layer.

    Attributes
    ----------
    experts : str
        Name of the experts module, e.g. "encoder.block.1.layer.1.mlp.experts".
    block : str
        Name of the block that holds it, e.g. "encoder.block.1".
    count : int
        Number of experts.
    shapes : dict, projection name to (rows, columns)
        The last one takes what the others, which all take the expert's input, put out: see `inner`.
    top_k : int
        Experts of a token.
    """

    experts: str
    block: str
    count: int
    shapes: dict[str, tuple[int, int]]
    top_k: int = 1

    @property
    def projections(self) -> tuple[str, ...]:
        return tuple(self.shapes)

    @property
    def stages(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Projections of one input each: (gate_proj, up_proj) or (wi,); then the last."""
        return self.projections[:-1], self.projections[-1:]

    @property
    def matrices(self) -> int:
        return self.count * len(self.shapes)

    @property
    def weights(self) -> int:
        return self.count * sum(rows * columns for rows, columns in self.shapes.values())


def inner(activation: Callable[[Tensor], Tensor], outputs: Sequence[Tensor]) -> Tensor:
    """Give the last projection's input: activation(wi x), or activation(gate_proj x) * up_proj x."""
    first, *others = outputs
    result = activation(first)
    for other in others:
        result = result * other
    return result


@dataclass(frozen=True)
class Stack:
    """A chain of blocks that run one after another: the encoder, the decoder.

    Attributes
    ----------
    name : str
        Name of the module that owns the blocks.
    blocks : tuple of str
        Names of the blocks.
    """

    name: str
    blocks: tuple[str, ...]


class Family(Protocol):
    """What the library must know of a family; all methods are free of state."""

    @property
    def model_type(self) -> str:
        """As in config.json; transformers' module has the same name."""

    @property
    def experts_class(self) -> str | None:
        """Transformers' class of an experts module that is slow to build, even without weights."""

    @property
    def router(self) -> str:
        """Name, beside the experts module, of what holds the router's weight, shape (experts, width)."""

    @property
    def seq2seq(self) -> bool:
        """Whether the model has an encoder and a decoder."""

    def tied(self, config: Any) -> frozenset[str]:
        """Tensors that a checkpoint may lack, because they are another one's."""

    def canonical(self, name: str) -> str:
        """Give the model's name of a tensor for its name in the checkpoint's files."""

    def stored(self, name: str) -> str:
        """Give the name in the files for the model's own."""

    def layers(self, config: Any) -> list[MoELayer]:
        """All sparse layers that the configuration promises, in the order in which they run."""

    def weight_name(self, layer: MoELayer, expert: int, projection: str) -> str:
        """Canonical name of one expert's matrix in the dense checkpoint."""

    def stacks(self, config: Any) -> list[Stack]:
        """The chains of blocks, in the order in which they run."""

    def activation(self, config: Any) -> Callable[[Tensor], Tensor]:
        """The experts' activation function."""

    def routing(self, arguments: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Turn the experts module's routing arguments into (index (T, K) int64, -1 = dropped; weights (T, K))."""

    def load_outside_blocks(self, model: nn.Module, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        """Fill everything outside the blocks: embeddings, final norms, output head."""

    def tie(self, model: nn.Module, held: Container[str]) -> None:
        """Share the tensors that the family shares and that are not among those held by the checkpoint."""

    def enter(self, model: nn.Module, stack: Stack, tokens: Tensor, memory: Tensor | None) -> Any:
        """Run the model's own code up to the stack's first block; give its hidden states and the blocks' call."""

    def through(
        self, block: nn.Module, number: int, hidden: Tensor, memory: Tensor | None, call: Any
    ) -> tuple[Tensor, Any]:
        """Run a stack's block by number; give the hidden states and the call for the blocks after it."""

    def leave(self, model: nn.Module, stack: Stack, hidden: Tensor) -> Tensor:
        """Run what follows a stack's last block."""


class _Recorder(nn.Module):
    """Stands for a block while the model's own code runs around it: notes how it is called, passes its input on."""

    def __init__(self, block: nn.Module, handed_on: int) -> None:
        super().__init__()
        self.__dict__["block"] = block  # no child: its weights are not there yet
        self._handed_on = handed_on
        self.call: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"], name)  # such as attention_type, which the model's code asks for

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.call = (hidden_states, *args), kwargs
        return (hidden_states, *(None,) * self._handed_on) if self._handed_on else hidden_states


def recorded_calls(
    owner: Any, attribute: str, run: Callable[[], Any], handed_on: int = 0
) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Run `run` with recorders in place of `owner`'s blocks; give (args, kwargs) of each block's call.

    Masks may differ from block to block (sliding windows), so each block's own call is kept.
    """
    blocks = getattr(owner, attribute)
    recorders = [_Recorder(block, handed_on) for block in blocks]
    setattr(owner, attribute, nn.ModuleList(recorders))
    try:
        run()
    finally:
        setattr(owner, attribute, blocks)
    return [recorder.call for recorder in recorders]


class SwitchTransformers:
    """SwitchTransformers: T5 with one expert of many for each token (arXiv:2101.03961)."""

    model_type = "switch_transformers"
    seq2seq = True
    experts_class = "SwitchTransformersExperts"
    router = "router.classifier"

    def tied(self, config: Any) -> frozenset[str]:
        embeddings = frozenset({"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"})
        return embeddings | _tied_head(config)

    def canonical(self, name: str) -> str:
        return name

    def stored(self, name: str) -> str:
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

    def activation(self, config: Any) -> Callable[[Tensor], Tensor]:
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
                module = model.get_submodule(name)  # one that differs is kept, as transformers keeps it
                if f"{name}.weight" not in held or torch.equal(module.weight, shared):
                    module.weight = shared

    def enter(self, model: nn.Module, stack: Stack, tokens: Tensor, memory: Tensor | None) -> Any:
        owner = model.get_submodule(stack.name)
        arguments = {} if memory is None else {"encoder_hidden_states": memory, "use_cache": False}
        calls = recorded_calls(owner, "block", lambda: owner(input_ids=tokens, **arguments), handed_on=2)
        (hidden, mask, bias, _, memory_mask, cross_bias), kwargs = calls[0]
        return hidden, ((mask, bias, memory_mask, cross_bias), kwargs)

    def through(
        self, block: nn.Module, number: int, hidden: Tensor, memory: Tensor | None, call: Any
    ) -> tuple[Tensor, Any]:
        # the first block makes the position biases, the others take them over
        (mask, bias, memory_mask, cross_bias), kwargs = call
        hidden, bias, cross_bias = block(hidden, mask, bias, memory, memory_mask, cross_bias, **kwargs)
        return hidden, ((mask, bias, memory_mask, cross_bias), kwargs)

    def leave(self, model: nn.Module, stack: Stack, hidden: Tensor) -> Tensor:
        return model.get_submodule(f"{stack.name}.final_layer_norm")(hidden)  # type: ignore[no-any-return]


def _tied_head(config: Any) -> frozenset[str]:
    return frozenset({"lm_head.weight"} if config.tie_word_embeddings else ())


def _all_layers(config: Any, layer: int) -> bool:
    """Tell that a layer is sparse, whichever it is."""
    return True


def _every_step(config: Any, layer: int) -> bool:
    """Tell whether a layer of a Qwen is sparse, as transformers decides it."""
    return layer not in config.mlp_only_layers and (layer + 1) % config.decoder_sparse_step == 0


def _after_first(config: Any, layer: int) -> bool:
    """Tell whether a layer of a DeepSeek is sparse."""
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
        Tells whether the layer with this number has experts.
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
        return _tied_head(config)

    def canonical(self, name: str) -> str:
        return name.replace(f".{self.moe}.", ".mlp.")

    def stored(self, name: str) -> str:
        return name.replace(".mlp.", f".{self.moe}.")

    def layers(self, config: Any) -> list[MoELayer]:
        count, inside, outside = getattr(config, self.count), getattr(config, self.width), config.hidden_size
        shapes = {"gate_proj": (inside, outside), "up_proj": (inside, outside), "down_proj": (outside, inside)}
        return [
            MoELayer(f"{block}.mlp.experts", block, count, shapes, config.num_experts_per_tok)
            for number, block in enumerate(self.stacks(config)[0].blocks)
            if self.is_sparse(config, number)
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

    def enter(self, model: nn.Module, stack: Stack, tokens: Tensor, memory: Tensor | None) -> Any:
        owner = model.get_submodule(stack.name)
        calls = recorded_calls(owner, "layers", lambda: owner(input_ids=tokens, use_cache=False))
        return calls[0][0][0], [(args[1:], kwargs) for args, kwargs in calls]

    def through(
        self, block: nn.Module, number: int, hidden: Tensor, memory: Tensor | None, call: Any
    ) -> tuple[Tensor, Any]:
        args, kwargs = call[number]
        return block(hidden, *args, **kwargs), call

    def leave(self, model: nn.Module, stack: Stack, hidden: Tensor) -> Tensor:
        return model.get_submodule(f"{stack.name}.norm")(hidden)  # type: ignore[no-any-return]


_MIXTRAL: dict[str, Any] = {
    "count": "num_local_experts",
    "width": "intermediate_size",
    "moe": "block_sparse_moe",
    "on_disk": ("w1", "w3", "w2"),
}
_DEEPSEEK: dict[str, Any] = {"count": "n_routed_experts", "is_sparse": _after_first}
_FAMILIES: tuple[Family, ...] = (
    SwitchTransformers(),
    Causal("mixtral", **_MIXTRAL),
    Causal("minimax_m2", **_MIXTRAL),
    Causal("qwen2_moe", is_sparse=_every_step),
    Causal("qwen3_moe", is_sparse=_every_step),
    Causal("olmoe", width="intermediate_size"),
    Causal("deepseek_v2", **_DEEPSEEK),
    Causal("deepseek_v3", **_DEEPSEEK),
    Causal("glm4_moe", **_DEEPSEEK),
)
FAMILIES = {family.model_type: family for family in _FAMILIES}


def family_of(model_type: str | None) -> Family:
    """Find the family of a model type.

    Raises
    ------
    UnsupportedFamilyError
        Names the type and the supported ones.
    """
    if model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise UnsupportedFamilyError(f"model type {model_type} is not supported; supported: {known}.")
    return FAMILIES[model_type]
