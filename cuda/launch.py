"""The one door to the CUDA compiler and driver: can a GPU be used, compile a kernel, launch it.

numba-cuda turns a kernel's Python into PTX at its first launch, cuda.core links it, which `cubins` keeps on disk, and
launches it on torch's current stream with raw addresses: some microseconds where numba's own launch takes tens. A
kernel's parameters are flat arrays ("float32*") and scalars ("int32"); it indexes by hand. Its helpers are inlined: by
numba ("inline") where they are a line or two, else by LLVM ("forceinline"), which compiles a long one once and not once
a call: the product's kernels in a tenth of the time, to the same machine code.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import operator
import re
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from qmoe_lite.cuda.cubins import cubin_key, load_cubin, store_cubin
from qmoe_lite.errors import DeviceError, DtypeError, SettingError, ShapeError

cuda: Any = None  # without numba-cuda: numba's own CUDA target knows no toolkit above 12.4
extending: Any = None  # where intrinsics are made
if importlib.util.find_spec("numba_cuda") is not None:
    if not hasattr(np, "row_stack"):
        np.row_stack = np.vstack  # numba-cuda 0.30 asks for it, NumPy 2.5 dropped it
    cuda = importlib.import_module("numba.cuda")
    extending = importlib.import_module("numba.cuda.extending")

DEVICE_TYPE = "cuda"
WARP = 32
SHARED_BYTES = 48 << 10  # what a block may ask for without opting in to more
_STATIC_BYTES = 1 << 10  # of a block's shared memory that are left to what a kernel declares
_OLDEST = (8, 0)
_DLPACK_CUDA = 2  # kDLCUDA of DLPack's device types
_FORMATS = {"int32": "i", "uint32": "I", "int64": "q", "uint64": "Q", "float32": "f"}
_INSTALL = "Run: pip install 'qmoe-lite[cuda]'"


def available(index: int = 0) -> bool:
    """Return whether the kernels can run on GPU `index`; see `reason` for why not."""
    return reason(index) is None


@functools.cache
def reason(index: int = 0) -> str | None:
    """Return what keeps the kernels from GPU `index` and what to do about it, one line; None where nothing does.

    Parameters
    ----------
    index : int, default 0
        The GPU's number, as torch counts.
    """
    if cuda is None:
        return f"numba-cuda is not installed; the GPU kernels are compiled with it. {_INSTALL}"
    if not cuda.is_available():
        return "no NVIDIA GPU or driver was found; expected both. Install the driver (580 or later), or use the CPU."
    if not torch.cuda.is_available():
        found = f"torch {torch.__version__} cannot use the GPU; expected a build for CUDA. "
        return found + "Install one: https://pytorch.org/get-started"
    missing = _missing_library()
    if missing is not None:
        found = f"lib{missing} was not found; the GPU kernels are compiled with it. "
        return f"{found}{_INSTALL}, or set CUDA_HOME to a CUDA 13 toolkit."
    if (index or 0) >= torch.cuda.device_count():
        return f"GPU {index} is not there; torch sees {torch.cuda.device_count()}. Name one of them."
    capability = torch.cuda.get_device_capability(index)
    if capability < _OLDEST:
        found = f"GPU {index} has compute capability {'.'.join(map(str, capability))}; "
        return found + f"expected {'.'.join(map(str, _OLDEST))} or later (A100, RTX 30). Use another GPU, or the CPU."
    return None


def as_tensor(array: Any, name: str, *, strided: bool = False) -> Tensor:
    """Return a device array as a torch tensor without a gradient, sharing memory where that is possible.

    Parameters
    ----------
    array : tensor, or anything with `__dlpack__` or `__cuda_array_interface__`
        On a GPU.
    name : str
        What an error calls it.
    strided : bool, default False
        Leave it as it lies in memory; else it is made contiguous.

    Raises
    ------
    DtypeError
        No such array.
    SettingError
        The array is not on a GPU.
    """
    if isinstance(array, Tensor):
        found = array.device.type
    elif hasattr(array, "__dlpack_device__"):
        found = DEVICE_TYPE if array.__dlpack_device__()[0] == _DLPACK_CUDA else "the CPU"
    elif hasattr(array, "__cuda_array_interface__"):
        found = DEVICE_TYPE
    else:
        raise DtypeError(f"{name} is a {type(array).__name__}; expected a tensor or device array. Convert it first.")
    if found != DEVICE_TYPE:
        raise SettingError(f"{name} is on {found}; expected a GPU. Move it there, or call the CPU function.")
    if isinstance(array, Tensor):
        shared = array.detach()
    else:
        shared = from_dlpack(array) if hasattr(array, "__dlpack__") else torch.as_tensor(array, device=DEVICE_TYPE)
    return shared if strided else shared.contiguous()


def multiprocessors(device: torch.device) -> int:
    """Return how many multiprocessors a GPU has."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.lru_cache(maxsize=64)
def shared_limit(device: torch.device) -> int:
    """Return the bytes of dynamic shared memory that a block may ask for on a GPU; more than `SHARED_BYTES`."""
    from cuda.core import Device

    return int(Device(device.index).properties.max_shared_memory_per_block_optin) - _STATIC_BYTES


def sizes(device: torch.device) -> tuple[int, int]:
    """Return `multiprocessors` and `shared_limit` of a GPU."""
    return multiprocessors(device), shared_limit(device)


def upload(numbers: list[int], device: torch.device) -> Tensor:
    """Return numbers as an int32 tensor on a GPU, without waiting for it."""
    pinned = torch.tensor(numbers, dtype=torch.int32, pin_memory=device.type == "cuda")
    return pinned.to(device, non_blocking=True)


def finish(device: torch.device) -> None:
    """Wait for what the current stream of a GPU was given to do."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


class Kernel:
    """A kernel's Python function, compiled at its first launch for each signature and GPU; made by `kernel`.

    Attributes
    ----------
    py_func : function
        What an emulator runs.
    signatures : tuple of str
        Parameter types, "float32*" for an array and "int32" for a scalar, arrays first; a launch takes the one its
        arrays fit.
    bounds : (int, int) or None
        Most threads a block, and blocks that a multiprocessor shall have the registers for.
    """

    __name__: str

    def __init__(
        self, py_func: Callable[..., None], signatures: tuple[str, ...], bounds: tuple[int, int] | None = None
    ) -> None:
        self.py_func = py_func
        self.signatures = signatures
        self.bounds = bounds
        self._arrays = signatures[0].count("*")
        for signature in signatures:
            assert all(kind.endswith("*") for kind in signature.split(", ")[: self._arrays]), "arrays come first"
        self._ready: dict[tuple[Any, ...], _Ready] = {}  # by the tensors' dtypes, and their device

    def ptx(self, signature: str) -> str:
        """Compile for all GPUs from the oldest on, whose machine code `link` makes of it; needs no GPU."""
        types: Any = importlib.import_module("numba.core.types")
        kinds = [getattr(types, kind.rstrip("*")) for kind in signature.split(", ")]
        pointers = [kind.endswith("*") for kind in signature.split(", ")]
        arguments = tuple(types.CPointer(kind) if p else kind for kind, p in zip(kinds, pointers, strict=True))
        with _compiling_for_the_oldest():
            return str(cuda.compile_ptx(self.py_func, arguments, cc=_OLDEST, launch_bounds=self.bounds)[0])

    def launch(self, blocks: int | tuple[int, int], threads: int, *arguments: Any, shared_bytes: int = 0) -> None:
        """Run on torch's current stream of the arrays' GPU, without waiting.

        Parameters
        ----------
        blocks : int or (int, int)
            Grid, at least one block.
        threads : int
            Threads a block.
        *arguments : contiguous tensors and numbers
            All tensors on one GPU, not empty.
        shared_bytes : int, default 0
            Dynamic shared memory a block.

        Raises
        ------
        DeviceError
            The GPU cannot be used; says what to install.
        DtypeError, ShapeError, SettingError
            No signature fits the tensors, a tensor is not contiguous, or they are on several devices.
        """
        tensors, scalars = arguments[: self._arrays], arguments[self._arrays :]
        try:
            devices = set(map(_device_of, tensors))
            ready = self._ready[*map(_dtype_of, tensors), *devices]
            packed = ready.scalars.pack(*scalars)
            fit = all(map(Tensor.is_contiguous, tensors))
        except (AttributeError, KeyError, TypeError, struct.error):
            fit = False
        if not fit:
            ready = self._prepare(arguments)
            packed = ready.scalars.pack(*scalars)
        values = [*map(Tensor.data_ptr, tensors), *ready.scalars.unpack(packed)]  # whatever numbers they were
        for place in ready.floats:
            values[place] = np.float32(values[place])
        index = ready.index
        # streams are looked up at each launch: a graph is captured on one of its own
        if _current_device() == index and index in _entered.indices and shared_bytes <= ready.opened:
            config = _config(blocks, threads, shared_bytes)
            ready.launch(_stream(_current_stream(index)), config, ready.compiled, *values)
            return
        with torch.cuda.device(index):
            core = _core()
            core.Device(index).set_current()  # a thread that has not used the GPU yet has no context
            if shared_bytes > ready.opened:
                _open_shared(ready.compiled, shared_bytes, index)
                ready.opened = shared_bytes
            config = _config(blocks, threads, shared_bytes)
            core.launch(_stream(_current_stream(index)), config, ready.compiled, *values)
        if _current_device() == index:
            _entered.indices.add(index)

    def _prepare(self, arguments: tuple[Any, ...]) -> _Ready:
        """Check the arguments, and compile what they fit where that has not been done."""
        signature, device = self._match(arguments)
        kinds = signature.split(", ")
        for kind, argument in zip(kinds[self._arrays :], arguments[self._arrays :], strict=True):
            getattr(np, kind)(argument)  # raises where it does not fit
        key = *(tensor.dtype for tensor in arguments[: self._arrays]), device
        if key not in self._ready:
            self._ready[key] = _Ready(self._load(signature, device.index), kinds, device.index)
        return self._ready[key]

    def _match(self, arguments: tuple[Any, ...]) -> tuple[str, torch.device]:
        """Return the signature that fits the arguments, and their device."""
        tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
        devices = {tensor.device for tensor in tensors}
        if len(devices) != 1 or tensors[0].device.type != DEVICE_TYPE:
            message = f"arrays are on {' and '.join(sorted(map(str, devices)))}; expected one GPU. "
            raise SettingError(message + "Move them to one device.")
        if not all(tensor.is_contiguous() for tensor in tensors):
            raise ShapeError(f"an array of {self.py_func.__name__} has strides; expected a contiguous one. Copy it.")
        found = [str(a.dtype).removeprefix("torch.") + "*" if isinstance(a, Tensor) else None for a in arguments]
        for signature in self.signatures:
            kinds = signature.split(", ")
            if len(kinds) == len(found) and all(
                kind == own if own else not kind.endswith("*") for kind, own in zip(kinds, found, strict=True)
            ):
                return signature, tensors[0].device
        expected = " or ".join(self.signatures)
        raise DtypeError(f"{self.py_func.__name__} got {[own or 'scalar' for own in found]}; expected {expected}.")

    def _load(self, signature: str, index: int) -> Any:
        """Return the compiled kernel on GPU `index`: from the disk, or compiled now."""
        missing = reason(index)
        if missing is not None:
            raise DeviceError(missing)
        capability = torch.cuda.get_device_capability(index)
        name = cubin_key(self.py_func, signature, capability, self.bounds)
        kept = None if name is None else load_cubin(name)
        if kept is None:
            ptx = self.ptx(signature)
            kept = entry_name(ptx), bytes(link(ptx, capability).code)
            if name is not None:
                store_cubin(name, *kept)
        entry, code = kept
        with torch.cuda.device(index):
            _core().Device(index).set_current()
            return _core().ObjectCode.from_cubin(code).get_kernel(entry)


class _Ready:
    """A compiled kernel of one signature on one GPU, and what its launches need."""

    def __init__(self, compiled: Any, kinds: list[str], index: int) -> None:
        scalars = [kind for kind in kinds if not kind.endswith("*")]
        self.compiled = compiled
        self.index = index
        self.launch = _core().launch
        self.scalars = struct.Struct("=" + "".join(map(_FORMATS.__getitem__, scalars)))
        self.floats = [place for place, kind in enumerate(kinds) if kind == "float32"]  # the driver would take float64
        self.opened = SHARED_BYTES - _STATIC_BYTES  # of shared memory that a launch may ask for, beside a kernel's own


class _Entered(threading.local):
    """The GPUs whose context this thread has made current at least once; torch switches between those."""

    def __init__(self) -> None:
        self.indices: set[int] = set()


_entered = _Entered()


def kernel(*signatures: str, bounds: tuple[int, int] | None = None) -> Callable[[Callable[..., None]], Kernel]:
    """Make a `Kernel` of a function; each signature names its parameters' types, such as "uint8*, float32*, int32"."""

    def decorate(py_func: Callable[..., None]) -> Kernel:
        made = Kernel(py_func, signatures, bounds)
        made.__name__, made.__doc__ = py_func.__name__, py_func.__doc__
        return made

    return decorate


@contextmanager
def _compiling_for_the_oldest() -> Iterator[None]:
    """Let numba-cuda compile helpers for the oldest GPU too; else it asks the driver, for the current one's."""
    dispatcher: Any = importlib.import_module("numba.cuda.dispatcher")
    lock = importlib.import_module("numba.cuda.core.compiler_lock").global_compiler_lock
    with lock:
        before = dispatcher.get_current_device
        dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=_OLDEST)
        try:
            yield
        finally:
            dispatcher.get_current_device = before


def entry_name(ptx: str) -> str:
    """Return the name of the kernel in PTX."""
    found = re.search(r"\.visible \.entry (\w+)\(", ptx)
    assert found is not None
    return found[1]


def link(ptx: str, capability: tuple[int, int]) -> Any:
    """Return the machine code of PTX, a `cuda.core.ObjectCode`; needs no GPU."""
    from cuda.core import Linker, LinkerOptions, ObjectCode

    options = LinkerOptions(arch="sm_{}{}".format(*capability))
    return Linker(ObjectCode.from_ptx(ptx.encode()), options=options).link("cubin")


def _open_shared(compiled: Any, shared_bytes: int, index: int) -> None:
    """Let a compiled kernel be launched with more shared memory than `SHARED_BYTES`."""
    from cuda.bindings import driver

    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    handle = driver.CUkernel(int(compiled.handle))
    (status,) = driver.cuKernelSetAttribute(attribute, shared_bytes, handle, driver.CUdevice(index))
    if status != driver.CUresult.CUDA_SUCCESS:
        found = f"GPU {index} refused {shared_bytes} bytes of shared memory a block: {status.name}. "
        raise DeviceError(found + "Update the driver, or use the CPU.")


@functools.cache
def _core() -> Any:
    return importlib.import_module("cuda.core")


@functools.lru_cache(maxsize=64)
def _stream(handle: int) -> Any:
    return _core().Stream.from_handle(handle)


@functools.lru_cache(maxsize=1024)
def _config(blocks: int | tuple[int, int], threads: int, shared_bytes: int) -> Any:
    return _core().LaunchConfig(grid=blocks, block=threads, shmem_size=shared_bytes)


def _public_stream(index: int) -> int:
    return int(torch.cuda.current_stream(index).cuda_stream)


# what torch.cuda's functions of these names come to, at a tenth of their time
_current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
_current_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", _public_stream)
_device_of, _dtype_of = operator.attrgetter("device"), operator.attrgetter("dtype")


def _missing_library() -> str | None:
    """Return the first of the compiler's libraries that is not found."""
    from cuda.pathfinder import DynamicLibNotFoundError, load_nvidia_dynamic_lib

    for name in ("nvvm", "nvrtc", "nvJitLink"):
        try:
            load_nvidia_dynamic_lib(name)
        except DynamicLibNotFoundError:
            return name
    return None
