"""Where a map lies: the smallest box that holds most of its mass.

Notation: T frames, H W rows and columns of the map.
"""

from __future__ import annotations

import numpy as np

from ogreg_core.gaze.geometry import ClipGeometry

__all__ = ["boxes_in_video", "flat_frames", "mass_boxes"]

# Below this the largest value of a map is rounding, and relative to it a map without relief is flat.
_NOTHING = 1e-5
_RELIEF = 1e-3
# Sums of floats: a box that holds the share up to rounding holds it.
_ROUNDING = 1e-9


def flat_frames(maps: np.ndarray) -> np.ndarray:
    """Which frames of ``[T, H, W]`` have no place that stands out: bool ``[T]``.

    A frame is flat if nothing in it exceeds 1e-5, or if it varies by less than a thousandth of its
    largest value.
    """
    highest, lowest = maps.max(axis=(1, 2)), maps.min(axis=(1, 2))
    return (highest < _NOTHING) | (highest - lowest < _RELIEF * highest)


def mass_boxes(maps: np.ndarray, share: float = 0.7) -> np.ndarray:
    """The smallest axis-aligned box of each frame that holds a share of its mass.

    Smallest in area, exactly; of several equally small ones the flattest, and of its places the one
    with the most mass. A flat frame (:func:`flat_frames`) gets the whole picture: it points nowhere.

    Args:
        maps: not negative, ``[T, H, W]``.
        share: of the frame's mass, above 0 and up to 1.

    Returns:
        int64 ``[T, 4]``: x0, y0, x1, y1 in cells of the map, the ends exclusive.

    Raises:
        ValueError: another share, or a map that has negative values or not-a-number.
    """
    if not 0.0 < share <= 1.0:
        raise ValueError(f"share {share} is not above 0 and up to 1")
    if not np.isfinite(maps).all() or (maps < -_NOTHING).any():
        raise ValueError("a map of mass has negative values or not-a-number")
    maps = maps.clip(0)  # what is left is rounding
    height, width = maps.shape[1:]
    boxes = np.tile(np.array([0, 0, width, height], dtype=np.int64), (len(maps), 1))
    for t in np.flatnonzero(~flat_frames(maps)):
        boxes[t] = _smallest_box(maps[t].astype(np.float64), share)
    return boxes


def _smallest_box(mass: np.ndarray, share: float) -> tuple[int, int, int, int]:
    """On the summed-area table: for every height the least width, where it can beat the best so far."""
    height, width = mass.shape
    table = np.zeros((height + 1, width + 1))
    table[1:, 1:] = mass.cumsum(axis=0).cumsum(axis=1)
    wanted = share * table[-1, -1] * (1.0 - _ROUNDING)
    best, area = (0, 0, width, height), height * width
    for rows in range(1, height + 1):
        strips = table[rows:] - table[:-rows]
        # Only narrower than this would be smaller.
        fitting, too_narrow = min(width, (area - 1) // rows), 0
        if fitting < 1 or (strips[:, fitting:] - strips[:, :-fitting]).max() < wanted:
            continue
        while fitting - too_narrow > 1:
            middle = (fitting + too_narrow) // 2
            if (strips[:, middle:] - strips[:, :-middle]).max() >= wanted:
                fitting = middle
            else:
                too_narrow = middle
        held = strips[:, fitting:] - strips[:, :-fitting]
        y, x = np.unravel_index(int(held.argmax()), held.shape)
        best, area = (int(x), int(y), int(x) + fitting, int(y) + rows), rows * fitting
    return best


def boxes_in_video(
    boxes: np.ndarray, map_size: tuple[int, int], geometry: ClipGeometry
) -> np.ndarray:
    """Boxes in cells of a map over the model's clip, in pixels of the upright video.

    Args:
        boxes: ``[T, 4]`` of :func:`mass_boxes`.
        map_size: rows and columns of the map.
        geometry: where the clip lies in the video.

    Returns:
        float64 ``[T, 4]``: x0, y0, x1, y1.
    """
    rows, columns = map_size
    scale = np.array([geometry.width / columns, geometry.height / rows] * 2)
    origin = np.array([geometry.left, geometry.top] * 2)
    return boxes * scale + origin
