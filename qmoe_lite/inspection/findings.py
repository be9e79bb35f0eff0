"""What a verification found, a finding a fault."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


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
