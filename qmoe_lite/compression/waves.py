"""Groups of experts in waves, one group for each rank: their tokens come to it, their outputs go back.

A rank has the activations of its own samples and solves the experts of its own groups. What a group's rank is given are
the rows in the order that they have on one rank alone, and outputs are added expert by expert in that order too, so
that every sum is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from qmoe_lite.compression.layer_parts import Inputs, LayerInputs
from qmoe_lite.compression.list_buffer import ListBuffer
from qmoe_lite.compression.rank_buffer import RankBuffer
from qmoe_lite.compression.ranks import Ranks, Together

_ROWS = 1 << 14  # of outputs that are added at a time


def waves(groups: list[range], ranks: Ranks) -> Iterator[list[range]]:
    """Yield as many groups at a time as there are ranks; the last ones may be fewer."""
    return (groups[start : start + ranks.count] for start in range(0, len(groups), ranks.count))


class Borrowed:
    """The inputs of one group's experts, as a list buffer of all rows has them.

    Parameters
    ----------
    rows : int64 tensor, ascending
        Numbers of the rows that are here.
    buffer : ListBuffer
        One sample of one token for each.
    """

    def __init__(self, rows: Tensor, buffer: ListBuffer) -> None:
        self._rows, self._buffer = rows, buffer

    def gather(self, rows: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the activations of some tokens, by row number; shape (len(rows), width)."""
        return self._buffer.gather(torch.searchsorted(self._rows, rows), dtype)


class Returns:
    """The outputs of one group's experts, until they go to the ranks that have the rows.

    Parameters
    ----------
    buffer : ListBuffer
        One sample of one token for each row of each expert, one expert's after another's.
    """

    def __init__(self, buffer: ListBuffer) -> None:
        self.buffer, self._done = buffer, 0

    def add(self, rows: Tensor, values: Tensor) -> None:
        """Take over outputs; an expert's rows come in ascending order, and the experts one after another."""
        self.buffer.write(slice(self._done, self._done + len(rows)), values[:, None])
        self._done += len(rows)


def lend(seen: LayerInputs, wave: list[range], ranks: Ranks) -> LayerInputs:
    """Return what the experts of this rank's group in a wave are given, and where their outputs go.

    On one rank alone that is `seen`. All ranks call it together.
    """
    if not isinstance(ranks, Together):
        return seen
    inputs, outputs = _buffers(seen)
    wanted = [torch.unique(_rows_of(seen, group)) for group in _of_each(wave, ranks)]
    borrowed = borrow(inputs, wanted, ranks)
    entries = len(_rows_of(seen, _of_each(wave, ranks)[ranks.rank]))
    returns = ListBuffer(entries, 1, outputs.shape[2], torch.float32, inputs.spill)
    lent = replace(seen, inputs=borrowed, hidden=Returns(returns))
    return lent if seen.tuner is None else replace(lent, tuner=seen.tuner.lent(lent, wanted, ranks))


def borrow(buffer: ListBuffer, wanted: list[Tensor], ranks: Ranks) -> Inputs:
    """Return this rank's rows of a buffer of all ranks; all of them call it together.

    Parameters
    ----------
    buffer : ListBuffer
        Of the run.
    wanted : list of int64 tensor, one a rank
        The rows that each is to have, ascending.
    ranks : Ranks
        Of the run.
    """
    if not isinstance(ranks, Together):
        return buffer
    assert isinstance(buffer, RankBuffer)
    own = wanted[ranks.rank]
    places = [rows[slice(*_between(rows, buffer.bounds, ranks.rank))] for rows in wanted]
    ends = torch.searchsorted(own, torch.tensor(buffer.bounds)).tolist()
    coming = [stop - start for start, stop in pairwise(ends)]
    width, dtype = buffer.shape[2], buffer.dtype
    borrowed = ListBuffer(len(own), 1, width, dtype, buffer.spill)
    ranks.swap(lambda rows: buffer.gather(rows, dtype), places, coming, _into(borrowed), width, dtype)
    return Borrowed(own, borrowed)


def give_back(seen: LayerInputs, lent: LayerInputs, wave: list[range], ranks: Ranks) -> None:
    """Add the outputs of a wave's experts to `seen.hidden`, in their order; all ranks call it together."""
    if not isinstance(ranks, Together):
        return
    inputs, outputs = _buffers(seen)
    assert isinstance(lent.hidden, Returns)
    mine, groups = lent.hidden.buffer, _of_each(wave, ranks)
    own = groups[ranks.rank]
    offset = seen.assigned.bounds[own.start]
    places = [torch.cat([part - offset for part in _entries(seen, own, inputs.bounds, rank)]) for rank in _all(ranks)]
    parts = [_entries(seen, group, inputs.bounds, ranks.rank) for group in groups]
    coming = [sum(map(len, each)) for each in parts]
    width = outputs.shape[2]
    came = ListBuffer(sum(coming), 1, width, torch.float32, inputs.spill)
    ranks.swap(mine.gather, places, coming, _into(came), width, torch.float32)
    begin = 0
    for entries in (each for group in parts for each in group):
        for some in torch.split(entries, _ROWS):
            values = came.read(slice(begin, begin + len(some)))[:, 0]
            outputs.add(seen.assigned.rows[some], values)
            begin += len(some)


def _buffers(seen: LayerInputs) -> tuple[RankBuffer, RankBuffer]:
    assert isinstance(seen.inputs, RankBuffer)
    assert isinstance(seen.hidden, RankBuffer)
    return seen.inputs, seen.hidden


def _all(ranks: Ranks) -> range:
    return range(ranks.count)


def _of_each(wave: list[range], ranks: Ranks) -> list[range]:
    """Return the group of each rank; without experts where there are fewer groups."""
    return [*wave, *[range(0)] * (ranks.count - len(wave))]


def _rows_of(seen: LayerInputs, group: range) -> Tensor:
    bounds = seen.assigned.bounds
    return seen.assigned.rows[bounds[group.start] : bounds[group.stop]]


def _between(rows: Tensor, bounds: list[int], rank: int) -> list[int]:
    """Return from where to where ascending rows are a rank's."""
    return torch.searchsorted(rows, torch.tensor(bounds[rank : rank + 2])).tolist()  # type: ignore[no-any-return]


def _entries(seen: LayerInputs, group: range, bounds: list[int], rank: int) -> list[Tensor]:
    """Return, for each expert of a group, which entries of the assignment are of a rank's rows."""
    found = [torch.empty(0, dtype=torch.int64)]
    for expert in group:
        rows, _ = seen.assigned.of_expert(expert)
        start, stop = _between(rows, bounds, rank)
        first = seen.assigned.bounds[expert]
        found.append(torch.arange(first + start, first + stop))
    return found


def _into(buffer: ListBuffer) -> Callable[[int, Tensor], None]:
    def put(begin: int, rows: Tensor) -> None:
        buffer.write(slice(begin, begin + len(rows)), rows[:, None])

    return put
