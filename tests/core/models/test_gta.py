"""GTA against plain loops over the equations of its design, and torchvision's own ResNet-50."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ogreg_core.errors import UsageError
from ogreg_core.models.gta import (
    GlobalTemporalAttention,
    GTAConfig,
    mix_frames,
)
from ogreg_core.profiling import count_multiply_adds

T, H, W, C, D = 4, 3, 5, 16, 8
S = H * W


def make(seed: int = 0, frames: int = T, layout="last", **choices) -> GlobalTemporalAttention:
    """A module in float64 whose batch norm and biases have moved, as after some training."""
    torch.manual_seed(seed)
    choices = {"heads": 4, "regions": 3, **choices}
    if choices.get("temporal", "global") != "global":
        del choices["heads"]
    module = GlobalTemporalAttention(C, frames, GTAConfig(**choices), layout=layout)
    module = module.double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        module.norm.running_mean.normal_()
        module.norm.running_var.uniform_(0.5, 2.0)
    return module


def features(batch: int = 2, frames: int = T, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, frames, H, W, C, dtype=torch.float64, generator=generator)


# --- an independent reference: one sample, loops, the state dict alone ---------------------------


def affine(state, name, vectors):
    bias = state.get(f"{name}.bias")
    return vectors @ state[f"{name}.weight"].T + (0 if bias is None else bias)


def attended(state, name, tokens):
    """Softmax attention of rows of one matrix."""
    width = state[f"{name}.weight"].shape[0] // 3
    theta, phi, g = affine(state, name, tokens).split(width, dim=-1)
    out = torch.empty_like(g)
    for query in range(len(tokens)):
        scores = torch.stack([theta[query] @ key for key in phi]) / width**0.5
        weights = scores.exp() / scores.exp().sum()
        out[query] = sum(w * value for w, value in zip(weights, g, strict=True))
    return out


def spatial_reference(state, x, attention):
    if attention == "joint":
        return attended(state, "qkv", x.reshape(-1, C)).reshape(T, S, D)
    return torch.stack([attended(state, "qkv", frame) for frame in x])


def temporal_reference(state, name, y, config):
    """y [T, P, D], P positions or regions."""
    if config.temporal == "none":
        return y
    if config.temporal == "instance":
        columns = [attended(state, f"{name}.qkv", y[:, p]) for p in range(y.shape[1])]
        return torch.stack(columns, dim=1)
    matrix, width = state[f"{name}.matrix"], D // config.heads
    z = torch.zeros_like(y)
    for i in range(config.heads):
        for t in range(T):
            sources = range(config.heads) if config.mixing == "cross" else [i]
            pairs = [(j, u) for j in sources for u in range(T)]
            row = [
                matrix[i, j, t, u] if config.mixing == "cross" else matrix[i, t, u]
                for j, u in pairs
            ]
            if config.matrix == "softmax":
                total = sum(a.exp() for a in row)
                row = [a.exp() / total for a in row]
            into = slice(i * width, (i + 1) * width)
            for (j, u), a in zip(pairs, row, strict=True):
                z[t, :, into] += a * y[u, :, j * width : (j + 1) * width]
            if config.bias == "frame":
                z[t, :, into] += state[f"{name}.bias"][t, i]
    return z


def region_reference(state, x, y, config):
    pooled, back = [], []
    for t in range(T):
        scores = affine(state, "region.assign", x[t]).exp()  # [S, N]
        if config.assignment == "pixels":
            share = scores / scores.sum(0, keepdim=True)
            pooled.append(share.T @ y[t])
        else:
            share = scores / scores.sum(1, keepdim=True)
            pooled.append((share.T @ y[t]) / share.sum(0)[:, None])
        if config.distribution == "separate":
            scores = affine(state, "region.distribute", x[t]).exp()
            share = scores / scores.sum(1, keepdim=True)
        back.append(share)
    mixed = temporal_reference(state, "region.temporal", torch.stack(pooled), config)
    return torch.stack([share @ v for share, v in zip(back, mixed, strict=True)])


def reference(module, x):
    """What the module gives for one sample ``[T, H, W, C]`` in eval mode."""
    config, state = module.config, module.state_dict()
    flat = x.reshape(T, S, C)
    y = spatial_reference(state, flat, config.attention)
    z = temporal_reference(state, "pixel", y, config)
    if config.regions:
        if config.fusion == "serial":
            z = z + region_reference(state, flat, z, config)
        elif config.fusion == "concat":
            z = torch.cat([z, region_reference(state, flat, y, config)], -1)
        else:
            z = z + region_reference(state, flat, y, config)
    out = affine(state, "out", z)
    scale = state["norm.weight"] / (state["norm.running_var"] + module.norm.eps).sqrt()
    out = (out - state["norm.running_mean"]) * scale + state["norm.bias"]
    return x + out.reshape(x.shape)


CHOICES = [
    {},
    {"regions": 0},
    {"mixing": "plain"},
    {"heads": 1},
    {"matrix": "softmax"},
    {"matrix": "softmax", "mixing": "plain"},
    {"bias": "frame"},
    {"assignment": "regions"},
    {"distribution": "separate"},
    {"fusion": "concat"},
    {"fusion": "serial"},
    {"attention": "joint"},
    {"temporal": "instance"},
    {"temporal": "none"},
    {"attention": "joint", "temporal": "none", "regions": 0},
]


class TestModule:
    @pytest.mark.parametrize("choices", CHOICES, ids=str)
    def test_equals_plain_loops_over_the_equations(self, choices):
        module, x = make(**choices), features()
        with torch.no_grad():
            expected = torch.stack([reference(module, sample) for sample in x])
            torch.testing.assert_close(module(x), expected)

    def test_channels_first_is_the_same_module(self):
        last, first = make(), make(layout="first")
        x = features()
        ours = first(x.permute(0, 4, 1, 2, 3))
        torch.testing.assert_close(ours.permute(0, 2, 3, 4, 1), last(x))

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("choices", CHOICES, ids=str)
    def test_is_exactly_the_identity_when_built(self, choices, training):
        config = GTAConfig(**({} if "temporal" in choices else {"heads": 4}) | choices)
        module = GlobalTemporalAttention(C, T, config).double().train(training)
        x = features()
        assert torch.equal(module(x), x)

    def test_identity_matrix_is_spatial_attention_alone(self):
        module, x = make(heads=1, regions=0), features().flatten(2, 3)
        with torch.no_grad():
            module.pixel.matrix.copy_(torch.eye(T))
        torch.testing.assert_close(module.mixed(x), module.spatial(x))

    def test_spatial_attention_does_not_cross_frames(self):
        module, x = make(), features().flatten(2, 3)
        changed = x.clone()
        changed[:, 2] += 1
        difference = (module.spatial(changed) - module.spatial(x)).abs().amax((0, 2, 3))
        assert difference[2] > 0.1
        assert torch.equal(difference[[0, 1, 3]], torch.zeros(3, dtype=torch.float64))

    @pytest.mark.parametrize("kind", ["raw", "softmax"])
    def test_even_matrix_is_the_mean_over_time(self, kind):
        module, x = make(heads=1, regions=0, matrix=kind), features().flatten(2, 3)
        with torch.no_grad():
            module.pixel.matrix.fill_(1 / T)
        expected = module.spatial(x).mean(1, keepdim=True).expand(-1, T, -1, -1)
        torch.testing.assert_close(module.mixed(x), expected)

    def test_cross_heads_without_crossing_are_plain_heads(self):
        plain = torch.randn(4, T, T, dtype=torch.float64)
        cross = torch.zeros(4, 4, T, T, dtype=torch.float64)
        cross[range(4), range(4)] = plain
        y = torch.randn(2, T, S, D, dtype=torch.float64)
        torch.testing.assert_close(mix_frames(y, cross), mix_frames(y, plain))
        cross[0, 1] = 1.0
        assert not torch.allclose(mix_frames(y, cross), mix_frames(y, plain))

    def test_every_sample_meets_the_same_matrix(self):
        module, x = make(), features(batch=3)
        together = module(x)
        apart = torch.cat([module(x[i : i + 1]) for i in range(3)])
        torch.testing.assert_close(together, apart)
        # Position s lights up in frame s alone, so that the output is the matrix, for any sample.
        matrix = module.pixel.matrix[:1, 0]
        y = (
            torch.eye(T, dtype=torch.float64)[None, :, :, None]
            * torch.tensor([1.0, -3.0])[:, None, None, None]
        )
        z = mix_frames(y, matrix)[..., 0]
        torch.testing.assert_close(z, torch.stack([matrix[0], -3 * matrix[0]]))

    def test_matrix_learns_once_the_norm_has_moved(self):
        torch.manual_seed(0)
        module, x = GlobalTemporalAttention(C, T, GTAConfig(heads=4)).double(), features()
        target = torch.randn_like(x)

        def gradients():
            module.zero_grad()
            (module(x) - target).square().sum().backward()
            return [
                p.grad.abs().max() for p in (module.pixel.matrix, module.region.temporal.matrix)
            ]

        assert gradients() == [0, 0]
        with torch.no_grad():
            module.norm.weight.sub_(1e-3 * module.norm.weight.grad)
        assert min(gradients()) > 0

    @pytest.mark.parametrize("choices", CHOICES, ids=str)
    def test_gradients_reach_every_parameter(self, choices):
        module, x = make(**choices).train(), features()
        (module(x) * torch.randn_like(x)).sum().backward()
        assert [n for n, p in module.named_parameters() if p.grad.abs().max() < 1e-9] == []

    def test_gradcheck(self):
        module = GlobalTemporalAttention(4, 2, GTAConfig(heads=2, regions=2)).double()
        nn.init.ones_(module.norm.weight)
        x = torch.randn(1, 2, 2, 2, 4, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(module, (x,))

    @pytest.mark.parametrize(
        ("choices", "sensitive"),
        [
            ({}, True),
            ({"regions": 0, "heads": 1}, True),
            ({"attention": "joint", "temporal": "none", "regions": 0}, False),
            ({"temporal": "instance"}, False),
        ],
        ids=str,
    )
    def test_only_the_learned_matrix_sees_the_order_of_frames(self, choices, sensitive):
        """Attention without positions is permutation-equivariant, so its pooled output is invariant."""
        module, x = make(**choices), features()
        shuffled = x[:, [2, 0, 3, 1]]
        pooled = module(x).mean((1, 2, 3)) - module(shuffled).mean((1, 2, 3))
        assert (pooled.abs().max() > 1e-3) == sensitive
        if not sensitive:
            torch.testing.assert_close(module(shuffled), module(x)[:, [2, 0, 3, 1]])

    @pytest.mark.parametrize(("over", "axis"), [("pixels", 2), ("regions", 3)])
    def test_assignment_sums_to_one_over_its_axis(self, over, axis):
        module, x = make(assignment=over), features().flatten(2, 3)
        total = module.region.assignment(x).sum(axis)
        torch.testing.assert_close(total, torch.ones_like(total))

    @pytest.mark.parametrize("over", ["pixels", "regions"])
    def test_a_region_for_each_pixel_is_pixel_attention(self, over):
        positions = C  # each position marked by a channel of its own
        module = make(regions=positions, assignment=over)
        with torch.no_grad():
            module.region.temporal.matrix.copy_(module.pixel.matrix)
            module.region.assign.weight.copy_(1000 * torch.eye(C))
            if module.region.assign.bias is not None:
                module.region.assign.bias.zero_()
        x = torch.eye(C, dtype=torch.float64).expand(2, T, C, C) + 0.01 * torch.rand(2, T, C, C)
        torch.testing.assert_close(
            module.region.assignment(x), torch.eye(C, dtype=torch.float64).expand_as(x)
        )
        y = module.spatial(x)
        torch.testing.assert_close(module.region(x, y), module.pixel(y))

    def test_an_empty_region_gives_nothing_instead_of_nan(self):
        module, x = make(assignment="regions"), features()
        with torch.no_grad():
            module.region.assign.bias[0] = -1e4
        assert module(x).isfinite().all()

    def test_initial_matrices_keep_the_size_of_features(self):
        torch.manual_seed(0)
        for choices in ({}, {"mixing": "plain"}, {"heads": 1}):
            module = GlobalTemporalAttention(64, 16, GTAConfig(**choices))
            y = torch.randn(1, 16, 400, 32)
            assert module.pixel(y).std().item() == pytest.approx(1.0, rel=0.2)

    @pytest.mark.parametrize("choices", [{}, {"matrix": "softmax"}, {"temporal": "instance"}])
    def test_bf16_autocast_stays_close(self, choices):
        module, x = make(**choices).float(), features().float()
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            half = module(x) - x
        with torch.no_grad():
            full = module(x) - x
        assert (half - full).norm() < 0.03 * full.norm()

    def test_another_number_of_frames_is_refused(self):
        with pytest.raises(UsageError, match="4 frames gets 6") as caught:
            make()(features(frames=6))
        assert caught.value.fix
        assert make(temporal="instance")(features(frames=6)).shape[1] == 6

    @pytest.mark.parametrize(
        ("choices", "named"),
        [
            ({"regions": 0, "fusion": "concat"}, "fusion"),
            ({"regions": 0, "assignment": "regions"}, "assignment"),
            ({"regions": 0, "distribution": "separate"}, "distribution"),
            ({"temporal": "none", "heads": 4}, "heads"),
            ({"temporal": "none", "mixing": "plain"}, "mixing"),
            ({"temporal": "instance", "matrix": "softmax"}, "matrix"),
            ({"temporal": "instance", "bias": "frame"}, "bias"),
        ],
    )
    def test_choices_without_effect_are_refused(self, choices, named):
        with pytest.raises(UsageError, match=f"option {named} ") as caught:
            GTAConfig(**choices)
        assert named in caught.value.fix

    @pytest.mark.parametrize("choices", [{"heads": 3}, {"heads": 0}, {"reduction": 3}])
    def test_choices_that_do_not_divide_the_channels_are_refused(self, choices):
        with pytest.raises(UsageError, match="divi"):
            GlobalTemporalAttention(C, T, GTAConfig(**choices))

    def test_drop_path_drops_the_branch_of_whole_samples(self):
        module = make().train()
        module.drop_path.rate = 0.5
        x = features(batch=64)
        moved = (module(x) - x).flatten(1).abs().amax(1) > 0
        assert 10 < int(moved.sum()) < 54


class TestMaps:
    def test_glance_is_the_attention_received(self):
        module, x = make(), features()
        state, flat = module.state_dict(), features().flatten(2, 3)
        expected = torch.zeros(2, T, S, dtype=torch.float64)
        for b in range(2):
            for t in range(T):
                theta, phi, _ = affine(state, "qkv", flat[b, t]).split(D, dim=-1)
                expected[b, t] = (theta @ phi.T / D**0.5).softmax(-1).mean(0) / T
        found = module.maps(x)
        torch.testing.assert_close(found.glance, expected.reshape(2, T, H, W))
        torch.testing.assert_close(found.glance.sum((1, 2, 3)), torch.ones(2).double())

    @pytest.mark.parametrize("choices", CHOICES, ids=str)
    def test_every_choice_has_maps(self, choices):
        found = make(**choices).maps(features())
        torch.testing.assert_close(found.glance.sum((1, 2, 3)), torch.ones(2).double())
        none = choices.get("temporal") == "none"
        rows = [] if none else ["A[0]", "A[2]", "A[3]"]
        assert [name for name in found.profiles if name.startswith("A")] == rows
        shares = {name: curve for name, curve in found.profiles.items() if "read" in name}
        assert len(shares) == (0 if none else 2 - (choices.get("regions") == 0))
        for curve in shares.values():
            torch.testing.assert_close(curve.sum(1), torch.ones(2).double())

    def test_profiles_show_which_frame_is_read(self):
        module = make(heads=1, regions=0)
        with torch.no_grad():
            module.pixel.matrix.zero_()
            module.pixel.matrix[..., 2, 3] = -2.0
        found = module.maps(features()).profiles
        assert found["A[2]"].tolist() == [[0, 0, 0, 2.0]] * 2
        assert found["A[0]"].tolist() == [[0] * 4] * 2
        assert found["read"].tolist() == [[0, 0, 0, 1.0]] * 2


@pytest.mark.slow
class TestCosts:
    @pytest.mark.parametrize(
        ("channels", "size", "frames", "heads", "gmacs"),
        [
            (512, 28, 8, 8, 3.288 + 2.518 + 0.1028),
            (512, 28, 8, 1, 3.288 + 2.518 + 0.0128),
            (1024, 14, 8, 8, 3.288 + 0.3147 + 0.0514),
            (512, 28, 16, 1, 6.576 + 5.036 + 0.0514),
        ],
    )
    def test_module_costs_what_the_table_says(self, channels, size, frames, heads, gmacs):
        module = GlobalTemporalAttention(channels, frames, GTAConfig(heads=heads, regions=0))
        flops = count_multiply_adds(module, torch.zeros(1, frames, size, size, channels))
        norm = flops.by_operator["batch_norm"]
        assert (flops.total - norm) / 1e9 == pytest.approx(gmacs, rel=0.005)
        assert module.pixel.matrix.numel() == (heads * frames) ** 2
