"""From a listing to a prepared data set: check every file, re-encode it if asked, write the manifest.

Every file is opened in a worker process with a deadline; what is found out goes into a journal at once.
Killed at any moment, the same command goes on where it stopped and ends with the same bytes.
"""

from __future__ import annotations

import csv
import io
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ogreg_core import __version__
from ogreg_core.data.manifest import DATASET_FILE, SPLITS, Row, write_dataset
from ogreg_core.datasets.checks import (
    FileJob,
    check_file,
    copies_folder,
    copy_path,
    record_of,
    row_of,
)
from ogreg_core.datasets.gain import measure_speedup
from ogreg_core.datasets.journal import Journal, Record, Shard, claim
from ogreg_core.datasets.listing import RESIZED_MARKER, LeftOut, Listing, is_text
from ogreg_core.datasets.locations import remember
from ogreg_core.datasets.place import OUTPUTS, check_writable, choose_folder
from ogreg_core.errors import DataError, Interrupted, VideoError
from ogreg_core.files import remove_leftovers, write_text_atomic
from ogreg_core.processes import Lost, run_isolated
from ogreg_core.progress import Progress, ProgressCallback
from ogreg_core.signals import StopRequest

if TYPE_CHECKING:
    from ogreg_core.video.transcode import TranscodeSettings

__all__ = ["REASONS", "PrepareOptions", "PrepareReport", "prepare_listing"]

# Why a video is left out, as written into quarantine.csv.
REASONS = {
    "missing": "annotated, but there is no such file",
    "duplicate": "the annotation or the file is there twice",
    "name": "the file name is not valid UTF-8",
    "empty": "0 bytes",
    "not-a-video": "not a video file",
    "not-an-image": "not an image file",
    "no-video-stream": "no pictures in the file",
    "unsupported-codec": "no decoder for it",
    "truncated": "cut off",
    "frame-count": "fewer frames decode than the file promises",
    "negative-timestamps": "frames before time zero that cannot be decoded",
    "seek-unstable": "frames depend on what was read before",
    "damaged": "a frame does not decode",
    "unreadable": "the disk or its rights did not allow to read it",
    "crash": "a decoder crashed on it",
    "time-out": "not done within the deadline",
}

# Re-encoding and full verification take longer the larger the file is.
_SECONDS_PER_MEGABYTE = 20.0


@dataclass(frozen=True)
class PrepareOptions:
    """How a data set is prepared.

    Args:
        out: folder for the manifest; None: the data set's own.
        verify: ``quick`` decodes three frames of each file, ``full`` all.
        resize: re-encode to smaller copies; None: use the files as they are.
        workers: processes; 0: this one, without protection from crashes and hangs.
        deadline: seconds a quick check of one file may take; re-encoding and full verification get
            more for large files.
        shard: do only this share of the files, and write no manifest.
        merge: write the manifest from finished shards and check nothing.
        command: this command line without ``--shard`` and ``--merge``, for messages.
    """

    out: Path | None = None
    verify: Literal["quick", "full"] = "quick"
    resize: TranscodeSettings | None = None
    workers: int = 0
    deadline: float = 60.0
    shard: Shard | None = None
    merge: bool = False
    command: str = "ogreg prepare"


@dataclass(frozen=True)
class PrepareReport:
    """What ``prepare`` made.

    Args:
        dataset: name under which the data set is remembered.
        folder: where the manifest lies.
        videos: usable videos by split.
        coverage: by split, videos ``annotated``, ``found`` and usable (``videos``).
        classes: class names by index.
        left_out: what is not used, and why.
        extra: files that no annotation names.
        notes: sentences worth telling.
        checked: files opened by this call; the others were known from before.
        seconds: time that took.
        shard: the share that was done; None if the data set is complete.
        originals_bytes, copies_bytes: of the re-encoded videos, before and after.
        read_speedup: how many times faster a training clip is read from the copies, measured on a
            few files; None if nothing was re-encoded.
    """

    dataset: str
    folder: Path
    videos: dict[str, int]
    coverage: dict[str, dict[str, int]]
    classes: list[str]
    left_out: list[LeftOut] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    checked: int = 0
    seconds: float = 0.0
    shard: Shard | None = None
    originals_bytes: int = 0
    copies_bytes: int = 0
    read_speedup: float | None = None

    def reasons(self) -> dict[str, int]:
        """How many videos were left out, by reason."""
        return dict(Counter(item.code for item in self.left_out).most_common())


def prepare_listing(
    listing: Listing, options: PrepareOptions, on_progress: ProgressCallback
) -> PrepareReport:
    """Check the files of a listing and write its manifest; no file of the data set is changed.

    Args:
        listing: what the annotations and the folder say.
        options: how.
        on_progress: receives progress events.

    Raises:
        DataError: no usable video, or shards to merge are incomplete.
        EnvironmentFault: the manifest cannot be written there.
        Interrupted: by a signal; what was found out is kept.
    """
    for split, count in listing.annotated.items():
        if not count:
            raise DataError(f"the {split} annotations of {listing.root} list no videos")
    folder = choose_folder(listing, options.out)
    check_writable(folder)
    paths = list(dict.fromkeys(entry.path for entry in listing.entries))
    copies = f"-{options.resize.describe()}" if options.resize else ""
    journal = Journal(folder, f"{options.verify}{copies}", options.shard)
    if options.merge and (journal.shard_files() or not paths or paths[0] not in journal):
        if not journal.shard_files():
            raise DataError(
                "there are no shards to merge",
                where=str(folder),
                fix=f"{options.command} --shard 1/2, and so on",
            )
        journal.check_shards(paths, options.command)
    claim(folder, listing.dataset)
    for name in OUTPUTS:
        remove_leftovers(folder / name)
    started = time.perf_counter()
    checked, problems = _check_files(listing, folder, paths, journal, options, on_progress)
    seconds = time.perf_counter() - started
    report = PrepareReport(
        dataset=listing.dataset,
        folder=folder,
        videos={},
        coverage={},
        classes=listing.labels,
        extra=listing.extra,
        notes=listing.notes,
        checked=checked,
        seconds=seconds,
        shard=options.shard,
    )
    if options.shard:
        return report
    rows, left_out, sizes = _collect(listing, journal, problems)
    _write_quarantine(folder, left_out)
    if not any(rows.values()):
        (folder / DATASET_FILE).unlink(missing_ok=True)
        raise DataError(
            f"none of the videos in {listing.root} can be read",
            why=left_out[-1].detail,
            fix=f"see the reasons in {folder / 'quarantine.csv'}",
        )
    coverage = _coverage(listing, rows)
    _write(listing, folder, rows, left_out, coverage, options)
    journal.compact(paths)
    before = remember(listing.dataset, folder)
    notes = list(listing.notes)
    if before is not None:
        notes.append(f"{listing.dataset} was remembered in {before} before")
    return replace(
        report,
        videos={split: len(found) for split, found in rows.items()},
        coverage=coverage,
        left_out=left_out,
        notes=notes,
        originals_bytes=sizes[0],
        copies_bytes=sizes[1],
        read_speedup=measure_speedup(listing.root, folder, paths, journal, options.resize)
        if options.resize and (checked or options.merge)
        else None,
    )


def _check_files(
    listing: Listing,
    folder: Path,
    paths: list[str],
    journal: Journal,
    options: PrepareOptions,
    on_progress: ProgressCallback,
) -> tuple[int, dict[str, LeftOut]]:
    """Bring the journal up to date.

    Returns:
        The number of files opened, and files that cannot be opened at all by path.
    """
    problems = _without_copy(paths, options.resize) if options.resize else {}
    mine = paths
    if options.shard:
        number, count = options.shard
        mine = paths[number - 1 :: count]
    # What a full verification has found holds for a quick one as well.
    full = Journal(folder, "full") if options.verify == "quick" else None
    todo = [
        path
        for path in mine
        if path not in problems
        and _needs_work(listing.root, folder, path, journal, full, options, problems)
    ]
    if options.merge and todo:
        raise DataError(
            f"{len(todo)} files have changed since the shards were made",
            where=todo[0],
            fix=options.command,
        )
    if options.resize and todo:
        copies = folder / copies_folder(options.resize)
        copies.mkdir(parents=True, exist_ok=True)
        (copies / RESIZED_MARKER).touch()
    started, done = time.perf_counter(), 0
    with StopRequest() as stop, journal:
        jobs = (_job(listing.root, folder, path, options) for path in todo)
        for job, result in _results(jobs, options, lambda: stop.number > 0):
            if isinstance(result, Lost):
                _remove_leftover(job)
            if isinstance(result, Lost) and result.from_outside:
                problems[job.path] = LeftOut(job.path, result.code, result.detail)
            else:
                journal.add(record_of(job, result, options.deadline))
            done += 1
            rate = done / (time.perf_counter() - started)
            on_progress(Progress("check files", done, len(todo), {"files_per_s": rate}))
        if stop.number:
            share = " --shard {}/{}".format(*options.shard) if options.shard else ""
            raise Interrupted(
                f"stopped after {done} of {len(todo)} files; what was found out is kept",
                signal_number=stop.number,
                fix=f"{options.command}{share}   # goes on where it stopped",
            )
        if options.shard:
            journal.finish_shard(paths)
    return len(todo), problems


def _without_copy(paths: list[str], resize: TranscodeSettings) -> dict[str, LeftOut]:
    """Files whose copy would take the name of another one's."""
    taken: dict[str, str] = {}
    problems = {}
    for path in paths:
        copy = copy_path(path, resize)
        if copy in taken:
            detail = f"its copy would have the same name as that of {taken[copy]}; rename it"
            problems[path] = LeftOut(path, "duplicate", detail)
        taken.setdefault(copy, path)
    return problems


def _remove_leftover(job: FileJob) -> None:
    """What a process left behind that was ended in the middle of a copy."""
    if job.resize is not None:
        from ogreg_core.video.transcode import temporary_path

        temporary_path(Path(job.folder) / job.copy).unlink(missing_ok=True)


def _results(
    jobs: Iterable[FileJob], options: PrepareOptions, stopping: Callable[[], bool]
) -> Iterator[tuple[FileJob, tuple[Row, int] | VideoError | Lost]]:
    slow = options.verify == "full" or options.resize is not None

    def deadline(job: FileJob) -> float:
        return options.deadline + slow * _SECONDS_PER_MEGABYTE * job.size / 1e6

    return run_isolated(
        check_file,
        jobs,
        options.workers,
        deadline=deadline,
        preload=["ogreg_core.video"],
        stopping=stopping,
    )


def _needs_work(
    root: Path,
    folder: Path,
    path: str,
    journal: Journal,
    full: Journal | None,
    options: PrepareOptions,
    problems: dict[str, LeftOut],
) -> bool:
    """Whether a file has to be opened: neither known nor hopeless."""
    if not is_text(path):
        problems[path] = LeftOut(ascii(path), "name", "the file name is not valid UTF-8; rename it")
        return False
    try:
        status = os.stat(root / path)
    except OSError as error:
        problems[path] = LeftOut(path, "missing", f"the file cannot be opened: {error.strerror}")
        return False
    verdict = full.known(path, status.st_size, status.st_mtime_ns) if full else None
    if verdict and ("code" in verdict or not options.resize):
        journal.adopt(verdict)
    record = journal.known(path, status.st_size, status.st_mtime_ns)
    if record is None:
        return True
    return not options.merge and _retry(record, folder, options)


def _job(root: Path, folder: Path, path: str, options: PrepareOptions) -> FileJob:
    status = os.stat(root / path)
    return FileJob(
        root=str(root),
        path=path,
        size=status.st_size,
        modified_ns=status.st_mtime_ns,
        verify=options.verify,
        resize=options.resize,
        folder=str(folder),
        copy=copy_path(path, options.resize) if options.resize else "",
    )


def _retry(record: Record, folder: Path, options: PrepareOptions) -> bool:
    """Whether a known file has to be worked on all the same."""
    if "row" in record:
        if options.resize is None:
            return False
        copy = folder / record["row"]["path"]
        return not copy.is_file() or copy.stat().st_size != record["copy_size"]
    if record["code"] == "unreadable":
        return True
    # What took too long may be done with more patience.
    return record["code"] == "time-out" and options.deadline > record.get("deadline", 0.0)


def _collect(
    listing: Listing, journal: Journal, problems: dict[str, LeftOut]
) -> tuple[dict[str, list[Row]], list[LeftOut], tuple[int, int]]:
    """Manifest rows by split in the order of the annotations, what is left out, and bytes before and
    after re-encoding.
    """
    rows: dict[str, list[Row]] = {split: [] for split in SPLITS if split in listing.annotated}
    left_out = list(listing.left_out)
    before = after = 0
    for entry in listing.entries:
        if entry.path in problems:
            left_out.append(replace(problems[entry.path], split=entry.split))
            continue
        record = journal[entry.path]
        if "row" not in record:
            left_out.append(LeftOut(entry.path, record["code"], record["detail"], entry.split))
            continue
        rows[entry.split].append(row_of(record["row"], entry.label))
        if "copy_size" in record:
            before += record["size"]
            after += record["copy_size"]
    return {split: found for split, found in rows.items() if found}, left_out, (before, after)


def _coverage(listing: Listing, rows: dict[str, list[Row]]) -> dict[str, dict[str, int]]:
    found = Counter(entry.split for entry in listing.entries)
    return {
        split: {
            "annotated": listing.annotated[split],
            "found": found[split],
            "videos": len(rows.get(split, [])),
        }
        for split in SPLITS
        if split in listing.annotated
    }


def _write_quarantine(folder: Path, left_out: list[LeftOut]) -> None:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["path", "split", "reason", "detail"])
    for item in left_out:
        cells = (item.path, item.split, item.code, item.detail)
        writer.writerow([cell if is_text(cell) else ascii(cell) for cell in cells])
    write_text_atomic(folder / "quarantine.csv", buffer.getvalue())


def _write(
    listing: Listing,
    folder: Path,
    rows: dict[str, list[Row]],
    left_out: list[LeftOut],
    coverage: dict[str, dict[str, int]],
    options: PrepareOptions,
) -> None:
    from ogreg_core.datasets.overview import save_overview

    _write_or_remove(folder / "extra.txt", [path for path in listing.extra if is_text(path)])
    save_overview(folder / "overview.png", listing.dataset, listing.labels, rows)
    reasons = Counter(item.code for item in left_out)
    write_dataset(
        folder,
        dataset=listing.dataset,
        video_root=folder if options.resize else listing.root,
        labels=listing.labels,
        splits=rows,
        mirror=listing.mirror,
        options={
            **listing.options,
            "verify": options.verify,
            **({"resize": asdict(options.resize)} if options.resize else {}),
            "left_out": dict(sorted(reasons.items())),
            "extra": len(listing.extra),
        },
        coverage=coverage,
        version=__version__,
    )


def _write_or_remove(path: Path, lines: list[str]) -> None:
    if lines:
        write_text_atomic(path, "".join(f"{line}\n" for line in lines))
    else:
        path.unlink(missing_ok=True)
