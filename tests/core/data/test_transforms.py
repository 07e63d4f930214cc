from __future__ import annotations

import random
import subprocess
import sys

import pytest
import torch
from torchvision.transforms import v2

from ogreg_core.data.rand_augment import parse_rand_augment
from ogreg_core.data.transforms import (
    Augmentation,
    TestCrops,
    augment,
    draw_short_side,
    resize_short_side,
    test_crops,
    to_input,
)


def clip(frames=4, height=60, width=90, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (frames, 3, height, width), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("size", [(60, 90), (90, 61), (33, 33), (48, 47)])
@pytest.mark.parametrize("short_side", [33, 48, 72])
def test_resize_equals_torchvision(size, short_side):
    frames = clip(2, *size)
    expected = v2.functional.resize(frames, [short_side], antialias=True)
    assert torch.equal(resize_short_side(frames, short_side), expected)


def test_normalisation_equals_torchvision():
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    frames = clip()
    expected = v2.Normalize(mean, std)(v2.functional.to_dtype(frames, torch.float32, scale=True))
    found = to_input(frames.transpose(0, 1), mean, std)
    torch.testing.assert_close(found.transpose(0, 1), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("landscape", [True, False])
def test_three_crops_along_the_long_side(landscape):
    frames = clip(2, 40, 70)
    if not landscape:
        frames = frames.transpose(-1, -2).contiguous()
    crops = test_crops(frames, TestCrops(size=40, short_side=40, crops=3))
    assert crops.shape == (3, 3, 2, 40, 40)
    for found, start in zip(crops, (0, 15, 30), strict=True):
        part = frames[..., start : start + 40] if landscape else frames[..., start : start + 40, :]
        assert torch.equal(found, part.transpose(0, 1))
    centre = test_crops(frames, TestCrops(size=40, short_side=40, crops=1))
    assert torch.equal(centre[0], crops[1])


def test_centre_crop_equals_torchvision():
    frames = clip(2, 50, 70)
    found = test_crops(frames, TestCrops(size=32, short_side=36))
    resized = v2.functional.resize(frames, [36], antialias=True)
    expected = v2.functional.center_crop(resized, [32, 32])
    assert torch.equal(found[0].transpose(0, 1), expected)


class TestAugment:
    full = Augmentation(32, scale=(0.5, 1.0), flip="random", color_jitter=0.4, grayscale=0.3)

    def test_is_a_function_of_the_generator_alone(self):
        first, _ = augment(clip(), 0, self.full, random.Random(4))
        torch.manual_seed(99)
        before = torch.get_rng_state()
        again, _ = augment(clip(), 0, self.full, random.Random(4))
        assert torch.equal(first, again)
        assert torch.equal(before, torch.get_rng_state())
        other, _ = augment(clip(), 0, self.full, random.Random(5))
        assert not torch.equal(first, other)

    def test_all_frames_get_the_same_draw(self):
        frames = clip(1).expand(6, -1, -1, -1)
        for seed in range(20):
            found, _ = augment(frames, 0, self.full, random.Random(seed))
            assert found.shape == (3, 6, 32, 32)
            assert found.dtype == torch.uint8
            assert (found == found[:, :1]).all()

    @pytest.mark.parametrize(
        ("change", "shows"),
        [
            ({"color_jitter": 0.5}, "colour"),
            ({"grayscale": 1.0}, "colour"),
            ({"hue": 0.3}, "colour"),
            ({"rand_augment": parse_rand_augment("rand-m9-n15")}, "operations"),
            ({"scale": (0.3, 0.3)}, "crop"),
        ],
    )
    def test_every_option_does_something(self, change, shows):
        plain = Augmentation(60, scale=(1.0, 1.0), ratio=(1.5, 1.5))
        frames = clip(2) // 2 + 64
        before, _ = augment(frames, 0, plain, random.Random(1))
        after, _ = augment(frames, 0, Augmentation(**{**vars(plain), **change}), random.Random(1))
        assert not torch.equal(before, after), shows

    def test_flip_and_mirrored_labels(self):
        plain = Augmentation(60, scale=(1.0, 1.0), ratio=(1.5, 1.5))
        spec = Augmentation(**{**vars(plain), "flip": "swap", "mirror": {0: 1, 1: 0}})
        frames = clip(2)
        outcomes = set()
        for seed in range(20):
            untouched, _ = augment(frames, 0, plain, random.Random(seed))
            found, label = augment(frames, 0, spec, random.Random(seed))
            flipped = torch.equal(found, untouched.flip(-1))
            assert flipped or torch.equal(found, untouched)
            assert label == (1 if flipped else 0)
            assert augment(frames, 2, spec, random.Random(seed))[1] == 2
            outcomes.add(flipped)
        assert outcomes == {True, False}


class TestShortSideAndCrop:
    def test_draws_stay_in_range_and_reach_its_ends(self):
        spec = Augmentation(32, short_side=(40, 48))
        found = {draw_short_side(spec, random.Random(seed)) for seed in range(200)}
        assert found == set(range(40, 49))
        assert draw_short_side(Augmentation(32), random.Random(0)) == 0

    def test_inverse_draws_favour_small_scales(self):
        """1 / s is even, so the median of s is the harmonic mean of the ends."""
        spec = Augmentation(224, short_side=(256, 320), inverse=True)
        found = sorted(draw_short_side(spec, random.Random(seed)) for seed in range(2000))
        assert (found[0], found[-1]) == (256, 320)
        assert found[1000] == pytest.approx(2 / (1 / 256 + 1 / 320), abs=2)

    def test_a_random_crop_is_cut_out_unscaled(self):
        frames = clip(1, 40, 50)
        spec = Augmentation(32, short_side=(40, 40), crop="random")
        corners = set()
        for seed in range(30):
            found, _ = augment(frames, 0, spec, random.Random(seed))
            places = [
                (y, x)
                for y in range(9)
                for x in range(19)
                if torch.equal(frames[0, :, y : y + 32, x : x + 32], found[:, 0])
            ]
            assert len(places) == 1
            corners.update(places)
        assert len(corners) > 20

    def test_mirror_classes_can_be_left_unflipped(self):
        spec = Augmentation(60, scale=(1.0, 1.0), ratio=(1.5, 1.5), flip="skip", mirror={0: 1})
        frames = clip(2)
        seen = {label: set() for label in (0, 2)}
        for label in (0, 2):
            for seed in range(20):
                found, same = augment(frames, label, spec, random.Random(seed))
                assert same == label
                seen[label].add(found.float().mean(dim=(0, 1, 2))[0].item())
        assert len(seen[0]) == 1
        assert len(seen[2]) == 2


def test_test_time_transforms_need_no_torchvision():
    code = "import sys, ogreg_core.inference; assert 'torchvision' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
