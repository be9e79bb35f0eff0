"""`qmoe chat`: lines in, answers out."""

from __future__ import annotations

import io
import os
import pty
import select
import subprocess
import sys

import pytest
from reciters import TEMPLATE, save_endless


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    """Writes "y y y .." for ever, behind a chat template that ends in x."""
    return save_endless(tmp_path_factory.mktemp("chatty") / "model", chat_template=TEMPLATE)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The same without a template: goes on like this after an x or a y."""
    return save_endless(tmp_path_factory.mktemp("plain") / "model")


@pytest.fixture
def say(run, monkeypatch):
    """Run `qmoe chat ARGS` with a text on standard input."""

    def call(text: str | bytes, *args: object):
        data = text.encode() if isinstance(text, str) else text
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
        return run("chat", *args)

    return call


def test_each_line_that_is_piped_in_gets_an_answer(say, chatty):
    code, printed, noted = say("hi\n\n  \nhello", chatty, "--max-new-tokens", 4)
    assert (code, printed) == (0, " y y\n y y\n")
    assert noted == "qmoe: cut; --max-new-tokens, or the model's context, allows no more.\n" * 2


def test_the_speed_is_printed_when_asked_and_reset_forgets(say, chatty):
    code, _, noted = say("hi\nhi\n/reset\nhi\n", chatty, "--max-new-tokens", 4, "--stats", "--system", "be")
    assert code == 0
    speeds = [line for line in noted.splitlines() if "tokens/s" in line]
    assert [line.rpartition("; ")[2] for line in speeds] == [
        f"{count} tokens before" for count in (len("[s]be[u]hix"), len("[s]be[u]hi[a] y y[u]hix"), len("[s]be[u]hix"))
    ]


def test_exit_leaves_whatever_follows(say, chatty):
    assert say(" /exit \nhi\n", chatty) == (0, "", "")


def test_without_a_template_the_model_goes_on(say, plain):
    code, printed, noted = say("x\n\n", plain, "--max-new-tokens", 3)
    assert (code, printed) == (0, " y \ny y\n")
    assert noted.splitlines()[0].startswith("qmoe: this model has no chat template; it continues")


def test_a_conversation_survives_a_question_that_is_too_long(say, tmp_path):
    model = save_endless(tmp_path / "model", positions=20, chat_template=TEMPLATE)
    code, printed, noted = say("h" * 30 + "\nhi\n", model, "--max-new-tokens", 2)
    assert (code, printed) == (0, " y\n")
    assert noted.splitlines()[0] == (
        "qmoe: the conversation has 34 tokens, the model 20 positions. Begin a new one (/reset)."
    )


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("x", ["{switch}"], "an encoder-decoder model holds no conversation"),
        ("x", ["{plain}", "--system", "be"], "no chat template, so there is no system message"),
        ("x", ["{plain}", "--top-p", "0.5"], "do nothing at temperature 0"),
        ("x", ["{plain}/none"], "is no model directory"),
        (b"\xe9\n", ["{chatty}"], "standard input is not UTF-8 text"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_1(say, chatty, plain, switch, text, arguments, message):
    places = {"plain": plain, "chatty": chatty, "switch": switch}
    code, printed, noted = say(text, *(a.format(**places) for a in arguments))
    assert (code, printed) == (1, "")
    assert len(noted.splitlines()) == 1
    assert noted.startswith("qmoe: ")
    assert message in noted


# the terminal of standard input becomes the one whose Ctrl-C reaches this process
ON_ITS_TERMINAL = """
import os, sys
os.close(os.open(os.ttyname(0), os.O_RDWR))
from qmoe_lite.cli.main import main
main()
"""


@pytest.mark.slow
def test_keys_on_a_terminal(chatty):
    """Ctrl-C stops an answer and no more, at the prompt it drops the line, Ctrl-D leaves."""
    here, there = pty.openpty()
    command = [sys.executable, "-c", ON_ITS_TERMINAL, "chat", chatty, "--max-new-tokens", "1000000"]
    files = {"stdin": there, "stdout": there, "stderr": there}
    with subprocess.Popen(command, start_new_session=True, env={**os.environ, "TERM": "dumb"}, **files) as process:
        os.close(there)
        seen = b""

        def until(wanted: bytes) -> None:
            nonlocal seen
            while wanted not in seen:
                assert select.select([here], [], [], 60)[0], seen
                seen += os.read(here, 1024)
            seen = seen.partition(wanted)[2]

        try:
            until(b"Ctrl-C stops an answer.\r\n")
            for _ in range(2):
                until(b"> ")
                os.write(here, b"hi\n")
                until(b" y y y")
                os.write(here, b"\x03")
                until(b"qmoe: stopped.\r\n")
            until(b"> ")
            os.write(here, b"half a line")
            until(b"half a line")
            for _ in range(30):  # one that comes just before input() begins to wait is not noticed until the next
                os.write(here, b"\x03")
                if select.select([here], [], [], 2)[0]:
                    break
            until(b"> ")
            os.write(here, b"\x04")
            assert process.wait(timeout=60) == 0
        finally:
            process.kill()
            os.close(here)


def test_the_command_has_help_and_an_example(run):
    code, printed, _ = run("chat", "--help")
    assert code == 0
    assert "Example: qmoe chat" in printed
    assert max(map(len, printed.splitlines())) <= 80
