"""Blocks run one by one over all samples: what the whole model computes, for every family and its odd settings."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from qmoe_lite.compression.block_runner import BlockRunner
from qmoe_lite.compression.settings import Settings
from qmoe_lite.models.building import read_config, skeleton
from qmoe_lite.models.family import inner
from qmoe_lite.models.skeletons import check_dense, check_promise, open_checkpoint

YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.7,
    "mscale_all_dim": 1.0,
    "rope_theta": 10000.0,
}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}


def biases_of(checkpoint, layer, expert):
    """Return what gpt_oss adds to gate's, up's and down's outputs; zeros for any other family."""
    name = f"{layer.experts}.gate_up_proj_bias"
    if name not in checkpoint:
        return [torch.zeros(rows) for rows, _ in layer.shapes.values()]
    both = checkpoint.tensor(name)[expert]
    return [both[0::2], both[1::2], checkpoint.tensor(f"{layer.experts}.down_proj_bias")[expert]]


def routed(layer, x, *routing):
    """Return what a layer's experts are given; Llama 4's are each given all tokens, which are zero but for one's."""
    if routing:
        return x, *routing
    of_expert = x.view(layer.count, -1, x.shape[-1])
    index = of_expert.abs().sum(-1).argmax(0)[:, None]
    return of_expert.sum(0), index, torch.ones(index.shape)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        *((model_type, {}) for model_type in sorted(tiny.CAUSAL | tiny.MORE)),
        ("qwen3_moe", {"mlp_only_layers": [], "decoder_sparse_step": 2}),
        ("qwen3_moe", {"rope_parameters": DYNAMIC, "max_position_embeddings": 16}),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
        ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
        ("mixtral", {"sliding_window": 7}),
        ("deepseek_v2", {"rope_parameters": YARN, "topk_method": "group_limited_greedy", "routed_scaling_factor": 3.0}),
        ("deepseek_v3", {"rope_parameters": YARN, "first_k_dense_replace": 0}),
        ("deepseek_v3", {"routed_scaling_factor": 2.5, "norm_topk_prob": False, "first_k_dense_replace": 2}),
        ("minimax_m2", {"rotary_dim": 4}),
        ("olmoe", {"clip_qkv": 0.05}),
    ],
)
def test_experts_see_what_they_see_in_the_whole_model(tmp_path, tokenizer, model_type, changes):
    directory = tiny.make_causal(tmp_path / "m", tokenizer, model_type, **changes)
    whole = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    family, checkpoint = open_checkpoint(directory)
    config = read_config(str(directory))
    model = skeleton(family, config, torch.float32)
    layers = check_promise(family, config, checkpoint)
    check_dense(family, model, checkpoint)
    tokens = np.random.default_rng(0).integers(3, 15, (12, 40))
    seen = {}
    for layer in layers:
        module = whole.get_submodule(layer.experts)
        module.register_forward_pre_hook(lambda _, args, name=layer.experts: seen.__setitem__(name, args))
    with torch.no_grad():
        expected = whole.model(input_ids=torch.from_numpy(tokens), use_cache=False).last_hidden_state
    activation = family.activation(config)
    stack = family.stacks(config)[0]
    with torch.inference_mode():
        family.load_outside_blocks(model, checkpoint, torch.float32)
        runner = BlockRunner(model, family, checkpoint, layers, Settings(batch_size=5))
        hidden = runner.buffer(tokens.shape)
        calls = runner.enter(stack, tokens, None, hidden, 0)
        for number in range(len(stack.blocks)):
            caught = runner.run(stack, number, hidden, None, calls)
            if caught is None:
                continue
            layer = next(layer for layer in layers if layer.block == stack.blocks[number])
            inputs, assigned = caught.inputs, caught.assigned
            x, index, weights = routed(layer, *seen[layer.experts])
            assert (inputs.rows - x).abs().max() <= 1e-5 * x.abs().max()
            for expert in range(layer.count):
                rows, gates = assigned.of_expert(expert)
                chosen = index == expert
                assert torch.equal(rows, chosen.any(-1).nonzero()[:, 0])
                assert torch.allclose(gates, weights[chosen].float(), atol=1e-6)
                matrices = [checkpoint.tensor(family.weight_name(layer, expert, p)) for p in layer.projections]
                biases = biases_of(checkpoint, layer, expert)
                before = zip(matrices[:-1], biases[:-1], strict=True)
                first = inner(activation, [inputs.rows[rows] @ matrix.T + bias for matrix, bias in before])
                caught.outputs.add(rows, (first @ matrices[-1].T + biases[-1]) * gates[:, None])
            caught.finish()
        runner.leave(stack, hidden)
    assert (hidden.read(slice(0, 12)) - expected).abs().max() <= 1e-5 * expected.abs().max()
