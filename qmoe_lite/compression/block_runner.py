"""The dense part of a model, run block by block over all samples.

A block's dense part is loaded, all samples go through it, and it is freed; what its experts are given is caught on the
way. What is outside the blocks stays on the CPU, as activations do; a block runs where the settings say.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qmoe_lite.checkpoint.reader import Checkpoint, materialise
from qmoe_lite.compression.list_buffer import ListBuffer
from qmoe_lite.compression.rank_buffer import RankBuffer
from qmoe_lite.compression.ranks import ALONE, Ranks, Together
from qmoe_lite.compression.settings import Settings
from qmoe_lite.errors import NotFiniteError
from qmoe_lite.models.blocks import Call, Calls, Mark, MoELayer, Stack
from qmoe_lite.models.family import Family
from qmoe_lite.models.placing import put
from qmoe_lite.models.routing import Assignment, in_order
from qmoe_lite.quantization.hessian import all_finite


def _moved(call: Any, device: torch.device, known: dict[int, Any] | None = None) -> Any:
    """Return a block's call with its tensors (masks, position biases, rotary angles) on a device, each copied once."""
    known = {} if known is None else known
    if isinstance(call, Tensor):
        if id(call) not in known:
            known[id(call)] = call.to(device)
        return known[id(call)]
    if isinstance(call, dict):
        return {name: _moved(each, device, known) for name, each in call.items()}
    if isinstance(call, tuple | list):
        return type(call)(_moved(each, device, known) for each in call)
    if isinstance(call, Call | Calls):
        return type(call)(**{name: _moved(each, device, known) for name, each in vars(call).items()})
    return call


def _same(one: Any, other: Any) -> bool:
    """Return whether two calls are the same, value by value."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one is other or torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[name], other[name]) for name in one)
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, Call | Calls) and type(one) is type(other):
        return _same(vars(one), vars(other))
    return type(one) is type(other)


class _Catcher(nn.Module):
    """Stands for an experts module while the dense part runs: keeps what it is given, returns what it is told to.

    Attributes
    ----------
    answer : tensor or None
        What it returns; None for zeros.
    """

    def __init__(self, family: Family) -> None:
        super().__init__()
        self._family = family
        self._caught: list[tuple[Tensor, Tensor, Tensor]] = []
        self.answer: Tensor | None = None

    def forward(self, hidden_states: Tensor, *routing: Tensor, **named: Tensor) -> Tensor:
        index, weights = self._family.routing(in_order(routing, named))
        self._caught.append((hidden_states.cpu(), index.to(torch.int32).cpu(), weights.float().cpu()))
        return torch.zeros_like(hidden_states) if self.answer is None else self.answer.view_as(hidden_states)

    def take(self) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states, index and weights of the one call since the last time."""
        (caught,), self._caught = self._caught, []
        return caught


@dataclass(frozen=True)
class Caught:
    """What the experts of a block are given, and where their outputs go.

    Attributes
    ----------
    inputs : ListBuffer
        One row a token.
    assigned : Assignment
        Which expert gets which rows.
    outputs : ListBuffer
        To which the experts' outputs are to be added.
    finish : callable
        To be called when they are.
    adds : bool
        Whether `outputs` is the block's whole output then.
    """

    inputs: ListBuffer
    assigned: Assignment
    outputs: ListBuffer
    finish: Callable[[], None]
    adds: bool


class BlockRunner:
    """Runs the blocks of one model.

    Parameters
    ----------
    model : torch module
        A skeleton whose parts outside the blocks are loaded.
    family, checkpoint
        Of the model.
    layers : list of MoELayer
        Its sparse layers.
    settings : Settings
        For the batch size, the dtype of activations and the device.
    apart : int, optional
        First sample that shares no batch with those before it.
    spill : Path, optional
        Folder for the activations, which are else in memory.
    ranks : Ranks, optional
        Of the run: each has the activations of its own batches, and runs those.
    """

    def __init__(
        self,
        model: Any,
        family: Family,
        checkpoint: Checkpoint,
        layers: list[MoELayer],
        settings: Settings,
        apart: int | None = None,
        spill: Path | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self._apart, self._spill, self._ranks = apart, spill, ranks
        self._model, self._family, self._checkpoint, self._settings = model, family, checkpoint, settings
        self._layer_of = {layer.block: layer for layer in layers}
        self._device = torch.device(settings.device)
        self._tokens = np.empty((0, 0), np.int64)
        self._calls_differ = False
        self._alone: Any = None  # the call of the blocks for the first sample
        self.handed: dict[int, dict[Mark, Any]] = {}  # by a batch's first sample: what the latest block hands on

    def _load(self, block: str) -> tuple[nn.Module, _Catcher | None]:
        """Load a block's dense part to where it runs, with a catcher in place of its experts."""
        module: nn.Module = self._model.get_submodule(block)
        materialise(module, block, self._checkpoint, torch.float32)
        catcher = None
        if block in self._layer_of:
            catcher = _Catcher(self._family)
            put(self._model, self._layer_of[block].experts, catcher)
        return module.to(self._device), catcher

    def resume(self, handed: dict[int, dict[Mark, Any]]) -> None:
        """Go on with what the block before handed on."""
        own = {part.start for part in self.batches(len(self._tokens))}
        self.handed = {start: each for start, each in handed.items() if start in own}

    def _read(self, buffer: ListBuffer | None, samples: slice) -> Any:
        return None if buffer is None else buffer.read(samples).to(self._device, copy=True)  # a block may write on it

    def buffer(self, shape: tuple[int, ...], width: int | None = None) -> ListBuffer:
        dtype = torch.float32 if self._settings.activations == "float32" else torch.bfloat16
        width = self._model.config.get_text_config().hidden_size if width is None else width
        if isinstance(self._ranks, Together):
            starts = [*(part.start for part in self._all_batches(shape[0])), shape[0]]
            cuts = [starts[cut] for cut in self._ranks.cuts(len(starts) - 1)]
            return RankBuffer(self._ranks, cuts, shape[1], width, dtype, self._spill)
        return ListBuffer(shape[0], shape[1], width, dtype, self._spill)

    def batches(self, samples: int) -> list[slice]:
        """Return this rank's batches of so many samples; they do not depend on the number of ranks."""
        found = list(self._all_batches(samples))
        cuts = self._ranks.cuts(len(found))
        return found[slice(*cuts[self._ranks.rank : self._ranks.rank + 2])]

    def _all_batches(self, samples: int) -> Iterator[slice]:
        first = samples if self._apart is None else self._apart
        for begin, end in ((0, first), (first, samples)):
            for start in range(begin, end, self._settings.batch):
                yield slice(start, min(start + self._settings.batch, end))

    def enter(
        self, stack: Stack, tokens: np.ndarray, encoder_output: ListBuffer | None, hidden: ListBuffer, first: int
    ) -> dict[int, Any]:
        """Fill `hidden` with the embeddings; return the call of the blocks from `first` on for each size of batch."""
        calls: dict[int, Any] = {}
        seen: dict[int, int] = {}
        self.handed = {}
        self._tokens, self._calls_differ, self._alone = tokens, False, None
        if not self._family.seq2seq:
            _, call = self._family.enter(self._model, stack, torch.from_numpy(tokens[:1]), None)
            self._alone = _moved(call, self._device)
        for part in self.batches(len(hidden)):
            size = part.stop - part.start
            seen[size] = seen.get(size, 0) + 1
            if first and seen[size] > 2:
                continue
            recalled = None if encoder_output is None else encoder_output.read(part)
            embedded, call = self._family.enter(self._model, stack, torch.from_numpy(tokens[part]), recalled)
            if size not in calls:
                calls[size] = _moved(call, self._device)
            elif seen[size] == 2:  # some are given something of the tokens themselves
                self._calls_differ |= not _same(calls[size], _moved(call, self._device))
            hidden.write(part, embedded)
        self._calls_differ = any(self._ranks.gather(self._calls_differ))
        if (
            first and self._family.seq2seq
        ):  # a resumed run needs what the first block hands on to the others, such as its position bias
            block, _ = self._load(stack.blocks[0])
            for size, call in calls.items():
                some = slice(hidden.own.start, hidden.own.start + size)
                read = self._read(hidden, some), self._read(encoder_output, some)
                _, calls[size] = self._family.through(block, 0, *read, call)
            block.to("meta")
        return calls

    def _through(
        self,
        stack: Stack,
        block_index: int,
        module: nn.Module,
        part: slice,
        read: tuple[Any, Any],
        calls: dict[int, Any],
    ) -> tuple[Tensor, Any]:
        """Run a block on a batch; return its hidden states, and the call for the blocks after it."""
        call = calls[part.stop - part.start]
        if self._calls_differ:
            _, call = self._family.enter(self._model, stack, torch.from_numpy(self._tokens[part]), None)
            call = _moved(call, self._device)
        if handed := self.handed.get(part.start):
            call = replace(call, handed=_moved(handed, self._device))
        return self._family.through(module, block_index, *read, call)

    def _next(self, following: dict[int, Any], calls: dict[int, Any]) -> None:
        """Take over what the batches handed on, by each one's first sample."""
        sizes = {part.start: part.stop - part.start for part in self.batches(len(self._tokens))}
        for start, call in following.items():
            if isinstance(call, Calls):
                self.handed[start] = _moved(call.handed, torch.device("cpu"))
            else:
                calls[sizes[start]] = call

    def run(
        self,
        stack: Stack,
        block_index: int,
        hidden: ListBuffer,
        encoder_output: ListBuffer | None,
        calls: dict[int, Any],
    ) -> Caught | None:
        """Send all samples through a block's dense part; return what its experts are given.

        Where the experts' outputs are added to what the block returns without them, as in most families, `hidden` is
        that afterwards, and they are to be added to it. Where the block does more with them (scales or normalises
        them), they are to be put into a buffer of their own, and `finish` must be called.
        """
        block = stack.blocks[block_index]
        module, catcher = self._load(block)
        layer = self._layer_of.get(block)
        inputs = None if layer is None else self.buffer(hidden.shape, layer.shapes[layer.projections[0]][1])
        routing: list[tuple[Tensor, Tensor]] = []
        following: dict[int, Any] = {}
        outputs: ListBuffer | None = None
        adds: bool | None = None
        for part in self.batches(len(hidden)):
            size = part.stop - part.start
            read = self._read(hidden, part), self._read(encoder_output, part)
            out, following[part.start] = self._through(stack, block_index, module, part, read, calls)
            self._check(block, out)
            if layer is not None and catcher is not None and inputs is not None:
                given, index, weights = catcher.take()
                inputs.write(part, given.view(size, -1, given.shape[-1]))
                routing.append((index, weights))
                if adds is None:  # the first sample of all decides, or its batch
                    again = functools.partial(self._through, stack, block_index, module, part, read, calls)
                    probe: tuple[Callable[[], tuple[Tensor, Any]], Tensor, Tensor] = again, given, out
                    if part.start == 0 and self._alone is not None and not any(self.handed.values()):
                        probe = self._of_first_sample(hidden, block_index, module, catcher)
                    adds = self._ranks.of(0, part.start > 0 or self._adds(catcher, *probe))
                    outputs = None if adds else self._zeros(hidden, layer)
            if outputs is None:
                hidden.write(part, out)
        if inputs is None or layer is None:
            self._next(following, calls)
            module.to("meta")
            return None
        if adds is None and not self._ranks.of(0, True):  # a rank without samples
            outputs = self._zeros(hidden, layer)
        own: list[Tensor | None] = [torch.cat(parts) for parts in zip(*routing, strict=True)]
        index, weights = map(self._ranks.join, own or [None, None])
        assigned = Assignment.group(index, weights, layer.count)
        if outputs is None:
            self._next(following, calls)
            module.to("meta")
            return Caught(inputs, assigned, hidden, lambda: None, True)

        def finish() -> None:
            assert catcher is not None
            assert outputs is not None
            for part in self.batches(len(hidden)):
                read = self._read(hidden, part), self._read(encoder_output, part)
                catcher.answer = outputs.read(part).to(self._device)
                out, _ = self._through(stack, block_index, module, part, read, calls)
                catcher.take()
                self._check(block, out)
                hidden.write(part, out)
            catcher.answer = None  # it views `outputs`, and stays in the model
            self._next(following, calls)
            module.to("meta")

        return Caught(inputs, assigned, outputs, finish, False)

    def _zeros(self, hidden: ListBuffer, layer: MoELayer) -> ListBuffer:
        """Return a buffer for the outputs of a layer's experts."""
        outputs = self.buffer(hidden.shape, layer.shapes[layer.projections[-1]][0])
        outputs.zero()
        return outputs

    def _check(self, block: str, out: Tensor) -> None:
        if not all_finite(out).all():
            raise NotFiniteError(f"{block} outputs NaN or infinity in float32. Fetch the checkpoint again.")

    def _of_first_sample(
        self, hidden: ListBuffer, block_index: int, module: nn.Module, catcher: _Catcher
    ) -> tuple[Callable[[], tuple[Tensor, Any]], Tensor, Tensor]:
        """Return how to send the first sample alone through a block, what its experts are given, and its output.

        It tells as much as a batch does of whether the block adds, in less time.
        """

        def again() -> tuple[Tensor, Any]:
            return self._family.through(module, block_index, self._read(hidden, slice(0, 1)), None, self._alone)

        out, _ = again()
        given, *_ = catcher.take()
        return again, given, out

    def _adds(self, catcher: _Catcher, again: Callable[[], tuple[Tensor, Any]], given: Tensor, out: Tensor) -> bool:
        """Return whether a block adds its experts' outputs to `out`, by what it makes of random ones."""
        if given.numel() != out.numel():
            return False
        random = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out)
        catcher.answer = random * out.abs().mean()
        expected = out + catcher.answer
        found, _ = again()
        catcher.take()
        catcher.answer = None
        return bool((found - expected).abs().max() <= 1e-5 * expected.abs().max())

    def leave(self, stack: Stack, hidden: ListBuffer) -> None:
        """Send all samples through what follows a stack's last block."""
        for part in self.batches(len(hidden)):
            hidden.write(part, self._family.leave(self._model, stack, hidden.read(part)))
