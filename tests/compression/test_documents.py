"""Reading texts: what files hold, whatever they are called, in pieces of a bounded size."""

from __future__ import annotations

import bz2
import functools
import gzip
import json
import lzma
import sys
import types

import pytest
import tiny

from qmoe_lite.compression import documents
from qmoe_lite.compression.calibration import read_tokens
from qmoe_lite.compression.documents import DEFAULT_TEXT, Conversation, read_text
from qmoe_lite.errors import TextError

gzipped = functools.partial(gzip.compress, mtime=0)  # the same bytes in every worker


def test_texts_are_read_from_files_folders_and_jsonl(tmp_path):
    (tmp_path / "b.txt").write_text("two\n", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "and a half"}\n', encoding="utf-8")
    assert list(read_text(tmp_path / "b.txt")) == ["two\n"]
    assert list(read_text(tmp_path)) == ["one\n", "and a half\n", "two\n"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "does not exist"),
        ("latin.txt", "caf\xe9".encode("latin-1"), "not UTF-8"),
        ("bad.jsonl", b'{"text": "fine"}\n{"words": 1}\n', "line 2"),
        ("worse.jsonl", b"no json\n", "line 1"),
        ("null.jsonl", b'{"text": null}\n', "line 1"),
    ],
)
def test_unreadable_text_is_named(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TextError, match=message) as caught:
        list(read_text(path))
    assert name in str(caught.value)


def test_an_empty_name_is_not_the_current_folder():
    with pytest.raises(TextError, match="empty"):
        list(read_text(""))


def test_a_folder_without_text_is_refused(tmp_path):
    with pytest.raises(TextError, match=r"no \.txt"):
        list(read_text(tmp_path))


def test_hub_names_need_the_datasets_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(TextError, match=r"qmoe-lite\[calibration\]"):
        list(read_text("allenai/c4"))


def test_hub_data_sets_are_streamed(monkeypatch):
    fake = types.ModuleType("datasets")
    calls = []

    def load_dataset(name, **options):
        calls.append((name, options))
        return iter([{"text": "one"}, {"text": "two"}])

    fake.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert list(read_text("allenai/c4")) == ["one\n", "two\n"]
    assert calls == [("allenai/c4", {"split": "train", "streaming": True})]


@pytest.fixture
def hub(monkeypatch):
    """Give a function: rows -> each data set has these."""
    fake = types.ModuleType("datasets")
    monkeypatch.setitem(sys.modules, "datasets", fake)

    def hold(*rows):
        fake.load_dataset = lambda *_, **__: iter(rows)

    return hold


@pytest.mark.parametrize(
    ("source", "options"),
    [
        ("a/b:en", {"name": "en", "split": "train"}),
        ("a/b:en:validation", {"name": "en", "split": "validation"}),
        ("b::train_sft", {"split": "train_sft"}),
    ],
)
def test_a_name_may_say_which_configuration_and_split(hub, source, options):
    calls = []
    sys.modules["datasets"].load_dataset = lambda path, **options: calls.append((path, options)) or [{"text": "a"}]
    assert list(read_text(source)) == ["a\n"]
    assert calls == [(source.split(":")[0], {**options, "streaming": True})]


def test_rows_of_a_data_set_may_hold_messages_or_nothing(hub):
    said = [{"role": "user", "content": "expert"}]
    hub({"text": None, "messages": said}, {"text": "", "messages": None}, {"text": "row", "messages": None})
    assert list(read_text("some/chat")) == [Conversation(said, "data set some/chat, row 1"), "row\n"]


def test_a_data_set_without_text_is_refused(hub):
    hub({"content": "a", "id": 1})
    with pytest.raises(TextError, match='data set a/b has no column with "text" or "messages"; it has: content, id'):
        list(read_text("a/b"))
    hub({"text": "a"}, {"text": ["a"]})
    with pytest.raises(TextError, match="data set a/b, row 2 is no JSON object"):
        list(read_text("a/b"))


def test_what_the_datasets_package_raises_is_one_line(hub):
    def load_dataset(*_, **__):
        raise ConnectionError("no network\nand more")

    sys.modules["datasets"].load_dataset = load_dataset
    with pytest.raises(TextError, match=r"^a/b is no file and no readable data set: no network\. Check the name\.$"):
        list(read_text("a/b"))


def test_the_window_of_json_lines_survives_unicode(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "caf\xe9 \u2028 router"}) + "\n", encoding="utf-8")
    assert read_tokens(read_text(path), tokenizer).tolist()[-1] == tokenizer.convert_tokens_to_ids("router")


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("a.jsonl", b'{"text": "a \\ud83d b \\ud83d\\ude00"}\n', ["a \ufffd b \U0001f600\n"]),
        ("a.jsonl", b'\xef\xbb\xbf{"text": "a"}\n\xef\xbb\xbf{"text": "b"}\n\xef\xbb\xbf\n', ["a\n", "b\n"]),
        ("a.txt", b"\xef\xbb\xbfa", ["a"]),
        ("a.txt", "\ufeffcaf\xe9\n".encode("utf-16-le"), ["caf\xe9\n"]),
        ("a.jsonl", '\ufeff{"text": "caf\xe9"}\r\n'.encode("utf-16-be"), ["caf\xe9\n"]),
        ("a.txt", "\ufeffa".encode("utf-32-le"), ["a"]),
        ("a.JSONL", b'{"text": "a"}\n', ["a\n"]),
        ("a.ndjson", b'{"text": "a"}\n', ["a\n"]),
        ("a.json", b'{"text": "a"}\n{"text": "b"}\n', ["a\n", "b\n"]),
        ("a.JSON", b'[{"text": "a"},\n {"text": "b"}]', ["a\n", "b\n"]),
        ("a.json", b'{\n "text": "a"\n}\n', ["a\n"]),
        ("a.TXT", b"a", ["a"]),
        ("a.txt.gz", gzipped(b"a\n"), ["a\n"]),
        ("a.jsonl.GZ", gzipped(b'{"text": "a"}\n'), ["a\n"]),
        ("a.json.bz2", bz2.compress(b'[{"text": "a"}]'), ["a\n"]),
        ("a.jsonl.xz", lzma.compress(b'{"text": "a"}\n'), ["a\n"]),
        ("a.txt", gzipped(b"\xef\xbb\xbfa"), ["a"]),  # by its content
        ("a.gz", b"a", ["a"]),
        ("a.txt", b"", []),
        ("a.txt.gz", gzipped(b""), []),
    ],
)
def test_a_text_is_read_as_what_it_is(tmp_path, name, content, texts):
    (tmp_path / name).write_bytes(content)
    assert list(read_text(tmp_path / name)) == texts


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.parquet", b"PAR1\x15\x04\x15", "a Parquet table. Export its text column to .jsonl"),
        ("a.arrow", b"ARROW1\0\0", "an Arrow table. Export its text column"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfd\0", "compressed by zstd. Decompress it first"),
        ("a.zip", b"PK\3\4", "a zip archive. Unpack"),
        ("a.txt", b"%PDF-1.4", "a PDF document"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("a.txt", "expert".encode("utf-16-le"), "zero bytes"),
        ("a.txt.gz", gzipped(b"expert" * 9)[:-4], "damaged"),
        ("a.txt.gz", gzipped(b"expert" * 9)[:14] + b"\xff" * 30, "damaged"),
        ("a.txt.bz2", b"BZh9 no", "cannot be read: Invalid data stream"),
        ("a.txt.xz", lzma.compress(b"expert" * 9)[:-4], "damaged"),
        ("a.txt.gz", gzipped("caf\xe9".encode("latin-1")), "not UTF-8"),
        ("a.jsonl", b"[" * 100_000, "line 1 is no JSON object"),
        ("a.json", b"[" * 100_000, "line 1 is no JSON object"),
        ("a.json", b'[{"text": "a"}, {"texts": "b"}]', "record 2 is no JSON object"),
        ("a.json", b'{"data": []}', "record 1 is no JSON object"),
        ("a.json", b"expert router\n", "line 1 is no JSON object"),
    ],
)
def test_what_is_no_text_is_refused_for_what_it_is(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TextError) as caught:
        list(read_text(tmp_path / name))
    assert message in str(caught.value)
    assert name in str(caught.value)


@pytest.mark.parametrize("name", ["data/a.txt.gz", "data/a.JSONL", "a.parquet", "a.json"])
def test_a_missing_file_is_no_name_of_the_hub(name):
    with pytest.raises(TextError, match="does not exist"):
        list(read_text(name))


def test_hidden_files_of_a_directory_are_passed_over(tmp_path):
    for place in (".hidden.txt", ".ipynb_checkpoints/a-checkpoint.txt", "sub/.git/a.md", "._a.txt"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text("hidden")
    (tmp_path / "sub" / "b.TXT").write_text("b")
    (tmp_path / "sub" / "c.ndjson.gz").write_bytes(gzipped(b'{"text": "c"}'))
    (tmp_path / "dataset_info.json").write_text("{}")
    assert list(read_text(tmp_path)) == ["b", "c\n"]
    (hidden := tmp_path / ".data").mkdir()
    (hidden / "a.txt").write_text("a")
    assert list(read_text(hidden)) == ["a"]  # a directory that was named is meant


def test_a_directory_of_tables_says_so(tmp_path):
    (tmp_path / "train-0.parquet").write_bytes(b"PAR1")
    with pytest.raises(TextError, match=r"tables, such as train-0\.parquet\. Export"):
        list(read_text(tmp_path))


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(documents, "_CHUNK", 1000)
    monkeypatch.setattr(documents, "_LINE", 100)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json"])
@pytest.mark.parametrize("space", [" ", "  ", "\t", "\n"])
def test_a_long_line_is_cut_where_no_token_is(tmp_path, small_pieces, name, space):
    text = space.join(tiny.make_text(seed=1, words=3000).split())
    path = tmp_path / name
    path.write_text(text if name == "a.txt" else json.dumps({"text": text}), encoding="utf-8")
    pieces = list(read_text(path))
    assert "".join(pieces).rstrip("\n") == text
    assert max(map(len, pieces)) <= 1300
    for tokenizer in (tiny.make_tokenizer(), tiny.train_tokenizer(text)):
        whole = tokenizer("".join(pieces), verbose=False)["input_ids"]
        assert read_tokens(read_text(path), tokenizer).tolist() == whole


def test_a_line_without_white_space_is_cut_too(tmp_path, small_pieces):
    (tmp_path / "a.txt").write_text("\u4e2d" * 5000, encoding="utf-8")
    pieces = list(read_text(tmp_path / "a.txt"))
    assert "".join(pieces) == "\u4e2d" * 5000
    assert max(map(len, pieces)) <= 1300


def test_lines_of_usual_length_are_cut_at_their_ends_only(tmp_path, small_pieces):
    """As ever: what was compressed with such a text is made again with the same bytes."""
    lines = [tiny.make_text(seed=seed, words=8) for seed in range(100)]
    (tmp_path / "a.txt").write_text("".join(lines))
    text, expected = "".join(lines), []
    while text:
        end = text.find("\n", 1000) + 1 or len(text)
        expected.append(text[:end])
        text = text[end:]
    assert list(read_text(tmp_path / "a.txt")) == expected


def test_a_json_line_longer_than_can_be_parsed_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "_RECORD", 50)
    for name, problem in (("a.jsonl", "line 1 has over 50"), ("a.json", "has over 50 characters. Make it a .jsonl")):
        (tmp_path / name).write_text(json.dumps({"text": "expert " * 20}))
        with pytest.raises(TextError, match=problem):
            list(read_text(tmp_path / name))


def test_the_default_text_is_small_and_holds_prose_and_sources():
    assert DEFAULT_TEXT.stat().st_size <= 300_000
    assert {"LICENSE", "NOTICE"} <= {path.name for path in DEFAULT_TEXT.parent.iterdir()}
    found = list(read_text(DEFAULT_TEXT))
    code = [text for text in found if "\nimport " in text or "\ndef " in text]
    assert sum(map(len, found)) > 1e6
    assert 0.3 < sum(map(len, code)) / sum(map(len, found)) < 0.7
    held_out = DEFAULT_TEXT.with_name("evaluation.txt").read_text(encoding="utf-8").split("\n\n")
    whole = "\n".join(found)
    assert not [text for text in held_out if len(text) > 60 and text.strip() in whole]
