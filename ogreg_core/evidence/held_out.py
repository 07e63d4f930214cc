"""Clips held out of a training split, on which learning rates are chosen."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from pathlib import Path

from ogreg_core import __version__
from ogreg_core.data.manifest import Row, load_manifest, read_dataset_info, write_dataset
from ogreg_core.errors import DataError

__all__ = ["hold_out", "split_rows"]


def split_rows(rows: tuple[Row, ...], share: float) -> tuple[list[Row], list[Row]]:
    """Part the rows of each class, the same way on every machine: by the hash of their paths.

    Args:
        rows: of a training split.
        share: held out of each class, at least one video where it has two, and never all.

    Returns:
        those to train on, and those held out, in manifest order.
    """
    by_class = defaultdict(list)
    for row in rows:
        by_class[row.label].append(row)
    held: set[str] = set()
    for members in by_class.values():
        members.sort(key=lambda row: hashlib.sha256(row.path.encode()).hexdigest())
        count = min(max(1, round(share * len(members))), len(members) - 1)
        held |= {row.path for row in members[:count]}
    return [row for row in rows if row.path not in held], [row for row in rows if row.path in held]


def hold_out(data: Path, folder: Path, share: float) -> Path:
    """A data set whose validation split is held out of another's training split; its manifest is written
    once, and again only when the videos have moved, so that who looks while others train changes nothing.

    Args:
        data: prepared data set; its validation split is left alone.
        folder: in which the new manifest gets a folder of its own.
        share: held out of each class.

    Returns:
        the new manifest's folder.

    Raises:
        DataError: no class has two videos.
    """
    train = load_manifest(data, "train")
    target = folder / f"{train.sha256[:12]}-{share:g}"
    root = train.root.resolve()
    if (target / "dataset.json").is_file() and load_manifest(target, "train").root == root:
        return target
    kept, held = split_rows(train.rows, share)
    if not held:
        raise DataError(
            f"{data} has no class with two training videos",
            why="learning rates are tuned on videos held out of the training split",
            fix="give each row its lr in the study",
        )
    write_dataset(
        target,
        dataset=f"{train.dataset}-tuning",
        video_root=root,
        labels=train.labels,
        splits={"train": kept, "val": held},
        mirror={train.labels[a]: train.labels[b] for a, b in train.mirror.items()},
        options={
            # Among others, whether its videos may lie outside its folder.
            **read_dataset_info(data)["options"],
            "held_out_of": train.sha256,
            "share": share,
        },
        version=__version__,
    )
    return target
