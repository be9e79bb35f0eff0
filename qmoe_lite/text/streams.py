"""The text of each row while a model writes it, passed on in whole words."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import torch

# up to the last space, or the last character of a script that has none (Thai, Burmese, Khmer, Chinese, Japanese)
_WHOLE_WORDS = re.compile(
    r".*[\s\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]", re.DOTALL
)


class Streams:
    """A streamer for transformers' `generate`: hands each row its tokens, and no longer once it has ended."""

    def __init__(self, streams: list[Stream]) -> None:
        self.streams = streams
        self._prompt_seen = False

    def put(self, tokens: torch.Tensor) -> None:
        """Take the prompt, then one token for each row."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        for stream, token in zip(self.streams, tokens.flatten().tolist(), strict=True):
            if not stream.ended:
                stream.put(token)

    def end(self) -> None:
        """Show what is left of the rows that the model has not ended."""
        for stream in self.streams:
            if not stream.ended:
                stream.end()


class Stream:
    """Keeps one row's tokens, and passes their text on in whole words.

    Unlike transformers' own streamer it keeps an ordinary token before those that it decodes: many decoders drop a
    space that stands first, which would eat the one after the prompt and the indentation of each line.
    """

    def __init__(
        self,
        tokenizer: Any,
        hidden: set[int],
        ends: set[int],
        write: Callable[[int, str], object] | None,
        number: int,
        alone: bool,
    ) -> None:
        self.made: list[int] = []
        self.pieces: list[str] = []
        self.ended = ""
        self.first_at = self.last_at = time.perf_counter()
        self._tokenizer, self._hidden, self._ends = tokenizer, hidden, ends
        self._write, self._number = write, number
        self._before: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
        self._line: list[int] = [] if alone else [*self._before]
        self._shown = len(self._decode())

    def _decode(self) -> str:
        return self._tokenizer.decode(self._line, clean_up_tokenization_spaces=False)  # type: ignore[no-any-return]

    def put(self, token: int) -> None:
        self.last_at = time.perf_counter()
        if not self.made:
            self.first_at = self.last_at
        self.made.append(token)
        if token not in self._hidden:
            self._line.append(token)
        text = self._decode()
        whole = _WHOLE_WORDS.match(text)
        self._show(text, whole.end() if whole else 0)
        if text.endswith("\n"):
            self._line = [*self._before]
            self._shown = len(self._decode())
        if token in self._ends:
            self.ended = "eos"
            self.end()

    def end(self) -> None:
        text = self._decode()
        self._show(text, len(text))
        if self._write is not None:
            self._write(self._number, "")

    def unseen(self) -> str:
        """Return the beginning of a word that was not passed on yet."""
        return self._decode()[self._shown :]

    def _show(self, text: str, end: int) -> None:
        if end > self._shown:
            self.pieces.append(text[self._shown : end])
            self._shown = end
            if self._write is not None:
                self._write(self._number, self.pieces[-1])
