"""Finished layers once more: what is damaged of unfinished work is computed again, to the same bytes."""

from __future__ import annotations

from typing import Any

from qmoe_lite.checkpoint.format import parts_of, tensor_name
from qmoe_lite.checkpoint.stack import ExpertStack
from qmoe_lite.checkpoint.writer import Writer
from qmoe_lite.coding.codes import code_from_config
from qmoe_lite.coding.dictionary import KIND, Dictionary
from qmoe_lite.compression.dead_zone import DeadZone
from qmoe_lite.compression.layer import LayerCompressor
from qmoe_lite.compression.layer_parts import LayerInputs
from qmoe_lite.compression.ranks import Ranks
from qmoe_lite.compression.rate import RateControl
from qmoe_lite.compression.settings import Settings
from qmoe_lite.compression.shares import shares_of
from qmoe_lite.compression.state import Done
from qmoe_lite.compression.waves import give_back, lend, waves
from qmoe_lite.errors import ResumeError
from qmoe_lite.models.blocks import MoELayer


def know_layers_before(
    number: int,
    layers: list[MoELayer],
    compressor: LayerCompressor,
    done: Done,
    settings: Settings,
    adapts: bool,
) -> None:
    """Let a compressor know what it is to know when it comes to a layer, whatever was finished since.

    Parameters
    ----------
    number : int
        The layer's place among the sparse ones.
    layers : list of MoELayer
        All of them.
    compressor : LayerCompressor
        Its dictionaries, its rate and its dead zone are set.
    done : Done
        Knows the layers before.
    settings : Settings
        Of the run: its rate, and how the layers share it.
    adapts : bool
        The dead zone follows the model.

    Raises
    ------
    ResumeError
        What is known of them is damaged.
    """
    before = [layer.experts for layer in layers[:number]]
    try:
        books = [book for name in before for book in done.codebooks[name].values() if book["kind"] == KIND]
        each = {book["sha256"]: book for book in books}
        compressor.dictionaries.resume(Dictionary.from_config(book) for book in each.values())
        if settings.rate is not None:
            if before:
                compressor.rate = RateControl(**done.rates[before[-1]])
            else:
                weights = sum(layer.weights for layer in layers)
                compressor.rate = RateControl(settings.rate, weights, shares=shares_of(settings.sensitivity, layers))
        if adapts:
            compressor.dead_zone = DeadZone(**(done.dead_zones[before[-1]] if before else {}))
    except (TypeError, KeyError) as error:
        raise ResumeError("the unfinished work has a damaged state. Start over with --restart.") from error


def run_stored(
    compressor: LayerCompressor,
    layer: MoELayer,
    writer: Writer,
    number: int,
    codebooks: dict[str, dict[str, Any]],
    seen: LayerInputs,
    ranks: Ranks,
) -> None:
    """Add the outputs of all experts of a finished layer to `seen.hidden`, as when it was compressed.

    Parameters
    ----------
    compressor : LayerCompressor
        Runs experts.
    layer : MoELayer
        Which one.
    writer : Writer
        Knows its file.
    number : int
        Its place among the sparse layers.
    codebooks : dict, projection to configuration
        What the layer is stored with.
    seen : LayerInputs
        Of the same samples.
    ranks : Ranks
        Of the run; all of them call it together.

    Raises
    ------
    FormatError
        An expert is damaged.
    """
    stacks: dict[str, ExpertStack] = {}
    for projection in layer.projections:
        code, name = code_from_config(codebooks[projection]), f"{layer.experts}.{projection}"
        names = {part: tensor_name(name, part) for part in parts_of(code)}
        tensors = writer.read_layer(number, list(names.values()))
        parts = {part: tensors[each] for part, each in names.items()}
        first = stacks.get(layer.first_of_stage(projection))
        stacks[projection] = ExpertStack(name, layer.count, layer.shapes[projection], code, parts, first=first)
    for wave in waves(compressor.groups(layer), ranks):
        lent = lend(seen, wave, ranks)
        for expert in wave[ranks.rank] if ranks.rank < len(wave) else ():
            weights = {name: stack.checked(expert).dense().to(compressor.device) for name, stack in stacks.items()}
            compressor.run(layer, expert, weights, lent)
        give_back(seen, lent, wave, ranks)
