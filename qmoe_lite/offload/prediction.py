"""Which experts the next layer will ask for: its router is asked about the input of the layer before.

Experts that are named are read, and copied to a GPU, ahead of their layer; not while fewer than half of such guesses
come true.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor, nn

from qmoe_lite.coding.tokens import count_tokens
from qmoe_lite.models.experts import PackedExperts
from qmoe_lite.offload.gpu_tier import GpuTier
from qmoe_lite.offload.ram_tier import Layer, RamTier
from qmoe_lite.offload.statistics import Statistics

_LEAST_TRUST = 0.5  # a wrong guess delays as many bytes as a right one brings early
_TRUST_GUESSES = 16.0  # layers over which that share is taken
_DOUBTED = 8  # passes, one of which is guessed for while guesses are wrong: to see whether they get better
_MOST_GUESSED_FROM = 64  # tokens; a longer prompt asks for nearly all experts of a layer anyway


@dataclass
class _Guess:
    """What was guessed for one layer; experts by their numbers among those of all layers."""

    layer_index: int
    predicted: list[int]
    begun: list[int] = field(default_factory=list)  # those of them whose reading the guess began


class Prediction:
    """Guesses for one layer at a time, and what came of them.

    Parameters
    ----------
    model : nn.Module
        The model, which holds the routers.
    layers : list of Layer
        Its sparse layers, in the order in which they run.
    openings : collection of int
        Indices of those that follow none: an encoder's last layer says nothing of the decoder's first.
    ram : RamTier
        Reads what is guessed.
    tier_of : sequence of GpuTier or None
        For each layer, where its experts are multiplied; None for the CPU.
    statistics : Statistics
        Counts the guesses.
    enabled : bool
        False makes no guess.

    Attributes
    ----------
    trust : float
        The share of guesses that were right lately.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        openings: Collection[int],
        ram: RamTier,
        tier_of: Sequence[GpuTier | None],
        statistics: Statistics,
        enabled: bool,
    ) -> None:
        self.trust = 1.0
        self._layers, self._ram, self._tier_of, self._statistics = layers, ram, tier_of, statistics
        self._routers = [
            router_weight(model, layer.experts) if enabled and i not in openings else None
            for i, layer in enumerate(layers)
        ]
        self._guess: _Guess | None = None

    def votes(self, layer_index: int, hidden: Tensor) -> Tensor | None:
        """Return how many tokens a layer's router would send to each of its experts, given the input of the one before.

        None where no guess is to be made; `layer_index` may be one past the last layer's.
        """
        if layer_index >= len(self._layers) or len(hidden) > _MOST_GUESSED_FROM:
            return None
        if (router := self._routers[layer_index]) is None:
            return None
        if self.trust < _LEAST_TRUST and self._statistics.passes % _DOUBTED:
            return None
        layer, weight = self._layers[layer_index].experts.layer, router.detach()
        logits = hidden.detach().to(weight.device, weight.dtype) @ weight.T
        return count_tokens(logits.topk(layer.top_k).indices, layer.count)[:-1]

    def begin(self, layer_index: int, votes: list[int]) -> None:
        """Begin to read the experts that got votes, those with most first."""
        layer = self._layers[layer_index]
        order = np.argsort(-np.array(votes), kind="stable").tolist()
        guess = _Guess(layer_index, [layer.first + expert for expert in order if votes[expert]])
        self._ram.open(layer)
        tier = self._tier_of[layer_index]
        missing = [number for number in guess.predicted if tier is None or not tier.there(number)]
        if self.trust >= _LEAST_TRUST:
            guess.begun = self._ram.guess(missing)
        self._statistics.prefetched += len(guess.begun)
        self._guess = guess

    def copy_ahead(self) -> None:
        """Begin to copy the guessed experts that are in memory to the GPU that would multiply them."""
        guess = self._guess
        if guess is None or self.trust < _LEAST_TRUST:
            return
        if (tier := self._tier_of[guess.layer_index]) is not None:
            self._ram.collect()
            likely = [number for number in guess.predicted if tier.there(number) or self._ram.ready(number)]
            self._statistics.copied_ahead += tier.guess(likely, self._layers[guess.layer_index])

    def end(self, layer_index: int, wanted: list[int]) -> None:
        """Count what the guess was worth, given the experts that a layer asks for; let go of what is not wanted."""
        guess, self._guess = self._guess, None
        if guess is not None and guess.layer_index == layer_index:
            asked, found = set(wanted), self._statistics
            right, used = len(asked.intersection(guess.predicted)), asked.intersection(guess.begun)
            found.predicted += len(guess.predicted)
            found.predicted_right += right
            self.trust += (right / max(len(guess.predicted), 1) - self.trust) / _TRUST_GUESSES
            found.prefetch_hits += len(used)
            if (tier := self._tier_of[layer_index]) is not None:
                found.copied_ahead_hits += len(asked & tier.guessed)
            found.late += sum(not self._ram.ready(number) for number in used)
        self._ram.end_guess(wanted)
        if guess is not None and (tier := self._tier_of[guess.layer_index]) is not None:
            tier.end_guess()


def router_weight(model: nn.Module, experts: PackedExperts) -> Tensor | None:
    """Return the weight of the router that stands beside an experts module, (experts, width); None for another one."""
    name = next(name for name, module in model.named_modules() if module is experts)
    beside = model.get_submodule(name.rpartition(".")[0])
    shape = experts.num_experts, experts.layer.shapes[experts.layer.projections[0]][1]
    found = [weight for _, weight in beside.named_parameters() if weight.shape == shape]
    return found[0] if len(found) == 1 else None
