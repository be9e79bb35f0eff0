"""What a config.json says of a model that compressed-tensors quantised: how matrices and their scales are stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_FORMATS = {  # of a group of tensors, and what its weights are then
    "float-quantized": (("float", 8),),
    "int-quantized": (("int", 8),),
    "naive-quantized": (("float", 8), ("int", 8)),
    "pack-quantized": (("int", 4), ("int", 8)),
}
WHOLE = 1 << 62  # rows or columns of a block that takes all of them


@dataclass(frozen=True)
class Scheme:
    """How a group of a model's tensors is stored.

    Attributes
    ----------
    packed : bool
        Whether several integers share 32 bits.
    bits : int
        Of a weight.
    block : (int, int)
        Rows and columns of what has one scale.
    """

    packed: bool
    bits: int
    block: tuple[int, int]


def schemes_of(settings: Mapping[str, Any]) -> list[Scheme] | str:
    """Return the schemes that a `quantization_config` names; or, where one is not read here, what it is."""
    if settings.get("quantization_status", "compressed") != "compressed":
        return f"compressed-tensors ({settings['quantization_status']}, not compressed)"
    groups = settings.get("config_groups")
    found = []
    for group in groups.values() if isinstance(groups, dict) else ():
        known = _FORMATS.get(kind := str(group.get("format") or settings.get("format")), ())
        weights = group.get("weights") or {}
        named = f"{weights.get('type', 'int')}{weights.get('num_bits', 8)}"
        block = _block(weights)
        if block is None or (weights.get("type", "int"), weights.get("num_bits", 8)) not in known:
            return f"compressed-tensors ({kind}, {named} by {weights.get('strategy')})"
        if not weights.get("symmetric", True):
            return f"compressed-tensors ({kind}, {named}, not symmetric)"
        if weights.get("actorder") in ("group", "dynamic", True):
            return f"compressed-tensors ({kind}, {named}, its columns in another order)"
        found.append(Scheme(kind == "pack-quantized", int(weights.get("num_bits", 8)), block))
    return found or f"compressed-tensors ({settings.get('format')}, without groups)"


def _block(weights: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the rows and columns of what has one scale."""
    size, structure = weights.get("group_size"), weights.get("block_structure")
    strategy = weights.get("strategy") or ("channel" if size == -1 else "group" if size else "tensor")
    if strategy == "group" and isinstance(size, int) and size > 0:
        return 1, size
    if strategy == "block" and isinstance(structure, list) and len(structure) == 2:
        return int(structure[0]), int(structure[1])
    return {"channel": (1, WHOLE), "tensor": (WHOLE, WHOLE)}.get(strategy)
