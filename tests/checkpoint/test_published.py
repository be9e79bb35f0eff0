"""The paper's published checkpoints: a tiny one that their own program wrote, and ones that are damaged or forged."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import naive
import numpy as np
import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

import qmoe_lite as qm
from qmoe_lite.checkpoint.expert_file import write_experts
from qmoe_lite.checkpoint.format import pack_experts
from qmoe_lite.checkpoint.reader import Checkpoint
from qmoe_lite.errors import CheckpointError, FormatError, NotFiniteError, OutputError
from qmoe_lite.inspection.card import make_card
from qmoe_lite.inspection.contents import inspect_model

PUBLISHED = Path(__file__).parents[1] / "data" / "published_format"
# sha256 of the experts' dense bfloat16 matrices, by their names in order
EXPECTED = "9c0a82f3b11439136dd29882e40334798970717afd7f1cf6d52948dd7762ff31"
WI = "encoder.block.1.layer.1.mlp.experts.expert_1.wi"


def importing(recode):
    return lambda place: qm.import_qmoe(PUBLISHED, place, recode)


@pytest.fixture(scope="session", params=[False, True], ids=["kept", "recoded"])
def imported(made_once, request):
    name = "imported-recoded" if request.param else "imported"
    return made_once(name, importing(request.param))


def dense_experts(model):
    """Each expert's dense matrix, by its name in the dense model."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, qm.PackedExperts)}
    return {
        f"{name}.expert_{expert}.{projection}.weight": module.dense(expert, projection)
        for name, module in layers.items()
        for expert in range(module.num_experts)
        for projection in ("wi", "wo")
    }


def test_weights_are_exact_and_logits_equal(imported):
    model = AutoModelForSeq2SeqLM.from_pretrained(imported, dtype=torch.float32)
    weights, digest = dense_experts(model), hashlib.sha256()
    for name in sorted(weights):
        digest.update(weights[name].bfloat16().view(torch.int16).numpy().tobytes())
    assert digest.hexdigest() == EXPECTED
    known = np.load(PUBLISHED / "logits.npz")
    ids = {name: torch.from_numpy(known[name]) for name in ("input_ids", "decoder_input_ids")}
    with torch.no_grad():
        np.testing.assert_allclose(model(**ids).logits.numpy(), known["logits"], atol=1e-5)


def test_the_directory_is_like_one_of_ours(imported, tmp_path):
    assert [finding for finding in qm.verify(imported) if finding.severity == "error"] == []
    found = inspect_model(imported)
    assert (found.recipe, found.grid, found.totals["matrices"]) == ("imported", "minmax-ternary", 16)
    assert {row.level_dtype for row in found.projections} == {"bfloat16"}
    assert "- Imported from the checkpoint that the authors of QMoE published;" in make_card(found)
    model = qm.load(imported, dtype=torch.float32)
    model.save_pretrained(tmp_path / "copy")
    limited = qm.load(tmp_path / "copy", dtype=torch.float32, expert_cache="30KB", offload="disk")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        both = [each(input_ids=ids, decoder_input_ids=ids).logits for each in (model, limited)]
    assert torch.equal(*both)


def test_codewords_are_kept_and_recoding_makes_them_fewer(tmp_path, made_once):
    kept, recoded = (made_once(name, importing(name != "imported")) for name in ("imported", "imported-recoded"))
    first = torch.load(PUBLISHED / "exp00.pt", weights_only=True)
    stored = Checkpoint(kept)
    codes = stored.tensor("encoder.block.1.layer.1.mlp.experts.wi_codes")
    start = int(stored.tensor("encoder.block.1.layer.1.mlp.experts.wi_expert_offsets")[1])
    words = first[f"{WI}.w_comp"]
    assert torch.equal(codes[start : start + 2 * len(words)].clone().view(torch.int16), words)
    bits = [inspect_model(place).totals["bits_per_weight"] for place in (kept, recoded)]
    assert bits[1] < 0.9 * bits[0]
    again = qm.import_qmoe(PUBLISHED, tmp_path / "again", recode=True)
    assert again.to_json()["bits_per_weight"] == bits[1]
    assert again.published_code_bytes == 22178
    assert again.code_bytes < 0.85 * again.published_code_bytes
    for path in recoded.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again"]


def publish(weights):
    """Tensors as the published program stores a matrix: codewords of two digits each, and zeros coded as it does."""
    least, most = weights.min(1)[0], weights.max(1)[0]
    digits = torch.zeros(len(weights), weights.shape[1] + weights.shape[1] % 2, dtype=torch.int8)
    digits[:, : weights.shape[1]][weights == least[:, None]] = -1
    digits[:, : weights.shape[1]][weights == most[:, None]] = 1
    table = qm.Codebook.paper().table.tolist()
    code_of = {naive.strings_of([entry], 3)[0]: code for code, entry in enumerate(table) if entry & 255 == 2}
    pairs = digits.reshape(-1, 2).tolist()
    codes = torch.tensor([code_of[tuple(pair)] for pair in pairs], dtype=torch.int32)
    return {
        "w_comp": codes.to(torch.int16),
        "row_off": torch.arange(0, len(pairs) + 1, digits.shape[1] // 2, dtype=torch.int32),
        "ter_minmax": torch.stack([least, most], 1).flatten(),
        "weight": torch.empty(0, dtype=torch.bfloat16),
    }


def make_all_sparse(place):
    """Write a checkpoint like that of the largest model: every block sparse, embeddings that are not tied to the head.

    Experts of odd sizes; some rows have no negative weight, no positive one, or no weight at all.
    """
    config = SwitchTransformersConfig(
        **{"vocab_size": 64, "d_model": 15, "d_kv": 4, "d_ff": 9, "num_heads": 2, "num_experts": 2, "num_layers": 2},
        **{"num_decoder_layers": 2, "num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 2},
        **{"expert_capacity": 1024, "router_jitter_noise": 0, "tie_word_embeddings": False, "dtype": "bfloat16"},
    )
    model = SwitchTransformersForConditionalGeneration(config).bfloat16().eval()
    model.encoder.embed_tokens.weight = model.decoder.embed_tokens.weight = model.shared.weight
    with torch.no_grad():
        model.lm_head.weight.normal_()
    place.mkdir()
    sizes, files, dense = {}, {}, model.state_dict()
    with torch.no_grad():
        for name, weight in [item for item in dense.items() if ".experts." in item[0]]:
            kept = weight.normal_().float() * (torch.rand(weight.shape) < 0.3)
            kept = torch.where(kept > 0, 0.5, torch.where(kept < 0, -0.25, 0.0))
            kept[0], kept[1], kept[2] = kept[0].clamp(min=0), kept[1].clamp(max=0), 0
            weight.copy_(kept)
            name = name.removesuffix(".weight")
            parts = publish(weight)
            sizes[name] = len(parts["w_comp"])
            file = files.setdefault(name.partition(".layer.")[0], {})
            file |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    for number, tensors in enumerate(files.values()):
        torch.save(tensors, place / f"exp{number:02d}.pt")
    torch.save(sizes, place / "sizes.pt")
    torch.save({name: tensor for name, tensor in dense.items() if ".experts." not in name}, place / "noexp.pt")
    # transformers could not say so then: the steps are wrong, and a name of their own says what is meant
    values = config.to_dict() | {"is_full_sparse": True, "encoder_sparse_step": 2, "decoder_sparse_step": 1}
    (place / "config.json").write_text(json.dumps(values | {"num_sparse_encoder_layers": 1, "architectures": None}))
    return model


@pytest.mark.parametrize("recode", [False, True])
def test_every_block_sparse_and_untied_embeddings(tmp_path, recode):
    dense = make_all_sparse(tmp_path / "published")
    found = qm.import_qmoe(tmp_path / "published", tmp_path / "out", recode)
    assert found.matrices == 16
    assert [finding for finding in qm.verify(tmp_path / "out") if finding.severity == "error"] == []
    model = qm.load(tmp_path / "out", dtype=torch.float32)
    weights, expected = dense_experts(model), dense.float().state_dict()
    for name, weight in weights.items():
        assert torch.equal(weight, expected[name])
    ids = torch.arange(12)[None]
    with torch.no_grad():
        logits = [each(input_ids=ids, decoder_input_ids=ids[:, :7]).logits for each in (model, dense)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
    zeros = [row.zeros for row in inspect_model(tmp_path / "out").projections]
    assert all(share > 0.5 for share in zeros) if recode else zeros == [None] * 8  # the paper's code knows no counts
    assert not found.recode or found.expert_bytes < found.published_bytes


def test_experts_are_written_one_by_one_as_they_are_at_once(tmp_path):
    rng, book = np.random.default_rng(0), qm.Codebook.fit([1, 20, 1], bits=8)
    digits = (rng.random((3, 5, 4000)) < 0.01).astype(np.int8)
    digits[1, 2] = 1  # a row so much longer than others that row lengths take 16 bits
    levels = torch.rand(3, 5, 2).bfloat16()
    matrices = [qm.encode(d, steps, book) for d, steps in zip(digits, levels, strict=True)]
    sums = write_experts(tmp_path / "model.safetensors", {"a.wi": iter(matrices), "a.wo": matrices[:1]})
    (tmp_path / "config.json").write_text("{}")
    found = Checkpoint(tmp_path)
    for name, of in (("a.wi", matrices), ("a.wo", matrices[:1])):
        for part, tensor in pack_experts(of).items():
            assert torch.equal(found.tensor(f"{name}_{part}").view(torch.uint8), tensor.view(torch.uint8))
            assert found.meta(f"{name}_{part}").dtype == tensor.dtype
            assert found.place(f"{name}_{part}").offset % tensor.itemsize == 0
    assert sums.keys() == set(found.names)
    assert found.meta("a.wi_row_codewords").dtype == torch.uint16


def change(file, edit):
    """Change what torch.save wrote."""
    content = torch.load(file, weights_only=True)
    torch.save(edit(content) or content, file)


def put(name, value):
    """Change one entry: to a value, or by a function of the one before."""
    return lambda content: content.update({name: value(content[name]) if callable(value) else value})


def at(place, value):
    """Change one number of a tensor."""

    def edit(tensor):
        changed = tensor.clone()
        changed[place] = value
        return changed

    return edit


def flip(file):
    """Change a byte of the codewords, so that these still decode to the same rows."""
    content = bytearray(file.read_bytes())
    words = torch.load(file, weights_only=True)[f"{WI}.w_comp"].numpy()
    place = content.index(words.tobytes())
    lengths = qm.Codebook.paper().table & 255
    code = int(words[0]) & 0xFFFF
    other = next(c for c in range(1 << 16) if c != code and lengths[c] == lengths[code])
    content[place : place + 2] = other.to_bytes(2, "little")
    file.write_bytes(content)


def split_archive(file):
    """Claim that the archive goes on elsewhere, which zipfile answers with an exception of its own."""
    content = file.read_bytes()
    place = content.rindex(b"PK\6\7")
    file.write_bytes(content[: place + 16] + b"\5" + content[place + 17 :])


def compress_archive(file):
    with zipfile.ZipFile(file) as old:
        entries = {each: old.read(each) for each in old.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        for name, content in entries.items():
            new.writestr(name, content)


ON_FILES = (Path.unlink, compress_archive, flip, split_archive)
BAD = {  # what is done to which file, and what is said of it
    "no experts' file": ("exp00.pt", Path.unlink, r"lacks the shard exp00\.pt\. Fetch the missing file"),
    "no last file": ("exp01.pt", Path.unlink, r"lacks decoder\.block\.1\.\S*w_comp: a file exp\?\?\.pt is missing"),
    "no dense file": ("noexp.pt", Path.unlink, r"lacks the shard noexp\.pt"),
    "no sizes": ("sizes.pt", Path.unlink, r"lacks the shard sizes\.pt"),
    "cut": ("exp01.pt", lambda file: os.truncate(file, 20000), r"exp01\.pt is damaged: "),
    "cut to nothing": ("exp01.pt", lambda file: os.truncate(file, 0), r"exp01\.pt is damaged: "),
    "a program": (
        "exp01.pt",
        lambda file: torch.save({"a": os.system}, file),
        r"asks for posix\.system: a pickle may run any program, and this one is not loaded",
    ),
    "a program of the older kind": (
        "sizes.pt",
        lambda file: file.write_bytes(pickle.dumps({"a": os.system}, protocol=2)),
        r"sizes\.pt is no archive that torch\.save wrote",
    ),
    "a number too large": (
        "exp01.pt",
        lambda file: file.rename(file.with_name("exp9999999999.pt")),
        r"lacks the shard exp01",
    ),
    "compressed": ("exp00.pt", compress_archive, r"exp00\.pt is compressed, as torch\.save writes none"),
    "a word flipped": ("exp00.pt", flip, r"exp00\.pt is damaged: .* has another checksum"),
    "archive in parts": ("sizes.pt", split_archive, r"sizes\.pt is damaged: zipfiles that span"),
    "no tensors": ("exp00.pt", {"a": 1}, "holds other things than plain tensors"),
    "a list": ("exp00.pt", [torch.zeros(1)], "holds other things than plain tensors"),
    "sparse": ("exp00.pt", put("x", torch.zeros(3, 3).to_sparse()), "holds other things than plain tensors"),
    "endless": ("noexp.pt", put("x", torch.zeros(1).expand(1 << 40)), "holds other things than plain tensors"),
    "sizes of texts": ("sizes.pt", {"a": "b"}, "does not name numbers of codewords"),
    "another size": ("sizes.pt", put(WI, 755), r"says that \S*expert_1\.wi has 755 codewords; exp00\.pt has 756"),
    "another name": (
        "sizes.pt",
        lambda content: {name if name != WI else "x": size for name, size in content.items()},
        r"sizes\.pt does not name \S*expert_1\.wi",
    ),
    "a size too many": ("sizes.pt", put("x", 3), "promises 16 matrices of experts; sizes.pt names 17"),
    "a part missing": (
        "exp00.pt",
        lambda content: content.pop(f"{WI}.row_off") is None or content,
        r"lacks \S*expert_1\.wi\.row_off",
    ),
    "twice": ("exp01.pt", put(f"{WI}.w_comp", torch.zeros(1)), r"w_comp is in exp00\.pt and in exp01\.pt"),
    "another dtype": ("exp00.pt", put(f"{WI}.w_comp", torch.Tensor.int), r"w_comp in \S*exp00\.pt is torch\.int32"),
    "a row too few": ("exp00.pt", put(f"{WI}.row_off", lambda t: t[:-1].clone()), r"row_off .*expected .*\(129,\)"),
    "begins later": ("exp00.pt", put(f"{WI}.row_off", at(0, 1)), "goes from 1 to 756; expected 0 to 756"),
    "ends early": ("exp00.pt", put(f"{WI}.row_off", at(-1, 700)), "goes from 0 to 700; expected 0 to 756"),
    "a row below zero": ("exp00.pt", put(f"{WI}.row_off", at(3, -5)), r"row_off .*: row 2 has -\d+ codewords"),
    "a row too long": ("exp00.pt", put(f"{WI}.row_off", at(3, 2**31 - 1)), r"row 2 has 21474\d+ codewords; .* 64"),
    "an empty row": (
        "exp00.pt",
        put(f"{WI}.row_off", lambda t: t.clone().index_copy_(0, torch.tensor([3]), t[2:3])),
        "has 0",
    ),
    "beyond a row": (
        "exp00.pt",
        put(f"{WI}.w_comp", lambda t: torch.zeros_like(t)),
        r"expert_1\.wi in \S*exp00\.pt: row \d+ (ends before|has codewords beyond) the matrix's width",
    ),
    "levels not finite": (
        "exp01.pt",
        lambda content: content.update(
            {n: torch.full_like(t, float("nan")) for n, t in content.items() if n.endswith("minmax")}
        ),
        "levels holds NaN",
    ),
    "dense not finite": (
        "noexp.pt",
        put("shared.weight", at((0, 0), float("inf"))),
        "shared.weight in .* holds NaN or",
    ),
    "dense of integers": (
        "noexp.pt",
        put("shared.weight", torch.Tensor.int),
        r"shared.weight .* is torch.int32; expected f",
    ),
    "dense of another shape": (
        "noexp.pt",
        put("lm_head.weight", lambda t: t[1:].clone()),
        r"lm_head.weight has shape \(255, 64\)",
    ),
    "dense missing": (
        "noexp.pt",
        lambda content: {n: t for n, t in content.items() if "final" not in n},
        "lacks the tensor encoder.final",
    ),
    "another family": ("config.json", {"model_type": "t5"}, "is of model type t5; published were switch"),
    "no number": ("config.json", {"num_experts": "many"}, r"config\.json is refused by transformers"),
    "more experts": ("config.json", {"num_experts": 5}, "promises 20 matrices of experts; sizes.pt names 16"),
    "endless experts": ("config.json", {"num_experts": 1 << 60}, r"promises \d+ matrices of experts"),
    "no step": ("config.json", {"encoder_sparse_step": None}, r"config\.json has encoder_sparse_step None; expected"),
    "endless blocks": ("config.json", {"num_layers": 1 << 60}, r"says that there are \d+ blocks; noexp\.pt has 48"),
    "more experts than needed": (
        "exp01.pt",
        put(WI.replace("expert_1", "expert_9"), torch.zeros(1)),
        r"holds \S*expert_9\.wi, which config\.json does not account for",
    ),
    "wider experts": ("config.json", {"d_ff": 130}, r"mlp\.wi\.weight has shape \(128, 64\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, case):
    file_name, edit, message = BAD[case]
    source, out = shutil.copytree(PUBLISHED, tmp_path / "source"), tmp_path / "out"
    file = source / file_name
    if file_name == "config.json":
        file.write_text(json.dumps(json.loads(file.read_text()) | edit))
    elif isinstance(edit, dict | list):
        torch.save(edit, file)
    elif edit in (Path.unlink, compress_archive, flip, split_archive) or case.startswith(
        ("cut", "a program", "a number")
    ):
        edit(file)
    else:
        change(file, edit)
    with pytest.raises((CheckpointError, FormatError, NotFiniteError), match=message) as error:
        qm.import_qmoe(source, out)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_directory_without_any_is_told_what_it_lacks(tmp_path, run):
    (tmp_path / "config.json").write_text('{"model_type": "switch_transformers"}')
    code, _, noted = run("import-qmoe", tmp_path, tmp_path / "out")
    assert (code, noted.count("\n")) == (1, 1)
    assert "has neither noexp.pt nor exp00.pt: it is no checkpoint of the paper's." in noted
    code, _, noted = run("compress", PUBLISHED, tmp_path / "out", "--recipe", "nearest")
    assert "It is one of the paper's: run qmoe import-qmoe." in noted
    code, _, noted = run("import-qmoe", tmp_path / "none", tmp_path / "out")
    assert (code, noted.count("\n")) == (1, 1)
    assert "Fetch the checkpoint first: hf download" in noted


def test_out_is_never_overwritten_and_only_an_import_s_own_work_discarded(tmp_path, made_once):
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    out.mkdir()
    with pytest.raises(OutputError, match="exists already"):
        qm.import_qmoe(PUBLISHED, out)
    out.rmdir()
    partial.mkdir()
    (partial / "state.json").write_text("{}")
    with pytest.raises(OutputError, match="is no unfinished import"):
        qm.import_qmoe(PUBLISHED, out)
    assert [path.name for path in partial.iterdir()] == ["state.json"]
    (partial / "state.json").rename(partial / "import.json")  # of an import that was killed
    (partial / "model-00009-of-00009.safetensors").write_text("left")
    qm.import_qmoe(PUBLISHED, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    made = made_once("imported", importing(False))
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in made.iterdir())


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="out cannot be written: No space left on device"):
        qm.import_qmoe(PUBLISHED, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_command_says_by_how_much(tmp_path, run):
    code, printed, _ = run("import-qmoe", PUBLISHED, tmp_path / "out", "--recode")
    assert code == 0
    assert "1.354 -> 1.100 bits a weight: -18.7%" in printed
    assert "has no tokenizer" in printed
    code, printed, _ = run("import-qmoe", PUBLISHED, tmp_path / "kept", "--json")
    assert json.loads(printed)["code_bytes"] == json.loads(printed)["published_code_bytes"] == 22178
