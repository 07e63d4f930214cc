"""Scores and metrics of the multi-view test protocol.

A video's score is the mean over its views of the softmax over classes. Training's validation,
``eval`` and ``predict`` all call :func:`score_views`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ogreg_core.data.loader import Unreadable, batches
from ogreg_core.data.manifest import Manifest
from ogreg_core.data.transforms import to_input
from ogreg_core.errors import DataError
from ogreg_core.progress import Progress, ProgressCallback

__all__ = [
    "Metrics",
    "Scores",
    "autocast",
    "compute_metrics",
    "metrics_of",
    "score_dataset",
    "score_views",
]

# Views pushed through the model at once; more needs memory, not time.
_VIEWS_AT_ONCE = 32


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """Mixed precision for ``bf16`` and ``fp16``; nothing for ``fp32``."""
    if precision == "fp32":
        return nullcontext()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    return torch.autocast(device.type, dtype=dtype)


def resolve_precision(precision: str, device: torch.device) -> str:
    """``auto`` becomes bf16 on CUDA devices that have it, fp32 elsewhere."""
    if precision != "auto":
        return precision
    # Emulated bf16 (before Ampere) is slower than fp32.
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16"
    return "fp32"


@torch.inference_mode()
def score_views(
    model: nn.Module,
    views: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    precision: str = "fp32",
) -> Tensor:
    """Scores of a batch of videos.

    Args:
        model: in evaluation mode.
        views: uint8 ``[B, V, 3, T, H, W]`` on any device.
        mean, std: normalisation of pixels in 0..1.
        precision: ``fp32``, ``bf16`` or ``fp16``.

    Returns:
        float32 ``[B, classes]`` on the CPU, rows sum to 1.
    """
    device = next(model.parameters()).device
    batch, count = views.shape[:2]
    parts = []
    for chunk in views.flatten(0, 1).split(_VIEWS_AT_ONCE):
        clip = to_input(chunk.to(device, non_blocking=True), mean, std)
        with autocast(device, precision):
            logits = model(clip)
        parts.append(logits.float().softmax(dim=-1))
    return torch.cat(parts).unflatten(0, (batch, count)).mean(dim=1).cpu()


@dataclass(frozen=True)
class Scores:
    """Scores of a data set in manifest order.

    Args:
        scores: float32 ``[N, classes]``.
        labels: int64 ``[N]``.
        indices: manifest row of each, int64 ``[N]``.
        unreadable: videos without a score.
    """

    scores: Tensor
    labels: Tensor
    indices: Tensor
    unreadable: tuple[Unreadable, ...] = ()


def score_dataset(
    model: nn.Module,
    loader: DataLoader[Any],
    mean: Sequence[float],
    std: Sequence[float],
    *,
    precision: str = "fp32",
    on_progress: ProgressCallback,
    task: str = "evaluate",
) -> Scores:
    """Score every video of a test loader; the model's training mode is restored afterwards.

    Raises:
        DataError: not one video can be read.
    """
    was_training = model.training
    model.eval()
    scores, labels, indices = [], [], []
    unreadable: list[Unreadable] = []
    total, done = len(loader.dataset), 0  # type: ignore[arg-type]
    try:
        for batch in batches(loader):
            if len(batch.indices):
                scores.append(score_views(model, batch.views, mean, std, precision))
                labels.append(batch.labels)
                indices.append(batch.indices)
            unreadable += batch.unreadable
            done += len(batch.indices) + len(batch.unreadable)
            on_progress(Progress(task, done, total))
    finally:
        model.train(was_training)
    if not scores:
        raise DataError("not one video can be read", why=unreadable[0].reason)
    return Scores(torch.cat(scores), torch.cat(labels), torch.cat(indices), tuple(unreadable))


@dataclass(frozen=True)
class Metrics:
    """Accuracies in percent.

    Args:
        top1, top5: share of videos whose label is the best, or among the five best; top5 equals 100
            where there are at most five classes.
        mean_class: mean over the classes that occur of their top-1.
        loss: mean negative log of the score given to the label, over the videos that could be read.
        videos: all of the manifest, the denominator of every accuracy.
        per_class: top-1 by class index; None for classes that do not occur.
        per_class_videos: videos by class index.
        unreadable: videos that could not be read and count as wrong.
    """

    top1: float
    top5: float
    mean_class: float
    loss: float
    videos: int
    per_class: list[float | None]
    per_class_videos: list[int]
    unreadable: int = 0

    def figures(self) -> dict[str, float]:
        """The scalars by name."""
        return {
            "top1": self.top1,
            "top5": self.top5,
            "mean_class": self.mean_class,
            "loss": self.loss,
        }


def compute_metrics(found: Scores, manifest: Manifest) -> Metrics:
    """Metrics of a scored split; a video without a score counts as wrong."""
    missed = [manifest.rows[video.index].label for video in found.unreadable]
    return metrics_of(found.scores, found.labels, missed)


def metrics_of(scores: Tensor, labels: Tensor, missed: Sequence[int] = ()) -> Metrics:
    """Metrics of scores ``[N, classes]`` against labels ``[N]``, and of the labels of ``missed``
    videos, which have no score.
    """
    classes = scores.shape[1]
    correct = scores.argmax(dim=1) == labels
    top5 = (scores.topk(min(5, classes), dim=1).indices == labels[:, None]).any(dim=1)
    everything = torch.cat([labels, torch.tensor(missed, dtype=labels.dtype)])
    counts = torch.bincount(everything, minlength=classes)
    hits = torch.bincount(labels[correct], minlength=classes)
    per_class = [
        100.0 * h / n if n else None for h, n in zip(hits.tolist(), counts.tolist(), strict=True)
    ]
    occurring = [accuracy for accuracy in per_class if accuracy is not None]
    own_score = scores.gather(1, labels[:, None]).clamp_min(torch.finfo(scores.dtype).tiny)
    return Metrics(
        top1=100.0 * correct.sum().item() / len(everything),
        top5=100.0 * top5.sum().item() / len(everything),
        mean_class=sum(occurring) / len(occurring),
        loss=-own_score.log().mean().item(),
        videos=len(everything),
        unreadable=len(missed),
        per_class=per_class,
        per_class_videos=counts.tolist(),
    )
