"""A layer of experts is one of torch's operations: compiled as a whole, learnt through, and no part of an export."""

from __future__ import annotations

import copy

import pytest
import torch

import qmoe_lite as qm
from qmoe_lite.errors import SettingError

# torch's own, about what it compiles with
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture(scope="module")
def experts(compressed_causal):
    model = qm.load(compressed_causal("qwen3_moe"), dtype=torch.float32)
    return next(module for module in model.modules() if hasattr(module, "run_expert"))


@pytest.fixture
def given(experts):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, experts.layer.shapes["gate_proj"][1], generator=generator)
    index = torch.randint(experts.num_experts, (5, 2), generator=generator)
    return hidden, index, torch.rand(5, 2, generator=generator)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_whole_graph_gives_what_the_layer_gives(experts, given, backend):
    torch.compiler.reset()
    compiled = torch.compile(lambda *given: experts(*given) * 2, backend=backend, fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(*given), experts(*given) * 2)


def test_gradients_pass_around_the_operation(experts, given):
    torch.compiler.reset()

    def gradients(call):
        hidden, index, weights = given[0].clone().requires_grad_(), given[1], given[2].clone().requires_grad_()
        call(hidden, index, weights).square().sum().backward()
        return hidden.grad, weights.grad

    compiled = gradients(torch.compile(experts, backend="aot_eager"))
    for found, expected in zip(compiled, gradients(experts), strict=True):
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)
        assert expected.any()


def test_copies_have_numbers_of_their_own(experts, given):
    twins = [copy.deepcopy(experts), copy.copy(experts)]
    assert len({each.number for each in (experts, *twins)}) == 3
    with torch.no_grad():
        assert torch.equal(torch.compile(twins[0], backend="eager", fullgraph=True)(*given), experts(*given))


@pytest.mark.parametrize("strict", [False, True])
def test_an_export_is_refused_in_words(experts, given, strict):
    with pytest.raises(Exception, match=r"torch\.export cannot hold the experts' kernels") as caught:
        torch.export.export(experts, given, strict=strict)
    assert strict or isinstance(caught.value, SettingError)
