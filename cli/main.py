"""The typer application: registers the commands, and turns the library's exceptions into one line and an exit code."""

from __future__ import annotations

import errno
import sys
from typing import Annotated

import typer

from qmoe_lite.cli import (
    _output,
    bench_,
    card,
    chat,
    compress_,
    demo,
    doctor,
    estimate,
    eval_,
    generate,
    import_qmoe,
    inspect_,
    pack,
    sensitivity,
    serve,
    tune,
    unpack,
    verify,
)
from qmoe_lite.cli._streams import give_up_output, mend_streams
from qmoe_lite.errors import QMoEError

_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EIO)

app = typer.Typer(
    help="Compress the experts of a Mixture-of-Experts model to 0.6 to 4 bits a weight, and run the result.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("demo")(demo.demo)
app.command("estimate")(estimate.estimate)
app.command("compress")(compress_.compress)
app.command("sensitivity")(sensitivity.sensitivity)
app.command("tune")(tune.tune)
app.command("eval")(eval_.evaluate)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.command("serve")(serve.serve)
app.command("doctor")(doctor.doctor)
app.command("inspect")(inspect_.inspect)
app.command("verify")(verify.verify)
app.command("card")(card.card)
app.command("import-qmoe")(import_qmoe.import_qmoe)
app.command("pack")(pack.pack)
app.command("unpack")(unpack.unpack)
app.add_typer(bench_.app, name="bench")


def _version(show: bool) -> None:
    if show:
        from qmoe_lite import __version__

        typer.echo(f"qmoe-lite {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Take the options that come before the command."""


def main() -> None:
    """Run the command line. Exit code 0, 1 (what went wrong, in one line), 2 (usage), 130 (Ctrl-C)."""
    debug = "--debug" in sys.argv[1:]
    if debug:  # wherever it stands
        sys.argv = [sys.argv[0], *(a for a in sys.argv[1:] if a != "--debug")]
    mend_streams()
    try:
        try:
            app()
        finally:
            sys.stdout.flush()  # here, where what goes wrong is told
    except QMoEError as error:
        if debug:
            raise
        _output.note(f"qmoe: {' '.join(str(error).split())}")
        sys.exit(1)
    except BrokenPipeError:
        give_up_output()
        sys.exit(1)
    except Exception as error:
        if debug:
            raise
        if isinstance(error, OSError) and error.errno in _UNWRITABLE:
            give_up_output()
            _output.note(f"qmoe: the output cannot be written: {error.strerror}.")
            sys.exit(1)
        if (memory := _used_up(error)) is not None:
            _output.note(f"qmoe: {memory}, or process fewer tokens or samples at a time.")
            sys.exit(1)
        text = (str(error).strip().splitlines() or [""])[0]
        _output.note(f"qmoe: unexpected {type(error).__name__}: {text} (run with --debug and report it)")
        sys.exit(1)


def _used_up(error: Exception) -> str | None:
    """Return whose memory ran out, and what helps; by torch's words, since the command may not have imported it."""
    if type(error).__name__ == "OutOfMemoryError":
        return "out of GPU memory. Use --device cpu"
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
        return "out of memory. Shorten the text"
    return None
