"""Opens what torch.save wrote, as data alone: nothing that is in the file runs, and nothing in it is unpacked."""

from __future__ import annotations

import errno
import re
import warnings
from pathlib import Path
from pickle import UnpicklingError
from struct import Struct
from typing import Any
from zipfile import ZIP_STORED, ZipFile, is_zipfile

import torch
from torch import Tensor

from qmoe_lite.errors import CheckpointError, first_line, unreadable

_NAME_LENGTH, _LENGTHS = (
    26,
    Struct("<HH"),
)  # place in a record's header of the lengths of its name and of what is beside it


def load_pickle(path: Path) -> Any:
    """Return what is in a file, its tensors mapped: no byte of them is read before it is touched.

    Raises
    ------
    CheckpointError
        It cannot be read, is damaged or compressed, or asks for more than tensors and plain values.
    """
    try:
        mapped, records = is_zipfile(path), dict[int, int]()
        if mapped:
            with ZipFile(path) as archive:
                _check_records(path, archive)
                records = _places(path, archive)
        else:
            _check_beginning(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about a pickle that it then refuses
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        if mapped:
            _check_storages(path, found, records)
        return found
    except CheckpointError:
        raise
    except OSError as error:
        if error.errno == errno.EINVAL:  # torch seeks before the first byte of an archive that was cut
            raise CheckpointError(f"{path} is damaged: it was truncated. Fetch the file again.") from error
        raise unreadable(path, error) from error
    except UnpicklingError as error:  # torch's words name a way to run what is in it
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        found = f"asks for {asked[1]}" if asked else "is damaged or holds other things than tensors"
        raise CheckpointError(
            f"{path} {found}: a pickle may run any program, and this one is not loaded. Fetch it again from a "
            "source that you trust, or the model's safetensors files."
        ) from error
    except Exception as error:  # zip, pickle and torch have their own
        raise CheckpointError(f"{path} is damaged: {first_line(error)}. Fetch the file again.") from error


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors in a file by name, without what else stands beside them; errors as for `load_pickle`."""
    found = load_pickle(path)
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is damaged: it holds no tensors by name. Fetch the file again.")
    return {name: value for name, value in found.items() if isinstance(name, str) and isinstance(value, Tensor)}


def check_sums(path: Path) -> None:
    """Compare all of an archive with the checksums that torch.save put there; mapping it does not.

    Raises
    ------
    CheckpointError
        It is no archive, as torch wrote none before 1.6, is damaged, or cannot be read.
    """
    bad = None
    try:
        archived = is_zipfile(path)
        if archived:
            with ZipFile(path) as archive:
                _check_records(path, archive)
                bad = archive.testzip()
    except CheckpointError:
        raise
    except OSError as error:
        raise unreadable(path, error, "read") from error
    except Exception as error:  # zipfile has its own, and lets others through
        raise CheckpointError(f"{path} is damaged: {first_line(error)}. Fetch the file again.") from error
    if not archived:
        raise CheckpointError(f"{path} is no archive that torch.save wrote, or was cut. Fetch the file again.")
    if bad is not None:
        raise CheckpointError(f"{path} is damaged: {bad} has another checksum. Fetch the file again.")


def _places(path: Path, archive: ZipFile) -> dict[int, int]:
    """Return the bytes of each record by where they begin in the file."""
    found = {}
    with path.open("rb") as file:
        for entry in archive.infolist():
            file.seek(entry.header_offset + _NAME_LENGTH)
            name, extra = _LENGTHS.unpack(file.read(_LENGTHS.size))
            found[entry.header_offset + _NAME_LENGTH + _LENGTHS.size + name + extra] = entry.file_size
    return found


def _check_storages(path: Path, found: Any, records: dict[int, int]) -> None:
    """Raise CheckpointError unless each tensor's memory is a whole record: a map would go on into the next."""
    values = found.values() if isinstance(found, dict) else ()
    tensors = (value for value in values if isinstance(value, Tensor) and value.layout is torch.strided)
    storages = (tensor.untyped_storage() for tensor in tensors)
    held = {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}
    if not held:
        return
    first = min(held)
    maps = (first - place for place, size in records.items() if size == held[first])  # where the file may be mapped
    if not any(all(records.get(address - start) == size for address, size in held.items()) for start in maps):
        raise CheckpointError(f"{path} is damaged: its tensors are not its records. Fetch the file again.")


def _check_beginning(path: Path) -> None:
    """Raise CheckpointError where a file is no pickle either: torch takes one of zeros for an archive of its own."""
    with path.open("rb") as file:
        head = file.read(2)
    if head and head[:1] != b"\x80" and head != b"PK":  # an archive that was cut is none
        zeros = " (it begins with zeros)" if not any(head) else ""
        raise CheckpointError(f"{path} is damaged: it is no file of torch's{zeros}. Fetch the file again.")


def _check_records(path: Path, archive: ZipFile) -> None:
    """Raise CheckpointError for what torch.save does not write, and what would be larger than the file."""
    entries = archive.infolist()
    if any(entry.compress_type != ZIP_STORED for entry in entries):
        raise CheckpointError(f"{path} is compressed, as torch.save writes none. Fetch it from its source.")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise CheckpointError(f"{path} is damaged: its records are larger than it. Fetch the file again.")
