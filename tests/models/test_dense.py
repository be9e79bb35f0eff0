"""Dense models that are run: whole ones, in the words of `compress`, and of any width."""

from __future__ import annotations

import json
import shutil

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import qmoe_lite as qm
from qmoe_lite.checkpoint.finding import find_model
from qmoe_lite.errors import CheckpointError
from qmoe_lite.models.dense import load_dense
from qmoe_lite.models.skeletons import open_checkpoint

WEIGHTS = "model.safetensors"


def truncated(path):
    path.write_bytes(path.read_bytes()[:-100])


def padded(path):
    path.write_bytes(path.read_bytes() + bytes(100))


def zero_filled(path):
    path.write_bytes(bytes(path.stat().st_size))


def empty(path):
    path.write_bytes(b"")


def removed(path):
    path.unlink()


def lacking(name):
    def change(path):
        tensors = load_file(path)
        del tensors[next(found for found in tensors if name in found)]
        save_file(tensors, path, {"format": "pt"})

    return change


def cut_embedding(path):
    tensors = load_file(path)
    name = next(found for found in tensors if "embed_tokens" in found)
    save_file(tensors | {name: tensors[name][1:].clone()}, path, {"format": "pt"})


def truncated_archive(path):
    """A .bin file, as torch saves it."""
    torch.save(load_file(path), path.with_name("pytorch_model.bin"))
    path.unlink()
    archive = path.with_name("pytorch_model.bin")
    archive.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])


def zero_filled_archive(path):
    """A .bin file that was allocated, and not written."""
    size = path.stat().st_size
    path.unlink()
    path.with_name("pytorch_model.bin").write_bytes(bytes(size))


def unnamed(path):
    """A config.json that does not say what model it is of."""
    place = path.with_name("config.json")
    config = json.loads(place.read_text())
    del config["model_type"]
    place.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (truncated, "is damaged"),
        (zero_filled_archive, "bin is damaged: it is no file of torch's (it begins with zeros). Fetch the file again."),
        (unnamed, "config.json lacks model_type: it does not say what model this is."),
        (padded, "is damaged"),
        (zero_filled, "is damaged"),
        (empty, "is damaged"),
        (removed, "has no weights"),
        (truncated_archive, "is damaged: it was truncated"),
        (lacking(".experts.1."), "lacks the tensor"),
        (lacking("lm_head"), "lacks the tensor lm_head.weight"),
        (cut_embedding, "config.json says"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_damaged_model_is_refused_in_the_words_of_compress(run, causal, tmp_path, text_file, change, message):
    shutil.copytree(causal("mixtral"), tmp_path / "model")
    change(tmp_path / "model" / WEIGHTS)
    run("--version")  # takes what was printed while the model was made
    lines = []
    for command in (
        ["eval", tmp_path / "model", "--text", text_file],
        ["generate", tmp_path / "model", "--prompt", "router"],
        ["compress", tmp_path / "model", tmp_path / "out", "--recipe", "nearest"],
    ):
        code, printed, noted = run(*command)
        assert (code, printed) == (1, "")
        lines.append(noted.strip())
    assert len(set(lines)) == 1
    assert message in lines[0]
    assert len(lines[0].splitlines()) == 1


@pytest.mark.parametrize(("change", "message"), [(truncated, "is damaged"), (removed, "lacks the shard model-00002")])
def test_a_damaged_shard_is_named(causal, tokenizer, tmp_path, change, message):
    whole = AutoModelForCausalLM.from_pretrained(causal("mixtral"))
    whole.save_pretrained(tmp_path, max_shard_size="40KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    change(shard)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_dense(tmp_path, *open_checkpoint(tmp_path), torch.float32)
    assert shard.name in str(caught.value)


def test_what_transformers_refuses_is_one_line(causal, monkeypatch):
    def refuse(*arguments, **options):
        raise RuntimeError("no such thing\nand more")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    path = find_model(causal("mixtral"))
    with pytest.raises(CheckpointError, match=r"is refused by transformers: no such thing\.$"):
        load_dense(path, *open_checkpoint(path), torch.float32)


@pytest.mark.parametrize(("hidden", "width"), [(36, 37), (36, 40), (32, 37), (32, 64)])
def test_experts_of_odd_widths_run(tmp_path, tokenizer, text_file, hidden, width):
    """torch's grouped product refuses rows that are no multiple of 16 bytes."""
    path = tiny.make_causal(tmp_path / "model", tokenizer, "mixtral", intermediate_size=width, hidden_size=hidden)
    for dtype in (torch.float32, torch.bfloat16):
        model = load_dense(path, *open_checkpoint(path), dtype)
        grouped = model.config._experts_implementation == "grouped_mm"
        assert grouped == (hidden * dtype.itemsize % 16 == 0 and width * dtype.itemsize % 16 == 0)
        found = qm.evaluate(model, tokenizer, text_file, samples=2, sequence_length=32)
        model.set_experts_implementation("eager")
        expected = qm.evaluate(model, tokenizer, text_file, samples=2, sequence_length=32)
        assert found.loss == pytest.approx(expected.loss, rel=1e-5 if dtype is torch.float32 else 1e-2)
