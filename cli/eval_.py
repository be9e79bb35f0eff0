"""`qmoe eval`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from qmoe_lite.cli._options import JsonOption, SequenceLengthOption


def evaluate(
    model: Annotated[str, typer.Argument(help="Compressed directory, or a dense model's directory or name.")],
    text: Annotated[str, typer.Option(help="UTF-8 text, .jsonl with a text field, a directory, or a data set.")],
    samples: Annotated[int | None, typer.Option(help="Samples drawn. [default: the whole text]", min=1)] = None,
    sequence_length: SequenceLengthOption = 512,
    passes: Annotated[int, typer.Option(help="Times that each window is masked anew (seq2seq).", min=1)] = 1,
    batch_size: Annotated[int, typer.Option(help="Samples at a time.", min=1)] = 16,
    seed: Annotated[int, typer.Option(help="Decides samples and masked spans.")] = 1,
    json: JsonOption = False,
) -> None:
    """Measure loss and perplexity on a text; the same seed gives every model the same questions.

    Example: qmoe eval switch-qmoe --text held_out.txt
    """
    from qmoe_lite.cli import _output
    from qmoe_lite.evaluation import evaluate as run

    _output.quiet_transformers()
    loaded, tokenizer = open_model(model)
    options: dict[str, Any] = {"samples": samples, "sequence_length": sequence_length, "passes": passes}
    result = run(loaded, tokenizer, text, batch_size=batch_size, seed=seed, **options)
    if json:
        _output.print_json({"loss": result.loss, "perplexity": result.perplexity, "tokens": result.tokens})
    else:
        _output.print_text(f"loss {result.loss:.4f}, perplexity {result.perplexity:.3f}, {result.tokens:,} tokens")


def open_model(name: str) -> tuple[Any, Any]:
    """Load a compressed or dense model in float32, with its tokenizer."""
    import torch
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    from qmoe_lite.checkpoint import Checkpoint, find_model
    from qmoe_lite.errors import CheckpointError
    from qmoe_lite.experts import load
    from qmoe_lite.families import family_of

    path = find_model(name)
    config = Checkpoint(path).config
    family_of(config.get("model_type"))
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # tokenizers, sentencepiece and json each raise their own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path} has no usable tokenizer: {reason}") from error
    if (config.get("quantization_config") or {}).get("quant_method") == "qmoe":
        return load(path, dtype=torch.float32), tokenizer
    return AutoModelForSeq2SeqLM.from_pretrained(path, dtype=torch.float32).eval(), tokenizer
