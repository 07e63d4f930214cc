"""Diving-48 with the corrected (V2) labels: ``Diving48_V2_{train,test}.json`` and the vocabulary.

Source: http://www.svcl.ucsd.edu/projects/resound/dataset.html (Li et al., RESOUND, ECCV 2018).
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from ogreg_core.datasets.listing import (
    Listing,
    find_annotation,
    walk_videos,
)
from ogreg_core.datasets.matching import Annotated, by_stem, match_rows, read_json
from ogreg_core.errors import DataError, UsageError

__all__ = ["list_diving48"]

_FILES = {
    "train": "Diving48_V2_train.json",
    "test": "Diving48_V2_test.json",
    "vocab": "Diving48_vocab.json",
}
_V1 = ("Diving48_train.json", "Diving48_test.json")
_COUNTS = {"train": 15_027, "test": 1_970}
_PAGE = "http://www.svcl.ucsd.edu/projects/resound/dataset.html"


def list_diving48(
    root: Path, annotations: Path | None, *, val_share: float = 0.0, seed: int = 0
) -> Listing:
    """List Diving-48 V2.

    Args:
        root: folder with ``<vid_name>.mp4`` anywhere below it.
        annotations: folder of the three JSON files; default: ``root`` or a folder in it.
        val_share: share of the train clips to hold out as split ``val``, in whole source videos
            (the official release has none); 0: no such split.
        seed: of the choice of source videos.

    Raises:
        DataError: the V2 annotations are missing or broken, or no file matches.
        UsageError: ``val_share`` is not in [0, 1).

    Source: http://www.svcl.ucsd.edu/projects/resound/dataset.html
    """
    if not 0 <= val_share < 1:
        raise UsageError(f"val_share {val_share} is not between 0 and 1", fix="val_share 0.1")
    paths = _find_files(root, annotations)
    labels = _read_vocabulary(paths["vocab"])
    rows = [
        row for split in ("train", "test") for row in _read_split(paths[split], split, len(labels))
    ]
    counts = Counter(row.split for row in rows)
    notes = []
    if counts != _COUNTS:
        notes.append(
            f"the annotations have {counts['train']:,} train and {counts['test']:,} test clips; "
            "the official V2 release has 15,027 and 1,970"
        )
    options: dict[str, Any] = {"annotations": [path.name for path in paths.values()]}
    if val_share:
        held_out = _hold_out(rows, val_share, seed)
        rows = [replace(row, split="val") if _is_held(row, held_out) else row for row in rows]
        # Train before val before test, as in all other data sets.
        rows.sort(key=lambda row: ("train", "val", "test").index(row.split))
        held = sum(row.split == "val" for row in rows)
        notes.append(f"{held:,} train clips of {len(held_out):,} source videos are held out as val")
        options |= {"val_share": val_share, "seed": seed}
    with_clips = {row.label for row in rows}
    empty = [f"{i} {name}" for i, name in enumerate(labels) if i not in with_clips]
    if empty:
        notes.append(f"classes without any clip: {', '.join(empty)}")
    files = list(walk_videos(root))
    stems = by_stem(files)
    matched = match_rows(root, rows, files, lambda row: stems.get(row.name, []))
    return matched.listing(
        "diving48",
        root,
        labels,
        notes=notes,
        options=options,
    )


def _find_files(root: Path, annotations: Path | None) -> dict[str, Path]:
    found = {key: find_annotation(root, annotations, [name]) for key, name in _FILES.items()}
    paths = {key: path for key, path in found.items() if path is not None}
    missing = [name for key, name in _FILES.items() if key not in paths]
    if not missing:
        return paths
    first_release = find_annotation(root, annotations, _V1)
    if first_release is not None and "train" not in paths and "test" not in paths:
        raise DataError(
            f"{first_release} has the first labels of Diving-48 (V1), which are not used",
            why="many of them are wrong; the authors replaced them by V2, and figures measured "
            "with V1 cannot be compared with those of V2",
            fix=f"fetch {', '.join(missing)} from {_PAGE}",
        )
    raise DataError(
        f"{', '.join(missing)} not found",
        where=str(annotations or root),
        fix=f"fetch them from {_PAGE} and add --annotations FOLDER",
    )


def _read_vocabulary(path: Path) -> list[str]:
    vocabulary = read_json(path, list)
    for parts in vocabulary:
        if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
            raise DataError(f"{path} is not a list of lists of words", why=f"found {parts!r}")
    return ["+".join(parts) for parts in vocabulary]


def _read_split(path: Path, split: str, classes: int) -> list[Annotated]:
    rows = []
    for number, item in enumerate(read_json(path, list)):
        try:
            row = Annotated(str(item["vid_name"]), int(item["label"]), split)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{path} has an item without vid_name and label",
                where=f"item {number}",
                why=repr(item),
            ) from error
        if not 0 <= row.label < classes:
            raise DataError(
                f"label {row.label} of {row.name} is not one of {classes} classes",
                where=f"{path} item {number}",
            )
        rows.append(row)
    return rows


def _source(name: str) -> str:
    """The video that a clip was cut from; clips of one video look alike."""
    return name.rpartition("_")[0] or name


def _is_held(row: Annotated, held_out: set[str]) -> bool:
    return row.split == "train" and _source(row.name) in held_out


def _hold_out(rows: list[Annotated], val_share: float, seed: int) -> set[str]:
    """Source videos of train, chosen at random until they hold ``val_share`` of its clips."""
    clips = Counter(_source(row.name) for row in rows if row.split == "train")
    sources = sorted(clips)
    random.Random(f"{seed}").shuffle(sources)
    held: set[str] = set()
    wanted = val_share * clips.total()
    # The last one always stays: there must be something to learn from.
    for source in sources[:-1]:
        if wanted <= 0:
            break
        held.add(source)
        wanted -= clips[source]
    return held
