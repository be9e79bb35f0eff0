"""The processes of one run: which of them this one is, and how they hand each other what they have.

`torchrun` starts one command several times, each time with another rank. A run's ranks go through the same work in the
same order; where it says `share`, `gather` or `swap`, all of them meet. Activations lie in the CPU's memory, so they
travel by gloo whatever the experts are solved on.
"""

from __future__ import annotations

import io
import os
import platform
import signal
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor

from qmoe_lite.devices import find_device
from qmoe_lite.errors import OutputError, QMoEError, RankError, first_line

T = TypeVar("T")

_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # that torchrun sets
_PATIENCE = timedelta(hours=6)  # for a rank that is silent, as while it reads all of a model; an end is noticed at once
_COMING = timedelta(minutes=10)  # in which all ranks are started
_FAREWELL = 2.0  # seconds in which a rank that ends is expected to have told why
_GO_ON = "Finished groups are kept: run the same command again."
_PIECE = 1 << 24  # bytes that two ranks hand each other at a time


class Ranks:
    """This process alone: what it is to share with the others it has already.

    Attributes
    ----------
    rank, count : int
        Which of how many.
    """

    rank, count = 0, 1

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes files and tells how far the work is."""
        return self.rank == 0

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def cuts(self, things: int) -> list[int]:
        """Return where each rank's share of a row of things begins, and where the last one ends."""
        return [-(-things * rank // self.count) for rank in range(self.count + 1)]

    def device(self, device: str | torch.device) -> torch.device:
        """Return the device of this rank: see `find_device`; a host's ranks take turns at its GPUs."""
        return find_device(device)

    def share(self, make: Callable[[], T]) -> T:
        """Return what `make` returns on the first rank, which alone calls it."""
        return make()

    def of(self, rank: int, value: T) -> T:
        """Return the value that one rank has."""
        return value

    def gather(self, value: T) -> list[T]:
        """Return the value of each rank."""
        return [value]

    def collect(self, value: T) -> list[T]:
        """Return the value of each rank on the first one, and nothing on the others."""
        return [value]

    def join(self, rows: Tensor | None) -> Tensor:
        """Return the rows of all ranks, one rank's after another's; None where a rank has none."""
        assert rows is not None
        return rows

    def meet_in(self, folder: Path) -> None:
        """Raise OutputError unless all ranks see what the first one writes into a folder."""


ALONE = Ranks()


class Together(Ranks):
    """One of several processes, by torch.distributed; a context that all of them leave together.

    Parameters
    ----------
    place : str
        Where they meet, as torch.distributed's `init_method`: "env://" for what torchrun sets.
    rank, count : int
        Which of how many; -1 where `place` says it.

    Notes
    -----
    The first rank that fails tells why, and is named; the others, whose talk with it breaks off, end quietly by
    SystemExit. Whoever is killed tells nothing: one of the others then does. SIGTERM, by which torchrun ends the others
    of a rank that failed, is taken for that.
    """

    def __init__(self, place: str = "env://", rank: int = -1, count: int = -1) -> None:
        import torch.distributed as dist
        from torch.distributed.rendezvous import rendezvous

        try:
            self._store, self.rank, self.count = next(rendezvous(place, rank, count, timeout=_COMING))
            process = {"store": self._store, "rank": self.rank, "world_size": self.count}
            dist.init_process_group("gloo", timeout=_PATIENCE, **process)
        except (RuntimeError, ValueError) as error:
            raise RankError(f"the ranks cannot meet: {first_line(error)}. Start all of them by torchrun.") from error
        self._dist = dist
        self._processes = self.gather((platform.node(), os.getpid()))

    def __enter__(self) -> Together:
        with suppress(ValueError):  # no main thread
            signal.signal(signal.SIGTERM, self._ended)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(ValueError):
            signal.signal(signal.SIGTERM, signal.SIG_DFL if error is None else signal.SIG_IGN)
        if error is None:
            self._dist.destroy_process_group()
        elif isinstance(error, KeyboardInterrupt):
            self._mark("interrupted")
        elif isinstance(error, RankError):
            self._part(error)
        elif isinstance(error, Exception):
            if not self._tells():
                raise SystemExit(1) from error
            error.args = (f"rank {self.rank} of {self.count}: {error}", *error.args[1:])

    def _ended(self, number: int, frame: object) -> None:
        raise RankError(f"this run was ended by SIGTERM. {_GO_ON}")

    def _part(self, error: RankError) -> None:
        """End after another rank: as it did where it told why, else by an error that names whoever is gone."""
        end = time.monotonic() + _FAREWELL
        while time.monotonic() < end:
            gone = self._gone()  # before it is asked what they told
            if self._marked("interrupted"):
                raise KeyboardInterrupt from error
            if gone or self._marked("told"):
                break
            time.sleep(0.05)
        if not self._tells():
            raise SystemExit(1) from error
        if gone:
            text = f"rank {gone[0]} of {self.count} ended without a word: it was killed, perhaps for lack of memory"
            error.args = (f"{text}. {_GO_ON}",)

    def _gone(self) -> list[int]:
        """Return which ranks of this host have ended."""
        here = platform.node()
        return [rank for rank, (host, process) in enumerate(self._processes) if host == here and not _lives(process)]

    def _tells(self) -> bool:
        """Return whether no other rank has told why the run ends; none will after this one."""
        with suppress(RuntimeError):
            tells = int(self._store.add("told", 1)) == 1
            if self.first:
                self._stay()
            return tells
        return self.rank == 1  # the store went with the first rank

    def _stay(self) -> None:
        """Break the talk off, and keep the store a while for the others, who ask it whether to tell."""
        self._dist.destroy_process_group()
        end = time.monotonic() + _FAREWELL
        while time.monotonic() < end and int(self._store.add("told", 0)) + len(self._gone()) < self.count:
            time.sleep(0.05)

    def _mark(self, name: str) -> None:
        with suppress(RuntimeError):
            self._store.add(name, 1)

    def _marked(self, name: str) -> bool:
        with suppress(RuntimeError):
            return bool(self._store.check([name]))
        return False

    @contextmanager
    def _talking(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # torch.distributed has no more precise one
            if isinstance(error, QMoEError) or "DefaultCPUAllocator" in str(error):
                raise
            raise RankError(f"another rank ended without a word, or is silent. {_GO_ON}") from error

    def device(self, device: str | torch.device) -> torch.device:
        found = find_device(device)
        if found.type == "cpu" or str(device) not in ("auto", "cuda"):
            return found
        local = int(os.environ.get("LOCAL_RANK", self.rank))
        return torch.device("cuda", local % torch.cuda.device_count())

    def share(self, make: Callable[[], T]) -> T:
        return self.of(0, make() if self.first else None)  # type: ignore[return-value]

    def of(self, rank: int, value: T) -> T:
        values: list[Any] = [_packed(value) if rank == self.rank else None]
        with self._talking():
            self._dist.broadcast_object_list(values, src=rank)
        return value if rank == self.rank else _unpacked(values[0])  # type: ignore[no-any-return]

    def gather(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.count
        with self._talking():
            self._dist.all_gather_object(values, _packed(value))
        return [value if rank == self.rank else _unpacked(each) for rank, each in enumerate(values)]

    def collect(self, value: T) -> list[T]:
        values: list[Any] | None = [None] * self.count if self.first else None
        with self._talking():
            self._dist.gather_object(_packed(value), values, dst=0)
        return [value if rank == 0 else _unpacked(each) for rank, each in enumerate(values or [])]

    def join(self, rows: Tensor | None) -> Tensor:
        shapes = self.gather(None if rows is None else (tuple(rows.shape), rows.dtype))
        known = [each for each in shapes if each is not None]
        counts = [0 if each is None else each[0][0] for each in shapes]
        joined = torch.empty(sum(counts), *known[0][0][1:], dtype=known[0][1])
        begin = 0
        with self._talking():
            for rank, count in enumerate(counts):
                part = joined[begin : begin + count]
                if rank == self.rank and rows is not None:
                    part.copy_(rows)
                if count:
                    self._dist.broadcast(part.reshape(-1).view(torch.uint8), src=rank)
                begin += count
        return joined

    def swap(
        self,
        take: Callable[[Tensor], Tensor],
        places: Sequence[Tensor],
        coming: Sequence[int],
        put: Callable[[int, Tensor], None],
        width: int,
        dtype: torch.dtype,
    ) -> None:
        """Hand rows to each rank and get some from each, a piece at a time.

        Parameters
        ----------
        take : callable
            Returns rows, (N, width), of this dtype, by their places.
        places : sequence of int64 tensors, one a rank
            Of the rows that it is to get.
        coming : sequence of int
            How many rows each rank has for this one.
        put : callable
            Is given rows, and the place of the first of them among all that come, the first rank's before the
            second's; each rank's arrive in order.
        width : int
            Values of a row.
        dtype : torch dtype
            Of a value.
        """
        bytes_, step = width * dtype.itemsize, max(1, _PIECE // (width * dtype.itemsize))
        begins = [sum(coming[:rank]) for rank in range(self.count)]
        for start in range(0, max(self.gather(max(map(len, places)))), step):
            parts = [each[start : start + step] for each in places]
            counts = [max(0, min(step, each - start)) for each in coming]
            sent = take(torch.cat(parts)).contiguous().view(torch.uint8).view(-1)
            got = torch.empty(sum(counts) * bytes_, dtype=torch.uint8)
            sizes = [count * bytes_ for count in counts], [len(part) * bytes_ for part in parts]
            with self._talking():
                self._dist.all_to_all_single(got, sent, *sizes)
            for begin, rows in zip(begins, torch.split(got.view(dtype).view(-1, width), counts), strict=True):
                if len(rows):
                    put(begin + start, rows)

    def send(self, pieces: Iterable[Tensor]) -> None:
        """Send tensors to the first rank, which gets them by `receive`."""
        with self._talking():
            for piece in pieces:
                self._dist.send(piece.contiguous().view(torch.uint8).view(-1), 0)

    def receive(self, rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return the next tensor that a rank sends."""
        piece = torch.empty(shape, dtype=dtype)
        with self._talking():
            self._dist.recv(piece.view(torch.uint8).view(-1), rank)
        return piece

    def meet_in(self, folder: Path) -> None:
        name, seen = self.of(0, f".qmoe-{uuid.uuid4().hex}"), True
        if self.first:
            try:
                (folder / name).touch()
            except OSError as error:
                raise OutputError(f"{folder} cannot be written: {error.strerror}. Name another directory.") from error
        try:
            self.of(0, None)  # it is there now
            seen = (folder / name).exists()
            blind = [host for host, sees in self.gather((platform.node(), seen)) if not sees]
        finally:
            if self.first:
                (folder / name).unlink(missing_ok=True)
        if blind:
            text = f"{folder.resolve()} on {blind[0]} is not the folder that the first rank writes"
            raise OutputError(f"{text}. Name an OUT on a file system that all hosts share.")


def _lives(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def _packed(value: Any) -> bytes:
    """Return any value as bytes: torch.distributed's own pickling fails on tensors of some dtypes."""
    whole = io.BytesIO()
    torch.save(value, whole)
    return whole.getvalue()


def _unpacked(whole: bytes) -> Any:
    return torch.load(io.BytesIO(whole), weights_only=False)  # it comes from another process of the same run


def ranks_of(environment: Mapping[str, str]) -> Ranks:
    """Return the ranks that torchrun started, by its variables; this process alone where there are none."""
    if not all(environment.get(name) for name in _VARIABLES) or environment["WORLD_SIZE"] == "1":
        return ALONE
    return Together()
