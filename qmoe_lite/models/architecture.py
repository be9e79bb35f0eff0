"""What a model of transformers says of its own experts: where they are, how they lie in memory, what they compute.

Since version 5 a layer's experts are one module, `gate_up_proj` (or `up_proj`) and `down_proj` with all experts in
their first dimension, and the class declares the rest: transposed or not, gate and up one after the other or
interleaved, biases, an activation of its own. Nothing is guessed from shapes, and what is not declared is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from qmoe_lite.errors import UnsupportedFamilyError
from qmoe_lite.models.blocks import Layout, MoELayer, Stack

_BESIDE = {  # experts classes that are not of transformers' common interface: how they hold what they hold
    "Llama4TextExperts": Layout(transposed=True),
    "LongcatFlashExperts": Layout(),
    "Step3p7Experts": Layout(),
}
_TOP_K = ("num_experts_per_tok", "top_k_experts", "moe_k", "moe_topk", "num_experts_per_token")


class Joint:
    """An activation of an experts class's own, which takes gate and up together: clamped, biased by one, ..

    Parameters
    ----------
    experts : torch module
        transformers' experts module; its weights are not kept.
    layout : Layout
        How it wants gate and up.
    """

    def __init__(self, experts: nn.Module, layout: Layout) -> None:
        self._experts, self._layout = copy.copy(experts), layout
        self._experts._parameters = {}

    def join(self, outputs: Sequence[Tensor]) -> Tensor:
        """Return the last projection's input for what gate and up put out."""
        return self._experts._apply_gate(self._layout.join(outputs))  # type: ignore[operator,no-any-return]


@dataclass(frozen=True)
class Architecture:
    """What was read off a model.

    Attributes
    ----------
    layers : list of MoELayer
        Its sparse layers, in order.
    stack : Stack
        Its blocks.
    activations : dict, name of an experts module to callable or Joint
        Between its projections.
    tied : frozenset of str
        Tensors that are another one's.
    """

    layers: list[MoELayer]
    stack: Stack
    activations: dict[str, Callable[[Tensor], Tensor] | Joint]
    tied: frozenset[str]

    @classmethod
    def read(cls, model: Any) -> Architecture:
        """Read a model, which may be on the meta device.

        Raises
        ------
        UnsupportedFamilyError
            Its experts are not as described above, or they are not in one list of blocks, one module a block.
        """
        model_type = model.config.model_type
        found = {name: module for name, module in model.named_modules() if _layout(module) is not None}
        lists: dict[str, list[str]] = {}
        for name in found:
            parts = name.split(".")
            place = next((i for i, part in enumerate(parts) if part.isdigit()), None)
            if place is None or parts[-1] != "experts":
                raise _refusal(model_type, f"{name} is no module `experts` in a list of blocks")
            lists.setdefault(".".join(parts[:place]), []).append(".".join(parts[: place + 1]))
        if not found:
            others = sorted({type(m).__name__ for m in model.modules() if type(m).__name__.endswith("Experts")})
            if others:
                raise _refusal(model_type, f"{others[0]} is not of transformers' common interface")
            return cls([], Stack("", ()), {}, frozenset())
        if len(lists) > 1 or len(set(next(iter(lists.values())))) < len(found):
            raise _refusal(model_type, f"there are experts in {' and '.join(lists)}, or several in a block")
        ((blocks, of_layers),) = lists.items()
        owner = blocks.rpartition(".")[0]
        top_k = _experts_of_a_token(model, model_type)
        layers = [_layer(*item, block, top_k) for item, block in zip(found.items(), of_layers, strict=True)]
        stack = Stack(owner, tuple(f"{blocks}.{i}" for i in range(len(model.get_submodule(blocks)))))
        return cls(layers, stack, _activations(found), frozenset(model.all_tied_weights_keys))


def _refusal(model_type: str, reason: str) -> UnsupportedFamilyError:
    return UnsupportedFamilyError(f"model type {model_type} is not supported: {reason}.")


def _experts_of_a_token(model: Any, model_type: str) -> int:
    config = model.config.get_text_config()
    for name in _TOP_K:
        if (value := getattr(config, name, None)) is not None:
            return max(value) if isinstance(value, list) else int(value)
    raise _refusal(model_type, f"its configuration has none of {', '.join(_TOP_K)}")


def _layout(module: Any) -> Layout | None:
    """Return how an experts module holds its experts; None for another module."""
    if not hasattr(module, "is_concatenated"):
        return _BESIDE.get(type(module).__name__)
    return Layout(module.has_gate, module.is_transposed, not module.is_concatenated, module.has_bias)


def _layer(name: str, module: Any, block: str, top_k: int) -> MoELayer:
    layout = _layout(module)
    assert layout is not None
    held = {each for each, _ in module.named_parameters()} | {each for each, _ in module.named_buffers()}
    if held != set(layout.tensors) or getattr(module, "has_post_expert_norm", False):
        raise UnsupportedFamilyError(
            f"{name} ({type(module).__name__}) holds {', '.join(sorted(held))}; supported is to hold "
            f"{', '.join(layout.tensors)}."
        )
    if type(module).__name__ == "Llama4TextExperts" and top_k > 1:
        raise UnsupportedFamilyError(f"{name} gives a token to {top_k} experts, each scaled; supported is one.")
    shape = getattr(module, layout.first).shape[1:]
    both, outside = shape[::-1] if layout.transposed else shape
    inside = both // 2 if layout.gated else both
    shapes = dict.fromkeys(layout.projections, (inside, outside))
    shapes["down_proj"] = tuple(module.down_proj.shape[:0:-1] if layout.transposed else module.down_proj.shape[1:])
    return MoELayer(name, block, len(module.down_proj), shapes, top_k, layout)


def _activations(modules: dict[str, Any]) -> dict[str, Callable[[Tensor], Tensor] | Joint]:
    """Return what each experts module has between its projections; one object where they have the same settings."""

    def settings(module: Any) -> tuple[Any, ...]:
        sizes = ("layer", "dim", "size", "num_experts")  # which may differ from layer to layer
        own = {name: value for name, value in vars(module).items() if isinstance(value, int | float | str)}
        own = {name: value for name, value in own.items() if not any(size in name for size in sizes)}
        return type(module), *sorted(own.items()), repr(getattr(module, "act_fn", None))

    known: dict[tuple[Any, ...], Callable[[Tensor], Tensor] | Joint] = {}
    return {name: known.setdefault(settings(module), _activation(module)) for name, module in modules.items()}


def _activation(module: Any) -> Callable[[Tensor], Tensor] | Joint:
    from transformers.integrations.moe import _default_apply_gate

    layout = _layout(module)
    assert layout is not None
    if not layout.gated or getattr(type(module), "_apply_gate", _default_apply_gate) is _default_apply_gate:
        return module.act_fn  # type: ignore[no-any-return]
    return Joint(module, layout)
