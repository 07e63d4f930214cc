"""Token selection against loops over its definition, and its gradient against finite differences."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ogreg_core.errors import UsageError
from ogreg_core.models.stts import (
    AnchorSelector,
    FrameSelector,
    Grid,
    Keep,
    Perturbation,
    Scorer,
    Selection,
    anchors_of,
    keep_count,
    normalise_scores,
    perturbed_top_k,
    top_k,
)


def randomised(module: nn.Module) -> nn.Module:
    """Fresh scorers have weights of 0.02 and biases of 0, behind which mistakes hide."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def perturbation(
    selector: FrameSelector | AnchorSelector, x: Tensor, sigma: float, gradient: str = "unbiased"
) -> Perturbation:
    shape = selector.noise_shape(Grid(*x.shape[1:4]), 60)
    return Perturbation(torch.randn(len(x), *shape), torch.tensor(sigma), gradient)


class TestScorer:
    def test_equals_the_formula_item_by_item(self):
        scorer = randomised(Scorer(8))
        x = torch.randn(2, 5, 8)
        weights = dict(scorer.named_parameters())

        def linear(value: Tensor, name: str) -> Tensor:
            return weights[f"{name}.weight"] @ value + weights[f"{name}.bias"]

        def gelu(value: Tensor) -> Tensor:
            return value * 0.5 * (1 + torch.erf(value / 2**0.5))

        for n in range(2):
            hidden = []
            for item in x[n]:
                normed = (item - item.mean()) / (item.var(unbiased=False) + 1e-5).sqrt()
                normed = normed * weights["in_conv.0.weight"] + weights["in_conv.0.bias"]
                hidden.append(gelu(linear(normed, "in_conv.1")))
            shared = sum(h[4:] for h in hidden) / 5
            for i, h in enumerate(hidden):
                value = gelu(linear(torch.cat([h[:4], shared]), "out_conv.0"))
                value = linear(gelu(linear(value, "out_conv.2")), "out_conv.4")
                torch.testing.assert_close(scorer(x)[n, i], value[0], atol=1e-5, rtol=1e-4)

    @pytest.mark.parametrize(("width", "count"), [(192, 60_673), (384, 241_153), (256, 107_521)])
    def test_names_and_sizes_are_the_released_ones(self, width, count):
        shapes = {name: tuple(value.shape) for name, value in Scorer(width).state_dict().items()}
        assert shapes == {
            "in_conv.0.weight": (width,),
            "in_conv.0.bias": (width,),
            "in_conv.1.weight": (width, width),
            "in_conv.1.bias": (width,),
            "out_conv.0.weight": (width // 2, width),
            "out_conv.0.bias": (width // 2,),
            "out_conv.2.weight": (width // 4, width // 2),
            "out_conv.2.bias": (width // 4,),
            "out_conv.4.weight": (1, width // 4),
            "out_conv.4.bias": (1,),
        }
        assert sum(value.numel() for value in Scorer(width).parameters()) == count


class TestCounts:
    @pytest.mark.parametrize(
        ("items", "ratio", "kept"),
        [
            *((8, r, k) for r, k in ((0.875, 7), (0.75, 6), (0.625, 5), (0.5, 4), (0.375, 3))),
            *((16, r, k) for r, k in ((0.875, 14), (0.75, 12), (0.5625, 9), (0.375, 6))),
            (100, 0.29, 29),
            (7, 0.1, 1),
            (5, 1.0, 5),
        ],
    )
    def test_frames(self, items, ratio, kept):
        assert keep_count(items, ratio) == kept

    @pytest.mark.parametrize(
        ("ratio", "side", "count"),
        [(0.863, 13, 4), (0.7367, 12, 9), (0.6174, 11, 16), (1.0, 14, 1), (0.25, 7, 9)],
    )
    def test_anchors_of_a_square_frame(self, ratio, side, count):
        anchors = anchors_of(14, 14, ratio)
        assert (anchors.height, anchors.width, len(anchors.corners)) == (side, side, count)
        assert anchors.corners == sorted(anchors.corners)

    @given(height=st.integers(1, 30), width=st.integers(1, 30), ratio=st.floats(0.02, 1.0))
    @settings(max_examples=200)
    def test_windows_lie_within_any_frame_and_keep_no_more_than_asked(self, height, width, ratio):
        anchors = anchors_of(height, width, ratio)
        assert 1 <= anchors.height <= height
        assert 1 <= anchors.width <= width
        assert anchors.height * anchors.width <= keep_count(height * width, ratio)
        for top, left in anchors.corners:
            assert top + anchors.height <= height
            assert left + anchors.width <= width

    def test_window_has_the_aspect_of_the_frame(self):
        anchors = anchors_of(8, 16, 0.25)
        assert (anchors.height, anchors.width) == (4, 8)
        assert anchors.tops == (0, 2, 4)
        assert anchors.lefts == (0, 4, 8)


class TestTopK:
    def test_ascending_and_earlier_wins_among_equals(self):
        scores = torch.tensor([[0.1, 0.9, 0.5, 0.9, 0.2], [0.0, 0.0, 0.0, 0.0, 0.0]])
        assert top_k(scores, 3).tolist() == [[1, 2, 3], [0, 1, 2]]

    def test_scores_span_the_unit_interval(self):
        scores = normalise_scores(torch.tensor([[3.0, 1.0, 2.0], [4.0, 4.0, 4.0]]))
        torch.testing.assert_close(scores[0], torch.tensor([1.0, 0.0, 0.5]), atol=1e-5, rtol=0)
        assert scores[1].tolist() == [0.0, 0.0, 0.0]

    @pytest.mark.parametrize("k", [1, 3, 5])
    def test_value_and_released_gradient_equal_loops_over_the_samples(self, k):
        torch.manual_seed(0)
        samples, sigma = 40, 0.3
        scores = torch.rand(2, 5, dtype=torch.float64, requires_grad=True)
        noise = torch.randn(2, samples, 5, dtype=torch.float64)
        upstream = torch.randn(2, k, 5, dtype=torch.float64)
        value = perturbed_top_k(scores, k, noise, sigma, "official")
        value.backward(upstream)
        expected, gradient = torch.zeros_like(value), torch.zeros_like(scores)
        for n in range(2):
            for m in range(samples):
                noisy = [float(scores[n, e].detach() + sigma * noise[n, m, e]) for e in range(5)]
                best = sorted(sorted(range(5), key=lambda e: -noisy[e])[:k])
                for row, item in enumerate(best):
                    expected[n, row, item] += 1 / samples
                    gradient[n, item] += (
                        upstream[n, row, item] * noise[n, m, item] / (samples * sigma)
                    )
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(scores.grad, gradient)

    @pytest.mark.parametrize("gradient", ["unbiased", "official"])
    def test_without_noise_it_is_the_hard_choice_and_has_no_gradient(self, gradient):
        scores = torch.rand(3, 6, requires_grad=True)
        value = perturbed_top_k(scores, 2, torch.randn(3, 50, 6), 0.0, gradient)
        assert torch.equal(value, F.one_hot(top_k(scores, 2), 6).float())
        value.square().sum().backward()
        assert torch.equal(scores.grad, torch.zeros(3, 6))


def smoothed(scores: Tensor, k: int, noise: Tensor, sigma: float) -> Tensor:
    """The mean choice ``[k, d]`` over ``noise`` ``[M, d]``, by torch's own top-k."""
    chosen = (scores + sigma * noise).topk(k, dim=-1).indices.sort(dim=-1).values
    counts = [chosen[:, row].bincount(minlength=len(scores)) for row in range(k)]
    return torch.stack(counts) / len(noise)


def gradients(
    scores: Tensor, k: int, upstream: Tensor, runs: int, samples: int, kind: str
) -> Tensor:
    """The gradient of independent runs, ``[runs, d]``."""
    repeated = scores.expand(runs, -1).clone().requires_grad_()
    noise = torch.randn(runs, samples, len(scores))
    value = perturbed_top_k(repeated, k, noise, 0.1, kind)
    value.backward(upstream.expand(runs, -1, -1))
    return repeated.grad


class TestGradient:
    @pytest.mark.parametrize(("k", "items"), [(5, 8), (1, 4)])
    def test_unbiased_agrees_with_finite_differences_of_the_smoothed_choice(self, k, items):
        torch.manual_seed(k)
        scores, upstream = 0.1 * torch.randn(items), torch.randn(k, items)
        noise, step = torch.randn(30_000, items), 0.03
        expected = torch.zeros(items)
        for e in range(items):
            shift = torch.zeros(items)
            shift[e] = step
            rise = smoothed(scores + shift, k, noise, 0.1) - smoothed(scores - shift, k, noise, 0.1)
            expected[e] = (rise * upstream).sum() / (2 * step)
        found = gradients(scores, k, upstream, 50, 500, "unbiased").mean(0)
        assert (found - expected).norm() < 0.08 * expected.norm()
        released = gradients(scores, k, upstream, 50, 500, "official").mean(0)
        assert (released - expected).norm() > 0.3 * expected.norm()

    def test_its_variance_is_worth_less_than_the_bias_of_the_released_one(self):
        """Mean square errors over draws of scores and upstream gradients. The released one varies
        less, having fewer terms, and is wrong all the same.
        """
        torch.manual_seed(2)
        spread = {"unbiased": 0.0, "official": 0.0}
        error = {"unbiased": 0.0, "official": 0.0}
        for _ in range(4):
            scores, upstream = 0.2 * torch.rand(8), torch.randn(5, 8)
            truth = gradients(scores, 5, upstream, 50, 500, "unbiased").mean(0)
            for kind in spread:
                found = gradients(scores, 5, upstream, 25, 500, kind)
                spread[kind] += found.var(0).sum().item()
                error[kind] += (found - truth).square().sum(1).mean().item()
        assert spread["official"] < spread["unbiased"]
        assert error["unbiased"] < 0.2 * error["official"]

    def test_baseline_halves_the_variance(self):
        torch.manual_seed(3)
        scores, upstream = 0.2 * torch.rand(8), torch.randn(5, 8) + 1.0
        found = gradients(scores, 5, upstream, 60, 500, "unbiased")
        noise = torch.randn(60, 500, 8)
        chosen = (scores + 0.1 * noise).topk(5).indices.sort().values
        worth = (F.one_hot(chosen, 8) * upstream).sum((2, 3))
        plain = (worth.unsqueeze(-1) * noise).mean(1) / 0.1
        margin = 4 * (plain.var(0) / 60).sqrt() + 4 * (found.var(0) / 60).sqrt()
        assert ((found.mean(0) - plain.mean(0)).abs() < margin).all()
        assert found.var(0).sum() < 0.5 * plain.var(0).sum()

    def test_baseline_takes_out_what_is_common_to_all_samples(self):
        """An upstream gradient that is the same for every choice has no effect on the choice."""
        scores = torch.rand(1, 8)
        found = gradients(scores[0], 5, torch.full((5, 8), 3.0), 10, 500, "unbiased")
        torch.testing.assert_close(found, torch.zeros(10, 8), atol=1e-3, rtol=0)

    def test_reaches_the_scorer_through_the_mixture(self):
        for selector in (FrameSelector(4, 0.5), AnchorSelector(4, 0.5)):
            x = torch.randn(2, 4, 4, 4, 4, requires_grad=True)
            mixed, _ = selector(x, perturbation(selector, x, 0.1))
            mixed.square().sum().backward()
            assert x.grad.abs().sum() > 0
            for name, parameter in selector.named_parameters():
                # Scores are normalised, so that the last bias shifts nothing.
                if name != "score_network.out_conv.4.bias":
                    assert parameter.grad.abs().sum() > 0, name


class TestSelectors:
    def test_frames_are_kept_whole_and_in_order(self):
        selector = randomised(FrameSelector(4, 0.6))
        x = torch.randn(3, 5, 2, 3, 4)
        kept, scores = selector(x)
        for n in range(3):
            descriptors = [
                torch.cat([x[n, t].flatten(0, 1).mean(0), x[n, t].flatten(0, 1).amax(0)])
                for t in range(5)
            ]
            raw = selector.score_network(torch.stack(descriptors)[None])[0].detach()
            torch.testing.assert_close(
                scores[n], (raw - raw.min()) / (raw.max() - raw.min() + 1e-5)
            )
            best = sorted(sorted(range(5), key=lambda t: -float(raw[t]))[:3])
            assert torch.equal(kept[n], torch.stack([x[n, t] for t in best]))

    @pytest.mark.parametrize(("height", "width"), [(5, 5), (4, 7)])
    def test_each_frame_keeps_its_best_window(self, height, width):
        selector = randomised(AnchorSelector(4, 0.5))
        x = torch.randn(2, 3, height, width, 4)
        kept, scores = selector(x)
        anchors = anchors_of(height, width, 0.5)
        assert kept.shape == (2, 3, anchors.height, anchors.width, 4)
        chosen = set()
        for n in range(2):
            for t in range(3):
                raw = selector.score_network(x[n, t].flatten(0, 1)[None]).detach()
                raw = raw.view(height, width)
                means = [
                    raw[top : top + anchors.height, left : left + anchors.width].mean()
                    for top, left in anchors.corners
                ]
                best = max(range(len(means)), key=lambda i: float(means[i]))
                assert scores[n, t].argmax() == best
                top, left = anchors.corners[best]
                assert torch.equal(
                    kept[n, t], x[n, t, top : top + anchors.height, left : left + anchors.width]
                )
                chosen.add(best)
        assert len(chosen) > 1

    def test_soft_frames_are_mixtures(self):
        selector = randomised(FrameSelector(4, 0.5))
        x = torch.randn(2, 6, 2, 2, 4)
        soft = perturbation(selector, x, 0.5)
        mixed, scores = selector(x, soft)
        weights = torch.stack([smoothed(scores[n], 3, soft.noise[n], 0.5) for n in range(2)])
        torch.testing.assert_close(mixed, torch.einsum("nkt,nthwc->nkhwc", weights, x))

    def test_soft_windows_are_mixtures(self):
        selector = randomised(AnchorSelector(4, 0.4))
        x = torch.randn(2, 3, 5, 5, 4)
        soft = perturbation(selector, x, 0.5)
        mixed, scores = selector(x, soft)
        anchors = anchors_of(5, 5, 0.4)
        for n in range(2):
            for t in range(3):
                weights = smoothed(scores[n, t], 1, soft.noise[n, t], 0.5)[0]
                expected = sum(
                    weight * x[n, t, top : top + anchors.height, left : left + anchors.width]
                    for weight, (top, left) in zip(weights, anchors.corners, strict=True)
                )
                torch.testing.assert_close(mixed[n, t], expected)

    @pytest.mark.parametrize("kind", [FrameSelector, AnchorSelector])
    @pytest.mark.parametrize("gradient", ["unbiased", "official"])
    def test_noise_of_nothing_is_the_hard_choice(self, kind, gradient):
        selector = randomised(kind(4, 0.5))
        x = torch.randn(2, 4, 6, 6, 4)
        mixed, _ = selector(x, perturbation(selector, x, 0.0, gradient))
        assert torch.equal(mixed, selector(x)[0])

    @pytest.mark.parametrize("kind", [FrameSelector, AnchorSelector])
    def test_keeping_all_changes_nothing(self, kind):
        selector = randomised(kind(4, 1.0))
        x = torch.randn(2, 4, 6, 5, 4)
        assert torch.equal(selector(x)[0], x)
        assert torch.equal(selector(x, perturbation(selector, x, 0.1))[0], x)

    @pytest.mark.parametrize("kind", [FrameSelector, AnchorSelector])
    def test_choice_under_autocast_is_that_of_full_precision(self, kind):
        selector = randomised(kind(8, 0.5))
        x = torch.randn(4, 8, 6, 6, 8)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            kept, scores = selector(x)
        assert scores.dtype == torch.float32
        assert torch.equal(kept, selector(x)[0])


class TestSettings:
    @pytest.mark.parametrize(
        "make",
        [
            lambda: Keep(0, 0.0),
            lambda: Keep(0, 1.1),
            lambda: Selection(time=(Keep(0, 0.5), Keep(0, 0.4))),
            lambda: Selection(sigma=0.0),
            lambda: Selection(samples=1),
            lambda: Selection(gradient="biased"),
        ],
    )
    def test_what_makes_no_sense_is_refused(self, make):
        with pytest.raises(UsageError, match="token_selection"):
            make()
