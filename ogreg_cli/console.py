"""The only place that prints: results on stdout, everything else on stderr; errors and exit codes."""

from __future__ import annotations

import errno
import json
import os
import sys
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ogreg_cli.imports import uncollected
from ogreg_core.errors import (
    EnvironmentFault,
    Interrupted,
    LostPeer,
    OgregError,
    OutOfMemory,
    is_lost_peer,
    is_out_of_memory,
)
from ogreg_core.progress import Note, Progress

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

__all__ = [
    "Reporter",
    "clock",
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
# The live view: often enough for the eye, too seldom to flicker.
_REFRESHES_PER_SECOND = 4.0
_BAR_WIDTH = 20
# From this width on, figures stand in the line of their task.
_WIDE = 140
_ETA_WIDTH = len("eta 0:00:00")
# The task that stands for all epochs.
_WHOLE = "training"
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
    """Import torch, and say so where a person waits for it."""
    if sys.stderr.isatty():
        info("loading torch ...")
    with uncollected():
        import torch  # noqa: F401


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


@dataclass
class _Running:
    """A task under way: its last event, and when and where its first one was."""

    event: Progress
    first: int
    started: float
    heard: float

    @property
    def counted(self) -> str:
        """How much of how much."""
        return f"{self.event.done:,}/{self.event.total:,}"

    @property
    def eta(self) -> str:
        """The time that the rest will take at the mean pace so far; nothing before a pace is known."""
        done = self.event.done - self.first
        if done <= 0:
            return ""
        left = (self.heard - self.started) / done * (self.event.total - self.event.done)
        return f"eta {clock(left)}"


class Reporter:
    """Receives core's progress events: a live view on a terminal, one line now and then elsewhere.

    Use as a context manager and pass it as ``on_progress``.

    Args:
        silent: say nothing at all; for all but the main process of a job.
        console: draw on this one instead of stderr.
    """

    def __init__(self, *, silent: bool = False, console: Console | None = None) -> None:
        self._silent = silent
        self._console = console
        self._view: Live | None = None
        self._running: dict[str, _Running] = {}
        self._last_line = time.monotonic()
        self._pause = _VERBOSE_LINE_EVERY_SECONDS if settings.verbose else _LINE_EVERY_SECONDS

    def __enter__(self) -> Reporter:
        if self._silent or settings.quiet or not (self._console or sys.stderr.isatty()):
            return self
        from rich.live import Live

        console = self._console or _console(stderr=True)
        if console.is_terminal and not console.is_dumb_terminal:
            self._view = Live(
                get_renderable=lambda: _draw(tuple(self._running.values()), console.width),
                console=console,
                refresh_per_second=_REFRESHES_PER_SECOND,
                transient=True,
                redirect_stdout=sys.stdout.isatty(),
            )
            self._view.start()
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        if self._view is not None:
            # The last frame is wiped; what has ended need not be drawn once more.
            self._running.clear()
            self._view.stop()
            self._view = None

    def __call__(self, event: Progress | Note) -> None:
        if self._silent:
            return
        if isinstance(event, Note):
            self._say([event.text])
            return
        if event.task == "epochs":
            names = {"loss": "val_loss"} if "train_loss" in event.fields else {}
            figures = _figures({names.get(key, key): v for key, v in event.fields.items()})
            self._say([f"epoch {event.done}/{event.total}", *figures])
            return
        task = self._note(event)
        if self._view is None and event.done < event.total and self._is_time(task):
            whole = self._running.get(_WHOLE)
            parts = [event.task, task.counted, *_figures(event.fields)]
            parts += [task.eta] if task.eta else []
            parts += (
                [f"whole {_WHOLE} {whole.eta}"] if whole and whole.eta and whole is not task else []
            )
            self._say(parts)

    def _note(self, event: Progress) -> _Running:
        """Remember how far a task is; forget it when it has ended."""
        now = time.monotonic()
        task = self._running.get(event.task)
        if task is None or event.done < task.event.done:
            # A resumed task begins in the middle: its pace is counted from there.
            task = _Running(event, event.done, now, now)
        task = replace(task, event=event, heard=now)
        if event.done < event.total:
            self._running[event.task] = task
        else:
            self._running.pop(event.task, None)
        return task

    def _is_time(self, task: _Running) -> bool:
        """Whether a line is due; what the whole training has to say stands in those of its parts."""
        if task.event.task == _WHOLE and (len(self._running) > 1 or not task.eta):
            return False
        return time.monotonic() - self._last_line >= self._pause

    def _say(self, parts: Sequence[str]) -> None:
        """One event on a line of its own, above the live view; folded between figures, not within."""
        self._last_line = time.monotonic()
        if self._view is None:
            info("  ".join(parts))
            return
        from rich.text import Text

        console = self._view.console
        console.print(Text("\n".join(_fold(parts, console.width))))


def _draw(tasks: Sequence[_Running], width: int) -> RenderableType:
    """The live view: a line per task, its figures behind it, or below it where they do not fit."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    if not tasks:
        return Group()
    tasks = sorted(tasks, key=lambda task: task.event.task == _WHOLE)
    figures: dict[str, list[str]] = {}
    for task in tasks:
        parts = _figures(task.event.fields)
        # An epoch and the whole training may tell the same ones.
        figures[task.event.task] = [] if parts in figures.values() else parts
    texts = [(task.event.task, task.counted, task.eta.ljust(_ETA_WIDTH)) for task in tasks]
    taken = sum(max(map(len, column)) + 1 for column in zip(*texts, strict=True))
    beside = width >= _WIDE
    bar_width = _BAR_WIDTH if beside else max(min(width - taken, 2 * _BAR_WIDTH), 4)
    table = Table.grid(padding=(0, 1, 0, 0))
    for justify in ("left", "left", "right", "left", "left"):
        table.add_column(justify=justify, no_wrap=True)
    below: list[Text] = []
    for task, (name, counted, eta) in zip(tasks, texts, strict=True):
        parts = figures[name]
        bar = ProgressBar(max(task.event.total, 1), task.event.done, width=bar_width)
        end = Text("  ".join(parts) if beside else "")
        table.add_row(Text(name), bar, Text(counted), Text(eta), end)
        if not beside:
            below += [Text(line, no_wrap=True) for line in _fold(parts, width)]
    return Group(table, *below)


def _fold(parts: Sequence[str], width: int) -> list[str]:
    """Two spaces between the parts; a part that does not fit begins a new line, indented."""
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + 2 + len(part) <= width:
            lines[-1] += f"  {part}"
        else:
            lines.append(f"  {part}" if lines else part)
    return lines


def clock(seconds: float) -> str:
    """Hours, minutes and seconds, for example ``0:03:20``; with days where there are some."""
    return str(timedelta(seconds=round(seconds)))


_FIGURES = {
    "loss": "loss {:.3f}",
    "train_loss": "train loss {:.3f}",
    "val_loss": "val loss {:.3f}",
    "top1": "top-1 {:.1f} %",
    "top5": "top-5 {:.1f} %",
    "mean_class": "mean class {:.1f} %",
    "ece": "ECE {:.1f} %",
    "lr": "lr {:.2e}",
    "clips_per_s": "{:,.1f} clips/s",
    "files_per_s": "{:,.1f} files/s",
    "memory_mb": "{:,.0f} MB",
    "data_wait_pct": "waiting {:.0f} %",
}


def _figures(fields: Mapping[str, float]) -> list[str]:
    """Figures in words, with their units; what is not a number is left out."""
    return [
        _FIGURES[name].format(value) if name in _FIGURES else f"{name} {value:.3g}"
        for name, value in fields.items()
        if value == value
    ]


def translate(error: BaseException) -> OgregError | None:
    """Errors of libraries that have a meaning for users."""
    if isinstance(error, OgregError):
        return error
    if isinstance(error, KeyboardInterrupt):
        return Interrupted("stopped", signal_number=2)
    if is_lost_peer(error):
        return LostPeer(
            "another process of the job has ended",
            fix="look for its error above, or for that of the launcher",
        )
    if is_out_of_memory(error):
        return OutOfMemory(
            "the device ran out of memory",
            why=str(error).partition("\n")[0],
            fix="fewer videos at a time (--batch-size 1), fewer --clips and --crops, or --device cpu",
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
        frames = traceback.extract_tb(error.__traceback__)
        known = OgregError(
            f"unexpected {type(error).__name__}: {error}",
            where=f"{Path(frames[-1].filename).name} line {frames[-1].lineno}" if frames else "",
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
