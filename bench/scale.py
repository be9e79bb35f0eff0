"""What compressing takes as a model grows: memory, time by phase, bytes moved; and what large models would take.

A sharded checkpoint of random weights is made on disk, in two sizes, and compressed, each time in a fresh process and
with the activations on disk; `qmoe estimate` is asked beforehand. Then the smallest such model is compressed by 1, 4
and 16 experts at a time. Large models are projected by `qmoe estimate`, which measures this machine on their shapes,
and, as far as time goes, by how much longer than its estimate the larger checkpoint took.

    python bench/scale.py                               # 0.15 and 0.3 GB of experts in bfloat16
    python bench/scale.py --family switch --gigabytes 1
    python bench/scale.py --family qwen3-30b --gigabytes 12 --scratch DIR --no-projection

Nothing here is trained: what the models lose says nothing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from qmoe_lite.bench._parts.common import machine_line
from qmoe_lite.bench._parts.large_models import LARGE, rate_of
from qmoe_lite.bench._parts.made_checkpoint import FAMILIES, config_of, make_checkpoint, make_text
from qmoe_lite.bench._parts.phases import Compressed, compress_watched
from qmoe_lite.bench._show.text import duration, print_rows, print_text, print_wrapped

GROUPS = (1, 4, 16)  # experts; QMoE, table 1
# products, Cholesky, the solver, tuning
KERNELS = ("dense forward", "Hessian", "factor", "solve", "tuning", "experts' outputs")
T = TypeVar("T")


@dataclass(frozen=True)
class Size:
    """One checkpoint, compressed.

    Attributes
    ----------
    dense_bytes : int
        Of its weight files.
    took : Compressed
    memory_bytes, output_bytes, seconds : int, int, float
        What `qmoe estimate` said that it would take at the peak, write, and last.
    clock : str
        By which that was measured: "wall", or "processor".
    phases : dict, phase to seconds
        What it said that these are made of.
    """

    dense_bytes: int
    took: Compressed
    memory_bytes: int
    output_bytes: int
    seconds: float
    clock: str
    phases: dict[str, float]

    @property
    def longer(self) -> float:
        """How many times as long as estimated it took, by the clock of the estimate."""
        return (self.took.processor_seconds if self.clock == "processor" else self.took.seconds) / self.seconds


@dataclass(frozen=True)
class Projected:
    """What `qmoe estimate` says of a large model on this machine.

    Attributes
    ----------
    model : str
    experts, others : int
        Parameters.
    rate : float
        Stored bits of a weight in an expert.
    expert_bytes, other_bytes : int
        Of the compressed model.
    memory_bytes, spilled_bytes : int
        Memory at the peak, with the activations of all samples in the folder of --spill.
    samples : int
    seconds : float
    """

    model: str
    experts: int
    others: int
    rate: float
    expert_bytes: int
    other_bytes: int
    memory_bytes: int
    spilled_bytes: int
    samples: int
    seconds: float


def fresh(function: Callable[..., T], *args: Any, **named: Any) -> T:
    """Call a function in a process of its own, for its memory and its times."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args, **named).result()


def measure(scratch: Path, config: dict[str, Any], settings: dict[str, Any]) -> Size:
    """Make a checkpoint, ask what compressing it will take, compress it, and remove both.

    Parameters
    ----------
    scratch : Path
        Where there is room.
    config : dict
        As `config_of` makes it.
    settings : dict
        For `compress`; without the text, for `estimate` too.
    """
    from qmoe_lite.inspection.estimation import estimate

    model, out = scratch / "dense", scratch / "compressed"
    size = make_checkpoint(model, config)
    known = {name: value for name, value in settings.items() if name != "calibration"}
    expected = fresh(estimate, model, out=out, **known)
    took = fresh(compress_watched, model, out, settings)
    for made in (model, out):
        shutil.rmtree(made)
    work, clock = expected.compressing, expected.measured["clock"]
    written, seconds = sum(expected.compressed_bytes.values()), work.seconds or 0.0
    return Size(size, took, work.memory_bytes, written, seconds, clock, work.phases)


def measure_groups(scratch: Path, config: dict[str, Any], settings: dict[str, Any]) -> dict[int, Compressed]:
    """Compress a model by 1, 4 and 16 experts at a time."""
    make_checkpoint(scratch / "dense", config)
    found = {}
    for group in GROUPS:
        found[group] = fresh(
            compress_watched, scratch / "dense", scratch / f"by-{group}", {**settings, "group_size": group}
        )
        shutil.rmtree(scratch / f"by-{group}")
    shutil.rmtree(scratch / "dense")
    return found


def project(scratch: Path) -> Iterator[Projected]:
    """Yield what each large model would take here, with the samples that `compress` takes by default."""
    from qmoe_lite.inspection.estimation import estimate

    for name, config in LARGE.items():
        directory = scratch / name
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps(config))
        found = estimate(directory, rate=rate_of(config), spill=scratch)
        work = found.compressing
        yield Projected(
            name,
            found.parameters["experts"],
            found.parameters["others"],
            rate_of(config),
            found.compressed_bytes["experts"],
            found.compressed_bytes["others"],
            work.memory_bytes,
            work.activation_bytes,
            work.samples,
            work.seconds or 0.0,
        )


def show_sizes(sizes: list[Size]) -> None:
    """Print what each checkpoint took, and what was estimated; then the phases."""
    headings = ["", *(heading for _ in sizes for heading in ("measured", "estimated"))]
    rows: dict[str, list[str]] = {}

    def add(name: str, measured: str, estimated: str = "") -> None:
        rows.setdefault(name, []).extend((measured, estimated))

    for size in sizes:
        took = size.took
        add("weights in experts, millions", f"{took.weights / 1e6:,.0f}")
        add("dense files, GB", f"{size.dense_bytes / 1e9:.3f}")
        add("compressed, MB", f"{took.bytes / 1e6:,.1f}", f"{size.output_bytes / 1e6:,.1f}")
        add("bits of a weight", f"{took.bits:.3f}")
        estimated, by_processor = f"{size.seconds:,.1f}", size.clock == "processor"
        add("seconds", f"{took.seconds:,.1f}", "" if by_processor else estimated)
        add("  of all processors", f"{took.processor_seconds:,.1f}", estimated if by_processor else "")
        name = "what layers lose alone"
        add(f"  {name}", f"{took.alone_seconds:,.1f}", f"{size.phases.get(name, 0.0):,.1f}")
        add("memory at the peak, GB", f"{took.peak_bytes / 1e9:.3f}", f"{size.memory_bytes / 1e9:.3f}")
        add("  over the imports, GB", f"{(took.peak_bytes - took.import_bytes) / 1e9:.3f}")
        add("  in the phase", took.peak_phase)
        for way, moved in took.moved.items():
            add(f"{way}, GB", f"{moved / 1e9:.3f}")
    print_rows("What it took", headings, [[name, *cells] for name, cells in rows.items()], text=1)
    phases = sorted(sizes[-1].took.phases, key=lambda phase: -sizes[-1].took.phases[phase])
    print_rows(
        "Time by phase, each without those inside it",
        ("", *(heading for _ in sizes for heading in ("seconds", "share", "ns a weight"))),
        [[phase, *(cell for size in sizes for cell in _phase(size.took, phase))] for phase in phases],
        text=1,
    )
    kernels = (f"{sum(s.took.phases.get(p, 0.0) for p in KERNELS) / s.took.seconds:.0%}" for s in sizes)
    print_wrapped(f"{', '.join(KERNELS)}: {' and '.join(kernels)} of the time")
    if len(sizes) > 1:
        small, large = (size.took.peak_bytes for size in sizes)
        print_text(f"peak of the larger one against the other: {large / small:.3f}")
    print_text()


def _phase(took: Compressed, phase: str) -> tuple[str, str, str]:
    seconds = took.phases.get(phase, 0.0)
    return f"{seconds:.2f}", f"{seconds / took.seconds:.1%}", f"{1e9 * seconds / took.weights:.1f}"


def show_groups(groups: dict[int, Compressed]) -> None:
    """Print what groups of several experts gain."""
    rows, first = [], groups[GROUPS[0]]
    for group, took in groups.items():
        solving, before = (sum(each.phases[p] for p in ("factor", "solve")) for each in (took, first))
        gains = f"{before / solving:.2f}x", f"{first.seconds / took.seconds:.2f}x"
        rows.append([str(group), f"{solving:.2f}", gains[0], f"{took.seconds:.2f}", gains[1]])
    title = f"Experts per group, {first.weights / 1e6:,.0f} million weights, measured: seconds"
    print_rows(title, ("experts", "factor, solve", "", "all", ""), rows)


def show_projected(projected: list[Projected], longer: float) -> None:
    """Print what large models would take."""
    rows = [
        [
            each.model,
            f"{each.experts / 1e9:,.1f}",
            f"{each.others / 1e9:.1f}",
            f"{each.rate:g}",
            f"{(each.expert_bytes + each.other_bytes) / 1e9:,.1f}",
            f"{each.memory_bytes / 1e9:.1f}",
            f"{each.spilled_bytes / 1e9:,.0f}",
            _time(each.seconds),
            _time(longer * each.seconds),
        ]
        for each in projected
    ]
    headings = ("10^9", "experts", "others", "bits", "bytes", "memory", "spilled", "time", f"x {longer:.2f}")
    title = "Projected for this machine by `qmoe estimate`; unit costs alone are measured"
    print_rows(title, headings, rows, text=1, tight=True)
    print_text("bytes = experts x bits / 8 + others x 2; default samples of 512 tokens,")
    print_text("activations on disk. Last column: the same, if all takes as much longer than")
    print_text(f"estimated as the larger checkpoint above, {longer:.2f} times.")


def _time(seconds: float) -> str:
    return f"{seconds / 86400:.1f} days" if seconds > 2 * 86400 else duration(seconds)


def main() -> None:
    """Print tables, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=[*FAMILIES], default="qwen3")
    parser.add_argument("--gigabytes", type=float, default=0.3, help="of experts in bfloat16; half of it is run too")
    parser.add_argument("--rate", type=float, default=2.0)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--scratch", type=Path, help="folder with room for the larger one; by default a temporary one")
    parser.add_argument("--no-half", action="store_true", help="leave out the smaller one")
    parser.add_argument("--no-groups", action="store_true", help="leave out 1, 4 and 16 experts at a time")
    parser.add_argument("--no-projection", action="store_true", help="leave out the large models")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="qmoe-scale-", dir=options.scratch) as place:
        scratch = Path(place)
        (scratch / "spill").mkdir()
        settings = {
            "calibration": make_text(scratch / "text.txt", 2 * (options.samples + 8) * options.sequence_length),
            "samples": options.samples,
            "sequence_length": options.sequence_length,
            "validation_samples": 4,
            "rate": options.rate,
            "spill": scratch / "spill",
        }
        configs = [config_of(options.family, share * options.gigabytes) for share in (0.5, 1.0)]
        if options.no_half or configs[0] == configs[1]:
            configs = configs[1:]
        sizes = [measure(scratch, config, settings) for config in configs]
        groups = {} if options.no_groups else measure_groups(scratch, config_of(options.family, 0.0), settings)
        projected = [] if options.no_projection else list(project(scratch))
    machine = machine_line("torch", "transformers", "numba")
    if options.json:
        parts: dict[str, Sequence[Any]] = {"sizes": sizes, "projected": projected}
        found: dict[str, Any] = {name: [asdict(each) for each in part] for name, part in parts.items()}
        found |= {"machine": machine, "groups": {group: asdict(took) for group, took in groups.items()}}
        print(json.dumps(found, indent=2))
        return
    print_wrapped(machine)
    windows = f"{options.samples} samples of {options.sequence_length} tokens"
    print(f"{options.family}, {windows}, rate {options.rate:g}, activations on disk\n")
    show_sizes(sizes)
    if groups:
        show_groups(groups)
    if projected:
        show_projected(projected, sizes[-1].longer)


if __name__ == "__main__":
    main()
