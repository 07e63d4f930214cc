from __future__ import annotations

import itertools
import math
import random
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps

from ogreg_core.data.rand_augment import (
    OPERATIONS,
    Operation,
    RandAugmentSpec,
    apply_operation,
    draw_operations,
    parse_rand_augment,
    rand_augment,
)

GREY = (128, 128, 128)
WARPS = {"Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"}
MVIT = RandAugmentSpec("timm", num_ops=4, magnitude=7, noise=0.5, increasing=True)


def pictures(height=57, width=71, seed=0):
    """Two smooth frames of narrow range and one of noise: uint8 [3, 3, height, width]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(2, 3, 7, 9, generator=generator) * 180 + 30
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic")
    noise = torch.rand(1, 3, height, width, generator=generator) * 256
    return torch.cat([smooth, noise]).to(torch.uint8)


def by_pillow(frames, change):
    """The change applied to every frame as a picture."""
    changed = [change(Image.fromarray(frame.permute(1, 2, 0).numpy())) for frame in frames]
    return torch.stack([torch.from_numpy(np.array(c)).permute(2, 0, 1) for c in changed])


def off_by(found, expected):
    return (found.int() - expected.int()).abs().max().item()


def affine(matrix, resample):
    return lambda picture: picture.transform(
        picture.size, Image.Transform.AFFINE, matrix, resample=resample, fillcolor=GREY
    )


class TestAgainstPillow:
    @pytest.mark.parametrize("name", ["Color", "Contrast", "Brightness", "Sharpness"])
    @pytest.mark.parametrize("factor", [0.1, 0.37, 1.0, 1.63, 1.9])
    def test_enhancements(self, name, factor):
        frames = pictures()
        expected = by_pillow(frames, lambda p: getattr(ImageEnhance, name)(p).enhance(factor))
        found = apply_operation(frames, Operation(name, factor))
        # Both round down; single precision in Pillow puts a few whole numbers on the other side.
        assert off_by(found, expected) <= 1
        assert (found != expected).float().mean() < 0.05

    @pytest.mark.parametrize(
        ("operation", "change"),
        [
            (Operation("AutoContrast"), ImageOps.autocontrast),
            (Operation("Equalize"), ImageOps.equalize),
            (Operation("Invert"), ImageOps.invert),
            *(
                (Operation("Posterize", bits), lambda p, bits=bits: ImageOps.posterize(p, bits))
                for bits in (1, 2, 4)
            ),
            (Operation("Posterize", 0), lambda p: p.point([0] * 768)),
            *(
                (Operation("Solarize", edge), lambda p, edge=edge: ImageOps.solarize(p, edge))
                for edge in (0, 77, 128, 256)
            ),
            *(
                (
                    Operation("SolarizeAdd", add),
                    lambda p, add=add: p.point(
                        [min(v + add, 255) if v < 128 else v for v in range(256)] * 3
                    ),
                )
                for add in (0, 33, 110)
            ),
        ],
    )
    def test_tables_are_exact(self, operation, change):
        frames = pictures()
        assert torch.equal(apply_operation(frames, operation), by_pillow(frames, change))

    @pytest.mark.parametrize("name", ["AutoContrast", "Equalize", "Contrast", "Sharpness"])
    @pytest.mark.parametrize("value", [0, 77, 255])
    def test_a_blank_frame(self, name, value):
        frames = torch.full((2, 3, 8, 9), value, dtype=torch.uint8)
        assert torch.equal(apply_operation(frames, Operation(name, 1.5)), frames)

    @pytest.mark.parametrize("bicubic", [False, True])
    @pytest.mark.parametrize("strength", [-1.0, -0.31, 0.0, 0.5, 1.0])
    @pytest.mark.parametrize("name", sorted(WARPS))
    @pytest.mark.parametrize("size", [(57, 71), (64, 64)])
    def test_warps(self, size, name, strength, bicubic):
        frames = pictures(*size)
        height, width = size
        resample = Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR
        argument = strength * {"R": 30, "S": 0.3, "T": 0.45}[name[0]]
        change = {
            "Rotate": lambda p: p.rotate(argument, resample=resample, fillcolor=GREY),
            "ShearX": affine((1, argument, 0, 0, 1, 0), resample),
            "ShearY": affine((1, 0, 0, argument, 1, 0), resample),
            "TranslateXRel": affine((1, 0, argument * width, 0, 1, 0), resample),
            "TranslateYRel": affine((1, 0, 0, 0, 1, argument * height), resample),
        }[name]
        found = apply_operation(frames, Operation(name, argument, bicubic)).int()
        # Ours round to the nearest, Pillow's down: 0 or 1 above, with the same pixels grey.
        difference = found - by_pillow(frames, change).int()
        assert difference.min() >= -1
        assert difference.max() <= 1
        assert (difference < 0).float().mean() < 1e-3

    @pytest.mark.parametrize("pixels", [-10.5, -8, 8, 10.5])
    def test_a_pixel_from_just_the_border(self, pixels):
        frames = pictures(64, 64)
        for name, matrix in [
            ("TranslateXRel", (1, 0, pixels, 0, 1, 0)),
            ("TranslateYRel", (1, 0, 0, 0, 1, pixels)),
        ]:
            expected = by_pillow(frames, affine(matrix, Image.Resampling.BILINEAR))
            assert off_by(apply_operation(frames, Operation(name, pixels / 64)), expected) <= 1


class TestClip:
    @pytest.mark.parametrize("name", OPERATIONS)
    def test_frames_are_treated_alike_and_the_input_is_kept(self, name):
        frames = pictures()[:1].expand(4, -1, -1, -1)
        before = frames.clone()
        argument = {"Rotate": 20.0, "Posterize": 2, "Solarize": 90, "SolarizeAdd": 60}.get(
            name, 0.3
        )
        found = apply_operation(frames, Operation(name, argument, bicubic=True))
        assert found.shape == frames.shape
        assert found.dtype == torch.uint8
        assert (found == found[:1]).all()
        assert not torch.equal(found, frames)
        assert torch.equal(frames, before)

    @pytest.mark.parametrize("name", ["AutoContrast", "Equalize", "Contrast"])
    def test_statistics_are_per_frame(self, name):
        frames = pictures()
        whole = apply_operation(frames, Operation(name, 1.6))
        alone = [apply_operation(frame[None], Operation(name, 1.6)) for frame in frames]
        assert torch.equal(whole, torch.cat(alone))

    @pytest.mark.parametrize("name", OPERATIONS)
    def test_a_view_in_another_memory_order(self, name):
        frames = pictures()
        view = frames.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
        operation = Operation(name, 1.0)
        assert torch.equal(apply_operation(view, operation), apply_operation(frames, operation))

    @pytest.mark.parametrize("spec", [MVIT, RandAugmentSpec("torchvision", 2, 9)])
    def test_is_a_function_of_the_generator_alone(self, spec):
        frames = pictures()
        first = [rand_augment(frames, spec, random.Random(seed)) for seed in range(12)]
        torch.manual_seed(99)
        random.seed(99)
        before = torch.get_rng_state()
        again = [rand_augment(frames, spec, random.Random(seed)) for seed in range(12)]
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert torch.equal(before, torch.get_rng_state())
        assert len({a.numpy().tobytes() for a in first}) > 6

    @pytest.mark.parametrize("spec", [MVIT, RandAugmentSpec("torchvision", 2, 9)])
    def test_a_still_clip_stays_still(self, spec):
        frames = pictures()[:1].expand(3, -1, -1, -1)
        for seed in range(20):
            found = rand_augment(frames, spec, random.Random(seed))
            assert found.shape == frames.shape
            assert (found == found[:1]).all()

    def test_operations_follow_each_other(self):
        lengths = set()
        for seed in range(10):
            frames, expected = pictures(), pictures()
            operations = draw_operations(MVIT, random.Random(seed))
            for operation in operations:
                expected = apply_operation(expected, operation)
            assert torch.equal(rand_augment(frames, MVIT, random.Random(seed)), expected)
            lengths.add(len(operations))
        assert max(lengths) > 1


def drawn(spec, clips=6000, seed=0):
    rng = random.Random(seed)
    return [draw_operations(spec, rng) for _ in range(clips)]


class TestDraws:
    def test_fifteen_operations_with_equal_frequency_half_of_them_applied(self):
        assert len(set(OPERATIONS)) == 15
        clips = drawn(MVIT)
        counts = Counter(len(operations) for operations in clips)
        for number in range(5):
            share = math.comb(4, number) / 16
            deviation = math.sqrt(share * (1 - share) / len(clips))
            assert abs(counts[number] / len(clips) - share) < 4.5 * deviation
        names = Counter(o.name for o in itertools.chain(*clips))
        total = names.total()
        assert set(names) == set(OPERATIONS)
        for count in names.values():
            assert abs(count / total - 1 / 15) < 4.5 * math.sqrt(14 / 15**2 / total)
        # With replacement: a clip can meet the same operation twice.
        assert any(len({o.name for o in clip}) < len(clip) for clip in clips)

    def test_magnitude_noise(self):
        levels = [abs(o.argument) / 3 for c in drawn(MVIT) for o in c if o.name == "Rotate"]
        assert np.mean(levels) == pytest.approx(7, abs=0.1)
        assert np.std(levels) == pytest.approx(0.5, abs=0.06)
        strong = RandAugmentSpec("timm", 4, 10, noise=3.0)
        levels = [abs(o.argument) / 3 for c in drawn(strong) for o in c if o.name == "Rotate"]
        assert max(levels) == pytest.approx(10)
        assert np.mean(np.array(levels) > 9.999) == pytest.approx(0.5, abs=0.08)
        quiet = RandAugmentSpec("timm", 4, 7)
        assert {abs(o.argument) for c in drawn(quiet, 500) for o in c if o.name == "Rotate"} == {21}

    @pytest.mark.parametrize("magnitude", [0, 4, 7, 10])
    @pytest.mark.parametrize("increasing", [False, True])
    def test_arguments(self, magnitude, increasing):
        spec = RandAugmentSpec("timm", 4, magnitude, increasing=increasing)
        found: dict[str, set[float]] = {}
        for operation in itertools.chain(*drawn(spec, 1500)):
            found.setdefault(operation.name, set()).add(round(operation.argument, 9))
        v = magnitude / 10
        factor = {1 + 0.9 * v, 1 - 0.9 * v} if increasing else {0.1 + 1.8 * v}
        expected = {
            "Rotate": {30 * v, -30 * v},
            **{key: {0.3 * v, -0.3 * v} for key in ("ShearX", "ShearY")},
            **{key: {0.45 * v, -0.45 * v} for key in ("TranslateXRel", "TranslateYRel")},
            **dict.fromkeys(("Color", "Contrast", "Brightness", "Sharpness"), factor),
            "Posterize": {4 - int(4 * v) if increasing else int(4 * v)},
            "Solarize": {256 - int(256 * v) if increasing else int(256 * v)},
            "SolarizeAdd": {int(110 * v)},
            **{key: {0.0} for key in ("AutoContrast", "Equalize", "Invert")},
        }
        assert found == {name: {round(a, 9) for a in values} for name, values in expected.items()}

    def test_signs_and_kernels_are_even(self):
        warps = [o for o in itertools.chain(*drawn(MVIT)) if o.name in WARPS]
        deviation = math.sqrt(0.25 / len(warps))
        assert abs(np.mean([o.argument > 0 for o in warps]) - 0.5) < 4.5 * deviation
        assert abs(np.mean([o.bicubic for o in warps]) - 0.5) < 4.5 * deviation
        others = [o for o in itertools.chain(*drawn(MVIT)) if o.name not in WARPS]
        assert not any(o.bicubic for o in others)


class TestParse:
    def test_none(self):
        assert parse_rand_augment("") is None

    @pytest.mark.parametrize(
        ("text", "spec"),
        [
            ("rand-m7-n4-mstd0.5-inc1", MVIT),
            ("rand-inc1-mstd0.5-n4-m7", MVIT),
            ("rand", RandAugmentSpec("timm", 2, 10)),
            ("rand-m9-mstd1-inc0", RandAugmentSpec("timm", 2, 9, noise=1.0)),
            ("torchvision-n2-m9", RandAugmentSpec("torchvision", 2, 9)),
            ("torchvision-m14-n3", RandAugmentSpec("torchvision", 3, 14)),
        ],
    )
    def test_known_policies(self, text, spec):
        assert parse_rand_augment(text) == spec

    @given(
        st.integers(1, 20),
        st.integers(0, 10),
        st.integers(0, 1000).map(lambda hundredths: hundredths / 100),
        st.booleans(),
        st.permutations(range(4)),
    )
    def test_round_trip(self, num_ops, magnitude, noise, increasing, order):
        parts = [f"m{magnitude}", f"n{num_ops}", f"mstd{noise}", f"inc{int(increasing)}"]
        text = "-".join(["rand", *(parts[i] for i in order)])
        expected = RandAugmentSpec("timm", num_ops, magnitude, noise, increasing)
        assert parse_rand_augment(text) == expected

    @pytest.mark.parametrize(
        "text",
        [
            *("augmix-m3", "rand m7", "rand-", "rand-m", "rand-m7-m8", "rand-x3", "rand-m-7", " "),
            *("rand-m11", "rand-n0", "rand-inc2", "rand-mstd101", "rand-m7.5", "RAND-m7"),
            *("rand-inc0.5", "torchvision-n2-m31", "torchvision-n2-m9-mstd0.5", "torchvision-inc1"),
        ],
    )
    def test_anything_else_is_refused(self, text):
        with pytest.raises(ValueError, match="neither") as caught:
            parse_rand_augment(text)
        message = str(caught.value)
        assert repr(text) in message
        assert "rand-m7-n4-mstd0.5-inc1" in message
        assert "torchvision-n2-m9" in message
        assert "\n" not in message


def test_parsing_needs_neither_torch_nor_torchvision():
    code = (
        "import sys; from ogreg_core.data.rand_augment import parse_rand_augment as parse;"
        "parse('rand-m7-n4-mstd0.5-inc1');"
        "assert not {'torch', 'torchvision', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_timms_policy_needs_no_torchvision():
    code = (
        "import sys, random, torch; from ogreg_core.data.rand_augment import *;"
        "frames = torch.zeros(1, 3, 8, 8, dtype=torch.uint8);"
        "[apply_operation(frames, Operation(name, 1.0)) for name in OPERATIONS];"
        "assert 'torchvision' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
