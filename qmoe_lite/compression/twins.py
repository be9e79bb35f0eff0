"""What blocks of the quantised model would lack of the dense model's outputs, were their experts dense.

Some calibration samples go through the dense model too; these are their twins, and stand among the reference samples.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from qmoe_lite.compression.correction import Lack
from qmoe_lite.compression.layer_parts import LayerInputs
from qmoe_lite.compression.layer_waves import LayerWaves
from qmoe_lite.compression.list_buffer import ListBuffer
from qmoe_lite.compression.rank_buffer import RankBuffer
from qmoe_lite.compression.ranks import Ranks, Together
from qmoe_lite.compression.run_samples import RunSamples
from qmoe_lite.compression.waves import give_back, lend, waves
from qmoe_lite.models.blocks import MoELayer

_ROWS = 1 << 14  # that are added at a time


def lack_of(runner: LayerWaves, layer: MoELayer, seen: LayerInputs, samples: RunSamples, ranks: Ranks) -> Lack:
    """Send the reference samples through a layer's dense experts; return what the block lacks for those with twins.

    Parameters
    ----------
    runner : LayerWaves
        Runs experts.
    layer : MoELayer
        Which ones.
    seen : LayerInputs
        Of all samples; the dense experts' outputs are added to `hidden`.
    samples : RunSamples
        Some of them with twins.
    ranks : Ranks
        Of the run; all of them call it together.
    """
    hidden, tokens = seen.hidden, len(seen.eligible) // len(samples.all)
    assert isinstance(hidden, ListBuffer)
    rows = samples.twins * tokens
    others = torch.ones(len(seen.eligible), dtype=torch.bool)
    others[:rows] = False
    twinned = seen.assigned.without(others)
    squares = torch.zeros(rows).index_add(0, twinned.rows, twinned.weights.square())
    # where a block does more with its experts' outputs than to add them, each has its own dense output as goal
    lack = hidden.another(samples.twins) if seen.adds else None
    parts = [replace(seen, assigned=seen.assigned.without(~seen.reference))]
    if lack is not None:
        lack.zero()
        parts.append(replace(seen, assigned=twinned, hidden=lack))
    for wave in waves(runner.groups(layer), ranks):
        lent = [lend(part, wave, ranks) for part in parts]
        for expert in wave[ranks.rank] if ranks.rank < len(wave) else ():
            truth = runner.truth(layer, expert)
            runner.run_reference(expert, truth, lent[0])
            for own in lent[1:]:
                for some, gates in runner.chunks(*own.assigned.of_expert(expert)):
                    own.hidden.add(some, -runner.outputs(truth, own, some, gates).cpu())
        for part, each in zip(parts, lent, strict=True):
            give_back(part, each, wave, ranks)
    if lack is not None:
        _add_differences(lack, hidden, samples.first_twin * tokens, ranks)
    return Lack(rows, lack, squares)


def _add_differences(lack: ListBuffer, hidden: ListBuffer, first: int, ranks: Ranks) -> None:
    """Add to the lack of each row what its twin's hidden state has more; `first` is the first twin's first row."""
    count = lack.shape[0] * lack.shape[1]
    if not isinstance(ranks, Together):
        for rows in torch.split(torch.arange(count), _ROWS):
            _add(lack, hidden, rows, hidden.gather(rows + first))
        return
    assert isinstance(lack, RankBuffer)
    assert isinstance(hidden, RankBuffer)
    own = lack.bounds[ranks.rank]
    places = _common(_spans(lack.bounds, first), _spans(hidden.bounds)[ranks.rank])
    coming = list(map(len, _common(_spans(hidden.bounds), _spans(lack.bounds, first)[ranks.rank])))

    def put(begin: int, values: Tensor) -> None:
        _add(lack, hidden, torch.arange(own + begin, own + begin + len(values)), values.float())

    ranks.swap(lambda rows: hidden.gather(rows, hidden.dtype), places, coming, put, hidden.shape[2], hidden.dtype)


def _add(lack: ListBuffer, hidden: ListBuffer, rows: Tensor, twins: Tensor) -> None:
    lack.add(rows, twins)
    lack.add(rows, -hidden.gather(rows))


def _spans(bounds: list[int], shift: int = 0) -> list[range]:
    return [range(start + shift, stop + shift) for start, stop in pairwise(bounds)]


def _common(spans: list[range], other: range) -> list[Tensor]:
    """Return the rows that each of some spans has in common with another."""
    both = [range(max(span.start, other.start), min(span.stop, other.stop)) for span in spans]
    return [torch.arange(each.start, max(each.start, each.stop)) for each in both]
