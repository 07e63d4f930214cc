"""From the tables of a recipe to plain arguments: sampling, augmentation, order, optimiser, step."""

from __future__ import annotations

import torch

from ogreg_core.data.mixing import Erasing, Mixing
from ogreg_core.data.order import BatchOrder
from ogreg_core.data.rand_augment import parse_rand_augment
from ogreg_core.data.sampling import ClipSampling
from ogreg_core.data.transforms import Augmentation
from ogreg_core.distributed import SINGLE, World
from ogreg_core.errors import EnvironmentFault, UsageError
from ogreg_core.evaluation import resolve_precision
from ogreg_core.models.registry import find_model
from ogreg_core.models.stts import keep_count
from ogreg_core.recipe import Recipe
from ogreg_core.training.optim import OptimSettings
from ogreg_core.training.step import StepSettings

__all__ = [
    "augmentation_of",
    "mixing_of",
    "optim_of",
    "order_of",
    "sampling_of",
    "step_settings_of",
    "training_precision",
]


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


def step_settings_of(
    recipe: Recipe, videos: int, steps_per_epoch: int, precision: str
) -> StepSettings:
    """What a step of so many videos does besides moving the weights; see :func:`training_precision`."""
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


def _token_frames(recipe: Recipe) -> int:
    """Token frames in the last stage; the stems make one of two frames."""
    left = -(-recipe.data.frames // 2)
    for keep in sorted(recipe.model.token_selection.time, key=lambda keep: keep.before):
        left = keep_count(left, keep.ratio)
    return left


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
