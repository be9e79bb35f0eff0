"""How each Hugging Face family holds, names and routes its experts.

A family is one entry of `FAMILIES`. Everything else in the library sees a model through it: which layers are sparse
and what their checkpoint tensors are called, how the stacks of blocks are run one block at a time, and what the
experts module's routing arguments mean.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from difflib import get_close_matches
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qmoe_lite.checkpoint.reader import Checkpoint
from qmoe_lite.checkpoint.sources import View
from qmoe_lite.errors import UnsupportedFamilyError
from qmoe_lite.models.architecture import Joint
from qmoe_lite.models.blocks import MoELayer, Stack
from qmoe_lite.models.causal import CAUSAL, Causal
from qmoe_lite.models.switch import SwitchTransformers


def inner(activation: Callable[[Tensor], Tensor] | Joint, outputs: Sequence[Tensor]) -> Tensor:
    """Return the last projection's input: activation(wi x), or activation(gate_proj x) * up_proj x, or its own."""
    if isinstance(activation, Joint):
        return activation.join(outputs)
    first, *others = outputs
    result = activation(first)
    for other in others:
        result = result * other
    return result


class Family(Protocol):
    """What the library must know of a family; all methods are free of state."""

    @property
    def model_type(self) -> str:
        """As in config.json; transformers' module has the same name."""

    @property
    def experts_class(self) -> str | None:
        """Transformers' class of an experts module that is slow to build, even without weights."""

    @property
    def seq2seq(self) -> bool:
        """Whether the model has an encoder and a decoder."""

    def tied(self, config: Any) -> frozenset[str]:
        """Tensors that a checkpoint may lack, because they are another one's."""

    def views(self, config: Any, checkpoint: Checkpoint) -> dict[str, View]:
        """Return where each of the model's tensors lies in the checkpoint's files."""

    def stored(self, config: Any, name: str, checkpoint: Checkpoint) -> str:
        """Return what a compressed model's files are to call a tensor, given the checkpoint that it is made of."""

    def layers(self, config: Any) -> list[MoELayer]:
        """All sparse layers that the configuration promises, in the order in which they run."""

    def weight_name(self, layer: MoELayer, expert: int, projection: str) -> str:
        """Canonical name of one expert's matrix in the dense checkpoint."""

    def stacks(self, config: Any) -> list[Stack]:
        """The chains of blocks, in the order in which they run."""

    def activation(self, config: Any, experts: str | None = None) -> Callable[[Tensor], Tensor] | Joint:
        """The activation function of the experts of a module; by default of the first one."""

    def routing(self, arguments: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Turn the experts module's routing arguments into (index (T, K) int64, -1 = dropped; weights (T, K))."""

    def load_outside_blocks(self, model: nn.Module, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        """Fill everything outside the blocks: embeddings, final norms, output head."""

    def tie(self, model: nn.Module, held: Container[str]) -> None:
        """Share the tensors that the family shares and that are not among those held by the checkpoint."""

    def enter(self, model: nn.Module, stack: Stack, tokens: Tensor, encoder_output: Tensor | None) -> Any:
        """Run the model's own code up to the stack's first block; return its hidden states and the blocks' call."""

    def through(
        self, block: nn.Module, block_index: int, hidden: Tensor, encoder_output: Tensor | None, call: Any
    ) -> tuple[Tensor, Any]:
        """Run one of a stack's blocks, by its index; return the hidden states and the call for the blocks after it."""

    def head(self, model: nn.Module, checkpoint: Checkpoint) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Return the vocabulary's weight (V, C), and what makes logits of its products with the last stack's output."""

    def leave(self, model: nn.Module, stack: Stack, hidden: Tensor) -> Tensor:
        """Run what follows a stack's last block."""


_REFUSED = dict.fromkeys(("deepseek_v4", "hy_v4", "hy_v4_vl"), "its hidden states are several streams a token")
FAMILIES: dict[str, Family] = {
    "switch_transformers": SwitchTransformers(),
    **{each.model_type: each for each in CAUSAL},
}


def _in_transformers(model_type: str | None) -> bool:
    from transformers import CONFIG_MAPPING

    return model_type in CONFIG_MAPPING  # or registered there


def family_of(model_type: str | None, auto: bool = False) -> Family:
    """Find the family of a model type.

    Parameters
    ----------
    model_type : str or None
        As in config.json.
    auto : bool
        Whether one that is not among the tested types is read off transformers' model like those.

    Raises
    ------
    UnsupportedFamilyError
        Names the type, and those that are closest.
    """
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    if model_type in _REFUSED:
        raise UnsupportedFamilyError(f"model type {model_type} is not supported: {_REFUSED[model_type]}.")
    if auto and _in_transformers(model_type):
        return Causal(str(model_type))
    known, close = ", ".join(sorted(FAMILIES)), get_close_matches(str(model_type), FAMILIES, n=1, cutoff=0.5)
    closest = f" (closest: {close[0]})" if close else ""
    raise UnsupportedFamilyError(
        f"model type {model_type} is not supported; supported: {known}{closest}. With --family auto (family='auto') it "
        "is read off transformers' model, and tried on its first blocks before anything is compressed."
    )
