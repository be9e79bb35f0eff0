"""Read checkpoints lazily, a tensor at a time."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qmoe_lite.checkpoint.config_file import read_config_file
from qmoe_lite.checkpoint.finding import variant_of, with_variant
from qmoe_lite.checkpoint.header import read_header, rewritten
from qmoe_lite.checkpoint.index_file import check_inside, read_index
from qmoe_lite.checkpoint.pickles import load_pickle, load_tensors
from qmoe_lite.checkpoint.sources import DTYPES, Source, View, dequantised, method_of, whole
from qmoe_lite.checkpoint.weight_file import WeightFile, ask_for
from qmoe_lite.errors import CheckpointError, FormatError, NotFiniteError, first_line, unreadable

_KINDS = (("model.safetensors", "safetensors"), ("pytorch_model.bin", "bin"))
EXPERTS = ".experts."  # part of the name of each expert's tensors, by the model's names; of no other but of biases


class Place(NamedTuple):
    """Where a tensor's bytes lie: file, first byte, number of bytes; and what they are."""

    path: Path
    offset: int
    length: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class _Plain:
    """A tensor as it lies in a file; see `Source`."""

    def __init__(self, checkpoint: Checkpoint, stored: str) -> None:
        self._checkpoint, self._stored = checkpoint, stored

    def _part(self) -> Any:
        return self._checkpoint.look_up(
            self._stored, lambda file: file[self._stored] if isinstance(file, dict) else file.get_slice(self._stored)
        )

    @property
    def shape(self) -> tuple[int, ...]:
        part = self._part()
        return tuple(part.shape if isinstance(part, Tensor) else part.get_shape())

    @property
    def dtype(self) -> torch.dtype:
        part = self._part()
        known = part.dtype if isinstance(part, Tensor) else DTYPES.get(part.get_dtype())
        return known or self.read().dtype

    def read(self, expert: int | None = None) -> Tensor:
        if expert is not None:
            return self._part()[expert]  # type: ignore[no-any-return]
        return self._checkpoint.look_up(  # type: ignore[no-any-return]
            self._stored, lambda file: file[self._stored] if isinstance(file, dict) else file.get_tensor(self._stored)
        )


class Checkpoint:
    """The tensors of a model directory; nothing is read before it is asked for.

    Parameters
    ----------
    directory : path
        Holds config.json and model.safetensors or pytorch_model.bin, whole or in shards with an index.
    faults : list, optional
        Takes the error of a config.json that cannot be read, which is then empty. Shards may be missing too.
    variant : str, optional
        Of the weights: part of their files' names, as in `save_pretrained(variant=..)`.

    Raises
    ------
    CheckpointError
        No config.json or weights, a shard that the index names is missing, or a file that cannot be read.
    """

    def __init__(
        self, directory: Path, faults: list[CheckpointError] | None = None, variant: str | None = None
    ) -> None:
        self.directory = directory
        self._open_files: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        self._checksums: dict[str, int] = {}
        self._made_of: dict[str, list[str]] = {}  # in the files, of tensors that are made of several
        self._as_stored: dict[str, Source] = {}  # before they are converted under the same name
        self._forgotten: set[str] = set()  # by their names in the files
        self._headers: dict[Path, tuple[int, dict[str, Any]]] = {}
        self.config: dict[str, Any] = {}
        try:
            self.config = read_config_file(directory)
        except CheckpointError as error:
            if faults is None:
                raise
            faults.append(error)
        self._find_weights(variant)
        missing = [f for f in self.files if not (directory / f).is_file()]
        if missing and faults is None:
            rest = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise CheckpointError(f"{directory} lacks the shard {missing[0]}{rest}. Fetch the missing files.")
        plain: dict[str, Source] = {stored: _Plain(self, stored) for stored in self._file_of}
        self._sources = dequantised(self.config, plain)
        self._views = whole(self._sources)

    def _find_weights(self, variant: str | None) -> None:
        """Find out of which kind the files are, and which holds which tensor."""
        directory = self.directory
        for usual, self._kind in _KINDS:
            file_name = with_variant(usual, variant)
            if (directory / file_name).is_file():  # first, as transformers does: save_pretrained may leave an old index
                self._file_of = dict.fromkeys(self._open(file_name).keys(), file_name)
                break
            index = directory / with_variant(f"{usual}.index.json", variant)
            if index.is_file():
                self._file_of, self._checksums, _ = read_index(index, method_of(self.config) == "qmoe")
                break
        else:
            text = f"{directory} has no weights: neither model.safetensors nor pytorch_model.bin."
            if (directory / "noexp.pt").exists():
                text += " It is one of the paper's: run qmoe import-qmoe."
            others = {name for file in directory.glob("model.*safetensors*") if (name := variant_of(file.name))}
            for each in sorted(others):
                text += f" There are some of the variant {each}: from_pretrained(.., variant={each!r}) loads them."
            raise CheckpointError(text)

    @property
    def sources(self) -> Mapping[str, Source]:
        """What the files hold, by the names there; dequantised."""
        return self._sources

    @property
    def views(self) -> Mapping[str, View]:
        """Where each of the model's tensors lies, by the model's names."""
        return self._views

    def know_as(self, views: dict[str, View]) -> None:
        """Know the tensors by the model's names from now on, and where each lies."""
        self._views = views

    def add(self, name: str, source: Source, made_of: list[str]) -> None:
        """Take in a tensor that is made of some in the files, under the model's name of it."""
        if made_of == [name]:
            self._as_stored[name] = self._sources[name]
        else:
            self._made_of[name] = made_of
        self._sources[name] = source

    def to_write(self, name: str) -> Tensor:
        """Return what is to be stored of one tensor under the name that it has in the files."""
        stored = self.stored_name(name)
        return self._as_stored[stored].read() if stored in self._as_stored else self.tensor(name)

    def forget(self, names: Iterable[str]) -> None:
        """Leave some tensors out, as if the files did not hold them."""
        for name in names:
            stored = self._views.pop(name).stored
            self._forgotten.update(self._made_of.get(stored, [stored]))

    def check_index(self) -> None:
        """Compare the index with what the files hold; only headers are read.

        Raises
        ------
        CheckpointError
            The index names a tensor, which was not forgotten, that its file lacks; or a file is missing or damaged.
        """
        named: dict[str, set[str]] = {}
        for name in self._file_of.keys() - self._forgotten:
            named.setdefault(self._file_of[name], set()).add(name)
        for file_name in self.files:
            if lacking := sorted(named.get(file_name, set()) - self.stored_in(file_name)):
                more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
                text = f"{self.directory / file_name} lacks {lacking[0]}{more}, which the index names."
                raise CheckpointError(f"{text} Fetch the file again.")

    @property
    def names(self) -> Iterable[str]:
        """Names of all tensors, as the model knows them."""
        return self._views.keys()

    def stored_name(self, name: str) -> str:
        """Name of a tensor, or of the one that it is part of, in the files."""
        return self._views[name].stored

    def file_of(self, name: str) -> Path:
        """Return which file holds a tensor."""
        stored = self.stored_name(name)
        return self.directory / self._file_of[self._made_of.get(stored, [stored])[0]]

    @property
    def files(self) -> list[str]:
        """Names of the weight files, sorted."""
        return sorted(set(self._file_of.values()))

    def stored_in(self, file_name: str) -> set[str]:
        """Return the names of the tensors that a file holds, whatever the index says; names as they are in the file.

        Raises
        ------
        CheckpointError
            The file is missing or damaged.
        """
        return set(self._open(file_name).keys())

    def __contains__(self, name: object) -> bool:
        return name in self._views

    def _open(self, file_name: str) -> Any:
        if file_name not in self._open_files:
            path = self.directory / file_name
            if method_of(self.config) == "qmoe":  # others' models people lay out as they like
                check_inside(self.directory, file_name)
            if not path.is_file():
                raise CheckpointError(f"{self.directory} lacks the shard {file_name}. Fetch the missing file.")
            try:
                path.open("rb").close()  # safetensors calls missing whatever it cannot open
                if self._kind == "safetensors":
                    opened: Any = safe_open(path, framework="pt", device="cpu")
                else:
                    opened = load_tensors(path) if path.suffix == ".bin" else load_pickle(path)
            except CheckpointError:
                raise
            except OSError as error:
                raise unreadable(path, error) from error
            except Exception as error:  # safetensors has its own
                raise CheckpointError(f"{path} is damaged: {first_line(error)}. Fetch the file again.") from error
            if self._kind == "safetensors" and method_of(self.config) == "qmoe":
                self._header(path)
            self._open_files[file_name] = opened
        return self._open_files[file_name]

    def look_up(self, stored: str, read: Callable[[Any], Any]) -> Any:
        """Return what `read(opened file)` gives of a tensor in the files."""
        file_name = self._file_of[stored]
        try:
            return read(self._open(file_name))
        except (SafetensorError, KeyError) as error:
            raise CheckpointError(f"{self.directory / file_name} lacks {stored}, which the index names.") from error

    def _view(self, name: str) -> tuple[View, Source]:
        if name not in self._views:
            raise CheckpointError(f"{self.directory} lacks the tensor {name}. Is it the whole model?")
        view = self._views[name]
        return view, self._sources[view.stored]

    def tensor(self, name: str) -> Tensor:
        """Map one tensor into memory; no byte is read before it is touched, unless it is dequantised."""
        view, source = self._view(name)
        return view.of(source)

    def will_need(self, names: Iterable[str]) -> None:
        """Ask the system to read some tensors, of whole layers an expert's slice, ahead; nothing waits for it."""
        for name in names if self._kind == "safetensors" else ():
            view, source = self._view(name)
            for stored in self._made_of.get(view.stored, [view.stored]):
                path = self.directory / self._file_of[stored]
                start, header = self._header(path)
                (first, end), shape = (header[stored][key] for key in ("data_offsets", "shape"))
                parts = 1 if view.expert is None or shape[:1] != [source.shape[0]] else shape[0]
                size, part = (end - first) // parts, 0 if parts == 1 else view.expert
                ask_for(path, start + first + part * size, size)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of one tensor without reading it."""
        view, source = self._view(name)
        return view.shape(source.shape)

    def meta(self, name: str) -> Tensor:
        """Return an empty tensor of one tensor's shape and dtype, on the meta device; reads only the file's header."""
        return torch.empty(self.shape(name), dtype=self._view(name)[1].dtype, device="meta")

    def place(self, name: str) -> Place:
        """Return where the bytes of one tensor lie.

        Raises
        ------
        CheckpointError
            The tensor is missing, or the file is no safetensors file, or can no longer be read.
        """
        empty = self.meta(name)
        stored, path = self.stored_name(name), self.file_of(name)
        if self._kind != "safetensors":
            raise CheckpointError(f"{path} is no safetensors file: its bytes have no fixed place. Compress it again.")
        start, header = self._header(path)
        try:
            first, end = header[stored]["data_offsets"]
            if end - first != empty.nbytes and empty.dtype in DTYPES.values():  # of others torch knows no size
                raise ValueError
        except (ValueError, KeyError) as error:
            raise rewritten(path) from error
        return Place(path, start + first, end - first, empty.dtype, tuple(empty.shape))

    def _header(self, path: Path) -> tuple[int, dict[str, Any]]:
        if path not in self._headers:
            self._headers[path] = read_header(path)
        return self._headers[path]

    @property
    def has_checksums(self) -> bool:
        """Whether `compress` put CRC-32 sums into the index. A model that transformers saved again has none."""
        return bool(self._checksums)

    def checksum(self, name: str) -> int | None:
        """CRC-32 of a tensor's bytes by the index; None where it has none."""
        return self._checksums.get(self.stored_name(name))

    def pieces(self, name: str, memory: NDArray[np.uint8] | None = None) -> Iterator[memoryview]:
        """Read a tensor's bytes a piece at a time, as `WeightFile.pieces` does, where `tensor` would map them.

        Raises
        ------
        CheckpointError
            The file is no safetensors file, has become shorter, or cannot be read.
        FormatError
            After the last piece: their CRC-32 is not the one that `compress` put into the index; or it put some there
            and none for this tensor.
        """
        if self.stored_name(name) in self._made_of:
            yield self.tensor(name).reshape(-1).view(torch.uint8).numpy().data
            return
        place, crc = self.place(name), 0
        with closing(WeightFile(place.path)) as file:
            for piece in file.pieces(place.offset, place.length, memory):
                crc = zlib.crc32(piece, crc)
                yield piece
        if self.has_checksums:
            compare_checksums(name, place.path, self.checksum(name), crc)

    def fingerprint(self) -> str:
        """Hash the configuration and the names, sizes and times of the weight files."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for file_name in self.files:
            status = (self.directory / file_name).stat()
            digest.update(f"{file_name} {status.st_size} {status.st_mtime_ns}".encode())
        return digest.hexdigest()


def of_experts(name: str) -> bool:
    """Return whether a tensor is weights or codes of experts; their biases stay as they are, as dense tensors do."""
    return EXPERTS in name and not name.endswith("_bias")


def materialise(
    module: torch.nn.Module, prefix: str, checkpoint: Checkpoint, dtype: torch.dtype, without: str | None = None
) -> None:
    """Fill a module's meta parameters and persistent buffers from a checkpoint; experts are left alone.

    Parameters
    ----------
    module : torch module
        Its floating-point tensors are given `dtype`, others keep theirs.
    prefix : str
        Name of the module in the checkpoint, "" for the whole model.
    checkpoint : Checkpoint
        Where the values come from.
    dtype : torch dtype
        Of all floating-point tensors.
    without : str, optional
        Tensors whose names in the module begin so are left alone too.

    Raises
    ------
    CheckpointError
        A tensor is missing or has another shape.
    NotFiniteError
        A tensor holds NaN or infinity.
    """
    filled: dict[str, Tensor] = {}
    for name, target in module.state_dict().items():
        full = f"{prefix}.{name}" if prefix else name
        if of_experts(full) or (without is not None and name.startswith(without)):
            continue
        value = checkpoint.tensor(full)
        if value.shape != target.shape:
            found, expected = tuple(value.shape), tuple(target.shape)
            raise CheckpointError(f"{full} has shape {found} in {checkpoint.directory}; config.json says {expected}.")
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise NotFiniteError(f"{full} in {checkpoint.directory} holds NaN or infinity. Fetch it again.")
        filled[name] = value.to(dtype) if value.is_floating_point() else value
    module.load_state_dict(filled, assign=True, strict=False)
    module.requires_grad_(False)


def compare_checksums(name: str, path: Path, expected: int | None, found: int) -> None:
    """Raise FormatError where a tensor's CRC-32 is not the one in the index."""
    if found != expected:
        raise FormatError(f"{name} in {path} is damaged (checksum). Fetch or make it again.")
