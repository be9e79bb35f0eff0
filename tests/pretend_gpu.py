"""A GPU that is none: tensors on the CPU that say they are on it, and refuse what those of a real one refuse.

Whole compressions run so, on what a GPU would run but the kernels, which their CPU twins stand for: a tensor that was
left on the other device is found without a GPU. Not seen: what a backward pass does inside of an autograd.Function;
experts multiplied together from packets, which run one after another here; torch's grouped products; streams.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter, tree_map

from qmoe_lite.coding import codec as cpu_codec
from qmoe_lite.coding import matmul as cpu_matmul
from qmoe_lite.cuda import codec, launch, matmul, solver
from qmoe_lite.models.experts import PackedExperts
from qmoe_lite.quantization import solver as cpu_solver

GPU = torch.device("cuda", 0)
MEMORY = 80 << 30
_SAID = {"device": GPU, "is_cuda": True, "is_cpu": False}
_REFUSED = {"numpy", "__array__", "data_ptr", "untyped_storage", "storage"}
_ACROSS = {"copy_", "_has_compatible_shallow_copy_type"}  # may have tensors of both
_WHOLE = {"stack", "index_select", "gather", "index_add", "index_add_"}  # no number of the CPU's either


class OnGpu(torch.Tensor):
    """A tensor on the CPU that says it is on the GPU."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})


class PretendGpu(TorchFunctionMode):
    """While it is entered, torch makes and moves tensors to a GPU that is none."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})


def _is_gpu(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _call(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = getattr(func, "__name__", "")
    tensors = [each for each in tree_iter((args, kwargs)) if isinstance(each, torch.Tensor)]
    ours = [each for each in tensors if isinstance(each, OnGpu)]
    with torch._C.DisableTorchFunctionSubclass():
        if name == "__get__" and ours and (said := _SAID.get(func.__self__.__name__)) is not None:
            return said
        if name in _REFUSED and ours:
            raise TypeError(f"{name} of a tensor on {GPU}. Copy it to the CPU first.")
        if name in ("to", "cpu", "cuda"):
            return _moved(name, *args, **kwargs)
        in_backward = torch._C._current_graph_task_id() != -1  # gradients come there as plain tensors
        if ours and not in_backward and name not in _ACROSS:
            _check(name, func, args, tensors)
        device = kwargs.get("device")
        drawn = [each for each in tree_iter((args, kwargs)) if isinstance(each, torch.Generator)]
        if drawn and (_is_gpu(device) or (device is None and ours)):
            raise RuntimeError(f"{name}: expected a generator of {GPU}, but found {drawn[0].device}")
        if name == "__format__":  # of a number, if the type is Tensor itself
            return func(_plain(args[0]), *args[1:])
        if name == "histc" and ours:  # of integers on a GPU alone
            args = args[0].float(), *args[1:]
        if _is_gpu(device):
            kwargs = kwargs | {"device": "cpu"}
        stays = device is not None and not _is_gpu(device)
        found = func(*args, **kwargs)
    if stays:
        return tree_map(_plain, found)
    if not (ours or _is_gpu(device)):
        return found
    return tree_map(_on_gpu, found)


def _check(name: str, func: Any, args: Any, tensors: list[torch.Tensor]) -> None:
    if name == "__set__" and func.__self__.__name__ == "data":
        return
    if name in ("__getitem__", "index_put_", "__setitem__") and isinstance(args[0], OnGpu):
        indexed = name == "index_put_" or any(isinstance(each, torch.Tensor | list) for each in tree_iter(args[1]))
        tensors = [args[0], *args[2:3]] if indexed else args[:1]  # indices may be on the CPU, and a slice is copied to
        tensors = [each for each in tensors if isinstance(each, torch.Tensor)]
    others = [each for each in tensors if not isinstance(each, OnGpu) and (each.dim() or name in _WHOLE)]
    if others:
        shapes = ", ".join(f"{tuple(each.shape)} on {'cuda' if isinstance(each, OnGpu) else 'cpu'}" for each in tensors)
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, but found {shapes}")


def _moved(name: str, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Do what `to`, `cpu` and `cuda` do; what is moved is copied."""
    here = isinstance(tensor, OnGpu)
    if name != "to":
        there, rest, given = name == "cuda", (), {}
    elif args and isinstance(args[0], torch.Tensor):
        there, rest, given = isinstance(args[0], OnGpu), (args[0].dtype, *args[1:]), kwargs
    else:
        copy = kwargs.pop("copy", False)
        device, dtype, _, layout = torch._C._nn._parse_to(*args, **kwargs)
        there = here if device is None else _is_gpu(device)
        if device is not None and device.type == "meta":
            return tensor.to(*args, **kwargs)
        given = {"copy": copy, "memory_format": layout or torch.preserve_format}
        rest = (dtype or tensor.dtype,)
    found = tensor.to(*rest, **given) if rest else tensor
    if here != there and found is tensor:
        found = tensor.clone()
    return found.as_subclass(OnGpu) if there else _plain(found)


def _on_gpu(value: Any) -> Any:
    return value.as_subclass(OnGpu) if type(value) is torch.Tensor else value


def _plain(value: Any) -> Any:
    return value.as_subclass(torch.Tensor) if isinstance(value, OnGpu) else value


def _converted(value: Any, convert: Any) -> Any:
    """Return a value whose tensors, those of dataclasses too, are converted."""
    if isinstance(value, torch.Tensor):
        return convert(value)
    if isinstance(value, tuple | list):
        return type(value)(_converted(each, convert) for each in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {each.name: getattr(value, each.name) for each in dataclasses.fields(value) if each.init}
        changed = {name: _converted(each, convert) for name, each in fields.items()}
        return dataclasses.replace(value, **{n: each for n, each in changed.items() if each is not fields[n]})
    return value


def _stand_in(on_cpu: Any) -> Any:
    """Return a CUDA twin that is what the CPU's function makes of tensors on the GPU."""

    @functools.wraps(on_cpu)
    def call(*args: Any) -> Any:
        assert all(isinstance(each, OnGpu) for each in _tensors(args)), f"{on_cpu.__name__}: a tensor on the CPU"
        return _converted(on_cpu(*_converted(args, _plain)), _on_gpu)

    return call


def _tensors(values: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    _converted(tuple(values), lambda tensor: found.append(tensor) or tensor)
    return found


_TWINS = [
    (codec, cpu_codec, ("encode", "decode", "decode_dense")),
    (matmul, cpu_matmul, ("decode_matmul",)),
    (solver, cpu_solver, ("solve_block",)),
]


@contextmanager
def pretended(monkeypatch: Any) -> Iterator[None]:
    """Have a GPU that is none: `compress(.., device="cuda:0")` and others take it."""
    for twin, on_cpu, names in _TWINS:
        for name in names:
            monkeypatch.setattr(twin, name, _stand_in(getattr(on_cpu, name)))
    monkeypatch.setattr(launch, "reason", lambda index=0: None)
    monkeypatch.setattr(PackedExperts, "in_turn", True)  # no kernel that multiplies experts together
    said = {"mem_get_info": (MEMORY, MEMORY), "synchronize": None, "is_available": True}
    said["get_device_capability"] = 7, 0  # torch has no grouped product for it
    for name, value in said.items():
        monkeypatch.setattr(torch.cuda, name, lambda *given, value=value: value)
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with PretendGpu():
            yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)
