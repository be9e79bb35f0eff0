"""Writes a sparse layer's file expert by expert, so that no more than one expert's codes are in memory."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from qmoe_lite.checkpoint.atomic import crc32, write_atomically
from qmoe_lite.checkpoint.format import ALIGNMENT, PARTS, checksum, pack_experts, tensor_name
from qmoe_lite.checkpoint.sources import DTYPES
from qmoe_lite.coding.packed import PackedMatrix

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_PAGE = 4096  # what the header is filled up to, so that codes begin on a page
_ENTRY = 200  # bytes that a tensor takes in the header at most, besides its name


def write_experts(path: Path, projections: Mapping[str, Iterable[PackedMatrix]]) -> dict[str, int]:
    """Write a safetensors file of all experts of a layer crash-safely.

    Parameters
    ----------
    path : Path
        Of the file.
    projections : mapping, full name of a projection to its experts' matrices
        Of codebooks of few digits; each is asked for when the one before is written.

    Returns
    -------
    dict, tensor name to int
        The CRC-32 of each tensor.

    Raises
    ------
    OutputError
        The disk is full or the place not writable.

    Notes
    -----
    The same tensors as `pack_experts` makes. All codes stand first and the header is written last, into room that was
    left for it: what stands in it is known only then.
    """
    sums: dict[str, int] = {}

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            _write(file, projections, sums)

    write_atomically(path, write)
    return sums


def _write(file: BinaryIO, projections: Mapping[str, Iterable[PackedMatrix]], sums: dict[str, int]) -> None:
    names = [tensor_name(name, part) for name in projections for part in PARTS]
    room = -(-(8 + sum(len(json.dumps(name)) + _ENTRY for name in names)) // _PAGE) * _PAGE
    file.seek(room)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0

    def enter(name: str, dtype: torch.dtype, shape: Iterable[int], length: int, crc: int) -> None:
        nonlocal place
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [place, place + length]}
        sums[name], place = crc, place + length

    rest: dict[str, Tensor] = {}
    for name, matrices in projections.items():
        codes = _Codes()
        for piece in codes.pieces(matrices):
            file.write(piece)
        enter(tensor_name(name, "codes"), torch.uint8, [codes.length], codes.length, codes.crc)
        rest |= {tensor_name(name, part): tensor for part, tensor in codes.others().items()}
    for name in sorted(rest, key=lambda name: (-rest[name].itemsize, name)):  # each stands on a multiple of its size
        tensor = rest[name].contiguous()
        file.write(tensor.view(-1).view(torch.uint8).numpy().data)
        enter(name, tensor.dtype, tensor.shape, tensor.nbytes, crc32(tensor))
    text = json.dumps(header, separators=(",", ":")).encode().ljust(room - 8)
    file.seek(0)
    file.write(len(text).to_bytes(8, "little") + text)


class _Codes:
    """One projection's codes on their way into a file; what else is stored of it waits here."""

    def __init__(self) -> None:
        self.length = self.crc = 0
        self._offsets = [0]
        self._sums: list[int] = []
        self._matrices: list[PackedMatrix] = []  # without their codes

    def pieces(self, matrices: Iterable[PackedMatrix]) -> Iterator[bytes]:
        for packed in matrices:
            own = packed.codes.numpy().tobytes()
            self._sums.append(zlib.crc32(own))
            self._matrices.append(replace(packed, codes=packed.codes[:0].clone()))
            filled = own.ljust(-(-len(own) // ALIGNMENT) * ALIGNMENT, b"\0")
            self.crc, self.length = zlib.crc32(filled, self.crc), self.length + len(filled)
            self._offsets.append(self.length)
            yield filled

    def others(self) -> dict[str, Tensor]:
        """Return the other parts of the projection."""
        matrices = self._matrices
        if any(packed.row_codewords.dtype == torch.uint16 for packed in matrices):  # as `pack_experts` does
            matrices = [replace(packed, row_codewords=packed.row_codewords.to(torch.uint16)) for packed in matrices]
        stored = pack_experts(matrices)
        del stored["codes"]
        sums = [checksum(packed, crc) for packed, crc in zip(matrices, self._sums, strict=True)]
        return stored | {
            "expert_offsets": torch.tensor(self._offsets, dtype=torch.int64),
            "checksums": torch.tensor(sums, dtype=torch.int64),
        }
