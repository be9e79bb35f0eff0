"""Llama 4's sparse block, whose experts are each given all tokens, scaled, most of them by zero."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

if not hasattr(MoeCausalLMOutputWithPast, "image_outputs"):
    # transformers 5.24's model that takes pictures asks its text model for them, and does not run else, dense or not
    MoeCausalLMOutputWithPast.image_outputs = None


class RoutedLlama4Moe(Llama4TextMoe):  # type: ignore[misc]
    """The same block with experts that are given their own tokens, by index, and add up what they put out.

    One expert a token: its input is scaled by the router, not its output.
    """

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Return the block's output, (tokens, width), and the router's logits."""
        tokens = hidden_states.reshape(-1, self.hidden_dim)
        scores, logits = self.router(tokens)
        weight, index = scores.max(1, keepdim=True)
        routed = self.experts(tokens * weight, index, torch.ones_like(weight))
        return self.shared_expert(tokens) + routed, logits
