"""What a file holds, read from its packets alone: no frame is decoded, a few milliseconds per clip.

The packet index answers four questions: which frames will be presented and when, where decoding can
start, whether decord can be trusted with the file, and whether the file is shorter than it claims.
The frame index answers the first two, which is all that reading needs; some files hold it in a table.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TypeAlias

import av
import numpy as np

from ogreg_core.errors import VideoError

__all__ = ["FrameIndex", "PacketIndex", "open_video", "read_frame_index", "read_packet_index"]

# A packet: presentation and decoding timestamp, key frame or not, hidden by an edit list or not.
_Packet: TypeAlias = "tuple[int | None, int | None, bool, bool]"

# Containers without usable timestamps for seeking: read from the start and counted.
_SEQUENTIAL_CONTAINERS = {"mpeg", "mpegts", "asf", "avi"}
_TIMESTAMP_LIMIT = 2**31


@dataclass(frozen=True)
class FrameIndex:
    """The presented frames of the first video stream, in presentation order.

    Args:
        path: the file.
        time_base: seconds per timestamp unit.
        pts: presentation timestamp of each frame, int64 ``[frames]``; empty for files that must be
            counted.
        keys: presentation timestamps of key frames, ascending.
        key_seeks: for each key frame the earlier of its two timestamps, for containers that seek by
            the time of decoding.
        frames: number of presented frames the packets promise.
        average_rate: frames per second as the container states it, 0 if unknown.
    """

    path: str
    time_base: Fraction
    pts: np.ndarray
    keys: np.ndarray
    key_seeks: np.ndarray
    frames: int
    average_rate: float

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


@dataclass(frozen=True)
class PacketIndex(FrameIndex):
    """The frames, and what else the packets tell about the file.

    Args:
        container: FFmpeg's name of the format, for example ``mov,mp4,m4a,3gp,3g2,mj2``.
        codec: codec name such as ``h264``.
        width, height: as stored, before rotation.
        packets: of the video stream, presented or not.
        stated_seconds: duration as the container states it, 0 if unknown.
        held_seconds: where the packets of all streams, sound included, end.
        stated_frames: frame count as the container states it, 0 if unknown.
        distrust: why decord must not read this file; empty when it may.
    """

    container: str
    codec: str
    width: int
    height: int
    packets: int
    stated_seconds: float
    held_seconds: float
    stated_frames: int
    distrust: str


def read_packet_index(path: str | Path) -> PacketIndex:
    """Demultiplex ``path`` without decoding.

    Raises:
        VideoError: missing, empty, not a video, no video stream, unsupported codec, no frames.
    """
    path = str(path)
    container, stream = open_video(path)
    with container:
        return _from_packets(path, container, stream)


def read_frame_index(
    path: str, container: av.container.InputContainer, stream: av.VideoStream
) -> FrameIndex:
    """The frames of an open file, from its table if that is certain to say what its packets do.

    May leave the container at its end.

    Raises:
        VideoError: as :func:`read_packet_index`.
    """
    return _from_table(path, container, stream) or _from_packets(path, container, stream)


def open_video(path: str) -> tuple[av.container.InputContainer, av.VideoStream]:
    """The opened file and its first video stream, to be decoded in one thread.

    Raises:
        VideoError: missing, empty, not a video, no video stream, unsupported codec.
    """
    _check_file(path)
    try:
        container = av.open(path)
    except av.error.FFmpegError as error:
        raise _not_a_video(path, error) from error
    try:
        stream = _video_stream(path, container)
    except VideoError:
        container.close()
        raise
    stream.thread_type = "NONE"
    stream.codec_context.thread_count = 1
    return container, stream


def _not_a_video(path: str, error: av.error.FFmpegError) -> VideoError:
    return VideoError(
        f"{path} is not a video file that can be read",
        code="not-a-video",
        why=f"FFmpeg says: {error.strerror}",
        fix="check that the file was downloaded completely",
    )


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


def _video_stream(path: str, container: av.container.InputContainer) -> av.VideoStream:
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
    return stream


def _from_table(
    path: str, container: av.container.InputContainer, stream: av.VideoStream
) -> FrameIndex | None:
    """The frames as an mp4's own table lists them, without reading a packet: 0.3 instead of 1 to 4 ms.

    The table holds times of decoding. They are those of presentation unless the header has offsets
    between the two (ctts), which FFmpeg does not hand out. None for such files, for fragmented ones,
    whose table is incomplete (mvex), for packed headers (cmov), and wherever the table does not
    account for every frame with bytes that are there.
    """
    if "mp4" not in container.format.name.split(","):
        return None
    header = _movie_header(path)
    if not header or any(box in header for box in (b"ctts", b"mvex", b"cmov")):
        return None
    table = [
        (entry.timestamp, entry.pos, entry.size, entry.is_keyframe, entry.is_discard)
        for entry in stream.index_entries
    ]
    if not table or len(table) != stream.frames or not table[0][3]:
        return None
    held = Path(path).stat().st_size
    if any(hidden or size <= 0 or pos + size > held for _, pos, size, _, hidden in table):
        return None
    pts = np.array([row[0] for row in table], dtype=np.int64)
    if np.any(np.diff(pts) <= 0):
        return None
    keys = np.array([row[0] for row in table if row[3]], dtype=np.int64)
    return FrameIndex(
        path=path,
        time_base=stream.time_base or Fraction(1, 1000),
        pts=pts,
        keys=keys,
        key_seeks=keys,
        frames=len(table),
        average_rate=float(stream.average_rate or 0),
    )


def _movie_header(path: str) -> bytes:
    """The contents of an mp4's moov box; empty if there is none."""
    start = 0
    with open(path, "rb") as file:
        while len(head := file.read(16)) >= 8:
            size = int.from_bytes(head[:4], "big")
            if size == 1:
                size = int.from_bytes(head[8:], "big")
            if head[4:8] == b"moov":
                file.seek(start)
                return file.read(size or -1)
            if size < 8:
                break
            start += size
            file.seek(start)
    return b""


def _from_packets(
    path: str, container: av.container.InputContainer, stream: av.VideoStream
) -> PacketIndex:
    rows: list[_Packet] = []
    held = 0.0
    refreshed = False
    codec = stream.codec_context.codec.canonical_name
    try:
        for packet in container.demux():
            if packet.size == 0:
                continue
            if packet.pts is not None and packet.time_base is not None:
                held = max(held, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            if packet.stream.index == stream.index:
                if rows and packet.is_keyframe and codec == "h264":
                    refreshed |= not _is_clean_start(packet, stream.codec_context.extradata or b"")
                rows.append((packet.pts, packet.dts, packet.is_keyframe, packet.is_discard))
    except av.error.FFmpegError as error:
        raise _not_a_video(path, error) from error
    discarded = sum(row[3] for row in rows)
    if not rows:
        raise VideoError(f"{path} holds no video frames", code="truncated")
    name = container.format.name
    timed = all(row[0] is not None for row in rows) and len({row[0] for row in rows}) == len(rows)
    # Where a damaged table marks no key frame there is nothing to seek to either.
    sequential = not timed or name in _SEQUENTIAL_CONTAINERS or not any(row[2] for row in rows)
    # Decoding starts at key frames; a discarded one (before an edit list's start) still serves. FFmpeg
    # marks some lone intra pictures of H.264 too, to which no container seeks.
    sought = {entry.timestamp for entry in stream.index_entries if entry.is_keyframe}
    marked = [(row[0], row[1]) for row in rows if row[2] and timed and row[0] is not None]
    keys = sorted(
        (pts, pts if dts is None else min(pts, dts))
        for place, (pts, dts) in enumerate(marked)
        if pts is not None and (place == 0 or not sought or pts in sought or dts in sought)
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
        pts=np.array(
            [] if sequential else sorted(row[0] for row in shown if row[0] is not None),
            dtype=np.int64,
        ),
        keys=np.array([key[0] for key in keys], dtype=np.int64),
        key_seeks=np.array([key[1] for key in keys], dtype=np.int64),
        frames=len(shown),
        packets=len(rows),
        average_rate=float(stream.average_rate or 0),
        stated_seconds=(container.duration or 0) / av.time_base,
        held_seconds=held - (container.start_time or 0) / av.time_base,
        stated_frames=stream.frames,
        distrust=_why_not_decord(name, codec, rows, discarded, timed)
        or ("frames before the first key frame" if len(shown) + discarded < len(rows) else "")
        or ("key frames that are no clean starts" if refreshed else ""),
    )


def _is_clean_start(packet: av.Packet, extradata: bytes) -> bool:
    """Whether an H.264 key frame is one picture on its own: its first slice is coded intra.

    Streams that are refreshed bit by bit have recovery points instead, which FFmpeg takes for key
    frames too; decord shows the pictures after them before they are complete.
    """
    content = bytes(packet)
    if extradata.startswith(b"\x01"):  # units after their lengths
        width, at, units = (extradata[4] & 3) + 1, 0, []
        while at + width < len(content):
            size = int.from_bytes(content[at : at + width], "big")
            units.append(content[at + width : at + width + min(size, 9)])
            at += width + size
    else:  # units after start codes
        units = [unit[:9] for unit in content.split(b"\0\0\1")[1:]]
    for unit in units:
        if unit and unit[0] & 31 in (1, 2, 5):
            bits = "".join(f"{byte:08b}" for byte in unit[1:])
            _, bits = _exp_golomb(bits)  # first macroblock
            return _exp_golomb(bits)[0] % 5 in (2, 4)  # I, SI
    return True


def _exp_golomb(bits: str) -> tuple[int, str]:
    """The first number of a bit string as H.264 codes them (9.1), and the rest."""
    zeros = len(bits) - len(bits.lstrip("0"))
    return int(bits[zeros : 2 * zeros + 1] or "1", 2) - 1, bits[2 * zeros + 1 :]


def _why_not_decord(
    container: str,
    codec: str,
    rows: list[_Packet],
    discarded: int,
    timed: bool,
) -> str:
    """The guard: decord reads every file exactly that passes all of these, and some that fail
    wrongly in silence.
    """
    if codec == "av1":
        return "decord has no AV1 decoder"
    if container in _SEQUENTIAL_CONTAINERS:
        # In AVI it goes wrong for certain with several key frames, and now and then with one.
        return f"decord cannot seek in {container}"
    if discarded:
        return f"an edit list hides {discarded} frames"
    if not timed:
        return "timestamps are missing or repeated"
    times = [row[0] for row in rows if row[0] is not None]
    if max(times) >= _TIMESTAMP_LIMIT:
        return "timestamps of 2^31 and above"
    rank = {pts: i for i, pts in enumerate(sorted(times))}
    if any(row[2] and rank[row[0]] != i for i, row in enumerate(rows) if row[0] is not None):
        return "open groups of pictures"
    return ""
