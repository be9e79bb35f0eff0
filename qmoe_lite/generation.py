"""Text that a model writes after a prompt, token by token."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from qmoe_lite.calibration import Samples, check_ids
from qmoe_lite.errors import NotFiniteError, SettingError, first_line

COLDEST = 1e-3  # lower temperatures are greedy in all but name, and in the end overflow float32
# up to the last space, or the last character of a script that has none (Thai, Burmese, Khmer, Chinese, Japanese)
_WHOLE_WORDS = re.compile(
    r".*[\s\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]", re.DOTALL
)


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; nothing else decides, whatever the model's generation_config.json says.

    Attributes
    ----------
    max_new_tokens : int
        Where the text is cut if the model does not end it.
    temperature : float
        0 takes the likeliest token each time (greedy); above 0 tokens are drawn.
    top_p, top_k : float, int, or None
        Draw among the likeliest tokens that together have this probability, or this many. None: among all.
    repetition_penalty : float
        Above 1 lowers what stands there already; 1 is off.
    seed : int
        Decides the draws.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float = 1.0
    seed: int = 0

    def check(self) -> None:
        """Raise SettingError for a value outside its range, or for options that do nothing."""
        warm = COLDEST <= self.temperature < math.inf
        ranges: tuple[tuple[str, bool, str], ...] = (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature == 0 or warm, f"0 (greedy), or at least {COLDEST}"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "above 0, at most 1"),
            ("top_k", self.top_k is None or self.top_k >= 1, "at least 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0 and finite"),
            ("seed", 0 <= self.seed < 1 << 63, "at least 0, below 2^63"),
        )
        for name, good, expected in ranges:
            if not good:
                raise SettingError(f"{name} is {getattr(self, name)}; expected {expected}.")
        if self.temperature == 0 and not (self.top_p is None and self.top_k is None):
            raise SettingError("top_p and top_k do nothing at temperature 0 (greedy). Give a temperature, e.g. 0.7.")


@dataclass(frozen=True)
class Generation:
    """What `generate` made.

    Attributes
    ----------
    text : str
        The continuation, without the prompt.
    token_ids : tuple of int
        Its tokens; the one that ended it is the last.
    prompt_tokens : int
    finish_reason : str
        "eos": the model ended the text; "length": it was cut after `max_new_tokens`.
    seconds, first_token_seconds : float
        From the start of the first forward pass to the last token, and to the first.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    finish_reason: str
    seconds: float
    first_token_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """All tokens over all seconds, the prompt's pass among them."""
        return len(self.token_ids) / max(self.seconds, 1e-9)


def encode_prompt(
    model: Any, tokenizer: Any, prompt: str, *, chat: bool = False, system: str | None = None
) -> list[int]:
    """Turn a prompt into the ids that the model is to go on from.

    Parameters
    ----------
    model : transformers model
        Causal or encoder-decoder.
    tokenizer : transformers tokenizer
        The model's own.
    prompt : str
        Special tokens written out in it, such as <extra_id_0>, count as such.
    chat : bool
        Wrap it as a user's message by the tokenizer's chat template.
    system : str, optional
        A system message before it; needs `chat`.

    Returns
    -------
    list of int
        With what the tokenizer adds (a begin token, </s>). An encoder's input always ends with </s>, as in training.

    Raises
    ------
    SettingError
        No token at all, an id that the model does not know, or no chat template that takes the messages.
    """
    seq2seq = bool(model.config.is_encoder_decoder)
    if system is not None and not chat:
        raise SettingError("a system message needs the chat template. Give --chat too.")
    if chat:
        ids = _chat_ids(tokenizer, prompt, system)
    else:
        ids = list(tokenizer(prompt, verbose=False)["input_ids"])
        eos = tokenizer.eos_token_id
        if seq2seq and eos is not None and ids[-1:] != [eos]:
            ids.append(eos)
        if not ids and tokenizer.bos_token_id is not None:
            ids.append(tokenizer.bos_token_id)
    if not ids:
        raise SettingError("the prompt is empty, and this tokenizer has no token that begins a text. Give some text.")
    check_ids(Samples(np.asarray([ids]), None, 1), model.config.vocab_size)
    return ids


def _chat_ids(tokenizer: Any, prompt: str, system: str | None) -> list[int]:
    if not getattr(tokenizer, "chat_template", None):
        raise SettingError("the tokenizer has no chat template. Leave --chat out, or use the model's chat version.")
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": prompt})
    try:
        return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
    except Exception as error:  # jinja2's own, and whatever a template raises
        more = " Some take no system message." if system is not None else ""
        raise SettingError(f"the chat template refuses the messages: {first_line(error)}.{more}") from error


def generate(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    chat: bool = False,
    system: str | None = None,
    sampling: Sampling | None = None,
    write: Callable[[str], object] | None = None,
) -> Generation:
    """Let a model go on from a prompt.

    Parameters
    ----------
    model : transformers model
        Causal or encoder-decoder, dense or compressed. It is put in evaluation mode and otherwise runs as it is.
    tokenizer : transformers tokenizer
        The model's own.
    prompt : str
        As `encode_prompt` takes it.
    chat : bool
        Apply the chat template.
    system : str, optional
        A system message.
    sampling : Sampling, optional
        By default 128 tokens, greedily. Drawing sets torch's global seed.
    write : function, optional
        Called with each piece of text as soon as its words are whole; the pieces together are the text.

    Returns
    -------
    Generation
        Special tokens are left out of the text, but an encoder-decoder model's sentinels (<extra_id_0>, ..) are shown.

    Raises
    ------
    SettingError
        As `Sampling.check` and `encode_prompt`, or prompt and new tokens exceed the model's positions.
    NotFiniteError
        The model puts out NaN.
    """
    sampling = sampling or Sampling()
    sampling.check()
    ids = encode_prompt(model, tokenizer, prompt, chat=chat, system=system)
    seq2seq = bool(model.config.is_encoder_decoder)
    positions = None if seq2seq else getattr(model.config, "max_position_embeddings", None)
    if positions is not None and len(ids) + sampling.max_new_tokens > positions:
        raise SettingError(
            f"the prompt has {len(ids)} tokens, and {sampling.max_new_tokens} new ones do not fit: the model has "
            f"{positions} positions. Shorten the prompt or ask for fewer tokens (--max-new-tokens)."
        )
    settings, ends = _settings(model, tokenizer, sampling)
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    hidden = ends | ({settings.pad_token_id, settings.decoder_start_token_id} if seq2seq else special)
    stream = _Stream(tokenizer, hidden, write, alone=seq2seq or chat)
    torch.manual_seed(sampling.seed)
    model.eval()
    started = time.perf_counter()
    with torch.inference_mode(), _only(model, settings):
        tokens = torch.tensor([ids], device=model.device)
        model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            generation_config=settings,
            logits_processor=[_refuse_nan],
            streamer=stream,
        )
    return Generation(
        text="".join(stream.pieces),
        token_ids=tuple(stream.made),
        prompt_tokens=len(ids),
        finish_reason="eos" if stream.made[-1] in ends else "length",
        seconds=time.perf_counter() - started,
        first_token_seconds=stream.first_at - started,
    )


def _settings(model: Any, tokenizer: Any, sampling: Sampling) -> tuple[Any, set[int]]:
    """Give transformers' settings, and the ids that end a text."""
    from transformers import GenerationConfig

    own = model.generation_config
    eos = own.eos_token_id if own.eos_token_id is not None else tokenizer.eos_token_id
    ends = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    pad = own.pad_token_id if own.pad_token_id is not None else tokenizer.pad_token_id
    chosen: dict[str, Any] = {"do_sample": sampling.temperature > 0}
    if sampling.temperature > 0:  # a top_k left open would be 50
        chosen |= {"temperature": sampling.temperature, "top_p": sampling.top_p or 1.0, "top_k": sampling.top_k or 0}
    settings = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        repetition_penalty=sampling.repetition_penalty,
        eos_token_id=ends or None,
        pad_token_id=pad if pad is not None else next(iter(ends), None),
        bos_token_id=own.bos_token_id,
        decoder_start_token_id=own.decoder_start_token_id,
        **chosen,
    )
    return settings, set(ends)


@contextmanager
def _only(model: Any, settings: Any) -> Iterator[None]:
    """Hide the model's own generation_config, from which transformers fills what is left open."""
    before = model.generation_config
    model.generation_config = settings
    try:
        yield
    finally:
        model.generation_config = before


def _refuse_nan(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    if torch.isnan(scores).any():  # argmax would call it the likeliest token
        raise NotFiniteError("the model puts out NaN: its weights or activations hold it. Fetch the model again.")
    return scores


class _Stream:
    """A streamer for transformers' `generate`: keeps the tokens, and passes their text on in whole words.

    Unlike transformers' own it keeps an ordinary token before those that it decodes: many decoders drop a space that
    stands first, which would eat the one after the prompt and the indentation of each line.
    """

    def __init__(self, tokenizer: Any, hidden: set[int], write: Callable[[str], object] | None, alone: bool) -> None:
        self.made: list[int] = []
        self.pieces: list[str] = []
        self.first_at = math.inf
        self._tokenizer, self._hidden, self._write = tokenizer, hidden, write
        self._prompt_seen = False
        self._before: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
        self._line: list[int] = [] if alone else [*self._before]
        self._shown = len(self._decode())

    def _decode(self) -> str:
        return self._tokenizer.decode(self._line, clean_up_tokenization_spaces=False)  # type: ignore[no-any-return]

    def put(self, tokens: torch.Tensor) -> None:
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        if not self.made:
            self.first_at = time.perf_counter()
        ids = tokens.flatten().tolist()
        self.made += ids
        self._line += [i for i in ids if i not in self._hidden]
        text = self._decode()
        whole = _WHOLE_WORDS.match(text)
        self._show(text, whole.end() if whole else 0)
        if text.endswith("\n"):
            self._line = [*self._before]
            self._shown = len(self._decode())

    def end(self) -> None:
        text = self._decode()
        self._show(text, len(text))

    def _show(self, text: str, end: int) -> None:
        if end > self._shown:
            self.pieces.append(text[self._shown : end])
            self._shown = end
            if self._write is not None:
                self._write(self.pieces[-1])
