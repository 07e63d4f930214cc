"""Optimiser and learning-rate schedule."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

__all__ = ["build_optimizer", "build_schedule", "parameter_groups", "warmup_cosine"]

# The warm-up starts at this share of the peak learning rate.
_WARMUP_START = 0.01


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Two groups: parameters that decay, and those the model exempts (``no_weight_decay``)."""
    exempt = model.no_weight_decay()  # type: ignore[operator]
    decay: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (no_decay if name in exempt else decay).append(parameter)
    return [
        {"params": decay, "weight_decay": weight_decay},
        {"params": no_decay, "weight_decay": 0.0},
    ]


def build_optimizer(model: nn.Module, lr: float, weight_decay: float) -> Optimizer:
    """AdamW with betas (0.9, 0.999)."""
    return AdamW(parameter_groups(model, weight_decay), lr=lr)


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
    """Per-step schedule over ``epochs`` epochs; see :func:`warmup_cosine`."""
    total = steps_per_epoch * epochs
    warmup = min(round(warmup_epochs * steps_per_epoch), total)
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warmup_cosine(step, warmup, total, min_lr / lr)
    )
