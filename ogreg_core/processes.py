"""Work on many files in worker processes, so that a crash or a hang in a native library costs one
file.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures import TimeoutError as DeadlineMissed
from dataclasses import dataclass
from multiprocessing import forkserver
from typing import TypeVar

__all__ = ["Lost", "default_workers", "end_with_parent", "run_isolated", "silence_native_code"]

Job = TypeVar("Job")
Result = TypeVar("Result")

# Enough that no worker waits for the next job, few enough that memory does not grow with the jobs.
_JOBS_AHEAD = 4
_ASK_SECONDS = 0.5
_SIGNALS_OF_GROUPS = {
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)
}


@dataclass(frozen=True)
class Lost:
    """A job without a result.

    Args:
        code: ``crash`` (the process died) or ``time-out``.
        detail: one sentence.
        from_outside: whether it was ended by a signal that others send (SIGKILL, SIGTERM), for
            example because memory ran out; the job may be as good as any.
    """

    code: str
    detail: str
    from_outside: bool = False


def default_workers() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_isolated(
    function: Callable[[Job], Result],
    jobs: Iterable[Job],
    workers: int,
    *,
    deadline: Callable[[Job], float] | None = None,
    preload: Sequence[str] = (),
    stopping: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[Job, Result | Lost]]:
    """``function`` of every job, as they finish.

    Args:
        function: importable by name; its exceptions are raised here.
        jobs: picklable; taken as needed, so that a long list costs no memory here.
        workers: processes; 0 runs everything in this one, without protection.
        deadline: seconds that a job may take before its process is killed; None: as long as it
            likes.
        preload: modules to import once, before workers are forked.
        stopping: asked twice a second; once it is true, work under way is given up and the results
            end.

    Yields:
        Each job with its result, or :class:`Lost` if its process crashed or missed the deadline.
    """
    if workers == 0:
        for job in jobs:
            if stopping():
                return
            yield job, function(job)
        return
    from pebble import ProcessExpired, ProcessPool

    waiting: dict[Future[Result], tuple[Job, float | None]] = {}
    source = iter(jobs)
    pool = ProcessPool(workers, context=_context(preload), initializer=_start_worker)
    try:
        while True:
            for job in source:
                limit = deadline(job) if deadline else None
                waiting[pool.schedule(function, args=(job,), timeout=limit)] = (job, limit)
                if len(waiting) >= workers * _JOBS_AHEAD:
                    break
            if not waiting:
                break
            for future in wait(waiting, _ASK_SECONDS, FIRST_COMPLETED).done:
                job, limit = waiting.pop(future)
                try:
                    yield job, future.result()
                except ProcessExpired as error:
                    lost = _lost(error)
                    # Of a signal to everybody, the death of a worker may be heard of first.
                    if lost.from_outside:
                        time.sleep(_ASK_SECONDS)
                    if stopping():
                        return
                    yield job, lost
                except DeadlineMissed:
                    yield job, Lost("time-out", f"not done after {limit:g} s")
            if stopping():
                return
        pool.close()
    finally:
        # After an error or an interrupt nothing that is under way is waited for.
        pool.stop()
        pool.join()


def _lost(error: object) -> Lost:
    code = getattr(error, "exitcode", None)
    signal_number = -code if isinstance(code, int) and code < 0 else 0
    how = f"signal {signal_number}" if signal_number else f"exit code {code}"
    # 255 is what a fork server says of a child whose end it did not see.
    outside = signal_number in (signal.SIGTERM, getattr(signal, "SIGKILL", 9)) or code == 255
    return Lost("crash", f"the process that opened it died ({how})", outside)


def _context(preload: Sequence[str]) -> multiprocessing.context.BaseContext:
    """Never a fork of this process, whose threads may hold locks at that moment."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    # The server keeps the mask: a signal to the whole process group is this process's to answer.
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS_OF_GROUPS)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
    return context


def _start_worker() -> None:
    """A worker is out of its main process's group, and writes nothing to the terminal."""
    end_with_parent()
    if hasattr(os, "setsid"):
        # Out of the group that signals are sent to, and open to those that are sent to us alone.
        os.setsid()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS_OF_GROUPS)
    silence_native_code()


def silence_native_code() -> None:
    """Libraries write about damaged files straight to file descriptor 2; from now on to nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)


def end_with_parent() -> None:
    """End this worker as soon as the process that asked for it has gone, even by SIGKILL; nothing happens
    in a process that is no worker.

    Who forked it is no sign: a fork server lives as long as its workers do.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
