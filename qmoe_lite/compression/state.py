"""Unfinished work: the directory OUT.partial, and what an interrupted run resumes from.

`state.json` claims the directory: it names the work by a fingerprint, and lists the finished layers and what was found
of them. Beside it lie the finished layers' tensors, the activations after the last finished block, the encoder's
output, and the finished groups of the layer under way.
"""

from __future__ import annotations

import io
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
from qmoe_lite.checkpoint.report import FILE_NAME, ProjectionReport
from qmoe_lite.compression.dead_zone import DeadZone
from qmoe_lite.compression.groups import GroupLog
from qmoe_lite.compression.identity import difference
from qmoe_lite.compression.layer_parts import LayerResult
from qmoe_lite.compression.list_buffer import ListBuffer
from qmoe_lite.compression.ranks import ALONE, Ranks
from qmoe_lite.compression.rate import RateControl
from qmoe_lite.errors import FormatError, OutputError, ResumeError
from qmoe_lite.models.blocks import Mark, MoELayer

STATE_FILE = "state.json"


@dataclass
class Done:
    """What is known of the finished layers; saved with the state, so that a resumed run reports them too."""

    seconds: float = 0.0
    sensitivity: dict[str, float] | None = None  # what each layer quantised alone loses, where that is measured
    projections: list[ProjectionReport] = field(default_factory=list)
    held_out_error: dict[str, float | None] = field(default_factory=dict)
    codebooks: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    checksums: dict[str, int] = field(default_factory=dict)
    rates: dict[str, dict[str, Any]] = field(default_factory=dict)  # what `RateControl` knows after each layer
    dead_zones: dict[str, dict[str, Any]] = field(default_factory=dict)  # and `DeadZone`
    tuning: dict[str, dict[str, float]] = field(default_factory=dict)  # what it did to each layer
    files: dict[str, list[int]] = field(default_factory=dict)  # size and CRC-32 of each layer's file, by the layer

    def take(self, layer: MoELayer, result: LayerResult, rate: RateControl | None, zone: DeadZone | None) -> None:
        """Note what was found of a layer, and what is known after it."""
        name = layer.experts
        self.projections += result.reports
        self.codebooks[name], self.held_out_error[name] = result.codebooks, result.held_out_error
        if rate is not None:
            self.rates[name] = rate.to_json()
        if zone is not None:
            self.dead_zones[name] = zone.to_json()
        if result.tuning:
            self.tuning[name] = result.tuning


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
        Of the dense model: see `identity.contents_of`.
    lost : list of str
        Finished layers whose files are missing or damaged.
    groups : GroupLog
        Finished groups of the layer under way.
    ranks : Ranks
        Of the run: only the first one writes.
    """

    def __init__(self, directory: Path, fingerprint: dict[str, Any], started: float) -> None:
        self.directory, self.fingerprint = directory, fingerprint
        self.groups = GroupLog(directory)
        self.ranks: Ranks = ALONE
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
        fingerprint: dict[str, Any],
        resume: bool,
        started: float,
        contents: Callable[[dict[str, list[int]] | None], dict[str, list[int]]],
    ) -> Unfinished:
        """Make the directory, or take up what it holds.

        Parameters
        ----------
        directory : Path
            OUT.partial.
        fingerprint : dict
            Of the work: see `identity.fingerprint_of`.
        resume : bool
            False discards what the directory holds.
        started : float
            When this run began, by `time.perf_counter`.
        contents : callable
            Returns what `identity.contents_of` does, given what is known.

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

    @classmethod
    def open_together(cls, ranks: Ranks, layer_files: dict[str, Path], *what: Any) -> tuple[Unfinished, str | None]:
        """Let the first rank `open` and `check` the directory; all of them know what it holds, and what is bad."""

        def opened() -> tuple[Unfinished, str | None]:
            unfinished = cls.open(*what)
            return unfinished, unfinished.check(layer_files)

        found, bad = ranks.share(opened)
        found.ranks = ranks
        return found, bad

    def _load(self, contents: Callable[[dict[str, list[int]] | None], dict[str, list[int]]]) -> None:
        file = self.directory / STATE_FILE
        try:
            state: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            found, known = state.pop("fingerprint"), state.pop("model", None)
            self.done = Done(**state.pop("done"))
            self.done.projections = [ProjectionReport(**row) for row in state.pop("projections")]
        except (ValueError, KeyError, TypeError) as error:
            raise ResumeError(f"{file} is damaged. Start over with --restart.") from error
        if (other := difference(found, self.fingerprint)) is not None:
            raise ResumeError(
                f"{self.directory} holds unfinished work of another model, text or setting: {other}. Use the same "
                f"ones, or start over with --restart."
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

        Finished layers are then read from their files, and those in `lost` computed again. Where a group of the layer
        under way is bad, it alone is solved again.

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
        if self.finished and not (self.directory / FILE_NAME).is_file():
            bad.append(self.directory / FILE_NAME)
        again = f"{len(self.lost)} of {len(self.done.held_out_error)} finished layers" if self.lost else "activations"
        groups = self.groups.damaged()
        if bad:
            self._known_until = self.stack, -1 if self.block is None else self.block
            self._position = {}
        elif groups:
            bad, again = groups, "groups of experts"
        else:
            return None
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        return f"missing or damaged in unfinished work: {bad[0]}{more}; {again} computed again"

    @property
    def stack(self) -> int:
        return int(self._position.get("stack", 0))

    @property
    def block(self) -> int | None:
        return self._position.get("block")

    @property
    def finished(self) -> bool:
        """Whether everything is written, and the directory only lacks its name."""
        return bool(self._position.get("finished"))

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
        self._write(self._position["hidden"], hidden.save)
        if encoder_output is not None:
            self._position["memory"] = f"memory-{stack}.zst"
            if old.get("memory") != self._position["memory"]:
                self._write(self._position["memory"], encoder_output.save)
        handed = {start: marks for each in self.ranks.collect(handed) for start, marks in each.items()}
        if any(handed.values()):
            self._position["handed"] = f"handed-{stack}-{block}.pt"
            plain = {
                n: {(mark.block, mark.number): value for mark, value in each.items()} for n, each in handed.items()
            }
            whole = io.BytesIO()
            torch.save(plain, whole)  # not to the file: on a full disk torch fails in its own words
            self._write(self._position["handed"], lambda file: file.write_bytes(whole.getbuffer()))
            self._position["sum"] = files.file_sum(self.directory / self._position["handed"])
        self.save()
        if not self.ranks.first:
            return
        for stale in (old.get(name) for name in ("hidden", "handed") if old.get(name) != self._position.get(name)):
            if stale is not None:
                (self.directory / stale).unlink(missing_ok=True)

    def clear_groups(self, layer: int) -> None:
        """Remove the groups of a finished layer."""
        if self.ranks.first:
            self.groups.clear(layer)

    def become(self, out: Path) -> None:
        """Give the finished directory its name; before, remove what only a run that resumes needs.

        Raises
        ------
        OutputError
            It cannot have it; the work is kept.
        """
        self._position = {"finished": True}
        self.save()
        for pattern in ("*.zst", "handed-*.pt", "groups-*.log"):
            for left in self.directory.glob(pattern):
                left.unlink(missing_ok=True)
        try:
            self.directory.rename(out)
            files.sync_directory(out.parent.resolve())
        except OSError as error:
            text = f"{self.directory} is finished but cannot become {out}: {error.strerror}. "
            raise OutputError(text + "Move the existing directory, then rerun.") from error
        (out / STATE_FILE).unlink(missing_ok=True)

    def _write(self, name: str, write: Callable[[Path], object]) -> None:
        """Write a file; other ranks than the first only give what they have of it."""
        if self.ranks.first:
            files.write_atomically(self.directory / name, write)
        else:
            write(self.directory / name)

    def save(self) -> None:
        """Write the state."""
        if not self.ranks.first:
            return
        done = {**vars(self.done), "seconds": self.seconds}
        rows = [asdict(row) for row in done.pop("projections")]
        state = {"fingerprint": self.fingerprint, "model": self.model, **self._position}
        state |= {"done": done, "projections": rows}
        files.write_json(self.directory / STATE_FILE, state, indent=None)


def _is_whole(file: Path, expected: list[int] | None) -> bool:
    try:
        return expected is not None and files.file_sum(file) == expected
    except OSError:
        return False
