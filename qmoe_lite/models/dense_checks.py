"""Compares a loaded model's dense tensors with their checksums before they are first used, so that loading reads none.

A checksum costs as much as reading the tensor, so it waits until the tensor is read anyway. A block is checked as a
whole, before any module in it runs: a router's weight, or a tied one, is used by other code than its own module's.
Outside the blocks a module is checked with all that lies in it. What is compared are the file's bytes, not the
parameter's: it may have been cast, moved or trained since. They are read and not mapped, and not by torch: neither a
file that was cut nor a mode of torch's, such as an export's fake tensors, comes into it.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import chain
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from qmoe_lite.checkpoint.reader import Checkpoint, Place, compare_checksums, of_experts
from qmoe_lite.checkpoint.weight_file import THREADS, SizeGuard
from qmoe_lite.devices import uncompiled


def check_before_use(model: nn.Module, checkpoint: Checkpoint, blocks: Iterable[str], guard: SizeGuard) -> None:
    """Let each module raise FormatError before it first runs, or gives its state, with a damaged dense tensor.

    Parameters
    ----------
    model : torch module
        Its weights are loaded and tied.
    checkpoint : Checkpoint
        What it was loaded from; it is not kept.
    blocks : iterable of str
        Names of the modules that are checked as a whole.
    guard : SizeGuard
        Of the same files.
    """
    if not checkpoint.has_checksums:
        return
    sums = _Sums(guard)
    names: dict[int, list[str]] = defaultdict(list)  # of a tensor in the files: a tied one has several, or another's
    for name, tensor in chain(
        model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    ):
        if name in checkpoint and not of_experts(name):
            names[id(tensor)].append(name)
            sums.left[name] = checkpoint.place(name), checkpoint.checksum(name)

    def names_in(modules: Iterable[nn.Module]) -> list[str]:
        tensors = chain.from_iterable(
            chain(module.parameters(recurse=False), module.buffers(recurse=False)) for module in modules
        )
        return list(dict.fromkeys(name for tensor in tensors for name in names.get(id(tensor), ())))

    inside: set[nn.Module] = set()
    for block in blocks:
        modules = list(model.get_submodule(block).modules())
        inside.update(modules)
        _FirstUse(sums, names_in(modules)).await_in(module for module in modules if names_in(module.modules()))
    for module in model.modules():
        own = [] if module in inside else names_in(part for part in module.modules() if part not in inside)
        if own:
            _FirstUse(sums, own).await_in([module])


class _Sums:
    """The dense tensors that were not compared yet.

    Attributes
    ----------
    left : dict, name to (Place, CRC-32 by the index)
    """

    def __init__(self, guard: SizeGuard) -> None:
        self.left: dict[str, tuple[Place, int | None]] = {}
        self.lock = threading.Lock()
        self._guard = guard

    def compare(self, names: Iterable[str]) -> None:
        """Compare those of some tensors that are left, each once; the caller holds the lock."""
        left = {name: self.left[name] for name in names if name in self.left}
        if not left:
            return
        with ThreadPoolExecutor(THREADS) as pool:  # zlib lets go of the interpreter's lock
            found = pool.map(lambda name: self._crc32(left[name][0]), left)
            for (name, (place, expected)), crc in zip(left.items(), found, strict=True):
                compare_checksums(name, place.path, expected, crc)
                del self.left[name]

    def _crc32(self, place: Place) -> int:
        return self._guard.files[place.path].crc32(place.offset, place.length)


class _FirstUse:
    """A hook that runs before a module does, or before it gives its state: compares tensors, once.

    What a copy or a file of the model gets is compared when it is made; the copy's hooks do nothing.
    """

    def __init__(self, sums: _Sums | None, names: list[str]) -> None:
        self._sums, self._names = sums, names
        self._handles: list[RemovableHandle] = []

    def await_in(self, modules: Iterable[nn.Module]) -> None:
        """Be called before any of these modules runs for the first time."""
        for module in modules:
            self._handles.append(module.register_forward_pre_hook(self))
            module.register_state_dict_pre_hook(self._compare)  # type: ignore[no-untyped-call]

    @uncompiled
    def __call__(self, module: nn.Module, arguments: Any) -> None:
        self._compare()
        with suppress(IndexError):  # another thread may be here too
            while True:
                self._handles.pop().remove()

    def _compare(self, *arguments: Any) -> None:
        if (sums := self._sums) is not None:  # read once, for the same reason
            with sums.lock:
                sums.compare(self._names)
            self._sums = None

    def __reduce__(self) -> tuple[Any, ...]:
        self._compare()
        return _FirstUse, (None, [])
