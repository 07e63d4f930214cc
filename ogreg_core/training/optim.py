"""Parameter groups, optimiser and learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

__all__ = [
    "OptimSettings",
    "ParameterGroup",
    "build_optimizer",
    "build_schedule",
    "parameter_groups",
    "warmup_cosine",
]

# The warm-up starts at this share of the peak learning rate.
_WARMUP_START = 0.01


@dataclass(frozen=True)
class OptimSettings:
    """Plain arguments of the optimiser.

    Args:
        lr: peak learning rate, for a factor of 1.
        weight_decay: of the parameters that decay.
        head_lr, backbone_lr: factors on the learning rate of the classifier and of the rest.
        layer_decay: factor per layer from the classifier down (Clark et al. 2020, as in BEiT).
        optimizer: ``adamw`` with betas (0.9, 0.999), ``sgd``, or ``nesterov``.
        momentum: of the latter two.
    """

    lr: float
    weight_decay: float
    head_lr: float = 1.0
    backbone_lr: float = 1.0
    layer_decay: float = 1.0
    optimizer: str = "adamw"
    momentum: float = 0.9


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate and a weight decay.

    Args:
        name: ``backbone, decay``, ``head, no decay``, ``layer 3, decay`` and the like.
        parameters: by name.
        lr: peak learning rate.
        weight_decay: 0 for those that the model exempts.
    """

    name: str
    parameters: dict[str, nn.Parameter]
    lr: float
    weight_decay: float


def parameter_groups(model: nn.Module, settings: OptimSettings) -> list[ParameterGroup]:
    """Every trainable parameter in exactly one group, from the input to the classifier.

    The model says which parameters form a layer (``layers``, the last one being the classifier) and
    which must not decay (``no_weight_decay``).

    Raises:
        ValueError: the model's layers leave a parameter out.
    """
    layers: Sequence[Sequence[str]] = model.layers()  # type: ignore[operator]
    exempt = model.no_weight_decay()  # type: ignore[operator]
    top = len(layers) - 1
    # Few groups are fast: without a decay by layer the whole backbone is one.
    by_layer = settings.layer_decay != 1
    members: dict[tuple[int, bool], dict[str, nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            layer = _layer_of(name, layers)
            key = (layer if by_layer or layer == top else 0, name not in exempt)
            members.setdefault(key, {})[name] = parameter
    groups = []
    for (layer, decays), parameters in sorted(members.items(), key=lambda item: item[0]):
        place = "head" if layer == top else f"layer {layer}" if by_layer else "backbone"
        factor = settings.head_lr if layer == top else settings.backbone_lr
        groups.append(
            ParameterGroup(
                name=f"{place}, {'decay' if decays else 'no decay'}",
                parameters=parameters,
                lr=settings.lr * factor * settings.layer_decay ** (top - layer if by_layer else 0),
                weight_decay=settings.weight_decay if decays else 0.0,
            )
        )
    return groups


def _layer_of(name: str, layers: Sequence[Sequence[str]]) -> int:
    for number, prefixes in enumerate(layers):
        if any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes):
            return number
    raise ValueError(f"parameter {name} belongs to no layer of the model")


def build_optimizer(model: nn.Module, settings: OptimSettings) -> Optimizer:
    """The optimiser over :func:`parameter_groups`."""
    groups = [
        {
            "params": list(group.parameters.values()),
            "lr": group.lr,
            "weight_decay": group.weight_decay,
            "name": group.name,
        }
        for group in parameter_groups(model, settings)
    ]
    if settings.optimizer == "adamw":
        return AdamW(groups, lr=settings.lr, fused=True)
    nesterov = settings.optimizer == "nesterov"
    return SGD(groups, lr=settings.lr, momentum=settings.momentum, nesterov=nesterov)


def warmup_cosine(step: int, warmup: int, total: int, floor: float) -> float:
    """Share of the peak learning rate at ``step``: linear from 1 %, then a half cosine down to
    ``floor``.
    """
    if step < warmup:
        return _WARMUP_START + (1 - _WARMUP_START) * step / warmup
    done = (step - warmup) / max(total - warmup, 1)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def build_schedule(
    optimizer: Optimizer,
    *,
    steps_per_epoch: int,
    epochs: int,
    warmup_epochs: float,
    lr: float,
    min_lr: float,
) -> LambdaLR:
    """Per-step schedule over ``epochs`` epochs for every group; see :func:`warmup_cosine`."""
    total = steps_per_epoch * epochs
    warmup = min(round(warmup_epochs * steps_per_epoch), total)
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warmup_cosine(step, warmup, total, min_lr / lr)
    )
