"""The pipeline: against a plain re-enactment on the whole model, and everything that can go wrong on the way."""

from __future__ import annotations

import dataclasses
import inspect
import json
import shutil

import pytest
import tiny
import torch
from checks import Killed, bytes_of, changed_copy
from safetensors.torch import load_file, save_file
from tiny import dense_model

import qmoe_lite as qm
from qmoe_lite.checkpoint.reader import Checkpoint
from qmoe_lite.compression import tally as tally_module
from qmoe_lite.compression.calibration import hessian_masks, make_samples, read_tokens, window_length
from qmoe_lite.compression.documents import read_text
from qmoe_lite.compression.layer import LayerCompressor
from qmoe_lite.compression.layer_parts import draw
from qmoe_lite.compression.settings import Settings
from qmoe_lite.errors import (
    CheckpointError,
    NotFiniteError,
    OutputError,
    ResumeError,
    SettingError,
    TextError,
    UnsupportedFamilyError,
)
from qmoe_lite.models.blocks import MoELayer
from qmoe_lite.quantization.grid import Quantized

SMALL = {"samples": 24, "sequence_length": 32, "validation_samples": 2, "tune": "none", "codeword_bits": 10}


def experts_inputs(model, name, samples):
    """What one experts module is given when the whole model runs: (tokens, width) and each token's expert."""
    caught = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda module, args: caught.append(args))
    with torch.no_grad():
        labels = torch.from_numpy(samples.labels)
        decoder_ids = model.prepare_decoder_input_ids_from_labels(labels)
        model(input_ids=torch.from_numpy(samples.input_ids), decoder_input_ids=decoder_ids)
    handle.remove()
    hidden, one_hot, _ = caught[0]
    return hidden, one_hot[:, 0].argmax(-1)


@pytest.mark.parametrize("sparse_layers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_digits_are_those_of_gptq_on_the_whole_models_activations(tmp_path, tokenizer, text_file, sparse_layers):
    source = tiny.make_switch(
        tmp_path / "m", tokenizer, num_sparse_encoder_layers=sparse_layers, num_sparse_decoder_layers=sparse_layers
    )
    # a cap that nothing reaches and no borrowed tokens: what is left is exactly the paper's procedure
    qm.compress(source, tmp_path / "out", calibration=text_file, token_cap=1e9, blend_tokens=0, **SMALL)
    packed = qm.load(tmp_path / "out", dtype=torch.float32)
    window = window_length(32)
    tokens = read_tokens(read_text(text_file), tokenizer, 26 * window)
    samples = make_samples(
        tokens[: len(tokens) - 2 * window], tokenizer, seq2seq=True, count=24, sequence_length=32, seed=0
    )
    masks = dict(zip(("encoder", "decoder"), hessian_masks(samples, tokenizer), strict=True))
    grid = qm.MinMaxTernary(level_dtype=torch.bfloat16)
    before: list[str] = []
    for name, module in packed.named_modules():
        if not isinstance(module, qm.PackedExperts):
            continue
        model = dense_model(source, packed, before)
        hidden, expert_of = experts_inputs(model, name, samples)
        eligible = torch.from_numpy(masks[name.split(".")[0]]).reshape(-1)
        for e in range(module.num_experts):
            x = hidden[(expert_of == e) & eligible]
            for projection in ("wi", "wo"):
                weight = getattr(model.get_submodule(name)[f"expert_{e}"], projection).weight.data
                expected = qm.gptq(weight, x.T @ x, grid)
                digits, levels = qm.decode(module.packed(e, projection))
                assert torch.equal(levels.float(), expected.levels)
                assert (digits == expected.digits).float().mean() > 0.99, (name, e, projection)
                x = torch.relu(x @ expected.weight.T)
        before.append(name)
    assert len(before) == 2 * sparse_layers


def test_nearest_is_plain_rounding(tmp_path, switch):
    report = qm.compress(switch, tmp_path / "out", recipe="nearest")
    packed = qm.load(tmp_path / "out")
    dense = dense_model(switch)
    for name, module in packed.named_modules():
        if isinstance(module, qm.PackedExperts):
            for e in range(module.num_experts):
                weight = dense.get_submodule(name)[f"expert_{e}"].wi.weight
                low, high = (w.to(torch.bfloat16).float() for w in (weight.amin(1), weight.amax(1)))
                expected = torch.where(weight > high[:, None] / 2, high[:, None], torch.zeros(()))
                expected = torch.where(weight < low[:, None] / 2, low[:, None], expected)
                assert torch.equal(module.dense(e, "wi"), expected)
    assert report.matrices == 16
    assert not report.degraded


def test_the_next_group_is_read_while_one_is_solved(switch, tmp_path, monkeypatch):
    events, solve = [], LayerCompressor._solve_group

    def solved(self, layer, group, *rest):
        events.append(("solve", layer.block[:7], group[0]))
        return solve(self, layer, group, *rest)

    def asked(self, names):
        events.extend(("read", name[:7], int(name.split("expert_")[1][0])) for name in names if ".wi." in name)

    monkeypatch.setattr(LayerCompressor, "_solve_group", solved)
    monkeypatch.setattr(Checkpoint, "will_need", asked)
    qm.compress(switch, tmp_path / "out", recipe="nearest", group_size=1)
    order = [("read", 1), ("solve", 0), ("read", 2), ("solve", 1), ("read", 3), ("solve", 2), ("solve", 3)]
    assert events == [(what, stack, expert) for stack in ("encoder", "decoder") for what, expert in order]


def test_the_report_adds_up(compressed, switch):
    out, report = compressed
    assert report.matrices == 2 * 4 * 2
    assert report.expert_weights == 2 * 4 * 2 * 24 * 40
    stored = sum(t.nbytes for f in out.glob("*.safetensors") for n, t in load_file(f).items() if ".experts." in n)
    assert report.bits_per_weight == 8 * stored / report.expert_weights
    written = json.loads((out / "qmoe_report.json").read_text())
    assert written["totals"]["matrices"] == 16
    assert written["settings"]["dampening"] == 0.1
    assert set(report.held_out_error) == {row.layer for row in report.projections}
    assert all(0 < error < 1 for error in report.held_out_error.values())
    for row in report.projections:
        assert sum(row.hessian_classes.values()) == row.experts == len(row.tokens)
    assert not list(out.glob("*.zst"))
    assert not (out / "state.json").exists()
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) == {n for f in out.glob("*.safetensors") for n in load_file(f)}


def test_dense_tensors_keep_every_bit(compressed, switch):
    out, _ = compressed
    before = load_file(switch / "model.safetensors")
    after = {n: t for f in out.glob("*.safetensors") for n, t in load_file(f).items()}
    for name, tensor in before.items():
        if ".experts." not in name:
            assert torch.equal(after[name], tensor)
            assert after[name].dtype == tensor.dtype


def test_the_same_settings_give_the_same_bytes(tmp_path, compressed, switch, text_file):
    qm.compress(switch, tmp_path / "again", calibration=text_file, **SMALL)
    assert bytes_of(tmp_path / "again") == bytes_of(compressed[0])


def test_no_token_is_dropped_whatever_the_models_capacity(tmp_path, compressed, switch, text_file):
    tight = tmp_path / "tight"
    shutil.copytree(switch, tight)
    config = json.loads((tight / "config.json").read_text())
    config["expert_capacity"] = 1
    (tight / "config.json").write_text(json.dumps(config))
    qm.compress(tight, tmp_path / "out", calibration=text_file, **SMALL)
    assert bytes_of(tmp_path / "out") == bytes_of(compressed[0])


@pytest.mark.parametrize("kind", ["sharded", "bin"])
def test_shards_and_bin_files_are_read_alike(tmp_path, compressed, switch, text_file, kind):
    other = tmp_path / "other"
    shutil.copytree(switch, other)
    tensors = load_file(other / "model.safetensors")
    (other / "model.safetensors").unlink()
    if kind == "bin":
        torch.save(tensors, other / "pytorch_model.bin")
    else:
        names = sorted(tensors)
        weight_map = {}
        for i in range(3):
            part = {n: tensors[n] for n in names[i::3]}
            save_file(part, other / f"model-0000{i + 1}-of-00003.safetensors")
            weight_map |= dict.fromkeys(part, f"model-0000{i + 1}-of-00003.safetensors")
        (other / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    qm.compress(other, tmp_path / "out", calibration=text_file, **SMALL)
    ours, reference = (
        {n: t for f in d.glob("*.safetensors") for n, t in load_file(f).items()}
        for d in (tmp_path / "out", compressed[0])
    )
    assert ours.keys() == reference.keys()
    assert all(torch.equal(ours[n].view(torch.uint8), reference[n].view(torch.uint8)) for n in ours if ours[n].dim())


@pytest.mark.slow
@pytest.mark.parametrize("sparse_layers", [1, 2])
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(tmp_path, tokenizer, text_file, sparse_layers):
    source = tiny.make_switch(
        tmp_path / "m", tokenizer, num_sparse_encoder_layers=sparse_layers, num_sparse_decoder_layers=sparse_layers
    )
    settings = {"calibration": text_file, "batch_size": 5, **SMALL}
    whole = qm.compress(source, tmp_path / "whole", **settings)
    for killed_after in range(1, 2 * sparse_layers + 1):
        out = tmp_path / f"out{killed_after}"

        def kill(event, killed_after=killed_after):
            if event.done == killed_after:
                raise Killed

        with pytest.raises(Killed):
            qm.compress(source, out, progress=kill, **settings)
        assert not out.exists()
        places = []
        report = qm.compress(source, out, progress=places.append, **settings)
        assert bytes_of(out) == bytes_of(tmp_path / "whole")
        assert [p.layer for p in report.projections] == [p.layer for p in whole.projections]
        assert report.held_out_error == whole.held_out_error
        assert len(places) == 2 * sparse_layers - killed_after + 1  # the killed group is done again
        assert places[-1].done == places[-1].total
        assert not out.with_name(out.name + ".partial").exists()


def unfinished(tmp_path, switch, text_file):
    def kill(event):
        if event.done == 2:
            raise Killed

    with pytest.raises(Killed):
        qm.compress(switch, tmp_path / "out", calibration=text_file, progress=kill, **SMALL)


def test_unfinished_work_of_other_settings_is_refused_and_kept(tmp_path, switch, text_file):
    unfinished(tmp_path, switch, text_file)
    kept = bytes_of(tmp_path / "out.partial")
    assert kept
    with pytest.raises(ResumeError, match="--restart"):
        qm.compress(switch, tmp_path / "out", calibration=text_file, **{**SMALL, "samples": 23})
    assert bytes_of(tmp_path / "out.partial") == kept
    qm.compress(switch, tmp_path / "out", calibration=text_file, resume=False, **{**SMALL, "samples": 23})
    assert (tmp_path / "out").is_dir()


def test_a_directory_of_somebody_else_is_left_alone(tmp_path, switch):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("precious")
    for resume in (True, False):
        with pytest.raises(OutputError, match="is not ours"):
            qm.compress(switch, tmp_path / "out", recipe="nearest", resume=resume)
    assert (tmp_path / "out.partial" / "thesis.txt").read_text() == "precious"


def test_a_finished_run_that_cannot_take_its_name_is_kept(tmp_path, switch, text_file, monkeypatch):
    def fail(self, target):
        raise OSError(39, "Directory not empty")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.rename", fail)
        with pytest.raises(OutputError, match="Move the existing directory, then rerun"):
            qm.compress(switch, tmp_path / "out", calibration=text_file, **SMALL)
    places = []
    qm.compress(switch, tmp_path / "out", calibration=text_file, progress=places.append, **SMALL)
    assert not places  # nothing is computed again
    assert not list((tmp_path / "out").glob("*.zst"))


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path, switch, text_file, monkeypatch):
    unfinished(tmp_path, switch, text_file)
    kept = bytes_of(tmp_path / "out.partial")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", full)
        with pytest.raises(OutputError, match="No space left on device"):
            qm.compress(switch, tmp_path / "out", calibration=text_file, **SMALL)
    assert bytes_of(tmp_path / "out.partial") == kept
    assert not list((tmp_path / "out.partial").glob(".*.tmp"))
    qm.compress(switch, tmp_path / "out", calibration=text_file, **SMALL)


def test_what_is_no_model_is_refused(tmp_path, switch, text_file):
    cases = {
        tmp_path / "missing": "no model directory",
        tmp_path: "no config.json",
        text_file: "no model directory",
    }
    for path, message in cases.items():
        with pytest.raises(CheckpointError, match=message):
            qm.compress(path, tmp_path / "out", calibration=text_file)
    with pytest.raises(UnsupportedFamilyError, match=r"model type bert is not supported; supported: .*switch"):
        qm.compress(changed_copy(switch, tmp_path / "bert", model_type="bert"), tmp_path / "out", recipe="nearest")
    assert not list(tmp_path.glob("out*"))


def test_damaged_checkpoints_are_refused_before_anything_is_written(tmp_path, switch):
    def edited(name, edit):
        path = changed_copy(switch, tmp_path / name)
        tensors = load_file(path / "model.safetensors")
        edit(tensors)
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
        return path

    key = "encoder.block.1.layer.1.mlp.experts.expert_2.wo.weight"
    missing = edited("missing", lambda t: t.pop(key))
    with pytest.raises(CheckpointError, match=f"lacks the tensor {key}"):
        qm.compress(missing, tmp_path / "out", recipe="nearest")
    misshapen = edited("misshapen", lambda t: t.update({key: torch.ones(3, 5)}))
    with pytest.raises(CheckpointError, match=r"expert_2.wo.weight has shape \(3, 5\)"):
        qm.compress(misshapen, tmp_path / "out", recipe="nearest")
    with pytest.raises(CheckpointError, match="does not account for"):
        qm.compress(changed_copy(switch, tmp_path / "fewer", num_experts=3), tmp_path / "out", recipe="nearest")
    truncated = changed_copy(switch, tmp_path / "truncated")
    data = (truncated / "model.safetensors").read_bytes()
    (truncated / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="is damaged"):
        qm.compress(truncated, tmp_path / "out", recipe="nearest")
    no_weights = changed_copy(switch, tmp_path / "no_weights")
    (no_weights / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has no weights"):
        qm.compress(no_weights, tmp_path / "out", recipe="nearest")
    index = {"weight_map": {"shared.weight": "model-00001-of-00002.safetensors"}}
    (no_weights / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="lacks the shard model-00001-of-00002"):
        qm.compress(no_weights, tmp_path / "out", recipe="nearest")
    assert not list(tmp_path.glob("out*"))
    with pytest.raises(NotFiniteError, match=r"expert_2.wo.weight .* holds NaN"):
        qm.compress(edited("nan", lambda t: t[key][0].fill_(float("nan"))), tmp_path / "out", recipe="nearest")
    assert not (tmp_path / "out").exists()


def test_nan_in_the_dense_part_is_named(tmp_path, switch, text_file):
    path = changed_copy(switch, tmp_path / "nan")
    tensors = load_file(path / "model.safetensors")
    key = "encoder.block.0.layer.0.SelfAttention.q.weight"
    tensors[key][3, 4] = float("nan")
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(NotFiniteError, match=key):
        qm.compress(path, tmp_path / "out", calibration=text_file, **SMALL)


def test_a_missing_or_foreign_tokenizer_is_named(tmp_path, switch, tokenizer, text_file):
    path = changed_copy(switch, tmp_path / "none")
    for file in path.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        qm.compress(path, tmp_path / "out", calibration=text_file, **SMALL)
    small = tiny.make_switch(tmp_path / "small", tokenizer, vocab_size=20)
    with pytest.raises(SettingError, match="the model knows 20"):
        qm.compress(small, tmp_path / "out", calibration=text_file, **SMALL)


def test_outputs_that_exist_and_impossible_options_are_refused(tmp_path, switch, text_file, compressed):
    (tmp_path / "there").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        qm.compress(switch, tmp_path / "there", recipe="nearest")
    with pytest.raises(SettingError, match="needs no calibration text"):
        qm.compress(switch, tmp_path / "out", recipe="nearest", calibration=text_file)
    with pytest.raises(SettingError, match="codeword_bits is 7"):
        qm.compress(switch, tmp_path / "out", recipe="nearest", codeword_bits=7)
    with pytest.raises(TypeError, match="colour"):
        qm.compress(switch, tmp_path / "out", recipe="nearest", colour=7)
    with pytest.raises(SettingError, match="quantised already"):
        qm.compress(compressed[0], tmp_path / "out", recipe="nearest")
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    with pytest.raises(TextError, match="empty"):
        qm.compress(switch, tmp_path / "out", calibration=empty)
    assert not list(tmp_path.glob("out*"))


def test_every_setting_is_a_keyword_with_its_default():
    keywords = inspect.signature(qm.compress).parameters
    fields = {f.name: f.default for f in dataclasses.fields(Settings) if f.name != "device"}
    assert {name: keywords[name].default for name in fields} == fields
    other = {"model", "out", "calibration", "grid", "device", "resume", "progress", "family", "log", "before", "spill"}
    assert set(keywords) == {*fields, *other, "each_group", "ranks"}
    assert all(f"    {name} : " in qm.compress.__doc__ for name in keywords if name != "model")


def test_experts_without_tokens_borrow_or_are_reported(tmp_path, switch, text_file):
    few = {"samples": 1, "sequence_length": 32, "validation_samples": 0}
    borrowed = qm.compress(switch, tmp_path / "a", calibration=text_file, **few)
    assert any("blended" in p.hessian_classes for p in borrowed.projections)
    assert not any("nearest" in p.hessian_classes for p in borrowed.projections)
    alone = qm.compress(switch, tmp_path / "b", calibration=text_file, blend_tokens=0, **few)
    starved = sum(p.tokens.count(0) for p in alone.projections)
    assert starved > 0
    assert sum(p.hessian_classes.get("nearest", 0) for p in alone.projections) == starved
    assert f"{starved} matrices had no usable Hessian and were rounded to nearest" in alone.degraded


def test_the_token_cap_draws_at_random():
    rows = torch.arange(1000)
    drawn = draw(rows, 100, 0, 3)
    assert len(drawn) == 100
    assert torch.equal(drawn, drawn.sort().values)
    assert drawn.max() > 800  # not the first ones
    assert torch.equal(drawn, draw(rows, 100, 0, 3))
    assert not torch.equal(drawn, draw(rows, 100, 0, 4))
    assert torch.equal(draw(rows, 1000, 0, 3), rows)


def test_groups_shrink_to_the_memory_and_change_nothing(tmp_path, compressed, switch, text_file):
    places = []
    qm.compress(switch, tmp_path / "out", calibration=text_file, group_bytes=1, progress=places.append, **SMALL)
    assert len(places) == 8
    assert bytes_of(tmp_path / "out") == bytes_of(compressed[0])


def test_two_bit_models_are_stored_and_run_too(tmp_path, compressed, switch, text_file, tokenizer):
    grid = qm.MinMaxTwoBit(level_dtype=torch.bfloat16)
    report = qm.compress(switch, tmp_path / "out", calibration=text_file, grid=grid, **SMALL)
    packed = qm.load(tmp_path / "out", dtype=torch.float32)
    names = [name for name, module in packed.named_modules() if isinstance(module, qm.PackedExperts)]
    dense = dense_model(switch, packed, names)
    settings = {"sequence_length": 32, "samples": 5}
    found, expected = (qm.evaluate(model, tokenizer, text_file, **settings).loss for model in (packed, dense))
    assert found == pytest.approx(expected, rel=1e-5)
    assert all(report.held_out_error[name] < compressed[1].held_out_error[name] for name in names)


@pytest.mark.parametrize("what", ["activations", "products"])
def test_bfloat16_comes_close(tmp_path, compressed, switch, text_file, what):
    report = qm.compress(switch, tmp_path / "out", calibration=text_file, **{what: "bfloat16"}, **SMALL)
    assert report.held_out_error != compressed[1].held_out_error
    for name, error in compressed[1].held_out_error.items():
        assert report.held_out_error[name] == pytest.approx(error, rel=0.2)


def test_each_projection_s_own_digits_choose_its_codeword_bits(tmp_path, switch):
    """Digits of all experts, in rows: the tiny model has fewer than would be sampled."""
    chosen = qm.compress(switch, tmp_path / "chosen", recipe="nearest", grid=qm.MinMaxTernary(torch.bfloat16))
    packed = qm.load(tmp_path / "chosen")
    assert len({row.codeword_bits for row in chosen.projections}) > 1
    for row in chosen.projections:
        module = packed.get_submodule(row.layer)
        digits = torch.cat([qm.decode(module.packed(e, row.projection))[0] for e in range(module.num_experts)]).numpy()
        counts = [int((digits == digit).sum()) for digit in (-1, 0, 1)]
        assert module.codebooks[row.projection] == qm.Codebook.choose(counts, digits)
        assert row.codeword_bits == module.codebooks[row.projection].bits
    report = qm.compress(switch, tmp_path / "out", recipe="nearest", codeword_bits=9)
    assert report.settings["codeword_bits"] == 9
    assert {row.codeword_bits for row in report.projections} == {9}


@pytest.mark.parametrize(("most", "rows"), [(1 << 22, 60), (600, 30), (200, 10), (1, 6)])
def test_the_codebook_is_chosen_by_rows_of_every_expert(monkeypatch, most, rows):
    monkeypatch.setattr(tally_module, "_SAMPLE", most)
    numbers = torch.arange(60).reshape(6, 10, 1)
    digits = (numbers // 4 ** torch.arange(20).clamp(max=3) % 4).to(torch.int8)  # a row's number, in base 4
    layer = MoELayer("experts", "block", 6, {"wi": (10, 20)})
    tally = tally_module.CodebookTally(layer, "wi", qm.MinMaxTwoBit(), lambda counts, sample: None)
    solved = Quantized(digits, torch.ones(6, 10, 3), torch.ones(6), torch.zeros(6, dtype=torch.bool), ("own",) * 6)
    for part in (slice(0, 4), slice(4, 6)):
        group = dataclasses.replace(solved, digits=digits[part], levels=solved.levels[part])
        tally.add(tally_module.Solved(group, [0], ["own"]))
    found = tally.sample()[:, :3].astype(int) @ [1, 4, 16]
    assert len(set(found)) == len(found) == rows
    assert set(found // 10) == set(range(6))
    assert rows == 60 or len(set(found % 10)) >= min(rows, 6), "not the same rows of each"


def test_the_papers_recipe_stores_its_dictionary_and_its_digits(tmp_path, switch, text_file):
    """Digits are those of the default recipe without borrowed tokens; only the code differs."""
    settings = {"calibration": text_file, **SMALL}
    report = qm.compress(switch, tmp_path / "paper", recipe="paper", **settings)
    assert report.settings["codeword_bits"] == 16
    assert report.settings["blend_tokens"] == 0
    qm.compress(switch, tmp_path / "ours", blend_tokens=0, **settings)
    paper, ours = qm.load(tmp_path / "paper"), qm.load(tmp_path / "ours")
    for name, module in paper.named_modules():
        if isinstance(module, qm.PackedExperts):
            assert module.codebooks["wi"].kind == "paper"
            for e in range(module.num_experts):
                for projection in ("wi", "wo"):
                    other = ours.get_submodule(name).packed(e, projection)
                    for found, expected in zip(qm.decode(module.packed(e, projection)), qm.decode(other), strict=True):
                        assert torch.equal(found, expected)
    with pytest.raises(SettingError, match="codes ternary weights only"):
        qm.compress(switch, tmp_path / "two", recipe="paper", grid=qm.MinMaxTwoBit(), **settings)
