"""A whole layer of experts straight from codewords beside Hugging Face's own experts module in bfloat16.

All get the same tokens and the same random routing, a new one for each call, and take turns, so that the caches hold
few of the experts that are asked for. What ours computes is compared with its dequantised experts first.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor, nn

from qmoe_lite.bench._common import limited_threads, machine_line
from qmoe_lite.codebook import Codebook
from qmoe_lite.codec import encode
from qmoe_lite.errors import QMoEError, SettingError
from qmoe_lite.experts import PackedExperts, pack_experts
from qmoe_lite.families import family_of

LAYERS: dict[str, tuple[str, dict[str, int]]] = {  # model type, and what its configuration must say
    "qwen3-30b-a3b": (
        "qwen3_moe",
        {"hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8},
    ),
    "olmoe-1b-7b": (
        "olmoe",
        {"hidden_size": 2048, "intermediate_size": 1024, "num_experts": 64, "num_experts_per_tok": 8},
    ),
}
TOKENS = (1, 4, 16, 64, 256)
PEERS = ("eager", "grouped_mm")  # transformers' own ways of running experts; batched_mm copies them for each token
ZEROS = 0.885
_ROUTINGS, _SECONDS, _FEWEST = 16, 0.6, 5


@dataclass(frozen=True)
class LayerSpeed:
    """Milliseconds of a call, medians, of one number of tokens; `peers` by transformers' name for the way."""

    tokens: int
    ours: float
    peers: dict[str, float]

    @property
    def ratio(self) -> float:
        """How many times as fast as the fastest peer ours is."""
        return min(self.peers.values()) / self.ours


@dataclass(frozen=True)
class LayerReport:
    """What `measure` found, and where."""

    layer: str
    speeds: tuple[LayerSpeed, ...]
    bits_per_weight: float
    threads: int
    seed: int
    machine: str

    def to_json(self) -> dict[str, Any]:
        """Give everything as JSON values."""
        return asdict(self)


def measure(
    layer: str = "qwen3-30b-a3b", tokens: tuple[int, ...] = TOKENS, threads: int | None = None, seed: int = 0
) -> LayerReport:
    """Time one layer both ways.

    Parameters
    ----------
    layer : str
        Name out of `LAYERS`.
    tokens : tuple of int
        Tokens of one call.
    threads : int, optional
        For torch and for Numba; by default all.
    seed : int
        Decides digits, tokens and routing.

    Raises
    ------
    SettingError
        An unknown layer, or a number below 1.
    QMoEError
        Ours differs from its dequantised experts: nothing is timed.
    """
    if layer not in LAYERS:
        raise SettingError(f"layer {layer} is unknown; expected {', '.join(LAYERS)}.")
    if min(tokens) < 1:
        raise SettingError(f"tokens is {min(tokens)}; expected at least 1.")
    threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS) if threads is None else threads
    with limited_threads(threads), torch.inference_mode():
        rng = np.random.default_rng(seed)
        ours, dense, bits = _build(layer, rng)
        speeds = tuple(_measure_tokens(ours, dense, count, rng) for count in tokens)
    return LayerReport(layer, speeds, bits, threads, seed, machine_line("torch", "transformers", "numba"))


def _build(layer: str, rng: np.random.Generator) -> tuple[PackedExperts, nn.Module, float]:
    """Make our experts, transformers' in bfloat16, and tell the bits of a weight of ours."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, sizes = LAYERS[layer]
    config = AutoConfig.for_model(
        model_type, num_hidden_layers=1, vocab_size=8, num_attention_heads=8, num_key_value_heads=8, **sizes
    )
    family = family_of(model_type)
    place = family.layers(config)[0]
    books: dict[str, Codebook] = {}
    parts = {}
    for name, (rows, columns) in place.shapes.items():
        matrices = []
        for _ in range(place.count):
            draws = rng.random((rows, columns), dtype=np.float32)
            half = (1 - ZEROS) / 2
            digits = (draws > 1 - half).astype(np.int8) - (draws < half).astype(np.int8)
            books.setdefault(name, Codebook.fit([int((digits == digit).sum()) for digit in (-1, 0, 1)]))
            matrices.append(encode(digits, torch.tensor([[-0.02, 0.03]] * rows, dtype=torch.bfloat16), books[name]))
        parts[name] = pack_experts(matrices)
    ours = PackedExperts(family, place, books, config)
    for name, tensors in parts.items():
        ours.fill(name, tensors)
    stored = sum(tensor.nbytes for tensors in parts.values() for tensor in tensors.values())
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    dense = skeleton.get_submodule(place.experts).to_empty(device="cpu")
    for parameter in dense.parameters():
        for expert in parameter:
            expert.copy_(torch.from_numpy(rng.standard_normal(expert.shape, dtype=np.float32)).mul_(0.02))
    return ours, dense, 8 * stored / place.weights


def _measure_tokens(ours: PackedExperts, dense: nn.Module, count: int, rng: np.random.Generator) -> LayerSpeed:
    config: Any = dense.config
    experts, width = config.num_experts_per_tok, config.hidden_size
    x = torch.from_numpy(rng.standard_normal((count, width), dtype=np.float32)).bfloat16()
    routings = []
    for _ in range(_ROUTINGS):
        chosen = np.stack([rng.permutation(ours.num_experts)[:experts] for _ in range(count)])
        routings.append((torch.from_numpy(chosen), torch.full((count, experts), 1 / experts, dtype=torch.bfloat16)))
    _compare(ours, x[:4], *(part[:4] for part in routings[0]))
    calls: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"ours": ours}
    for way in PEERS:
        calls[way] = _way(dense, way)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for index, weights in routings:
        calls["ours"](x, index, weights)  # experts are checked at their first call
    for call in calls.values():
        call(x, *routings[0])
    end = time.perf_counter() + _SECONDS * len(calls)
    turn = 0
    while time.perf_counter() < end or turn < _FEWEST:
        for name, call in calls.items():
            start = time.perf_counter()
            call(x, *routings[turn % _ROUTINGS])
            times[name].append(1e3 * (time.perf_counter() - start))
        turn += 1
    medians = {name: statistics.median(some) for name, some in times.items()}
    return LayerSpeed(count, medians.pop("ours"), medians)


def _way(dense: Any, way: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def call(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        dense.config._experts_implementation = way
        return dense(x, index, weights)  # type: ignore[no-any-return]

    return call


def _compare(ours: PackedExperts, x: Tensor, index: Tensor, weights: Tensor) -> None:
    """Raise QMoEError unless ours agrees with its own experts dequantised."""
    x, weights = x.float(), weights.float()
    expected = torch.zeros_like(x)
    for token, (chosen, shares) in enumerate(zip(index.tolist(), weights, strict=True)):
        for expert, share in zip(chosen, shares, strict=True):
            first, (last,) = ours.layer.stages
            gate, *rest = (x[token] @ ours.dense(expert, name).T for name in first)
            inside = ours.activation(gate)
            for other in rest:
                inside = inside * other
            expected[token] += share * (inside @ ours.dense(expert, last).T)
    error = float((ours(x, index, weights) - expected).abs().max() / expected.abs().max())
    if not error <= 1e-4:
        raise QMoEError(f"the layer differs from its dense experts by {error:.1e}; please report this as a bug.")
