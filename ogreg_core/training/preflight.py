"""What can be known before a training starts: the work behind ``ogreg train --dry-run``, and the
quick part of it that precedes every training.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ogreg_core import profiling
from ogreg_core.data.loader import (
    ClipDataset,
    TrainBatch,
    ViewDataset,
    Views,
    batches,
    train_loader,
)
from ogreg_core.data.sampling import positions
from ogreg_core.data.transforms import TestCrops
from ogreg_core.distributed import World
from ogreg_core.errors import CheckpointError, DataError, EnvironmentFault
from ogreg_core.models.weights import PRETRAINED
from ogreg_core.recipe import LoadedRecipe, Recipe
from ogreg_core.recipe_tables import InitTable
from ogreg_core.training.announcement import PLACEHOLDER_CLASSES
from ogreg_core.training.assemble import build_model, memory_advice, model_of, step_of
from ogreg_core.training.rehearsal import Rehearsal, invented_batch, loading_rate, rehearse
from ogreg_core.training.settings import augmentation_of, order_of, sampling_of, training_precision
from ogreg_core.training.splits import Splits, load_splits
from ogreg_core.video.decoders import decord_available

__all__ = ["Preflight", "check_recipe", "quick_checks", "waiting_share"]

# Below this share of its time it does not matter that the model waits for data.
_WORTH_A_WORD = 0.05
_MOST_NAMES = 5
_BYTES_PER_NUMBER = 4


@dataclass
class Preflight:
    """What a dry run found.

    Args:
        figures: by name.
        missing: sentences about data and weights that are not there.
        problems: sentences about what would stop the training, with what to do.
        notes: sentences worth reading before it starts.
    """

    figures: dict[str, Any] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def quick_checks(recipe: Recipe, splits: Splits, run_parent: Path) -> list[str]:
    """What the manifests and the disk say about a training; no video is opened.

    Args:
        recipe: what shall be trained.
        splits: on what.
        run_parent: the run's folder, or one above it that need not exist yet.

    Returns:
        One sentence for each thing worth knowing.

    Raises:
        EnvironmentFault: the disk has no room for the checkpoints.
    """
    return [
        *_check_labels(splits),
        *_check_lengths(recipe, splits),
        *_check_overlap(splits),
        *_check_decoders(splits),
        *_check_disk(recipe, len(splits.train.labels), run_parent),
    ]


def _check_labels(splits: Splits) -> Iterable[str]:
    labels = splits.train.labels
    learnt = {row.label for row in splits.train.rows}
    never = [name for number, name in enumerate(labels) if number not in learnt]
    if never:
        yield (
            f"{len(never)} of {len(labels)} classes have no training video: {_some(never)}; the "
            "classifier has a place for them all the same"
        )
    asked = sorted({row.label for row in splits.val.rows} - learnt)
    if asked:
        names = _some([labels[number] for number in asked])
        yield f"{len(asked)} classes are validated but never trained on: {names}"


def _check_lengths(recipe: Recipe, splits: Splits) -> Iterable[str]:
    sampling = sampling_of(recipe)
    if sampling.frames == 1:
        return
    dense = sampling.kind == "dense"
    window = (sampling.frames - 1) * sampling.stride + 1 if dense else sampling.frames
    for manifest in (splits.train, splits.val):
        lengths = ((positions(row, sampling), row.path) for row in manifest.rows)
        short = [(length, path) for length, path in lengths if length < window]
        if short:
            shortest, path = min(short)
            end = "begin again" if sampling.short == "loop" else "hold their last frame"
            effect = f'{end} (data.short = "{sampling.short}")' if dense else "repeat frames"
            yield (
                f"{len(short)} of {len(manifest.rows)} videos in {manifest.split} are shorter than "
                f"a clip of {window} frames and {effect}; the shortest has {shortest}: {path}"
            )


def _check_overlap(splits: Splits) -> Iterable[str]:
    both = sorted({row.path for row in splits.train.rows} & {row.path for row in splits.val.rows})
    if both:
        yield f"{len(both)} videos are in both {splits.train.split} and {splits.val.split}: {_some(both)}"


def _check_decoders(splits: Splits) -> Iterable[str]:
    counts = Counter(
        row.decoder for manifest in (splits.train, splits.val) for row in manifest.rows
    )
    if counts["decord"] and not decord_available():
        counts["pyav (decord is not installed)"] += counts.pop("decord")
    yield "decoders: " + ", ".join(f"{number} {name}" for name, number in counts.most_common())


def _check_disk(recipe: Recipe, classes: int, run_parent: Path) -> Iterable[str]:
    """A checkpoint for the best and one for the last epoch, and the state: weights, two moments and
    the moving average. Each is written beside its predecessor before it takes its place.
    """
    average = 1 if recipe.train.ema else 0
    weights = _BYTES_PER_NUMBER * _count_parameters(recipe, classes)
    kept = weights * (2 + 3 + average)
    present = sum(
        file.stat().st_size for file in run_parent.glob("checkpoints/*") if file.is_file()
    )
    place = run_parent.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    needed = max(2 * kept - present, 0)
    if free < needed:
        raise EnvironmentFault(
            f"checkpoints and state need {_amount(needed)}, the disk has {_amount(free)} left",
            where=str(place),
            fix="free some space, or choose another place with --out",
        )
    if free < 2 * needed:
        yield f"{place} has {_amount(free)} left; checkpoints and state need {_amount(needed)}"


def _count_parameters(recipe: Recipe, classes: int) -> int:
    with torch.device("meta"):
        model = model_of(recipe, classes)
    return profiling.count_parameters(model)


def _amount(number: float) -> str:
    return f"{number / 2**30:.1f} GB" if number >= 2**30 else f"{number / 2**20:.0f} MB"


def _some(names: list[str]) -> str:
    more = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def check_recipe(
    loaded: LoadedRecipe, device: torch.device, workers: int = 0, processes: int = 1
) -> Preflight:
    """Read the manifests, build the model, make a few steps at the micro-batch's size on invented
    clips, and load real ones as the training would.

    Missing data or weights and too little memory or disk are reported, not raised; a model that
    cannot be built is an error. Nothing is written.

    Args:
        loaded: what shall be trained.
        device: where.
        workers: processes of the loader.
        processes: that will share a step; speeds are those of one times their number.
    """
    recipe = loaded.recipe
    found = Preflight()
    splits = _find_data(loaded, processes, found)
    labels = (
        splits.train.labels if splits else tuple(f"class {i}" for i in range(PLACEHOLDER_CLASSES))
    )
    found.figures["classes"] = len(labels)
    model = _find_model(recipe, labels, found)
    trained = _rehearse(recipe, labels, model, device, processes, found)
    if splits and not any(text.startswith("videos:") for text in found.missing):
        _compare_speeds(recipe, splits, trained, device, workers, processes, found)
    return found


def _find_data(loaded: LoadedRecipe, processes: int, found: Preflight) -> Splits | None:
    recipe = loaded.recipe
    try:
        splits = load_splits(recipe)
    except DataError as error:
        found.missing.append(f"data: {error}")
        return None
    order = order_of(recipe, len(splits.train.rows), World(size=processes))
    found.figures["processes"] = processes
    found.figures["training_videos"] = len(splits.train.rows)
    found.figures["validation_videos"] = len(splits.val.rows)
    found.figures["steps_per_epoch"] = order.batches_per_epoch
    found.figures["clips_per_step"] = order.batch_size * recipe.augment.repeats
    if splits.val.annotated:
        share = 100.0 * len(splits.val.rows) / splits.val.annotated
        found.figures["validation_coverage_pct"] = share
    try:
        found.notes += quick_checks(recipe, splits, Path("runs", "train", loaded.name))
    except EnvironmentFault as error:
        found.problems.append(str(error))
    _load_one_of_each(recipe, splits, found)
    return splits


def _find_model(recipe: Recipe, labels: tuple[str, ...], found: Preflight) -> nn.Module:
    scratch = recipe.model_copy(update={"init": InitTable()})
    if recipe.init.weights in PRETRAINED:
        # Not fetched here: a dry run uses no network and writes no cache.
        found.figures["starting_weights"] = f"{recipe.init.weights}, fetched by name at the start"
        recipe = scratch
    try:
        model, report = build_model(recipe, labels)
    except CheckpointError as error:
        found.missing.append(f"starting weights: {error}")
        model, report = build_model(scratch, labels)
    if report is not None:
        found.figures["starting_weights"] = report.summary()
    found.figures["model"] = recipe.model.name
    found.figures["params_m"] = profiling.count_parameters(model) / 1e6
    clip = torch.randn(1, 3, recipe.data.frames, recipe.data.size, recipe.data.size)
    found.figures["gmacs_per_view"] = profiling.count_multiply_adds(model, clip).total / 1e9
    found.figures["views_per_video"] = recipe.eval.clips * recipe.eval.crops
    return model


def _load_one_of_each(recipe: Recipe, splits: Splits, found: Preflight) -> None:
    """One training sample and the views of one test video, as training would load them."""
    sampling = sampling_of(recipe)
    augmentation = augmentation_of(recipe, splits.train.mirror)
    crops = TestCrops(recipe.data.size, recipe.data.short_side, recipe.eval.crops)
    try:
        started = time.perf_counter()
        sample = ClipDataset(splits.train, sampling, augmentation, recipe.seed)[0, 0]
        found.figures["load_training_sample_s"] = time.perf_counter() - started
        started = time.perf_counter()
        views = ViewDataset(splits.val, Views(sampling, recipe.eval.clips, crops))[0]
        found.figures["load_test_video_s"] = time.perf_counter() - started
    except DataError as error:
        found.missing.append(f"videos: {error}")
        return
    found.missing += [f"video: {v.reason}" for v in (*sample.unreadable, *views.unreadable)]


def _rehearse(
    recipe: Recipe,
    labels: tuple[str, ...],
    model: nn.Module,
    device: torch.device,
    processes: int,
    found: Preflight,
) -> Rehearsal:
    """A few real steps on invented clips."""
    data, table = recipe.data, recipe.train
    videos = table.batch_size // table.accumulate // processes
    clips = videos * recipe.augment.repeats
    precision = training_precision(recipe, device)
    step = step_of(
        recipe,
        model.to(device),
        precision,
        videos=videos,
        batch=table.batch_size,
        steps_per_epoch=1,
    )

    def make(batch: TrainBatch) -> object:
        return step([batch], 0, 0)

    def batch_of(count: int) -> TrainBatch:
        return invented_batch(count, data.frames, data.size, len(labels))

    measured = rehearse(make, batch_of, clips, device)
    found.figures["clips_per_micro_batch"] = clips
    found.figures["rehearsed_clips"] = measured.clips
    found.figures["precision"] = precision
    found.figures["step_s"] = measured.seconds
    gpu = device.type == "cuda"
    found.figures["peak_memory_mb"] = measured.peak_mb
    found.figures["peak_memory_is"] = "allocated" if gpu else "growth of the resident set"
    if measured.clips < clips and measured.fits:
        found.figures["micro_batch_memory_mb"] = measured.needed_mb
    found.figures["fits_into_memory"] = measured.fits
    if 0 < measured.clips < clips:
        found.notes.append(
            f"the step was made with {measured.clips} of {clips} clips; the rest is computed from it"
        )
    if not measured.fits:
        why = "" if gpu else f"they would need about {measured.needed_mb / 2**10:.1f} GB"
        peak = measured.peak_mb if gpu else 0.0
        advice = memory_advice(recipe, step.model, videos, precision, device, peak, why)
        found.problems.append(str(advice))
    return measured


def _compare_speeds(
    recipe: Recipe,
    splits: Splits,
    trained: Rehearsal,
    device: torch.device,
    workers: int,
    processes: int,
    found: Preflight,
) -> None:
    """Whether the model will wait for data, and how long the training will take."""
    augmentation = augmentation_of(recipe, splits.train.mirror)
    dataset = ClipDataset(splits.train, sampling_of(recipe), augmentation, recipe.seed)
    order = order_of(recipe, len(dataset))
    loader = train_loader(dataset, order, workers)

    def batches_of(epoch: int) -> Any:
        order.set_position(epoch)
        return batches(loader)

    try:
        loaded = loading_rate(batches_of, workers)
    except DataError as error:
        found.problems.append(str(error))
        return
    # Every process has a loader of its own.
    loaded, model = processes * loaded, processes * trained.clips_per_second
    found.figures["loaded_clips_per_s"] = loaded
    if not model:
        return
    found.figures["trained_clips_per_s"] = model
    waiting = waiting_share(loaded, model, workers)
    found.figures["data_wait_pct"] = 100 * waiting
    found.notes.append(_speed_sentence(loaded, model, waiting, device, workers))
    seconds = order.batches_per_epoch * order.batch_size * recipe.augment.repeats / model
    seconds /= 1 - waiting
    found.figures["epoch_without_validation_min"] = seconds / 60
    found.figures["training_without_validation_h"] = seconds * recipe.train.epochs / 3600


def waiting_share(loaded: float, trained: float, workers: int) -> float:
    """Share of its time that the model waits for data.

    Args:
        loaded: clips per second out of the loader alone.
        trained: clips per second through the model alone.
        workers: 0 loads and trains in turns, more at the same time.
    """
    if not workers:
        return trained / (loaded + trained)
    return max(0.0, 1 - loaded / trained)


def _speed_sentence(
    loaded: float, trained: float, waiting: float, device: torch.device, workers: int
) -> str:
    speeds = f"{loaded:.1f} clips/s loaded, {trained:.1f} clips/s trained"
    if device.type == "cpu" and workers:
        # Measured one after the other; at work they share the processors.
        speeds += ", each with all processors to itself"
    if waiting < _WORTH_A_WORD:
        return f"the model will not wait for data: {speeds}"
    cure = "more --workers, or smaller copies (ogreg prepare ... --resize 256)"
    return f"the model will wait for data {100 * waiting:.0f} % of the time: {speeds}; {cure}"
