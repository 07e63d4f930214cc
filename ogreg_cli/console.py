"""The only place that prints: results on stdout, everything else on stderr; errors and exit codes."""

from __future__ import annotations

import errno
import json
import os
import sys
import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ogreg_core.errors import EnvironmentFault, Interrupted, OgregError, OutOfMemory
from ogreg_core.progress import Note, Progress

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "Reporter",
    "emit_json",
    "explain",
    "fail",
    "info",
    "loading",
    "print_table",
    "result",
    "settings",
]

# Off a terminal a running task says something this often, and with --verbose.
_LINE_EVERY_SECONDS = 30.0
_VERBOSE_LINE_EVERY_SECONDS = 2.0
_INTERNAL_ERROR = 70


@dataclass
class Settings:
    """Verbosity, set once by the app's callback."""

    quiet: bool = False
    verbose: bool = False


settings = Settings()


def _console(stderr: bool = False) -> Console:
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    # No wrapping and no cut where a program or a log file reads.
    return Console(file=stream, soft_wrap=not stream.isatty(), highlight=False)


def result(text: str) -> None:
    """One line of the result, on stdout."""
    print(text)  # noqa: T201


def emit_json(document: Any) -> None:
    """One JSON document on one line of stdout; not-a-number becomes null."""
    print(json.dumps(_finite(document), ensure_ascii=False), flush=True)  # noqa: T201


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def info(text: str) -> None:
    """A message on stderr, silenced by --quiet."""
    if not settings.quiet:
        print(text, file=sys.stderr, flush=True)  # noqa: T201


def loading() -> None:
    """Say that the next seconds go into importing torch, where a person waits."""
    if sys.stderr.isatty():
        info("loading torch ...")


def print_table(
    title: str, header: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()
) -> None:
    """A table on stdout: boxed on a terminal, tab-separated elsewhere.

    Args:
        title: shown above on a terminal.
        header: column names.
        rows: cells as text, taken literally.
        right: columns aligned right.
    """
    if not sys.stdout.isatty():
        for row in (header, *rows):
            result("\t".join(row))
        return
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left")
    for number, name in enumerate(header):
        table.add_column(name, justify="right" if number in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    _console().print(table)


def bar(share: float, width: int = 24) -> str:
    """A bar of eighth blocks for a share in 0..1."""
    eighths = round(share * width * 8)
    return "█" * (eighths // 8) + (" ▏▎▍▌▋▊▉"[eighths % 8].strip())


class Reporter:
    """Receives core's progress events: live bars on a terminal, one line now and then elsewhere.

    Use as a context manager and pass it as ``on_progress``.
    """

    def __init__(self) -> None:
        self._live = sys.stderr.isatty() and not settings.quiet
        self._bars: Any = None
        self._tasks: dict[str, Any] = {}
        self._started: dict[str, float] = {}
        self._last_line = time.monotonic()
        self._pause = _VERBOSE_LINE_EVERY_SECONDS if settings.verbose else _LINE_EVERY_SECONDS

    def __enter__(self) -> Reporter:
        if self._live:
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bars

            self._bars = Bars(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeRemainingColumn(),
                console=_console(stderr=True),
                transient=True,
            )
            self._bars.start()
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def __call__(self, event: Progress | Note) -> None:
        if isinstance(event, Note):
            self._line(event.text)
            return
        self._started.setdefault(event.task, time.monotonic())
        figures = "  ".join(
            f"{name} {_figure(name, value)}" for name, value in event.fields.items()
        )
        if event.task == "epochs":
            self._line(f"epoch {event.done}/{event.total}  {figures}")
            return
        if self._bars is not None:
            self._draw(event, figures)
        elif event.done < event.total and time.monotonic() - self._last_line >= self._pause:
            self._line(f"{event.task}  {event.done}/{event.total}  {figures}  {self._eta(event)}")
        if event.done >= event.total:
            self._started.pop(event.task, None)

    def _draw(self, event: Progress, figures: str) -> None:
        if event.task not in self._tasks:
            self._tasks[event.task] = self._bars.add_task(event.task, total=event.total, figures="")
        task = self._tasks[event.task]
        self._bars.update(task, completed=event.done, total=event.total, figures=figures)
        if event.done >= event.total:
            self._bars.remove_task(self._tasks.pop(event.task))

    def _line(self, text: str) -> None:
        self._last_line = time.monotonic()
        if self._bars is not None:
            self._bars.console.print(text, markup=False)
        else:
            info(text)

    def _eta(self, event: Progress) -> str:
        elapsed = time.monotonic() - self._started[event.task]
        left = elapsed / max(event.done, 1) * (event.total - event.done)
        return f"eta {left:.0f} s"


def _figure(name: str, value: float) -> str:
    if name in ("top1", "top5", "mean_class", "data_wait_pct"):
        return f"{value:.1f} %"
    return f"{value:.2e}" if name == "lr" else f"{value:.3g}"


def translate(error: BaseException) -> OgregError | None:
    """Errors of libraries that have a meaning for users."""
    if isinstance(error, OgregError):
        return error
    if isinstance(error, KeyboardInterrupt):
        return Interrupted("stopped", signal_number=2)
    out_of_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if out_of_memory or "can't allocate memory" in str(error):
        return OutOfMemory(
            "the device ran out of memory",
            why=(str(error).splitlines() or [""])[0],
            fix="lower train.batch_size, data.frames or data.size",
        )
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return EnvironmentFault(
            "the disk is full", where=str(error.filename or ""), fix="free some space"
        )
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return EnvironmentFault(f"no permission for {error.filename}", fix="choose another place")
    return None


def explain(error: BaseException) -> OgregError:
    """The user-facing form of any exception, with the exit code that it leads to."""
    known = translate(error)
    if known is None:
        last = traceback.extract_tb(error.__traceback__)[-1]
        known = OgregError(
            f"unexpected {type(error).__name__}: {error}",
            where=f"{Path(last.filename).name} line {last.lineno}",
            fix="this is a bug in ogreg; run again with OGREG_DEBUG=1 and report the traceback",
        )
        known.exit_code = _INTERNAL_ERROR
        known.kind = "internal"
    return known


def fail(error: BaseException) -> int:
    """Print an error the way users are promised and return the exit code."""
    known = explain(error)
    if os.environ.get("OGREG_DEBUG"):
        traceback.print_exception(error)
    if "--json" in sys.argv:
        emit_json(error_document(known))
    lines = [f"error: {known.what}"]
    for name, text in known.details():
        if text:
            lines += [
                f"  {name if n == 0 else '':<6} {line}" for n, line in enumerate(text.splitlines())
            ]
    print("\n".join(lines), file=sys.stderr, flush=True)  # noqa: T201
    return known.exit_code


def error_document(error: OgregError) -> dict[str, Any]:
    """An error as JSON."""
    return {
        "schema": "ogreg.error.v1",
        "error": {
            "kind": error.kind,
            "code": error.exit_code,
            "what": error.what,
            "where": error.where,
            "why": error.why,
            "fix": error.fix,
        },
    }
