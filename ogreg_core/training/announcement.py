"""What a training is about to do, in words and tables."""

from __future__ import annotations

from typing import Any

import torch

from ogreg_core.data.order import BatchOrder
from ogreg_core.errors import DataError
from ogreg_core.recipe import Recipe
from ogreg_core.training.assemble import model_of
from ogreg_core.training.optim import parameter_groups
from ogreg_core.training.settings import optim_of
from ogreg_core.training.splits import load_splits

__all__ = ["PLACEHOLDER_CLASSES", "describe_step", "parameter_table"]

# Stands in for the number of classes while the data set is not there.
PLACEHOLDER_CLASSES = 400


def describe_step(recipe: Recipe, order: BatchOrder) -> list[str]:
    """What an optimiser step consists of, and where its learning rate comes from."""
    table = recipe.train
    micro = order.batch_size // (order.processes * order.accumulate)
    parts = [f"{micro} videos"]
    if order.accumulate > 1:
        parts.append(f"{order.accumulate} micro-batches")
    if order.processes > 1:
        parts.append(f"{order.processes} processes")
    text = f"step: {order.batch_size} videos"
    if len(parts) > 1:
        text += f" ({' x '.join(parts)})"
    if recipe.augment.repeats > 1:
        text += f", {recipe.augment.repeats} views of each"
    lr = f"learning rate {table.lr * table.lr_factor(order.batch_size):.3g}"
    if table.reference_batch:
        lr += f": {table.lr:.3g} is stated for {table.reference_batch} videos"
        scaled = "not scaled" if table.lr_scaling == "none" else f"{table.lr_scaling} scaling"
        lr += f", {scaled} (train.lr_scaling)"
    if order.batch_size < table.batch_size:
        text += f"; the training split has no more, train.batch_size is {table.batch_size}"
    return [text, lr]


def parameter_table(recipe: Recipe) -> list[dict[str, Any]]:
    """Name, shape, group, peak learning rate and weight decay of every parameter."""
    try:
        classes = len(load_splits(recipe).train.labels)
    except DataError:
        classes = PLACEHOLDER_CLASSES
    with torch.device("meta"):
        model = model_of(recipe, classes)
    return [
        {
            "name": name,
            "shape": list(parameter.shape),
            "group": group.name,
            "lr": group.lr,
            "weight_decay": group.weight_decay,
        }
        for group in parameter_groups(model, optim_of(recipe, recipe.train.batch_size))
        for name, parameter in group.parameters.items()
    ]
