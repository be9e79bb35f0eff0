"""Each family: what its model computes, what its files hold, and that only its experts are touched."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from checks import Killed, bytes_of, changed_copy
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import qmoe_lite as qm
from qmoe_lite import models
from qmoe_lite.compression.calibration import make_samples, read_tokens
from qmoe_lite.compression.documents import read_text
from qmoe_lite.compression.losses import head_products
from qmoe_lite.compression.opening import opened
from qmoe_lite.errors import CheckpointError, SettingError, UnsupportedFamilyError
from qmoe_lite.models.architecture import Joint
from qmoe_lite.models.blocks import Layout, recorded_calls
from qmoe_lite.models.building import skeleton
from qmoe_lite.models.causal import Causal
from qmoe_lite.models.family import FAMILIES, family_of, inner
from qmoe_lite.models.skeletons import open_checkpoint, unused

TERNARY = qm.MinMaxTernary(torch.bfloat16)
SMALL = {"samples": 24, "sequence_length": 32, "validation_samples": 2, "codeword_bits": 10, "grid": TERNARY}
SMALL |= {"tune": "none"}


def names_in(directory) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(directory.glob("*.safetensors")) for k, v in load_file(file).items()}


def test_every_causal_family_is_tested():
    assert {name for name, family in FAMILIES.items() if not family.seq2seq} == set(
        tiny.CAUSAL | tiny.MORE | tiny.WITH_PICTURES
    )


def test_the_readme_names_each_family_by_how_it_is_tested():
    table = (Path(models.__file__).parent / "README.md").read_text().split("| tested on |")[1].split("\n\n")[0]
    rows = {cells[1]: cells[2].split(", ") for line in table.splitlines()[2:] if (cells := re.split(r" ?\| ?", line))}
    named = dict(zip(("CAUSAL", "MORE", "WITH_PICTURES"), rows.values(), strict=True))
    assert all(f"`{name}`" in row for name, row in zip(named, rows, strict=True))
    assert named.pop("CAUSAL") == sorted([*tiny.CAUSAL, "switch_transformers"])
    assert named == {name: sorted(getattr(tiny, name)) for name in named}


@pytest.mark.parametrize("model_type", sorted(tiny.CAUSAL | tiny.MORE))
def test_logits_are_made_where_the_head_is(causal, model_type):
    found = opened(causal(model_type), auto=False)
    found.family.load_outside_blocks(found.model, found.checkpoint, torch.float32)
    weight, finish = found.family.head(found.model, found.checkpoint)
    logits = finish(head_products(torch.ones(5, weight.shape[1]), weight.to("meta")))  # refuses what is elsewhere
    assert logits.is_meta
    assert logits.shape == (5, len(weight))


def test_another_type_is_refused_by_name_and_taken_by_auto(tmp_path, causal, monkeypatch):
    source = causal("qwen3_moe")
    monkeypatch.delitem(FAMILIES, "qwen3_moe")
    with pytest.raises(
        UnsupportedFamilyError, match=r"qwen3_moe is not supported; supported: .*closest: qwen.*--family auto"
    ):
        qm.compress(source, tmp_path / "out", recipe="nearest")
    with pytest.raises(SettingError, match="family qwen2_moe is unknown"):
        qm.compress(source, tmp_path / "out", recipe="nearest", family="qwen2_moe")
    qm.compress(source, tmp_path / "out", recipe="nearest", family="auto")
    assert qm.load(tmp_path / "out").config.model_type == "qwen3_moe"
    assert qm.verify(tmp_path / "out") == []


@pytest.mark.parametrize("wrong", ["layout", "activation", "hidden"])
def test_auto_refuses_a_type_whose_first_blocks_differ(tmp_path, causal, monkeypatch, wrong):
    source = causal("gpt_oss")
    monkeypatch.delitem(FAMILIES, "gpt_oss")
    if wrong == "layout":  # up's rows taken for gate's
        place = Layout.place
        swapped = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
        monkeypatch.setattr(Layout, "place", lambda self, name, rows: place(self, swapped.get(name, name), rows))
    elif wrong == "activation":
        monkeypatch.setattr(Joint, "join", lambda self, outputs: torch.relu(outputs[0]) * outputs[1])
    else:
        through = Causal.through
        monkeypatch.setattr(Causal, "through", lambda *args: (lambda out: (out[0] * 1.01, out[1]))(through(*args)))
    with pytest.raises(UnsupportedFamilyError, match="gpt_oss is not supported: run block by block"):
        qm.compress(source, tmp_path / "out", recipe="nearest", family="auto")


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("deepseek_v4", "deepseek_v4 is not supported: its hidden states are several streams"),
        (
            "openai_privacy_filter",
            "openai_privacy_filter is not supported: transformers has no model of it that writes",
        ),
    ],
)
def test_a_type_that_cannot_be_read_off_is_refused_in_one_true_line(tmp_path, causal, model_type, reason):
    path = changed_copy(causal("mixtral"), tmp_path / "m")
    AutoConfig.for_model(model_type).save_pretrained(path)
    with pytest.raises(UnsupportedFamilyError, match=reason):
        qm.compress(path, tmp_path / "out", recipe="nearest", family="auto")


def test_experts_that_transformers_does_not_declare_are_refused_by_name(tmp_path, tokenizer):
    sizes = {"num_local_experts": 4, "intermediate_size": 20, "kv_channels": 8}
    config = AutoConfig.for_model("jetmoe", vocab_size=len(tokenizer), **tiny.TEXT, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "m")
    with pytest.raises(UnsupportedFamilyError, match="JetMoeParallelExperts is not of transformers' common interface"):
        qm.compress(tmp_path / "m", tmp_path / "out", recipe="nearest", family="auto")


def test_llama_4_with_several_experts_a_token_is_refused(tmp_path, causal):
    """Their inputs are scaled one by one; no published model has them."""
    path = changed_copy(causal("llama4_text"), tmp_path / "m", num_experts_per_tok=2)
    with pytest.raises(UnsupportedFamilyError, match="gives a token to 2 experts, each scaled; supported is one"):
        qm.compress(path, tmp_path / "out", recipe="nearest")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("mixtral", {}),
        ("qwen3_moe", {}),
        # windows that differ from block to block: every block must be run with its own mask
        ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    ],
)
def test_digits_are_those_of_gptq_on_the_whole_models_activations(tmp_path, tokenizer, text_file, model_type, changes):
    source = tiny.make_causal(tmp_path / "m", tokenizer, model_type, **changes)
    qm.compress(source, tmp_path / "out", calibration=text_file, token_cap=1e9, blend_tokens=0, batch_size=7, **SMALL)
    packed = qm.load(tmp_path / "out", dtype=torch.float32)
    tokens = read_tokens(read_text(text_file), tokenizer, 26 * 32)
    main = tokens[: len(tokens) - 2 * 32]
    samples = make_samples(main, tokenizer, seq2seq=False, count=24, sequence_length=32, seed=0)
    grid = qm.MinMaxTernary(level_dtype=torch.bfloat16)
    before: list[str] = []
    for layer in family_of(model_type).layers(packed.config):
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        tiny.fill_dense(model, packed, before)
        caught = []
        model.get_submodule(layer.experts).register_forward_pre_hook(lambda _, args, caught=caught: caught.append(args))
        with torch.no_grad():
            model(torch.from_numpy(samples.input_ids))
        hidden, index, _ = caught[0]
        module, dense = packed.get_submodule(layer.experts), model.get_submodule(layer.experts)
        for e in range(layer.count):
            x = hidden[(index == e).any(-1)]
            gate, up = dense.gate_up_proj.data[e].chunk(2)
            outputs = []
            for name, weight in (("gate_proj", gate), ("up_proj", up), ("down_proj", dense.down_proj.data[e])):
                if name == "down_proj":
                    x = torch.nn.functional.silu(outputs[0]) * outputs[1]
                expected = qm.gptq(weight, x.T @ x, grid)
                digits, levels = qm.decode(module.packed(e, name))
                assert torch.equal(levels.float(), expected.levels)
                assert (digits == expected.digits).float().mean() > 0.99, (layer.experts, e, name)
                outputs.append(x @ expected.weight.T)
        before.append(layer.experts)
    assert len(before) >= 2


@pytest.mark.parametrize("model_type", sorted(tiny.CAUSAL))
def test_nothing_but_experts_is_touched(causal, compressed_causal, model_type):
    """Shared experts, routers, their biases, attention and embeddings keep their names and bits."""
    before, after = names_in(causal(model_type)), names_in(compressed_causal(model_type))
    kept = {name for name in before if ".experts." not in name}
    assert {name for name in after if ".experts." not in name} == kept
    for name in kept:
        assert after[name].dtype == before[name].dtype
        assert torch.equal(after[name], before[name])
    assert any("gate" in name or "router" in name for name in kept)
    assert any("shared_expert" in name for name in kept) == (
        model_type in ("qwen2_moe", "deepseek_v2", "deepseek_v3", "glm4_moe")
    )


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        *((model_type, {}) for model_type in sorted(tiny.CAUSAL)),
        ("qwen3_moe", {"mlp_only_layers": [], "decoder_sparse_step": 2}),
        ("deepseek_v3", {"first_k_dense_replace": 0}),
        ("glm4_moe", {"first_k_dense_replace": 2}),
    ],
)
def test_tensors_are_known_by_the_models_names(tmp_path, tokenizer, model_type, changes):
    directory = tiny.make_causal(tmp_path / "m", tokenizer, model_type, **changes)
    family, checkpoint = open_checkpoint(directory)
    assert {checkpoint.stored_name(name) for name in checkpoint.names} == set(names_in(directory))
    model = AutoModelForCausalLM.from_pretrained(directory)
    dense = {name for name in model.state_dict() if ".experts." not in name}
    assert {name for name in checkpoint.names if ".experts." not in name} == dense
    layers = family.layers(model.config)
    experts = [name for name, module in model.named_modules() if name.endswith(".mlp.experts")]
    assert [layer.experts for layer in layers] == experts


def test_a_mixtral_with_the_models_own_names_is_read_too(tmp_path, causal, compressed_causal, text_file):
    path = tmp_path / "renamed"
    shutil.copytree(causal("mixtral"), path)
    tensors = {n.replace("block_sparse_moe", "mlp"): t for n, t in load_file(path / "model.safetensors").items()}
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    qm.compress(path, tmp_path / "out", calibration=text_file, **SMALL)
    renamed = {n.replace("block_sparse_moe", "mlp"): t for n, t in names_in(tmp_path / "out").items()}
    usual = {n.replace("block_sparse_moe", "mlp"): t for n, t in names_in(compressed_causal("mixtral")).items()}
    assert renamed.keys() == usual.keys()
    assert all(torch.equal(renamed[name], usual[name]) for name in usual)
    tensors["model.layers.0.block_sparse_moe.gate.weight"] = tensors["model.layers.0.mlp.gate.weight"].clone()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"holds model.layers.0.mlp.gate.weight twice"):
        qm.compress(path, tmp_path / "twice", recipe="nearest")


@pytest.mark.slow
def test_a_killed_causal_run_goes_on_and_ends_with_the_same_bytes(tmp_path, causal, text_file):
    settings = {"calibration": text_file, "batch_size": 5, **SMALL}
    qm.compress(causal("mixtral"), tmp_path / "whole", **settings)
    for killed_after in (1, 2, 3):
        out = tmp_path / f"out{killed_after}"

        def kill(event, killed_after=killed_after):
            if event.done == killed_after:
                raise Killed

        with pytest.raises(Killed):
            qm.compress(causal("mixtral"), out, progress=kill, **settings)
        qm.compress(causal("mixtral"), out, **settings)
        assert bytes_of(out) == bytes_of(tmp_path / "whole")


def test_several_experts_a_token_need_fewer_samples_and_raise_the_cap(tmp_path, causal, text_file):
    settings = {"calibration": text_file, "sequence_length": 32, "token_cap": 1.0, "grid": TERNARY}
    report = qm.compress(causal("mixtral"), tmp_path / "out", **settings)
    # 4 experts, 2 of them for each token: 80 * 4 / 2 samples; the text has fewer windows
    assert any("instead of 160" in line for line in report.degraded)
    samples = int(next(line for line in report.degraded if "instead" in line).split()[3])
    mean = samples * 32 * 2 / 4
    for row in report.projections:
        assert max(row.tokens) <= mean + 1
        assert max(row.tokens) > mean / 2  # what a cap that forgot the second expert would have been


def test_layers_that_transformers_leaves_out_are_left_out_and_named(tmp_path, causal, text_file):
    path = tmp_path / "with-more"
    shutil.copytree(causal("glm4_moe"), path)
    tensors = load_file(path / "model.safetensors")
    more = {
        "model.layers.46.eh_proj.weight": torch.ones(3, 3),
        "model.layers.46.mlp.experts.0.up_proj.weight": torch.ones(20, 24),
    }
    save_file({**tensors, **more}, path / "model.safetensors", {"format": "pt"})
    report = qm.compress(path, tmp_path / "out", calibration=text_file, **SMALL)
    sizes = qm.compress(causal("glm4_moe"), tmp_path / "without", recipe="nearest").sizes
    assert report.sizes["dense_expert_bytes"] == sizes["dense_expert_bytes"]
    assert any(line.startswith("left out 2 tensors") and "layers.46" in line for line in report.degraded)
    assert not any(".46." in name for name in names_in(tmp_path / "out"))
    qm.load(tmp_path / "out")
    # the larger GLM has a layer 46 of its own
    family, checkpoint = open_checkpoint(path)
    config = AutoConfig.from_pretrained(path, num_hidden_layers=47)
    assert unused(family, skeleton(family, config, torch.float32), checkpoint) == []


def test_experts_that_config_does_not_account_for_are_refused(tmp_path, causal):
    path = tmp_path / "more"
    shutil.copytree(causal("qwen3_moe"), path)
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.0.mlp.experts.6.up_proj.weight"] = torch.ones(20, 24)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"experts.6.up_proj.weight, which config.json does not account for"):
        qm.compress(path, tmp_path / "out", recipe="nearest")


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.1.mlp.gate.weight", "model.norm.weight"])
def test_a_missing_dense_tensor_is_named_before_any_work(tmp_path, causal, text_file, name):
    path = tmp_path / "less"
    shutil.copytree(causal("olmoe"), path)
    tensors = load_file(path / "model.safetensors")
    del tensors[name]
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"lacks the tensor {name}"):
        qm.compress(path, tmp_path / "out", calibration=text_file, **SMALL)
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("value", ["absent", None])
def test_the_dtype_is_written_when_the_source_does_not_say_it(tmp_path, causal, value):
    """transformers would take the first tensor's, which may be that of the levels."""
    path = changed_copy(causal("qwen3_moe"), tmp_path / "untold", dtype=None)
    if value == "absent":
        config = json.loads((path / "config.json").read_text())
        del config["dtype"]
        (path / "config.json").write_text(json.dumps(config))
    qm.compress(path, tmp_path / "out", recipe="nearest")
    assert qm.load(tmp_path / "out").dtype == torch.float32


def test_a_configuration_that_names_no_quantization_is_a_dense_models(tmp_path, causal):
    path = changed_copy(causal("olmoe"), tmp_path / "null", quantization_config=None)
    qm.compress(path, tmp_path / "out", recipe="nearest")
    assert qm.load(tmp_path / "out").config.quantization_config.quant_method == "qmoe"


def test_code_that_a_model_came_with_is_not_asked_for(tmp_path, causal):
    """DeepSeek's configurations name modeling files, which are not copied; trust_remote_code would look for them."""
    path = changed_copy(
        causal("deepseek_v2"), tmp_path / "remote", auto_map={"AutoModelForCausalLM": "modeling_x.Model"}
    )
    qm.compress(path, tmp_path / "out", recipe="nearest")
    AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)


@pytest.mark.parametrize("settings", [{"hidden_act": "gleu"}, {"decoder_sparse_step": 0}])
def test_a_configuration_that_makes_no_model_is_one_line(tmp_path, causal, settings):
    path = changed_copy(causal("qwen3_moe"), tmp_path / "odd", **settings)
    with pytest.raises(CheckpointError, match="makes no qwen3_moe model") as caught:
        qm.compress(path, tmp_path / "out", recipe="nearest")
    assert "\n" not in str(caught.value)


def test_the_inner_activations_are_gated():
    x = [torch.tensor([-1.0, 2.0]), torch.tensor([3.0, 4.0])]
    assert inner(torch.relu, x[:1]).tolist() == [0.0, 2.0]
    assert inner(torch.relu, x).tolist() == [0.0, 8.0]


def test_blocks_are_put_back_when_the_models_code_fails():
    owner = torch.nn.Module()
    owner.layers = blocks = torch.nn.ModuleList([torch.nn.Linear(2, 2)])

    def fail():
        owner.layers[0](torch.zeros(2), mask=None)
        raise KeyError

    with pytest.raises(KeyError):
        recorded_calls(owner, "layers", fail)
    assert owner.layers is blocks
