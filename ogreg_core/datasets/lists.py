"""Video lists of other projects: one ``path label`` line per video, one file per split.

Read are the dialects of mmaction2, PySlowFast and Video-FocalNets (separated by space, tab or
comma), see https://mmaction2.readthedocs.io/en/latest/user_guides/prepare_dataset.html.
"""

from __future__ import annotations

import csv
import os
import posixpath
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from ogreg_core.datasets.listing import (
    UNLABELLED,
    Listing,
    class_key,
    read_annotation,
    walk_videos,
)
from ogreg_core.datasets.matching import Annotated, match_rows
from ogreg_core.errors import DataError
from ogreg_core.files import VIDEO_SUFFIXES

__all__ = ["list_lists"]

# More classes than this need more videos or a file of their names.
_LARGEST_LABEL = 1000
_WORDS = {"train": "train", "val": "val", "validation": "val", "test": "test"}
_INTEGER = re.compile(r"-?[0-9]+")
# A path that ends with a number, where a frame list has the number of frames.
_FRAME_LIST = re.compile(r"(.+)[\t, ]-?[0-9]+")


@dataclass(frozen=True, slots=True)
class _Line:
    number: int
    path: str
    label: str


@dataclass(frozen=True)
class _ListFile:
    path: Path
    split: str
    lines: list[_Line]
    comments: int

    @property
    def numbered(self) -> bool:
        """Labels are integers, not class names."""
        return bool(self.lines) and all(_INTEGER.fullmatch(line.label) for line in self.lines)

    def where(self, line: _Line) -> str:
        return f"{self.path} line {line.number}"


def list_lists(
    root: Path,
    annotations: Path | None,
    *,
    name: str | None = None,
    allow_outside: bool = False,
) -> Listing:
    """List the videos that another project's list files name.

    Args:
        root: folder that the paths in the lists are relative to.
        annotations: folder of the lists and, if there is one, of the file of class names; default:
            ``root``.
        name: data set name; default: the name of ``root``.
        allow_outside: accept files that are not below ``root``; their paths stay absolute.

    Raises:
        DataError: no train list, two lists for one split, a line that cannot be read, labels that
            are no 0-based class indices, paths outside ``root``, or no file matches.

    Source: https://mmaction2.readthedocs.io/en/latest/user_guides/prepare_dataset.html
    """
    folder = annotations if annotations is not None else root
    found = _find_lists(folder)
    files = [
        _read_list(found[split], split) for split in ("train", "val", "test") if split in found
    ]
    names_file, names, notes = _find_names(folder)
    labels, label_of, spelling_notes = _classes(files, names_file, names)
    where: dict[str, tuple[_ListFile, _Line]] = {}
    rows = []
    locate = _locator(root, allow_outside)
    for file in files:
        for line in file.lines:
            path = locate(line.path, file, line)
            rows.append(Annotated(path, label_of(file, line), file.split))
            where.setdefault(path, (file, line))
    videos = list(walk_videos(root))
    on_disk = _Disk(root, videos)

    def candidates(row: Annotated) -> list[str]:
        paths = on_disk.find(row.name)
        if not paths:
            file, line = where[row.name]
            _refuse_frames(root, row.name, file.where(line))
        return paths

    matched = match_rows(root, rows, videos, candidates)
    renamed = sum(entry.path not in where for entry in matched.entries)
    if renamed:
        notes.append(f"{renamed:,} files have another extension than in the lists")
    if comments := sum(file.comments for file in files):
        notes.append(f"{comments:,} lines that start with '#' were taken for comments")
    options: dict[str, object] = {"annotations": [file.path.name for file in files]}
    if names_file:
        options["labels"] = names_file.name
    if allow_outside:
        options["allow_outside"] = True
    extra = [path for path in matched.extra if path not in on_disk.aliased]
    return replace(matched, extra=extra).listing(
        name or root.resolve().name,
        root,
        labels,
        notes=notes + spelling_notes,
        options=options,
    )


# -- which files


def _find_lists(folder: Path) -> dict[str, Path]:
    """The list of each split."""
    found: dict[str, Path] = {}
    for path in _text_files(folder):
        words = {_WORDS[word] for word in re.split(r"[^a-z]+", path.stem.lower()) if word in _WORDS}
        if len(words) != 1 or _is_names_file(path) or _is_manifest(path):
            continue
        split = words.pop()
        if split in found:
            raise DataError(
                f"two lists for the {split} split",
                where=f"{found[split]} and {path}",
                fix="put the lists that are meant into a folder of their own and add "
                "--annotations FOLDER",
            )
        found[split] = path
    if "train" not in found:
        raise DataError(
            f"no train list in {folder}",
            why="expected one .txt or .csv per split with train, val or test in its name",
            fix="add --annotations FOLDER_OF_THE_LISTS",
        )
    return found


def _text_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder", fix="add --annotations FOLDER_OF_THE_LISTS")
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in (".txt", ".csv")
        and path.is_file()
        and not path.name.startswith(".")
    )


def _first_line(path: Path) -> str:
    return read_annotation(path).partition("\n")[0].strip()


def _is_manifest(path: Path) -> bool:
    """What `ogreg prepare` wrote into the same folder is no list."""
    return _first_line(path).startswith("path,label,frames,")


def _is_names_file(path: Path) -> bool:
    name = path.name.lower()
    if name in ("labels.txt", "classes.txt") or re.fullmatch(r"label_map.*\.txt", name):
        return True
    if path.suffix.lower() != ".csv" or "labels" not in name:
        return False
    return [cell.strip().lower() for cell in _first_line(path).split(",")] == ["id", "name"]


def _find_names(folder: Path) -> tuple[Path | None, list[str], list[str]]:
    """The file of class names, the names, and notes about them."""
    paths = [path for path in _text_files(folder) if _is_names_file(path)]
    # Beside dataset.json, labels.txt is what `ogreg prepare` made of the other one.
    if (folder / "dataset.json").exists() and len(paths) > 1:
        paths = [path for path in paths if path.name != "labels.txt"]
    if not paths:
        return None, [], []
    names = [_read_names(path) for path in paths]
    for path, other in zip(paths[1:], names[1:], strict=True):
        if other != names[0]:
            raise DataError(
                "two files of class names that differ",
                where=f"{paths[0]} and {path}",
                fix="leave only the one that belongs to the lists",
            )
    twice = sorted({name for name in names[0] if names[0].count(name) > 1})
    notes = [f"{paths[0].name} has several classes called {name!r}" for name in twice]
    return paths[0], names[0], notes


def _read_names(path: Path) -> list[str]:
    lines = read_annotation(path).rstrip().split("\n")
    if path.suffix.lower() != ".csv":
        if "" in (stripped := [line.strip() for line in lines]):
            raise DataError("an empty class name", where=f"{path} line {stripped.index('') + 1}")
        return stripped
    names: dict[str, str] = {}
    for cells in csv.reader(line for line in lines[1:] if line.strip()):
        # Files written by hand lack the quotes around names with commas.
        names[cells[0].strip()] = ",".join(cells[1:]).strip()
    order = [str(index) for index in range(len(names))]
    if sorted(names) != sorted(order):
        raise DataError(f"{path} does not number its classes from 0 to {len(names) - 1}")
    return [names[index] for index in order]


# -- what the lines say


def _read_list(path: Path, split: str) -> _ListFile:
    """The lines of a list, whichever delimiter it has.

    Each of the three delimiters may be part of a path too. The one that is meant leaves a number at
    the end of every line or, in a list of class names, a video's extension before every label.
    """
    stripped = [line.strip(" \t\r") for line in read_annotation(path).split("\n")]
    raw = [(i, text) for i, text in enumerate(stripped, 1) if text and not text.startswith("#")]
    comments = sum(text.startswith("#") for text in stripped)
    if not raw:
        raise DataError(f"{path} lists no videos")
    best: list[_Line] = []
    for is_row in (_has_number, _has_video):
        for delimiter in "\t, ":
            lines = [_split_line(number, text, delimiter) for number, text in raw]
            good = [line for line in lines if line and is_row(line)]
            header = len(lines) > 1 and good == lines[1:] and _is_header(lines[0])
            if header or len(good) == len(raw):
                return _ListFile(path, split, good, comments)
            best = max(best, good, key=len)
        if best:
            break
    numbers = {line.number for line in best}
    number, text = next((number, text) for number, text in raw if number not in numbers)
    raise DataError(
        f"{text!r} is not a video and its label",
        where=f"{path} line {number}",
        why="it has no label"
        if _is_video(text)
        else "all lines must have one delimiter and either numbers or class names as labels; "
        "frame folders are not supported",
        fix="give every line `path label`, with a tab or a comma where class names have spaces",
    )


def _split_line(number: int, text: str, delimiter: str) -> _Line | None:
    """Path and label: the last field is the label, all before it the path."""
    if delimiter not in text:
        return None
    if delimiter == "," and '"' in text:
        *fields, label = next(csv.reader([text], skipinitialspace=True))
        path = ",".join(fields)
    else:
        path, _, label = text.rpartition(delimiter)
    path, label = path.strip(" \t"), label.strip(" \t")
    return _Line(number, path, label) if path and label else None


def _has_number(line: _Line) -> bool:
    return _INTEGER.fullmatch(line.label) is not None


def _has_video(line: _Line) -> bool:
    return _is_video(line.path)


def _is_header(line: _Line | None) -> bool:
    # A line that names a video is one without a label, not a header.
    return line is not None and not _is_video(line.path) and not _is_video(line.label)


def _is_video(path: str) -> bool:
    return posixpath.splitext(path)[1].lower() in VIDEO_SUFFIXES


# -- classes


def _classes(
    files: Sequence[_ListFile], names_file: Path | None, names: list[str]
) -> tuple[list[str], Callable[[_ListFile, _Line], int], list[str]]:
    """Class names in index order, the index of a line's label, and notes."""
    if len({file.numbered for file in files}) > 1:
        raise DataError(
            "some lists have numbers as labels, others class names",
            where=", ".join(str(file.path) for file in files),
        )
    if files[0].numbered:
        labels = _numbered_classes(files, names_file, names)
        return labels, lambda file, line: int(line.label), []
    return _named_classes(files, names_file, names)


def _numbered_classes(
    files: Sequence[_ListFile], names_file: Path | None, names: list[str]
) -> list[str]:
    used = [int(line.label) for file in files for line in file.lines]
    lowest = min((label for label in used if label != UNLABELLED), default=0)
    highest = max(used)
    if lowest == 1 and (highest == len(names) if names_file else True):
        raise DataError(
            f"the labels count from 1 (1 to {highest}); classes count from 0",
            where=", ".join(str(file.path) for file in files),
            fix="subtract 1 from every label in the lists"
            + ("" if names_file else ", or add a labels.txt with the names of all classes"),
        )
    if not names_file and highest >= _LARGEST_LABEL + 10 * len(used):
        raise DataError(
            f"the labels go up to {highest:,}, for {len(used):,} videos",
            where=", ".join(str(file.path) for file in files),
            why="the last field of a line is taken for its label",
            fix="if they are labels, add a labels.txt with the names of all classes",
        )
    classes = len(names) if names_file else highest + 1
    for file in files:
        for line in file.lines:
            label = int(line.label)
            withheld = label == UNLABELLED and file.split == "test"
            if not withheld and not 0 <= label < classes:
                why = f"{names_file} has {classes} names" if names_file else "classes count from 0"
                raise DataError(
                    f"label {label} is not one of {classes} classes",
                    where=file.where(line),
                    why=why,
                )
    return names if names_file else [str(index) for index in range(classes)]


def _named_classes(
    files: Sequence[_ListFile], names_file: Path | None, names: list[str]
) -> tuple[list[str], Callable[[_ListFile, _Line], int], list[str]]:
    # The spelling of train before any other.
    spellings = names or sorted({line.label for line in files[0].lines})
    if not names_file:
        spellings += sorted({line.label for file in files[1:] for line in file.lines})
    first: dict[str, str] = {}
    for label in spellings:
        first.setdefault(class_key(label), label)
    labels = names or sorted(first.values())
    index = {label: i for i, label in enumerate(labels)}
    merged = [
        f"{label!r} = {first[class_key(label)]!r}" for label in spellings if label not in index
    ]
    notes = [f"class names taken to be the same: {', '.join(sorted(set(merged)))}"] * bool(merged)

    def label_of(file: _ListFile, line: _Line) -> int:
        label = line.label if line.label in index else first.get(class_key(line.label), "")
        if label not in index:
            raise DataError(f"class {line.label!r} is not in {names_file}", where=file.where(line))
        return index[label]

    return labels, label_of, notes


# -- files


def _locator(root: Path, allow_outside: bool) -> Callable[[str, _ListFile, _Line], str]:
    """Maps a path of a list to one relative to ``root``, or absolute where that is allowed."""
    base = os.path.abspath(root)
    real_base = os.path.realpath(root)
    real_folder = cache(os.path.realpath)

    def locate(path: str, file: _ListFile, line: _Line) -> str:
        plain = posixpath.normpath(path)
        if not plain.startswith(("/", "../")) and plain != "..":
            return plain
        absolute = posixpath.normpath(posixpath.join(base, plain))
        folder, name = posixpath.split(absolute)
        # The lists may have been made under another name (a link) of the same folder.
        for start, path_there in (
            (base, absolute),
            (real_base, posixpath.join(real_folder(folder), name)),
        ):
            if path_there.startswith(start.rstrip("/") + "/"):
                return posixpath.relpath(path_there, start)
        if allow_outside:
            return absolute
        raise DataError(
            f"{path} is outside {root}",
            where=file.where(line),
            fix="choose a ROOT that holds all videos, or add --allow-outside",
        )

    return locate


class _Disk:
    """The files that a path of a list may mean."""

    def __init__(self, root: Path, videos: Iterable[str]) -> None:
        self._root = str(root)
        self._videos = set(videos)
        # Paths that walk_videos reached under another name: it enters a linked folder only once.
        self.aliased: set[str] = set()
        self._without_suffix: dict[str, list[str]] = {}
        for path in sorted(self._videos):
            self._without_suffix.setdefault(posixpath.splitext(path)[0], []).append(path)
        self._outside = cache(self._list_outside)

    def find(self, path: str) -> list[str]:
        """The file itself, else the videos in its folder whose names differ in the extension."""
        if path in self._videos:
            return [path]
        full = os.path.join(self._root, path)
        if os.path.isfile(full):
            real = os.path.realpath(full)
            self.aliased.add(os.path.relpath(real, os.path.realpath(self._root)))
            return [path]
        stem = posixpath.splitext(path)[0] if _is_video(path) else path
        if posixpath.isabs(path):
            folder = posixpath.dirname(path)
            return [
                other for other in self._outside(folder) if posixpath.splitext(other)[0] == stem
            ]
        return self._without_suffix.get(stem, [])

    @staticmethod
    def _list_outside(folder: str) -> list[str]:
        try:
            names = sorted(os.listdir(folder))
        except OSError:
            return []
        return [posixpath.join(folder, name) for name in names if _is_video(name)]


def _refuse_frames(root: Path, path: str, where: str) -> None:
    """Raise if a path without a file looks like a line of a frame list."""
    if _is_video(path):
        return
    frames = _FRAME_LIST.fullmatch(path)
    if frames or (root / path).is_dir():
        raise DataError(
            f"{frames[1] if frames else path} is no video but a folder of frames",
            where=where,
            why="the list looks like `folder frames label`; frame folders are not supported",
            fix="give lists of videos",
        )
