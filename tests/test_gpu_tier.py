"""The GPU tier on a device that is none: what is put off until it is waited for shows what was not waited for."""

from __future__ import annotations

import gc
import threading
from pathlib import Path

import pytest
import torch
from test_offload import outputs

import qmoe_lite as qm
from qmoe_lite._gpu_tier import GpuTier, share_layers
from qmoe_lite._ram_tier import slot_layout
from qmoe_lite.errors import DeviceError, SettingError
from qmoe_lite.offload import attach, runner_of


class Mark(int):
    """The event of the end of what was computed; a plain number is that of a copy."""


class FakeDevice:
    """Copies nothing before their event is waited for, as a stream may; computes at once, on the CPU."""

    def __init__(self, name="fake:0", memory=1 << 30, fails_at=()):
        self.name, self.device, self.memory = name, torch.device("cpu"), memory
        self.products = self.copies = 0
        self._fails_at = set(fails_at)
        self._pending = []
        self._block = None
        self._used = {}  # start of a target, to the mark after what was computed from it
        self._marks = 0

    def allocate(self, size):
        if size > self.memory:
            raise torch.OutOfMemoryError("fake out of memory")
        assert not self._used, "memory is given back before what was computed from it is done"
        return torch.full((size,), 0x55, dtype=torch.uint8)

    def stage(self, size):
        return torch.full((size,), 0x33, dtype=torch.uint8)

    def copy(self, source, target, after):
        begin, end = target.data_ptr(), target.data_ptr() + len(target)
        last = max((mark for at, mark in self._used.items() if begin <= at < end), default=0)
        assert (after or 0) >= last, "the slot is overwritten before what was computed from it is done"
        self.copies += 1
        self._pending.append((self.copies, source, target))
        return self.copies

    def wait(self, event):
        assert not isinstance(event, Mark), "what is computed is in order as it is"
        while self._pending and self._pending[0][0] <= event:
            _, source, target = self._pending.pop(0)
            target.copy_(source)

    def finish(self, event):
        if not isinstance(event, Mark):
            return self.wait(event)
        self._used = {at: mark for at, mark in self._used.items() if not 0 < mark <= event}

    def mark(self):
        self._marks += 1
        for at, mark in self._used.items():
            self._used[at] = mark or self._marks
        return Mark(self._marks)

    def multiply(self, packed, x):
        self.products += 1
        if self.products in self._fails_at:
            raise torch.OutOfMemoryError("fake out of memory")
        self._used[packed.codes.data_ptr()] = 0  # until the next mark
        return qm.decode_matmul(packed, x)

    def beside(self, codebook, codes, rows):
        return 0


@pytest.fixture
def on_devices(request):
    """Give a function: directory, devices, slots on each, slots in memory -> model and runner."""

    def get(path, devices, slots, memory=None):
        model = qm.load(path, dtype=torch.float32)
        probe = attach(model, remember=False)
        size = max(GpuTier(FakeDevice(), probe._layers, 99, None, 1.0, []).slot_bytes, 1)
        index = sum(layer.index_bytes for layer in probe._layers)
        ram = None if memory is None else index + memory * slot_layout(probe._layers)[1]
        probe.close()
        budgets = [n * size for n in slots] if isinstance(slots, tuple) else None if slots is None else slots * size
        runner = attach(model, devices=devices, expert_cache=budgets, ram_cache=ram, remember=False)
        request.addfinalizer(runner.close)
        return model, runner

    return get


@pytest.mark.parametrize("model_type", ["switch_transformers", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("memory", [None, 1, 3])
@pytest.mark.parametrize("slots", [1, 2, 5, None])
def test_logits_are_the_same_bits_at_every_pair_of_budgets(directory, on_devices, model_type, memory, slots):
    path = directory(model_type)
    expected = outputs(qm.load(path, dtype=torch.float32))
    device = FakeDevice()
    model, runner = on_devices(path, [device], slots, memory)
    for _ in range(3):
        assert torch.equal(outputs(model), expected)
    found = runner.statistics
    assert found.misses == found.ram_hits + found.ram_misses
    assert found.hits + found.misses > 0
    assert device.copies >= found.misses
    assert found.copied_bytes > 0
    assert not found.notes
    assert any("copied to the GPU" in line for line in found.lines())
    if slots is None:
        assert found.hits > 2 * found.misses / 3
    if slots == 1:
        assert found.cache_bytes == runner._tiers[0].slot_bytes


def test_layers_are_spread_over_devices_as_their_budgets(directory, on_devices):
    path = directory("mixtral")
    expected = outputs(qm.load(path, dtype=torch.float32))
    devices = [FakeDevice("fake:0"), FakeDevice("fake:1")]
    model, runner = on_devices(path, devices, (8, 4))
    assert torch.equal(outputs(model), expected)
    assert [tier.device.name for tier in runner._tier_of] == ["fake:0", "fake:0", "fake:1"]
    assert all(device.products > 0 for device in devices)


def test_more_devices_than_layers_is_said(directory, on_devices):
    path = directory("switch_transformers")
    _, runner = on_devices(path, [FakeDevice(f"fake:{i}") for i in range(3)], 4)
    assert runner.statistics.notes == ["fake:1 is left out: there are fewer layers than GPUs."]


def test_shares_are_as_the_budgets():
    class Layer:
        codes_bytes = 10

    layers = [Layer()] * 8
    assert share_layers(layers, [1]) == [0] * 8
    assert share_layers(layers, [1, 1]) == [0] * 4 + [1] * 4
    assert share_layers(layers, [3, 1]) == [0] * 6 + [1] * 2
    assert share_layers(layers[:2], [1, 1, 1]) == [0, 2]


@pytest.mark.parametrize("fails_at", [(1,), (7,), (8, 30), (2, 3)])
def test_out_of_memory_in_the_middle_goes_on_with_a_smaller_cache(directory, on_devices, fails_at):
    path = directory()
    expected = outputs(qm.load(path, dtype=torch.float32))
    model, runner = on_devices(path, [FakeDevice(fails_at=fails_at)], 8)
    for _ in range(2):
        assert torch.equal(outputs(model), expected)
    assert runner._tiers[0].cache.slots == 8 >> len(fails_at)
    notes = runner.statistics.notes
    assert notes[0] == "fake:0 ran out of memory: its cache now holds 4 experts instead of 8."
    assert len(notes) == len(fails_at)
    assert "note: " + notes[-1] in runner.statistics.lines()


def test_a_cache_that_cannot_get_smaller_is_one_line(directory, on_devices):
    path = directory()
    model, _ = on_devices(path, [FakeDevice(fails_at=range(1, 99))], 8)
    with pytest.raises(DeviceError, match="fake:0 is out of memory with room for one expert only"):
        outputs(model)


def test_a_copy_that_fails_leaves_no_expert_behind(directory, on_devices, monkeypatch):
    path, device = directory(), FakeDevice()
    expected = outputs(qm.load(path, dtype=torch.float32))
    model, runner = on_devices(path, [device], 3)

    def fail(*_):
        raise RuntimeError("fake copy error")

    with monkeypatch.context() as patch:
        patch.setattr(device, "copy", fail)
        with pytest.raises(RuntimeError, match="fake copy error"):
            outputs(model)
    assert len(runner._tiers[0].cache) == 0
    assert runner._tiers[0].cache.unpinned == 3
    assert torch.equal(outputs(model), expected)


def test_too_little_memory_at_the_start_makes_a_smaller_cache(directory, on_devices):
    path = directory()
    expected = outputs(qm.load(path, dtype=torch.float32))
    size = on_devices(path, [FakeDevice()], 1)[1]._tiers[0].slot_bytes
    model, runner = on_devices(path, [FakeDevice(memory=3 * size)], 8)
    assert runner.statistics.notes == ["fake:0 was out of memory: its cache holds 2 experts instead of 8."]
    assert torch.equal(outputs(model), expected)
    with pytest.raises(DeviceError, match="has no memory for one expert"):
        on_devices(path, [FakeDevice(memory=size - 1)], 8)


def test_what_a_product_keeps_beside_an_expert_counts_too(directory, on_devices, monkeypatch):
    path = directory()
    alone = on_devices(path, [FakeDevice()], 8)[1]._tiers[0]
    rows = []
    monkeypatch.setattr(FakeDevice, "beside", lambda device, codebook, codes, n: rows.append(n) or alone.slot_bytes)
    both = on_devices(path, [FakeDevice()], 8)[1]
    (tier,) = both._tiers
    assert min(rows) > 0
    assert tier.slot_bytes == alone.slot_bytes
    assert tier.expert_bytes % alone.slot_bytes == 0
    assert tier.cache.slots == 8 * alone.expert_bytes // tier.expert_bytes < 8
    assert both.statistics.cache_bytes <= 8 * alone.expert_bytes


def test_budgets_that_do_not_fit_are_refused(directory):
    path = directory()
    model = qm.load(path, dtype=torch.float32)
    gc.collect()  # what other tests left
    before = set(threading.enumerate()), len(list(Path("/proc/self/fd").iterdir()))
    for options, match in (
        ({"devices": [FakeDevice()], "expert_cache": 100}, "expert_cache is 100 bytes on fake:0"),
        ({"devices": [FakeDevice()], "expert_cache": ["1MB", "1MB"]}, "2 sizes for 1 devices"),
        ({"devices": ["banana"]}, "device banana is not supported"),
    ):
        with pytest.raises(SettingError, match=match):
            attach(model, remember=False, **options)
        assert runner_of(model) is None
    gc.collect()
    assert set(threading.enumerate()) <= before[0], "no thread is left"
    assert len(list(Path("/proc/self/fd").iterdir())) <= before[1], "no file is left open"


def test_without_a_gpu_one_is_refused_in_one_line(directory):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    path = directory()
    for options in ({"device": "cuda"}, {"devices": ["cuda:0"]}):
        with pytest.raises(DeviceError):
            qm.load(path, **options)
