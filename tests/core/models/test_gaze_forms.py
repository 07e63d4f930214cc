"""Forms of the Gaze and what they listen to, against loops over their formulas."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ogreg_core.models.gaze_forms import FORMS, SIMILARITIES, GazeForm, Listening
from ogreg_core.models.mdconv import frame_dissimilarity, modulation


def form_of(name: str, dim: int = 4, **listening) -> GazeForm:
    """In float64, with every parameter random."""
    torch.manual_seed(2)
    # Less steep than at the start, so that m is neither 0 nor 1 anywhere.
    layer = FORMS[name](dim, Listening(**{"sharpness": 3, "offset": -1, **listening})).double()
    layer.init_weights()
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def features(frames: int = 4, batch: int = 2, dim: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(batch, frames, 5, 3, dim, generator=generator, dtype=torch.float64)


def tap(frame: Tensor, kernel: Tensor) -> Tensor:
    """One frame ``[B, H, W, C]`` by torch's own depthwise convolution."""
    image = frame.permute(0, 3, 1, 2)
    return F.conv2d(image, kernel, padding=1, groups=len(kernel)).permute(0, 2, 3, 1)


def volume(y: Tensor, weight: Tensor) -> Tensor:
    """All frames by torch's own depthwise 3-D convolution."""
    out = F.conv3d(y.permute(0, 4, 1, 2, 3), weight, padding=1, groups=len(weight))
    return out.permute(0, 2, 3, 4, 1)


def at_frame(m: Tensor, t: int) -> Tensor:
    around = [m[:, i] for i in (t - 1, t) if 0 <= i < m.shape[1]]
    return sum(around) / len(around)


def neighbours(layer: GazeForm, y: Tensor, m: Tensor, t: int) -> Tensor:
    past, centre, future = layer.weight.unbind(2)
    out = tap(y[:, t], centre)
    if t > 0:
        out = out + m[:, t - 1] * tap(y[:, t - 1], past)
    if t < y.shape[1] - 1:
        out = out + m[:, t] * tap(y[:, t + 1], future)
    return out


def mixed(layer: GazeForm, y: Tensor, m: Tensor, t: int) -> Tensor:
    n = at_frame(m, t)
    return (1 - n) * tap(y[:, t], layer.flat) + n * volume(y, layer.weight)[:, t]


def difference(layer: GazeForm, y: Tensor, m: Tensor, t: int) -> Tensor:
    past, centre, future = layer.weight.unbind(2)
    out = tap(y[:, t], centre)
    if t > 0:
        out = out + m[:, t - 1] * tap(y[:, t - 1] - y[:, t], past)
    if t < y.shape[1] - 1:
        out = out + m[:, t] * tap(y[:, t + 1] - y[:, t], future)
    return out


def repeating(layer: GazeForm, y: Tensor, _m: Tensor, t: int) -> Tensor:
    return volume(torch.cat([y[:, :1], y, y[:, -1:]], dim=1), layer.weight)[:, t + 1]


def flat(layer: GazeForm, y: Tensor, _m: Tensor, t: int) -> Tensor:
    return tap(y[:, t], layer.weight[:, :, 1])


def gating(seen: Callable) -> Callable:
    """What is seen, with its bias, times 1 + n; the bias is added to every form by the test."""

    def formula(layer: GazeForm, y: Tensor, m: Tensor, t: int) -> Tensor:
        return (1 + at_frame(m, t)) * (seen(layer, y, m, t) + layer.bias) - layer.bias

    return formula


gated, gated_2d, emphasised = gating(repeating), gating(flat), gating(neighbours)


def by_cosine(layer: GazeForm, y: Tensor) -> Tensor:
    cosine = F.cosine_similarity(y[:, :-1], y[:, 1:], dim=-1)[..., None]
    floor = torch.sigmoid(layer.offset)
    raised = torch.sigmoid(layer.sharpness * (1 - cosine) + layer.offset)
    return (raised - floor) / (1 - floor)


def against_cosine(layer: GazeForm, y: Tensor) -> Tensor:
    return 1 - by_cosine(layer, y)


def by_lot(layer: GazeForm, y: Tensor) -> Tensor:
    """The permutation itself is tested by itself."""
    return modulation(layer.listen(y)[..., 0], layer.sharpness, layer.offset)


def by_excitation(layer: GazeForm, y: Tensor) -> Tensor:
    squeezed = y @ layer.squeeze.weight.T
    return torch.tanh((squeezed[:, 1:] - squeezed[:, :-1]).abs() @ layer.excite.weight.T)


def by_sigmoid(layer: GazeForm, y: Tensor) -> Tensor:
    d = 1 - F.cosine_similarity(y[:, :-1], y[:, 1:], dim=-1)[..., None]
    return torch.sigmoid(layer.sharpness * d + layer.offset)


def fully(_layer: GazeForm, y: Tensor) -> Tensor:
    return torch.ones_like(y[:, 1:])


# Form: what its m is, and its output at a frame, without bias.
REFERENCES: dict[str, tuple[Callable, Callable]] = {
    "modulated": (by_cosine, neighbours),
    "mixed": (by_cosine, mixed),
    "difference": (by_cosine, difference),
    "difference-3d": (fully, difference),
    "3d-repeating": (fully, repeating),
    "gated": (by_cosine, gated),
    "gated-2d": (by_cosine, gated_2d),
    "emphasised": (by_cosine, emphasised),
    "excitation": (by_excitation, gated),
    "sigmoid": (by_sigmoid, neighbours),
    "inverse": (against_cosine, neighbours),
    "random": (by_lot, neighbours),
    "gated-inverse": (against_cosine, gated),
    "gated-random": (by_lot, gated),
}


class TestForms:
    @pytest.mark.parametrize("name", REFERENCES)
    def test_equals_a_loop_over_its_formula(self, name):
        layer, y = form_of(name), features()
        opened, formula = REFERENCES[name]
        m = opened(layer, y)
        torch.testing.assert_close(layer.modulation(y).expand_as(m), m)
        frames = [formula(layer, y, m, t) + layer.bias for t in range(y.shape[1])]
        torch.testing.assert_close(layer(y), torch.stack(frames, 1))

    def test_every_form_is_tested(self):
        assert set(REFERENCES) == set(FORMS)

    @pytest.mark.parametrize("name", FORMS)
    def test_one_frame_is_a_2d_convolution(self, name):
        layer, y = form_of(name), features(frames=1)
        kernel = layer.flat if name == "mixed" else layer.weight[:, :, 1]
        if REFERENCES[name][1] in (gated, repeating):
            kernel = layer.weight.sum(2)
        torch.testing.assert_close(layer(y)[:, 0], tap(y[:, 0], kernel) + layer.bias)
        assert layer.modulation(y) is None

    @pytest.mark.parametrize("name", FORMS)
    def test_gradients(self, name):
        y = features(frames=3, batch=1).requires_grad_()
        assert torch.autograd.gradcheck(form_of(name), (y,), fast_mode=True)

    @pytest.mark.parametrize("name", FORMS)
    def test_order_of_frames(self, name):
        layer, y = form_of(name), features()
        backwards = layer(y.flip(1)).flip(1)
        moved = (layer(y) - backwards).abs().max()
        # Gating alone has no direction.
        assert (moved < 1e-12) == (name == "gated-2d")

    # Where frames agree the others open: to the zeros beyond the ends of a clip, or by doubling.
    @pytest.mark.parametrize("name", sorted(set(FORMS) - {"sigmoid", "inverse", "gated-inverse"}))
    def test_a_still_clip_is_seen_as_its_frame(self, name):
        layer = form_of(name)
        still = features()[:, :1].expand(-1, 4, -1, -1, -1)
        torch.testing.assert_close(layer(still), layer(still[:, :1]).expand_as(still))

    def test_differences_fully_open_are_a_3d_convolution_of_another_kernel(self):
        layer, y = form_of("difference-3d"), features(frames=5)
        past, centre, future = layer.weight.unbind(2)
        kernel = torch.stack([past, centre - past - future, future], dim=2)
        expected = volume(y, kernel) + layer.bias
        torch.testing.assert_close(layer(y)[:, 1:-1], expected[:, 1:-1])

    @pytest.mark.parametrize("name", ["random", "gated-random"])
    @pytest.mark.parametrize("similarity", ["position", "frame"])
    def test_random_has_the_values_of_the_clip_at_other_places(self, name, similarity):
        layer, y = form_of(name, similarity=similarity), features(frames=7)
        d, found = SIMILARITIES[similarity](y), layer.listen(y)
        torch.testing.assert_close(found.flatten(1).sort().values, d.flatten(1).sort().values)
        assert (found != d).float().mean() > 0.5
        torch.testing.assert_close(layer.listen(y[1:]), found[1:])
        torch.testing.assert_close(layer.dissimilarity(y), frame_dissimilarity(y))


class TestListening:
    def test_pooled_is_the_cosine_of_mean_features(self):
        y = features()
        d = SIMILARITIES["pooled"](y)
        mean = y.mean((2, 3))
        expected = 1 - F.cosine_similarity(mean[:, :-1], mean[:, 1:], dim=-1)
        torch.testing.assert_close(d[:, :, 0, 0, 0], expected)

    def test_centred_is_the_cosine_about_the_mean_of_the_clip(self):
        # Beside features a hundred times as large the constant that guards them is none.
        y = 100 * features() + 1000
        centred = y - y.flatten(1, 3).mean(1)[:, None, None, None]
        expected = 1 - F.cosine_similarity(centred[:, :-1], centred[:, 1:], dim=-1)
        torch.testing.assert_close(
            SIMILARITIES["centred"](y)[..., 0], expected, atol=1e-5, rtol=1e-4
        )
        assert frame_dissimilarity(y).max() < 0.1 * expected.mean()

    def test_relative_is_a_tenth_in_the_mean_however_much_moves(self):
        y = features()
        d = SIMILARITIES["relative"](y)
        assert d.mean((1, 2, 3, 4)) == pytest.approx(0.1, rel=2e-3)
        cosine = frame_dissimilarity(y)
        torch.testing.assert_close(d[0, ..., 0] / d[0].mean(), cosine[0] / cosine[0].mean())

    def test_excess_is_what_exceeds_the_mean(self):
        y = features()
        d, cosine = SIMILARITIES["excess"](y)[0, ..., 0], frame_dissimilarity(y)[0]
        calm = cosine <= cosine.mean()
        assert 0.2 < calm.double().mean() < 0.8
        assert torch.equal(d == 0, calm)
        expected = 0.1 * (cosine / cosine.mean() - 1)
        torch.testing.assert_close(d[~calm], expected[~calm], rtol=3e-3, atol=0)

    def test_channels_make_up_the_cosine_of_normalised_features(self):
        y = F.layer_norm(features(dim=64), (64,))
        d = SIMILARITIES["channel"](y)
        assert d.shape == (2, 3, 5, 3, 64)
        torch.testing.assert_close(d.mean(-1), frame_dissimilarity(y), atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("similarity", SIMILARITIES)
    @pytest.mark.parametrize("content", ["textured", "uniform"])
    def test_a_still_clip_has_no_dissimilarity(self, similarity, content):
        y = features()[:, :1].expand(-1, 4, -1, -1, -1).float()
        if content == "uniform":
            y = y[:, :, :1, :1].expand_as(y)
        layer = form_of("modulated", similarity=similarity, sharpness=30).float()
        assert layer.dissimilarity(y).shape == (2, 3, 5, 3)
        assert layer.dissimilarity(y).abs().max() < 1e-4
        assert layer.modulation(y).abs().max() < 1e-3

    def test_one_modulation_per_frame_is_the_mean_over_positions(self):
        y = features()
        layer = form_of("modulated", modulation="frame")
        found = layer.modulation(y)
        assert found.shape == (2, 3, 1, 1, 4)
        torch.testing.assert_close(found[:, :, 0, 0], by_cosine(layer, y).mean((2, 3)))
        pooled = form_of("modulated", similarity="frame").modulation(y)
        assert not torch.allclose(found, pooled)

    @pytest.mark.parametrize(
        ("channels", "learnt", "entries"),
        [("own", 2, 4), ("log", 2, 4), ("shared", 2, 1), ("fixed", 0, 1)],
    )
    def test_whose_sharpness_and_offset(self, channels, learnt, entries):
        layer = FORMS["modulated"](4, Listening(channels=channels, sharpness=15))
        names = dict(layer.named_parameters()).keys() - {"weight", "bias"}
        assert len(names) == learnt
        assert layer.slope().shape == layer.offset.shape == (entries,)
        torch.testing.assert_close(layer.slope(), torch.full((entries,), 15.0))
        y = features().float()
        expected = modulation(
            frame_dissimilarity(y), torch.full((4,), 15.0), torch.full((4,), -2.0)
        )
        torch.testing.assert_close(layer.modulation(y).expand_as(expected), expected)
        if channels == "log":
            layer.init_weights()
            layer(y).sum().backward()
            assert layer.log_sharpness.grad.abs().min() > 0
