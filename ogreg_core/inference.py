"""Predictions from a checkpoint on video files, along the same way as evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ogreg_core.checkpoint import CheckpointInfo, load_model
from ogreg_core.data.loader import Views, load_views
from ogreg_core.data.manifest import Manifest, Row
from ogreg_core.evaluation import resolve_precision, score_views
from ogreg_core.video import VideoInfo, probe

__all__ = ["Prediction", "Predictor", "single_video"]


@dataclass(frozen=True)
class Prediction:
    """Scores of one video.

    Args:
        video: what was found out about the file.
        scores: float32 ``[classes]``, sums to 1.
        top: the best classes as (label, score), best first.
    """

    video: VideoInfo
    scores: Tensor
    top: list[tuple[str, float]]


def single_video(path: str | Path) -> tuple[VideoInfo, Manifest]:
    """Probe a file and wrap it as a manifest of one row, so that it takes the way of every other
    video.

    Raises:
        VideoError: the file cannot be read.
    """
    info = probe(path)
    file = Path(path)
    row = Row.from_probe(file.name, info)
    return info, Manifest(root=file.parent, split="", rows=(row,), labels=("",))


class Predictor:
    """A model with everything its checkpoint says about input and labels.

    Args:
        model: in evaluation mode.
        info: the checkpoint's description.
        device: where to run; the precision is the checkpoint's.
    """

    def __init__(self, model: nn.Module, info: CheckpointInfo, device: torch.device) -> None:
        self.model = model.to(device).eval()
        self.info = info
        self.device = device
        self.precision = resolve_precision(info.precision, device)

    @classmethod
    def from_checkpoint(cls, path: str | Path, device: torch.device) -> Predictor:
        """Load a checkpoint file.

        Raises:
            CheckpointError: missing, broken or not ours.
        """
        model, info = load_model(path)
        return cls(model, info, device)

    def predict(self, path: str | Path, views: Views | None = None, top: int = 5) -> Prediction:
        """Scores of one video file.

        Args:
            path: the file.
            views: test protocol; default: the checkpoint's.
            top: how many classes to name.

        Raises:
            VideoError: the file cannot be read.
        """
        video, manifest = single_video(path)
        clips = load_views(manifest, manifest.rows[0], views or self.info.views())
        scores = score_views(
            self.model, clips[None], self.info.mean, self.info.std, self.precision
        )[0]
        best = scores.topk(min(top, len(scores)))
        named = [
            (self.info.labels[i], float(s))
            for s, i in zip(best.values, best.indices.tolist(), strict=True)
        ]
        return Prediction(video, scores, named)
