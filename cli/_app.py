"""The server's side of OpenAI's interface, as an ASGI application: who may ask, what is asked, and the answers."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import secrets
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any

from qmoe_lite.cli._requests import Refusal, Request, read_request
from qmoe_lite.cli._turns import Closed, Job, QueueFull, Turns
from qmoe_lite.errors import QMoEError, SettingError
from qmoe_lite.text.generation import chat_ids, encode_prompt
from qmoe_lite.text.writing import Writing

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

LARGEST_BODY = 1 << 20  # bytes
SLOWEST_BODY = 60.0  # seconds from the head of a request to its end
MOST_REQUESTS = 256  # open at a time, of all kinds
LEGACY_TOKENS = 16  # what /v1/completions makes without max_tokens
RETRY = "5"  # seconds, where the queue is full
_FINISH = {"eos": "stop", "stop": "stop", "length": "length"}
_ROUTES = {"/health": "GET", "/v1/models": "GET", "/v1/chat/completions": "POST", "/v1/completions": "POST"}


class Gone(Exception):
    """The client has closed its connection."""


class App:
    """Answers requests about one model.

    Parameters
    ----------
    model, tokenizer : transformers model and tokenizer
    name : str
        The model's, for clients.
    turns : Turns
        Runs the model.
    context : int
        Tokens of a prompt and its answer together, at most.
    prefill_chunk : int
        Tokens of a prompt in a pass.
    api_key : str, optional
        What clients must send as a bearer token.
    hosts : set of str, optional
        Names in the Host header that are answered, beside addresses; by default any. A web page whose name leads to
        the loopback reaches a server there, under its own name.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        name: str,
        turns: Turns,
        *,
        context: int,
        prefill_chunk: int,
        api_key: str | None = None,
        hosts: set[str] | None = None,
    ) -> None:
        self._model, self._tokenizer, self._name, self._turns = model, tokenizer, name, turns
        self._context, self._prefill_chunk, self._hosts = context, prefill_chunk, hosts
        self._api_key = None if api_key is None else api_key.encode()
        self._tokenizing = threading.Lock()  # tokenizers are not made for several threads
        self._open = 0
        self._created = int(time.time())

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer a request, as ASGI has it."""
        if scope["type"] != "http":
            return
        answer = _Answer(send)
        self._open += 1
        try:
            await self._route(scope, receive, answer)
        except Gone:
            pass
        except Refusal as refusal:
            await answer.fail(refusal)
        except Exception as error:  # a fault of ours: this answer fails, the server goes on
            await answer.fail(Refusal(f"unexpected {type(error).__name__}: {error}", status=500))
        finally:
            self._open -= 1

    async def _route(self, scope: Message, receive: Receive, answer: _Answer) -> None:
        path, headers = scope["path"], dict(scope["headers"])
        self._admit(path, headers)
        model = path.removeprefix("/v1/models/") if path.startswith("/v1/models/") else None
        method = "GET" if model else _ROUTES.get(path)
        if method is None:
            raise Refusal(f"{path[:80]} is not served. There are {', '.join(_ROUTES)}.", status=404)
        if scope["method"] != method:
            raise Refusal(f"{path} takes {method} requests.", status=405, allow=method)
        if method == "POST":
            chat = path == "/v1/chat/completions"
            request = read_request(await _body(headers, receive), chat)
            self._check_model(request.model)
            client = (scope["client"][0] if scope.get("client") else None, request.user)
            await self._answer(request, chat, client, receive, answer)
        elif path == "/health":
            under_way, waiting = self._turns.counts()
            await answer.json({"status": "ok", "under_way": under_way, "waiting": waiting})
        else:
            about = {"id": self._name, "object": "model", "created": self._created, "owned_by": "qmoe-lite"}
            self._check_model(model)
            await answer.json(about if model else {"object": "list", "data": [about]})

    def _admit(self, path: str, headers: dict[bytes, bytes]) -> None:
        """Refuse who may not ask, and what is too much at a time."""
        if self._open > MOST_REQUESTS:
            raise Refusal("too many requests are open. Try again later.", status=503, retry_after=RETRY)
        host = _host(headers.get(b"host", b""))
        if self._hosts is not None and host not in self._hosts and not _is_address(host):
            text = f"the server was asked for as {host[:80]!r}. Ask for it as localhost, or start it with --api-key."
            raise Refusal(text, status=403)
        if self._api_key is not None and path != "/health":
            scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
            right = hmac.compare_digest(token.strip(), self._api_key)
            if not right or scheme.lower() != b"bearer":
                text = "the API key is wrong or missing. Send the header Authorization: Bearer KEY."
                raise Refusal(text, status=401, code="invalid_api_key", www_authenticate="Bearer")

    def _check_model(self, name: str | None) -> None:
        if name not in (None, self._name):
            text = f"model {name[:80]!r} is not served. Ask for {self._name!r}, or leave it out."
            raise Refusal(text, "model", status=404, code="model_not_found")

    async def _answer(self, request: Request, chat: bool, client: Any, receive: Receive, answer: _Answer) -> None:
        writing = await asyncio.to_thread(self._begin, request, chat)
        news: asyncio.Queue[str | Exception | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def tell(piece: str | Exception | None) -> None:
            with suppress(RuntimeError):  # the loop is closed: the server has stopped
                loop.call_soon_threadsafe(news.put_nowait, piece)

        job = Job(client, writing, tell)
        form = _Form(self._name, chat, request.usage)
        try:
            self._turns.submit(job)
            work = self._stream if request.stream else self._whole
            await _while_connected(receive, work(writing, news, form, answer))
        except QueueFull:
            text = "the queue is full. Try again later, or start the server with a larger --queue."
            raise Refusal(text, status=429, code="queue_full", retry_after=RETRY) from None
        except Closed:
            raise Refusal("the server is stopping. Try again later.", status=503, retry_after=RETRY) from None
        except (QMoEError, RuntimeError) as error:
            raise Refusal(str(error), status=500) from None
        finally:
            job.over = True

    def _begin(self, request: Request, chat: bool) -> Writing:
        """Tokenise a prompt and compare it with the model's positions."""
        try:
            with self._tokenizing:
                ids = self._ids(request.prompt, chat)
        except SettingError as error:
            raise Refusal(str(error), "messages" if chat else "prompt") from None
        room = self._context - len(ids)
        if room < 1:
            text = f"the prompt has {len(ids)} tokens, and the model takes {self._context} with the answer. Shorten it."
            raise Refusal(text, "messages" if chat else "prompt", code="context_length_exceeded")
        if request.max_tokens is not None and request.max_tokens > room:
            field = request.max_tokens_field
            text = f"{field} is {request.max_tokens:,}, but the prompt has {len(ids)} tokens, and the model takes "
            text += f"{self._context} with the answer. Ask for at most {room}, or leave it out."
            raise Refusal(text, field, code="context_length_exceeded")
        most = request.max_tokens or (room if chat else min(room, LEGACY_TOKENS))
        return Writing(
            self._model,
            self._tokenizer,
            ids,
            request.sampling(most),
            stop=request.stop,
            prefill_chunk=self._prefill_chunk,
            fresh_line=chat,
        )

    def _ids(self, prompt: Any, chat: bool) -> list[int]:
        if chat:
            if self._model.config.is_encoder_decoder:
                raise SettingError("an encoder-decoder model does not chat. Use /v1/completions.")
            if not getattr(self._tokenizer, "chat_template", None):
                raise SettingError(
                    "this model has no chat template. Use /v1/completions, or serve the model's chat version."
                )
            return chat_ids(self._model, self._tokenizer, prompt)
        if isinstance(prompt, str):
            return encode_prompt(self._model, self._tokenizer, prompt)
        if max(prompt) >= self._model.config.vocab_size:
            known = self._model.config.vocab_size
            raise SettingError(f"prompt has token {max(prompt)}; the model knows {known}. Use its own tokenizer.")
        return list(prompt)

    async def _whole(self, writing: Writing, news: asyncio.Queue[Any], form: _Form, answer: _Answer) -> None:
        """Answer in one piece."""
        pieces = []
        while (piece := await _next(news)) is not None:
            pieces.append(piece)
        await answer.json(form.whole("".join(pieces), writing))

    async def _stream(self, writing: Writing, news: asyncio.Queue[Any], form: _Form, answer: _Answer) -> None:
        """Answer piece by piece, as server-sent events."""
        await answer.event(*form.first())
        while (piece := await _next(news)) is not None:
            await answer.event(form.piece(piece))
        await answer.event(*form.last(writing), "[DONE]")
        await answer.end()


class _Form:
    """The JSON of one answer."""

    def __init__(self, model: str, chat: bool, usage: bool) -> None:
        self._chat, self._usage = chat, usage
        kind = "chat.completion" if chat else "text_completion"
        self._head = {"id": f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}", "object": kind}
        self._head |= {"created": int(time.time()), "model": model}  # type: ignore[dict-item]

    def whole(self, text: str, writing: Writing) -> Message:
        said = {"message": {"role": "assistant", "content": text, "refusal": None}} if self._chat else {"text": text}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": _FINISH[writing.finish_reason]}
        return {**self._head, "choices": [choice], "usage": _usage(writing)}

    def first(self) -> list[Message]:
        return [self._event({"role": "assistant", "content": ""})] if self._chat else []

    def piece(self, text: str) -> Message:
        return self._event({"content": text} if self._chat else text)

    def last(self, writing: Writing) -> list[Message]:
        end = self._event({} if self._chat else "", _FINISH[writing.finish_reason])
        counted = {**self._event(None), "choices": [], "usage": _usage(writing)}
        return [end, counted] if self._usage else [end]

    def _event(self, said: Any, finish: str | None = None) -> Message:
        head = {**self._head, "object": "chat.completion.chunk"} if self._chat else self._head
        choice = {"index": 0, "delta" if self._chat else "text": said, "logprobs": None, "finish_reason": finish}
        return {**head, "choices": [choice], **({"usage": None} if self._usage else {})}


def _usage(writing: Writing) -> dict[str, int]:
    prompt, made = writing.prompt_tokens, len(writing.token_ids)
    return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}


class _Answer:
    """What goes back to the client: one JSON document, or events."""

    def __init__(self, send: Send) -> None:
        self._send, self._begun = send, False

    async def json(self, document: Message, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(document, ensure_ascii=False).encode()
        given = {"content-type": "application/json", "content-length": str(len(body)), **(headers or {})}
        await self._begin(status, given)
        await self._send({"type": "http.response.body", "body": body})

    async def event(self, *data: Message | str) -> None:
        if not self._begun:
            await self._begin(200, {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"})
        lines = [each if isinstance(each, str) else json.dumps(each, ensure_ascii=False) for each in data]
        body = "".join(f"data: {line}\n\n" for line in lines).encode()
        await self._send({"type": "http.response.body", "body": body, "more_body": True})

    async def end(self) -> None:
        await self._send({"type": "http.response.body", "body": b""})

    async def fail(self, refusal: Refusal) -> None:
        """Answer with an error: by its status, or as an event where the answer has begun."""
        if self._begun:
            await self.event(refusal.body())
            await self.end()
            return
        await self.json(refusal.body(), refusal.status, refusal.headers)

    async def _begin(self, status: int, headers: dict[str, str]) -> None:
        self._begun = True
        given = [(name.encode(), value.encode()) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": given})


async def _next(news: asyncio.Queue[Any]) -> str | None:
    """Wait for the next piece of text; None where it has ended. Raises what went wrong."""
    piece: str | Exception | None = await news.get()
    if isinstance(piece, Exception):
        raise piece
    return piece


async def _while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Work for as long as the client is there; raise Gone if it leaves."""

    async def leaves() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = (asyncio.ensure_future(work), asyncio.ensure_future(leaves()))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise Gone
        tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _body(headers: dict[bytes, bytes], receive: Receive) -> bytes:
    """Read a request's body, within bounds."""
    kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
    if kind != b"application/json":  # a web page may send other types here without asking
        raise Refusal("the body is not sent as JSON. Send the header Content-Type: application/json.")
    parts: list[bytes] = []
    size, more = 0, True
    try:
        async with asyncio.timeout(SLOWEST_BODY):
            while more and size <= 16 * LARGEST_BODY:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Gone
                part, more = message.get("body", b""), message.get("more_body", False)
                size += len(part)
                if size <= LARGEST_BODY:  # else it is only read to its end, so that the client reads the answer
                    parts.append(part)
    except TimeoutError:
        raise Refusal(f"the body took over {SLOWEST_BODY:.0f} s. Send it faster.", status=408) from None
    if size > LARGEST_BODY:
        raise Refusal(f"the body is over {LARGEST_BODY:,} bytes. Send a shorter prompt.", status=413)
    return b"".join(parts)


def _host(header: bytes) -> str:
    """Return the name or address of a Host header, without the port."""
    text = header.decode("latin-1").strip().lower()
    return text[1:].partition("]")[0] if text.startswith("[") else text.partition(":")[0]


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
