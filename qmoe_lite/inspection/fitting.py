"""Whether what a compression needs is there, memory and room on the disk: what is certain, and what is likely."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from qmoe_lite.compression.settings import Settings
from qmoe_lite.compression.telling import resident_bytes
from qmoe_lite.inspection.anatomy import Anatomy
from qmoe_lite.inspection.memory_model import Need, folder_of, need_of, rows_of
from qmoe_lite.offload.sizes import show_size
from qmoe_lite.quantization.grid import Grid

_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Room:
    """What is there.

    Attributes
    ----------
    memory : int
        Bytes that a program could take now, swap among them.
    disk : int
        Bytes free where OUT is to be, with those of its unfinished work.
    spill : int or None
        Bytes free in the folder for activations; None where they are to be in memory.
    """

    memory: int
    disk: int
    spill: int | None = None


def anonymous_bytes() -> int:
    """Bytes of memory of this process that belong to no file."""
    return resident_bytes() or 0


def room_for(out: Path | None, spill: Path | None = None) -> Room:
    """Look at how much memory and disk there is.

    Parameters
    ----------
    out : Path or None
        The directory to be made; None for the current one.
    spill : Path, optional
        Folder for activations.
    """
    info = Path("/proc/meminfo")
    memory = _field(info, "MemAvailable") + _field(info, "SwapFree")
    with suppress(OSError, ValueError):  # a container's limit, where there is one
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
        given = _stat(_CGROUP / "memory.stat", "inactive_file") + _stat(_CGROUP / "memory.stat", "active_file")
        memory = min(memory, limit - used + given)
    folder = folder_of(Path() if out is None else out.parent)
    disk = shutil.disk_usage(folder).free
    if out is not None and (partial := out.with_name(f"{out.name}.partial")).is_dir():
        disk += sum(file.stat().st_size for file in partial.iterdir() if file.is_file())
    return Room(memory, disk, None if spill is None else shutil.disk_usage(spill).free)


def _field(file: Path, name: str) -> int:
    """Bytes that a line of a file in /proc says; 0 where there is none."""
    with suppress(OSError, ValueError, IndexError):
        for line in file.read_text(encoding="utf-8").splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) << 10
    return 0


def _stat(file: Path, name: str) -> int:
    return next(int(line.split()[1]) for line in file.read_text().splitlines() if line.split()[0] == name)


def obstacles(need: Need, program: int, room: Room, anatomy: Anatomy, settings: Settings, grid: Grid) -> Iterator[str]:
    """Yield what makes a compression impossible, each with what would make it fit.

    Parameters
    ----------
    need : Need
        Of the compression.
    program : int
        Bytes that this program takes already.
    room : Room
        What is there.
    anatomy, settings, grid
        Of which `need` is.
    """
    if room.memory and need.certain > room.memory:
        text = f"at least {show_size(need.certain)} of memory are needed, {show_size(room.memory)} are there"
        yield f"{text}. {_smaller(anatomy, settings, grid, room.memory, room.spill is not None)}"
    if need.certain_disk > room.disk:
        text = f"at least {show_size(need.certain_disk)} are needed on the disk of OUT, {show_size(room.disk)} are free"
        yield f"{text}. Give OUT on another disk{', or a lower --rate' if settings.rate is not None else ''}."


def doubts(need: Need, program: int, room: Room, anatomy: Anatomy, settings: Settings, grid: Grid) -> Iterator[str]:
    """Yield what may make it impossible, as `obstacles` does; nothing of what that yields."""
    if room.memory and need.certain <= room.memory < need.memory + program:
        text = f"about {show_size(need.memory + program)} of memory will be taken, {show_size(room.memory)} are there"
        yield f"{text}. {_smaller(anatomy, settings, grid, room.memory - program, room.spill is not None, False)}"
    if need.certain_disk <= room.disk < need.disk:
        yield f"about {show_size(need.disk)} will be taken on the disk of OUT, {show_size(room.disk)} are free."
    if room.spill is not None and need.activations > room.spill:
        text = (
            f"about {show_size(need.activations)} of activations go to the folder of --spill, {show_size(room.spill)}"
        )
        yield f"{text} are free. Name one on another disk."


def _smaller(anatomy: Anatomy, settings: Settings, grid: Grid, memory: int, spilled: bool, certain: bool = True) -> str:
    """Say which options make a compression fit into so many bytes."""
    if settings.recipe == "nearest":
        return "Use a machine with more memory."

    def takes(spilled: bool = spilled, **changes: object) -> int:
        changed = replace(settings, **changes)  # type: ignore[arg-type]
        need = need_of(anatomy, changed, grid, settings.rate or 1.0, spilled)
        return need.certain if certain else need.memory

    found = []
    if not spilled and takes(spilled=True) <= memory:
        found.append("--spill DIR")
    if settings.activations == "float32" and takes(activations="bfloat16") <= memory:
        found.append("--activations bfloat16")
    if not certain and takes(batch_size=1) <= memory:
        found.append("--batch-size 1")
    samples = rows_of(anatomy, settings).samples
    low, high = 0, samples
    while high - low > max(1, low // 50):
        middle = (low + high) // 2
        low, high = (middle, high) if takes(samples=middle) <= memory else (low, middle)
    if low:
        found.append(f"--samples {low}")
    if not found and takes(samples=1, activations="bfloat16", group_size=1) <= memory:
        found.append("--samples 1 --activations bfloat16, with group_size=1 in Python")
    return f"It would fit with {' or '.join(found)}." if found else "Use a machine with more memory."
