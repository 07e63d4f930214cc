"""Kinetics-400 and Kinetics-600: the CSV files of DeepMind, ActivityNet's crawler and CVDF.

Sources: Kay et al., arXiv:1705.06950; https://github.com/cvdfoundation/kinetics-dataset.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ogreg_core.datasets.listing import (
    UNLABELLED,
    Listing,
    annotation_folders,
    class_key,
    read_csv,
    walk_videos,
)
from ogreg_core.datasets.matching import Annotated, match_rows
from ogreg_core.errors import DataError

__all__ = ["list_kinetics"]

# As spelt in file names, folder names and the split column; the preferred file name first.
_SPELLINGS = {
    "train": ("train", "training"),
    "val": ("validate", "val", "validation", "valid"),
    "test": ("test", "testing"),
}
_SPLIT_OF = {word: split for split, words in _SPELLINGS.items() for word in words}
_COLUMNS = ("youtube_id", "time_start", "time_end")
# YouTube's identifiers have eleven characters, `_` and `-` among them: no splitting at `_`.
_ID_LENGTH = 11
_TIMES = re.compile(r"_(\d+)_(\d+)")


@dataclass(frozen=True, slots=True)
class _Row:
    clip: str
    label: str
    split: str


def list_kinetics(
    root: Path, annotations: Path | None, *, dataset: Literal["kinetics400", "kinetics600"]
) -> Listing:
    """List Kinetics-400 or -600: the clips that are both annotated and there.

    Classes are the sorted labels of all splits, as in every common code base. Files are found by
    YouTube id and times, in whatever folders they lie.

    Args:
        root: folder with the videos.
        annotations: folder of the CSV files; default: ``root`` or a folder in it.
        dataset: which of the two.

    Raises:
        DataError: no annotations, a broken row, or no file that they name.

    Source: https://github.com/cvdfoundation/kinetics-dataset
    """
    paths = _find_files(root, annotations, dataset)
    rows = [row for split, path in paths.items() for row in _read_rows(path, split)]
    spelling = _spellings(rows)
    labels = sorted(spelling.values())
    if not labels:
        raise DataError(
            "the annotations name no classes",
            where=", ".join(str(path) for path in paths.values()),
            why="the public test list has no labels; the classes come from train and val",
            fix=_WHENCE,
        )
    index = {label: i for i, label in enumerate(labels)}
    annotated = [
        Annotated(
            row.clip,
            index[spelling[class_key(row.label)]] if row.label else UNLABELLED,
            row.split,
        )
        for row in rows
    ]
    del rows  # the labels as text are the largest part of the annotations
    files = list(walk_videos(root))
    by_clip = _files_by_clip(files, {row.name for row in annotated})

    def candidates(row: Annotated) -> list[str]:
        found = by_clip.get(row.name, [])
        if len(found) < 2:
            return found
        return sorted(found, key=lambda path: _rank(root, path, row.split))

    matched = match_rows(root, annotated, files, candidates)
    notes = []
    expected = int(dataset.removeprefix("kinetics"))
    if len(labels) != expected:
        notes.append(f"the annotations name {len(labels):,} classes; {dataset} has {expected}")
    return matched.listing(
        dataset,
        root,
        labels,
        notes=notes,
        options={"annotations": [path.name for path in paths.values()]},
    )


_WHENCE = (
    "fetch kinetics400.tar.gz of DeepMind, or the CVDF repository's annotations, and add "
    "--annotations FOLDER; class folders without annotations can be used by "
    "`ogreg prepare folder ROOT`"
)


def _find_files(root: Path, annotations: Path | None, dataset: str) -> dict[str, Path]:
    """The CSV file of each split that has one."""
    base = annotations if annotations is not None else root
    folders = annotation_folders(root, annotations)
    classes = dataset.removeprefix("kinetics")
    prefixes = [""] + [
        f"{word}{classes}{dash}"
        for word in ("kinetics", "kinetics-", "kinetics_", "k")
        for dash in "_-"
    ]
    found: dict[str, Path] = {}
    others = []
    for split, words in _SPELLINGS.items():
        for name in [f"{prefix}{word}.csv" for prefix in prefixes for word in words]:
            for path in (folder / name for folder in folders):
                if split in found or not path.is_file():
                    continue
                # Manifests and lists of other projects have the same names: look inside.
                if "youtube_id" in _header(path):
                    found[split] = path
                else:
                    others.append(path)
    if not found:
        raise DataError(
            f"no annotations of {dataset} in {base}",
            why=f"{others[0]} has no column youtube_id"
            if others
            else f"expected train.csv, validate.csv (or val.csv) and test.csv, also with "
            f"kinetics-{classes}_ before the name, there or in a folder in it",
            fix=_WHENCE,
        )
    return found


def _header(path: Path) -> str:
    try:
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            return file.readline()
    except OSError as error:
        raise DataError(f"{path} cannot be read", why=str(error)) from error


def _read_rows(path: Path, split: str) -> Iterator[_Row]:
    """The rows of one file; ``split`` is for those that do not name theirs."""
    for number, cells in enumerate(read_csv(path), start=2):
        missing = [name for name in _COLUMNS if name not in cells]
        if missing:
            raise DataError(f"{path} lacks the columns {', '.join(missing)}")
        where = f"{path} line {number}"
        try:
            start, end = (int(float(cells[name])) for name in _COLUMNS[1:])
        except (ValueError, OverflowError) as error:
            raise DataError(
                "times of a clip that are no numbers", where=where, why=str(error)
            ) from error
        word = cells.get("split", "").lower()
        if word and word not in _SPLIT_OF:
            raise DataError(f"{word!r} is no split", where=where, fix="train, val or test")
        row_split = _SPLIT_OF[word] if word else split
        # Some copies carry the quotes inside the label, where they would change the sorted order.
        label = cells.get("label", "").strip('" ')
        if not label and row_split != "test":
            raise DataError(f"a row of {row_split} without a label", where=where)
        yield _Row(_clip(cells["youtube_id"], start, end), label, row_split)


def _clip(youtube_id: str, start: int, end: int) -> str:
    return f"{youtube_id}_{start:06d}_{end:06d}"


def _spellings(rows: Iterable[_Row]) -> dict[str, str]:
    """One spelling per class by its key: that of train, else the first in sorted order."""
    spelling: dict[str, str] = {}
    labels = {(row.split != "train", row.label) for row in rows if row.label}
    for _, label in sorted(labels):
        spelling.setdefault(class_key(label), label)
    return spelling


def _files_by_clip(files: Iterable[str], clips: set[str]) -> dict[str, list[str]]:
    # Empty where several clips of one video are annotated: then the id alone does not tell which.
    only: dict[str, str] = {}
    for clip in clips:
        youtube_id = clip[:_ID_LENGTH]
        only[youtube_id] = "" if youtube_id in only else clip
    by_clip: dict[str, list[str]] = {}
    for path in files:
        stem = os.path.splitext(path.rpartition("/")[2])[0]
        youtube_id = stem[:_ID_LENGTH]
        times = _TIMES.fullmatch(stem, _ID_LENGTH)
        clip = _clip(youtube_id, int(times[1]), int(times[2])) if times else ""
        # CVDF's replacements stand for whatever clip of that id is annotated.
        if clip not in clips and (not times or _is_replacement(path)):
            clip = only.get(youtube_id, "")
        if clip in clips:
            by_clip.setdefault(clip, []).append(path)
    return by_clip


def _is_replacement(path: str) -> bool:
    return any(folder.startswith("replacement") for folder in path.split("/")[:-1])


def _rank(root: Path, path: str, split: str) -> tuple[bool, bool, bool, str]:
    """Sorts the files of one clip, the best one first: a dangling link is worse than any file."""
    in_split = any(_SPLIT_OF.get(folder.lower()) == split for folder in path.split("/")[:-1])
    return not os.path.exists(root / path), not _is_replacement(path), not in_split, path
