"""ExpertStack: the parts of one projection of one layer, from which an expert's matrix is sliced and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qmoe_lite.checkpoint.format import ALIGNMENT, checksum, tensor_name
from qmoe_lite.checkpoint.reader import Place
from qmoe_lite.coding.codes import Code, bytes_of_stream
from qmoe_lite.coding.dictionary import Dictionary
from qmoe_lite.coding.exceptions import block_rows
from qmoe_lite.coding.matmul import MatrixStack, Stack
from qmoe_lite.coding.narrow import HEADER_BYTES, bits_of_numbers, unpack_numbers, unpack_scales
from qmoe_lite.coding.packed import PackedMatrix
from qmoe_lite.coding.validation import validate
from qmoe_lite.coding.windows_product import WindowStack
from qmoe_lite.errors import FormatError


class ExpertStack:
    """One projection of all experts of a layer, as it is stored.

    Parameters
    ----------
    name : str
        Of the projection: "model.layers.0.mlp.experts.gate_proj".
    experts : int
        Number of experts.
    shape : tuple of int
        (rows, columns) of each matrix.
    codebook : Codebook or Dictionary
    parts : dict, part to tensor
        All that `format.parts_of` names, on one device; without "codes" where these lie elsewhere an expert at a time.
    codes_bytes : int, optional
        Length of the codes' tensor; needed where it is not among the parts.
    first : ExpertStack, optional
        Of the stage's first projection, whose column scales are this one's where it has none of its own.

    Attributes
    ----------
    valid : bool array, shape (experts,)
        Whose codes are known to decode to exactly their rows.

    Raises
    ------
    FormatError
        A tensor has another shape or dtype than the projection needs.
    """

    def __init__(
        self,
        name: str,
        experts: int,
        shape: tuple[int, int],
        codebook: Code,
        parts: dict[str, Tensor],
        codes_bytes: int | None = None,
        first: ExpertStack | None = None,
    ) -> None:
        self.name, self.experts, self.shape, self.codebook, self.parts = name, experts, shape, codebook, parts
        self._first = first
        self._check_parts()
        self.codes_bytes = len(parts["codes"]) if codes_bytes is None else codes_bytes
        self.valid: NDArray[np.bool_] = np.zeros(experts, dtype=bool)
        self._spans: dict[int, tuple[int, int]] = {}

    def _check_parts(self) -> None:
        experts, rows = self.experts, self.shape[0]
        expected = {
            "expert_offsets": ((experts + 1,), (torch.int64,)),
            "row_codewords": ((experts, rows), (torch.uint8, torch.uint16)),
            "fewest_codewords": ((experts,), (torch.int32,)),
            "checksums": ((experts,), (torch.int64,)),
        }
        if self._is_narrow("row_codewords"):
            del expected["row_codewords"]
        for part, (shape, dtypes) in expected.items():
            found = self.parts[part]
            if tuple(found.shape) != shape or found.dtype not in dtypes:
                raise FormatError(
                    f"{tensor_name(self.name, part)} is {found.dtype} {tuple(found.shape)}; "
                    f"config.json promises {' or '.join(map(str, dtypes))} {shape}. Fetch both again."
                )
        if isinstance(self.codebook, Dictionary):
            self._check_window_parts()
        levels, codes = self.parts["levels"], self.parts.get("codes")
        usual = levels.dim() == 3 and tuple(levels.shape[:2]) == (experts, rows) and levels.is_floating_point()
        if not usual and not self._is_narrow("levels"):
            raise FormatError(f"{tensor_name(self.name, 'levels')} is not (experts, rows, levels) of floats.")
        if codes is not None and (codes.dim() != 1 or codes.dtype != torch.uint8):
            raise FormatError(f"{tensor_name(self.name, 'codes')} is not a row of bytes. Fetch the file again.")

    def _check_window_parts(self) -> None:
        rows, columns = self.shape
        blocks = -(-rows // block_rows(columns))
        widths = (columns,) if self._first is None else (0, columns)
        expected: dict[str, tuple[tuple[int | None, ...], torch.dtype]] = {
            "column_scales": ((self.experts, None), torch.bfloat16),
            "exception_starts": ((self.experts, blocks + 1), torch.int32),
            "exception_positions": ((None,), torch.uint16),
            "exception_values": (tuple(self.parts["exception_positions"].shape), torch.int8),
        }
        if self._is_narrow("column_scales"):
            del expected["column_scales"]
        for part, (shape, dtype) in expected.items():
            found = self.parts[part]
            fits = found.dim() == len(shape) and all(n in (None, m) for n, m in zip(shape, found.shape, strict=True))
            if not fits or found.dtype != dtype or (part == "column_scales" and found.shape[1] not in widths):
                wanted = str(shape).replace("None", "any")
                raise FormatError(
                    f"{tensor_name(self.name, part)} is {found.dtype} {tuple(found.shape)}; "
                    f"config.json promises {dtype} {wanted}. Fetch both again."
                )

    def _is_narrow(self, name: str) -> bool:
        """Return whether a part is stored in as many bits as its numbers need, as a dictionary's may be."""
        part = self.parts[name]
        if not isinstance(self.codebook, Dictionary) or part.dtype != torch.uint8 or part.dim() != 2:
            return False
        rows, columns = self.shape
        size, count = part.shape[1], columns if name == "column_scales" else rows
        header, most = (0, 8) if name == "row_codewords" else (HEADER_BYTES, 16)
        return len(part) == self.experts and bits_of_numbers(size - header, count) in range(1, most + 1)

    @cached_property
    def held(self) -> dict[str, Tensor]:
        """The parts as they are multiplied: levels and column scales are floats, row lengths whole bytes."""
        rows, columns = self.shape
        held = dict(self.parts)
        if held["row_codewords"].shape[1] != rows:
            lengths = held["row_codewords"]
            numbers = unpack_numbers(lengths.cpu().numpy(), rows)
            held["row_codewords"] = torch.from_numpy(numbers.astype(np.uint8)).to(lengths.device)
        if self._is_narrow("levels"):
            held["levels"] = unpack_scales(held["levels"], rows)[:, :, None]
        if "column_scales" in held and self._is_narrow("column_scales"):
            held["column_scales"] = unpack_scales(held["column_scales"], columns)
        return held

    @property
    def column_scales(self) -> Tensor:
        """Column scales of a dictionary's experts, (E, C), its own or the first projection's."""
        own = self.held["column_scales"]
        return self._first.column_scales if self._first is not None and own.shape[1] == 0 else own

    @cached_property
    def _float_scales(self) -> NDArray[np.float32]:
        if self._first is not None and self.parts["column_scales"].shape[1] == 0:
            return self._first._float_scales  # the same array: x is laid out for both at once
        scales: NDArray[np.float32] = self.column_scales.float().numpy()
        return scales

    @cached_property
    def _steps(self) -> NDArray[np.float32]:
        steps: NDArray[np.float32] = self.held["levels"][:, :, 0].float().contiguous().numpy()
        return steps

    @cached_property
    def _exception_starts(self) -> NDArray[np.int32]:
        starts: NDArray[np.int32] = self.parts["exception_starts"].cpu().numpy()  # asked of a GPU once
        return starts

    @property
    def nbytes(self) -> int:
        """Bytes of all parts that are here."""
        return sum(tensor.nbytes for tensor in self.parts.values())

    def name_of(self, expert: int) -> str:
        """Return what errors call one expert's matrix."""
        return f"expert {expert} of {self.name}"

    def span(self, expert: int) -> tuple[int, int]:
        """Return where in the codes' tensor an expert's stream begins, and its bytes with the zeros behind it.

        Raises
        ------
        FormatError
            It does not lie inside the tensor.
        """
        if expert in self._spans:
            return self._spans[expert]
        start, stop = self.parts["expert_offsets"][expert : expert + 2].tolist()
        lengths = self.matrix(expert, torch.empty(0, dtype=torch.uint8)).count_codewords()
        used = bytes_of_stream(self.codebook, int(lengths.sum()))
        if start < 0 or start % ALIGNMENT or not start <= start + used <= stop <= self.codes_bytes:
            raise FormatError(f"{self.name_of(expert)} does not lie inside its codes. Fetch or make the file again.")
        self._spans[expert] = start, used
        return start, used

    def matrix(self, expert: int, codes: Tensor) -> PackedMatrix:
        """Return one expert's matrix, of its own codes and views of the other parts; it may not have been checked."""
        return PackedMatrix(
            codes=codes,
            row_codewords=self.held["row_codewords"][expert],
            levels=self.held["levels"][expert],
            codebook=self.codebook,
            columns=self.shape[1],
            fewest_codewords=int(self.parts["fewest_codewords"].numpy()[expert]),
            _validated=bool(self.valid[expert]),
            **self._window_parts(expert),
        )

    def _window_parts(self, expert: int) -> dict[str, Any]:
        """Return one expert's column scales and exceptions, where the code is a dictionary."""
        if not isinstance(self.codebook, Dictionary):
            return {}
        starts = self.parts["exception_starts"][expert]
        first, last = int(self._exception_starts[expert, 0]), int(self._exception_starts[expert, -1])
        if not 0 <= first <= last <= len(self.parts["exception_positions"]):
            raise FormatError(
                f"{self.name_of(expert)} has exceptions outside their list. Fetch or make the file again."
            )
        return {
            "column_scales": self.column_scales[expert],
            "exception_starts": starts - first,
            "exception_positions": self.parts["exception_positions"][first:last],
            "exception_values": self.parts["exception_values"][first:last],
        }

    def checked(self, expert: int) -> PackedMatrix:
        """Return one expert's matrix as it is stored, on the CPU, once it has passed every check.

        Raises
        ------
        FormatError
            It does not lie inside its codes, its checksum differs, or its codes do not decode to exactly its rows.
        """
        start, used = self.span(expert)
        packed = self.matrix(expert, self.parts["codes"][start : start + used])
        self.check_sum(expert, packed)
        self.check_codes(expert, packed)
        return packed

    def check_sum(self, expert: int, packed: PackedMatrix) -> None:
        """Raise FormatError unless an expert's matrix is, byte for byte, what was written."""
        if checksum(packed) != int(self.parts["checksums"][expert]):
            raise FormatError(f"{self.name_of(expert)} is damaged (checksum). Fetch or make the file again.")

    def check_codes(self, expert: int, packed: PackedMatrix) -> None:
        """Raise FormatError unless an expert's matrix decodes to exactly its rows; note that it is valid."""
        try:
            validate(packed)
        except FormatError as error:
            raise FormatError(f"{self.name_of(expert)}: {error}") from error
        self.valid[expert] = True

    def checked_on_device(self) -> list[PackedMatrix]:
        """Return all experts' matrices where they lie, checked in one copy of the parts on the CPU; errors as there."""
        on_host = {part: tensor.cpu() for part, tensor in self.parts.items()}
        if isinstance(self.codebook, Dictionary):
            on_host["column_scales"] = self.column_scales.cpu()
        host = ExpertStack(self.name, self.experts, self.shape, self.codebook, on_host)
        found = []
        for expert in range(self.experts):
            known, (start, used) = host.checked(expert), host.span(expert)
            found.append(
                replace(
                    known,
                    codes=self.parts["codes"][start : start + used],
                    row_codewords=self.held["row_codewords"][expert],
                    levels=self.held["levels"][expert],
                    **self._window_parts(expert),
                )
            )
        return found

    def for_product(self, codes: NDArray[np.uint8] | None = None, offsets: NDArray[np.int64] | None = None) -> Stack:
        """Return all matrices as the CPU's kernels take them, whether checked or not.

        Parameters
        ----------
        codes, offsets : arrays, optional
            Memory that holds the codes, and where each expert's begin there; by default the parts.
        """
        if isinstance(self.codebook, Dictionary):
            return WindowStack(
                codes=self.parts["codes"].numpy() if codes is None else codes,
                offsets=self.parts["expert_offsets"].numpy() if offsets is None else offsets,
                row_codewords=self.held["row_codewords"].numpy(),
                fewest=self.parts["fewest_codewords"].numpy(),
                steps=self._steps,
                column_scales=self._float_scales,
                dictionary=self.codebook,
                columns=self.shape[1],
                exception_starts=self.parts["exception_starts"].numpy(),
                exception_positions=self.parts["exception_positions"].numpy(),
                exception_values=self.parts["exception_values"].numpy(),
            )
        return MatrixStack(
            codes=self.parts["codes"].numpy() if codes is None else codes,
            offsets=self.parts["expert_offsets"].numpy() if offsets is None else offsets,
            row_codewords=self.held["row_codewords"].numpy(),
            fewest=self.parts["fewest_codewords"].numpy(),
            levels=self.held["levels"],
            codebook=self.codebook,
            columns=self.shape[1],
        )


def index_bytes(places: Mapping[str, Place], shape: tuple[int, int]) -> int:
    """Return the memory that a projection's parts but the codes take: as they are stored, and as they are multiplied.

    Row lengths and scales in few bits are unpacked; of a dictionary's, steps and scales are held in float32 too.
    """
    total = sum(place.length for part, place in places.items() if part != "codes")
    if "column_scales" not in places:
        return total
    (rows, columns), lengths = shape, places["row_codewords"]
    if lengths.dtype == torch.uint8 and lengths.shape[1] != rows:
        total += lengths.shape[0] * rows
    for part, count in (("levels", rows), ("column_scales", columns)):
        experts, width, *_ = places[part].shape
        if width:  # else they are the first projection's
            total += experts * count * (6 if places[part].dtype == torch.uint8 else 4)
    return total
