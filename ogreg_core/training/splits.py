"""The data of a training: found, checked, and what a run records of them to be known by."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ogreg_core.data.manifest import Manifest, load_manifest
from ogreg_core.datasets.locations import find_dataset
from ogreg_core.errors import DataError, UsageError
from ogreg_core.files import write_text_atomic
from ogreg_core.recipe import NOT_LEARNT, LoadedRecipe, Recipe
from ogreg_core.runs import RunFolder, environment

__all__ = ["Splits", "describe_run", "identity_of", "load_splits"]


@dataclass(frozen=True)
class Splits:
    """The manifests of a training."""

    folder: Path
    train: Manifest
    val: Manifest


def load_splits(recipe: Recipe, folder: Path | None = None) -> Splits:
    """Find and read the data set of a recipe.

    Args:
        recipe: names the data set and its splits.
        folder: where the manifest lies, if that is known.

    Raises:
        DataError: not prepared, or broken.
    """
    folder = folder or find_dataset(recipe.data.dataset, recipe.data.root)
    train = load_manifest(folder, recipe.data.train_split)
    val = load_manifest(folder, recipe.data.val_split)
    if len(train.rows) < 2:
        raise DataError(
            f"the training split of {folder} holds {len(train.rows)} videos; at least two are needed"
        )
    for manifest in (train, val):
        manifest.require_labels()
    _check_flip(recipe.augment.flip, train)
    return Splits(folder, train, val)


def _check_flip(flip: str, manifest: Manifest) -> None:
    """Refuse flips that would teach wrong labels without a word.

    Raises:
        UsageError: the recipe's flip does not fit the data set's mirror classes.
    """
    if flip == "random" and manifest.mirror:
        first, second = (manifest.labels[i] for i in next(iter(manifest.mirror.items())))
        raise UsageError(
            'augment.flip = "random" would turn classes into each other under their old labels',
            why=f"{len(manifest.mirror)} classes of {manifest.dataset}, such as {first!r} and {second!r}",
            fix='augment.flip="skip" leaves them unflipped, "swap" changes their label',
        )
    if flip in ("skip", "swap") and not manifest.mirror:
        raise UsageError(
            f'augment.flip = "{flip}" needs to know which classes a flip turns into each other',
            why=f"{manifest.dataset} names none",
            fix='augment.flip="random" if there are none, "none" otherwise; or fill in '
            f"mirror in {manifest.root / 'dataset.json'}",
        )


def describe_run(run: RunFolder, loaded: LoadedRecipe, splits: Splits) -> None:
    """Write what a new run starts from: recipe, environment and data."""
    write_text_atomic(run.path / "recipe.toml", loaded.recipe.to_toml())
    run.write_json("env.json", environment())
    run.write_json("data.json", {"recipe": loaded.name, **_describe_data(splits)})


def _describe_data(splits: Splits) -> dict[str, Any]:
    return {
        "dataset": splits.train.dataset,
        "folder": str(splits.folder.resolve()),
        "classes": len(splits.train.labels),
        "train": {"videos": len(splits.train.rows), "sha256": splits.train.sha256},
        "val": {"videos": len(splits.val.rows), "sha256": splits.val.sha256},
    }


def identity_of(recipe: Recipe, splits: Splits) -> dict[str, Any]:
    """What a training must agree in to be continued: every value of its recipe by dotted key but for
    those that only say where and in how much memory, the clips of a step, the classes and the content
    of both manifests.
    """
    classes = hashlib.sha256("\n".join(splits.train.labels).encode()).hexdigest()
    batch = min(recipe.train.batch_size, len(splits.train.rows))
    return {
        **{key: value for key, value in recipe.flat().items() if key not in NOT_LEARNT},
        "seed": recipe.seed,
        "clips per step": batch * recipe.augment.repeats,
        "classes": f"{len(splits.train.labels)} ({classes[:12]})",
        "training manifest": f"{len(splits.train.rows)} videos ({splits.train.sha256[:12]})",
        "validation manifest": f"{len(splits.val.rows)} videos ({splits.val.sha256[:12]})",
    }
