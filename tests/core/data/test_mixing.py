from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from ogreg_core.data.mixing import Erasing, Mixing, draw_erasing, erase, mix

K = 7


def batch(size=5, frames=3, height=12, width=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    clips = torch.randn(size, 3, frames, height, width, generator=generator)
    return clips, torch.randint(0, K, (size,), generator=generator)


def one_hot(labels, smoothing=0.0):
    return F.one_hot(labels, K).double() * (1 - smoothing) + smoothing / K


class TestDrawErasing:
    def test_distribution(self):
        rng = random.Random(0)
        boxes = [draw_erasing(Erasing(0.25), 224, 224, rng) for _ in range(12000)]
        drawn = np.array([box[:4] for box in boxes if box[2]])
        assert len(drawn) / len(boxes) == pytest.approx(0.25, abs=0.018)
        top, left, height, width = drawn.T
        assert (top + height).max() == 224
        assert (left + width).max() == 224
        assert top.min() == left.min() == 0
        area, aspect = height * width / 224**2, height / width
        assert area.min() > 0.015
        assert area.max() < 0.34
        assert area.mean() == pytest.approx((0.02 + 1 / 3) / 2, abs=0.01)
        # Log-uniform, but for the rounding to whole pixels and the few boxes that do not fit.
        assert aspect.min() > 0.27
        assert aspect.max() < 3.6
        assert np.log(aspect).mean() == pytest.approx(0, abs=0.05)
        assert np.log(aspect).std() == pytest.approx(np.log(3.3 / 0.3) / 12**0.5, abs=0.04)
        # The corner is uniform over the places where the box fits.
        assert (top / (224 - height)).mean() == pytest.approx(0.5, abs=0.03)
        assert (left / (224 - width)).mean() == pytest.approx(0.5, abs=0.03)
        assert len({box[4] for box in boxes if box[2]}) == len(drawn)

    @given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32))
    def test_any_box_fits_and_is_a_function_of_the_generator(self, height, width, seed):
        found = draw_erasing(Erasing(1.0), height, width, random.Random(seed))
        assert found == draw_erasing(Erasing(1.0), height, width, random.Random(seed))
        top, left, box_height, box_width, noise_seed = found
        assert 0 <= top <= top + box_height <= height
        assert 0 <= left <= left + box_width <= width
        assert (box_height == 0) == (box_width == 0)
        assert 0 <= noise_seed < 2**63
        assert torch.tensor([found], dtype=torch.int64).tolist() == [list(found)]

    def test_never_and_impossible(self):
        rng = random.Random(0)
        assert {draw_erasing(Erasing(0.0), 64, 64, rng) for _ in range(100)} == {(0,) * 5}
        assert draw_erasing(Erasing(1.0, area=(2.0, 3.0)), 64, 64, rng) == (0,) * 5


class TestErase:
    boxes = torch.tensor([[2, 1, 5, 6, 11], [0, 0, 0, 0, 0], [0, 4, 11, 3, 12], [7, 9, 5, 1, 13]])

    def test_against_a_plain_loop(self):
        clips, _ = batch(4)
        before = clips.clone()
        found = erase(clips, self.boxes)
        assert found is clips
        for b, (top, left, height, width, seed) in enumerate(self.boxes.tolist()):
            noise = torch.randn(
                (3, 3, height, width), generator=torch.Generator().manual_seed(seed)
            )
            for y in range(12):
                for x in range(10):
                    inside = top <= y < top + height and left <= x < left + width
                    expected = noise[..., y - top, x - left] if inside else before[b, ..., y, x]
                    assert torch.equal(found[b, ..., y, x], expected)

    def test_noise_is_standard_normal_and_fresh_for_every_frame(self):
        clips = torch.full((1, 3, 8, 64, 64), 9.0)
        box = erase(clips, torch.tensor([[4, 8, 48, 40, 5]]))[0, :, :, 4:52, 8:48]
        assert box.mean().item() == pytest.approx(0, abs=0.02)
        assert box.std().item() == pytest.approx(1, abs=0.02)
        planes = box.flatten(0, 1).flatten(1)
        correlation = torch.corrcoef(planes) - torch.eye(len(planes))
        assert correlation.abs().max() < 0.12
        assert (clips == 9).sum() == clips.numel() - box.numel()

    def test_does_not_depend_on_the_rest_of_the_batch(self):
        clips, _ = batch(4)
        whole = erase(clips.clone(), self.boxes)
        for b in range(4):
            alone = erase(clips[b : b + 1].clone(), self.boxes[b : b + 1])
            assert torch.equal(alone[0], whole[b])
        order = torch.tensor([3, 1, 0, 2])
        assert torch.equal(erase(clips[order].clone(), self.boxes[order]), whole[order])

    def test_leaves_the_global_generator_alone(self):
        before = torch.get_rng_state()
        erase(batch(4)[0], self.boxes)
        assert torch.equal(before, torch.get_rng_state())

    def test_bfloat16_gets_the_same_noise(self):
        clips, _ = batch(4)
        low = erase(clips.bfloat16(), self.boxes)
        assert low.dtype == torch.bfloat16
        assert torch.equal(low, erase(clips, self.boxes).bfloat16())


class TestTargets:
    @pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.3])
    def test_cross_entropy_equals_label_smoothing(self, smoothing):
        clips, labels = batch()
        before = clips.clone()
        found, targets = mix(clips, labels, K, Mixing(smoothing=smoothing), random.Random(0))
        assert torch.equal(found, before)
        assert targets.dtype == torch.float32
        torch.testing.assert_close(targets.double(), one_hot(labels, smoothing))
        logits = torch.randn(5, K)
        expected = F.cross_entropy(logits, labels, label_smoothing=smoothing)
        torch.testing.assert_close(F.cross_entropy(logits, targets), expected)

    @pytest.mark.parametrize("spec", [Mixing(mixup=0.8), Mixing(cutmix=1.0), Mixing(0.8, 1.0)])
    def test_a_batch_of_one_has_no_partner(self, spec):
        clips, labels = batch(1)
        before = clips.clone()
        found, targets = mix(clips, labels, K, spec, random.Random(0))
        assert torch.equal(found, before)
        torch.testing.assert_close(targets.double(), one_hot(labels))


class TestMix:
    @pytest.mark.parametrize("size", [2, 5, 8])
    @pytest.mark.parametrize("smoothing", [0.0, 0.1])
    def test_mixup_against_a_plain_loop(self, size, smoothing):
        clips, labels = batch(size)
        clean = one_hot(labels, smoothing)
        before = clips.double()
        spec = Mixing(mixup=0.8, smoothing=smoothing)
        rng = random.Random(3)
        found, targets = mix(clips, labels, K, spec, rng)
        assert found is clips
        replay = random.Random(3)
        replay.random()
        kept = replay.betavariate(0.8, 0.8)
        assert replay.getstate() == rng.getstate()
        assert 0.05 < kept < 0.95
        for b in range(size):
            partner = size - 1 - b
            expected = kept * before[b] + (1 - kept) * before[partner]
            torch.testing.assert_close(found[b].double(), expected, atol=1e-6, rtol=1e-5)
            expected = kept * clean[b] + (1 - kept) * clean[partner]
            torch.testing.assert_close(targets[b].double(), expected, atol=1e-6, rtol=1e-5)

    @given(
        st.integers(2, 5),
        st.integers(1, 40),
        st.integers(1, 40),
        st.sampled_from([0.2, 1.0, 4.0]),
        st.integers(0, 2**32),
    )
    def test_cutmix_moves_one_box_and_keeps_the_books(self, size, height, width, alpha, seed):
        # Each clip is its own index everywhere, so the result says where each pixel came from.
        index = torch.arange(size, dtype=torch.float32)
        clips = index.view(-1, 1, 1, 1, 1).expand(size, 3, 2, height, width).clone()
        labels = torch.arange(size)
        found, targets = mix(clips, labels, K, Mixing(cutmix=alpha), random.Random(seed))
        moved = found != index.view(-1, 1, 1, 1, 1)
        first = moved[0, 0, 0]
        for b in range(size):
            partner = size - 1 - b
            assert (found[b][:, :, first] == partner).all()
            assert (found[b][:, :, ~first] == b).all()
            own = 1.0 if partner == b else 1 - first.float().mean().item()
            assert targets[b, b].item() == pytest.approx(own, abs=1e-5)
            assert targets[b].sum().item() == pytest.approx(1, abs=1e-5)
        rows, columns = first.any(1).sum(), first.any(0).sum()
        assert first.sum() == rows * columns  # a rectangle

    def test_cutmix_box_sizes(self):
        # Before the border cuts it, the box covers 1 - lambda with lambda uniform at alpha 1;
        # its centre is uniform. Compared with the same draw by numpy.
        clips = torch.zeros(2, 3, 1, 64, 64)
        labels, rng = torch.tensor([0, 1]), random.Random(0)
        shares = [
            1 - mix(clips, labels, 2, Mixing(cutmix=1.0), rng)[1][0, 0].item() for _ in range(4000)
        ]
        generator = np.random.default_rng(0)
        half = (64 * np.sqrt(generator.random(100_000))).astype(int) // 2
        centre = generator.integers(0, 64, (2, 100_000))
        sides = np.minimum(centre + half, 64) - np.maximum(centre - half, 0)
        expected = sides.prod(0) / 64**2
        assert np.mean(shares) == pytest.approx(expected.mean(), abs=0.015)
        levels = [0.1, 0.25, 0.5, 0.75, 0.9]
        assert np.quantile(shares, levels) == pytest.approx(np.quantile(expected, levels), abs=0.03)

    def test_as_torchvision_up_to_the_choice_of_partner(self):
        from torchvision.transforms import v2

        clips, labels = batch(2)  # with two clips, rolled by one is flipped
        for spec, theirs in [
            (Mixing(mixup=0.8), v2.MixUp(alpha=0.8, num_classes=K)),
            (Mixing(cutmix=1.0), v2.CutMix(alpha=1.0, num_classes=K)),
        ]:
            rng = random.Random(5)
            found, targets = mix(clips.clone(), labels, K, spec, rng)
            kept = (targets[0, labels[0]]).item()
            params = {
                "labels": labels,
                "batch_size": 2,
                "num_classes": K,
                "lam": kept,
                "lam_adjusted": kept,
            }
            if spec.cutmix:
                where = (found != clips)[0, 0, 0].nonzero()
                (y1, x1), (y2, x2) = where.min(0).values.tolist(), where.max(0).values.tolist()
                params["box"] = (x1, y1, x2 + 1, y2 + 1)
            video = v2.functional.to_image(clips[:, :, 0])
            torch.testing.assert_close(
                found[:, :, 0], torch.as_tensor(theirs.transform(video, params))
            )
            torch.testing.assert_close(targets, theirs.transform(labels, params))

    def test_switch_and_probability(self):
        labels, rng = torch.tensor([0, 1]), random.Random(0)
        spec = Mixing(mixup=1.0, cutmix=1.0, probability=0.8, switch=0.3)
        counts = {"none": 0, "mixup": 0, "cutmix": 0}
        for _ in range(5000):
            clips = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1, 1).expand(2, 1, 1, 24, 24).clone()
            found, targets = mix(clips, labels, 2, spec, rng)
            values = found[0].unique()
            if len(values) == 1 and 0 < values[0] < 1:
                counts["mixup"] += 1
                assert targets[0, 1].item() == pytest.approx(values[0].item(), abs=1e-6)
            elif targets[0, 0] < 1:
                counts["cutmix"] += 1
            else:
                counts["none"] += 1
        assert counts["mixup"] / 5000 == pytest.approx(0.8 * 0.7, abs=0.03)
        # A cutmix box of less than two pixels is none, which happens once in 24² / 4 draws.
        assert counts["cutmix"] / 5000 == pytest.approx(0.8 * 0.3, abs=0.03)

    @pytest.mark.parametrize(
        ("spec", "cut"), [(Mixing(mixup=0.8), False), (Mixing(cutmix=1.0), True)]
    )
    def test_one_of_them_alone_needs_no_switch(self, spec, cut):
        for seed in range(20):
            clips, labels = batch(4, seed=seed)
            before = clips.clone()
            mix(clips, labels, K, spec, random.Random(seed))
            same = (clips == before) | (clips == before.flip(0))
            assert bool(same.all()) == cut

    @pytest.mark.parametrize("spec", [Mixing(mixup=0.8), Mixing(cutmix=1.0)])
    def test_bfloat16(self, spec):
        clips, labels = batch(4)
        low, targets = mix(clips.bfloat16(), labels, K, spec, random.Random(1))
        full, expected = mix(clips, labels, K, spec, random.Random(1))
        assert low.dtype == torch.bfloat16
        assert targets.dtype == torch.float32
        assert torch.equal(targets, expected)
        torch.testing.assert_close(low.float(), full, atol=0.03, rtol=0.02)

    @pytest.mark.parametrize("spec", [Mixing(mixup=0.8), Mixing(cutmix=1.0), Mixing(0.8, 1.0)])
    def test_is_a_function_of_the_generator_alone(self, spec):
        clips, labels = batch(4)
        before = torch.get_rng_state()
        first = mix(clips.clone(), labels, K, spec, random.Random(2))
        again = mix(clips.clone(), labels, K, spec, random.Random(2))
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])
        assert torch.equal(before, torch.get_rng_state())
