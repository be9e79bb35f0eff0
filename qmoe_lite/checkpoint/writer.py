"""The files of a compressed model: one for each sparse layer, then dense tensors, index and configuration."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from qmoe_lite.checkpoint import atomic as files
from qmoe_lite.checkpoint.reader import Checkpoint, of_experts

_DENSE_SHARD = 2 << 30  # bytes of dense tensors in one file


class Writer:
    """Writes a compressed model into a directory.

    Parameters
    ----------
    directory : path
        Exists.
    checkpoint : Checkpoint
        Of the dense model.
    stored_name : callable
        Returns a tensor's name in the files for the model's own.
    layers : int
        Number of sparse layers.
    """

    def __init__(self, directory: Path, checkpoint: Checkpoint, stored_name: Callable[[str], str], layers: int) -> None:
        self._directory, self._checkpoint, self._layers = directory, checkpoint, layers
        self._stored_name = stored_name

    def write_layer(self, number: int, tensors: dict[str, Tensor]) -> dict[str, int]:
        """Write one sparse layer's tensors; return the CRC-32 of each."""
        stored = {self._stored_name(name): tensor for name, tensor in tensors.items()}
        return files.write_tensors(self.layer_file(number), stored)

    def read_layer(self, number: int, names: list[str]) -> dict[str, Tensor]:
        """Read tensors of a sparse layer that was written before."""
        with safe_open(self.layer_file(number), framework="pt") as file:
            return {name: file.get_tensor(self._stored_name(name)) for name in names}

    def layer_file(self, number: int) -> Path:
        """Return where a sparse layer's tensors are written."""
        return self._directory / self._file_name(number)

    def write_rest(self, checksums: dict[str, int], settings: dict[str, Any]) -> None:
        """Write what is not in the sparse layers' files.

        Parameters
        ----------
        checksums : dict, tensor name to CRC-32
            Of the sparse layers' tensors.
        settings : dict
            As `format.quantization_config` makes it.
        """
        weight_map: dict[str, str] = {}
        for number in range(self._layers):
            file_name = self._file_name(number)
            weight_map |= dict.fromkeys(_names_in(self._directory / file_name), file_name)
        for number, shard in enumerate(self._dense_shards, self._layers):
            file_name = self._file_name(number)
            # copies: a checkpoint's tied tensors may be views of one storage, which safetensors refuses
            tensors = {self._checkpoint.stored_name(name): self._checkpoint.to_write(name).clone() for name in shard}
            checksums = checksums | files.write_tensors(self._directory / file_name, tensors)
            weight_map |= dict.fromkeys(tensors, file_name)
        files.write_json(self._directory / "config.json", self._config(settings))
        files.copy_companions(self._checkpoint.directory, self._directory)
        total = sum((self._directory / file_name).stat().st_size for file_name in set(weight_map.values()))
        index = {"metadata": {"total_size": total, "crc32": checksums}, "weight_map": weight_map}
        files.write_json(self._directory / "model.safetensors.index.json", index)

    def _config(self, settings: dict[str, Any]) -> dict[str, Any]:
        config = dict(self._checkpoint.config)
        config.pop("auto_map", None)  # names code that is not copied; transformers has its own for these families
        if not (
            config.get("dtype") or config.get("torch_dtype")
        ):  # else transformers would take the first tensor's: the levels'
            dense = [self._checkpoint.meta(name) for name in self._dense_names]
            largest = max(dense, key=lambda tensor: tensor.nbytes)
            config["dtype"] = str(largest.dtype).removeprefix("torch.")
        config["quantization_config"] = settings
        return config

    @property
    def _dense_names(self) -> list[str]:
        return [name for name in self._checkpoint.names if not of_experts(name)]

    @cached_property
    def _dense_shards(self) -> list[list[str]]:
        shards: list[list[str]] = [[]]
        size = 0
        for name in self._dense_names:
            tensor = self._checkpoint.meta(name)
            if size and size + tensor.nbytes > _DENSE_SHARD:
                shards.append([])
                size = 0
            shards[-1].append(name)
            size += tensor.nbytes
        return shards

    def _file_name(self, number: int) -> str:
        return f"model-{number + 1:05d}-of-{self._layers + len(self._dense_shards):05d}.safetensors"


def _names_in(file: Path) -> list[str]:
    """Names of the tensors in one safetensors file."""
    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())
