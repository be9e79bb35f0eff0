"""Activations of all samples, addressed by sample and by expert, in CPU memory or on disk.

QMoE, section 3.1: layer after layer is calibrated on all samples, so the activations between two blocks must be kept,
and each expert gathers its own tokens from among all of them. One big buffer makes both a slice or an index. With
samples of equal length, sample i is rows [i * tokens, (i + 1) * tokens).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from qmoe_lite.compression.spill import SpilledRows
from qmoe_lite.errors import FormatError, ShapeError

_CHUNK = 1 << 26  # bytes copied or compressed at a time
_HEADER = 18  # bytes of a frame's header, at most


class _Rows(Protocol):
    """Where the rows of a buffer are, all of one width and dtype."""

    def get(self, where: slice | Tensor) -> Tensor:
        """Return some rows, by a span or by their numbers."""

    def put(self, where: slice | Tensor, values: Tensor) -> None:
        """Store some rows."""


class _RowsInMemory:
    def __init__(self, rows: int, width: int, dtype: torch.dtype) -> None:
        self._all = torch.empty(rows, width, dtype=dtype)

    def get(self, where: slice | Tensor) -> Tensor:
        return self._all[where]

    def put(self, where: slice | Tensor, values: Tensor) -> None:
        self._all[where] = values


class ListBuffer:
    """One row of activations for each token of each sample.

    Parameters
    ----------
    samples, tokens, width : int
        Samples, tokens of each, values of a token.
    dtype : torch dtype
        float32, or bfloat16 at half the memory.
    spill : path, optional
        Keep the rows on disk, in this folder, instead of in memory.

    Attributes
    ----------
    shape : tuple of int
        Samples, tokens of each, values of a token.
    dtype : torch dtype
        Of a value.
    """

    def __init__(
        self, samples: int, tokens: int, width: int, dtype: torch.dtype = torch.float32, spill: Path | None = None
    ) -> None:
        self.shape, self.dtype, self.spill = (samples, tokens, width), dtype, spill
        size = samples * tokens, width, dtype
        self._rows: _Rows = _RowsInMemory(*size) if spill is None else SpilledRows(spill, *size)

    def another(self, samples: int) -> ListBuffer:
        """Make a buffer of float32 for the first samples, where those of this one are."""
        return ListBuffer(samples, *self.shape[1:], spill=self.spill)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def rows(self) -> Tensor:
        """All rows, (samples * tokens, width): the memory itself, or a copy of what is on disk."""
        return self._rows.get(slice(0, self.shape[0] * self.shape[1]))

    @property
    def own(self) -> range:
        """Which samples' activations are here."""
        return range(self.shape[0])

    @property
    def nbytes(self) -> int:
        return self.shape[0] * self.shape[1] * self.shape[2] * self.dtype.itemsize

    def read(self, samples: slice, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return some samples' activations, shape (samples, tokens, width); a copy unless the dtypes agree."""
        start, stop, _ = samples.indices(len(self))
        return self._rows.get(self._span(start, stop)).view(stop - start, *self.shape[1:]).to(dtype)

    def write(self, samples: slice, values: Tensor) -> None:
        """Store some samples' activations, shape (samples, tokens, width)."""
        start, stop, _ = samples.indices(len(self))
        if tuple(values.shape) != (stop - start, *self.shape[1:]):
            raise ShapeError(f"values {tuple(values.shape)} do not fit {(stop - start, *self.shape[1:])}.")
        self._rows.put(self._span(start, stop), values.reshape(-1, self.shape[2]).to("cpu", self.dtype))

    def _span(self, start: int, stop: int) -> slice:
        return slice(start * self.shape[1], stop * self.shape[1])

    def gather(self, rows: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the activations of some tokens, by row number; shape (len(rows), width)."""
        return self._rows.get(rows).to(dtype)

    def everywhere(self, rows: Tensor) -> Tensor:
        """Return what `gather` does, of ascending numbers, whatever rank of a run has the rows."""
        return self.gather(rows)

    def add(self, rows: Tensor, values: Tensor) -> None:
        """Add to the activations of some tokens; no row may occur twice."""
        self._rows.put(rows, (self._rows.get(rows).float() + values).to(self.dtype))

    def zero(self) -> None:
        """Set all to 0."""
        for part in self._chunks(len(self.own) * self.shape[1]):
            self._rows.put(part, torch.zeros(part.stop - part.start, self.shape[2], dtype=self.dtype))

    def _chunks(self, rows: int | None = None) -> Iterator[slice]:
        """Cut all rows, or so many, into pieces that are copied at a time."""
        rows = self.shape[0] * self.shape[1] if rows is None else rows
        step = max(1, _CHUNK // max(1, self.shape[2] * self.dtype.itemsize))
        return (slice(start, min(start + step, rows)) for start in range(0, rows, step))

    def _pieces(self) -> Iterator[Tensor]:
        return map(self._rows.get, self._chunks())

    def _keep(self, part: slice, values: Tensor) -> None:
        self._rows.put(part, values)

    def save(self, file: Path) -> None:
        """Write all rows, compressed by zstandard, to a file object's path (no rename, no fsync)."""
        import zstandard  # here, since experts run where it is not installed

        frame = zstandard.ZstdCompressor(level=1, write_checksum=True).compressobj(size=self.nbytes)
        with file.open("wb") as out:
            for piece in self._pieces():
                out.write(frame.compress(piece.view(torch.uint8).view(-1).numpy().data))
            out.write(frame.flush())

    @staticmethod
    def whole(file: Path) -> bool:
        """Return whether a file holds one frame of zstandard to its end, as `save` writes; all of it is read."""
        import zstandard

        found = 0
        try:
            with file.open("rb") as raw, zstandard.ZstdDecompressor().stream_reader(raw) as source:
                expected = zstandard.frame_content_size(raw.read(_HEADER))
                raw.seek(0)
                while piece := source.read(_CHUNK):
                    found += len(piece)
        except (OSError, zstandard.ZstdError):
            return False
        return found == expected  # the reader ends quietly where a file does

    def load(self, file: Path) -> None:
        """Read what `save` wrote.

        Raises
        ------
        FormatError
            The file is damaged or holds another number of bytes.
        """
        import zstandard

        try:
            with file.open("rb") as raw, zstandard.ZstdDecompressor().stream_reader(raw) as source:
                for part in self._chunks():
                    values = torch.empty(part.stop - part.start, self.shape[2], dtype=self.dtype)
                    if source.readinto(values.view(torch.uint8).view(-1).numpy().data) != values.nbytes:
                        break
                    self._keep(part, values)
                else:
                    if not source.read(1):
                        return
        except (OSError, zstandard.ZstdError) as error:
            raise FormatError(f"{file} is damaged ({error}). Start over with --restart.") from error
        raise FormatError(f"{file} holds other activations than this run needs. Start over with --restart.")
