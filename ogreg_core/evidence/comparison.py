"""Rows of a study compared: the difference on each data set, and what all data sets say together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ogreg_core.evidence.results import Result
from ogreg_core.statistics import binomial_tail, paired_bootstrap_interval, sign_flip_test

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "LEAST_SEEDS",
    "MARGIN_POINTS",
    "SIGNIFICANT",
    "Cell",
    "Difference",
    "Verdict",
    "difference_of",
    "is_chance",
    "judge",
]

SIGNIFICANT = 0.05
# Two models are called alike if the interval of their difference stays within so many points: what the
# choice of 400 test videos alone leaves open of one accuracy near a half (1.96 standard errors are 4.9).
MARGIN_POINTS = 5.0
# Two seeds may agree by chance.
LEAST_SEEDS = 3


@dataclass(frozen=True)
class Difference:
    """A row against the reference or another row, over the seeds that both have.

    Args:
        points: top-1 of the row less that of the other, in percent points.
        low, high: 95 % interval of it, over seeds and videos.
        p: of the sign-flip test over videos.
        by_seed: the difference of each seed that both have, in percent points.
    """

    points: float
    low: float
    high: float
    p: float
    by_seed: Mapping[int, float]

    @property
    def seeds(self) -> tuple[int, ...]:
        """That both have."""
        return tuple(self.by_seed)

    @property
    def is_clear(self) -> bool:
        """Whether the test and the interval say that there is one, and every seed says the same: of
        three seeds an interval sees too little of what others would do.
        """
        values = self.by_seed.values()
        same_way = all(value > 0 for value in values) or all(value < 0 for value in values)
        return self.p < SIGNIFICANT and (self.low > 0 or self.high < 0) and same_way

    @property
    def is_small(self) -> bool:
        """Whether the interval leaves no room for one that matters."""
        return self.low >= -MARGIN_POINTS and self.high <= MARGIN_POINTS


@dataclass(frozen=True)
class Cell:
    """A row on a data set; None stands for what is not known.

    Args:
        row, dataset: which.
        model: registry name; empty before the first result.
        lr: peak learning rate.
        top1s: percent, by seed.
        mean, low, high: of them, with the 95 % interval over seeds, as far as it lies in 0..100.
        at_chance: seeds that are right no more often than chance could be (one-sided binomial test).
        difference: to the reference; None for the reference itself, too.
        judged: the same under each control that the study compares rows under.
        paired: the difference to the row that the study names as ``against``.
        controls: mean top-1 in percent of the same networks under each frame-order control that all of
            them were tested under.
        seconds: median of the trainings.
        gmacs: billions of multiply-adds of one view.
        params: trainable numbers.
        missing: why a seed has no result, by seed.
    """

    row: str
    dataset: str
    model: str = ""
    lr: float | None = None
    top1s: Mapping[int, float] = field(default_factory=dict)
    mean: float | None = None
    low: float | None = None
    high: float | None = None
    at_chance: tuple[int, ...] = ()
    difference: Difference | None = None
    judged: Mapping[str, Difference] = field(default_factory=dict)
    paired: Difference | None = None
    controls: Mapping[str, float] = field(default_factory=dict)
    seconds: float | None = None
    gmacs: float | None = None
    params: int | None = None
    missing: Mapping[int, str] = field(default_factory=dict)

    @property
    def has_learnt(self) -> bool:
        """Whether some seed is better than chance."""
        return set(self.at_chance) != set(self.top1s)

    def under(self, control: str) -> Difference | None:
        """The difference to the reference under a control, or ``none``."""
        return self.difference if control == "none" else self.judged.get(control)


@dataclass(frozen=True)
class Verdict:
    """What all data sets together say about a row against another.

    Args:
        row: which.
        word: ``better``, ``worse``, ``no clear difference`` or ``not settled``.
        why: what has to be said with it.
        control: the frames that it is about; ``none`` are the plain ones.
        against: the study's reference, or the row that the study pairs this one with.
        differences: by data set; None where there is none.
    """

    row: str
    word: str
    why: str
    control: str
    against: str
    differences: Mapping[str, Difference | None]


def is_chance(result: Result, classes: int) -> bool:
    """Whether it is right no more often than guessing could be (one-sided binomial test)."""
    bits = result.right["none"]
    return binomial_tail(bits.count("1"), len(bits), 1.0 / classes) >= SIGNIFICANT


def difference_of(
    first: Mapping[int, Result], second: Mapping[int, Result], control: str = "none"
) -> Difference | None:
    """The second less the first, over the seeds that both were tested with; None if there is none.

    Args:
        first, second: trainings of two rows on one data set, by seed.
        control: the frames that they were tested on; ``none`` are the plain ones.
    """
    seeds = tuple(
        seed
        for seed in second
        if seed in first and control in first[seed].right and control in second[seed].right
    )
    if not seeds:
        return None
    a, b = (_table([results[seed].right[control] for seed in seeds]) for results in (first, second))
    low, high = paired_bootstrap_interval(a, b)
    by_video = b.sum(axis=0) - a.sum(axis=0)
    points = 100.0 * float(by_video.sum()) / a.size
    by_seed = 100.0 * (b.mean(axis=1) - a.mean(axis=1))
    p = sign_flip_test(by_video.tolist())
    each = dict(zip(seeds, by_seed.tolist(), strict=True))
    return Difference(points, 100 * low, 100 * high, p, each)


def _table(right: Sequence[str]) -> np.ndarray:
    """Whether each video is right under each seed, ``[seeds, videos]``."""
    import numpy as np

    return np.array([[int(bit) for bit in bits] for bits in right])


def judge(
    row: str, against: str, cells: Sequence[Cell], control: str = "none", paired: bool = False
) -> Verdict:
    """The verdict on a row: clear only if it is clear on every data set, and the same way.

    Args:
        row, against: which rows.
        cells: of both on every data set; others are passed over.
        control: the frames that it is about.
        paired: whether ``against`` is the row that the study pairs this one with, not its reference.
    """
    own = [cell for cell in cells if cell.row == row]
    others = [cell for cell in cells if cell.row == against]
    found = {cell.dataset: cell.paired if paired else cell.under(control) for cell in own}
    word, why = _word_and_reason(own, others, found)
    return Verdict(row, word, why, control, against, found)


def _word_and_reason(
    own: Sequence[Cell], others: Sequence[Cell], found: Mapping[str, Difference | None]
) -> tuple[str, str]:
    """Word and reason of a verdict."""
    lacking = [cell for cell in (*own, *others) if cell.missing]
    if lacking:
        return "not settled", f"{lacking[0].row} lacks seeds on {lacking[0].dataset}"
    differences = [difference for difference in found.values() if difference]
    if not differences or len(differences) < len(found):
        return "not settled", "the reference was not asked for, not trained, or not tested so"
    if min(len(difference.seeds) for difference in differences) < LEAST_SEEDS:
        return "not settled", f"fewer than {LEAST_SEEDS} seeds"
    if all(one.is_clear for one in differences):
        if all(one.low > 0 for one in differences):
            return "better", _caveats(others)
        if all(one.high < 0 for one in differences):
            return "worse", _caveats(own)
        return "not settled", "better on one data set, worse on another"
    if all(one.is_small for one in differences):
        return "no clear difference", ""
    return "not settled", _unsettled(found)


def _caveats(losers: Sequence[Cell]) -> str:
    """What has to be said of a clear verdict."""
    said = []
    if len(losers) == 1:
        said.append(f"on {losers[0].dataset} alone")
    stuck = [cell.dataset for cell in losers if not cell.has_learnt]
    if stuck:
        said.append(f"{losers[0].row} is at chance on {', '.join(stuck)} after this budget")
    return "; ".join(said)


def _unsettled(found: Mapping[str, Difference | None]) -> str:
    """Where a difference is neither clear nor small."""
    clear = [dataset for dataset, difference in found.items() if difference and difference.is_clear]
    others = [dataset for dataset in found if dataset not in clear]
    if clear:
        return f"clear on {', '.join(clear)}, not on {', '.join(others)}"
    return f"neither clear nor within ±{MARGIN_POINTS:g} points"
