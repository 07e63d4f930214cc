"""Clips at other rates than usual, and when their frames are due."""

from __future__ import annotations

import random
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from math import ceil, floor

import av
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ogreg_core.data.loader import ClipDataset, ViewDataset, Views, load_timed_views, load_views
from ogreg_core.data.loader import test_loader as loader_of
from ogreg_core.data.manifest import Manifest, Row
from ogreg_core.data.order import sample_rng
from ogreg_core.data.sampling import (
    ClipSampling,
    clip_seconds,
    fold,
    frame_numbers,
    positions,
    rated_places,
    train_indices,
)
from ogreg_core.data.sampling import test_indices as usual_indices
from ogreg_core.data.transforms import Augmentation, TestCrops
from ogreg_core.errors import UsageError
from ogreg_core.video import VideoReader, probe
from tests.conftest import moving_frames

CROPS = TestCrops(32, 32)
UNIFORM = ClipSampling("uniform", 8)
DENSE = ClipSampling("dense", 8, 4)
UNEVEN = [40 * i for i in range(25)] + [1000 + 200 * i for i in range(15)]

totals = st.integers(1, 300)
lengths = st.integers(1, 20).map(lambda half: 2 * half)


def places(total, sampling, rate, seed=0, clip=0, clips=1):
    return rated_places(total, sampling, rate, clip, clips, random.Random(seed))


class TestUniform:
    @given(total=totals, frames=lengths)
    def test_half_and_double_take_the_middles_of_their_segments(self, total, frames):
        sampling = ClipSampling("uniform", frames)
        for rate, count in (("half", frames // 2), ("double", 2 * frames)):
            middles = [Fraction(total * (2 * i + 1), 2 * count) for i in range(count)]
            found = places(total, sampling, rate)
            # A middle may lie exactly between two frames.
            for place, middle in zip(found, middles, strict=True):
                assert place in (floor(middle), ceil(middle) - 1)

    @given(total=totals, frames=lengths, seed=st.integers(0, 99))
    def test_irregular_frames_are_distinct_and_in_order(self, total, frames, seed):
        found = places(total, ClipSampling("uniform", frames), "irregular", seed)
        assert len(found) == frames
        assert found[0] >= 0
        assert found[-1] < total
        if total >= frames:
            assert all(a < b for a, b in pairwise(found))
        else:
            assert found == usual_indices(total, ClipSampling("uniform", frames))

    def test_irregular_frames_reach_everywhere(self):
        taken = {place for seed in range(200) for place in places(30, UNIFORM, "irregular", seed)}
        assert taken == set(range(30))


class TestDense:
    @given(total=totals, frames=lengths, stride=st.integers(1, 8), clip=st.integers(0, 2))
    def test_half_takes_every_second_frame(self, total, frames, stride, clip):
        sampling = ClipSampling("dense", frames, stride)
        found = fold(places(total, sampling, "half", clip=clip, clips=3), total, sampling)
        assert found == usual_indices(total, sampling, clip, 3)[::2]

    @given(total=totals, frames=lengths, stride=st.integers(2, 8), clip=st.integers(0, 2))
    def test_double_adds_one_between_two_frames(self, total, frames, stride, clip):
        sampling = ClipSampling("dense", frames, stride)
        found = places(total, sampling, "double", clip=clip, clips=3)
        usual = usual_indices(total, sampling, clip, 3)
        assert fold(found[::2], total, sampling) == usual
        assert len(found) == 2 * frames
        assert {b - a for a, b in pairwise(found)} <= {stride // 2, stride - stride // 2}

    @given(total=totals, stride=st.integers(2, 8), seed=st.integers(0, 99))
    def test_irregular_stays_in_the_span(self, total, stride, seed):
        sampling = ClipSampling("dense", 6, stride)
        found = places(total, sampling, "irregular", seed)
        start = usual_indices(total, sampling)[0]
        assert len(found) == 6
        assert start <= found[0]
        assert all(a < b for a, b in pairwise(found))
        assert found[-1] < start + 6 * stride


class TestRefused:
    @pytest.mark.parametrize("rate", ["double", "irregular"])
    def test_frames_between_neighbours(self, rate):
        with pytest.raises(UsageError, match="stride 1") as caught:
            Views(ClipSampling("dense", 8, 1), 1, CROPS, rate)
        assert caught.value.fix == "--frame-order half"

    def test_half_of_one_frame(self):
        with pytest.raises(UsageError, match="one frame"):
            Views(ClipSampling("uniform", 1), 1, CROPS, "half")


class TestViews:
    def test_irregular_frames_depend_on_the_path_alone(self):
        views = Views(UNIFORM, 2, CROPS, "irregular")
        assert views.indices(100, 1, "a/b.mp4") == views.indices(100, 2, "a/b.mp4")
        assert views.indices(100, 1, "a/b.mp4") != views.indices(100, 1, "a/c.mp4")
        first, second = views.indices(100, 0, "a/b.mp4")
        assert first != second
        # As on every machine: a change of this list changes results that have been reported.
        assert first == [0, 30, 46, 47, 58, 61, 89, 95]

    @pytest.mark.parametrize(("control", "frames"), [("half", 4), ("double", 16), ("shuffled", 8)])
    def test_frames_per_clip(self, control, frames):
        views = Views(DENSE, 3, CROPS, control)
        assert views.frames == frames
        assert {len(clip) for clip in views.indices(100)} == {frames}


def row_of(frames: int, fps: float) -> Row:
    return Row("x.mp4", 0, frames, fps, frames / fps, 64, 48, "pyav")


class TestClipSeconds:
    @given(frames=st.integers(1, 60), start=st.integers(0, 59), stride=st.integers(1, 9))
    def test_time_goes_on_at_the_end_of_a_short_video(self, frames, start, stride):
        """Played again or held: frames that are a stride apart stay a stride apart."""
        row = row_of(frames, 25.0)
        taken = [start % frames + stride * i for i in range(10)]
        for short in ("loop", "clamp"):
            sampling = ClipSampling("dense", 10, stride, short=short)
            shown = [number / 25 for number in fold(taken, frames, sampling)]
            found = clip_seconds(taken, shown, frames, row, sampling)
            assert found == pytest.approx([stride * i / 25 for i in range(10)])

    def test_a_nominal_rate_is_that_of_the_positions(self):
        """Half a second, looped: the second round begins half a second after the first."""
        row, sampling = row_of(12, 24.0), ClipSampling("dense", 20, 1, fps=20.0)
        assert positions(row, sampling) == 10
        taken = list(range(20))
        numbers = frame_numbers(fold(taken, 10, sampling), row, sampling, lambda _: [])
        found = clip_seconds(taken, [n / 24 for n in numbers], 10, row, sampling)
        assert found[10:] == pytest.approx([second + 0.5 for second in found[:10]])


@pytest.fixture
def uneven(encode) -> Manifest:
    """A video whose frames are 40 ms apart at first and 200 ms later."""
    path = encode("uneven.mkv", moving_frames(40, 48, 64), pts_ms=UNEVEN)
    info = probe(path)
    assert info.variable_rate
    return Manifest(path.parent, "val", (Row.from_probe(path.name, info),), ("a",))


def on_screen(manifest: Manifest, chosen: list[int], sampling: ClipSampling) -> list[float]:
    """When the frames at some positions were presented, by a plain decoder."""
    row = manifest.rows[0]
    with av.open(str(manifest.video(row))) as container:
        shown = [frame.time for frame in container.decode(video=0)]
    rate = sampling.fps or row.frames / row.duration
    return [max(t for t in shown if t <= place / rate + 1e-6) for place in chosen]


@pytest.mark.parametrize(
    "sampling",
    [UNIFORM, ClipSampling("dense", 8, 2), ClipSampling("dense", 8, 3, fps=30)],
    ids=["uniform", "dense", "nominal"],
)
class TestTimesOfAnUnevenVideo:
    def test_of_test_views(self, uneven, sampling):
        row = uneven.rows[0]
        views = Views(sampling, 2, TestCrops(32, 32, 3))
        found = load_timed_views(uneven, row, views)
        assert found.times.shape == (6, 8)
        assert found.times.dtype == torch.float32
        for clip, chosen in enumerate(views.indices(positions(row, sampling))):
            seconds = np.array(on_screen(uneven, chosen, sampling))
            for crop in range(3):
                times = found.times[3 * clip + crop].numpy()
                np.testing.assert_allclose(times, seconds - seconds[0], atol=1e-6)

    def test_of_training_clips(self, uneven, sampling):
        dataset = ClipDataset(uneven, sampling, Augmentation(32, (36, 40), repeats=2), seed=3)
        found = dataset[5, 0].times
        rng = sample_rng(3, 5, 0, "frames")
        chosen = train_indices(positions(uneven.rows[0], sampling), sampling, rng)
        seconds = np.array(on_screen(uneven, chosen, sampling))
        assert found.shape == (2, 8)
        np.testing.assert_allclose(found[0].numpy(), seconds - seconds[0], atol=1e-6)
        assert torch.equal(found[0], found[1])

    @pytest.mark.parametrize("control", ["half", "double", "irregular"])
    def test_at_other_rates(self, uneven, sampling, control):
        row = uneven.rows[0]
        views = Views(sampling, 1, CROPS, control)
        (chosen,) = views.indices(positions(row, sampling), path=row.path)
        seconds = np.array(on_screen(uneven, chosen, sampling))
        found = load_timed_views(uneven, row, views)
        assert found.views.shape[2] == views.frames == len(chosen)
        np.testing.assert_allclose(found.times[0].numpy(), seconds - seconds[0], atol=1e-6)


class TestTimesUnderControls:
    def test_times_ascend_whatever_the_order_of_pictures(self, uneven):
        row = uneven.rows[0]
        times = {
            control: load_timed_views(uneven, row, Views(UNIFORM, 1, CROPS, control)).times
            for control in ("none", "shuffled", "middle", "reversed")
        }
        assert torch.equal(times["shuffled"], times["none"])
        assert torch.equal(times["middle"], times["none"])
        gaps = times["none"].diff()
        torch.testing.assert_close(times["reversed"].diff(), gaps.flip(1))
        assert not torch.allclose(gaps, gaps.flip(1))
        assert times["reversed"][0, 0] == 0

    def test_even_videos_are_not_looked_into_for_times(self, encode, monkeypatch):
        path = encode("even.mp4", moving_frames(40, 48, 64), fps=20)
        row = Row.from_probe(path.name, probe(path))
        manifest = Manifest(path.parent, "val", (row,), ("a",))
        views = Views(UNIFORM, 1, CROPS)
        expected = load_views(manifest, row, views)

        def refuse(_self):
            raise AssertionError("an even rate needs no packets")

        monkeypatch.setattr(VideoReader, "index", property(refuse))
        # Its decoder was found when it was prepared, and reads by a table of its own.
        found = load_timed_views(manifest, row, views)
        assert torch.equal(found.views, expected)
        torch.testing.assert_close(found.times, torch.arange(8)[None] * 5 / 20)

    def test_batches_carry_them_past_unreadable_videos(self, uneven):
        row = uneven.rows[0]
        rows = (row, replace(row, path="missing.mkv"), row)
        manifest = replace(uneven, rows=rows)
        (batch,) = loader_of(ViewDataset(manifest, Views(UNIFORM, 2, CROPS)), 3, 0)
        assert batch.times.shape == (2, 2, 8)
        assert torch.equal(batch.times[0], batch.times[1])
        assert [video.index for video in batch.unreadable] == [1]
