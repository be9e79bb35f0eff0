"""The server as an ASGI application: what it answers, refuses and drops. No socket, no uvicorn."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import tiny
import torch
from reciters import TEMPLATE
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from qmoe_lite.cli import _app
from qmoe_lite.cli._app import App
from qmoe_lite.cli._turns import Closed, Job, QueueFull, Turns
from qmoe_lite.errors import NotFiniteError
from qmoe_lite.text.generation import Sampling, generate

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "expert router"}]


@pytest.fixture(scope="module")
def served(made_once):
    """A dense Qwen3-MoE that never ends a text, and a byte-level tokenizer with a chat template."""
    tokenizer = tiny.train_tokenizer(tiny.make_text(3, 2000))
    tokenizer.chat_template = TEMPLATE
    options = {"eos_token_id": None, "bos_token_id": None}
    place = made_once("served", lambda place: tiny.make_causal(place, tokenizer, "qwen3_moe", **options))
    return AutoModelForCausalLM.from_pretrained(place), tokenizer


@contextmanager
def serving(model, tokenizer, parallel=4, waiting=32, **options):
    """Give an app whose model runs, and end it."""
    turns = Turns(model, parallel, waiting)
    options = {"context": 256, "prefill_chunk": 16, **options}
    try:
        yield App(model, tokenizer, "m", turns, **options)
    finally:
        assert turns.close(timeout=30)


@pytest.fixture
def app(served):
    with serving(*served) as app:
        yield app


async def send(app, path, body=None, method=None, headers=(), leave_when=None, client="127.0.0.1"):
    """Ask as uvicorn does; give (status, headers, body). The client leaves when a function of the body says so."""
    data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    given = {b"content-type": b"application/json", b"host": b"localhost:8000"} | dict(headers)
    scope = {"type": "http", "method": method or ("GET" if body is None else "POST"), "path": path}
    scope |= {"headers": list(given.items()), "client": (client, 1)}
    parts = [data[i : i + 65536] for i in range(0, len(data), 65536)] or [b""]
    head, got, left = {}, bytearray(), asyncio.Event()

    async def receive():
        if parts:
            return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}
        await left.wait()
        return {"type": "http.disconnect"}

    async def take(message):
        head.update(message if message["type"] == "http.response.start" else {})
        got.extend(message.get("body", b""))
        if leave_when is not None and leave_when(bytes(got)):
            left.set()

    if leave_when is not None and leave_when(b""):
        asyncio.get_running_loop().call_later(0.05, left.set)
    await app(scope, receive, take)
    return head.get("status"), dict(head.get("headers", ())), bytes(got)


def ask(app, path, body=None, **options):
    status, _, got = asyncio.run(send(app, path, body, **options))
    return status, json.loads(got)


def events(data: bytes):
    lines = [line.removeprefix("data: ") for line in data.decode().split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_the_answer_is_the_models(app, served):
    options = {"temperature": 0, "max_tokens": 8}
    wanted = generate(*served, "expert router", chat=True, sampling=Sampling(8))
    status, answer = ask(app, CHAT, {"model": "m", "messages": USER, **options})
    assert (status, answer["object"], answer["model"]) == (200, "chat.completion", "m")
    [choice] = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": wanted.text, "refusal": None}
    assert (choice["finish_reason"], choice["index"], choice["logprobs"]) == ("length", 0, None)
    counted = {"prompt_tokens": wanted.prompt_tokens, "completion_tokens": 8}
    assert answer["usage"] == {**counted, "total_tokens": wanted.prompt_tokens + 8}
    wanted = generate(*served, "expert router", sampling=Sampling(8))
    ids = served[1]("expert router")["input_ids"]
    for prompt in ("expert router", ["expert router"], ids, [ids]):
        assert ask(app, COMPLETIONS, {"prompt": prompt, **options})[1]["choices"][0]["text"] == wanted.text


@pytest.mark.parametrize("chat", [True, False])
def test_a_streamed_answer_is_the_same(app, chat):
    path, body = (CHAT, {"messages": USER}) if chat else (COMPLETIONS, {"prompt": "expert router"})
    body |= {"temperature": 0, "max_tokens": 60}
    whole = ask(app, path, body)[1]
    counted = {"stream": True, "stream_options": {"include_usage": True}}
    status, headers, data = asyncio.run(send(app, path, body | counted))
    *pieces, last = events(data)
    assert (status, headers[b"content-type"]) == (200, b"text/event-stream; charset=utf-8")
    assert len({piece["id"] for piece in pieces}) == 1
    choices = [piece["choices"][0] for piece in pieces]
    text = "".join(c["delta"].get("content", "") if chat else c["text"] for c in choices)
    assert text == (whole["choices"][0]["message"]["content"] if chat else whole["choices"][0]["text"])
    assert [c["finish_reason"] for c in choices] == [None] * (len(choices) - 1) + ["length"]
    assert len(choices) > 3
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    assert not any(event.get("usage") for event in events(asyncio.run(send(app, path, body | {"stream": True}))[2]))


def test_a_stop_string_is_never_sent(app):
    body = {"prompt": "expert router", "temperature": 0, "max_tokens": 20}
    text = ask(app, COMPLETIONS, body)[1]["choices"][0]["text"]
    stop = text[7:10]  # of several tokens, and inside a word
    answer = ask(app, COMPLETIONS, body | {"stop": stop})[1]
    assert answer["choices"][0]["text"] == text[: text.index(stop)]
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] < 20
    pieces = events(asyncio.run(send(app, COMPLETIONS, body | {"stop": [stop], "stream": True}))[2])
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == text[: text.index(stop)]


def test_drawn_answers_depend_on_their_seed_alone(app, served):
    body = {"prompt": "expert router", "max_tokens": 8, "top_p": 0.9, "temperature": 0.8}

    async def at_once():
        return await asyncio.gather(*(send(app, COMPLETIONS, body | {"seed": seed}) for seed in (1, 2, 1)))

    texts = [json.loads(got)["choices"][0]["text"] for _, _, got in asyncio.run(at_once())]
    sampling = Sampling(8, temperature=0.8, top_p=0.9, seed=1)
    assert texts[0] == texts[2] == generate(*served, "expert router", sampling=sampling).text
    assert texts[1] != texts[0]
    unseeded = {ask(app, COMPLETIONS, body)[1]["choices"][0]["text"] for _ in range(4)}
    assert len(unseeded) > 1


def test_an_answer_without_max_tokens_ends_at_the_models_positions(served):
    with serving(*served, context=70) as app:
        greedy = {"temperature": 0}  # a drawn text may end early
        assert ask(app, CHAT, {"messages": USER} | greedy)[1]["usage"]["total_tokens"] == 70
        assert ask(app, COMPLETIONS, {"prompt": "expert"} | greedy)[1]["usage"]["completion_tokens"] == 16
        assert ask(app, COMPLETIONS, {"prompt": list(range(60))} | greedy)[1]["usage"]["total_tokens"] == 70


def test_what_asks_for_nothing_unusual_is_taken(app):
    neutral = {
        "n": 1,
        "frequency_penalty": 0.0,
        "presence_penalty": 0,
        "logit_bias": {},
        "logprobs": False,
        "tools": [],
    }
    neutral |= {"response_format": {"type": "text"}, "user": "me", "metadata": {"a": "b"}, "store": False, "stop": None}
    parts = [{"type": "text", "text": "expert "}, {"type": "text", "text": "router"}]
    messages = [{"role": "developer", "content": "row"}, {"role": "user", "content": parts}]
    options = {"max_completion_tokens": 2, "temperature": 0}
    answer = ask(app, CHAT, {"messages": messages, **options, "top_p": 0.5, **neutral})[1]
    plain = [{"role": "system", "content": "row"}, *USER]
    assert answer["choices"] == ask(app, CHAT, {"messages": plain, **options})[1]["choices"]


REFUSED = [  # what is asked, and what the answer names
    (CHAT, {}, "messages"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": "hello"}, "messages"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content"),
    (CHAT, {"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
    (CHAT, {"messages": [*USER, {"role": "assistant", "tool_calls": [{}]}]}, "messages[1]"),
    (CHAT, {"messages": USER, "max_completion_tokens": 10**9}, "max_completion_tokens"),
    (CHAT, {"messages": USER, "max_completion_tokens": 2, "max_tokens": 3}, "max_tokens"),
    (CHAT, {"messages": USER, "tools": [{"type": "function"}]}, "tools"),
    (CHAT, {"messages": USER, "response_format": {"type": "json_object"}}, "response_format"),
    (COMPLETIONS, {}, "prompt"),
    (COMPLETIONS, {"prompt": ""}, "prompt"),
    (COMPLETIONS, {"prompt": ["a", "b"]}, "prompt"),
    (COMPLETIONS, {"prompt": [1, 10**6]}, "prompt"),
    (COMPLETIONS, {"prompt": [True]}, "prompt"),
    (COMPLETIONS, {"prompt": "a " * 300}, "prompt"),
    (COMPLETIONS, b'{"prompt": "\\ud800"}', "prompt"),
    (COMPLETIONS, {"prompt": "x", "echo": True}, "echo"),
    (COMPLETIONS, {"prompt": "x", "logprobs": 0}, "logprobs"),
    (COMPLETIONS, {"prompt": "x", "max_tokens": 10**9}, "max_tokens"),
    (COMPLETIONS, {"prompt": "x", "max_tokens": 0}, "max_tokens"),
    (COMPLETIONS, {"prompt": "x", "max_tokens": -1}, "max_tokens"),
    (COMPLETIONS, {"prompt": "x", "max_tokens": True}, "max_tokens"),
    (COMPLETIONS, {"prompt": "x", "n": 2}, "n"),
    (COMPLETIONS, {"prompt": "x", "temperature": "hot"}, "temperature"),
    (COMPLETIONS, {"prompt": "x", "temperature": -1}, "temperature"),
    (COMPLETIONS, b'{"prompt": "x", "temperature": 1e400}', "temperature"),
    (COMPLETIONS, {"prompt": "x", "top_p": 0}, "top_p"),
    (COMPLETIONS, {"prompt": "x", "seed": 0.5}, "seed"),
    (COMPLETIONS, {"prompt": "x", "stop": [""]}, "stop"),
    (COMPLETIONS, {"prompt": "x", "stop": ["x"] * 16 + ["y" * 300]}, "stop"),
    (COMPLETIONS, {"prompt": "x", "stream": "yes"}, "stream"),
    (COMPLETIONS, {"prompt": "x", "stream_options": {"include_usage": True}}, "stream_options"),
    (COMPLETIONS, {"prompt": "x", "temprature": 1}, "temprature"),
    (COMPLETIONS, {"prompt": "x", "model": 3}, "model"),
    (COMPLETIONS, b"", None),
    (COMPLETIONS, b"{", None),
    (COMPLETIONS, b"\xff\xfe", None),
    (COMPLETIONS, b"[]", None),
    (COMPLETIONS, b"[" * 100_000, None),
    (COMPLETIONS, b'{"prompt": "x", "top_p": NaN}', None),
]


def test_what_is_not_in_order_is_refused_by_name(app):
    for path, body, field in REFUSED:
        status, answer = ask(app, path, body)
        error = answer["error"]
        assert (status, error["type"], error["param"]) == (400, "invalid_request_error", field), (body, error)
        assert len(error["message"].splitlines()) == 1
        assert error["message"].endswith(".")
        assert field is None or field.split(".")[0] in error["message"]


def test_other_refusals_have_their_own_status(app):
    for path, body, options, wanted in (
        (COMPLETIONS, {"prompt": "x", "model": "another"}, {}, 404),
        ("/v1/models/another", None, {}, 404),
        ("/v1/embeddings", {"input": "x"}, {}, 404),
        (COMPLETIONS, None, {}, 405),
        (COMPLETIONS, {"prompt": "x" * (1 << 20)}, {}, 413),
        (COMPLETIONS, {"prompt": "x"}, {"headers": [(b"content-type", b"text/plain")]}, 400),
    ):
        status, answer = ask(app, path, body, **options)
        assert (status, set(answer["error"])) == (wanted, {"message", "type", "param", "code"})


def test_the_model_is_listed(app):
    [listed] = ask(app, "/v1/models")[1]["data"]
    assert (listed["id"], listed["object"]) == ("m", "model")
    assert ask(app, "/v1/models/m") == (200, listed)
    assert ask(app, "/health") == (200, {"status": "ok", "under_way": 0, "waiting": 0})


def test_a_key_is_asked_for(served):
    with serving(*served, api_key="secret") as app:
        for header in (b"", b"Bearer", b"Bearer secre", b"Bearer secret2", b"Basic secret", b"secret", b"Bearer \xff"):
            status, headers, got = asyncio.run(send(app, "/v1/models", headers=[(b"authorization", header)]))
            assert (status, headers[b"www-authenticate"]) == (401, b"Bearer")
            assert json.loads(got)["error"]["code"] == "invalid_api_key"
        for header in (b"Bearer secret", b"bearer  secret"):
            assert ask(app, "/v1/models", headers=[(b"authorization", header)])[0] == 200
        assert ask(app, "/health")[0] == 200


def test_a_web_page_cannot_reach_a_local_server_under_its_own_name(served):
    with serving(*served, hosts={"localhost"}) as app:
        for host, wanted in (
            ("localhost:8000", 200),
            ("127.0.0.1", 200),
            ("[::1]:8000", 200),
            ("evil.example:8000", 403),
            ("", 403),
        ):
            assert ask(app, "/v1/models", headers=[(b"host", host.encode())])[0] == wanted


@pytest.mark.parametrize("stream", [True, False])
def test_a_text_ends_when_its_client_has_gone(app, served, stream):
    passes = []
    handle = served[0].register_forward_hook(lambda *_: passes.append(1))
    body = {"prompt": "expert router", "max_tokens": 250, "temperature": 0, "stream": stream}
    leave = (lambda got: b"data" in got) if stream else (lambda _: True)
    status, _, got = asyncio.run(send(app, COMPLETIONS, body, leave_when=leave))
    handle.remove()
    assert (status, b"[DONE]" in got) == (200 if stream else None, False)
    assert len(passes) < 250
    assert ask(app, "/health")[1] == {"status": "ok", "under_way": 0, "waiting": 0}


def test_clients_that_leave_in_the_middle_leave_nothing_behind(app):
    body = {"prompt": "expert router", "max_tokens": 250, "temperature": 0, "stream": True}

    async def many():
        leave = [lambda _: True, lambda got: b"data" in got]
        return await asyncio.gather(
            *(send(app, COMPLETIONS, body, leave_when=leave[i % 2], client=str(i % 7)) for i in range(24))
        )

    assert {status for status, _, _ in asyncio.run(many())} <= {200, 429}
    assert ask(app, "/health")[1] == {"status": "ok", "under_way": 0, "waiting": 0}
    assert ask(app, COMPLETIONS, {"prompt": "x", "max_tokens": 2})[0] == 200


def test_a_full_queue_and_too_many_requests_are_refused(served, monkeypatch):
    body = {"prompt": "expert router", "max_tokens": 12, "temperature": 0}

    async def many(app, count):
        return await asyncio.gather(*(send(app, COMPLETIONS, body) for _ in range(count)))

    with serving(*served, parallel=1, waiting=2) as app:
        answers = asyncio.run(many(app, 5))
        assert sorted(status for status, _, _ in answers) == [200, 200, 200, 429, 429]
        assert {headers.get(b"retry-after") for status, headers, _ in answers if status == 429} == {b"5"}
        monkeypatch.setattr(_app, "MOST_REQUESTS", 2)
        assert sorted(status for status, _, _ in asyncio.run(many(app, 3))) == [200, 200, 503]


def test_what_goes_wrong_in_the_model_ends_one_answer(app, served):
    def break_down(*_):
        raise NotFiniteError("the model outputs NaN.")

    for stream in (True, False):
        handle = served[0].register_forward_pre_hook(break_down)
        body = {"prompt": "expert router", "max_tokens": 2, "stream": stream}
        status, _, got = asyncio.run(send(app, COMPLETIONS, body))
        handle.remove()
        error = json.loads(got.removeprefix(b"data: "))["error"]
        assert (status, error["message"]) == (200 if stream else 500, "the model outputs NaN.")
    assert ask(app, COMPLETIONS, {"prompt": "x", "max_tokens": 2})[0] == 200


def test_the_end_of_the_server_ends_the_answers(served):
    with serving(*served) as app:

        async def cut():
            body = {"prompt": "expert router", "max_tokens": 250, "temperature": 0}
            running = asyncio.gather(*(send(app, COMPLETIONS, body | {"stream": s}) for s in (False, True)))
            while app._turns.counts()[0] < 2:
                await asyncio.sleep(0.01)
            assert await asyncio.to_thread(app._turns.close, 30)
            return [*await running, await send(app, COMPLETIONS, body)]

        whole, streamed, late = asyncio.run(cut())
        assert (whole[0], streamed[0], late[0]) == (503, 200, 503)
        assert b"the server is stopping" in streamed[2]


def test_an_encoder_decoder_completes_and_does_not_chat(switch, tokenizer):
    model = AutoModelForSeq2SeqLM.from_pretrained(switch)
    with serving(model, tokenizer) as app:
        body = {"prompt": "expert router", "temperature": 0, "max_tokens": 5}
        wanted = generate(model, tokenizer, "expert router", sampling=Sampling(5))
        assert ask(app, COMPLETIONS, body)[1]["choices"][0]["text"] == wanted.text
        status, answer = ask(app, CHAT, {"messages": USER})
        assert (status, "/v1/completions" in answer["error"]["message"]) == (400, True)


def test_a_model_without_a_template_does_not_chat(causal, tokenizer):
    with serving(AutoModelForCausalLM.from_pretrained(causal("qwen3_moe")), tokenizer) as app:
        status, answer = ask(app, CHAT, {"messages": USER})
        assert (status, answer["error"]["param"]) == (400, "messages")
        assert "no chat template. Use /v1/completions" in answer["error"]["message"]


class Counted:
    """A text of so many passes, which it notes."""

    def __init__(self, name, passes, log, gate=None):
        self.name, self.left, self.log, self.gate, self.finish_reason = name, passes, log, gate, ""

    def step(self):
        if self.gate is not None:
            assert self.gate.wait(30)
        self.log.append(self.name)
        self.left -= 1
        self.finish_reason = "" if self.left else "length"
        return "x"


def taken(parallel, jobs):
    """Submit (client, passes) at once; give the order in which their numbers made passes."""
    log, gate, ends = [], threading.Event(), []
    turns = Turns(torch.nn.Module(), parallel, len(jobs))
    for number, (client, passes) in enumerate(jobs):
        ended = threading.Event()
        ends.append(ended)
        tell = lambda news, ended=ended: ended.set() if news is None else None  # noqa: E731
        turns.submit(Job(client, Counted(number, passes, log, gate), tell))
    gate.set()
    assert all(ended.wait(30) for ended in ends)
    assert turns.close(30)
    return log


def test_clients_take_turns_whatever_they_ask_for():
    jobs = [("a", 6), ("a", 6), ("a", 6), ("b", 4)]
    order = taken(4, jobs)
    last = max(i for i, number in enumerate(order) if number == 3)
    assert last <= 9  # every second pass, but for the first ones, before all had come
    assert sorted(order) == [0] * 6 + [1] * 6 + [2] * 6 + [3] * 4


def test_nobody_takes_the_last_place_twice():
    jobs = [("a", 30), ("a", 30), ("a", 30), ("b", 2)]
    order = taken(2, jobs)
    assert order.index(3) < 10
    assert order.index(1) > 25  # one text of the first client at a time
    assert taken(1, [("a", 2), ("a", 2)]) == [0, 0, 1, 1]


def test_a_full_queue_gives_way_to_who_has_less_in_it():
    turns = Turns(torch.nn.Module(), 1, 3)
    heard, gate = {}, threading.Event()

    def submit(name, client):
        heard[name] = []
        turns.submit(Job(client, Counted(name, 1, [], gate), heard[name].append))

    submit("a0", "a")
    while turns.counts() != (1, 0):
        time.sleep(0.001)
    for name in ("a1", "a2", "a3"):
        submit(name, "a")
    with pytest.raises(QueueFull):
        submit("a4", "a")
    submit("b1", "b")
    assert [type(news) for news in heard["a3"]] == [QueueFull]
    with pytest.raises(QueueFull):  # two of one client and one of the other wait
        submit("b2", "b")
    submit("c1", "c")
    assert [type(news) for news in heard["a2"]] == [QueueFull]
    gate.set()
    while turns.counts() != (0, 0):
        time.sleep(0.001)
    assert turns.close(30)
    assert all(heard[name] == ["x", None] for name in ("a0", "a1", "b1", "c1"))


def test_a_closed_queue_takes_nothing():
    turns = Turns(torch.nn.Module(), 1, 0)
    heard = []
    gate = threading.Event()
    turns.submit(Job("a", Counted(0, 2, [], gate), heard.append))
    with pytest.raises(QueueFull):
        turns.submit(Job("b", SimpleNamespace(), heard.append))
    while turns.counts() != (1, 0):
        time.sleep(0.001)
    assert not turns.close(0.01)  # in the middle of a pass
    gate.set()
    assert turns.close(30)
    assert [type(news) for news in heard] == [Closed]
    with pytest.raises(Closed):
        turns.submit(Job("b", SimpleNamespace(), heard.append))
