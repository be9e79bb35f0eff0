"""Where a family's modules are in a model of it: with its own head, with another one, or without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qmoe_lite.checkpoint.reader import Checkpoint, of_experts
from qmoe_lite.errors import CheckpointError
from qmoe_lite.models.blocks import MoELayer
from qmoe_lite.models.building import auto_class
from qmoe_lite.models.family import Family


@dataclass(frozen=True)
class Within:
    """How a model's names come of those of the model that writes text.

    Attributes
    ----------
    cut : str
        What they lack at their beginning, "model." of a model without a head.
    """

    cut: str = ""

    @classmethod
    def find(cls, family: Family, checkpoint: Checkpoint, model: Any, layers: Sequence[MoELayer]) -> Within:
        """Look for the experts.

        Raises
        ------
        CheckpointError
            They are not all in the model: it is another one, or a part.
        """
        wanted = auto_class(family, checkpoint.config)
        classes = wanted._model_mapping.get(type(model.config), ())
        if isinstance(model, classes):
            return cls()
        names = {name for name, _ in model.named_modules()}
        for cut in ("", f"{layers[0].experts.partition('.')[0]}."):
            within = cls(cut)
            if {within.name(layer.experts) for layer in layers} <= names:
                return within
        raise CheckpointError(
            f"a compressed model is loaded by {wanted.__name__} or qmoe_lite.load, not as {type(model).__name__}."
        )

    def name(self, name: str) -> str:
        """Return what the model calls a module or tensor."""
        return "" if name == self.cut[:-1] else name.removeprefix(self.cut)

    def new_head(self, model: Any, checkpoint: Checkpoint) -> list[str]:
        """Return the tensors of another head that the checkpoint lacks: transformers makes them, to be trained."""
        if model.base_model is model or model.get_output_embeddings() is not None:
            return []
        inside = f"{model.base_model_prefix}."
        tensors = (name for name, _ in model.named_parameters())
        return [n for n in tensors if not n.startswith(inside) and n not in checkpoint and not of_experts(n)]
