"""Standard input, output and error that are closed, full, or of an encoding of few characters."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys

import pytest

from qmoe_lite.cli import _output
from qmoe_lite.cli._streams import mend_streams


def shell(line: str, **variables: str) -> tuple[int, str, str]:
    """Run a line in which `qmoe` is the program; return exit code, output, errors."""
    program = f"qmoe() {{ '{sys.executable}' -m qmoe_lite \"$@\"; }}; {line}"
    found = subprocess.run(["bash", "-c", program], env=os.environ | variables, capture_output=True, text=True)
    return found.returncode, found.stdout, found.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "code", "noted"),
    [
        ("qmoe inspect {compressed} >&-", 0, ""),
        ("qmoe pack {compressed} {packed} 2>/dev/full >&-", 0, ""),
        ("qmoe --version >/dev/full", 1, "qmoe: the output cannot be written: No space left on device.\n"),
        ("qmoe inspect {compressed} >/dev/full", 1, "qmoe: the output cannot be written: No space left on device.\n"),
        ("qmoe unpack nowhere {packed} >&- 2>&- <&-", 1, ""),
        ("qmoe nothing >&- 2>&-", 2, ""),
        ("set -o pipefail; qmoe pack {compressed} {packed} --json | true", 1, ""),
    ],
)
def test_exit_code_and_words_are_right_whatever_the_streams_are(compressed, tmp_path, line, code, noted):
    """`inspect` imports torch and transformers; the other commands are the quick ones."""
    found = shell(line.format(compressed=compressed[0], packed=tmp_path / "packed"))
    assert (found[0], found[2]) == (code, noted)


@pytest.mark.slow
def test_a_closed_standard_input_is_an_empty_prompt(compressed):
    code, printed, noted = shell(f"qmoe generate {compressed[0]} --json --max-new-tokens 1 <&-")
    assert (code, json.loads(printed)["prompt"]) == (0, ""), noted


@pytest.mark.slow
def test_an_encoding_without_a_character_is_no_error(tmp_path):
    code, _, noted = shell(f"qmoe pack {tmp_path}/é {tmp_path}/packed", PYTHONIOENCODING="ascii")
    assert code == 1
    assert "\\xe9 is no directory" in noted


def test_characters_that_an_encoding_lacks_are_escaped(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("é中".encode()), encoding="ascii"))
    mend_streams()
    assert sys.stdin.read() == "é中"
    sys.stdout.write("é中 \udcff")
    sys.stdout.flush()
    assert written.getvalue() == rb"\xe9\u4e2d \udcff"


def test_closed_streams_take_what_is_written_and_read_nothing(monkeypatch):
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    mend_streams()
    assert sys.stdin.read() == ""
    assert not sys.stdin.isatty()
    sys.stdout.write("é")
    _output.note("é")
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        stream.close()


def test_a_note_that_cannot_be_written_ends_no_work(monkeypatch):
    with open("/dev/full", "w", encoding="utf-8", buffering=1) as full:
        monkeypatch.setattr(sys, "stderr", full)
        _output.note("compressing")
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())  # for its last flush
