"""Every knob of a step: that it does what it says, and leaves alone what it must."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ogreg_core.data.loader import TrainBatch
from ogreg_core.data.mixing import Mixing
from ogreg_core.data.order import share_of
from ogreg_core.data.transforms import to_input
from ogreg_core.distributed import SINGLE
from ogreg_core.errors import UsageError
from ogreg_core.models.ogreg import OGReG, OGReGConfig, Stage
from ogreg_core.models.registry import create_model
from ogreg_core.training.averaging import averaged, decay_at
from ogreg_core.training.memory import checkpoint_activations
from ogreg_core.training.optim import OptimSettings, build_optimizer, build_schedule
from ogreg_core.training.step import StepSettings, TrainStep

MEAN, STD = (0.45, 0.45, 0.45), (0.225, 0.225, 0.225)
SETTINGS = StepSettings(8, 5.0, Mixing(), 0, "fp32", MEAN, STD)
OPTIONS = {"strides": (2, 1, 1, 1)}


def small_ogreg(stem="patch", drop_path=0.0, **options):
    return create_model("ogreg-n", 5, drop_path=drop_path, stem=stem, **OPTIONS, **options)


def make_step(settings=SETTINGS, *, network=small_ogreg, lr=1e-3, world=SINGLE, **options):
    torch.manual_seed(3)
    model = network(**options)
    optimizer = build_optimizer(model, OptimSettings(lr, 0.05))
    schedule = build_schedule(
        optimizer, steps_per_epoch=4, epochs=2, warmup_epochs=0, lr=lr, min_lr=0.0
    )
    return TrainStep(model, optimizer, schedule, settings, world)


def make_batch(indices=range(8), frames=4):
    """Clips that depend on their index alone, so that a share of a batch holds the same ones."""
    clips = []
    for index in indices:
        generator = torch.Generator().manual_seed(index)
        clips.append(torch.randint(256, (3, frames, 32, 32), generator=generator).byte())
    return TrainBatch(
        torch.stack(clips),
        torch.tensor([i % 5 for i in indices]),
        torch.tensor(list(indices)),
        torch.tensor([[2, 3, 9, 7, 40 + i] for i in indices]),
        (),
    )


def weights(step):
    return torch.cat([p.detach().flatten() for p in step.model.parameters()])


def run(step, parts, steps=3):
    """Losses of some steps on the same micro-batches."""
    return [step(parts, 0, number).loss_sum / 8 for number in range(steps)]


MIXED = replace(SETTINGS, mixing=Mixing(mixup=0.8, cutmix=1.0, smoothing=0.1))


@pytest.mark.parametrize("settings", [SETTINGS, MIXED], ids=["plain", "mixed"])
@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulated_steps_equal_whole_ones(settings, accumulate):
    """Two or four micro-batches, erasing, mixup and cutmix included: the step of the whole batch.

    Adam divides gradients by their own size: of those that vanish it makes steps of lr out of noise,
    so weights are compared at a rate of fine-tuning.
    """
    whole, parts = make_step(settings, lr=1e-4), make_step(settings, lr=1e-4)
    shares = [make_batch(share_of(range(8), accumulate, part)) for part in range(accumulate)]
    assert run(parts, shares) == pytest.approx(run(whole, [make_batch()]), abs=1e-5)
    torch.testing.assert_close(weights(parts), weights(whole), atol=1e-5, rtol=0)


def test_accumulation_needs_less_memory():
    shares = [make_batch(share_of(range(8), 2, part)) for part in range(2)]
    kept = saved_bytes(make_step(), [make_batch()])
    assert saved_bytes(make_step(), shares[:1]) == pytest.approx(kept / 2, rel=0.05)


def saved_bytes(step, parts):
    """Bytes of activations that the forward passes of a step keep for its backward passes."""
    total = 0
    own = {parameter.untyped_storage().data_ptr() for parameter in step.model.parameters()}

    def pack(tensor):
        nonlocal total
        if tensor.untyped_storage().data_ptr() not in own:
            total += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step(parts, 0, 0)
    return total


@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_recomputed_activations_save_memory_and_change_nothing(stem):
    """Bit for bit, drop path included; every stage more saves more."""
    plain = make_step(stem=stem, drop_path=0.5)
    expected = run(plain, [make_batch()])
    kept = [saved_bytes(make_step(stem=stem, drop_path=0.5), [make_batch()])]
    for stages in ([1], [1, 2], [1, 2, 3, 4]):
        settings = replace(SETTINGS, checkpoint_stages=stages)
        step = make_step(settings, stem=stem, drop_path=0.5)
        assert run(step, [make_batch()]) == expected
        assert torch.equal(weights(step), weights(plain))
        kept.append(saved_bytes(make_step(settings, stem=stem, drop_path=0.5), [make_batch()]))
    assert kept == sorted(kept, reverse=True)
    assert kept[-1] < 0.5 * kept[0]
    assert len(set(kept)) == 4


def test_recomputing_moves_running_statistics_once():
    """A block with batch norm of its own, which the recomputation must not count twice."""

    class Staged(nn.Sequential):
        def stage_blocks(self):
            return [list(self)]

    def built():
        torch.manual_seed(1)
        return Staged(nn.Sequential(nn.Conv3d(3, 4, 1), nn.BatchNorm3d(4), nn.GELU()))

    plain, recomputed = built(), built()
    checkpoint_activations(recomputed, [1, 1])
    clip = torch.randn(2, 3, 2, 4, 4)
    for model in (plain, recomputed):
        model(clip).square().sum().backward()
    for a, b in zip(plain.state_dict().values(), recomputed.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(plain[0][0].weight.grad, recomputed[0][0].weight.grad)


def test_an_overflow_in_fp16_is_no_step():
    step = make_step(replace(SETTINGS, precision="fp16", ema=0.9))
    before, lr = weights(step), step.learning_rate
    step.scaler.scale(torch.ones(()))
    step.scaler._scale.fill_(1e38)
    result = step([make_batch()], 0, 0)
    assert not math.isfinite(result.grad_norm)
    assert torch.equal(weights(step), before)
    assert step.learning_rate == lr
    assert step.average.n_averaged == 0
    assert step.scaler.get_scale() < 1e38


def test_a_stage_that_is_not_there_is_refused():
    with pytest.raises(UsageError, match="names stage 5"):
        checkpoint_activations(create_model("ogreg-n", 5), [5])


def test_the_average_lags_and_is_what_is_kept():
    """Against a plain loop in float64."""
    step = make_step(replace(SETTINGS, ema=0.9))
    expected = None
    for number in range(6):
        step([make_batch()], 0, number)
        current = weights(step).double()
        # The first update takes the weights as they are.
        decay = min(0.9, (1 + number) / (10 + number))
        expected = current if expected is None else decay * expected + (1 - decay) * current
    kept = torch.cat([p.detach().flatten() for p in step.best_model.parameters()])
    torch.testing.assert_close(kept.double(), expected, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(kept, weights(step), atol=1e-4)
    assert make_step().best_model is not None
    assert "average" not in make_step().state_dict()


def test_buffers_of_the_average_are_the_models():
    step = make_step(replace(SETTINGS, ema=0.9), stem="conv")
    run(step, [make_batch()])
    assert torch.equal(step.best_model.stem.bn1.running_mean, step.model.stem.bn1.running_mean)
    assert step.model.stem.bn1.running_mean.abs().sum() > 0


def test_decay_rises_to_its_value():
    decays = [decay_at(0.99, n) for n in range(2000)]
    assert decays[0] == pytest.approx(0.1)
    assert decays == sorted(decays)
    assert decays[-1] == 0.99
    with pytest.raises(AttributeError):
        averaged(nn.Linear(1, 1), 0.5).num_classes  # noqa: B018


def test_bf16_stays_near_fp32():
    """Autocast on the CPU: bfloat16 holds three decimal digits."""
    plain, rounded = make_step(), make_step(replace(SETTINGS, precision="bf16"))
    expected, found = run(plain, [make_batch()]), run(rounded, [make_batch()])
    assert found != expected
    assert found == pytest.approx(expected, rel=0.02)
    assert next(rounded.model.parameters()).dtype == torch.float32
    change = F.cosine_similarity(
        weights(rounded) - weights(make_step()), weights(plain) - weights(make_step()), dim=0
    )
    assert change > 0.8


def test_fp16_scales_the_loss_and_gets_the_same_step():
    plain, scaled = make_step(), make_step(replace(SETTINGS, precision="fp16"))
    assert scaled.scaler.get_scale() == 2.0**16
    assert run(scaled, [make_batch()]) == pytest.approx(run(plain, [make_batch()]), rel=0.01)
    state = scaled.state_dict()["scaler"]
    assert state["_growth_tracker"] == 3


def test_channels_last_changes_the_layout_alone():
    # The patch stem: what else OG-ReG convolves lies channels last anyway.
    plain, other = (
        make_step(stem="patch"),
        make_step(replace(SETTINGS, channels_last=True), stem="patch"),
    )
    weight = other.model.stem.proj.weight
    assert weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert not weight.is_contiguous()
    layouts = []
    other.model.stem.proj.register_forward_pre_hook(
        lambda _module, args: layouts.append(
            args[0].is_contiguous(memory_format=torch.channels_last_3d)
        )
    )
    assert run(other, [make_batch()]) == pytest.approx(run(plain, [make_batch()]), abs=1e-4)
    assert layouts
    assert all(layouts)


@pytest.mark.slow
def test_compiled_steps_stay_near_plain_ones():
    # Compiling takes its time for each block; two stages of one are enough.
    config = OGReGConfig((Stage(16, 1, 2, 2), Stage(32, 1, 2, 1)), stem="patch")
    network = partial(OGReG, config, 5)
    plain = make_step(network=network)
    compiled = make_step(replace(SETTINGS, compile=True), network=network)
    torch._dynamo.utils.counters.clear()
    assert run(compiled, [make_batch()], 2) == pytest.approx(
        run(plain, [make_batch()], 2), abs=1e-4
    )
    assert torch._dynamo.utils.counters["stats"]["calls_captured"] > 0
    assert set(compiled.model.state_dict()) == set(plain.model.state_dict())


def test_the_loss_is_that_of_torch():
    step = make_step(replace(SETTINGS, mixing=Mixing(smoothing=0.1)))
    batch = make_batch()._replace(boxes=torch.zeros(8, 5, dtype=torch.int64))
    with torch.no_grad():
        logits = step.model(to_input(batch.clips, MEAN, STD))
    expected = F.cross_entropy(logits, batch.labels, label_smoothing=0.1).item()
    result = step([batch], 0, 0)
    assert result.loss_sum / 8 == pytest.approx(expected, abs=1e-6)
    assert result.correct == int((logits.argmax(1) == batch.labels).sum())
    assert result.clips == 8


def test_clipping_limits_the_step_and_tells_the_norm():
    free = make_step(replace(SETTINGS, clip_grad=0.0))
    told = free([make_batch()], 0, 0).grad_norm
    grads = [p.grad.flatten() for p in free.model.parameters() if p.grad is not None]
    norm = torch.cat(grads).norm().item()
    assert told == pytest.approx(norm, rel=1e-4)
    clipped = make_step(replace(SETTINGS, clip_grad=norm / 10))
    assert clipped([make_batch()], 0, 0).grad_norm == pytest.approx(norm, rel=1e-4)
    grads = [p.grad.flatten() for p in clipped.model.parameters() if p.grad is not None]
    assert torch.cat(grads).norm().item() == pytest.approx(norm / 10, rel=1e-3)


def test_a_step_draws_by_its_place_alone():
    """Drop path does not depend on what was drawn before, so that a kill loses no state."""
    first, second = make_step(drop_path=0.5), make_step(drop_path=0.5)
    torch.rand(17)
    expected = run(first, [make_batch()])
    torch.manual_seed(99)
    assert run(second, [make_batch()]) == expected
    third = make_step(drop_path=0.5)
    assert third([make_batch()], 0, 1).loss_sum / 8 != expected[0]


def test_state_goes_through_a_state_dict():
    settings = replace(SETTINGS, ema=0.9, precision="fp16")
    whole, first, second = make_step(settings), make_step(settings), make_step(settings)
    run(whole, [make_batch()], 4)
    run(first, [make_batch()], 2)
    second.load_state_dict(first.state_dict())
    for number in (2, 3):
        second([make_batch()], 0, number)
    assert torch.equal(weights(second), weights(whole))
    for a, b in zip(second.best_model.parameters(), whole.best_model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert second.learning_rate == whole.learning_rate


def test_single_images_train():
    step = make_step(replace(SETTINGS, still=True))
    result = step([make_batch(frames=1)], 0, 0)
    assert result.grad_norm > 0
