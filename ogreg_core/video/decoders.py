"""The two decoders. The only module that imports decord, and it imports torch first.

(decord#293: importing decord before torch can crash a process that uses CUDA.) decord has wheels
for x86-64 Linux and Windows only; elsewhere ``decord`` is None here and PyAV reads everything.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import av
import numpy as np
import torch
from torch import Tensor

from ogreg_core.errors import VideoError
from ogreg_core.video.packets import PacketIndex

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
]


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
        return torch.from_numpy(reader.get_batch(list(indices)).asnumpy())
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


def _oriented(frame: av.VideoFrame, size: tuple[int, int] | None = None) -> np.ndarray:
    """RGB pixels ``[H, W, 3]`` the way up that the container asks for, scaled to ``size`` (height,
    width).
    """
    turns = round(frame.rotation / 90) % 4
    height, width = (size[::-1] if turns % 2 else size) if size else (None, None)
    # One thread: a pool per worker process makes busy cores slower.
    pixels = frame.reformat(width, height, format="rgb24", threads=1).to_ndarray()
    return np.ascontiguousarray(np.rot90(pixels, turns)) if turns else pixels


def display_rotation(path: str) -> int:
    """Degrees, a multiple of 90 in [0, 360), by which stored frames are turned counter-clockwise
    for display.
    """
    container, stream = _open(path)
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


def _open(path: str) -> tuple[av.container.InputContainer, av.VideoStream]:
    container = av.open(path)
    stream = container.streams.video[0]
    stream.thread_type = "NONE"
    stream.codec_context.thread_count = 1
    return container, stream


def read_with_pyav(
    index: PacketIndex, indices: Sequence[int], size: tuple[int, int] | None = None
) -> Tensor:
    """Frames by index through PyAV, driven by the packet index, scaled to ``size`` (height, width)
    if given: uint8 ``[len(indices), H, W, 3]`` RGB.

    Seeks to the key frame at or before each wanted frame and decodes up to it; files without usable
    timestamps are read from the start and counted.

    Raises:
        VideoError: damaged file, or an index past its end.
    """
    if max(indices) >= index.frames or min(indices) < 0:
        raise index_error(index.path, max(indices), index.frames)
    wanted = sorted(set(indices))
    container, stream = _open(index.path)
    with container:
        if index.sequential:
            found = _read_counting(index, container, stream, wanted, size)
        else:
            found = _read_seeking(index, container, stream, wanted, size)
    missing = [i for i in wanted if i not in found]
    if missing:
        raise damaged(index.path, f"frame {missing[0]} of {index.frames} does not decode")
    return torch.from_numpy(np.stack([found[i] for i in indices]))


def _read_counting(
    index: PacketIndex,
    container: av.container.InputContainer,
    stream: av.VideoStream,
    wanted: list[int],
    size: tuple[int, int] | None,
) -> dict[int, np.ndarray]:
    found: dict[int, np.ndarray] = {}
    targets = set(wanted)
    for position, frame in enumerate(_decoded(index.path, container, stream)):
        if position in targets:
            found[position] = _oriented(frame, size)
        if position >= wanted[-1]:
            break
    return found


def _read_seeking(
    index: PacketIndex,
    container: av.container.InputContainer,
    stream: av.VideoStream,
    wanted: list[int],
    size: tuple[int, int] | None,
) -> dict[int, np.ndarray]:
    # Wanted frames that share a starting key frame are decoded in one go.
    groups: dict[int, list[int]] = {}
    for i in wanted:
        key = int(np.searchsorted(index.keys, index.pts[i], side="right")) - 1
        groups.setdefault(max(key, 0), []).append(i)
    found: dict[int, np.ndarray] = {}
    for key, members in groups.items():
        container.seek(int(index.key_seeks[key]), stream=stream, backward=True)
        targets = {int(index.pts[i]): i for i in members}
        last = int(index.pts[members[-1]])
        for frame in _decoded(index.path, container, stream):
            if frame.pts in targets:
                found[targets[frame.pts]] = _oriented(frame, size)
            if frame.pts is None or frame.pts >= last:
                break
    return found


def iterate_frames(index: PacketIndex) -> Iterator[tuple[float, Tensor]]:
    """All presented frames in order as (seconds, uint8 ``[H, W, 3]``), one in memory at a time.

    Raises:
        VideoError: damaged file.
    """
    seconds = index.seconds
    container, stream = _open(index.path)
    with container:
        for position, frame in enumerate(_decoded(index.path, container, stream)):
            if position < len(seconds):
                yield float(seconds[position]), torch.from_numpy(_oriented(frame))
