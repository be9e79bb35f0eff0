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


@dataclass(frozen=True)
class Converted:
    """One tensor that comes out; see `Source`. All that it is made of is read for it."""

    name: str
    parts: Parts
    checkpoint: Checkpoint
    known: dict[str, Tensor]
    config: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.known[self.name].shape)

    @property
    def dtype(self) -> torch.dtype:
        first = next(iter(self.parts.stored.values()))[0]
        return self.checkpoint.sources[first].dtype

    def read(self, expert: int | None = None) -> Tensor:
        from transformers.core_model_loading import dot_natural_key

        converter, sources = self.parts.converter, self.checkpoint.sources
        collected: Any = {
            pattern: [sources[each].read() for each in sorted(stored, key=dot_natural_key)]
            for pattern, stored in self.parts.stored.items()
        }
        model = SimpleNamespace(get_parameter=lambda name: self.known[name], config=self.config)
        try:
            for operation in converter.operations:
                collected = operation.convert(
                    collected,
                    source_patterns=converter.source_patterns,
                    target_patterns=converter.target_patterns,
                    full_layer_name=self.parts.first,
                    model=model,
                    config=self.config,
                )
        except (RuntimeError, ValueError, KeyError, IndexError) as error:
            raise self._wrong() from error
        place = self.parts.targets().index(self.name)
        found: Tensor = collected[converter.target_patterns[place]]
        found = found[0] if isinstance(found, list) else found
        if tuple(found.shape) != self.shape:
            raise self._wrong()
        return found if expert is None else found[expert]

    def _wrong(self) -> CheckpointError:
        names = ", ".join(name for stored in self.parts.stored.values() for name in stored)
        return CheckpointError(f"{names} in {self.checkpoint.directory} do not make {self.name}. Fetch them again.")
