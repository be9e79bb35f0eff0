"""`qmoe import-qmoe`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qmoe_lite.bench._show.text import duration, megabytes, print_text
from qmoe_lite.cli._options import JsonOption


def import_qmoe(
    src: Annotated[Path, typer.Argument(help="Directory with config.json, noexp.pt, exp00.pt, .. and sizes.pt.")],
    out: Annotated[Path, typer.Argument(help="Directory to create.")],
    recode: Annotated[
        bool, typer.Option("--recode", help="Fit a code to each layer: the same weights in fewer bits.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Make a compressed model of a checkpoint that the paper's authors published (switch-*_qmoe on the hub).

    Codewords are kept as they are, unless --recode is given. Nothing in the files is run.

    Example: qmoe import-qmoe switch-base-128_qmoe base-128 --recode
    """
    from qmoe_lite.cli import _output
    from qmoe_lite.compression.importing import import_qmoe as run

    _output.quiet_transformers()
    try:
        with _output.progress_shown("importing", show=not json) as progress:
            found = run(src, out, recode, progress=progress)
    except KeyboardInterrupt:
        _output.note("qmoe: interrupted. Nothing is kept: an import starts over.")
        raise typer.Exit(130) from None
    if json:
        _output.print_json(found.to_json())
        return
    print_text(f"{out}: {found.matrices:,} matrices, {found.expert_weights:,} weights in experts")
    sizes = (
        ("codewords", found.published_code_bytes, found.code_bytes),
        ("experts", found.published_bytes, found.expert_bytes),
    )
    for name, before, after in sizes:
        rates = " -> ".join(f"{found.bits_per_weight(size):.3f}" for size in (before, after))
        change = f"{after / before - 1:+.1%}" if after != before else "as they were"
        print_text(f"{name} {megabytes(before)} -> {megabytes(after)} MB, {rates} bits a weight: {change}")
    print_text(f"all else {megabytes(found.other_bytes)} MB, {duration(found.seconds)}")
    for line in found.notes:
        print_text(f"note: {line}")
