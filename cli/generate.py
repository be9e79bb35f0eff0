"""`qmoe generate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from qmoe_lite.generation import Generation

DTYPES = ("float32", "bfloat16")


def generate(
    model: Annotated[str, typer.Argument(help="Compressed directory, or a dense model's directory or name.")],
    prompt: Annotated[str | None, typer.Option(help="Text to go on from; - reads standard input.")] = None,
    prompt_file: Annotated[
        str | None,
        typer.Option(help="UTF-8 file with the prompt; - reads standard input. One last newline is dropped."),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(help="Where the text is cut, if the model does not end it.", min=1)
    ] = 128,
    temperature: Annotated[
        float, typer.Option(help="0 takes the likeliest token: the same text each time. Above 0 draws.", min=0)
    ] = 0.0,
    top_p: Annotated[
        float | None, typer.Option(help="Draw among the likeliest tokens of this probability. [default: all]", max=1)
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Draw among this many of the likeliest tokens. [default: all]", min=1)
    ] = None,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 lowers what stands there already.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Decides the draws.", min=0)] = 0,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Wrap the prompt by the model's chat template. [default: never; a line says so if there is one]",
            show_default=False,
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message before the prompt; needs --chat.")] = None,
    dtype: Annotated[str, typer.Option(help="Of everything but compressed experts: float32 or bfloat16.")] = "float32",
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document at the end, and no stream.")] = False,
) -> None:
    """Let a model go on from a prompt; the text appears as it is made.

    The model's generation_config.json decides only which tokens end the text. Speed goes to standard error.

    Example: qmoe generate switch-qmoe --prompt "The list <extra_id_0> sorted."
    """
    if (prompt is None) == (prompt_file is None):
        raise typer.BadParameter("give either --prompt or --prompt-file")
    if system is not None and not chat:
        raise typer.BadParameter("--system needs --chat")
    if dtype not in DTYPES:
        raise typer.BadParameter(f"--dtype is {dtype}; expected {' or '.join(DTYPES)}")
    from qmoe_lite.cli import _output

    shown = _Shown()
    try:
        text = _read_prompt(prompt, prompt_file)
        from qmoe_lite.cli._models import open_model
        from qmoe_lite.generation import Sampling
        from qmoe_lite.generation import generate as run

        sampling = Sampling(max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed)
        sampling.check()
        _output.quiet_transformers()
        loaded, tokenizer = open_model(model, dtype)
        if chat is None and getattr(tokenizer, "chat_template", None):
            _output.note("qmoe: this model has a chat template. --chat applies it, --no-chat silences this line.")
        write = None if json else shown.write
        made = run(loaded, tokenizer, text, chat=bool(chat), system=system, sampling=sampling, write=write)
    except KeyboardInterrupt:
        shown.end_line()
        _output.note("qmoe: interrupted.")
        raise typer.Exit(130) from None
    if json:
        _print_json(text, made)
        return
    shown.end_line(always=True)
    why = "ended by the model" if made.finish_reason == "eos" else "cut by --max-new-tokens"
    _output.note(
        f"qmoe: {len(made.token_ids)} tokens in {made.seconds:.2f} s, {made.tokens_per_second:.1f} tokens/s, "
        f"the first after {made.first_token_seconds:.2f} s; {why}"
    )


class _Shown:
    """What stands on standard output so far."""

    def __init__(self) -> None:
        self._last = ""

    def write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()
        self._last = text[-1:]

    def end_line(self, always: bool = False) -> None:
        if self._last != "\n" and (self._last or always):
            self.write("\n")


def _read_prompt(prompt: str | None, prompt_file: str | None) -> str:
    from qmoe_lite.errors import TextError

    try:
        if "-" in (prompt, prompt_file):
            name, data = "standard input", sys.stdin.buffer.read()
        elif prompt_file is not None:
            name, data = prompt_file, Path(prompt_file).read_bytes()
        else:
            assert prompt is not None
            name = "the prompt"
            prompt.encode("utf-8")  # bytes of an argument that are not UTF-8 stand in it as lone surrogates
            return prompt
        return data.decode("utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeError as error:
        raise TextError(f"{name} is not UTF-8 text. Convert it, e.g. with iconv.") from error
    except OSError as error:
        raise TextError(f"{prompt_file} cannot be read: {error.strerror}. Name a text file.") from error


def _print_json(prompt: str, made: Generation) -> None:
    from qmoe_lite.cli import _output

    _output.print_json(
        {
            "prompt": prompt,
            "text": made.text,
            "tokens": len(made.token_ids),
            "prompt_tokens": made.prompt_tokens,
            "finish_reason": made.finish_reason,
            "seconds": made.seconds,
            "first_token_seconds": made.first_token_seconds,
            "tokens_per_second": made.tokens_per_second,
        }
    )
