"""A dialogue with a causal model, whose keys and values stay in memory from one answer to the next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import takewhile
from typing import Any

from qmoe_lite.errors import SettingError
from qmoe_lite.text.generation import (
    PREFILL_CHUNK,
    Generation,
    Sampling,
    chat_ids,
    encode_prompt,
    go_on,
    positions_of,
)


class Conversation:
    """Questions and answers, each seen by the next.

    With a chat template the messages go through it. Without one the model goes on from all text so far, which is what
    stands on the screen: each question begins a line, and an empty one lets the model go on where it stopped.

    Parameters
    ----------
    model : transformers model
        Causal, dense or compressed.
    tokenizer : transformers tokenizer
        The model's own; its chat template is used if it has one.
    system : str, optional
        A system message before all others; needs a chat template.
    sampling : Sampling, optional
        By default 128 tokens, greedily. The seed is set once, here and by `reset`.
    prefill_chunk : int
        Tokens of a question that the model takes at a time.

    Raises
    ------
    SettingError
        An encoder-decoder model, a system message without a chat template, or as `Sampling.check`.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        system: str | None = None,
        sampling: Sampling | None = None,
        prefill_chunk: int = PREFILL_CHUNK,
    ) -> None:
        if model.config.is_encoder_decoder:
            raise SettingError("an encoder-decoder model holds no conversation. Use qmoe generate.")
        self.templated = bool(getattr(tokenizer, "chat_template", None))
        if system is not None and not self.templated:
            raise SettingError("the tokenizer has no chat template, so there is no system message. Leave --system out.")
        self._sampling = sampling or Sampling()
        self._sampling.check()
        self._model, self._tokenizer, self._prefill_chunk = model, tokenizer, prefill_chunk
        self._first = [] if system is None else [{"role": "system", "content": system}]
        self.reset()

    def reset(self) -> None:
        """Forget all but the system message."""
        self._messages = [*self._first]
        self._text: list[int] = []  # without a template: all ids so far
        self._cached: list[int] = []  # the ids whose keys and values are in the cache
        self._cache: Any = None
        self._sampling.begin()

    def answer(
        self,
        question: str,
        *,
        write: Callable[[str], object] | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> Generation:
        """Let the model answer.

        Parameters
        ----------
        question : str
            What the user says. Without a chat template, empty lets the model go on.
        write : function, optional
            Called with each piece of the answer as soon as its words are whole.
        stop : function, optional
            Asked before each pass of the model: True ends the answer, and what there is of it counts as said.

        Returns
        -------
        Generation
            `prompt_tokens` counts the whole conversation. As many new tokens as the model has positions for, if that is
            less than `sampling.max_new_tokens`.

        Raises
        ------
        SettingError
            As `encode_prompt`, or the conversation fills the model's positions. The question then counts as not asked.
        NotFiniteError
            The model puts out NaN.
        """
        ids = self._ids(question)
        positions = positions_of(self._model)
        room = self._sampling.max_new_tokens if positions is None else positions - len(ids)
        if room < 1:
            raise SettingError(
                f"the conversation has {len(ids)} tokens, the model {positions} positions. Begin a new one (/reset)."
            )
        sampling = replace(self._sampling, max_new_tokens=min(room, self._sampling.max_new_tokens))
        cache = self._cache_for(ids)
        try:
            [made] = go_on(
                self._model,
                self._tokenizer,
                [ids],
                sampling,
                prefill_chunk=self._prefill_chunk,
                fresh_line=self.templated,
                write=lambda _, text: write(text) if write is not None and text else None,
                cache=cache,
                stop=stop,
            )
        except BaseException:  # an interrupt too: some layers of the cache may hold a token that others lack
            self._cache, self._cached = None, []
            raise
        said = [*ids, *made.token_ids]
        self._cached = said[: cache.get_seq_length()]
        if self.templated and made.token_ids:
            self._messages += [
                {"role": "user", "content": question},
                {"role": "assistant", "content": made.text},
            ]
        elif not self.templated:  # the token that ended the text would keep it from going on
            self._text = said[:-1] if made.finish_reason == "eos" else said
        return made

    def _ids(self, question: str) -> list[int]:
        """Return the ids of all that was said, the question among it."""
        if self.templated:
            return chat_ids(self._model, self._tokenizer, [*self._messages, {"role": "user", "content": question}])
        if not self._text:
            return encode_prompt(self._model, self._tokenizer, question)
        if not question:
            return self._text
        more = self._tokenizer("\n" + question, add_special_tokens=False, verbose=False)["input_ids"]
        return [*self._text, *more]

    def _cache_for(self, ids: list[int]) -> Any:
        """Keep the keys and values of what the ids begin with, less the last one: the model must see some token."""
        from transformers import DynamicCache

        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self._cached, ids[:-1], strict=False)))
        if self._cache is not None and same < len(self._cached):
            try:
                self._cache.crop(same - len(self._cached))
            except (RuntimeError, ValueError):  # a sliding window has let go of what would be needed
                self._cache = None
        if self._cache is None or not same:
            self._cache = DynamicCache(config=self._model.config)
        return self._cache
