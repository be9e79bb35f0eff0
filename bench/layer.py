"""A whole layer of experts straight from codewords against Hugging Face's own experts module in bfloat16.

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

from qmoe_lite.bench._parts.common import limited_threads, machine_line
from qmoe_lite.bench._parts.rated import digits_of, draw_weights, fit_step
from qmoe_lite.checkpoint.format import pack_experts
from qmoe_lite.coding.codebook import Codebook
from qmoe_lite.coding.codec import encode
from qmoe_lite.coding.codes import Code
from qmoe_lite.coding.packed import PackedMatrix
from qmoe_lite.compression.rate import check_rate
from qmoe_lite.errors import QMoEError, SettingError
from qmoe_lite.models.experts import PackedExperts
from qmoe_lite.models.family import family_of, inner

LAYERS: dict[str, tuple[str, dict[str, int]]] = {  # model type, and what its configuration must contain
    "qwen3-30b-a3b": (
        "qwen3_moe",
        {"hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8},
    ),
    "olmoe-1b-7b": (
        "olmoe",
        {"hidden_size": 2048, "intermediate_size": 1024, "num_experts": 64, "num_experts_per_tok": 8},
    ),
    "mixtral-8x7b": (
        "mixtral",
        {"hidden_size": 4096, "intermediate_size": 14336, "num_local_experts": 8, "num_experts_per_tok": 2},
    ),
}
TOKENS = (1, 4, 16, 64, 256)
PEERS = ("eager", "grouped_mm")  # transformers' own ways of running experts; batched_mm copies them for each token
ZEROS = 0.885
_ROUTINGS, _SECONDS, _FEWEST = 16, 0.6, 5

Routings = list[tuple[Tensor, Tensor]]


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
        """Return everything as JSON values."""
        return asdict(self)


def measure(
    layer: str = "qwen3-30b-a3b",
    tokens: tuple[int, ...] = TOKENS,
    threads: int | None = None,
    seed: int = 0,
    rate: float | None = None,
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
        Seed for digits, tokens and routing.
    rate : float, optional
        About so many stored bits a weight, by uniform digits and a dictionary; by default ternary digits.

    Raises
    ------
    SettingError
        An unknown layer, a number below 1, or a rate out of range.
    QMoEError
        Ours differs from its dequantised experts: nothing is timed.
    """
    if layer not in LAYERS:
        raise SettingError(f"layer {layer} is unknown; expected {', '.join(LAYERS)}.")
    if min(tokens) < 1:
        raise SettingError(f"tokens is {min(tokens)}; expected at least 1.")
    rate = None if rate is None else check_rate(rate)
    threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS) if threads is None else threads
    generator = torch.Generator().manual_seed(seed)
    with limited_threads(threads), torch.inference_mode():
        ours, dense, bits = _build(layer, generator, rate)
        speeds = tuple(_measure_tokens(ours, dense, count, generator) for count in tokens)
    return LayerReport(layer, speeds, bits, threads, seed, machine_line("torch", "transformers", "numba"))


def _build(layer: str, generator: torch.Generator, rate: float | None = None) -> tuple[PackedExperts, nn.Module, float]:
    """Make our experts and transformers' in bfloat16 on the generator's device; return our bits per weight."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, sizes = LAYERS[layer]
    config = AutoConfig.for_model(
        model_type, num_hidden_layers=1, vocab_size=8, num_attention_heads=8, num_key_value_heads=8, **sizes
    )
    family, device = family_of(model_type), generator.device
    place = family.layers(config)[0]
    books: dict[str, Code] = {}
    parts = {}
    for name, (rows, columns) in place.shapes.items():
        if rate is not None:
            rated = _rated(rate, place.count, rows, columns, generator)
            books[name] = rated[0].codebook
            parts[name] = pack_experts(rated, shares_scales=place.first_of_stage(name) != name)
            continue
        matrices = []
        levels = torch.tensor([[-0.02, 0.03]] * rows, dtype=torch.bfloat16, device=device)
        for _ in range(place.count):
            draws = torch.rand(rows, columns, generator=generator, device=device)
            half = (1 - ZEROS) / 2
            digits = (draws > 1 - half).to(torch.int8) - (draws < half).to(torch.int8)
            if name not in books:
                books[name] = Codebook.fit([int((digits == digit).sum()) for digit in (-1, 0, 1)])
            matrices.append(encode(digits, levels, books[name]).to("cpu"))
        parts[name] = pack_experts(matrices)
    ours = PackedExperts(family, place, books, config)
    for name, tensors in parts.items():
        ours.fill(name, tensors)
    stored = sum(tensor.nbytes for tensors in parts.values() for tensor in tensors.values())
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    dense = skeleton.get_submodule(place.experts).to_empty(device=device).requires_grad_(False)
    for parameter in dense.parameters():
        for expert in parameter:
            expert.copy_(torch.randn(expert.shape, generator=generator, device=device).mul_(0.02))
    return ours.to(device), dense, 8 * stored / place.weights


def _rated(rate: float, count: int, rows: int, columns: int, generator: torch.Generator) -> list[PackedMatrix]:
    """Make matrices of uniform digits that take about `rate` stored bits, all by one dictionary."""
    rng = np.random.default_rng(generator.initial_seed())
    weights = draw_weights(rows, columns, rng)
    step, dictionary = fit_step(weights, rate)
    steps = torch.full((rows, 1), 0.01, dtype=torch.bfloat16)
    scales = torch.full((columns,), 1.5)
    digits = digits_of(weights, step)
    # the experts' digits are one matrix's, moved along: to draw 6e8 weights takes half a minute
    moved = (np.roll(digits, rng.integers(digits.size)) for _ in range(count))
    return [encode(each, steps, dictionary, scales) for each in moved]


def _draw_tokens(ours: PackedExperts, count: int, routings: int, generator: torch.Generator) -> tuple[Tensor, Routings]:
    """Draw tokens in bfloat16, and each routing's experts and weights."""
    width, slots = ours.layer.shapes[ours.layer.projections[0]][1], ours.layer.top_k
    x = torch.randn(count, width, generator=generator, device=generator.device).bfloat16()
    shares = torch.full((count, slots), 1 / slots, dtype=torch.bfloat16, device=generator.device)
    draws = (torch.rand(count, ours.num_experts, generator=generator, device=generator.device) for _ in range(routings))
    return x, [(each.argsort(1)[:, :slots].contiguous(), shares) for each in draws]


def _measure_tokens(ours: PackedExperts, dense: nn.Module, count: int, generator: torch.Generator) -> LayerSpeed:
    x, routings = _draw_tokens(ours, count, _ROUTINGS, generator)
    _compare(ours, x[:4].float(), *(part[:4] for part in routings[0]))
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
    """Raise QMoEError unless ours agrees with its own experts dequantised, but for rounding to the dtype of x."""
    exact, weights = x.float(), weights.float()
    expected = torch.zeros_like(exact)
    first, (last,) = ours.layer.stages
    for expert in sorted(set(index.flatten().tolist())):
        token, slot = torch.nonzero(index == expert, as_tuple=True)
        inside = inner(ours.activation, [exact[token] @ ours.dense(expert, name).T for name in first])
        expected.index_add_(0, token, weights[token, slot, None] * (inside @ ours.dense(expert, last).T))
    error = float((ours(x, index, weights) - expected).abs().max() / expected.abs().max())
    if not error <= max(1e-4, torch.finfo(x.dtype).eps):
        raise QMoEError(f"the layer differs from its dense experts by {error:.1e}; please report this as a bug.")
