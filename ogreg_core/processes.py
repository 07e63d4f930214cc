"""Work on many files in worker processes, so that a crash or a hang in a native library costs one
file.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures import TimeoutError as DeadlineMissed
from dataclasses import dataclass
from typing import TypeVar

__all__ = ["Lost", "default_workers", "run_isolated"]

Job = TypeVar("Job")
Result = TypeVar("Result")

# Enough that no worker waits for the next job, few enough that memory does not grow with the jobs.
_JOBS_AHEAD = 4


@dataclass(frozen=True)
class Lost:
    """A job without a result.

    Args:
        code: ``crash`` (the process died) or ``time-out``.
        detail: one sentence.
    """

    code: str
    detail: str


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
) -> Iterator[tuple[Job, Result | Lost]]:
    """``function`` of every job, as they finish.

    Args:
        function: importable by name; its exceptions are raised here.
        jobs: picklable; taken as needed, so that a long list costs no memory here.
        workers: processes; 0 runs everything in this one, without protection.
        deadline: seconds that a job may take before its process is killed; None: as long as it
            likes.
        preload: modules to import once, before workers are forked.

    Yields:
        Each job with its result, or :class:`Lost` if its process crashed or missed the deadline.
    """
    if workers == 0:
        for job in jobs:
            yield job, function(job)
        return
    from pebble import ProcessExpired, ProcessPool

    waiting: dict[Future[Result], tuple[Job, float | None]] = {}
    source = iter(jobs)
    pool = ProcessPool(workers, context=_context(preload), initializer=_die_with_parent)
    try:
        while True:
            for job in source:
                limit = deadline(job) if deadline else None
                waiting[pool.schedule(function, args=(job,), timeout=limit)] = (job, limit)
                if len(waiting) >= workers * _JOBS_AHEAD:
                    break
            if not waiting:
                break
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                job, limit = waiting.pop(future)
                try:
                    yield job, future.result()
                except ProcessExpired as error:
                    yield job, Lost("crash", f"the process that opened it died ({_death(error)})")
                except DeadlineMissed:
                    yield job, Lost("time-out", f"not done after {limit:g} s")
        pool.close()
    finally:
        # After an error or an interrupt nothing that is under way is waited for.
        pool.stop()
        pool.join()


def _death(error: object) -> str:
    code = getattr(error, "exitcode", None)
    return f"signal {-code}" if isinstance(code, int) and code < 0 else f"exit code {code}"


def _context(preload: Sequence[str]) -> multiprocessing.context.BaseContext:
    """Never a fork of this process, whose threads may hold locks at that moment."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    return context


def _die_with_parent() -> None:
    """A worker whose main process was killed ends itself; and it writes nothing to the terminal."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    # Native libraries write about damaged files straight to file descriptor 2.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
