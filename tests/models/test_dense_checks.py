"""Dense tensors' checksums: each is compared once, before anything uses the tensor, and not before that."""

from __future__ import annotations

import copy
import io
import os
import shutil
import threading
from collections import Counter

import pytest
import tiny
import torch
from forking import PACKAGE
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

import qmoe_lite as qm
from qmoe_lite.checkpoint.weight_file import WeightFile
from qmoe_lite.errors import FormatError
from qmoe_lite.models.skeletons import open_checkpoint
from qmoe_lite.offload.runner import runner_of

FAMILIES = ["switch_transformers", *sorted(tiny.CAUSAL)]
IDS = torch.tensor([[4, 5, 6, 7]])


def run(model):
    more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=IDS, **more).logits


def places_of(path):
    """File and offset of each dense tensor, by name."""
    _, checkpoint = open_checkpoint(path)
    found = {name: checkpoint.place(name) for name in checkpoint.names if ".experts." not in name}
    return {name: (place.path, place.offset) for name, place in found.items()}


def damage(path, name):
    """Change one byte of a tensor."""
    file, offset = places_of(path)[name]
    with file.open("rb+") as opened:
        opened.seek(offset)
        byte = opened.read(1)[0]
        opened.seek(offset)
        opened.write(bytes([byte ^ 1]))


def hooks_of(model):
    return sum(len(module._forward_pre_hooks) for module in model.modules())


@pytest.fixture
def reads(monkeypatch):
    """How often each place was read for its checksum."""
    found, crc32 = Counter(), WeightFile.crc32

    def counted(file, offset, length):
        found[file.path, offset] += 1
        return crc32(file, offset, length)

    monkeypatch.setattr(WeightFile, "crc32", counted)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("model_type", FAMILIES)
def test_each_dense_tensor_is_compared_once_and_only_when_the_model_runs(directory, reads, model_type):
    path = directory(model_type)
    model = qm.load(path)
    assert not reads
    run(model)
    assert reads == dict.fromkeys(places_of(path).values(), 1)
    run(model)
    model.save_pretrained(path / "again")
    assert set(reads.values()) == {1}


@pytest.mark.parametrize("name", ["shared.weight", "encoder.block.0.layer.0.SelfAttention.k.weight"])
def test_a_damaged_tensor_is_one_line_at_its_first_use(directory, name):
    path = directory("switch_transformers")
    damage(path, name)
    for load in (qm.load, AutoModelForSeq2SeqLM.from_pretrained):
        model = load(path)
        for use in (run, run, lambda model: model.generate(IDS), lambda model: model.encoder(IDS)):
            with pytest.raises(FormatError, match=rf"^{name} in \S+ is damaged \(checksum\)\. Fetch or make it .*$"):
                use(model)


def test_a_model_used_in_part_does_not_pay_for_the_rest(directory, reads):
    path = directory("switch_transformers")
    places = places_of(path)
    damage(path, "decoder.block.1.layer.0.SelfAttention.q.weight")
    model = qm.load(path)
    model.encoder(IDS)
    shared = {"shared.weight", "lm_head.weight", "decoder.embed_tokens.weight"}  # its embedding has these names too
    expected = {name for name in places if name.startswith("encoder.")} | (shared & places.keys())
    assert reads == {places[name]: 1 for name in expected}
    with pytest.raises(FormatError, match=r"decoder\.block\.1\..* is damaged"):
        run(model)


def test_any_module_of_a_block_answers_for_the_whole_block(directory):
    """A router's weight is used by its MoE block, whose own tensors are none."""
    path = directory("qwen3_moe")
    damage(path, "model.layers.2.mlp.gate.weight")
    model = qm.load(path)
    hidden = torch.ones(1, 3, 24, dtype=model.dtype)
    for name in ("mlp", "mlp.gate", "self_attn.q_proj", "input_layernorm"):
        model.get_submodule(f"model.layers.0.{name}")(hidden)
        with pytest.raises(FormatError, match=r"layers\.2\.mlp\.gate\.weight in .* is damaged"):
            model.get_submodule(f"model.layers.2.{name}")(hidden)


def test_a_tied_head_answers_for_the_embedding(tmp_path, tokenizer):
    source = tiny.make_causal(tmp_path / "m", tokenizer, "qwen3_moe", tie_word_embeddings=True)
    qm.compress(source, tmp_path / "out", recipe="nearest")
    assert "lm_head.weight" not in places_of(tmp_path / "out")
    damage(tmp_path / "out", "model.embed_tokens.weight")
    model = qm.load(tmp_path / "out")
    for use in (lambda: model.lm_head(torch.ones(1, 24, dtype=model.dtype)), lambda: model.model(IDS)):
        with pytest.raises(FormatError, match=r"embed_tokens\.weight in .* is damaged"):
            use()


@pytest.mark.parametrize("name", ["shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head"])
def test_each_copy_of_a_tied_tensor_is_compared(tmp_path, tokenizer, name):
    """Some files hold a Switch's embedding under all its names."""
    source = tiny.make_switch(tmp_path / "m", tokenizer)
    tensors = load_file(source / "model.safetensors")
    names = ("shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head")
    tensors |= {f"{each}.weight": tensors["shared.weight"].clone() for each in names}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    qm.compress(source, tmp_path / "out", recipe="nearest")
    run(qm.load(tmp_path / "out"))
    damage(tmp_path / "out", f"{name}.weight")
    with pytest.raises(FormatError, match=rf"^{name}\.weight in .* is damaged"):
        run(qm.load(tmp_path / "out"))


@pytest.mark.slow
@pytest.mark.parametrize("change", ["cast", "cast while loading", "trained", "budget", "compiled"])
def test_what_happened_to_the_parameter_does_not_matter(directory, change):
    """Compared are the file's bytes: a good file passes, a damaged one does not."""
    path = directory("qwen3_moe")
    for bad in (False, True):
        if bad:
            damage(path, "model.layers.1.self_attn.q_proj.weight")
        options = {"dtype": torch.float64} if change == "cast while loading" else {}
        model = qm.load(path, **options, **({"ram_cache": "1MB"} if change == "budget" else {}))
        called = model
        if change == "cast":
            model.to(torch.float64)
        elif change == "trained":
            with torch.no_grad():
                model.get_submodule("model.layers.1.self_attn.q_proj").weight.add_(1)
        elif change == "compiled":
            called = torch.compile(model, backend="eager")
        if bad:
            with pytest.raises(FormatError, match=r"layers\.1\.self_attn\.q_proj\.weight in .* is damaged"):
                run(called)
        else:
            assert torch.equal(run(called), run(model))
        if (runner := runner_of(model)) is not None:
            runner.close()


@pytest.mark.parametrize("way", ["deepcopy", "torch.save", "state_dict", "save_pretrained", "a block's state_dict"])
def test_what_leaves_the_model_is_compared_first(directory, tmp_path, way):
    path = directory("qwen3_moe")
    give = {
        "deepcopy": copy.deepcopy,
        "torch.save": lambda model: torch.save(model, io.BytesIO()),
        "state_dict": lambda model: model.state_dict(),
        "save_pretrained": lambda model: model.save_pretrained(tmp_path / "again"),
        "a block's state_dict": lambda model: model.get_submodule("model.layers.1").state_dict(),
    }[way]
    damage(path, "model.layers.1.input_layernorm.weight")
    model = qm.load(path)
    with pytest.raises(FormatError, match=r"layers\.1\.input_layernorm\.weight in .* is damaged"):
        give(model)
    assert not (tmp_path / "again").exists() or not list((tmp_path / "again").glob("*.safetensors"))


def test_a_copy_of_an_unused_model_runs(directory, reads):
    path = directory("qwen3_moe")
    model = qm.load(path)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [copy.deepcopy(model), torch.load(file, weights_only=False)]
    assert reads == dict.fromkeys(places_of(path).values(), 1)
    damage(path, "model.norm.weight")  # what they hold was read before that
    for other in copies:
        assert run(other).isfinite().all()


def test_hooks_are_gone_once_the_model_has_run(directory):
    model = qm.load(directory("mixtral"))
    before = hooks_of(model)
    run(model)
    assert hooks_of(model) == 2 < before, "the guards of the files' sizes stay"


@pytest.mark.parametrize("change", ["damaged", "deleted", "replaced"])
def test_files_that_change_between_loading_and_the_first_use(directory, change):
    path = directory("qwen3_moe")
    expected = run(qm.load(path))
    model = qm.load(path)
    if change == "damaged":
        damage(path, "lm_head.weight")
        with pytest.raises(FormatError, match=r"lm_head\.weight in .* is damaged"):
            run(model)
        return
    if change == "deleted":
        shutil.rmtree(path)
    else:
        file, _ = places_of(path)["lm_head.weight"]
        other = file.with_name("other")
        other.write_bytes(bytes(file.stat().st_size))
        os.replace(other, file)
    assert torch.equal(run(model), expected), "the map is of the file that was there"


@pytest.mark.slow
@pytest.mark.parametrize("used", ["not yet", "before"])
def test_a_file_cut_before_an_encoder_runs_is_one_line(forks, directory, used):
    """In a process of its own: a map that is touched behind the file's end would end it. generate begins with it."""
    code = """
import os, sys, torch, qmoe_lite as qm
from pathlib import Path
model, ids = qm.load(sys.argv[1]), torch.tensor([[4, 5, 6]])
if sys.argv[2] == "before":
    model.generate(ids, max_new_tokens=2)
for file in Path(sys.argv[1]).glob("*.safetensors"):
    os.truncate(file, 4096)
try:
    model.generate(ids, max_new_tokens=2)
except qm.QMoEError as error:
    print(type(error).__name__, error)
"""
    done = forks.run(code, directory("switch_transformers"), used, imports=PACKAGE)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("CheckpointError")
    assert "it was truncated while the model ran" in done.stdout
    assert len(done.stdout.splitlines()) == 1


def test_threads_that_use_a_new_model_at_once(directory, reads):
    path = directory("qwen3_moe")
    model, found, start = qm.load(path), [], threading.Barrier(8)
    hidden = torch.ones(1, 3, 24, dtype=model.dtype)

    def work():
        start.wait()
        for layer in model.model.layers:
            layer.self_attn.q_proj(layer.input_layernorm(hidden))
        found.append(model.lm_head(model.model.norm(model.model.embed_tokens(IDS))))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert reads == dict.fromkeys(places_of(path).values(), 1)


def test_a_model_that_was_saved_again_has_no_sums_to_compare(directory, tmp_path, reads):
    AutoModelForCausalLM.from_pretrained(directory("mixtral")).save_pretrained(tmp_path / "again")
    reads.clear()
    model = qm.load(tmp_path / "again")
    assert hooks_of(model) == 2
    run(model)
    assert not reads
