"""UCF101 with its three official train/test splits, in the official class order.

Source: Soomro et al., arXiv:1212.0402; https://www.crcv.ucf.edu/data/UCF101.php.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ogreg_core.datasets.listing import Listing, find_annotation, read_annotation, walk_videos
from ogreg_core.datasets.matching import Annotated, by_stem, match_rows, name_of_fold
from ogreg_core.errors import DataError

__all__ = ["list_ucf101"]


def list_ucf101(root: Path, annotations: Path | None, *, fold: int = 1) -> Listing:
    """List one of the three splits of UCF101.

    Args:
        root: folder with the videos, flat or in class folders.
        annotations: folder of ``classInd.txt`` and the lists; default: ``root`` or a folder in it.
        fold: 1, 2 or 3.

    Raises:
        DataError: a list is missing or contradicts itself, or no file matches.
        UsageError: no such fold.

    Source: https://www.crcv.ucf.edu/data/UCF101.php
    """
    dataset = name_of_fold("UCF101", fold)
    paths = {}
    for key, name in {
        "classes": "classInd.txt",
        "train": f"trainlist{fold:02d}.txt",
        "test": f"testlist{fold:02d}.txt",
    }.items():
        path = find_annotation(root, annotations, [name])
        if path is None:
            raise DataError(
                f"no {name} in {annotations or root}",
                fix="fetch and unpack UCF101TrainTestSplits-RecognitionTask.zip from "
                "https://www.crcv.ucf.edu/data/UCF101.php, and add --annotations FOLDER",
            )
        paths[key] = path
    labels = _read_classes(paths["classes"])
    # Folder, list and file spell HandstandPushups in different ways: case is never trusted.
    index = {label.lower(): i for i, label in enumerate(labels)}
    rows = [row for split in ("train", "test") for row in _read_split(paths[split], split, index)]
    files = list(walk_videos(root))
    stems: dict[str, list[str]] = {}
    for stem, paths_of_stem in by_stem(files).items():
        stems.setdefault(stem.lower(), []).extend(paths_of_stem)

    def candidates(row: Annotated) -> list[str]:
        folder, _, name = row.name.lower().rpartition("/")
        found = stems.get(name.rpartition(".")[0] or name, [])
        return sorted(found, key=lambda path: (folder not in path.lower().split("/")[:-1], path))

    matched = match_rows(root, rows, files, candidates)
    return matched.listing(
        dataset,
        root,
        labels,
        options={"fold": fold, "annotations": [path.name for path in paths.values()]},
    )


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Lines that are not empty, each with its place."""
    for number, line in enumerate(read_annotation(path).split("\n"), start=1):
        if line.strip():
            yield line.strip(), f"{path} line {number}"


def _read_classes(path: Path) -> list[str]:
    """Class names in the order of ``classInd.txt``.

    The official order ignores case: sorted() would swap Hammering with HammerThrow and JumpingJack
    with JumpRope.
    """
    names: dict[int, str] = {}
    for line, where in _lines(path):
        number, _, name = line.partition(" ")
        if not number.isdecimal() or not name.strip():
            raise DataError("a line that is not `number name`", where=where, why=line)
        names[int(number)] = name.strip()
    if sorted(names) != list(range(1, len(names) + 1)):
        raise DataError(f"{path} does not number its classes from 1 to {len(names)}")
    return [names[number] for number in sorted(names)]


def _read_split(path: Path, split: str, index: dict[str, int]) -> Iterator[Annotated]:
    for line, where in _lines(path):
        name, number = [*line.rsplit(maxsplit=1), ""][:2]
        if not number.isdecimal():
            name, number = line, ""
        folder = name.rpartition("/")[0].rpartition("/")[2]
        label = index.get(folder.lower())
        if label is None:
            raise DataError(
                f"{folder or name!r} is no class of classInd.txt",
                where=where,
                why="the folder in the list tells the class",
            )
        if split == "train" and not number:
            raise DataError("a train line without a label", where=where, why=line)
        if number and int(number) != label + 1:
            raise DataError(
                f"label {number} contradicts the folder {folder}, which is class {label + 1}",
                where=where,
                fix="fetch the lists again, all from one release",
            )
        yield Annotated(name, label, split)
