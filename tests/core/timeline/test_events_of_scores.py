"""Smoothing against plain loops, and events against labels written down by hand."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ogreg_core.timeline.events import EventRules, cells, find_events, smooth

RULES = EventRules(threshold=0.5, min_length_s=0.0, max_gap_s=0.0)


def windows(count: int, length: float, hop: float) -> tuple[np.ndarray, np.ndarray]:
    starts = np.arange(count) * hop
    return starts, starts + length


def random_scores(count: int, classes: int = 3) -> np.ndarray:
    return np.random.default_rng(0).dirichlet(np.ones(classes), count).astype(np.float32)


@pytest.mark.parametrize("how", ["mean", "gaussian", "none"])
@pytest.mark.parametrize(("length", "hop"), [(2.0, 1.0), (2.0, 0.5), (1.5, 1.5), (3.1, 0.7)])
def test_smoothing_is_what_it_says(how, length, hop):
    starts, ends = windows(9, length, hop)
    scores = random_scores(9)
    borders = cells(float(ends[-1]), hop)
    found = smooth(starts, ends, scores, borders, how)
    assert found.shape == (len(borders) - 1, 3)
    for cell, middle in enumerate((borders[:-1] + borders[1:]) / 2):
        covering = [n for n in range(9) if starts[n] <= middle < ends[n]]
        away = [abs((starts[n] + ends[n]) / 2 - middle) for n in covering]
        weights = {
            "mean": [1.0 for _ in away],
            "gaussian": [np.exp(-8 * (distance / length) ** 2) for distance in away],
            "none": [float(n == int(np.argmin(away))) for n in range(len(away))],
        }[how]
        wanted = np.average(scores[covering], axis=0, weights=weights)
        np.testing.assert_allclose(found[cell], wanted, rtol=1e-5)


def test_what_no_window_covers_has_no_score():
    starts, ends = np.array([0.0, 6.0]), np.array([2.0, 8.0])
    curves = smooth(starts, ends, np.full((2, 2), 0.5, np.float32), cells(8.0, 2.0), "mean")
    assert np.isnan(curves).all(axis=1).tolist() == [False] * 2 + [True] * 4 + [False] * 2


def test_cells_are_half_hops_and_end_with_the_video():
    assert cells(3.3, 1.0).tolist() == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.3]
    assert cells(2.0, 1.0).tolist() == [0.0, 0.5, 1.0, 1.5, 2.0]
    assert cells(0.04, 1.0).tolist() == [0.0, 0.04]


def events_of(scores: list[float], rules: EventRules, other: list[float] | None = None):
    """Events of class 0, and of class 1, on cells of a second."""
    rows = [[score, (other or [0.0] * len(scores))[n], 0.1] for n, score in enumerate(scores)]
    found = find_events(np.array(rows, np.float32), np.arange(len(scores) + 1.0), rules)
    return [(event.start_s, event.end_s, event.label) for event in found]


class TestEvents:
    def test_hysteresis(self):
        # Begins below the threshold, above half of it; 0.3 alone is none.
        assert events_of([0.1, 0.3, 0.6, 0.3, 0.2, 0.3], RULES) == [(1, 4, 0)]
        assert events_of([0.3, 0.3, 0.49], RULES) == []

    def test_short_ones_are_dropped(self):
        rules = EventRules(0.5, 2.0, 0.0)
        assert events_of([0.6, 0.1, 0.6, 0.6, 0.1], rules) == [(2, 4, 0)]

    def test_gaps_are_closed(self):
        rules = EventRules(0.5, 2.0, 1.0)
        assert events_of([0.6, 0.1, 0.6, 0.1, 0.1, 0.6], rules) == [(0, 3, 0)]

    def test_an_event_in_a_gap_keeps_it_open(self):
        scores, other = [0.6, 0.6, 0.1, 0.1, 0.6, 0.6], [0.1, 0.1, 0.7, 0.7, 0.1, 0.1]
        wide = EventRules(0.5, 2.0, 5.0)
        assert events_of(scores, wide, other) == [(0, 2, 0), (2, 4, 1), (4, 6, 0)]
        # Too short to be one, it is swallowed.
        assert events_of(scores, EventRules(0.5, 3.0, 5.0), other) == [(0, 6, 0)]

    def test_scores(self):
        curves = np.array([[0.6, 0.4], [0.8, 0.2], [0.1, 0.1]], np.float32)
        (event,) = find_events(curves, np.arange(4.0), RULES)
        assert event.score == pytest.approx(0.7)
        assert event.peak == pytest.approx(0.8)

    def test_nothing_where_nothing_was_read(self):
        curves = np.array([[0.6, 0.1], [np.nan, np.nan], [0.6, 0.1]], np.float32)
        found = find_events(curves, np.arange(4.0), RULES)
        assert [(event.start_s, event.end_s) for event in found] == [(0, 1), (2, 3)]


@settings(max_examples=60)
@given(
    seed=st.integers(0, 999),
    threshold=st.floats(0.1, 0.9),
    least=st.floats(0, 4),
    gap=st.floats(0, 4),
)
def test_events_never_overlap_and_keep_their_rules(seed, threshold, least, gap):
    rng = np.random.default_rng(seed)
    curves = rng.dirichlet([0.3] * 4, 40).astype(np.float32)
    found = find_events(curves, np.arange(41.0), EventRules(threshold, least, gap))
    for event in found:
        own = curves[int(event.start_s) : int(event.end_s), event.label]
        assert event.end_s - event.start_s >= least - 1e-6
        assert own.max() == pytest.approx(event.peak)
        assert event.peak >= np.float32(threshold)
    for before, after in pairwise(found):
        assert before.end_s <= after.start_s
    if least == gap == 0:
        best = curves.max(axis=1) >= threshold
        inside = np.zeros(40, dtype=bool)
        for event in found:
            inside[int(event.start_s) : int(event.end_s)] = True
        assert inside[best].all()
