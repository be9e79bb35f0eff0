"""What a verification found, a finding a fault."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from qmoe_lite.errors import CheckpointError


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a compressed directory, or worth knowing.

    Attributes
    ----------
    severity : str
        "error": the model does not load, or gives wrong numbers. "note": it works.
    name : str
        The tensor, expert or setting; "" for a whole file.
    file : str
        Name of the file in the directory; "" where it is in none, or concerns them all.
    message : str
        What is wrong with it and what to do, in one line.
    """

    severity: str
    name: str
    file: str
    message: str

    def __str__(self) -> str:
        return f"{self.severity}: {'' if self.file in self.message else f'{self.file}: '}{self.message}"


@dataclass(frozen=True)
class Verification:
    """What `verification.verify_model` found.

    Attributes
    ----------
    directory : str
    findings : list of Finding
    tensors, experts : int
        Tensors, those of experts among them, and matrices of experts that were looked at.
    bytes : int
        Of these tensors.
    seconds : float
    """

    directory: str
    findings: list[Finding]
    tensors: int
    experts: int
    bytes: int
    seconds: float

    @property
    def sound(self) -> bool:
        """Whether there is no error among the findings."""
        return all(finding.severity != "error" for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {**asdict(self), "sound": self.sound}


def of_no_tensor(file: str) -> str:
    """Say of a file beside the model what it is; only what is called like a model's own is called superfluous."""
    if re.fullmatch(r"adapter(_model)?([-.].*)?\.safetensors", file):
        return f"{file} is an adapter (LoRA or the like), saved beside the model by peft. It was not checked."
    if re.match(r"model[-.]", file):
        return f"{file} belongs to no tensor of the model. It may be removed."
    return f"{file} belongs to no tensor of the model: it is not loaded, and was not checked."


class FileFault(CheckpointError):
    """A whole file cannot be read, which is said once and not of each of its tensors."""

    def __init__(self, file: str, text: str) -> None:
        super().__init__(text)
        self.file = file
