"""How far an accuracy can be trusted: intervals, paired tests, calibration. Plain functions."""

from __future__ import annotations

import math
from statistics import NormalDist, fmean, stdev
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy as np
    from torch import Tensor

__all__ = [
    "binomial_tail",
    "expected_calibration_error",
    "mcnemar_exact",
    "mean_interval",
    "paired_bootstrap_interval",
    "paired_difference_interval",
    "sign_flip_test",
    "student_quantile",
    "wilson_interval",
]

# Draws of the bootstrap that are computed at a time: their weights are a table of draws x videos.
_DRAWS_AT_A_TIME = 500


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


def binomial_tail(successes: int, trials: int, share: float) -> float:
    """The probability of at least so many successes.

    Args:
        successes: how many there were.
        trials: how many there could have been.
        share: of successes in the long run, 0..1.
    """
    if share in (0.0, 1.0):
        return float(successes <= trials * share)

    def log_ways(count: int) -> float:
        return math.lgamma(trials + 1) - math.lgamma(count + 1) - math.lgamma(trials - count + 1)

    # By logarithms: of a thousand trials the ways alone are more than a float holds.
    return math.fsum(
        math.exp(log_ways(n) + n * math.log(share) + (trials - n) * math.log1p(-share))
        for n in range(successes, trials + 1)
    )


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


def student_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t distribution, from its finite series for whole degrees of freedom
    (Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4).

    Args:
        probability: share of the distribution below the quantile, strictly between 0 and 1.
        degrees: of freedom, at least one.
    """
    if probability < 0.5:
        return -student_quantile(1 - probability, degrees)
    outside = 2 * (1 - probability)

    def both_tails(angle: float) -> float:
        return 1 - _student_within(angle, degrees)

    # The angle, whose tangent times the root of the degrees is t, has a finite range.
    angle = _fall(both_tails, outside, 0.0, math.pi / 2)
    return math.sqrt(degrees) * math.tan(angle)


def _student_within(angle: float, degrees: int) -> float:
    """Share of the distribution within plus or minus ``sqrt(degrees) * tan(angle)``."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term, total = (cosine if odd else 1.0), 0.0
    for power in range(2 + odd, degrees + 1, 2):
        total += term
        term *= cosine * cosine * (power - 1) / power
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean and Student's interval (Biometrika 6, 1908) of it, for accuracies of several seeds.

    It captures how far other seeds of the same recipe would go, on this test split. It says nothing
    about other videos. It takes the seeds' accuracies for normally distributed; three seeds are too few
    to see whether they are, and make it wide: 2.5 standard deviations to either side, of an estimate
    that is itself uncertain by half.

    Args:
        values: one per seed, at least one.
        confidence: how often such intervals hold the true mean.

    Returns:
        Mean, lowest and highest mean; a single value has no interval: the ends are not numbers.
    """
    mean = fmean(values)
    if len(values) == 1:
        return mean, math.nan, math.nan
    t = student_quantile((1 + confidence) / 2, len(values) - 1)
    half = t * stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def sign_flip_test(differences: Sequence[int]) -> float:
    """Fisher's exact two-sided paired permutation test (The Design of Experiments, 1935, section 21):
    how often the sum is at least as far from zero if each difference had its sign by chance.

    Per video the difference is how many seeds of one model get it right, less how many of another. It
    captures the choice of the videos: whether these very networks, taken together, would differ on
    others. It treats the trained networks as given, so that it says nothing about other seeds. Of one
    seed it is McNemar's exact test.

    Args:
        differences: whole numbers, one per video; the scale does not matter.

    Returns:
        The probability, from the whole distribution: no random numbers are drawn.
    """
    import numpy as np

    sizes = [abs(difference) for difference in differences]
    distribution = np.ones(1)
    for size in sorted(set(sizes) - {0}):
        flips = np.zeros(size * sizes.count(size) + 1)
        flips[::size] = list(_fair_coins(sizes.count(size)))
        distribution = np.convolve(distribution, flips)
    # The sum of all signed sizes, by the sum of those that are positive.
    sums = 2 * np.arange(len(distribution)) - sum(sizes)
    return min(1.0, float(distribution[np.abs(sums) >= abs(sum(differences))].sum()))


def _fair_coins(number: int) -> Iterator[float]:
    """The probabilities of 0, 1, ... heads."""
    ways, all_ways = 1, 2**number
    for heads in range(number + 1):
        yield ways / all_ways
        ways = ways * (number - heads) // (heads + 1)


def paired_bootstrap_interval(
    first: np.ndarray,
    second: np.ndarray,
    confidence: float = 0.95,
    draws: int = 10_000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of the difference of two accuracies by the crossed ("pigeonhole") bootstrap
    (Owen, Annals of Applied Statistics 1, 2007): seeds and videos are drawn again, each by itself, with
    replacement, and both models are seen through the same draw.

    It captures both the choice of the videos and that of the seeds. It errs to the wide side in the part
    that is neither the video's nor the seed's alone, and to the narrow side in the seeds' part, whose
    variance it takes for (S - 1) / S of what it is: two thirds for three seeds, and none at all for one.

    Args:
        first: whether a video is right under a seed, 1 or 0, ``[seeds, videos]``.
        second: the same of the other model, under the same seeds, ``[seeds, videos]``.
        confidence: how often such intervals are meant to hold the true difference.
        draws: how many times seeds and videos are drawn.
        seed: of the draws; the same seed gives the same interval.

    Returns:
        Lowest and highest share of the second less that of the first, in -1..1.
    """
    import numpy as np

    table = np.asarray(second, dtype=float) - np.asarray(first, dtype=float)
    seeds, videos = table.shape
    generator = np.random.default_rng(seed)
    means: list[np.ndarray] = []
    for start in range(0, draws, _DRAWS_AT_A_TIME):
        count = min(_DRAWS_AT_A_TIME, draws - start)
        # How often each seed and each video was drawn.
        of_seeds = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=count)
        of_videos = generator.multinomial(videos, np.full(videos, 1 / videos), size=count)
        means.append(((of_seeds @ table) * of_videos).sum(axis=1) / table.size)
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return float(low), float(high)


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
