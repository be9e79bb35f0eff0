"""PackedExperts where its buffers are on a GPU: the emulator runs what the CPU's forward gives."""

from __future__ import annotations

import shutil

import pytest
import torch

pytest.importorskip("greenlet", reason="the emulator runs one greenlet a thread; pip install 'qmoe-lite[dev]'")

import emulator
from checks import recode_in_windows

import qmoe_lite as qm
from qmoe_lite.cuda import codec, gather, matmul, packets, window_packets, windows, windows_product
from qmoe_lite.cuda import experts as experts_twin
from qmoe_lite.cuda import launch as launcher
from qmoe_lite.errors import FormatError, SettingError
from qmoe_lite.models import gpu_dispatch
from qmoe_lite.models.experts import PackedExperts


@pytest.fixture
def emulated(monkeypatch):
    emulator.install(monkeypatch, seed=3)
    monkeypatch.setattr(gather, "WARPS", (1, 2))
    monkeypatch.setattr(windows_product, "WARPS", (1, 2))
    for module in (codec, windows, window_packets):
        monkeypatch.setattr(module, "WARPS", 2)


@pytest.fixture(params=["switch", "causal", "switch of windows", "causal of windows"])
def experts(request, compressed, compressed_causal, in_windows):
    directory = compressed[0] if "switch" in request.param else compressed_causal("qwen3_moe")
    if "windows" in request.param:
        directory = in_windows("switch_transformers" if "switch" in request.param else "qwen3_moe")
    model = qm.load(directory, dtype=torch.float32)
    return next(module for module in model.modules() if isinstance(module, PackedExperts))


def drawn(experts, tokens):
    """Hidden states, experts and weights; one pair has no expert."""
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, experts.layer.shapes[experts.layer.projections[0]][1], generator=generator)
    slots = experts.layer.top_k
    index = torch.rand(tokens, experts.num_experts, generator=generator).argsort(1)[:, :slots]
    index[:1, :1] = -1
    return hidden, index, torch.rand(tokens, slots, generator=generator)


def on_the_cpu(experts, hidden, index, weights):
    out = torch.zeros_like(hidden)
    for token in range(len(hidden)):
        for slot, expert in enumerate(index[token].tolist()):
            if expert >= 0:
                out[token] += weights[token, slot] * experts.run_expert(expert, hidden[token])
    return out


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 3])
def test_the_gpu_s_forward_is_the_cpu_s(emulated, experts, tokens):
    inputs = drawn(experts, tokens)
    expected = on_the_cpu(experts, *inputs)
    found = experts._forward_on_gpu(*inputs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()) + 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("reason", ["many pairs", "many tokens", "stretches", "a wide layer", "no tokens"])
def test_any_way_through_the_experts_gives_the_same(emulated, monkeypatch, experts, reason):
    hidden, index, weights = drawn(experts, 0 if reason == "no tokens" else 3)
    expected = on_the_cpu(experts, hidden, index, weights)
    decoded = []
    for module, name in ((matmul, "decode_packets"), (windows_product, "decode_window_rows")):
        decode = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given, decode=decode: decoded.append(given[1]) or decode(*given))
    if reason in ("many pairs", "many tokens"):
        monkeypatch.setattr(experts_twin, "GATHERED_PAIRS", 1)
        monkeypatch.setattr(matmul, "GATHERED_TOKENS", 1 if reason == "many pairs" else 0)
        monkeypatch.setattr(windows_product, "PRODUCT_TOKENS", 1 if reason == "many pairs" else 0)
    elif reason == "stretches":
        monkeypatch.setattr(gpu_dispatch, "GPU_BYTES", 1)
        assert len(experts.stretches(index)) == 3
    elif reason == "a wide layer":
        monkeypatch.setattr(experts_twin, "choose_variant", lambda *_: None)
        monkeypatch.setattr(experts_twin, "choose_window_variant", lambda *_: None)
    found = experts._forward_on_gpu(hidden, index, weights)
    torch.testing.assert_close(
        found, expected, rtol=1e-4, atol=1e-5 * max(expected.abs().flatten().tolist(), default=0) + 1e-6
    )
    known = index[index >= 0]
    if reason in ("many tokens", "a wide layer"):
        assert set(decoded) == set(known.tolist())
    else:
        sizes = known.bincount(minlength=experts.num_experts) if reason == "many pairs" else torch.zeros(1)
        assert set(decoded) == set((sizes > 1).nonzero().flatten().tolist())


@pytest.mark.slow
def test_few_tokens_take_two_launches_however_many_experts(emulated, monkeypatch, experts):
    launched = []
    launch = launcher.Kernel.launch
    monkeypatch.setattr(
        launcher.Kernel, "launch", lambda kernel, *g, **k: launched.append(kernel) or launch(kernel, *g, **k)
    )
    inputs = drawn(experts, 3)
    experts._forward_on_gpu(*inputs)
    launched.clear()
    experts._forward_on_gpu(*inputs)
    assert len(launched) == 2


@pytest.mark.slow
def test_a_pair_s_bits_do_not_depend_on_the_others(emulated, monkeypatch, experts):
    """Tokens one by one, or all in groups of four, some experts in a turn of their own."""
    hidden, index, weights = drawn(experts, 9)
    whole = experts._forward_on_gpu(hidden, index, weights)
    alone = [experts._forward_on_gpu(*(part[i : i + 1] for part in (hidden, index, weights))) for i in range(9)]
    assert torch.equal(torch.cat(alone), whole)
    packets_of = {name: experts._packets(name) for name in experts.layer.projections}
    call = experts.begin_call(packets_of, hidden, index, weights)
    sizes = [int((index == expert).sum()) for expert in range(experts.num_experts)]
    for expert in reversed(range(experts.num_experts)):
        call.turn({expert: expert} if sizes[expert] else {}, sizes, experts.activate)
    assert torch.equal(call.total(), whole)


def test_gate_and_up_with_column_scales_of_their_own(emulated, compressed_causal, tmp_path):
    directory = recode_in_windows(shutil.copytree(compressed_causal("qwen3_moe"), tmp_path / "windows"), shares=False)
    experts = next(m for m in qm.load(directory, dtype=torch.float32).modules() if isinstance(m, PackedExperts))
    inputs = drawn(experts, 3)
    expected = on_the_cpu(experts, *inputs)
    found = experts._forward_on_gpu(*inputs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()) + 1e-6)


@pytest.mark.slow
def test_an_activation_that_the_kernel_lacks_is_torch_s(emulated, experts):
    hidden, index, weights = drawn(experts, 2)
    experts.activation = torch.nn.Tanh()
    expected = on_the_cpu(experts, hidden, index, weights)
    found = experts._forward_on_gpu(hidden, index, weights)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()) + 1e-6)


@pytest.mark.slow
def test_packets_are_made_once_and_anew_after_a_move(emulated, monkeypatch, experts):
    inputs = drawn(experts, 1)
    first = experts._forward_on_gpu(*inputs)
    made = packets.stack_packets, window_packets.stack_window_packets
    monkeypatch.setattr(packets, "stack_packets", None)
    monkeypatch.setattr(window_packets, "stack_window_packets", None)
    assert torch.equal(experts._forward_on_gpu(*inputs), first)
    monkeypatch.setattr(packets, "stack_packets", made[0])
    monkeypatch.setattr(window_packets, "stack_window_packets", made[1])
    kept = dict(experts._packets_of)
    experts.to("cpu")
    assert torch.equal(experts._forward_on_gpu(*inputs), first)
    assert all(experts._packets_of[name] is not kept[name] for name in kept)


def test_a_projection_on_a_gpu_is_checked_as_a_whole(experts):
    projection = experts.layer.projections[0]
    on_gpu = dict(enumerate(experts.stack(projection).checked_on_device()))
    assert len(on_gpu) == experts.num_experts
    experts._forget()
    for expert, packed in on_gpu.items():
        known = experts.packed(expert, projection)
        assert packed._validated
        assert torch.equal(packed.codes, known.codes)
        assert torch.equal(packed.dense(), known.dense())
    experts.get_buffer(f"{projection}_checksums")[-1] ^= 1
    with pytest.raises(FormatError, match="damaged"):
        experts.stack(projection).checked_on_device()


def test_hidden_states_elsewhere_are_refused_in_one_line(experts):
    hidden, index, weights = drawn(experts, 2)
    with pytest.raises(SettingError, match="hidden_states is on meta, the experts on cpu"):
        experts(hidden.to("meta"), index, weights)
