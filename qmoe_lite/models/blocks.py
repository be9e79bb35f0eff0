"""What a family describes its models by: sparse layers, chains of blocks, and how a model calls a block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


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
        The last one takes what the others, which all take the expert's input, put out: see `family.inner`.
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

    def first_of_stage(self, projection: str) -> str:
        """Return the projection that stands first among those that get the same inputs."""
        return next(stage[0] for stage in self.stages if projection in stage)

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
    """Run `run` with recorders in place of `owner`'s blocks; return (args, kwargs) of each block's call.

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


def tied_head(config: Any) -> frozenset[str]:
    """Return the name of the output head where it is the embeddings' own tensor."""
    return frozenset({"lm_head.weight"} if config.tie_word_embeddings else ())
