"""A checkpoint against a prepared data set: the work behind ``ogreg eval``."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ogreg_core.checkpoint import CheckpointInfo, load_model
from ogreg_core.data.loader import FrameControl, ViewDataset, Views, test_loader
from ogreg_core.data.manifest import Manifest, load_manifest
from ogreg_core.datasets.locations import find_dataset
from ogreg_core.errors import CheckpointError, DataError
from ogreg_core.evaluation import Metrics, Scores, compute_metrics, resolve_precision, score_dataset
from ogreg_core.files import write_text_atomic
from ogreg_core.progress import ProgressCallback
from ogreg_core.runs import RunFolder

__all__ = ["EvaluationReport", "evaluate_checkpoint", "protocol"]


def protocol(views: Views) -> str:
    """Frames x stride or segments, views, and sizes in one phrase, for example ``16 uniform, 1x1
    views, 64 of 72 px``.
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
    text = f"{taken}, {views.clips}x{views.crops.crops} views, {views.crops.size} of {views.crops.short_side} px"
    return text if views.control == "none" else f"{text}, frames {views.control}"


@dataclass(frozen=True)
class EvaluationReport:
    """Everything an evaluation found.

    Args:
        document: the figures with their circumstances, ready for JSON.
        metrics: the accuracies.
        scores: per video.
        manifest: the videos.
    """

    document: dict[str, Any]
    metrics: Metrics
    scores: Scores
    manifest: Manifest

    def write(self, run: RunFolder) -> None:
        """``report.json``, ``per_class.csv`` and ``scores.csv`` into a run folder."""
        run.write_json("report.json", self.document)
        labels = self.manifest.labels
        per_class = zip(labels, self.metrics.per_class_videos, self.metrics.per_class, strict=True)
        _write_csv(
            run.path / "per_class.csv",
            ["class", "videos", "top1_pct"],
            [
                [name, count, "" if top1 is None else f"{top1:.4f}"]
                for name, count, top1 in per_class
            ],
        )
        best = self.scores.scores.argmax(dim=1)
        lines: dict[int, list[Any]] = {}
        for index, guess, row in zip(
            self.scores.indices.tolist(), best.tolist(), self.scores.scores.tolist(), strict=True
        ):
            lines[index] = [labels[guess], *(f"{score:.6f}" for score in row)]
        for video in self.scores.unreadable:
            lines[video.index] = [""] * (1 + len(labels))
        _write_csv(
            run.path / "scores.csv",
            ["path", "label", "predicted", *labels],
            [
                [self.manifest.rows[index].path, labels[self.manifest.rows[index].label], *cells]
                for index, cells in sorted(lines.items())
            ],
        )


def _write_csv(path: Path, header: list[str], rows: list[list[Any]]) -> None:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_text_atomic(path, buffer.getvalue())


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
    loader = test_loader(ViewDataset(manifest, views), batch_size, workers)
    scores = score_dataset(
        model.to(device), loader, info.mean, info.std, precision=precision, on_progress=on_progress
    )
    metrics = compute_metrics(scores, manifest)
    document = {
        "schema": "ogreg.eval.v1",
        "checkpoint": str(checkpoint.resolve()),
        "model": info.model,
        "recipe": info.recipe,
        "dataset": manifest.dataset,
        "split": split,
        "manifest_sha256": manifest.sha256,
        "protocol": protocol(views),
        "precision": precision,
        "top1_pct": metrics.top1,
        "top5_pct": metrics.top5,
        "mean_class_pct": metrics.mean_class,
        "loss": metrics.loss,
        "videos": metrics.videos,
        "unreadable": [asdict(video) for video in scores.unreadable],
        "annotated_videos": manifest.annotated or None,
        "coverage_pct": 100.0 * (metrics.videos - metrics.unreadable) / manifest.annotated
        if manifest.annotated
        else None,
    }
    return EvaluationReport(document, metrics, scores, manifest)


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
