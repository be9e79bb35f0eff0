"""Part "offload" of `bench/gpu.py`: a whole model's tokens a second, with a quarter of its experts on the GPU.

Beside it the same model with all experts on the GPU, and the dense one in bfloat16. The layers' shapes are those of
Qwen3-30B-A3B. All go through the same experts, which are drawn beforehand: evenly, which no cache can help, or as a
text's tokens went in the bundled Switch.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from qmoe_lite.bench._parts import gpu as parts
from qmoe_lite.bench._parts import offload as models
from qmoe_lite.bench._show.text import print_rows, print_text
from qmoe_lite.cuda import launch
from qmoe_lite.errors import QMoEError
from qmoe_lite.offload.runner import attach
from qmoe_lite.offload.sizes import show_size

LAYERS, VOCABULARY = 4, 8192
SHARE = 0.25  # of the experts, on the GPU
PROMPT, WARM, TOKENS = 32, 24, 64
_SECONDS = 35.0  # that the models are made within
_TOLERANCE = 0.05  # of logits in bfloat16: largest difference over the largest logit; another expert makes it 0.2


def measure_offload(quick: bool, end: float) -> Iterator[parts.Row]:
    """Tokens a second each way, after the logits were compared: cached and in memory they must be the same bits."""
    if time.monotonic() > end - _SECONDS:
        yield {"skipped": "all"}
        return
    layers = max(1, LAYERS // 2) if quick else LAYERS
    with TemporaryDirectory() as folder:
        packed, dense = models.make_models(Path(folder) / "models", models.SHAPE, layers, VOCABULARY, seed=0)
        routings = _draw_routings(layers, quick)
        sizes = {"layers": layers, "packed_bytes": packed, "dense_bytes": dense}
        logits: dict[str, Tensor] = {}
        for way in ("dense", "all", "cached"):
            model, runner = _load(way, Path(folder) / "models")
            for routing, experts in routings.items():
                if time.monotonic() > end - 3:
                    yield {"skipped": f"{way}, {routing}"}
                    continue
                row = {"way": way, "routing": routing} | sizes
                yield row | _time(model, runner, way, experts, logits if routing == "even" else {})
            if runner is not None:
                runner.close()
            del model, runner


def _draw_routings(layers: int, quick: bool) -> dict[str, Tensor]:
    """Experts of each token of each layer, (layers, tokens, top_k), on the GPU."""
    experts, top_k = models.SHAPE["num_experts"], models.SHAPE["num_experts_per_tok"]
    count = PROMPT + WARM + TOKENS
    draws = torch.rand(layers, count, experts, generator=torch.Generator().manual_seed(0))
    found = {"even": draws.argsort(-1)[..., :top_k]}
    if not quick:
        passes = torch.tensor(models.passes_of(models.demo_trace(), experts, top_k, layers, count))
        found["a text's"] = passes.transpose(0, 1) - experts * torch.arange(layers)[:, None, None]
    return {name: drawn.to(parts._DEVICE) for name, drawn in found.items()}


def _load(way: str, directory: Path) -> tuple[Any, Any]:
    """Load a model to the GPU, and its runner where it has one."""
    from transformers import AutoModelForCausalLM

    import qmoe_lite as qm

    if way == "dense":
        dense = AutoModelForCausalLM.from_pretrained(directory / "dense", dtype=torch.bfloat16)
        return dense.eval().to(parts._DEVICE), None
    model = qm.load(directory / "packed", device="cpu")
    runner = None
    if way == "cached":
        runner = attach(model, devices=[_device()], remember=False)
        whole = runner.statistics.cache_bytes
        runner.close()
        runner = attach(model, devices=[_device()], expert_cache=int(SHARE * whole), remember=False)
    return model.to(parts._DEVICE), runner


def _device() -> Any:
    return f"{parts._DEVICE}:0"


class _Forced:
    """Sends tokens through experts that were drawn, without a look at what is on the GPU."""

    def __init__(self, experts: Tensor) -> None:
        self._experts = experts
        self._at: dict[int, tuple[int, int]] = {}  # of a module: its layer, and the tokens that went through it

    def __call__(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, index, weights = arguments
        layer, at = self._at.get(id(module), (len(self._at), 0))
        self._at[id(module)] = layer, at + len(hidden)
        own = self._experts[layer, at : at + len(hidden)].to(index.dtype)
        return hidden, own, torch.full_like(weights, 1 / index.shape[1])


def _time(model: Any, runner: Any, way: str, experts: Tensor, logits: dict[str, Tensor]) -> parts.Row:
    """Time tokens one by one; compare the prompt's logits with those of the ways before, and keep them."""
    if way != "dense":
        return _time_once(model, runner, way, experts, logits)
    found = []
    for peer in ("grouped_mm", "eager"):  # transformers' own ways of running experts
        model.config._experts_implementation = peer
        found.append(_time_once(model, None, way, experts, logits) | {"peer": peer})
    return max(found, key=lambda row: row["tokens_per_second"])


@torch.no_grad()
def _time_once(model: Any, runner: Any, way: str, experts: Tensor, logits: dict[str, Tensor]) -> parts.Row:
    forced = _Forced(experts)
    hooks = [layer.mlp.experts.register_forward_pre_hook(forced, prepend=True) for layer in model.model.layers]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(8, VOCABULARY, (1, PROMPT), generator=generator).to(parts._DEVICE)
    past: Any = None
    start, before = 0.0, {}
    for step in range(1 + WARM + TOKENS):
        if step == 1 + WARM:
            before = _counted(runner)
            start = time.perf_counter()
        result = model(input_ids=ids, cache=past, use_cache=True)
        if step == 0:
            _compare(way, result.logits[0].float(), logits)
        ids, past = result.logits[:, -1:].argmax(-1), result.past_key_values
        launch.finish(ids.device)  # as whoever reads the token does
    seconds = time.perf_counter() - start
    for hook in hooks:
        hook.remove()
    row: parts.Row = {"tokens_per_second": TOKENS / seconds}
    if runner is not None:
        after = _counted(runner)
        grown = {name: after[name] - before[name] for name in ("hits", "misses", "copied_bytes")}
        row["hit_rate"] = grown["hits"] / (grown["hits"] + grown["misses"])
        row["copied_bytes"] = grown["copied_bytes"] / TOKENS
        lost = after["copy_stall_seconds"]
        row["lost_share"] = None if lost is None else (lost - before["copy_stall_seconds"]) / seconds
    return row


def _counted(runner: Any) -> dict[str, Any]:
    """What a runner has done so far, the last token's waits among it: they have ended."""
    if runner is None:
        return {}
    runner._count()
    return dict(runner.statistics.to_json())


def _compare(way: str, found: Tensor, logits: dict[str, Tensor]) -> None:
    """Raise QMoEError where ours is not the dense model, or ours cached not ours as a whole, bit for bit."""
    if way == "all" and "dense" in logits:
        error = float((found - logits["dense"]).abs().max() / logits["dense"].abs().max())
        if not error <= _TOLERANCE:
            raise QMoEError(f"the logits differ from the dense model's by {error:.1e}; please report this as a bug.")
    if way == "cached" and "all" in logits and not torch.equal(found, logits["all"]):
        raise QMoEError("with a cache the logits are not the same bits as without; please report this as a bug.")
    logits[way] = found


def show_offload(rows: list[parts.Row]) -> None:
    """Print tokens a second, and what the cache did."""
    dense = {row["routing"]: row["tokens_per_second"] for row in rows if row["way"] == "dense"}
    names = {"dense": "dense bf16", "all": "ours, all on the GPU", "cached": f"ours, {SHARE:.0%} on the GPU"}
    cells, shown = [], ""
    for r in sorted(rows, key=lambda row: row["routing"] != "even"):
        speed, peer = r["tokens_per_second"], dense.get(r["routing"])
        cache = ["-", "-", "-"]
        if "hit_rate" in r:
            lost = r["lost_share"]
            cache = [f"{r['hit_rate']:.0%}", show_size(r["copied_bytes"]), "-" if lost is None else f"{lost:.0%}"]
        ratio = "-" if peer is None else f"{speed / peer:.2f}x"
        cells.append([r["routing"] if r["routing"] != shown else "", names[r["way"]], f"{speed:.1f}", ratio, *cache])
        shown = r["routing"]
    titles = ("experts\ndrawn", "", "tokens/\ns", "to\ndense", "hits", "copied\na token", "lost to\ncopies")
    print_rows(
        f"{rows[0]['layers']} layers of Qwen3-30B-A3B's shape, a token at a time", titles, cells, text=2, tight=True
    )
    first = rows[0]
    sizes = f"Experts {show_size(first['packed_bytes'])}, dense {show_size(first['dense_bytes'])}. "
    peers = ", ".join(dict.fromkeys(row["peer"] for row in rows if "peer" in row))
    print_text(sizes + f"Dense: {peers}, the faster." if peers else sizes)
    print_text("Lost: time that the GPU waited. Nothing is copied ahead: routers do not draw.\n")


PART = parts.Part(measure_offload, show_offload, 45)
