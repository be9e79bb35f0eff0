"""Damages compressed directories and looks what becomes of them: the exact result, or an error in one line.

    python bench/fuzz.py --cases 10000 --seed 0

From a checkout: tests/mutate.py damages and tests/judge.py says what is right. Worker processes do both, so that a
crash or a hang is known by its case. `--replay CODE:SEED` runs one case in this process, and prints what was done.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SILENT = 90.0  # seconds without a word after which a worker hangs, whatever else the machine does
BUSY = 20.0  # seconds of processor time after which it does, as for `judge`
WIDTH = 80
GOOD = ("as before", "as it says", "refused", "cannot run")  # as tests/judge.py has them
BAD = ("wrong", "exception", "slow", "hang", "memory", "crash")


def main() -> int:
    """Run the cases and print the table; 1 where one went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first case; the others follow")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--replay", metavar="CODE:SEED", help="run one case here")
    parser.add_argument("--work", metavar="DIR:FIRST:STEP:END", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
    if options.work:
        work(options.work)
        return 0
    with tempfile.TemporaryDirectory(prefix="qmoe-fuzz-") as base:
        if options.replay:
            return replay(Path(base), options.replay)
        return run(Path(base), options)


def judge() -> Any:
    """Import tests/judge.py, in silence."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.simplefilter("ignore")
    logging: Any = importlib.import_module("transformers.utils.logging")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    importlib.import_module("torch").set_num_threads(1)
    return importlib.import_module("judge")


def replay(base: Path, case: str) -> int:
    """Run one case, and show what was done and what came of it."""
    code, _, seed = case.partition(":")
    made = judge().make_directories(base)
    if code not in made or not seed.isdigit():
        print(f"no such case: {case}; the codes are {', '.join(made)}, the seed is a number.", file=sys.stderr)
        return 2
    mutant, outcome = judge().judge(judge().original_of(code, made[code]), int(seed), base / "mutant")
    sums = "all checksums made right" if mutant.sealed else "checksums left alone"
    print(*mutant.done, sums, f"{outcome.kind}: {outcome.text}", sep="\n")
    return 0 if outcome.right else 1


# -- one worker


def work(task: str) -> None:
    """Run every so manyth case from the first on, a line of JSON each; each is announced before it begins."""
    directory, first, step, end = task.rsplit(":", 3)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what others print is not for whoever reads the lines
    base, its = Path(directory), judge()
    originals = [its.original_of(path.stem, path) for path in sorted(base.iterdir()) if path.suffix == ".code"]
    with tempfile.TemporaryDirectory(prefix="qmoe-fuzz-") as own:
        for seed in range(int(first), int(end), int(step)):
            original = originals[seed % len(originals)]
            print(json.dumps({"code": original.name, "seed": seed}), file=out, flush=True)
            mutant, outcome = its.judge(original, seed, Path(own) / "mutant")
            told = {"kind": outcome.kind, "text": outcome.text, "sealed": mutant.sealed, "done": mutant.done}
            print(json.dumps(told), file=out, flush=True)


# -- all of them


@dataclass
class Worker:
    """A process, the case that it is at, and when it was heard of last."""

    process: subprocess.Popen[bytes]
    first: int
    out: int
    errors: Path
    at: dict[str, Any] | None = None
    heard: float = 0.0
    busy: float = 0.0
    rest: bytes = b""


@dataclass
class Tally:
    """What became of the cases: by code and kind, and each that went wrong."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    sealed: int = 0
    wrong: list[str] = field(default_factory=list)

    def add(self, case: dict[str, Any], kind: str, text: str, done: list[str]) -> None:
        self.counts[case["code"], kind] += 1
        if kind not in GOOD:
            self.wrong.append(f"{kind} at {case['code']}:{case['seed']}: {text[:300]}; {'; '.join(done)[:300]}")
            print(self.wrong[-1], file=sys.stderr, flush=True)

    @property
    def total(self) -> int:
        return self.counts.total()


def run(base: Path, options: argparse.Namespace) -> int:
    """Share the cases among workers; print the table."""
    began = time.monotonic()
    for name, path in judge().make_directories(base).items():
        path.rename(base / f"{name}.code")
    tally, step = Tally(), max(1, min(options.workers, options.cases))
    end = options.seed + options.cases
    workers = [start(base, options.seed + i, step, end) for i in range(step)]
    with suppress(KeyboardInterrupt):  # what is done is told
        follow_all(base, workers, tally, step, end, options.cases)
    for worker in workers:
        worker.process.kill()
        print(worker.errors.read_text(errors="replace"), file=sys.stderr)
    show(tally, options, time.monotonic() - began)
    return 1 if tally.wrong or workers else 0


def follow_all(base: Path, workers: list[Worker], tally: Tally, step: int, end: int, cases: int) -> None:
    """Follow the workers to their ends; one that cannot begin is left in the list."""
    shown = 0.0
    while workers:
        time.sleep(0.05)
        for worker in list(workers):
            follow(worker, tally)
            ended = worker.process.poll() is not None
            reason = None if ended else hanging(worker)
            if not ended and reason is None:
                continue
            if reason is not None:
                worker.process.kill()
                worker.process.wait()
            follow(worker, tally)
            if worker.at is None and worker.process.returncode:
                return
            workers.remove(worker)
            if worker.at is not None:
                last = (worker.errors.read_text(errors="replace").strip().splitlines() or [""])[-1]
                tally.add(worker.at, "hang" if reason else "crash", reason or f"{worker.process.returncode} {last}", [])
                workers.append(start(base, worker.at["seed"] + step, step, end))
        if sys.stderr.isatty() and time.monotonic() - shown > 1:
            shown = time.monotonic()
            print(f"\r{tally.total} of {cases}", end="", file=sys.stderr, flush=True)


def start(base: Path, first: int, step: int, end: int) -> Worker:
    """Start a worker at a case."""
    errors = base / f"{first}.errors"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
    command = [sys.executable, "-X", "faulthandler", __file__, "--work", f"{base}:{first}:{step}:{end}"]
    with errors.open("w") as written:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=written, env=environment)
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    return Worker(process, first, process.stdout.fileno(), errors, heard=time.monotonic())


def follow(worker: Worker, tally: Tally) -> None:
    """Read what a worker has said."""
    said = worker.rest
    with suppress(BlockingIOError):
        while piece := os.read(worker.out, 1 << 16):
            said += piece
    *lines, worker.rest = said.split(b"\n")
    for line in lines:
        told = json.loads(line)
        worker.heard, worker.busy = time.monotonic(), processor_seconds(worker.process.pid)
        if "seed" in told:
            worker.at = told
        elif worker.at is not None:
            tally.sealed += told["sealed"]
            tally.add(worker.at, told["kind"], told["text"], told["done"])
            worker.at = None


def hanging(worker: Worker) -> str | None:
    """Return why a worker is taken to hang at its case; None where it is not."""
    if worker.at is None:  # it begins: kernels may be compiled
        return None
    if (took := processor_seconds(worker.process.pid) - worker.busy) > BUSY:
        return f"{took:.0f} s of processor time"
    return f"{SILENT:.0f} s" if time.monotonic() - worker.heard > SILENT else None


def processor_seconds(process: int) -> float:
    """Return what a process has used."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def show(tally: Tally, options: argparse.Namespace, seconds: float) -> None:
    """Print the table, and how to see again what went wrong."""
    codes = sorted({code for code, _ in tally.counts})
    kinds = [kind for kind in (*GOOD, *BAD) if any(tally.counts[code, kind] for code in codes) or kind in GOOD]
    widths = [max(len(kind), 6) for kind in kinds]
    print(f"{tally.total:,} mutants, {tally.sealed:,} with their checksums made right, seed {options.seed}")
    print(f"{'code':<12}" + "".join(f"{kind:>{width + 2}}" for kind, width in zip(kinds, widths, strict=True)))
    for code in [*codes, "all"]:
        of = codes if code == "all" else [code]
        figures = [sum(tally.counts[each, kind] for each in of) for kind in kinds]
        print(f"{code:<12}" + "".join(f"{n:>{w + 2},}" for n, w in zip(figures, widths, strict=True)))
    print(f"{len(tally.wrong)} went wrong; {seconds:.0f} s with {options.workers} workers")
    for line in tally.wrong:
        print(f"  {line}"[: 4 * WIDTH])
        case = line.partition(" at ")[2].split(": ")[0]
        print(f"    python bench/fuzz.py --replay {case}")


if __name__ == "__main__":
    sys.exit(main())
