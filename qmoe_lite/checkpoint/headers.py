"""What the files of a model hold, by config.json and their headers; of a model on the hub nothing else is fetched."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qmoe_lite.checkpoint.config_file import read_config_file
from qmoe_lite.checkpoint.finding import check_hub_name
from qmoe_lite.checkpoint.index_file import read_index
from qmoe_lite.checkpoint.reader import Checkpoint
from qmoe_lite.checkpoint.sources import DTYPES, Source, dequantised
from qmoe_lite.errors import CheckpointError, first_line, unreadable

_LARGEST = 100_000_000  # bytes of a header, as safetensors has it
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Held:
    """A tensor in a file, by the file's header; see `Source`."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, expert: int | None = None) -> Tensor:
        raise CheckpointError(f"{self.name} is known by its header alone: its values were not fetched.")


@dataclass(frozen=True)
class _Columns(Held):
    """Stands for the tensor that says how many columns a packed one has, as far as its own columns tell."""

    columns: int

    def read(self, expert: int | None = None) -> Tensor:
        return torch.tensor([self.columns])


@dataclass(frozen=True)
class Headers:
    """A model without its values.

    Attributes
    ----------
    directory : Path
        Holds config.json.
    config : dict
        As it stands there.
    held : dict, name in the files to Held
        Empty where no header is at hand.
    file_bytes : int or None
        Of all weights, where only their sum is known.
    origin : str
        Where `held`, or `file_bytes`, comes from, in words.
    shards : list of Path
        The weight files that are on this machine.
    """

    directory: Path
    config: dict[str, Any]
    held: dict[str, Held] = field(default_factory=dict)
    file_bytes: int | None = None
    origin: str = "config.json alone"
    shards: list[Path] = field(default_factory=list)

    @property
    def sources(self) -> Mapping[str, Source]:
        """What the files hold, by the names there; dequantised."""
        found: dict[str, Source] = dict(self.held)
        bits = min(_packed_bits(self.config), default=4)
        for name, packed in self.held.items():
            if name.endswith("_packed") and (of := f"{name.removesuffix('_packed')}_shape") in found:
                found[of] = _Columns(of, self.held[of].shape, self.held[of].dtype, packed.shape[-1] * 32 // bits)
        return dequantised(self.config, found)


def _packed_bits(config: dict[str, Any]) -> list[int]:
    """Return the bits of weights that compressed-tensors' schemes name."""
    settings = config.get("quantization_config") or {}
    groups = settings.get("config_groups") if isinstance(settings, dict) else None
    schemes = [each.get("weights") or {} for each in (groups or {}).values()]
    return [int(each["num_bits"]) for each in schemes if each.get("num_bits")]


def read_headers(model: str | Path) -> Headers:
    """Read what is known of a model's tensors without reading one.

    Parameters
    ----------
    model : path or str
        A directory with a config.json, with or without weights; or a name on the hub, of which config.json and the
        headers of the shards are fetched.

    Raises
    ------
    CheckpointError
        No such directory or name, no config.json, or a damaged header.
    """
    path = Path(model)
    if path.is_dir() or check_hub_name(model) is None:
        return _of_directory(path)
    return _of_hub(str(model))


def _of_directory(directory: Path) -> Headers:
    config = read_config_file(directory)
    whole, index = directory / "model.safetensors", directory / _INDEX
    total: int | None = None
    if whole.is_file():
        names = [whole.name]
    elif index.is_file():
        found = read_index(index)
        names, total = sorted({*found.file_of.values()}), found.total_bytes
    elif any((directory / name).is_file() for name in ("pytorch_model.bin", "pytorch_model.bin.index.json")):
        return _of_pickles(directory, config)
    else:
        return Headers(directory, config)
    here = [directory / name for name in names if (directory / name).is_file()]
    if len(here) < len(names):
        origin = f"{_INDEX}, {len(here)} of {len(names)} shards being here"
        return Headers(directory, config, {}, total, origin, here)
    held = {each.name: each for shard in here for each in _header(shard)}
    return Headers(directory, config, held, None, f"the headers of {len(here)} safetensors files", here)


def _header(shard: Path) -> Iterator[Held]:
    try:
        with shard.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > _LARGEST:
                raise ValueError
            content = json.loads(file.read(size))
        for name, entry in content.items():
            if name != "__metadata__":
                yield _held(name, entry["shape"], entry["dtype"])
    except OSError as error:
        raise unreadable(shard, error) from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{shard} has a damaged header. Fetch the file again.") from error


def _held(name: str, shape: Any, dtype: str) -> Held:
    if dtype not in DTYPES:
        raise CheckpointError(f"{name} is of dtype {dtype}, which is not read.")
    return Held(name, tuple(int(size) for size in shape), DTYPES[dtype])


def _of_pickles(directory: Path, config: dict[str, Any]) -> Headers:
    """Know what .bin files hold; torch maps them, and no tensor is touched."""
    faults: list[CheckpointError] = []
    checkpoint = Checkpoint(directory, faults)
    here = [directory / name for name in checkpoint.files if (directory / name).is_file()]
    if len(here) < len(checkpoint.files):
        return Headers(directory, config, {}, None, "config.json alone, some shards being elsewhere", here)
    held = {name: Held(name, source.shape, source.dtype) for name, source in checkpoint.sources.items()}
    return Headers(directory, config, held, None, f"{len(here)} .bin files", here)


def _of_hub(name: str) -> Headers:
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import NotASafetensorsRepoError

    try:
        directory = Path(hf_hub_download(name, "config.json")).parent
        if any(directory.glob("*.safetensors")):  # fetched before; perhaps not all of it
            known = _of_directory(directory)
            if known.held:
                return known
        config = read_config_file(directory)
        try:
            found = HfApi().get_safetensors_metadata(name)
        except NotASafetensorsRepoError:
            files = [each for each in HfApi().model_info(name, files_metadata=True).siblings or () if each.size]
            total = sum(each.size or 0 for each in files if each.rfilename.endswith(".bin"))
            return Headers(directory, config, {}, total or None, "the sizes of the .bin files on the hub")
    except CheckpointError:
        raise
    except Exception as error:  # huggingface_hub raises its own, httpx's and the file system's exceptions
        raise CheckpointError(
            f"{name} is no directory here, and the Hugging Face hub answers: {first_line(error)}."
        ) from error
    held = {
        tensor: _held(tensor, info.shape, info.dtype)
        for file in found.files_metadata.values()
        for tensor, info in file.tensors.items()
    }
    count = len(found.files_metadata)
    return Headers(directory, config, held, None, f"the headers of {count} safetensors files on the hub")
