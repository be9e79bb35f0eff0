"""The codes by name: how each is read from what config.json says of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from qmoe_lite.coding.codebook import Codebook
from qmoe_lite.coding.dictionary import KIND, Dictionary
from qmoe_lite.coding.stream import stream_bytes
from qmoe_lite.coding.windows import windows_bytes
from qmoe_lite.errors import FormatError

Code = Codebook | Dictionary
CODES: dict[str, Callable[[Mapping[str, Any]], Code]] = {
    "tunstall": Codebook.from_config,
    "paper": Codebook.from_config,
    KIND: Dictionary.from_config,
}


def code_from_config(config: Any) -> Code:
    """Return the code that an entry of config.json's `codebooks` describes, by its "kind".

    Parameters
    ----------
    config : mapping
        What the code's `to_config` returned.

    Raises
    ------
    FormatError
        The kind is missing or unknown, or the code's own reader refuses the entry.
    """
    kind = config.get("kind") if isinstance(config, Mapping) else None
    if not isinstance(kind, str) or kind not in CODES:
        known = " or ".join(f'"{name}"' for name in CODES)
        raise FormatError(f"codebook config is unusable: kind is {kind!r}; expected {known}. Upgrade qmoe-lite.")
    return CODES[kind](config)


def bytes_of_stream(code: Code, codewords: int) -> int:
    """Return the bytes of a matrix's stream of so many codewords, with its padding."""
    return (windows_bytes if isinstance(code, Dictionary) else stream_bytes)(codewords, code.bits)
