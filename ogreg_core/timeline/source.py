"""Views of the windows of a long video, in one pass over the file and with flat memory.

A thread decodes ahead. Of each frame that some window takes, the scaled picture (uint8) is kept until the
last window that takes it has passed. A video that breaks gives what can be read of it.
"""

from __future__ import annotations

import queue
import shlex
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ogreg_core.data.loader import Views, shown_at
from ogreg_core.data.manifest import Row
from ogreg_core.data.transforms import scaled_size, test_crops
from ogreg_core.errors import UsageError, VideoError
from ogreg_core.inference import DEADLINE_SECONDS, within
from ogreg_core.timeline.windows import Plan, Window
from ogreg_core.video import VideoInfo, VideoReader, probe
from ogreg_core.video.decoders import display_rotation, stream_frames
from ogreg_core.video.probe import describe

__all__ = ["Heed", "Source", "WindowViews", "ahead", "open_source", "read_windows"]

# Called often while something is waited for; may raise to end the work.
Heed = Callable[[], None]

Item = TypeVar("Item")

_FRAMES_AHEAD = 8
_TICK_SECONDS = 0.5
# What a probe finds wrong with files of which a part can be read.
_PARTLY_READABLE = {"truncated", "frame-count", "negative-timestamps", "seek-unstable", "damaged"}


@dataclass(frozen=True)
class Source:
    """A video that is about to be read from start to end.

    Args:
        info: what it holds, or promises.
        row: the same as a manifest row.
        reader: its packet index.
        trouble: why ``predict`` would refuse it; None for a sound file.
    """

    info: VideoInfo
    row: Row
    reader: VideoReader
    trouble: VideoError | None = None

    @cached_property
    def seconds(self) -> np.ndarray:
        """When each frame appears, float64 ``[frames]``."""
        return self.reader.index.seconds

    def shown(self, numbers: Sequence[int]) -> list[float]:
        """When frames appear, as for any other video."""
        return shown_at(self.reader, self.row, numbers)

    def shortened(self, frames: int) -> Source:
        """The same video as if it ended after so many frames."""
        duration = float(self.seconds[frames - 1]) + 1 / self.row.fps
        row = replace(self.row, frames=frames, duration=duration, fps=frames / duration)
        return replace(self, row=row)


def open_source(path: str | Path, deadline: float = DEADLINE_SECONDS) -> Source:
    """Find out what a video holds; one that breaks later is accepted.

    Raises:
        VideoError: not one frame can be read, or nothing happened within the deadline.
        UsageError: an image.
    """
    return within(lambda: _open(path), str(path), deadline)


def _open(path: str | Path) -> Source:
    trouble: VideoError | None = None
    reader = VideoReader(path)
    if reader.decoder == "image":
        raise UsageError(
            f"{path} is an image, which has no timeline",
            fix=f"ogreg predict {shlex.quote(str(path))}",
        )
    try:
        info = probe(path, index=reader.index)
    except VideoError as error:
        if error.code not in _PARTLY_READABLE:
            raise
        trouble = error
        info = _describe_damaged(reader, error)
    row = Row.from_probe(Path(path).name, info)
    return Source(info, row, VideoReader(path, info.decoder, reader.index), trouble)


def _describe_damaged(reader: VideoReader, error: VideoError) -> VideoInfo:
    index = reader.index
    frames = stream_frames(index, np.ones(index.frames, dtype=bool))
    first = next(frames, None)
    if first is None:
        raise error
    frames.close()  # type: ignore[attr-defined]
    height, width = first[1].shape[:2]
    return describe(index, height, width, display_rotation(reader.path), "pyav", error.why)


@dataclass(frozen=True)
class WindowViews:
    """A window as the model wants it.

    Args:
        window: which.
        views: uint8 ``[V, 3, T, size, size]``.
        missing: how many of its frames did not decode; the frame before stands in for each.
        times: when its frames are due, float32 ``[V, T]``, see
            :class:`ogreg_core.data.loader.TimedViews`.
    """

    window: Window
    views: Tensor
    missing: int
    times: Tensor


def read_windows(
    source: Source,
    plan: Plan,
    heed: Heed,
    on_frame: Callable[[int], None],
    deadline: float = DEADLINE_SECONDS,
) -> Iterator[WindowViews]:
    """Every window of which most frames decode and behind which the video goes on, in order.

    Args:
        source: the video.
        plan: its windows.
        heed: see :data:`Heed`.
        on_frame: told the number of each frame that was decoded and kept.
        deadline: seconds that a frame may take.

    Raises:
        VideoError: with the code ``time-out``; what came before has been given out.
    """
    spec = plan.views.crops
    row = source.row
    size = scaled_size(row.height, row.width, spec.short_side) if spec.short_side else None
    decoded = stream_frames(source.reader.index, plan.needed(), size)
    kept: dict[int, Tensor] = {}
    waiting = iter(range(len(plan)))
    window = plan[next(waiting)]
    for number, picture in ahead(decoded, str(source.reader.path), heed, deadline):
        on_frame(number)
        kept[number] = picture.permute(2, 0, 1)
        while number >= window.frames[-1]:
            times = plan.times(window, source.shown)
            yield from _views_of(window, kept, plan.views, torch.tensor(times))
            following = next(waiting, None)
            if following is None:
                return
            window = plan[following]
            kept = {n: kept[n] for n in kept if n >= window.frames[0]}


def _views_of(
    window: Window, kept: dict[int, Tensor], views: Views, times: Tensor
) -> Iterator[WindowViews]:
    """Nothing where more frames are missing than are there."""
    there = sorted(kept)
    missing = [number for number in window.frames if number not in kept]
    if len(missing) > len(window.frames) / 2:
        return
    # What was on screen last stays there until another frame comes.
    stands_in = {number: there[max(bisect_left(there, number) - 1, 0)] for number in missing}
    parts = [
        test_crops(torch.stack([kept[stands_in.get(n, n)] for n in clip]), views.crops)
        for clip in window.clips
    ]
    times = times.repeat_interleave(views.crops.crops, dim=0)
    yield WindowViews(window, torch.cat(parts), len(missing), times)


def ahead(
    items: Iterator[Item], path: str, heed: Heed, deadline: float = DEADLINE_SECONDS
) -> Iterator[Item]:
    """The items of an iterator that a thread runs a little ahead.

    Args:
        items: what to run.
        path: the file that it reads, for the error.
        heed: see :data:`Heed`.
        deadline: seconds that an item may take while it is waited for.

    Raises:
        VideoError: with the code ``time-out``.
    """
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(_FRAMES_AHEAD)
    over = threading.Event()
    threading.Thread(target=_fill, args=(items, ready, over), daemon=True).start()
    try:
        since = time.monotonic()
        while True:
            heed()
            try:
                kind, item = ready.get(timeout=min(_TICK_SECONDS, deadline))
            except queue.Empty:
                if time.monotonic() - since >= deadline:
                    raise VideoError(
                        f"{path}: no frame came within {deadline:g} s",
                        code="time-out",
                        why="its decoder hangs, or its disk does",
                        fix="re-encode the file with ffmpeg, or leave it out",
                    ) from None
                continue
            if kind == "end":
                return
            if kind == "error":
                raise item
            yield item
            since = time.monotonic()
    finally:
        over.set()


def _fill(items: Iterator[Any], ready: queue.Queue[tuple[str, Any]], over: threading.Event) -> None:
    """In the thread: hand over items until nobody wants more; errors are the receiver's to raise."""

    def put(kind: str, item: Any) -> None:
        while not over.is_set():
            try:
                ready.put((kind, item), timeout=_TICK_SECONDS)
                return
            except queue.Full:
                continue

    try:
        for item in items:
            put("item", item)
            if over.is_set():
                return
        put("end", None)
    except Exception as error:
        put("error", error)
