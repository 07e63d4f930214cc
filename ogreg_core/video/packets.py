"""What a file holds, read from its packets alone: no frame is decoded, a few milliseconds per clip.

The packet index answers four questions: which frames will be presented and when, where decoding can
start, whether decord can be trusted with the file, and whether the file is shorter than it claims.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from ogreg_core.errors import VideoError

__all__ = ["PacketIndex", "read_packet_index"]

# Containers without usable timestamps for seeking: read from the start and counted.
_SEQUENTIAL_CONTAINERS = {"mpeg", "mpegts", "asf", "avi"}
_TIMESTAMP_LIMIT = 2**31


@dataclass(frozen=True)
class PacketIndex:
    """The presented frames of the first video stream, in presentation order.

    Args:
        path: the file.
        container: FFmpeg's name of the format, for example ``mov,mp4,m4a,3gp,3g2,mj2``.
        codec: codec name such as ``h264``.
        width, height: as stored, before rotation.
        time_base: seconds per timestamp unit.
        pts: presentation timestamp of each frame, int64 ``[frames]``; empty for files that must be
            counted.
        keys: presentation timestamps of key frames, ascending.
        key_seeks: the timestamp to seek to for each key frame.
        frames: number of presented frames the packets promise.
        average_rate: frames per second as the container states it, 0 if unknown.
        stated_seconds: duration as the container states it, 0 if unknown.
        held_seconds: where the packets of all streams, sound included, end.
        stated_frames: frame count as the container states it, 0 if unknown.
        distrust: why decord must not read this file; empty when it may.
    """

    path: str
    container: str
    codec: str
    width: int
    height: int
    time_base: Fraction
    pts: np.ndarray
    keys: np.ndarray
    key_seeks: np.ndarray
    frames: int
    packets: int
    average_rate: float
    stated_seconds: float
    held_seconds: float
    stated_frames: int
    distrust: str

    @property
    def sequential(self) -> bool:
        """True if frames are found by counting from the start instead of by timestamp."""
        return len(self.pts) == 0

    @property
    def seconds(self) -> np.ndarray:
        """When each frame appears, seconds from the first one, float64 ``[frames]``."""
        if self.sequential:
            return np.arange(self.frames) / (self.average_rate or 25.0)
        return (self.pts - self.pts[0]) * float(self.time_base)


def read_packet_index(path: str | Path) -> PacketIndex:
    """Demultiplex ``path`` without decoding.

    Raises:
        VideoError: missing, empty, not a video, no video stream, unsupported codec, no frames.
    """
    path = str(path)
    _check_file(path)
    try:
        with av.open(path) as container:
            return _index_container(path, container)
    except av.error.FFmpegError as error:
        raise VideoError(
            f"{path} is not a video file that can be read",
            code="not-a-video",
            why=f"FFmpeg says: {error.strerror}",
            fix="check that the file was downloaded completely",
        ) from error


def _check_file(path: str) -> None:
    file = Path(path)
    if not file.exists():
        raise VideoError(f"{path} does not exist", code="missing", fix="check the path")
    if file.is_dir():
        raise VideoError(f"{path} is a folder, not a video file", code="not-a-video")
    if file.stat().st_size == 0:
        raise VideoError(
            f"{path} is empty (0 bytes)", code="empty", fix="fetch or copy the file again"
        )


def _index_container(path: str, container: av.container.InputContainer) -> PacketIndex:
    if not container.streams.video:
        kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
        raise VideoError(
            f"{path} has no video stream",
            code="no-video-stream",
            why=f"the file holds only: {kinds}",
        )
    stream = container.streams.video[0]
    if stream.codec_context is None:
        raise VideoError(
            f"{path} uses a video codec this FFmpeg does not know", code="unsupported-codec"
        )
    rows = []
    held = 0.0
    for packet in container.demux():
        if packet.size == 0:
            continue
        if packet.pts is not None and packet.time_base is not None:
            held = max(held, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        if packet.stream.index == stream.index:
            rows.append((packet.pts, packet.dts, packet.is_keyframe, packet.is_discard))
    discarded = sum(row[3] for row in rows)
    codec = stream.codec_context.codec.canonical_name
    if not rows:
        raise VideoError(f"{path} holds no video frames", code="truncated")
    name = container.format.name
    timed = all(row[0] is not None for row in rows) and len({row[0] for row in rows}) == len(rows)
    sequential = not timed or name in _SEQUENTIAL_CONTAINERS
    # Decoding starts at key frames; a discarded one (before an edit list's start) still serves.
    keys = sorted(
        (pts, pts if dts is None else min(pts, dts))
        for pts, dts, key, _ in rows
        if key and timed and pts is not None
    )
    # What is presented before the first key frame (a cut in mid-stream) cannot be decoded.
    first = keys[0][0] if keys else 0
    shown = [row for row in rows if not row[3] and (not timed or (row[0] or 0) >= first)]
    if not shown:
        raise VideoError(f"{path} holds no frame that can be decoded", code="truncated")
    return PacketIndex(
        path=path,
        container=name,
        codec=codec,
        width=stream.width,
        height=stream.height,
        time_base=stream.time_base or Fraction(1, 1000),
        pts=np.array([] if sequential else sorted(row[0] for row in shown), dtype=np.int64),
        keys=np.array([key[0] for key in keys], dtype=np.int64),
        key_seeks=np.array([key[1] for key in keys], dtype=np.int64),
        frames=len(shown),
        packets=len(rows),
        average_rate=float(stream.average_rate or 0),
        stated_seconds=(container.duration or 0) / av.time_base,
        held_seconds=held - (container.start_time or 0) / av.time_base,
        stated_frames=stream.frames,
        distrust=_why_not_decord(name, codec, rows, discarded, timed)
        or ("frames before the first key frame" if len(shown) + discarded < len(rows) else ""),
    )


def _why_not_decord(
    container: str,
    codec: str,
    rows: list[tuple[int | None, int | None, bool, bool]],
    discarded: int,
    timed: bool,
) -> str:
    """The guard: decord reads every file exactly that passes all of these, and some that fail
    wrongly in silence.
    """
    if codec == "av1":
        return "decord has no AV1 decoder"
    if container in _SEQUENTIAL_CONTAINERS - {"avi"}:
        return f"decord cannot seek in {container}"
    if discarded:
        return f"an edit list hides {discarded} frames"
    if container == "avi" and sum(row[2] for row in rows) > 1:
        return "an AVI with several key frames"
    if not timed:
        return "timestamps are missing or repeated"
    times = [row[0] for row in rows if row[0] is not None]
    if max(times) >= _TIMESTAMP_LIMIT:
        return "timestamps of 2^31 and above"
    rank = {pts: i for i, pts in enumerate(sorted(times))}
    if any(row[2] and rank[row[0]] != i for i, row in enumerate(rows) if row[0] is not None):
        return "open groups of pictures"
    return ""
