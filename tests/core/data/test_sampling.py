"""Frame indices against the definitions, written out as plain loops, and their properties."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from ogreg_core.data.loader import Views
from ogreg_core.data.sampling import ClipSampling, middle_only, test_indices, train_indices
from ogreg_core.data.transforms import TestCrops

totals = st.integers(1, 400)
samplings = st.builds(
    ClipSampling,
    kind=st.sampled_from(["dense", "uniform"]),
    frames=st.integers(1, 64),
    stride=st.integers(1, 8),
)


@given(total=totals, sampling=samplings, seed=st.integers(0, 99))
def test_training_clips_have_the_right_length_and_stay_inside(total, sampling, seed):
    indices = train_indices(total, sampling, random.Random(seed))
    assert len(indices) == sampling.frames
    assert all(0 <= i < total for i in indices)
    assert indices == train_indices(total, sampling, random.Random(seed))
    if sampling.kind == "uniform":
        assert indices == sorted(indices)
        for place, index in enumerate(indices):
            low, high = place * total / sampling.frames, (place + 1) * total / sampling.frames
            assert int(low) <= index <= high


@given(total=totals, sampling=samplings, clips=st.integers(1, 10))
def test_test_clips_cover_the_video_in_order(total, sampling, clips):
    all_clips = [test_indices(total, sampling, clip, clips) for clip in range(clips)]
    assert all(len(clip) == sampling.frames for clip in all_clips)
    assert all(0 <= i < total for clip in all_clips for i in clip)
    starts = [clip[0] for clip in all_clips]
    assert starts == sorted(starts)


def test_dense_clips_of_video_swin_by_hand():
    """300 frames, 32x2: four clips at the middles of four equal parts of the 237 possible offsets."""
    sampling = ClipSampling("dense", 32, 2)
    starts = [test_indices(300, sampling, clip, 4)[0] for clip in range(4)]
    assert starts == [int(237 / 4 * i + 237 / 8) for i in range(4)] == [29, 88, 148, 207]
    assert test_indices(300, sampling, 0, 1)[:3] == [118, 120, 122]


def test_short_dense_clips_loop():
    assert test_indices(5, ClipSampling("dense", 8, 1)) == [0, 1, 2, 3, 4, 0, 1, 2]


def test_uniform_takes_the_middles():
    assert test_indices(32, ClipSampling("uniform", 4)) == [4, 12, 20, 28]
    assert test_indices(30, ClipSampling("uniform", 3), 0, 2) == [3, 13, 23]
    assert test_indices(2, ClipSampling("uniform", 4)) == [0, 0, 1, 1]


def test_controls_keep_the_frames_and_change_their_order():
    views = Views(ClipSampling("uniform", 16), 2, TestCrops(32, 32), control="none")
    plain = views.indices(64)
    reverse = Views(views.sampling, 2, views.crops, "reversed").indices(64)
    shuffled = Views(views.sampling, 2, views.crops, "shuffled").indices(64, seed=5)
    middle = Views(views.sampling, 2, views.crops, "middle").indices(64)
    assert reverse == [clip[::-1] for clip in plain]
    assert [sorted(clip) for clip in shuffled] == plain
    assert shuffled != plain
    assert shuffled == Views(views.sampling, 2, views.crops, "shuffled").indices(64, seed=5)
    assert middle == [[clip[8]] * 16 for clip in plain]
    assert middle_only([3]) == [3]
