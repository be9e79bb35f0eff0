"""PackedExperts, the module that stands where Hugging Face's experts stood.

The codes of all experts of a layer and projection are one tensor; an expert is a slice of it. A slice is checked once,
when its expert is first needed, and multiplied as it is.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qmoe_lite.checkpoint.reader import Checkpoint
from qmoe_lite.coding.codebook import Codebook
from qmoe_lite.coding.codes import code_from_config
from qmoe_lite.coding.matmul import MatrixStack, decode_matmul, grouped_matmul
from qmoe_lite.coding.packed import PackedMatrix
from qmoe_lite.coding.routing import count_tokens
from qmoe_lite.coding.stream import stream_bytes
from qmoe_lite.coding.validation import validate
from qmoe_lite.compression.list_buffer import Assignment
from qmoe_lite.errors import CheckpointError, FormatError, NotFiniteError, SettingError, ShapeError
from qmoe_lite.models.family import Family, MoELayer, inner

FORMAT = 2
PARTS = ("codes", "expert_offsets", "row_codewords", "fewest_codewords", "levels", "checksums")
STRETCH = 4096  # routed tokens that go through a layer at a time, so that memory does not grow with a prompt
ALIGNMENT = 16  # bytes; where an expert's codes may start
GPU_BYTES = 1 << 28  # of what one projection puts out on a GPU, so that memory does not grow with a prompt
_KERNEL_ACTIVATIONS = {  # classes of transformers and torch: what the GPU's kernel calls them
    "ReLU": "relu",
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
}


def checksum(packed: PackedMatrix) -> int:
    """CRC-32 of one expert's matrix: its codes, row lengths and levels."""
    fewest = torch.tensor([packed.fewest_codewords], dtype=torch.int32)
    crc = 0
    for part in (packed.codes, packed.row_codewords, fewest, packed.levels):
        crc = zlib.crc32(part.contiguous().view(-1).view(torch.uint8).numpy().data, crc)
    return crc


def check_sum(packed: PackedMatrix, crc: int, name: str) -> None:
    """Raise FormatError unless the matrix is, byte for byte, what was written."""
    if checksum(packed) != crc:
        raise FormatError(f"{name} is damaged (checksum). Fetch or make the file again.")


def check_codes(packed: PackedMatrix, name: str) -> None:
    """Raise FormatError unless the matrix decodes to exactly its rows."""
    try:
        validate(packed)
    except FormatError as error:
        raise FormatError(f"{name}: {error}") from error


class ExpertSource(Protocol):
    """Where experts come from that are not to be multiplied from the module's own buffers; see `offload`."""

    def packed(self, experts: PackedExperts, expert: int, projection: str) -> PackedMatrix:
        """Give an own copy of one expert's matrix, checked."""

    def run(self, experts: PackedExperts, numbers: list[int], tokens: Tensor, bounds: list[int]) -> Tensor:
        """Send tokens[bounds[i] : bounds[i + 1]] through expert numbers[i]; float32."""

    def run_layer(self, experts: PackedExperts, hidden_states: Tensor, routing: Sequence[Tensor]) -> Tensor | None:
        """Send each token through its experts, float32; None where they are multiplied on the CPU, by `run`."""


def pack_experts(matrices: list[PackedMatrix]) -> dict[str, Tensor]:
    """Lay the matrices of a layer's experts side by side, as they are stored.

    Parameters
    ----------
    matrices : list of PackedMatrix, one an expert
        Of one shape and codebook.

    Returns
    -------
    dict
        "codes" uint8 (bytes,), "expert_offsets" int64 (E + 1,), "row_codewords" (E, R), uint8 or, where one expert
        needs it, uint16, "fewest_codewords" int32 (E,), "levels" (E, R, L), "checksums" int64 (E,).
    """
    if any(packed.row_codewords.dtype == torch.uint16 for packed in matrices):
        matrices = [replace(packed, row_codewords=packed.row_codewords.to(torch.uint16)) for packed in matrices]
    row_codewords = torch.stack([packed.row_codewords.view(torch.uint8) for packed in matrices])  # uint16 has no stack
    offsets = [0]
    for packed in matrices:
        offsets.append(offsets[-1] + -(-len(packed.codes) // ALIGNMENT) * ALIGNMENT)
    codes = torch.zeros(offsets[-1], dtype=torch.uint8)
    for packed, start in zip(matrices, offsets[:-1], strict=True):
        codes[start : start + len(packed.codes)] = packed.codes
    return {
        "codes": codes,
        "expert_offsets": torch.tensor(offsets, dtype=torch.int64),
        "row_codewords": row_codewords.view(matrices[0].row_codewords.dtype),
        "fewest_codewords": torch.tensor([p.fewest_codewords for p in matrices], dtype=torch.int32),
        "levels": torch.stack([p.levels for p in matrices]),
        "checksums": torch.tensor([checksum(p) for p in matrices], dtype=torch.int64),
    }


class _Product(torch.autograd.Function):
    """y = W x with a gradient for x: what trains around the experts, such as LoRA, sees through them."""

    @staticmethod
    def forward(ctx: Any, packed: PackedMatrix, x: Tensor) -> Tensor:
        ctx.packed = packed
        return decode_matmul(packed, x)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        (gradient,) = gradients
        return None, (gradient.float() @ ctx.packed.dense()).to(gradient.dtype)


class PackedExperts(nn.Module):
    """The experts of one sparse layer, multiplied straight from their codewords.

    Called as the experts module of the model's family was: `forward(hidden_states, *routing)`. Its buffers are
    `<projection>_codes`, `_expert_offsets`, `_row_codewords`, `_fewest_codewords`, `_levels` and `_checksums` for each
    projection.

    Parameters
    ----------
    family : Family
    layer : MoELayer
    codebooks : dict, projection name to Codebook
    config : transformers configuration
    """

    def __init__(self, family: Family, layer: MoELayer, codebooks: dict[str, Codebook], config: Any) -> None:
        super().__init__()
        if len({book.digits for book in codebooks.values()}) > 1:
            raise FormatError(f"{layer.experts} mixes codebooks of three and of four digits. Fetch the file again.")
        self.family = family
        self.layer = layer
        self.codebooks = codebooks
        self.activation = family.activation(config)
        self.source: ExpertSource | None = None
        self.guard: Callable[[], None] | None = None  # raises where a file that the buffers are maps of was cut
        self._checked: dict[tuple[int, str], PackedMatrix] = {}
        self._buffers_of: dict[str, dict[str, Tensor]] = {}
        self._packets_of: dict[str, Any] = {}  # on a GPU

    @property
    def num_experts(self) -> int:
        return self.layer.count

    def fill(self, projection: str, tensors: dict[str, Tensor]) -> None:
        """Take over one projection's tensors, as `pack_experts` makes them.

        Raises
        ------
        FormatError
            A tensor has another shape or dtype than the layer needs.
        """
        experts, (rows, _) = self.layer.count, self.layer.shapes[projection]
        expected = {
            "expert_offsets": ((experts + 1,), (torch.int64,)),
            "row_codewords": ((experts, rows), (torch.uint8, torch.uint16)),
            "fewest_codewords": ((experts,), (torch.int32,)),
            "checksums": ((experts,), (torch.int64,)),
        }
        for part, (shape, dtypes) in expected.items():
            found = tensors[part]
            if tuple(found.shape) != shape or found.dtype not in dtypes:
                raise FormatError(
                    f"{self.layer.experts}.{projection}_{part} is {found.dtype} {tuple(found.shape)}; "
                    f"config.json promises {' or '.join(map(str, dtypes))} {shape}. Fetch both again."
                )
        levels, codes = tensors["levels"], tensors["codes"]
        if levels.dim() != 3 or tuple(levels.shape[:2]) != (experts, rows) or not levels.is_floating_point():
            raise FormatError(f"{self.layer.experts}.{projection}_levels is not (experts, rows, levels) of floats.")
        if codes.dim() != 1 or codes.dtype != torch.uint8:
            raise FormatError(f"{self.layer.experts}.{projection}_codes is not a row of bytes. Fetch the file again.")
        for part in PARTS:
            self.register_buffer(f"{projection}_{part}", tensors[part])
        self._forget()

    def name_of(self, expert: int, projection: str) -> str:
        """What errors call one expert's matrix."""
        return f"expert {expert} of {self.layer.experts}.{projection}"

    def packed(self, expert: int, projection: str) -> PackedMatrix:
        """Give one expert's matrix as it is stored; check it when it is first asked for.

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
            names = ", ".join(self.layer.projections)
            raise SettingError(
                f"no {projection} of expert {expert}; there are {names} of experts 0 to {self.layer.count - 1}."
            )
        if (source := self.source) is not None:  # read once: another thread may close it
            return source.packed(self, expert, projection)
        held = self._held(projection)
        if held["codes"].device.type != "cpu":
            self._check_on_host(projection)
            return self._checked[expert, projection]
        self._checked[expert, projection] = self._check(expert, projection, held)
        return self._checked[expert, projection]

    def _check(self, expert: int, projection: str, held: dict[str, Tensor]) -> PackedMatrix:
        name = self.name_of(expert, projection)
        start, stop = held["expert_offsets"][expert : expert + 2].tolist()
        codes = held["codes"]
        if start < 0 or start % ALIGNMENT or not start <= stop <= len(codes):
            raise FormatError(f"{name} does not lie inside its codes. Fetch or make the file again.")
        packed = PackedMatrix(
            codes=codes[start:stop],
            row_codewords=held["row_codewords"][expert],
            levels=held["levels"][expert],
            codebook=self.codebooks[projection],
            columns=self.layer.shapes[projection][1],
            fewest_codewords=int(held["fewest_codewords"][expert]),
        )
        used = stream_bytes(int(packed.count_codewords().sum()), packed.codebook.bits)
        if not 0 <= used <= stop - start:
            raise FormatError(f"{name} does not lie inside its codes. Fetch or make the file again.")
        packed = replace(packed, codes=packed.codes[:used])
        check_sum(packed, int(held["checksums"][expert]), name)
        check_codes(packed, name)
        return packed

    def _check_on_host(self, projection: str) -> None:
        """Check all experts of a projection that lies on a GPU, in one copy of it."""
        held = self._held(projection)
        on_host = {part: tensor.cpu() for part, tensor in held.items()}
        for expert in range(self.layer.count):
            known, start = self._check(expert, projection, on_host), int(on_host["expert_offsets"][expert])
            self._checked[expert, projection] = replace(
                known,
                codes=held["codes"][start : start + len(known.codes)],
                row_codewords=held["row_codewords"][expert],
                levels=held["levels"][expert],
            )

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
        """Give what the last projection takes, of what the first ones put out."""
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
        if torch.is_grad_enabled() and x.requires_grad:
            return _Product.apply(packed, x)  # type: ignore[no-any-return,no-untyped-call]
        return decode_matmul(packed, x)  # type: ignore[no-any-return]

    @torch.compiler.disable  # torch.compile goes around it: Numba's kernels are not for it to trace
    def forward(self, hidden_states: Tensor, *routing: Tensor) -> Tensor:
        """Send each token through its experts.

        Parameters
        ----------
        hidden_states : float tensor, shape (T, C)
            Tokens.
        *routing : tensors
            As the family's experts module is called by its MoE block.

        Returns
        -------
        tensor like `hidden_states`; zero for a token without an expert.
        """
        width = self.layer.shapes[self.layer.projections[0]][1]
        if hidden_states.dim() != 2 or hidden_states.shape[1] != width:
            raise ShapeError(f"hidden_states is {tuple(hidden_states.shape)}; expected (tokens, {width}). Reshape it.")
        home = self.get_buffer(f"{self.layer.projections[0]}_codes").device
        if (source := self.source) is None and hidden_states.device != home:
            message = f"hidden_states is on {hidden_states.device}, the experts on {home}; expected one device. "
            raise SettingError(message + "Move the model, or what it is given.")
        index, weights = self.family.routing(routing)
        learns = torch.is_grad_enabled() and (hidden_states.requires_grad or weights.requires_grad)
        if not learns:
            if source is not None:
                found = source.run_layer(self, hidden_states, routing)
            else:
                found = None if home.type == "cpu" else self._forward_on_gpu(hidden_states, index, weights)
            if found is not None:
                return found.to(hidden_states.dtype)
        run = self._run_in_turn if learns and hidden_states.device.type != "cpu" else self._run_experts
        assigned = Assignment.group(index, weights, self.layer.count)
        bounds = assigned.bounds[: self.layer.count + 1]  # a number beyond the last expert means none, as -1 does
        out = torch.zeros(hidden_states.shape, dtype=torch.float32, device=hidden_states.device)
        for start in range(bounds[0], bounds[-1], STRETCH):
            stop = min(start + STRETCH, bounds[-1])
            clipped = [min(max(bound, start), stop) - start for bound in bounds]
            experts = [expert for expert, (first, end) in enumerate(pairwise(clipped)) if first < end]
            ends = [*(clipped[expert] for expert in experts), stop - start]
            rows, shares = assigned.rows[start:stop], assigned.weights[start:stop, None]
            out = out.index_add(0, rows, run(experts, hidden_states[rows], ends) * shares)
        return out.to(hidden_states.dtype)

    def _forward_on_gpu(self, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Do it with the CUDA twins: two launches for few tokens; else experts of many tokens are decoded."""
        from qmoe_lite.cuda.experts import GATHERED_PAIRS

        packets = {name: self._packets(name) for name in self.layer.projections}
        parts = []
        for some in self.stretches(index):
            call = self.begin_call(packets, hidden_states[some], index[some], weights[some])
            if call.fits and index[some].numel() <= GATHERED_PAIRS:
                call.gather()
            else:
                sizes = count_tokens(index[some], self.layer.count)[:-1].tolist()
                call.turn({expert: expert for expert, size in enumerate(sizes) if size}, sizes, self.activate)
            parts.append(call.total())
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def stretches(self, index: Tensor) -> list[slice]:
        """Give the tokens that go through the layer on a GPU at a time: as many as `GPU_BYTES` suffice for."""
        widest = max(rows for rows, _ in self.layer.shapes.values())
        step = max(1, GPU_BYTES // (4 * widest * index.shape[1]))
        return [slice(start, start + step) for start in range(0, max(len(index), 1), step)]

    def begin_call(self, packets: dict[str, Any], x: Tensor, index: Tensor, weights: Tensor) -> Any:
        """Begin to send tokens through experts that a GPU holds as packets, a projection an entry."""
        from qmoe_lite.cuda.experts import ExpertsCall

        first, (last,) = self.layer.stages
        activation = _KERNEL_ACTIVATIONS.get(type(self.activation).__name__, self.activate)
        x = (x.float() if x.dtype == torch.float64 else x).contiguous()
        return ExpertsCall(
            [packets[name] for name in first], packets[last], activation, x, index, weights, self.layer.count
        )

    def _packets(self, projection: str) -> Any:
        """A projection as the GPU's kernels read it; made when it is first needed."""
        from qmoe_lite.cuda.packets import stack_packets

        if projection not in self._packets_of:
            for expert in range(self.layer.count):
                self.packed(expert, projection)
            columns = self.layer.shapes[projection][1]
            made = stack_packets(self._held(projection), self.codebooks[projection], columns)
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
            return self.multiply(self._stack, experts, tokens, bounds)
        except NotFiniteError:  # NaN spreads as in dense experts
            return self._run_in_turn(experts, tokens.to(torch.float32), bounds)

    def multiply(
        self, stack: Callable[[str], MatrixStack], experts: list[int], tokens: Tensor, bounds: list[int]
    ) -> Tensor:
        """Send tokens[bounds[i] : bounds[i + 1]] through the stacks' matrices experts[i], on the CPU; in float32.

        Raises
        ------
        NotFiniteError
            As `grouped_matmul`.
        """
        first, (last,) = self.layer.stages
        tokens = tokens.to(torch.float32).contiguous()
        sizes = [end - start for start, end in pairwise(bounds)]
        outputs = grouped_matmul([stack(name) for name in first], tokens, experts, bounds)
        # an expert at a time: torch's activations round an element at a tensor's end otherwise than one in its middle
        groups = zip(*(torch.split(output, sizes) for output in outputs), strict=True)
        inside = torch.cat([inner(self.activation, group) for group in groups])
        return grouped_matmul([stack(last)], inside, experts, bounds)[0]

    def _run_in_turn(self, experts: list[int], tokens: Tensor, bounds: list[int]) -> Tensor:
        parts = zip(experts, pairwise(bounds), strict=True)
        return torch.cat([self.run_expert(expert, tokens[start:end]) for expert, (start, end) in parts])

    def _held(self, projection: str) -> dict[str, Tensor]:
        """The projection's buffers: what is checked and what is multiplied must be the same."""
        if projection not in self._buffers_of:
            self._buffers_of[projection] = {part: self.get_buffer(f"{projection}_{part}") for part in PARTS}
        return self._buffers_of[projection]

    def _stack(self, projection: str) -> MatrixStack:
        """All experts' matrices of a projection, whether checked or not."""
        held = self._held(projection)
        return MatrixStack(
            codes=held["codes"].numpy(),
            offsets=held["expert_offsets"].numpy(),
            row_codewords=held["row_codewords"].numpy(),
            fewest=held["fewest_codewords"].numpy(),
            levels=held["levels"],
            codebook=self.codebooks[projection],
            columns=self.layer.shapes[projection][1],
        )

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
        return {**self.__dict__, "_checked": {}, "_buffers_of": {}, "_packets_of": {}, "source": None}

    def _forget(self) -> None:
        self._checked.clear()
        self._buffers_of.clear()
        self._packets_of.clear()

    def extra_repr(self) -> str:
        shapes = ", ".join(f"{name} {rows}x{columns}" for name, (rows, columns) in self.layer.shapes.items())
        return f"{self.layer.count} experts, {shapes}"


def quantization_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """Give the `quantization_config` of a compressed model's config.json.

    Raises
    ------
    CheckpointError
        The model is not compressed by qmoe.
    FormatError
        It is of a newer format.
    """
    directory, settings = checkpoint.directory, checkpoint.config.get("quantization_config") or {}
    if not isinstance(settings, dict) or settings.get("quant_method") != "qmoe":
        raise CheckpointError(f"{directory} is not compressed by qmoe. Run: qmoe compress {directory} OUT")
    if (found := settings.get("format")) != FORMAT:
        remedy = "Upgrade qmoe-lite" if isinstance(found, int) and found > FORMAT else "Compress the model again"
        raise FormatError(f"{directory} has format {found}; this qmoe-lite reads {FORMAT}. {remedy}.")
    return settings  # type: ignore[no-any-return]


def _codebooks(checkpoint: Checkpoint) -> dict[str, dict[str, Codebook]]:
    """Give the codebook of each experts module's projections; raise FormatError where one does not match its hash."""
    settings = quantization_of(checkpoint)
    try:
        books = [code_from_config(entry) for entry in settings["codebooks"]]
        return {
            name: {projection: books[number] for projection, number in used.items()}
            for name, used in settings["layers"].items()
        }
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        path = checkpoint.directory
        raise FormatError(f"{path}/config.json has a damaged quantization_config. Fetch it again.") from error


def empty_experts(family: Family, checkpoint: Checkpoint, config: Any) -> list[PackedExperts]:
    """Make the experts modules of a compressed model, their buffers on the meta device with shapes from the files.

    Raises
    ------
    CheckpointError
        The model is not compressed, or a code tensor is missing.
    FormatError
        The configuration, the model and the files do not go together.
    """
    codebooks = _codebooks(checkpoint)
    layers = family.layers(config)
    promised = {layer.experts: set(layer.projections) for layer in layers}
    if promised != {name: set(books) for name, books in codebooks.items()}:
        raise FormatError(
            f"{checkpoint.directory}/config.json names other compressed layers or projections than the model has. "
            f"Fetch it again."
        )
    made = []
    for layer in layers:
        made.append(PackedExperts(family, layer, codebooks[layer.experts], config))
        for projection in layer.projections:
            parts = {part: checkpoint.meta(f"{layer.experts}.{projection}_{part}") for part in PARTS}
            made[-1].fill(projection, parts)
    return made
