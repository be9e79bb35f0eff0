"""`qmoe serve`: transformers' server with our model in it."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request

import pytest
import tiny
from transformers.utils.import_utils import is_serve_available

import qmoe_lite as qm
from qmoe_lite.cli import serve
from qmoe_lite.text.generation import Sampling, generate

# what transformers looks for in the prompt of a Qwen3 to tell where an answer begins
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{{ '<|im_start|>assistant\n' }}"
)
needs_server = pytest.mark.skipif(
    not is_serve_available(), reason="needs transformers' server: pip install 'qmoe-lite[serve]'"
)


@pytest.fixture(scope="module")
def served(tmp_path_factory, text_file):
    """A compressed Qwen3-MoE with a chat template, and its tokenizer."""
    tokenizer = tiny.train_tokenizer(tiny.make_text(3, 2000))
    tokenizer.chat_template = CHATML
    folder = tmp_path_factory.mktemp("served")
    tiny.make_causal(folder / "dense", tokenizer, "qwen3_moe", eos_token_id=None, bos_token_id=None)
    qm.compress(folder / "dense", folder / "qmoe", recipe="nearest")
    return folder / "qmoe", tokenizer


@pytest.fixture
def asked(monkeypatch):
    """What the command asks of transformers' server, which does not start."""
    found: list[dict[str, object]] = []
    monkeypatch.setattr(serve, "_server_class", lambda: lambda **given: found.append(given))
    return found


@needs_server
def test_the_server_answers_as_the_model_does(served):
    directory, tokenizer = served
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "qmoe_lite", "serve", directory, "--port", str(port), "--prefill-chunk", "4"]

    def ask(path: str, body: dict[str, object] | None = None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.read().decode()

    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            for line in process.stderr:
                if "Uvicorn running" in line:
                    break
            [listed] = json.loads(ask("/v1/models"))["data"]
            assert listed["id"] == str(directory)
            options = {"model": listed["id"], "temperature": 0, "max_tokens": 8}
            message = {"role": "user", "content": "expert router"}
            answer = json.loads(ask("/v1/chat/completions", {**options, "messages": [message]}))
            streamed = ask("/v1/chat/completions", {**options, "messages": [message], "stream": True})
            plain = json.loads(ask("/v1/completions", {**options, "prompt": "expert router"}))
            with pytest.raises(urllib.error.HTTPError, match="400"):
                ask("/v1/completions", {**options, "model": "another", "prompt": "x"})
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=60) == 0, process.stderr.read()
            assert "Traceback" not in process.stderr.read()
        finally:
            process.kill()
    model = qm.load(directory)
    wanted = generate(model, tokenizer, "expert router", chat=True, sampling=Sampling(8))
    assert answer["choices"][0]["message"]["content"] == wanted.text
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 8
    pieces = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
    assert "".join(piece["choices"][0]["delta"].get("content", "") for piece in pieces) == wanted.text
    tokens = generate(model, tokenizer, "expert router", sampling=Sampling(8)).token_ids
    assert plain["choices"][0]["text"] == tokenizer.decode(tokens, skip_special_tokens=True)


def test_the_server_gets_the_model_and_its_address(run, served, asked):
    code, printed, noted = run("serve", served[0], "--host", "127.0.0.2", "--port", 8123)
    assert (code, printed, noted) == (0, "", "")
    assert asked == [{"force_model": str(served[0]), "host": "127.0.0.2", "port": 8123}]


def test_a_model_without_a_template_is_served_with_a_note(run, compressed_causal, asked):
    code, _, noted = run("serve", compressed_causal("qwen3_moe"))
    assert (code, len(asked)) == (0, 1)
    assert noted == "qmoe: this model has no chat template: /v1/completions works, /v1/chat/completions does not.\n"


def test_what_cannot_be_served_is_one_line(run, switch, asked, tmp_path):
    for model, message in ((switch, "is an encoder-decoder model"), (tmp_path, "no config.json")):
        code, printed, noted = run("serve", model)
        assert (code, printed, asked) == (1, "", [])
        assert len(noted.splitlines()) == 1
        assert message in noted


def test_a_missing_server_is_named(run, served, monkeypatch):
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: False)
    code, _, noted = run("serve", served[0])
    wanted = "qmoe: qmoe serve needs transformers' server. Run: pip install 'qmoe-lite[serve]'\n"
    assert (code, noted) == (1, wanted)


def test_the_command_has_help_and_an_example(run):
    code, printed, _ = run("serve", "--help")
    assert code == 0
    assert "Example: qmoe serve" in printed
    assert max(map(len, printed.splitlines())) <= 80
