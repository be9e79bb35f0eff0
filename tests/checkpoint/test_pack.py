"""One file of a directory, and back to the byte; and files that are cut, changed or forged."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import zlib
from collections import namedtuple

import naive
import numpy as np
import pytest
import torch
import zstandard
from safetensors.torch import save_file

import qmoe_lite as qm
from qmoe_lite.checkpoint import pack_frames, packing
from qmoe_lite.errors import CheckpointError, FormatError, OutputError, SettingError


def tree(directory):
    """Every file below a directory, and its bytes."""
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def make_directory(place, rng, size=3000):
    """Write files of all kinds."""
    noise = torch.from_numpy(rng.normal(0, 0.02, size + 1)).float()
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    tensors = {
        "a": noise.bfloat16()[:-1],
        "all": every[:: max(1, (1 << 17) // size)].clone(),
        "b": noise.half(),
        "c": noise,
        "codes": torch.from_numpy(rng.integers(0, 256, 40, np.uint8)),
        "d": noise.double()[:5],
        "empty": torch.empty(0, dtype=torch.bfloat16),
        "offsets": torch.arange(9),
        "small": noise[:7].to(torch.float8_e4m3fn),
    }
    (place / "below" / "again").mkdir(parents=True)
    save_file(tensors, place / "model.safetensors", {"format": "pt"})
    save_file({"x": noise.bfloat16()}, place / "below" / "again" / "x y.safetensors")
    (place / "config.json").write_text(json.dumps({"words": ["expert", "router"] * 40}))
    (place / "empty.txt").touch()
    (place / "damaged.safetensors").write_bytes(rng.bytes(100))
    (place / "cut.safetensors").write_bytes((place / "model.safetensors").read_bytes()[:-3])
    (place / "long.safetensors").write_bytes((place / "model.safetensors").read_bytes() + b"more")
    (place / os.fsdecode(b"name-\xff")).write_bytes(b"1")
    (place / "link.json").symlink_to("config.json")
    return place


@pytest.mark.parametrize(("frame", "threads"), [(4 << 20, 1), (1 << 10, 3)])
def test_every_byte_comes_back(tmp_path, monkeypatch, frame, threads):
    monkeypatch.setattr(pack_frames, "FRAME_BYTES", frame)
    source = make_directory(tmp_path / "source", np.random.default_rng(0))
    packed = qm.pack(source, tmp_path / "new" / "file", threads=threads)
    assert packed.packed_bytes == (tmp_path / "new" / "file").stat().st_size
    back = qm.unpack(tmp_path / "new" / "file", tmp_path / "newer" / "back", threads=threads)
    assert tree(tmp_path / "newer" / "back") == tree(source)
    assert (back.files, back.bytes) == (packed.files, packed.bytes) == (9, sum(map(len, tree(source).values())))
    assert naive.unpack((tmp_path / "new" / "file").read_bytes()) == tree(source)
    qm.pack(source, tmp_path / "again", threads=4 - threads)
    assert (tmp_path / "again").read_bytes() == (tmp_path / "new" / "file").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "new", "newer", "source"]
    assert not [p.name for place in ("new", "newer") for p in (tmp_path / place).iterdir() if p.name[0] == "."]


def test_floats_take_two_thirds_and_noise_what_it_took(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "source").mkdir()
    weights = torch.from_numpy(rng.normal(0, 0.02, 1 << 18))
    save_file({"w": weights.bfloat16()}, tmp_path / "source" / "model.safetensors")
    found = qm.pack(tmp_path / "source", tmp_path / "file")
    assert found.float_bytes == 1 << 19
    assert found.packed_float_bytes < 0.68 * found.float_bytes
    codes = rng.integers(0, 256, 1 << 19, np.uint8)
    save_file({"w_codes": torch.from_numpy(codes)}, tmp_path / "source" / "model.safetensors")
    found = qm.pack(tmp_path / "source", tmp_path / "codes")
    assert found.packed_bytes <= found.bytes + 150
    assert codes.tobytes() in (tmp_path / "codes").read_bytes()


def test_a_compressed_model_is_one_again(tmp_path, compressed):
    qm.pack(compressed[0], tmp_path / "file")
    qm.unpack(tmp_path / "file", tmp_path / "model")
    assert tree(tmp_path / "model") == tree(compressed[0])
    assert (tmp_path / "file").stat().st_size < 0.9 * sum(map(len, tree(tmp_path / "model").values()))
    assert [finding.severity for finding in qm.verify(tmp_path / "model")] == []


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A pack file of a few frames, and a function that unpacks other bytes: the error, once nothing is left."""
    monkeypatch.setattr(pack_frames, "FRAME_BYTES", 256)
    source = tmp_path / "source"
    source.mkdir()
    rng = np.random.default_rng(1)
    save_file({"w": torch.from_numpy(rng.normal(0, 0.02, 300)).bfloat16()}, source / "w.safetensors")
    (source / "config.json").write_text("{}" * 300)
    qm.pack(source, tmp_path / "good")
    before = sorted(p.name for p in tmp_path.iterdir())

    def unpacked(content):
        (tmp_path / "bad").write_bytes(content)
        found = None
        try:
            qm.unpack(tmp_path / "bad", tmp_path / "out", threads=1)
        except FormatError as error:
            found = str(error)
        if found is None:
            assert tree(tmp_path / "out") == tree(source)
            shutil.rmtree(tmp_path / "out")
        else:
            assert "\n" not in found
        assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["bad", *before])
        return found

    return (tmp_path / "good").read_bytes(), unpacked


def test_a_cut_or_changed_file_is_never_half_written(small):
    good, unpacked = small
    assert unpacked(good) is None
    assert "goes on behind its last frame" in unpacked(good + b"\0")
    for length in [*range(0, 40, 5), *range(40, len(good), 97), len(good) - 1]:
        assert unpacked(good[:length])
    rng = np.random.default_rng(2)
    same = 0
    for place in rng.permutation(len(good))[:60]:
        changed = bytearray(good)
        changed[place] ^= 1 << int(rng.integers(8))
        same += unpacked(bytes(changed)) is None  # zstd does not look at every bit of its frames' heads
    assert same < 4


def start_of(listed, version=1, text=None, crc=None):
    """The beginning of a forged file."""
    text = json.dumps({"files": listed}).encode() if text is None else text
    return struct.pack("<8sIII", b"QMOEPACK", version, len(text), zlib.crc32(text) if crc is None else crc) + text


def named(name, size=1):
    return [{"name": name, "size": size}]


def frame(raw, number=0, word=1, length=None, body=None):
    body = struct.pack("<I", len(raw) | 1 << 31) + raw if body is None else body
    length = len(raw) if length is None else length
    return struct.pack("<IIIBxxx", length, len(body), zlib.crc32(raw, number), word) + body


def bomb(raw):
    small = zstandard.ZstdCompressor().compress(raw)
    return struct.pack("<I", len(small)) + small


FORGED = {
    "no pack file": (b"PK\3\4" * 9, "is no file of qmoe pack"),
    "newer": (start_of(named("a"), version=2), "is of version 2 of pack files; .* Upgrade qmoe-lite"),
    "list too long": (struct.pack("<8sIII", b"QMOEPACK", 1, 1 << 31, 0), "list of files is longer than it"),
    "list changed": (start_of(named("a"), crc=5), "list of files was cut or changed"),
    "no JSON": (start_of([], text=b"{"), "list of files says nothing of use"),
    "deep JSON": (start_of([], text=b"[" * 100000), "list of files says nothing of use"),
    "no list": (start_of([], text=b'{"files": 3}'), "list of files says nothing of use"),
    "empty list": (start_of([]), "list of files is forged"),
    "no size": (start_of([{"name": "a"}]), "list of files says nothing of use"),
    "size below zero": (start_of(named("a", -1)), "list of files is forged"),
    "size of a word": (start_of(named("a", "1")), "list of files is forged"),
    "size of a truth": (start_of(named("a", True)), "list of files is forged"),
    "above": (start_of(named("../a")) + frame(b"x"), r"names a file '\.\./a', which may lie outside"),
    "above later": (start_of(named("a/../../b")) + frame(b"x"), "may lie outside of the directory"),
    "root": (start_of(named("/tmp/a")) + frame(b"x"), "may lie outside of the directory"),
    "itself": (start_of(named(".")) + frame(b"x"), "may lie outside of the directory"),
    "nothing": (start_of(named("")) + frame(b"x"), "may lie outside of the directory"),
    "zero byte": (start_of(named("a\0b")) + frame(b"x"), "may lie outside of the directory"),
    "a number": (start_of(named(7)) + frame(b"x"), "may lie outside of the directory"),
    "no such letter": (start_of(named("\ud800")) + frame(b"x"), "may lie outside of the directory"),
    "too deep": (start_of(named("a/" * 33 + "a")) + frame(b"x"), "may lie outside of the directory"),
    "too long": (start_of(named("a/" + "a" * 5000)) + frame(b"x"), "may lie outside of the directory"),
    "twice": (start_of(named("a") * 2) + frame(b"x") * 2, "names a file twice"),
    "file and directory": (start_of(named("a") + named("a/b")) + frame(b"x") * 2, "as a directory too"),
    "grows too much": (start_of(named("a", 1 << 40)) + frame(b"x"), "over 256 times as many"),
    "no frame": (start_of(named("a", 1)), "damaged at a: it was truncated"),
    "no bytes": (start_of(named("a", 1)) + frame(b""), "a frame's head is forged"),
    "unknown words": (start_of(named("a", 9)) + frame(b"x" * 9, word=3), "a frame's head is forged"),
    "half a word": (start_of(named("a", 9)) + frame(b"x" * 9, word=2), "a frame's head is forged"),
    "frame too long": (start_of(named("a", 1)) + frame(b"xx"), "a frame is longer than its file"),
    "frame too large": (start_of(named("a", 9000)) + frame(b"x" * 9000), "a frame's head is forged"),
    "length forged": (start_of(named("a", 200)) + frame(b"x", length=200), "do not fit its length"),
    "body forged": (start_of(named("a", 1)) + frame(b"x", body=b"x" * 99), "a frame's size is forged"),
    "stream forged": (start_of(named("a", 4)) + frame(b"xxxx", body=b"\xff" * 8), "a stream is longer than"),
    "stream missing": (start_of(named("a", 4)) + frame(b"xxxx", word=2, body=b"\1\0\0\x80x"), "a stream is missing"),
    "no zstd": (start_of(named("a", 4)) + frame(b"xxxx", body=b"\4\0\0\0xxxx"), "zstandard refuses it"),
    "bomb": (
        start_of(named("a", 200)) + frame(b"x" * 200, body=bomb(bytes(1 << 20))),
        "length is forged",
    ),
    "longer than said": (start_of(named("a", 200)) + frame(b"x" * 200, body=bomb(b"x" * 201)), "length is forged"),
    "another checksum": (start_of(named("a", 1)) + frame(b"x", number=1), "damaged at a: checksum"),
    "data behind": (start_of(named("a", 0)) + frame(b"x"), "goes on behind its last frame"),
}


@pytest.mark.parametrize("case", FORGED)
def test_a_forged_file_is_one_line_and_leaves_nothing(small, case):
    content, message = FORGED[case]
    assert re.search(message, small[1](content))


def test_frames_cannot_trade_places(small):
    _, unpacked = small
    frames = [frame(letter * 9, number) for number, letter in enumerate((b"a", b"b"))]
    assert "checksum" in unpacked(start_of(named("a", 18)) + frames[1] + frames[0])


def test_zeros_grow_no_more_than_a_reader_allows(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "zeros").write_bytes(bytes(5 << 20))
    found = qm.pack(tmp_path / "source", tmp_path / "file")
    assert found.bytes / 256 < found.packed_bytes < found.bytes / 250
    qm.unpack(tmp_path / "file", tmp_path / "back")
    assert tree(tmp_path / "back") == tree(tmp_path / "source")


def test_what_cannot_be_packed_is_one_line(tmp_path, monkeypatch):
    source, file = tmp_path / "source", tmp_path / "file"
    with pytest.raises(CheckpointError, match="source is no directory"):
        qm.pack(source, file)
    source.mkdir()
    with pytest.raises(CheckpointError, match="holds no file"):
        qm.pack(source, file)
    (source / "a").write_text("a")
    with pytest.raises(OutputError, match=r"would lie in .*source itself"):
        qm.pack(source, source / "b")
    with pytest.raises(SettingError, match="threads is 0"):
        qm.pack(source, file, threads=0)
    (source / "l").symlink_to(tmp_path)
    with pytest.raises(CheckpointError, match="l is a link to a directory"):
        qm.pack(source, file)
    (source / "l").unlink()
    for make in (os.mkfifo, lambda path: os.symlink("nowhere", path)):
        make(source / "l")
        with pytest.raises(CheckpointError, match="l is no file, or a link to none"):
            qm.pack(source, file)
        (source / "l").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(packing, "_size", lambda path: 2)
        with pytest.raises(CheckpointError, match="a became shorter while it was read"):
            qm.pack(source, file)
        patch.setattr(packing, "_size", lambda path: 0)
        with pytest.raises(CheckpointError, match="a changed while it was read"):
            qm.pack(source, file)

    deep = source.joinpath(*"d" * 33)
    deep.mkdir(parents=True)
    (deep / "a").write_text("a")
    with pytest.raises(CheckpointError, match="d/a lies too deep below"):
        qm.pack(source, file)
    shutil.rmtree(source / "d")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(packing, "_encode", full)
        with pytest.raises(OutputError, match="file cannot be written: No space left on device"):
            qm.pack(source, file)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]
    file.write_text("kept")
    with pytest.raises(OutputError, match="exists already"):
        qm.pack(source, file)
    assert file.read_text() == "kept"


def test_what_cannot_be_unpacked_is_one_line(tmp_path, monkeypatch, run):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a").write_text("a")
    code, printed, noted = run("pack", tmp_path / "source", tmp_path / "file")
    assert (code, noted) == (0, "")
    assert "1 file, 0.00 -> 0.00 MB" in printed
    with pytest.raises(OutputError, match="exists already"):
        qm.unpack(tmp_path / "file", tmp_path / "source")
    with pytest.raises(CheckpointError, match="none is no file"):
        qm.unpack(tmp_path / "none", tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(0))
        with pytest.raises(OutputError, match="takes 1 bytes and there are 0 free"):
            qm.unpack(tmp_path / "file", tmp_path / "out")

    def full(handle):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OutputError, match="out cannot be written: No space left on device"):
            qm.unpack(tmp_path / "file", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "source"]
    code, printed, _ = run("unpack", tmp_path / "file", tmp_path / "out", "--json")
    assert json.loads(printed)["bytes"] == 1
    assert tree(tmp_path / "out") == {"a": b"a"}
