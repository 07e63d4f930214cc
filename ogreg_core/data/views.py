"""The test protocol: which clips and crops of a video are scored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast, get_args

from ogreg_core.data.order import sample_rng
from ogreg_core.data.sampling import (
    ClipSampling,
    Rate,
    check_rate,
    fold,
    middle_only,
    rated_frames,
    rated_places,
    test_places,
)
from ogreg_core.data.transforms import TestCrops

__all__ = ["FrameControl", "Views"]

FrameControl = Literal["none", "shuffled", "reversed", "middle", "half", "double", "irregular"]
_RATES = get_args(Rate)


@dataclass(frozen=True)
class Views:
    """The test protocol: which clips and crops of a video are scored.

    Args:
        sampling: how a clip's frames are picked.
        clips: clips per video, spread over time.
        crops: how each is cropped.
        control: ``none``; or frames ``shuffled`` (seeded per video), ``reversed``, or the
            ``middle`` one repeated, to find out how much of a score needs the order of frames; or
            clips over the same span at another rate, ``half`` or ``double`` as many frames, or as
            many at ``irregular`` places (drawn from the video's path), to find out whether a model
            stands it.

    Raises:
        UsageError: a rate at which there are no frames to take.
    """

    sampling: ClipSampling
    clips: int
    crops: TestCrops
    control: FrameControl = "none"

    def __post_init__(self) -> None:
        if self.control in _RATES:
            check_rate(self.sampling, cast(Rate, self.control))

    @property
    def count(self) -> int:
        """Views per video."""
        return self.clips * self.crops.crops

    @property
    def frames(self) -> int:
        """Frames per clip."""
        if self.control in _RATES:
            return rated_frames(self.sampling, cast(Rate, self.control))
        return self.sampling.frames

    def places(self, total: int, path: str = "") -> list[list[int]]:
        """Where each clip's frames lie as it is played, see :mod:`ogreg_core.data.sampling`.

        Args:
            total: positions of the video.
            path: of the video, from which irregular places are drawn.
        """
        numbers = range(self.clips)
        if self.control not in _RATES:
            return [test_places(total, self.sampling, clip, self.clips) for clip in numbers]
        rate = cast(Rate, self.control)
        return [
            rated_places(
                total, self.sampling, rate, clip, self.clips, sample_rng(0, 0, clip, rate, path)
            )
            for clip in numbers
        ]

    def indices(self, total: int, seed: int = 0, path: str = "") -> list[list[int]]:
        """Positions of each clip's frames out of ``total``, in the order in which the model gets them;
        frames, for videos of even rate.

        Args:
            total: positions of the video.
            seed: of the shuffling.
            path: see :meth:`places`.
        """
        clips = [fold(places, total, self.sampling) for places in self.places(total, path)]
        if self.control == "reversed":
            return [clip[::-1] for clip in clips]
        if self.control == "middle":
            return [middle_only(clip) for clip in clips]
        if self.control == "shuffled":
            rng = sample_rng(seed, 0, total)
            return [rng.sample(clip, len(clip)) for clip in clips]
        return clips
