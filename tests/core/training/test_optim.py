from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from ogreg_core.models.registry import create_model
from ogreg_core.training.optim import (
    build_optimizer,
    build_schedule,
    parameter_groups,
    warmup_cosine,
)


def test_groups_cover_every_parameter_once():
    model = create_model("ogreg-n", 4)
    groups = parameter_groups(model, 0.1)
    everything = [p for group in groups for p in group["params"]]
    assert len(everything) == len(list(model.parameters())) == len({id(p) for p in everything})
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert all(p.ndim > 1 for p in groups[0]["params"])
    assert any(p is model.stages[0][0].gaze.sharpness for p in groups[1]["params"])


def test_schedule_equals_torchs_own_pieces():
    """Linear warm-up, then torch's CosineAnnealingLR."""
    model = create_model("ogreg-n", 4)
    optimizer = build_optimizer(model, 0.5, 0.1)
    schedule = build_schedule(
        optimizer, steps_per_epoch=10, epochs=6, warmup_epochs=1.5, lr=0.5, min_lr=0.05
    )
    reference_optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(
        reference_optimizer, T_max=45, eta_min=0.05
    )
    for step in range(60):
        rate = schedule.get_last_lr()[0]
        if step < 15:
            assert rate == pytest.approx(0.5 * (0.01 + 0.99 * step / 15))
        else:
            assert rate == pytest.approx(reference.get_last_lr()[0], rel=1e-5)
            reference_optimizer.step()
            reference.step()
        optimizer.step()
        schedule.step()


def test_edges_of_the_schedule():
    assert warmup_cosine(0, 0, 10, 0.0) == 1.0
    assert warmup_cosine(10, 0, 10, 0.25) == pytest.approx(0.25)
    assert warmup_cosine(5, 0, 10, 0.0) == pytest.approx(0.5 * (1 + math.cos(math.pi / 2)))
    assert warmup_cosine(99, 10, 10, 0.1) == pytest.approx(0.1)
