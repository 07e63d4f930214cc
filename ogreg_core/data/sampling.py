"""Which frames of a video make a clip; chosen before decoding.

Two samplings:

* ``dense``: frames at a fixed stride, starting anywhere, as the Video-Swin code base defines it.
* ``uniform``: the whole video in equal segments, one frame from each (TSN, Wang et al. 2016). The
  segments are exact; Video-Swin's code rounds their borders to frames first and leaves out the last
  one, which picks a neighbouring frame here and there.

Both choose *positions* on an even time axis; :func:`frame_numbers` says which frame is on screen at each.
For most videos a position is a frame. It is not where frame times are uneven, or where a nominal rate
makes the stride mean the same time in videos of any rate.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from ogreg_core.data.manifest import Row

__all__ = [
    "ClipSampling",
    "frame_numbers",
    "middle_only",
    "positions",
    "test_indices",
    "train_indices",
]


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
    rate = sampling.fps if nominal else row.frames / row.duration
    seconds = [position / rate for position in chosen]
    if row.variable_rate:
        return look_up(seconds)
    # A hair of slack: a time may fall just short of the frame that begins there.
    return [min(int(time * row.fps + 1e-4), row.frames - 1) for time in seconds]


def train_indices(total: int, sampling: ClipSampling, rng: random.Random) -> list[int]:
    """A random clip out of ``total`` positions."""
    if sampling.kind == "dense":
        start = rng.randint(0, max(total - sampling.frames * sampling.stride, 0))
        return _dense(start, total, sampling)
    segment = total / sampling.frames
    return [min(int(segment * (i + rng.random())), total - 1) for i in range(sampling.frames)]


def test_indices(total: int, sampling: ClipSampling, clip: int = 0, clips: int = 1) -> list[int]:
    """Clip number ``clip`` of ``clips`` spread evenly over ``total`` positions, the same at every
    call.

    Dense clips start at the middle of equal parts of the possible offsets; uniform ones take the
    frames at the share ``(clip + 1) / (clips + 1)`` of each segment, so a single clip takes the
    middles.
    """
    if sampling.kind == "dense":
        free = max(total - sampling.frames * sampling.stride + 1, 1)
        return _dense(int(free * (clip + 0.5) / clips), total, sampling)
    segment = total / sampling.frames
    share = (clip + 1) / (clips + 1)
    return [min(int(segment * (i + share)), total - 1) for i in range(sampling.frames)]


test_indices.__test__ = False  # type: ignore[attr-defined]  # pytest would collect it by its name


def _dense(start: int, total: int, sampling: ClipSampling) -> list[int]:
    places = [start + i * sampling.stride for i in range(sampling.frames)]
    if sampling.short == "clamp":
        return [min(place, total - 1) for place in places]
    return [place % total for place in places]


def middle_only(indices: list[int]) -> list[int]:
    """The clip's middle frame in every place: what can be told from one frame alone."""
    return [indices[len(indices) // 2]] * len(indices)
