"""What `qmoe pack` saves of compressed directories, and how fast, beside `zstd -3` of the same directory as tar.

    python bench/pack.py [DIRECTORY ..] [--threads N]

Without directories it makes two: Switch-like (base-128: ternary experts of 0.8 bits, 58% of the bytes, the rest dense)
and Qwen-like (Qwen3-30B-A3B: 2.5 bits, 75% of the bytes). Dense weights are normal, their rows' scales log-normal;
digits are independent. Each is timed twice, the better counts; what comes back is compared to the byte.
"""

from __future__ import annotations

import argparse
import filecmp
import os
import shutil
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import zstandard

from qmoe_lite.bench._parts.common import machine_line
from qmoe_lite.bench._show.text import megabytes, print_rows, print_wrapped
from qmoe_lite.checkpoint.atomic import write_json, write_tensors
from qmoe_lite.checkpoint.format import pack_experts
from qmoe_lite.checkpoint.packing import Packed, pack, unpack
from qmoe_lite.coding.codebook import Codebook
from qmoe_lite.coding.codec import encode
from qmoe_lite.coding.dictionary import Dictionary
from qmoe_lite.coding.packed import PackedMatrix

BYTES = 80e6  # of a directory that is made
TRIALS = 2


def make_switch(place: Path, rng: np.random.Generator) -> None:
    """Write ternary experts of 3,072 x 768, 89% zeros, and dense tensors."""
    book, matrices = Codebook.fit([55, 890, 55]), list[PackedMatrix]()
    while sum(matrix.nbytes for matrix in matrices) < 0.58 * BYTES:
        drawn = rng.integers(0, 1000, (3072, 768), dtype=np.uint16)
        digits = (drawn < 55).astype(np.int8) - (drawn >= 945).astype(np.int8)
        levels = torch.from_numpy(rng.lognormal(-3, 0.3, (3072, 2)) * (-1, 1)).bfloat16()
        matrices.append(encode(digits, levels, book))
    _write(place, pack_experts(matrices), 0.42 * BYTES, rng)


def make_qwen(place: Path, rng: np.random.Generator) -> None:
    """Write experts of 768 x 2,048 at about 2.5 bits, and dense tensors."""
    matrices, book = list[PackedMatrix](), None
    while sum(matrix.nbytes for matrix in matrices) < 0.75 * BYTES:
        digits = np.rint(rng.standard_normal((768, 2048), dtype=np.float32) * 1.35).astype(np.int8)
        book = book or Dictionary.fit(digits)
        steps = torch.from_numpy(rng.lognormal(-4, 0.3, (768, 1))).bfloat16()
        scales = torch.from_numpy(rng.lognormal(0, 0.2, 2048)).bfloat16()
        matrices.append(encode(digits, steps, book, scales))
    _write(place, pack_experts(matrices), 0.25 * BYTES, rng)


def _write(place: Path, experts: dict[str, torch.Tensor], dense_bytes: float, rng: np.random.Generator) -> None:
    place.mkdir()
    write_tensors(place / "model-1.safetensors", {f"layer.experts.wi_{part}": t for part, t in experts.items()})
    rows = int(dense_bytes / 2 / 2048)
    weights = rng.standard_normal((rows, 2048), dtype=np.float32) * rng.lognormal(-4, 0.4, (rows, 1))
    norms = 1 + rng.standard_normal(2048) / 10
    tensors = {"dense.weight": torch.from_numpy(weights).bfloat16(), "norm.weight": torch.from_numpy(norms).bfloat16()}
    write_tensors(place / "model-2.safetensors", tensors)
    write_json(place / "config.json", {"model_type": "made by bench/pack.py"})


def zstd_tar(directory: Path, file: Path, threads: int) -> None:
    compressor = zstandard.ZstdCompressor(level=3, threads=threads if threads > 1 else 0)
    with (
        file.open("wb") as out,
        compressor.stream_writer(out) as small,
        tarfile.open(fileobj=small, mode="w|", bufsize=1 << 20) as tar,
    ):
        tar.add(directory, arcname=".")


def untar(file: Path, directory: Path) -> None:
    with (
        file.open("rb") as opened,
        zstandard.ZstdDecompressor().stream_reader(opened) as large,
        tarfile.open(fileobj=large, mode="r|", bufsize=1 << 20) as tar,
    ):
        tar.extraction_filter = getattr(tarfile, "data_filter", None)  # Python before 3.11.4 has none
        tar.extractall(directory)


def timed(work: Callable[[], object], made: Path) -> float:
    """Return the seconds of the better trial; what the other made is removed."""
    seconds = []
    for _ in range(TRIALS):
        if made.exists():
            shutil.rmtree(made) if made.is_dir() else made.unlink()
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def measure(name: str, directory: Path, scratch: Path, threads: int) -> list[list[str]]:
    """Return two rows of the table."""
    size = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
    rows, found = list[list[str]](), list[Packed]()

    def packed() -> None:
        found.append(pack(directory, scratch / "pack", threads=threads))

    ways: tuple[tuple[str, Path, Callable[[], object], Callable[[], object]], ...] = (
        (
            "tar, zstd -3",
            scratch / "zst",
            lambda: zstd_tar(directory, scratch / "zst", threads),
            lambda: untar(scratch / "zst", scratch / "back"),
        ),
        (
            "qmoe pack",
            scratch / "pack",
            packed,
            lambda: unpack(scratch / "pack", scratch / "back", threads=threads),
        ),
    )
    for way, file, forth, back in ways:
        both = timed(forth, file), timed(back, scratch / "back")
        names = [p.relative_to(directory) for p in directory.rglob("*") if p.is_file()]
        _, *others = filecmp.cmpfiles(directory, scratch / "back", names, shallow=False)
        assert others == [[], []], others
        small = file.stat().st_size
        speeds = [f"{size / 1e6 / seconds:,.0f}" for seconds in both]
        rows.append(
            [name if not rows else "", way, megabytes(size), megabytes(small), f"{1 - small / size:.1%}", *speeds]
        )
        shutil.rmtree(scratch / "back")
        file.unlink()
    floats = found[-1].float_bytes, found[-1].packed_float_bytes
    if floats[0]:
        share = f"{1 - floats[1] / floats[0]:.1%}"
        rows.append(["", "floats of it", megabytes(floats[0]), megabytes(floats[1]), share, "", ""])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", nargs="*", type=Path)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        places = {place.name: place for place in arguments.directories}
        if not places:
            for name, make in (("Switch-like", make_switch), ("Qwen-like", make_qwen)):
                places[name] = scratch / name
                make(places[name], np.random.default_rng(0))
        rows = [row for name, place in places.items() for row in measure(name, place, scratch, arguments.threads)]
    headings = ["directory", "as", "MB", "takes", "saved", "MB/s", "and back"]
    print_rows(f"One file of a directory, {arguments.threads} threads", headings, rows, text=2)
    print_wrapped(machine_line())


if __name__ == "__main__":
    main()
