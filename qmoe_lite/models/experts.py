"""PackedExperts, the module that stands where Hugging Face's experts stood.

The codes of all experts of a layer and projection are one tensor; an expert is a slice of it. A slice is checked once,
when its expert is first needed, and multiplied as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qmoe_lite.checkpoint.format import check_alphabets, codebooks_of, parts_of, quantization_of, tensor_name
from qmoe_lite.checkpoint.reader import Checkpoint
from qmoe_lite.checkpoint.stack import ExpertStack
from qmoe_lite.coding.codes import Code
from qmoe_lite.coding.dictionary import Dictionary
from qmoe_lite.coding.guards import check_recording
from qmoe_lite.coding.matmul import Stack
from qmoe_lite.coding.narrow import dtype_of_levels
from qmoe_lite.coding.packed import PackedMatrix
from qmoe_lite.errors import FormatError, NotFiniteError, SettingError, ShapeError
from qmoe_lite.models.blocks import MoELayer
from qmoe_lite.models.cpu_dispatch import multiply, product, run_stretches
from qmoe_lite.models.family import Family, inner
from qmoe_lite.models.gpu_dispatch import begin_call, run_packets, stretches
from qmoe_lite.models.operations import call_experts, register
from qmoe_lite.models.routing import Assignment, in_order


class ExpertSource(Protocol):
    """Where experts come from that are not to be multiplied from the module's own buffers; see `offload`."""

    def packed(self, module: PackedExperts, expert: int, projection: str) -> PackedMatrix:
        """Return an own copy of one expert's matrix, checked."""

    def begin_layer(self, module: PackedExperts, hidden_states: Tensor, index: Tensor) -> list[int]:
        """Hear which experts a layer asks for, index (T, K), before it runs; return the tokens of each expert."""

    def run_layer(
        self, module: PackedExperts, hidden_states: Tensor, index: Tensor, weights: Tensor, sizes: list[int]
    ) -> Tensor | None:
        """Send each token through its experts, float32; None where they are multiplied on the CPU, by `run`.

        `sizes` are the tokens of each expert, as `begin_layer` returned them.
        """

    def run(self, module: PackedExperts, experts: list[int], tokens: Tensor, bounds: list[int]) -> Tensor:
        """Send tokens[bounds[i] : bounds[i + 1]] through expert experts[i]; float32."""


class PackedExperts(nn.Module):
    """The experts of one sparse layer, multiplied straight from their codewords.

    Called as the experts module of the model's family was: `forward(hidden_states, *routing)`. Its buffers are
    `<projection>_codes`, `_expert_offsets`, `_row_codewords`, `_fewest_codewords`, `_levels` and `_checksums` for each
    projection; where its code is a Dictionary, `_column_scales` and the three of its exceptions too.

    Parameters
    ----------
    family : Family
    layer : MoELayer
    codebooks : dict, projection name to Codebook or Dictionary
    config : transformers configuration
    """

    def __init__(self, family: Family, layer: MoELayer, codebooks: Mapping[str, Code], config: Any) -> None:
        super().__init__()
        check_alphabets(layer.experts, codebooks)
        self.family = family
        self.layer = layer
        self.codebooks = codebooks
        self.activation = family.activation(config, layer.experts)
        self.source: ExpertSource | None = None
        self.guard: Callable[[], None] | None = None  # raises where a file that the buffers are maps of was cut
        self._checked: dict[tuple[int, str], PackedMatrix] = {}
        self._stacks: dict[str, ExpertStack] = {}
        self._packets_of: dict[str, Any] = {}  # on a GPU
        self.number = register(self)  # among torch's operations, in this process

    @property
    def num_experts(self) -> int:
        return self.layer.count

    def fill(self, projection: str, tensors: dict[str, Tensor]) -> None:
        """Take over one projection's tensors, as `format.pack_experts` makes them.

        Raises
        ------
        FormatError
            A tensor has another shape or dtype than the layer needs.
        """
        self._stack_of(projection, tensors)  # which checks them
        for part in parts_of(self.codebooks[projection]):
            self.register_buffer(tensor_name(projection, part), tensors[part])
        self._forget()

    def bias(self, expert: int, projection: str) -> Tensor | None:
        """Return one expert's bias, float32 (R,), where the family has them."""
        if (layout := self.layer.layout) is None or not layout.biased:
            return None
        tensor, rows = layout.place(projection, self.layer.shapes[projection][0])
        bias = self.get_buffer(f"{tensor}_bias")[expert].float()
        return bias if rows is None else bias[rows]

    def packed(self, expert: int, projection: str) -> PackedMatrix:
        """Return one expert's matrix as it is stored; check it when it is first asked for.

        Raises
        ------
        FormatError
            Its checksum differs, or its codes do not decode to exactly its rows.
        SettingError
            No such expert or projection.
        """
        if (known := self._checked.get((expert, projection))) is not None:
            return known
        if projection not in self.layer.shapes or not 0 <= expert < self.layer.count:
            there = f"there are {', '.join(self.layer.projections)} of experts 0 to {self.layer.count - 1}"
            raise SettingError(f"no {projection} of expert {expert}; {there}.")
        if (source := self.source) is not None:  # read once: another thread may close it
            return source.packed(self, expert, projection)
        stack = self.stack(projection)
        if stack.parts["codes"].device.type == "cpu":
            self._checked[expert, projection] = stack.checked(expert)
        else:
            self._checked |= {(i, projection): matrix for i, matrix in enumerate(stack.checked_on_device())}
        return self._checked[expert, projection]

    def dense(self, expert: int, projection: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """Dequantise one expert's matrix.

        Parameters
        ----------
        expert : int
            From 0.
        projection : str
            Its Hugging Face name: wi, wo; gate_proj, up_proj, down_proj.
        dtype : torch dtype
            Of the result.

        Returns
        -------
        tensor, shape (rows, columns)
        """
        if self.guard is not None:
            self.guard()
        return self.packed(expert, projection).dense(dtype)

    def activate(self, outputs: list[Tensor]) -> Tensor:
        """Return what the last projection takes, of what the first ones put out."""
        return inner(self.activation, outputs)

    def run_expert(self, expert: int, hidden_states: Tensor) -> Tensor:
        """Send tokens, shape (T, C), through one expert."""
        first, (last,) = self.layer.stages
        outputs = [self._product(expert, name, hidden_states) for name in first]
        return self._product(expert, last, self.activate(outputs))

    def _product(self, expert: int, projection: str, x: Tensor) -> Tensor:
        packed = self.packed(expert, projection)
        if packed.device != x.device:  # a source gives it on the CPU
            packed = packed.to(x.device)
        y, bias = product(packed, x), self.bias(expert, projection)
        return y if bias is None else (y + bias).to(y.dtype)

    def forward(self, hidden_states: Tensor, *routing: Tensor, **named: Tensor) -> Tensor:
        """Send each token through its experts.

        Parameters
        ----------
        hidden_states : float tensor, shape (T, C)
            Tokens.
        *routing, **named : tensors
            As the family's experts module is called by its MoE block.

        Returns
        -------
        tensor like `hidden_states`; zero for a token without an expert.

        Raises
        ------
        ShapeError, SettingError
            `hidden_states` has another width or device; or torch records what cannot be recorded.

        Notes
        -----
        torch.compile takes it as one operation, unless gradients are wanted; torch.export is refused.
        """
        routing = in_order(routing, named)
        if torch.compiler.is_compiling():
            return call_experts(hidden_states, routing, self.number)
        return self.run_layer(hidden_states, *routing)

    def run_layer(self, hidden_states: Tensor, *routing: Tensor) -> Tensor:
        """Do what `forward` does, not as an operation of torch's."""
        width = self.layer.shapes[self.layer.projections[0]][1]
        if hidden_states.dim() != 2 or hidden_states.shape[1] != width:
            raise ShapeError(f"hidden_states is {tuple(hidden_states.shape)}; expected (tokens, {width}). Reshape it.")
        home = self.get_buffer(f"{self.layer.projections[0]}_codes").device
        if (source := self.source) is None and hidden_states.device != home:
            message = f"hidden_states is on {hidden_states.device}, the experts on {home}; expected one device. "
            raise SettingError(message + "Move the model, or what it is given.")
        check_recording(hidden_states)
        index, weights = self.family.routing(routing)
        sizes = [] if source is None else source.begin_layer(self, hidden_states, index)
        learns = torch.is_grad_enabled() and (hidden_states.requires_grad or weights.requires_grad)
        if not learns:
            if source is not None:
                found = source.run_layer(self, hidden_states, index, weights, sizes)
            else:
                by_torch = home.type == "cpu" or self.in_turn
                found = None if by_torch else self._forward_on_gpu(hidden_states, index, weights)
            if found is not None:
                return found.to(hidden_states.dtype)
        alone = hidden_states.device.type != "cpu" and (learns or self.in_turn)
        run = self._run_in_turn if alone else self._run_experts
        count = self.layer.count
        assigned = Assignment.group(index, weights, count)
        return run_stretches(run, hidden_states, assigned, count).to(hidden_states.dtype)

    def _forward_on_gpu(self, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        packets = {name: self._packets(name) for name in self.layer.projections}
        return run_packets(self.layer, self.activation, packets, hidden_states, index, weights)

    def stretches(self, index: Tensor) -> list[slice]:
        """Return the tokens that go through the layer on a GPU at a time; see `gpu_dispatch.stretches`."""
        return stretches(self.layer, index)

    def begin_call(self, packets: dict[str, Any], x: Tensor, index: Tensor, weights: Tensor) -> Any:
        """Begin to send tokens through experts that a GPU holds as packets; see `gpu_dispatch.begin_call`."""
        return begin_call(self.layer, self.activation, packets, x, index, weights)

    def _packets(self, projection: str) -> Any:
        """A projection as the GPU's kernels read it; made when it is first needed."""
        from qmoe_lite.cuda.packets import stack_packets
        from qmoe_lite.cuda.window_packets import stack_window_packets

        if projection not in self._packets_of:
            for expert in range(self.layer.count):
                self.packed(expert, projection)
            stack, first = self.stack(projection), self.layer.first_of_stage(projection)
            if isinstance(stack.codebook, Dictionary):
                shared = None if first == projection else self._packets(first)
                made: Any = stack_window_packets(stack.held, stack.codebook, stack.shape[1], shared)
            else:
                made = stack_packets(stack.parts, stack.codebook, stack.shape[1])
            self._packets_of[projection] = made
        return self._packets_of[projection]

    def _run_experts(self, experts: list[int], tokens: Tensor, bounds: list[int]) -> Tensor:
        """Send tokens[bounds[i] : bounds[i + 1]] through expert experts[i], all in one call a product; in float32."""
        if torch.is_grad_enabled() and tokens.requires_grad:
            return self._run_in_turn(experts, tokens, bounds)
        try:
            if (source := self.source) is not None:
                return source.run(self, experts, tokens, bounds)
            for projection in self.layer.projections:
                for expert in experts:
                    self.packed(expert, projection)  # checked when it is first needed
            return self.multiply(lambda name: self.stack(name).for_product(), experts, tokens, bounds)
        except NotFiniteError:  # NaN spreads as in dense experts
            return self._run_in_turn(experts, tokens.to(torch.float32), bounds)

    def multiply(self, stack: Callable[[str], Stack], experts: list[int], tokens: Tensor, bounds: list[int]) -> Tensor:
        """Send tokens[bounds[i] : bounds[i + 1]] through the stacks' experts[i]; see `cpu_dispatch.multiply`."""
        return multiply(self.layer, self.activation, self.bias, stack, experts, tokens, bounds)

    def _run_in_turn(self, experts: list[int], tokens: Tensor, bounds: list[int]) -> Tensor:
        parts = zip(experts, pairwise(bounds), strict=True)
        return torch.cat([self.run_expert(expert, tokens[start:end]) for expert, (start, end) in parts])

    def stack(self, projection: str) -> ExpertStack:
        """Return the projection's buffers: what is checked and what is multiplied must be the same."""
        if projection not in self._stacks:
            held = {p: self.get_buffer(tensor_name(projection, p)) for p in parts_of(self.codebooks[projection])}
            self._stacks[projection] = self._stack_of(projection, held)
        return self._stacks[projection]

    def _stack_of(self, projection: str, parts: dict[str, Tensor]) -> ExpertStack:
        layer = self.layer
        name, first = f"{layer.experts}.{projection}", layer.first_of_stage(projection)
        shared = None if first == projection else self.stack(first)
        book = self.codebooks[projection]
        return ExpertStack(name, layer.count, layer.shapes[projection], book, parts, first=shared)

    @property
    def in_turn(self) -> bool:
        """Whether a GPU multiplies its experts one after another: no kernel there adds biases."""
        return self.layer.layout is not None and self.layer.layout.biased

    def _apply(self, fn: Any, recurse: bool = True) -> PackedExperts:
        if self.source is not None:
            return self  # what lies where is the source's to decide
        # `.to(dtype)` casts float buffers, but levels are data: they travel as integers of the same size
        floats = {name: b for name, b in self._buffers.items() if b is not None and b.is_floating_point()}
        for name, buffer in floats.items():
            self._buffers[name] = buffer.view(torch.int16 if buffer.itemsize == 2 else torch.int32)
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            for name, buffer in floats.items():
                self._buffers[name] = self.get_buffer(name).view(buffer.dtype)
            self._forget()  # views of buffers that fn may have replaced
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._forget()  # other codes must be checked anew
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        # a copy has buffers of its own
        return {**self.__dict__, "_checked": {}, "_stacks": {}, "_packets_of": {}, "source": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.number = register(self)

    def _forget(self) -> None:
        self._checked.clear()
        self._stacks.clear()
        self._packets_of.clear()

    def extra_repr(self) -> str:
        shapes = ", ".join(f"{name} {rows}x{columns}" for name, (rows, columns) in self.layer.shapes.items())
        return f"{self.layer.count} experts, {shapes}"


def empty_experts(family: Family, checkpoint: Checkpoint, config: Any) -> list[PackedExperts]:
    """Make the experts modules of a compressed model, their buffers on the meta device with shapes from the files.

    Raises
    ------
    CheckpointError
        The model is not compressed, or a code tensor is missing.
    FormatError
        The configuration, the model and the files do not go together.
    """
    codebooks = codebooks_of(checkpoint)
    level_dtype = quantization_of(checkpoint).get("level_dtype")
    layers = family.layers(config)
    promised = {layer.experts: set(layer.projections) for layer in layers}
    if promised != {name: set(books) for name, books in codebooks.items()}:
        raise FormatError(
            f"{checkpoint.directory}/config.json names other compressed layers or projections than the model has. "
            f"Fetch it again."
        )
    made = [PackedExperts(family, layer, codebooks[layer.experts], config) for layer in layers]
    for experts in made:
        for projection in experts.layer.projections:
            name, parts = f"{experts.layer.experts}.{projection}", parts_of(experts.codebooks[projection])
            found = {part: checkpoint.meta(tensor_name(name, part)) for part in parts}
            dtype = dtype_of_levels(found["levels"])
            if level_dtype is not None and str(dtype) != f"torch.{level_dtype}":
                raise FormatError(f"{name}_levels is {dtype}; config.json says {level_dtype}. Fetch both again.")
            experts.fill(projection, found)
        if (layout := experts.layer.layout) is not None and layout.biased:
            for tensor in (f"{layout.first}_bias", "down_proj_bias"):
                experts.register_buffer(tensor, checkpoint.meta(f"{experts.layer.experts}.{tensor}"))
    return made
