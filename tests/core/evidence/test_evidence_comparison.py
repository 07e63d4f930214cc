"""When two rows of a study differ."""

from __future__ import annotations

import numpy as np
import pytest

from ogreg_core.evidence.comparison import Difference, difference_of
from ogreg_core.statistics import paired_bootstrap_interval, sign_flip_test
from tests.core.evidence.test_evidence_summary import bits, result


def test_differences_are_those_of_the_statistics():
    first = {seed: result(seed, bits(100, shift=7 * seed)) for seed in range(3)}
    second = {seed: result(seed, bits(112, shift=11 * seed)) for seed in range(3)}
    a, b = (
        np.array([[*map(int, item.right["none"])] for item in row.values()])
        for row in (first, second)
    )
    difference = difference_of(first, second)
    low, high = paired_bootstrap_interval(a, b)
    assert difference.points == pytest.approx(100 * (b.mean() - a.mean()))
    assert (difference.low, difference.high) == pytest.approx((100 * low, 100 * high))
    assert difference.p == sign_flip_test((b - a).sum(axis=0).tolist())


def test_clear_needs_both_the_test_and_the_interval():
    for low, high, p, clear, small in (
        *((1, 9, 0.04, True, False), (1, 9, 0.06, False, False), (-1, 9, 0.04, False, False)),
        *((-9, -1, 0.04, True, False), (-9, 0, 0.04, False, False), (-5, 5, 0.9, False, True)),
        *((-5.1, 2, 0.9, False, False), (-2, 5.1, 0.9, False, False), (0.5, 4, 0.01, True, True)),
    ):
        middle = (low + high) / 2
        difference = Difference(middle, low, high, p, {0: middle, 1: middle, 2: middle})
        assert (difference.is_clear, difference.is_small) == (clear, small)


def test_clear_needs_every_seed():
    assert Difference(5, 1, 9, 0.01, {0: 9.0, 1: 5.0, 2: 1.0}).is_clear
    assert not Difference(5, 1, 9, 0.01, {0: 12.0, 1: 5.0, 2: -2.0}).is_clear
