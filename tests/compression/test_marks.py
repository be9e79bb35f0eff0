"""What stands around documents: the tokenizer's own marks, a window's beginning, chat templates."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny
from tokenizers.processors import TemplateProcessing

from qmoe_lite.compression import calibration as cal
from qmoe_lite.compression.documents import Continued, Conversation, read_text
from qmoe_lite.compression.marks import marks_of, special_ids
from qmoe_lite.compression.run_samples import RunSamples
from qmoe_lite.compression.settings import Settings
from qmoe_lite.errors import TextError
from qmoe_lite.text.evaluation import _draw

TEMPLATE = "{{ '<s>' }}{% for m in messages %}{{ ' ' + m.role + ' ' + m.content + ' </s>' }}{% endfor %}"


def make_tokenizer(template: str | None = "<s> $A"):
    """As Llama's: <s> before each text; the words of roles are known too."""
    tokenizer = tiny.make_tokenizer()
    tokenizer.add_tokens(["user", "assistant"])
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    if template:
        marks = [(each, tokenizer.convert_tokens_to_ids(each)) for each in ("<s>", "</s>")]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=marks)
    return tokenizer


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer.convert_tokens_to_ids(text.split())


@pytest.mark.parametrize(
    ("template", "begin", "end"),
    [(None, "", "</s>"), ("<s> $A", "<s>", "</s>"), ("<s> $A </s>", "<s>", "</s>"), ("$A </s>", "", "</s>")],
)
def test_the_marks_are_those_that_the_tokenizer_adds(template, begin, end):
    tokenizer = make_tokenizer(template)
    assert marks_of(tokenizer) == (ids(tokenizer, begin), ids(tokenizer, end))


def test_a_tokenizer_without_any_mark_has_none():
    tokenizer = make_tokenizer(None)
    tokenizer.eos_token = None
    assert marks_of(tokenizer) == ([], [])


def test_documents_are_parted_by_marks_and_their_pieces_are_not():
    tokenizer = make_tokenizer()
    documents = ["expert router", Continued(" token"), "row", "level digit"]
    packed = cal.read_tokens(documents, tokenizer).tolist()
    assert packed == ids(tokenizer, "<s> expert router token </s> <s> row </s> <s> level digit")
    without = make_tokenizer(None)
    assert cal.read_tokens(documents, without).tolist() == ids(without, "expert router token </s> row </s> level digit")
    plain = ids(tokenizer, "expert router token row level digit")
    assert cal.read_tokens(documents, tokenizer, seq2seq=True).tolist() == plain, "T5 puts nothing between documents"


def test_a_window_begins_as_a_text_does_and_is_as_long_as_ever():
    tokens = np.arange(100) % 10 + 3
    tokenizer, plain = make_tokenizer(), make_tokenizer(None)
    settings = {"seq2seq": False, "count": None, "sequence_length": 32, "seed": 0}
    drawn = cal.make_samples(tokens, tokenizer, **settings).input_ids
    assert drawn[:, 0].tolist() == [tokenizer.bos_token_id] * 3
    assert np.array_equal(drawn[:, 1:], cal.make_samples(tokens, plain, **settings).input_ids[:, 1:])
    assert tokens[0] == 3, "the text itself stays as it was"


def test_special_tokens_enter_no_hessian_of_a_causal_model():
    tokenizer = make_tokenizer()
    words = ids(tokenizer, "<s> expert <unk> </s> <pad> <extra_id_0> router")
    mask, none = cal.hessian_masks(cal.Samples(np.asarray([words]), None, 1), tokenizer)
    assert mask.tolist() == [[False, True, True, False, False, False, True]]
    assert none is None
    tokenizer.unk_token = "</s>"  # GPT-2's one token for everything
    assert tokenizer.eos_token_id in special_ids(tokenizer)


def test_compression_and_evaluation_draw_such_windows(tmp_path):
    from transformers import AutoConfig

    path, tokenizer = tmp_path / "a.jsonl", make_tokenizer()
    records = [{"text": tiny.make_text(seed=seed, words=40)} for seed in range(60)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    settings = Settings(sequence_length=32, validation_samples=2)
    samples, _ = RunSamples.make(path, tokenizer, 40, False, settings)
    eligible, validation, reference = samples.flags(cal.hessian_masks(samples.all, tokenizer)[0])
    special = np.isin(samples.all.input_ids, [tokenizer.bos_token_id, tokenizer.eos_token_id])
    assert special[:, 0].all()
    assert special[:, 1:].any()
    used = eligible.numpy().reshape(special.shape)[: samples.calibration]
    assert np.array_equal(used, ~special[: samples.calibration])
    rides = slice(samples.calibration, samples.reference)
    assert np.array_equal(validation.numpy().reshape(special.shape)[rides], ~special[rides])
    assert int(validation.sum()) == int((~special[rides]).sum())
    assert reference.numpy().reshape(special.shape)[samples.reference :].all(), "each goes through the dense experts"
    model = type("Model", (), {"config": AutoConfig.for_model("mixtral", vocab_size=len(tokenizer))})
    assert (_draw(model, tokenizer, path, None, 32, 1, 1).input_ids[:, 0] == tokenizer.bos_token_id).all()


MESSAGES = [{"role": "user", "content": "expert router"}, {"role": "assistant", "content": "row"}]
SHAREGPT = [{"from": "human", "value": "expert router"}, {"from": "gpt", "value": "row"}]


@pytest.mark.parametrize("record", [{"messages": MESSAGES}, {"conversations": SHAREGPT}, {"conversations": MESSAGES}])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_conversations_go_through_the_chat_template(tmp_path, record, name):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    (tmp_path / name).write_text(json.dumps({"text": "token"}) + "\n" + 2 * (json.dumps(record) + "\n"))
    said = "<s> user expert router </s> assistant row </s>"
    packed = cal.read_tokens(read_text(tmp_path / name), tokenizer)
    assert packed.tolist() == ids(tokenizer, f"<s> token </s> {said} {said}"), "a template brings its own marks"


def test_messages_without_a_template_are_refused_in_one_line(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": MESSAGES}) + "\n")
    with pytest.raises(TextError, match=r"a\.jsonl line 1 holds messages, and the tokenizer has no chat template"):
        cal.read_tokens(read_text(tmp_path / "a.jsonl"), make_tokenizer())


def test_messages_that_a_template_refuses_are_named():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system message') }}"
    with pytest.raises(TextError, match=r"^line 7: the chat template refuses the messages: no system message\. Leave"):
        cal.read_tokens([Conversation(MESSAGES, "line 7")], tokenizer)


@pytest.mark.parametrize(
    "record",
    [{"messages": []}, {"messages": "expert"}, {"messages": ["expert"]}, {"conversations": [{"value": "a"}]}, {"a": 1}],
)
def test_records_with_neither_text_nor_messages_are_named(tmp_path, record):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' + json.dumps(record) + "\n")
    with pytest.raises(TextError, match='line 2 is no JSON object with "text" or "messages"'):
        list(read_text(tmp_path / "a.jsonl"))


def test_halves_of_characters_in_a_message_are_replaced(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"messages": [{"role": "user", "content": "a \\ud83d"}, {"role": "tool"}]}\n')
    [conversation] = read_text(tmp_path / "a.jsonl")
    assert [message["content"] for message in conversation.messages] == ["a \ufffd", None]
