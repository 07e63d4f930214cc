"""HMDB51 with its three official splits: one ``<class>_test_split<N>.txt`` per class.

Source: Kuehne et al., ICCV 2011; https://serre-lab.clps.brown.edu/resource/hmdb-a-large-human-motion-database.
"""

from __future__ import annotations

import os
import shlex
from dataclasses import replace
from pathlib import Path

from ogreg_core.datasets.listing import Listing, annotation_folders, read_annotation, walk_videos
from ogreg_core.datasets.matching import Annotated, by_stem, match_rows, name_of_fold
from ogreg_core.errors import DataError

__all__ = ["list_hmdb51"]

_SPLITS = {"0": "", "1": "train", "2": "test"}
_CLASSES = 51
# A later run of the same line must not stop to ask about files that exist.
_UNPACK_ALL = 'for archive in *.rar; do unrar x -o- "$archive"; done'


def list_hmdb51(root: Path, annotations: Path | None, *, fold: int = 1) -> Listing:
    """List one of the three splits of HMDB51.

    Args:
        root: folder with the videos, in class folders.
        annotations: folder of the split files; default: ``root`` or a folder in it.
        fold: 1, 2 or 3.

    Raises:
        DataError: split files are missing or broken, the archives were never unpacked, or no file
            matches.
        UsageError: no such fold.

    Source: https://serre-lab.clps.brown.edu/resource/hmdb-a-large-human-motion-database
    """
    dataset = name_of_fold("HMDB51", fold)
    split_files = _find_split_files(root, annotations, fold)
    labels = sorted(split_files)
    rows: list[Annotated] = []
    unused: list[Annotated] = []
    for index, label in enumerate(labels):
        for row in _read_split(split_files[label], label, index):
            (rows if row.split else unused).append(row)
    # Train before test, as in all other data sets; the order within a split stays.
    rows.sort(key=lambda row: row.split != "train")
    files = list(walk_videos(root))
    if not files:
        _refuse_archives(root)
    stems = by_stem(files)
    classes = set(labels)

    def candidates(row: Annotated) -> list[str]:
        label, _, name = row.name.partition("/")
        found = stems.get(os.path.splitext(name)[0], [])
        own = [path for path in found if label in path.split("/")[:-1]]
        # The same name may exist in two classes: a file in another class's folder is that class's.
        free = [path for path in found if classes.isdisjoint(path.split("/")[:-1])]
        return own or (free if len(free) == 1 else [])

    matched = match_rows(root, rows, files, candidates)
    notes = []
    if len(labels) != _CLASSES:
        notes.append(f"there are split files of {len(labels)} classes; HMDB51 has {_CLASSES}")
    if unused:
        notes.append(f"{len(unused):,} clips are in neither train nor test of split {fold}")
    known = {path for row in unused for path in candidates(row)}
    matched = replace(matched, extra=[path for path in matched.extra if path not in known])
    return matched.listing(
        dataset,
        root,
        labels,
        notes=notes,
        options={"fold": fold, "annotations": [f"<class>_test_split{fold}.txt"]},
    )


def _find_split_files(root: Path, annotations: Path | None, fold: int) -> dict[str, Path]:
    """Split files by class name, all from one folder."""
    base = annotations if annotations is not None else root
    ending = f"_test_split{fold}.txt"
    for folder in annotation_folders(root, annotations):
        found = {
            path.name.removesuffix(ending): path
            for path in folder.iterdir()
            if path.name.endswith(ending) and not path.name.startswith(".")
        }
        if found:
            return found
    raise DataError(
        f"no split files <class>{ending} in {base}",
        fix="fetch test_train_splits.rar from the data set's page, unpack it (unrar x "
        "test_train_splits.rar), and add --annotations FOLDER",
    )


def _read_split(path: Path, label: str, index: int) -> list[Annotated]:
    """Rows named ``<class>/<file>``; the split of a file that this fold does not use is empty."""
    rows = []
    for number, line in enumerate(read_annotation(path).split("\n"), start=1):
        if not line.strip():
            continue
        # From the right: there are file names with spaces.
        name, tag = [*line.rsplit(maxsplit=1), ""][:2]
        if tag not in _SPLITS:
            raise DataError(
                "a line that is not `file tag`",
                where=f"{path} line {number}",
                why=f"{line.strip()!r}; the tag is 1 (train), 2 (test) or 0 (unused)",
            )
        rows.append(Annotated(f"{label}/{name.lstrip()}", index, _SPLITS[tag]))
    return rows


def _refuse_archives(root: Path) -> None:
    """Raise if the videos are still in the archives they are distributed in."""
    for folder, folders, names in os.walk(root):
        folders.sort()
        archives = sorted(
            name for name in names if name.lower().endswith(".rar") and "splits" not in name
        )
        if not archives:
            continue
        # One archive holds the 51 others.
        outer = "unrar x -o- hmdb51_org.rar && " if "hmdb51_org.rar" in archives else ""
        raise DataError(
            f"the archives in {folder} have not been unpacked",
            why=f"there are no videos yet, but {archives[0]}"
            + (f" and {len(archives) - 1} more" if archives[1:] else ""),
            fix=f"cd {shlex.quote(os.path.abspath(folder))} && {outer}{_UNPACK_ALL}",
        )
