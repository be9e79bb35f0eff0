"""Text that a model writes after a prompt, token by token."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from qmoe_lite.compression.calibration import Samples, check_ids
from qmoe_lite.errors import SettingError, first_line
from qmoe_lite.text.guards import Stopped, alone, only, refuse_nan, stopping
from qmoe_lite.text.streams import Stream, Streams

PREFILL_CHUNK = 1024  # tokens of a prompt in one forward pass: what bounds the memory that a long prompt takes
COLDEST = 1e-3  # lower temperatures are greedy in all but name, and in the end overflow float32


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
        Above 1 makes tokens that occurred already less likely; 1 is off.
    seed : int
        Decides the draws.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float = 1.0
    seed: int = 0

    def begin(self) -> None:
        """Set torch's global seed, where tokens are drawn."""
        if self.temperature > 0:
            torch.manual_seed(self.seed)

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
        "eos": the model ended the text; "length": it was cut after `max_new_tokens`; "stopped": by the caller.
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
    """Turn a prompt into the token ids that the model continues.

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
        messages = [] if system is None else [{"role": "system", "content": system}]
        return chat_ids(model, tokenizer, [*messages, {"role": "user", "content": prompt}])
    ids = list(tokenizer(prompt, verbose=False)["input_ids"])
    eos = tokenizer.eos_token_id
    if seq2seq and eos is not None and ids[-1:] != [eos]:
        ids.append(eos)
    if not ids and tokenizer.bos_token_id is not None:
        ids.append(tokenizer.bos_token_id)
    return _known(model, ids)


def chat_ids(model: Any, tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    """Put messages through the chat template, up to where an answer begins.

    Raises
    ------
    SettingError
        No chat template, one that does not take the messages, or as `encode_prompt`.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise SettingError("the tokenizer has no chat template. Leave --chat out, or use the model's chat version.")
    try:
        ids = list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
    except Exception as error:  # jinja2's own, and whatever a template raises
        more = " Some take no system message." if messages[0]["role"] == "system" else ""
        raise SettingError(f"the chat template refuses the messages: {first_line(error)}.{more}") from error
    return _known(model, ids)


def _known(model: Any, ids: list[int]) -> list[int]:
    """Refuse ids that the model cannot continue."""
    if not ids:
        raise SettingError("the prompt is empty, and this tokenizer has no token that begins a text. Give some text.")
    check_ids(Samples(np.asarray([ids]), None, 1), model.config.vocab_size)
    return ids


def generate(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    chat: bool = False,
    system: str | None = None,
    sampling: Sampling | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
    write: Callable[[str], object] | None = None,
) -> Generation:
    """Generate text from a prompt.

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
    prefill_chunk : int
        A causal model takes so many tokens of the prompt at a time; an encoder always takes all.
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

    def write_text(_: int, text: str) -> None:
        if text and write is not None:
            write(text)

    options: dict[str, Any] = {"chat": chat, "system": system, "sampling": sampling, "prefill_chunk": prefill_chunk}
    return generate_batch(model, tokenizer, [prompt], write=write_text, **options)[0]


def generate_batch(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    chat: bool = False,
    system: str | None = None,
    sampling: Sampling | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
    write: Callable[[int, str], object] | None = None,
) -> list[Generation]:
    """Generate text from several prompts at once.

    Greedily, each text is the one that its prompt alone gives, but for rounding. Drawn texts depend on the whole batch.

    Parameters
    ----------
    model, tokenizer, chat, system, sampling, prefill_chunk
        As in `generate`.
    prompts : sequence of str
        At least one. Shorter ones are padded: a causal model's on the left, an encoder's on the right.
    write : function, optional
        Called with a prompt's number, from 0, and the next piece of its text; with an empty text when that one ends.

    Returns
    -------
    list of Generation
        In the order of the prompts. `seconds` is up to each one's own last token.

    Raises
    ------
    SettingError, NotFiniteError
        As in `generate`; the message names the prompt, from 1.
    """
    sampling = sampling or Sampling()
    sampling.check()
    if prefill_chunk < 1:
        raise SettingError(f"prefill_chunk is {prefill_chunk}; expected at least 1.")
    if not prompts:
        raise SettingError("there is no prompt. Give at least one.")
    rows = []
    for number, prompt in enumerate(prompts, 1):
        try:
            ids = encode_prompt(model, tokenizer, prompt, chat=chat, system=system)
            positions = positions_of(model)
            if positions is not None and len(ids) + sampling.max_new_tokens > positions:
                raise SettingError(
                    f"the prompt has {len(ids)} tokens, and {sampling.max_new_tokens} new ones do not fit: the model "
                    f"has {positions} positions. Shorten the prompt or ask for fewer tokens (--max-new-tokens)."
                )
        except SettingError as error:
            if len(prompts) == 1:
                raise
            raise SettingError(f"prompt {number} of {len(prompts)}: {error}") from error
        rows.append(ids)
    sampling.begin()
    return go_on(model, tokenizer, rows, sampling, prefill_chunk=prefill_chunk, fresh_line=chat, write=write)


def positions_of(model: Any) -> int | None:
    """Return the number of tokens that a causal model has positions for; None where there is no limit."""
    if model.config.is_encoder_decoder:  # relative positions; some checkpoints name a number all the same
        return None
    return getattr(model.config, "max_position_embeddings", None)


def go_on(
    model: Any,
    tokenizer: Any,
    rows: list[list[int]],
    sampling: Sampling,
    *,
    prefill_chunk: int = PREFILL_CHUNK,
    fresh_line: bool = False,
    write: Callable[[int, str], object] | None = None,
    cache: Any = None,
    stop: Callable[[], bool] | None = None,
) -> list[Generation]:
    """Run the model on rows of ids, which are taken as they are.

    Parameters
    ----------
    model, tokenizer, sampling, prefill_chunk, write
        As in `generate_batch`; torch's seed is the caller's to set.
    rows : list of list of int
        With all that is in the cache.
    fresh_line : bool
        The text begins a line of its own (a chat's answer), and does not continue the prompt's.
    cache : transformers Cache, optional
        Keys and values of the one row's beginning; those of the rest are added to it.
    stop : function, optional
        Asked before each forward pass: True ends all texts there.
    """
    seq2seq = bool(model.config.is_encoder_decoder)
    settings, ends, hidden = settings_for(model, tokenizer, sampling)
    # what makes a cache of its own kind takes a prompt whole
    if not seq2seq and max(map(len, rows)) > prefill_chunk and model._supports_default_dynamic_cache():
        settings.prefill_chunk_size = prefill_chunk
    streams = Streams(
        [Stream(tokenizer, hidden, ends, write, i, alone=seq2seq or fresh_line) for i in range(len(rows))]
    )
    tokens, mask = _pad(rows, left=not seq2seq)
    kept = {} if cache is None else {cache_argument(model): cache}
    model.eval()
    started = time.perf_counter()
    with alone(model), torch.inference_mode(), only(model, settings), stopping(model, stop):
        try:
            model.generate(
                input_ids=tokens.to(model.device),
                attention_mask=mask.to(model.device),
                generation_config=settings,
                logits_processor=[refuse_nan],
                streamer=streams,
                **kept,
            )
        except Stopped:
            streams.end()
    return [
        Generation(
            text="".join(stream.pieces),
            token_ids=tuple(stream.made),
            prompt_tokens=len(row),
            finish_reason=stream.ended or ("length" if len(stream.made) == sampling.max_new_tokens else "stopped"),
            seconds=stream.last_at - started,
            first_token_seconds=stream.first_at - started,
        )
        for row, stream in zip(rows, streams.streams, strict=True)
    ]


def _pad(rows: list[list[int]], left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Make one tensor of all rows, and the mask that is 0 where it is padded."""
    width = max(map(len, rows))
    tokens, mask = [], []
    for ids in rows:
        missing = width - len(ids)
        # with a token of the row: a repetition penalty counts padding as text
        filling, nothing = [ids[0]] * missing, [0] * missing
        ones = [1] * len(ids)
        tokens.append(filling + ids if left else ids + filling)
        mask.append(nothing + ones if left else ones + nothing)
    return torch.tensor(tokens), torch.tensor(mask)


def cache_argument(model: Any) -> str:
    """Return the name under which `generate` takes a cache: past_key_values up to transformers 5.23."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def settings_for(model: Any, tokenizer: Any, sampling: Sampling) -> tuple[Any, set[int], set[int]]:
    """Return transformers' settings, the ids that end a text, and those that are left out of it."""
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
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    starts = {settings.pad_token_id, settings.decoder_start_token_id}
    return settings, set(ends), set(ends) | (starts if model.config.is_encoder_decoder else special)
