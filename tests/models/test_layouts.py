"""One model however its files hold it: split, fused, over shards, in FP8, in MXFP4; the same bytes come out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from checks import bytes_of
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import qmoe_lite as qm
from qmoe_lite.checkpoint import reader
from qmoe_lite.errors import CheckpointError, SettingError
from qmoe_lite.models.building import read_config
from qmoe_lite.models.skeletons import open_checkpoint

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "dtype": "bfloat16"}
SMALL = {
    "samples": 12,
    "sequence_length": 32,
    "validation_samples": 2,
    "tune": "none",
    "codeword_bits": 10,
    "grid": qm.MinMaxTernary(torch.bfloat16),
}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 24]}


def make(place, tokenizer, model_type="qwen3_moe", own=False, **changes):
    """Save a tiny bfloat16 model, as transformers holds it where `own`, else as such models are published."""
    made = tiny.make_causal(place, tokenizer, model_type, **{**SIZES, "mlp_only_layers": [], **changes})
    model = AutoModelForCausalLM.from_pretrained(made, dtype=torch.bfloat16)
    model.save_pretrained(place, save_original_format=not own)
    return place


def rewritten(source, target, tensors, **config):
    """Copy a model with other tensors, and with more in its config.json."""
    shutil.copytree(source, target)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target / "model.safetensors")
    known = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**known, **config}))
    return target


def to_fp8(weight):
    """Quantise (.., R, C) by blocks of 16 x 24; return FP8, scales, and what they stand for in bfloat16."""
    rows, columns = weight.shape[-2:]
    scales = torch.zeros(*weight.shape[:-2], -(-rows // 16), -(-columns // 24))
    values, back = torch.zeros_like(weight, dtype=torch.float8_e4m3fn), torch.zeros_like(weight)
    for i in range(scales.shape[-2]):
        for j in range(scales.shape[-1]):
            part = (..., slice(16 * i, 16 * i + 16), slice(24 * j, 24 * j + 24))
            scale = weight[part].float().abs().amax((-2, -1)) / 448
            scales[..., i, j] = scale
            values[part] = (weight[part].float() / scale[..., None, None]).to(torch.float8_e4m3fn)
            back[part] = (values[part].float() * scale[..., None, None]).to(torch.bfloat16)
    return values, scales, back


def fp8_twins(source, place):
    """Write a model in FP8, and its twin in the bfloat16 that it stands for."""
    quantised, plain = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if "_proj" in name and not name.endswith("_bias"):
            quantised[name], quantised[f"{name}_scale_inv"], plain[name] = to_fp8(tensor)
        else:
            quantised[name] = plain[name] = tensor
    return (
        rewritten(source, place / "fp8", quantised, quantization_config=FP8),
        rewritten(source, place / "plain", plain),
    )


def assert_the_same_comes_out(first, second, place, text_file):
    for directory, name in ((first, "first"), (second, "second")):
        qm.compress(directory, place / name, calibration=text_file, **SMALL)
    assert bytes_of(place / "first") == bytes_of(place / "second")
    for name in ("config.json", "model.safetensors.index.json"):
        assert json.loads((place / "first" / name).read_text()) == json.loads((place / "second" / name).read_text())
    settings = json.loads((place / "first" / "config.json").read_text())["quantization_config"]
    assert settings["quant_method"] == "qmoe"


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["qwen3_moe", "lfm2_moe", "nemotron_h"])
def test_split_and_fused_give_the_same_bytes(tmp_path, tokenizer, text_file, model_type):
    changes = (
        {"num_hidden_layers": len(tiny.MORE[model_type].get("layers_block_type", "abc"))}
        if model_type in tiny.MORE
        else {}
    )
    split = make(tmp_path / "split", tokenizer, model_type, **changes)
    fused = make(tmp_path / "fused", tokenizer, model_type, own=True, **changes)
    names = [set(load_file(path / "model.safetensors")) for path in (split, fused)]
    assert not names[0] & {name for name in names[1] if ".experts." in name}
    for directory, out in ((split, "a"), (fused, "b")):
        qm.compress(directory, tmp_path / out, calibration=text_file, **SMALL)
    a, b = ({k: v for f in (tmp_path / o).glob("*.safetensors") for k, v in load_file(f).items()} for o in "ab")
    bare = {name.replace("backbone.", "model."): tensor for name, tensor in a.items()}
    assert bare.keys() == {name.replace("backbone.", "model.") for name in b}
    for name, tensor in b.items():
        assert torch.equal(bare[name.replace("backbone.", "model.")], tensor), name


def test_a_mixture_of_layouts_over_shards_is_read(tmp_path, tokenizer, text_file):
    split = make(tmp_path / "split", tokenizer)
    fused = make(tmp_path / "fused", tokenizer, own=True)
    of_split, of_fused = (load_file(path / "model.safetensors") for path in (split, fused))
    shards = {
        "one.safetensors": {name: t for name, t in of_fused.items() if ".layers.1." in name},
        "two.safetensors": {name: t for name, t in of_split.items() if ".layers.1." not in name},
    }
    mixed = tmp_path / "mixed"
    shutil.copytree(split, mixed)
    (mixed / "model.safetensors").unlink()
    for name, tensors in shards.items():
        save_file(tensors, mixed / name)
    index = {"weight_map": {name: file for file, tensors in shards.items() for name in tensors}}
    (mixed / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_the_same_comes_out(split, mixed, tmp_path, text_file)


@pytest.mark.slow
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral"])
def test_fp8_with_block_scales_gives_its_bfloat16_twins_bytes(tmp_path, tokenizer, text_file, model_type, own):
    source = make(tmp_path / "m", tokenizer, model_type, own=own)
    assert_the_same_comes_out(*fp8_twins(source, tmp_path), tmp_path, text_file)


def test_an_expert_s_own_bytes_are_read_ahead(tmp_path, tokenizer, monkeypatch):
    asked = []
    monkeypatch.setattr(reader, "ask_for", lambda path, *where: asked.append((path, *where)))
    expert, stack = "model.layers.1.mlp.experts.3.down_proj.weight", "model.layers.1.mlp.experts.down_proj"
    split, fused = make(tmp_path / "split", tokenizer), make(tmp_path / "fused", tokenizer, own=True)
    for path, name, part in (split, expert, ...), (fused, stack, 3), (fp8_twins(split, tmp_path)[0], expert, ...):
        open_checkpoint(path)[1].will_need([expert])
        (file, start, size), *_ = asked
        weight = load_file(path / "model.safetensors")[name][part]
        assert file.read_bytes()[start : start + size] == weight.contiguous().view(torch.uint8).numpy().tobytes()
        asked.clear()


def compressed(kind, **weights):
    """Return a quantization_config as compressed-tensors writes one."""
    usual = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 4, "actorder": None}
    group = {"targets": ["Linear"], "weights": {**usual, **weights}, "input_activations": None, "format": kind}
    return {"quant_method": "compressed-tensors", "format": kind, "config_groups": {"group_0": group}}


def to_integers(weight, bits, size):
    """Quantise (R, C) by groups of columns; return packed integers, scales, and what they stand for in bfloat16."""
    size = size or weight.shape[1]
    scales = (weight.float().unflatten(1, (-1, size)).abs().amax(-1) / ((1 << bits - 1) - 1)).bfloat16()
    each = scales.repeat_interleave(size, 1)
    digits = (weight.float() / each.float()).round().clamp(-(1 << bits - 1), (1 << bits - 1) - 1).int()
    packed = torch.zeros(len(weight), -(-weight.shape[1] * bits // 32), dtype=torch.int32)
    for column in range(weight.shape[1]):
        place = column * bits % 32
        packed[:, column * bits // 32] |= digits[:, column] + (1 << bits - 1) << place
    return packed, scales, (digits * each.float()).bfloat16()


def quantised_twins(source, place, settings, quantise):
    """Write a model with what `quantise` makes of its projections, and its twin in the bfloat16 that it stands for."""
    quantised, plain = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if "_proj.weight" in name:
            parts, plain[name] = quantise(tensor)
            quantised |= {f"{name}{suffix}": part for suffix, part in parts.items()}
        else:
            quantised[name] = plain[name] = tensor
    return (
        rewritten(source, place / "quantised", quantised, quantization_config=settings),
        rewritten(source, place / "plain", plain),
    )


@pytest.mark.parametrize(("bits", "size"), [(4, 4), pytest.param(8, None, marks=pytest.mark.slow)])
def test_packed_integers_give_their_bfloat16_twins_bytes(tmp_path, tokenizer, text_file, bits, size):
    def quantise(weight):
        packed, scales, plain = to_integers(weight, bits, size)
        return {"_packed": packed, "_scale": scales, "_shape": torch.tensor(weight.shape)}, plain

    settings = compressed("pack-quantized", num_bits=bits, group_size=size, strategy="group" if size else "channel")
    source = make(tmp_path / "m", tokenizer, "qwen3_moe", hidden_size=80, moe_intermediate_size=20)
    assert_the_same_comes_out(*quantised_twins(source, tmp_path, settings, quantise), tmp_path, text_file)


@pytest.mark.parametrize(
    "strategy", ["mixed", *(pytest.param(each, marks=pytest.mark.slow) for each in ("channel", "tensor", "block"))]
)
def test_fp8_of_compressed_tensors_gives_its_bfloat16_twins_bytes(tmp_path, tokenizer, text_file, strategy):
    """By rows, by tensors, by blocks; or attention in FP8 and experts in packed integers, as Kimi has them."""

    def quantise(weight):
        if strategy == "mixed" and len(weight) == 20:
            packed, scales, plain = to_integers(weight, 4, 4)
            return {"_packed": packed, "_scale": scales, "_shape": torch.tensor(weight.shape)}, plain
        if strategy == "block":
            values, scales, plain = to_fp8(weight)
            return {"": values, "_scale": scales}, plain
        largest = weight.float().abs().amax(None if strategy == "tensor" else (1,), keepdim=True)
        scales = (largest / 448).reshape(-1, *([] if strategy == "tensor" else [1])).bfloat16()
        values = (weight.float() / scales.float()).to(torch.float8_e4m3fn)
        parts = {"": values, "_scale": scales, "_input_scale": torch.ones(1)}
        return parts, (values.float() * scales.float()).bfloat16()

    eight = {"num_bits": 8, "type": "float", "strategy": strategy, "group_size": None, "block_structure": [16, 24]}
    settings = compressed("float-quantized", **(eight if strategy != "mixed" else {**eight, "strategy": "channel"}))
    if strategy == "mixed":
        settings["config_groups"]["group_1"] = compressed("pack-quantized")["config_groups"]["group_0"]
        settings["format"] = "mixed-precision"
    source = make(tmp_path / "m", tokenizer, "qwen3_moe")
    assert_the_same_comes_out(*quantised_twins(source, tmp_path, settings, quantise), tmp_path, text_file)


def test_damaged_packed_integers_are_one_line(tmp_path, tokenizer):
    def quantise(weight):
        packed, scales, plain = to_integers(weight, 4, 4)
        return {"_packed": packed[:, 1:], "_scale": scales, "_shape": torch.tensor(weight.shape)}, plain

    source = make(tmp_path / "m", tokenizer, "qwen3_moe")
    path, _ = quantised_twins(source, tmp_path, compressed("pack-quantized"), quantise)
    with pytest.raises(
        CheckpointError, match=r"weight_packed has 7 columns of 32 bits; config.json says 64 weights of 4"
    ):
        qm.compress(path, tmp_path / "out", recipe="nearest")


def test_mxfp4_gives_its_bfloat16_twins_bytes(tmp_path, tokenizer, text_file):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    source = make(tmp_path / "m", tokenizer, "gpt_oss", intermediate_size=32, num_hidden_layers=3)
    quantised, plain = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, columns, rows = tensor.shape  # stored by output, (E, R, C / 32, 16)
            blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
            scales = torch.randint(118, 126, (experts, rows, columns // 32), dtype=torch.uint8)
            quantised |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            plain[name] = convert_moe_packed_tensors(blocks.clone(), scales.clone(), dtype=torch.bfloat16)
            assert plain[name].shape == tensor.shape
        else:
            quantised[name] = plain[name] = tensor
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    packed = rewritten(source, tmp_path / "mxfp4", quantised, quantization_config=settings)
    assert_the_same_comes_out(packed, rewritten(source, tmp_path / "plain", plain), tmp_path, text_file)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"quant_method": "awq", "bits": 4}, "quantised by awq"),
        (
            {"quant_method": "compressed-tensors", "format": "pack-quantized"},
            "compressed-tensors .pack-quantized, with",
        ),
        (compressed("pack-quantized", symmetric=False), "compressed-tensors .pack-quantized, int4, not symmetric."),
        (compressed("pack-quantized", actorder="group"), "pack-quantized, int4, its columns in another order"),
        (compressed("pack-quantized", num_bits=3), "pack-quantized, int3 by group"),
        (compressed("nvfp4-pack-quantized", type="float"), "nvfp4-pack-quantized, float4 by group"),
        ({**compressed("pack-quantized"), "quantization_status": "frozen"}, "frozen, not compressed"),
        ({"quant_method": "qmoe"}, "quantised already"),
    ],
)
def test_another_quantisation_is_refused_by_name(tmp_path, causal, settings, named):
    source = causal("qwen3_moe")
    tensors = load_file(source / "model.safetensors")
    path = rewritten(source, tmp_path / "q", tensors, quantization_config=settings)
    with pytest.raises(SettingError, match=named):
        qm.compress(path, tmp_path / "out", recipe="nearest")


def test_an_unknown_layout_is_named(tmp_path, causal):
    """Not called missing: the experts are there."""
    source = causal("qwen3_moe")
    tensors = load_file(source / "model.safetensors")
    renamed = {name.replace(".gate_proj.", ".w9.") if ".experts." in name else name: t for name, t in tensors.items()}
    path = rewritten(source, tmp_path / "odd", renamed)
    with pytest.raises(CheckpointError, match=r"holds model.layers.0.mlp.experts.0.w9.weight and not .*: its layout"):
        qm.compress(path, tmp_path / "out", recipe="nearest")


@pytest.mark.parametrize(
    ("model_type", "joined", "made"),
    [
        ("kimi_linear", "self_attn.q_conv1d.weight", "self_attn.conv1d.weight"),
        pytest.param(
            "sarvam_moe", "attention.query_key_value.weight", "self_attn.q_proj.weight", marks=pytest.mark.slow
        ),
    ],
)
def test_dense_tensors_that_transformers_joins_or_splits_are_made_as_it_does(
    tmp_path, causal, model_type, joined, made
):
    source = causal(model_type)
    held = load_file(source / "model.safetensors")
    assert any(name.endswith(joined) for name in held)
    assert not any(name.endswith(made) for name in held)
    qm.compress(source, tmp_path / "out", recipe="nearest")
    model = AutoModelForCausalLM.from_pretrained(source).state_dict()
    found = {name: t for file in (tmp_path / "out").glob("*.safetensors") for name, t in load_file(file).items()}
    assert any(name.endswith(made) for name in found)
    assert all(torch.equal(found[name], model[name]) for name in found if name.endswith(made))
    qm.load(tmp_path / "out").save_pretrained(tmp_path / "again")
    assert [finding for finding in qm.verify(tmp_path / "again") if finding.severity == "error"] == []
    name = next(name for name in held if name.endswith(joined))
    less = rewritten(source, tmp_path / "less", {each: tensor for each, tensor in held.items() if each != name})
    with pytest.raises(CheckpointError, match=rf"lacks the tensor .*{made.rpartition('.')[0]}"):
        qm.compress(less, tmp_path / "never", recipe="nearest")
    wrong = rewritten(source, tmp_path / "wrong", {**held, name: held[name][1:]})
    with pytest.raises(CheckpointError, match="do not make"):
        qm.compress(wrong, tmp_path / "never", recipe="nearest")


def own_memory() -> int:
    """Bytes of the process that are no file's: a page that is mapped from one is given back when memory is short."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")))


@pytest.mark.parametrize("fp8", [False, True])
def test_a_fused_layer_of_128_experts_is_read_an_expert_at_a_time(tmp_path, tokenizer, fp8):
    """A group of them is what its matrices take, in float32; the layer would take 402 MB so."""
    sizes = {"hidden_size": 512, "moe_intermediate_size": 512, "num_experts": 128, "num_hidden_layers": 1}
    tiny.make_causal(tmp_path, tokenizer, "qwen3_moe", **{**SIZES, **sizes, "num_experts": 1, "mlp_only_layers": []})
    prefix = "model.layers.0.mlp.experts"
    dtype = torch.float8_e4m3fn if fp8 else torch.bfloat16
    tensors = {f"{prefix}.gate_up_proj": torch.zeros(128, 1024, 512, dtype=dtype)}
    tensors[f"{prefix}.down_proj"] = torch.zeros(128, 512, 512, dtype=dtype)
    if fp8:
        tensors |= {f"{name}_scale_inv": torch.ones(128, t.shape[1] // 128, 4) for name, t in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    del tensors
    config = json.loads((tmp_path / "config.json").read_text())
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128]} if fp8 else None
    (tmp_path / "config.json").write_text(json.dumps({**config, **sizes, "quantization_config": settings}))
    family, checkpoint = open_checkpoint(tmp_path)
    (layer,) = family.layers(read_config(str(tmp_path)))
    before, most = own_memory(), 0
    for first in range(0, layer.count, 4):
        for projection in layer.projections:
            names = [family.weight_name(layer, first + i, projection) for i in range(4)]
            group = torch.stack([checkpoint.tensor(name).float() for name in names])
            assert group.shape == (4, *layer.shapes[projection])
            most = max(most, own_memory() - before)
    assert most < 5 * 4 * 512 * 512 * 4
