"""The two decoders. The only module that imports decord, and it imports torch first.

(decord#293: importing decord before torch can crash a process that uses CUDA.) decord has wheels
for x86-64 Linux and Windows only; elsewhere ``decord`` is None here and PyAV reads everything.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from torch import Tensor

from ogreg_core.errors import VideoError
from ogreg_core.video.packets import FrameIndex, open_video, read_frame_index

try:
    import decord
except ImportError:
    decord = None
else:
    # Damaged files make it write up to 37 kB to stderr; the exception carries what matters.
    decord.logging.set_level(decord.logging.QUIET)

__all__ = [
    "decord_available",
    "display_rotation",
    "iterate_frames",
    "read_with_decord",
    "read_with_pyav",
    "stream_frames",
]

# From this reduction of the area on, scaling before the conversion to RGB is the faster order.
_SCALE_FIRST = 3.0
# Where the next key frame is at most so many frames off, decoding up to it costs less than a seek.
_DECODE_ON = 2


def decord_available() -> bool:
    """Whether decord is installed on this machine."""
    return decord is not None


def damaged(path: str, why: str) -> VideoError:
    """The error for a file whose container is fine and whose frames are not."""
    return VideoError(
        f"{path} cannot be decoded: its frames are damaged",
        code="damaged",
        why=why,
        fix="fetch the file again, or leave it out",
    )


def read_with_decord(
    path: str, indices: Sequence[int], size: tuple[int, int] | None = None
) -> Tensor:
    """Frames by index through decord, scaled to ``size`` (height, width) if given: uint8
    ``[len(indices), H, W, 3]`` RGB.

    Opens, reads once and drops the reader: decord reads ahead without bound, so a kept reader
        grows.

    Raises:
        VideoError: damaged file, or an index past its end.
    """
    try:
        height, width = size or (-1, -1)
        reader = decord.VideoReader(path, num_threads=1, width=width, height=height)
        # Each frame once, in the order asked for: decord decodes repeated ones again.
        places = {index: place for place, index in enumerate(dict.fromkeys(indices))}
        frames = torch.from_numpy(reader.get_batch(list(places)).asnumpy())
        if len(places) == len(indices):
            return frames
        return frames[[places[index] for index in indices]]
    except IndexError as error:
        raise index_error(path, max(indices), len(reader)) from error
    # decord raises its own error class or a bare RuntimeError, with C++ file names in the text.
    except (RuntimeError, decord.DECORDError) as error:
        raise damaged(path, "decord failed on a frame") from error


def index_error(path: str, index: int, frames: int) -> VideoError:
    """The error for a frame index outside the file."""
    return VideoError(
        f"{path} has no frame {index}",
        code="index",
        why=f"it holds {frames} frames",
        fix="run `ogreg prepare` again if the file has changed",
    )


class _Converter:
    """Makes frames upright RGB pixels ``[H, W, 3]`` of one size (height, width).

    The scaler's tables are made once: a reformatter is kept, where ``frame.reformat`` makes a new
    one for each frame. One thread: a pool per worker process makes busy cores slower.

    FFmpeg's bilinear filter widens with the reduction as torch's antialiased one does. Measured
    against that on real clips scaled to half, bilinear gives 40 to 45 dB, area 37 to 41, and the
    fast variant, which leaves pixels out, 28 to 33. From 720p to 256 pixels it takes 1.4 ms straight
    to RGB, but 0.8 ms by way of yuv444p, which keeps the colours' resolution (44.7 instead of 45.1
    dB); yuv420p takes 0.4 ms and loses up to 7 dB.
    """

    def __init__(self, size: tuple[int, int] | None = None) -> None:
        self._size = size
        self._scale = VideoReformatter()
        self._convert = VideoReformatter()

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        turns = round(frame.rotation / 90) % 4
        height, width = frame.height, frame.width
        if self._size:
            height, width = self._size[::-1] if turns % 2 else self._size
        target = {"width": width, "height": height, "interpolation": "BILINEAR", "threads": 1}
        reduced = frame.width * frame.height >= _SCALE_FIRST * width * height
        if reduced and frame.format.name == "yuv420p":
            frame = self._scale.reformat(frame, format="yuv444p", **target)
        pixels: np.ndarray = self._convert.reformat(frame, format="rgb24", **target).to_ndarray()
        return np.ascontiguousarray(np.rot90(pixels, turns)) if turns else pixels


class _Clip:
    """The wanted frames, in one array that is allocated once."""

    def __init__(self, path: str, indices: Sequence[int], size: tuple[int, int] | None) -> None:
        self.path = path
        self.missing = set(indices)
        self._slots: dict[int, list[int]] = {}
        for slot, index in enumerate(indices):
            self._slots.setdefault(index, []).append(slot)
        self._count = len(indices)
        self._converted = _Converter(size)
        self.pixels: np.ndarray | None = None

    def put(self, index: int, frame: av.VideoFrame) -> None:
        """Keep a decoded frame."""
        pixels = self._converted(frame)
        if self.pixels is None:
            self.pixels = np.empty((self._count, *pixels.shape), np.uint8)
        if pixels.shape != self.pixels.shape[1:]:
            raise damaged(self.path, "the picture changes its size")
        for slot in self._slots[index]:
            self.pixels[slot] = pixels
        self.missing.discard(index)


def display_rotation(path: str) -> int:
    """Degrees, a multiple of 90 in [0, 360), by which stored frames are turned counter-clockwise
    for display.
    """
    container, stream = open_video(path)
    with container:
        frame = next(_decoded(path, container, stream), None)
    return 0 if frame is None else round(frame.rotation / 90) % 4 * 90


def _decoded(
    path: str, container: av.container.InputContainer, stream: av.VideoStream
) -> Iterator[av.VideoFrame]:
    try:
        yield from container.decode(stream)
    except av.error.FFmpegError as error:
        raise damaged(path, f"FFmpeg says: {error.strerror}") from error


def read_with_pyav(
    path: str,
    indices: Sequence[int],
    size: tuple[int, int] | None = None,
    index: FrameIndex | None = None,
) -> Tensor:
    """Frames by index through PyAV, driven by the frame index, scaled to ``size`` (height, width)
    if given: uint8 ``[len(indices), H, W, 3]`` RGB.

    Seeks to the key frame at or before each wanted frame and decodes up to it; files without usable
    timestamps are read from the start and counted.

    Args:
        path: the file.
        indices: 0-based, in any order, repeats allowed.
        size: (height, width) of the result.
        index: the file's frames if known already.

    Raises:
        VideoError: unreadable or damaged file, or an index past its end.
    """
    container, stream = open_video(path)
    with container:
        index = index or read_frame_index(path, container, stream)
        if max(indices) >= index.frames or min(indices) < 0:
            raise index_error(path, max(indices), index.frames)
        clip = _Clip(path, indices, size)
        if not index.sequential:
            try:
                _read_seeking(index, container, stream, clip)
            except av.error.FFmpegError as error:
                raise damaged(path, f"FFmpeg says: {error.strerror}") from error
    if index.sequential:
        _read_counting(path, clip)
    if clip.missing or clip.pixels is None:
        raise damaged(path, f"frame {min(clip.missing)} of {index.frames} does not decode")
    return torch.from_numpy(clip.pixels)


def _read_counting(path: str, clip: _Clip) -> None:
    container, stream = open_video(path)
    last = max(clip.missing)
    with container:
        for position, frame in enumerate(_decoded(path, container, stream)):
            if position in clip.missing:
                clip.put(position, frame)
            if position >= last:
                break


def _read_seeking(
    index: FrameIndex,
    container: av.container.InputContainer,
    stream: av.VideoStream,
    clip: _Clip,
) -> None:
    # Nothing in H.264 is predicted from a picture marked as no reference (7.4.1, nal_ref_idc), and
    # x264 marks half or more of them so: where they are not wanted, the decoder may leave them out.
    left_out = "NONREF" if stream.codec_context.codec.name == "h264" else "DEFAULT"
    for key, members in _groups(index, sorted(clip.missing)):
        _read_group(index, container, stream, clip, key, members, left_out)
    if clip.missing and len(index.keys):
        # From the start and with every picture: for streams that are refreshed bit by bit, whose
        # "key frames" are no clean starts, and for decoders that take what is left out for damage.
        _read_group(index, container, stream, clip, 0, sorted(clip.missing), "DEFAULT")


def _read_group(
    index: FrameIndex,
    container: av.container.InputContainer,
    stream: av.VideoStream,
    clip: _Clip,
    key: int,
    members: Sequence[int],
    left_out: str,
) -> None:
    """Decode from a key frame to the last of some wanted frames; give up if it is no clean start."""
    context = stream.codec_context
    wanted = {int(index.pts[i]): i for i in members}
    last, start = max(wanted), int(index.keys[key])
    # The first frame of all may be hidden by an edit list, and there is no other to start from.
    clean = key == 0
    for packet in _packets(index, container, stream, key):
        needed = packet.is_keyframe or packet.pts in wanted
        context.skip_frame = "DEFAULT" if needed else left_out
        for frame in packet.decode():
            clean = clean or frame.pts == start
            if frame.pts is None or (frame.pts > start and not clean):
                return
            if frame.pts in wanted:
                clip.put(wanted[frame.pts], frame)
            if frame.pts >= last:
                return


def _groups(index: FrameIndex, wanted: Sequence[int]) -> list[tuple[int, list[int]]]:
    """Wanted frames that are decoded in one go, each group with the key frame it starts from."""
    starts = np.searchsorted(index.keys, index.pts[wanted], side="right") - 1
    key_frames = np.searchsorted(index.pts, index.keys)
    groups: list[tuple[int, list[int]]] = []
    reached = -1
    for i, key in zip(wanted, np.maximum(starts, 0).tolist(), strict=True):
        on = groups and key_frames[key] - groups[-1][1][-1] <= _DECODE_ON
        if key == reached or on:
            groups[-1][1].append(i)
        else:
            groups.append((key, [i]))
        reached = key
    return groups


def _packets(
    index: FrameIndex,
    container: av.container.InputContainer,
    stream: av.VideoStream,
    key: int,
) -> Iterator[av.Packet]:
    """The stream from a key frame on, or from an earlier one where the container finds no other."""
    # The time of presentation first: sought by the earlier time of decoding, FFmpeg's mp4 reader
    # begins one key frame too early. Containers that seek by decoding may come out too late with it.
    for time in (index.keys[key], index.key_seeks[key], index.key_seeks[0]):
        container.seek(int(time), stream=stream, backward=True)
        packets = container.demux(stream)
        first = next(packets)
        if first.is_keyframe and first.pts is not None and first.pts <= index.keys[key]:
            break
    return chain([first], packets)


def iterate_frames(index: FrameIndex) -> Iterator[tuple[float, Tensor]]:
    """All presented frames in order as (seconds, uint8 ``[H, W, 3]``), one in memory at a time.

    Raises:
        VideoError: damaged file.
    """
    seconds = index.seconds
    converted = _Converter()
    container, stream = open_video(index.path)
    with container:
        for position, frame in enumerate(_decoded(index.path, container, stream)):
            if position < len(seconds):
                yield float(seconds[position]), torch.from_numpy(converted(frame))


def stream_frames(
    index: FrameIndex, wanted: np.ndarray, size: tuple[int, int] | None = None
) -> Iterator[tuple[int, Tensor]]:
    """Some frames of a long file in one pass, in order of presentation, one in memory at a time; only
    these are converted and scaled.

    Made for files of which as much as possible is to be read: damaged packets are passed over, and where
    the container itself is broken the frames end. Whoever counts them knows what is missing.

    Args:
        index: the file's frames.
        wanted: bool ``[frames]``; may end earlier than the file.
        size: (height, width) of the result; None: as stored.

    Yields:
        Frame number and uint8 ``[H, W, 3]`` RGB, upright.

    Raises:
        VideoError: the file cannot be opened.
    """
    numbers = np.flatnonzero(wanted)
    if not len(numbers):
        return
    last, reached = int(numbers[-1]), -1
    converted = _Converter(size)
    container, stream = open_video(index.path)
    # Nothing else decodes meanwhile, unlike in the workers of a loader.
    stream.thread_type = "AUTO"
    stream.codec_context.thread_count = 0
    with container:
        for count, frame in enumerate(_undamaged(container, stream)):
            number = count
            if not index.sequential:
                number = int(np.searchsorted(index.pts, frame.pts)) if frame.pts is not None else -1
                if not 0 <= number < index.frames or index.pts[number] != frame.pts:
                    continue
            if reached < number < len(wanted) and wanted[number]:
                yield number, torch.from_numpy(converted(frame))
                reached = number
            if number >= last:
                return


def _undamaged(
    container: av.container.InputContainer, stream: av.VideoStream
) -> Iterator[av.VideoFrame]:
    """Every frame that decodes, whatever happens to others."""
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
        except av.error.FFmpegError:
            return
        if packet is None:
            return
        try:
            frames = packet.decode()
        except av.error.FFmpegError:
            continue
        yield from frames
