"""Compiled kernels on disk: each is found again by all that its machine code follows from.

An entry is one file, written elsewhere and renamed, so that it is whole or absent; it begins with the hash of its
contents, and one that does not fit its hash is taken for absent.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np

_FORMAT = b"qmoe-lite cubin 1\n"
_HASH_BYTES = 32
_COMPILER = ("numba", "numba-cuda", "llvmlite", "cuda-core", "nvidia-nvvm", "nvidia-nvjitlink")
_PLAIN = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis), np.generic)
_OURS = __name__.partition(".")[0]


class _NotKnownError(Exception):
    """Something that a kernel refers to cannot be told from a changed one."""


def directory() -> Path | None:
    """Return where entries lie: in NUMBA_CACHE_DIR, or the user's cache directory; None where there is neither."""
    cache = os.environ.get("NUMBA_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "qmoe-lite" / "cuda" if os.path.isabs(cache) else None


def cubin_key(py_func: Callable[..., None], *settings: Any) -> str | None:
    """Return the name of a kernel's entry, None where what it is made of cannot be followed.

    Parameters
    ----------
    py_func : function
        The kernel. Its code, constants, closure and the globals that it names count, and so do those of its helpers.
    *settings : numbers, strings and tuples of them
        What else it is compiled for: signature, architecture.
    """
    digest = hashlib.sha256(_FORMAT)
    try:
        for part in _parts((py_func, settings, _compiler()), set()):
            digest.update(len(part).to_bytes(8, "little") + part)
    except _NotKnownError:
        return None
    return digest.hexdigest()


def load_cubin(name: str) -> tuple[str, bytes] | None:
    """Return a kernel's entry point and machine code; None where there is no whole entry of that name."""
    folder = directory()
    if folder is None:
        return None
    try:
        whole = (folder / name).read_bytes()
    except OSError:
        return None
    found, content = whole[:_HASH_BYTES], whole[_HASH_BYTES:]
    if hashlib.sha256(_FORMAT + content).digest() != found:
        return None
    entry, _, code = content.partition(b"\0")
    return entry.decode(), code


def store_cubin(name: str, entry: str, code: bytes) -> None:
    """Keep a kernel's entry point and machine code, where the directory may be written to."""
    folder = directory()
    if folder is None:
        return
    content = entry.encode() + b"\0" + code
    with contextlib.suppress(OSError):  # what cannot be kept is compiled again
        folder.mkdir(parents=True, exist_ok=True)
        number, written = tempfile.mkstemp(dir=folder, prefix=".")
        try:
            with os.fdopen(number, "wb") as file:
                file.write(hashlib.sha256(_FORMAT + content).digest() + content)
            os.replace(written, folder / name)
        except BaseException:
            os.unlink(written)
            raise


@functools.cache
def _compiler() -> tuple[str, ...]:
    """Versions of all that has a part in the machine code: packages, and the libraries, which may be a toolkit's."""
    found = []
    for name in _COMPILER:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(name)
    for name in ("nvvm", "nvjitlink"):
        library = importlib.import_module(f"cuda.bindings.{name}")
        found.append(f"lib{name} {library.version()}")
    return tuple(found)


def _parts(value: Any, seen: set[int]) -> Iterator[bytes]:
    """Return what tells a value from another one, bit by bit."""
    if isinstance(value, _PLAIN):
        yield f"{type(value).__qualname__} {value!r}".encode()
    elif isinstance(value, tuple | list | frozenset):
        ordered = sorted(value, key=repr) if isinstance(value, frozenset) else value
        yield f"{type(value).__qualname__} {len(value)}".encode()
        for each in ordered:
            yield from _parts(each, seen)
    elif isinstance(value, np.ndarray):
        yield f"array {value.dtype} {value.shape}".encode()
        yield value.tobytes()
    elif isinstance(value, ModuleType):
        yield f"module {value.__name__}".encode()
    elif isinstance(value, type | BuiltinFunctionType | np.ufunc):
        yield f"name {getattr(value, '__module__', '')}.{getattr(value, '__qualname__', value.__name__)}".encode()
    elif id(value) in seen:
        yield b"again"
    else:
        seen.add(id(value))
        yield from _compound_parts(value, seen)


def _compound_parts(value: Any, seen: set[int]) -> Iterator[bytes]:
    """Do the same for what holds other values: functions, however they are wrapped, their code, data classes."""
    if isinstance(value, FunctionType):
        yield b"function"
        closure = tuple(cell.cell_contents for cell in value.__closure__ or ())
        yield from _parts((value.__code__, value.__defaults__, closure), seen)
        for name in _names(value.__code__):
            if name in value.__globals__:
                found = value.__globals__[name]
                yield name.encode()
                yield from _parts(found, seen)
                if isinstance(found, ModuleType) and found.__name__.partition(".")[0] == _OURS:
                    for attribute in _names(value.__code__):
                        if hasattr(found, attribute):
                            yield attribute.encode()
                            yield from _parts(getattr(found, attribute), seen)
    elif isinstance(value, CodeType):
        yield value.co_code
        yield from _parts((value.co_consts, value.co_names, value.co_varnames, value.co_freevars, value.co_name), seen)
    elif is_dataclass(value):
        yield from _parts(type(value), seen)
        for field in fields(value):
            yield field.name.encode()
            yield from _parts(getattr(value, field.name), seen)
    else:
        # a helper of numba's, an intrinsic, a cached function
        inner = next((each for each in ("py_func", "_defn", "__wrapped__") if hasattr(value, each)), None)
        if inner is None:
            raise _NotKnownError(repr(value))
        yield type(value).__qualname__.encode()
        yield from _parts(sorted(map(repr, getattr(value, "targetoptions", {}).items())), seen)
        yield from _parts(getattr(value, inner), seen)


def _names(code: CodeType) -> list[str]:
    """Return the names that code, and code inside it, looks up outside of its own variables."""
    found = list(code.co_names)
    for each in code.co_consts:
        if isinstance(each, CodeType):
            found += _names(each)
    return sorted(set(found))
