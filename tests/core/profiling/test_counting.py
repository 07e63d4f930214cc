from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from ogreg_core.errors import UsageError
from ogreg_core.models.layers import attend
from ogreg_core.models.registry import create_model
from ogreg_core.profiling import count_multiply_adds, count_parameters
from ogreg_core.profiling.counting import observe
from ogreg_core.profiling.subject import Subject, count_costs, usual_views


class Fused(nn.Module):
    def __init__(self, fused: bool):
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.fused = fused

    def forward(self, x):
        qkv = self.qkv(x)
        if self.fused:
            return attend(qkv, 4)
        q, k, v = (part.unflatten(-1, (4, 4)).transpose(1, 2) for part in qkv.chunk(3, -1))
        return ((q @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).flatten(2)


PROJECTION = 2 * 10 * 16 * 48
PRODUCTS = 2 * (2 * 10 * 10 * 16)


def test_fused_attention_counts_as_much_as_unfused():
    x = torch.randn(2, 10, 16)
    fused, unfused = count_multiply_adds(Fused(True), x), count_multiply_adds(Fused(False), x)
    assert fused.total == unfused.total == PROJECTION + PRODUCTS
    assert fused.attention == PRODUCTS
    assert fused.attention_share == pytest.approx(PRODUCTS / fused.total)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_torch_takes_fused_attention_apart(device):
    """On the CPU the fused kernel would run, on meta nothing does; both count the same."""
    x = torch.randn(2, 10, 16, device=device)
    found = observe(Fused(True).to(device), x)
    assert (found.multiply_adds, found.attention) == (PROJECTION + PRODUCTS, PRODUCTS)
    # The scores are never stored.
    assert found.activations[""] == 2 * 10 * 48 + 2 * 10 * 16
    assert found.activations["qkv"] == 2 * 10 * 48


def test_count_of_a_whole_model_in_closed_form():
    """ogreg-n, patch stem, 8 x 64 x 64: every matrix product and convolution written out."""
    model = create_model("ogreg-n", 10, stem="patch")
    found = count_multiply_adds(model, torch.zeros(1, 3, 8, 64, 64))
    frames, side, total = 4, 16, 0
    total += frames * side * side * 32 * 3 * 2 * 4 * 4
    for dim, depth, stride in ((32, 1, 8), (64, 1, 4), (128, 3, 2), (256, 1, 1)):
        tokens = frames * side * side
        coarse = frames * (-(-side // stride)) ** 2
        taps = frames * side * side * 9 + 2 * (frames - 1) * side * side * 9
        block = tokens * dim * dim + 2 * 4 * tokens * dim * dim + taps * dim
        block += coarse * dim * 3 * dim + 2 * coarse * coarse * dim + coarse * dim * 27
        total += depth * block
        side //= 2
        if dim < 256:
            total += frames * side * side * 4 * dim * 2 * dim
    total += 256 * 10
    # The positional encoding may leave out taps that reach beyond the clip; fvcore also counts
    # normalisation and interpolation: little, but not nothing in a small model.
    assert found.products == pytest.approx(total, rel=0.005)
    assert found.total == pytest.approx(total, rel=0.03)
    assert found.total > found.products


def test_training_mode_is_restored_and_parameters_counted():
    model = Fused(True).train()
    x = torch.randn(1, 4, 16)
    count_multiply_adds(model, x)
    observe(model, x)
    assert model.training
    assert not model._forward_hooks
    assert not model.qkv._forward_pre_hooks
    assert count_parameters(model) == 16 * 48 + 48


@pytest.mark.parametrize(("name", "frames"), [("r2plus1d-18", 4), ("mvit-v2-s", 4), ("ogreg-n", 5)])
def test_the_counters_agree(name, frames):
    subject = Subject.fresh(name, {}, 10, frames, 32)
    found = count_costs(subject, subject.build())
    assert found.note == ""
    assert found.difference == pytest.approx(0, abs=1e-4)
    assert found.flops.attention == found.seen.attention
    assert found.flops.uncounted == {}


def test_activations_are_those_that_fvcore_counts():
    """Of a network without fused attention, which fvcore does not know."""
    model = create_model("r2plus1d-18", 10).eval()
    clip = torch.zeros(1, 3, 4, 32, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from fvcore.nn import ActivationCountAnalysis

        analysis = ActivationCountAnalysis(model, clip)
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        expected = analysis.by_module()
    found = observe(model, clip).activations
    assert found == {name: count for name, count in expected.items() if count}


class Needy(nn.Module):
    """Does as its data say."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(32, 7)

    def forward(self, clip):
        return self.linear(clip) if float(clip.sum()) == float(clip.sum()) else clip


def test_a_model_that_needs_its_data_is_counted_on_them(monkeypatch):
    monkeypatch.setattr(Subject, "build", lambda self: Needy())
    found = count_costs(Subject.fresh("ogreg-n", {}, 7, 2, 32), Needy())
    assert found.note.startswith("not without data")
    assert found.seen.multiply_adds == found.flops.total == 3 * 2 * 32 * 32 * 7


def test_an_input_that_a_model_does_not_take_is_refused():
    subject = Subject.fresh("s3d", {}, 7, 4, 32)
    with pytest.raises(UsageError, match="4 frames"):
        count_costs(subject, subject.build())
    # A model that does not say so in words of its own.
    with pytest.raises(UsageError, match="ogreg-n does not take clips of 2x40x40") as caught:
        count_costs(Subject.fresh("ogreg-n", {}, 7, 2, 40), Needy())
    assert "shapes cannot be multiplied" in caught.value.why


def test_views_are_those_of_the_recipe():
    found = usual_views("xvit-b16")
    assert (found.clips, found.crops, found.views) == (1, 3, 3)
    assert found.origin == "recipe kinetics400-xvit-b16"
    assert usual_views("ogreg-b").origin == "recipe kinetics400-b"
    assert usual_views("ogreg-n").origin == ""
    assert usual_views("ogreg-n").views == 1
