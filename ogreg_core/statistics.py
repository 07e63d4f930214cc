"""How far an accuracy can be trusted: intervals, paired test, calibration. Plain functions."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

__all__ = [
    "expected_calibration_error",
    "mcnemar_exact",
    "paired_difference_interval",
    "wilson_interval",
]


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share (J. Am. Stat. Assoc. 22, 1927), without continuity correction.

    Args:
        successes: how many of the trials succeeded.
        trials: how many there were, at least one.
        confidence: how often such intervals hold the true share.

    Returns:
        Lowest and highest share, in 0..1.
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = successes / trials
    centre = share + z * z / (2 * trials)
    half = z * math.sqrt(share * (1 - share) / trials + (z / (2 * trials)) ** 2)
    scale = 1 + z * z / trials
    # Rounding may leave a hair below 0 where none succeeded, or above 1 where all did.
    low = 0.0 if successes == 0 else (centre - half) / scale
    high = 1.0 if successes == trials else (centre + half) / scale
    return low, high


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """McNemar's exact two-sided test (Psychometrika 12, 1947) of two classifiers on the same items.

    Args:
        only_first: items that only the first gets right.
        only_second: items that only the second gets right.

    Returns:
        The probability that two classifiers that are equally good differ at least so much: twice the
        binomial tail at one half, at most 1.
    """
    discordant = only_first + only_second
    fewer = min(only_first, only_second)
    ways, tail = 1, 0
    for number in range(fewer + 1):
        tail += ways
        ways = ways * (discordant - number) // (number + 1)
    # Whole numbers all the way: nothing is rounded before the division.
    return min(1.0, 2 * tail / 2**discordant)


def paired_difference_interval(
    only_first: int, only_second: int, items: int, confidence: float = 0.95
) -> tuple[float, float]:
    """Tango's score interval of the difference of two shares on the same items (Statistics in Medicine
    17, 1998): the differences that a score test of the paired counts does not reject. It is to McNemar's
    test what Wilson's interval is to a single share.

    Args:
        only_first: items that only the first gets right.
        only_second: items that only the second gets right.
        items: all of them, at least one.
        confidence: how often such intervals hold the true difference.

    Returns:
        Lowest and highest share of the second less that of the first, in -1..1.
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    reached = (only_second - only_first) / items

    def distance(difference: float) -> float:
        """Standard errors from a difference, with what is most likely under it, to the one reached."""
        a = 2.0 * items
        b = (2 * items - only_second + only_first) * difference - only_second - only_first
        c = -only_first * difference * (1 - difference)
        # The most likely share of the items that only the first gets right.
        share = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
        variance = (2 * share + difference * (1 - difference)) / items
        gap = reached - difference
        if variance <= 0:
            return math.copysign(math.inf, gap) if gap else 0.0
        return gap / math.sqrt(variance)

    low = -1.0 if only_first == items else _fall(distance, z, -1.0, reached)
    high = 1.0 if only_second == items else _fall(distance, -z, reached, 1.0)
    return low, high


def _fall(function: Callable[[float], float], level: float, low: float, high: float) -> float:
    """Where a falling function reaches a level, by bisection."""
    # Each step gains a binary digit.
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) > level else (low, middle)
    return (low + high) / 2


def expected_calibration_error(confidence: Tensor, correct: Tensor, bins: int = 15) -> float:
    """How far confidence and accuracy lie apart (Guo et al., ICML 2017, arXiv 1706.04599).

    Args:
        confidence: score of the predicted class, in 0..1, ``[N]``.
        correct: whether the prediction is right, bool ``[N]``.
        bins: how many equal parts of 0..1 the predictions are sorted into by their confidence.

    Returns:
        Mean over predictions of |accuracy - mean confidence| of their bin, in 0..1; not a number
        where there are no predictions.
    """
    if not len(confidence):
        return math.nan
    confidence = confidence.double()
    # Bins are open below and closed above; the first takes 0 too.
    place = (confidence * bins).ceil().long().sub(1).clamp(0, bins - 1)
    surplus = confidence.new_zeros(bins).index_add(0, place, correct.double() - confidence)
    return float(surplus.abs().sum() / len(confidence))
