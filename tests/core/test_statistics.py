"""Intervals, McNemar's test and calibration against independent computations."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ogreg_core.statistics import (
    expected_calibration_error,
    mcnemar_exact,
    paired_difference_interval,
    wilson_interval,
)


def bisect(function, low, high):
    """Root of a function that is negative at ``low`` and positive at ``high``."""
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) < 0 else (low, middle)
    return (low + high) / 2


@given(trials=st.integers(1, 30000), share=st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_wilson_solves_the_score_equation(trials, share):
    """At both ends the observed share is 1.96 standard errors *of the end* away."""
    successes = round(share * trials)
    observed, z = successes / trials, 1.959963984540054

    def distance(p):
        return (p - observed) ** 2 - z * z * p * (1 - p) / trials

    low, high = wilson_interval(successes, trials)
    # The quadratic falls to its root below the observed share and rises to the one above.
    expected_low = bisect(lambda p: -distance(p), 0, observed) if successes else 0
    expected_high = bisect(distance, observed, 1) if successes < trials else 1
    assert low == pytest.approx(expected_low, abs=1e-9)
    assert high == pytest.approx(expected_high, abs=1e-9)


@pytest.mark.parametrize(
    ("successes", "trials", "interval"),
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
    [
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
    ],
)
def test_wilson_equals_the_published_table(successes, trials, interval):
    assert wilson_interval(successes, trials) == pytest.approx(interval, abs=5e-5)


def test_intervals_stay_within_0_and_1():
    assert wilson_interval(7, 7)[1] == 1.0
    assert wilson_interval(0, 7)[0] == 0.0
    narrow, wide = wilson_interval(50, 100, 0.5), wilson_interval(50, 100, 0.99)
    assert wide[0] < narrow[0] < 0.5 < narrow[1] < wide[1]


@pytest.mark.parametrize("discordant", [0, 1, 2, 5, 10, 33])
def test_mcnemar_equals_the_sum_over_all_outcomes(discordant):
    """Two-sided: every split of the discordant items that is at least as uneven."""
    for first in range(discordant + 1):
        uneven = abs(2 * first - discordant)
        ways = sum(
            math.comb(discordant, k)
            for k in range(discordant + 1)
            if abs(2 * k - discordant) >= uneven
        )
        expected = float(Fraction(ways, 2**discordant))
        assert mcnemar_exact(first, discordant - first) == pytest.approx(expected, rel=1e-12)


def test_mcnemar_of_many_videos():
    """Where the normal approximation with continuity correction is good, they agree; the far tail
    vanishes without an error.
    """
    z = (abs(5100 - 4900) - 1) / math.sqrt(10000)
    assert mcnemar_exact(5100, 4900) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=1e-3)
    assert mcnemar_exact(4900, 5100) == mcnemar_exact(5100, 4900)
    assert mcnemar_exact(20000, 0) == 0.0


def golden(function, low, high):
    """Where a function with one peak is highest."""
    ratio = (math.sqrt(5) - 1) / 2
    for _ in range(120):
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, b) if function(a) > function(b) else (a, high)
    return (low + high) / 2


@pytest.mark.parametrize(
    ("first", "second", "items"),
    [(0, 0, 20), (3, 9, 40), (9, 3, 40), (0, 7, 30), (12, 2, 50), (1, 1, 4), (140, 205, 1000)],
)
def test_paired_interval_ends_where_the_score_test_rejects(first, second, items):
    """The nuisance parameter by searching the multinomial likelihood, instead of by a formula."""

    def distance(difference):
        def likelihood(p):
            cells = ((first, p), (second, p + difference))
            rest = (items - first - second, 1 - 2 * p - difference)
            return sum(n * math.log(max(q, 1e-300)) for n, q in (*cells, rest) if n)

        p = golden(likelihood, max(0.0, -difference), (1 - difference) / 2)
        deviation = math.sqrt((2 * p + difference - difference**2) / items)
        return ((second - first) / items - difference) / deviation

    low, high = paired_difference_interval(first, second, items)
    assert low < (second - first) / items < high
    assert distance(low) == pytest.approx(1.959963984540054, abs=1e-4)
    assert distance(high) == pytest.approx(-1.959963984540054, abs=1e-4)
    mirrored = paired_difference_interval(second, first, items)
    assert mirrored == pytest.approx((-high, -low))


def test_paired_interval_at_its_ends():
    """With nothing but one kind of change it is Wilson's; where all changed it ends at 1."""
    assert paired_difference_interval(0, 8, 8)[1] == 1.0
    assert paired_difference_interval(8, 0, 8)[0] == -1.0
    z = 1.959963984540054
    low, high = paired_difference_interval(0, 0, 50)
    assert (-low, high) == pytest.approx((z**2 / (50 + z**2),) * 2)
    narrow = paired_difference_interval(300, 500, 20000)
    # Of many items it is the normal approximation.
    deviation = math.sqrt((800 - 200**2 / 20000) / 20000**2)
    assert narrow == pytest.approx((0.01 - z * deviation, 0.01 + z * deviation), abs=5e-5)


@given(
    classes=st.integers(2, 9),
    count=st.integers(1, 200),
    bins=st.integers(1, 20),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=40, deadline=None)
def test_calibration_error_equals_torchmetrics(classes, count, bins, seed):
    from torchmetrics.functional.classification import multiclass_calibration_error

    generator = torch.Generator().manual_seed(seed)
    scores = (3 * torch.randn(count, classes, generator=generator)).softmax(1)
    labels = torch.randint(0, classes, (count,), generator=generator)
    best = scores.max(1)
    found = expected_calibration_error(best.values, best.indices == labels, bins)
    expected = multiclass_calibration_error(scores, labels, classes, n_bins=bins, norm="l1").item()
    assert found == pytest.approx(expected, abs=1e-5)


def test_calibration_error_of_known_cases():
    sure = torch.ones(4)
    assert expected_calibration_error(sure, torch.tensor([True] * 4)) == 0
    assert expected_calibration_error(sure, torch.tensor([True, False, False, False])) == 0.75
    # A border belongs to the bin below it: 0.5 of two bins to the first.
    confidence = torch.tensor([0.5, 0.9])
    found = expected_calibration_error(confidence, torch.tensor([True, False]), bins=2)
    assert found == pytest.approx((0.5 + 0.9) / 2)
    assert math.isnan(expected_calibration_error(torch.empty(0), torch.empty(0, dtype=torch.bool)))
