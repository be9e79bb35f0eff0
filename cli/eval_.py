"""`qmoe eval`."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qmoe_lite.bench._show.text import print_text
from qmoe_lite.cli._options import (
    JsonOption,
    Placement,
    SequenceLengthOption,
    StatsOption,
    grouped,
)

if TYPE_CHECKING:
    from qmoe_lite.text.evaluation import Comparison


@grouped
def evaluate(
    model: Annotated[str, typer.Argument(help="Compressed directory, or a dense model's directory or name.")],
    *,
    text: Annotated[str, typer.Option(help="UTF-8 text, .jsonl with text or messages, a directory, or a data set.")],
    samples: Annotated[int | None, typer.Option(help="Samples drawn. [default: the whole text]", min=1)] = None,
    sequence_length: SequenceLengthOption = 512,
    passes: Annotated[
        int, typer.Option(help="How often each window is masked, differently each time (seq2seq).", min=1)
    ] = 1,
    batch_size: Annotated[
        int | None, typer.Option(help="Samples per batch. [default: what a few hundred MB hold, at most 16]", min=1)
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed for samples and masked spans.", min=0)] = 1,
    against: Annotated[
        str | None,
        typer.Option(help="Original model, which is loaded too: print how far the two are apart.", metavar="DIR"),
    ] = None,
    placement: Placement,
    stats: StatsOption = False,
    json: JsonOption = False,
) -> None:
    """Measure loss and perplexity on a text; the same seed draws the same samples for every model.

    --against DIR measures the original model on the same samples too: the difference of the losses, the KL divergence
    of the predictions, and how often both models hold the same token for the likeliest.

    Example: qmoe eval switch-qmoe --text held_out.txt
    """
    from qmoe_lite.cli import _output
    from qmoe_lite.cli._models import open_model, watched
    from qmoe_lite.compression.positions import check_window
    from qmoe_lite.text.evaluation import compare
    from qmoe_lite.text.evaluation import evaluate as run

    _output.quiet_transformers()
    loaded, tokenizer = open_model(model, placement=placement)
    check_window(loaded.config, sequence_length)
    other = None if against is None else open_model(against, placement=Placement(placement.device))[0]
    options: dict[str, Any] = {"samples": samples, "sequence_length": sequence_length, "passes": passes}
    options |= {"batch_size": batch_size, "seed": seed}
    with watched(loaded, stats), _output.progress_shown("evaluating", show=sys.stderr.isatty()) as progress:
        if other is None:
            result, found = run(loaded, tokenizer, text, progress=progress, **options), None
        else:
            found = compare(loaded, other, tokenizer, text, progress=progress, **options)
            result = found.model
    document: dict[str, Any] = {"loss": result.loss, "perplexity": result.perplexity, "tokens": result.tokens}
    lines = [f"loss {result.loss:.4f}, perplexity {result.perplexity:.3f}, {result.tokens:,} tokens"]
    if found is not None:
        document["against"] = _document(found)
        gap, divergence = found.gap, found.divergence
        lines += [
            f"against {found.reference.loss:.4f}, perplexity {found.reference.perplexity:.3f}: "
            f"{gap.nats:+.4f} +- {gap.standard_error:.4f} nats a token",
            f"KL divergence {divergence.nats:.4f} +- {divergence.standard_error:.4f} nats a token, "
            f"same likeliest token {found.agreement:.2%}",
        ]
    if json:
        _output.print_json(document)
    else:
        print_text("\n".join(lines))


def _document(found: Comparison) -> dict[str, Any]:
    """Return a comparison as JSON values; a standard error of a single sample is None."""
    values = {
        "loss": found.reference.loss,
        "perplexity": found.reference.perplexity,
        "gap": found.gap.nats,
        "gap_standard_error": found.gap.standard_error,
        "divergence": found.divergence.nats,
        "divergence_standard_error": found.divergence.standard_error,
        "agreement": found.agreement,
    }
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
