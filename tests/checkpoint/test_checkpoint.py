"""Crash-safe writing and names on the hub."""

from __future__ import annotations

import errno
import json
import os
import re

import numpy as np
import pytest
import torch

from qmoe_lite.checkpoint import atomic as files
from qmoe_lite.checkpoint.finding import find_model
from qmoe_lite.checkpoint.reader import Checkpoint
from qmoe_lite.checkpoint.report import read_report
from qmoe_lite.compression.calibration import open_tokenizer
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
    found = Checkpoint(tmp_path)
    for name, value in values.items():
        assert torch.equal(found.tensor(name), value)
    for name in "ac":
        assert b"".join(found.pieces(name)) == values[name].numpy().tobytes()
    pieces = found.pieces("b")
    assert bytes(next(pieces)) == values["b"].numpy().tobytes()
    with pytest.raises(FormatError, match=r"b in .*part.safetensors is damaged"):
        next(pieces)
    memory = np.empty(40, dtype=np.uint8)
    assert sum(map(len, found.pieces("a", memory))) == 40
    assert memory.tobytes() == values["a"].numpy().tobytes()


def test_a_file_that_is_cut_or_replaced_is_an_error_at_the_read(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    file = tmp_path / "model.safetensors"
    files.write_tensors(file, {"a": torch.arange(1000.0), "b": torch.ones(3)})
    found = Checkpoint(tmp_path)
    assert found.place("b").length == 12
    os.truncate(file, 2000)
    with pytest.raises(
        CheckpointError, match=r"has 2000 bytes of at least \d+: it was truncated\. Fetch the file again"
    ):
        list(found.pieces("a"))
    files.write_tensors(file, {"a": torch.arange(1000.0), "b": torch.ones(3)})
    found = Checkpoint(tmp_path)
    files.write_tensors(file, {"c": torch.ones(3)})
    with pytest.raises(CheckpointError, match="was truncated or rewritten while it was read"):
        found.place("a")


@pytest.fixture
def closed(monkeypatch):
    """Let a file's opening fail as the system would; permissions mean nothing where the tests run as root."""

    def close(path, number):
        def fail(original):
            def call(name, *args, **kwargs):
                if name == path or name == str(path):
                    raise OSError(number, os.strerror(number), str(path))
                return original(name, *args, **kwargs)

            return call

        opened = fail(open)
        monkeypatch.setattr("io.open", opened)
        monkeypatch.setattr("builtins.open", opened)
        monkeypatch.setattr("os.open", fail(os.open))

    return close


REMEDIES = [
    (errno.EACCES, "Permission denied. Grant yourself read permission"),
    (errno.EMFILE, "Too many open files. Raise the limit of open files: ulimit -n"),
    (errno.EIO, "Input/output error. Check the disk"),
]


@pytest.mark.parametrize(("number", "message"), REMEDIES)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "part.safetensors"])
def test_a_file_that_may_not_be_opened_is_not_called_damaged(tmp_path, closed, name, number, message):
    (tmp_path / "config.json").write_text("{}")
    files.write_tensors(tmp_path / "part.safetensors", {"a": torch.ones(3)})
    files.write_json(tmp_path / "model.safetensors.index.json", {"weight_map": {"a": "part.safetensors"}})
    closed(tmp_path / name, number)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(tmp_path).tensor("a")
    assert str(caught.value).startswith(f"{tmp_path / name} cannot be opened: {message}")


@pytest.mark.parametrize(("number", "message"), REMEDIES)
def test_a_report_that_may_not_be_opened_is_not_to_be_removed(tmp_path, closed, number, message):
    (tmp_path / "qmoe_report.json").write_text("{}")
    closed(tmp_path / "qmoe_report.json", number)
    with pytest.raises(CheckpointError, match=re.escape(f"cannot be opened: {message}")):
        read_report(tmp_path)


@pytest.mark.parametrize(("number", "message"), REMEDIES)
def test_a_tokenizer_that_may_not_be_opened_is_not_called_damaged(tmp_path, tokenizer, closed, number, message):
    tokenizer.save_pretrained(tmp_path)
    closed(tmp_path / "tokenizer.json", number)
    with pytest.raises(CheckpointError, match=re.escape(f"tokenizer.json cannot be opened: {message}")):
        open_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["./none", "../none", "~/none", "/none", "a/b/none", ".none/x", "none"])
def test_what_looks_like_a_path_is_not_looked_up_on_the_hub(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=f"^{re.escape(name)} is no model directory: there is no such directory"):
        find_model(name)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="it is a file"):
        find_model("./file")


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
        find_model("some-owner/some-model")
    assert "\n" not in str(caught.value)


def test_a_fingerprint_changes_with_the_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    files.write_tensors(tmp_path / "model.safetensors", {"a": torch.ones(3)})
    first = Checkpoint(tmp_path).fingerprint()
    assert Checkpoint(tmp_path).fingerprint() == first
    files.write_tensors(tmp_path / "model.safetensors", {"a": torch.ones(4)})
    assert Checkpoint(tmp_path).fingerprint() != first


def test_an_index_cannot_name_files_elsewhere(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    files.write_tensors(tmp_path / "outside.safetensors", {"a": torch.ones(2)})
    index = {"weight_map": {"a": "../outside.safetensors"}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="is no shard index"):
        Checkpoint(tmp_path / "model")
