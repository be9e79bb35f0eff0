"""What a tokenizer puts around a text: the tokens that begin and end it, and a conversation's template."""

from __future__ import annotations

from typing import Any, NamedTuple

from qmoe_lite.compression.documents import Conversation
from qmoe_lite.errors import TextError, first_line

_PROBE = "text"


class Marks(NamedTuple):
    """Ids around a document, as a causal model saw them in training.

    Attributes
    ----------
    begin : list of int
        What the tokenizer puts before a text: its BOS, or nothing.
    end : list of int
        What it puts after one; where that is nothing, its EOS, which parts documents in training all the same.
    """

    begin: list[int]
    end: list[int]


def marks_of(tokenizer: Any) -> Marks:
    """Return what a tokenizer puts around a document."""
    bare: list[int] = list(tokenizer(_PROBE, add_special_tokens=False, verbose=False)["input_ids"])
    whole: list[int] = list(tokenizer(_PROBE, verbose=False)["input_ids"])
    places = range(len(whole) - len(bare) + 1)
    start = next((i for i in places if whole[i : i + len(bare)] == bare), 0)
    end = whole[start + len(bare) :]
    if not end and tokenizer.eos_token_id is not None:
        end = [tokenizer.eos_token_id]
    return Marks(whole[:start], end)


def conversation_ids(conversation: Conversation, tokenizer: Any) -> list[int]:
    """Put a conversation through the tokenizer's chat template, which brings its own marks.

    Raises
    ------
    TextError
        There is no template, or it refuses the messages.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise TextError(
            f"{conversation.place} holds messages, and the tokenizer has no chat template. Give records with a "
            '"text" field, or compress the chat version of the model.'
        )
    try:
        return list(tokenizer.apply_chat_template(conversation.messages, return_dict=False))
    except Exception as error:  # jinja2's own, and whatever a template raises
        problem = f"{conversation.place}: the chat template refuses the messages: {first_line(error)}"
        raise TextError(f"{problem}. Leave the record out, or mend it.") from error


def special_ids(tokenizer: Any) -> list[int]:
    """Return the ids that no text is written with; that of unknown words is none of them."""
    marks = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    return sorted(set(tokenizer.all_special_ids) - ({tokenizer.unk_token_id} - marks))
