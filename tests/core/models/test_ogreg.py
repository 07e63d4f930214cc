"""OG-ReG against independent references: torch's own convolutions and attention, plain loops, float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ogreg_core.models.mdconv import (
    MDConv,
    depthwise_tap,
    frame_dissimilarity,
    modulated_conv,
    modulation,
)
from ogreg_core.models.ogreg import OGReG, OGReGConfig, SoDA, Stage, build_ogreg
from ogreg_core.models.weights import initialise

SMALL = {"strides": (4, 2, 1, 1)}


def small_model(stem: str = "conv", **choices) -> nn.Module:
    torch.manual_seed(1)
    model = build_ogreg("n", 7, stem=stem, **SMALL, **choices).eval()
    # Random norms and biases: fresh ones hide mistakes behind zeros and ones.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


class TestMDConv:
    def test_closed_modulation_is_2d_convolution_per_frame(self):
        y, weight = torch.randn(2, 5, 6, 7, 4), torch.randn(4, 1, 3, 3, 3)
        ours = modulated_conv(y, weight, torch.zeros(1))
        images = y.flatten(0, 1).permute(0, 3, 1, 2)
        reference = F.conv2d(images, weight[:, :, 1], padding=1, groups=4)
        reference = reference.permute(0, 2, 3, 1).unflatten(0, (2, 5))
        torch.testing.assert_close(ours, reference, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(modulated_conv(y, weight, None), reference, atol=1e-5, rtol=1e-5)

    def test_open_modulation_is_3d_convolution(self):
        y, weight = torch.randn(2, 5, 6, 7, 4), torch.randn(4, 1, 3, 3, 3)
        ours = modulated_conv(y, weight, torch.ones(1))
        reference = F.conv3d(y.permute(0, 4, 1, 2, 3), weight, padding=1, groups=4)
        torch.testing.assert_close(ours, reference.permute(0, 2, 3, 4, 1), atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("shape", [(2, 4, 1, 1, 3), (2, 4, 5, 6, 3)])
    def test_equals_a_plain_loop_over_the_formula(self, shape):
        y, weight = torch.randn(2, 5, 5, 6, 3), torch.randn(3, 1, 3, 3, 3)
        m = torch.rand(shape)

        def tap(frame, k):
            return F.conv2d(
                frame.permute(0, 3, 1, 2), weight[:, :, k], padding=1, groups=3
            ).permute(0, 2, 3, 1)

        expected = []
        for t in range(5):
            out = tap(y[:, t], 1)
            if t > 0:
                out = out + m[:, t - 1] * tap(y[:, t - 1], 0)
            if t < 4:
                out = out + m[:, t] * tap(y[:, t + 1], 2)
            expected.append(out)
        torch.testing.assert_close(
            modulated_conv(y, weight, m), torch.stack(expected, 1), atol=1e-5, rtol=1e-5
        )

    @pytest.mark.parametrize("batch", [1, 3])
    def test_taps_of_frames_cut_off_a_batch_stay_channels_last(self, batch):
        y = torch.randn(batch, 4, 8, 8, 16)
        assert depthwise_tap(y[:, :-1], torch.randn(16, 1, 3, 3)).is_contiguous()

    def test_one_frame_is_the_2d_convolution(self):
        layer, flat = MDConv(4), MDConv(4, gaze="2d")
        nn.init.normal_(layer.weight)
        flat.load_state_dict(
            {k: v for k, v in layer.state_dict().items() if k in flat.state_dict()}
        )
        y = torch.randn(1, 1, 6, 6, 4)
        torch.testing.assert_close(layer(y), flat(y))

    @pytest.mark.parametrize("similarity", ["frame", "position"])
    def test_gradcheck_in_float64(self, similarity):
        layer = MDConv(2, similarity=similarity).double()
        nn.init.normal_(layer.weight)
        y = torch.randn(1, 3, 3, 3, 2, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(layer, (y,))

    @pytest.mark.parametrize("content", ["random", "still", "blank"])
    def test_the_written_out_gradient_is_that_of_the_definition(self, content):
        torch.manual_seed(0)
        layer = MDConv(5).double()
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
        y = torch.randn(2, 4, 3, 5, 5, dtype=torch.float64)
        if content == "still":
            y = y[:, :1].expand(-1, 4, -1, -1, -1).clone()
        elif content == "blank":  # features of norm 0 beside others
            y[:, 1:3, :, 2:] = 0.0
        y.requires_grad_()
        inputs = [y, *layer.parameters()]
        m = modulation(frame_dissimilarity(y), layer.sharpness, layer.offset)
        defined = modulated_conv(y, layer.weight, m, layer.bias)
        weights = torch.randn_like(defined)
        expected = torch.autograd.grad((defined * weights).sum(), inputs)
        out = layer(y)
        assert type(out.grad_fn).__name__ == "_GazeBackward"
        torch.testing.assert_close(out, defined)
        # Beside a feature of norm 0 gradients reach 1e8, and what is left of their sums is coarse.
        torch.testing.assert_close(
            torch.autograd.grad((out * weights).sum(), inputs), expected, rtol=1e-6, atol=1e-5
        )

    def test_gradients_reach_sharpness_and_offset(self):
        layer = MDConv(4)
        nn.init.normal_(layer.weight)
        layer(torch.randn(2, 4, 6, 6, 4)).square().sum().backward()
        assert layer.sharpness.grad.abs().min() > 0
        assert layer.offset.grad.abs().min() > 0

    def test_frame_similarity_uses_the_mean_over_positions(self):
        layer = MDConv(3, similarity="frame")
        y = torch.randn(2, 5, 4, 6, 3)
        d = frame_dissimilarity(y).mean((2, 3))
        expected = modulation(d, layer.sharpness, layer.offset)
        torch.testing.assert_close(layer.modulation(y)[:, :, 0, 0], expected)


class TestDissimilarity:
    def test_against_numpy_style_loop(self):
        y = torch.randn(1, 3, 2, 2, 5, dtype=torch.float64)
        d = frame_dissimilarity(y)
        for t in range(2):
            for p in range(4):
                a, b = y[0, t].reshape(4, 5)[p], y[0, t + 1].reshape(4, 5)[p]
                cosine = (a @ b) / (a.norm() * b.norm())
                assert d[0, t].reshape(4)[p].item() == pytest.approx(1 - cosine.item(), abs=1e-9)

    @given(scale=st.floats(0.01, 100), seed=st.integers(0, 1000))
    @settings(max_examples=30)
    def test_ignores_scale_and_stays_within_bounds(self, scale, seed):
        y = torch.randn(1, 4, 3, 3, 8, generator=torch.Generator().manual_seed(seed))
        d = frame_dissimilarity(y)
        torch.testing.assert_close(d, frame_dissimilarity(y * scale), atol=1e-5, rtol=1e-4)
        assert d.min() >= -1e-6
        assert d.max() <= 2 + 1e-6

    def test_modulation_starts_at_zero_and_rises_to_one(self):
        a, b = torch.tensor([6.0, 20.0]), torch.tensor([-2.0, 0.5])
        d = torch.linspace(0, 2, 50)
        m = modulation(d, a, b)
        assert torch.equal(m[0], torch.zeros(2))
        assert (m.diff(dim=0) >= 0).all()
        assert (m[-1] > 0.99).all()


class TestSoDA:
    def test_the_positional_encoding_is_a_conv3d_that_repeats_the_edge_frames(self):
        layer = SoDA(6, heads=2, stride=1)
        nn.init.normal_(layer.position.weight)
        y = torch.randn(2, 4, 5, 3, 6)
        volume = y.permute(0, 4, 1, 2, 3)
        volume = F.pad(volume, (0, 0, 0, 0, 1, 1), mode="replicate")
        expected = y + layer.position(volume).permute(0, 2, 3, 4, 1)
        torch.testing.assert_close(layer.coarse(y), expected, atol=1e-5, rtol=1e-5)

    def test_stride_one_is_multihead_attention(self):
        ours = SoDA(12, heads=3, stride=1, position=False)
        reference = nn.MultiheadAttention(12, 3, batch_first=True)
        with torch.no_grad():
            reference.in_proj_weight.copy_(ours.qkv.weight)
            reference.in_proj_bias.copy_(ours.qkv.bias)
            reference.out_proj.weight.copy_(torch.eye(12))
            reference.out_proj.bias.zero_()
        y = torch.randn(2, 3, 4, 5, 12)
        tokens = y.flatten(1, 3)
        expected = reference(tokens, tokens, tokens, need_weights=False)[0].unflatten(1, (3, 4, 5))
        torch.testing.assert_close(ours(y), expected, atol=1e-5, rtol=1e-5)

    def test_attention_map_is_what_multihead_attention_reports(self):
        ours = SoDA(12, heads=3, stride=1, position=False)
        reference = nn.MultiheadAttention(12, 3, batch_first=True)
        with torch.no_grad():
            reference.in_proj_weight.copy_(ours.qkv.weight)
            reference.in_proj_bias.copy_(ours.qkv.bias)
        y = torch.randn(1, 2, 3, 3, 12)
        tokens = y.flatten(1, 3)
        weights = reference(tokens, tokens, tokens)[1]
        torch.testing.assert_close(
            ours.attention(y).flatten(1), weights.mean(1), atol=1e-6, rtol=1e-5
        )

    def test_partial_windows_average_what_they_hold(self):
        layer = SoDA(4, heads=1, stride=2, position=False)
        y = torch.randn(1, 1, 3, 5, 4)
        coarse = layer.coarse(y)
        assert coarse.shape == (1, 1, 2, 3, 4)
        torch.testing.assert_close(coarse[0, 0, 1, 2], y[0, 0, 2, 4])
        torch.testing.assert_close(coarse[0, 0, 0, 0], y[0, 0, :2, :2].mean((0, 1)))

    def test_time_is_never_pooled(self):
        assert SoDA(4, heads=1, stride=4).coarse(torch.randn(1, 9, 8, 8, 4)).shape[1] == 9


class TestModel:
    @pytest.mark.parametrize("stem", ["conv", "patch"])
    @pytest.mark.parametrize("similarity", ["frame", "position"])
    def test_still_clip_has_no_dissimilarity_in_any_block(self, stem, similarity):
        model = small_model(stem, similarity=similarity)
        frame = torch.randn(1, 3, 1, 64, 64)
        _, maps = model.forward_with_maps(frame.expand(-1, -1, 8, -1, -1))
        assert len(maps) == 6
        for found in maps.values():
            assert found.gaze.abs().max() < 1e-5
            assert found.profiles["m"].abs().max() < 1e-4

    @given(
        frames=st.integers(1, 9),
        height=st.integers(32, 70),
        width=st.integers(32, 70),
        stem=st.sampled_from(["conv", "patch"]),
    )
    @settings(max_examples=12)
    def test_any_size_runs(self, frames, height, width, stem):
        model = small_model(stem)
        with torch.no_grad():
            out = model(torch.randn(1, 3, frames, height, width))
        assert out.shape == (1, 7)
        assert out.isfinite().all()

    @pytest.mark.parametrize("stem", ["conv", "patch"])
    def test_batch_of_two_equals_two_of_one(self, stem):
        model = small_model(stem)
        clip = torch.randn(2, 3, 6, 40, 48)
        with torch.no_grad():
            together = model(clip)
            apart = torch.cat([model(clip[:1]), model(clip[1:])])
        torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("choices", [{}, {"gaze": "3d"}, {"similarity": "frame"}])
    def test_order_of_frames_matters(self, choices):
        model = small_model("patch", **choices)
        clip = torch.randn(1, 3, 8, 64, 64)
        with torch.no_grad():
            difference = (model(clip) - model(clip.flip(2))).abs().max()
        assert difference > 1e-4

    def test_one_frame_equals_the_image_model(self):
        """T = 1 on inflated weights: the same network with 2-D patch embedding, attention over one frame."""
        video = small_model("patch")
        image = copy.deepcopy(video)
        kernel = torch.randn(32, 3, 4, 4)
        with torch.no_grad():
            video.stem.proj.weight.copy_(kernel[:, :, None].expand(-1, -1, 2, -1, -1) / 2)
        picture = torch.randn(2, 3, 64, 64)

        def image_stem(clip):
            tokens = F.conv2d(clip[:, :, 0], kernel, image.stem.proj.bias, stride=4)
            return image.stem.norm(tokens.permute(0, 2, 3, 1))[:, None]

        stem, image.stem = image.stem, nn.Identity()
        with torch.no_grad():
            image.stem.norm = stem.norm
            image.stem.proj = stem.proj
            image.stem.forward = image_stem
            torch.testing.assert_close(
                video(picture[:, :, None]), image(picture[:, :, None]), atol=1e-5, rtol=1e-5
            )

    def test_bf16_autocast_stays_close(self):
        model = small_model()
        clip = torch.randn(2, 3, 8, 64, 64)
        with torch.no_grad():
            full = model(clip)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                half = model(clip)
        assert (full - half.float()).abs().max() < 0.03 * full.abs().max() + 0.03

    @pytest.mark.slow
    def test_compile_and_export_give_the_same_logits(self):
        # Compiling takes its time for each block; one of each kind is enough.
        torch.manual_seed(1)
        model = OGReG(OGReGConfig((Stage(16, 1, 2, 2), Stage(32, 1, 2, 1))), 7).eval()
        clip = torch.randn(1, 3, 4, 32, 32)
        with torch.no_grad():
            expected = model(clip)
            exported = torch.export.export(model, (clip,)).module()(clip)
            # Whose kernels are right too is tested of whole steps, in test_step.py.
            compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(clip)
        torch.testing.assert_close(exported, expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(compiled, expected, atol=1e-4, rtol=1e-4)

    def test_maps_leave_logits_alone(self):
        model = small_model()
        clip = torch.randn(2, 3, 6, 64, 64)
        with torch.no_grad():
            plain = model(clip)
        logits, maps = model.forward_with_maps(clip)
        torch.testing.assert_close(logits, plain)
        for found in maps.values():
            torch.testing.assert_close(
                found.glance.sum((1, 2, 3)), torch.ones(2), atol=1e-4, rtol=0
            )
        assert not model._forward_hooks
        assert not any(block.gaze._forward_pre_hooks for block in model.blocks().values())

    def test_merging_order_is_that_of_swin(self):
        from torchvision.models.swin_transformer import PatchMerging as Reference

        from ogreg_core.models.ogreg import PatchMerging

        ours, reference = PatchMerging(6), Reference(6)
        reference.load_state_dict(ours.state_dict())
        x = torch.randn(2, 1, 5, 7, 6)
        torch.testing.assert_close(ours(x)[:, 0], reference(x[:, 0]))

    def test_norms_biases_and_modulation_do_not_decay(self):
        model = small_model()
        exempt = model.no_weight_decay()
        assert "stages.0.0.gaze.sharpness" in exempt
        assert "stages.0.0.gaze.offset" in exempt
        assert "stages.0.0.norm1.weight" in exempt
        assert "stages.0.0.mlp.0.weight" not in exempt

    def test_state_dict_round_trip_through_initialise(self):
        source, target = small_model(), build_ogreg("n", 7, **SMALL)
        classes = [f"c{i}" for i in range(7)]
        report = initialise(
            target, source.state_dict(), "x", classes=classes, source_classes=classes
        )
        assert not report.missing
        assert all(
            torch.equal(a, b)
            for a, b in zip(source.state_dict().values(), target.state_dict().values(), strict=True)
        )
