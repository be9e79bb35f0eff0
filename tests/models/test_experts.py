"""PackedExperts and load: the logits of the dense model they stand for, and no way for a bad file to get through."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from checks import layers_of, logits_of
from safetensors.torch import load_file, save_file
from tiny import dense_model

import qmoe_lite as qm
from qmoe_lite.checkpoint.format import PARTS, checksum, pack_experts
from qmoe_lite.errors import CheckpointError, DeviceError, FormatError, SettingError, ShapeError
from qmoe_lite.models.experts import PackedExperts
from qmoe_lite.offload.runner import runner_of


def test_logits_are_those_of_the_dense_model_with_decoded_experts(compressed, switch):
    packed = qm.load(compressed[0], dtype=torch.float32)
    assert len(layers_of(packed)) == 2
    dense = dense_model(switch, packed, layers_of(packed))
    ours, reference = logits_of(packed), logits_of(dense)
    largest = reference.abs().max()
    assert (ours - reference).abs().max() <= 1e-4 * largest
    # on a model where it would show: any two experts swapped change the logits by more than a tenth
    for name in layers_of(packed):
        experts = dense.get_submodule(name)
        experts["expert_0"], experts["expert_1"] = experts["expert_1"], experts["expert_0"]
        assert (logits_of(dense) - reference).abs().max() > 0.1 * largest
        experts["expert_0"], experts["expert_1"] = experts["expert_1"], experts["expert_0"]


def test_tokens_over_capacity_get_nothing_as_in_the_dense_model(compressed, switch):
    packed = qm.load(compressed[0], dtype=torch.float32)
    dense = dense_model(switch, packed, layers_of(packed))
    unlimited = logits_of(dense)
    for model in (packed, dense):
        for module in model.modules():
            if hasattr(module, "expert_capacity"):
                module.expert_capacity = 1
    ours, reference = logits_of(packed), logits_of(dense)
    assert (ours - reference).abs().max() <= 1e-4 * reference.abs().max()
    assert (reference - unlimited).abs().max() > 1e-2


def routed(experts, tokens, seed):
    """Hidden states and Switch's routing arguments; every fifth token is dropped."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, experts.layer.shapes["wi"][1], generator=generator)
    chosen = torch.randint(experts.num_experts, (tokens,), generator=generator)
    one_hot = torch.nn.functional.one_hot(chosen, experts.num_experts)[:, None]
    one_hot[4::5] = 0
    return hidden, (one_hot, torch.rand(tokens, 1, generator=generator)), chosen


@pytest.mark.parametrize("tokens", [1, 2, 7, 300])
def test_one_call_for_a_layer_equals_expert_after_expert(compressed, tokens):
    experts = first_experts(qm.load(compressed[0], dtype=torch.float32))
    hidden, (one_hot, weights), chosen = routed(experts, tokens, seed=tokens)
    expected = torch.zeros_like(hidden)
    for token in range(tokens):
        if token % 5 < 4:
            expected[token] = weights[token] * experts.run_expert(int(chosen[token]), hidden[token])
    found = experts(hidden, one_hot, weights)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not found[4::5].any()
    assert found[0].any()
    with_gradient = experts(hidden.requires_grad_(), one_hot, weights)
    torch.testing.assert_close(with_gradient, expected, rtol=1e-4, atol=1e-5)


def first_experts(model):
    return next(module for module in model.modules() if isinstance(module, PackedExperts))


def test_a_number_beyond_the_last_expert_means_none(compressed_causal):
    experts = first_experts(qm.load(compressed_causal("qwen3_moe"), dtype=torch.float32))
    hidden = torch.randn(3, experts.layer.shapes["gate_proj"][1])
    index, weights = torch.tensor([[0, 1], [1, experts.num_experts], [-1, 0]]), torch.ones(3, 2)
    found = experts(hidden, index, weights)
    torch.testing.assert_close(found[1], experts.run_expert(1, hidden[1]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[2], experts.run_expert(0, hidden[2]), rtol=1e-4, atol=1e-5)


def test_many_tokens_go_through_a_layer_in_stretches(compressed_causal, monkeypatch):
    experts = first_experts(qm.load(compressed_causal("qwen3_moe"), dtype=torch.float32))
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(50, experts.layer.shapes["gate_proj"][1], generator=generator)
    index = torch.randint(experts.num_experts, (50, 2), generator=generator)
    weights = torch.rand(50, 2, generator=generator)
    whole = experts(hidden, index, weights)
    monkeypatch.setattr("qmoe_lite.models.cpu_dispatch.STRETCH", 7)
    torch.testing.assert_close(experts(hidden, index, weights), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 5), (3, 500), (7,), (1, 2, 3)])
def test_hidden_states_of_another_width_are_refused(compressed, shape):
    experts = first_experts(qm.load(compressed[0]))
    _, routing, _ = routed(experts, 3, seed=0)
    with pytest.raises(ShapeError, match="hidden_states is"):
        experts(torch.zeros(shape), *routing)
    with pytest.raises(SettingError, match="meta"):
        experts(torch.zeros(3, experts.layer.shapes["wi"][1], device="meta"), *routing)


def test_refilled_experts_are_checked_anew_and_copies_share_nothing(compressed):
    experts = first_experts(qm.load(compressed[0], dtype=torch.float32))
    hidden, routing, _ = routed(experts, 6, seed=1)
    before = experts(hidden, *routing)
    copied = copy.deepcopy(experts)
    parts = {part: experts.get_buffer(f"wi_{part}").clone() for part in PARTS}
    parts["codes"][:] = 255 - parts["codes"]
    experts.fill("wi", parts)
    with pytest.raises(FormatError, match="checksum"):
        experts(hidden, *routing)
    assert torch.equal(copied(hidden, *routing), before)


def test_codebooks_of_different_alphabets_are_refused(compressed_causal):
    experts = first_experts(qm.load(compressed_causal("qwen3_moe")))
    books = {**experts.codebooks, "up_proj": qm.Codebook.fit([885, 50, 40, 25])}
    with pytest.raises(FormatError, match="mixes codes of different digits"):
        PackedExperts(experts.family, experts.layer, books, None)


def test_a_token_that_is_not_finite_spoils_itself_alone(compressed):
    experts = first_experts(qm.load(compressed[0], dtype=torch.float32))
    hidden, routing, _ = routed(experts, 40, seed=0)
    sound = experts(hidden, *routing)
    hidden[7, 3] = torch.nan
    found = experts(hidden, *routing)
    assert found[7].isnan().all()
    others = torch.arange(40) != 7
    torch.testing.assert_close(found[others], sound[others], rtol=1e-4, atol=1e-5)


def test_generation_gives_the_same_tokens(compressed, switch):
    packed = qm.load(compressed[0], dtype=torch.float32)
    dense = dense_model(switch, packed, layers_of(packed))
    ids = torch.randint(3, 15, (2, 9), generator=torch.Generator().manual_seed(1))
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": 1, "eos_token_id": None}
    assert torch.equal(packed.generate(ids, **options), dense.generate(ids, **options))


def test_bfloat16_models_run(compressed):
    packed = qm.load(compressed[0], dtype=torch.bfloat16)
    logits = logits_of(packed)
    assert logits.dtype == torch.bfloat16
    exact = logits_of(qm.load(compressed[0], dtype=torch.float32))
    assert (logits.float() - exact).abs().mean() < 0.05 * exact.abs().max()


def test_a_moved_model_still_runs(compressed):
    packed = qm.load(compressed[0], dtype=torch.float32)
    before = logits_of(packed)
    packed = packed.to(torch.float64).to(torch.float32)
    assert torch.equal(logits_of(packed), before)


def test_loading_maps_codes_instead_of_copying(compressed):
    packed = qm.load(compressed[0])
    module = packed.get_submodule(layers_of(packed)[0])
    assert module.wi_codes.dtype == torch.uint8
    assert module.wi_levels.dtype == torch.bfloat16
    assert not list(module.parameters())
    assert not any("expert_0.wi" in name for name, _ in packed.named_parameters())


def test_there_is_no_expert_beyond_the_last(compressed):
    module = qm.load(compressed[0]).get_submodule("encoder.block.1.layer.1.mlp.experts")
    with pytest.raises(SettingError, match="experts 0 to 3"):
        module.dense(4, "wi")
    with pytest.raises(SettingError, match="there are wi, wo"):
        module.dense(0, "gate_proj")


def edited(compressed, tmp_path, edit):
    """A copy of the compressed model with one layer's tensors edited."""
    target = tmp_path / "edited"
    shutil.copytree(compressed[0], target)
    file = target / "model-00001-of-00003.safetensors"
    tensors = load_file(file)
    edit(tensors, "encoder.block.1.layer.1.mlp.experts.wi_")
    save_file(tensors, file, {"format": "pt"})
    return target


@pytest.mark.parametrize("part", ["codes", "row_codewords", "fewest_codewords", "levels"])
def test_a_flipped_bit_is_found_when_its_expert_is_used(compressed, tmp_path, part):
    def flip(tensors, prefix):
        tensors[prefix + part].view(torch.uint8).view(-1)[0] ^= 1

    model = qm.load(edited(compressed, tmp_path, flip))
    module = model.get_submodule("encoder.block.1.layer.1.mlp.experts")
    with pytest.raises(FormatError, match=r"expert 0 of encoder.block.1.*wi"):
        module.dense(0, "wi")
    module.dense(3, "wi")


def shift_a_codeword(tensors, prefix):
    lengths = tensors[prefix + "row_codewords"][0]
    longest = int(lengths.argmax())
    lengths[longest] -= 1
    lengths[longest - 1] += 1


def add_to_fewest(number):
    def forge(tensors, prefix):
        tensors[prefix + "fewest_codewords"][0] += number  # int32: wraps around

    return forge


@pytest.mark.parametrize(
    "forge_lengths",
    [shift_a_codeword, *(add_to_fewest(number) for number in (1, -1, -9, 65535, 2**31 - 9, 2**31 - 1))],
    ids=["shifted", "1", "-1", "-9", "65535", "most", "wrapped"],
)
def test_codes_forged_with_a_matching_checksum_are_found(compressed, tmp_path, forge_lengths):
    def forge(tensors, prefix):
        book = qm.load(compressed[0]).get_submodule(prefix.rpartition(".")[0]).codebooks["wi"]
        forge_lengths(tensors, prefix)
        whole = qm.PackedMatrix(
            codes=tensors[prefix + "codes"],
            row_codewords=tensors[prefix + "row_codewords"][0],
            levels=tensors[prefix + "levels"][0],
            codebook=book,
            columns=24,
            fewest_codewords=int(tensors[prefix + "fewest_codewords"][0]),
        )
        used = -(-int(whole.count_codewords().sum()) * book.bits // 8) + 8
        tensors[prefix + "checksums"][0] = checksum(dataclasses.replace(whole, codes=whole.codes[:used]))

    model = qm.load(edited(compressed, tmp_path, forge))
    with pytest.raises(FormatError, match="expert 0"):
        model.get_submodule("encoder.block.1.layer.1.mlp.experts").dense(0, "wi")


def test_a_layer_whose_row_lengths_are_of_8_and_of_16_bits_is_stored_in_16(compressed):
    codebook = qm.Codebook.fit([115, 1770, 115])
    digits = np.zeros((2, 3, 6000), dtype=np.int8)
    digits[0, 1, :50] = 1
    digits[1, 2] = 1
    matrices = [qm.encode(each, np.ones((3, 2), dtype=np.float32), codebook) for each in digits]
    assert [packed.row_codewords.dtype for packed in matrices] == [torch.uint8, torch.uint16]
    tensors = pack_experts(matrices)
    assert tensors["row_codewords"].dtype == torch.uint16
    assert tensors["fewest_codewords"].tolist() == [packed.fewest_codewords for packed in matrices]
    one = pack_experts(matrices[:1])
    assert one["row_codewords"].dtype == torch.uint8
    module = qm.load(compressed[0]).get_submodule("encoder.block.1.layer.1.mlp.experts")
    module.layer = dataclasses.replace(module.layer, count=2, shapes={"wi": (3, 6000)})
    module.codebooks = {"wi": codebook}
    module.fill("wi", tensors)
    for moved in (module, module.to(torch.bfloat16), module.to("cpu", torch.float64)):
        for expert, packed in enumerate(matrices):
            assert torch.equal(moved.packed(expert, "wi").count_codewords(), packed.count_codewords())
            assert torch.equal(moved.dense(expert, "wi"), packed.dense())


@pytest.mark.parametrize("start", [-16, 8, 1 << 40])
def test_offsets_out_of_bounds_are_found(compressed, tmp_path, start):
    def move(tensors, prefix):
        tensors[prefix + "expert_offsets"][1] = start

    model = qm.load(edited(compressed, tmp_path, move))
    with pytest.raises(FormatError, match="does not lie inside its codes"):
        model.get_submodule("encoder.block.1.layer.1.mlp.experts").dense(1, "wi")


@pytest.mark.parametrize("part", PARTS)
def test_tensors_of_another_shape_are_refused_at_load(compressed, tmp_path, part):
    def shrink(tensors, prefix):
        value = tensors[prefix + part]
        tensors[prefix + part] = value[None] if part == "codes" else value[:-1].clone()

    with pytest.raises(FormatError, match=f"wi_{part}"):
        qm.load(edited(compressed, tmp_path, shrink))


def test_a_missing_tensor_is_named(compressed, tmp_path):
    target = edited(compressed, tmp_path, lambda tensors, prefix: tensors.pop(prefix + "codes"))
    with pytest.raises(CheckpointError, match="wi_codes"):
        qm.load(target)


def test_configurations_of_other_makers_and_versions_are_refused(compressed, switch, tmp_path):
    with pytest.raises(CheckpointError, match="not compressed by qmoe"):
        qm.load(switch)
    target = tmp_path / "edited"
    shutil.copytree(compressed[0], target)
    config = json.loads((target / "config.json").read_text())

    def rewrite(**changes):
        changed = {**config, "quantization_config": {**config["quantization_config"], **changes}}
        (target / "config.json").write_text(json.dumps(changed))

    for other in (1, 5):
        rewrite(format=other)
        with pytest.raises(FormatError, match=f"format {other}; this qmoe-lite reads 2"):
            qm.load(target)
    rewrite(format=2)
    rewrite(layers={})
    with pytest.raises(FormatError, match="other compressed layers"):
        qm.load(target)
    forged = [{**book, "counts": [1, 2, 3]} for book in config["quantization_config"]["codebooks"]]
    rewrite(codebooks=forged)
    with pytest.raises(FormatError):
        qm.load(target)
    rewrite(codebooks=[])
    with pytest.raises(FormatError, match="damaged quantization_config"):
        qm.load(target)


def test_an_output_head_of_its_own_is_kept(switch, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(switch, source)
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["shared.weight"] * 0.5
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    qm.compress(source, tmp_path / "out", recipe="nearest")
    packed = qm.load(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(packed.lm_head.weight, tensors["lm_head.weight"])
    assert torch.equal(packed.encoder.embed_tokens.weight, tensors["shared.weight"])


def test_a_device_that_cannot_be_used_is_refused_in_one_line(compressed, monkeypatch):
    from qmoe_lite.cuda import launch

    monkeypatch.setattr(launch, "reason", lambda index=0: "no NVIDIA GPU or driver was found.")
    with pytest.raises(DeviceError, match="device cuda: no NVIDIA GPU"):
        qm.load(compressed[0], device="cuda")
    with pytest.raises(SettingError, match="device is mps; expected"):
        qm.load(compressed[0], device="mps")


def test_a_budget_for_experts_keeps_them_on_the_cpu_unless_a_device_is_named(compressed, monkeypatch):
    from qmoe_lite.cuda import launch
    from qmoe_lite.offload import runner as offload

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(launch, "reason", lambda index=0: None)
    model = qm.load(compressed[0], expert_cache="1GiB")
    assert model.device.type == "cpu"
    runner_of(model).close()
    asked = []
    monkeypatch.setattr(offload, "attach", lambda model, **budgets: asked.append(budgets["devices"]))
    monkeypatch.setattr(torch.nn.Module, "to", lambda model, device: model)
    qm.load(compressed[0], device="cuda", expert_cache="1GiB")
    assert asked == [["cuda:0"]]
