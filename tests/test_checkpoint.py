"""Crash-safe writing and names on the hub."""

from __future__ import annotations

import json
import os

import pytest
import torch

from qmoe_lite import checkpoint as files
from qmoe_lite.errors import CheckpointError, FormatError, OutputError


def test_a_failed_write_leaves_the_old_file_and_no_new_one(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"old": 1})

    def fail(file):
        file.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match="No space left on device"):
        files.write_atomically(path, fail)
    assert path.read_text() == '{\n  "old": 1\n}\n'
    assert list(tmp_path.iterdir()) == [path]


def test_tensors_are_checked_against_the_index(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    values = {"a": torch.arange(10.0), "b": torch.arange(3, dtype=torch.uint8), "c": torch.empty(0)}
    checksums = files.write_tensors(tmp_path / "part.safetensors", values)
    index = {"metadata": {"crc32": {**checksums, "b": 5}}, "weight_map": dict.fromkeys(values, "part.safetensors")}
    files.write_json(tmp_path / "model.safetensors.index.json", index)
    found = files.Checkpoint(tmp_path)
    for name, value in values.items():
        assert torch.equal(found.tensor(name), value)
    found.check("a")
    found.check("c")
    with pytest.raises(FormatError, match=r"b in .*part.safetensors is damaged"):
        found.check("b")


def test_others_may_read_what_the_umask_lets_them(tmp_path):
    before = os.umask(0o027)
    try:
        files.write_tensors(tmp_path / "a.safetensors", {"a": torch.ones(3)})
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o640


def test_equal_tensors_give_equal_files(tmp_path):
    values = {name: torch.arange(4.0) for name in "zyxabc"}
    for i in range(5):
        files.write_tensors(tmp_path / f"{i}.safetensors", values)
    assert len({(tmp_path / f"{i}.safetensors").read_bytes() for i in range(5)}) == 1


def test_names_on_the_hub_that_cannot_be_fetched_are_one_line():
    with pytest.raises(
        CheckpointError, match=r"some-owner/some-model is no directory here, and the .* hub answers"
    ) as caught:
        files.find_model("some-owner/some-model")
    assert "\n" not in str(caught.value)


def test_a_fingerprint_changes_with_the_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    files.write_tensors(tmp_path / "model.safetensors", {"a": torch.ones(3)})
    first = files.Checkpoint(tmp_path).fingerprint()
    assert files.Checkpoint(tmp_path).fingerprint() == first
    files.write_tensors(tmp_path / "model.safetensors", {"a": torch.ones(4)})
    assert files.Checkpoint(tmp_path).fingerprint() != first


def test_an_index_cannot_name_files_elsewhere(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    files.write_tensors(tmp_path / "outside.safetensors", {"a": torch.ones(2)})
    index = {"weight_map": {"a": "../outside.safetensors"}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="is no shard index"):
        files.Checkpoint(tmp_path / "model")
