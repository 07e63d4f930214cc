"""The original video with the event of each moment written over it, streamed from file to file."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ogreg_core.timeline.events import Box, Event
from ogreg_core.timeline.picture import colours_of
from ogreg_core.timeline.run import Timeline
from ogreg_core.timeline.source import Heed, ahead
from ogreg_core.video import write_video
from ogreg_core.video.decoders import stream_frames

__all__ = ["save_overlay"]

# Of the picture's height.
_TEXT_SHARE = 0.06
_LEAST_TEXT = 10
_BACKGROUND = (0, 0, 0, 160)


def save_overlay(found: Timeline, target: Path, heed: Heed, deadline: float) -> None:
    """Write an mp4 with label, score, and box where events have some; atomically, without sound.

    Its rate is constant: the video's mean rate. Of a video of variable rate each picture is the one on
    screen at that moment, so that times stay what they are.

    Args:
        found: the timeline.
        target: the mp4.
        heed: see :data:`ogreg_core.timeline.source.Heed`.
        deadline: seconds that a frame may take.

    Raises:
        VideoError: not one frame can be read, or none comes within the deadline.
    """
    row, index = found.source.row, found.source.reader.index
    everything = np.ones(index.frames, dtype=bool)
    decoded = stream_frames(index, everything, (row.height, row.width))
    timed = (
        (float(second), picture)
        for number, picture in ahead(decoded, index.path, heed, deadline)
        for second in [found.source.seconds[number] if row.variable_rate else number / row.fps]
    )
    events = _Events(found)
    pictures = (events.drawn(second, picture) for second, picture in _at_rate(timed, row.fps))
    write_video(target, pictures, row.fps)


def _at_rate(
    timed: Iterator[tuple[float, Tensor]], fps: float
) -> Iterator[tuple[float, np.ndarray]]:
    """What is on screen at even times, until the last frame has had its turn."""
    tick = 0
    shown: np.ndarray | None = None
    for second, picture in timed:
        # All ticks up to half an interval before this frame still show the one before.
        while shown is not None and tick / fps < second - 0.5 / fps:
            yield tick / fps, shown
            tick += 1
        shown = picture.numpy()
    if shown is not None:
        yield tick / fps, shown


class _Events:
    """Draws what happens at a moment; moments come in rising order."""

    def __init__(self, found: Timeline) -> None:
        self._labels = found.labels
        self._left = list(reversed(found.events))
        self._colours = colours_of(list(dict.fromkeys(event.label for event in found.events)))

    def drawn(self, second: float, picture: np.ndarray) -> np.ndarray:
        """The picture with the event of that second, uint8 ``[H, W, 3]``."""
        while self._left and self._left[-1].end_s <= second:
            self._left.pop()
        if not self._left or self._left[-1].start_s > second:
            return picture
        event = self._left[-1]
        red, green, blue = self._colours[event.label]
        colour = (round(255 * red), round(255 * green), round(255 * blue))
        image = Image.fromarray(picture)
        pen = ImageDraw.Draw(image, "RGBA")
        if event.boxes:
            box = _box_at(event.boxes, second)
            width = max(round(image.height / 120), 1)
            right, bottom = max(box.x1 - 1, box.x0), max(box.y1 - 1, box.y0)
            pen.rectangle((box.x0, box.y0, right, bottom), outline=colour, width=width)
        _write(pen, image.size, self._text(event), colour)
        return np.asarray(image)

    def _text(self, event: Event) -> str:
        return f"{' '.join(self._labels[event.label].split())}  {100 * event.score:.0f} %"


def _box_at(boxes: tuple[Box, ...], second: float) -> Box:
    return min(boxes, key=lambda box: abs(box.time_s - second))


def _write(
    pen: ImageDraw.ImageDraw, size: tuple[int, int], text: str, colour: tuple[int, int, int]
) -> None:
    """A line of text at the top left on a dark ground, with a stripe in the colour of its class."""
    width, height = size
    points = max(round(_TEXT_SHARE * height), _LEAST_TEXT)
    while points > _LEAST_TEXT and _font(points).getlength(text) > width - 2 * points:
        points -= 1
    font = _font(points)
    pad = points // 3
    right = min(font.getlength(text) + 3 * pad, width)
    pen.rectangle((0, 0, right, points + 2 * pad), fill=_BACKGROUND)
    pen.rectangle((0, 0, pad, points + 2 * pad), fill=colour)
    pen.text((2 * pad, pad / 2), text, fill=(255, 255, 255), font=font)


@lru_cache(maxsize=16)
def _font(points: int) -> ImageFont.FreeTypeFont:
    """matplotlib's DejaVu Sans, which has Greek and Cyrillic letters, too."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), points)
