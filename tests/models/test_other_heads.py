"""Compressed models in transformers' other classes, on other devices, under other file names, and dense again."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from checks import changed_copy, layers_of, logits_of
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.integrations import accelerate as placing

import qmoe_lite as qm
from qmoe_lite.checkpoint.format import PARTS, checksum
from qmoe_lite.errors import CheckpointError, DeviceError, SettingError
from qmoe_lite.models.hf import QMoEConfig, QMoEQuantizer
from qmoe_lite.offload import attach, runner_of

IDS = torch.randint(3, 15, (2, 11), generator=torch.Generator().manual_seed(3))
HEADS = [AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification]


def states_of(model):
    """Hidden states of two prompts, from a model with any head."""
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            out = model(input_ids=IDS, decoder_input_ids=IDS, output_hidden_states=True)
            return torch.stack((out.encoder_last_hidden_state, out.decoder_hidden_states[-1]))
        return model.base_model(input_ids=IDS).last_hidden_state


@pytest.fixture
def of_family(request, switch, compressed):
    """Give a function: model type -> (dense directory, compressed directory, transformers class)."""

    def get(model_type):
        if model_type == "switch_transformers":
            return switch, compressed[0], AutoModelForSeq2SeqLM
        make, pack = request.getfixturevalue("causal"), request.getfixturevalue("compressed_causal")
        return make(model_type), pack(model_type), AutoModelForCausalLM

    return get


@pytest.mark.parametrize("auto", HEADS)
@pytest.mark.parametrize(
    "model_type", ["mixtral", *(pytest.param(each, marks=pytest.mark.slow) for each in ("qwen3_moe", "deepseek_v3"))]
)
def test_other_heads_get_the_same_hidden_states(compressed_causal, tmp_path, auto, model_type):
    directory = compressed_causal(model_type)
    expected = states_of(qm.load(directory, dtype=torch.float32))
    model, info = auto.from_pretrained(directory, dtype=torch.float32, num_labels=3, output_loading_info=True)
    assert torch.equal(states_of(model), expected)
    assert set(info["missing_keys"]) <= {"score.weight", "score.bias", "classifier.weight", "classifier.bias"}
    with torch.no_grad():
        out = model(input_ids=IDS)
    if auto is not AutoModel:
        head = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        assert head
        assert all(name.startswith(("score.", "classifier.")) for name in head)
        assert out.logits.shape[-1] == 3
    model.save_pretrained(tmp_path / "again")
    for again in (auto.from_pretrained(tmp_path / "again"), qm.load(tmp_path / "again")):
        assert type(again) is type(model)
        with torch.no_grad():
            assert torch.equal(again(input_ids=IDS)[0], out[0])
    assert [finding for finding in qm.verify(tmp_path / "again") if finding.severity == "error"] == []
    with pytest.raises(CheckpointError, match=r"lacks the tensor lm_head\.weight"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "again")


def test_a_switch_without_its_head(compressed, tmp_path):
    expected = states_of(qm.load(compressed[0]))
    model = AutoModel.from_pretrained(compressed[0])
    assert torch.equal(states_of(model), expected)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(states_of(qm.load(tmp_path / "again")), expected)
    assert [finding for finding in qm.verify(tmp_path / "again") if finding.severity == "error"] == []


def test_a_model_of_pictures_without_its_head(tmp_path, tokenizer):
    source = tiny.make_with_pictures(tmp_path / "m", tokenizer, "qwen3_vl_moe")
    qm.compress(source, tmp_path / "out", recipe="nearest")
    expected = states_of(qm.load(tmp_path / "out", dtype=torch.float32))
    model = AutoModel.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(states_of(model), expected)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(states_of(qm.load(tmp_path / "again")), expected)


def test_experts_of_a_model_without_its_head_may_have_a_budget(compressed_causal):
    model = AutoModel.from_pretrained(compressed_causal("qwen3_moe"))
    expected = states_of(model)
    attach(model, ram_cache="100KB", remember=False)
    try:
        assert torch.equal(states_of(model), expected)
        with pytest.raises(SettingError, match=r"experts have a runner\. Close it first"):
            model.dequantize()
    finally:
        runner_of(model).close()


def test_a_missing_tensor_is_found_whatever_the_head(compressed_causal, tmp_path):
    path = changed_copy(compressed_causal("mixtral"), tmp_path / "less")
    index = json.loads((path / "model.safetensors.index.json").read_text())
    del index["weight_map"]["model.norm.weight"]
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    for auto in HEADS:
        with pytest.raises(CheckpointError, match=r"lacks the tensor (model\.)?norm\.weight"):
            auto.from_pretrained(path)


@pytest.mark.parametrize(
    "model_type",
    [
        "switch_transformers",
        "gpt_oss",
        *(pytest.param(each, marks=pytest.mark.slow) for each in ("mixtral", "nemotron_h", "llama4_text")),
    ],
)
def test_a_dequantized_model_is_an_ordinary_one(of_family, tmp_path, model_type):
    source, directory, auto = of_family(model_type)
    model, before = qm.load(directory, dtype=torch.float32), qm.load(directory, dtype=torch.float32)
    expected = logits_of(before)
    dense = model.dequantize()
    assert dense is model
    assert not layers_of(dense)
    assert (logits_of(dense) - expected).abs().max() <= 1e-4 * expected.abs().max()
    filled = auto.from_pretrained(source, dtype=torch.float32)
    tiny.fill_dense(filled, before, layers_of(before))
    state, known = dense.state_dict(), filled.state_dict()
    assert state.keys() == known.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in known.items())
    assert [type(module) for module in dense.modules()] == [type(module) for module in filled.modules()]
    dense.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    again = auto.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    again.set_experts_implementation(dense.config._experts_implementation)
    assert torch.equal(logits_of(again), logits_of(dense))
    assert all(parameter.requires_grad for parameter in dense.parameters())
    with pytest.raises(ValueError, match="need to first quantize"):
        dense.dequantize()


def test_a_model_is_dequantized_to_another_dtype(compressed_causal):
    model = qm.load(compressed_causal("qwen3_moe"), dtype=torch.float32).dequantize(torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert logits_of(model).dtype == torch.bfloat16


@pytest.mark.slow
def test_a_dequantized_model_is_loaded_without_us(forks, compressed_causal, tmp_path):
    qm.load(compressed_causal("mixtral")).dequantize().save_pretrained(tmp_path / "dense")
    code = """
import sys
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(type(model.model.layers[0].mlp.experts).__name__, "qmoe_lite" in sys.modules)
"""
    done = forks.run(code, tmp_path / "dense")
    assert done.stdout.split() == ["MixtralExperts", "False"], done.stderr


@pytest.mark.parametrize("size", ["20KB", "1GB"])
def test_a_variant_is_saved_and_loaded(compressed_causal, tmp_path, size):
    directory, path = compressed_causal("mixtral"), tmp_path / "variant"
    model = AutoModelForCausalLM.from_pretrained(directory)
    expected = logits_of(model)
    model.save_pretrained(path, variant="fp16", max_shard_size=size)
    assert all("fp16" in file.name for file in path.glob("*.safetensors*"))
    again = AutoModelForCausalLM.from_pretrained(path, variant="fp16")
    assert torch.equal(logits_of(again), expected)
    with attached(again):
        assert torch.equal(logits_of(again), expected)
    with pytest.raises(CheckpointError, match=r"no weights: .* the variant fp16: from_pretrained\(.., variant='fp16'"):
        qm.load(path)


class attached:
    """A model whose experts have a budget."""

    def __init__(self, model):
        self.model = model

    def __enter__(self):
        attach(self.model, ram_cache="100KB", remember=False)

    def __exit__(self, *error):
        runner_of(self.model).close()


def test_a_variant_is_read_beside_other_weights(compressed_causal, tmp_path):
    """Its experts are its own, also where they are read from disk as they are needed."""
    path = changed_copy(compressed_causal("mixtral"), tmp_path / "both")
    other = AutoModelForCausalLM.from_pretrained(path)
    layer = other.get_submodule(layers_of(other)[0])
    parts = {part: layer.get_buffer(f"gate_proj_{part}").clone() for part in PARTS}
    layer.fill("gate_proj", {**parts, "levels": 2 * parts["levels"]})
    stack = layer.stack("gate_proj")
    spans = (stack.span(expert) for expert in range(layer.num_experts))
    matrices = (stack.matrix(i, parts["codes"][start : start + used]) for i, (start, used) in enumerate(spans))
    layer.get_buffer("gate_proj_checksums").copy_(torch.tensor([checksum(matrix) for matrix in matrices]))
    expected = logits_of(other)
    other.save_pretrained(path, variant="loud")
    found = AutoModelForCausalLM.from_pretrained(path, variant="loud")
    assert torch.equal(logits_of(found), expected)
    with attached(found):
        assert torch.equal(logits_of(found), expected)
    assert not torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(path)), expected)


@pytest.mark.parametrize("place", ["auto", "balanced", "balanced_low_0", "sequential"])
def test_device_maps_that_transformers_resolves(compressed_causal, monkeypatch, place):
    """To the CPU where there is no GPU; to one GPU, or to several, where they have room; not to a part on each."""
    directory = compressed_causal("mixtral")
    if not torch.cuda.is_available():
        model = AutoModelForCausalLM.from_pretrained(directory, device_map=place)
        assert {tensor.device.type for tensor in model.state_dict().values()} == {"cpu"}
        assert torch.equal(logits_of(model), logits_of(qm.load(directory)))
    settings = json.loads((directory / "config.json").read_text())["quantization_config"]
    config = AutoConfig.from_pretrained(directory)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)

    def resolved(memory):
        quantizer = QMoEQuantizer(QMoEConfig(**settings))
        quantizer.validate_environment(device_map=place)
        monkeypatch.setattr(placing, "get_max_memory", lambda _: dict(memory))
        return set(placing._get_device_map(empty, place, None, quantizer).values())

    assert resolved({0: 10**9, "cpu": 10**9}) == {0}
    assert resolved({0: 60_000, 1: 10**9, "cpu": 10**9}) == {0, 1}
    with pytest.raises(DeviceError, match=f"device_map='{place}' leaves a part of the model on the CPU or on disk"):
        resolved({0: 60_000, "cpu": 10**9})
