"""Video-FocalNet against the published equations in plain torch, and against a focal modulation of images.

Both references know only the names and shapes of the released checkpoints, so that they test the key map too.
Weights are never those of a fresh network, whose modulators are nearly zero.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ogreg_core.errors import UsageError
from ogreg_core.models.protocol import VideoModel
from ogreg_core.models.video_focalnet import (
    Block,
    FocalModulation,
    Stage,
    VideoFocalNet,
    VideoFocalNetConfig,
    build_video_focalnet,
    focal_context,
    map_video_focalnet,
)
from ogreg_core.training.memory import checkpoint_activations

SMALL = VideoFocalNetConfig((Stage(6, 1), Stage(12, 2), Stage(24, 1), Stage(48, 1)))
FLAGS = {
    "plain": SMALL,
    "tubelet": replace(SMALL, tubelet=2),
    "conv_embed": replace(SMALL, conv_embed=True),
    "layerscale": replace(SMALL, layerscale=True),
    "postln": replace(SMALL, postln=True, layerscale=True),
    "postln_in_modulation": replace(SMALL, postln_in_modulation=True),
    "normalize": replace(SMALL, normalize_modulator=True),
    "levels": VideoFocalNetConfig((Stage(6, 1, 3), Stage(12, 1, 1, 5)), focal_factor=4),
}
# Tensors of one block as the authors name them, for C channels and two levels.
BLOCK_KEYS = {
    "norm1.weight": "C",
    "norm1.bias": "C",
    "norm2.weight": "C",
    "norm2.bias": "C",
    "modulation.f.weight": "2C+3,C",
    "modulation.f.bias": "2C+3",
    "modulation.h.weight": "C,C,1,1",
    "modulation.h.bias": "C",
    "modulation.proj.weight": "C,C",
    "modulation.proj.bias": "C",
    "modulation.focal_layers.0.0.weight": "C,1,3,3",
    "modulation.focal_layers.1.0.weight": "C,1,5,5",
    "modulation.f_temporal.weight": "C+3,C",
    "modulation.f_temporal.bias": "C+3",
    "modulation.h_temporal.weight": "C,C,1",
    "modulation.h_temporal.bias": "C",
    "modulation.focal_layers_temporal.0.0.weight": "C,C,3",
    "modulation.focal_layers_temporal.1.0.weight": "C,C,5",
    "mlp.fc1.weight": "4C,C",
    "mlp.fc1.bias": "4C",
    "mlp.fc2.weight": "C,4C",
    "mlp.fc2.bias": "C",
}


def lively(config: VideoFocalNetConfig = SMALL, classes: int = 7) -> VideoFocalNet:
    """A model whose parameters are all drawn anew, large enough that both modulators matter."""
    torch.manual_seed(2)
    model = VideoFocalNet(config, classes).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 1.0 / math.sqrt(parameter[0].numel()) if parameter.ndim > 1 else 0.3
            parameter.normal_(std=spread)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)
    return model


def official(model: VideoFocalNet) -> dict[str, torch.Tensor]:
    """The model's state under the authors' names, found by mapping each of them."""
    own, names = model.state_dict(), {}
    for s, stage in enumerate(model.config.stages):
        for part in ("weight", "bias"):
            for b in range(stage.depth):
                inner = {key.rpartition(".")[0] for key in BLOCK_KEYS} | {"modulation.ln"}
                levels = [f"modulation.focal_layers{t}.2.0" for t in ("", "_temporal")]
                names |= {f"layers.{s}.blocks.{b}.{x}.{part}": 0 for x in [*inner, *levels]}
                names |= {f"layers.{s}.blocks.{b}.gamma_{i}": 0 for i in (1, 2)}
            names |= {f"layers.{s}.downsample.{x}.{part}": 0 for x in ("proj", "norm")}
        names |= {
            f"{x}.{p}": 0
            for x in ("patch_embed.proj", "patch_embed.norm", "norm", "head")
            for p in ("weight", "bias")
        }
    numbered = {name: torch.tensor(i) for i, name in enumerate(names)}
    theirs = dict(enumerate(names))
    found = {ours: theirs[int(i)] for ours, i in map_video_focalnet(numbered).items()}
    return {found[name]: tensor for name, tensor in own.items()}


# --- the published equations, per clip -----------------------------------------------------------


def norm(x, w, name):
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)


def linear(x, w, name):
    return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def spatial_modulator(u, w, name, levels, normalize):
    """Query and modulator of frames ``[BT, H, W, C]``."""
    channels = u.shape[-1]
    projected = linear(u, w, f"{name}.f")
    query, c = projected[..., :channels], projected[..., channels : 2 * channels]
    total = 0
    for level in range(levels):
        kernel = w[f"{name}.focal_layers.{level}.0.weight"]
        images = F.pad(c.permute(0, 3, 1, 2), [kernel.shape[-1] // 2] * 4)
        c = F.gelu(F.conv2d(images, kernel, groups=channels)).permute(0, 2, 3, 1)
        total = total + c * projected[..., 2 * channels + level, None]
    total = total + F.gelu(c.mean((1, 2), keepdim=True)) * projected[..., -1:]
    total = total / (levels + 1) if normalize else total
    return query, total @ w[f"{name}.h.weight"][:, :, 0, 0].T + w[f"{name}.h.bias"]


def temporal_modulator(u, w, name, levels, normalize, frames):
    """Modulator of frames ``[BT, H, W, C]``: every tap of every frame by hand."""
    channels = u.shape[-1]
    projected = linear(u, w, f"{name}.f_temporal").unflatten(0, (-1, frames))
    c, gates = projected[..., :channels], projected[..., channels:]
    total = torch.zeros_like(c)
    for level in range(levels):
        kernel = w[f"{name}.focal_layers_temporal.{level}.0.weight"]
        reach = kernel.shape[-1] // 2
        out = torch.zeros_like(c)
        for t in range(frames):
            for source in range(max(0, t - reach), min(frames, t + reach + 1)):
                out[:, t] += c[:, source] @ kernel[:, :, source - t + reach].T
        c = F.gelu(out)
        total += c * gates[..., level, None]
    total += F.gelu(c.mean(1, keepdim=True)) * gates[..., -1:]
    total = total / (levels + 1) if normalize else total
    m = total @ w[f"{name}.h_temporal.weight"][:, :, 0].T + w[f"{name}.h_temporal.bias"]
    return m.flatten(0, 1)


def reference(model: VideoFocalNet, clip, observed=None):
    """Logits of ``[B, T, 3, H, W]`` from the equations; modulators per block go into ``observed``."""
    config, w = model.config, official(model)
    batch = len(clip)
    if config.tubelet == 1:
        stride, padding = 4, 2 if config.conv_embed else 0
        x = F.conv2d(
            clip.flatten(0, 1),
            w["patch_embed.proj.weight"],
            w["patch_embed.proj.bias"],
            stride,
            padding,
        )
    else:
        kernel = w["patch_embed.proj.weight"]
        x = F.conv3d(
            clip.transpose(1, 2), kernel, w["patch_embed.proj.bias"], tuple(kernel.shape[2:])
        )
        x = x.transpose(1, 2).flatten(0, 1)
    x = norm(x.permute(0, 2, 3, 1), w, "patch_embed.norm")
    for s, stage in enumerate(config.stages):
        for b in range(stage.depth):
            name = f"layers.{s}.blocks.{b}"

            def modulate(u, name=name, levels=stage.levels):
                at, flag = f"{name}.modulation", config.normalize_modulator
                query, spatial = spatial_modulator(u, w, at, levels, flag)
                temporal = temporal_modulator(u, w, at, levels, flag, len(u) // batch)
                if observed is not None:
                    observed[name] = spatial, temporal
                product = query * spatial * temporal
                product = norm(product, w, f"{at}.ln") if config.postln_in_modulation else product
                return linear(product, w, f"{at}.proj")

            def mlp(u, name=name):
                return linear(F.gelu(linear(u, w, f"{name}.mlp.fc1")), w, f"{name}.mlp.fc2")

            for number, function in ((1, modulate), (2, mlp)):
                at = f"{name}.norm{number}"
                branch = norm(function(x), w, at) if config.postln else function(norm(x, w, at))
                x = x + w.get(f"{name}.gamma_{number}", torch.ones(1)) * branch
        name = f"layers.{s}.downsample"
        if f"{name}.proj.weight" in w:
            x = F.conv2d(
                x.permute(0, 3, 1, 2),
                w[f"{name}.proj.weight"],
                w[f"{name}.proj.bias"],
                stride=2,
                padding=int(config.conv_embed),
            )
            x = norm(x.permute(0, 2, 3, 1), w, f"{name}.norm")
    per_frame = norm(x, w, "norm").mean((1, 2)).unflatten(0, (batch, -1))
    return linear(per_frame.mean(1), w, "head")


# --- a focal modulation network of images, channels first ----------------------------------------


def image_network(picture, w, depths):
    """Logits of pictures ``[N, 3, H, W]``: FocalNet without time, features as ``[N, C, H, W]``."""

    def norm_channels(x, name):
        centred = x - x.mean(1, keepdim=True)
        scaled = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
        return scaled * w[f"{name}.weight"][:, None, None] + w[f"{name}.bias"][:, None, None]

    def dense(x, name):
        return F.conv2d(x, w[f"{name}.weight"].reshape(-1, x.shape[1], 1, 1), w[f"{name}.bias"])

    def modulate(y, name):
        channels = y.shape[1]
        query, context, gates = dense(y, f"{name}.f").split([channels, channels, 3], 1)
        small = F.gelu(
            F.conv2d(context, w[f"{name}.focal_layers.0.0.weight"], None, 1, 1, 1, channels)
        )
        large = F.gelu(
            F.conv2d(small, w[f"{name}.focal_layers.1.0.weight"], None, 1, 2, 1, channels)
        )
        whole = F.gelu(F.adaptive_avg_pool2d(large, 1))
        gathered = small * gates[:, 0:1] + large * gates[:, 1:2] + whole * gates[:, 2:3]
        return dense(query * dense(gathered, f"{name}.h"), f"{name}.proj")

    x = F.conv2d(picture, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=4)
    x = norm_channels(x, "patch_embed.norm")
    for s, depth in enumerate(depths):
        for name in (f"layers.{s}.blocks.{b}" for b in range(depth)):
            x = x + modulate(norm_channels(x, f"{name}.norm1"), f"{name}.modulation")
            hidden = F.gelu(dense(norm_channels(x, f"{name}.norm2"), f"{name}.mlp.fc1"))
            x = x + dense(hidden, f"{name}.mlp.fc2")
        if s < len(depths) - 1:
            name = f"layers.{s}.downsample"
            x = F.conv2d(x, w[f"{name}.proj.weight"], w[f"{name}.proj.bias"], stride=2)
            x = norm_channels(x, f"{name}.norm")
    features = norm_channels(x, "norm").mean((2, 3))
    return features @ w["head.weight"].T + w["head.bias"]


def set_temporal_to_one(model: VideoFocalNet) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".h_temporal." in name:
                parameter.fill_(1.0 if name.endswith("bias") else 0.0)


class TestEquations:
    @pytest.mark.parametrize("flags", FLAGS)
    @pytest.mark.parametrize("shape", [(2, 4, 64, 96), (1, 6, 45, 34)])
    def test_logits_are_those_of_the_published_equations(self, flags, shape):
        model = lively(FLAGS[flags])
        batch, frames, height, width = shape
        clip = torch.randn(batch, frames, 3, height, width)
        with torch.no_grad():
            ours, expected = model(clip.transpose(1, 2)), reference(model, clip)
        assert expected.abs().max() > 0.1
        torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-4)

    @pytest.mark.parametrize("frames", [1, 2, 3, 5, 11])
    def test_any_number_of_frames(self, frames):
        model = lively()
        clip = torch.randn(1, frames, 3, 32, 40)
        with torch.no_grad():
            torch.testing.assert_close(
                model(clip.transpose(1, 2)), reference(model, clip), atol=2e-5, rtol=1e-4
            )

    def test_a_level_of_context_by_hand(self):
        """One channel, three frames at one pixel; identity kernel, then the mean."""
        context = torch.tensor([1.0, 2.0, 6.0]).view(1, 1, 3, 1)
        gates = torch.tensor([[1.0, 10.0, 100.0], [1.0, 2.0, 3.0]]).view(1, 2, 3, 1)
        after = torch.tensor([0.0, 0.0, 1.0]).view(1, 1, 3, 1)  # each frame sees the next one
        found = focal_context(context, gates, [after], groups=1, pooled=(2,))
        normal = torch.distributions.Normal(0.0, 1.0)
        shifted = [x * normal.cdf(torch.tensor(x)).item() for x in (2.0, 6.0, 0.0)]
        mean = sum(shifted) / 3
        mean *= normal.cdf(torch.tensor(mean)).item()
        expected = [shifted[t] * 10.0**t + mean * (t + 1) for t in range(3)]
        torch.testing.assert_close(found.flatten(), torch.tensor(expected), atol=1e-5, rtol=1e-5)

    def test_temporal_branch_of_one_is_the_image_network_averaged_over_frames(self):
        model = lively()
        set_temporal_to_one(model)
        clip = torch.randn(2, 3, 5, 64, 96)
        with torch.no_grad():
            frames = [image_network(clip[:, :, t], official(model), (1, 2, 1, 1)) for t in range(5)]
            torch.testing.assert_close(
                model(clip), torch.stack(frames).mean(0), atol=2e-5, rtol=1e-4
            )

    def test_temporal_modulator_stays_at_its_pixel(self):
        layer = lively().blocks()["stage2.block1"].modulation
        u = torch.randn(1, 5, 4, 6, 12)
        changed = u.clone()
        changed[0, 2, 1, 3] += 1.0
        with torch.no_grad():
            moved = (layer.temporal(u) - layer.temporal(changed)).abs().amax(-1)[0]
        assert (moved[:, 1, 3] > 1e-4).all()
        moved[:, 1, 3] = 0
        assert moved.max() < 1e-5

    def test_spatial_modulator_stays_in_its_frame(self):
        layer = lively().blocks()["stage2.block1"].modulation
        u = torch.randn(1, 5, 4, 6, 12)
        changed = u.clone()
        changed[0, 2, 1, 3] += 1.0
        with torch.no_grad():
            difference = layer.query_and_spatial(u)[1] - layer.query_and_spatial(changed)[1]
        moved = difference.abs().amax(-1)[0]
        assert (moved[2] > 1e-5).all()
        assert moved[[0, 1, 3, 4]].max() < 1e-5

    def test_gradcheck_in_float64(self):
        torch.manual_seed(0)
        layer = FocalModulation(Stage(2, 1), SMALL).double()
        u = torch.randn(1, 3, 3, 2, 2, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(layer, (u,))


class TestModel:
    def test_order_of_frames_matters(self):
        model = lively()
        clip = torch.randn(1, 3, 6, 64, 64)
        with torch.no_grad():
            assert (model(clip) - model(clip.flip(2))).abs().max() > 1e-2

    @given(
        frames=st.integers(1, 7),
        height=st.integers(32, 70),
        width=st.integers(32, 70),
        flags=st.sampled_from(["plain", "tubelet"]),
    )
    @settings(max_examples=8)
    def test_any_size_runs(self, frames, height, width, flags):
        model = lively(FLAGS[flags])
        with torch.no_grad():
            out = model(torch.randn(1, 3, frames, height, width))
        assert out.shape == (1, 7)
        assert out.isfinite().all()

    def test_incomplete_tubelet_is_filled_up_with_the_last_frame(self):
        model = lively(FLAGS["tubelet"])
        clip = torch.randn(1, 3, 5, 32, 32)
        with torch.no_grad():
            full = model(torch.cat([clip, clip[:, :, -1:]], dim=2))
            torch.testing.assert_close(model(clip), full)

    def test_tubelets_and_overlapping_stem_are_refused(self):
        with pytest.raises(UsageError, match="tubelets of 2"):
            build_video_focalnet("t", 5, tubelet=2, conv_embed=True)
        for choices in ({"tubelet": 1}, {"tubelet": 2, "conv_embed": True}):
            with pytest.raises(UsageError, match="stem conv"):
                build_video_focalnet("t", 5, stem="conv", **choices)

    def test_answers_the_protocol(self):
        model = lively()
        assert isinstance(model, VideoModel)
        assert model.num_classes == 7
        shapes = [tuple(x.shape) for x in model.forward_stages(torch.randn(2, 3, 4, 64, 96))]
        assert shapes == [
            (2, 4, 16, 24, 6),
            (2, 4, 8, 12, 12),
            (2, 4, 4, 6, 24),
            (2, 4, 2, 3, 48),
        ]

    def test_same_in_train_and_eval_and_in_a_batch(self):
        model = lively()
        clip = torch.randn(2, 3, 4, 40, 48)
        with torch.no_grad():
            expected = model(clip)
            apart = torch.cat([model(clip[:1]), model(clip[1:])])
            torch.testing.assert_close(apart, expected, atol=1e-5, rtol=1e-4)
            assert torch.equal(model.train()(clip), expected)

    @pytest.mark.parametrize("flags", ["plain", "postln_in_modulation"])
    def test_maps_are_the_modulators_of_the_equations(self, flags):
        model = lively(FLAGS[flags])
        clip = torch.randn(2, 3, 4, 64, 64)
        observed = {}
        with torch.no_grad():
            plain = model(clip)
            reference(model, clip.transpose(1, 2), observed)
        logits, maps = model.forward_with_maps(clip)
        assert torch.equal(logits, plain)
        assert list(maps) == [
            *("stage1.block1", "stage2.block1", "stage2.block2", "stage3.block1", "stage4.block1")
        ]
        for found, (spatial, temporal) in zip(maps.values(), observed.values(), strict=True):
            norms = (spatial * temporal).norm(dim=-1).unflatten(0, (2, 4))
            torch.testing.assert_close(found.gaze, norms, atol=1e-4, rtol=1e-3)
            for name, modulator in (("spatial", spatial), ("temporal", temporal)):
                per_frame = modulator.norm(dim=-1).mean((1, 2)).unflatten(0, (2, 4))
                torch.testing.assert_close(found.profiles[name], per_frame, atol=1e-4, rtol=1e-3)
            assert found.glance is None
            assert not found.between
        assert not any(block.modulation._forward_pre_hooks for block in model.blocks().values())

    def test_gates_in_the_profiles_are_named_by_their_reach(self):
        model = lively()
        with torch.no_grad():
            for block in model.blocks().values():
                block.modulation.f_temporal.weight.zero_()
                block.modulation.f_temporal.bias[-3:] = torch.tensor([0.5, -1.0, 2.0])
        _, maps = model.forward_with_maps(torch.randn(1, 3, 4, 32, 32))
        for found in maps.values():
            gates = {k: v.unique().tolist() for k, v in found.profiles.items() if "gate" in k}
            assert gates == {"gate 3 frames": [0.5], "gate 7 frames": [-1.0], "gate clip": [2.0]}
            assert all(curve.shape == (1, 4) for curve in found.profiles.values())

    def test_gradients_reach_every_parameter(self):
        model = lively(FLAGS["layerscale"])
        model(torch.randn(2, 3, 4, 64, 64)).square().sum().backward()
        silent = [n for n, p in model.named_parameters() if not p.grad.abs().max() > 0]
        assert not silent

    def test_norms_and_biases_do_not_decay(self):
        model = lively(FLAGS["layerscale"])
        exempt = model.no_weight_decay()
        assert {
            "stages.0.0.norm1.weight",
            "stages.0.0.gamma_1",
            "stages.3.0.modulation.h_temporal.bias",
            "merges.0.norm.bias",
        } <= exempt
        assert "stages.0.0.modulation.focal_layers.0.weight" not in exempt
        assert "stages.0.0.modulation.focal_layers_temporal.1.weight" not in exempt

    def test_layers_hold_every_parameter_once(self):
        model = lively(FLAGS["layerscale"])
        layers = model.layers()
        assert layers[-1] == ["head"]
        assert len(layers) == 7
        for name, _ in model.named_parameters():
            homes = [i for i, a in enumerate(layers) for p in a if name.startswith(f"{p}.")]
            assert len(homes) == 1, name

    def test_recomputed_activations_change_nothing(self):
        clip = torch.randn(2, 3, 3, 32, 32)
        plain, recomputed = lively(), lively()
        checkpoint_activations(recomputed, [1, 2, 3, 4])
        for model in (plain, recomputed):
            model(clip).sum().backward()
        for a, b in zip(plain.parameters(), recomputed.parameters(), strict=True):
            assert torch.equal(a.grad, b.grad)

    def test_stochastic_depth_drops_single_frames_and_grows_from_zero(self):
        model = VideoFocalNet(SMALL, 5, drop_path=0.4)
        rates = [block.drop_path.rate for block in model.blocks().values()]
        assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
        torch.manual_seed(0)
        block = Block(Stage(6, 1), SMALL, 0.5).train()
        nn.init.zeros_(block.mlp[3].weight)
        nn.init.zeros_(block.mlp[3].bias)
        nn.init.ones_(block.modulation.proj.bias)
        x = torch.randn(1, 40, 2, 3, 6)
        kept = (block(x) - x).detach().flatten(2).abs().amax(-1)[0] > 0.1
        assert 8 < kept.sum() < 32

    def test_bf16_autocast_stays_close(self):
        model = lively()
        clip = torch.randn(2, 3, 4, 64, 64)
        with torch.no_grad():
            full = model(clip)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                half = model(clip)
        assert (full - half.float()).abs().max() < 0.05 * full.abs().max()

    @pytest.mark.slow
    def test_compiles_to_one_graph(self):
        model = lively()
        clip = torch.randn(2, 3, 3, 32, 32)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        found = []
        for run in (model, compiled):
            model.zero_grad()
            logits = run(clip)
            logits.square().sum().backward()
            found.append([logits.detach(), *(p.grad.clone() for p in model.parameters())])
        for plain, captured in zip(*found, strict=True):
            torch.testing.assert_close(captured, plain, atol=1e-4, rtol=1e-3)
