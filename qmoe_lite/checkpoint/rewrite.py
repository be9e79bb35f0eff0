"""A compressed directory with some of its tensors changed, as a directory of its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from qmoe_lite.checkpoint import atomic as files
from qmoe_lite.checkpoint.reader import Checkpoint
from qmoe_lite.errors import FormatError

_INDEX = "model.safetensors.index.json"


def rewrite(checkpoint: Checkpoint, out: Path, changed: Mapping[str, Tensor], contents: Mapping[str, Any]) -> None:
    """Fill a directory with a model's files, some tensors changed.

    Parameters
    ----------
    checkpoint : Checkpoint
        Of the compressed model.
    out : path
        An empty directory.
    changed : dict, tensor name to tensor
        By the model's own names; each is stored in the dtype that it has in the files.
    contents : dict, file name to JSON value
        Other files that are written anew.

    Raises
    ------
    FormatError
        A tensor has another shape than in the files, or is not there.
    OutputError
        The disk is full, or `out` is not writable.
    """
    stored: dict[str, Tensor] = {}
    for name, tensor in changed.items():
        if name not in checkpoint or checkpoint.shape(name) != tuple(tensor.shape):
            raise FormatError(f"{checkpoint.directory} holds no {name} of shape {tuple(tensor.shape)}. Fetch it again.")
        stored[checkpoint.stored_name(name)] = tensor.to(checkpoint.meta(name).dtype)
    sums: dict[str, int] = {}
    for file_name in checkpoint.files:
        held = checkpoint.stored_in(file_name)
        if held & set(stored):
            tensors = {each: stored[each] if each in stored else checkpoint.sources[each].read() for each in held}
            sums |= files.write_tensors(out / file_name, dict(sorted(tensors.items())))
    for file in sorted(checkpoint.directory.iterdir()):
        if not file.is_file() or file.name in contents or (out / file.name).exists():
            continue
        if file.name == _INDEX:
            files.write_json(out / _INDEX, _index(file, sums))
        else:
            files.write_atomically(out / file.name, lambda to, file=file: shutil.copyfile(file, to))  # type: ignore[misc]
    for name, value in contents.items():
        files.write_json(out / name, value)


def _index(file: Path, sums: dict[str, int]) -> dict[str, Any]:
    """Return the index with the checksums of the tensors that were written anew."""
    index: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    known = index.get("metadata", {}).get("crc32")
    if known is not None:
        index["metadata"]["crc32"] = known | sums
    return index
