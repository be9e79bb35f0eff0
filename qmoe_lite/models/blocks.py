"""What a family describes its models by: sparse layers, chains of blocks, and how a model calls a block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qmoe_lite.errors import UnsupportedFamilyError


@dataclass(frozen=True)
class Layout:
    """How transformers' module holds the experts of a layer, all in one tensor a stage.

    Attributes
    ----------
    gated : bool
        Whether the first tensor is `gate_up_proj`, gate and up in one, or `up_proj` alone.
    transposed : bool
        Whether a matrix lies as (columns, rows).
    interleaved : bool
        Whether gate's and up's rows take turns, or up's follow gate's.
    biased : bool
        Whether each tensor has a bias, `<its name>_bias`, (experts, rows).
    """

    gated: bool = True
    transposed: bool = False
    interleaved: bool = False
    biased: bool = False

    @property
    def first(self) -> str:
        return "gate_up_proj" if self.gated else "up_proj"

    @property
    def projections(self) -> tuple[str, ...]:
        return ("gate_proj", "up_proj", "down_proj") if self.gated else ("up_proj", "down_proj")

    @property
    def tensors(self) -> tuple[str, ...]:
        weights = self.first, "down_proj"
        return (*weights, *(f"{name}_bias" for name in weights)) if self.biased else weights

    def place(self, projection: str, rows: int) -> tuple[str, slice | None]:
        """Return which tensor holds a projection, and which rows there; `rows` are the projection's."""
        if projection == "down_proj" or not self.gated:
            return projection, None
        second = projection == "up_proj"
        return self.first, slice(int(second), None, 2) if self.interleaved else slice(
            second * rows, second * rows + rows
        )

    def join(self, outputs: Sequence[Tensor]) -> Tensor:
        """Return gate and up, each (.., rows), as the module has them, (.., 2 rows)."""
        return torch.stack(tuple(outputs), -1).flatten(-2) if self.interleaved else torch.cat(tuple(outputs), -1)


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
    layout : Layout or None
        How the model's own module holds them; None where each is a module.
    """

    experts: str
    block: str
    count: int
    shapes: dict[str, tuple[int, int]]
    top_k: int = 1
    layout: Layout | None = None

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

    @property
    def attribute(self) -> str:
        """What the owner calls the list of blocks."""
        return self.blocks[0].removeprefix(f"{self.name}.").rpartition(".")[0]


@dataclass(frozen=True)
class Call:
    """How a model's own code calls a block after the hidden states; what earlier blocks hand on are marks in it.

    Attributes
    ----------
    args, kwargs
        Masks may differ from block to block (sliding windows), so each block's own call is kept.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Calls:
    """How the blocks of a stack are called, and what the latest one handed on.

    Attributes
    ----------
    of_block : list of Call
    handed : dict
        What stands for the marks in the next block's call.
    """

    of_block: list[Call]
    handed: dict[Mark, Any]

    def fill(self, value: Any) -> Any:
        """Return an argument with what stands for its mark."""
        return self.handed[value] if isinstance(value, Mark) else value


@dataclass(frozen=True)
class Mark:
    """Stands for what a block returns besides the hidden states, in the calls of those after it."""

    block: int
    number: int


class _Unpacked(Exception):
    """A block's result was taken for several values."""


class _Single(Tensor):
    """Hidden states that notice when they are taken apart as the result of a block that returns more than them."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __iter__(self) -> Any:
        raise _Unpacked

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, int):
            raise _Unpacked
        return self.as_subclass(Tensor)[index]


class _Recorder(nn.Module):
    """Stands for a block while the model's own code runs around it: notes how it is called, passes its input on."""

    def __init__(self, block: nn.Module, marks: tuple[Any, ...], answer: Tensor | None) -> None:
        super().__init__()
        self.__dict__["block"] = block  # no child: its weights are not there yet
        self.__dict__["marks"] = marks
        self._answer = answer
        self.call: tuple[Tensor, Call] | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"], name)  # such as attention_type, which the model's code asks for

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if isinstance(hidden_states, _Single):
            hidden_states = hidden_states.as_subclass(Tensor)  # type: ignore[arg-type]
        self.call = hidden_states, Call(args, kwargs)
        out = hidden_states if self._answer is None else self._answer
        marks = self.__dict__["marks"]
        return (out, *marks) if marks else out.as_subclass(_Single)


def recorded_calls(
    owner: Any, attribute: str, run: Callable[[], Any], marks: int = 0, answer: Tensor | None = None
) -> tuple[list[tuple[Tensor, Call]], Any]:
    """Run `run` with recorders in place of `owner`'s blocks.

    Parameters
    ----------
    owner, attribute
        The module that holds the list of blocks, and its name there.
    run : callable
        Runs the model's own code.
    marks : int
        What a block returns after the hidden states.
    answer : tensor, optional
        Hidden states that each block is to return; by default those that it is given.

    Returns
    -------
    calls : list of (hidden states, Call), a block an entry
    result
        What `run` returned.
    """
    blocks = getattr(owner, attribute)
    recorders = [_Recorder(block, tuple(Mark(i, m) for m in range(marks)), answer) for i, block in enumerate(blocks)]
    setattr(owner, attribute, nn.ModuleList(recorders))
    try:
        result = run()
    finally:
        setattr(owner, attribute, blocks)
    return [recorder.call for recorder in recorders], result  # type: ignore[misc]


def calls_of(
    owner: Any, attribute: str, run: Callable[[], Any], answer: Tensor | None = None
) -> tuple[list[tuple[Tensor, Call]], Any]:
    """Return what `recorded_calls` does, with as many marks as the model's own code takes of a block.

    Raises
    ------
    UnsupportedFamilyError
        It takes more than three.
    """
    for marks in range(4):
        try:
            return recorded_calls(owner, attribute, run, marks, answer)
        except (_Unpacked, ValueError, IndexError) as error:
            # too few values are a ValueError where they are unpacked, an IndexError where they are asked for by number
            if (
                not isinstance(error, _Unpacked)
                and "values to unpack" not in str(error)
                and "index out" not in str(error)
            ):
                raise
    raise UnsupportedFamilyError(f"the blocks of {type(owner).__name__} return more than is known.")


def tied_head(config: Any) -> frozenset[str]:
    """Return the name of the output head where it is the embeddings' own tensor."""
    return frozenset({"lm_head.weight"} if config.tie_word_embeddings else ())
