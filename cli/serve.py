"""`qmoe serve`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Annotated, Any

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


@grouped
def serve(
    model: ModelArgument,
    *,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=0, max=65535)] = 8000,
    prefill_chunk: PrefillChunkOption = 1024,
    dtype: DtypeOption = Dtype.float32,
    placement: Placement,
    stats: StatsOption = False,
    trace: TraceOption = None,
) -> None:
    """Serve a causal model over OpenAI's HTTP API; Ctrl-C stops it.

    The server is transformers' own (`transformers serve`): /v1/chat/completions, /v1/completions, /v1/responses,
    /v1/models. It needs pip install 'qmoe-lite[serve]'.

    Example: qmoe serve qwen3-qmoe --port 8000
    """
    server = _server_class()
    from qmoe_lite.cli import _output
    from qmoe_lite.cli._models import open_model, watched
    from qmoe_lite.errors import SettingError

    _output.quiet_transformers()
    loaded, tokenizer = open_model(model, dtype, placement)
    if loaded.config.is_encoder_decoder:
        raise SettingError(f"{model} is an encoder-decoder model; OpenAI's interface is for causal ones.")
    if not getattr(tokenizer, "chat_template", None):
        _output.note("qmoe: this model has no chat template: /v1/completions works, /v1/chat/completions does not.")
    loaded.generation_config.prefill_chunk_size = prefill_chunk
    # Ctrl-C is raised again when the server has shut down
    with watched(loaded, stats, trace), _serving(loaded, tokenizer), suppress(KeyboardInterrupt):
        server(force_model=model, host=host, port=port)


def _server_class() -> Any:
    """Return transformers' server class, whose constructor runs the server."""
    from transformers.utils.import_utils import is_serve_available

    from qmoe_lite.errors import SettingError

    if not is_serve_available():
        raise SettingError("qmoe serve needs transformers' server. Run: pip install 'qmoe-lite[serve]'")
    from transformers.cli.serve import Serve
    from transformers.cli.serving.model_manager import ModelManager

    wanted = ("_load_model", "_load_processor", "list_models")
    if not all(hasattr(ModelManager, name) for name in wanted):
        raise SettingError("this version of transformers has a different server. Run: pip install 'qmoe-lite[serve]'")
    return Serve


@contextmanager
def _serving(loaded: Any, tokenizer: Any) -> Iterator[None]:
    """Make the server answer with this model, instead of one that it loads itself."""
    from transformers.cli.serving import model_manager

    class OneModel(model_manager.ModelManager):
        def _load_model(self, *args: Any, **kwargs: Any) -> Any:
            return loaded

        def _load_processor(self, *args: Any, **kwargs: Any) -> Any:
            return tokenizer

    before = model_manager.ModelManager
    model_manager.ModelManager = OneModel
    try:
        yield
    finally:
        model_manager.ModelManager = before
