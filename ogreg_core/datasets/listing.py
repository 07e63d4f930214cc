"""What a data set's official annotations say, matched with the files that are there.

Each data set has one module that reads its annotations and returns a :class:`Listing`;
``ogreg_core.datasets.prepare`` checks the files and writes the manifest. No file is opened here.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ogreg_core.data.manifest import UNLABELLED
from ogreg_core.errors import DataError
from ogreg_core.files import VIDEO_SUFFIXES

__all__ = [
    "RESIZED_MARKER",
    "UNLABELLED",
    "Entry",
    "LeftOut",
    "Listing",
    "annotation_folders",
    "class_key",
    "find_annotation",
    "is_text",
    "nothing_matched",
    "read_annotation",
    "read_csv",
    "walk_videos",
]

# A folder that holds this file was made by `prepare --resize`: its videos are nobody's originals.
RESIZED_MARKER = ".ogreg-resized"


@dataclass(frozen=True, slots=True)
class Entry:
    """One annotated video that has a file.

    Args:
        path: relative to the data set's root, with forward slashes; absolute only where the user
            allowed it.
        label: class index, 0-based; ``UNLABELLED`` if withheld.
        split: ``train``, ``val`` or ``test``.
    """

    path: str
    label: int
    split: str


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A video that is not used.

    Args:
        path: the file, or the annotation's name for it where there is no file.
        code: reason, one of those in :data:`ogreg_core.datasets.prepare.REASONS`.
        detail: one sentence.
        split: of the annotation; empty if unknown.
    """

    path: str
    code: str
    detail: str
    split: str = ""


@dataclass(frozen=True)
class Listing:
    """A data set as its annotations and its folder describe it.

    Args:
        dataset: name to remember it by.
        root: folder that entries are relative to.
        labels: class names in index order.
        entries: annotated videos with a file, in the order of the annotations.
        annotated: rows in the annotations by split, with or without a file.
        left_out: annotated rows that cannot be used: code ``missing`` or ``duplicate``.
        extra: video files that no annotation names, relative to ``root``.
        mirror: class names that a left-right flip turns into each other.
        notes: sentences worth telling the user.
        options: how the listing came about, kept in ``dataset.json``.
    """

    dataset: str
    root: Path
    labels: list[str]
    entries: list[Entry]
    annotated: dict[str, int]
    left_out: list[LeftOut] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    mirror: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)


def walk_videos(root: Path, suffixes: Collection[str] = VIDEO_SUFFIXES) -> Iterator[str]:
    """Paths of video files below ``root``, relative to it with forward slashes, in sorted order.

    Links to files and folders are followed, each real folder once; hidden files and folders,
    ``lost+found`` and copies made by ``prepare --resize`` are passed over.

    Args:
        root: where to look.
        suffixes: endings in small letters, by which files are told.

    Raises:
        DataError: a folder cannot be read.
    """
    yield from _walk(str(root), "", suffixes, set())


def _walk(
    folder: str, prefix: str, suffixes: Collection[str], seen: set[tuple[int, int]]
) -> Iterator[str]:
    status = os.stat(folder)
    identity = (status.st_dev, status.st_ino)
    if identity in seen or os.path.exists(os.path.join(folder, RESIZED_MARKER)):
        return
    seen.add(identity)
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(
            f"the folder {folder} cannot be read",
            why=str(error.strerror),
            fix="give yourself the right to read it, or take it out of the data set's folder",
        ) from error
    for entry in entries:
        if entry.name.startswith(".") or entry.name == "lost+found":
            continue
        # Not entry.is_dir, which fails on a link that leads to itself.
        if os.path.isdir(entry.path):
            yield from _walk(entry.path, f"{prefix}{entry.name}/", suffixes, seen)
        elif os.path.splitext(entry.name)[1].lower() in suffixes:
            yield f"{prefix}{entry.name}"


def is_text(name: str) -> bool:
    """Whether a file name is valid UTF-8, so that it can be written into a manifest."""
    return name == name.encode("utf-8", "ignore").decode()


def class_key(name: str) -> str:
    """A class name without case, spaces and punctuation: spellings that mean the same class share
    it. A name of punctuation alone is its own key.
    """
    return re.sub(r"[\W_]", "", name.casefold()) or name


def annotation_folders(root: Path, annotations: Path | None) -> list[Path]:
    """Where annotation files may lie: ``annotations`` if given, else ``root``, and each folder in
    it.
    """
    base = annotations if annotations is not None else root
    inside = base.iterdir() if base.is_dir() else ()
    return [base, *sorted(path for path in inside if os.path.isdir(path))]


def find_annotation(
    root: Path, annotations: Path | None, names: Sequence[str], *, deep: bool = True
) -> Path | None:
    """The first of ``names`` (exact file names, preferred first) in the usual places.

    Args:
        root: the data set's folder: searched itself and, if ``deep``, one level of sub-folders.
        annotations: where the user says they lie; searched first and, if given, alone.
        names: file names.
        deep: look into sub-folders.

    Returns:
        The file, or None.
    """
    folders = annotation_folders(root, annotations)
    for name in names:
        for folder in folders if deep else folders[:1]:
            if os.path.isfile(folder / name):
                return folder / name
    return None


def read_annotation(path: Path) -> str:
    """The text of an annotation file: UTF-8 with or without byte-order mark, line ends as ``\\n``.

    Raises:
        DataError: unreadable.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read", why=str(error), fix="fetch it again") from error
    return text.replace("\r\n", "\n")


def read_csv(path: Path) -> list[dict[str, str]]:
    """Rows of a comma-separated file with a header, by column name; quotes are taken off.

    Raises:
        DataError: unreadable, or a row that does not fit the header.
    """
    reader = csv.DictReader(io.StringIO(read_annotation(path)))
    rows = []
    try:
        for row in reader:
            if None in row or None in row.values():
                raise DataError(
                    f"{path} has a line that does not fit its header",
                    where=f"line {reader.line_num}",
                    why=f"the header names {', '.join(reader.fieldnames or [])}",
                )
            rows.append({key.strip(): value.strip() for key, value in row.items()})
    except csv.Error as error:
        where = f"line {reader.line_num}"
        raise DataError(f"{path} is not a CSV file", where=where, why=str(error)) from error
    return rows


def nothing_matched(root: Path, annotated: Sequence[str], files: Sequence[str]) -> DataError:
    """The error for annotations and files that have nothing in common: shows one of each."""
    first = f"first file: {files[0]}" if files else f"no video files below {root}"
    return DataError(
        f"0 of {len(annotated):,} annotated videos were found in {root}",
        why=f"{first}; first annotation: {annotated[0] if annotated else 'none'}",
        fix="point ROOT to the folder that holds the videos, and --annotations to the annotation files",
    )
