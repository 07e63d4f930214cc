"""A checkpoint against a prepared data set: the work behind ``ogreg eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ogreg_core.checkpoint import CheckpointInfo, load_model
from ogreg_core.data.loader import FrameControl, ViewDataset, Views, test_loader
from ogreg_core.data.manifest import Manifest, load_manifest
from ogreg_core.datasets.locations import find_dataset
from ogreg_core.distributed import SINGLE, World
from ogreg_core.errors import CheckpointError, DataError
from ogreg_core.evaluation import resolve_precision, score_dataset
from ogreg_core.evaluation_report import EvaluationReport
from ogreg_core.progress import ProgressCallback
from ogreg_core.saved_scores import SavedScores

__all__ = ["EvaluationReport", "evaluate_checkpoint", "protocol"]


def protocol(views: Views) -> str:
    """How a score was reached: frames x stride, clips x crops, and sizes in pixels in one phrase, for
    example ``32x2, 4x3 views, short side 224``, or ``16 uniform, 1x1 views, short side 72, crop 64``.
    """
    sampling = views.sampling
    taken = (
        f"{sampling.frames}x{sampling.stride}"
        if sampling.kind == "dense"
        else f"{sampling.frames} uniform"
    )
    if sampling.kind == "dense" and sampling.fps:
        taken += f" at {sampling.fps:g} fps"
    if sampling.kind == "dense" and sampling.short == "clamp":
        taken += " clamped"
    crops = views.crops
    text = f"{taken}, {views.clips}x{crops.crops} views, short side {crops.short_side}"
    if crops.size != crops.short_side:
        text += f", crop {crops.size}"
    return text if views.control == "none" else f"{text}, frames {views.control}"


def evaluate_checkpoint(
    checkpoint: Path,
    *,
    data: Path | None,
    split: str | None,
    clips: int | None,
    crops: int | None,
    control: FrameControl,
    batch_size: int,
    workers: int,
    device: torch.device,
    on_progress: ProgressCallback,
    world: World = SINGLE,
) -> EvaluationReport:
    """Score every video of a split.

    Args:
        checkpoint: file written by ogreg.
        data: manifest folder; None for the one of the training.
        split: ``train``, ``val`` or ``test``; None for the one of the validation.
        clips, crops: views per video; None for those of the validation.
        control: frame-order control, see :class:`Views`.
        batch_size: videos at a time.
        workers: loader processes.
        device: where the model runs.
        on_progress: receives progress events.
        world: the processes that share the videos; all get the same report.

    Raises:
        CheckpointError: broken, or trained on other classes than the data set has.
        DataError: data set missing or broken.
    """
    model, info = load_model(checkpoint)
    split = split or info.split
    manifest = load_manifest(_data_folder(data, info), split)
    manifest.require_labels()
    _check_labels(checkpoint, info, manifest)
    views = info.views(clips, crops, control)
    precision = resolve_precision(info.precision, device)
    loader = test_loader(ViewDataset(manifest, views), batch_size, workers, world)
    found = score_dataset(
        model.to(device),
        loader,
        info.mean,
        info.std,
        precision=precision,
        on_progress=on_progress,
        world=world,
    )
    about = _circumstances(checkpoint, info, manifest, views, precision)
    return EvaluationReport.of(SavedScores.of(found, manifest, about))


def _circumstances(
    checkpoint: Path, info: CheckpointInfo, manifest: Manifest, views: Views, precision: str
) -> dict[str, Any]:
    """What was scored on what and how, ready for JSON."""
    return {
        "checkpoint": str(checkpoint.resolve()),
        "model": info.model,
        "options": info.options,
        "recipe": info.recipe,
        "recipe_sha256": info.recipe_sha256,
        "experiment_sha256": info.experiment_sha256,
        "seed": info.seed,
        "epoch": info.epoch,
        "dataset": manifest.dataset,
        "split": manifest.split,
        "manifest_sha256": manifest.sha256,
        "annotated_videos": manifest.annotated or None,
        "protocol": protocol(views),
        "frames": views.sampling.frames,
        "size": views.crops.size,
        "clips": views.clips,
        "crops": views.crops.crops,
        "frame_order": views.control,
        "precision": precision,
    }


def _data_folder(data: Path | None, info: CheckpointInfo) -> Path:
    if data is not None:
        return data
    if info.data_folder and (Path(info.data_folder) / "dataset.json").is_file():
        return Path(info.data_folder)
    try:
        return find_dataset(info.dataset, "")
    except DataError as error:
        raise DataError(
            error.what, fix=f"ogreg prepare {info.dataset} FOLDER, or --data FOLDER"
        ) from error


def _check_labels(checkpoint: Path, info: CheckpointInfo, manifest: Manifest) -> None:
    if list(manifest.labels) == info.labels:
        return
    difference = next(
        (
            f"class {i} is {a!r} there and {b!r} here"
            for i, (a, b) in enumerate(zip(info.labels, manifest.labels, strict=False))
            if a != b
        ),
        f"{len(info.labels)} classes there, {len(manifest.labels)} here",
    )
    raise CheckpointError(
        f"{checkpoint} was trained on other classes than {manifest.dataset} has",
        why=difference,
        fix="choose the data set it belongs to with --data, or train on this one with --init-from",
    )
