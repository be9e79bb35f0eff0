"""Compressions that are killed at random moments, on disks that fill, and into places that cannot be written.

Each is begun again by the same call, some are killed again then, and all must end with the bytes of a run that nothing
befell: every file, but for the time in the report. What is not killed must end by itself or in one line of QMoEError.
Every second one has its activations on disk (`spill`), where nothing may be left.

    python bench/kill.py --kills 30                     # a small random model, made for it

A full disk is a small tmpfs, where this user may mount one; besides, files may be limited in their size (RLIMIT_FSIZE).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qmoe_lite.bench._parts.common import machine_line
from qmoe_lite.bench._show.text import print_rows, print_wrapped

AGAIN = 0.4  # share of the runs that are killed a second time
SHAPE = {"hidden_size": 64, "moe_intermediate_size": 48, "num_hidden_layers": 3, "num_experts": 8}
SETTINGS: dict[str, Any] = {"samples": 32, "sequence_length": 64, "validation_samples": 2, "group_size": 2, "rate": 2.0}
REFUSED, FAILED = 3, 4  # exit codes: QMoEError, something else


def untimed(report: dict[str, Any]) -> dict[str, Any]:
    """Return a report's values without the times in it, which no two runs share."""
    for timed in (report, report.get("tuning_by_block") or {}):
        timed.pop("seconds", None)
    return report


def everything_of(directory: Path) -> dict[str, str]:
    """Return the SHA-256 of each file; of the report of all but the time."""
    found = {}
    for file in sorted(directory.iterdir()):
        content = file.read_bytes()
        if file.name == "qmoe_report.json":
            content = json.dumps(untimed(json.loads(content))).encode()
        found[file.name] = hashlib.sha256(content).hexdigest()
    return found


@dataclass
class Runs:
    """Compressions of one model, each in a fork of this process.

    Attributes
    ----------
    model, text, scratch : Path
        Dense model, calibration text, and where there is room.
    expected : dict, file to SHA-256
        Of a run that nothing befell.
    seconds : float
        That one takes.
    begun : int
        Compressions so far.
    found : Counter
        How runs ended, by what befell them.
    wrong : list of str
        What must not be.
    """

    model: Path
    text: Path
    scratch: Path
    expected: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    begun: int = 0
    found: Counter[tuple[str, str]] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def begin(self, out: Path, limit: int | None = None) -> int:
        """Start a compression, of whose files none may be larger than `limit`; return the process."""
        self.begun += 1
        process = os.fork()
        if process:
            return process
        code = FAILED
        try:
            code = self._compress(out, limit)
        finally:
            os._exit(code)

    def _compress(self, out: Path, limit: int | None) -> int:
        """Compress in this process; return its exit code, and leave what there is to say in a file."""
        from qmoe_lite.compression.run import compress
        from qmoe_lite.errors import QMoEError

        code, said, before = 0, "", resource.getrlimit(resource.RLIMIT_FSIZE)
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            compress(self.model, out, calibration=self.text, spill=self.spill if self.begun % 2 else None, **SETTINGS)
        except QMoEError as error:
            code, said = REFUSED, str(error)
        except BaseException as error:
            code, said = FAILED, repr(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        (self.scratch / "said").write_text(said)
        return code

    def end(self, process: int, kind: str) -> int:
        """Wait for a compression's end; return its exit code. What is neither done, killed nor refused is wrong."""
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        if code == REFUSED and "\n" in self.said:
            self.wrong.append(f"{kind}: several lines: {self.said}")
        elif code not in (0, REFUSED, -signal.SIGKILL):
            self.wrong.append(f"{kind}: exit code {code}: {self.said}")
        return code

    @property
    def spill(self) -> Path:
        """Folder for activations."""
        return self.scratch / "spill"

    @property
    def said(self) -> str:
        """What the last run that was refused or failed ended with."""
        file = self.scratch / "said"
        return file.read_text() if file.exists() else ""

    def finish(self, out: Path, kind: str, where: str) -> None:
        """Run to the end, and compare."""
        code = self.end(self.begin(out), kind)
        if code != 0:
            self.wrong.append(f"{kind}, {where}: the last run ended with {code}: {self.said}")
        elif (found := everything_of(out)) != self.expected:
            names = [name for name in found.keys() | self.expected.keys() if found.get(name) != self.expected.get(name)]
            self.wrong.append(f"{kind}, {where}: differs in {', '.join(sorted(names))}")
        else:
            self.found[kind, "the same bytes"] += 1
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(out.with_name(f"{out.name}.partial"), ignore_errors=True)

    def kill(self, out: Path, draws: random.Random, kind: str) -> bool:
        """Start a compression and kill it at a random moment; return whether it had not ended by then."""
        moment = draws.random() * self.seconds
        process = self.begin(out)
        time.sleep(moment)
        os.kill(process, signal.SIGKILL)
        return self.end(process, kind) == -signal.SIGKILL


def where(out: Path) -> str:
    """Return how far unfinished work is."""
    partial = out.with_name(f"{out.name}.partial")
    if not partial.is_dir():
        return "nothing written"
    kept = sum(file.stat().st_size for file in partial.glob("groups-*.log"))
    return f"{len(list(partial.glob('model-*.safetensors')))} layers and {kept} bytes of groups written"


def killed(runs: Runs, draws: random.Random, kills: int) -> None:
    """Kill runs at random moments; go on with each to its end."""
    number = 0
    while number < kills:
        out, kind = runs.scratch / f"killed-{number}", "killed once"
        if not runs.kill(out, draws, kind):
            shutil.rmtree(out, ignore_errors=True)
            continue
        place = where(out)
        runs.found["killed between two groups", ""] += " bytes of groups" in place and " 0 bytes" not in place
        if draws.random() < AGAIN and runs.kill(out, draws, kind):
            kind, place = "killed twice", f"{place}, then {where(out)}"
        if out.exists():  # the second kill came too late
            shutil.rmtree(out)
            continue
        runs.finish(out, kind, place)
        number += 1


def refused(runs: Runs, draws: random.Random, tries: int, most: int, kind: str, limited: Callable[..., Any]) -> None:
    """Let runs meet a limit of so many bytes at most; lift it, and go on with each to its end.

    `limited` is a context of an output and a limit; it gives what `Runs.begin` takes as one, and a call that lifts it.
    """
    for number in range(tries):
        size = draws.randrange(most // 20, most)
        with limited(runs.scratch / f"{kind.replace(' ', '-')}-{number}", size) as (out, own, lift):
            code = runs.end(runs.begin(out, own), kind)
            runs.found[kind, "enough room" if code == 0 else "refused"] += 1
            place = f"{size} bytes, {where(out)}"
            if code == 0:
                shutil.rmtree(out)
                continue
            lift()
            runs.finish(out, kind, place)


@contextmanager
def file_limit(place: Path, size: int) -> Iterator[tuple[Path, int | None, Callable[[], None]]]:
    """Limit the size of files."""
    yield place, size, lambda: None


@contextmanager
def small_disk(place: Path, size: int) -> Iterator[tuple[Path, int | None, Callable[[], None]]]:
    """Mount a small tmpfs."""
    place.mkdir()
    mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", place)
    try:
        yield place / "out", None, lambda: mount("-o", "remount,size=1g", place)
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def mount(*arguments: object) -> None:
    """Call `mount`."""
    subprocess.run(["mount", *map(str, arguments)], check=True, capture_output=True)


def read_only(runs: Runs, draws: random.Random, most: int) -> None:
    """Kill a run, make its disk read-only, where it must be refused and change nothing; make it writable and go on."""
    kind = "read-only"
    with small_disk(runs.scratch / "read-only", 20 * most) as (out, _, _):
        while not runs.kill(out, draws, kind) or " 0 bytes of groups" in where(out):
            shutil.rmtree(out, ignore_errors=True)
        place, partial = where(out), out.with_name("out.partial")
        before = {file: file.read_bytes() for file in partial.rglob("*") if file.is_file()}
        mount("-o", "remount,ro", out.parent)
        if runs.end(runs.begin(out), kind) == REFUSED:
            runs.found[kind, "refused"] += 1
        else:
            runs.wrong.append("read-only: the run was not refused")
        if before != {file: file.read_bytes() for file in partial.rglob("*") if file.is_file()}:
            runs.wrong.append("read-only: files have changed")
        mount("-o", "remount,rw", out.parent)
        runs.finish(out, kind, place)


def may_mount(scratch: Path) -> bool:
    """Return whether this user may mount a tmpfs."""
    try:
        with small_disk(scratch / "tried", 1 << 16):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def prepare(scratch: Path, seed: int) -> Runs:
    """Make a model and a text; compress it in this process, so that its forks have the kernels, and in a fork."""
    import torch

    from qmoe_lite.bench.soak import WORDS, make_dense
    from qmoe_lite.compression.run import compress

    torch.set_num_threads(1)
    draws = random.Random(seed)
    text = scratch / "text.txt"
    text.write_text(" ".join(f"w{draws.randrange(1, WORDS)}" for _ in range(4000)))
    runs = Runs(make_dense(scratch / "dense", **SHAPE), text, scratch)
    runs.spill.mkdir()
    compress(runs.model, scratch / "whole", calibration=text, **SETTINGS)
    runs.expected = everything_of(scratch / "whole")
    begun = time.monotonic()
    process = runs.begin(scratch / "timed")
    runs.end(process, "whole")
    runs.seconds = time.monotonic() - begun
    if everything_of(scratch / "timed") != runs.expected:
        runs.wrong.append("two runs that nothing befell differ")
    return runs


def main() -> None:
    """Print a table; exit code 1 where something went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--disks", type=int, default=10, help="that fill, and as many limits of a file's size")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ |= {"NUMBA_THREADING_LAYER": "workqueue", "NUMBA_NUM_THREADS": "1"}  # which may be forked
    draws, begun = random.Random(options.seed), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="qmoe-kill-") as place:
        runs = prepare(Path(place), options.seed)
        sizes = [file.stat().st_size for file in (runs.scratch / "whole").iterdir()]
        killed(runs, draws, options.kills)
        refused(runs, draws, options.disks, max(sizes), "file limit", file_limit)
        if mounts := may_mount(runs.scratch):
            refused(runs, draws, options.disks, 2 * sum(sizes), "small disk", small_disk)
            read_only(runs, draws, sum(sizes))
        if left := [*runs.spill.iterdir()]:
            runs.wrong.append(f"left in the folder for activations: {left[0].name}")
    print_wrapped(machine_line("torch", "transformers"))
    rows = [[kind, outcome, str(count)] for (kind, outcome), count in sorted(runs.found.items())]
    print_rows(f"a run takes {runs.seconds:.2f} s; seed {options.seed}", ("what befell it", "and then", "runs"), rows)
    print(f"{len(runs.wrong)} went wrong; {time.monotonic() - begun:.0f} s")
    if not mounts:
        print("no tmpfs can be mounted here: neither small disks nor read-only ones were tried")
    for line in runs.wrong:
        print(f"  {line}"[:300])
    sys.exit(1 if runs.wrong else 0)


if __name__ == "__main__":
    main()
