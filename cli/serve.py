"""`qmoe serve`."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qmoe_lite.cli._options import (
    Dtype,
    DtypeOption,
    ModelArgument,
    Placement,
    PrefillChunkOption,
    StatsOption,
    TraceOption,
    grouped,
)

if TYPE_CHECKING:
    import socket

UNLIMITED = 4096  # tokens of a prompt and its answer, of a model whose positions have no limit


@grouped
def serve(
    model: ModelArgument,
    *,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in, and needs --api-key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.", min=0, max=65535)] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            help="Key that clients must send; the environment variable is not seen by other users.",
            envvar="QMOE_API_KEY",
            metavar="KEY",
        ),
    ] = None,
    no_auth: Annotated[bool, typer.Option("--no-auth", help="Let anyone in who reaches the address.")] = False,
    context: Annotated[
        int | None,
        typer.Option(
            help="Tokens of a prompt and its answer together. [default: the model's positions]", min=2, metavar="TOKENS"
        ),
    ] = None,
    parallel: Annotated[int, typer.Option(help="Requests that take turns, each with memory for its text.", min=1)] = 4,
    queue: Annotated[int, typer.Option(help="Requests that may wait; one more is refused.", min=0)] = 32,
    prefill_chunk: PrefillChunkOption = 1024,
    dtype: DtypeOption = Dtype.float32,
    placement: Placement,
    stats: StatsOption = False,
    trace: TraceOption = None,
) -> None:
    """Serve a model over OpenAI's HTTP API; Ctrl-C stops it.

    /v1/chat/completions, /v1/completions and /v1/models, streamed or not. It needs pip install 'qmoe-lite[serve]'.

    Example: qmoe serve qwen3-qmoe --port 8000
    """
    if api_key is not None and no_auth:
        raise typer.BadParameter("give either --api-key (or QMOE_API_KEY) or --no-auth")
    from qmoe_lite.cli import _output

    with _address(host, port, api_key, no_auth) as taken:
        try:
            from qmoe_lite.cli import _server
            from qmoe_lite.cli._app import App
            from qmoe_lite.cli._models import open_model, watched
            from qmoe_lite.cli._turns import Turns

            _output.quiet_transformers()
            loaded, tokenizer = open_model(model, dtype, placement)
            tokens = _context(loaded, context)
            _note_what_works(loaded, tokenizer)
            local = api_key is None and _server.is_loopback(taken)
            limits: dict[str, Any] = {"context": tokens, "prefill_chunk": prefill_chunk}
            with watched(loaded, stats, trace):
                turns = Turns(loaded, parallel, queue)
                hosts = {"localhost", host.lower()} if local else None
                app = App(loaded, tokenizer, model, turns, **limits, api_key=api_key, hosts=hosts)
                where = _server.url(taken)
                ended = _server.listen(
                    app, turns, taken, lambda: _output.note(f"qmoe: {model} is served at {where}; Ctrl-C stops it.")
                )
                _output.note("qmoe: stopped.")
                if not ended:  # a thread still uses the model, which cannot be closed
                    _server.leave()
            _server.leave()
        except KeyboardInterrupt:  # while the model was loaded
            _output.note("qmoe: interrupted.")
            raise typer.Exit(130) from None


def _address(host: str, port: int, api_key: str | None, no_auth: bool) -> socket.socket:
    """Take the address, before the model is loaded; raise SettingError for one that is open to everyone unasked."""
    from qmoe_lite.cli import _output, _server
    from qmoe_lite.errors import SettingError

    if importlib.util.find_spec("uvicorn") is None:
        raise SettingError("qmoe serve needs uvicorn. Run: pip install 'qmoe-lite[serve]'")
    if api_key is not None:
        _server.check_key(api_key)
    taken = _server.bind(host, port)
    if not _server.is_loopback(taken) and api_key is None:
        if not no_auth:
            taken.close()
            raise SettingError(
                f"--host {host} lets other machines in, without a password. Give --api-key KEY (or set QMOE_API_KEY), "
                "or --no-auth to let anyone in."
            )
        _output.note(f"qmoe: warning: whoever reaches {_server.url(taken)} may use the model.")
    return taken


def _context(model: Any, asked: int | None) -> int:
    """Return how many tokens a prompt and its answer may have together."""
    from qmoe_lite.errors import SettingError
    from qmoe_lite.text.generation import positions_of

    positions = positions_of(model)
    if asked is not None and positions is not None and asked > positions:
        raise SettingError(f"--context is {asked}, and the model has {positions} positions. Ask for at most these.")
    return asked or positions or UNLIMITED


def _note_what_works(model: Any, tokenizer: Any) -> None:
    from qmoe_lite.cli import _output

    why = "has no chat template" if not getattr(tokenizer, "chat_template", None) else ""
    if model.config.is_encoder_decoder:
        why = "is an encoder-decoder model"
    if why:
        _output.note(f"qmoe: this model {why}: /v1/completions works, /v1/chat/completions does not.")
