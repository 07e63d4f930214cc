"""Any collection of videos, or of images, in class folders: ``ROOT/<split>/<class>/<file>`` or
``ROOT/<class>/<file>``.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path

from ogreg_core.datasets.journal import owner
from ogreg_core.datasets.listing import (
    RESIZED_MARKER,
    Entry,
    LeftOut,
    Listing,
    is_text,
    walk_videos,
)
from ogreg_core.datasets.place import OUTPUTS
from ogreg_core.errors import DataError
from ogreg_core.files import VIDEO_SUFFIXES

__all__ = ["list_class_folders", "list_folder"]

_SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}


def list_folder(
    root: Path, *, name: str | None = None, val_share: float = 0.2, seed: int = 0
) -> Listing:
    """List a class-folder data set of videos; see :func:`list_class_folders`."""
    return list_class_folders(
        root, VIDEO_SUFFIXES, "videos", name=name, val_share=val_share, seed=seed
    )


def list_class_folders(
    root: Path,
    suffixes: Collection[str],
    kind: str,
    *,
    name: str | None = None,
    val_share: float = 0.2,
    seed: int = 0,
) -> Listing:
    """List a class-folder data set. Classes are in the order of their names, as in torchvision.

    Args:
        root: folder that holds split folders (train, val, test) or class folders.
        suffixes: endings of the files that count.
        kind: what they are, for messages: ``videos`` or ``images``.
        name: data set name to remember; default: the folder's name.
        val_share: share of each class that becomes the ``val`` split where there are no split
            folders.
        seed: of that split.

    Raises:
        DataError: no such folder, or fewer than two classes.
    """
    if not root.is_dir():
        raise DataError(f"{root} is not a folder", fix=f"check the path of your {kind}")
    everything = [path for path in walk_videos(root, suffixes) if not _is_output(root, path)]
    files = [path for path in everything if is_text(path)]
    odd = [path for path in everything if not is_text(path)]
    folders = sorted(path.name for path in root.iterdir() if _is_visible_folder(path))
    splits = _split_folders(root, folders)
    found = _by_split(files, splits) if splits else _split_classes(files, val_share, seed)
    # The classes that can be learnt; others would shift the indices between data sets.
    learnt = found.get("train", [])
    labels = sorted({label for _, label in learnt})
    if len(labels) < 2:
        raise DataError(
            f"{root} holds {len(labels)} classes of training {kind}; at least two are needed",
            why="expected ROOT/<class>/<file> or ROOT/<split>/<class>/<file>",
        )
    if broken := [label for label in labels if "\n" in label]:
        raise DataError(f"the class folder {broken[0]!r} has a line break in its name")
    index = {label: i for i, label in enumerate(labels)}
    entries = [
        Entry(path, index[label], split)
        for split, rows in found.items()
        for path, label in rows
        if label in index
    ]
    used = {entry.path for entry in entries}
    unknown = sorted({label for rows in found.values() for _, label in rows if label not in index})
    notes = [f"class {label!r} has no training {kind} and is left out" for label in unknown]
    notes += [f"class folder {path!r} is empty" for path in _empty(root, folders, splits, files)]
    annotated: dict[str, int] = defaultdict(int)
    for entry in entries:
        annotated[entry.split] += 1
    return Listing(
        dataset=name or root.name,
        root=root,
        labels=labels,
        entries=entries,
        annotated=dict(annotated),
        left_out=[
            LeftOut(ascii(path), "name", "the file name is not valid UTF-8; rename it")
            for path in odd
        ],
        extra=[path for path in files if path not in used],
        notes=notes,
        options={"layout": "splits"} if splits else {"val_share": val_share, "seed": seed},
    )


def _is_visible_folder(path: Path) -> bool:
    """Not hidden, and not made by ``prepare``."""
    return (
        path.is_dir()
        and not path.name.startswith(".")
        and is_text(path.name)
        and not (path / RESIZED_MARKER).exists()
        and owner(path) is None
    )


def _is_output(root: Path, path: str) -> bool:
    """A picture that ``prepare`` has put beside its manifest."""
    return path.rpartition("/")[2] in OUTPUTS and owner((root / path).parent) is not None


def _split_folders(root: Path, folders: list[str]) -> dict[str, str]:
    """Split by folder name; empty if there are none."""
    splits: dict[str, str] = {}
    for folder in folders:
        split = _SPLITS.get(folder.lower())
        if split is None:
            continue
        if split in splits.values():
            other = next(name for name, known in splits.items() if known == split)
            raise DataError(
                f"{root} holds two {split} splits", why=f"{root / other} and {root / folder}"
            )
        splits[folder] = split
    if splits and "train" not in splits.values():
        raise DataError(
            f"{root} has a {' and a '.join(splits)} folder and no train folder",
            fix="add ROOT/train/<class>, or point ROOT to a folder of class folders",
        )
    return splits


Found = dict[str, list[tuple[str, str]]]  # split -> (path, class)


def _by_split(files: list[str], splits: dict[str, str]) -> Found:
    found: Found = defaultdict(list)
    for path in files:
        folder, _, rest = path.partition("/")
        if folder in splits and "/" in rest:
            found[splits[folder]].append((path, rest.partition("/")[0]))
    return dict(found)


def _split_classes(files: list[str], val_share: float, seed: int) -> Found:
    """A seeded split, per class so that none is left out."""
    classes: dict[str, list[str]] = defaultdict(list)
    for path in files:
        if "/" in path:
            classes[path.partition("/")[0]].append(path)
    found: Found = defaultdict(list)
    for label, videos in classes.items():
        random.Random(f"{seed},{label}").shuffle(videos)
        # At least one, so that every class with two videos is validated; at least one to learn from.
        held_out = min(max(round(len(videos) * val_share), 1), len(videos) - 1) if val_share else 0
        for position, video in enumerate(videos):
            found["val" if position < held_out else "train"].append((video, label))
    return {split: sorted(rows) for split, rows in sorted(found.items())}


def _empty(root: Path, folders: list[str], splits: dict[str, str], files: list[str]) -> list[str]:
    """Class folders without a video."""
    if splits:
        candidates = [
            f"{split}/{path.name}"
            for split in splits
            for path in sorted((root / split).iterdir())
            if _is_visible_folder(path)
        ]
        occupied = {"/".join(path.split("/")[:2]) for path in files}
    else:
        candidates = folders
        occupied = {path.split("/")[0] for path in files}
    return [path for path in candidates if path not in occupied]
