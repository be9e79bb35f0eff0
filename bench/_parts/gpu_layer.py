"""Part "layer" of `bench/gpu.py`: a whole layer of experts on the GPU against transformers' own in bfloat16.

Each call has another routing and, of ours, takes another copy, so that it finds none of its experts in the L2 cache.
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qmoe_lite.bench._parts import gpu as parts
from qmoe_lite.bench._show.text import print_rows, print_text

if TYPE_CHECKING:
    from qmoe_lite.bench.layer import Routings
    from qmoe_lite.models.experts import PackedExperts

CASES = (("qwen3-30b-a3b", 2.0), ("qwen3-30b-a3b", None), ("mixtral-8x7b", None))  # and stored bits, or ternary
GRAPH_TOKENS = 16  # most of a call that is timed in a graph: more is a prompt
ROUTINGS = 32
_PEER_ROUTINGS = 8  # a token's experts in bfloat16 are larger than the cache
_BUILD_SECONDS = 20.0  # that a layer is begun with


def measure_layer(quick: bool, end: float) -> Iterator[parts.Row]:
    """Microseconds of a layer's call, as called and in a graph, after a comparison with its dequantised experts."""
    for name, rate in CASES[:1] if quick else CASES:
        if time.monotonic() > end - _BUILD_SECONDS:
            yield {"skipped": name if rate is None else f"{name} at {rate} bits"}
        else:
            yield from _measure_one(name, rate, quick, end)


def _measure_one(name: str, rate: float | None, quick: bool, end: float) -> Iterator[parts.Row]:
    from qmoe_lite.bench import layer  # with packages that no other part needs

    generator = torch.Generator(parts._DEVICE).manual_seed(0)
    ours, dense, bits = layer._build(name, generator, rate)
    nbytes = sum(ours._packets(projection).nbytes for projection in ours.layer.projections)
    copies = parts._copies(nbytes * ours.layer.top_k // ours.num_experts, ours, _clone)  # what one token reads
    refused: dict[str, str] = {}
    for tokens in parts.TOKENS[::2] if quick else parts.TOKENS:
        if time.monotonic() > end - 6:
            yield {"skipped": f"{name}, {tokens} tokens"}
        else:
            drawn = layer._draw_tokens(ours, tokens, ROUTINGS, generator)
            yield {"layer": name, "tokens": tokens, "bits": bits} | _time_call(copies, dense, *drawn, refused)


def _time_call(
    copies: list[PackedExperts], dense: nn.Module, x: Tensor, routings: Routings, refused: dict[str, str]
) -> parts.Row:
    """Time all ways; `refused` remembers what is not to be captured in a graph, and why."""
    from qmoe_lite.bench import layer

    layer._compare(copies[0], x, *routings[0])
    ways: dict[str, list[parts.Call]] = {
        "ours": _calls([copies[i % len(copies)] for i in range(ROUTINGS)], x, routings),
        **{way: _calls([layer._way(dense, way)] * _PEER_ROUTINGS, x, routings) for way in layer.PEERS},
    }
    row: parts.Row = {f"{way}_us": parts._event_us(calls) for way, calls in ways.items()}
    for way in ("ours", "grouped_mm"):  # eager asks the GPU which experts there are
        if len(x) <= GRAPH_TOKENS and way not in refused:
            try:
                row[f"{way}_graph_us"] = parts._graph_us(ways[way])
            except Exception as error:
                refused[way] = row["note"] = f"{way} cannot be captured in a graph: {parts.one_line(error)}"
    return row


def _calls(ways: list[Any], x: Tensor, routings: Routings) -> list[Callable[[], Tensor]]:
    return [functools.partial(way, x, *routing) for way, routing in zip(ways, routings, strict=False)]


def _clone(ours: PackedExperts) -> PackedExperts:
    """Return the same experts with packets of their own, which are all that a GPU's call reads."""
    twin = copy.copy(ours)
    for name, packets in ours._packets_of.items():
        parts = (part for part in ("words", "starts", "levels", "steps") if hasattr(packets, part))
        arrays = {part: getattr(packets, part).clone() for part in parts}
        twin._packets_of[name] = replace(packets, **arrays)
    return twin


def show_layer(rows: list[parts.Row]) -> None:
    """Print microseconds of our layer and transformers'."""
    cells: list[list[str]] = []
    names: list[str] = []
    for number, r in enumerate(rows):
        if number == 0 or (r["layer"], r["bits"]) != (rows[number - 1]["layer"], rows[number - 1]["bits"]):
            names = [r["layer"], f"{r['bits']:.2f} bits"]
        called = [r["ours_us"], *(r[f"{way}_us"] for way in ("eager", "grouped_mm"))]
        graph = r.get("ours_graph_us"), r.get("grouped_mm_graph_us")
        figures = [*(f"{each:.1f}" for each in called), parts._times(called[0], min(called[1:]))]
        figures += [*("-" if each is None else f"{each:.1f}" for each in graph), parts._times(*graph)]
        cells.append([names.pop(0) if names else "", str(r["tokens"]), *figures])
    titles = ("as called\nours", "\neager", "\ngrouped", "\nratio", "in a graph\nours", "\ngrouped", "\nratio")
    print_rows("us of a layer's call, x bfloat16", ("layer", "tokens", *titles), cells, text=1, tight=True)
    print_text("Bits a weight, everything counted.")
    print_text("Eager, grouped (_mm): transformers' experts. Ratio: the faster one to ours.")
    for row in rows:
        if "note" in row:
            print_text(row["note"])
    print_text("")


PART = parts.Part(measure_layer, show_layer, 60)
