"""Scores and metrics of the multi-view test protocol.

A video's score is the mean over its views of the softmax over classes. Training's validation,
``eval`` and ``predict`` all call :func:`score_views`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ogreg_core.data.loader import Unreadable, batches
from ogreg_core.data.manifest import Manifest
from ogreg_core.data.transforms import to_input
from ogreg_core.distributed import SINGLE, World
from ogreg_core.errors import DataError
from ogreg_core.models.protocol import logits_of
from ogreg_core.progress import Progress, ProgressCallback
from ogreg_core.statistics import expected_calibration_error, wilson_interval

__all__ = [
    "Metrics",
    "Scores",
    "autocast",
    "compute_metrics",
    "confusion_matrix",
    "metrics_of",
    "ranks",
    "resolve_precision",
    "score_dataset",
    "score_views",
]

# Views pushed through the model at once; more needs memory, not time.
_VIEWS_AT_ONCE = 32


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """Mixed precision for ``bf16`` and ``fp16``; nothing for ``fp32`` and ``tf32``."""
    if precision in ("fp32", "tf32"):
        return nullcontext()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    return torch.autocast(device.type, dtype=dtype)


def resolve_precision(precision: str, device: torch.device) -> str:
    """``auto`` becomes bf16 on CUDA devices that have it, fp32 elsewhere; so does ``tf32`` where there
    is no CUDA.
    """
    if precision == "tf32" and device.type != "cuda":
        return "fp32"
    if precision != "auto":
        return precision
    # Emulated bf16 (before Ampere) is slower than fp32.
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16"
    return "fp32"


@contextmanager
def _matmul_precision(precision: str) -> Iterator[None]:
    """Matrix products on tensor cores for ``tf32``, as in a training with it; the switch is global."""
    before = torch.get_float32_matmul_precision()
    if precision == "tf32":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@torch.inference_mode()
def score_views(
    model: nn.Module,
    views: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    precision: str = "fp32",
    times: Tensor | None = None,
) -> Tensor:
    """Scores of a batch of videos.

    Args:
        model: in evaluation mode.
        views: uint8 ``[B, V, 3, T, H, W]`` on any device.
        mean, std: normalisation of pixels in 0..1.
        precision: ``fp32``, ``tf32``, ``bf16`` or ``fp16``.
        times: of the frames, ``[B, V, T]``, for models that take them; None if unknown.

    Returns:
        float32 ``[B, classes]`` on the CPU, rows sum to 1.
    """
    device = next(model.parameters()).device
    batch, count = views.shape[:2]
    parts = []
    clips, when = views.flatten(0, 1), None if times is None else times.flatten(0, 1)
    for start in range(0, batch * count, _VIEWS_AT_ONCE):
        part = slice(start, start + _VIEWS_AT_ONCE)
        clip = to_input(clips[part].to(device, non_blocking=True), mean, std)
        with autocast(device, precision), _matmul_precision(precision):
            logits = logits_of(model, clip, None if when is None else when[part])
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
    world: World = SINGLE,
) -> Scores:
    """Score every video of a test loader; the model's training mode is restored afterwards.

    Args:
        model: on its device.
        loader: of this process's videos.
        mean, std: normalisation of pixels in 0..1.
        precision: see :func:`score_views`.
        on_progress: receives progress events; of several processes the main one speaks for all.
        task: name in those events.
        world: the processes that share the data set.

    Returns:
        The scores of all processes, on every process: each video once, in manifest order.

    Raises:
        DataError: not one video can be read.
    """
    was_training = model.training
    model.eval()
    found: list[Scores] = []
    total, done = len(loader.dataset), 0  # type: ignore[arg-type]
    try:
        for batch in batches(loader):
            scores = torch.empty(0)
            if len(batch.indices):
                scores = score_views(model, batch.views, mean, std, precision, batch.times)
            found.append(Scores(scores, batch.labels, batch.indices, batch.unreadable))
            done += len(batch.indices) + len(batch.unreadable)
            # Every process has done about as many.
            on_progress(Progress(task, min(done * world.size, total), total))
    finally:
        model.train(was_training)
    everything = _in_order([part for share in world.gather(found) for part in share])
    seen = [*everything.indices.tolist(), *(video.index for video in everything.unreadable)]
    assert sorted(seen) == list(range(total)), "shares that are not the data set, each video once"
    if not len(everything.indices):
        raise DataError("not one video can be read", why=everything.unreadable[0].reason)
    return everything


def _in_order(parts: Sequence[Scores]) -> Scores:
    """Join scores of batches, whichever process they come from, in manifest order."""
    unreadable = sorted((v for part in parts for v in part.unreadable), key=lambda v: v.index)
    parts = [part for part in parts if len(part.indices)]
    if not parts:
        nothing = torch.empty(0, dtype=torch.int64)
        return Scores(torch.empty(0, 0), nothing, nothing, tuple(unreadable))
    indices, order = torch.cat([part.indices for part in parts]).sort()
    scores = torch.cat([part.scores for part in parts])[order]
    labels = torch.cat([part.labels for part in parts])[order]
    return Scores(scores, labels, indices, tuple(unreadable))


@dataclass(frozen=True)
class Metrics:
    """Accuracies in percent.

    Args:
        top1, top5: share of videos whose label is the best, or among the five best; top5 says
            nothing where there are at most five classes, and is not reported there.
        mean_class: mean over the classes that occur of their top-1.
        loss: mean negative log of the score given to the label, over the videos that could be read.
        ece: expected calibration error in percent, 15 bins, over the videos that could be read.
        videos: all of the manifest, the denominator of every accuracy.
        per_class: top-1 by class index; None for classes that do not occur.
        per_class_videos: videos by class index.
        unreadable: videos that could not be read and count as wrong.
    """

    top1: float
    top5: float
    mean_class: float
    loss: float
    ece: float
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
            "ece": self.ece,
        }

    def interval(self, accuracy: float) -> tuple[float, float]:
        """Wilson's 95 % interval in percent of ``top1`` or ``top5``."""
        low, high = wilson_interval(round(accuracy / 100 * self.videos), self.videos)
        return 100 * low, 100 * high


def compute_metrics(found: Scores, manifest: Manifest) -> Metrics:
    """Metrics of a scored split; a video without a score counts as wrong."""
    missed = [manifest.rows[video.index].label for video in found.unreadable]
    return metrics_of(found.scores, found.labels, missed)


def metrics_of(scores: Tensor, labels: Tensor, missed: Sequence[int] = ()) -> Metrics:
    """Metrics of scores ``[N, classes]`` against labels ``[N]``, and of the labels of ``missed``
    videos, which have no score.
    """
    classes = scores.shape[1]
    place = ranks(scores, labels)
    correct = place == 1
    top5 = place <= min(5, classes)
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
        ece=_calibration_error(scores, correct),
        videos=len(everything),
        unreadable=len(missed),
        per_class=per_class,
        per_class_videos=counts.tolist(),
    )


def _calibration_error(scores: Tensor, correct: Tensor) -> float:
    confidence = scores.amax(dim=1)
    if not bool(confidence.isfinite().all()):
        return math.nan
    return 100 * expected_calibration_error(confidence, correct)


def ranks(scores: Tensor, labels: Tensor) -> Tensor:
    """Place of each label among the classes, best first, from 1 on: ``[N, classes], [N] -> int64 [N]``.

    Of equal scores the lower class comes first. Where a score is not a number the label comes after
    all classes: nothing has been predicted.
    """
    own = scores.gather(1, labels[:, None])
    before = torch.arange(scores.shape[1]) < labels[:, None]
    place = 1 + ((scores > own) | ((scores == own) & before)).sum(dim=1)
    return torch.where(scores.isnan().any(dim=1), scores.shape[1] + 1, place)


def confusion_matrix(scores: Tensor, labels: Tensor) -> Tensor:
    """How many videos of each class (rows) are predicted as each class (columns).

    Args:
        scores: ``[N, classes]``; rows that are not numbers predict nothing and are left out.
        labels: int64 ``[N]``.

    Returns:
        int64 ``[classes, classes]``.
    """
    classes = scores.shape[1]
    known = ~scores.isnan().any(dim=1)
    pairs = labels[known] * classes + scores[known].argmax(dim=1)
    return torch.bincount(pairs, minlength=classes**2).unflatten(0, (classes, classes))
