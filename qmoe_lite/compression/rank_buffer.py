"""Activations of all samples, of which each rank of a run has those of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from qmoe_lite.compression.list_buffer import ListBuffer
from qmoe_lite.compression.ranks import Together


class RankBuffer(ListBuffer):
    """A list buffer whose samples and rows have the numbers that they have on one rank alone.

    What this rank has can be read and written; `save` and `load` are of all rows, and all ranks call them together.

    Parameters
    ----------
    ranks : Together
        Of the run.
    cuts : list of int, length ranks + 1
        First sample of each rank, and the number of all.
    tokens, width, dtype, spill
        As for `ListBuffer`.

    Attributes
    ----------
    bounds : list of int, length ranks + 1
        First row of each rank, and the number of all.
    """

    def __init__(
        self, ranks: Together, cuts: list[int], tokens: int, width: int, dtype: torch.dtype, spill: Path | None
    ) -> None:
        self._ranks, self._own = ranks, range(*cuts[ranks.rank : ranks.rank + 2])
        self.bounds = [cut * tokens for cut in cuts]
        self._begin, self._end = self.bounds[ranks.rank : ranks.rank + 2]
        super().__init__(len(self._own), tokens, width, dtype, spill)
        self._cuts, self.shape = cuts, (cuts[-1], tokens, width)

    def another(self, samples: int) -> RankBuffer:
        """Make a buffer of float32 for the first samples, which are where those of this one are."""
        cuts = [min(cut, samples) for cut in self._cuts]
        return RankBuffer(self._ranks, cuts, *self.shape[1:], torch.float32, self.spill)

    @property
    def own(self) -> range:
        return self._own

    def _span(self, start: int, stop: int) -> slice:
        span = super()._span(start, stop)
        assert self._begin <= span.start <= span.stop <= self._end
        return slice(span.start - self._begin, span.stop - self._begin)

    def gather(self, rows: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return super().gather(rows - self._begin, dtype)

    def everywhere(self, rows: Tensor) -> Tensor:  # all ranks call it together
        own = rows[(rows >= self._begin) & (rows < self._end)]
        return self._ranks.join(self.gather(own))

    def add(self, rows: Tensor, values: Tensor) -> None:
        super().add(rows - self._begin, values)

    def save(self, file: Path) -> None:
        """Write the rows of all ranks to a file: the first rank does."""
        if self._ranks.first:
            super().save(file)
        else:
            self._ranks.send(map(self._rows.get, self._chunks(self._end - self._begin)))

    def _pieces(self) -> Iterator[Tensor]:
        yield from map(self._rows.get, self._chunks(self._end - self._begin))
        for rank in range(1, self._ranks.count):
            for part in self._chunks(self.bounds[rank + 1] - self.bounds[rank]):
                yield self._ranks.receive(rank, (part.stop - part.start, self.shape[2]), self.dtype)

    def _keep(self, part: slice, values: Tensor) -> None:
        """Keep what is this rank's of the rows that `load` reads."""
        start, stop = max(part.start, self._begin), min(part.stop, self._end)
        if start < stop:
            own = values[start - part.start : stop - part.start]
            self._rows.put(slice(start - self._begin, stop - self._begin), own)
