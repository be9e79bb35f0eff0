"""Finished groups of the layer under way: what was solved is kept, so that a run that was killed solves only the rest.

A group's file holds its digits, and what the layer's compressor knew after it. The group's outputs are computed from
the digits once more, by the same code and in the same order, so that a resumed run ends with the same bytes.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qmoe_lite.checkpoint import atomic as files
from qmoe_lite.compression.list_buffer import ListBuffer
from qmoe_lite.compression.tally import Solved
from qmoe_lite.errors import FormatError
from qmoe_lite.quantization.digits import squeeze, unsqueeze
from qmoe_lite.quantization.grid import Quantized, grid_from_config

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


class GroupFiles:
    """The finished groups of the layer that is under way, a file each.

    Parameters
    ----------
    directory : Path
        Is made with the first file.

    Notes
    -----
    A file is named by the layer and the group's experts: where a resumed run forms other groups, they are solved anew.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def write(self, layer: int, group: range, found: Group) -> None:
        """Keep a group.

        Raises
        ------
        OutputError
            The disk is full, or the place not writable.
        """
        import zstandard

        plain = {name: _plain(solved) for name, solved in found.solved.items()}
        whole = io.BytesIO()
        torch.save({"solved": plain, "after": found.after}, whole)  # not to the file: on a full disk torch aborts

        def fill(file: Path) -> None:
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(zstandard.ZstdCompressor(level=1, write_checksum=True).compress(whole.getbuffer()))

        files.write_atomically(self._file(layer, group), fill)

    def read(self, layer: int, group: range, device: torch.device) -> Group | None:
        """Return a group that was kept, its tensors on a device; None where there is none.

        Raises
        ------
        FormatError
            The file was damaged since `discard_damaged` looked at it.
        """
        import zstandard

        file = self._file(layer, group)
        try:
            with file.open("rb") as raw, zstandard.ZstdDecompressor().stream_reader(raw) as source:
                known = torch.load(io.BytesIO(source.read()), weights_only=True)
        except FileNotFoundError:
            return None
        except (OSError, zstandard.ZstdError, RuntimeError) as error:
            raise FormatError(f"{file} is damaged. Run the same command again.") from error
        return Group({name: _solved(plain, device) for name, plain in known["solved"].items()}, known["after"])

    def discard_damaged(self) -> list[Path]:
        """Remove the files that are not what was written; return them."""
        damaged = [file for file in sorted(self._directory.glob("*.zst")) if not ListBuffer.whole(file)]
        for file in damaged:
            file.unlink()
        return damaged

    def clear(self) -> None:
        """Remove all: the layer is finished."""
        shutil.rmtree(self._directory, ignore_errors=True)

    def _file(self, layer: int, group: range) -> Path:
        return self._directory / f"{layer}-{group.start}-{group.stop}.zst"


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


def _solved(plain: Mapping[str, Any], device: torch.device) -> Solved:
    grid, digits = grid_from_config(plain["grid"]), plain["digits"]
    if grid.alphabet <= _FEW:
        digits = torch.from_numpy(unsqueeze(digits.numpy(), plain["shape"], grid.alphabet))
    else:
        digits = digits.to(torch.int16)
    tensors = {name: None if plain[name] is None else plain[name].to(device) for name in _TENSORS}
    quantized = Quantized(digits.to(device), hessian_class=plain["hessian_class"], **tensors)
    return Solved(quantized, plain["tokens"], plain["classes"], grid)
