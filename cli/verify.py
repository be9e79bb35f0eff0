"""`qmoe verify`."""

from __future__ import annotations

from typing import Annotated

import typer

from qmoe_lite.bench._show.text import duration, megabytes, plural, print_text
from qmoe_lite.cli._options import JsonOption


def verify(
    directory: Annotated[str, typer.Argument(help="Compressed directory.")],
    json: JsonOption = False,
) -> None:
    """Check every byte of a compressed directory and report every problem. Exit code 1 if there is an error.

    Example: qmoe verify switch-qmoe
    """
    import sys

    from qmoe_lite.cli import _output
    from qmoe_lite.inspection.verification import verify_model

    _output.quiet_transformers()
    with _output.progress_shown("verifying", show=sys.stderr.isatty()) as progress:
        found = verify_model(directory, progress)
    if json:
        _output.print_json(found.to_json())
    else:
        for finding in found.findings:
            print_text(str(finding))
        errors = sum(finding.severity == "error" for finding in found.findings)
        verdict = plural(errors, "error") if errors else "sound"
        size, time = megabytes(found.bytes), duration(found.seconds)
        looked = f"{found.tensors:,} tensors, {found.experts:,} matrices of experts, {size} MB in {time}"
        print_text(f"{verdict}: {looked}")
    if not found.sound:
        raise typer.Exit(1)
