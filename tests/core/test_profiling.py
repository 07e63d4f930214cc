from __future__ import annotations

import pytest
import torch
from torch import nn

from ogreg_core.models.layers import attend
from ogreg_core.models.registry import create_model
from ogreg_core.profiling import (
    count_multiply_adds,
    count_parameters,
    measure,
    measure_in_turn,
    peak_memory_mb,
)


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


def test_fused_attention_counts_as_much_as_unfused():
    x = torch.randn(2, 10, 16)
    fused, unfused = count_multiply_adds(Fused(True), x), count_multiply_adds(Fused(False), x)
    projection = 2 * 10 * 16 * 48
    products = 2 * (2 * 10 * 10 * 16)
    assert fused.total == unfused.total == projection + products
    assert fused.attention_share == pytest.approx(products / fused.total)


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
    # fvcore also counts normalisation and interpolation: little, but not nothing in a small model.
    assert found.total == pytest.approx(total, rel=0.03)
    assert found.total >= total


def test_training_mode_is_restored_and_parameters_counted():
    model = Fused(True).train()
    count_multiply_adds(model, torch.randn(1, 4, 16))
    assert model.training
    assert count_parameters(model) == 16 * 48 + 48


def test_functions_are_timed_in_turn():
    calls, seen = [], []
    functions = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    found = measure_in_turn(
        functions, torch.device("cpu"), 3, 1, lambda event: seen.append(event.done)
    )
    assert "".join(calls) == "abababab"
    assert seen == list(range(1, 9))
    assert [(name, timing.repeats, timing.warmup) for name, timing in found.items()] == [
        ("a", 3, 1),
        ("b", 3, 1),
    ]


def test_timing_and_memory():
    calls = []
    timing = measure(lambda: calls.append(1), torch.device("cpu"), repeats=7, warmup=3)
    assert len(calls) == 10
    assert 0 <= timing.median_ms <= timing.p90_ms
    assert peak_memory_mb(torch.device("cpu")) > 50
