"""Where a compression spends its time, and what it holds in memory: measured from outside, around the library's own."""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

from qmoe_lite.inspection.fitting import anonymous_bytes

_PAUSE = 0.02  # seconds between two looks at the memory
OTHER, ALONE = "other", "layers alone"


class Stopwatch:
    """Seconds of phases, each without those inside it.

    Attributes
    ----------
    seconds : defaultdict
        By phase; `OTHER` for what is in none.
    within : defaultdict
        By phase, those inside it included.
    """

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.within: defaultdict[str, float] = defaultdict(float)
        self._thread = threading.get_ident()
        self._phases = [OTHER]
        self._mark = time.perf_counter()

    @property
    def phase(self) -> str:
        """The one that runs."""
        return self._phases[-1]

    def lap(self) -> None:
        """Give the time since the last lap to the phase that runs."""
        now = time.perf_counter()
        self.seconds[self.phase] += now - self._mark
        self._mark = now

    def around(self, phase: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that counts to a phase in this thread; in others it is what it was."""

        @wraps(call)
        def timed(*args: Any, **named: Any) -> Any:
            if threading.get_ident() != self._thread:
                return call(*args, **named)
            self.lap()
            self._phases.append(phase)
            begun = self._mark
            try:
                return call(*args, **named)
            finally:
                self.lap()
                self.within[phase] += self._mark - begun
                self._phases.pop()

        return timed


def _watched() -> Iterator[tuple[str, Any, str]]:
    """Yield what runs in each phase: the phase, where it is found, and its name there."""
    from qmoe_lite.checkpoint.reader import Checkpoint
    from qmoe_lite.checkpoint.writer import Writer
    from qmoe_lite.compression import layer, run
    from qmoe_lite.compression.block_runner import BlockRunner
    from qmoe_lite.compression.block_tuning import BlockTuning, LayerTuner
    from qmoe_lite.compression.groups import GroupLog
    from qmoe_lite.compression.layer import LayerCompressor
    from qmoe_lite.compression.run_samples import RunSamples
    from qmoe_lite.compression.state import Unfinished
    from qmoe_lite.compression.tally import CodebookTally, WindowTally

    places: dict[str, list[tuple[Any, str]]] = {
        "read": [(Checkpoint, "tensor"), (LayerCompressor, "_weights")],  # mapped by one, touched by the other
        "checksums": [(run, "contents_of")],
        ALONE: [(run, "measured_by_first")],
        "dense forward": [(BlockRunner, name) for name in ("enter", "run", "leave")],
        "gather": [(LayerCompressor, "gather")],
        "Hessian": [(LayerCompressor, "_hessians"), (LayerCompressor, "_hessian_and_inner")],
        "importance": [(layer, "importance_of")],
        "factor": [(layer, "factorise_all")],
        "solve": [(layer, "gptq_shared"), (layer, "gptq")],
        "encode": [(WindowTally, "encode"), (WindowTally, "finish"), (CodebookTally, "finish")],
        "experts' outputs": [(LayerCompressor, "run")],
        "tuning": [(BlockTuning, "begin"), *((LayerTuner, name) for name in ("take", "aim", "tune"))],
        "judge": [(RunSamples, "judge")],
        "write": [(Writer, "write_layer"), (Writer, "write_rest"), (GroupLog, "write"), (Unfinished, "keep")],
    }
    for phase, calls in places.items():
        for owner, name in calls:
            yield phase, owner, name


@contextmanager
def watched() -> Iterator[Stopwatch]:
    """Count the seconds of each phase of what is compressed inside the block."""
    watch = Stopwatch()
    with ExitStack() as stack:
        for phase, owner, name in _watched():
            stack.enter_context(patch.object(owner, name, watch.around(phase, getattr(owner, name))))
        yield watch
        watch.lap()


class MemoryPeak:
    """The most anonymous memory that this process has inside a block, looked at 50 times a second.

    Parameters
    ----------
    watch : Stopwatch
        Knows which phase runs.

    Attributes
    ----------
    before, most : int
        Bytes when it began, and at most.
    phase : str
        That ran when it was most.
    """

    def __init__(self, watch: Stopwatch) -> None:
        self._watch, self.phase = watch, watch.phase
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self.before = self.most = anonymous_bytes()

    def _look(self) -> None:
        while not self._ended.wait(_PAUSE):
            if (now := anonymous_bytes()) > self.most:
                self.most, self.phase = now, self._watch.phase

    def __enter__(self) -> MemoryPeak:
        self._thread.start()
        return self

    def __exit__(self, *rest: object) -> None:
        self._ended.set()
        self._thread.join()


def moved_bytes() -> Counter[str]:
    """Return the bytes that this process has read and written so far, and how many of them the disk has seen."""
    file = Path("/proc/self/io")
    lines = file.read_text().splitlines() if file.exists() else []
    names = {"rchar": "read", "wchar": "written", "read_bytes": "from the disk", "write_bytes": "to the disk"}
    return Counter({names[line.split(":")[0]]: int(line.split()[1]) for line in lines if line.split(":")[0] in names})


@dataclass(frozen=True)
class Compressed:
    """What one compression took.

    Attributes
    ----------
    weights : int
        In experts.
    bits : float
        Stored, of one of them.
    bytes : int
        Of the directory that was written.
    seconds, processor_seconds : float
        By the clock, and of all processors.
    alone_seconds : float
        To measure what layers lose alone, in all phases.
    phases : dict, phase to seconds
    import_bytes, peak_bytes : int
        Anonymous memory after the imports, and at most.
    peak_phase : str
        That ran then.
    moved : dict, way to bytes
        By calls of the system; a mapped file is not among them.
    """

    weights: int
    bits: float
    bytes: int
    seconds: float
    processor_seconds: float
    alone_seconds: float
    phases: dict[str, float]
    import_bytes: int
    peak_bytes: int
    peak_phase: str
    moved: dict[str, int]


def compress_watched(model: Path, out: Path, settings: dict[str, Any]) -> Compressed:
    """Compress a model in this process; best in a fresh one, for its memory.

    Parameters
    ----------
    model, out : Path
        As `compress` takes them.
    settings : dict
        Its other parameters.
    """
    from qmoe_lite.compression.run import compress

    before, begun, used = moved_bytes(), time.perf_counter(), time.process_time()
    with watched() as watch, MemoryPeak(watch) as memory:
        report = compress(model, out, **settings)
    took = time.perf_counter() - begun, time.process_time() - used
    return Compressed(
        report.expert_weights,
        report.bits_per_weight,
        sum(file.stat().st_size for file in out.iterdir()),
        *took,
        watch.within[ALONE],
        dict(watch.seconds),
        memory.before,
        memory.most,
        memory.phase,
        dict(moved_bytes() - before),
    )
