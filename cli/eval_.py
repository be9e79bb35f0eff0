"""`qmoe eval`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from qmoe_lite.bench._show.text import print_text
from qmoe_lite.cli._options import (
    JsonOption,
    Placement,
    SequenceLengthOption,
    StatsOption,
    grouped,
)


@grouped
def evaluate(
    model: Annotated[str, typer.Argument(help="Compressed directory, or a dense model's directory or name.")],
    *,
    text: Annotated[str, typer.Option(help="UTF-8 text, .jsonl with a text field, a directory, or a data set.")],
    samples: Annotated[int | None, typer.Option(help="Samples drawn. [default: the whole text]", min=1)] = None,
    sequence_length: SequenceLengthOption = 512,
    passes: Annotated[
        int, typer.Option(help="How often each window is masked, differently each time (seq2seq).", min=1)
    ] = 1,
    batch_size: Annotated[int, typer.Option(help="Samples per batch.", min=1)] = 16,
    seed: Annotated[int, typer.Option(help="Seed for samples and masked spans.", min=0)] = 1,
    placement: Placement,
    stats: StatsOption = False,
    json: JsonOption = False,
) -> None:
    """Measure loss and perplexity on a text; the same seed draws the same samples for every model.

    Example: qmoe eval switch-qmoe --text held_out.txt
    """
    from qmoe_lite.cli import _output
    from qmoe_lite.cli._models import open_model, watched
    from qmoe_lite.compression.positions import check_window
    from qmoe_lite.text.evaluation import evaluate as run

    _output.quiet_transformers()
    loaded, tokenizer = open_model(model, placement=placement)
    check_window(loaded.config, sequence_length)
    options: dict[str, Any] = {"samples": samples, "sequence_length": sequence_length, "passes": passes}
    with watched(loaded, stats):
        result = run(loaded, tokenizer, text, batch_size=batch_size, seed=seed, **options)
    if json:
        _output.print_json({"loss": result.loss, "perplexity": result.perplexity, "tokens": result.tokens})
    else:
        print_text(f"loss {result.loss:.4f}, perplexity {result.perplexity:.3f}, {result.tokens:,} tokens")
