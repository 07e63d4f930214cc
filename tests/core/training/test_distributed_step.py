"""Two processes against one, step by step and over a whole training."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from ogreg_core.data.order import share_of
from ogreg_core.distributed import join
from ogreg_core.recipe import load_recipe
from ogreg_core.training.batch_norm import SyncedBatchNorm, synchronise_batch_norm
from ogreg_core.training.settings import step_settings_of
from tests import ranks
from tests.core.training.test_resume import records, train
from tests.core.training.test_step import MIXED, SETTINGS, make_batch, make_step, weights

# Batch norm sees a micro-batch at a time; the patch stem has none.
PLAIN = (
    "train.precision=fp32",
    "model.drop_path=0.0",
    "train.lr=1e-4",
    "model.options.stem=patch",
)


def steps(settings, stem, accumulate=1):
    """Losses and weights of three steps; of two processes each has its half of the eight clips."""
    torch.set_num_threads(1)
    with join("cpu") as (world, _):
        step = make_step(settings, stem=stem, lr=1e-4, world=world)
        parts = world.size * accumulate
        own = [
            make_batch(share_of(range(8), parts, micro * world.size + world.rank))
            for micro in range(accumulate)
        ]
        losses = [world.sum([step(own, 0, n).loss_sum])[0] / 8 for n in range(3)]
        buffers = {name: b.numpy() for name, b in step.model.named_buffers()}
        return losses, weights(step).numpy(), buffers


@pytest.mark.parametrize(
    ("settings", "stem", "accumulate"),
    [
        (SETTINGS, "patch", 1),
        (MIXED, "patch", 2),
        (SETTINGS, "conv", 1),
        (replace(MIXED, checkpoint_stages=[1, 2], ema=0.9), "conv", 1),
    ],
    ids=["plain", "mixed and accumulated", "batch norm", "everything"],
)
def test_two_processes_with_half_a_batch_equal_one(settings, stem, accumulate):
    """Loss and weights in fp32 to 1e-5; batch norm sees both halves."""
    alone = steps(settings, stem)
    both = ranks.run(2, steps, settings, stem, accumulate)
    for losses, found, buffers in both:
        assert losses == pytest.approx(alone[0], abs=1e-5)
        # Where a gradient is next to nothing Adam divides rounding by rounding: one weight in a million.
        apart = np.abs(found - alone[1])
        assert (apart > 1e-5).mean() <= 1.2e-6
        assert apart.max() < 5e-5
        for name, buffer in buffers.items():
            np.testing.assert_allclose(buffer, alone[2][name], atol=1e-5, rtol=1e-5)
    assert np.array_equal(both[0][1], both[1][1])


def norms_inside_blocks(stages):
    """Running statistics after two steps of a model with batch norm in its blocks."""
    torch.set_num_threads(1)
    gta = {"stages": [1], "options": {"regions": 0, "heads": 1, "mixing": "plain"}}
    with join("cpu") as (world, _):
        settings = replace(SETTINGS, checkpoint_stages=stages)
        step = make_step(settings, lr=1e-4, world=world, gta=gta, frames=4, size=32)
        batch = make_batch(share_of(range(8), world.size, world.rank))
        for number in range(2):
            step([batch], 0, number)
        return {
            name: buffer.numpy()
            for name, buffer in step.model.named_buffers()
            if "running" in name or "tracked" in name
        }


def test_recomputed_blocks_see_their_synchronised_norms_once():
    plain = norms_inside_blocks([])
    assert len(plain) > 2
    for found in ranks.run(2, norms_inside_blocks, [1, 2]):
        assert found.keys() == plain.keys()
        for name, buffer in plain.items():
            np.testing.assert_allclose(found[name], buffer, atol=1e-5, rtol=1e-5)


def short_clips(frames, ratio=None):
    with join("cpu") as (world, _):
        keep = {"time": [{"before": 1, "ratio": ratio}]} if ratio else None
        still = frames <= 2 or ratio is not None
        step = make_step(replace(SETTINGS, still=still), lr=1e-4, world=world, token_selection=keep)
        batch = make_batch(share_of(range(8), world.size, world.rank), frames)
        return [step([batch], 0, n).grad_norm for n in range(2)]


@pytest.mark.parametrize("frames", [1, 2, 3])
def test_clips_that_leave_parameters_without_gradient(frames):
    alone = short_clips(frames)
    assert ranks.run(2, short_clips, frames) == [pytest.approx(alone, rel=1e-4)] * 2


def test_selection_that_leaves_parameters_without_gradient():
    """One token frame has no neighbour. The noise of a clip depends on its process: no comparison."""
    for norms in ranks.run(2, short_clips, 8, 0.25):
        assert all(norm > 0 for norm in norms)


@pytest.mark.parametrize(
    ("frames", "keeps", "left"),
    [(8, [], 4), (7, [], 4), (2, [], 1), (8, [(1, 0.5)], 2), (8, [(2, 0.5), (1, 0.5)], 1)],
)
def test_token_frames_that_are_left(frames, keeps, left):
    texts = ", ".join(f"{{before={before}, ratio={ratio}}}" for before, ratio in keeps)
    recipe = load_recipe(
        "demo", [f"data.frames={frames}", f"model.token_selection.time=[{texts}]"]
    ).recipe
    settings = step_settings_of(recipe, 8, 1, "fp32")
    assert settings.still == (left == 1)


def normalise(x, grad):
    with join("cpu") as (world, device):
        torch.manual_seed(0)
        norm = nn.BatchNorm3d(3)
        torch.nn.init.uniform_(norm.weight)
        if world.size > 1:
            norm = synchronise_batch_norm(nn.Sequential(norm), device)[0]
            assert type(norm) is SyncedBatchNorm
        half = len(x) // world.size
        own = slice(world.rank * half, (world.rank + 1) * half)
        own_x = x[own].clone().requires_grad_()
        out = norm(own_x)
        out.backward(grad[own])
        norm.eval()
        return (
            out.detach().numpy(),
            own_x.grad.numpy(),
            norm.weight.grad.numpy(),
            norm.running_var.numpy(),
            norm(x).detach().numpy(),
        )


def test_synchronised_batch_norm_equals_torchs_on_the_whole_batch():
    """Outputs, gradients of inputs and weights, running statistics, evaluation."""
    torch.manual_seed(5)
    x, grad = torch.randn(6, 3, 2, 4, 5) * 3 + 100, torch.randn(6, 3, 2, 4, 5)
    out, dx, dw, variance, later = normalise(x, grad)
    first, second = ranks.run(2, normalise, x, grad)
    np.testing.assert_allclose(np.concatenate([first[0], second[0]]), out, atol=1e-4)
    np.testing.assert_allclose(np.concatenate([first[1], second[1]]), dx, atol=1e-5)
    np.testing.assert_allclose(first[2] + second[2], dw, atol=1e-4)
    for found in (first, second):
        np.testing.assert_allclose(found[3], variance, rtol=1e-5)
        np.testing.assert_allclose(found[4], later, atol=1e-4)


@pytest.mark.slow
def test_a_training_of_two_processes_equals_one(demo_root, tmp_path):
    """Through loader, order, mixing, averages, validation and reports: a line per step, once."""
    alone = train(demo_root, tmp_path / "one", 0, 600.0, *PLAIN)
    both = ranks.run(2, train, demo_root, tmp_path / "two", 0, 600.0, *PLAIN)
    accumulated = train(demo_root, tmp_path / "three", 0, 600.0, *PLAIN, "train.accumulate=2")
    for found in (*both, accumulated):
        for name, value in alone.items():
            np.testing.assert_allclose(found[name], value, atol=1e-4, rtol=0)
    one, two = records(tmp_path / "one"), records(tmp_path / "two")
    assert len(one) == len(two) == 3 * 6 + 2
    for expected, found in zip(one, two, strict=True):
        assert found == pytest.approx(expected, abs=1e-4)
