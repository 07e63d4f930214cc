"""What a file holds and who reads it exactly: the check that every video passes before it is used."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ogreg_core.errors import VideoError
from ogreg_core.video.decoders import display_rotation
from ogreg_core.video.image import IMAGE_RATE, check_image
from ogreg_core.video.packets import PacketIndex
from ogreg_core.video.reader import VideoReader

__all__ = ["Verification", "VideoInfo", "describe", "probe"]

Verification = Literal["quick", "full"]

# Frame intervals may differ by this share of their median before a file counts as variable-rate;
# container time bases of a millisecond (Matroska) alone cause 3 % at 30 frames per second.
_RATE_TOLERANCE = 0.25
# Frames compared at a time in a full verification: memory of a 4K file stays below 2 GB.
_FULL_CHUNK = 32
# Mean absolute difference in grey levels up to which two decoders' frames are the same picture; they
# round the conversion to RGB differently.
_SAME_PICTURE = 2.0


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
        codec, container: FFmpeg's names; of an image Pillow's name and ``image``.
        variable_rate: whether frame intervals differ by more than a quarter of their median.
        decoder: ``image`` for images, ``decord`` if it may be trusted with this file, else ``pyav``.
        reason: why decord may not be; empty if it may.
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

    @property
    def reader(self) -> str:
        """The fastest of the decoders that read this file exactly, for the manifest."""
        return _reader(self.codec, self.decoder)


def _reader(codec: str, decoder: str) -> str:
    """Of H.264 PyAV need not decode pictures that nothing depends on; training clips of raw files are
    read 1.2 to 1.6 times as fast as by decord (tests/benchmarks/loader.py).
    """
    return "pyav" if codec == "h264" else decoder


def probe(
    path: str | Path, verification: Verification = "quick", index: PacketIndex | None = None
) -> VideoInfo:
    """Everything a manifest row needs.

    ``quick`` decodes the first, middle and last frame, in two orders: frames that depend on what was
    read before are found out. ``full`` also decodes everything once and compares every frame of the
    chosen decoder with it. Images: see :func:`ogreg_core.video.image.check_image`.

    Args:
        path: the file.
        verification: how much to decode.
        index: the packet index if it was read before.

    Raises:
        VideoError: with the code of what is wrong: missing, empty, not-a-video, no-video-stream,
            unsupported-codec, truncated, frame-count, negative-timestamps, seek-unstable, damaged;
            of an image not-an-image or unreadable.
    """
    first = VideoReader(path, index=index)
    if first.decoder == "image":
        return _probe_image(first.path, verification)
    index = first.index
    _check_complete(index)
    decoder, reason = first.decoder, index.distrust
    checked = _reader(index.codec, decoder)
    try:
        sample = _check(VideoReader(path, checked, index), verification)
    except VideoError as error:
        if checked == "pyav":
            raise _explained(error, index) from error
        # Some healthy files are beyond decord (odd widths with rotation); a damaged one fails here too.
        decoder, reason = "pyav", f"decord fails: {error.why or error.what}"
        try:
            sample = _check(VideoReader(path, "pyav", index), verification)
        except VideoError as second:
            raise _explained(second, index) from second
    height, width = sample.shape[1:3]
    return describe(index, height, width, display_rotation(index.path), decoder, reason)


def describe(
    index: PacketIndex, height: int, width: int, rotation: int, decoder: str, reason: str
) -> VideoInfo:
    """What packets and one upright frame tell about a file.

    Args:
        index: its packets.
        height, width, rotation, decoder, reason: see :class:`VideoInfo`.
    """
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
        rotation=rotation,
        codec=index.codec,
        container=index.container,
        variable_rate=variable,
        decoder=decoder,
        reason=reason,
    )


def _probe_image(path: str, verification: Verification) -> VideoInfo:
    header = check_image(path, verification)
    return VideoInfo(
        path=path,
        frames=1,
        fps=IMAGE_RATE,
        duration=1 / IMAGE_RATE,
        width=header.width,
        height=header.height,
        rotation=header.rotation,
        codec=header.codec,
        container="image",
        variable_rate=False,
        decoder="image",
        reason="an image",
    )


def _check(reader: VideoReader, verification: Verification) -> Tensor:
    """First, middle and last frame, uint8 ``[1 to 3, H, W, 3]``, after all checks were passed."""
    wanted = sorted({0, reader.index.frames // 2, reader.index.frames - 1})
    sample = reader.frames_at(wanted)
    # Backwards: a decoder with a memory of what it read gives other frames now.
    if len(wanted) > 1 and not torch.equal(reader.frames_at(wanted[::-1]).flip(0), sample):
        raise _unstable(reader.path, "the same frames differ when read in another order")
    if verification == "full":
        _check_all(reader)
    return sample


def _check_all(reader: VideoReader) -> None:
    frames = 0
    for reference in _in_chunks(reader, _FULL_CHUNK):
        # Each chunk is read from a newly opened file, which has to seek to it.
        found = reader.frames_at(range(frames, frames + len(reference)))
        if found.shape != reference.shape:
            raise _unstable(reader.path, "the picture changes its size")
        difference = (found.int() - reference.int()).abs().flatten(1).float().mean(dim=1)
        if bool((difference > _SAME_PICTURE).any()):
            wrong = frames + int(difference.argmax())
            raise _unstable(reader.path, f"frame {wrong} is another one when read directly")
        frames += len(reference)
    if frames != reader.index.frames:
        raise VideoError(
            f"{reader.path} does not hold the frames it promises",
            code="frame-count",
            why=f"{frames} of {reader.index.frames} frames decode",
            fix="fetch the file again, or leave it out",
        )


def _in_chunks(reader: VideoReader, size: int) -> Iterator[Tensor]:
    frames = iter(reader)
    while chunk := [frame for _, frame in islice(frames, size)]:
        if len({frame.shape for frame in chunk}) > 1:
            raise _unstable(reader.path, "the picture changes its size")
        yield torch.stack(chunk)


def _unstable(path: str, why: str) -> VideoError:
    return VideoError(
        f"{path} cannot be read frame by frame",
        code="seek-unstable",
        why=why,
        fix="re-encode the file with ffmpeg, or leave it out",
    )


def _explained(error: VideoError, index: PacketIndex) -> VideoError:
    """Name the cause rather than the symptom where the packets show one."""
    if error.code != "damaged" or index.sequential or index.pts[0] >= 0:
        return error
    return VideoError(
        f"{index.path} has frames before time zero that cannot be decoded",
        code="negative-timestamps",
        why=f"its first frame is at {float(index.pts[0] * index.time_base):.3f} s",
        fix="re-encode the file with ffmpeg, or leave it out",
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
