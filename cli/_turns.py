"""Texts that take turns on one model: a bounded queue, and one thread that makes all passes."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from typing import Any

from qmoe_lite.errors import QMoEError, first_line
from qmoe_lite.text.guards import Stopped, leaving
from qmoe_lite.text.writing import Writing


class QueueFull(Exception):
    """There is no place left in the queue."""


class Closed(Exception):
    """The server stops."""


class Job:
    """A text that a client waits for.

    Attributes
    ----------
    client : hashable
        Whose turn it is.
    writing : Writing
    over : bool
        Nobody waits for it any more: set when it has ended, and by a client that has gone, for which the model stops
        before its next block.
    """

    def __init__(self, client: Any, writing: Writing, tell: Callable[[str | Exception | None], object]) -> None:
        self.client, self.writing, self.over = client, writing, False
        self._tell = tell

    def tell(self, news: str | Exception | None) -> None:
        """Pass on a piece of text, or that the text has ended (None), or what went wrong."""
        if not self.over:
            self._tell(news)
        self.over = self.over or not isinstance(news, str)


class Turns:
    """Runs jobs: `parallel` of them take turns, pass by pass, `waiting` more wait.

    Clients take turns, and one's own jobs take turns with one another. Who has the fewest jobs under way is the next to
    begin one, and nobody takes the last place but one who has none, so that a client with many long texts keeps no
    other one from beginning. Nor from waiting: where the queue is full, who has most in it gives way to who has less.

    Parameters
    ----------
    model : transformers model
    parallel, waiting : int
        Jobs under way, whose keys and values are in memory, and jobs that wait.
    """

    def __init__(self, model: Any, parallel: int, waiting: int) -> None:
        self._model, self._parallel, self._places = model, parallel, waiting
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._under_way: OrderedDict[Any, deque[Job]] = OrderedDict()  # of each client; whose turn is next comes first
        self._now: Job | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="qmoe-passes", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Let a job wait for its turn; raise QueueFull or Closed."""
        with self._changed:
            if self._closed:
                raise Closed
            if self._count() >= self._parallel + self._places:
                self._drop()
            if self._count() >= self._parallel + self._places:
                self._make_room(job.client)
            self._waiting.append(job)
            self._changed.notify()

    def counts(self) -> tuple[int, int]:
        """Return how many jobs are under way, and how many wait."""
        with self._changed:
            self._drop()
            return sum(map(len, self._under_way.values())), len(self._waiting)

    def close(self, timeout: float) -> bool:
        """End all jobs, which are told `Closed`; return whether the thread has ended within so many seconds."""
        with self._changed:
            self._closed = True
            for job in [*self._waiting, *(job for jobs in self._under_way.values() for job in jobs)]:
                job.tell(Closed())
            self._changed.notify()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _count(self) -> int:
        return len(self._waiting) + sum(map(len, self._under_way.values()))

    def _make_room(self, client: Any) -> None:
        """Turn away the last job of who has most in the queue, or raise QueueFull where this client has as many."""
        waiting = Counter(job.client for job in self._waiting)
        most = max(waiting, key=lambda each: waiting[each], default=client)
        if waiting[most] <= waiting[client] + 1:
            raise QueueFull
        last = next(job for job in reversed(self._waiting) if job.client == most)
        last.tell(QueueFull())
        self._waiting.remove(last)

    def _drop(self) -> None:
        self._waiting = deque(job for job in self._waiting if not job.over)
        for client, jobs in list(self._under_way.items()):
            for job in [job for job in jobs if job.over]:
                jobs.remove(job)
            if not jobs:
                del self._under_way[client]

    def _run(self) -> None:
        with leaving(self._model, self._leave):
            while (job := self._next()) is not None:
                self._step(job)

    def _leave(self) -> bool:
        """Report whether nobody waits for the pass that this thread is in."""
        if threading.current_thread() is not self._thread:
            return False
        return self._closed or (self._now is not None and self._now.over)

    def _next(self) -> Job | None:
        """Wait for the job whose turn it is; None when the server stops."""
        with self._changed:
            while not self._closed:
                self._drop()
                self._admit()
                if self._under_way:
                    client, jobs = next(iter(self._under_way.items()))
                    self._under_way.move_to_end(client)
                    jobs.rotate(-1)
                    return jobs[-1]
                self._changed.wait()
        return None

    def _admit(self) -> None:
        """Let jobs begin, where there are places."""
        mine = Counter({client: len(jobs) for client, jobs in self._under_way.items()})
        while self._waiting and (free := self._parallel - mine.total()) > 0:
            job = min(self._waiting, key=lambda job: mine[job.client])
            if mine[job.client] and free == 1 < self._parallel:
                return
            self._waiting.remove(job)
            self._under_way.setdefault(job.client, deque()).append(job)
            mine[job.client] += 1

    def _step(self, job: Job) -> None:
        """Run one pass; what goes wrong in it is the job's, and the others go on."""
        self._now = job
        news: str | Exception
        try:
            news = job.writing.step()
        except Stopped:
            news = Closed()
        except QMoEError as error:
            news = error
        except Exception as error:
            news = RuntimeError(f"unexpected {type(error).__name__}: {first_line(error)}")
        finally:
            self._now = None
        if news:
            job.tell(news)
        if job.writing.finish_reason:
            job.tell(None)
