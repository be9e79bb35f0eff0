"""What a client asks for, read from the body of its request: OpenAI's fields, each checked once."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from qmoe_lite.text.generation import COLDEST, Sampling

MOST_STOPS = 16  # strings
LONGEST_STOP = 256  # characters


class Refusal(Exception):
    """An answer that is an error: one line, the field, the status, OpenAI's code for it, and headers."""

    def __init__(
        self, message: str, field: str | None = None, *, status: int = 400, code: str | None = None, **headers: str
    ) -> None:
        super().__init__(message)
        self.field, self.status, self.code = field, status, code
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    def body(self) -> dict[str, Any]:
        """Return it as OpenAI's interface has it."""
        kind = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}
        error = {"message": str(self), "type": kind.get(self.status, "invalid_request_error")}
        return {"error": {**error, "param": self.field, "code": self.code}}


@dataclass(frozen=True)
class Request:
    """A request whose fields are in order; whether its tokens fit is not known yet.

    Attributes
    ----------
    model : str or None
    prompt : str, list of int, or list of dict
        Text or token ids to continue, or a chat's messages.
    max_tokens : int or None
    max_tokens_field : str
        By which name it was given.
    draws : dict
        Sampling's arguments but `max_new_tokens`.
    stop : tuple of str
    stream, usage : bool
        Answer piece by piece; and then with a last piece that counts tokens.
    user : str
        Whom the client asks for, if it says so.
    """

    model: str | None
    prompt: str | list[int] | list[dict[str, str]]
    max_tokens: int | None
    max_tokens_field: str
    draws: dict[str, Any]
    stop: tuple[str, ...]
    stream: bool
    usage: bool
    user: str

    def sampling(self, max_new_tokens: int) -> Sampling:
        """Return how tokens are chosen."""
        return Sampling(max_new_tokens, **self.draws)


_LABELS = {"metadata", "prompt_cache_key", "safety_identifier", "service_tier", "store"}  # they change no answer
_SHARED = {"frequency_penalty", "logit_bias", "model", "n", "presence_penalty", "repetition_penalty", "seed", "stop"}
_SHARED |= {"stream", "stream_options", "temperature", "top_k", "top_p", "user", "max_tokens", "logprobs"} | _LABELS
_CHAT = _SHARED | {"messages", "max_completion_tokens", "top_logprobs", "response_format", "tools", "tool_choice"}
_CHAT |= {"audio", "functions", "function_call", "modalities", "parallel_tool_calls", "prediction"}
_CHAT |= {"reasoning_effort", "verbosity", "web_search_options"}
_COMPLETION = _SHARED | {"prompt", "best_of", "echo", "suffix"}
_NEUTRAL: dict[str, tuple[Any, ...]] = {  # not served: only with a value that changes nothing
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "n": (1,),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": (),
    "web_search_options": (),
}


def read_request(data: bytes, chat: bool) -> Request:
    """Read a body of /v1/chat/completions or /v1/completions; raise Refusal for what is not in order."""
    fields = _object(data)
    allowed = _CHAT if chat else _COMPLETION
    for name, value in fields.items():
        if name not in allowed:
            raise Refusal(f"{name[:80]!r} is no field of this request. Leave it out.", name[:80])
        if name in _NEUTRAL and not any(_same(value, neutral) for neutral in _NEUTRAL[name]):
            raise Refusal(f"{name} is {_short(value)}, which this server does not support. Leave it out.", name)
    take = _Fields(fields)
    stream = take.flag("stream")
    most, field = _max_tokens(take, chat)
    return Request(
        model=take.text("model"),
        prompt=_messages(fields.get("messages")) if chat else _prompt(fields.get("prompt")),
        max_tokens=most,
        max_tokens_field=field,
        draws=_draws(take),
        stop=_stop(fields.get("stop")),
        stream=stream,
        usage=_usage(fields.get("stream_options"), stream),
        user=take.text("user") or "",
    )


def _object(data: bytes) -> dict[str, Any]:
    """Parse a JSON object; fields that are null are as good as left out."""

    def no_number(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    try:
        fields = json.loads(data.decode("utf-8"), parse_constant=no_number)
    except (ValueError, RecursionError) as error:
        raise Refusal(f"the body is not JSON: {str(error)[:120] or 'too deep'}. Send one JSON object.") from None
    if not isinstance(fields, dict):
        raise Refusal(f"the body is {_short(fields)}. Send one JSON object.")
    return {name: value for name, value in fields.items() if value is not None}


class _Fields:
    """Fields by their type."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self._fields = fields

    def number(self, name: str, expected: str, good: Callable[[Any], bool], types: Any = (int, float)) -> Any:
        """Return a number, None where it is left out."""
        value = self._fields.get(name)
        right = isinstance(value, types) and not isinstance(value, bool) and good(value)
        if value is not None and not right:
            raise Refusal(f"{name} is {_short(value)}; expected {expected}.", name)
        return value

    def text(self, name: str) -> str | None:
        """Return a string, None where it is left out."""
        value = self._fields.get(name)
        return None if value is None else _text(value, name)

    def flag(self, name: str) -> bool:
        """Return whether it is true."""
        value = self._fields.get(name, False)
        if not isinstance(value, bool):
            raise Refusal(f"{name} is {_short(value)}; expected true or false.", name)
        return value


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise Refusal(f"{name} is {_short(value)}; expected a string.", name)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise Refusal(f"{name} holds half a surrogate pair (such as \\ud800). Send valid Unicode.", name) from None
    return value


def _prompt(value: Any) -> str | list[int]:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        value = value[0]
    if not value:
        raise Refusal("prompt is missing or empty. Send a string to continue.", "prompt")
    if not isinstance(value, list):
        return _text(value, "prompt")
    if not all(isinstance(each, int) and not isinstance(each, bool) and each >= 0 for each in value):
        raise Refusal("prompt is a list of several prompts. Send one string, or the ids of its tokens.", "prompt")
    return value


def _messages(value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise Refusal(
            'messages is missing or empty. Send a list such as [{"role": "user", "content": "..."}].', "messages"
        )
    return [_message(message, f"messages[{number}]") for number, message in enumerate(value)]


def _message(message: Any, name: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise Refusal(f"{name} is {_short(message)}; expected an object with role and content.", name)
    roles = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
    role = message.get("role")
    if not isinstance(role, str) or role not in roles:
        raise Refusal(f"{name}.role is {_short(role)}; expected system, user or assistant.", f"{name}.role")
    if message.get("tool_calls") or message.get("function_call"):
        raise Refusal(f"{name} calls a tool, which this server does not support. Leave it out.", name)
    content = message.get("content")
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text":
                raise Refusal(f"{name}.content has a part that is no text. Send text alone.", f"{name}.content")
        content = "".join(_text(part.get("text"), f"{name}.content") for part in content)
    return {"role": roles[role], "content": _text(content, f"{name}.content")}


def _max_tokens(take: _Fields, chat: bool) -> tuple[int | None, str]:
    """Return how many tokens are asked for at most, and by which name."""
    names = ("max_completion_tokens", "max_tokens") if chat else ("max_tokens",)
    found = {name: take.number(name, "a whole number, at least 1", lambda value: value >= 1, int) for name in names}
    given = [name for name in names if found[name] is not None] or [names[-1]]
    if len({found[name] for name in given}) > 1:
        raise Refusal("max_completion_tokens and max_tokens differ. Send one of them.", names[-1])
    return found[given[0]], given[0]


def _draws(take: _Fields) -> dict[str, Any]:
    # OpenAI's defaults: temperature 1, top_p 1
    temperature = take.number(
        "temperature", f"0 (greedy), or a number from {COLDEST} to 2", lambda t: t == 0 or COLDEST <= t <= 2
    )
    top_p = take.number("top_p", "a number above 0, at most 1", lambda p: 0 < p <= 1)
    top_k = take.number("top_k", "a whole number, at least 1", lambda k: k >= 1, int)
    penalty = take.number("repetition_penalty", "a number above 0, at most 10", lambda p: 0 < p <= 10)
    seed = take.number("seed", "a whole number", lambda _: True, int)
    temperature = 1.0 if temperature is None else float(temperature)  # OpenAI's default
    warm = temperature > 0  # else the likeliest token is taken, whatever the others are
    return {
        "temperature": temperature,
        "top_p": top_p if warm else None,
        "top_k": top_k if warm else None,
        "repetition_penalty": 1.0 if penalty is None else float(penalty),
        "seed": secrets.randbits(63) if seed is None else seed % (1 << 63),
    }


def _stop(value: Any) -> tuple[str, ...]:
    strings: Iterable[Any] = [] if value is None else value if isinstance(value, list) else [value]
    found = tuple(dict.fromkeys(_text(each, "stop") for each in strings))
    if len(found) > MOST_STOPS or not all(1 <= len(each) <= LONGEST_STOP for each in found):
        raise Refusal(
            f"stop takes up to {MOST_STOPS} strings of 1 to {LONGEST_STOP} characters. Leave others out.", "stop"
        )
    return found


def _usage(value: Any, stream: bool) -> bool:
    if value is None:
        return False
    if not isinstance(value, dict) or not stream:
        raise Refusal('stream_options is for "stream": true, such as {"include_usage": true}.', "stream_options")
    return _Fields({name: each for name, each in value.items() if each is not None}).flag("include_usage")


def _same(value: Any, neutral: Any) -> bool:
    """Compare as JSON does, where 0 is not false."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def _short(value: Any) -> str:
    """Return a value as it would stand in a message, cut to a few words."""
    text = "missing" if value is None else json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
