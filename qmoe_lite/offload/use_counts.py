"""How often each expert was used, kept between runs of a model: the next one begins with those used most."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qmoe_lite.checkpoint.atomic import write_json
from qmoe_lite.checkpoint.json_file import read_json
from qmoe_lite.checkpoint.reader import Checkpoint
from qmoe_lite.errors import QMoEError

COUNTS_FILE = "expert_counts.json"


@dataclass
class UseCounts:
    """Use counts that outlive the process. Names are settled at the start: the model's directory may go."""

    model: str
    files: list[Path]  # beside the model, else in the user's cache directory
    uses: NDArray[np.float64]

    @classmethod
    def of(cls, checkpoint: Checkpoint, uses: NDArray[np.float64]) -> UseCounts:
        """Return the counts of a checkpoint's model; `uses` are a cache's, which go on counting."""
        model = checkpoint.fingerprint()
        files = [checkpoint.directory / COUNTS_FILE]
        with suppress(RuntimeError):  # a user without a home, as in a container
            cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qmoe-lite"
            files.append(cache / f"{model[:32]}.{COUNTS_FILE}")
        return cls(model, files, uses)

    def load(self) -> NDArray[np.float64] | None:
        """Return what an earlier run kept, None where there is nothing of this model."""
        for file in self.files:
            try:
                found = read_json(file)
                counts = np.array(found["counts"], dtype=np.float64)
                if found["model"] == self.model and counts.shape == self.uses.shape and (counts >= 0).all():
                    return counts
            except (OSError, ValueError, KeyError, TypeError):  # none yet, or of another model: it is only a hint
                continue
        return None

    def save(self) -> None:
        """Keep half of what was counted: older runs fade."""
        if not self.uses.any() or not self.files[0].parent.is_dir():
            return
        content = {"model": self.model, "counts": np.round(self.uses / 2, 3).tolist()}
        for file in self.files:
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                write_json(file, content)
            except (OSError, QMoEError):  # a hint is not worth an error at the end of a run
                continue
            return
