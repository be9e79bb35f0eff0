"""A model whose experts do not fit in memory: tokens a second against the dense model, from disk and in memory.

The model is shaped as Qwen3-30B-A3B, with fewer layers, and lies on disk twice: compressed, and the same weights in
bfloat16. Each contender writes a text, one token at a time, in a process of its own; before each token the files are
dropped from the page cache, whoever reads them. The routing is forced, evenly drawn or as the bundled Switch routed the
evaluation text, so that all contenders do the same work.
"""

from __future__ import annotations

import importlib.util
import json
import math
import multiprocessing
import shutil
import statistics
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qmoe_lite.bench._parts.common import machine_line
from qmoe_lite.bench._parts.offload import KINDS, SHAPE, demo_trace, make_models, passes_of, run_contender
from qmoe_lite.errors import OutputError, QMoEError, SettingError
from qmoe_lite.offload.cache import replay

BUDGETS = (1.0, 0.5, 0.25, 0.1)
HALF_LIVES = (0.0, 8.0, 32.0, 128.0, math.inf)  # passes; the first is LRU, the last LFU
_REPLAYED = 1024  # tokens
_WARM = 8  # tokens before the timed ones
_SPARE = 1 << 30  # bytes that must be free besides the dense model's experts before it is created


@dataclass(frozen=True)
class Run:
    """What one contender did.

    Attributes
    ----------
    contender, routing : str
    budget : float or None
        Share of the compressed experts' bytes; None where nothing limits it.
    tokens_per_second : float
        Over the median token.
    load_seconds : float or None
        None for the dense model in memory, which is made there and not loaded.
    anonymous_bytes : int
        The most, above what the process had before it loaded the model.
    file_bytes : int
        The most file pages it mapped.
    hit_rate, disk_bytes_per_token : float or None
        Ours with a budget.
    """

    contender: str
    routing: str
    budget: float | None
    tokens_per_second: float
    load_seconds: float | None
    anonymous_bytes: int
    file_bytes: int
    hit_rate: float | None = None
    disk_bytes_per_token: float | None = None


@dataclass(frozen=True)
class Parts:
    """Milliseconds of a token, everything in memory, by part of the model; the median token's.

    Attributes
    ----------
    ours, dense : dict
        "experts"; "blocks", which are experts and what routes to them; "attention"; "head"; and "whole", the model.
    """

    ours: dict[str, float]
    dense: dict[str, float]

    @property
    def share(self) -> float:
        """Of the dense model's time that its experts take."""
        return self.dense["experts"] / self.dense["whole"]

    @property
    def predicted(self) -> float:
        """How many times as fast the whole must be, by Amdahl's law, if the experts alone differ."""
        return 1 / (1 - self.share + self.share * self.ours["experts"] / self.dense["experts"])


@dataclass(frozen=True)
class Policy:
    """Share of hits of a cache on one trace, by the half-life of a use."""

    trace: str
    budget: float
    hit_rates: dict[str, float]


@dataclass(frozen=True)
class OffloadReport:
    """What `measure` found, and where."""

    layers: int
    packed_bytes: int
    dense_bytes: int
    runs: tuple[Run, ...]
    parts: Parts | None
    policies: tuple[Policy, ...]
    notes: tuple[str, ...]
    seed: int
    machine: str

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return asdict(self)


def measure(
    layers: int = 2,
    tokens: int = 24,
    budgets: tuple[float, ...] = BUDGETS,
    *,
    peers: bool = True,
    disk: bool = True,
    vocabulary: int = 8192,
    traces: tuple[str, ...] = (),
    directory: str | None = None,
    seed: int = 0,
    shape: dict[str, Any] | None = None,
) -> OffloadReport:
    """Run all contenders.

    Parameters
    ----------
    layers, vocabulary : int
        Of the model; the dense one takes 1.2 GB of disk a layer.
    tokens : int
        Timed tokens of ours; the slower contenders write fewer.
    budgets : tuple of float
        Shares of the compressed experts' bytes.
    peers : bool
        Measure the dense model too: in memory if it fits, by accelerate's offload to disk, and through a cache of
        bfloat16 experts with the same bytes as ours.
    disk : bool
        Measure what reads experts from disk; else only both models in memory, and no dense one is written.
    traces : tuple of str
        Files of `Runner.trace`, on which to compare eviction policies.
    directory : str, optional
        Where there is room for the models; by default the system's place for temporary files. They are removed.
    seed : int
        Decides digits, weights, routing and prompt.
    shape : dict, optional
        Configuration of the model instead of Qwen3-30B-A3B's.

    Raises
    ------
    QMoEError
        Two budgets gave different tokens, or a contender's process died.
    """
    if layers < 1 or tokens < 1 or not budgets or not all(0 < budget <= 1 for budget in budgets):
        raise SettingError("layers and tokens must be at least 1, and budgets above 0, at most 1.")
    if not peers and not disk:
        raise SettingError("with neither peers nor disk there is nothing to measure. Leave one of them on.")
    shape, budgets = shape or SHAPE, tuple(sorted(set(budgets), reverse=True))
    recorded = [(Path(name).name, *read_trace(Path(name))) for name in traces]
    place = Path(tempfile.mkdtemp(prefix="qmoe-offload-", dir=directory))
    try:
        kinds = KINDS if peers and disk else KINDS[:1]
        packed, dense = make_models(place, shape, layers, vocabulary, seed, kinds)
        trace = demo_trace() if disk else []
        run = _Contest(place, packed, tokens, trace, seed)
        if disk:
            _measure_disk(run, budgets, peers)
        parts = _measure_memory(run, dense) if peers else None
    finally:
        shutil.rmtree(place, ignore_errors=True)
    policies = _replay_all(shape, layers, budgets, trace, recorded, seed) if disk else []
    machine = machine_line("torch", "transformers", "numba")
    return OffloadReport(
        layers, packed, dense, tuple(run.runs), parts, tuple(policies), tuple(run.notes), seed, machine
    )


def _replay_all(
    shape: dict[str, Any],
    layers: int,
    budgets: tuple[float, ...],
    trace: list[list[int]],
    recorded: list[tuple[str, int, list[list[list[int]]]]],
    seed: int,
) -> list[Policy]:
    """Replay even routing, the demo's, and recorded ones on caches of all half-lives."""
    experts, top_k = shape["num_experts"], shape["num_experts_per_tok"]
    rng = np.random.default_rng(seed)
    even = [
        [(layer * experts + rng.permutation(experts)[:top_k]).tolist() for layer in range(layers)]
        for _ in range(_REPLAYED)
    ]
    streams = [("even", layers * experts, even)]
    streams.append(("switch", layers * experts, passes_of(trace, experts, top_k, layers, _REPLAYED)))
    policies = []
    for name, count, passes in [*streams, *recorded]:
        for budget in budgets:
            if budget < 1:
                slots = max(1, round(budget * count))
                rates = {str(half_life): replay(count, slots, half_life, passes) for half_life in HALF_LIVES}
                policies.append(Policy(name, budget, rates))
    return policies


class _Contest:
    """Lets contenders write, and keeps what they did."""

    def __init__(self, place: Path, packed: int, tokens: int, trace: list[list[int]], seed: int) -> None:
        self.runs: list[Run] = []
        self.notes: list[str] = []
        self.tokens = tokens
        self._place, self._packed, self._trace, self._seed = place, packed, trace, seed

    def __call__(
        self,
        kind: str,
        routing: str,
        budget: float | None,
        tokens: int | None = None,
        before: int = _WARM,
        shown: bool = True,
    ) -> dict[str, Any]:
        count = tokens or self.tokens
        size = None if budget is None else round(budget * self._packed)
        forced = self._trace if routing == "switch" else None
        found = _alone(run_contender, kind, self._place, size, count, before, forced, self._seed)
        timed = found.get("timed")
        done = Run(
            kind,
            routing,
            budget,
            1 / statistics.median(found["seconds"]),
            None if kind == "dense" else found["load_seconds"],
            found["anonymous_bytes"],
            found["file_bytes"],
            timed and timed["hits"] / (timed["hits"] + timed["misses"]),
            timed and timed["disk_bytes"] / count,
        )
        if shown:
            self.runs.append(done)
        return found


def _measure_disk(run: _Contest, budgets: tuple[float, ...], peers: bool) -> None:
    """Ours with each budget, whose tokens are compared with those without one; then the peers."""
    for routing in ("even", "switch"):
        expected = run("ours", routing, None)["tokens"]
        for budget in budgets:
            if run("ours", routing, budget)["tokens"] != expected:
                raise QMoEError(f"a budget of {budget:.0%} gave other tokens; please report this as a bug.")
    if not peers:
        return
    for routing in ("even", "switch"):
        run("dense cache", routing, min(budgets), max(2, run.tokens // 6), 1)
    if importlib.util.find_spec("accelerate") is None:
        run.notes.append("accelerate is not installed: its offload to disk was not measured.")
    else:
        run("accelerate", "even", None, 2, 1)


def _measure_memory(run: _Contest, dense: int) -> Parts | None:
    """Ours and the dense model in memory, after each other: both do not fit in many a machine."""
    if _available() < dense + _SPARE:
        run.notes.append(f"the dense model, {dense / 1e9:.1f} GB, does not fit in memory: it was not measured there.")
        return None
    # ours once more, just before: a machine's speed wanders
    ours = run("ours", "even", None, shown=not run.runs)
    return Parts(_milliseconds(ours), _milliseconds(run("dense", "even", None)))


def _milliseconds(found: dict[str, Any]) -> dict[str, float]:
    times = found["part_seconds"] | {"whole": found["seconds"]}
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}


def _alone(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Call a function in a new process, whose memory is its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool as error:
            raise QMoEError(
                f"the process of {arguments[0]} died; memory may have run out. Ask for fewer layers."
            ) from error


def _available() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return 1024 * int(line.split()[1])
    return 0


def read_trace(path: Path) -> tuple[int, list[list[list[int]]]]:
    """Read a file of `Runner.trace`: experts of all layers together, and for each pass those that each layer asked for.

    Raises
    ------
    OutputError
        It cannot be read.
    SettingError
        It is no trace.
    """
    try:
        head, *lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        count = head["experts"]
        passes: dict[int, list[list[int]]] = {}
        for line in lines:
            chosen = {expert for row in line["experts"] for expert in row if 0 <= expert < count}
            passes.setdefault(line["pass"], []).append(sorted(line["layer"] * count + expert for expert in chosen))
        return len(head["layers"]) * count, list(passes.values())
    except OSError as error:
        raise OutputError(f"{path} cannot be read: {error.strerror}. Record one: qmoe generate --trace FILE") from error
    except (ValueError, KeyError, TypeError) as error:
        raise SettingError(f"{path} is no trace. Record one: qmoe generate --trace FILE") from error
