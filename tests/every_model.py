"""Every architecture small enough to be trained within seconds, and the ordinary path from a recipe to
its scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.models.video.resnet import BasicBlock, Conv2Plus1D, R2Plus1dStem, VideoResNet

from ogreg_core.data.manifest import load_manifest, write_dataset
from ogreg_core.evaluate_checkpoint import open_evaluation
from ogreg_core.evaluation_report import EvaluationReport
from ogreg_core.models import gta, ogreg, torchvision_models, video_focalnet, xvit
from ogreg_core.progress import ignore_progress
from ogreg_core.recipe import load_recipe
from ogreg_core.runs import RunFolder
from ogreg_core.training.assemble import build_trainer, describe_run, load_splits
from ogreg_core.training.loop import Trainer

CPU = torch.device("cpu")

# --- the same architectures, thinner -----------------------------------------------------------


class ThinResNet(ResNet):
    """ResNet-50 with an eighth of the channels behind the stem."""

    def __init__(self) -> None:
        super().__init__(Bottleneck, [3, 4, 6, 3])
        self.fc = nn.Linear(64 * Bottleneck.expansion, 1)

    def _make_layer(self, block: Any, planes: int, *arguments: Any, **rest: Any) -> nn.Sequential:
        return super()._make_layer(block, planes // 8, *arguments, **rest)


class ThinR2Plus1D(VideoResNet):
    """R(2+1)D-18 with an eighth of the channels behind the stem."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(BasicBlock, [Conv2Plus1D] * 4, [2] * 4, R2Plus1dStem)
        self.fc = nn.Linear(64, num_classes)

    def _make_layer(
        self, block: Any, maker: Any, planes: int, *arguments: Any, **rest: Any
    ) -> nn.Sequential:
        return super()._make_layer(block, maker, planes // 8, *arguments, **rest)


@contextmanager
def thinned() -> Iterator[None]:
    """Fewer channels and blocks of the same architectures: of the registry's, a step takes seconds on
    two cores and a saved state up to 1.5 GB. ogreg-n is small as it is.
    """
    focal_stages = tuple(
        video_focalnet.Stage(24 << i, depth) for i, depth in enumerate((1, 1, 2, 1))
    )
    swin = (24, (1, 1, 2, 1), (1, 2, 4, 8))
    with pytest.MonkeyPatch.context() as patch:
        for variants, name, fields in (
            (video_focalnet.VARIANTS, "t", {"stages": focal_stages}),
            (xvit.VARIANTS, "b16", {"dim": 192, "depth": 2, "heads": 4}),
            (ogreg.VARIANTS, "t", {"stages": ogreg.VARIANTS["n"].stages}),
        ):
            patch.setitem(variants, name, replace(variants[name], **fields))
        patch.setattr(gta, "resnet50", ThinResNet)
        for name in ("swin3d_t", "swin3d_b"):
            patch.setitem(torchvision_models._SWIN, name, swin)
        patch.setattr(torchvision_models, "_MVIT_HEAD_DIM", 16)
        patch.setattr(torchvision_models, "r2plus1d_18", ThinR2Plus1D)
        # Batch norm of S3D moves its statistics by a thousandth per step: within the few steps here
        # they would stay those of the beginning.
        moving = partial(nn.BatchNorm3d, eps=1e-3)
        patch.setattr(torchvision_models, "s3d", partial(torchvision_models.s3d, norm_layer=moving))
        # Layers as small as these gain nothing from a second thread, and wait for it where other work
        # runs on the same cores: a step then takes up to twenty times as long.
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


# --- from a recipe to its scores ---------------------------------------------------------------


def eight_clips(source: Path, folder: Path, steps: int) -> Path:
    """A data set whose only epoch shows the first clips of eight classes in every step, and whose
    validation split is those clips: motions and their reversals. It names no mirror classes.
    """
    train = load_manifest(source, "train")
    first = {row.label: row for row in reversed(train.rows)}
    rows = [first[label] for label in sorted(first)[:8]]
    write_dataset(
        folder,
        dataset="eight",
        video_root=train.root,
        labels=train.labels,
        splits={"train": rows * steps, "val": rows},
        version="0",
    )
    return folder


def trainer_from(recipe: str, overrides: Sequence[str], folder: Path) -> Trainer:
    """By the ordinary path, in a run folder that is made where it is missing."""
    loaded = load_recipe(recipe, overrides)
    folder.mkdir(exist_ok=True)
    run = RunFolder(folder)
    splits = load_splits(loaded.recipe)
    describe_run(run, loaded, splits)
    return build_trainer(loaded, splits, run, device=CPU, workers=0, on_progress=ignore_progress)


def evaluate(checkpoint: Path) -> EvaluationReport:
    """A checkpoint by itself, in batches unlike those of the validation."""
    evaluation = open_evaluation(
        checkpoint,
        data=None,
        split=None,
        clips=None,
        crops=None,
        control="none",
        device=CPU,
    )
    return evaluation.score(batch_size=3, workers=0, on_progress=ignore_progress)
