"""Which tensor of the files is which of the model, by transformers' own conversion mapping.

transformers renames tensors when it loads a model, and joins experts that files hold one by one; older layouts of a
family are declared there too. The same list is followed here, so that whatever transformers loads is known by the
model's names, and each expert's matrix is a view of its own: `<experts>.<number>.<projection>.weight`.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from qmoe_lite.checkpoint.reader import Checkpoint
from qmoe_lite.checkpoint.sources import View
from qmoe_lite.errors import CheckpointError, UnsupportedFamilyError
from qmoe_lite.models.blocks import MoELayer
from qmoe_lite.models.converted import Converted, Parts


def weight_name(experts: str, expert: int, projection: str) -> str:
    """Return the name by which one expert's matrix is known, whatever the files call it."""
    return f"{experts}.{expert}.{projection}.weight"


def _unknown(stored: str, name: str, operations: list[str]) -> UnsupportedFamilyError:
    text = f"{stored} becomes {name} by {', '.join(operations)}, which is not supported. Load the model in transformers"
    return UnsupportedFamilyError(f"{text} and save it by save_pretrained(.., save_original_format=False).")


class Names:
    """The names of one model's tensors.

    Parameters
    ----------
    model : transformers model
        May be on the meta device.
    layers : list of MoELayer
        Its sparse layers.
    """

    def __init__(self, model: Any, layers: Iterable[MoELayer]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter

        transforms = get_model_conversion_mapping(model)
        self._renamings = [each for each in transforms if not isinstance(each, WeightConverter)]
        self._converters = [each for each in transforms if isinstance(each, WeightConverter)]
        self._prefix, self._known, self._config = model.base_model_prefix, model.state_dict(), model.config
        self._layers = [layer for layer in layers if layer.layout is not None]
        self._experts = {layer.experts for layer in self._layers}
        self._tensors = {f"{layer.experts}.{name}": layer for layer in self._layers for name in layer.layout.tensors}  # type: ignore[union-attr]

    def of(self, stored: str) -> tuple[str, Any, int]:
        """Return the model's name of a tensor in the files, the converter that makes it, and its place in that."""
        from transformers.core_model_loading import rename_source_key

        name, pattern = rename_source_key(stored, self._renamings, self._converters, self._prefix, self._known)
        codes = stored.rpartition(".")[0] in self._experts and name.rpartition(".")[0] not in self._experts
        if name not in self._known and (codes or stored in self._known):
            return stored, None, 0  # as it is called in the model; transformers sees it too
        if f"{self._prefix}.{name.rpartition('.')[0]}" in self._experts:  # codes, of a model saved without its head
            name = f"{self._prefix}.{name}"
        if pattern is None:
            return name, None, 0
        converter = next(each for each in self._converters if pattern in each.source_patterns)
        return name, converter, converter.source_patterns.index(pattern)

    def views(self, checkpoint: Checkpoint) -> dict[str, View]:
        """Return where each of the model's tensors lies in the files.

        Raises
        ------
        CheckpointError
            Two tensors have one name.
        UnsupportedFamilyError
            transformers converts a tensor in a way that is not followed here.
        """
        found: dict[str, View] = {}
        made: dict[str, Parts] = {}
        for stored in sorted(checkpoint.sources):
            for name, view in self._views_of(stored, checkpoint, made):
                if name in found:
                    raise CheckpointError(
                        f"{checkpoint.directory} holds {name} twice, also as {stored}. Fetch it again."
                    )
                found[name] = view
        for parts in made.values():
            whole = set(parts.stored) == set(parts.converter.source_patterns)
            for name in parts.targets() if whole else ():
                made_of = [stored for each in parts.stored.values() for stored in each]
                if made_of != [name] and self.of(name)[1] is not None:  # it would be converted once more
                    raise _unknown(made_of[0], name, [type(each).__name__ for each in parts.converter.operations])
                checkpoint.add(name, Converted(name, parts, checkpoint, self._known, self._config), made_of)
                found[name] = View(name)
        return found

    def _views_of(self, stored: str, checkpoint: Checkpoint, made: dict[str, Parts]) -> list[tuple[str, View]]:
        name, converter, number = self.of(stored)
        operations = [] if converter is None else [type(each).__name__ for each in converter.operations]
        layer = self._tensors.get(name)
        if layer is None or layer.layout is None or name.endswith("_bias"):
            if not operations:
                return [(name, View(stored))]
            parts = made.get(name) or Parts(converter, name)
            if name not in self._known or not set(parts.targets()) <= self._known.keys():
                return [(stored, View(stored))]  # of a layer that transformers leaves out
            made[name] = parts
            parts.stored.setdefault(converter.source_patterns[number], []).append(stored)
            return []
        layout, tensor = layer.layout, name.rpartition(".")[2]
        held = [each for each in layer.projections if layout.place(each, 1)[0] == tensor]
        if operations and operations[0] == "MergeModulelist":
            expert = next((part for part in reversed(stored.split(".")) if part.isdigit()), None)
            joined = operations[1:] in ([], ["Concatenate"]) and len(converter.source_patterns) == len(held)
            if expert is None or not joined or layout.transposed or layout.interleaved:
                raise _unknown(stored, name, operations)
            if layer.count <= int(expert) < len(self._known[name]):
                return []  # transformers has room for it, and never runs it
            return [(weight_name(layer.experts, int(expert), held[number]), View(stored))]
        transposed, shape = layout.transposed, checkpoint.sources[stored].shape
        if operations == ["Concatenate"]:  # gate's and up's are a tensor each
            plain = not (layout.transposed or layout.interleaved) and converter.operations[0].dim == 1
            if not plain or len(converter.source_patterns) != len(held):
                raise _unknown(stored, name, operations)
            return [
                (weight_name(layer.experts, expert, held[number]), View(stored, expert)) for expert in range(shape[0])
            ]
        if operations == ["Transpose"]:
            # as transformers does it: one that has the model's shape is taken as it is
            transposed ^= not (converter.operations[0].check_dims and shape == tuple(self._known[name].shape))
        elif operations:
            raise _unknown(stored, name, operations)
        if len(shape) != 3:
            raise CheckpointError(f"{stored} has shape {shape}; expected (experts, rows, columns). Fetch it again.")
        return [
            (
                weight_name(layer.experts, expert, each),
                View(stored, expert, transposed, layout.place(each, layer.shapes[each][0])[1]),
            )
            for expert in range(layer.count if shape[0] == len(self._known[name]) else shape[0])
            for each in held
        ]

    def own_slice(self, layer: MoELayer, tensor: str, expert: int, checkpoint: Checkpoint) -> Tensor:
        """Return one expert's slice of a tensor of transformers' experts module, made by transformers' operations."""
        assert layer.layout is not None
        name = f"{layer.experts}.{tensor}"
        collected: dict[str, Any] = {}
        for each in layer.projections:
            if layer.layout.place(each, 1)[0] != tensor:
                continue
            stored = checkpoint.stored_name(weight_name(layer.experts, expert, each))
            _, converter, number = self.of(stored)
            if converter is None:
                return checkpoint.sources[stored].read(expert)
            split = len(checkpoint.sources[stored].shape) == 2
            part = checkpoint.sources[stored].read() if split else checkpoint.sources[stored].read(expert)[None]
            collected[converter.source_patterns[number]] = [part]
        one = SimpleNamespace(get_parameter=lambda _: self._known[name][:1])
        for operation in converter.operations:
            collected = operation.convert(
                collected,
                source_patterns=converter.source_patterns,
                target_patterns=converter.target_patterns,
                full_layer_name=name,
                model=one,
            )
        return next(iter(collected.values()))[0]  # type: ignore[no-any-return]

    def stored(self, name: str, checkpoint: Checkpoint) -> str:
        """Return what the files of a compressed model call a tensor of experts, as their source calls the module."""
        experts, _, part = name.rpartition(".")
        for known in (weight_name(experts, 0, each) for each in ("up_proj", "gate_proj")):
            if known in checkpoint:
                head, found, _ = checkpoint.stored_name(known).partition(".experts.")
                if found and self.of(usual := f"{head}.experts.{part}")[0] == name:
                    return usual
        return name
