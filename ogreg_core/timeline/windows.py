"""Where the windows of a long video lie and which frames each takes; decided before decoding.

A window is sampled as if it were a video of its own, by the rule of every other video
(:mod:`ogreg_core.data.sampling`). Positions on the even time axis of the whole video are what windows
are measured in: frames, or moments of the nominal rate, looked up by time where frame times are uneven.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ogreg_core.checkpoint import CheckpointInfo
from ogreg_core.data.loader import Views
from ogreg_core.data.manifest import Row, load_manifest
from ogreg_core.data.sampling import clip_seconds, frame_numbers, positions
from ogreg_core.errors import DataError, UsageError

__all__ = ["Plan", "Window", "default_window"]

# Usual length of a video in seconds, for checkpoints whose training data are not at hand.
_TYPICAL_SECONDS = {
    "kinetics400": 10.0,
    "kinetics600": 10.0,
    "ssv2": 4.0,
    "diving48": 5.0,
    "ucf101": 7.0,
    "hmdb51": 3.0,
    "demo": 2.0625,
    "demo-hard": 2.0,
}


def default_window(info: CheckpointInfo, row: Row) -> tuple[float, str]:
    """What one training clip spans: seconds, and where that is known from.

    Args:
        info: the checkpoint.
        row: the video; its own rate counts where the checkpoint names none.

    Raises:
        UsageError: clips spanned whole videos, of which nothing is known.
    """
    sampling = info.sampling
    if sampling.kind == "dense":
        seconds = sampling.frames * sampling.stride / (sampling.fps or row.fps)
        return seconds, f"{sampling.frames} frames, {sampling.stride} apart, as in training"
    # A uniform clip spans its video.
    durations = _durations_at_hand(info)
    if durations:
        return statistics.median(durations), f"the median video of {info.dataset or 'its data set'}"
    if info.dataset in _TYPICAL_SECONDS:
        return _TYPICAL_SECONDS[info.dataset], f"the usual length of {info.dataset}'s videos"
    raise UsageError(
        "how long a window should be is not known",
        why="the checkpoint takes its frames from whole videos, and its data set is not at hand",
        fix="--window 4, or about as many seconds as the training videos had",
    )


def _durations_at_hand(info: CheckpointInfo) -> list[float]:
    """Seconds of the videos that the checkpoint was validated on; empty if they are elsewhere."""
    if not info.data_folder:
        return []
    try:
        rows = load_manifest(Path(info.data_folder), info.split).rows
    except (DataError, OSError):
        return []
    return [row.duration for row in rows]


@dataclass(frozen=True)
class Window:
    """A stretch of a video that is scored on its own.

    Args:
        number: from 0.
        start_s, end_s: seconds from the first frame.
        clips: frame numbers of each clip; clips that are all alike are named once.
    """

    number: int
    start_s: float
    end_s: float
    clips: list[list[int]]

    @property
    def frames(self) -> list[int]:
        """The different frames it needs, ascending."""
        return sorted({number for clip in self.clips for number in clip})


class Plan:
    """The windows of a video: one every ``hop_s`` seconds, and one that ends where the video ends.

    Args:
        row: the video.
        views: test protocol of each window.
        window_s: length; a video that is not longer is one window.
        hop_s: distance of their starts.
        look_up: frames at given seconds; called for videos of uneven frame times only.
    """

    def __init__(
        self,
        row: Row,
        views: Views,
        window_s: float,
        hop_s: float,
        look_up: Callable[[Sequence[float]], list[int]],
    ) -> None:
        self.row = row
        self.views = views
        self._look_up = look_up
        nominal = views.sampling.kind == "dense" and views.sampling.fps > 0
        self._rate = views.sampling.fps if nominal else row.frames / row.duration
        total = positions(row, views.sampling)
        self._length = min(max(round(window_s * self._rate), 1), total)
        end = total - self._length
        # Not multiples of a rounded hop, whose error would add up.
        count = int(end / (hop_s * self._rate) + 1e-6) + 1
        starts = [min(round(k * hop_s * self._rate), end) for k in range(count)]
        self._starts = list(dict.fromkeys([*starts, end]))
        clips = views.indices(self._length)
        # Their mean is that of one.
        alike = all(clip == clips[0] for clip in clips)
        self._clips = clips[:1] if alike else clips
        self._places = views.places(self._length)[: len(self._clips)]

    def __len__(self) -> int:
        return len(self._starts)

    @property
    def window_s(self) -> float:
        """Length of every window in seconds, to whole positions."""
        return min(self._length / self._rate, self.row.duration)

    def __getitem__(self, number: int) -> Window:
        start = self._starts[number]
        clips = [
            frame_numbers(
                [start + place for place in clip], self.row, self.views.sampling, self._look_up
            )
            for clip in self._clips
        ]
        last = start == self._starts[-1]
        ends_s = self.row.duration if last else (start + self._length) / self._rate
        return Window(number, start / self._rate, ends_s, clips)

    def times(
        self, window: Window, shown: Callable[[Sequence[int]], list[float]]
    ) -> list[list[float]]:
        """When the frames of each clip of a window appear as it is played, in seconds from the clip's
        first one.

        Args:
            window: one of these.
            shown: when frames appear in the file, by their numbers.
        """
        return [
            clip_seconds(places, shown(numbers), self._length, self.row, self.views.sampling)
            for places, numbers in zip(self._places, window.clips, strict=True)
        ]

    def needed(self) -> np.ndarray:
        """Whether any window takes a frame: bool ``[frames]``."""
        found = np.zeros(self.row.frames, dtype=bool)
        for number in range(len(self)):
            found[self[number].frames] = True
        return found
