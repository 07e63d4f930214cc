"""Which frames of a video make a clip; chosen before decoding.

Two samplings:

* ``dense``: frames at a fixed stride, starting anywhere, as the Video-Swin code base defines it.
* ``uniform``: the whole video in equal segments, one frame from each (TSN, Wang et al. 2016). The
  segments are exact; Video-Swin's code rounds their borders to frames first and leaves out the last
  one, which picks a neighbouring frame here and there.

Both choose *positions* on an even time axis; :func:`frame_numbers` says which frame is on screen at each.
For most videos a position is a frame. It is not where frame times are uneven, or where a nominal rate
makes the stride mean the same time in videos of any rate.

At test a clip can be taken at another rate (:data:`Rate`), over the same span. *Places* are positions
before a short video's end was minded: :func:`fold` brings them back into the video, and
:func:`clip_seconds` says how much time passes between them as the clip is played.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ogreg_core.data.manifest import Row
from ogreg_core.errors import UsageError

__all__ = [
    "ClipSampling",
    "Rate",
    "check_rate",
    "clip_seconds",
    "fold",
    "frame_numbers",
    "middle_only",
    "positions",
    "rated_frames",
    "rated_places",
    "test_indices",
    "test_places",
    "train_indices",
    "train_places",
]

Rate = Literal["half", "double", "irregular"]


@dataclass(frozen=True)
class ClipSampling:
    """How frames are picked.

    Args:
        kind: ``dense`` or ``uniform``.
        frames: frames per clip.
        stride: distance between frames, in frames; dense only.
        fps: count the stride in frames of a video of this rate, whatever the file's is; 0: in the
            file's own frames; dense only.
        short: what a dense clip does at the end of a short video: ``loop`` to its start (mmaction2)
            or ``clamp`` to its last frame (PySlowFast).
    """

    kind: Literal["dense", "uniform"]
    frames: int
    stride: int = 1
    fps: float = 0.0
    short: Literal["loop", "clamp"] = "loop"


def positions(row: Row, sampling: ClipSampling) -> int:
    """How many positions there are on the even time axis of a video."""
    if sampling.kind == "dense" and sampling.fps:
        return max(1, round(row.duration * sampling.fps))
    return row.frames


def frame_numbers(
    chosen: Sequence[int],
    row: Row,
    sampling: ClipSampling,
    look_up: Callable[[Sequence[float]], list[int]],
) -> list[int]:
    """The frame on screen at each position.

    Args:
        chosen: positions.
        row: the video.
        sampling: how they were chosen.
        look_up: frames at given seconds, from the times in the file; called for uneven ones only.
    """
    nominal = sampling.kind == "dense" and sampling.fps > 0
    if not row.variable_rate and not nominal:
        return list(chosen)
    seconds = [position / _rate(row, sampling) for position in chosen]
    if row.variable_rate:
        return look_up(seconds)
    # A hair of slack: a time may fall just short of the frame that begins there.
    return [min(int(time * row.fps + 1e-4), row.frames - 1) for time in seconds]


def _rate(row: Row, sampling: ClipSampling) -> float:
    """Positions per second."""
    if sampling.kind == "dense" and sampling.fps:
        return sampling.fps
    return row.frames / row.duration


def clip_seconds(
    places: Sequence[int], seconds: Sequence[float], total: int, row: Row, sampling: ClipSampling
) -> list[float]:
    """When each frame of a clip appears as the clip is played, in seconds from its first one.

    Beyond the end of a short video time goes on: while it is played again, or its last frame held.

    Args:
        places: of the clip's frames, out of ``total`` positions.
        seconds: when the frame at each place appears in the file.
        total: positions of the video, or of the window of one.
        row: the video.
        sampling: how the places were chosen.
    """
    folded = fold(places, total, sampling)
    played = [
        second + ((place - position) / _rate(row, sampling) if place != position else 0.0)
        for place, position, second in zip(places, folded, seconds, strict=True)
    ]
    return [second - played[0] for second in played]


def train_places(total: int, sampling: ClipSampling, rng: random.Random) -> list[int]:
    """Places of a random clip out of ``total`` positions."""
    if sampling.kind == "dense":
        start = rng.randint(0, max(total - sampling.frames * sampling.stride, 0))
        return _strided(start, sampling)
    segment = total / sampling.frames
    return [min(int(segment * (i + rng.random())), total - 1) for i in range(sampling.frames)]


def train_indices(total: int, sampling: ClipSampling, rng: random.Random) -> list[int]:
    """A random clip out of ``total`` positions."""
    return fold(train_places(total, sampling, rng), total, sampling)


def test_places(total: int, sampling: ClipSampling, clip: int = 0, clips: int = 1) -> list[int]:
    """Places of :func:`test_indices`."""
    if sampling.kind == "dense":
        return _strided(_test_start(total, sampling, clip, clips), sampling)
    segment = total / sampling.frames
    share = (clip + 1) / (clips + 1)
    return [min(int(segment * (i + share)), total - 1) for i in range(sampling.frames)]


def test_indices(total: int, sampling: ClipSampling, clip: int = 0, clips: int = 1) -> list[int]:
    """Clip number ``clip`` of ``clips`` spread evenly over ``total`` positions, the same at every
    call.

    Dense clips start at the middle of equal parts of the possible offsets; uniform ones take the
    frames at the share ``(clip + 1) / (clips + 1)`` of each segment, so a single clip takes the
    middles.
    """
    return fold(test_places(total, sampling, clip, clips), total, sampling)


# pytest would collect them by their names.
test_places.__test__ = False  # type: ignore[attr-defined]
test_indices.__test__ = False  # type: ignore[attr-defined]


def _test_start(total: int, sampling: ClipSampling, clip: int, clips: int) -> int:
    free = max(total - sampling.frames * sampling.stride + 1, 1)
    return int(free * (clip + 0.5) / clips)


def _strided(start: int, sampling: ClipSampling) -> list[int]:
    return [start + i * sampling.stride for i in range(sampling.frames)]


def fold(places: Sequence[int], total: int, sampling: ClipSampling) -> list[int]:
    """Positions of places: beyond the end as :class:`ClipSampling` says for short videos."""
    if sampling.short == "clamp":
        return [min(place, total - 1) for place in places]
    return [place % total for place in places]


# --- other rates --------------------------------------------------------------------------------


def rated_frames(sampling: ClipSampling, rate: Rate) -> int:
    """Frames of a clip at another rate."""
    return {
        "half": sampling.frames // 2,
        "double": 2 * sampling.frames,
        "irregular": sampling.frames,
    }[rate]


def check_rate(sampling: ClipSampling, rate: Rate) -> None:
    """Refuse a rate at which there are no frames to take.

    Raises:
        UsageError: half of one frame, or frames between neighbouring ones.
    """
    if rate == "half" and sampling.frames < 2:
        raise UsageError(
            "half the frames of a clip of one frame are none",
            fix="choose a checkpoint whose clips have more frames",
        )
    if rate != "half" and sampling.kind == "dense" and sampling.stride == 1:
        raise UsageError(
            f"clips of stride 1 cannot be taken at the rate {rate!r}",
            why="they take every frame already: there is none between two neighbours",
            fix="--frame-order half",
        )


def rated_places(
    total: int, sampling: ClipSampling, rate: Rate, clip: int, clips: int, rng: random.Random
) -> list[int]:
    """Places of a test clip over the span that :func:`test_places` gives it, at another rate.

    Args:
        total: positions of the video.
        sampling: how clips are usually taken.
        rate: ``half`` or ``double`` as many frames, evenly; ``irregular``: as many frames as usual, at
            random distinct places in ascending order. A uniform clip of a video that has fewer
            positions than the clip has frames cannot choose any: it repeats some as usual.
        clip, clips: which one of how many.
        rng: source of the irregular places.
    """
    frames = rated_frames(sampling, rate)
    if sampling.kind == "uniform":
        if rate == "irregular" and total >= frames:
            return sorted(rng.sample(range(total), frames))
        return test_places(total, replace(sampling, frames=frames), clip, clips)
    start = _test_start(total, sampling, clip, clips)
    if rate == "irregular":
        span = range(start, start + sampling.frames * sampling.stride)
        return sorted(rng.sample(span, frames))
    # Of an odd stride the half is rounded down at every second frame.
    twice = 4 * sampling.stride if rate == "half" else sampling.stride
    return [start + i * twice // 2 for i in range(frames)]


def middle_only(indices: list[int]) -> list[int]:
    """The clip's middle frame in every place: what can be told from one frame alone."""
    return [indices[len(indices) // 2]] * len(indices)
