"""A text that a model writes one pass at a time, so that several texts can take turns on one model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from qmoe_lite.text.generation import PREFILL_CHUNK, Sampling, cache_argument, settings_for
from qmoe_lite.text.guards import alone, only, refuse_nan
from qmoe_lite.text.streams import Stream


class Writing:
    """One text under way, with keys, values and draws of its own: what else the model writes meanwhile changes nothing.

    Parameters
    ----------
    model, tokenizer : transformers model and tokenizer
        Causal or encoder-decoder. The model is put in evaluation mode.
    ids : list of int
        The prompt, as `encode_prompt` and `chat_ids` make it; with the new tokens it fits the model's positions.
    sampling : Sampling
        Greedily and drawn, the tokens are those of `generate`; torch's global seed stays as it is.
    stop : sequence of str
        The text ends before the first of them.
    prefill_chunk : int
        Tokens of the prompt in a pass; an encoder takes all.
    fresh_line : bool
        The text begins a line of its own, as a chat's answer does.

    Attributes
    ----------
    token_ids : list of int
        The tokens so far.
    prompt_tokens : int
    finish_reason : str
        Empty while the text is under way, then "eos" (the model ended it), "stop" (a stop string), or "length".
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        ids: list[int],
        sampling: Sampling,
        *,
        stop: Sequence[str] = (),
        prefill_chunk: int = PREFILL_CHUNK,
        fresh_line: bool = False,
    ) -> None:
        sampling.check()
        self.prompt_tokens = len(ids)
        self.finish_reason = ""
        self._model, self._ids, self._sampling, self._prefill_chunk = model, ids, sampling, prefill_chunk
        self._settings, ends, hidden = settings_for(model, tokenizer, sampling)
        self._whole: list[str] = []  # words that are complete and were not looked through for stop strings yet
        alone_on_line = bool(model.config.is_encoder_decoder) or fresh_line
        self._stream = Stream(tokenizer, hidden, ends, lambda _, text: self._whole.append(text), 0, alone=alone_on_line)
        self.token_ids = self._stream.made
        self._stops = Stops(stop)
        self._passes: Iterator[int | None] | None = None

    def step(self) -> str:
        """Run the model once; return the text that is certain since then, in whole words.

        Raises
        ------
        NotFiniteError
            The model puts out NaN.
        """
        with alone(self._model), torch.inference_mode():
            if self._passes is None:
                self._model.eval()
                self._passes = self._begin()
            token = next(self._passes)
        if token is None:
            return ""
        self._stream.put(token)
        reason = self._stream.ended
        if not reason and len(self.token_ids) == self._sampling.max_new_tokens:
            self._stream.end()
            reason = "length"
        text = self._stops.put("".join(self._whole))
        self._whole.clear()
        if not reason and not self._stops.found and self._stops.would_end(self._stream.unseen()):
            text += self._stops.put(self._stream.unseen())
        if self._stops.found:
            reason = "stop"
        elif reason:
            text += self._stops.rest()
        self.finish_reason = reason
        if reason:
            self._passes = None  # with its keys and values
        return text

    def _begin(self) -> Iterator[int | None]:
        """Let transformers prepare all that `generate` does, and take the passes from it."""
        tokens = torch.tensor([self._ids], device=self._model.device)
        with only(self._model, self._settings):
            passes: Iterator[int | None] = self._model.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                generation_config=self._settings,
                logits_processor=[refuse_nan],
                custom_generate=self._decode,
            )
        return passes

    def _decode(
        self,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **inputs: Any,
    ) -> Iterator[int | None]:
        """Yield a token for each pass, and None for one over a part of the prompt that is not the last."""
        seq2seq = bool(model.config.is_encoder_decoder)
        draws = torch.Generator(input_ids.device).manual_seed(self._sampling.seed)
        whole = seq2seq or inputs.get(cache_argument(model)) is None
        parts = (input_ids,) if whole else torch.split(input_ids, self._prefill_chunk, dim=-1)
        end = 0
        for part in parts:
            begin, end = end, end + part.shape[-1]
            here = dict(inputs)
            if len(parts) > 1 and inputs.get("position_ids") is not None:
                here["position_ids"] = inputs["position_ids"][..., begin:end]
            outputs = model(
                **model.prepare_inputs_for_generation(part, is_first_iteration=True, **here), return_dict=True
            )
            if end < input_ids.shape[-1]:
                yield None
        while True:
            inputs = model._update_model_kwargs_for_generation(outputs, inputs, is_encoder_decoder=seq2seq)
            scores = logits_processor(input_ids, outputs.logits[:, -1].to(input_ids.device, torch.float32, copy=True))
            del outputs
            if self._sampling.temperature > 0:
                chosen = torch.multinomial(torch.softmax(scores, dim=-1), 1, generator=draws)
            else:
                chosen = scores.argmax(dim=-1, keepdim=True)
            input_ids = torch.cat([input_ids, chosen], dim=-1)
            yield int(chosen)
            new = 1 if inputs["use_cache"] else None
            given = model.prepare_inputs_for_generation(input_ids, next_sequence_length=new, **inputs)
            outputs = model(**given, return_dict=True)


class Stops:
    """Strings before the first of which a text ends, wherever the borders of its pieces lie.

    Attributes
    ----------
    found : bool
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self.found = False
        self._strings = strings
        self._held = ""  # the end of the text, where one of them may have begun

    def put(self, piece: str) -> str:
        """Take the next piece; return the text that stands before all stop strings, whatever comes."""
        text = self._held + piece
        # the one that is complete first, wherever the pieces' borders lie
        ends = [(at + len(string), at) for string in self._strings if (at := text.find(string)) >= 0]
        if ends:
            self.found, self._held = True, ""
            return text[: min(ends)[1]]
        longest = max(map(len, self._strings), default=1) - 1
        held = next(
            (n for n in range(min(longest, len(text)), 0, -1) if any(s.startswith(text[-n:]) for s in self._strings)), 0
        )
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def would_end(self, piece: str) -> bool:
        """Report whether a stop string would be in the text with this piece."""
        return any(string in self._held + piece for string in self._strings)

    def rest(self) -> str:
        """Return what was held back; no text comes after it."""
        held, self._held = self._held, ""
        return held
