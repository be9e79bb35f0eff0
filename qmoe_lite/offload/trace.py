"""Traces: files of JSON lines that record which experts each layer asks for, pass by pass."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from qmoe_lite.errors import OutputError
from qmoe_lite.models.experts import PackedExperts


def head_of(layers: Sequence[PackedExperts]) -> dict[str, Any]:
    """Return a trace's first line for a model's experts modules, in the order in which they run."""
    first = layers[0].layer
    return {
        "model_type": layers[0].family.model_type,
        "layers": [experts.layer.experts for experts in layers],
        "experts": first.count,
        "top_k": first.top_k,
    }


class Trace:
    """A trace that is being written; its first line describes the model.

    Parameters
    ----------
    path : path or str
        The file; what it holds is replaced.
    head : dict
        The first line, as JSON values.

    Raises
    ------
    OutputError
        The file cannot be written; nothing is left open.
    """

    def __init__(self, path: str | Path, head: dict[str, Any]) -> None:
        file: TextIO | None = None
        try:
            file = Path(path).open("w", encoding="utf-8")  # noqa: SIM115
            file.write(json.dumps(head) + "\n")
            file.flush()
        except OSError as error:
            if file is not None:
                _abandon(file)
            raise _unwritable(path, error, "Name another file.") from error
        self.file = file

    def write(self, number: int, layer_index: int, experts: list[list[int]]) -> None:
        """Add a line: in a pass, by its number, the experts of each of a layer's tokens.

        Raises
        ------
        OutputError
            The file cannot be written; it is closed.
        """
        try:
            self.file.write(json.dumps({"pass": number, "layer": layer_index, "experts": experts}) + "\n")
        except OSError as error:
            _abandon(self.file)
            raise _unwritable(self.file.name, error, "The trace ends here.") from error

    def flush(self) -> None:
        """Write what is held back, as far as that is possible; `close` raises what is not."""
        with suppress(OSError):
            self.file.flush()

    def close(self) -> None:
        """End the trace; raise OutputError where its end cannot be written."""
        try:
            self.file.close()
        except OSError as error:
            raise _unwritable(self.file.name, error, "The end of the trace is missing.") from error


def _unwritable(path: Any, error: OSError, remedy: str) -> OutputError:
    return OutputError(f"{path} cannot be written: {error.strerror}. {remedy}")


def _abandon(file: TextIO) -> None:
    """Close a file that could not be written, once more in vain."""
    with suppress(OSError):
        file.close()
