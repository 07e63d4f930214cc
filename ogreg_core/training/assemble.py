"""From a validated recipe to a trainer: where configuration ends and plain arguments begin."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ogreg_core.checkpoint import CheckpointInfo, load_checkpoint, save_checkpoint
from ogreg_core.data.loader import ClipDataset, ViewDataset, test_loader, train_loader
from ogreg_core.data.manifest import Manifest, load_manifest
from ogreg_core.data.mixing import Erasing, Mixing
from ogreg_core.data.order import BatchOrder
from ogreg_core.data.rand_augment import parse_rand_augment
from ogreg_core.data.sampling import ClipSampling
from ogreg_core.data.transforms import Augmentation
from ogreg_core.datasets.locations import find_dataset
from ogreg_core.distributed import SINGLE, World
from ogreg_core.errors import (
    CheckpointError,
    DataError,
    EnvironmentFault,
    OutOfMemory,
    UsageError,
)
from ogreg_core.evaluation import compute_metrics, resolve_precision, score_dataset
from ogreg_core.files import write_text_atomic
from ogreg_core.models.conversion import settings_in
from ogreg_core.models.initialisation import spread_by_inputs
from ogreg_core.models.registry import create_model, find_model
from ogreg_core.models.stts import keep_count
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
from ogreg_core.recipe import NOT_LEARNT, LoadedRecipe, Recipe
from ogreg_core.recipe_tables import InitTable
from ogreg_core.runs import RunFolder, environment, find_checkpoint
from ogreg_core.training.loop import LoopSettings, Trainer, Validation
from ogreg_core.training.memory_advice import out_of_memory
from ogreg_core.training.optim import OptimSettings, build_optimizer, build_schedule
from ogreg_core.training.step import StepSettings, TrainStep

log = logging.getLogger("ogreg.train")

__all__ = [
    "Splits",
    "augmentation_of",
    "build_model",
    "build_trainer",
    "check_model",
    "describe_run",
    "identity_of",
    "load_splits",
    "memory_advice",
    "mixing_of",
    "model_of",
    "optim_of",
    "order_of",
    "sampling_of",
    "step_of",
    "training_precision",
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


def optim_of(recipe: Recipe, batch: int) -> OptimSettings:
    """How the recipe moves the weights in steps of so many videos."""
    table = recipe.train
    return OptimSettings(
        lr=table.lr * table.lr_factor(batch),
        weight_decay=table.weight_decay,
        head_lr=table.head_lr,
        backbone_lr=table.backbone_lr,
        layer_decay=table.layer_decay,
        optimizer=table.optimizer,
        momentum=table.momentum,
    )


def order_of(recipe: Recipe, videos: int, world: World = SINGLE) -> BatchOrder:
    """The order of the training split, and this process's share of it.

    Raises:
        UsageError: the recipe's batch cannot be divided by the processes of the job.
    """
    table = recipe.train
    parts = world.size * table.accumulate
    try:
        order = BatchOrder(
            videos,
            recipe.seed,
            table.batch_size,
            processes=world.size,
            rank=world.rank,
            accumulate=table.accumulate,
        )
    except ValueError as error:
        raise UsageError(
            f"train.batch_size = {table.batch_size} does not fit the job",
            why=f"{error}; the training split holds {videos} videos",
            fix=f"train.batch_size={min(table.batch_size, videos) // parts * parts}"
            if videos >= parts <= table.batch_size
            else "fewer processes, or train.accumulate=1",
        ) from error
    mixes = recipe.augment.mixup or recipe.augment.cutmix
    if mixes and order.batch_size // parts * recipe.augment.repeats == 1:
        raise UsageError(
            "mixup and cutmix need at least two clips in a micro-batch",
            why=f"a batch of {order.batch_size} on {world.size} processes leaves one",
            fix="fewer processes, train.accumulate=1, or a larger train.batch_size",
        )
    return order


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
    settings = _step_settings(recipe, videos, steps_per_epoch, precision)
    return TrainStep(model, optimizer, schedule, settings, world)


def _token_frames(recipe: Recipe) -> int:
    """Token frames in the last stage; the stems make one of two frames."""
    left = -(-recipe.data.frames // 2)
    for keep in sorted(recipe.model.token_selection.time, key=lambda keep: keep.before):
        left = keep_count(left, keep.ratio)
    return left


def _step_settings(
    recipe: Recipe, videos: int, steps_per_epoch: int, precision: str
) -> StepSettings:
    table, entry = recipe.train, find_model(recipe.model.name)
    return StepSettings(
        clips_per_step=videos * recipe.augment.repeats,
        clip_grad=table.clip_grad,
        mixing=mixing_of(recipe),
        seed=recipe.seed,
        precision=precision,
        mean=entry.mean,
        std=entry.std,
        steps_per_epoch=steps_per_epoch,
        epochs=table.epochs,
        ema=table.ema,
        checkpoint_stages=table.checkpoint_stages,
        channels_last=table.channels_last,
        compile=table.compile,
        still=_token_frames(recipe) <= 1,
    )


def training_precision(recipe: Recipe, device: torch.device) -> str:
    """The precision that the recipe means on a device; switches TF32 on where it asks for it.

    Raises:
        EnvironmentFault: TF32 without a CUDA device.
    """
    if recipe.train.precision == "tf32":
        if device.type != "cuda":
            raise EnvironmentFault(
                'train.precision = "tf32" needs a CUDA device', fix='train.precision="fp32"'
            )
        torch.set_float32_matmul_precision("high")
    precision = resolve_precision(recipe.train.precision, device)
    # cuDNN uses TF32 unless told otherwise.
    torch.backends.cudnn.allow_tf32 = precision != "fp32"
    return precision


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
