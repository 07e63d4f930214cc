"""Where the labels of a picture go so that none lies on another: plain geometry, in pixels."""

from __future__ import annotations

import numpy as np

__all__ = ["place_labels", "spread"]

# Distances at which a label is tried, in multiples of its height, and directions.
_RINGS = np.array([0.5, 0.7, 1.0, *np.arange(1.3, 4.0, 0.5), *np.arange(4.0, 16.0, 1.0)])
_DIRECTIONS = np.linspace(0, 2 * np.pi, 24, endpoint=False)
_PASSES = 4
# So many of the free places nearest to a dot are looked at closely.
_SHORT_LIST = 120
# What is worse than what: to lie on a label or dot, to leave the frame, to cross a leader, to lie on a
# line; all beside the distance from the dot.
_COVERED, _OUTSIDE, _CROSSED, _LINED = 1000.0, 3000.0, 100.0, 8.0
_LEADER_POINTS = np.linspace(0, 1, 17)[1:, None]
# In multiples of a label's height: clear space around it, and the radius of a dot.
_CLEAR, _DOT = 0.1, 0.3


def place_labels(
    dots: np.ndarray, sizes: np.ndarray, frame: np.ndarray, lines: np.ndarray | None = None
) -> np.ndarray:
    """Put each label beside its dot, clear of all other labels, dots and leaders.

    The most crowded dot has the first choice; then all labels choose again in the knowledge of the
    others. Where no place is free the least bad one is taken.

    Args:
        dots: centres, ``[N, 2]``.
        sizes: width and height of each label, ``[N, 2]``.
        frame: left, lower, right and upper edge of the room, ``[4]``.
        lines: boxes of thin lines, which labels rather keep clear of, ``[M, 4]``.

    Returns:
        Lower left corner of each label, ``[N, 2]``.
    """
    height = float(sizes[:, 1].max())
    radius = _DOT * height
    dot_boxes = np.hstack([dots - radius, dots + radius])
    boxes = np.full((len(dots), 4), np.nan)
    distances = np.linalg.norm(dots[:, None] - dots[None], axis=-1)
    crowd = (distances < 6 * height).sum(axis=1)
    for _ in range(_PASSES):
        before = boxes.copy()
        for i in np.argsort(-crowd, kind="stable"):
            labels, others = np.delete(boxes, i, 0), np.delete(dots, i, 0)
            choices, badness = _choices(dots[i], sizes[i], height)
            clear = choices + _CLEAR * height * np.array([-1, -1, 1, 1])
            badness += _COVERED * (_overlaps(clear, labels) + _overlaps(clear, dot_boxes))
            if lines is not None:
                badness += _LINED * _overlaps(choices, lines)
            outside = np.maximum(frame[:2] - choices[:, :2], choices[:, 2:] - frame[2:])
            badness += _OUTSIDE * (outside > 0).any(axis=1)
            best = np.argsort(badness, kind="stable")[:_SHORT_LIST]
            choices, badness = choices[best], badness[best]
            own = _leaders(np.broadcast_to(dots[i], (len(best), 2)), choices)
            crossed = np.vstack([labels, np.delete(dot_boxes, i, 0)])
            badness += _CROSSED * _inside(own, crossed).any(axis=1).sum(axis=1)
            drawn = _leaders(others, labels)
            badness += _CROSSED * _inside(drawn, choices).any(axis=1).sum(axis=0)
            boxes[i] = choices[badness.argmin()]
        if np.array_equal(boxes, before):
            break
    return boxes[:, :2]


def _choices(dot: np.ndarray, size: np.ndarray, height: float) -> tuple[np.ndarray, np.ndarray]:
    """Boxes of one label around its dot, ``[C, 4]``, and how far each is, in heights, ``[C]``."""
    unit = np.stack([np.cos(_DIRECTIONS), np.sin(_DIRECTIONS)], axis=-1)
    rings = np.repeat(_RINGS, len(unit))[:, None]
    unit = np.tile(unit, (len(_RINGS), 1))
    centres = dot + unit * (rings * height + size / 2)
    # To the right reads best, above and below better than left.
    far = rings[:, 0] * 4 + 0.8 * (1 - unit[:, 0])
    return np.hstack([centres - size / 2, centres + size / 2]), far


def _overlaps(boxes: np.ndarray, obstacles: np.ndarray) -> np.ndarray:
    """How many obstacles each box lies on, ``[C]``; obstacles without a place (NaN) are none."""
    low = np.maximum(boxes[:, None, :2], obstacles[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], obstacles[None, :, 2:])
    # A vertical line is a box without width.
    return (low <= high).all(axis=-1).sum(axis=1)


def _leaders(dots: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Points on the way from each dot to the nearest point of its box, ``[N, P, 2]``."""
    ends = np.clip(dots, boxes[:, :2], boxes[:, 2:])
    return dots[:, None] + (ends - dots)[:, None] * _LEADER_POINTS


def _inside(points: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Which points lie strictly in which boxes, ``[N, P, 2]`` and ``[M, 4]`` to ``[N, P, M]``."""
    points = points[:, :, None]
    inside: np.ndarray = (points > boxes[:, :2]) & (points < boxes[:, 2:])
    return np.logical_and.reduce(inside, axis=-1)


def spread(wanted: np.ndarray, gap: float, low: float, high: float) -> np.ndarray:
    """The places nearest to those wanted (least squares) that are ``gap`` apart and in ``low`` .. ``high``.

    Args:
        wanted: ``[N]``, in any order.
        gap: least distance; made smaller where ``N`` places do not fit.
        low, high: ends of the room.

    Returns:
        ``[N]``, in the order of ``wanted``.
    """
    if len(wanted) > 1:
        gap = min(gap, (high - low) / (len(wanted) - 1))
    order = np.argsort(wanted, kind="stable")
    steps = gap * np.arange(len(wanted))
    # Without the gaps this is isotonic regression: neighbours in the wrong order are averaged.
    pools: list[list[float]] = []
    for value in wanted[order] - steps:
        pools.append([float(value)])
        while len(pools) > 1 and np.mean(pools[-2]) >= np.mean(pools[-1]):
            last = pools.pop()
            pools[-1] += last
    level = np.concatenate([np.full(len(pool), np.mean(pool)) for pool in pools] or [steps])
    places = np.empty(len(wanted))
    places[order] = np.clip(level, low, high - (steps[-1] if len(steps) else 0.0)) + steps
    return places
