"""A checkpoint against a prepared data set: the work behind ``ogreg eval``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from ogreg_core.checkpoint import CheckpointInfo, load_model
from ogreg_core.data.loader import FrameControl, ViewDataset, Views, test_loader
from ogreg_core.data.manifest import SPLITS, Manifest, load_manifest
from ogreg_core.data.sampling import Rate
from ogreg_core.datasets.locations import find_dataset
from ogreg_core.distributed import SINGLE, World
from ogreg_core.errors import CheckpointError, DataError
from ogreg_core.evaluation import resolve_precision, score_dataset
from ogreg_core.evaluation_report import EvaluationReport
from ogreg_core.progress import ProgressCallback
from ogreg_core.run_records import read_run
from ogreg_core.saved_scores import SavedScores

__all__ = [
    "Evaluation",
    "EvaluationReport",
    "evaluate_checkpoint",
    "open_evaluation",
    "protocol",
]


def protocol(views: Views) -> str:
    """How a score was reached: frames x stride, clips x crops, and sizes in pixels in one phrase, for
    example ``32x2, 4x3 views, short side 224``, or ``16 uniform, 1x1 views, short side 72, crop 64``.
    A control or another rate is named behind it: ``frames shuffled``, ``at double rate (32 frames)``.
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
    if views.control in get_args(Rate):
        return f"{text}, at {views.control} rate ({views.frames} frames)"
    return text if views.control == "none" else f"{text}, frames {views.control}"


@dataclass(frozen=True)
class Evaluation:
    """A checkpoint and a split that belong together: everything is checked, nothing is scored.

    Args:
        checkpoint: the file.
        model: with its weights, on the CPU.
        info: what the checkpoint says about itself.
        manifest: of the split.
        views: how each video is tested.
        device: where the model will run.
    """

    checkpoint: Path
    model: nn.Module
    info: CheckpointInfo
    manifest: Manifest
    views: Views
    device: torch.device

    def score(
        self,
        *,
        batch_size: int,
        workers: int,
        on_progress: ProgressCallback,
        world: World = SINGLE,
    ) -> EvaluationReport:
        """Score every video.

        Args:
            batch_size: videos at a time.
            workers: loader processes.
            on_progress: receives progress events.
            world: the processes that share the videos; all get the same report.

        Raises:
            DataError: not one video can be read.
        """
        dataset = ViewDataset(self.manifest, self.views)
        found = score_dataset(
            self.model.to(self.device),
            test_loader(dataset, batch_size, workers, world),
            self.info.mean,
            self.info.std,
            precision=self._precision,
            on_progress=on_progress,
            world=world,
        )
        return EvaluationReport.of(SavedScores.of(found, self.manifest, self.about()))

    @property
    def _precision(self) -> str:
        return resolve_precision(self.info.precision, self.device)

    def about(self) -> dict[str, Any]:
        """What is scored on what and how, ready for JSON."""
        info, manifest, views = self.info, self.manifest, self.views
        role = _role(self.checkpoint, info)
        return {
            "checkpoint": str(self.checkpoint.resolve()),
            "role": role,
            "chosen_on": _chosen_on(self.checkpoint, info, role),
            "model": info.model,
            "options": info.options,
            "classes": len(info.labels),
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
            "frames": views.frames,
            "size": views.crops.size,
            "clips": views.clips,
            "crops": views.crops.crops,
            "frame_order": views.control,
            "precision": self._precision,
        }


def open_evaluation(
    checkpoint: Path,
    *,
    data: Path | None,
    split: str | None,
    clips: int | None,
    crops: int | None,
    control: FrameControl,
    device: torch.device,
) -> Evaluation:
    """Load a checkpoint and find its videos.

    Args:
        checkpoint: file written by ogreg.
        data: manifest folder; None for the one of the training.
        split: ``train``, ``val`` or ``test``; None for the one of the validation.
        clips, crops: views per video; None for those of the validation.
        control: other order or rate of frames, see :class:`Views`.
        device: where the model will run.

    Raises:
        CheckpointError: broken, or trained on other classes than the data set has.
        DataError: data set missing or broken.
        UsageError: a rate at which there are no frames to take.
    """
    model, info = load_model(checkpoint)
    manifest = _load_split(_data_folder(data, info), split or info.split)
    manifest.require_labels()
    _check_labels(checkpoint, info, manifest)
    views = info.views(clips, crops, control)
    return Evaluation(checkpoint, model, info, manifest, views, device)


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
    """:func:`open_evaluation` and :meth:`Evaluation.score` in one call."""
    evaluation = open_evaluation(
        checkpoint,
        data=data,
        split=split,
        clips=clips,
        crops=crops,
        control=control,
        device=device,
    )
    return evaluation.score(
        batch_size=batch_size, workers=workers, on_progress=on_progress, world=world
    )


def _role(checkpoint: Path, info: CheckpointInfo) -> str:
    """``best``, ``last``, or empty if nobody knows. Older files do not tell; in the folder where their
    training wrote them their name does.
    """
    if info.role or checkpoint.resolve().parent.name != "checkpoints":
        return info.role
    return checkpoint.stem if checkpoint.stem in ("best", "last") else ""


def _chosen_on(checkpoint: Path, info: CheckpointInfo, role: str) -> dict[str, Any] | None:
    """Where the checkpoint was chosen: data set, split, the ``validations`` of which it was the best (0
    if it was not chosen at all, None if their number is unknown), and whether there may have been more
    of them; None if all of that is unknown.
    """
    if not role:
        return None
    place = {"dataset": info.dataset, "split": info.split}
    if role != "best":
        return {**place, "validations": 0, "or_more": False}
    # The file was written when its validation was made; the run, if it is still there, knows the later
    # ones that were no better.
    training = read_run(checkpoint.resolve().parent.parent)
    in_all = len(training.validations) if training and training.kind == "train" else 0
    known = max(in_all, info.validations)
    return {**place, "validations": known or None, "or_more": not in_all}


def _load_split(folder: Path, split: str) -> Manifest:
    try:
        return load_manifest(folder, split)
    except DataError as error:
        if error.fix or not (folder / "dataset.json").is_file():
            raise
        have = [name for name in SPLITS if (folder / f"{name}.csv").is_file()]
        fix = f"--split {have[0]}" if have and split not in have else ""
        raise DataError(error.what, where=error.where, why=error.why, fix=fix) from error


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
