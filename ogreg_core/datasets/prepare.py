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
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ogreg_core import __version__
from ogreg_core.data.manifest import SPLITS, Row, write_dataset
from ogreg_core.datasets.checks import FileJob, check_file, copies_folder, copy_path, record_of
from ogreg_core.datasets.journal import Journal, Record, Shard, has_journal
from ogreg_core.datasets.listing import RESIZED_MARKER, LeftOut, Listing
from ogreg_core.datasets.locations import remember
from ogreg_core.errors import DataError, EnvironmentFault, Interrupted, VideoError
from ogreg_core.files import write_text_atomic
from ogreg_core.processes import Lost, run_isolated
from ogreg_core.progress import Progress, ProgressCallback
from ogreg_core.signals import StopRequest

if TYPE_CHECKING:
    from ogreg_core.video.transcode import TranscodeSettings

__all__ = ["REASONS", "PrepareOptions", "PrepareReport", "check_writable", "prepare_listing"]

# Why a video is left out, as written into quarantine.csv.
REASONS = {
    "missing": "annotated, but there is no such file",
    "duplicate": "the annotation or the file is there twice",
    "name": "the file name is not valid UTF-8",
    "empty": "0 bytes",
    "not-a-video": "not a video file",
    "no-video-stream": "no pictures in the file",
    "unsupported-codec": "no decoder for it",
    "truncated": "cut off",
    "frame-count": "fewer frames decode than the file promises",
    "negative-timestamps": "frames before time zero that cannot be decoded",
    "seek-unstable": "frames depend on what was read before",
    "damaged": "a frame does not decode",
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
    folder = _choose_folder(listing, options.out)
    check_writable(folder)
    paths = list(dict.fromkeys(entry.path for entry in listing.entries))
    work = f"probe-{options.verify}"
    if options.resize:
        work += f"-{options.resize.describe()}"
    journal = Journal(folder, work, options.shard)
    if options.merge:
        journal.check_shards(paths, options.command)
    started = time.perf_counter()
    checked, problems, encoded = _check_files(listing, folder, paths, journal, options, on_progress)
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
    rows, left_out, sizes = _collect(listing, folder, journal, problems)
    if not any(rows.values()):
        broken = [item for item in left_out if item.code not in ("missing", "duplicate")]
        raise DataError(
            f"none of the videos in {listing.root} can be read",
            why=broken[0].detail if broken else "",
        )
    coverage = _coverage(listing, rows)
    _write(listing, folder, rows, left_out, coverage, options)
    journal.compact(paths)
    remember(listing.dataset, folder)
    return replace(
        report,
        videos={split: len(found) for split, found in rows.items()},
        coverage=coverage,
        left_out=left_out,
        originals_bytes=sizes[0],
        copies_bytes=sizes[1],
        read_speedup=_measure_speedup(listing.root, folder, encoded, options.resize)
        if encoded
        else None,
    )


# Our files that may carry the name of somebody's annotations.
_OUTPUTS = (*(f"{split}.csv" for split in SPLITS), "labels.txt", "dataset.json")


def _choose_folder(listing: Listing, out: Path | None) -> Path:
    """Where the manifest goes: ``out``, else the data set's folder, else one inside it.

    Raises:
        DataError: ``out`` holds files of somebody else that would be overwritten.
    """
    if out is not None:
        folder = out.expanduser().resolve()
        if foreign := _foreign_file(folder):
            raise DataError(
                f"{foreign} would be overwritten",
                why="it is not of a manifest that ogreg wrote",
                fix="--out NEW_FOLDER",
            )
        return folder
    root = listing.root.resolve()
    return root / "ogreg-manifest" if _foreign_file(root) else root


def _foreign_file(folder: Path) -> Path | None:
    """A file that bears the name of one of ours in a folder that is not ours."""
    if has_journal(folder):
        return None
    return next((folder / name for name in _OUTPUTS if (folder / name).exists()), None)


def check_writable(folder: Path) -> None:
    """Refuse a folder that the manifest cannot be written to.

    Raises:
        EnvironmentFault: it cannot be created, or is read-only.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentFault(f"{folder} cannot be created", why=str(error)) from error
    # Mode bits, not os.access: root may write into read-only folders, and should not.
    if not folder.stat().st_mode & 0o200 or not os.access(folder, os.W_OK):
        raise EnvironmentFault(
            f"{folder} is read-only",
            why="the manifest is written there",
            fix="add --out FOLDER_FOR_THE_MANIFEST",
        )


def _check_files(
    listing: Listing,
    folder: Path,
    paths: list[str],
    journal: Journal,
    options: PrepareOptions,
    on_progress: ProgressCallback,
) -> tuple[int, dict[str, LeftOut], list[tuple[str, str]]]:
    """Bring the journal up to date.

    Returns:
        The number of files opened, files that cannot be opened by path, and (original, copy) of what
        was re-encoded.
    """
    problems: dict[str, LeftOut] = {}
    mine = paths
    if options.shard:
        number, count = options.shard
        mine = paths[number - 1 :: count]
    jobs = [
        job for path in mine if (job := _job(listing, folder, path, journal, options, problems))
    ]
    if options.merge and jobs:
        raise DataError(
            f"{len(jobs)} files have changed since the shards were made",
            where=jobs[0].path,
            fix=options.command,
        )
    if options.resize and jobs:
        copies = folder / copies_folder(options.resize)
        copies.mkdir(parents=True, exist_ok=True)
        (copies / RESIZED_MARKER).touch()
    encoded = []
    with StopRequest() as stop, journal:
        started = time.perf_counter()
        for done, (job, result) in enumerate(_results(jobs, options), 1):
            record = record_of(job, result, options.deadline)
            journal.add(record)
            if options.resize and "row" in record:
                encoded.append((job.path, job.copy))
            rate = done / (time.perf_counter() - started)
            on_progress(Progress("check files", done, len(jobs), {"files_per_s": rate}))
            if stop.number:
                raise Interrupted(
                    f"stopped after {done} of {len(jobs)} files; what was found out is kept",
                    signal_number=stop.number,
                    fix=f"{options.command}   # goes on where it stopped",
                )
        if options.shard:
            journal.finish_shard(paths)
    return len(jobs), problems, encoded


def _results(
    jobs: list[FileJob], options: PrepareOptions
) -> Iterator[tuple[FileJob, tuple[Row, int] | VideoError | Lost]]:
    slow = options.verify == "full" or options.resize is not None

    def deadline(job: FileJob) -> float:
        return options.deadline + slow * _SECONDS_PER_MEGABYTE * job.size / 1e6

    return run_isolated(
        check_file, jobs, options.workers, deadline=deadline, preload=["ogreg_core.video"]
    )


def _job(
    listing: Listing,
    folder: Path,
    path: str,
    journal: Journal,
    options: PrepareOptions,
    problems: dict[str, LeftOut],
) -> FileJob | None:
    """The work that a file needs; None if it is known or hopeless."""
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        problems[path] = LeftOut(ascii(path), "name", "the file name is not valid UTF-8; rename it")
        return None
    try:
        status = os.stat(listing.root / path)
    except OSError as error:
        problems[path] = LeftOut(path, "missing", f"the file cannot be opened: {error.strerror}")
        return None
    record = journal.known(path, status.st_size, status.st_mtime_ns)
    if record and not _retry(record, folder, options):
        return None
    return FileJob(
        root=str(listing.root),
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
    # What took too long may be done with more patience.
    return record["code"] == "time-out" and options.deadline > record.get("deadline", 0.0)


def _collect(
    listing: Listing, folder: Path, journal: Journal, problems: dict[str, LeftOut]
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
        record = journal.records[entry.path]
        if "row" not in record:
            left_out.append(LeftOut(entry.path, record["code"], record["detail"], entry.split))
            continue
        rows[entry.split].append(Row(label=entry.label, **record["row"]))
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


def _write(
    listing: Listing,
    folder: Path,
    rows: dict[str, list[Row]],
    left_out: list[LeftOut],
    coverage: dict[str, dict[str, int]],
    options: PrepareOptions,
) -> None:
    from ogreg_core.datasets.overview import save_overview

    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["path", "split", "reason", "detail"])
    writer.writerows((item.path, item.split, item.code, item.detail) for item in left_out)
    write_text_atomic(folder / "quarantine.csv", buffer.getvalue())
    _write_or_remove(folder / "extra.txt", [path for path in listing.extra if _is_text(path)])
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


def _is_text(path: str) -> bool:
    return path == path.encode("utf-8", "ignore").decode()


def _write_or_remove(path: Path, lines: list[str]) -> None:
    if lines:
        write_text_atomic(path, "".join(f"{line}\n" for line in lines))
    else:
        path.unlink(missing_ok=True)


# Files on which the gain of re-encoding is measured, and repeats of each.
_MEASURED_FILES, _MEASURED_REPEATS = 5, 3


def _measure_speedup(
    root: Path, folder: Path, pairs: list[tuple[str, str]], resize: TranscodeSettings | None
) -> float:
    """Median over a few files of how many times faster a training clip (32 frames at stride 2, at the
    copies' size) is read from the copy than from the original.
    """
    import statistics

    from ogreg_core.data.transforms import scaled_size
    from ogreg_core.video import VideoReader, probe

    assert resize is not None
    ratios = []
    for path, copy in pairs[:: max(1, len(pairs) // _MEASURED_FILES)][:_MEASURED_FILES]:
        times: dict[str, list[float]] = {"original": [], "copy": []}
        for name, file in (("original", root / path), ("copy", folder / copy)):
            info = probe(file)
            decoder = info.decoder if name == "original" else "pyav"
            size = scaled_size(info.height, info.width, resize.short_side)
            indices = [min(2 * i + info.frames // 4, info.frames - 1) for i in range(32)]
            for _ in range(_MEASURED_REPEATS):
                started = time.perf_counter()
                VideoReader(file, decoder).frames_at(indices, size)
                times[name].append(time.perf_counter() - started)
        ratios.append(statistics.median(times["original"]) / statistics.median(times["copy"]))
    return statistics.median(ratios)
