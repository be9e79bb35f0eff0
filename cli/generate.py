"""`qmoe generate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    from qmoe_lite.text.generation import Generation

HEADING = 76  # columns that a prompt gets above its text


@grouped
def generate(
    model: ModelArgument,
    *,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="Prompt; - reads standard input. Several form one batch.", show_default=False),
    ] = None,
    prompt_file: Annotated[
        list[str] | None,
        typer.Option(
            help="UTF-8 file with a prompt, without its last newline; - reads standard input. Several form one batch.",
            show_default=False,
        ),
    ] = None,
    max_new_tokens: MaxNewTokensOption = 128,
    draws: Draws,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Apply the model's chat template to the prompt. [default: no, with a note if there is one]",
            show_default=False,
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message before the prompt; needs --chat.")] = None,
    prefill_chunk: PrefillChunkOption = 1024,
    dtype: DtypeOption = Dtype.float32,
    placement: Placement,
    stats: StatsOption = False,
    trace: TraceOption = None,
    json: Annotated[
        bool,
        typer.Option(
            "--json", help="Print one JSON document at the end instead of streaming; an array for several prompts."
        ),
    ] = False,
) -> None:
    """Generate text from a prompt; the text is streamed.

    Without --prompt and --prompt-file the prompt is read from a pipe. The model's generation_config.json decides only
    which tokens end the text.

    Example: qmoe generate switch-qmoe --prompt "The list <extra_id_0> sorted."
    """
    if prompt and prompt_file:
        raise typer.BadParameter("give either --prompt or --prompt-file")
    if not prompt and not prompt_file:
        if sys.stdin.isatty():
            raise typer.BadParameter("give --prompt or --prompt-file, or pipe the prompt in")
        prompt = ["-"]
    if system is not None and not chat:
        raise typer.BadParameter("--system needs --chat")
    from qmoe_lite.cli import _output

    try:
        texts = [_read_prompt(text) for text in prompt or []] + [_read_file(name) for name in prompt_file or []]
        from qmoe_lite.cli._models import open_model, watched
        from qmoe_lite.text.generation import generate_batch

        sampling = draws.sampling(max_new_tokens)
        _output.quiet_transformers()
        loaded, tokenizer = open_model(model, dtype, placement)
        if chat is None and getattr(tokenizer, "chat_template", None):
            _output.note("qmoe: this model has a chat template. --chat applies it, --no-chat silences this line.")
        options: dict[str, Any] = {"chat": bool(chat), "system": system}
        options |= {"sampling": sampling, "prefill_chunk": prefill_chunk}
        with watched(loaded, stats, trace), _Shown(texts) as shown:
            write = None if json else shown.write
            made = generate_batch(loaded, tokenizer, texts, write=write, **options)
    except KeyboardInterrupt:
        _output.note("qmoe: interrupted.")
        raise typer.Exit(130) from None
    if json:
        documents = [_document(text, one) for text, one in zip(texts, made, strict=True)]
        _output.print_json(documents if len(documents) > 1 else documents[0])
    else:
        _note_cuts(made)
    if stats:
        tokens, seconds = sum(len(one.token_ids) for one in made), max(one.seconds for one in made)
        first = min(one.first_token_seconds for one in made)
        _output.note(
            f"qmoe: {tokens} tokens in {seconds:.2f} s, {tokens / max(seconds, 1e-9):.1f} tokens/s, "
            f"the first after {first:.2f} s"
        )


class _Shown:
    """Texts on standard output: the first one as it is made, the next ones as soon as those before them have ended."""

    def __init__(self, prompts: list[str]) -> None:
        self._prompts = prompts
        self._waiting = ["" for _ in prompts]
        self._ended: set[int] = set()
        self._now = 0
        self._begun = False
        self._last = ""

    def write(self, number: int, text: str) -> None:
        """Take the next piece of a prompt's text; an empty one ends it."""
        self._waiting[number] += text
        if not text:
            self._ended.add(number)
        while self._now < len(self._prompts):
            self._print_waiting()
            if self._now not in self._ended:
                break
            self._end_line(always=True)
            self._now += 1
            self._begun = False

    def __enter__(self) -> _Shown:
        return self

    def __exit__(self, *_: object) -> None:
        """Show what there is of texts that have not ended, as after Ctrl-C, and end the line."""
        while self._now < len(self._prompts):
            if self._waiting[self._now] or self._begun:
                self._print_waiting()
                self._end_line()
            self._now += 1
            self._begun = False

    def _print_waiting(self) -> None:
        if not self._begun:
            self._begun = True
            if len(self._prompts) > 1:
                line = (self._prompts[self._now].strip().splitlines() or [""])[0]
                heading = line if len(line) <= HEADING else f"{line[: HEADING - 3]}..."
                self._print(f"{chr(10) if self._now else ''}[{self._now + 1}] {heading}\n")
                self._last = ""
        self._print(self._waiting[self._now])
        self._waiting[self._now] = ""

    def _end_line(self, always: bool = False) -> None:
        if self._last != "\n" and (self._last or always):
            self._print("\n")
        self._last = ""

    def _print(self, text: str) -> None:
        if text:
            sys.stdout.write(text)
            sys.stdout.flush()
            self._last = text[-1]


def _read_prompt(prompt: str) -> str:
    from qmoe_lite.errors import TextError

    if prompt == "-":
        return _read_file("-")
    try:
        prompt.encode("utf-8")  # bytes of an argument that are not UTF-8 stand in it as lone surrogates
    except UnicodeError as error:
        raise TextError("the prompt is not UTF-8 text. Convert it, e.g. with iconv.") from error
    return prompt


def _read_file(name: str) -> str:
    from qmoe_lite.errors import TextError

    place = "standard input" if name == "-" else name
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        return data.decode("utf-8-sig").removesuffix("\n").removesuffix("\r")
    except UnicodeError as error:
        raise TextError(f"{place} is not UTF-8 text. Convert it, e.g. with iconv.") from error
    except OSError as error:
        raise TextError(f"{place} cannot be read: {error.strerror}. Name a text file.") from error


def _note_cuts(made: list[Generation]) -> None:
    from qmoe_lite.cli import _output

    cut = [str(number) for number, one in enumerate(made, 1) if one.finish_reason == "length"]
    if cut:
        which = f" ({', '.join(cut)} of {len(made)})" if len(made) > 1 else ""
        _output.note(f"qmoe: cut by --max-new-tokens{which}.")


def _document(prompt: str, made: Generation) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "text": made.text,
        "tokens": len(made.token_ids),
        "prompt_tokens": made.prompt_tokens,
        "finish_reason": made.finish_reason,
        "seconds": made.seconds,
        "first_token_seconds": made.first_token_seconds,
        "tokens_per_second": made.tokens_per_second,
    }
