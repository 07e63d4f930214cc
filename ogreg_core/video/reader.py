"""Probing and reading video files: what every command uses to get from a path to frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from torch import Tensor

from ogreg_core.errors import VideoError
from ogreg_core.video.decoders import (
    decord_available,
    display_rotation,
    iterate_frames,
    read_with_decord,
    read_with_pyav,
)
from ogreg_core.video.packets import PacketIndex, read_packet_index

__all__ = ["VideoInfo", "VideoReader", "probe", "read_frames"]

# Frame intervals may differ by this share of their median before a file counts as variable-rate;
# container time bases of a millisecond (Matroska) alone cause 3 % at 30 frames per second.
_RATE_TOLERANCE = 0.25


@dataclass(frozen=True)
class VideoInfo:
    """What ``probe`` finds out about a file.

    Args:
        path: the file.
        frames: presented frames.
        fps: mean frames per second over the presented frames.
        duration: seconds, from the first frame's appearance to the last one's end.
        width, height: pixels as displayed, after rotation.
        rotation: degrees by which stored frames are turned counter-clockwise for display.
        codec, container: FFmpeg's names.
        variable_rate: whether frame intervals differ by more than a quarter of their median.
        decoder: ``decord`` or ``pyav``, whichever reads this file exactly.
        reason: why decord was not chosen; empty if it was.
    """

    path: str
    frames: int
    fps: float
    duration: float
    width: int
    height: int
    rotation: int
    codec: str
    container: str
    variable_rate: bool
    decoder: str
    reason: str


class VideoReader:
    """Random access to the frames of one file, by index or by time.

    Args:
        path: the file.
        decoder: ``decord``, ``pyav``, or None to let the packets decide. Passing the decoder that
            ``probe`` found saves reading the packets again when decord serves.

    Raises:
        VideoError: on first use, if the file cannot be read.
    """

    def __init__(self, path: str | Path, decoder: str | None = None) -> None:
        self.path = str(path)
        self._decoder = decoder

    @cached_property
    def index(self) -> PacketIndex:
        """The packet index, read on first use."""
        return read_packet_index(self.path)

    @cached_property
    def decoder(self) -> str:
        """The decoder in use."""
        if self._decoder == "decord" and decord_available():
            return "decord"
        if self._decoder == "pyav" or not decord_available() or self.index.distrust:
            return "pyav"
        return "decord"

    def __len__(self) -> int:
        return self.index.frames

    def frames_at(self, indices: Sequence[int]) -> Tensor:
        """Frames by index, in any order, repeats allowed: uint8 ``[len(indices), H, W, 3]`` RGB,
        upright.

        Raises:
            VideoError: unreadable file, or an index past its end.
        """
        indices = [int(i) for i in indices]
        if not indices:
            raise VideoError(f"no frames of {self.path} were asked for", code="index")
        if self.decoder == "decord":
            if not Path(self.path).is_file():
                raise VideoError(
                    f"{self.path} does not exist", code="missing", fix="check the path"
                )
            return read_with_decord(self.path, indices)
        return read_with_pyav(self.index, indices)

    def indices_at(self, seconds: Sequence[float]) -> list[int]:
        """The frame on screen at each time, counted in seconds from the first frame; clamped to the
        file.
        """
        starts = self.index.seconds
        # A hair of slack: a time computed as i / fps may land just before the frame it names.
        found = (
            np.searchsorted(starts, np.asarray(seconds, dtype=np.float64) + 1e-6, side="right") - 1
        )
        return [int(i) for i in np.clip(found, 0, len(starts) - 1)]

    def frames_at_times(self, seconds: Sequence[float]) -> Tensor:
        """Frames on screen at the given times: uint8 ``[len(seconds), H, W, 3]`` RGB."""
        return self.frames_at(self.indices_at(seconds))

    def __iter__(self):  # type: ignore[no-untyped-def]
        """All frames in order as (seconds, uint8 ``[H, W, 3]``)."""
        return iterate_frames(self.index)


def read_frames(path: str | Path, indices: Sequence[int], decoder: str | None = None) -> Tensor:
    """Frames of one file by index: uint8 ``[len(indices), H, W, 3]``; see :class:`VideoReader`."""
    return VideoReader(path, decoder).frames_at(indices)


def probe(path: str | Path) -> VideoInfo:
    """Everything a manifest row needs; decodes the first, middle and last frame.

    Raises:
        VideoError: missing, empty, not a video, no video stream, truncated, or damaged file.
    """
    reader = VideoReader(path)
    index = reader.index
    _check_complete(index)
    reason = index.distrust
    wanted = sorted({0, index.frames // 2, index.frames - 1})
    try:
        sample = reader.frames_at(wanted)
    except VideoError:
        if reader.decoder == "pyav":
            raise
        # Some healthy files are beyond decord (odd widths with rotation); a damaged one fails here too.
        reader, reason = VideoReader(path, "pyav"), "decord fails on a frame"
        sample = reader.frames_at(wanted)
    height, width = sample.shape[1:3]
    seconds = index.seconds
    steps = np.diff(seconds)
    last_step = float(np.median(steps)) if len(steps) else 1.0 / (index.average_rate or 25.0)
    duration = float(seconds[-1]) + last_step
    variable = bool(len(steps)) and bool(
        np.max(np.abs(steps - np.median(steps))) > _RATE_TOLERANCE * np.median(steps)
    )
    return VideoInfo(
        path=index.path,
        frames=index.frames,
        fps=index.frames / duration,
        duration=duration,
        width=width,
        height=height,
        rotation=display_rotation(index.path),
        codec=index.codec,
        container=index.container,
        variable_rate=variable,
        decoder=reader.decoder,
        reason=reason,
    )


def _check_complete(index: PacketIndex) -> None:
    """Refuse a file that was cut off: its header promises more than it holds."""
    if index.stated_frames > index.packets:
        raise VideoError(
            f"{index.path} is cut off",
            code="truncated",
            why=f"its header promises {index.stated_frames} frames, {index.packets} are there",
            fix="fetch the file again",
        )
    # Sound counts: it may outlast the pictures. Half a second of slack for rounding in headers.
    if index.held_seconds < 0.9 * index.stated_seconds - 0.5:
        raise VideoError(
            f"{index.path} is cut off",
            code="truncated",
            why=f"its header promises {index.stated_seconds:.1f} s, it ends at {index.held_seconds:.1f} s",
            fix="fetch the file again",
        )
