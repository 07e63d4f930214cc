"""Where a manifest goes, so that nothing of somebody else is overwritten."""

from __future__ import annotations

import os
from pathlib import Path

from ogreg_core.data.manifest import (
    DATASET_FILE,
    LABELS_FILE,
    SPLITS,
    is_manifest,
    read_dataset_info,
)
from ogreg_core.datasets.journal import owner
from ogreg_core.datasets.listing import Listing
from ogreg_core.errors import DataError, EnvironmentFault

__all__ = ["OUTPUTS", "check_writable", "choose_folder"]

# Our files, which may bear the names of somebody else's.
_TABLES = tuple(f"{split}.csv" for split in SPLITS)
OUTPUTS = (*_TABLES, LABELS_FILE, DATASET_FILE, "quarantine.csv", "extra.txt", "overview.png")


def choose_folder(listing: Listing, out: Path | None) -> Path:
    """Where the manifest goes: ``out``, else the data set's folder, else one inside it.

    Raises:
        DataError: ``out`` holds files of somebody else that would be overwritten.
        EnvironmentFault: the data set's folder is read-only.
    """
    folder = out.expanduser().resolve() if out else listing.root.resolve()
    foreign = _foreign_file(folder, listing.dataset)
    if out is None and foreign:
        check_writable(folder)
        folder = folder / f"ogreg-{listing.dataset}"
        foreign = _foreign_file(folder, listing.dataset)
    if foreign:
        raise DataError(
            f"{foreign} would be overwritten",
            why=f"it is not of a manifest of {listing.dataset} that ogreg wrote",
            fix="--out NEW_FOLDER",
        )
    return folder


def _foreign_file(folder: Path, dataset: str) -> Path | None:
    """A file that would be overwritten and is not of this data set's manifest."""
    for name in _TABLES:
        if (folder / name).is_file() and not is_manifest(folder / name):
            return folder / name
    ours = owner(folder)
    if ours is None and (folder / DATASET_FILE).is_file():
        ours = read_dataset_info(folder)["dataset"]
    if ours == dataset:
        return None
    return next((folder / n for n in OUTPUTS if (folder / n).exists()), None)


def check_writable(folder: Path) -> None:
    """Refuse a folder that the manifest cannot be written to.

    Raises:
        EnvironmentFault: it cannot be created, or is read-only.
    """
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
