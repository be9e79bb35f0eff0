"""Runs a CUDA kernel's own Python on NumPy arrays, no GPU needed: one greenlet a thread, in an order drawn from a seed.

Stricter than a GPU: an index outside its array, a store that does not fit, an integer that overflows, a barrier that a
thread does not reach and a warp operation whose mask names an absent lane all raise. Shared memory begins as poison.
"""

from __future__ import annotations

import contextvars
import functools
import operator
import random
import sys
from types import FunctionType, SimpleNamespace

import numpy as np
import torch
from greenlet import getcurrent, greenlet

from qmoe_lite.cuda import intrinsics

WARP = 32
POISON = 0xA5
SHARED_ORIGIN = 1152  # where dynamic shared memory begins: not at 0


class EmulationError(AssertionError):
    """The kernel did what a GPU would not forgive."""


class Memory:
    """A flat array that refuses what a raw pointer would let pass."""

    def __init__(self, array, origin=0):
        self.array = array
        self.size, self.itemsize = array.size, array.itemsize
        self.bounds = _bounds(array.dtype)
        self.origin = origin  # the place of its first byte, as `intrinsics.origin` gives it

    def at(self, place, count=1):
        """Return `count` elements from a place in bytes on."""
        byte = operator.index(place) - self.origin
        if byte % (count * self.itemsize):
            raise EmulationError(f"{count} elements at byte {byte}, which is no multiple of their size")
        first = byte // self.itemsize
        self._check(first)
        self._check(first + count - 1)
        return self.array[first : first + count]

    def __getitem__(self, index):
        return self.array[self._check(operator.index(index))]

    def __setitem__(self, index, value):
        if self.bounds is not None and not self.bounds[0] <= operator.index(value) <= self.bounds[1]:
            raise EmulationError(f"{value} does not fit {self.array.dtype}")
        self.array[self._check(operator.index(index))] = value

    def _check(self, place):
        if not 0 <= place < self.size:
            raise EmulationError(f"index {place} of an array of {self.size} {self.array.dtype}")
        return place


@functools.cache
def _bounds(dtype):
    """Return the least and the largest value of integers; None of others."""
    return (int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)) if dtype.kind in "iu" else None


class Cuda:
    """Stands where a kernel sees `cuda`, for one block."""

    warpsize = WARP

    def __init__(self, blocks, block, threads, shared_bytes):
        self.gridDim = SimpleNamespace(x=np.int32(blocks[0]), y=np.int32(blocks[1]))
        self.blockIdx = SimpleNamespace(x=np.int32(block[0]), y=np.int32(block[1]))
        self.blockDim = SimpleNamespace(x=np.int32(threads))
        self.shared = SimpleNamespace(array=self._shared_array)
        self.local = SimpleNamespace(array=_local_array)
        self.atomic = SimpleNamespace(add=self._atomic_add)
        self._dynamic = np.full(shared_bytes, POISON, dtype=np.uint8)
        self._static = {}
        self.hub = getcurrent()

    @property
    def threadIdx(self):
        return getcurrent().index

    @property
    def laneid(self):
        return getcurrent().lane

    def grid(self, axes):
        assert axes == 1
        return np.int32(self.blockIdx.x * self.blockDim.x + getcurrent().number)

    def gridsize(self, axes):
        assert axes == 1
        return np.int32(self.gridDim.x * self.blockDim.x)

    def ffs(self, word):
        return np.uint32((int(word) & -int(word)).bit_length())

    def fma(self, a, b, c):
        assert {type(a), type(b), type(c)} == {np.float32}
        return np.float32(np.float64(a) * np.float64(b) + np.float64(c))  # the product is exact

    def _shared_array(self, shape, dtype, alignment=None):
        if shape == 0:
            return Memory(self._dynamic.view(dtype), origin=SHARED_ORIGIN)
        frame = sys._getframe(1)
        place = frame.f_code, frame.f_lasti
        if place not in self._static:
            self._static[place] = np.full(shape * np.dtype(dtype).itemsize, POISON, dtype=np.uint8).view(dtype)
        return Memory(self._static[place])

    def _atomic_add(self, array, index, value):
        old = array[index]
        array[index] = old + value
        return old

    def syncthreads(self):
        self.hub.switch(("syncthreads", None, None))

    def _together(self, name, mask, value):
        """Wait for every lane of the mask; return what each brought."""
        return self.hub.switch((name, mask, value))

    def _shuffle(self, name, mask, value, source):
        lane = getcurrent().number % WARP
        brought = self.hub.switch((name, mask, value))
        source = source(lane)
        if not 0 <= source < WARP:
            return value
        if source not in brought:
            raise EmulationError(f"{name}: lane {lane} reads lane {source}, which is not in mask {mask:#x}")
        return brought[source]

    def syncwarp(self, mask=0xFFFFFFFF):
        self._together("syncwarp", mask, None)

    def shfl_sync(self, mask, value, source):
        return self._shuffle("shfl_sync", mask, value, lambda lane: int(source) % WARP)

    def shfl_up_sync(self, mask, value, step):
        return self._shuffle("shfl_up_sync", mask, value, lambda lane: lane - int(step))

    def shfl_down_sync(self, mask, value, step):
        return self._shuffle("shfl_down_sync", mask, value, lambda lane: lane + int(step))

    def shfl_xor_sync(self, mask, value, step):
        return self._shuffle("shfl_xor_sync", mask, value, lambda lane: lane ^ int(step))

    def ballot_sync(self, mask, predicate):
        brought = self._together("ballot_sync", mask, predicate)
        return np.uint32(sum(1 << lane for lane, value in brought.items() if value))

    def all_sync(self, mask, predicate):
        return all(self._together("all_sync", mask, predicate).values())

    def any_sync(self, mask, predicate):
        return any(self._together("any_sync", mask, predicate).values())


def _local_array(shape, dtype):
    return Memory(np.full(shape * np.dtype(dtype).itemsize, POISON, dtype=np.uint8).view(dtype))


def _floats(values):
    """Values of an array of floats, of which uint16 stands for bfloat16, as float32."""
    return (values.astype(np.uint32) << 16).view(np.float32) if values.dtype == np.uint16 else np.float32(values)


class Intrinsics:
    """What each of `qmoe_lite.cuda.intrinsics` does, for one block; indices wrap nowhere and places are checked."""

    def __init__(self, cuda):
        self.cuda = cuda

    def advanced(self, array, count):
        assert 0 <= int(count) < array.array.size
        return Memory(array.array[int(count) :], array.origin)

    def load_quad(self, array, index):
        if array.array.ctypes.data % 16:
            raise EmulationError("128 bits from an array that does not begin at a multiple of 16 bytes")
        return tuple(array[4 * operator.index(index) + i] for i in range(4))

    def load_constant(self, array, index):
        return array[index]

    def origin(self, array):
        return np.uint32(array.origin)

    def word_at(self, array, place):
        return array.at(place)[0]

    def pair_at(self, array, offset):
        return tuple(array.at(offset + np.uint32(array.origin), 2))

    def add_digits(self, total, array, offset, low, high, span):
        unit = len(total) * len(span)
        row_bytes = unit * array.array.itemsize * len(span)
        rows = [array.at(offset + array.origin + row_bytes * i, unit) for i in range(8 // len(span))]
        digits = np.array([low, high], np.uint32).view(np.uint8).astype(np.float32) - np.float32(128)
        with np.errstate(invalid="ignore"):  # infinity times zero
            products = digits[:, None] * _floats(np.concatenate(rows)).reshape(8, -1)
            return tuple(np.add.accumulate(np.vstack([total, products]), dtype=np.float32)[-1])

    def add_multiple(self, total, array, place, factor):
        assert isinstance(factor, np.float32)
        with np.errstate(invalid="ignore"):  # infinity times zero
            return tuple(np.array(total, np.float32) + factor * _floats(array.at(place, len(total))))

    def dot_bytes(self, a, b, c):
        a, b, total = int(np.uint32(a)), int(np.uint32(b)), int(c)
        for bit in (0, 8, 16, 24):
            total += (a >> bit & 255) * (b >> bit & 255)
        return np.uint32(total)

    def bits_of_quad(self, quad, bit):
        assert 0 <= bit < 128
        whole = sum(int(word) << 32 * i for i, word in enumerate(quad))
        return np.uint32(whole >> int(bit) & 0xFFFFFFFF)

    def float_of_bits(self, bits):
        return np.uint32(bits).view(np.float32)

    def load_float(self, array, index):
        return _floats(array[index])

    def store_float(self, array, index, value):
        assert isinstance(value, np.float32)
        if array.array.dtype == np.uint16:
            array[index] = torch.tensor(value).bfloat16().view(torch.int16).numpy().view(np.uint16)[()]
        else:
            with np.errstate(over="ignore"):
                array[index] = array.array.dtype.type(value)


def run(kernel, blocks, threads, *arguments, shared_bytes=0, seed=0):
    """Launch a kernel on NumPy arrays and NumPy scalars.

    Parameters
    ----------
    kernel : function, or anything with `py_func`
    blocks : int or (int, int)
    threads : int
    *arguments : NumPy arrays (flattened, changed in place) and scalars
    shared_bytes : int
        Dynamic shared memory a block.
    seed : int
        Of the order of the blocks and, between two waits, of the threads.
    """
    blocks = (blocks, 1) if isinstance(blocks, int) else blocks
    assert 0 < threads <= 1024
    assert min(blocks) > 0
    order = random.Random(seed)
    flat = [Memory(a.reshape(-1)) if isinstance(a, np.ndarray) else a for a in arguments]
    places = [(x, y) for y in range(blocks[1]) for x in range(blocks[0])]
    order.shuffle(places)
    with np.errstate(over="raise"):
        for place in places:
            cuda = Cuda(blocks, place, threads, shared_bytes)
            _run_block(_rebind(getattr(kernel, "py_func", kernel), cuda, {}), flat, threads, order)


def install(monkeypatch, seed):
    """Let the twins of `qmoe_lite.cuda` take CPU tensors and launch here; `torch.empty` gives poison."""
    from qmoe_lite.cuda import launch

    def emulated(kernel, blocks, threads, *arguments, shared_bytes=0):
        signature, _ = kernel._match(arguments)
        values = [
            argument.numpy() if isinstance(argument, torch.Tensor) else getattr(np, kind)(argument)
            for argument, kind in zip(arguments, signature.split(", "), strict=True)
        ]
        run(kernel, blocks, threads, *values, shared_bytes=shared_bytes, seed=seed)

    empty = torch.empty

    def poisoned(*arguments, **settings):
        tensor = empty(*arguments, **settings)
        tensor.view(torch.uint8).fill_(POISON)
        return tensor

    monkeypatch.setattr(launch, "DEVICE_TYPE", "cpu")
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 1)
    monkeypatch.setattr(launch, "shared_limit", lambda device: launch.SHARED_BYTES)
    monkeypatch.setattr(launch.Kernel, "launch", emulated)
    monkeypatch.setattr(torch, "empty", poisoned)


def _run_block(function, arguments, threads, order):
    hub = getcurrent()
    everyone = [greenlet(function, hub) for _ in range(threads)]
    for number, thread in enumerate(everyone):
        thread.number, thread.lane = number, np.int32(number % WARP)
        thread.index = SimpleNamespace(x=np.int32(number))
        thread.gr_context = contextvars.copy_context()  # NumPy keeps its errstate there
    waiting = {}
    ready = [(thread, arguments) for thread in everyone]
    while ready:
        order.shuffle(ready)
        for thread, brought in ready:
            request = thread.switch(*brought)
            if not thread.dead:
                waiting[thread.number] = request
        ready = [(everyone[number], (brought,)) for number, brought in _release(waiting, everyone)]


def _release(waiting, everyone):
    """Take the threads that may go on out of `waiting`; return each one's number and what it is given."""
    released = []
    groups = {}
    for number, (name, mask, value) in waiting.items():
        if name != "syncthreads":
            groups.setdefault((number // WARP, name, int(mask)), {})[number % WARP] = value
    for (warp, name, mask), brought in groups.items():
        named = [lane for lane in range(WARP) if mask >> lane & 1]
        for lane in named:
            number = warp * WARP + lane
            if number >= len(everyone) or everyone[number].dead:
                raise EmulationError(f"{name}: mask {mask:#x} names lane {lane} of warp {warp}, which is absent")
        if not set(brought) <= set(named):
            raise EmulationError(f"{name}: a lane of warp {warp} calls it with mask {mask:#x}, which leaves it out")
        if len(brought) == len(named):
            released += [(warp * WARP + lane, brought) for lane in named]
    for number, _ in released:
        del waiting[number]
    if released or not waiting:
        return released
    if len(waiting) < len(everyone) or any(name != "syncthreads" for name, _, _ in waiting.values()):
        places = {number: (name, mask) for number, (name, mask, _) in sorted(waiting.items())[:4]}
        raise EmulationError(f"deadlock: {len(waiting)} of {len(everyone)} threads wait for ever, such as {places}")
    released = [(number, None) for number in waiting]
    waiting.clear()
    return released


def _rebind(function, cuda, done):
    """Copy a function so that it, and the compiled helpers it names, see the emulator's `cuda`."""
    if function not in done:
        names = dict(function.__globals__)
        done[function] = FunctionType(
            function.__code__, names, function.__name__, function.__defaults__, function.__closure__
        )
        for name in function.__code__.co_names:
            if names.get(name) is not None and names[name] is getattr(intrinsics, name, None):
                names[name] = getattr(Intrinsics(cuda), name)
            if hasattr(names.get(name), "py_func"):
                names[name] = _rebind(names[name].py_func, cuda, done)
        names["cuda"] = cuda
    return done[function]
