"""Dense tensors that transformers makes of others when it loads a model: joined, split, permuted, .."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from qmoe_lite.checkpoint.reader import Checkpoint
from qmoe_lite.errors import CheckpointError


@dataclass
class Parts:
    """The tensors in the files that one converter takes at one place, by its patterns.

    Attributes
    ----------
    converter
        transformers' own, whose operations are run.
    first : str
        The name that transformers derives of what comes out, or of the first.
    stored : dict, pattern to list of str
        Names in the files.
    """

    converter: Any
    first: str
    stored: dict[str, list[str]] = field(default_factory=dict)

    def targets(self) -> list[str]:
        """Return the model's names of what comes out."""
        head = self.converter.target_patterns[0]
        return [self.first.replace(head, each) for each in self.converter.target_patterns]


class Converted:
    """One tensor that comes out; see `Source`. All that it is made of is read for it.

    Parameters
    ----------
    name : str
        By the model.
    parts : Parts
        What it is made of.
    checkpoint : Checkpoint
        Where these are.
    known : dict, name to tensor
        All tensors of the model, on the meta device.
    config : transformers configuration
        Of the model.
    """

    def __init__(self, name: str, parts: Parts, checkpoint: Checkpoint, known: dict[str, Tensor], config: Any) -> None:
        from transformers.core_model_loading import dot_natural_key

        self.shape = tuple(known[name].shape)
        self._name, self._parts, self._known, self._config = name, parts, known, config
        self._place = checkpoint.directory
        self._sources = {
            pattern: [checkpoint.sources[each] for each in sorted(stored, key=dot_natural_key)]
            for pattern, stored in parts.stored.items()
        }

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self._sources.values()))[0].dtype

    def read(self, expert: int | None = None) -> Tensor:
        converter = self._parts.converter
        collected: Any = {pattern: [each.read() for each in sources] for pattern, sources in self._sources.items()}
        model = SimpleNamespace(get_parameter=lambda name: self._known[name], config=self._config)
        try:
            for operation in converter.operations:
                collected = operation.convert(
                    collected,
                    source_patterns=converter.source_patterns,
                    target_patterns=converter.target_patterns,
                    full_layer_name=self._parts.first,
                    model=model,
                    config=self._config,
                )
        except (RuntimeError, ValueError, KeyError, IndexError) as error:
            raise self._wrong() from error
        place = self._parts.targets().index(self._name)
        found: Tensor = collected[converter.target_patterns[place]]
        found = found[0] if isinstance(found, list) else found
        if tuple(found.shape) != self.shape:
            raise self._wrong()
        return found if expert is None else found[expert]

    def _wrong(self) -> CheckpointError:
        names = ", ".join(name for stored in self._parts.stored.values() for name in stored)
        return CheckpointError(f"{names} in {self._place} do not make {self._name}. Fetch them again.")
