"""From scores of overlapping windows to events: smoothing over time, hysteresis, merging.

Time is cut into cells of half a hop. A cell's scores are a mean over the windows that cover its middle,
plain or weighted by a Gaussian of the distance between the middles; each window is a noisy opinion about
every instant that it covers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal

import numpy as np

__all__ = ["LOW_SHARE", "Box", "Event", "EventRules", "Smoothing", "cells", "find_events", "smooth"]

Smoothing = Literal["mean", "gaussian", "none"]

# Hysteresis: an event begins at the threshold and lasts while the score is above this share of it.
LOW_SHARE = 0.5
# Of the window's length: with windows that overlap by half, one off the middle counts a seventh.
_SIGMA_SHARE = 0.25


@dataclass(frozen=True)
class Box:
    """Where the model looks at a moment.

    Args:
        time_s: seconds from the first frame.
        x0, y0, x1, y1: pixels of the upright video; x1 and y1 lie just outside.
    """

    time_s: float
    x0: float
    y0: float
    x1: float
    y1: float


@dataclass(frozen=True)
class Event:
    """A stretch of time in which one class is the best.

    Args:
        start_s, end_s: seconds from the first frame.
        label: class index.
        score: mean smoothed score over it.
        peak: highest smoothed score in it.
        boxes: where the model looks, by rising time; None if nobody asked.
    """

    start_s: float
    end_s: float
    label: int
    score: float
    peak: float
    boxes: tuple[Box, ...] | None = field(default=None, compare=False)


@dataclass(frozen=True)
class EventRules:
    """What makes an event.

    Args:
        threshold: the smoothed score of its class is at least this somewhere in it, and at least
            half of this everywhere.
        min_length_s: shorter ones are dropped.
        max_gap_s: two of one class that are this close are one, if nothing else happens between.
    """

    threshold: float
    min_length_s: float
    max_gap_s: float


def cells(duration_s: float, hop_s: float) -> np.ndarray:
    """Borders of the cells of a video: multiples of half the hop and its end, seconds ``[cells + 1]``."""
    step = hop_s / 2
    inner = np.arange(max(int(np.ceil(duration_s / step - 1e-6)), 1)) * step
    return np.append(inner, duration_s)


def smooth(
    starts: np.ndarray, ends: np.ndarray, scores: np.ndarray, borders: np.ndarray, how: Smoothing
) -> np.ndarray:
    """Scores per cell.

    Args:
        starts, ends: of the windows in seconds, both ascending, ``[N]``.
        scores: float32 ``[N, classes]``.
        borders: of the cells in seconds, ``[cells + 1]``.
        how: ``mean`` over the windows that cover the cell's middle; ``gaussian``: the same, weighted
            by the distance of the window's middle, with a standard deviation of a quarter of its
            length; ``none``: the window whose middle is nearest.

    Returns:
        float32 ``[cells, classes]``; not a number where no window covers the middle.
    """
    middles = (borders[:-1] + borders[1:]) / 2
    centres = (starts + ends) / 2
    first = np.searchsorted(ends, middles, side="right")
    last = np.searchsorted(starts, middles, side="right")
    result = np.full((len(middles), scores.shape[1]), np.nan, np.float32)
    for cell, (begin, end, middle) in enumerate(zip(first, last, middles, strict=True)):
        if begin >= end:
            continue
        distances = np.abs(centres[begin:end] - middle)
        if how == "none":
            result[cell] = scores[begin + int(distances.argmin())]
            continue
        weights = np.ones(end - begin)
        if how == "gaussian":
            sigma = _SIGMA_SHARE * (ends[begin:end] - starts[begin:end])
            weights = np.exp(-0.5 * (distances / sigma) ** 2)
        result[cell] = weights @ scores[begin:end] / weights.sum()
    return result


@dataclass(frozen=True)
class _Run:
    """Cells ``first`` to ``last - 1`` of one class."""

    first: int
    last: int
    label: int


def find_events(curves: np.ndarray, borders: np.ndarray, rules: EventRules) -> list[Event]:
    """Events in the order of time; they do not overlap.

    A run of cells with one best class whose score stays above half of the threshold and reaches it
    (hysteresis) is an event. Two of one class close to each other become one, with what is too short
    to be an event between them; then those that are too short are dropped.

    Args:
        curves: smoothed scores ``[cells, classes]``.
        borders: seconds ``[cells + 1]``.
        rules: thresholds.
    """
    runs = [run for run in _runs(curves, rules.threshold) if _reaches(run, curves, rules)]
    merged: list[_Run] = []
    for run in runs:
        before = _continues(merged, run, borders, rules)
        if before is not None:
            run = replace(run, first=merged[before].first)
            del merged[before:]
        merged.append(run)
    return [_event(run, curves, borders) for run in merged if _is_long(run, borders, rules)]


def _runs(curves: np.ndarray, threshold: float) -> list[_Run]:
    best = np.where(np.isnan(curves).any(axis=1), 0, curves.argmax(axis=1))
    height = curves[np.arange(len(curves)), best]
    # -1 where nothing happens; comparisons with not-a-number are false.
    labels = np.where(height >= LOW_SHARE * threshold, best, -1)
    changes = np.flatnonzero(np.diff(labels)) + 1
    borders = [0, *changes.tolist(), len(labels)]
    return [_Run(a, b, int(labels[a])) for a, b in pairwise(borders) if a < b and labels[a] >= 0]


def _reaches(run: _Run, curves: np.ndarray, rules: EventRules) -> bool:
    return bool(curves[run.first : run.last, run.label].max() >= rules.threshold)


def _is_long(run: _Run, borders: np.ndarray, rules: EventRules) -> bool:
    # A hair of slack, here and below: borders are multiples of a hop.
    return bool(borders[run.last] - borders[run.first] >= rules.min_length_s - 1e-6)


def _continues(
    merged: Sequence[_Run], run: _Run, borders: np.ndarray, rules: EventRules
) -> int | None:
    """Which earlier run this one goes on with: the last of its class, close enough, and with nothing
    between them that is an event.
    """
    for place in reversed(range(len(merged))):
        earlier = merged[place]
        if borders[run.first] - borders[earlier.last] > rules.max_gap_s + 1e-6:
            return None
        if earlier.label == run.label:
            return place
        if _is_long(earlier, borders, rules):
            return None
    return None


def _event(run: _Run, curves: np.ndarray, borders: np.ndarray) -> Event:
    own = curves[run.first : run.last, run.label]
    return Event(
        float(borders[run.first]),
        float(borders[run.last]),
        run.label,
        float(np.nanmean(own)),
        float(np.nanmax(own)),
    )
