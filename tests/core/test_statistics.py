"""Intervals, paired tests and calibration against independent computations."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ogreg_core.statistics import (
    binomial_tail,
    expected_calibration_error,
    mcnemar_exact,
    mean_interval,
    paired_bootstrap_interval,
    paired_difference_interval,
    sign_flip_test,
    student_quantile,
    wilson_interval,
)


def bisect(function, low, high):
    """Root of a function that is negative at ``low`` and positive at ``high``."""
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) < 0 else (low, middle)
    return (low + high) / 2


@given(trials=st.integers(1, 30000), share=st.floats(0, 1))
@settings(max_examples=60)
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
@settings(max_examples=40)
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


# Of probabilities 0.975 and 0.9995: Student's table, as in Abramowitz and Stegun, table 26.10.
TABLE = {
    1: (12.706, 636.619),
    **{2: (4.303, 31.598), 3: (3.182, 12.924), 4: (2.776, 8.610)},
    **{5: (2.571, 6.869), 10: (2.228, 4.587), 29: (2.045, 3.659), 120: (1.980, 3.373)},
}


@pytest.mark.parametrize("degrees", TABLE)
def test_student_quantile_equals_the_published_table(degrees):
    found = student_quantile(0.975, degrees), student_quantile(0.9995, degrees)
    assert found == pytest.approx(TABLE[degrees], abs=1.5e-3, rel=5e-5)
    assert student_quantile(0.025, degrees) == pytest.approx(-found[0])
    assert student_quantile(0.5, degrees) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("degrees", [1, 2, 3, 6, 7, 40])
def test_student_quantile_has_the_area_below_it(degrees):
    """The density, summed by Simpson's rule from the middle."""
    t = student_quantile(0.9, degrees)
    scale = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2))
    x = torch.linspace(0, t, 2001, dtype=torch.float64)
    density = scale / math.sqrt(degrees * math.pi) * (1 + x**2 / degrees) ** (-(degrees + 1) / 2)
    weights = torch.ones_like(x)
    weights[1:-1:2], weights[2:-1:2] = 4, 2
    area = float((weights * density).sum() * t / 2000 / 3)
    assert 0.5 + area == pytest.approx(0.9, abs=1e-9)


@given(st.integers(1, 60), st.data())
def test_binomial_tail_is_the_exact_sum(trials, data):
    successes = data.draw(st.integers(0, trials))
    share = Fraction(data.draw(st.integers(0, 20)), 20)
    # Of the trials one after the other: the distribution of how many succeeded so far.
    known = [Fraction(1)]
    for _ in range(trials):
        known = [
            (known[n] if n < len(known) else 0) * (1 - share) + (known[n - 1] * share if n else 0)
            for n in range(len(known) + 1)
        ]
    expected = float(sum(known[successes:]))
    assert binomial_tail(successes, trials, float(share)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("successes", "trials"), [(0, 2000), (300, 2000), (2600, 20000)])
def test_binomial_tail_of_a_large_test_set(successes, trials):
    ways = sum(math.comb(trials, n) * 7 ** (trials - n) for n in range(successes))
    expected = float(1 - Fraction(ways, 8**trials))
    assert binomial_tail(successes, trials, 1 / 8) == pytest.approx(expected, rel=1e-8)


def test_student_quantile_equals_scipy():
    stats = pytest.importorskip("scipy.stats")
    for degrees in (1, 2, 3, 8, 51, 1000):
        for probability in (0.01, 0.6, 0.975, 0.9999):
            expected = stats.t.ppf(probability, degrees)
            assert student_quantile(probability, degrees) == pytest.approx(expected, rel=1e-7)


def test_mean_interval_of_seeds():
    # Mean 61, standard deviation 2, 4.3027 quantile: 61 +- 4.3027 * 2 / sqrt(3).
    assert mean_interval([59, 61, 63]) == pytest.approx((61, 56.0317, 65.9683), abs=1e-4)
    narrow = mean_interval([59, 61, 63], confidence=0.5)
    assert narrow == pytest.approx(
        (61, 61 - 0.8165 * 2 / 3**0.5, 61 + 0.8165 * 2 / 3**0.5), abs=1e-4
    )
    mean, low, high = mean_interval([72.5])
    assert mean == 72.5
    assert math.isnan(low)
    assert math.isnan(high)


@given(differences=st.lists(st.integers(-3, 3), max_size=9))
@settings(max_examples=60)
def test_sign_flips_equal_all_sign_patterns(differences):
    far = abs(sum(differences))
    patterns = list(itertools.product((-1, 1), repeat=len(differences)))
    reached = sum(
        abs(sum(s * d for s, d in zip(signs, differences, strict=True))) >= far
        for signs in patterns
    )
    assert sign_flip_test(differences) == pytest.approx(reached / len(patterns), rel=1e-12)


def test_sign_flips_of_one_seed_are_mcnemars_test():
    for first, second in ((9, 3), (0, 0), (0, 12), (25, 31)):
        differences = [-1] * first + [1] * second + [0] * 40
        found = sign_flip_test(differences)
        assert found == pytest.approx(mcnemar_exact(first, second), rel=1e-12)
        assert sign_flip_test([3 * difference for difference in differences]) == found


def test_sign_flips_of_many_videos_are_normal():
    generator = torch.Generator().manual_seed(0)
    differences = torch.randint(-3, 4, (4000,), generator=generator).tolist()
    differences += [1] * 300
    # Sums are two apart.
    z = (abs(sum(differences)) - 1) / math.sqrt(sum(d * d for d in differences))
    assert z > 1.5
    assert sign_flip_test(differences) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=2e-3)


def tables(seeds, videos, second, seed_scale=0.0):
    """Right or wrong of two models that see the same videos, under the same seeds."""
    rng = np.random.default_rng(5)
    hard = rng.random(videos)
    of_seed = seed_scale * rng.standard_normal((2, seeds, 1))
    found = []
    for number, share in enumerate((0.5, second)):
        chance = np.clip(0.5 * hard + 0.5 * share + of_seed[number], 0, 1)
        found.append((rng.random((seeds, videos)) < chance).astype(int))
    return found


def test_bootstrap_equals_drawing_one_by_one():
    """Plain loops over indices that are drawn, instead of products with counts."""
    first, second = tables(4, 60, 0.7, seed_scale=0.1)
    rng = np.random.default_rng(17)
    drawn = []
    for _ in range(4000):
        seeds, videos = rng.integers(4, size=4), rng.integers(60, size=60)
        pick = np.ix_(seeds, videos)
        drawn.append(second[pick].mean() - first[pick].mean())
    found = paired_bootstrap_interval(first, second, confidence=0.9)
    assert found == pytest.approx(np.quantile(drawn, [0.05, 0.95]), abs=0.012)
    low, high = paired_bootstrap_interval(first, second, confidence=0.99)
    assert low < found[0] < second.mean() - first.mean() < found[1] < high


def test_bootstrap_of_one_seed_is_that_of_the_videos():
    first, second = tables(1, 400, 0.6)
    difference = second[0] - first[0]
    low, high = paired_bootstrap_interval(first, second)
    half = 1.96 * difference.std() / math.sqrt(400)
    assert (low, high) == pytest.approx(
        (difference.mean() - half, difference.mean() + half), abs=4e-3
    )


def test_bootstrap_takes_seeds_and_videos_into_account():
    """Seeds that differ more widen it; the same tables have no difference at all."""
    calm, wild = (
        paired_bootstrap_interval(*tables(3, 120, 0.6, seed_scale=scale)) for scale in (0, 0.3)
    )
    assert wild[1] - wild[0] > 1.5 * (calm[1] - calm[0])
    first, second = tables(3, 120, 0.6)
    assert paired_bootstrap_interval(first, first) == (0, 0)
    assert paired_bootstrap_interval(first, second) == paired_bootstrap_interval(first, second)
    mirrored = paired_bootstrap_interval(second, first)
    assert mirrored == pytest.approx(tuple(-end for end in calm[::-1]), abs=1e-9)
    assert paired_bootstrap_interval(first, second, draws=700) != calm
