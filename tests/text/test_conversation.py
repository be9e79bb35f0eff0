"""Conversations: what the model sees in each turn, and which keys and values it keeps."""

from __future__ import annotations

import itertools

import pytest
import tiny
import torch
from reciters import byte_tokenizer, make_random, reciter
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qmoe_lite.errors import NotFiniteError, SettingError
from qmoe_lite.text.conversation import Conversation
from qmoe_lite.text.generation import Sampling, chat_ids, go_on

# words of tiny.WORDS stand for the roles
TEMPLATE = (
    "{% for m in messages %}{{ {'system': 'book', 'user': 'gate', 'assistant': 'level'}[m.role] }} {{ m.content }} "
    "{% endfor %}level"
)
FORGETFUL = TEMPLATE.replace("{{ m.content }}", "{{ m.content if m.role != 'assistant' else '' }}")
QUESTIONS = ["router expert token", "code", "weight row digit block"]
SIX = Sampling(6)


@pytest.fixture
def words():
    """A tokenizer without special tokens: what a model says comes back as the same ids."""
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["a", *tiny.WORDS])}))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core)


@pytest.fixture(params=["mixtral", "qwen3_moe"])
def model(request, words):
    return make_random(request.param, words, max_position_embeddings=128)


@pytest.fixture
def widths(model):
    """Numbers of tokens that the model was given, pass by pass."""
    found: list[int] = []
    model.model.register_forward_pre_hook(
        lambda _, __, given: found.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    return found


def without_cache(model, tokenizer, questions, system=None):
    """The answers, each from scratch."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    answers = []
    for question in questions:
        messages.append({"role": "user", "content": question})
        [made] = go_on(model, tokenizer, [chat_ids(model, tokenizer, messages)], SIX, fresh_line=True)
        answers.append(made.token_ids)
        messages.append({"role": "assistant", "content": made.text})
    return answers


@pytest.mark.parametrize("template", [TEMPLATE, FORGETFUL], ids=["all", "forgetful"])
@pytest.mark.parametrize("window", [None, 8])
def test_answers_are_those_of_a_model_that_keeps_nothing(words, template, window):
    model = make_random("mixtral", words, max_position_embeddings=128, sliding_window=window)
    words.chat_template = template
    conversation = Conversation(model, words, system="layer", sampling=SIX, prefill_chunk=5)
    answers = [conversation.answer(question).token_ids for question in QUESTIONS]
    assert answers == without_cache(model, words, QUESTIONS, system="layer")
    assert len(set(answers)) == 3


def test_the_model_sees_only_what_is_new(model, words, widths):
    words.chat_template = TEMPLATE
    conversation = Conversation(model, words, sampling=SIX)
    first = conversation.answer(QUESTIONS[0])
    assert (first.prompt_tokens, len(first.token_ids), widths) == (5, 6, [5, 1, 1, 1, 1, 1])
    widths.clear()
    second = conversation.answer(QUESTIONS[1])
    assert second.prompt_tokens == 5 + 6 + 3
    assert widths == [1 + 3, 1, 1, 1, 1, 1]  # the last token of an answer has not been through the model


def test_an_answer_that_the_template_drops_is_dropped_from_the_cache(model, words, widths):
    words.chat_template = FORGETFUL
    conversation = Conversation(model, words, sampling=SIX)
    said = conversation.answer(QUESTIONS[0]).text
    widths.clear()
    assert conversation.answer(QUESTIONS[1]).prompt_tokens == 5 + 3
    assert widths[0] == 3 - said.startswith("gate")  # the word of the template that stands there now


def test_without_a_template_the_model_goes_on_from_all_text(model, words, widths):
    conversation = Conversation(model, words, sampling=SIX)
    first = conversation.answer(QUESTIONS[0])
    second = conversation.answer("")
    third = conversation.answer(QUESTIONS[1])
    assert widths == [3, 1, 1, 1, 1, 1] + [1] * 6 + [2, 1, 1, 1, 1, 1]
    ids = words(QUESTIONS[0])["input_ids"]
    [whole] = go_on(model, words, [ids], Sampling(12))
    assert whole.token_ids == (*first.token_ids, *second.token_ids)
    ids += [*whole.token_ids, *words(QUESTIONS[1])["input_ids"]]
    assert third.token_ids == go_on(model, words, [ids], SIX)[0].token_ids


def test_without_a_template_each_question_begins_a_line_and_an_end_is_no_end():
    tokenizer = byte_tokenizer()
    x, y, newline = tokenizer("xy\n")["input_ids"]
    model = reciter({x: y, y: 256, newline: y}, len(tokenizer))
    seen = []
    model.model.register_forward_pre_hook(
        lambda _, __, given: seen.extend(given["input_ids"][0].tolist()), with_kwargs=True
    )
    conversation = Conversation(model, tokenizer, sampling=SIX)
    assert [conversation.answer("x").text, conversation.answer("x").text] == ["y", "y"]
    assert tokenizer.decode(seen) == "xy\nxy"


def test_what_was_said_before_a_stop_counts(model, words):
    words.chat_template = TEMPLATE
    asked = itertools.count()
    conversation = Conversation(model, words, sampling=SIX)
    made = conversation.answer(QUESTIONS[0], stop=lambda: next(asked) == 3)
    assert (len(made.token_ids), made.finish_reason) == (3, "stopped")
    said = [
        {"role": "user", "content": QUESTIONS[0]},
        {"role": "assistant", "content": made.text},
        {"role": "user", "content": QUESTIONS[1]},
    ]
    wanted = go_on(model, words, [chat_ids(model, words, said)], SIX, fresh_line=True)[0]
    assert conversation.answer(QUESTIONS[1]).token_ids == wanted.token_ids


def test_a_question_that_was_stopped_before_its_answer_was_not_asked(model, words):
    words.chat_template = TEMPLATE
    conversation = Conversation(model, words, sampling=SIX, prefill_chunk=2)
    wanted = conversation.answer(QUESTIONS[1])
    conversation.reset()
    asked = itertools.count()
    made = conversation.answer(QUESTIONS[0], stop=lambda: next(asked) == 1)  # in the middle of the question
    assert (made.token_ids, made.text, made.finish_reason) == ((), "", "stopped")
    assert conversation.answer(QUESTIONS[1]).token_ids == wanted.token_ids


def test_an_exception_between_two_layers_leaves_no_half_a_cache(model, words):
    words.chat_template = TEMPLATE
    conversation = Conversation(model, words, sampling=SIX)
    conversation.answer(QUESTIONS[0])
    calls = itertools.count()

    def interrupt(*_):
        if next(calls) == 2:
            raise KeyboardInterrupt

    hook = model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        conversation.answer("layer")
    hook.remove()
    assert conversation.answer(QUESTIONS[1]).token_ids == without_cache(model, words, QUESTIONS[:2])[1]


def test_reset_begins_anew_with_the_same_draws(model, words):
    words.chat_template = TEMPLATE
    conversation = Conversation(model, words, sampling=Sampling(12, temperature=1.5, seed=4))
    first = [conversation.answer(question).token_ids for question in QUESTIONS]
    assert conversation.answer(QUESTIONS[0]).token_ids != first[0]
    conversation.reset()
    assert [conversation.answer(question).token_ids for question in QUESTIONS] == first


def test_an_answer_ends_where_the_positions_do_and_the_next_question_is_refused(words):
    model = make_random("mixtral", words, max_position_embeddings=12)
    words.chat_template = TEMPLATE
    conversation = Conversation(model, words, sampling=SIX)
    made = conversation.answer("router " * 5)
    assert (made.prompt_tokens, len(made.token_ids), made.finish_reason) == (7, 5, "length")
    with pytest.raises(SettingError, match=r"has 15 tokens, the model 12 positions\. Begin a new one"):
        conversation.answer("code")
    conversation.reset()
    assert conversation.answer("router " * 5).token_ids == made.token_ids


def test_what_cannot_converse_is_refused(switch, model, words):
    from qmoe_lite.cli._models import open_model

    with pytest.raises(SettingError, match="an encoder-decoder model holds no conversation"):
        Conversation(*open_model(str(switch)))
    with pytest.raises(SettingError, match="no chat template, so there is no system message"):
        Conversation(model, words, system="layer")
    with pytest.raises(SettingError, match="max_new_tokens is 0"):
        Conversation(model, words, sampling=Sampling(0))
    model.lm_head.weight.data[0, 0] = torch.nan
    with pytest.raises(NotFiniteError):
        Conversation(model, words).answer("router")
