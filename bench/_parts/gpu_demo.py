"""Part "demo" of `bench/gpu.py`: the whole job on the model in the package, `qmoe demo --device cuda`."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator

from qmoe_lite.bench._parts import gpu as parts
from qmoe_lite.bench._show.text import print_text
from qmoe_lite.errors import QMoEError

_MODELS = ("dense", "rtn", "qmoe")


def measure_demo(quick: bool, end: float) -> Iterator[parts.Row]:
    """Seconds and losses of the demo; a row that notes it where the command has no such option."""
    if "--device" not in _output("--help", end=end):
        yield {"note": "qmoe demo has no option --device: not run."}
        return
    found = json.loads(_output("--device", "cuda", "--json", end=end))
    losses = {f"{name}_loss": found[name]["loss"] for name in _MODELS}
    yield {"seconds": found["seconds"], "recovered": found["recovered"]} | losses


def _output(*arguments: str, end: float) -> str:
    """Run `qmoe demo` and return what it prints; raise QMoEError with its last words where it fails."""
    left = max(1.0, end - time.monotonic())
    try:
        ran = subprocess.run(_command(*arguments), text=True, capture_output=True, timeout=min(left, 1e6), check=False)
    except subprocess.TimeoutExpired as error:
        raise QMoEError(f"qmoe demo did not end within {left:.0f} s") from error
    if ran.returncode != 0:
        raise QMoEError(f"qmoe demo: {(ran.stderr.strip() or 'no message').splitlines()[-1]}")
    return ran.stdout


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "qmoe_lite", "demo", *arguments]


def show_demo(rows: list[parts.Row]) -> None:
    """Print the demo's time and losses."""
    for row in rows:
        if "note" in row:
            print_text(f"{row['note']}\n")
            continue
        losses = ", ".join(f"{name} {row[f'{name}_loss']:.4f}" for name in _MODELS)
        print_text(f"qmoe demo --device cuda: {row['seconds']:.1f} s; losses: {losses};")
        print_text(f"QMoE recovers {row['recovered']:.0%} of what rounding to nearest (rtn) loses.\n")


PART = parts.Part(measure_demo, show_demo, 35)
