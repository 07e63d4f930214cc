"""From a validated recipe to a trainer: model, starting weights, step and validation wired together."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ogreg_core.checkpoint import CheckpointInfo, load_checkpoint, save_checkpoint
from ogreg_core.data.loader import ClipDataset, ViewDataset, test_loader, train_loader
from ogreg_core.distributed import SINGLE, World
from ogreg_core.errors import CheckpointError, OutOfMemory
from ogreg_core.evaluation import compute_metrics, score_dataset
from ogreg_core.models.conversion import settings_in
from ogreg_core.models.initialisation import spread_by_inputs
from ogreg_core.models.registry import create_model, find_model
from ogreg_core.models.weights import (
    PRETRAINED,
    LoadReport,
    initialise,
    load_torchvision,
    map_names,
    read_state_file,
)
from ogreg_core.profiling import peak_memory_mb
from ogreg_core.progress import Note, Progress, ProgressCallback
from ogreg_core.recipe import LoadedRecipe, Recipe
from ogreg_core.recipe_tables import InitTable
from ogreg_core.runs import RunFolder, find_checkpoint
from ogreg_core.training.loop import LoopSettings, Trainer, Validation
from ogreg_core.training.memory_advice import out_of_memory
from ogreg_core.training.optim import build_optimizer, build_schedule
from ogreg_core.training.settings import (
    augmentation_of,
    optim_of,
    order_of,
    sampling_of,
    step_settings_of,
    training_precision,
)
from ogreg_core.training.splits import Splits, identity_of
from ogreg_core.training.step import TrainStep

log = logging.getLogger("ogreg.train")

__all__ = ["build_model", "build_trainer", "check_model", "memory_advice", "model_of", "step_of"]


def model_of(recipe: Recipe, classes: int) -> nn.Module:
    """The recipe's model, freshly initialised."""
    table = recipe.model
    return create_model(
        table.name,
        classes,
        frames=recipe.data.frames,
        size=recipe.data.size,
        drop_path=table.drop_path,
        dropout=table.dropout,
        **table.architecture(),
    )


def check_model(recipe: Recipe, classes: int) -> None:
    """Refuse choices that do not go together, before anything is written; takes no memory.

    Raises:
        UsageError: the architecture cannot be built.
    """
    with torch.device("meta"):
        model_of(recipe, classes)


def build_model(recipe: Recipe, labels: tuple[str, ...]) -> tuple[nn.Module, LoadReport | None]:
    """The recipe's model with its starting weights.

    Raises:
        CheckpointError: starting weights are missing or belong to another model.
    """
    torch.manual_seed(recipe.seed)
    model = model_of(recipe, len(labels))
    if recipe.init.linear == "fan-in":
        spread_by_inputs(model)
    source = recipe.init.weights
    if not source:
        return model, None
    source_labels: list[str] | None = None
    if source in PRETRAINED:
        state, source_labels = load_torchvision(source)
        told = {}
    else:
        file = find_checkpoint(source)
        state, configuration = read_state_file(file)
        source_labels = _labels_of(file)
        told = settings_in(recipe.model.name, state, configuration)
    if source_labels is None or source in PRETRAINED:
        state = map_names(recipe.model.name, state)
    report = initialise(model, state, source, classes=labels, source_classes=source_labels)
    # Such settings leave no trace in the shapes, or one that only shows as another shape.
    built = {key: getattr(getattr(model, "config", None), key, None) for key in told}
    report.other_settings.extend(
        f"{key} {value}, not {built[key]}" for key, value in told.items() if value != built[key]
    )
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
        options=recipe.model.architecture(),
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
        experiment_sha256=recipe.experiment_sha256,
        seed=recipe.seed,
    )


def step_of(
    recipe: Recipe,
    model: nn.Module,
    precision: str,
    *,
    videos: int,
    batch: int,
    steps_per_epoch: int,
    world: World = SINGLE,
) -> TrainStep:
    """The recipe's optimiser step for a model on its device.

    Args:
        recipe: optimiser, schedule, mixing and what saves memory.
        model: with its starting weights.
        precision: see :func:`training_precision`.
        videos: whose clips make a step.
        batch: videos of a step that the learning rate is scaled to.
        steps_per_epoch: of the schedule.
        world: the processes that share a step.
    """
    table = recipe.train
    optimizer = build_optimizer(model, optim_of(recipe, batch))
    schedule = build_schedule(
        optimizer,
        steps_per_epoch=steps_per_epoch,
        epochs=table.epochs,
        warmup_epochs=table.warmup_epochs,
        lr=table.lr,
        min_lr=table.min_lr,
    )
    settings = step_settings_of(recipe, videos, steps_per_epoch, precision)
    return TrainStep(model, optimizer, schedule, settings, world)


def build_trainer(
    loaded: LoadedRecipe,
    splits: Splits,
    run: RunFolder,
    *,
    device: torch.device,
    workers: int,
    on_progress: ProgressCallback,
    world: World = SINGLE,
    save_seconds: float = 600.0,
    starting_weights: bool = True,
) -> Trainer:
    """Everything wired together.

    Args:
        loaded: what is learnt.
        splits: from which videos.
        run: where everything is written.
        device, workers: where the model runs, and how many processes load its clips.
        on_progress: receives progress events.
        world: the processes of the job.
        save_seconds: longest time between two saved states within an epoch.
        starting_weights: whether to load those of the recipe; a resumed training has its own.

    Raises:
        CheckpointError: starting weights are missing or belong to another model.
        UsageError: the recipe's batch cannot be divided by the processes of the job.
    """
    recipe = loaded.recipe
    table = recipe.train
    info = _describe(loaded, splits)
    order = order_of(recipe, len(splits.train.rows), world)
    precision = training_precision(recipe, device)
    began = recipe if starting_weights else recipe.model_copy(update={"init": InitTable()})
    model = _build_in_turn(began, splits, run, world, on_progress).to(device)
    step = step_of(
        recipe,
        model,
        precision,
        videos=order.batch_size,
        batch=order.batch_size,
        steps_per_epoch=order.batches_per_epoch,
        world=world,
    )
    augmentation = augmentation_of(recipe, splits.train.mirror)
    dataset = ClipDataset(splits.train, info.sampling, augmentation, recipe.seed)

    def save_model(path: Path, kept: nn.Module, notes: dict[str, Any]) -> None:
        save_checkpoint(path, kept.state_dict(), replace(info, **notes))

    run.checkpoints.mkdir(parents=True, exist_ok=True)
    return Trainer(
        step,
        train_loader(dataset, order, workers),
        order,
        LoopSettings(
            epochs=table.epochs,
            max_unreadable=table.max_unreadable,
            eval_every=recipe.eval.every,
            save_seconds=save_seconds,
            identity=identity_of(recipe, splits),
        ),
        run,
        world,
        splits.train.labels,
        _validator(recipe, info, splits, precision, workers, on_progress, world),
        save_model,
        lambda index: splits.train.rows[index].path,
        lambda why: memory_advice(
            recipe,
            model,
            order.batch_size // order.processes // order.accumulate,
            precision,
            device,
            peak_memory_mb(device),
            why,
        ),
        on_progress,
    )


def memory_advice(
    recipe: Recipe,
    model: nn.Module,
    videos: int,
    precision: str,
    device: torch.device,
    peak_mb: float,
    why: str = "",
) -> OutOfMemory:
    """The error for a micro-batch of so many videos that does not fit into memory."""
    return out_of_memory(
        videos=videos,
        repeats=recipe.augment.repeats,
        frames=recipe.data.frames,
        size=recipe.data.size,
        accumulate=recipe.train.accumulate,
        checkpoint_stages=recipe.train.checkpoint_stages,
        precision=precision,
        peak_bytes=int(peak_mb * 2**20),
        device=device,
        stages=len(model.stage_blocks()),  # type: ignore[operator]
        why=why,
    )


def _build_in_turn(
    recipe: Recipe, splits: Splits, run: RunFolder, world: World, on_progress: ProgressCallback
) -> nn.Module:
    """The model with its starting weights; the main process first, which may fetch them for all."""
    built: list[nn.Module] = []

    def build() -> None:
        model, report = build_model(recipe, splits.train.labels)
        built.append(model)
        if report is not None and world.is_main:
            on_progress(Note(report.summary()))
            run.write_json("init.json", report.as_dict())

    world.on_main(build)
    if not built:
        build()
    return built[0]


def _validator(
    recipe: Recipe,
    info: CheckpointInfo,
    splits: Splits,
    precision: str,
    workers: int,
    on_progress: ProgressCallback,
    world: World,
) -> Callable[[nn.Module, Callable[[], None]], Validation]:
    views = info.views()
    batch = max(1, recipe.train.batch_size // world.size // recipe.train.accumulate // views.count)
    loader = test_loader(ViewDataset(splits.val, views), batch, workers, world)

    def validate(model: nn.Module, after_batch: Callable[[], None]) -> Validation:
        def report(event: Progress | Note) -> None:
            on_progress(event)
            after_batch()

        found = score_dataset(
            model,
            loader,
            info.mean,
            info.std,
            precision=precision,
            on_progress=report,
            task="validate",
            world=world,
        )
        for video in found.unreadable:
            on_progress(Note(f"counted as wrong: {video.reason}"))
            log.warning("counted as wrong: %s", video.reason)
        return Validation(compute_metrics(found, splits.val), found)

    return validate
