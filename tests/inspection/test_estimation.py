"""`qmoe estimate`: sizes against what compress wrote, models that are not here, and what does not fit."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import qmoe_lite as qm
from qmoe_lite.checkpoint.headers import Held, read_headers
from qmoe_lite.checkpoint.report import read_report
from qmoe_lite.compression.choice import choose
from qmoe_lite.compression.layer import LayerCompressor
from qmoe_lite.compression.settings import Settings
from qmoe_lite.compression.shares import MEASURED, NONE
from qmoe_lite.inspection import estimation, time_model
from qmoe_lite.inspection import speeds as measuring
from qmoe_lite.inspection.anatomy import anatomy_of
from qmoe_lite.inspection.drawn_experts import DrawnExperts
from qmoe_lite.inspection.fitting import Room, doubts, obstacles
from qmoe_lite.inspection.memory_model import need_of, rows_of
from qmoe_lite.inspection.speeds import Speeds, scaled_expert, solve_work, token_work
from qmoe_lite.inspection.time_model import seconds_of

C_2048 = {  # flaxformer/t5x/configs/moe/models/switch_c.gin
    "model_type": "switch_transformers",
    "architectures": ["SwitchTransformersForConditionalGeneration"],
    "d_model": 2080,
    "d_ff": 6144,
    "d_kv": 64,
    "num_heads": 30,
    "num_layers": 15,
    "num_decoder_layers": 15,
    "num_sparse_encoder_layers": 15,
    "num_sparse_decoder_layers": 15,
    "encoder_sparse_step": 1,
    "decoder_sparse_step": 1,
    "num_experts": 2048,
    "vocab_size": 32128,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
SPEEDS = Speeds(1e11, 0.1, 0.2, 1e-3, 1e-2, 1e-5, {"a": (64, 32), "b": (32, 64)}, 1e-8, 1e-10, 1.0, 1e10, 1e9, "x", 1e8)


@pytest.fixture
def c_2048(tmp_path):
    (tmp_path / "c-2048").mkdir()
    (tmp_path / "c-2048" / "config.json").write_text(json.dumps(C_2048))
    return tmp_path / "c-2048"


def test_the_paper_s_largest_model_by_its_configuration_alone(c_2048):
    found = qm.estimate(c_2048, rate=0.8, measuring=False)
    experts = 30 * 2048 * 2 * 2080 * 6144
    assert found.parameters["experts"] == experts == 1_570_347_417_600
    assert found.compressed_bytes["experts"] == experts // 10
    assert 158e9 < sum(found.compressed_bytes.values()) < 160e9
    assert found.dense_bytes["experts"] == 2 * experts
    assert found.compressing.samples == 80 * 2048
    assert "config.json" in found.read
    assert not found.measured
    assert found.compressing.seconds is None
    (memory, disk) = found.compressing.obstacles
    assert "It would fit with --spill DIR or --samples" in memory
    assert "Give OUT on another disk, or a lower --rate." in disk


@pytest.mark.parametrize("model_type", ["switch_transformers", "qwen3_moe", "gpt_oss"])
def test_sizes_are_those_that_compress_reports(request, model_type):
    if model_type == "switch_transformers":
        model, made = request.getfixturevalue("switch"), request.getfixturevalue("compressed")[0]
    else:
        model = request.getfixturevalue("causal")(model_type)
        made = request.getfixturevalue("compressed_causal")(model_type)
    report, anatomy = read_report(made), anatomy_of(read_headers(model))
    assert anatomy.expert_bytes == report.sizes["dense_expert_bytes"]
    assert anatomy.other_bytes == report.sizes["dense_other_bytes"]
    assert anatomy.kept_bytes == report.sizes["other_bytes"]
    assert anatomy.experts == report.expert_weights


@pytest.mark.parametrize("tune", ["none", "targets"])
def test_rows_are_those_of_a_run(switch, tokenizer, text_file, tune):
    from qmoe_lite.compression.run_samples import RunSamples, twins_for

    settings = Settings(samples=24, sequence_length=32, validation_samples=2, tune=tune)
    anatomy = anatomy_of(read_headers(switch))
    samples, _ = RunSamples.make(text_file, tokenizer, 24, True, settings, twins_for(anatomy.layers, settings))
    rows = rows_of(anatomy, settings)
    assert (rows.twins, rows.validation) == (24 * (tune == "targets"), 4)
    assert (rows.samples, rows.all) == (samples.calibration, len(samples.all))
    assert rows.tokens == [samples.all.input_ids.shape[1], samples.all.labels.shape[1]]


def test_a_model_on_the_hub_is_known_by_its_headers(causal, tmp_path, monkeypatch):
    model = causal("qwen3_moe")
    local = read_headers(model)
    assert local.held
    shutil.copy(model / "config.json", tmp_path)
    tensors = {
        name: SimpleNamespace(shape=list(each.shape), dtype={2: "BF16", 4: "F32"}[each.dtype.itemsize])
        for name, each in local.held.items()
    }
    answer = SimpleNamespace(files_metadata={"model.safetensors": SimpleNamespace(tensors=tensors)})
    fetched = []

    def download(name, file):
        fetched.append(file)
        return str(tmp_path / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.HfApi.get_safetensors_metadata", lambda api, name: answer)
    remote = read_headers("some/model")
    assert fetched == ["config.json"]
    assert remote.held == local.held
    assert not remote.shards
    assert anatomy_of(remote).expert_bytes == anatomy_of(local).expert_bytes


def test_packed_experts_are_counted_by_their_headers(causal):
    plain = read_headers(causal("qwen3_moe"))
    held, expected = {}, 0
    for name, each in plain.held.items():
        if ".experts." not in name:
            held[name] = each
            continue
        rows, columns = each.shape
        parts = {"_packed": ((rows, -(-columns // 8)), torch.int32), "_scale": ((rows, columns // 4), torch.bfloat16)}
        for part, (shape, dtype) in {**parts, "_shape": ((2,), torch.int64)}.items():
            held[name + part] = Held(name + part, shape, dtype)
            expected += held[name + part].nbytes
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 4}
    group = {"targets": ["Linear"], "weights": weights, "format": "pack-quantized"}
    settings = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}}
    packed = replace(plain, held=held, config={**plain.config, "quantization_config": settings})
    found = anatomy_of(packed)
    assert found.expert_bytes == expected
    assert found.experts == anatomy_of(plain).experts
    assert found.kept_bytes == anatomy_of(plain).kept_bytes


def test_without_files_their_dtype_is_read_or_said_to_be_assumed(causal, tmp_path):
    config = json.loads((causal("qwen3_moe") / "config.json").read_text())
    for name in ("dtype", "torch_dtype"):
        config.pop(name, None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = anatomy_of(read_headers(tmp_path))
    assert found.expert_bytes == 2 * found.experts
    assert found.assumed == ["weights of bfloat16: there are no files, and config.json names no dtype"]


def test_missing_shards_and_damaged_headers(causal, tmp_path):
    shutil.copy(causal("qwen3_moe") / "config.json", tmp_path)
    index = {"metadata": {"total_size": 10**6}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    found = anatomy_of(read_headers(tmp_path))
    assert found.expert_bytes + found.other_bytes == 10**6
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(qm.QMoEError, match="has a damaged header"):
        read_headers(tmp_path)


def test_what_cannot_fit_is_told_from_what_may_not(switch):
    anatomy = anatomy_of(read_headers(switch))
    grid, settings = choose(None, Settings(samples=4000, sequence_length=128), "switch_transformers", 2)
    need = need_of(anatomy, settings, grid, 1.0)
    assert need.certain < need.memory
    assert need.certain_disk < need.disk
    what = anatomy, settings, grid
    plenty = Room(10**12, 10**12)
    assert not [*obstacles(need, 0, plenty, *what), *doubts(need, 0, plenty, *what)]
    tight = Room(need.certain - 1, 10**12)
    (text,) = obstacles(need, 0, tight, *what)
    assert "It would fit with --spill DIR or --activations bfloat16 or --samples " in text
    samples = int(text.rpartition(" ")[2].rstrip("."))
    assert 3000 < samples < 4000
    assert not list(doubts(need, 0, tight, *what))
    unsure = Room(need.certain, 10**12)
    assert not list(obstacles(need, 0, unsure, *what))
    (text,) = doubts(need, 0, unsure, *what)
    assert text.startswith("about ")
    (text,) = obstacles(need, 0, Room(10**12, need.certain_disk - 1), *what)
    assert text.endswith("Give OUT on another disk.")
    spilled = need_of(anatomy, settings, grid, 1.0, spilled=True)
    assert need.memory - spilled.memory == need.activations == spilled.activations
    assert not list(obstacles(spilled, 0, Room(need.certain - 1, 10**12, need.activations), *what))
    (text,) = doubts(spilled, 0, Room(10**12, 10**12, need.activations - 1), *what)
    assert text.endswith(" are free. Name one on another disk.")
    (text,) = obstacles(spilled, 0, Room(spilled.certain - 1, 10**12, 10**12), *what)
    assert "--spill" not in text


@pytest.mark.parametrize("room", [Room(10**6, 10**12), Room(10**12, 10)])
def test_compress_refuses_before_it_writes(run, tmp_path, switch, text_file, monkeypatch, room):
    monkeypatch.setattr(estimation, "room_for", lambda out, spill: room)
    code, printed, noted = run(
        "compress", switch, tmp_path / "out", "--calibration", text_file, "--sequence-length", 32
    )
    assert (code, printed) == (1, "")
    assert noted.startswith(f"qmoe: {tmp_path}/out cannot be made here: at least ")
    assert not list(tmp_path.iterdir())


def test_the_command_prints_at_most_80_columns_and_says_what_it_rests_on(run, c_2048, tmp_path, monkeypatch):
    monkeypatch.setattr(estimation, "measure", lambda *args: SPEEDS)
    code, printed, noted = run("estimate", c_2048, "--rate", 0.8, "--expert-cache", "16GiB")
    assert (code, noted) == (0, "")
    assert max(map(len, printed.splitlines())) <= 80
    for heading in ("parameters", "memory", "disk", "time", "speed", "read", "measured", "assumed"):
        assert f"\n{heading} " in printed
    assert "1,570,347,417,600 x 0.8 bits / 8" in printed
    code, printed, _ = run("estimate", c_2048, "--json", "--no-measure", "--rate", 0.8)
    found = json.loads(printed)
    assert found["measured"] == {}
    assert found["compressed_bytes"]["experts"] == 157_034_741_760
    code, printed, _ = run("estimate", c_2048, "--json", "--no-measure", "--rate", 0.8, "--spill", tmp_path)
    spilled = json.loads(printed)["compressing"]
    saved = found["compressing"]["memory_bytes"] - spilled["memory_bytes"]
    assert saved == pytest.approx(spilled["activation_bytes"], rel=1e-3)


def test_times_grow_with_the_work():
    small, large = {"a": (64, 32), "b": (32, 64)}, {"a": (128, 64), "b": (64, 128)}
    assert solve_work(large) == 8 * solve_work(small)
    assert token_work(large) == 4 * token_work(small)
    own, token = scaled_expert(SPEEDS, small)
    assert own == pytest.approx(SPEEDS.expert)
    assert token == pytest.approx(SPEEDS.expert_token)
    assert scaled_expert(SPEEDS, large)[0] > 5 * own
    assert scaled_expert(SPEEDS, large)[1] == pytest.approx(4 * token)


def test_experts_with_few_tokens_take_the_time_of_the_layer_s(causal):
    headers = read_headers(causal("qwen3_moe"))
    anatomy = anatomy_of(headers)

    def seconds(**changes):
        settings = Settings(sequence_length=32, validation_samples=0, tune="none", **changes)
        found = seconds_of(anatomy, settings, headers, SPEEDS, 10**12, [])
        return found["experts: Hessians and outputs"]

    few, alone = seconds(samples=1), seconds(samples=1, blend_tokens=0)
    assert 1.5 * alone < few < (1 + anatomy.layers[0].count) * alone  # the sample here is that of all tokens
    assert seconds(samples=1000) == pytest.approx(1000 * alone)


def test_each_stage_takes_of_the_layer_s_tokens_what_it_needs(causal):
    anatomy = anatomy_of(read_headers(causal("qwen3_moe")))
    shapes = {"gate_proj": (768, 2048), "up_proj": (768, 2048), "down_proj": (2048, 768)}
    layer = replace(anatomy.layers[0], count=128, top_k=8, shapes=shapes)
    for samples, expected in ((32, (4096, 1536)), (4, (512, 512)), (128, (4096, 0)), (256, (0, 0))):
        settings = Settings(sequence_length=128, samples=samples, validation_samples=0, tune="none")
        rows = rows_of(anatomy, settings)
        assert time_model._of_layer(layer, settings, rows, 0) == expected
        off = replace(settings, blend_tokens=0)
        assert time_model._of_layer(layer, off, rows, 0) == (0, 0)


def test_what_is_tuned_takes_its_time(causal):
    headers = read_headers(causal("qwen3_moe"))
    anatomy, phases, speeds = anatomy_of(headers), {}, replace(SPEEDS, tuned=0.02, tuned_token=3e-5)
    for tune in ("none", "targets", "block"):
        settings = Settings(sequence_length=32, samples=2000, tune=tune)
        phases[tune] = seconds_of(anatomy, settings, headers, speeds, 10**12, [])
    none, targets, block = (phases[tune].pop("experts: tuning", 0) for tune in phases)
    assert 0 == none < targets < block
    seconds = (0.02 * solve_work(layer.shapes) / solve_work(SPEEDS.shape) for layer in anatomy.layers)
    assert targets > sum(layer.count * own for layer, own in zip(anatomy.layers, seconds, strict=True))
    assert phases["none"]["dense parts"] < phases["targets"]["dense parts"] == phases["block"]["dense parts"]


def test_what_is_measured_first_takes_its_time_and_its_activations(causal):
    headers = read_headers(causal("qwen3_moe"))
    anatomy, found = anatomy_of(headers), {}
    for word in (MEASURED, NONE):
        grid, settings = choose(None, Settings(sequence_length=32, samples=8, sensitivity=word), "qwen3_moe", 2)
        phases = seconds_of(anatomy, settings, headers, SPEEDS, 10**12, [])
        found[word] = phases.pop("what layers lose alone", 0), phases, need_of(anatomy, settings, grid, 2.0)
    assert found[NONE][0] == 0 < found[MEASURED][0]
    assert found[NONE][1] == found[MEASURED][1]
    own, more = (found[word][2].activations for word in (NONE, MEASURED))  # 8 samples, and 4 of each layer
    hidden, columns = anatomy.hidden, anatomy.layers[0].shapes["gate_proj"][1]
    copies = (8 + 4 * len(anatomy.layers)) * 32 * 4 * (hidden + columns)
    assert more == max(own, copies)


def test_groups_are_solved_again_on_the_layers_that_decide_on_the_rate(causal):
    headers = read_headers(causal("qwen3_moe"))
    anatomy = anatomy_of(headers)
    experts = anatomy.layers[0].count

    def seconds(group_size, rate):
        settings = Settings(sequence_length=32, validation_samples=0, blend_tokens=0, group_size=group_size, rate=rate)
        return seconds_of(anatomy, settings, headers, SPEEDS, 10**12, [])["experts: solving and encoding"]

    again = [seconds(size, 2.0) - seconds(size, None) for size in (1, experts)]
    assert again[0] / 5 == pytest.approx(again[1] / 4 / experts)


def test_experts_of_a_decoder_are_measured_with_its_own_activation(causal):
    anatomy = anatomy_of(read_headers(causal("qwen3_moe")))
    run = DrawnExperts(anatomy, Settings(sequence_length=32), qm.MinMaxTernary(torch.bfloat16))
    assert run.seconds(anatomy.layers[0].shapes, 2, 8) > 0


def test_of_full_tuning_what_comes_first_is_estimated(causal):
    found, whole = (qm.estimate(causal("qwen3_moe"), rate=2.0, tune=tune, measuring=False) for tune in (None, "full"))
    assert whole.compressing.activation_bytes == found.compressing.activation_bytes > 0
    assert set(whole.assumed) - set(found.assumed) == {"training the whole model afterwards is not counted"}


@pytest.mark.parametrize("tune", ["targets", "block"])
def test_experts_are_tuned_where_that_is_measured(causal, tune, monkeypatch):
    anatomy, tuned = anatomy_of(read_headers(causal("qwen3_moe"))), []
    own = LayerCompressor.compress
    monkeypatch.setattr(LayerCompressor, "compress", lambda *what: tuned.append(own(*what).tuning))
    run = DrawnExperts(anatomy, Settings(sequence_length=32, tune=tune), qm.UniformGrid(1.0))
    assert run.seconds(anatomy.layers[0].shapes, 2, 8, tuned=True) > 0
    assert run.seconds(anatomy.layers[0].shapes, 2, 8) > 0
    assert tuned[0]["seconds"] > 0
    assert not tuned[1]


@pytest.mark.parametrize(
    ("more", "found"), [(1.25, (0.5, 0.25)), (2.0, (0.125, 0.625)), (6.0, (0.0, 2.0)), (0.1, (0.75, 0.0))]
)
def test_neither_a_tuned_expert_nor_its_tokens_take_less_than_nothing(more, found, monkeypatch):
    # untuned 1 s of any tokens; tuned .75 more of one token, so many more of three
    best = lambda shapes, experts, tokens, tuned=False: 1.0 + tuned * (0.75 if tokens == 1 else more)  # noqa: E731
    monkeypatch.setattr(measuring, "_TUNED", 2)
    assert measuring._tuning(SimpleNamespace(best=best), {}, 1, 1.0) == pytest.approx(found)


@pytest.mark.slow
def test_a_machine_is_measured(switch):
    found = qm.estimate(switch, samples=24, sequence_length=32)
    assert found.compressing.seconds > 0
    assert found.running.tokens_per_second > 0
    for name in ("multiply", "encode", "codes", "vector", "disk", "save"):
        assert found.measured[name] > 0
    for name in ("expert", "tuned"):  # on a busy machine all of such small ones may seem to go with their tokens
        assert found.measured[name] + found.measured[f"{name}_token"] > 0
    assert found.running.resident == 1.0
