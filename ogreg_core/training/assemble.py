"""From a validated recipe to a trainer: where configuration ends and plain arguments begin."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ogreg_core.checkpoint import CheckpointInfo, load_checkpoint, save_checkpoint
from ogreg_core.data.loader import ClipDataset, EpochSampler, ViewDataset, test_loader, train_loader
from ogreg_core.data.manifest import Manifest, load_manifest
from ogreg_core.data.mixing import Erasing, Mixing
from ogreg_core.data.rand_augment import parse_rand_augment
from ogreg_core.data.sampling import ClipSampling
from ogreg_core.data.transforms import Augmentation
from ogreg_core.datasets.locations import find_dataset
from ogreg_core.errors import CheckpointError, DataError, UsageError
from ogreg_core.evaluation import Metrics, compute_metrics, resolve_precision, score_dataset
from ogreg_core.files import write_text_atomic
from ogreg_core.models.registry import create_model, find_model
from ogreg_core.models.weights import (
    TORCHVISION_SWIN,
    LoadReport,
    initialise,
    load_state_file,
    load_torchvision,
    map_swin,
)
from ogreg_core.progress import Note, Progress, ProgressCallback
from ogreg_core.recipe import LoadedRecipe, Recipe
from ogreg_core.runs import RunFolder, environment, find_checkpoint
from ogreg_core.training.loop import Trainer, TrainSettings
from ogreg_core.training.optim import build_optimizer, build_schedule

log = logging.getLogger("ogreg.train")

__all__ = [
    "Splits",
    "augmentation_of",
    "build_model",
    "build_trainer",
    "check_same_data",
    "describe_run",
    "load_splits",
    "mixing_of",
    "sampling_of",
]


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


def build_model(recipe: Recipe, labels: tuple[str, ...]) -> tuple[nn.Module, LoadReport | None]:
    """The recipe's model with its starting weights.

    Raises:
        CheckpointError: starting weights are missing or belong to another model.
    """
    table = recipe.model
    torch.manual_seed(recipe.seed)
    model = create_model(
        table.name, len(labels), drop_path=table.drop_path, dropout=table.dropout, **table.options
    )
    source = recipe.init.weights
    if not source:
        return model, None
    source_labels: list[str] | None = None
    if source in TORCHVISION_SWIN:
        state, source_labels = load_torchvision(source)
    else:
        file = find_checkpoint(source)
        state = load_state_file(file)
        source_labels = _labels_of(file)
    if source_labels is None or source in TORCHVISION_SWIN:
        state = map_swin(state)
    report = initialise(model, state, source, classes=labels, source_classes=source_labels)
    return model, report


def _labels_of(path: Path) -> list[str] | None:
    """Class names if the file is one of our checkpoints."""
    try:
        return load_checkpoint(path)[1].labels
    except CheckpointError:
        return None


def _describe(loaded: LoadedRecipe, splits: Splits) -> CheckpointInfo:
    recipe = loaded.recipe
    entry = find_model(recipe.model.name)
    return CheckpointInfo(
        model=recipe.model.name,
        options=dict(recipe.model.options),
        labels=list(splits.train.labels),
        sampling=sampling_of(recipe),
        size=recipe.data.size,
        short_side=recipe.data.short_side,
        mean=entry.mean,
        std=entry.std,
        clips=recipe.eval.clips,
        crops=recipe.eval.crops,
        split=recipe.data.val_split,
        precision=recipe.train.precision,
        dataset=splits.train.dataset,
        data_folder=str(splits.folder.resolve()),
        recipe=loaded.name,
        recipe_sha256=recipe.sha256,
    )


def sampling_of(recipe: Recipe) -> ClipSampling:
    """How the recipe picks a clip's frames."""
    table = recipe.data
    return ClipSampling(table.sampling, table.frames, table.stride, table.fps, table.short)


def mixing_of(recipe: Recipe) -> Mixing:
    """How the recipe mixes the clips and labels of a batch."""
    return Mixing(
        mixup=recipe.augment.mixup,
        cutmix=recipe.augment.cutmix,
        probability=recipe.augment.mix_probability,
        switch=recipe.augment.mix_switch,
        smoothing=recipe.train.label_smoothing,
    )


def augmentation_of(recipe: Recipe, mirror: dict[int, int]) -> Augmentation:
    """The recipe's augmentation for a data set with the given mirror classes."""
    table = recipe.augment
    return Augmentation(
        size=recipe.data.size,
        short_side=(table.short_side[0], table.short_side[1]),
        inverse=table.inverse,
        crop=table.crop,
        scale=(table.scale[0], table.scale[1]),
        ratio=(table.ratio[0], table.ratio[1]),
        flip=table.flip,
        color_jitter=table.color_jitter,
        hue=table.hue,
        color_probability=table.color_probability,
        grayscale=table.grayscale,
        rand_augment=parse_rand_augment(table.rand_augment),
        erasing=Erasing(table.erasing),
        mirror=mirror,
        repeats=table.repeats,
    )


def build_trainer(
    loaded: LoadedRecipe,
    splits: Splits,
    run: RunFolder,
    *,
    device: torch.device,
    workers: int,
    on_progress: ProgressCallback,
) -> Trainer:
    """Everything wired together.

    Raises:
        CheckpointError: starting weights are missing or belong to another model.
    """
    recipe = loaded.recipe
    info = _describe(loaded, splits)
    model, report = build_model(recipe, splits.train.labels)
    if report is not None:
        on_progress(Note(report.summary()))
    model.to(device)
    precision = resolve_precision(recipe.train.precision, device)
    augmentation = augmentation_of(recipe, splits.train.mirror)
    dataset = ClipDataset(splits.train, info.sampling, augmentation, recipe.seed)
    sampler = EpochSampler(len(dataset), recipe.seed)
    loader = train_loader(dataset, sampler, recipe.train.batch_size, workers)
    optimizer = build_optimizer(model, recipe.train.lr, recipe.train.weight_decay)
    schedule = build_schedule(
        optimizer,
        steps_per_epoch=len(loader),
        epochs=recipe.train.epochs,
        warmup_epochs=recipe.train.warmup_epochs,
        lr=recipe.train.lr,
        min_lr=recipe.train.min_lr,
    )
    views = info.views()
    batch = max(1, recipe.train.batch_size // views.count)
    val_loader = test_loader(ViewDataset(splits.val, views), batch, workers)

    def validate(after_batch: Callable[[], None]) -> Metrics:
        def report(event: Progress | Note) -> None:
            on_progress(event)
            after_batch()

        found = score_dataset(
            model,
            val_loader,
            info.mean,
            info.std,
            precision=precision,
            on_progress=report,
            task="validate",
        )
        for video in found.unreadable:
            on_progress(Note(f"counted as wrong: {video.reason}"))
            log.warning("counted as wrong: %s", video.reason)
        return compute_metrics(found, splits.val)

    def save_model(path: Path, epoch: int, figures: dict[str, float]) -> None:
        described = replace(info, epoch=epoch, metrics=figures)
        save_checkpoint(path, model.state_dict(), described)

    settings = TrainSettings(
        epochs=recipe.train.epochs,
        batch_size=recipe.train.batch_size,
        clip_grad=recipe.train.clip_grad,
        mixing=mixing_of(recipe),
        seed=recipe.seed,
        max_unreadable=recipe.train.max_unreadable,
        precision=precision,
        eval_every=recipe.eval.every,
        mean=info.mean,
        std=info.std,
    )
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    return Trainer(
        model,
        optimizer,
        schedule,
        loader,
        sampler,
        settings,
        run,
        validate,
        save_model,
        lambda index: splits.train.rows[index].path,
        on_progress,
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


def check_same_data(run: RunFolder, splits: Splits) -> None:
    """Refuse to resume on other data than the run began with.

    Raises:
        DataError: names the split whose manifest has changed.
    """
    before, now = run.read_json("data.json"), _describe_data(splits)
    for split in ("train", "val"):
        if before[split] != now[split]:
            raise DataError(
                f"the {split} manifest in {splits.folder} is not the one that {run.path} began with",
                why=f"{before[split]['videos']} videos then, {now[split]['videos']} now",
                fix=f"restore it, or start a new run with --init-from {shlex.quote(str(run.path))}",
            )
