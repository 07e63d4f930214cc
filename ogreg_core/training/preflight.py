"""What can be known before a training starts: the work behind ``ogreg train --dry-run``."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from ogreg_core import profiling
from ogreg_core.data.loader import ClipDataset, ViewDataset, Views
from ogreg_core.data.transforms import TestCrops
from ogreg_core.errors import CheckpointError, DataError
from ogreg_core.evaluation import autocast, resolve_precision
from ogreg_core.models.weights import TORCHVISION_SWIN
from ogreg_core.recipe import InitTable, LoadedRecipe, Recipe
from ogreg_core.training.assemble import (
    Splits,
    augmentation_of,
    build_model,
    load_splits,
    sampling_of,
)
from ogreg_core.training.optim import build_optimizer

__all__ = ["Preflight", "check_recipe"]

# Stands in for the number of classes while the data set is not there.
_PLACEHOLDER_CLASSES = 400


@dataclass
class Preflight:
    """Figures by name, and sentences about what is missing."""

    figures: dict[str, Any] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)


def check_recipe(loaded: LoadedRecipe, device: torch.device) -> Preflight:
    """Read the manifests, build the model, and make one optimiser step on one random clip of the
    recipe's size.

    Missing data or weights are reported, not raised; a model that cannot be built is an error.
    """
    recipe = loaded.recipe
    found = Preflight()
    labels: tuple[str, ...] = tuple(f"class {i}" for i in range(_PLACEHOLDER_CLASSES))
    try:
        splits = load_splits(recipe)
    except DataError as error:
        found.missing.append(f"data: {error}")
    else:
        labels = splits.train.labels
        found.figures["training videos"] = len(splits.train.rows)
        found.figures["validation videos"] = len(splits.val.rows)
        found.figures["steps per epoch"] = max(len(splits.train.rows) // recipe.train.batch_size, 1)
        found.figures["clips per step"] = recipe.train.batch_size * recipe.augment.repeats
        if splits.val.annotated:
            share = 100.0 * len(splits.val.rows) / splits.val.annotated
            found.figures["validation coverage (%)"] = share
        _load_one_of_each(recipe, splits, found)
    found.figures["classes"] = len(labels)
    scratch = recipe.model_copy(update={"init": InitTable()})
    if recipe.init.weights in TORCHVISION_SWIN:
        # Not fetched here: a dry run uses no network and writes no cache.
        found.figures["starting weights"] = f"{recipe.init.weights}, fetched by name at the start"
        recipe = scratch
    try:
        model, report = build_model(recipe, labels)
    except CheckpointError as error:
        found.missing.append(f"starting weights: {error}")
        model, report = build_model(scratch, labels)
    if report is not None:
        found.figures["starting weights"] = report.summary()
    shape = (recipe.data.frames, recipe.data.size, recipe.data.size)
    found.figures["model"] = recipe.model.name
    found.figures["parameters (M)"] = profiling.count_parameters(model) / 1e6
    clip = torch.randn(1, 3, *shape)
    found.figures["multiply-adds per view (G)"] = (
        profiling.count_multiply_adds(model, clip).total / 1e9
    )
    found.figures["views per video"] = recipe.eval.clips * recipe.eval.crops
    found.figures["one-clip step (s)"] = _one_step(loaded, model.to(device), clip.to(device))
    found.figures["peak memory (MB)"] = profiling.peak_memory_mb(device)
    return found


def _load_one_of_each(recipe: Recipe, splits: Splits, found: Preflight) -> None:
    """One training sample and the views of one test video, as training would load them."""
    sampling = sampling_of(recipe)
    augmentation = augmentation_of(recipe, splits.train.mirror)
    crops = TestCrops(recipe.data.size, recipe.data.short_side, recipe.eval.crops)
    try:
        started = time.perf_counter()
        sample = ClipDataset(splits.train, sampling, augmentation, recipe.seed)[0, 0]
        found.figures["load a training sample (s)"] = time.perf_counter() - started
        started = time.perf_counter()
        views = ViewDataset(splits.val, Views(sampling, recipe.eval.clips, crops))[0]
        found.figures["load a test video (s)"] = time.perf_counter() - started
    except DataError as error:
        found.missing.append(f"videos: {error}")
        return
    found.missing += [f"video: {v.reason}" for v in (*sample.unreadable, *views.unreadable)]


def _one_step(loaded: LoadedRecipe, model: torch.nn.Module, clip: torch.Tensor) -> float:
    table = loaded.recipe.train
    optimizer = build_optimizer(model, table.lr, table.weight_decay)
    started = time.perf_counter()
    model.train()
    with autocast(clip.device, resolve_precision(table.precision, clip.device)):
        logits = model(clip)
    loss = F.cross_entropy(logits.float(), torch.zeros(1, dtype=torch.long, device=clip.device))
    loss.backward()
    optimizer.step()
    return time.perf_counter() - started
