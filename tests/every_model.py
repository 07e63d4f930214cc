"""Every architecture small enough to be trained within seconds, and the ordinary path from a recipe to
its scores.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from ogreg_core.data.manifest import load_manifest, write_dataset
from ogreg_core.evaluate_checkpoint import open_evaluation
from ogreg_core.evaluation_report import EvaluationReport
from ogreg_core.models import convnets, gta_resnet, ogreg, torchvision_models, video_focalnet, xvit
from ogreg_core.models.registry import MODELS
from ogreg_core.progress import ignore_progress
from ogreg_core.recipe import load_recipe
from ogreg_core.runs import RunFolder
from ogreg_core.training.assemble import build_trainer
from ogreg_core.training.loop import Trainer
from ogreg_core.training.splits import describe_run, load_splits

CPU = torch.device("cpu")

# --- one size of every architecture --------------------------------------------------------------


def architectures(names: Iterable[str]) -> set[str]:
    """Sizes of one architecture share their source in the registry, but for what is said of the size."""
    return {MODELS[name].source.partition(", at the size of")[0] for name in names}


@contextmanager
def one_thread() -> Iterator[None]:
    """Layers as small as these gain nothing from a second thread, and wait for it where other work runs on
    the same cores: a step then takes up to twenty times as long.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def thinned() -> Iterator[None]:
    """The models of the recipes with fewer channels and blocks: of the registry's, a step takes seconds
    on two cores and a saved state up to 1.5 GB.
    """
    focal = video_focalnet.VARIANTS
    swin = torchvision_models.SwinSize(24, (1, 1, 2, 1), (1, 2, 4, 8))
    deep = partial(gta_resnet.ThinResNet, [3, 4, 6, 3])
    with pytest.MonkeyPatch.context() as patch, one_thread():
        patch.setitem(focal, "t", replace(focal["t"], stages=focal["n"].stages))
        small = replace(xvit.VARIANTS["b16"], dim=192, depth=2, heads=4)
        patch.setitem(xvit.VARIANTS, "b16", small)
        patch.setitem(ogreg.VARIANTS, "t", ogreg.VARIANTS["n"])
        patch.setitem(gta_resnet._BACKBONES, "r50", (deep, "nl5"))
        for name in ("swin3d_t", "swin3d_b"):
            patch.setitem(torchvision_models.SWIN, name, swin)
        for name in ("mvit_v1_b", "mvit_v2_s"):
            size = torchvision_models.MVIT[name]
            patch.setitem(torchvision_models.MVIT, name, replace(size, head_dim=16))
        patch.setattr(convnets, "r2plus1d_18", convnets.ThinR2Plus1D)
        # Batch norm of S3D moves its statistics by a thousandth per step: within the few steps here
        # they would stay those of the beginning.
        moving = partial(nn.BatchNorm3d, eps=1e-3)
        patch.setattr(convnets, "s3d", partial(convnets.s3d, norm_layer=moving))
        yield


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
