"""`qmoe chat`."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Annotated

import typer

from qmoe_lite.cli._options import (
    Draws,
    Dtype,
    DtypeOption,
    MaxNewTokensOption,
    ModelArgument,
    Placement,
    PrefillChunkOption,
    StatsOption,
    TraceOption,
    grouped,
)

if TYPE_CHECKING:
    from qmoe_lite.text.conversation import Conversation

ASK = "> "


@grouped
def chat(
    model: ModelArgument,
    *,
    system: Annotated[str | None, typer.Option(help="System message before the conversation.")] = None,
    max_new_tokens: MaxNewTokensOption = 512,
    draws: Draws,
    prefill_chunk: PrefillChunkOption = 1024,
    dtype: DtypeOption = Dtype.float32,
    placement: Placement,
    stats: StatsOption = False,
    trace: TraceOption = None,
) -> None:
    """Chat with a causal model, line by line.

    Each line goes through the model's chat template; a model without one continues the text so far. /reset
    starts a new conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer.

    Example: qmoe chat qwen3-qmoe --temperature 0.7 --top-p 0.8
    """
    from qmoe_lite.cli import _output

    try:
        from qmoe_lite.cli._models import open_model, watched
        from qmoe_lite.text.conversation import Conversation

        sampling = draws.sampling(max_new_tokens)
        _output.quiet_transformers()
        loaded, tokenizer = open_model(model, dtype, placement)
        conversation = Conversation(loaded, tokenizer, system=system, sampling=sampling, prefill_chunk=prefill_chunk)
    except KeyboardInterrupt:
        _output.note("qmoe: interrupted.")
        raise typer.Exit(130) from None
    if not conversation.templated:
        _output.note("qmoe: this model has no chat template; it continues the text so far, also after an empty line.")
    if sys.stdin.isatty():
        _edit_lines()
        _output.note("qmoe: /reset starts over, /exit or Ctrl-D leaves, Ctrl-C stops an answer.")
    with watched(loaded, stats, trace):
        for question in _questions():
            if question == "/reset":
                conversation.reset()
            elif question.strip() or not conversation.templated:
                _answer(conversation, question, stats)


def _edit_lines() -> None:
    """Turn on arrow keys and a history for `input`, where Python was built with them."""
    with suppress(ImportError):
        import readline  # noqa: F401


def _questions() -> Iterator[str]:
    """Read lines up to /exit or the end of the input."""
    from qmoe_lite.errors import TextError

    terminal = sys.stdin.isatty()
    while True:
        try:
            line = input(ASK if terminal else "")
            line.encode("utf-8")  # in some locales bytes that are not UTF-8 stand in it as lone surrogates
        except EOFError:
            if terminal:
                sys.stdout.write("\n")
            return
        except KeyboardInterrupt:
            if not terminal:
                raise typer.Exit(130) from None
            sys.stdout.write("\n")
            continue
        except UnicodeError as error:
            raise TextError("standard input is not UTF-8 text. Convert it, e.g. with iconv.") from error
        if line.strip() == "/exit":
            return
        yield line.strip() if line.strip() == "/reset" else line


def _answer(conversation: Conversation, question: str, stats: bool) -> None:
    from qmoe_lite.cli import _output
    from qmoe_lite.errors import SettingError

    last = "\n"

    def write(text: str) -> None:
        nonlocal last
        sys.stdout.write(text)
        sys.stdout.flush()
        last = text[-1]

    try:
        with _interrupts() as interrupted:
            made = conversation.answer(question, write=write, stop=interrupted)
    except (
        SettingError
    ) as error:  # the conversation is too long, or the template refuses: it continues without this question
        _output.note(f"qmoe: {error}")
        return
    finally:
        if last != "\n":
            write("\n")
    if not made.text:  # a line for each answer
        write("\n")
    if made.finish_reason == "length":
        _output.note("qmoe: cut; --max-new-tokens, or the model's context, allows no more.")
    elif made.finish_reason == "stopped":
        _output.note("qmoe: stopped.")
    if stats:
        _output.note(
            f"qmoe: {len(made.token_ids)} tokens in {made.seconds:.2f} s, {made.tokens_per_second:.1f} tokens/s, "
            f"the first after {made.first_token_seconds:.2f} s; {made.prompt_tokens} tokens before"
        )


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Note Ctrl-C only, so that the model ends the pass it is in; a second one leaves."""
    seen: list[int] = []

    def note(number: int, frame: object) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(seen)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    finally:
        signal.signal(signal.SIGINT, before)
