"""Layers of experts from codes of windows on a GPU: grouped launches, slots of the expert cache, strings of 32 digits.

A failure shows the seed; QMOE_TEST_SEED repeats it. Needs no conftest.
"""

from __future__ import annotations

import functools
import os
import random
import sys

import numpy as np
import pytest
import torch
from checks import draw_windows, recode_in_windows, window_book
from torch.nn import functional
from transformers import AutoConfig

import qmoe_lite as qm
from qmoe_lite.checkpoint.format import pack_experts
from qmoe_lite.cuda import launch, windows
from qmoe_lite.cuda.window_packets import matrix_packets
from qmoe_lite.models.experts import PackedExperts
from qmoe_lite.models.family import family_of
from qmoe_lite.offload.runner import attach

if not launch.available():
    pytest.skip(f"needs a GPU: {launch.reason()}", allow_module_level=True)

DEVICE = torch.device("cuda", 0)
SEED = int(os.environ.get("QMOE_TEST_SEED", random.SystemRandom().getrandbits(31)))
OUTSIDE, INSIDE, EXPERTS, SLOTS = 520, 264, 8, 3
# digits of the longest strings of gate, up and down projection
CODES = {"8 digits": (8, 8, 8), "32 digits": (32, 32, 32), "each its own": (8, 32, 8)}
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2**-7, torch.float16: 2**-9}  # of x, of what is kept of it and of y
FLOAT32 = 1e-5  # error of a float32 sum, over the sum of its terms' sizes


@pytest.fixture(autouse=True)
def seeded():
    sys.stderr.write(f"QMOE_TEST_SEED={SEED}\n")
    torch.manual_seed(SEED)
    yield
    torch.cuda.synchronize()  # an error of this test shows here, not in the next


@functools.cache
def layer(codes):
    """A layer's module as a loaded model has it, on the GPU, and its weights in float64, projection by projection."""
    rng = np.random.default_rng(SEED)
    sizes = {"hidden_size": OUTSIDE, "moe_intermediate_size": INSIDE, "num_experts": EXPERTS, "num_hidden_layers": 1}
    sparse = {"mlp_only_layers": [], "decoder_sparse_step": 1, "num_experts_per_tok": SLOTS}
    config, family = AutoConfig.for_model("qwen3_moe", hidden_act="silu", **sizes, **sparse), family_of("qwen3_moe")
    place = family.layers(config)[0]
    books = dict(zip(place.projections, map(window_book, CODES[codes]), strict=True))
    experts, dense, scales = PackedExperts(family, place, books, config), {}, {}
    for name, book in books.items():
        first = place.first_of_stage(name)
        own = [draw_windows(rng, book, place.shapes[name], scales.get((first, e))) for e in range(EXPERTS)]
        scales |= {(name, e): packed.column_scales for e, packed in enumerate(own)}
        experts.fill(name, pack_experts(own, shares_scales=first != name))
        dense[name] = [packed.dense().double() for packed in own]
    return experts.to(DEVICE), dense


def drawn(tokens, dtype=torch.float32):
    """Activations, experts and weights; some pairs have no expert."""
    index = torch.rand(tokens, EXPERTS).argsort(1)[:, :SLOTS]
    index[0, 0] = -1
    return (torch.randn(tokens, OUTSIDE) / 8).to(dtype), index, torch.rand(tokens, SLOTS)


def on_gpu(*tensors):
    return tuple(tensor.to(DEVICE) for tensor in tensors)


def assert_layer(y, dense, x, index, weights):
    """Compare with each token through each of its experts in float64."""
    gate, up, down = dense.values()
    out, sizes = (torch.zeros(len(x), OUTSIDE, dtype=torch.float64) for _ in range(2))
    x64 = x.double()
    for token, slot in (index >= 0).nonzero().tolist():
        e = int(index[token, slot])
        inside = functional.silu(gate[e] @ x64[token]) * (up[e] @ x64[token])
        largest = (gate[e].abs() @ x64[token].abs()) * (up[e].abs() @ x64[token].abs())
        out[token] += weights[token, slot] * (down[e] @ inside)
        sizes[token] += weights[token, slot] * (down[e].abs() @ largest)
    bound = (2 * FLOAT32 + 2 * ROUNDING[x.dtype]) * sizes + ROUNDING[x.dtype] * out.abs() + 1e-30
    worst = ((y.double().cpu() - out).abs() / bound).max().item()
    assert worst <= 1, f"{worst:.2f} times the bound"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [1, 5, 40, 90])
@pytest.mark.parametrize("codes", CODES)
def test_a_layer_is_the_dense_one(codes, tokens, dtype):
    """Few tokens in two launches, 90 with some experts decoded."""
    experts, dense = layer(codes)
    given = drawn(tokens, dtype)
    with torch.no_grad():
        y = experts(*on_gpu(*given))
    assert y.dtype == dtype
    assert_layer(y, dense, *given)


@pytest.mark.parametrize("codes", CODES)
def test_few_tokens_take_two_launches_and_a_token_s_bits_are_its_own(codes, monkeypatch):
    experts, _ = layer(codes)
    given = on_gpu(*drawn(24, torch.bfloat16))
    launched, made = [], launch.Kernel.launch

    def noted(kernel, *arguments, **more):
        launched.append(kernel)
        made(kernel, *arguments, **more)

    with torch.no_grad():
        whole = experts(*given)
        alone = [experts(*(part[i : i + 1] for part in given)) for i in range(24)]
        monkeypatch.setattr(launch.Kernel, "launch", noted)
        again = experts(*given)
    assert torch.equal(torch.cat(alone), whole)
    assert torch.equal(again, whole)
    assert len(launched) == 2


def test_an_expert_s_turn_does_not_change_the_bits():
    experts, _ = layer("each its own")
    x, index, weights = on_gpu(*drawn(24))
    with torch.no_grad():
        whole = experts(x, index, weights)
    packets = {name: experts._packets(name) for name in experts.layer.projections}
    call = experts.begin_call(packets, x, index, weights)
    sizes = [int((index == expert).sum()) for expert in range(EXPERTS)]
    for expert in reversed([expert for expert, size in enumerate(sizes) if size]):
        call.turn({expert: expert}, sizes, experts.activate)
    assert torch.equal(call.total(), whole)


def test_a_layer_can_be_captured_in_a_graph_and_routed_anew():
    experts, dense = layer("8 digits")
    given = on_gpu(*drawn(4))
    with torch.no_grad():
        experts(*given)  # compiled before
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            experts(*given)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = experts(*given)
    for _ in range(3):
        anew = drawn(4)
        for part, other in zip(given, anew, strict=True):
            part.copy_(other)
        graph.replay()
        torch.cuda.synchronize()
        assert_layer(y, dense, *anew)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (7, 63), (70, 9), (130, 4096)], ids=str)
def test_strings_of_32_digits_are_decoded_and_multiplied(shape, dtype):
    packed = draw_windows(np.random.default_rng(SEED), window_book(32), shape)
    there, dense = packed.to(DEVICE), packed.dense().double()
    assert torch.equal(windows.decode_weights(matrix_packets(there)).cpu(), packed.dense())
    for tokens in (1, 2, 5, 20):
        x = torch.randn(tokens, shape[1]).to(dtype)
        y = qm.decode_matmul(there, x.to(DEVICE)).double().cpu()
        sizes = x.double().abs() @ dense.abs().T
        assert ((y - x.double() @ dense.T).abs() <= (FLOAT32 + 2 * ROUNDING[dtype]) * sizes + 1e-30).all()


SMALL_MODEL = {
    **{"hidden_size": 264, "moe_intermediate_size": 136, "num_experts": 8, "num_experts_per_tok": 3},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "tie_word_embeddings": False},
}


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory):
    """A model of two layers of 8 experts, in codes of windows."""
    from qmoe_lite.bench._parts.offload import make_models

    path = tmp_path_factory.mktemp("model")
    make_models(path / "models", SMALL_MODEL, 2, 96, seed=0)
    return recode_in_windows(path / "models" / "packed", SEED)


def generated(model, where, tokens=(3, 40, 1)):
    """Logits of prompts, then of eight tokens that each was the likeliest."""
    ids = torch.randint(0, 96, (1, sum(tokens)), generator=torch.Generator().manual_seed(1)).to(where)
    found = []
    with torch.no_grad():
        for part in ids.split(tokens, 1):
            found.append(model(input_ids=part).logits[0])
        for _ in range(8):
            found.append(model(input_ids=found[-1][-1:].argmax(1)[None]).logits[0])
    return torch.cat(found)


@pytest.mark.parametrize("slots", [1, 4, 16])
def test_experts_from_slots_give_the_bits_of_a_model_that_is_there(model_directory, slots):
    """4 of 16 experts have a slot: a quarter of the memory, the same tokens bit for bit."""
    expected = generated(qm.load(model_directory, device="cuda"), DEVICE)
    model = qm.load(model_directory, device="cpu")
    probe = attach(model, devices=["cuda:0"], remember=False)
    size = probe.statistics.cache_bytes
    probe.close()
    runner = attach(model, devices=["cuda:0"], expert_cache=size // 16 * slots, remember=False)
    model.to(DEVICE)
    for _ in range(2):
        assert torch.equal(generated(model, DEVICE), expected)
    found = runner.statistics
    assert found.cache_bytes == size // 16 * slots
    assert found.misses > 0
    assert found.copied_bytes > 0
    runner.close()
