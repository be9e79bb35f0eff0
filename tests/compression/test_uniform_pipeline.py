"""Models compressed at a rate: their bits, their logits, everything that reads them, and what is refused."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import tiny
import torch
from checks import Killed, bytes_of
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import qmoe_lite as qm
from qmoe_lite.checkpoint.atomic import write_tensors
from qmoe_lite.checkpoint.format import FORMAT, WINDOW_PARTS
from qmoe_lite.compression.layer import LayerCompressor
from qmoe_lite.compression.verdict import Verdict
from qmoe_lite.errors import BadResultError, FormatError, SettingError
from qmoe_lite.offload import attach
from qmoe_lite.tuning.train import Tuner

WIDE = {"hidden_size": 64, "num_hidden_layers": 2, "num_experts": 5}  # rows that their metadata do not outweigh
MODELS = {
    "qwen3_moe": {**WIDE, "moe_intermediate_size": 96, "intermediate_size": 48, "mlp_only_layers": []},
    "mixtral": {**WIDE, "num_local_experts": 4, "intermediate_size": 80},
}
TEXT = {"samples": 48, "sequence_length": 32, "validation_samples": 4, "tune": "none"}


@pytest.fixture(scope="module")
def made(tmp_path_factory, tokenizer, text_file):
    """A function: family, rate -> (dense directory, compressed directory, report), once each."""
    known = {}

    def make(model_type="qwen3_moe", rate=2.5):
        if (model_type, rate) not in known:
            place = tmp_path_factory.mktemp(f"{model_type}-{rate}")
            dense = tiny.make_causal(place / "dense", tokenizer, model_type, **MODELS[model_type])
            give_outliers(dense)
            report = qm.compress(dense, place / "out", calibration=text_file, rate=rate, **TEXT)
            known[model_type, rate] = dense, place / "out", report
        return known[model_type, rate]

    return make


def give_outliers(directory):
    """Make some weights so large that their digits are exceptions."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if ".experts." in name:
            tensor[::7, 3] *= 40
    save_file(tensors, file, {"format": "pt"})


def logits(model, seed=0):
    ids = torch.randint(2, model.config.vocab_size, (2, 19), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.slow
@pytest.mark.parametrize("rate", [1.6, 2.5, 4.0])
def test_the_experts_take_the_bits_that_were_asked_for(made, rate):
    _, out, report = made(rate=rate)
    assert report.bits_per_weight == pytest.approx(rate, rel=0.01)
    assert report.settings["rate"] == rate
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (config["format"], {book["kind"] for book in config["codebooks"]}) == (FORMAT, {"windows"})


def with_experts(directory, target, change):
    """Copy a model, its experts changed by `change(name, tensor)`."""
    shutil.copytree(directory, target)
    tensors = load_file(target / "model.safetensors")
    changed = {name: change(name, t) if ".experts." in name else t for name, t in tensors.items()}
    save_file(changed, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.mark.slow
@pytest.mark.parametrize("group_size", [1, 2])
def test_groups_that_differ_take_the_bits_together(made, text_file, tmp_path, group_size):
    def other(name, tensor):
        tensor[:, ::5] *= 30 if ".experts.3." in name else 1
        return tensor

    dense = with_experts(made()[0], tmp_path / "dense", other)
    report = qm.compress(dense, tmp_path / "out", calibration=text_file, rate=2.5, group_size=group_size, **TEXT)
    assert report.bits_per_weight == pytest.approx(2.5, rel=0.02)


@pytest.mark.slow
def test_experts_of_zeros_take_no_others_bits(made, text_file, tmp_path):
    dense = with_experts(made()[0], tmp_path / "dense", lambda name, t: t * 0 if ".layers.0." in name else t)
    report = qm.compress(dense, tmp_path / "out", calibration=text_file, rate=2.5, **TEXT)
    bits = {row.layer: row.bits_per_weight for row in report.projections if row.projection == "down_proj"}
    assert 1.8 < bits["model.layers.1.mlp.experts"] < 3.5
    assert report.degraded[-1].endswith("instead of 2.5")
    assert qm.verify(tmp_path / "out") == []


@pytest.mark.slow
def test_more_bits_lose_less(made):
    errors = [sum(made(rate=rate)[2].held_out_error.values()) for rate in (1.6, 2.5, 4.0)]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", MODELS)
def test_logits_are_those_of_the_dequantised_experts(made, model_type):
    dense, out, _ = made(model_type)
    packed = qm.load(out, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    tiny.fill_dense(model, packed, [f"model.layers.{i}.mlp.experts" for i in range(2)])
    expected = logits(model)
    assert (logits(packed) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_gate_and_up_share_their_column_scales(made):
    model = qm.load(made()[1])
    experts = model.model.layers[0].mlp.experts
    assert tuple(experts.get_buffer("up_proj_column_scales").shape) == (5, 0)
    gate, up = (experts.packed(3, name).column_scales for name in ("gate_proj", "up_proj"))
    assert torch.equal(gate, up)


def test_a_copy_by_save_pretrained_is_the_same(made, tmp_path):
    model = qm.load(made()[1])
    model.save_pretrained(tmp_path / "copy")
    again = qm.load(tmp_path / "copy")
    assert torch.equal(logits(again), logits(model))
    assert not [finding for finding in qm.verify(tmp_path / "copy") if finding.severity == "error"]


def test_experts_from_disk_compute_the_same_bits(made):
    out = made()[1]
    whole = logits(qm.load(out))
    model = qm.load(out)
    size = sum(buffer.nbytes for name, buffer in model.named_buffers() if name.endswith("_codes"))
    runner = attach(model, ram_cache=max(size // 3, 70_000), offload="disk", remember=False)
    assert torch.equal(logits(model), whole)
    runner.close()


def test_verify_and_inspect_know_the_code(made, run):
    from qmoe_lite.inspection.contents import inspect_model

    _, out, report = made()
    assert qm.verify(out) == []
    found = inspect_model(out)
    assert found.totals["bits_per_weight"] == report.bits_per_weight
    assert set(found.projections[0].part_bytes) == set(WINDOW_PARTS)
    row = found.projections[0].report
    assert 0 < row.zeros < 1
    assert row.entropy < row.code_bits_per_weight
    assert row.largest_digit >= 1
    steps = [each.report.step for each in found.projections]
    assert all(0.05 < step < 8 for step in steps)
    assert found.projections[0].report.step == found.projections[1].report.step
    grid = json.loads((out / "config.json").read_text())["quantization_config"]["grid"]
    assert min(steps) <= grid["step"] <= max(steps)
    assert report.settings["grid"] == grid
    code, printed, _ = run("inspect", out)
    assert (code, "times the root mean square of a row" in printed, f"{steps[0]:.3f}" in printed) == (0, True, True)


@pytest.mark.slow
def test_a_grid_without_column_steps_is_stored_with_scales_of_one(made, text_file, tmp_path):
    grid = qm.UniformGrid(level_dtype=torch.bfloat16, column_steps=False)
    qm.compress(made()[0], tmp_path / "out", calibration=text_file, rate=2.5, grid=grid, **TEXT)
    assert qm.verify(tmp_path / "out") == []
    assert torch.isfinite(logits(qm.load(tmp_path / "out"))).all()


@pytest.mark.slow
def test_a_group_that_is_solved_again_keeps_the_hessians_of_its_inputs(made, text_file, tmp_path, monkeypatch):
    dense, whole, _ = made()
    stages, solves = [], []
    hessians, solve = LayerCompressor._hessians, LayerCompressor._solve

    def counted(self, seen, rows_of, before, *rest):
        stages.append(len(before[0]))
        return hessians(self, seen, rows_of, before, *rest)

    monkeypatch.setattr(LayerCompressor, "_hessians", counted)
    monkeypatch.setattr(LayerCompressor, "_solve", lambda *given: solves.append(1) or solve(*given))
    qm.compress(dense, tmp_path / "out", calibration=text_file, rate=2.5, sensitivity="none", **TEXT)
    assert len(solves) > 2, "no group was solved twice"
    assert (stages.count(0), stages.count(2)) == (2, len(solves))
    assert bytes_of(tmp_path / "out").keys() == bytes_of(whole).keys()


@pytest.mark.slow
def test_experts_that_see_the_same_tokens_share_a_hessian(tokenizer, text_file, tmp_path, monkeypatch):
    every = {**MODELS["mixtral"], "num_experts_per_tok": 4}
    dense = tiny.make_causal(tmp_path / "dense", tokenizer, "mixtral", **every)
    qm.compress(dense, tmp_path / "shared", calibration=text_file, rate=2.5, **TEXT)
    whole = LayerCompressor._hessians

    def apart(self, seen, rows_of, before, starved, columns, aimed=()):
        each = [aimed[i : i + 1] for i in range(len(rows_of))]
        alone = zip(rows_of, before, starved, each, strict=True)
        return torch.cat([whole(self, seen, [r], [b], [s], columns, a) for r, b, s, a in alone])

    monkeypatch.setattr(LayerCompressor, "_hessians", apart)
    qm.compress(dense, tmp_path / "apart", calibration=text_file, rate=2.5, **TEXT)
    shared, alone = (
        {k: v for k, v in bytes_of(tmp_path / n).items() if "report" not in k} for n in ("shared", "apart")
    )
    assert shared == alone


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bytes(made, text_file, tmp_path):
    dense, out, _ = made()
    settings = {"calibration": text_file, "rate": 2.5, **TEXT}

    def kill(event):
        if event.done == 1:
            raise Killed

    with pytest.raises(Killed):
        qm.compress(dense, tmp_path / "out", progress=kill, **settings)
    qm.compress(dense, tmp_path / "out", **settings)
    ignored = {"qmoe_report.json"}  # seconds
    assert {k: v for k, v in bytes_of(tmp_path / "out").items() if k not in ignored} == {
        k: v for k, v in bytes_of(out).items() if k not in ignored
    }


def test_the_verdict_is_of_the_two_models_losses(made, text_file):
    """The riders' losses are those of whole models on the same text."""
    from qmoe_lite.compression.calibration import make_samples, open_tokenizer, read_tokens
    from qmoe_lite.compression.documents import read_text
    from qmoe_lite.text.evaluation import summed_loss

    dense, out, report = made()
    tokens = read_tokens(read_text(text_file), open_tokenizer(dense), (48 + 4) * 32)
    samples = make_samples(tokens[-4 * 32 :], None, seq2seq=False, count=None, sequence_length=32, seed=0)
    verdict = Verdict.from_json(report.verdict)
    for directory, loss in ((dense, verdict.dense_loss), (out, verdict.loss)):
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        ids = torch.from_numpy(samples.input_ids)
        with torch.no_grad():
            found = model(ids).logits
        total = sum(summed_loss(found[i, :-1], ids[i, 1:]) for i in range(4))
        assert total / verdict.tokens == pytest.approx(loss, abs=2e-4)
    assert verdict.gap == pytest.approx(verdict.loss - verdict.dense_loss)


@pytest.mark.slow
def test_a_layer_that_goes_wrong_is_told_of_at_once(made, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr("qmoe_lite.compression.verdict.BAD_LAYER", 0.01)
    dense = made()[0]
    settings = {"calibration": text_file, "rate": 0.6, **TEXT}
    warnings = []
    report = qm.compress(dense, tmp_path / "a", progress=lambda e: warnings.append(e.warning), **settings)
    assert sum(warning is not None for warning in warnings) == 1
    assert next(filter(None, warnings)).startswith("model.layers.0 loses ")
    assert "instead of 0.6" in report.degraded[-1]
    with pytest.raises(BadResultError, match="work so far"):
        qm.compress(dense, tmp_path / "b", stop_when_bad=True, **settings)
    assert not (tmp_path / "b").exists()
    qm.compress(dense, tmp_path / "b", **settings)  # resumes
    assert (tmp_path / "b").is_dir()


def test_what_does_not_go_together_is_one_line(made, text_file, tmp_path):
    dense = made()[0]

    def refused(match, **settings):
        with pytest.raises(SettingError, match=match):
            qm.compress(dense, tmp_path / "out", calibration=text_file, **TEXT, **settings)

    refused("only the uniform grid reaches", rate=2, grid=qm.MinMaxTernary())
    refused("grid is 'two-bit'; expected a UniformGrid", grid="two-bit")
    refused("expected a UniformGrid", grid=qm.UniformGrid)
    refused("paper's dictionary codes ternary", rate=2, recipe="paper")
    refused("expected 0.6 to 4 stored bits", rate=5)
    refused("takes 9 to 12", grid=qm.UniformGrid(), codeword_bits=8)


@pytest.mark.parametrize(
    ("part", "forge"),
    [
        ("exception_positions", lambda t: torch.zeros(len(t) + 1, dtype=torch.int16).view(torch.uint16)),
        ("exception_starts", lambda t: t + 1),
        ("exception_starts", lambda t: t - 1),
        ("column_scales", lambda t: torch.full((5, 64), math.nan, dtype=torch.bfloat16)),
        ("column_scales", lambda t: t | 255),
        ("column_scales", lambda t: t[:, :-1]),
        ("row_codewords", lambda t: t ^ 1),
        ("row_codewords", lambda t: torch.cat([t, t, t], 1)),
        ("codes", lambda t: t ^ 255),
        ("levels", lambda t: torch.ones(5, 96, 2, dtype=torch.bfloat16)),
        ("levels", lambda t: t.repeat(1, 2)),
        ("levels", lambda t: t[:, :, None]),
        ("levels", lambda t: t[:-1]),
        ("levels", lambda t: torch.cat([t[:, :2], t[:, 2:3] | 128, t[:, 3:]], 1)),  # the shift
    ],
)
def test_forged_parts_are_refused_before_a_kernel_sees_them(made, tmp_path, part, forge):
    out = tmp_path / "forged"
    shutil.copytree(made(rate=1.6)[1], out)
    for file in sorted(out.glob("*.safetensors")):
        tensors = load_file(file)
        names = [name for name in tensors if name.endswith(f"gate_proj_{part}")]
        for name in names:
            tensors[name] = forge(tensors[name]).contiguous()
        save_file(tensors, file, {"format": "pt"})
    with pytest.raises(FormatError):
        logits(qm.load(out))


def test_a_directory_of_format_3_is_read(made, tmp_path):
    """Its row lengths are bytes, its steps and scales bfloat16."""
    old, model = tmp_path / "old", qm.load(made()[1], dtype=torch.float32)
    shutil.copytree(made()[1], old)
    experts = {name: m for name, m in model.named_modules() if isinstance(m, qm.PackedExperts)}
    held = {
        f"{name}.{projection}_{part}": tensor
        for name, module in experts.items()
        for projection in module.layer.projections
        for part, tensor in module.stack(projection).held.items()
    }
    index = json.loads((old / "model.safetensors.index.json").read_text())
    narrow = 0
    for file in sorted(old.glob("*.safetensors")):
        tensors = load_file(file)
        narrow += sum(held.get(name, tensor).dtype != tensor.dtype for name, tensor in tensors.items())
        index["metadata"]["crc32"] |= write_tensors(file, {name: held.get(name, t) for name, t in tensors.items()})
    assert narrow == 2 * (2 + 1 + 2)  # layers; steps and scales of gate and down, steps of up
    (old / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((old / "config.json").read_text())
    config["quantization_config"]["format"] = 3
    (old / "qmoe_report.json").unlink()  # it says what was stored
    (old / "config.json").write_text(json.dumps(config))
    again = qm.load(old, dtype=torch.float32)
    for name, module in experts.items():
        assert torch.equal(again.get_submodule(name).dense(3, "up_proj"), module.dense(3, "up_proj"))
    assert [finding.severity for finding in qm.verify(old)] == ["note"]  # there is no report
    stored = Tuner(again).stored()
    assert all(torch.equal(stored[name], held[name]) for name in stored if name in held)


def test_a_forged_dictionary_is_refused(made, tmp_path):
    out = tmp_path / "forged"
    shutil.copytree(made()[1], out)
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["codebooks"][0]["clip"] += 1
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError):
        qm.load(out)
