"""How each Hugging Face family holds, names and routes its experts.

A family is one entry of `FAMILIES`. Everything else in the library sees a model through it: which layers are sparse
and what their checkpoint tensors are called, how the stacks of blocks are run one block at a time, and what the
experts module's routing arguments mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qmoe_lite.checkpoint import EXPERTS, Checkpoint, materialise
from qmoe_lite.errors import CheckpointError, UnsupportedFamilyError, first_line

UNLIMITED = 1 << 30  # tokens; an expert capacity that nothing reaches


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
        In the order in which they are compressed; the last one takes what the others put out.
    """

    experts: str
    block: str
    count: int
    shapes: dict[str, tuple[int, int]]

    @property
    def projections(self) -> tuple[str, ...]:
        return tuple(self.shapes)

    @property
    def matrices(self) -> int:
        return self.count * len(self.shapes)

    @property
    def weights(self) -> int:
        return self.count * sum(rows * columns for rows, columns in self.shapes.values())


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

    model_type: str
    seq2seq: bool
    experts_class: str
    tied: frozenset[str]  # tensors that a checkpoint may lack, because they are another one's

    def layers(self, config: Any) -> list[MoELayer]:
        """All sparse layers that the configuration promises, in the order in which they run."""

    def weight_name(self, layer: MoELayer, expert: int, projection: str) -> str:
        """Name of one expert's matrix in the checkpoint."""

    def stacks(self, config: Any) -> list[Stack]:
        """The chains of blocks, in the order in which they run."""

    def activation(self, config: Any) -> Callable[[Tensor], Tensor]:
        """The experts' activation function."""

    def routing(self, arguments: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Turn the experts module's routing arguments into (index (T, K) int64, -1 = dropped; weights (T, K))."""

    def load_outside_blocks(self, model: nn.Module, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        """Fill everything outside the blocks: embeddings, final norms, output head."""

    def tie(self, model: nn.Module, checkpoint: Checkpoint) -> None:
        """Share the tensors that the family shares but its checkpoints may not repeat."""

    def enter(self, model: nn.Module, stack: Stack, tokens: Tensor, memory: Tensor | None) -> Any:
        """Run the model's own code up to the stack's first block; give the block's (args, kwargs)."""

    def through(self, block: nn.Module, hidden: Tensor, memory: Tensor | None, call: Any) -> tuple[Tensor, Any]:
        """Run one block; give the hidden states and the call that the next block needs."""

    def leave(self, model: nn.Module, stack: Stack, hidden: Tensor) -> Tensor:
        """Run what follows a stack's last block."""


class _Entered(Exception):
    """Raised by a hook to stop a forward pass once the first block's arguments are known."""


def call_of_first_block(block: nn.Module, run: Callable[[], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Run `run` until it calls `block`; give the arguments of that call."""
    caught: list[Any] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append((args, kwargs))
        raise _Entered

    handle = block.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        run()
    except _Entered:
        pass
    finally:
        handle.remove()
    return caught[0]  # type: ignore[no-any-return]


class SwitchTransformers:
    """SwitchTransformers: T5 with one expert of many for each token (arXiv:2101.03961)."""

    model_type = "switch_transformers"
    seq2seq = True
    tied = frozenset({"encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"})
    experts_class = "SwitchTransformersExperts"

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

    def tie(self, model: Any, checkpoint: Checkpoint) -> None:
        # transformers ties the embeddings only together with lm_head, but checkpoints hold `shared` alone either way
        shared = model.shared.weight
        for name in ("encoder.embed_tokens", "decoder.embed_tokens"):
            if f"{name}.weight" not in checkpoint:
                model.get_submodule(name).weight = shared
        if model.config.tie_word_embeddings:
            for name in ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head"):
                module = model.get_submodule(name)  # one that differs is kept, as transformers keeps it
                if f"{name}.weight" not in checkpoint or torch.equal(module.weight, shared):
                    module.weight = shared
        elif "lm_head.weight" not in checkpoint:
            raise CheckpointError(
                f"{checkpoint.directory} lacks lm_head.weight, and config.json says that it is not tied to the "
                f"embeddings. Is it the whole model?"
            )

    def enter(self, model: nn.Module, stack: Stack, tokens: Tensor, memory: Tensor | None) -> Any:
        owner = model.get_submodule(stack.name)
        arguments = {} if memory is None else {"encoder_hidden_states": memory, "use_cache": False}
        first = model.get_submodule(stack.blocks[0])
        return call_of_first_block(first, lambda: owner(input_ids=tokens, **arguments))

    def through(self, block: nn.Module, hidden: Tensor, memory: Tensor | None, call: Any) -> tuple[Tensor, Any]:
        (_, mask, bias, _, memory_mask, cross_bias), kwargs = call
        hidden, bias, cross_bias = block(hidden, mask, bias, memory, memory_mask, cross_bias, **kwargs)
        return hidden, ((None, mask, bias, None, memory_mask, cross_bias), kwargs)

    def leave(self, model: nn.Module, stack: Stack, hidden: Tensor) -> Tensor:
        return model.get_submodule(f"{stack.name}.final_layer_norm")(hidden)  # type: ignore[no-any-return]


FAMILIES: dict[str, Family] = {family.model_type: family for family in (SwitchTransformers(),)}


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


def check_promise(family: Family, config: Any, checkpoint: Checkpoint) -> list[MoELayer]:
    """Compare what config.json promises with what the checkpoint holds.

    Returns
    -------
    list of MoELayer

    Raises
    ------
    CheckpointError
        No sparse layer; an expert's matrix is missing or has another shape; or there are more than promised.
    """
    layers = family.layers(config)
    if not layers:
        raise CheckpointError(f"{checkpoint.directory} has no sparse layer: there are no experts to compress.")
    promised = {
        family.weight_name(layer, expert, projection): shape
        for layer in layers
        for expert in range(layer.count)
        for projection, shape in layer.shapes.items()
    }
    for name, shape in promised.items():
        if (found := checkpoint.shape(name)) != shape:
            raise CheckpointError(f"{name} has shape {found}; config.json says {shape}.")
    held = [name for name in checkpoint.names if EXPERTS in name]
    if extra := set(held) - set(promised):
        raise CheckpointError(f"the checkpoint has {sorted(extra)[0]}, which config.json does not account for.")
    return layers


@contextmanager
def experts_replaced(family: Family, replacement: type[nn.Module]) -> Iterator[None]:
    """Let transformers build `replacement(config)` where it would build the family's experts module."""
    from transformers.monkey_patching import register_patch_mapping, unregister_patch_mapping

    register_patch_mapping({family.experts_class: replacement})
    try:
        yield
    finally:
        unregister_patch_mapping([family.experts_class])


def skeleton(family: Family, config: Any, replacement: type[nn.Module], dtype: torch.dtype) -> nn.Module:
    """Build the model without any weights (on the meta device), `replacement` in place of each experts module."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
    from transformers.initialization import no_init_weights

    auto = AutoModelForSeq2SeqLM if family.seq2seq else AutoModelForCausalLM
    with experts_replaced(family, replacement), torch.device("meta"), no_init_weights():
        return auto.from_config(config, dtype=dtype).eval()  # type: ignore[no-any-return]


@contextmanager
def capacity_lifted(model: nn.Module) -> Iterator[None]:
    """Let routers drop no token: calibration and evaluation must see each token's expert (notes of QMoE, section 3)."""
    limited: list[Any] = [m for m in model.modules() if hasattr(m, "expert_capacity")]
    before = [m.expert_capacity for m in limited]
    for module in limited:
        module.expert_capacity = UNLIMITED
    try:
        yield
    finally:
        for module, capacity in zip(limited, before, strict=True):
            module.expert_capacity = capacity


def read_config(directory: str) -> Any:
    """Read config.json through transformers.

    Raises
    ------
    CheckpointError
        transformers refuses it.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(directory)
    except Exception as error:  # transformers raises ValueError, OSError and its validators' own
        raise CheckpointError(f"{directory}/config.json is refused by transformers: {first_line(error)}.") from error
