"""The data sets by name: an explicit table that help texts and completion can read without importing
anything heavy.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ogreg_core.datasets.journal import Shard
from ogreg_core.datasets.listing import Listing, is_text
from ogreg_core.errors import DataError, UsageError

__all__ = ["CATALOGUE", "DatasetEntry", "list_dataset", "parse_shard", "shard_of_environment"]


@dataclass(frozen=True)
class DatasetEntry:
    """One data set that ``prepare`` knows.

    Args:
        factory: ``module:function`` that lists it from (root, annotations, options).
        fixed: arguments that this name stands for.
        options: arguments that a user may give, with their defaults.
        annotated: whether it has annotation files.
        images: whether it holds images instead of videos.
        recipe: recipe to go on with.
    """

    factory: str
    recipe: str
    fixed: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    annotated: bool = True
    images: bool = False


_KINETICS = "ogreg_core.datasets.kinetics:list_kinetics"

CATALOGUE: dict[str, DatasetEntry] = {
    "kinetics400": DatasetEntry(_KINETICS, "kinetics400", fixed={"dataset": "kinetics400"}),
    "kinetics600": DatasetEntry(_KINETICS, "kinetics600", fixed={"dataset": "kinetics600"}),
    "ssv2": DatasetEntry("ogreg_core.datasets.ssv2:list_ssv2", "ssv2"),
    "diving48": DatasetEntry(
        "ogreg_core.datasets.diving48:list_diving48",
        "diving48",
        options={"val_share": 0.0, "seed": 0},
    ),
    "ucf101": DatasetEntry("ogreg_core.datasets.ucf101:list_ucf101", "ucf101", options={"fold": 1}),
    "hmdb51": DatasetEntry("ogreg_core.datasets.hmdb51:list_hmdb51", "hmdb51", options={"fold": 1}),
    "folder": DatasetEntry(
        "ogreg_core.datasets.folder:list_folder",
        "folder",
        options={"name": None, "val_share": 0.2, "seed": 0},
        annotated=False,
    ),
    "list": DatasetEntry(
        "ogreg_core.datasets.lists:list_lists",
        "folder",
        options={"name": None, "allow_outside": False},
    ),
    "imagenet1k": DatasetEntry(
        "ogreg_core.datasets.imagefolder:list_imagenet1k",
        "imagenet1k",
        annotated=False,
        images=True,
    ),
    "imagefolder": DatasetEntry(
        "ogreg_core.datasets.imagefolder:list_imagefolder",
        "imagenet1k",
        options={"name": None, "val_share": 0.2, "seed": 0},
        annotated=False,
        images=True,
    ),
}


def list_dataset(
    dataset: str, root: Path, annotations: Path | None = None, **options: Any
) -> Listing:
    """The listing of a data set.

    Args:
        dataset: a key of ``CATALOGUE``.
        root: folder that holds the videos.
        annotations: folder of the annotation files; None: the usual places below ``root``.
        options: of this data set; None stands for the default.

    Raises:
        UsageError: an option that the data set does not have.
        DataError: no such folder, or annotations missing or broken.
    """
    entry = CATALOGUE[dataset]
    given = {key: value for key, value in options.items() if value is not None}
    if annotations is not None and not entry.annotated:
        given["annotations"] = annotations
    if unusable := sorted(set(given) - set(entry.options)):
        words = ", ".join("--" + key.replace("_", "-") for key in unusable)
        raise UsageError(f"{words} cannot be used with {dataset}", fix="ogreg prepare --help")
    for folder in (root, annotations):
        if folder is not None and not folder.is_dir():
            raise DataError(f"{folder} is not a folder", fix="check the path")
    if not is_text(str(root)):
        raise DataError(f"the path {str(root)!a} is not valid UTF-8", fix="rename the folder")
    module, _, function = entry.factory.partition(":")
    factory = getattr(importlib.import_module(module), function)
    arguments = {**entry.fixed, **entry.options, **given}
    listing: Listing = (
        factory(root, annotations, **arguments) if entry.annotated else factory(root, **arguments)
    )
    official = {name for name, known in CATALOGUE.items() if "name" not in known.options}
    if "name" in entry.options and listing.dataset in official:
        raise UsageError(
            f"the name {listing.dataset} belongs to the official data set",
            why=f"ogreg prepare {listing.dataset} gives its official classes and splits",
            fix="--name ANOTHER_NAME",
        )
    return listing


def parse_shard(text: str) -> Shard:
    """``2/4`` as (2, 4).

    Raises:
        UsageError: not of that form, or out of range.
    """
    number, slash, count = text.partition("/")
    if slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count):
        return int(number), int(count)
    raise UsageError(
        f"--shard {text} is not i/n with i from 1 to n", fix="--shard 1/4 ... --shard 4/4"
    )


def shard_of_environment(environment: Mapping[str, str] = os.environ) -> Shard | None:
    """This process's share as torchrun (RANK, WORLD_SIZE) or srun (SLURM_PROCID,
    SLURM_STEP_NUM_TASKS) tell it; None if it works alone.
    """
    # Not SLURM_NTASKS, which a batch script also sees when it runs the command once.
    for rank, size in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")):
        number, count = environment.get(rank, ""), environment.get(size, "")
        if number.isdecimal() and count.isdecimal() and int(count) > 1:
            return int(number) + 1, int(count)
    return None
