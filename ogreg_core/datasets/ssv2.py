"""Something-Something V2: Qualcomm's package of labels, and the names 20BN gave the files before.

Source: Goyal et al., arXiv:1706.04261; https://www.qualcomm.com/developer/software/something-something-v-2-dataset.
"""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

from ogreg_core.datasets.listing import (
    UNLABELLED,
    Listing,
    find_annotation,
    read_annotation,
    walk_videos,
)
from ogreg_core.datasets.matching import Annotated, by_stem, match_rows, read_json
from ogreg_core.errors import DataError

__all__ = ["MIRROR_PAIRS", "list_ssv2"]

# Classes that a left-right flip turns into each other; indices 86/87, 93/94 and 166/167.
MIRROR_PAIRS = (
    (
        "Pulling something from left to right",
        "Pulling something from right to left",
    ),
    (
        "Pushing something from left to right",
        "Pushing something from right to left",
    ),
    (
        "Turning the camera left while filming something",
        "Turning the camera right while filming something",
    ),
)
_SPLIT_FILES = {"train": "train", "val": "validation", "test": "test"}
_PART = re.compile(r"20bn-something-something-v2-\d\d")
_WHENCE = (
    "fetch and unpack 20bn-something-something-download-package-labels.zip from Qualcomm's page "
    "of the data set, and add --annotations FOLDER"
)


def list_ssv2(root: Path, annotations: Path | None) -> Listing:
    """List Something-Something V2.

    Args:
        root: folder with ``<id>.webm`` (or another video format) anywhere below it.
        annotations: folder of the JSON files; default: ``root`` or a folder in it.

    Raises:
        DataError: annotations are missing or contradict each other, the archive's parts were never
            joined, or no file matches.

    Source: https://www.qualcomm.com/developer/software/something-something-v-2-dataset
    """
    labels_file = find_annotation(root, annotations, _names("labels.json"))
    if labels_file is None:
        raise DataError(
            f"no labels.json in {annotations or root}",
            why="expected labels.json, train.json, validation.json and test.json, or the same with "
            "something-something-v2- before the name",
            fix=_WHENCE,
        )

    def find(name: str) -> Path | None:
        # Names such as train.json are common: what lies beside labels.json is meant first.
        beside = find_annotation(root, labels_file.parent, _names(name), deep=False)
        return beside or find_annotation(root, annotations, _names(name))

    found = {split: find(f"{word}.json") for split, word in _SPLIT_FILES.items()}
    paths = {split: path for split, path in found.items() if path is not None}
    if not paths:
        raise DataError(
            f"no train.json, validation.json or test.json beside {labels_file}", fix=_WHENCE
        )
    index = _read_labels(labels_file)
    answers_file = find("test-answers.csv") if "test" in paths else None
    answers = _read_answers(answers_file, index) if answers_file else {}
    rows = [
        row for split, path in paths.items() for row in _read_split(path, split, index, answers)
    ]
    files = list(walk_videos(root))
    if not files:
        _refuse_parts(root)
    stems = by_stem(files)
    matched = match_rows(root, rows, files, lambda row: _webm_first(stems.get(row.name, [])))
    used = [labels_file, *paths.values()] + ([answers_file] if answers_file else [])
    notes = []
    unanswered = sum(row.label == UNLABELLED for row in rows)
    if answers_file and unanswered:
        notes.append(f"{unanswered:,} test videos have no answer in {answers_file.name}")
    mirror = {a: b for a, b in MIRROR_PAIRS if a in index and b in index}
    return matched.listing(
        "ssv2",
        root,
        sorted(index, key=index.__getitem__),
        mirror=mirror | {b: a for a, b in mirror.items()},
        notes=notes,
        options={"annotations": [path.name for path in used]},
    )


def _names(name: str) -> list[str]:
    return [name, f"something-something-v2-{name}"]


def _webm_first(paths: list[str]) -> list[str]:
    """The original before a conversion of it."""
    return sorted(paths, key=lambda path: (not path.lower().endswith(".webm"), path))


def _read_labels(path: Path) -> dict[str, int]:
    try:
        index = {name: int(number) for name, number in read_json(path, dict).items()}
    except (TypeError, ValueError) as error:
        raise DataError(f"{path} has an index that is no number", why=str(error)) from error
    if sorted(index.values()) != list(range(len(index))):
        raise DataError(
            f"{path} does not number its {len(index)} classes from 0 to {len(index) - 1}",
            fix=_WHENCE,
        )
    return index


def _class_name(template: str) -> str:
    """A template as labels.json spells it: the brackets go, what they hold stays."""
    return template.replace("[", "").replace("]", "")


def _read_answers(path: Path, index: dict[str, int]) -> dict[str, int]:
    """Test labels by id. Separated by semicolons, for there are commas in the class names."""
    answers = {}
    for number, line in enumerate(read_annotation(path).split("\n"), start=1):
        if not line.strip():
            continue
        video, _, template = line.partition(";")
        name = _class_name(template.strip())
        if name not in index:
            raise DataError(
                f"test answer {template!r} of video {video} is not in labels.json",
                where=f"{path} line {number}",
            )
        answers[video.strip()] = index[name]
    return answers


def _read_split(
    path: Path, split: str, index: dict[str, int], answers: dict[str, int]
) -> list[Annotated]:
    rows = []
    for number, item in enumerate(read_json(path, list)):
        try:
            video = str(item["id"])
            if split == "test":
                rows.append(Annotated(video, answers.get(video, UNLABELLED), split))
                continue
            template = str(item["template"])
        except (KeyError, TypeError) as error:
            raise DataError(
                f"{path} has an item without id or template",
                where=f"item {number}",
                why=repr(item),
            ) from error
        if _class_name(template) not in index:
            raise DataError(
                f"template {template!r} of video {video} is not in labels.json",
                where=f"{path} item {number}",
                fix="use labels.json and the splits of one release",
            )
        rows.append(Annotated(video, index[_class_name(template)], split))
    return rows


def _refuse_parts(root: Path) -> None:
    """Raise if the archive lies there in the parts it is distributed in."""
    for folder, folders, names in os.walk(root):
        folders.sort()
        parts = [name for name in names if _PART.fullmatch(name)]
        if parts:
            source, target = (
                shlex.quote(os.path.abspath(folder)),
                shlex.quote(os.path.abspath(root)),
            )
            raise DataError(
                f"the {len(parts)} parts of the video archive in {folder} were never joined",
                why="there are no videos yet, and a single part is no archive of its own",
                fix=f"cat {source}/20bn-something-something-v2-?? | tar -xzf - -C {target}",
            )
