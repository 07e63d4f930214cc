from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from ogreg_core.models.registry import MODELS, create_model
from ogreg_core.training.optim import (
    OptimSettings,
    build_optimizer,
    build_schedule,
    parameter_groups,
    warmup_cosine,
)


@pytest.mark.parametrize("decay", [1.0, 0.7])
def test_groups_cover_every_parameter_once(decay):
    model = create_model("ogreg-n", 4)
    groups = parameter_groups(model, OptimSettings(1.0, 0.1, layer_decay=decay))
    names = [name for group in groups for name in group.parameters]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    for group in groups:
        decays = {parameter.ndim > 1 for parameter in group.parameters.values()}
        assert decays == {group.weight_decay > 0}
    exempt = {name for group in groups if not group.weight_decay for name in group.parameters}
    assert {"stages.0.0.gaze.sharpness", "stages.0.0.gaze.offset", "norm.weight"} <= exempt


def test_factors_of_head_and_backbone():
    model = create_model("ogreg-n", 4)
    groups = parameter_groups(model, OptimSettings(2.0, 0.1, head_lr=3.0, backbone_lr=0.1))
    assert {group.name: group.lr for group in groups} == {
        "backbone, no decay": pytest.approx(0.2),
        "backbone, decay": pytest.approx(0.2),
        "head, no decay": 6.0,
        "head, decay": 6.0,
    }
    head = [name for group in groups if group.lr == 6.0 for name in group.parameters]
    assert sorted(head) == ["head.bias", "head.weight"]


def test_learning_rates_fall_from_the_head_to_the_stem():
    """ogreg-n has six blocks: the stem lies seven layers below the classifier."""
    model = create_model("ogreg-n", 4)
    groups = parameter_groups(model, OptimSettings(1.0, 0.1, layer_decay=0.5, backbone_lr=0.1))
    rate = {name: group.lr for group in groups for name in group.parameters}
    assert rate["head.weight"] == 1.0
    assert rate["norm.weight"] == rate["stages.3.0.proj.weight"] == pytest.approx(0.05)
    assert rate["merges.2.reduction.weight"] == rate["stages.3.0.proj.weight"]
    assert rate["stages.2.0.proj.weight"] == pytest.approx(0.1 * 0.5**4)
    assert rate["stem.conv1.weight"] == pytest.approx(0.1 * 0.5**7)


# The smallest of each architecture: sizes differ in their numbers alone.
@pytest.mark.parametrize("name", [name for name in MODELS if name.endswith("-n")])
def test_layers_of_every_model_hold_each_parameter_once(name):
    with torch.device("meta"):
        model = create_model(name, 3)
    prefixes = [prefix for layer in model.layers() for prefix in layer]
    assert model.layers()[-1] == ["head"]
    for parameter, _ in model.named_parameters():
        found = [p for p in prefixes if parameter == p or parameter.startswith(f"{p}.")]
        assert len(found) == 1, parameter
    assert len(model.layers()) > len(model.stage_blocks()) + 1
    if name.startswith("ogreg"):
        blocks = sum(len(stage) for stage in model.stage_blocks())
        assert len(model.layers()) == blocks + 2


def test_steps_follow_the_factors():
    """Plain AdamW by hand, one parameter of each kind."""
    model = create_model("ogreg-n", 4)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, OptimSettings(0.01, 0.1, head_lr=2.0, backbone_lr=0.5))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    after = dict(model.named_parameters())
    # The first step of Adam is the learning rate; decay takes lr x decay of the weight before it.
    for name, lr, decay in (
        ("head.weight", 0.02, 0.1),
        ("head.bias", 0.02, 0.0),
        ("stages.0.0.proj.weight", 0.005, 0.1),
        ("stages.0.0.gaze.offset", 0.005, 0.0),
    ):
        expected = before[name] * (1 - lr * decay) - lr
        torch.testing.assert_close(after[name].detach(), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", ["sgd", "nesterov"])
def test_sgd_by_hand(kind):
    """Two steps of a gradient of one: v = 1, then v = m + 1; Nesterov steps by g + m v."""
    model = create_model("ogreg-n", 4)
    before = model.head.bias.detach().clone()
    optimizer = build_optimizer(model, OptimSettings(0.1, 0.0, optimizer=kind, momentum=0.5))
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    steps = 1.0 + 1.5 if kind == "sgd" else (1 + 0.5) + (1 + 0.5 * 1.5)
    torch.testing.assert_close(model.head.bias.detach(), before - 0.1 * steps)


def test_schedule_equals_torchs_own_pieces():
    """Linear warm-up, then torch's CosineAnnealingLR, for every group by its factor."""
    model = create_model("ogreg-n", 4)
    optimizer = build_optimizer(model, OptimSettings(0.5, 0.1, head_lr=0.1))
    schedule = build_schedule(
        optimizer, steps_per_epoch=10, epochs=6, warmup_epochs=1.5, lr=0.5, min_lr=0.05
    )
    reference_optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(
        reference_optimizer, T_max=45, eta_min=0.05
    )
    for step in range(60):
        rate = schedule.get_last_lr()[0]
        assert schedule.get_last_lr()[-1] == pytest.approx(0.1 * rate)
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
