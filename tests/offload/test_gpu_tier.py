"""The GPU tier on a device that is none: what is put off until it is waited for shows what was not waited for."""

from __future__ import annotations

import gc
import threading
from pathlib import Path

import pytest
import torch
from checks import bytes_of, outputs
from fake_device import EmulatedDevice, FakeDevice
from torch.utils._python_dispatch import TorchDispatchMode

import qmoe_lite as qm
from qmoe_lite.cuda import codec, gather, matmul, window_packets, windows, windows_product
from qmoe_lite.cuda import experts as experts_twin
from qmoe_lite.errors import DeviceError, SettingError
from qmoe_lite.models.causal import Causal
from qmoe_lite.offload.gpu_tier import GpuTier, share_layers
from qmoe_lite.offload.prediction import Prediction
from qmoe_lite.offload.ram_tier import slot_layout
from qmoe_lite.offload.runner import Runner, attach, runner_of

KINDS = ["qwen3_moe", "qwen3_moe of windows"]


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


FOUND = {}  # logits, by a model's weights


@pytest.fixture
def everything_there(on_devices):
    """Give a function: directory -> logits of the model with a slot for each expert, compared with the CPU's."""

    def get(path):
        weights = tuple(bytes_of(path).values())
        if weights not in FOUND:
            found = outputs(on_devices(path, [FakeDevice()], None)[0])
            on_cpu = outputs(qm.load(path, dtype=torch.float32))
            torch.testing.assert_close(found, on_cpu, rtol=1e-4, atol=1e-5 * float(on_cpu.abs().max()))
            FOUND[weights] = found
        return FOUND[weights]

    return get


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["switch_transformers", "mixtral", "qwen3_moe", "qwen3_moe of windows"])
@pytest.mark.parametrize("memory", [None, 1, 3])
@pytest.mark.parametrize("slots", [1, 2, 5, None])
def test_logits_are_the_same_bits_at_every_pair_of_budgets(
    directory, on_devices, everything_there, model_type, memory, slots
):
    path = directory(model_type)
    expected = everything_there(path)
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


def test_layers_are_spread_over_devices_as_their_budgets(directory, on_devices, everything_there):
    path = directory("mixtral")
    expected = everything_there(path)
    devices = [FakeDevice("fake:0"), FakeDevice("fake:1")]
    model, runner = on_devices(path, devices, (8, 4))
    assert torch.equal(outputs(model), expected)
    assert [tier.device.name for tier in runner._tier_of] == ["fake:0", "fake:0", "fake:1"]
    assert all(device.turns > 0 for device in devices)


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


@pytest.mark.slow
@pytest.mark.parametrize("fails_at", [(1,), (7,), (8, 20), (2, 3)])
def test_out_of_memory_in_the_middle_goes_on_with_a_smaller_cache(directory, on_devices, everything_there, fails_at):
    path = directory()
    expected = everything_there(path)
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
    for _ in range(2):
        with pytest.raises(DeviceError, match="fake:0 is out of memory with room for one expert only"):
            outputs(model)


def test_a_cache_that_is_lost_is_the_same_line_at_every_call(directory, on_devices):
    path, device = directory(), FakeDevice(fails_at=[3])
    model, runner = on_devices(path, [device], 8)
    device.memory = 0  # somebody else has taken what was given back
    for _ in range(3):
        with pytest.raises(DeviceError, match="fake:0 has no memory for one expert"):
            outputs(model)
    name = runner._layers[0].experts.layer.experts
    with pytest.raises(DeviceError, match="fake:0 has no memory for one expert"):
        model.get_submodule(name).forward(torch.zeros(1, 24), torch.zeros(1, 2).long(), torch.ones(1, 2))
    runner._count()
    assert runner.statistics.cache_bytes == 0


def test_a_copy_that_fails_leaves_no_expert_behind(directory, on_devices, everything_there, monkeypatch):
    path, device = directory(), FakeDevice()
    expected = everything_there(path)
    model, runner = on_devices(path, [device], 3)

    def fail(*_):
        raise RuntimeError("fake copy error")

    with monkeypatch.context() as patch:
        patch.setattr(device, "fill", fail)
        with pytest.raises(RuntimeError, match="fake copy error"):
            outputs(model)
    assert len(runner._tiers[0].cache) == 0
    assert runner._tiers[0].cache.unpinned == 3
    assert torch.equal(outputs(model), expected)


def test_too_little_memory_at_the_start_makes_a_smaller_cache(directory, on_devices, everything_there):
    path = directory()
    expected = everything_there(path)
    size = on_devices(path, [FakeDevice()], 1)[1]._tiers[0].slot_bytes
    model, runner = on_devices(path, [FakeDevice(memory=3 * size)], 8)
    assert runner.statistics.notes == ["fake:0 was out of memory: its cache holds 2 experts instead of 8."]
    assert torch.equal(outputs(model), expected)
    with pytest.raises(DeviceError, match="has no memory for one expert"):
        on_devices(path, [FakeDevice(memory=size - 1)], 8)


@pytest.mark.slow
def test_budgets_that_do_not_fit_are_refused(directory):
    path = directory()
    model = qm.load(path, dtype=torch.float32)
    gc.collect()  # what other tests left
    before = set(threading.enumerate()), len(list(Path("/proc/self/fd").iterdir()))
    for options, match in (
        ({"devices": [FakeDevice()], "expert_cache": 100}, "expert_cache is 100 bytes on fake:0"),
        ({"devices": [FakeDevice()], "expert_cache": ["1MB", "1MB"]}, "2 sizes for 1 devices"),
        ({"devices": ["banana"]}, "devices has banana; expected GPUs only, such as cuda:0"),
        ({"devices": ["cpu"]}, "devices has cpu; expected GPUs only, such as cuda:0"),
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


@pytest.fixture
def emulated(monkeypatch):
    emulator = pytest.importorskip("emulator", reason="it runs one greenlet a thread", exc_type=ImportError)
    emulator.install(monkeypatch, seed=5)
    monkeypatch.setattr(gather, "WARPS", (1, 2))
    monkeypatch.setattr(windows_product, "WARPS", (1, 2))
    for module in (codec, windows, window_packets):
        monkeypatch.setattr(module, "WARPS", 2)


def layer_of(model, runner, number=0):
    return model.get_submodule(runner._layers[number].experts.layer.experts)


def drawn(tokens, experts=6, slots=2):
    """Hidden states, experts and weights; two pairs have no expert."""
    generator = torch.Generator().manual_seed(tokens)
    index = torch.stack([torch.randperm(experts, generator=generator)[:slots] for _ in range(tokens)])
    index[0, 0], index[-1, -1] = -1, experts
    return torch.randn(tokens, 24, generator=generator), index, torch.rand(tokens, slots, generator=generator)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [*KINDS, "switch_transformers", "switch_transformers of windows"])
@pytest.mark.parametrize("slots", [1, 3, None])
def test_the_kernels_multiply_from_slots_what_the_naive_experts_do(directory, on_devices, emulated, model_type, slots):
    path = directory(model_type)
    plain = qm.load(path, dtype=torch.float32)
    model, runner = on_devices(path, [EmulatedDevice()], slots)
    experts = layer_of(model, runner)
    own, first, (last,) = layer_of(plain, runner), *experts.layer.stages
    for tokens, times in ((2, 2), (7, 1)):
        x, index, weights = drawn(tokens, experts.num_experts, experts.layer.top_k)
        expected = torch.zeros(tokens, 24, dtype=torch.float64)
        for token, k in ((index >= 0) & (index < experts.num_experts)).nonzero().tolist():
            dense = {name: own.dense(int(index[token, k]), name, torch.float64) for name in experts.layer.projections}
            inside = experts.activate([dense[name] @ x[token].double() for name in first])
            expected[token] += weights[token, k] * (dense[last] @ inside)
        sizes = [int((index == expert).sum()) for expert in range(experts.num_experts)]
        for _ in range(times):
            layer = runner._layers[0]
            runner._ram.open(layer)
            y = runner._run_there(runner._tiers[0], layer, x, index, weights, sizes)
            torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
        assert torch.equal(y, own._forward_on_gpu(x, index, weights)), "the bits of a model that is there as a whole"


@pytest.mark.slow
@pytest.mark.parametrize("model_type", KINDS)
def test_many_tokens_of_an_expert_meet_its_decoded_matrix_in_the_slot(
    directory, on_devices, emulated, monkeypatch, model_type
):
    model, runner = on_devices(directory(model_type), [EmulatedDevice()], 3)
    experts, inputs = layer_of(model, runner), drawn(9)
    gathered = experts(*inputs)
    monkeypatch.setattr(experts_twin, "GATHERED_PAIRS", 4)
    monkeypatch.setattr(matmul, "GATHERED_TOKENS", 2)
    monkeypatch.setattr(windows_product, "PRODUCT_TOKENS", 2)
    decoded = []
    for module, name in ((matmul, "decode_packets"), (windows_product, "decode_window_rows")):
        decode = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given, decode=decode: decoded.append(given[1]) or decode(*given))
    torch.testing.assert_close(experts(*inputs), gathered, rtol=1e-4, atol=1e-5 * float(gathered.abs().max()))
    assert decoded


class Operations(TorchDispatchMode):
    """Notes which of torch's operations are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.names.append(str(function))
        return function(*arguments, **(options or {}))


@pytest.mark.slow
@pytest.mark.parametrize("model_type", KINDS)
def test_a_layer_waits_for_the_gpu_once(directory, on_devices, emulated, monkeypatch, model_type):
    """What would wait for a GPU's numbers is asked for once, as the layer begins: which experts there are."""
    model, runner = on_devices(directory(model_type), [EmulatedDevice()], 5)
    experts, inputs = layer_of(model, runner), drawn(3)
    runner._prediction.trust = 0.0
    experts(*inputs)  # codes are checked at the first call, on the CPU
    asked = []
    to_list = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: asked.append(tensor.shape) or to_list(tensor))
    for held in (True, False):
        if not held:
            runner._tiers[0].cache = type(runner._tiers[0].cache)(99, 5)
        asked.clear()
        before = runner.statistics.misses
        with torch.no_grad(), Operations() as seen:
            experts(*inputs)
        assert (runner.statistics.misses > before) is not held
        assert asked == [(2 * experts.num_experts,)], "tokens of each expert, and what the next router says"
        waits = ("nonzero", "_local_scalar_dense", "unique", "bincount", "masked_select", "equal", "item")
        assert "aten.scatter_add_.default" in seen.names
        assert not [name for name in seen.names if any(each in name for each in waits)]


def test_experts_that_the_next_router_names_are_copied_ahead(directory, on_devices, everything_there, monkeypatch):
    path = directory("mixtral")
    expected = everything_there(path)
    model, runner = on_devices(path, [FakeDevice()], 8)
    asked = []
    begin = Runner.begin_layer

    def noting(runner, module, hidden, index):
        sizes = begin(runner, module, hidden, index)
        asked.append(torch.tensor(sizes))
        return sizes

    with monkeypatch.context() as patch:
        patch.setattr(Runner, "begin_layer", noting)
        assert torch.equal(outputs(model), expected)
    layers = len(runner._layers)
    without = runner.statistics.copied_ahead, runner.statistics.misses
    turn = iter(range(len(asked)))

    def right(prediction, layer_index, hidden):
        now = next(turn)
        return asked[now + 1] if layer_index < layers else None

    monkeypatch.setattr(Prediction, "votes", right)
    runner._prediction.trust = 1.0
    most = []
    guess = GpuTier.guess

    kept = []

    def counted(tier, numbers, layer):
        there = [number for number in numbers if tier.there(number)]
        found = guess(tier, numbers, layer)
        assert all(map(tier.there, there)), "one that is likely gave way to another"
        kept.append(len(there))
        most.append(len(tier.guessed))
        return found

    monkeypatch.setattr(GpuTier, "guess", counted)
    assert torch.equal(outputs(model), expected)
    found = runner.statistics
    ahead = found.copied_ahead - without[0]
    assert ahead > 0
    assert found.copied_ahead_hits >= ahead, "each guess was right"
    assert max(most) == 8 // 4
    assert max(kept) > 0
    assert "copied ahead" in "".join(found.lines())
    assert found.misses - without[1] < without[1]


def test_routing_is_decoded_once_a_layer(directory, on_devices, monkeypatch):
    model, runner = on_devices(directory(), [FakeDevice()], 2)
    decoded, routing = [], Causal.routing
    monkeypatch.setattr(Causal, "routing", lambda *given: decoded.append(given) or routing(*given))
    outputs(model)
    assert len(decoded) == runner.statistics.passes * len(runner._layers) > 0


def test_gradients_are_the_cpu_s(directory, on_devices):
    path, gradients = directory(), []
    for model in (qm.load(path, dtype=torch.float32), on_devices(path, [FakeDevice()], 2)[0]):
        weight = model.get_input_embeddings().weight.requires_grad_(True)
        model(input_ids=torch.arange(3, 14)[None]).logits.square().sum().backward()
        gradients.append(weight.grad)
    assert gradients[0].abs().max() > 0
    assert torch.equal(*gradients)


def test_a_long_prompt_goes_in_stretches(directory, on_devices, monkeypatch):
    model, runner = on_devices(directory(), [FakeDevice()], 3)
    experts, inputs = layer_of(model, runner), drawn(9)
    whole = experts(*inputs)
    monkeypatch.setattr("qmoe_lite.models.gpu_dispatch.GPU_BYTES", 4 * 24 * 2 * 4)
    assert len(experts.stretches(inputs[1])) == 3
    assert torch.equal(experts(*inputs), whole)
    none = [part[:0] for part in inputs]
    assert experts(*none).shape == (0, 24)


def test_time_lost_to_copies_is_what_the_devices_say(directory, on_devices, monkeypatch):
    model, runner = on_devices(directory(), [FakeDevice(), FakeDevice("fake:1")], 2)
    outputs(model)
    assert runner.statistics.copy_stall_seconds is None
    assert not any("waited" in line and "copies" in line for line in runner.statistics.lines())
    monkeypatch.setattr(FakeDevice, "waited", lambda device: 1.25)
    outputs(model)
    assert runner.statistics.copy_stall_seconds == 2.5
    assert any("copied to the GPU, which waited 2.50 s for copies" in line for line in runner.statistics.lines())
