"""Opens what torch.save wrote, as data alone: nothing that is in the file runs, and nothing in it is unpacked."""

from __future__ import annotations

import errno
import re
import warnings
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import ZIP_STORED, ZipFile, is_zipfile

import torch

from qmoe_lite.errors import CheckpointError, first_line, unreadable


def load_pickle(path: Path) -> Any:
    """Return what is in a file, its tensors mapped: no byte of them is read before it is touched.

    Raises
    ------
    CheckpointError
        It cannot be read, is damaged or compressed, or asks for more than tensors and plain values.
    """
    try:
        mapped = is_zipfile(path)
        if mapped:
            with ZipFile(path) as archive:
                packed = any(entry.compress_type != ZIP_STORED for entry in archive.infolist())
            if packed:  # torch.save compresses nothing, and a little of it could fill the memory
                raise CheckpointError(f"{path} is compressed, as torch.save writes none. Fetch it from its source.")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about a pickle that it then refuses
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
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
