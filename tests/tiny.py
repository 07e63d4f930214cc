"""A checkpoint and a data set that are small enough to be evaluated in a second."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from ogreg_core.checkpoint import CheckpointInfo, save_checkpoint
from ogreg_core.data.manifest import load_manifest, write_dataset
from ogreg_core.data.sampling import ClipSampling
from ogreg_core.models.registry import create_model


def tiny_checkpoint(path: Path, data: Path, *, seed: int = 0, **changes: object) -> Path:
    """An untrained model that is sure of its random opinions, for the classes of a data set."""
    info = CheckpointInfo(
        model="ogreg-n",
        options={"strides": [2, 1, 1, 1]},
        labels=list(load_manifest(data, "val").labels),
        sampling=ClipSampling("uniform", 4),
        size=32,
        short_side=36,
        mean=(0.4, 0.5, 0.6),
        std=(0.2, 0.3, 0.4),
        data_folder=str(data),
        dataset="demo",
        recipe="tiny",
        recipe_sha256="12",
        experiment_sha256="34",
        seed=seed,
    )
    torch.manual_seed(seed)
    model = create_model(info.model, len(info.labels), **info.options)
    with torch.no_grad():
        model.get_parameter("head.weight").mul_(40)
    save_checkpoint(path, model.state_dict(), replace(info, **changes))  # type: ignore[arg-type]
    return path


def seven_videos(folder: Path, data: Path, missing: int | None = None, annotated: int = 0) -> Path:
    """A data set of every fourth validation video of another one, of which one may be missing."""
    manifest = load_manifest(data, "val")
    rows = list(manifest.rows[::4])[:7]
    if missing is not None:
        rows[missing] = replace(rows[missing], path="missing.mp4")
    write_dataset(
        folder,
        dataset="seven",
        video_root=manifest.root,
        labels=manifest.labels,
        splits={"val": rows},
        coverage={"val": {"annotated": annotated}} if annotated else None,
        version="0",
    )
    return folder
