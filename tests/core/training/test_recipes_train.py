"""Every peer's own recipe trains: its optimiser, mixing, augmentation, drop path, dropout and token
selection, at the size of the demo data.

What a recipe says is tested in ``tests/core/test_peer_recipes.py``; that every architecture learns, in
``test_every_model.py``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD

from ogreg_core.inference import load_model
from ogreg_core.recipe import load_recipe
from ogreg_core.training.loop import Trainer
from tests.every_model import eight_clips, evaluate, thinned, trainer_from

# One for each model, optimiser and way of token selection.
RECIPES = [
    "kinetics400-video-focalnet-t",
    "kinetics400-xvit-b16",
    "ssv2-xvit-b16",
    "kinetics400-gta-r50-8f",
    "kinetics400-swin3d-t",
    "kinetics400-mvit-v2-s",
    "kinetics400-mvit-v1-b-stts",
    "kinetics400-swin3d-b-stts",
    "kinetics400-stts",
    "kinetics400-r2plus1d-18",
    "kinetics400-s3d",
]
STEPS = 3
# Pixels; convolutions are slow on the CPU.
SIZES = {"kinetics400-r2plus1d-18": 32, "kinetics400-s3d": 32}

# Parameters that no gradient can reach: of the last block of MViT only the class token goes on, and these
# serve the queries of the others.
UNREACHED = {
    "kinetics400-mvit-v2-s": {
        "blocks.15.attn.pool_q.pool.weight",
        *(f"blocks.15.attn.rel_pos_{axis}" for axis in "thw"),
    }
}


def at_demo_size(name: str, data: Path) -> dict[str, Any]:
    """What the demo data and two CPU cores demand, by key; crops keep their share of the picture."""
    recipe, size = load_recipe(name).recipe, SIZES.get(name, 64)

    def scaled(side: int) -> int:
        return round(side * size / recipe.data.size)

    return {
        "data.dataset": "",
        "data.root": str(data),
        "data.frames": min(recipe.data.frames, 16),
        "data.size": size,
        "data.short_side": scaled(recipe.data.short_side),
        "augment.short_side": [scaled(side) for side in recipe.augment.short_side],
        "init.weights": "",
        "train.epochs": 1,
        "train.batch_size": 8,
        "train.accumulate": 1,
        # The first step.
        "train.warmup_epochs": 1 / STEPS,
        "eval.clips": min(recipe.eval.clips, 2),
    }


@pytest.fixture(scope="module", autouse=True)
def thin() -> Iterator[None]:
    with thinned():
        yield


@dataclass(frozen=True)
class Trained:
    """A recipe after its epoch.

    Args:
        name: of the recipe.
        trainer: as it was when the training ended.
        before: the parameters that need a gradient, before the first step.
        gradients: largest magnitude in each parameter's, by step; nothing where it had none.
    """

    name: str
    trainer: Trainer
    before: dict[str, Tensor]
    gradients: list[dict[str, float]]


@pytest.fixture(scope="module", params=RECIPES)
def trained(
    request: pytest.FixtureRequest, demo_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Trained:
    name: str = request.param
    folder = tmp_path_factory.mktemp(name)
    data = eight_clips(demo_root, folder / "data", STEPS)
    changes = [f"{key}={json.dumps(value)}" for key, value in at_demo_size(name, data).items()]
    trainer = trainer_from(name, changes, folder / "run")
    learnt = {n: p for n, p in trainer.step.model.named_parameters() if p.requires_grad}
    before = {n: p.detach().clone() for n, p in learnt.items()}
    gradients: list[dict[str, float]] = []

    def note(*_: Any) -> None:
        found = {n: p.grad for n, p in learnt.items() if p.grad is not None}
        gradients.append({n: float(gradient.abs().max()) for n, gradient in found.items()})

    trainer.step.optimizer.register_step_post_hook(note)
    trainer.fit()
    return Trained(name, trainer, before, gradients)


def test_every_loss_and_gradient_is_finite(trained: Trained) -> None:
    lines = (trained.trainer.run.path / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    steps = [record for record in records if record["kind"] == "train"]
    assert [record["step"] for record in steps] == [1, 2, 3]
    assert all(math.isfinite(record["loss"]) for record in steps)
    # Near the logarithm of 16 classes: untrained, and nothing blows up within the epoch.
    assert all(record["loss"] == pytest.approx(math.log(16), rel=0.15) for record in steps)
    assert all(0 < record["grad_norm"] < math.inf for record in steps)
    assert len(trained.gradients) == STEPS
    assert all(math.isfinite(g) for found in trained.gradients for g in found.values())


def test_a_gradient_reaches_every_parameter(trained: Trained) -> None:
    """Whether a parameter has moved does not tell: weight decay moves one that learns nothing. No
    branch is left out for good, as drop path draws for every clip.
    """
    for found in trained.gradients:
        assert found.keys() == trained.before.keys()
    reached = {name for found in trained.gradients for name, peak in found.items() if peak}
    assert trained.before.keys() - reached == UNREACHED.get(trained.name, set())


def test_the_optimizer_moves_every_parameter(trained: Trained) -> None:
    """Unless all that its gradients ask for is lost in rounding; SGD is slow where they are small."""
    optimizer, model = trained.trainer.step.optimizer, trained.trainer.step.model
    rates = {
        id(p): group["initial_lr"] for group in optimizer.param_groups for p in group["params"]
    }
    epsilon = torch.finfo(torch.float32).eps
    for name, before in trained.before.items():
        after = model.get_parameter(name)
        asked = rates[id(after)]
        if isinstance(optimizer, SGD):
            asked *= sum(found[name] for found in trained.gradients)
        tiny = asked < epsilon * float(before.abs().max())
        reached = name not in UNREACHED.get(trained.name, set())
        assert tiny or not reached or not torch.equal(after, before), name


def test_loaded_checkpoint_repeats_the_validation(trained: Trained) -> None:
    trainer = trained.trainer
    model, _ = load_model(trainer.run.last)
    state = trainer.step.best_model.state_dict()
    assert model.state_dict().keys() == state.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert trainer.validation is not None
    report, validation = evaluate(trainer.run.last), trainer.validation
    assert report.metrics.videos == 8
    assert report.metrics.figures() == pytest.approx(validation.metrics.figures(), abs=1e-5)
    found, expected = report.scores.scores, validation.scores.scores
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    # Scores of so short a training are alike, but not as much as that; only S3D's many batch norms, whose
    # statistics are still those of the beginning, leave nothing of the clip.
    if trained.name != "kinetics400-s3d":
        assert (expected - expected[0]).abs().max() > 1e-4
