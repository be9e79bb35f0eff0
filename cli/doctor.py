"""`qmoe doctor`: which of qmoe-lite's requirements are met, and what to do about the rest.

Each check stands alone, and findings are printed as they are made: whatever is broken, the lines before it are there.
"""

from __future__ import annotations

import importlib
import os
import platform
import textwrap
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from qmoe_lite.bench._show.text import print_text
from qmoe_lite.cli._options import JsonOption
from qmoe_lite.errors import first_line

if TYPE_CHECKING:
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

NEEDED_FOR = {  # what an optional package is for
    "datasets": "Calibration texts are read from files; data sets of the Hugging Face hub are not.",
    "matplotlib": "qmoe inspect cannot draw its --plot.",
    "numba-cuda": "The CPU path is used: GPU kernels are compiled with it.",
    "uvicorn": "qmoe serve does not run.",
}
CPU_PATH = "The CPU path is used."
CUDA = 13  # version that the kernels are compiled for
_INDENT = 26  # columns before what was found


@dataclass(frozen=True)
class CheckResult:
    """One row: what was looked at, what was found, and where that is not enough, what follows and what to run.

    `status` is ok, missing, too old, too new or broken. Only a `required` row makes the command fail.
    """

    name: str
    found: str
    status: str = "ok"
    required: bool = False
    follows: str = ""
    run: str = ""


def doctor(json: JsonOption = False) -> None:
    """Check what qmoe-lite needs; report what is missing, what that means, and what to run.

    Exit code 1 where something required is missing; a GPU is not.

    Example: qmoe doctor
    """
    from qmoe_lite.cli import _output

    findings = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such as torch's on an old driver, which is a finding of ours
        for finding in examine():
            findings.append(finding)
            if not json:
                for line in in_words(finding):
                    print_text(line)
    wrong = [finding.name for finding in findings if finding.required and finding.status != "ok"]
    if json:
        _output.print_json({"ok": not wrong, "findings": [asdict(finding) for finding in findings]})
    elif wrong:
        print_text(f"\nqmoe-lite does not work yet: see {', '.join(wrong)}.")
    else:
        print_text("\nEverything that qmoe-lite needs is installed.")
    if wrong:
        raise typer.Exit(1)


def in_words(finding: CheckResult) -> Iterator[str]:
    """Format a result in lines of 80 columns."""
    wrap = textwrap.TextWrapper(80 - _INDENT, break_on_hyphens=False)
    first, *rest = wrap.wrap(finding.found) or [""]
    yield f"{finding.status:<8}{finding.name:<{_INDENT - 8}}{first}"
    for line in [*rest, *wrap.wrap(finding.follows)]:
        yield " " * _INDENT + line
    if finding.run:
        yield " " * _INDENT + f"Run: {finding.run}"  # whole, so that it can be copied


def examine() -> Iterator[CheckResult]:
    """Look at everything, the machine first."""
    checks: tuple[tuple[str, Callable[[], Iterator[CheckResult]], bool, str], ...] = (
        ("system", _system, True, ""),
        ("processor", _processor, False, ""),
        ("memory", _memory, False, ""),
        ("packages", _packages, True, ""),
        ("threads", _threads, False, ""),
        ("numba cache", _cache, True, "The kernels cannot be imported."),
        ("CUDA compiler", _compiler, False, CPU_PATH),
        ("NVIDIA driver", _driver, False, CPU_PATH),
    )
    for name, check, required, follows in checks:
        try:
            yield from check()
        except Exception as error:  # a broken installation can raise anything anywhere
            yield CheckResult(name, _words(error), "broken", required, follows)


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def _system() -> Iterator[CheckResult]:
    from qmoe_lite import __version__

    yield CheckResult("qmoe-lite", f"{__version__} in {Path(__file__).parents[1]}")
    linux = platform.system() == "Linux"
    follows = "" if linux else "qmoe-lite is made and tested for Linux only."
    system = f"{platform.system()} {platform.release()}, {platform.machine()}"
    yield CheckResult("system", system, "ok" if linux else "missing", True, follows)


def _processor() -> Iterator[CheckResult]:
    from qmoe_lite.bench._parts.common import processor

    usable, cores = len(os.sched_getaffinity(0)), os.cpu_count()
    yield CheckResult("processor", f"{processor()}, {usable} of {cores} cores may be used")
    known = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")
    flags = set(_fields(Path("/proc/cpuinfo"), ("flags", "Features")).split())
    found = [flag for flag in known if flag in flags]
    if not {"avx2", "asimd"} & set(found):
        text = "Everything works, but slower than with AVX2 or NEON."
        yield CheckResult("SIMD", " ".join(found) or "neither AVX2 nor NEON", "too old", follows=text)
        return
    slow = "bfloat16 layers are computed in software. Load models with dtype=torch.float32 where the memory allows it."
    yield CheckResult("SIMD", " ".join(found), follows="" if any("bf16" in flag for flag in found) else slow)


def _fields(file: Path, names: tuple[str, ...]) -> str:
    """Return the first value of one of `names` in a file of /proc."""
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in names:
            return value.strip()
    return ""


def _memory() -> Iterator[CheckResult]:
    total, free = (
        int(_fields(Path("/proc/meminfo"), (name,)).split()[0]) << 10 for name in ("MemTotal", "MemAvailable")
    )
    limit = Path("/sys/fs/cgroup/memory.max")  # a container's
    text = f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free"
    if limit.is_file() and (most := limit.read_text().strip()).isdigit() and int(most) < total:
        text += f", this container may take {int(most) / 1e9:.1f} GB"
    yield CheckResult("memory", text)


def _packages() -> Iterator[CheckResult]:
    """Compare what is installed with what the installed qmoe-lite asks for."""
    from importlib.metadata import PackageNotFoundError, metadata

    try:
        ours = metadata("qmoe-lite")
    except PackageNotFoundError:
        text = "Which packages and versions it needs is not known."
        run = "pip install -e .   # in the checkout"
        yield CheckResult("packages", "qmoe-lite itself is not installed", "missing", True, text, run)
        return
    try:
        from packaging.requirements import Requirement
        from packaging.specifiers import SpecifierSet
    except ImportError as error:
        follows = "Versions cannot be compared, and transformers cannot be imported."
        yield CheckResult("packaging", first_line(error), "missing", True, follows, "pip install packaging")
        return
    status = _status(platform.python_version(), SpecifierSet(ours["Requires-Python"] or ""))
    text = (
        "" if status == "ok" else f"Python {ours['Requires-Python']} is needed: create a virtual environment with it."
    )
    yield CheckResult("Python", platform.python_version(), status, True, text)
    extras = [extra for extra in ours.get_all("Provides-Extra") or [] if extra != "dev"]
    needed: set[str] = set()
    for wanted in map(Requirement, ours.get_all("Requires-Dist") or []):
        if wanted.marker is None or wanted.marker.evaluate({"extra": ""}):
            needed.add(wanted.name)
            yield _package(wanted, None)
            continue
        for extra in extras:
            if wanted.marker.evaluate({"extra": extra}):
                yield _package(wanted, extra, extra if wanted.name in needed else wanted.name)


def _package(wanted: Requirement, extra: str | None, name: str = "") -> CheckResult:
    from importlib.metadata import PackageNotFoundError, version

    required = extra is None
    name = name or wanted.name
    run = f"pip install '{name}{wanted.specifier}'" if extra is None else f"pip install 'qmoe-lite[{extra}]'"
    follows = NEEDED_FOR.get(name, "" if extra is None else f"qmoe-lite[{extra}] is not whole.")
    module_name = wanted.name.replace("-", "_")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name == module_name:
            return CheckResult(name, "not installed", "missing", required, follows, run)
        return CheckResult(name, _words(error), "broken", required, follows, f"{run} --force-reinstall")
    except (Exception, SystemExit) as error:
        return CheckResult(name, _words(error), "broken", required, follows, f"{run} --force-reinstall")
    if lacking := _lacking(wanted):
        return CheckResult(name, f"{lacking} is not installed", "missing", required, follows, run)
    try:
        found = version(wanted.name)
    except PackageNotFoundError:
        found = str(getattr(module, "__version__", ""))
    status = _status(found, wanted.specifier)
    if name == "torch":
        built = module.version.cuda
        found += ", built for the CPU" if built is None else f", built for CUDA {built}"
    if status == "ok":
        return CheckResult(name, found, required=required)
    return CheckResult(name, found, status, required, f"{wanted.specifier} is needed. {follows}".strip(), run)


def _lacking(wanted: Requirement) -> str | None:
    """Return the first package that a requirement's own extras ask for and that is not installed."""
    from importlib.metadata import PackageNotFoundError, requires, version

    from packaging.requirements import Requirement

    try:
        declared = list(map(Requirement, requires(wanted.name) or [])) if wanted.extras else []
    except PackageNotFoundError:
        return None
    for each in declared:
        marker = each.marker
        if marker and not marker.evaluate({"extra": ""}) and any(marker.evaluate({"extra": e}) for e in wanted.extras):
            try:
                version(each.name)
            except PackageNotFoundError:
                return each.name
    return None


def _status(found: str, wanted: SpecifierSet) -> str:
    """Report whether a version is ok, too old or too new; an unknown one passes."""
    if not found or wanted.contains(found, prereleases=True):
        return "ok"
    floors = [one for one in wanted if one.operator in (">=", ">", "~=")]
    return "too old" if any(not one.contains(found, prereleases=True) for one in floors) else "too new"


def _threads() -> Iterator[CheckResult]:
    import numba
    import torch

    yield CheckResult("threads", f"torch {torch.get_num_threads()}, numba {numba.get_num_threads()}")


def _cache() -> Iterator[CheckResult]:
    """Ask numba where it keeps a compiled function; it has tried to write there."""
    run = "export NUMBA_CACHE_DIR=DIRECTORY   # one that you may write to"
    try:
        from qmoe_lite.coding import counting
    except RuntimeError as error:
        yield CheckResult("numba cache", first_line(error), "missing", True, "The kernels cannot be imported.", run)
        return
    path = counting._count_codewords_kernel.stats.cache_path
    asked = os.environ.get("NUMBA_CACHE_DIR")
    if asked and not path.startswith(asked):
        follows = f"NUMBA_CACHE_DIR is {asked}, where nothing can be written."
        yield CheckResult("numba cache", path, "broken", False, follows, run)
    else:
        yield CheckResult("numba cache", path)


def _driver() -> Iterator[CheckResult]:
    from qmoe_lite.cli._driver import find_driver

    driver = find_driver()
    if driver is None:
        yield CheckResult("NVIDIA driver", "libcuda.so.1 was not found", "missing", follows=CPU_PATH)
        return
    text = f"{driver.version}, for CUDA up to {'.'.join(map(str, driver.cuda))}"
    if driver.cuda[0] < CUDA:
        follows = f"{CPU_PATH} The GPU kernels need a driver for CUDA {CUDA}: 580 or later."
        yield CheckResult("NVIDIA driver", text, "too old", follows=follows)
    else:
        yield CheckResult("NVIDIA driver", text)
    if not driver.gpus:
        yield CheckResult("GPU", "the driver shows none", "missing", follows=CPU_PATH)
        return
    for index, (name, capability) in enumerate(driver.gpus):
        status, why = _kernels(index, capability)
        text = f"{name}, compute capability {'.'.join(map(str, capability))}"
        yield CheckResult(f"GPU {index}", text, status, follows=why and f"{CPU_PATH} {why}")


def _kernels(index: int, capability: tuple[int, int]) -> tuple[str, str]:
    """Report whether the GPU kernels can run on a GPU, as a status, and why not."""
    try:
        from qmoe_lite.cuda import launch

        why = launch.reason(index)
    except Exception as error:  # the GPU is there, whatever fails in torch or numba-cuda
        return "broken", _words(error)
    if why is None:
        return "ok", ""
    return "too old" if capability < launch._OLDEST else "missing", why


def _compiler() -> Iterator[CheckResult]:
    from qmoe_lite.cuda import launch

    if launch.cuda is None:
        return  # numba-cuda has said so
    missing = launch._missing_library()
    if missing is None:
        yield CheckResult("CUDA compiler", "libnvvm, libnvrtc and libnvJitLink were found")
    else:
        run = "pip install 'qmoe-lite[cuda]'"
        yield CheckResult("CUDA compiler", f"lib{missing} was not found", "missing", False, CPU_PATH, run)
