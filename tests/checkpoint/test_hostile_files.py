"""Files that somebody made to do harm: refused in one line, before what they ask for is allocated, read or fetched."""

from __future__ import annotations

import ast
import base64
import hashlib
import json
import os
import shutil
import socket
import time
import tracemalloc
from pathlib import Path

import judge
import mutate
import mutate_files
import numpy as np
import pytest
import torch
import zstandard
from safetensors.torch import load_file

import qmoe_lite as qm
from qmoe_lite.checkpoint.atomic import write_json
from qmoe_lite.checkpoint.index_file import read_index
from qmoe_lite.checkpoint.json_file import LARGEST, parse_json, read_json
from qmoe_lite.checkpoint.pickles import load_tensors
from qmoe_lite.checkpoint.reader import Checkpoint
from qmoe_lite.checkpoint.report import read_report
from qmoe_lite.compression.calibration import open_tokenizer
from qmoe_lite.compression.list_buffer import ListBuffer
from qmoe_lite.errors import CheckpointError, FormatError, QMoEError

ROOT = Path(__file__).parents[2]
EXPERTS = "model.layers.0.mlp.experts"


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def refused(path, match, kind=QMoEError):
    """Load and verify say it in one line, in little time and memory."""
    began = time.process_time()
    with judge.memory_limited(), pytest.raises(kind, match=match) as caught:
        qm.load(path)
    assert "\n" not in str(caught.value)
    assert any(finding.severity == "error" for finding in qm.verify(path))
    assert time.process_time() - began < judge.SECONDS


# -- JSON


@pytest.mark.parametrize("name", ["config.json", mutate.INDEX])
def test_a_gigabyte_of_json_is_not_read(directory, name):
    path = directory()
    with (path / name).open("rb+") as file:
        file.truncate(1 << 30)  # a hole: it takes no room on the disk
    refused(
        path, "of which at most 8,388,608 are read" if name == "config.json" else "is no shard index", CheckpointError
    )


def test_json_is_read_up_to_its_limit(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"a": [1, 2.5, "x"]}')
    assert read_json(path) == {"a": [1, 2.5, "x"]}
    path.write_text("{}")
    os.truncate(path, LARGEST + 1)
    with pytest.raises(ValueError, match="it has 33,554,433 bytes, of which at most 33,554,432 are read"):
        read_json(path)


def test_an_index_may_be_larger_than_other_json(tmp_path):
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(b'{"weight_map": {"a": "b.safetensors"}}' + b" " * LARGEST)
    assert read_index(path) == ({"a": "b.safetensors"}, {}, None)
    huge, others = 10**400, ("1e999", "NaN", '"7"', "-1", "true", "1.5", "null")
    for total, read in (("5e9", 5 * 10**9), ("7", 7), (str(huge), huge), *((each, None) for each in others)):
        path.write_text(f'{{"weight_map": {{"a": "b.safetensors"}}, "metadata": {{"total_size": {total}}}}}')
        assert read_index(path).total_bytes == read
    os.truncate(path, 2 * LARGEST + 1)
    with pytest.raises(CheckpointError, match="no shard index: it has 67,108,865 bytes, of which at most 67,108,864"):
        read_index(path)


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    "text",
    [DEEP, '{"a": ' * 50_000 + "1" + "}" * 50_000, '{"a": 1, "a": 2}', '{"b": {"a": 1, "a": 1}}', '{"a": "\udc80"}'],
)
def test_json_that_no_honest_program_writes(directory, text):
    content = text.encode("utf-8", "surrogateescape")
    with pytest.raises(ValueError, match=r"^(it is nested too deeply|the key 'a' is there twice|'utf-8' codec .*)$"):
        parse_json(content)
    path = directory()
    for name in ("qmoe_report.json", mutate.INDEX, "config.json"):
        (path / name).write_bytes(content)
        if name == "qmoe_report.json":
            with pytest.raises(FormatError, match="is no report"):
                read_report(path)
        else:
            refused(path, "is no shard index" if name == mutate.INDEX else ".")


def test_a_dense_model_s_config_may_have_a_key_twice_and_a_compressed_one_s_not(directory, switch, tmp_path):
    for source, allowed in ((switch, True), (directory(), False)):
        path = tmp_path / str(allowed)
        shutil.copytree(source, path)
        text = (path / "config.json").read_text().rstrip()
        (path / "config.json").write_text(text[:-1] + ', "vocab_size": 7, "vocab_size": 7}')
        if allowed:
            assert Checkpoint(path).config["vocab_size"] == 7
        else:
            refused(path, "has the key 'vocab_size' twice", CheckpointError)


# -- the index, and where files lie


@pytest.mark.parametrize("place", [*mutate.PLACES, "/", "a\nb", "\x1b[2J", "\x00", 7, None, ["x"], {"a": 1}, "é"])
def test_an_index_leads_nowhere_else(directory, place):
    path = directory()
    (path.parent / "x.safetensors").write_bytes(next(iter(path.glob("*.safetensors"))).read_bytes())
    edit(path / mutate.INDEX, lambda index: index["weight_map"].update({"model.norm.weight": place}))
    refused(path, r"is no shard index|lacks the shard|is damaged", CheckpointError)


def test_an_index_without_what_transformers_asks_of_it(directory):
    """`verify` called it sound."""
    path = directory()
    edit(path / mutate.INDEX, lambda index: index.pop("metadata"))
    refused(path, "is no shard index", CheckpointError)


@pytest.mark.parametrize("name", ["a\nb", "\x1b[2J", "", "x" * 5000])
def test_a_tensor_s_name_is_one_that_a_message_can_hold(directory, name):
    path = directory()
    edit(path / mutate.INDEX, lambda index: index["weight_map"].update({name: "model-00001-of-00003.safetensors"}))
    refused(path, "is no shard index", CheckpointError)


def test_links_are_followed_as_the_hub_s_cache_has_them_and_no_further(directory, tmp_path):
    source = directory()
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(source.iterdir())):
        shutil.copyfile(file, blobs / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    (tmp_path / "link").symlink_to(snapshot)
    for path in (snapshot, tmp_path / "link"):
        assert not [f for f in qm.verify(path) if f.severity == "error"]
        qm.load(path)
    shard = snapshot / "model-00001-of-00003.safetensors"
    for target in (source / shard.name, Path("../../../qwen3_moe") / shard.name):
        shard.unlink()
        shard.symlink_to(target)
        assert shard.is_file()
        refused(snapshot, "is a link to .*, outside the model's directory", CheckpointError)


def test_a_link_where_a_file_is_to_be_written_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / ".counts.json.tmp").symlink_to(tmp_path / "precious")
    write_json(tmp_path / "counts.json", {"a": 1})
    assert (tmp_path / "precious").read_text() == "mine"
    assert json.loads((tmp_path / "counts.json").read_text()) == {"a": 1}


# -- headers


SHAPES = [
    [2**63],
    [2**32, 2**32],
    [2**40, 2**40, 0],
    [-1],
    [True],
    [1.0],
    [10**30],
    ["24"],
    [[24]],
    [None],
    [24, 1],
    24,
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_that_overflow_or_are_none(directory, shape):
    path = directory()
    file = path / json.loads((path / mutate.INDEX).read_text())["weight_map"]["model.norm.weight"]
    header, data = mutate.parse(file.read_bytes())
    header["model.norm.weight"]["shape"] = shape
    file.write_bytes(mutate.build(header, data))
    refused(path, "is damaged|has shape")


@pytest.mark.parametrize(
    "offsets", [[0, 2**64], [-1, 47], [0, 1], [2**63, 2**63 + 48], [48, 0], [0.0, 48.0], [0], None]
)
def test_places_outside_the_file(directory, offsets):
    path = directory()
    file = path / json.loads((path / mutate.INDEX).read_text())["weight_map"]["model.norm.weight"]
    header, data = mutate.parse(file.read_bytes())
    header["model.norm.weight"]["data_offsets"] = offsets
    file.write_bytes(mutate.build(header, data))
    refused(path, "is damaged", CheckpointError)


def test_a_header_with_a_tensor_twice(directory):
    path = directory()
    name = "model.norm.weight"
    file = path / json.loads((path / mutate.INDEX).read_text())["weight_map"][name]
    header, data = mutate.parse(file.read_bytes())
    text = json.dumps(header)
    file.write_bytes(mutate.build(f"{text[:-1]}, {json.dumps(name)}: {json.dumps(header[name])}}}", data))
    refused(path, "its header is forged", CheckpointError)
    with pytest.raises(CheckpointError, match="its header is forged"):
        qm.load(path, offload="ram")


def test_an_expert_s_tensor_that_is_twice_in_its_header(directory):
    """It was refused where experts had a budget, and loaded where they had none."""
    path = directory()
    file, name = path / "model-00001-of-00003.safetensors", f"{EXPERTS}.up_proj_row_codewords"
    header, data = mutate.parse(file.read_bytes())
    file.write_bytes(mutate.build(f"{json.dumps(header)[:-1]}, {json.dumps(name)}: {json.dumps(header[name])}}}", data))
    refused(path, "its header is forged", CheckpointError)


def test_a_generation_config_that_nothing_can_read(directory):
    """`verify` called it sound, and transformers refused the model."""
    path = directory()
    for content in (DEEP, "[]", "7"):
        (path / "generation_config.json").write_text(content)
        refused(path, "is refused by transformers", CheckpointError)


def test_a_dense_tensor_of_integers(directory):
    """It was loaded, and its first product failed in torch's words."""
    path, name = directory(), "model.layers.0.self_attn.q_proj.weight"
    file = path / json.loads((path / mutate.INDEX).read_text())["weight_map"][name]
    header, data = mutate.parse(file.read_bytes())
    header[name]["dtype"] = {"F32": "U32", "BF16": "U16"}[header[name]["dtype"]]
    file.write_bytes(mutate.build(header, data))
    refused(path, rf"^{name} in \S+ is torch\.uint\d+; expected floats\. Fetch the file again\.$", CheckpointError)


@pytest.mark.parametrize("value", [65535, "int8", "Tensor", "__name__", "float33", [], True, ""], ids=str)
def test_dtypes_that_are_none(directory, value):
    """`verify` called it sound, and transformers refused the model."""
    path = directory()
    edit(path / "config.json", lambda config: config.update(dtype=value))
    refused(path, "config.json has 'dtype': .*, which no such model has", CheckpointError)


@pytest.mark.parametrize("value", [["qwen3_moe"], {"a": 1}, 7, True, None, ""], ids=str)
def test_model_types_that_are_no_name(directory, value):
    path = directory()
    edit(path / "config.json", lambda config: config.update(model_type=value))
    refused(path, "model type .* is no name|is not supported|does not say what model|lacks model_type")


@pytest.mark.parametrize("size", [0, 1, 10**8 + 1, 2**40, 2**63, 2**64 - 1])
def test_headers_of_a_size_that_is_not_there(directory, size):
    path = directory()
    file = next(iter(path.glob("*.safetensors")))
    file.write_bytes(size.to_bytes(8, "little") + file.read_bytes()[8:])
    refused(path, "is damaged", CheckpointError)


# -- numbers of config.json


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", 1e9),
        ("num_nextn_predict_layers", 10**12),
        ("num_experts", 10**9),
        ("n_routed_experts", 2**63),
        ("attn_implementation", "someone/kernel"),
        ("_attn_implementation", {"": "someone/kernel"}),
    ],
)
@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
def test_numbers_that_would_take_hours(directory, name, value, inside):
    path = directory()
    edit(
        path / "config.json", lambda config: (config.setdefault("more", {}) if inside else config).update({name: value})
    )
    refused(path, f"config.json has '{name}': .*, which no such model has", CheckpointError)


@pytest.mark.parametrize("value", [10**30, "many", None, [], -1, 0, 2.5, True, float("nan")], ids=str)
@pytest.mark.parametrize("name", ["hidden_size", "num_hidden_layers", "head_dim"])
def test_numbers_that_are_none(directory, name, value):
    path = directory()
    edit(path / "config.json", lambda config: config.update({name: value}))
    refused(path, ".")


def test_tables_that_only_config_asks_for_are_bounded(directory, monkeypatch):
    """Angles of positions and the like: made when a model is loaded, in sizes that no file confirms."""
    monkeypatch.setattr("qmoe_lite.models.hf._MOST_MADE", 31)  # there are twice 4 float32
    with pytest.raises(CheckpointError, match=r"config\.json asks for tables of 32 bytes \(at most 31\)"):
        qm.load(directory())


# -- codes


@pytest.mark.parametrize("number", [-1, True, 0.0, "0", None, [0], 99, 10**30], ids=str)
def test_places_of_codes(directory, number):
    path = directory()
    edit(path / "config.json", lambda c: c["quantization_config"]["layers"][EXPERTS].update(up_proj=number))
    refused(path, "has a damaged quantization_config", FormatError)


def test_more_values_than_any_model_has(directory):
    path = directory()
    edit(path / "config.json", lambda config: config.update(more=[{"a": {}}] * 15_000, still=[[]] * 5_000))
    refused(path, "values; no model's has more than 32,768", CheckpointError)


def test_more_codes_than_are_used_are_not_built(directory):
    path = directory()

    def add(config):
        codes = config["quantization_config"]["codebooks"]
        codes += [{**codes[0], "bits": 13, "counts": [1, i + 1, 1]} for i in range(1_000)]

    edit(path / "config.json", add)
    refused(path, "more than there are projections", FormatError)


def test_a_dictionary_of_millions_of_nodes_is_refused_by_its_size():
    book = qm.Dictionary.fit(np.arange(-3, 4)).to_config()
    trees = bytes(8 << 20)
    book |= {"trees": base64.b64encode(trees).decode(), "sha256": hashlib.sha256(trees).hexdigest()}
    each = (book["clip"] + 1).bit_length()
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match=f"{8 << 20} bytes for {(8 << 23) // each} nodes"):
            qm.Dictionary.from_config({**book, "nodes": (8 << 23) // each})
        assert tracemalloc.get_traced_memory()[1] < 40 << 20
    finally:
        tracemalloc.stop()


def test_levels_of_another_dtype_than_config_says(directory):
    """Their bytes are the same, and so is the checksum."""
    path = directory()
    file = path / "model-00001-of-00003.safetensors"
    header, data = mutate.parse(file.read_bytes())
    name = f"{EXPERTS}.up_proj_levels"
    assert header[name]["dtype"] == "BF16"
    header[name]["dtype"] = "F16"
    file.write_bytes(mutate.build(header, data))
    refused(path, r"up_proj_levels is torch\.float16; config\.json says bfloat16", FormatError)


# -- programs, the network, bombs


@pytest.fixture
def offline(monkeypatch):
    """Whoever asks for a connection fails the test; the hub's libraries are not told to stay offline."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, lambda *_: pytest.fail("the network was asked for"))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("the network was asked for"))


@pytest.mark.parametrize("reference", ["evil.Model", "someone/else--evil.Model"])
def test_neither_program_nor_network(directory, offline, reference, monkeypatch):
    """What config.json calls remote code is neither run nor fetched, and nobody is asked whether it may be."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    path = directory()
    (path / "evil.py").write_text(f"open({str(path / 'ran')!r}, 'w')\n")
    kinds = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
    for name in ("config.json", "tokenizer_config.json"):
        edit(path / name, lambda content: content.update(auto_map=dict.fromkeys(kinds, reference)))
    qm.load(path)
    open_tokenizer(path)
    edit(path / "config.json", lambda content: content.update(model_type="evil"))
    with pytest.raises(QMoEError):
        qm.load(path)
    qm.verify(path)
    assert not (path / "ran").exists()


def test_every_pickle_is_read_as_weights_and_no_remote_code_is_trusted():
    """In all of the library, by its text: `torch.load` says weights_only=True, nobody else unpickles a file."""
    found, of_ourselves = (
        0,
        ROOT / "qmoe_lite" / "compression" / "ranks.py",
    )  # what processes of one run hand each other
    for folder in ("qmoe_lite", "cli", "cuda", "bench"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not isinstance(node, ast.Call):
                    continue
                called, given = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert called not in ("pickle.load", "pickle.loads", "np.load", "joblib.load", "eval", "exec"), path
                assert given.get("trust_remote_code", "False") == "False", path
                if called == "torch.load":
                    found += 1
                    assert given["weights_only"] == str(path != of_ourselves), path
                if called.startswith("AutoTokenizer.from_p") and folder != "bench":
                    assert given["trust_remote_code"] == "False", path
    assert found >= 2


def test_a_pickle_with_other_things_than_tensors(switch, tmp_path):
    """A list, or a number where the index promises a tensor, is one line."""
    shutil.copytree(switch, tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    (tmp_path / "m" / "model.safetensors").unlink()
    for content in ([1, 2], {"x": 3}, 7, {**tensors, "shared.weight": 7}):
        torch.save(content, tmp_path / "m" / "pytorch_model.bin")
        with pytest.raises(CheckpointError) as caught:
            Checkpoint(tmp_path / "m").tensor("shared.weight")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("swapped", [False, True])
def test_a_record_that_is_shorter_than_its_tensor(tmp_path, swapped):
    """Mapped, the tensor would go on into the record behind it, whose checksum is right too."""
    path = tmp_path / "x.bin"
    shared = torch.ones(2000)
    torch.save({"a": torch.arange(512, dtype=torch.uint8), "b": shared, "c": shared[5:9], "d": torch.empty(0)}, path)
    assert load_tensors(path).keys() == set("abcd")
    records = mutate_files._records(path.read_bytes())
    path.write_bytes(mutate_files._archive(records))
    assert load_tensors(path)["c"].tolist() == [1.0] * 4
    name, other = (next(n for n, content in records.items() if len(content) == size) for size in (512, 8000))
    if swapped:
        records[name], records[other] = records[other], records[name]
    else:
        records[name] = records[name][:259]
    path.write_bytes(mutate_files._archive(records))
    with pytest.raises(CheckpointError, match=r"is damaged: (its tensors are not its records|Trying to resize)"):
        load_tensors(path)


def test_a_bomb_of_zstandard_is_unpacked_no_further_than_there_is_room(tmp_path):
    bomb = zstandard.ZstdCompressor(level=1).compress(bytes(300 << 20))
    assert len(bomb) < 100_000
    (tmp_path / "rows").write_bytes(bomb)
    with pytest.raises(FormatError, match="holds other activations than this run needs"):
        ListBuffer(2, 3, 4).load(tmp_path / "rows")


@pytest.mark.parametrize(
    "value",
    ["x" * 100_000, "a\nb\tc", "\x1b[2J\x07", "\ud800", "\x85\u2028", [0] * 5000],
    ids=["long", "lines", "escapes", "surrogate", "separators", "list"],
)
def test_a_file_s_own_words_leave_an_error_one_printable_line(directory, value):
    """They stand in the message as far as they can, and what to do stands behind them."""
    path = directory()
    edit(path / "config.json", lambda c: c["quantization_config"]["codebooks"][0].update(sha256=value))
    with pytest.raises(FormatError) as caught:
        qm.load(path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) <= 1000
    assert "another version" in str(caught.value) or "get it again" in str(caught.value)
