"""Frame times for networks that ask when a token is seen, and not only as which one.

A clip's times are seconds from its first frame, ``[B, T]``. A token frame is made of two frames
(:mod:`ogreg_core.models.stems`), so its time is the mean of theirs. It is counted in token frames of a
fixed reference rate: of a clip at that rate the coordinates are the numbers of the token frames. Only
differences of coordinates should matter to a network.

Notation: B batch, T frames, t token frames.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ogreg_core.errors import UsageError
from ogreg_core.models.protocol import takes_times
from ogreg_core.models.stems import repeat_edge_frames

__all__ = ["REFERENCE_SECONDS", "Clock", "given_times", "token_coordinates"]

REFERENCE_SECONDS = 1 / 4
"""Between token frames at the reference rate: every second frame of video at 16 per second, as in the
study of frame times, where counting seconds and counting frames are then the same in training; and a
power of two, so that dividing by it does not round.
"""


def token_coordinates(times: Tensor) -> Tensor:
    """When each token frame is seen, in reference intervals: ``[B, T] -> [B, ceil(T / 2)]``, from 0.

    Of an odd number of frames the stem repeats the last one; so its time is.

    Args:
        times: seconds from any moment.
    """
    pairs = repeat_edge_frames(times, 0, times.shape[1] % 2, dim=1).unflatten(1, (-1, 2))
    seconds = pairs.mean(dim=2)
    return (seconds - seconds[:, :1]) / REFERENCE_SECONDS


@dataclass
class Clock:
    """What the parts of a network are told about time in the pass that is under way, or was the last.

    Args:
        given: frame times of the clips, ``[B, T]``; None: they are at the reference rate.
        coordinates: of their token frames, ``[B, t]``, or ``[1, t]`` at the reference rate; None as long
            as the network has seen no clip.
    """

    given: Tensor | None = None
    coordinates: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Copies of a network (moving averages) begin without: their clips are others.
        return {"given": None, "coordinates": None}

    def read(self, clip: Tensor) -> None:
        """Note the times of clips ``[B, 3, T, H, W]`` that are about to pass.

        Raises:
            ValueError: the given times are those of other clips.
        """
        batch, _, frames = clip.shape[:3]
        if self.given is None:
            tokens = -(-frames // 2)
            self.coordinates = torch.arange(tokens, device=clip.device)[None].float()
            return
        if self.given.shape != (batch, frames):
            raise ValueError(
                f"times {tuple(self.given.shape)} of {batch} clips of {frames} frames each"
            )
        self.coordinates = token_coordinates(self.given.to(clip.device))

    def now(self, tokens: Tensor) -> Tensor:
        """The coordinates of the token frames in ``[B, t, ...]``: ``[B, t]`` or ``[1, t]``.

        Raises:
            UsageError: they are not the token frames of a whole clip.
        """
        found = self.coordinates
        if found is None or found.shape[1] != tokens.shape[1]:
            raise UsageError(
                "model option position='rotary-seconds' needs all frames of a clip",
                why="token selection takes some of them away",
                fix="take model.token_selection out of the recipe",
            )
        return found


@contextmanager
def given_times(model: nn.Module, times: Tensor | None) -> Iterator[None]:
    """While active, every pass through the model is one of clips of these times, also those that cannot
    be told, such as of ``forward_with_maps``. Models that take no times are left alone.

    Args:
        model: answers the protocol ``VideoModel``; one that takes times has a ``clock``.
        times: ``[B, T]`` in seconds; None: what is given already, or else the reference rate.
    """
    if times is None or not takes_times(model):
        yield
        return
    clock = cast(Clock, model.clock)
    before, clock.given = clock.given, times
    try:
        yield
    finally:
        clock.given = before
