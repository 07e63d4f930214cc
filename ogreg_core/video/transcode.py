"""Re-encoding videos for fast training reads: small, closed groups of pictures, same frame times."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.filter import Graph
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter

from ogreg_core.errors import UsageError, VideoError
from ogreg_core.video.packets import PacketIndex, read_packet_index

__all__ = ["TranscodeSettings", "expected_frames", "temporary_path", "transcode"]

# Rates such as 30000/1001 are exact with this denominator, and no time base becomes absurd.
_LARGEST_DENOMINATOR = 1001
# FFmpeg's mp4 writer doubles the ticks per second until there are at least so many.
_TICKS_PER_SECOND = 10_000
# decord misreads timestamps of 2^31 and above; half of that leaves room.
_TIMESTAMP_LIMIT = 2**30
# Containers round times, Matroska to a millisecond: the frame due at 66.67 ms says 67.
_LARGEST_ROUNDING = 0.0005
# FFmpeg filters that turn a frame counter-clockwise by so many quarters.
_TURNS: dict[int, list[tuple[str, str]]] = {
    0: [],
    1: [("transpose", "cclock")],
    2: [("hflip", ""), ("vflip", "")],
    3: [("transpose", "clock")],
}


@dataclass(frozen=True)
class TranscodeSettings:
    """How to re-encode.

    Args:
        short_side: pixels of the shorter side, even; smaller videos are not enlarged.
        fps: constant frames per second to resample to; 0 keeps every frame and its time.
        crf: x264's constant rate factor, 0 to 51; lower is better and larger.
        preset: x264 preset.
        gop: largest distance between key frames, in frames.

    Raises:
        UsageError: a value that cannot be encoded.
    """

    short_side: int = 256
    fps: float = 0.0
    crf: int = 20
    preset: str = "veryfast"
    gop: int = 15

    def __post_init__(self) -> None:
        if self.short_side < 2 or self.short_side % 2:
            raise UsageError(f"short side {self.short_side} is not an even number of pixels")
        if not 0 <= self.fps <= 1000:
            raise UsageError(f"{self.fps:g} frames per second is not within 0 to 1000")
        if not 0 <= self.crf <= 51:
            raise UsageError(f"crf {self.crf} is not within 0 to 51")
        if self.gop < 1:
            raise UsageError(f"{self.gop} frames between key frames are not 1 or more")

    def describe(self) -> str:
        """The settings as a short text that stays the same, for cache keys."""
        rate = f"{self.fps:.6g}fps" if self.fps else "times"
        return f"h264-s{self.short_side}-{rate}-crf{self.crf}-{self.preset}-gop{self.gop}"


def expected_frames(index: PacketIndex, settings: TranscodeSettings) -> int:
    """Frames that :func:`transcode` writes if everything decodes."""
    return sum(len(ticks) for ticks in _schedule(index, settings)[1])


def temporary_path(target: Path) -> Path:
    """Where a copy is written before it is complete."""
    # A fixed name: what a killed run leaves behind is overwritten by the next one.
    return target.with_name(f".{target.name}.tmp")


def transcode(source: str | Path, target: str | Path, settings: TranscodeSettings) -> int:
    """Re-encode the presented frames of the first video stream to an H.264 mp4 without sound.

    Upright, yuv420p in the source's colour range and matrix, pixels square as the decoders take
    them. A video that needs no scaling loses the last row or column of an odd side. The first frame
    appears at 0 s, the others as long after it as in the packet index. What does not decode leaves
    a gap. One thread; the same source gives the same bytes; the target appears complete or not at
    all.

    Args:
        source: any video that FFmpeg decodes; only read.
        target: the mp4; its folder must exist. Only one process at a time may write a target.
        settings: size, rate and quality.

    Returns:
        Frames written; fewer than :func:`expected_frames` says if the source is damaged.

    Raises:
        VideoError: the source cannot be read, or nothing in it decodes (``damaged``).
        UsageError: target and source are one file.
        OSError: the target cannot be written.
    """
    source, target = Path(source), Path(target)
    index = read_packet_index(source)
    if target.exists() and target.samefile(source):
        raise UsageError(f"{target} is the source itself", fix="choose another target")
    temporary = temporary_path(target)
    try:
        written = _encode(index, temporary, settings)
        if not written:
            raise VideoError(
                f"{source} cannot be decoded: its frames are damaged",
                code="damaged",
                why=f"none of {index.frames} frames decodes",
                fix="fetch the file again, or leave it out",
            )
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return written


def _rate(fps: float) -> Fraction:
    """As a fraction that H.264 and mp4 can hold; 25 for an unknown rate, as the index takes it."""
    return Fraction(fps or 25.0).limit_denominator(_LARGEST_DENOMINATOR) or Fraction(1, 1001)


def _schedule(index: PacketIndex, settings: TranscodeSettings) -> tuple[Fraction, list[list[int]]]:
    """Seconds per tick of the copy, and the ticks at which each source frame is written."""
    if settings.fps:
        return _resampled(index, _rate(settings.fps))
    if index.sequential:
        return 1 / _rate(index.average_rate), [[tick] for tick in range(index.frames)]
    ticks = index.pts - index.pts[0]
    # Without their common factor, long files with a fine time base stay below the limit.
    common = int(np.gcd.reduce(ticks)) or 1
    time_base, ticks = index.time_base * common, ticks // common
    scale = time_base.denominator
    while scale < _TICKS_PER_SECOND:
        scale *= 2
    if int(ticks[-1]) * time_base * scale >= _TIMESTAMP_LIMIT:
        rounded = np.round(ticks * float(time_base * _TICKS_PER_SECOND)).astype(np.int64)
        time_base = Fraction(1, _TICKS_PER_SECOND)
        # Each frame at least a tick after the one before, also where rounding makes them equal.
        order = np.arange(len(ticks))
        ticks = np.maximum.accumulate(rounded - order) + order
    return time_base, [[int(tick)] for tick in ticks]


def _resampled(index: PacketIndex, rate: Fraction) -> tuple[Fraction, list[list[int]]]:
    """At each tick of a constant rate the frame that is on screen."""
    starts = index.seconds
    last = float(np.median(np.diff(starts))) if len(starts) > 1 else 1 / (index.average_rate or 25)
    count = max(1, math.ceil((float(starts[-1]) + last) * rate - 1e-6))
    slack = 1e-6
    if not index.sequential:
        slack += min(float(index.time_base) / 2, _LARGEST_ROUNDING)
    times = np.arange(count) / float(rate) + slack
    schedule: list[list[int]] = [[] for _ in range(index.frames)]
    for tick, position in enumerate(np.searchsorted(starts, times, side="right") - 1):
        schedule[position].append(tick)
    return 1 / rate, schedule


def _presented(index: PacketIndex) -> Iterator[tuple[int, av.VideoFrame]]:
    """Every presented frame that decodes, with its position in presentation order."""
    positions = {int(pts): position for position, pts in enumerate(index.pts)}
    counter = itertools.count()
    following = 0
    with av.open(index.path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        stream.codec_context.thread_count = 1
        for packet in container.demux(stream):
            try:
                frames = stream.decode(packet)
            except av.error.FFmpegError:
                continue  # Damaged bytes: the decoder recovers at a later packet.
            for frame in frames:
                position = next(counter) if index.sequential else positions.get(frame.pts, -1)
                # A decoder that recovers from damage may repeat a frame or show it late.
                if following <= position < index.frames:
                    following = position + 1
                    yield position, frame


class _Fitter:
    """Makes frames upright yuv420p of one even size, inside FFmpeg and without a detour over RGB.

    A reformatter that is kept scales as fast as a filter graph (0.75 ms from 720p) and, unlike one,
    takes frames whose size or format changes in mid-stream. Turning and cropping are rare and use
    a graph.
    """

    def __init__(self, first: av.VideoFrame, short_side: int) -> None:
        width, height = first.width, first.height
        shorter = min(width, height)
        if shorter > short_side or shorter < 2:
            scale = min(short_side, max(shorter, 2)) / shorter
            width, height = (2 * max(1, round(side * scale / 2)) for side in (width, height))
        filters = list(_TURNS[round(first.rotation / 90) % 4])
        if width % 2 or height % 2:
            filters.insert(0, ("crop", f"{width // 2 * 2}:{height // 2 * 2}:0:0"))
        self._layout = {"width": width, "height": height, "format": "yuv420p"}
        if first.format.is_rgb:  # RGB has no matrix to keep; decoders assume this one.
            self._layout |= {
                "dst_colorspace": Colorspace.ITU601,
                "dst_color_range": ColorRange.MPEG,
            }
        self._reformatter = VideoReformatter()
        self._graph: Graph | None = None
        if filters:
            self._graph = _graph(self(first), filters)

    def __call__(self, frame: av.VideoFrame) -> av.VideoFrame:
        frame = self._reformatter.reformat(
            frame, interpolation="BICUBIC", threads=1, **self._layout
        )
        if self._graph is not None:
            self._graph.push(frame)
            frame = self._graph.pull()
        frame.pict_type = 0  # The source's picture types would force the encoder's.
        return frame


def _graph(sample: av.VideoFrame, filters: list[tuple[str, str]]) -> Graph:
    graph = Graph()
    graph.threads = 1
    source = graph.add(
        "buffer",
        video_size=f"{sample.width}x{sample.height}",
        pix_fmt=sample.format.name,
        time_base="1/1000",
        colorspace=str(int(sample.colorspace)),
        range=str(int(sample.color_range)),
    )
    nodes = [graph.add(name, arguments) for name, arguments in filters]
    graph.link_nodes(source, *nodes, graph.add("buffersink")).configure()
    return graph


def _encode(index: PacketIndex, path: Path, settings: TranscodeSettings) -> int:
    """Write the file; returns the number of frames, 0 if nothing decodes."""
    frames = _presented(index)
    first = next(frames, None)
    if first is None:
        return 0
    fit = _Fitter(first[1], settings.short_side)
    time_base, schedule = _schedule(index, settings)
    written = 0
    # bitexact: neither dates nor library versions in the container.
    options = {"movflags": "+faststart", "fflags": "+bitexact"}
    with av.open(str(path), "w", format="mp4", options=options) as container:
        stream = _add_stream(container, fit(first[1]), settings)
        stream.codec_context.time_base = time_base
        # What rate control reckons with; the times themselves come with the frames.
        stream.codec_context.framerate = _rate(settings.fps or index.average_rate)
        for position, frame in itertools.chain([first], frames):
            if not schedule[position]:
                continue
            fitted = fit(frame)
            fitted.time_base = time_base
            for tick in schedule[position]:
                fitted.pts = tick
                container.mux(stream.encode(fitted))
                written += 1
        container.mux(stream.encode(None))
    return written


def _add_stream(
    container: av.container.OutputContainer, sample: av.VideoFrame, settings: TranscodeSettings
) -> av.VideoStream:
    stream = container.add_stream("libx264")
    stream.options = {
        "crf": str(settings.crf),
        "preset": settings.preset,
        "tune": "fastdecode",
        # x264 165 weighs macroblocks over time (mbtree) with memory that it did not write, where it
        # has AVX-512: in one of thirty runs other bytes.
        "x264-params": "open-gop=0:mbtree=0",
        # Files without B-frames are read faster and need no edit list.
        "bf": "0",
    }
    context = stream.codec_context
    context.thread_count = 1
    context.gop_size = settings.gop
    context.width, context.height, context.pix_fmt = sample.width, sample.height, "yuv420p"
    context.sample_aspect_ratio = Fraction(1)
    for name in ("colorspace", "color_range", "color_trc", "color_primaries"):
        setattr(context, name, getattr(sample, name))
    return stream
