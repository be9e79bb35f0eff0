"""Finished groups of the layer under way: what was solved is kept, so that a run that was killed solves only the rest.

A group's record has its digits, and what the layer's compressor knew after it. The group's outputs are computed from
the digits once more, by the same code and in the same order, so that a resumed run ends with the same bytes.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from struct import Struct
from typing import Any

import torch
from torch import Tensor

from qmoe_lite.checkpoint.atomic import unwritable
from qmoe_lite.compression.tally import Solved
from qmoe_lite.quantization.digits import squeeze, unsqueeze
from qmoe_lite.quantization.grid import Quantized, grid_from_config

_LENGTH = Struct("<Q")  # bytes of a record, which follows
_FEW = 4  # digits of an alphabet that are kept several to a byte
_TENSORS = ("levels", "error", "fallback", "column_scales")


@dataclass(frozen=True)
class Group:
    """A finished group of experts.

    Attributes
    ----------
    solved : dict, projection to Solved
        Of its experts.
    after : dict
        What the layer's compressor knew then, as plain values.
    """

    solved: dict[str, Solved]
    after: dict[str, Any]

    def to(self, device: torch.device) -> Group:
        """Return the same group, its tensors on a device."""
        return Group({name: _moved(each, device) for name, each in self.solved.items()}, self.after)


class GroupLog:
    """The finished groups of a layer, one record after another in a file of its own.

    Parameters
    ----------
    directory : Path
        OUT.partial.

    Notes
    -----
    A record is a frame of zstandard with its checksum. Nothing waits for the disk: a killed process loses no record,
    and of what a power cut takes the checksum tells. Groups are read, then written, in their order: what follows a
    record that is not whole is given up.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._done: dict[int, int] = {}  # bytes of a layer's file that were read or written

    def write(self, layer: int, group: range, found: Group) -> None:
        """Keep a group, in the place of what the file holds after the last one that was read or written.

        Raises
        ------
        OutputError
            The disk is full, or the place not writable.
        """
        self.append(layer, record_of(group, found))

    def append(self, layer: int, record: bytes) -> None:
        """Keep a group's record, as `write` does; it may be another rank's."""
        begin = self._done.get(layer, 0)
        try:
            _append(self._file(layer), begin, record)
        except OSError as error:
            with suppress(OSError), self._file(layer).open("r+b") as file:
                file.truncate(begin)
            raise unwritable(self._file(layer), error) from error
        self._done[layer] = begin + _LENGTH.size + len(record)

    def read(self, layer: int, group: range, device: torch.device) -> Group | None:
        """Return the next group, its tensors on a device; None where it was not kept, or other groups were formed."""
        begin = self._done.get(layer, 0)
        try:
            whole, end = next(_records(self._file(layer), begin), (None, begin))
        except ValueError:
            return None
        found = None if whole is None else group_of(whole, group, device)
        if found is not None:
            self._done[layer] = end
        return found

    def damaged(self) -> list[Path]:
        """Return the files that hold a damaged record; what was being written when a run was killed is none."""
        found = []
        for file in sorted(self._directory.glob("groups-*.log")):
            try:
                for _ in _records(file, 0):
                    pass
            except ValueError:
                found.append(file)
        return found

    def clear(self, layer: int) -> None:
        """Remove the groups of a finished layer."""
        self._file(layer).unlink(missing_ok=True)

    def _file(self, layer: int) -> Path:
        return self._directory / f"groups-{layer}.log"


def record_of(group: range, found: Group) -> bytes:
    """Return a group's record; see `GroupLog`."""
    import zstandard

    plain = {name: _plain(solved) for name, solved in found.solved.items()}
    whole = io.BytesIO()
    torch.save({"experts": (group.start, group.stop), "solved": plain, "after": found.after}, whole)
    return zstandard.ZstdCompressor(level=1, write_checksum=True).compress(whole.getbuffer())


def read_record(record: bytes, group: range, device: torch.device) -> Group:
    """Return the group that a record is of, its tensors on a device."""
    import zstandard

    found = group_of(zstandard.ZstdDecompressor().decompress(record), group, device)
    assert found is not None
    return found


def group_of(whole: bytes, group: range, device: torch.device) -> Group | None:
    """Return the group that a record holds, decompressed; None where it is of other experts."""
    known = torch.load(io.BytesIO(whole), weights_only=True)
    if known["experts"] != (group.start, group.stop):
        return None
    return Group({name: _solved(plain, device) for name, plain in known["solved"].items()}, known["after"])


def _append(path: Path, begin: int, record: bytes) -> None:
    """Write a record where the file is to go on."""
    with path.open("r+b" if begin else "wb") as file:
        file.truncate(begin)
        file.seek(begin)
        file.write(_LENGTH.pack(len(record)) + record)


def _records(path: Path, begin: int) -> Iterator[tuple[bytes, int]]:
    """Yield what records hold, and where each ends, up to half a one; ValueError for one that is damaged."""
    import zstandard

    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(begin)
        while len(head := file.read(_LENGTH.size)) == _LENGTH.size:
            (length,) = _LENGTH.unpack(head)
            if file.tell() + length > path.stat().st_size:
                return
            try:
                whole = zstandard.ZstdDecompressor().decompress(file.read(length))
            except (OSError, MemoryError, zstandard.ZstdError) as error:
                raise ValueError(f"{path} is damaged") from error
            yield whole, file.tell()


def _plain(solved: Solved) -> dict[str, Any]:
    """Return tensors and plain values; the digits as few bytes as are quickly made."""
    found, grid = solved.quantized, solved.grid
    assert grid is not None
    digits = found.digits.cpu()
    if grid.alphabet <= _FEW:
        digits = torch.from_numpy(squeeze(digits.numpy(), grid.alphabet))
    elif digits.abs().max() <= torch.iinfo(torch.int8).max:
        digits = digits.to(torch.int8)
    tensors: dict[str, Tensor | None] = {name: getattr(found, name) for name in _TENSORS}
    return {
        "digits": digits,
        "shape": tuple(found.digits.shape),
        **{name: None if tensor is None else tensor.cpu() for name, tensor in tensors.items()},
        "hessian_class": found.hessian_class,
        "tokens": solved.tokens,
        "classes": solved.classes,
        "grid": grid.to_config(),
    }


def _moved(solved: Solved, device: torch.device) -> Solved:
    found = solved.quantized
    tensors = {name: getattr(found, name) for name in ("digits", *_TENSORS)}
    moved: dict[str, Any] = {name: None if tensor is None else tensor.to(device) for name, tensor in tensors.items()}
    return solved._replace(quantized=replace(found, **moved))


def _solved(plain: Mapping[str, Any], device: torch.device) -> Solved:
    grid, digits = grid_from_config(plain["grid"]), plain["digits"]
    if grid.alphabet <= _FEW:
        digits = torch.from_numpy(unsqueeze(digits.numpy(), plain["shape"], grid.alphabet))
    else:
        digits = digits.to(torch.int16)
    tensors: dict[str, Any] = {name: None if plain[name] is None else plain[name].to(device) for name in _TENSORS}
    quantized = Quantized(digits.to(device), hessian_class=plain["hessian_class"], **tensors)
    return Solved(quantized, plain["tokens"], plain["classes"], grid)
