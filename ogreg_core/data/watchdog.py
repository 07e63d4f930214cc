"""Which file a loader's worker was reading when it died or hung.

A decoder that crashes ends its process, and one that hangs in native code hears no signal but
SIGKILL; torch then knows a process number at best. So each worker publishes the manifest row that it
reads in shared memory. A thread watches for rows that take too long and ends their workers, and
torch's complaint about a lost worker becomes an error that names the file.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader

from ogreg_core.errors import EnvironmentFault, VideoError

__all__ = [
    "DEADLINE_SECONDS",
    "Board",
    "LostFile",
    "LostWorker",
    "publish_to",
    "reading",
    "watched",
]

# How long a worker may sit on one file while the training waits for it.
DEADLINE_SECONDS = 120.0

Result = TypeVar("Result")

_PROCESS, _BEGUN, _ROW = range(3)
_NO_ROW = -1
_MOST_TICK_SECONDS = 1.0
_GRACE_SECONDS = 2.0
# What others send. A bus error is not the decoder's either: shared memory is full, or a file shrank
# while it was read.
_FROM_OUTSIDE = {
    getattr(signal, name)
    for name in ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP", "SIGBUS")
    if hasattr(signal, name)
}
_MOST_NAMES = 8


class LostFile(VideoError, RuntimeError):
    """A file that made its worker crash or hang.

    Also a ``RuntimeError``, as everything is that torch says about a lost worker: whoever asked all
    processes to stop hears of it in the same way.
    """


class LostWorker(EnvironmentFault, RuntimeError):
    """A worker that was ended from outside, for example because memory ran out."""


class Board:
    """What the workers of one loader are reading, in shared memory.

    Args:
        workers: how many there are.
        deadline: seconds that one may sit on one file while a batch is waited for; 0: for ever.
    """

    def __init__(self, workers: int, deadline: float = DEADLINE_SECONDS) -> None:
        self.deadline = deadline
        # Per worker: process number (0: not started), files begun, manifest row or -1.
        cells = torch.zeros((workers, 3), dtype=torch.int64)
        cells[:, _ROW] = _NO_ROW
        self.cells = cells.share_memory_()

    def begin(self, worker: int, row: int) -> None:
        """Note, in worker number ``worker``, that it opens a manifest row."""
        self.cells[worker, _BEGUN] += 1
        self.cells[worker, _ROW] = row

    def end(self, worker: int) -> None:
        """Note that it is done with it."""
        self.cells[worker, _ROW] = _NO_ROW

    def processes(self) -> dict[int, int]:
        """Process numbers of the workers that have started, by worker."""
        numbers = self.cells[:, _PROCESS].tolist()
        return {worker: number for worker, number in enumerate(numbers) if number}

    def open_rows(self) -> dict[int, tuple[int, int]]:
        """What is being read, by worker: (how manieth file of this worker, manifest row)."""
        rows = enumerate(self.cells[:, _BEGUN:].tolist())
        return {worker: (begun, row) for worker, (begun, row) in rows if row != _NO_ROW}


# In a worker: its place on the board; nowhere else.
_place: tuple[Board, int] | None = None


def publish_to(board: Board, worker: int) -> None:
    """In a worker, at its start: everything read from now on is published there."""
    global _place
    _place = board, worker
    board.cells[worker, _PROCESS] = os.getpid()


@contextlib.contextmanager
def reading(row: int) -> Iterator[None]:
    """Publish that this manifest row is being read; nothing outside workers."""
    if _place is None:
        yield
        return
    board, worker = _place
    board.begin(worker, row)
    try:
        yield
    finally:
        board.end(worker)


class _Watch:
    """The main process's side of a board, while a pass over its loader is under way.

    Args:
        board: what the workers publish.
        file_of: names the file of a manifest row.
    """

    def __init__(self, board: Board, file_of: Callable[[int], str]) -> None:
        self.board = board
        self.file_of = file_of
        self.stuck: dict[int, int] = {}  # manifest row by worker
        self._explained = False
        self._children: dict[int, BaseProcess] = {}
        self._waiting = False
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def wait_for(self, function: Callable[[], Result]) -> Result:
        """Call ``function``, which waits for workers, and name the file if one of them is lost."""
        if self._thread is None and self.board.deadline:
            self._thread = threading.Thread(target=self._run, name="loader watch", daemon=True)
            self._thread.start()
        self._waiting = True
        try:
            return function()
        except (RuntimeError, OSError, EOFError) as error:
            if not isinstance(error, RuntimeError):
                # What a dying worker has sent cannot be taken over; its death may be heard of later.
                self._wait_for_a_death()
            found = _explained(error, self)
            if found is error:
                raise
            raise found  # noqa: B904 - its cause is set
        finally:
            self._waiting = False

    def _wait_for_a_death(self) -> None:
        until = time.monotonic() + _GRACE_SECONDS
        while time.monotonic() < until and all(w.is_alive() for w in self._workers().values()):
            time.sleep(0.05)

    def meet(self) -> None:
        """Get to know the workers, when they have been started."""
        self._children = {
            child.pid: child for child in multiprocessing.active_children() if child.pid
        }

    def _workers(self) -> dict[int, BaseProcess]:
        numbers = self.board.processes().items()
        return {w: self._children[number] for w, number in numbers if number in self._children}

    def close(self) -> None:
        """Stop watching."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        deadline = self.board.deadline
        tick = min(_MOST_TICK_SECONDS, deadline / 4)
        since: dict[int, tuple[tuple[int, int], float]] = {}
        before = time.monotonic()
        while not self._over.wait(tick):
            now = time.monotonic()
            # Where all processes were suspended for a while, that time is nobody's fault.
            passed, before = min(now - before, 2 * tick), now
            found = self.board.open_rows()
            since = {
                worker: (item, since[worker][1] + passed)
                if worker in since and since[worker][0] == item
                else (item, 0.0)
                for worker, item in found.items()
            }
            late = {worker: row for worker, ((_, row), s) in since.items() if s >= deadline}
            # Not while the training is busy with other things: a disk may come back meanwhile.
            if late and self._waiting:
                self.stuck = late
                workers = self._workers()
                for worker in late:
                    workers[worker].kill()
                return

    def explain(self, error: Exception) -> LostFile | LostWorker | None:
        """What torch's complaint means; None if no worker of this loader is lost. Ends the others:
        nobody will read what they load.
        """
        if self._explained:
            return None
        workers = self._workers()
        ended = {w: child.exitcode for w, child in workers.items() if child.exitcode is not None}
        if not self.stuck and not ended:
            return None
        self._explained = True
        rows = {worker: row for worker, (_, row) in self.board.open_rows().items()}
        _old_news.update(child.pid or 0 for child in workers.values())
        for child in workers.values():
            child.kill()
        if self.stuck:
            files = [self.file_of(row) for row in self.stuck.values()]
            everywhere = 1 < len(files) == len(workers)
            return _hang(files, self.board.deadline, everywhere=everywhere)
        files = [self.file_of(rows[worker]) for worker in ended if worker in rows]
        return _death(files, set(ended.values()), error)


# Passes under way in this process; a signal about a dead worker may come from any of them.
_watches: weakref.WeakSet[_Watch] = weakref.WeakSet()
# Workers whose end was explained, or brought about here; torch may complain of them later.
_old_news: set[int] = set()


def watched(loader: DataLoader[Any], board: Board, file_of: Callable[[int], str]) -> Iterator[Any]:
    """One pass over a loader whose workers publish what they read.

    Args:
        loader: with at least one worker.
        board: where its workers publish.
        file_of: names the file of a manifest row.

    Raises:
        LostFile: a file made a worker crash, or kept it for longer than the board's deadline; all
            workers have been ended.
        LostWorker: a worker was ended from outside; all others have been ended, too.
    """
    watch = _Watch(board, file_of)
    _watches.add(watch)
    try:
        if board.processes():
            watch.meet()
            iterator = watch.wait_for(lambda: iter(loader))
        else:
            # Starts the workers; a fork should find no thread of ours.
            iterator = iter(loader)
        watch.meet()
        _hear_of_deaths()
        while True:
            try:
                batch = watch.wait_for(lambda: next(iterator))
            except StopIteration:
                return
            yield batch
    finally:
        watch.close()
        _watches.discard(watch)


def _hear_of_deaths() -> None:
    """Name the file also where torch learns of a death while the training computes: it raises from
    a signal handler then, wherever the main thread is.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        return
    previous = signal.getsignal(signal.SIGCHLD)
    if not callable(previous) or isinstance(previous, _DeathHandler):
        return
    signal.signal(signal.SIGCHLD, _DeathHandler(previous))


class _DeathHandler:
    """Torch's handler of SIGCHLD, whose errors come out with the file's name."""

    def __init__(self, previous: Callable[[int, FrameType | None], Any]) -> None:
        self.previous = previous

    def __call__(self, number: int, frame: FrameType | None) -> None:
        try:
            self.previous(number, frame)
        except RuntimeError as error:
            told = re.search(r"\(pid (\d+)\)", _torch_says(error))
            if told and int(told[1]) in _old_news:
                return
            found = _explained(error)
            if found is error:
                raise
            raise found  # noqa: B904 - its cause is set


def _explained(error: Exception, first: _Watch | None = None) -> Exception:
    """The error with the file's name, or as it is if it is not about a lost worker."""
    found = _told_before(error)
    if found is not None:
        return found
    for watch in [first, *_watches] if first else list(_watches):
        found = found or watch.explain(error)
    if found is None and _torch_says(error).startswith("DataLoader worker (pid"):
        # Of a loader that is at rest.
        found = LostWorker("a loader worker was lost", why=_torch_says(error))
    if found is None:
        return error
    found.__cause__ = error
    return found


def _told_before(error: BaseException | None) -> LostFile | LostWorker | None:
    """Ours, from the signal handler, if torch has wrapped it on its way through."""
    while error is not None and not isinstance(error, (LostFile, LostWorker)):
        error = error.__cause__ or error.__context__
    return error


def _torch_says(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).splitlines() or [""])[0].strip()


def _hang(files: list[str], deadline: float, *, everywhere: bool) -> LostFile:
    why = "all workers are stuck at once: perhaps the disk, not the files" if everywhere else ""
    return LostFile(
        f"{_listed(files)}: reading did not end within {deadline:g} s",
        code="time-out",
        why=why or "its decoder hangs",
        fix=_FIX,
    )


def _death(files: list[str], statuses: set[int], error: Exception) -> LostFile | LostWorker:
    """The error about workers that ended by themselves or were killed."""
    numbers = {-status for status in statuses if status < 0}
    how = ", ".join(_signal_name(number) for number in sorted(numbers))
    if files and not numbers & _FROM_OUTSIDE:
        return LostFile(
            f"{_listed(files)}: its decoder crashed{f' ({how})' if how else ''}",
            code="crash",
            why=_torch_says(error),
            fix=_FIX,
        )
    why, fix = "another process asked it to end", "start again"
    if not numbers or getattr(signal, "SIGKILL", None) in numbers:
        why, fix = "the system does so when memory runs out", "fewer --workers"
    if getattr(signal, "SIGBUS", None) in numbers:
        why = "shared memory is full, or a file was cut while it was read"
        fix = "fewer --workers, or more shared memory (docker run --shm-size=8g)"
    return LostWorker(
        f"a loader worker was ended{f' by {how}' if how else ''}",
        where=f"while it read {_listed(files)}" if files else "",
        why=f"{why}; torch: {_torch_says(error)}",
        fix=fix,
    )


def _signal_name(number: int) -> str:
    known = {member.value: member.name for member in signal.Signals}
    return known.get(number, f"signal {number}")


_FIX = (
    "run `ogreg prepare` again with --verify full, which puts such files into quarantine.csv, "
    "or remove the line from the manifest"
)


def _listed(files: list[str]) -> str:
    more = len(files) - _MOST_NAMES
    return ", ".join(files[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
