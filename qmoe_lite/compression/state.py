"""Unfinished work: the directory OUT.partial, and what an interrupted run resumes from.

`state.json` claims the directory: it names the work by a fingerprint, and lists the finished layers and what was found
of them. Beside it lie the finished layers' tensors, the activations after the last finished block, and the
encoder's output.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from qmoe_lite.checkpoint import atomic as files
from qmoe_lite.checkpoint.format import FORMAT
from qmoe_lite.checkpoint.reader import Checkpoint
from qmoe_lite.checkpoint.report import ProjectionReport
from qmoe_lite.compression.calibration import Samples
from qmoe_lite.compression.list_buffer import ListBuffer
from qmoe_lite.compression.settings import Progress, Settings
from qmoe_lite.errors import FormatError, OutputError, ResumeError, unreadable
from qmoe_lite.models.blocks import Mark
from qmoe_lite.quantization.grid import Grid

STATE_FILE = "state.json"
_NOT_DECISIVE = ("stop_when_bad", "check_first", "batch_size")
_SIZES_OF_GROUPS = ("group_size", "group_bytes")
_LARGE = 1 << 30  # bytes of a model that take a while to read


def fingerprint_of(checkpoint: Checkpoint, settings: Settings, grid: Grid, samples: Samples | None) -> str:
    """Return a digest of all that decides what a compression writes: model, settings, grid and calibration samples."""
    ignored = {*_NOT_DECISIVE, *(_SIZES_OF_GROUPS if settings.rate is None else ())}  # a rate's steps go by groups
    decisive = {name: value for name, value in asdict(settings).items() if name not in ignored}
    sizes = [(name, (checkpoint.directory / name).stat().st_size) for name in checkpoint.files]
    known = [FORMAT, checkpoint.config, sizes, decisive, grid.to_config()]
    digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode())
    if samples is not None:
        digest.update(samples.input_ids.tobytes())
        digest.update(b"" if samples.labels is None else samples.labels.tobytes())
    return digest.hexdigest()


def contents_of(
    checkpoint: Checkpoint, progress: Callable[[Progress], None], known: dict[str, list[int]] | None = None
) -> dict[str, list[int]]:
    """Return time of change, size and CRC-32 of each weight file of a model.

    Parameters
    ----------
    checkpoint : Checkpoint
        The dense model.
    progress : callable
        Told of each file of a large model.
    known : dict, file to its figures
        What an earlier call returned: a file of the same time and size is not read again.

    Raises
    ------
    CheckpointError
        A file cannot be read.
    """
    found: dict[str, list[int]] = {}
    large = sum((checkpoint.directory / name).stat().st_size for name in checkpoint.files) > _LARGE
    for name in checkpoint.files:
        path = checkpoint.directory / name
        try:
            status = path.stat()
            found[name] = (known or {}).get(name, [])
            if found[name][:2] != [status.st_mtime_ns, status.st_size]:
                if large:
                    progress(Progress(0, 1, f"reading {name}, to know it again if the run is interrupted"))
                found[name] = [status.st_mtime_ns, *files.file_sum(path)]
        except OSError as error:
            raise unreadable(path, error, "read") from error
    return found


def remove_state(directory: Path) -> None:
    """Remove what only a run that resumes needs, once the work is finished."""
    for left in [
        *directory.glob("*.zst"),
        *directory.glob("handed-*.pt"),
        directory / STATE_FILE,
    ]:  # the state last: until here a run could resume
        left.unlink(missing_ok=True)


@dataclass
class Done:
    """What is known of the finished layers; saved with the state, so that a resumed run reports them too."""

    seconds: float = 0.0

    projections: list[ProjectionReport] = field(default_factory=list)
    held_out_error: dict[str, float | None] = field(default_factory=dict)
    codebooks: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    checksums: dict[str, int] = field(default_factory=dict)
    rates: dict[str, dict[str, Any]] = field(default_factory=dict)  # what `RateControl` knows after each layer
    dead_zones: dict[str, dict[str, Any]] = field(default_factory=dict)  # and `DeadZone`
    files: dict[str, list[int]] = field(default_factory=dict)  # size and CRC-32 of each layer's file, by the layer


class Unfinished:
    """The unfinished work in a directory; made by `open`.

    Attributes
    ----------
    done : Done
        What is known of the finished layers; the run adds to it.
    stack : int
        Number of the stack that the run is in; those before are finished.
    block : int or None
        Its last block that is finished; None for none.
    model : dict, file to figures
        Of the dense model: see `contents_of`.
    lost : list of str
        Finished layers whose files are missing or damaged.
    """

    def __init__(self, directory: Path, fingerprint: str, started: float) -> None:
        self.directory, self.fingerprint = directory, fingerprint
        self.done = Done()
        self.model: dict[str, list[int]] = {}
        self.lost: list[str] = []
        self._known_until = (-1, -1)
        self._started = started
        self._position: dict[str, Any] = {}  # stack, block, and the files `hidden` and `memory`

    @classmethod
    def open(
        cls,
        directory: Path,
        fingerprint: str,
        resume: bool,
        started: float,
        contents: Callable[[dict[str, list[int]] | None], dict[str, list[int]]],
    ) -> Unfinished:
        """Make the directory, or take up what it holds.

        Parameters
        ----------
        directory : Path
            OUT.partial.
        fingerprint : str
            Of the work: see `fingerprint_of`.
        resume : bool
            False discards what the directory holds.
        started : float
            When this run began, by `time.perf_counter`.
        contents : callable
            Returns what `contents_of` does, given what is known.

        Raises
        ------
        ResumeError
            It holds other work, or its state is damaged.
        OutputError
            It cannot be made, or it holds something that no compression wrote.
        """
        self = cls(directory, fingerprint, started)
        if resume and (directory / STATE_FILE).is_file():
            self._load(contents)
            return self
        self.model = contents(None)
        try:
            if directory.exists():
                if not (directory / STATE_FILE).is_file() and any(directory.iterdir()):
                    raise OutputError(f"{directory} exists and is not ours. Move it, or name another OUT.")
                shutil.rmtree(directory)
            directory.mkdir(parents=True)
        except OSError as error:
            raise OutputError(f"{directory} cannot be made: {error.strerror}. Name another directory.") from error
        self.save()  # claims the directory
        return self

    def _load(self, contents: Callable[[dict[str, list[int]] | None], dict[str, list[int]]]) -> None:
        file = self.directory / STATE_FILE
        try:
            state: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            found, known = state.pop("fingerprint"), state.pop("model", None)
            self.done = Done(**state.pop("done"))
            self.done.projections = [ProjectionReport(**row) for row in state.pop("projections")]
        except (ValueError, KeyError, TypeError) as error:
            raise ResumeError(f"{file} is damaged. Start over with --restart.") from error
        if found != self.fingerprint:
            raise ResumeError(
                f"{self.directory} holds unfinished work of another model, text or setting. Use the same ones, or "
                f"start over with --restart."
            )
        self._position = state
        self.model = contents(known)
        changed = [name for name, figures in self.model.items() if figures[1:] != (known or {}).get(name, [])[1:]]
        if changed:
            raise ResumeError(
                f"{self.directory} holds unfinished work, and the model's {changed[0]} has changed since. Put the old "
                f"one back, or start over with --restart."
            )

    def check(self, layer_files: dict[str, Path]) -> str | None:
        """Compare all that is kept with its checksums; where some of it is bad, begin again with the first block.

        Finished layers are then read from their files, and those in `lost` computed again.

        Parameters
        ----------
        layer_files : dict, layer to Path
            Where each sparse layer is written, finished or not.

        Returns
        -------
        str or None
            What is bad, in words.
        """
        bad: list[Path] = []
        for layer in self.done.held_out_error:
            if not _is_whole(layer_files[layer], self.done.files.get(layer)):
                self.lost.append(layer)
                bad.append(layer_files[layer])
        bad += [
            self.directory / self._position[kind]
            for kind in ("hidden", "memory")
            if kind in self._position and not ListBuffer.whole(self.directory / self._position[kind])
        ]
        if (handed := self._position.get("handed")) and not _is_whole(self.directory / handed, self._position["sum"]):
            bad.append(self.directory / handed)
        if not bad:
            return None
        self._known_until = self.stack, -1 if self.block is None else self.block
        self._position = {}
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        again = f"{len(self.lost)} of {len(self.done.held_out_error)} finished layers" if self.lost else "activations"
        return f"missing or damaged in unfinished work: {bad[0]}{more}; {again} computed again"

    @property
    def stack(self) -> int:
        return int(self._position.get("stack", 0))

    @property
    def block(self) -> int | None:
        return self._position.get("block")

    @property
    def seconds(self) -> float:
        """What the work took until now, interrupted runs among it."""
        return round(self.done.seconds + time.perf_counter() - self._started, 3)

    def load_hidden(self, hidden: ListBuffer) -> None:
        """Fill a buffer with the activations after the last finished block."""
        hidden.load(self.directory / self._position["hidden"])

    def load_encoder_output(self, encoder_output: ListBuffer) -> None:
        """Fill a buffer with the finished encoder's output."""
        encoder_output.load(self.directory / self._position["memory"])

    def load_handed(self) -> dict[int, dict[Mark, Tensor]]:
        """Return what the last finished block handed on to the next one; see `BlockRunner.handed`."""
        if (name := self._position.get("handed")) is None:
            return {}
        try:
            found = torch.load(self.directory / name, weights_only=True)
            return {start: {Mark(*mark): value for mark, value in each.items()} for start, each in found.items()}
        except (OSError, RuntimeError, UnpicklingError, AttributeError, TypeError) as error:
            raise FormatError(f"{self.directory / name} is damaged. Start over with --restart.") from error

    def keep(
        self,
        stack: int,
        block: int,
        hidden: ListBuffer,
        encoder_output: ListBuffer | None,
        handed: dict[int, dict[Mark, Tensor]],
    ) -> None:
        """Make what is finished durable: an interrupted run resumes after this block.

        Nothing is written of a block before the one that was finished when the run began.
        """
        if (stack, block) < self._known_until:
            return
        old, self._position = self._position, {"stack": stack, "block": block, "hidden": f"hidden-{stack}-{block}.zst"}
        files.write_atomically(self.directory / self._position["hidden"], hidden.save)
        if encoder_output is not None:
            self._position["memory"] = f"memory-{stack}.zst"
            if old.get("memory") != self._position["memory"]:
                files.write_atomically(self.directory / self._position["memory"], encoder_output.save)
        if any(handed.values()):
            self._position["handed"] = f"handed-{stack}-{block}.pt"
            plain = {
                n: {(mark.block, mark.number): value for mark, value in each.items()} for n, each in handed.items()
            }
            files.write_atomically(self.directory / self._position["handed"], functools.partial(torch.save, plain))
            self._position["sum"] = files.file_sum(self.directory / self._position["handed"])
        self.save()
        for stale in (old.get(name) for name in ("hidden", "handed") if old.get(name) != self._position.get(name)):
            if stale is not None:
                (self.directory / stale).unlink(missing_ok=True)

    def become(self, out: Path) -> None:
        """Give the finished directory its name.

        Raises
        ------
        OutputError
            It cannot have it; the work is kept.
        """
        try:
            self.directory.rename(out)
            files.sync_directory(out.parent.resolve())
        except OSError as error:
            text = f"{self.directory} is finished but cannot become {out}: {error.strerror}. "
            raise OutputError(text + "Move the existing directory, then rerun.") from error
        remove_state(out)

    def save(self) -> None:
        """Write the state."""
        done = {**vars(self.done), "seconds": self.seconds}
        rows = [asdict(row) for row in done.pop("projections")]
        state = {"fingerprint": self.fingerprint, "model": self.model, **self._position}
        state |= {"done": done, "projections": rows}
        files.write_json(self.directory / STATE_FILE, state)


def _is_whole(file: Path, expected: list[int] | None) -> bool:
    try:
        return expected is not None and files.file_sum(file) == expected
    except OSError:
        return False
