"""Frame indices against the definitions, written out as plain loops, and their properties."""

from __future__ import annotations

import random

import av
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ogreg_core.data.loader import Views, load_views, locate
from ogreg_core.data.manifest import Manifest, Row
from ogreg_core.data.sampling import (
    ClipSampling,
    frame_numbers,
    middle_only,
    positions,
    test_indices,
    train_indices,
)
from ogreg_core.data.transforms import TestCrops
from ogreg_core.video import probe
from tests.conftest import moving_frames

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


def test_short_dense_clips_hold_the_last_frame_if_asked():
    sampling = ClipSampling("dense", 8, 1, short="clamp")
    assert test_indices(5, sampling) == [0, 1, 2, 3, 4, 4, 4, 4]
    assert train_indices(5, sampling, random.Random(0)) == [0, 1, 2, 3, 4, 4, 4, 4]


def row(frames: int, fps: float, variable: bool = False) -> Row:
    return Row("x.mp4", 0, frames, fps, frames / fps, 64, 48, "pyav", variable_rate=variable)


def refuse(_seconds):
    raise AssertionError("even rates need no look into the file")


@given(rate=st.sampled_from([23.976, 24, 25, 29.97, 30, 50, 60]), seed=st.integers(0, 99))
def test_a_nominal_rate_means_the_same_time_at_every_rate(rate, seed):
    """Ten seconds: 16 frames at stride 4 of 30 frames per second, whatever the file's rate is."""
    sampling = ClipSampling("dense", 16, 4, fps=30)
    video = row(round(10 * rate), rate)
    total = positions(video, sampling)
    assert total == round(30 * video.duration)
    chosen = train_indices(total, sampling, random.Random(seed))
    numbers = frame_numbers(chosen, video, sampling, refuse)
    for position, number in zip(chosen, numbers, strict=True):
        shown_at, gone_at = number / rate, (number + 1) / rate
        assert shown_at - 1e-4 <= position / 30 < gone_at + 1e-4


def test_even_rates_without_a_nominal_one_are_left_alone():
    sampling = ClipSampling("dense", 4, 2)
    assert frame_numbers([3, 5, 7, 9], row(20, 29.97), sampling, refuse) == [3, 5, 7, 9]
    uniform = ClipSampling("uniform", 4, fps=30)
    assert positions(row(20, 25), uniform) == 20


@pytest.mark.parametrize(
    "sampling",
    [
        ClipSampling("uniform", 8),
        ClipSampling("dense", 8, 2),
        ClipSampling("dense", 8, 3, fps=30),
    ],
    ids=["uniform", "dense", "nominal"],
)
def test_uneven_rates_are_sampled_by_time(sampling, encode, tmp_path):
    """Against the frames that a plain decoder has on screen at those times."""
    times = [40 * i for i in range(25)] + [1000 + 200 * i for i in range(15)]
    path = encode("uneven.mkv", moving_frames(40, 48, 64), pts_ms=times)
    info = probe(path)
    assert info.variable_rate
    video = Row(path.name, 0, 40, info.fps, info.duration, 64, 48, "pyav", variable_rate=True)
    manifest = Manifest(path.parent, "val", (video,), ("a",))
    views = Views(sampling, 2, TestCrops(48, 48))
    found = load_views(manifest, video, views)
    with av.open(str(path)) as container:
        decoded = [(f.time, f.to_ndarray(format="rgb24")) for f in container.decode(video=0)]
    rate = sampling.fps or 40 / info.duration
    for clip, chosen in enumerate(views.indices(positions(video, sampling))):
        seconds = [position / rate for position in chosen]
        on_screen = [[f for t, f in decoded if t <= s + 1e-6][-1] for s in seconds]
        expected = torch.from_numpy(np.stack(on_screen)[:, :, 8:56]).permute(3, 0, 1, 2)
        assert torch.equal(found[clip], expected)
        located = locate(manifest, video, chosen, sampling)
        assert [at for _, at in located] == pytest.approx(
            [max(t for t, _ in decoded if t <= s + 1e-6) for s in seconds]
        )
