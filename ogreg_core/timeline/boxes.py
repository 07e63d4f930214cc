"""Where a model looks during an event: the box that holds most of its gaze, over time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F

from ogreg_core.checkpoint import CheckpointInfo
from ogreg_core.data.transforms import TestCrops, to_input
from ogreg_core.errors import UsageError
from ogreg_core.gaze.boxes import boxes_in_video, flat_frames, mass_boxes
from ogreg_core.gaze.geometry import ClipGeometry, reduction_of
from ogreg_core.gaze.maps import Canvas, shown_blocks
from ogreg_core.inference import Predictor
from ogreg_core.models.frame_times import given_times
from ogreg_core.models.protocol import VideoModel
from ogreg_core.models.registry import MODELS, find_model
from ogreg_core.timeline.events import Box, Event
from ogreg_core.timeline.source import Source, WindowViews

__all__ = ["WindowBoxes", "boxes_of_event", "check_gaze", "look_at_window"]

# Most cells per side of the map in which a box is looked for.
_CELLS = 56


@dataclass(frozen=True)
class WindowBoxes:
    """Boxes of a window's clip.

    Args:
        seconds: when its frames appear, ``[T]``.
        boxes: x0, y0, x1, y1 in pixels of the upright video, ``[T, 4]``.
    """

    seconds: np.ndarray
    boxes: np.ndarray


def check_gaze(info: CheckpointInfo) -> None:
    """Refuse a model that has no gaze.

    Raises:
        UsageError: it has not, or token selection hides it.
    """
    if "token_selection" in info.options:
        raise UsageError(
            "--boxes does not go with token selection",
            why="the places that are left out have no gaze",
            fix="leave out --boxes",
        )
    if "gaze" not in find_model(info.model).maps:
        have = [name for name, entry in MODELS.items() if "gaze" in entry.maps]
        raise UsageError(
            f"--boxes: {info.model} has no gaze maps",
            why=f"these have: {', '.join(have)}",
            fix="leave out --boxes",
        )


def look_at_window(
    predictor: Predictor, item: WindowViews, source: Source, crops: TestCrops
) -> WindowBoxes:
    """Boxes of the gaze in the centre crop of a window's first clip; frames in which it points nowhere
    have none.
    """
    info = predictor.info
    clip = item.views[crops.crops // 2][None].to(predictor.device)
    times = item.times[crops.crops // 2][None]
    with torch.inference_mode(), given_times(predictor.model, times):
        inputs = to_input(clip, info.mean, info.std)
        _, blocks = cast(VideoModel, predictor.model).forward_with_maps(inputs)
    frames, rows, columns = clip.shape[2:]
    canvas = Canvas((frames, rows, columns), reduction_of(info.model, info.options))
    maps = torch.from_numpy(canvas.of_blocks("gaze", shown_blocks(blocks, "gaze", ())))
    side = min(rows, _CELLS)
    # Means of cells: a search over all pixels takes seconds per window.
    coarse = F.adaptive_avg_pool2d(maps[:, None], side)[:, 0].numpy()
    there = ~flat_frames(coarse)
    boxes = boxes_in_video(mass_boxes(coarse), (side, side), ClipGeometry.of(source.row, crops))
    seconds = source.seconds[item.window.clips[0]]
    return WindowBoxes(seconds[there], boxes[there])


def boxes_of_event(event: Event, windows: Sequence[WindowBoxes | None]) -> tuple[Box, ...]:
    """Boxes by rising time; of windows that overlap, each instant gets that of the nearest middle."""
    near = [
        found
        for found in windows
        if found is not None
        and len(found.seconds)
        and found.seconds.max() >= event.start_s
        and found.seconds.min() < event.end_s
    ]
    middles = np.array([(found.seconds.min() + found.seconds.max()) / 2 for found in near])
    boxes: dict[float, Box] = {}
    for number, found in enumerate(near):
        for second, box in zip(found.seconds.tolist(), found.boxes.tolist(), strict=True):
            nearest = int(np.abs(middles - second).argmin())
            if event.start_s <= second < event.end_s and nearest == number:
                boxes.setdefault(second, Box(second, *box))
    return tuple(boxes[second] for second in sorted(boxes))
