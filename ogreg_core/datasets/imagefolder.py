"""Images in class folders, the layout of torchvision's ImageFolder; ImageNet-1K is one of them.

``ROOT/train/<class>/<file>`` and ``ROOT/val/<class>/<file>``, or ``ROOT/<class>/<file>``. Each image is a
clip of one frame, and everything after the listing takes the way of videos.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path

from ogreg_core.datasets.folder import list_class_folders
from ogreg_core.datasets.listing import Listing
from ogreg_core.errors import DataError
from ogreg_core.files import IMAGE_SUFFIXES

__all__ = ["list_imagefolder", "list_imagenet1k"]

# Official numbers of images (ILSVRC 2012, classification).
_IMAGENET = {"train": 1_281_167, "val": 50_000}
_IMAGENET_CLASSES = 1000


def list_imagefolder(
    root: Path, *, name: str | None = None, val_share: float = 0.2, seed: int = 0
) -> Listing:
    """List a class-folder data set of images.

    Args:
        root: folder that holds split folders (train, val, test) or class folders.
        name: data set name to remember; default: the folder's name.
        val_share: share of each class that becomes the ``val`` split where there are no split
            folders.
        seed: of that split.

    Raises:
        DataError: no such folder, fewer than two classes, or a ``val`` folder without classes.
    """
    listing = list_class_folders(
        root, IMAGE_SUFFIXES, "images", name=name, val_share=val_share, seed=seed
    )
    flat = [path for path in listing.extra if re.fullmatch(r"val[a-z]*/[^/]+", path, re.IGNORECASE)]
    if flat and "val" not in listing.annotated and "layout" in listing.options:
        raise DataError(
            f"{root / Path(flat[0]).parent} holds {len(flat):,} images and no class folders",
            why="as the archive of ImageNet's validation images unpacks; their classes are elsewhere",
            fix="move them into class folders as in train, for ImageNet by the table in its devkit",
        )
    return listing


def list_imagenet1k(root: Path) -> Listing:
    """List ImageNet-1K, its classes by WordNet number, which is the order of all published weights.

    Args:
        root: folder that holds ``train`` and ``val``, each with 1,000 class folders.

    Raises:
        DataError: other classes or no such folders.
    """
    listing = list_imagefolder(root, name="imagenet1k")
    official = [label for label in listing.labels if re.fullmatch(r"n\d{8}", label)]
    if len(official) != _IMAGENET_CLASSES or official != listing.labels:
        raise DataError(
            f"{root} does not hold the classes of ImageNet-1K",
            why=f"{len(official):,} of {len(listing.labels):,} class folders have names such as "
            f"n01440764; {_IMAGENET_CLASSES:,} are expected",
            fix=f"ogreg prepare imagefolder {shlex.quote(str(root))}",
        )
    annotated = {split: _IMAGENET.get(split, found) for split, found in listing.annotated.items()}
    return replace(listing, annotated=annotated)
