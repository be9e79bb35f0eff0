"""PackedExperts, the module that stands where Hugging Face's experts stood.

The codes of all experts of a layer and projection are one tensor; an expert is a slice of it. A slice is checked once,
when its expert is first needed, and multiplied as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qmoe_lite.checkpoint import Checkpoint, crc32
from qmoe_lite.codebook import Codebook
from qmoe_lite.errors import CheckpointError, FormatError, SettingError
from qmoe_lite.families import Family, MoELayer, inner
from qmoe_lite.list_buffer import Assignment
from qmoe_lite.matmul import decode_matmul
from qmoe_lite.packed import PackedMatrix
from qmoe_lite.validation import validate

FORMAT = 1
PARTS = ("codes", "expert_offsets", "row_codewords", "levels", "checksums")
_ALIGNMENT = 16  # bytes; where an expert's codes may start
_PADDING = 8  # zero bytes behind each expert's codes, so that a kernel may read 8 bytes at a time


def checksum(packed: PackedMatrix) -> int:
    """CRC-32 of one expert's matrix: its codes, row lengths and levels."""
    parts = (packed.codes, packed.row_codewords.view(torch.int16), packed.levels)
    return crc32(torch.cat([p.contiguous().view(-1).view(torch.uint8) for p in parts]))


def pack_experts(matrices: list[PackedMatrix]) -> dict[str, Tensor]:
    """Lay the matrices of a layer's experts side by side, as they are stored.

    Parameters
    ----------
    matrices : list of PackedMatrix, one an expert
        Of one shape and codebook.

    Returns
    -------
    dict
        "codes" uint8 (bytes,), "expert_offsets" int64 (E + 1,), "row_codewords" uint16 (E, R), "levels" (E, R, L),
        "checksums" int64 (E,).
    """
    offsets = [0]
    for packed in matrices:
        offsets.append(offsets[-1] + -(-len(packed.codes) // _ALIGNMENT) * _ALIGNMENT)
    codes = torch.zeros(offsets[-1], dtype=torch.uint8)
    for packed, start in zip(matrices, offsets[:-1], strict=True):
        codes[start : start + len(packed.codes)] = packed.codes
    return {
        "codes": codes,
        "expert_offsets": torch.tensor(offsets, dtype=torch.int64),
        "row_codewords": torch.stack([p.row_codewords.view(torch.int16) for p in matrices]).view(torch.uint16),
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


def _product(packed: PackedMatrix, x: Tensor) -> Tensor:
    if torch.is_grad_enabled() and x.requires_grad:
        return _Product.apply(packed, x)  # type: ignore[no-any-return,no-untyped-call]
    return decode_matmul(packed, x)  # type: ignore[no-any-return]


class PackedExperts(nn.Module):
    """The experts of one sparse layer, multiplied straight from their codewords.

    Called as the experts module of the model's family was: `forward(hidden_states, *routing)`. Its buffers are
    `<projection>_codes`, `_expert_offsets`, `_row_codewords`, `_levels` and `_checksums` for each projection.

    Parameters
    ----------
    family : Family
    layer : MoELayer
    codebooks : dict, projection name to Codebook
    config : transformers configuration
    """

    def __init__(self, family: Family, layer: MoELayer, codebooks: dict[str, Codebook], config: Any) -> None:
        super().__init__()
        self.family = family
        self.layer = layer
        self.codebooks = codebooks
        self.activation = family.activation(config)
        self._checked: dict[tuple[int, str], PackedMatrix] = {}

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
            "expert_offsets": ((experts + 1,), torch.int64),
            "row_codewords": ((experts, rows), torch.uint16),
            "checksums": ((experts,), torch.int64),
        }
        for part, (shape, dtype) in expected.items():
            found = tensors[part]
            if tuple(found.shape) != shape or found.dtype != dtype:
                raise FormatError(
                    f"{self.layer.experts}.{projection}_{part} is {found.dtype} {tuple(found.shape)}; "
                    f"expected {dtype} {shape}. Fetch the file again."
                )
        levels, codes = tensors["levels"], tensors["codes"]
        if levels.dim() != 3 or tuple(levels.shape[:2]) != (experts, rows) or not levels.is_floating_point():
            raise FormatError(f"{self.layer.experts}.{projection}_levels is not (experts, rows, levels) of floats.")
        if codes.dim() != 1 or codes.dtype != torch.uint8:
            raise FormatError(f"{self.layer.experts}.{projection}_codes is not a row of bytes. Fetch the file again.")
        for part in PARTS:
            self.register_buffer(f"{projection}_{part}", tensors[part])

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

        def get(part: str) -> Tensor:
            return self.get_buffer(f"{projection}_{part}")

        name = f"expert {expert} of {self.layer.experts}.{projection}"
        start, stop = get("expert_offsets")[expert : expert + 2].tolist()
        row_codewords = get("row_codewords")[expert]
        codebook = self.codebooks[projection]
        used = -(-int(row_codewords.to(torch.int64).sum()) * codebook.bits // 8) + _PADDING
        codes = get("codes")
        if start < 0 or start % _ALIGNMENT or not start + used <= stop <= len(codes):
            raise FormatError(f"{name} does not lie inside its codes. Fetch or make the file again.")
        packed = PackedMatrix(
            codes=codes[start : start + used],
            row_codewords=row_codewords,
            levels=get("levels")[expert],
            codebook=codebook,
            columns=self.layer.shapes[projection][1],
        )
        if checksum(packed) != int(get("checksums")[expert]):
            raise FormatError(f"{name} is damaged (checksum). Fetch or make the file again.")
        try:
            validate(packed)
        except FormatError as error:
            raise FormatError(f"{name}: {error}") from error
        self._checked[expert, projection] = packed
        return packed

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
        return self.packed(expert, projection).dense(dtype)

    def run_expert(self, expert: int, hidden_states: Tensor) -> Tensor:
        """Send tokens, shape (T, C), through one expert."""
        first, (last,) = self.layer.stages
        outputs = [_product(self.packed(expert, name), hidden_states) for name in first]
        return _product(self.packed(expert, last), inner(self.activation, outputs))

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
        index, weights = self.family.routing(routing)
        assigned = Assignment.group(index, weights, self.layer.count)
        out = torch.zeros_like(hidden_states)
        for expert in range(self.layer.count):
            rows, gates = assigned.of_expert(expert)
            if len(rows):
                result = self.run_expert(expert, hidden_states[rows])
                out.index_add_(0, rows, (result * gates[:, None]).to(out.dtype))
        return out

    def _apply(self, fn: Any, recurse: bool = True) -> PackedExperts:
        # `.to(dtype)` casts float buffers, but levels are data: they travel as integers of the same size
        floats = {name: b for name, b in self._buffers.items() if b is not None and b.is_floating_point()}
        for name, buffer in floats.items():
            self._buffers[name] = buffer.view(torch.int16 if buffer.itemsize == 2 else torch.int32)
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            for name, buffer in floats.items():
                self._buffers[name] = self.get_buffer(name).view(buffer.dtype)
            self._checked.clear()  # its views are of buffers that fn may have replaced
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._checked.clear()  # other codes must be checked anew
        super()._load_from_state_dict(*args, **kwargs)

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
    if settings.get("quant_method") != "qmoe":
        raise CheckpointError(f"{directory} is not compressed by qmoe. Run: qmoe compress {directory} OUT")
    if (found := settings.get("format")) != FORMAT:
        raise FormatError(f"{directory} has format {found}; this qmoe-lite reads {FORMAT}. Upgrade qmoe-lite.")
    return settings  # type: ignore[no-any-return]


def _codebooks(checkpoint: Checkpoint) -> dict[str, dict[str, Codebook]]:
    """Give the codebook of each experts module's projections; raise FormatError where one does not match its hash."""
    settings = quantization_of(checkpoint)
    try:
        books = [Codebook.from_config(entry) for entry in settings["codebooks"]]
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
