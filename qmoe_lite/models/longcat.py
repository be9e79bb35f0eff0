"""LongCat-Flash's sparse block, whose router may choose experts without weights, which return their input."""

from __future__ import annotations

from torch import Tensor
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashMoE


class RoutedLongcatMoe(LongcatFlashMoE):  # type: ignore[misc]
    """The same block; what those without weights return is added here, and not by the experts module."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return the block's output, like `hidden_states`."""
        _, weights, index = self.router(hidden_states)
        tokens = hidden_states.view(-1, hidden_states.shape[-1])
        held = index < self.config.n_routed_experts
        routed = self.experts(tokens, index.masked_fill(~held, -1), weights)
        kept = (weights * ~held).sum(1, keepdim=True)
        return (routed + (tokens * kept).to(tokens.dtype)).view(hidden_states.shape)
