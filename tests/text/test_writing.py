"""Texts that are written one pass at a time, and stop strings."""

from __future__ import annotations

import random

import pytest
from reciters import byte_tokenizer, chain, reciter
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from qmoe_lite.text.generation import Sampling, encode_prompt, generate
from qmoe_lite.text.writing import Stops, Writing

PROMPT = "expert router token row level digit"


def written(*texts: Writing) -> list[str]:
    """Let texts take turns, pass by pass; give them."""
    pieces = ["" for _ in texts]
    while not all(text.finish_reason for text in texts):
        for number, text in enumerate(texts):
            if not text.finish_reason:
                pieces[number] += text.step()
    return pieces


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "jamba", "minimax", "switch_transformers"])
def test_texts_that_take_turns_are_those_of_generate(causal, switch, tokenizer, model_type):
    """Caches of keys and values, of sliding windows, of states, and of an encoder."""
    auto = AutoModelForSeq2SeqLM if model_type.startswith("switch") else AutoModelForCausalLM
    model = auto.from_pretrained(switch if model_type.startswith("switch") else causal(model_type))
    model.generation_config.eos_token_id = len(tokenizer) - 1  # rare
    greedy, drawn = Sampling(6, repetition_penalty=1.3), Sampling(6, temperature=0.9, top_p=0.9, top_k=20, seed=3)
    ids = encode_prompt(model, tokenizer, PROMPT)
    texts = [Writing(model, tokenizer, ids, sampling, prefill_chunk=4) for sampling in (greedy, drawn, drawn)]
    pieces = written(*texts)
    for text, piece, sampling in zip(texts, pieces, (greedy, drawn, drawn), strict=True):
        alone = generate(model, tokenizer, PROMPT, sampling=sampling, prefill_chunk=4)
        assert (piece, tuple(text.token_ids)) == (alone.text, alone.token_ids)
        assert (text.finish_reason, text.prompt_tokens) == (alone.finish_reason, len(ids))


def test_each_pass_takes_a_part_of_the_prompt(causal, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(causal("qwen3_moe"))
    ids = encode_prompt(model, tokenizer, PROMPT)
    text = Writing(model, tokenizer, ids, Sampling(2), prefill_chunk=2)
    made = []
    while not text.finish_reason:
        text.step()
        made.append(len(text.token_ids))
    assert made == [0] * (len(ids) // 2 - 1) + [1, 2]


def test_a_text_ends_before_a_stop_string_inside_a_word():
    recited = " eprt中é😀owd"  # no byte twice, so that each byte has one successor
    tokenizer = byte_tokenizer()
    model = reciter(chain(*tokenizer("x" + recited)["input_ids"], 256), len(tokenizer))
    model.generation_config.eos_token_id = 256
    ids = encode_prompt(model, tokenizer, "x")
    assert written(Writing(model, tokenizer, ids, Sampling(40))) == [recited]
    for stop in ("prt", "t中", "😀ow", "d"):
        text = Writing(model, tokenizer, ids, Sampling(40), stop=["nowhere", stop, "owdy"])
        assert written(text) == [recited[: recited.index(stop)]]
        assert text.finish_reason == "stop"
        assert tokenizer.decode(text.token_ids).endswith(stop)  # the model was stopped there
    text = Writing(model, tokenizer, ids, Sampling(40), stop=["wdy"])  # which begins at the end
    assert (written(text), text.finish_reason) == ([recited], "eos")


def test_stop_strings_are_found_across_all_borders():
    draws = random.Random(0)
    for _ in range(500):
        text = "".join(draws.choices("ab", k=draws.randint(0, 12)))
        strings = ["".join(draws.choices("ab", k=draws.randint(1, 4))) for _ in range(draws.randint(0, 3))]
        stops, shown, left = Stops(strings), "", text
        while left and not stops.found:
            size = draws.randint(1, 3)
            shown, left = shown + stops.put(left[:size]), left[size:]
        ends = [(text.index(each) + len(each), text.index(each)) for each in strings if each in text]
        assert stops.found == bool(ends)
        assert shown + stops.rest() == text[: min(ends)[1] if ends else None]
