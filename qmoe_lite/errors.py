"""Every exception that the library raises on purpose.

QMoEError
├── ShapeError (ValueError)         an array of the wrong shape
├── DtypeError (TypeError)          an array of the wrong dtype
├── DigitError (ValueError)         a digit outside the alphabet
├── NotFiniteError (ValueError)     NaN or infinity where a number is needed
├── SettingError (ValueError)       an option outside its range, or options that exclude each other
├── CodebookError (ValueError)      counts, bits or entries that make no usable codebook
├── FormatError                     a compressed file that is truncated, forged or too new
├── CheckpointError                 a directory that is no model, a missing shard or tensor
├── UnsupportedFamilyError          a model type that models/family.py lacks
├── TextError                       calibration or evaluation text that is missing, empty or not UTF-8
├── OutputError                     an output that exists already or cannot be written
├── DeviceError (RuntimeError)      a GPU, driver or CUDA package that is missing or too old
├── BadResultError                  a compression that was to end where it goes wrong
├── RankError (RuntimeError)        another process of a run of several that has ended
└── ResumeError                     unfinished work that belongs to other settings

Each message is one line: what was found, what was expected, what to do.
"""

from __future__ import annotations

import errno
from pathlib import Path

_REMEDIES = {
    errno.EACCES: "Grant yourself read permission.",
    errno.EPERM: "Grant yourself read permission.",
    errno.EMFILE: "Raise the limit of open files: ulimit -n 4096",
    errno.ENFILE: "Raise the system's limit of open files: sysctl fs.file-max",
    errno.ENOENT: "Fetch the file again.",
}


_LONGEST = 1000  # characters of a message


class QMoEError(Exception):
    """Root of every exception that the library raises on purpose.

    A file's own words in a message neither lengthen it beyond measure nor break its line, nor speak to the terminal.
    """

    def __str__(self) -> str:
        text = super().__str__()
        if not text.isprintable():
            text = "".join(c if c.isprintable() else " " if c.isspace() else ascii(c)[1:-1] for c in text)
        return text if len(text) <= _LONGEST else f"{text[:700]} .. {text[-250:]}"


class ShapeError(QMoEError, ValueError):
    """An array has the wrong shape."""


class DtypeError(QMoEError, TypeError):
    """An array has the wrong dtype."""


class DigitError(QMoEError, ValueError):
    """A digit lies outside the codebook's alphabet."""


class NotFiniteError(QMoEError, ValueError):
    """A weight, Hessian or activation holds NaN or infinity."""


class SettingError(QMoEError, ValueError):
    """An option lies outside its range, or options exclude each other."""


class CodebookError(QMoEError, ValueError):
    """Counts, bits or entries make no usable codebook."""


class FormatError(QMoEError):
    """A compressed file is truncated, forged, or newer than this program."""


class CheckpointError(QMoEError):
    """A directory is no model, or lacks a shard or a tensor."""


class UnsupportedFamilyError(QMoEError):
    """models/family.py does not know this model type."""


class TextError(QMoEError):
    """Text is missing, empty, or not UTF-8."""


class OutputError(QMoEError):
    """An output exists already, or cannot be written."""


class DeviceError(QMoEError, RuntimeError):
    """A GPU, its driver, or a package that compiles for it is missing or too old."""


class BadResultError(QMoEError):
    """A compression whose result will be bad, and that was to end then."""


class RankError(QMoEError, RuntimeError):
    """Another process of a run of several has ended, or keeps silent."""


class ResumeError(QMoEError):
    """Unfinished work belongs to other settings than those asked for."""


def unreadable(path: Path, error: OSError, doing: str = "opened") -> CheckpointError:
    """Word why a model's file cannot be opened or read; what helps depends on why, and the file may be in order."""
    reason = error.strerror or first_line(error)
    return CheckpointError(f"{path} cannot be {doing}: {reason}. {_REMEDIES.get(error.errno or 0, 'Check the disk.')}")


def first_line(error: BaseException) -> str:
    """Return what another library's exception says in one line, to stand inside one of ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")
