"""Sparse Gaze against the dense one, against a plain loop in float64, and against counts by hand."""

from __future__ import annotations

import math
from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ogreg_core.errors import UsageError
from ogreg_core.models.mdconv import MDConv, depthwise_tap, modulated_conv, modulation
from ogreg_core.models.registry import create_model
from ogreg_core.models.sparse_gaze import (
    add_temporal_taps,
    smallest_opening,
    sparse_gaze,
    sparse_modulated_conv,
)

STRIDES = (4, 2, 1, 1)


def small_model(name: str = "ogreg-n", **options) -> nn.Module:
    torch.manual_seed(1)
    model = create_model(name, 7, frames=8, size=32, strides=STRIDES, **options).eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path.endswith("gaze.bias"):
                parameter.normal_()
    return model


def features(batch: int, frames: int, height: int, width: int, channels: int, seed: int):
    """Features, a kernel, a bias, and m of which every other value is 0."""
    torch.manual_seed(seed)
    y = torch.randn(batch, frames, height, width, channels)
    m = torch.rand(batch, frames - 1, height, width, channels)
    m[torch.rand(batch, frames - 1, height, width) < 0.5] = 0
    return y, torch.randn(channels, 1, 3, 3, 3), m, torch.randn(channels)


def plain_loop(y: Tensor, weight: Tensor, m: Tensor, bias: Tensor, threshold: float) -> Tensor:
    """The formula, place by place, in float64."""
    y, weight, m, bias = (tensor.double() for tensor in (y, weight, m, bias))
    batch, frames, height, width, channels = y.shape
    padded = torch.zeros(batch, frames, height + 2, width + 2, channels, dtype=torch.float64)
    padded[:, :, 1:-1, 1:-1] = y

    def tap(b: int, t: int, row: int, column: int, k: int) -> Tensor:
        window = padded[b, t, row : row + 3, column : column + 3]
        return (window * weight[:, 0, k].permute(1, 2, 0)).sum(dim=(0, 1))

    out = torch.empty_like(y)
    for b, t, row, column in torch.cartesian_prod(*map(torch.arange, y.shape[:4])).tolist():
        place = b, t, row, column
        out[place] = bias + tap(*place, 1)
        for pair, other, k in ((t - 1, t - 1, 0), (t, t + 1, 2)):
            if 0 <= pair < frames - 1:
                opening = m[b, pair, row, column]
                if opening.abs().max() > threshold:
                    out[place] += opening * tap(b, other, row, column, k)
    return out


def moving_square() -> Tensor:
    """Features ``[1, 4, 6, 6, 2]``: a 2x2 square of another direction that goes right by one pixel per
    frame.
    """
    y = torch.zeros(1, 4, 6, 6, 2)
    y[..., 0] = 1.0
    for frame in range(4):
        y[0, frame, 2:4, frame : frame + 2] = torch.tensor([0.0, 1.0])
    return y


class TestConvolution:
    @settings(max_examples=15)
    @given(
        shape=st.tuples(*[st.integers(1, n) for n in (2, 4, 3, 4, 2)]),
        threshold=st.sampled_from([0.0, 0.3, 0.7, 0.95, 2.0]),
        seed=st.integers(0, 99),
    )
    def test_equals_a_plain_loop_at_any_threshold(self, shape, threshold, seed):
        y, weight, m, bias = features(*shape, seed)
        ours = sparse_modulated_conv(y, weight, m, bias, threshold)
        reference = plain_loop(y, weight, m, bias, threshold)
        torch.testing.assert_close(ours.double(), reference, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("of_m", [(2, 4, 5, 6, 3), (2, 4, 1, 1, 3), (2, 4, 5, 6, 1), (1,)])
    def test_threshold_0_is_the_dense_convolution(self, of_m):
        y, weight, _, bias = features(2, 5, 5, 6, 3, seed=0)
        m = torch.rand(of_m)
        ours = sparse_modulated_conv(y, weight, m, bias, 0.0)
        dense = modulated_conv(y, weight, m, bias)
        torch.testing.assert_close(ours, dense, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(ours, modulated_conv(y, weight, None, bias), atol=1e-2)

    def test_mixed_precision_is_close(self):
        y, weight, m, bias = features(1, 3, 5, 5, 3, seed=0)
        exact = sparse_modulated_conv(y, weight, m, bias, 0.3)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = sparse_modulated_conv(y, weight, m, bias, 0.3)
        assert mixed.dtype == torch.bfloat16
        torch.testing.assert_close(mixed.float(), exact, atol=0.15, rtol=0.05)

    def test_without_m_it_is_the_2d_convolution(self):
        y, weight, _, bias = features(2, 3, 4, 4, 3, seed=0)
        ours = sparse_modulated_conv(y, weight, None, bias, 0.0)
        torch.testing.assert_close(ours, modulated_conv(y, weight, None, bias))

    def test_the_largest_channel_opens_a_place_whatever_its_sign(self):
        y, weight, m, bias = features(1, 2, 1, 3, 2, seed=0)
        m[0, 0, 0] = torch.tensor([[0.4, -0.6], [0.4, 0.4], [0.5, 0.0]])
        ours = sparse_modulated_conv(y, weight, m, bias, 0.5)
        flat = modulated_conv(y, weight, None, bias)
        changed = (ours != flat).any(dim=-1)
        # 0.5 does not exceed 0.5.
        assert changed[0, :, 0].tolist() == [[True, False, False]] * 2

    def test_places_may_come_in_any_order_and_in_more_than_one_piece(self, monkeypatch):
        monkeypatch.setattr("ogreg_core.models.sparse_gaze.PLACES_AT_ONCE", 7)
        y, weight, m, bias = features(2, 4, 4, 5, 3, seed=0)
        places = (m.amax(dim=-1) > 0).nonzero()
        order = torch.randperm(len(places))
        found = []
        for some in (places, places[order]):
            out = depthwise_tap(y, weight[:, :, 1], bias)
            add_temporal_taps(out, y, weight, m[tuple(some.T)], some)
            found.append(out)
        torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-5)
        dense = modulated_conv(y, weight, m, bias)
        torch.testing.assert_close(found[1], dense, atol=1e-5, rtol=1e-5)


class TestSmallestOpening:
    @settings(max_examples=40)
    @given(
        a=st.lists(st.sampled_from([-20.0, 0.0, 5.0, 30.0]), min_size=1, max_size=3),
        b=st.floats(-3, 1),
        threshold=st.sampled_from([0.0, 0.01, 0.1, 0.5, 0.99, 1.0, 3.0]),
    )
    def test_says_of_d_what_the_threshold_says_of_m(self, a, b, threshold):
        sharpness, offset = torch.tensor(a).double(), torch.full((len(a),), b).double()
        d = torch.linspace(0, 2, 201, dtype=torch.float64)
        largest = modulation(d, sharpness, offset).abs().amax(dim=-1)
        from_d = d > smallest_opening(sharpness, offset, threshold)
        clear = (largest - threshold).abs() > 1e-9
        assert torch.equal(from_d[clear], (largest > threshold)[clear])

    def test_nothing_opens_above_1(self):
        one = torch.ones(1)
        assert smallest_opening(30 * one, -2 * one, 1.0) == math.inf


class TestModel:
    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("ogreg-n", {}),
            ("ogreg-n", {"similarity": "frame"}),
            ("ogreg-n-ablation", {"gaze": "sigmoid"}),
            ("ogreg-n-ablation", {"modulation": "frame", "channels": "shared"}),
        ],
    )
    def test_threshold_0_gives_the_models_own_logits(self, name, options):
        model, clip = small_model(name, **options), torch.randn(2, 3, 6, 32, 32)
        with torch.inference_mode():
            dense = model(clip)
            with sparse_gaze(model, 0.0) as work:
                sparse = model(clip)
        torch.testing.assert_close(sparse, dense, atol=1e-5, rtol=1e-5)
        assert work.share > 0.9

    def test_threshold_1_gives_the_logits_without_temporal_taps(self):
        model, flat = small_model(), small_model(gaze="2d")
        flat.load_state_dict(model.state_dict(), strict=False)
        clip = torch.randn(1, 3, 6, 32, 32)
        with torch.inference_mode(), sparse_gaze(model, 1.0) as work:
            torch.testing.assert_close(model(clip), flat(clip), atol=1e-5, rtol=1e-5)
        assert work.multiply_adds == 0

    def test_a_still_clip_executes_no_temporal_tap(self):
        model = small_model()
        clip = torch.randn(1, 3, 1, 32, 32).expand(2, 3, 8, 32, 32)
        with torch.inference_mode(), sparse_gaze(model, 1e-3) as work:
            model(clip)
        assert {block.open for block in work.blocks.values()} == {0}
        assert work.dense_multiply_adds > 0

    def test_a_single_frame_has_no_places(self):
        model, y = MDConv(2), torch.randn(1, 1, 4, 4, 2)
        model.init_weights()
        with torch.no_grad(), sparse_gaze(model, 0.5) as work:
            torch.testing.assert_close(model(y), modulated_conv(y, model.weight, None, model.bias))
        assert (work.blocks[""].places, work.share) == (0, 0.0)

    def test_work_of_a_moving_square_is_counted_exactly(self):
        gaze = MDConv(2)
        gaze.init_weights()
        y = moving_square()
        with torch.no_grad():
            dense = gaze(y)
            with sparse_gaze(gaze, 0.5) as work:
                for _ in range(2):
                    # Where nothing moves m is 0, so that nothing is lost.
                    torch.testing.assert_close(gaze(y), dense, atol=1e-5, rtol=1e-5)
        (block,) = work.blocks.values()
        # From frame to frame two pixels are left and two are entered; two passes of three pairs.
        assert (block.open, block.places) == (2 * 3 * 4, 2 * 3 * 36)
        assert block.multiply_adds == 24 * 2 * 9 * 2
        assert work.share == pytest.approx(4 / 36)

    def test_dense_work_is_what_torch_counts(self):
        gaze, y = MDConv(3), torch.randn(2, 4, 5, 6, 3)
        counts = []
        for m in (torch.ones(1), None):
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                modulated_conv(y, gaze.weight, m, gaze.bias)
            counts.append(counter.get_total_flops() // 2)
        gaze.init_weights()
        with torch.no_grad(), sparse_gaze(gaze, 0.0) as work:
            gaze(y)
        assert work.dense_multiply_adds == counts[0] - counts[1]
        assert work.multiply_adds == work.dense_multiply_adds

    def test_more_is_skipped_the_higher_the_threshold(self):
        model = small_model()
        clip = torch.randn(1, 3, 1, 32, 32) + 0.2 * torch.randn(1, 3, 8, 32, 32)
        executed = []
        for threshold in (0.0, 0.1, 0.3, 1.0):
            with torch.inference_mode(), sparse_gaze(model, threshold) as work:
                model(clip)
            executed.append(work.multiply_adds)
        assert executed == sorted(executed, reverse=True)
        assert len(set(executed)) == 4

    def test_the_model_is_restored_even_after_an_error(self):
        model, clip = small_model(), torch.randn(1, 3, 4, 32, 32)
        before = [sorted(vars(part)) for part in model.modules()]
        with torch.inference_mode():
            dense = model(clip)
            with suppress(ZeroDivisionError), sparse_gaze(model, 1.0):
                assert not torch.equal(model(clip), dense)
                raise ZeroDivisionError
            assert torch.equal(model(clip), dense)
        assert [sorted(vars(part)) for part in model.modules()] == before

    def test_contexts_nest(self):
        model, clip = small_model(), torch.randn(1, 3, 4, 32, 32)
        with torch.inference_mode(), sparse_gaze(model, 1.0) as outer:
            with sparse_gaze(model, 0.0) as inner:
                model(clip)
            assert (outer.dense_multiply_adds, inner.multiply_adds > 0) == (0, True)
            model(clip)
        assert outer.dense_multiply_adds == inner.dense_multiply_adds


class TestRefusals:
    def test_a_model_without_mdconv(self):
        with (
            pytest.raises(UsageError, match="Linear has no MDConv"),
            sparse_gaze(nn.Linear(2, 2), 0),
        ):
            pass

    @pytest.mark.parametrize("gaze", ["2d", "3d", "none", "gated", "difference-3d"])
    def test_a_gaze_of_another_formula(self, gaze):
        model = small_model("ogreg-n-ablation", gaze=gaze)
        refused = pytest.raises(UsageError, match="no temporal taps that close")
        with refused as caught, sparse_gaze(model, 0.1):
            pass
        assert caught.value.where == "stages.0.0.gaze"
        assert repr(gaze) in caught.value.why

    @pytest.mark.parametrize("threshold", [-0.1, math.nan])
    def test_a_threshold_that_is_none(self, threshold):
        with pytest.raises(UsageError, match="at least 0"), sparse_gaze(small_model(), threshold):
            pass
