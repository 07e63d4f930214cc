"""Any collection of videos in class folders: ``ROOT/<split>/<class>/<file>`` or
``ROOT/<class>/<file>``.
"""

from __future__ import annotations

import os
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

from ogreg_core import __version__
from ogreg_core.data.manifest import Row, write_dataset
from ogreg_core.datasets.common import PrepareReport, probe_rows, write_quarantine
from ogreg_core.datasets.locations import remember
from ogreg_core.errors import DataError, EnvironmentFault
from ogreg_core.files import VIDEO_SUFFIXES
from ogreg_core.progress import ProgressCallback

__all__ = ["prepare_folder"]

_SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}

Listing = dict[str, list[tuple[str, str]]]  # split -> (relative path, class)


def prepare_folder(
    root: Path,
    *,
    out: Path | None = None,
    name: str | None = None,
    val_share: float = 0.2,
    seed: int = 0,
    workers: int = 0,
    mirror: dict[str, str] | None = None,
    options: dict[str, Any] | None = None,
    on_progress: ProgressCallback,
) -> PrepareReport:
    """Write the manifest of a class-folder data set; no video is moved or changed.

    Args:
        root: folder that holds split folders (train, val, test) or class folders.
        out: where the manifest goes; default ``root``.
        name: data set name to remember; default: the folder's name.
        val_share: share of each class that becomes the ``val`` split where there are no split
            folders.
        seed: of that split.
        workers: processes for probing; 0: this one.
        mirror: class names that a left-right flip exchanges.
        options: how the videos came about, recorded instead of the split's options.
        on_progress: receives progress events.

    Raises:
        DataError: no such folder, no classes, or no readable video.
        EnvironmentFault: the manifest cannot be written there.
    """
    root = root.expanduser().resolve()
    if not root.is_dir():
        raise DataError(f"{root} is not a folder", fix="ogreg prepare folder PATH_TO_YOUR_VIDEOS")
    folder = (out or root).resolve()
    _check_writable(folder)
    listing = _list_split_folders(root) or _split_class_folders(root, val_share, seed)
    classes = sorted({label for files in listing.values() for _, label in files})
    if len(classes) < 2:
        raise DataError(
            f"{root} holds {len(classes)} classes of videos; at least two are needed",
            why="expected ROOT/<class>/<video> or ROOT/<split>/<class>/<video>",
        )
    index = {label: i for i, label in enumerate(classes)}
    splits: dict[str, list[Row]] = {}
    quarantined = []
    for split, files in listing.items():
        rows, bad = probe_rows(
            root, [(path, index[label]) for path, label in files], workers, on_progress
        )
        splits[split] = rows
        quarantined += bad
    if not any(splits.values()):
        raise DataError(f"none of the videos in {root} can be read", why=quarantined[0].detail)
    write_quarantine(folder, quarantined)
    name = name or root.name
    options = options or {"val_share": val_share, "seed": seed}
    write_dataset(
        folder,
        dataset=name,
        video_root=root,
        labels=classes,
        splits=splits,
        mirror={k: v for k, v in (mirror or {}).items() if k in index and v in index},
        options={**options, "quarantined": len(quarantined)},
        version=__version__,
    )
    remember(name, folder)
    counts = {split: len(rows) for split, rows in splits.items()}
    return PrepareReport(name, folder, counts, classes, quarantined)


def _check_writable(folder: Path) -> None:
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


def _videos(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file()
    )


def _folders(root: Path) -> list[Path]:
    return sorted(
        path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")
    )


def _list_split_folders(root: Path) -> Listing:
    """The ``ROOT/<split>/<class>/<file>`` layout; empty if there is no train folder."""
    folders: dict[str, Path] = {}
    for folder in _folders(root):
        split = _SPLITS.get(folder.name.lower())
        if split in folders:
            raise DataError(
                f"{root} holds two {split} splits", why=f"{folders[split]} and {folder}"
            )
        if split:
            folders[split] = folder
    if "train" not in folders:
        return {}
    return {
        split: [
            (video.relative_to(root).as_posix(), class_folder.name)
            for class_folder in _folders(folder)
            for video in _videos(class_folder)
        ]
        for split, folder in folders.items()
    }


def _split_class_folders(root: Path, val_share: float, seed: int) -> Listing:
    """The ``ROOT/<class>/<file>`` layout with a seeded split, per class so that none is left out."""
    listing: Listing = defaultdict(list)
    for class_folder in _folders(root):
        videos = _videos(class_folder)
        random.Random(f"{seed},{class_folder.name}").shuffle(videos)
        # At least one, so that every class with two videos is validated; at least one to learn from.
        held_out = min(max(round(len(videos) * val_share), 1), len(videos) - 1) if val_share else 0
        for position, video in enumerate(videos):
            split = "val" if position < held_out else "train"
            listing[split].append((video.relative_to(root).as_posix(), class_folder.name))
    return {split: sorted(files) for split, files in sorted(listing.items())}
