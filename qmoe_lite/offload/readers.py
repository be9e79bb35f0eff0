"""Threads that read experts' codes from a model's files, the urgent ones first."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from qmoe_lite.checkpoint.weight_file import THREADS
from qmoe_lite.errors import QMoEError


@dataclass(eq=False)
class Read:
    """One expert's codes on their way into a slot.

    `work` gives their bytes; `error` is set if they did not arrive. `early`: it began before the expert was wanted.
    """

    work: Callable[[], int]
    urgent: bool
    early: bool = False
    nbytes: int = 0
    started: bool = False
    done: bool = False
    error: QMoEError | None = field(default=None)


class Readers:
    """Threads that do reads: urgent ones first, else in the order in which they were asked for.

    Attributes
    ----------
    closed : bool
        The threads have been told to end: no read that has not begun will be done.
    """

    def __init__(self, threads: int = THREADS) -> None:
        self._changed = threading.Condition()
        self._urgent: deque[Read] = deque()
        self._later: deque[Read] = deque()
        self.closed = False
        self._process = os.getpid()
        self._threads = [threading.Thread(target=self._work, daemon=True, name=f"experts-{i}") for i in range(threads)]
        for thread in self._threads:
            thread.start()

    def submit(self, read: Read) -> None:
        """Let a read be done.

        Raises
        ------
        QMoEError
            This is a forked process.
        """
        self._check_process()
        with self._changed:
            (self._urgent if read.urgent else self._later).append(read)
            self._changed.notify_all()

    def hurry(self, read: Read) -> None:
        """Let a read that could wait come before the others."""
        with self._changed:
            if not read.urgent and not read.started and not self.closed:
                self._later.remove(read)
                self._urgent.append(read)
            read.urgent = True

    def cancel(self, read: Read) -> bool:
        """Take back a read that no thread has begun; return whether that was so."""
        with self._changed:
            if read.started or self.closed:
                return False
            (self._urgent if read.urgent else self._later).remove(read)
            return True

    def wait(self, reads: list[Read]) -> None:
        """Wait until one of them is done, or the threads end; raise QMoEError in a forked process."""
        self._check_process()
        with self._changed:
            self._changed.wait_for(lambda: self.closed or any(read.done for read in reads))

    def close(self) -> None:
        """Finish the reads that have begun, drop the others, end the threads."""
        if os.getpid() != self._process:  # a fork has none of the threads, and a lock as it happened to be
            return
        with self._changed:
            self.closed = True
            self._urgent.clear()
            self._later.clear()
            self._changed.notify_all()
        if threading.current_thread() in self._threads:  # the collector may end a forgotten model in any thread
            return
        for thread in self._threads:
            thread.join()

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise QMoEError("this process was forked without the threads that read experts. Load the model in it.")

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self.closed or self._urgent or self._later)
                if self.closed:
                    return
                read = (self._urgent or self._later).popleft()
                read.started = True
            try:
                read.nbytes = read.work()
            except QMoEError as error:
                read.error = error
            except Exception as error:  # would be lost with the thread, and the model wait for ever
                read.error = QMoEError(f"an expert could not be read: {error!r}. Please report this as a bug.")
            with self._changed:
                read.done = True
                self._changed.notify_all()
            del read  # its work holds the model
