"""Which frames of a video make a clip; chosen before decoding.

Two samplings, in the definitions of the Video-Swin code base that the field's tables use:

* ``dense``: consecutive frames at a fixed stride, starting anywhere; short videos loop.
* ``uniform``: the whole video in equal segments, one frame from each (TSN).
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

__all__ = ["ClipSampling", "middle_only", "test_indices", "train_indices"]


@dataclass(frozen=True)
class ClipSampling:
    """How frames are picked.

    Args:
        kind: ``dense`` or ``uniform``.
        frames: frames per clip.
        stride: distance between frames, in frames; dense only.
    """

    kind: Literal["dense", "uniform"]
    frames: int
    stride: int = 1


def train_indices(total: int, sampling: ClipSampling, rng: random.Random) -> list[int]:
    """A random clip out of ``total`` frames."""
    if sampling.kind == "dense":
        span = sampling.frames * sampling.stride
        start = rng.randint(0, max(total - span, 0))
        return [(start + i * sampling.stride) % total for i in range(sampling.frames)]
    segment = total / sampling.frames
    return [min(int(segment * (i + rng.random())), total - 1) for i in range(sampling.frames)]


def test_indices(total: int, sampling: ClipSampling, clip: int = 0, clips: int = 1) -> list[int]:
    """Clip number ``clip`` of ``clips`` spread evenly over ``total`` frames, the same at every
    call.

    Dense clips start at the middle of equal parts of the possible offsets; uniform ones take the
    frames at the share ``(clip + 1) / (clips + 1)`` of each segment, so a single clip takes the
    middles.
    """
    if sampling.kind == "dense":
        free = max(total - sampling.frames * sampling.stride + 1, 1)
        start = int(free * (clip + 0.5) / clips)
        return [(start + i * sampling.stride) % total for i in range(sampling.frames)]
    segment = total / sampling.frames
    share = (clip + 1) / (clips + 1)
    return [min(int(segment * (i + share)), total - 1) for i in range(sampling.frames)]


test_indices.__test__ = False  # type: ignore[attr-defined]  # pytest would collect it by its name


def middle_only(indices: list[int]) -> list[int]:
    """The clip's middle frame in every place: what can be told from one frame alone."""
    return [indices[len(indices) // 2]] * len(indices)
