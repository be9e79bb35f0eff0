"""Models and contenders of `qmoe bench offload`; each contender runs in a process of its own."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from qmoe_lite.bench._parts.offload_dense import load_dense_cache, load_dense_in_memory
from qmoe_lite.checkpoint.atomic import write_json
from qmoe_lite.checkpoint.format import pack_experts, quantization_config, tensor_name
from qmoe_lite.coding.codebook import Codebook
from qmoe_lite.coding.codec import encode
from qmoe_lite.models.building import skeleton
from qmoe_lite.models.family import family_of

SHAPE = {  # of Qwen3-30B-A3B, with fewer layers and a smaller vocabulary
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "norm_topk_prob": True,
}
ZEROS = 0.885
KINDS = ("packed", "dense")
_DISTINCT = 8  # matrices of each projection that are drawn; experts repeat them, at places of their own in the files
PARTS = ("experts", "blocks", "attention", "head")  # of a token's time; blocks: experts and what routes to them
_PROMPT = 96  # tokens: nearly every expert has been used, and checked, when the clock starts


def make_models(
    directory: Path, shape: dict[str, Any], layers: int, vocabulary: int, seed: int, kinds: tuple[str, ...] = KINDS
) -> tuple[int, int]:
    """Write one model twice: `directory`/packed, compressed, and `directory`/dense, the same weights in bfloat16.

    `kinds` names those that are written.

    Returns
    -------
    tuple of int
        Bytes of the experts, compressed and in bfloat16.
    """
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        "qwen3_moe", num_hidden_layers=layers, vocab_size=vocabulary, dtype="bfloat16", **shape
    )
    family, rng = family_of("qwen3_moe"), np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    places = family.layers(config)
    books: list[Codebook] = []
    packed, dense = {}, {}
    for number, (projection, (rows, columns)) in enumerate(places[0].shapes.items()):
        matrices = []
        for _ in range(_DISTINCT):
            draws, half = rng.random((rows, columns), dtype=np.float32), (1 - ZEROS) / 2
            digits = (draws > 1 - half).astype(np.int8) - (draws < half).astype(np.int8)
            if len(books) == number:
                books.append(Codebook.fit([int((digits == digit).sum()) for digit in (-1, 0, 1)]))
            matrices.append(encode(digits, torch.tensor([[-0.05, 0.05]] * rows, dtype=torch.bfloat16), books[number]))
        packed[projection] = pack_experts([matrices[e % _DISTINCT] for e in range(places[0].count)])
        dense[projection] = [matrix.dense(torch.bfloat16) for matrix in matrices]
    used = {name: book.to_config() for name, book in zip(places[0].projections, books, strict=True)}
    others: dict[str, Tensor] = {}
    for name, target in skeleton(family, config, torch.bfloat16).state_dict().items():
        if ".experts." not in name:
            drawn = torch.randn(target.shape, generator=generator).mul_(0.02) if target.dim() > 1 else 1.0
            others[name] = torch.zeros(target.shape, dtype=torch.bfloat16).add_(drawn)
    for kind in kinds:
        path = directory / kind
        path.mkdir(parents=True)
        weight_map = dict.fromkeys(others, "model-others.safetensors")
        save_file(others, path / "model-others.safetensors", {"format": "pt"})
        for place in places:
            if kind == "packed":
                tensors = {
                    tensor_name(f"{place.experts}.{p}", part): tensor
                    for p, parts in packed.items()
                    for part, tensor in parts.items()
                }
            else:
                tensors = {  # each on its own: tensors that share memory are not saved
                    family.weight_name(place, e, p): dense[p][e % _DISTINCT].clone()
                    for e in range(place.count)
                    for p in place.projections
                }
            file = f"model-{place.block}.safetensors"
            save_file(tensors, path / file, {"format": "pt"})
            weight_map |= dict.fromkeys(tensors, file)
        write_json(path / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
        settings = quantization_config({place.experts: used for place in places})
        extra = {"quantization_config": settings} if kind == "packed" else {}
        write_json(path / "config.json", {**config.to_dict(), **extra})
    os.sync()  # pages that are not on disk yet cannot be dropped
    stored = sum(tensor.nbytes for parts in packed.values() for tensor in parts.values())
    weights = sum(place.count * rows * columns for place in places for rows, columns in place.shapes.values())
    return len(places) * stored, 2 * weights


def drop_cached(directory: Path) -> None:
    """Drop a model's files from the page cache, as far as nobody maps them."""
    for file in directory.rglob("*"):
        if file.is_file():
            handle = os.open(file, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def memory_now(field: str) -> int:
    """Bytes of this process: RssAnon, RssFile."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    return 0


@contextmanager
def _watched(found: dict[str, int]) -> Iterator[None]:
    """Note the most anonymous memory and file pages that the block had, looking every 10 ms."""
    end = Event()

    def look() -> None:
        while not end.wait(0.01):
            for field in ("RssAnon", "RssFile"):
                found[field] = max(found.get(field, 0), memory_now(field))

    thread = Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


class Routing:
    """Forces the routing: drawn evenly, or as in a trace.

    Parameters
    ----------
    experts, top_k : int
    trace : list of list of int, optional
        The experts that one stream of tokens took in one layer, for several layers. Stream j of a token's top_k, a
        different layer or a later place in the text each, chooses within its own share of the experts.
    """

    def __init__(self, experts: int, top_k: int, seed: int, trace: list[list[int]] | None) -> None:
        self._experts, self._top_k, self._trace = experts, top_k, trace
        self._rng = np.random.default_rng(seed)
        self._calls: dict[int, int] = {}

    def __call__(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, index, weights = arguments
        rows = []
        for _ in range(len(hidden)):
            call = self._calls[id(module)] = self._calls.get(id(module), -1) + 1
            if self._trace is None:
                rows.append(np.sort(self._rng.permutation(self._experts)[: self._top_k]))
                continue
            layer = list(self._calls).index(id(module))
            rows.append(np.array(_as_traced(self._trace, layer, call, self._experts, self._top_k)))
        return hidden, torch.from_numpy(np.stack(rows)).to(index.device), torch.full_like(weights, 1 / self._top_k)


def load_contender(kind: str, directory: Path, budget: int | None) -> nn.Module:
    """Load "ours", "dense", "dense cache" or "accelerate"."""
    from transformers import AutoModelForCausalLM

    import qmoe_lite as qm
    from qmoe_lite.offload.runner import attach

    if kind == "ours":
        model: nn.Module = qm.load(directory / "packed", device="cpu")
        if budget is not None:
            attach(model, ram_cache=budget, remember=False)
        return model
    if kind == "dense cache":
        assert budget is not None
        return load_dense_cache(directory / "dense", budget)
    if kind == "dense":
        return load_dense_in_memory(directory / "packed")
    from transformers import AutoConfig

    places: dict[str, str] = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    places["lm_head"] = "cpu"
    for i in range(AutoConfig.from_pretrained(directory / "dense").num_hidden_layers):
        for part in ("self_attn", "input_layernorm", "post_attention_layernorm", "mlp.gate"):
            places[f"model.layers.{i}.{part}"] = "cpu"
        places[f"model.layers.{i}.mlp.experts"] = "disk"
    return AutoModelForCausalLM.from_pretrained(
        directory / "dense", dtype=torch.bfloat16, device_map=places, offload_folder=directory / "accelerate"
    ).eval()


def run_contender(
    kind: str,
    directory: Path,
    budget: int | None,
    tokens: int,
    warm: int,
    trace: list[list[int]] | None,
    seed: int,
) -> dict[str, Any]:
    """Load a model and generate; return seconds, memory and tokens.

    Before each token the model's files are dropped from the page cache. `timed` counts the timed tokens alone.
    """
    import transformers

    from qmoe_lite.offload import runner_of

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    drop_cached(directory)
    before = memory_now("RssAnon")
    start = time.perf_counter()
    model = load_contender(kind, directory, budget)
    found: dict[str, Any] = {"load_seconds": time.perf_counter() - start}
    gc.collect()  # what loading left would count as this model's memory
    config: Any = model.config
    routing = Routing(config.num_experts, config.num_experts_per_tok, seed, trace)
    inside = dict.fromkeys(PARTS, 0.0)
    timed_model: Any = model
    _time_inside(timed_model.lm_head, inside, "head")
    for layer in timed_model.model.layers:
        _time_inside(layer.mlp.experts, inside, "experts")
        _time_inside(layer.mlp, inside, "blocks")
        _time_inside(layer.self_attn, inside, "attention")
        layer.mlp.experts.register_forward_pre_hook(routing, prepend=True)
    ids = torch.randint(8, config.vocab_size, (1, _PROMPT), generator=torch.Generator().manual_seed(seed))
    times, made = [], []
    shares: dict[str, list[float]] = {name: [] for name in PARTS}
    peak: dict[str, int] = {}
    with _watched(peak):
        past: Any = None
        at_start: dict[str, Any] = {}
        runner = runner_of(model)
        for step in range(warm + tokens):
            if step == warm and runner is not None:
                at_start = runner.statistics.to_json()
            if kind != "dense" and not (kind == "ours" and budget is None):
                drop_cached(directory)
            inside.update(dict.fromkeys(PARTS, 0.0))
            start = time.perf_counter()
            with torch.no_grad():
                result = model(input_ids=ids, cache=past, use_cache=True)
            ids, past = result.logits[:, -1:].argmax(-1), result.past_key_values
            times.append(time.perf_counter() - start)
            for name, spent in inside.items():
                shares[name].append(spent)
            made.append(int(ids))
    found |= {"tokens": made, "seconds": times[warm:]}
    found |= {"part_seconds": {name: spent[warm:] for name, spent in shares.items()}}
    found |= {"anonymous_bytes": peak.get("RssAnon", 0) - before, "file_bytes": peak.get("RssFile", 0)}
    if runner is not None:
        at_end = runner.statistics.to_json()
        found["timed"] = {name: at_end[name] - at_start[name] for name in ("hits", "misses", "disk_bytes")}
        runner.close()
    return found


def _time_inside(module: nn.Module, total: dict[str, float], name: str) -> None:
    forward: Callable[..., Tensor] = module.forward

    def timed(*arguments: Any, **options: Any) -> Tensor:
        start = time.perf_counter()
        result = forward(*arguments, **options)
        total[name] += time.perf_counter() - start
        return result

    module.forward = timed  # type: ignore[method-assign]


def demo_trace(tokens: int = 2048) -> list[list[int]]:
    """Which experts the bundled Switch sends the evaluation text's tokens to: one list a sparse layer."""
    from transformers import AutoModelForSeq2SeqLM

    import qmoe_lite
    from qmoe_lite.compression.calibration import open_tokenizer
    from qmoe_lite.models.skeletons import capacity_lifted

    data = Path(qmoe_lite.__file__).parent / "data"
    model = AutoModelForSeq2SeqLM.from_pretrained(data / "tiny_switch").eval()
    tokenizer = open_tokenizer(data / "tiny_switch")
    text = (data / "text" / "evaluation.txt").read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"][:tokens]).view(-1, 128)
    layers = family_of("switch_transformers").layers(model.config)
    found: dict[str, list[int]] = {layer.experts: [] for layer in layers}
    for layer in layers:

        def note(module: nn.Module, arguments: tuple[Tensor, ...], name: str = layer.experts) -> None:
            found[name] += arguments[1][:, 0].argmax(-1).tolist()

        model.get_submodule(layer.experts).register_forward_pre_hook(note)
    with torch.no_grad(), capacity_lifted(model):
        for row in ids:
            model(input_ids=row[None], decoder_input_ids=row[None])
    return list(found.values())


def passes_of(trace: list[list[int]], experts: int, top_k: int, layers: int, count: int) -> list[list[list[int]]]:
    """Turn a trace into what `ExpertCache` is asked for: a pass a token, experts of all layers numbered through."""
    return [
        [
            [layer * experts + expert for expert in _as_traced(trace, layer, call, experts, top_k)]
            for layer in range(layers)
        ]
        for call in range(count)
    ]


def _as_traced(trace: list[list[int]], layer: int, call: int, experts: int, top_k: int) -> list[int]:
    """Experts of one token in one layer, as `Routing` chooses them by a trace."""
    share = experts // top_k
    streams = [trace[(layer + j) % len(trace)] for j in range(top_k)]
    return [j * share + stream[(call + 997 * j) % len(stream)] % share for j, stream in enumerate(streams)]
