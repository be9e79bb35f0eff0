"""`qmoe serve`: where it listens, for whom, and the running program."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager

import pytest
from reciters import TEMPLATE

import qmoe_lite as qm
from qmoe_lite.cli import _server
from qmoe_lite.text.generation import Sampling, generate

USER = {"role": "user", "content": "expert router"}
pytest.importorskip("uvicorn", reason="needs pip install 'qmoe-lite[serve]'")


@pytest.fixture(scope="module")
def served(tmp_path_factory, compressed_causal, tokenizer):
    """A compressed Qwen3-MoE with a chat template that ends no text, and its tokenizer."""
    directory = tmp_path_factory.mktemp("served") / "qmoe"
    shutil.copytree(compressed_causal("qwen3_moe"), directory)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    settings = {"eos_token_id": 10**6, "pad_token_id": 0}  # no token of its
    (directory / "generation_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return directory, tokenizer


@pytest.fixture
def listened(monkeypatch):
    """What the command listens with, which ends at once: (app, address)."""
    found = []

    def listen(app, turns, taken, started):
        found.append((app, taken.getsockname()))
        started()
        return turns.close(30)

    monkeypatch.setattr(_server, "listen", listen)
    monkeypatch.setattr(_server, "leave", lambda: None)
    monkeypatch.delenv("QMOE_API_KEY", raising=False)
    return found


def test_the_command_says_where_it_listens(run, causal, listened):
    model = causal("qwen3_moe")
    code, printed, noted = run("serve", model, "--host", "127.0.0.2", "--port", 0)
    [(app, (host, port))] = listened
    assert (code, printed, host) == (0, "", "127.0.0.2")
    assert noted.splitlines() == [
        "qmoe: this model has no chat template: /v1/completions works, /v1/chat/completions does not.",
        f"qmoe: {model} is served at http://127.0.0.2:{port}/v1; Ctrl-C stops it.",
        "qmoe: stopped.",
    ]
    assert (app._context, app._api_key, app._hosts) == (256, None, {"localhost", "127.0.0.2"})


def test_an_encoder_decoder_is_served_with_a_note(run, switch, listened):
    code, _, noted = run("serve", switch, "--port", 0, "--context", 100)
    assert (code, listened[0][0]._context) == (0, 100)
    assert "this model is an encoder-decoder model: /v1/completions works, /v1/chat/completions does not." in noted
    run("serve", switch, "--port", 0)
    assert listened[1][0]._context == 4096


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_other_machines_need_a_key_or_a_word(run, causal, listened, monkeypatch, host):
    if host == "::" and not os.path.exists("/proc/net/if_inet6"):
        pytest.skip("no IPv6 here")
    model = causal("qwen3_moe")
    code, _, noted = run("serve", model, "--host", host, "--port", 0)
    assert (code, listened, len(noted.splitlines())) == (1, [], 1)
    assert "lets other machines in, without a password. Give --api-key KEY" in noted
    code, _, noted = run("serve", model, "--host", host, "--port", 0, "--no-auth")
    assert code == 0
    assert "qmoe: warning: whoever reaches http://" in noted
    code, _, noted = run("serve", model, "--host", host, "--port", 0, "--api-key", "secret")
    assert (code, "warning" in noted) == (0, False)
    monkeypatch.setenv("QMOE_API_KEY", "of-the-environment")
    assert run("serve", model, "--host", host, "--port", 0)[0] == 0
    keys = [(app._api_key, app._hosts) for app, _ in listened]
    assert keys == [(None, None), (b"secret", None), (b"of-the-environment", None)]


def test_what_cannot_be_served_is_one_line(run, causal, listened, tmp_path):
    model = causal("qwen3_moe")
    with socket.create_server(("127.0.0.1", 0)) as other:
        for arguments, message in (
            ((tmp_path, "--port", 0), "no config.json"),
            ((model, "--port", other.getsockname()[1]), "Choose another --port"),
            ((model, "--host", "192.0.2.1"), "cannot be listened on"),
            ((model, "--host", ""), "is no address of this machine"),
            ((model, "--port", 0, "--api-key", ""), "API key is empty"),
            ((model, "--port", 0, "--api-key", "é"), "printable ASCII"),
            ((model, "--port", 0, "--context", 300), "the model has 256 positions"),
        ):
            code, printed, noted = run("serve", *arguments)
            assert (code, printed, listened) == (1, "", [])
            assert message in noted.splitlines()[-1]
    assert run("serve", model, "--api-key", "x", "--no-auth")[0] == 2


def test_a_missing_server_is_named(run, causal, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    code, _, noted = run("serve", causal("qwen3_moe"))
    assert (code, noted) == (1, "qmoe: qmoe serve needs uvicorn. Run: pip install 'qmoe-lite[serve]'\n")


def test_the_command_has_help_and_an_example(run):
    code, printed, _ = run("serve", "--help")
    assert code == 0
    assert "Example: qmoe serve" in printed
    assert "QMOE_API_KEY" in printed
    assert max(map(len, printed.splitlines())) <= 80


@contextmanager
def running(directory, *options, **environment):
    """Run the command; give the process and the server's address, once it answers."""
    command = [sys.executable, "-m", "qmoe_lite", "serve", directory, "--port", "0", *options]
    env = os.environ | environment
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env) as process:
        try:
            line = process.stderr.readline()
            assert " is served at http://127.0.0.1:" in line, line + process.stderr.read()
            yield process, line.split(" is served at ")[1].split(";")[0]
        finally:
            process.kill()


def wait_until_idle(url: str) -> None:
    """Wait until the server works for nobody, as it does soon when all clients have gone."""
    for _ in range(600):
        with urllib.request.urlopen(url.removesuffix("/v1") + "/health", timeout=60) as answer:
            if json.load(answer) == {"status": "ok", "under_way": 0, "waiting": 0}:
                return
        time.sleep(0.02)
    pytest.fail("texts are written for nobody")


@pytest.mark.slow
def test_the_openai_client_talks_to_the_running_server(served):
    openai = pytest.importorskip("openai", reason="needs pip install openai")
    directory, tokenizer = served
    wanted = generate(qm.load(directory), tokenizer, "expert router", chat=True, sampling=Sampling(8)).text
    assert len(wanted.split()) > 1
    with running(directory, "--prefill-chunk", "4", QMOE_API_KEY="secret") as (process, url):
        stranger = openai.OpenAI(base_url=url, api_key="wrong", max_retries=0)
        with stranger, pytest.raises(openai.AuthenticationError, match="Authorization: Bearer"):
            stranger.models.list()
        with openai.OpenAI(base_url=url, api_key="secret", max_retries=0, timeout=120) as client:
            [listed] = client.models.list()
            assert client.models.retrieve(listed.id).id == listed.id == str(directory)
            options = {"model": listed.id, "temperature": 0}
            chat, complete = client.chat.completions.create, client.completions.create
            answer = chat(**options, messages=[USER], max_completion_tokens=8)
            assert (answer.choices[0].message.content, answer.usage.completion_tokens) == (wanted, 8)
            pieces = list(chat(**options, messages=[USER], max_tokens=8, stream=True))
            assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == wanted
            assert pieces[-1].choices[0].finish_reason == "length"
            for error, wrong in (
                (openai.BadRequestError, {"max_tokens": 10**9}),
                (openai.BadRequestError, {"temperature": "hot"}),
                (openai.NotFoundError, {"model": "another"}),
            ):
                with pytest.raises(error) as caught:
                    complete(**{**options, "prompt": "x", **wrong})
                assert caught.value.param in wrong
            left = complete(**options, prompt="x", max_tokens=250, stream=True)
            next(iter(left))
            left.close()  # in the middle
            with pytest.raises(openai.APITimeoutError):
                complete(**options, prompt="x", max_tokens=250, timeout=0.05)
            wait_until_idle(url)
            assert complete(**options, prompt="x", max_tokens=2).usage.completion_tokens == 2
            cut = iter(complete(**options, prompt="x", max_tokens=250, stream=True))
            next(cut)
            process.send_signal(signal.SIGINT)
            with pytest.raises((openai.APIError, openai.APIConnectionError)):
                list(cut)
            process.send_signal(signal.SIGINT)  # changes nothing
        assert process.wait(timeout=15) == 0
        assert process.stderr.read() == "qmoe: stopped.\n"


@pytest.mark.slow
def test_the_running_server_survives_clients_that_leave(served):
    body = {"prompt": "expert router", "max_tokens": 250}
    with running(served[0]) as (process, url):
        host, port = url.removeprefix("http://").removesuffix("/v1").split(":")
        for share in (1.0, 0.5):  # of the request that is sent
            clients = []
            for number in range(200):
                data = json.dumps(body | {"stream": bool(number % 2)}).encode()
                head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
                request = f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data
                clients.append(socket.create_connection((host, int(port))))
                clients[-1].sendall(request[: int(share * len(request))])
            if share == 1.0:
                clients[1].settimeout(60)
                assert clients[1].recv(1)  # an answer has begun
            for client in clients:
                client.close()
            wait_until_idle(url)
        request = urllib.request.Request(
            f"{url}/completions", json.dumps(body | {"max_tokens": 3}).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] == 3
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=15) == 0
        assert process.stderr.read() == "qmoe: stopped.\n"
