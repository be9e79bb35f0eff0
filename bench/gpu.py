"""`python bench/gpu.py`: test the CUDA kernels on this machine's GPU, then time them against their peers.

Each part runs in a process of its own, so that a fault or a hang of one costs no other, and all of them within a time
budget. Results are written after each part: as JSON, and as the tables that were printed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from importlib.metadata import PackageNotFoundError, version
from io import StringIO
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # instead of this folder, whose names are those of other packages
    if Path("/usr/local/cuda/nvvm").is_dir() and "CUDA_PATH" not in os.environ:
        os.environ.setdefault("CUDA_HOME", "/usr/local/cuda")  # where the compiler's libraries are looked for

import torch  # noqa: E402

from qmoe_lite.bench._parts import gpu as parts  # noqa: E402
from qmoe_lite.bench._parts import gpu_choice, gpu_demo, gpu_layer, gpu_offload, gpu_paper, gpu_rates  # noqa: E402
from qmoe_lite.bench._parts.common import machine_line  # noqa: E402
from qmoe_lite.bench._parts.gpu import Row, one_line  # noqa: E402
from qmoe_lite.bench._show.text import print_text, print_wrapped  # noqa: E402
from qmoe_lite.cuda import launch  # noqa: E402

BUDGET = 475.0  # seconds for all of it: the tests' and the parts', each of which may take what those before it left
TEST_SECONDS = 150.0
_TESTERS = 12  # processes that the tests are shared among, at most: most of their time a kernel is compiled
_LEAST = 15.0  # seconds that a part is begun with
_PACKAGES = ("torch", "numba", "numba-cuda", "cuda-core")
_KNOWN = parts.PARTS | {
    "layer": gpu_layer.PART,
    "offload": gpu_offload.PART,
    "paper": gpu_paper.PART,
    "choice": gpu_choice.PART,
    "rates": gpu_rates.PART,
    "demo": gpu_demo.PART,
}
_ORDER = ("matmul", "rates", "layer", "offload", "solver", "launch", "paper", "coder", "choice", "demo")
PARTS = {name: _KNOWN[name] for name in _ORDER}


def main(arguments: list[str] | None = None) -> int:
    """Run the script; return its exit code: 0, or 1 where something failed."""
    parser = argparse.ArgumentParser(description="Test the CUDA kernels on this GPU, then time them.")
    parser.add_argument("--quick", action="store_true", help="two shapes, three counts of tokens, four experts")
    parser.add_argument("--out", type=Path, help="FILE.json and FILE.txt [default: bench/results/<GPU's name>]")
    parser.add_argument("--debug", action="store_true", help="show the output and the traceback of what fails")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--share", type=int, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=BUDGET, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if not launch.available():
        sys.stderr.write(f"bench/gpu.py: {launch.reason()}\n")
        return 1
    if given.share:
        return run_tests(*given.share)
    if given.part:
        return measure_part(given.part, given.quick, given.seconds)
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(0).lower()).strip("-")
    out = given.out or ROOT / "bench" / "results" / name
    if out.suffix in (".json", ".txt"):
        out = out.with_suffix("")
    return run(given.quick, out.absolute(), given.debug, given.seconds)


def run(quick: bool, out: Path, debug: bool, seconds: float) -> int:
    """Test, measure, print, and write OUT.json and OUT.txt anew after each part; return the exit code."""
    begun = time.monotonic()
    report: Row = {"gpu": torch.cuda.get_device_name(0), "machine": _machine(), "quick": quick}
    report |= {"tests": {}, "parts": {}, "skipped": [], "failed": {}}
    out.parent.mkdir(parents=True, exist_ok=True)
    shown = _Tee(sys.stdout)
    with redirect_stdout(shown):
        print_wrapped(f"{report['gpu']}; {report['machine']}")
        print_text()
        own = {"tests": TEST_SECONDS} | {name: part.seconds for name, part in PARTS.items()}
        for number, name in enumerate(own):
            left = begun + seconds - time.monotonic()
            if left < _LEAST:
                report["skipped"].append(name)
                continue
            limit = max(min(left, own[name]), left - sum(list(own.values())[number + 1 :]))
            try:
                if name == "tests":
                    _test(report, limit, debug)
                else:
                    _measure(report, name, quick, limit, debug)
            except Exception as error:  # the other parts are worth having
                _fail(report, name, one_line(error), traceback.format_exc(), debug)
            _write(report, out, shown.getvalue())
        if report["skipped"]:
            print_text(f"Skipped for want of time: {'; '.join(report['skipped'])}.")
        if report["failed"]:
            print_text(f"Failed: {', '.join(report['failed'])}.")
        print_text(f"{time.monotonic() - begun:.0f} seconds in all; written to {out}.json and .txt.")
    _write(report, out, shown.getvalue())
    return 1 if report["failed"] else 0


def measure_part(name: str, quick: bool, seconds: float) -> int:
    """Measure one part in this process, a row of JSON a line on standard output; the last one may be an error."""

    def put(row: Row) -> None:
        sys.stdout.write(json.dumps(row) + "\n")
        sys.stdout.flush()

    try:
        with torch.no_grad():
            for row in PARTS[name].measure(quick, time.monotonic() + seconds):
                put(row)
    except Exception as error:
        traceback.print_exc()
        put({"failed": one_line(error)})
        return 1
    return 0


def run_tests(number: int, shares: int) -> int:
    """Run one of so many shares of tests/gpu in this process; return pytest's exit code."""
    import pytest

    class Share:
        def pytest_collection_modifyitems(self, items: list[Any]) -> None:
            items[:] = share_of(items, number, shares)

        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.failed:  # at once: a share that is ended at its limit prints no summary
                print_text(f"FAILED {report.nodeid}\n{report.longreprtext}\n")

    # pyproject.toml's own options are for the whole suite and ask for pytest-xdist, which need not be here
    own = ["-o", "addopts=", "-p", "no:xdist", "--import-mode=importlib"]
    files = sorted((str(path) for path in ROOT.glob("tests/gpu/test_*.py")), reverse=True)  # the large file last
    options = [*own, "-q", "-p", "no:cacheprovider", "-W", "default", "--noconftest", "--tb=short", "-rN"]
    return int(pytest.main([*options, *files], plugins=[Share()]))


def share_of(items: list[Any], number: int, shares: int) -> list[Any]:
    """Return a share of each test function's cases: neighbours, which need the same kernels."""
    cases: dict[Any, list[Any]] = {}
    for item in items:
        cases.setdefault(item.function, []).append(item)
    found = []
    for turn, some in enumerate(cases.values()):
        place = (number + turn) % shares  # so that functions of one case are spread
        found += some[place * len(some) // shares : (place + 1) * len(some) // shares]
    return found


def _test(report: Row, seconds: float, debug: bool) -> None:
    """Run tests/gpu and note how they went."""
    shares = max(1, min(_TESTERS, (os.cpu_count() or 1) - 2))
    with ThreadPoolExecutor(shares) as pool:
        ran = list(pool.map(lambda number: _in_process(_tests_command(number, shares), seconds), range(shares)))
    lines = [line for _, out, _ in ran for line in out.splitlines()]
    counts: dict[str, int] = {}
    for _, out, err in ran:
        found = re.findall(r"(\d+) ([a-z]+)", _last_line(out).partition(" in ")[0])
        for number, outcome in found or [("1", "share ended without a result: " + _last_line(err))]:
            counts[outcome] = counts.get(outcome, 0) + int(number)
    summary = ", ".join(f"{number} {outcome}" for outcome, number in sorted(counts.items()))
    report["tests"] = {"summary": summary, "failed": [line for line in lines if line.startswith(("FAILED", "ERROR"))]}
    details = "".join(out + err for _, out, err in ran)
    if any(code is None for code, _, _ in ran):
        _fail(report, "tests", f"did not end within {seconds:.0f} s", details, debug)
    elif any(code for code, _, _ in ran) or not counts.get("passed"):
        _fail(report, "tests", summary, details, debug)
    else:
        print_text(f"tests/gpu: {summary}\n")
    for line in report["tests"]["failed"][:20]:
        print_text(line[:200])


def _measure(report: Row, name: str, quick: bool, seconds: float, debug: bool) -> None:
    """Run one part and keep its rows, also those that came before an error."""
    code, out, err = _in_process(_part_command(name, quick, seconds - 5), seconds)
    found = [json.loads(line) for line in out.splitlines() if line.startswith("{") and line.endswith("}")]
    report["skipped"] += [f"{name}: {row['skipped']}" for row in found if "skipped" in row]
    report["parts"][name] = rows = [row for row in found if not {"skipped", "failed"} & set(row)]
    failed = [row["failed"] for row in found if "failed" in row]
    if code is None:
        failed = [f"did not end within {seconds:.0f} s"]
    elif code != 0 and not failed:
        failed = [_last_line(err) or f"ended with exit code {code}"]
    if failed:
        _fail(report, name, failed[0], err, debug)
    if rows:
        PARTS[name].show(rows)


def _fail(report: Row, name: str, what: str, details: str, debug: bool) -> None:
    report["failed"][name] = what
    print_text(f"{name} failed: {what}\n")
    if debug:
        sys.stderr.write(details)


def _part_command(name: str, quick: bool, seconds: float) -> list[str]:
    call = [sys.executable, str(Path(__file__).resolve()), "--part", name, "--seconds", f"{seconds:.0f}"]
    return [*call, "--quick"] if quick else call


def _tests_command(number: int, shares: int) -> list[str]:
    return [sys.executable, str(Path(__file__).resolve()), "--share", str(number), str(shares)]


def _in_process(command: list[str], seconds: float) -> tuple[int | None, str, str]:
    """Run a command in the repository; return its exit code, None where it was ended at its limit, and its output."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        return None, out, err
    return process.returncode, out, err


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _machine() -> str:
    known = []
    for name in _PACKAGES:
        try:
            version(name)
            known.append(name)
        except PackageNotFoundError:
            continue
    return f"{machine_line(*known)}, CUDA {torch.version.cuda}"


def _write(report: Row, out: Path, text: str) -> None:
    Path(f"{out}.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    Path(f"{out}.txt").write_text(text, encoding="utf-8")


class _Tee(StringIO):
    """Keeps a copy of what it writes through to a stream."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(text)
        self._stream.flush()
        return super().write(text)


if __name__ == "__main__":
    sys.exit(main())
