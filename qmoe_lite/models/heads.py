"""A model's output head apart from the rest: logits of a few tokens, where those of a whole batch would fill memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qmoe_lite.errors import SettingError
from qmoe_lite.models.causal import finish


class _Recorder(nn.Module):
    """Stands for the head while the model runs: keeps what it is given, and puts out one logit a token."""

    def __init__(self) -> None:
        super().__init__()
        self.states = torch.empty(0)

    def forward(self, states: Tensor) -> Tensor:
        self.states = states
        return states[..., :1]


class Head:
    """The output head of a model that transformers built, adapters around it or not.

    Attributes
    ----------
    vocabulary : int
        Logits of a token.

    Raises
    ------
    SettingError
        The model has none.
    """

    def __init__(self, model: Any) -> None:
        from transformers import PreTrainedModel

        module = model.get_output_embeddings()
        owners = (each for each in model.modules() if isinstance(each, PreTrainedModel))
        owner = next((each for each in owners if any(child is module for child in each.children())), None)
        if module is None or owner is None:
            raise SettingError(f"{type(model).__name__} has no output head. Give a model that writes text.")
        self._model, self._owner, self._module = model, owner, module
        self._name = next(name for name, each in owner.named_modules() if each is module)
        self.vocabulary = int(module.weight.shape[0])

    def states(self, **arguments: Any) -> Tensor:
        """Run the model; return what its head would be given, (B, T, C), in the model's dtype."""
        recorder = _Recorder()
        parent, _, child = self._name.rpartition(".")
        holder = self._owner.get_submodule(parent)
        setattr(holder, child, recorder)
        try:
            self._model(**arguments)
        finally:
            setattr(holder, child, self._module)
        return recorder.states

    def logits(self, states: Tensor) -> Tensor:
        """Return the logits (N, V) of some tokens' states (N, C), scaled or capped as the model's own code does."""
        products: Tensor = self._module(states)
        if self._owner.config.is_encoder_decoder:  # nothing follows the head there
            return products
        return finish(self._owner, self._name, None, products)
