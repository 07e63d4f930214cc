"""What all data sets share: probing many files in parallel, and the events that report it."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from ogreg_core.data.manifest import Row
from ogreg_core.errors import VideoError
from ogreg_core.files import write_text_atomic
from ogreg_core.progress import Progress, ProgressCallback

__all__ = [
    "PrepareReport",
    "Quarantined",
    "default_workers",
    "parallel_map",
    "probe_rows",
    "write_quarantine",
]

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Quarantined:
    """A file that was left out: its reason code (of :class:`VideoError`, or ``name``), a sentence."""

    path: str
    code: str
    detail: str


@dataclass(frozen=True)
class PrepareReport:
    """What ``prepare`` made.

    Args:
        dataset: name under which the data set is remembered.
        folder: where the manifest lies.
        videos: readable videos by split.
        classes: class names by index.
        quarantined: files left out.
    """

    dataset: str
    folder: Path
    videos: dict[str, int]
    classes: list[str]
    quarantined: list[Quarantined] = field(default_factory=list)


def default_workers() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parallel_map(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    workers: int,
    task: str,
    on_progress: ProgressCallback,
) -> list[Result]:
    """``function`` over ``items`` in order, in ``workers`` processes (0: in this one), with
    progress.
    """
    results: list[Result] = []

    def collect(found: Iterable[Result]) -> list[Result]:
        for result in found:
            results.append(result)
            on_progress(Progress(task, len(results), len(items)))
        return results

    if workers == 0 or len(items) < 2:
        return collect(map(function, items))
    with ProcessPoolExecutor(workers) as pool:
        try:
            return collect(pool.map(function, items, chunksize=4))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _probe_row(job: tuple[str, str, int]) -> Row | Quarantined:
    from ogreg_core.video import probe

    root, path, label = job
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        return Quarantined(ascii(path), "name", "the file name is not valid UTF-8; rename it")
    try:
        info = probe(Path(root) / path)
    except VideoError as error:
        return Quarantined(path, error.code, f"{error.what}. {error.why}".strip())
    return Row(
        path=path,
        label=label,
        frames=info.frames,
        fps=round(info.fps, 4),
        duration=round(info.duration, 4),
        width=info.width,
        height=info.height,
        decoder=info.decoder,
    )


def probe_rows(
    root: Path, files: Sequence[tuple[str, int]], workers: int, on_progress: ProgressCallback
) -> tuple[list[Row], list[Quarantined]]:
    """Probe (relative path, label) pairs: manifest rows of readable files, and what was left out."""
    jobs = [(str(root), path, label) for path, label in files]
    found = parallel_map(_probe_row, jobs, workers, "probe", on_progress)
    rows = [item for item in found if isinstance(item, Row)]
    return rows, [item for item in found if isinstance(item, Quarantined)]


def write_quarantine(folder: Path, items: Iterable[Quarantined]) -> None:
    """List what was left out in ``quarantine.csv``."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["path", "reason", "detail"])
    writer.writerows((item.path, item.code, item.detail) for item in items)
    write_text_atomic(folder / "quarantine.csv", buffer.getvalue())
