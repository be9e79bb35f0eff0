"""`qm.verify` and `qmoe verify`: each kind of damage is found, all of it in one run, and nothing in a good model."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re

import pytest
import tiny
import torch
from forking import PACKAGE
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import qmoe_lite as qm
from qmoe_lite.checkpoint.atomic import crc32
from qmoe_lite.checkpoint.format import checksum
from qmoe_lite.checkpoint.stack import ExpertStack
from qmoe_lite.checkpoint.weight_file import WeightFile
from qmoe_lite.errors import CheckpointError, unreadable
from qmoe_lite.inspection.verification import verify_model
from qmoe_lite.models.skeletons import open_checkpoint

FAMILIES = ["switch_transformers", *sorted(tiny.CAUSAL)]
EXPERTS = "model.layers.0.mlp.experts"
PROJECTIONS = [f"model.layers.{i}.mlp.experts.{name}_proj" for i in (0, 2) for name in ("gate", "up", "down")]
INDEX = "model.safetensors.index.json"


def edit(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def index_of(path):
    return json.loads((path / INDEX).read_text())


def damage(path, name, byte=0):
    """Change one byte of a tensor in its file."""
    _, checkpoint = open_checkpoint(path)
    place = checkpoint.place(name)
    with place.path.open("rb+") as file:
        file.seek(place.offset + byte)
        value = file.read(1)[0]
        file.seek(place.offset + byte)
        file.write(bytes([value ^ 0x41]))


def replace(path, name, change, honest=True):
    """Change a tensor; an honest index has the checksum of what is then there."""
    index = index_of(path)
    file = path / index["weight_map"][name]
    tensors = load_file(file)
    tensors[name] = change(tensors[name])
    save_file(tensors, file, {"format": "pt"})
    if honest:
        index["metadata"]["crc32"][name] = crc32(tensors[name])
        (path / INDEX).write_text(json.dumps(index))


def errors(path):
    return [finding for finding in qm.verify(path) if finding.severity == "error"]


def lines(path):
    found = [str(finding) for finding in qm.verify(path)]
    assert all("\n" not in line for line in found)
    return found


@pytest.mark.parametrize("model_type", FAMILIES)
def test_nothing_is_found_in_a_good_model(directory, model_type):
    path = directory(model_type)
    found = verify_model(path)
    assert found.findings == []
    assert found.sound
    tensors = {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert found.tensors == len(tensors)
    assert found.bytes == sum(tensor.nbytes for tensor in tensors.values())
    model = qm.load(path)
    assert found.experts == sum(m.layer.matrices for m in model.modules() if isinstance(m, qm.PackedExperts))


def test_two_bit_models_and_imported_levels_are_good_too(tmp_path, switch):
    qm.compress(switch, tmp_path / "two", recipe="nearest", grid=qm.MinMaxTwoBit())
    assert lines(tmp_path / "two") == []


@pytest.mark.parametrize("model_type", ["switch_transformers", "mixtral"])
def test_a_model_that_transformers_saved_again_is_sound_with_notes(directory, tmp_path, model_type):
    qm.load(directory(model_type)).save_pretrained(tmp_path / "again", max_shard_size="20KB")
    found = lines(tmp_path / "again")
    assert [line.split(":")[0] for line in found] == ["note", "note", "note"]
    assert "carry no checksums" in found[0]
    assert "has no tokenizer" in found[1]
    assert "there is no report" in found[2]


def test_a_tokenizer_that_is_missing_or_damaged_is_a_note(directory):
    path = directory()
    (path / "tokenizer.json").write_text("{")
    (found,) = qm.verify(path)
    assert (found.severity, "has no usable tokenizer" in found.message) == ("note", True)
    for file in path.glob("tokenizer*"):
        file.unlink()
    (found,) = qm.verify(path)
    assert found.severity == "note"
    assert "has no tokenizer (tokenizer.json, " in found.message
    assert found.message.endswith("no text is generated or evaluated without a tokenizer.")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_a_shard_that_is_cut_while_it_is_looked_at_is_one_finding(forks, directory, kind):
    """In a process of its own, which a map would have ended."""
    path = directory()
    name = "model.norm.weight" if kind == "dense" else f"{EXPERTS}.gate_proj_codes"
    file = path / index_of(path)["weight_map"][name]
    script = f"""
import os, sys
from qmoe_lite.inspection import verification
original = verification._Search.look_at_files
def cut(search, checkpoint):
    original(search, checkpoint)
    os.truncate({str(file)!r}, 4096 if {kind!r} == "dense" else 3000)
verification._Search.look_at_files = cut
for finding in verification.verify({str(path)!r}):
    print(finding.severity, finding.name, finding.file, finding.message, sep="|")
"""
    done = forks.run(script, imports=PACKAGE)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("error")]
    _, found, where, message = line.split("|")
    assert (found, where) == ("", file.name)
    assert "was truncated" in message


@pytest.mark.parametrize("part", ["codes", "levels"])
def test_a_bad_sector_hides_no_other_file(directory, monkeypatch, part):
    """The levels lie in another file than the codes."""
    path = directory()
    index, name = index_of(path), f"{EXPERTS}.gate_proj_levels"
    tensors = load_file(path / index["weight_map"][name])
    save_file({name: tensors[name]}, path / "levels.safetensors", {"format": "pt"})
    index["weight_map"][name] = "levels.safetensors"
    (path / INDEX).write_text(json.dumps(index))
    damage(path, "model.norm.weight")
    bad = path / index["weight_map"][f"{EXPERTS}.gate_proj_{part}"]
    fill = WeightFile._fill

    def fail(file, view, offset):
        if file.path == bad:
            raise unreadable(bad, OSError(errno.EIO, os.strerror(errno.EIO)), "read")
        fill(file, view, offset)

    monkeypatch.setattr(WeightFile, "_fill", fail)
    found = {finding.name or finding.file: finding.message for finding in errors(path)}
    assert found.keys() == {bad.name, "model.norm.weight"}
    assert found[bad.name] == f"{bad} cannot be read: Input/output error. Check the disk."


@pytest.mark.parametrize("piece", [1 << 10, 1 << 20])
@pytest.mark.parametrize("place", [0, 300, -1])
def test_what_is_not_finite_is_found_in_any_piece(directory, monkeypatch, piece, place):
    monkeypatch.setattr("qmoe_lite.checkpoint.weight_file._PIECE", piece)
    path = directory()

    def spoil(tensor):
        tensor.view(-1)[place] = float("nan")
        return tensor

    replace(path, "lm_head.weight", spoil)  # 3360 bytes
    (found,) = errors(path)
    assert found.name == "lm_head.weight"
    assert "NaN or infinity" in found.message


def test_what_is_no_compressed_model_is_refused(switch, tmp_path):
    with pytest.raises(CheckpointError, match=r"is not compressed by qmoe\. Run: qmoe compress"):
        qm.verify(switch)
    with pytest.raises(CheckpointError, match="it has no config"):
        qm.verify(tmp_path)


def test_a_damaged_dense_tensor(directory):
    path = directory()
    damage(path, "model.layers.1.self_attn.q_proj.weight")
    (found,) = errors(path)
    assert found.name == "model.layers.1.self_attn.q_proj.weight"
    assert found.file == index_of(path)["weight_map"][found.name]
    assert found.message.endswith("is damaged (checksum). Fetch or make it again.")


@pytest.mark.parametrize("part", ["codes", "row_codewords", "levels", "fewest_codewords", "checksums"])
def test_a_damaged_expert_is_named(directory, part):
    path = directory()
    damage(path, f"{EXPERTS}.up_proj_{part}")
    found = errors(path)
    assert found[0].name == f"expert 0 of {EXPERTS}.up_proj"
    assert len(found) == 1, "not the tensor besides"
    assert str(found[0]).startswith(f"error: {found[0].file}: expert 0 of {EXPERTS}.up_proj ")


def test_damage_between_the_experts_is_found_too(directory):
    """No expert's checksum covers the padding behind its codes."""
    path = directory()
    _, checkpoint = open_checkpoint(path)
    name = f"{EXPERTS}.gate_proj_codes"
    damage(path, name, checkpoint.place(name).length - 1)
    (found,) = errors(path)
    assert found.name == name


@pytest.mark.parametrize("offset", [-16, 8, 1 << 40, 1 << 62])
def test_forged_offsets(directory, offset):
    """The checksums are right: whoever wrote them meant it."""
    path = directory()

    def forge(offsets):
        offsets[2] = offset
        return offsets

    replace(path, f"{EXPERTS}.down_proj_expert_offsets", forge)
    assert {finding.name for finding in errors(path)} == {f"expert {e} of {EXPERTS}.down_proj" for e in (1, 2)}


def test_codes_that_do_not_decode(directory):
    """An expert whose checksum fits codes that run past its rows."""
    path = directory()
    model = qm.load(path)
    packed = model.get_submodule(EXPERTS).packed(0, "gate_proj")
    codes = packed.codes.clone()
    codes[:8] ^= 0xFF

    def forge_codes(all_codes):
        all_codes[:8] ^= 0xFF
        return all_codes

    def forge_sums(sums):
        sums[0] = checksum(dataclasses.replace(packed, codes=codes))
        return sums

    replace(path, f"{EXPERTS}.gate_proj_codes", forge_codes)
    replace(path, f"{EXPERTS}.gate_proj_checksums", forge_sums)
    (found,) = errors(path)
    assert found.name == f"expert 0 of {EXPERTS}.gate_proj"
    assert "row " in found.message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite(directory, value):
    path = directory()

    def spoil(tensor):
        tensor.view(-1)[5] = value
        return tensor

    replace(path, "model.norm.weight", spoil)
    replace(path, f"{EXPERTS}.gate_proj_levels", spoil)
    found = {finding.name: finding.message for finding in errors(path)}
    assert found.keys() == {"model.norm.weight", f"expert 0 of {EXPERTS}.gate_proj"}
    assert "NaN or infinity" in found["model.norm.weight"]


def test_shapes_and_dtypes_that_config_does_not_promise(directory):
    path = directory()
    replace(path, "model.norm.weight", lambda tensor: tensor[:-1].clone())
    replace(path, "model.layers.0.input_layernorm.weight", lambda tensor: tensor.to(torch.int32))
    replace(path, f"{EXPERTS}.gate_proj_row_codewords", lambda tensor: tensor.to(torch.int32))
    replace(path, f"{EXPERTS}.up_proj_levels", lambda tensor: tensor[:, :-1].clone())
    replace(path, f"{EXPERTS}.down_proj_levels", lambda tensor: tensor.to(torch.float16))
    found = {finding.name: finding.message for finding in errors(path)}
    assert "has shape (23,)" in found.pop("model.norm.weight")
    assert "is torch.int32; the model has" in found.pop("model.layers.0.input_layernorm.weight")
    assert "row_codewords is torch.int32" in found.pop(f"{EXPERTS}.gate_proj")
    assert "up_proj_levels is not (experts, rows, levels)" in found.pop(f"{EXPERTS}.up_proj")
    assert "is float16; config.json says bfloat16" in found.pop(f"{EXPERTS}.down_proj_levels")
    assert all(name.startswith("expert ") and name.endswith("down_proj") for name in found)


def test_missing_and_unknown_tensors(directory):
    path = directory()
    index = index_of(path)
    for name in ("model.norm.weight", f"{EXPERTS}.gate_proj_levels"):
        file = path / index["weight_map"].pop(name)
        tensors = load_file(file)
        tensors[f"{name}_old"] = tensors.pop(name)
        save_file(tensors, file, {"format": "pt"})
        if name == "model.norm.weight":
            index["weight_map"][f"{name}_old"] = file.name
            index["metadata"]["crc32"][f"{name}_old"] = index["metadata"]["crc32"][name]
    index["weight_map"]["lm_head.bias"] = index["weight_map"]["lm_head.weight"]
    (path / INDEX).write_text(json.dumps(index))
    save_file({"x": torch.ones(1)}, path / "model-old.safetensors")
    found = {(finding.severity, finding.name or finding.file): finding.message for finding in qm.verify(path)}
    assert "lacks the tensor model.norm.weight" in found.pop(("error", "model.norm.weight"))
    assert "does not name" in found.pop(("error", f"{EXPERTS}.gate_proj_levels"))
    assert "lacks lm_head.bias, which the index names" in found.pop(("error", "lm_head.bias"))
    assert "is no part of the model" in found.pop(("note", "model.norm.weight_old"))
    assert "which the index does not name" in found.pop(("note", f"{EXPERTS}.gate_proj_levels_old"))
    assert "may be removed" in found.pop(("note", "model-old.safetensors"))
    assert not found


@pytest.mark.parametrize("cut", [0, 4, 300, -1])
def test_a_truncated_shard_and_a_missing_one_hide_nothing_else(directory, cut):
    path = directory()
    first, second, *_, last = sorted(path.glob("*.safetensors"))
    assert index_of(path)["weight_map"]["model.norm.weight"] == last.name
    damage(path, "model.norm.weight")
    os.truncate(first, cut if cut >= 0 else first.stat().st_size + cut)
    second.unlink()
    found = {finding.name or finding.file: finding.message for finding in errors(path)}
    assert found.keys() == {first.name, second.name, "model.norm.weight"}
    assert f"{first.name} is damaged" in found[first.name]
    assert found[second.name] == f"{path} lacks the shard {second.name}. Fetch the missing file."


def test_a_damaged_configuration_hides_no_damaged_tensor(directory):
    path = directory()
    damage(path, "model.norm.weight")
    (path / "config.json").write_text("{")
    assert errors(path)[0].file == "config.json"
    assert "model.norm.weight" in {finding.name for finding in errors(path)}


@pytest.mark.parametrize(
    ("change", "message", "names"),
    [
        (lambda c: c.update(hidden_size="many"), "config.json is refused by transformers: .* 'hidden_size'", [""]),
        (lambda c: c.update(num_hidden_layers="three"), "is refused by transformers: .* 'num_hidden_layers'", [""]),
        (lambda c: c.update(model_type="banana"), "model type banana is not supported", ["model_type"]),
        (lambda c: c["quantization_config"].update(format=99), "has format 99", ["quantization_config"]),
        (lambda c: c["quantization_config"]["codebooks"][0].update(sha256="0"), "the file says 0", ["codebooks[0]"]),
        (lambda c: c["quantization_config"].update(codebooks=7), "names no codebook for", PROJECTIONS),
        (lambda c: c["quantization_config"].update(layers=[]), "names no codebook for", PROJECTIONS),
        (
            lambda c: c["quantization_config"]["layers"][EXPERTS].update(up_proj=50),
            f"no codebook for {EXPERTS}.up_proj",
            [f"{EXPERTS}.up_proj"],
        ),
        (lambda c: c["quantization_config"]["layers"].update(other={}), "says that other is compressed", ["other"]),
    ],
)
def test_a_configuration_that_does_not_fit(directory, change, message, names):
    """A damaged tensor is found beside it, and nothing else."""
    path = directory()
    damage(path, "model.embed_tokens.weight")
    edit(path / "config.json", change)
    found = errors(path)
    assert re.search(message, str(found[0]))
    assert sorted(finding.name for finding in found) == sorted([*names, "model.embed_tokens.weight"])


def test_a_width_that_the_files_do_not_have(directory):
    """Each dense tensor that has it is named, each projection with as many rows, each expert with as many columns."""
    path = directory()
    edit(path / "config.json", lambda c: c.update(hidden_size=48))
    _, checkpoint = open_checkpoint(path)
    names = [name for name in checkpoint.names if ".experts." not in name and 24 in checkpoint.shape(name)]
    names += [f"expert {e} of {name}" for name in PROJECTIONS if "down" not in name for e in range(6)]
    names += [name for name in PROJECTIONS if "down" in name]
    found = errors(path)
    assert sorted(finding.name for finding in found) == sorted(names)
    assert any("config.json says (48,)" in finding.message for finding in found)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"weight_map": {"a": "../b"}}', '{"weight_map": {}, "metadata": {"crc32": []}}']
)
def test_a_damaged_index(directory, text):
    path = directory()
    (path / INDEX).write_text(text)
    (found,) = errors(path)
    assert "is no shard index" in found.message


def test_reports_that_are_damaged_or_contradict_the_files(directory):
    path = directory()
    report = path / "qmoe_report.json"
    edit(report, lambda r: r["projections"][0].update(experts=5))
    (found,) = errors(path)
    assert (found.file, "has experts 5" in found.message) == (report.name, True)
    report.write_text("{")
    assert [finding.file for finding in errors(path)] == [report.name]


def test_a_dtype_that_nobody_knows(directory):
    """F4, of half a byte each: safetensors reads it, torch does next to nothing with it. It hides no other fault."""
    path = directory()
    name = "model.norm.weight"
    file = path / index_of(path)["weight_map"][name]
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    count = header[name]["data_offsets"][1] - header[name]["data_offsets"][0]
    header[name] |= {"dtype": "F4", "shape": [2 * count]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    replace(path, "model.layers.0.input_layernorm.weight", lambda tensor: tensor * float("nan"))
    found = {finding.name for finding in errors(path)}
    assert found == {name, "model.layers.0.input_layernorm.weight"}


def test_an_error_that_nobody_foresaw_is_one_finding(directory, monkeypatch):
    path = directory()
    original = ExpertStack.checked

    def fail(stack, expert):
        if expert == 1 and stack.name.endswith("up_proj"):
            raise ZeroDivisionError("division\nby zero")
        return original(stack, expert)

    damage(path, "model.norm.weight")
    monkeypatch.setattr(ExpertStack, "checked", fail)
    found = [str(finding) for finding in errors(path)]
    assert any("could not be checked: ZeroDivisionError: division." in line for line in found)
    assert any("model.norm.weight" in line for line in found)


def test_a_single_file_beside_an_old_index(directory):
    path = directory()
    AutoModelForCausalLM.from_pretrained(path).save_pretrained(path)
    assert any(INDEX in line and line.startswith("note") for line in lines(path))
    assert not errors(path)


def test_the_command(run, directory):
    path = directory()
    code, printed, noted = run("verify", path)
    assert (code, noted) == (0, "")
    assert printed.startswith("sound: ")
    assert len(printed.splitlines()) == 1
    damage(path, "model.norm.weight")
    code, printed, _ = run("verify", path)
    assert (code, printed.splitlines()[-1].partition(":")[0]) == (1, "1 error")
    damage(path, f"{EXPERTS}.up_proj_codes")
    code, printed, noted = run("verify", path)
    assert (code, noted) == (1, "")
    assert printed.count("error: ") == 2
    assert printed.splitlines()[-1].startswith("2 errors: ")
    code, printed, _ = run("verify", path, "--json")
    assert code == 1
    found = json.loads(printed)
    assert {finding["severity"] for finding in found["findings"]} == {"error"}
    assert found["experts"] > 0 < found["bytes"]
    assert not found["sound"]


def test_the_command_refuses_a_dense_model_in_one_line(run, switch):
    code, printed, noted = run("verify", switch)
    assert (code, printed) == (1, "")
    assert noted.startswith("qmoe: ")
    assert "is not compressed by qmoe" in noted
    assert len(noted.splitlines()) == 1


def test_progress_counts_to_the_end(directory):
    seen = []
    found = verify_model(directory(), seen.append)
    assert [event.done for event in seen] == list(range(1, len(seen) + 1))
    assert seen[-1].done == seen[-1].total
    assert len(seen) > found.experts


COMPANIONS = [  # what transformers, peft and its Trainer save beside a model
    *("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "generation_config.json"),
    *("tokenizer.model", "added_tokens.json", "special_tokens_map.json", "vocab.json", "merges.txt", "spiece.model"),
    *("chat_template.jinja", "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
    *("README.md", ".gitattributes", "LICENSE", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"),
    *("trainer_state.json", "trainer_log.jsonl", "adapter_model-00001-of-00002.safetensors", "value_head.safetensors"),
]


def test_what_transformers_and_peft_put_beside_a_model_is_not_called_superfluous(directory):
    path = directory()
    for name in COMPANIONS:
        if not (path / name).exists():
            (path / name).write_text("{}")
    for name in ("adapter_model.safetensors", "value_head.safetensors"):
        save_file({"x": torch.ones(1)}, path / name)
    (path / "checkpoint-10").mkdir()
    (path / "checkpoint-10" / "model.safetensors").write_text("x")
    (path / "chat_template.jinja").write_text("{{ messages }}")
    found = {finding.file: finding for finding in qm.verify(path)}
    assert all("removed" not in finding.message for finding in found.values())
    assert {name for name, finding in found.items() if finding.severity != "note"} == set()
    assert "is an adapter (LoRA or the like), saved beside the model" in found["adapter_model.safetensors"].message
    assert "it is not loaded, and was not checked" in found["value_head.safetensors"].message
    assert set(found) == {name for name in COMPANIONS if name.endswith(".safetensors")}
