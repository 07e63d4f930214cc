"""What a study's trainings show: a cell for each row on each data set, and a verdict for each row."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from ogreg_core.errors import DataError
from ogreg_core.evidence.results import Result
from ogreg_core.evidence.study import Study
from ogreg_core.recipe import Recipe
from ogreg_core.statistics import (
    binomial_tail,
    mean_interval,
    paired_bootstrap_interval,
    sign_flip_test,
)

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "LEAST_SEEDS",
    "MARGIN_POINTS",
    "SIGNIFICANT",
    "Cell",
    "DataFacts",
    "Difference",
    "Failure",
    "Summary",
    "Tests",
    "Tuned",
    "Verdict",
    "is_chance",
    "summarise",
]

SCHEMA = "ogreg.evidence-report.v1"
SIGNIFICANT = 0.05
# Two models are called alike if the interval of their difference stays within so many points: what the
# choice of 400 test videos alone leaves open of one accuracy near a half (1.96 standard errors are 4.9).
MARGIN_POINTS = 5.0
# Two seeds may agree by chance.
LEAST_SEEDS = 3
_UNFINISHED = "not finished yet"


@dataclass(frozen=True)
class DataFacts:
    """A data set of the study.

    Args:
        name: of the data set.
        classes: how many.
        train_videos, val_videos: learnt from, and tested on.
        train_sha256, val_sha256: hashes of the manifests.
        epochs: that each training takes.
    """

    name: str
    classes: int
    train_videos: int
    val_videos: int
    train_sha256: str
    val_sha256: str
    epochs: int

    @property
    def chance(self) -> float:
        """Percent right by a draw among the classes."""
        return 100.0 / self.classes


@dataclass(frozen=True)
class Tests:
    """The trainings of all rows on one data set.

    Args:
        facts: of the data set.
        results: by the name of the row, in any order, failed ones included; rows without any may lack.
    """

    facts: DataFacts
    results: Mapping[str, Sequence[Result]]


@dataclass(frozen=True)
class Tuned:
    """How a row came by its learning rate.

    Args:
        row, dataset: what was tuned, on which data set's held-out videos.
        lr: chosen; None as long as it is not.
        accuracies: held-out top-1 in percent by learning rate; None where the training failed; empty
            where the study gives the rate, or another row does.
        is_blind: whether it was chosen by videos of which it was right no more often than chance.
    """

    row: str
    dataset: str
    lr: float | None
    accuracies: Mapping[float, float | None] = field(default_factory=dict)
    is_blind: bool = False


@dataclass(frozen=True)
class Failure:
    """A training that ended without a result.

    Args:
        row, dataset: what was trained; the data set ends in ``-tuning`` if it was for a learning rate.
        seed, lr: of the training.
        reason: one sentence.
    """

    row: str
    dataset: str
    seed: int
    lr: float
    reason: str


@dataclass(frozen=True)
class Difference:
    """A row against the reference, over the seeds that both have.

    Args:
        points: top-1 of the row less that of the reference, in percent points.
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


@dataclass(frozen=True)
class Summary:
    """Everything that a report says.

    Args:
        name: of the study.
        study, recipe: the terms that are equal for all rows.
        data: the data sets, in order.
        cells: of each data set all rows in the study's order.
        verdicts: of all rows but the reference, under the plain frames and each judged control; then
            those of pairs.
        tuned: learning rates and how they came about.
        failures: trainings without a result, those for learning rates included.
        machines: on what the trainings ran, each that occurs, with all versions of the code.
    """

    name: str
    study: Study
    recipe: Recipe
    data: tuple[DataFacts, ...]
    cells: tuple[Cell, ...]
    verdicts: tuple[Verdict, ...]
    tuned: tuple[Tuned, ...]
    failures: tuple[Failure, ...]
    machines: tuple[str, ...]

    def cell(self, row: str, dataset: str) -> Cell:
        """The row's cell on the data set."""
        return next(cell for cell in self.cells if (cell.row, cell.dataset) == (row, dataset))

    def is_blind(self, row: str, dataset: str) -> bool:
        """Whether the row's learning rate there was chosen by what was no better than chance."""
        return any(
            item.is_blind
            for item in self.tuned
            if item.row == row and _serves(self.study, item, dataset)
        )

    def document(self, command: str) -> dict[str, Any]:
        """For JSON, of the schema ``ogreg.evidence-report.v1``.

        Args:
            command: that makes the report again.
        """
        margin = {"significant": SIGNIFICANT, "margin_points": MARGIN_POINTS}
        return {
            "schema": SCHEMA,
            "name": self.name,
            "command": command,
            "study": self.study.model_dump(),
            "recipe": self.recipe.model_dump(),
            "data": [{**asdict(facts), "chance_pct": facts.chance} for facts in self.data],
            "cells": [asdict(cell) for cell in self.cells],
            "verdict_rule": {**margin, "least_seeds": LEAST_SEEDS},
            # The differences stand in the cells.
            "verdicts": [
                {key: value for key, value in asdict(verdict).items() if key != "differences"}
                for verdict in self.verdicts
            ],
            # Keys of JSON objects are texts, which would not sort as numbers do.
            "tuned": [
                {**asdict(item), "accuracies": sorted(item.accuracies.items())}
                for item in self.tuned
            ],
            "failures": [asdict(failure) for failure in self.failures],
            "machines": list(self.machines),
        }


def summarise(
    name: str,
    study: Study,
    recipe: Recipe,
    tests: Sequence[Tests],
    tuned: Sequence[Tuned] = (),
    failures: Sequence[Failure] = (),
) -> Summary:
    """Turn results into what they show.

    Args:
        name: of the study.
        study: with the rows and seeds that are wanted; results of other seeds do not count.
        recipe: shared by all rows.
        tests: the trainings on each data set.
        tuned: learning rates, by row and data set.
        failures: further trainings without a result; those among ``tests`` are found here.

    Raises:
        DataError: a result tells of another number of videos than its data set has.
    """
    names = [row.name for row in study.rows]

    cells: list[Cell] = []
    # In order, each once.
    lost, machines = dict.fromkeys(failures), dict[str, list[str]]()
    for test in tests:
        done = {row: _done(test, row, study.seeds) for row in names}
        failed = {row: _failed(test, row, study.seeds) for row in names}
        for row in names:
            reference = {} if row == study.reference else done.get(study.reference, {})
            partner = done.get(study.row(row).against, {})
            own = [
                item for item in tuned if item.row == row and _serves(study, item, test.facts.name)
            ]
            chooser = study.row(row).lr_of or row
            hopeless = any(
                _is_hopeless(item, study)
                for item in tuned
                if item.row == chooser and _serves(study, item, test.facts.name)
            )
            waiting = (
                "cannot start: no rate of the grid could be trained" if hopeless else _UNFINISHED
            )
            missing = {
                seed: f"failed: {failed[row][seed].reason}" if seed in failed[row] else waiting
                for seed in study.seeds
                if seed not in done[row]
            }
            rates: list[float | None] = [item.lr for item in failed[row].values()]
            rates += [item.lr for item in own]
            others = (reference, partner)
            cells.append(_cell(row, test.facts, study.judged, done[row], others, missing, rates))
            lost |= dict.fromkeys(failed[row].values())
            for result in done[row].values():
                codes = machines.setdefault(_machine(result), [])
                codes += [code for code in _code(result) if code not in codes]
    pairs = {row.name: row.against for row in study.rows if row.against in names}
    verdicts = [
        _verdict(row, study.reference, cells, control)
        for control in ("none", *study.judged)
        for row in names
        if row != study.reference
    ]
    verdicts += [_verdict(row, against, cells, paired=True) for row, against in pairs.items()]
    return Summary(
        name,
        study,
        recipe,
        tuple(test.facts for test in tests),
        tuple(cells),
        tuple(verdicts),
        tuple(tuned),
        tuple(lost),
        tuple(
            f"{machine}, code {' '.join(codes)}" if codes else machine
            for machine, codes in machines.items()
        ),
    )


def _done(test: Tests, row: str, seeds: Sequence[int]) -> dict[int, Result]:
    """Results with scores by seed, in the order of the seeds."""
    videos = test.facts.val_videos
    found = {result.identity.seed: result for result in test.results.get(row, ()) if result.is_done}
    for seed, result in found.items():
        wrong = {len(bits) for bits in result.right.values()} - {videos}
        if wrong:
            raise DataError(
                f"the result of {row}, seed {seed}, is not of the data set {test.facts.name}",
                where=f"test videos in the result: {wrong.pop()}",
                why=f"the data set has {videos}",
            )
    return {seed: found[seed] for seed in seeds if seed in found}


def _failed(test: Tests, row: str, seeds: Sequence[int]) -> dict[int, Failure]:
    return {
        result.identity.seed: Failure(
            row, test.facts.name, result.identity.seed, result.lr, result.reason
        )
        for result in test.results.get(row, ())
        if not result.is_done and result.identity.seed in seeds
    }


def _serves(study: Study, item: Tuned, dataset: str) -> bool:
    """Whether the rate is that of trainings on the data set: it is tuned there, or once for all."""
    return not study.tuning.each or item.dataset == dataset


def _is_hopeless(tuned: Tuned, study: Study) -> bool:
    """Whether all rates were tried, and all failed."""
    tried = len(tuned.accuracies) == len(study.tuning.lrs)
    return tried and all(top1 is None for top1 in tuned.accuracies.values())


def _machine(result: Result) -> str:
    """On what a training ran, as far as it was recorded; if results of a table differ in it, the report
    shows all of them.
    """
    made = result.made
    device, threads = made.get("device", "unknown device"), made.get("threads")
    parts = [f"{device}, {threads} thread{'s' * (threads != 1)}" if threads else str(device)]
    parts += [f"time of the {made['clock']}"] if "clock" in made else []
    parts += [str(made["precision"])] if "precision" in made else []
    parts += [f"torch {made['torch']}"] if "torch" in made else []
    return ", ".join(parts)


def _code(result: Result) -> list[str]:
    """The beginning of the hash of the code that trained, as far as it was recorded."""
    return [result.made["source"][:8]] if "source" in result.made else []


def _cell(
    row: str,
    facts: DataFacts,
    judged: Sequence[str],
    done: Mapping[int, Result],
    others: tuple[Mapping[int, Result], Mapping[int, Result]],
    missing: Mapping[int, str],
    rates: Sequence[float | None],
) -> Cell:
    """A row's cell against the reference and the row it is paired with; its learning rate is the first of
    ``rates`` where no result tells it.
    """
    reference, partner = others
    if not done:
        return Cell(row, facts.name, lr=rates[0] if rates else None, missing=missing)
    first = next(iter(done.values()))
    top1s = {seed: result.top1() for seed, result in done.items()}
    mean, low, high = mean_interval(list(top1s.values()))
    return Cell(
        row,
        facts.name,
        model=first.model,
        lr=first.lr,
        top1s=top1s,
        mean=mean,
        low=None if math.isnan(low) else max(low, 0.0),
        high=None if math.isnan(high) else min(high, 100.0),
        at_chance=tuple(seed for seed, result in done.items() if is_chance(result, facts.classes)),
        difference=_difference(reference, done),
        judged={
            control: difference
            for control in judged
            if (difference := _difference(reference, done, control)) is not None
        },
        paired=_difference(partner, done),
        controls=_controlled(list(done.values())),
        seconds=statistics.median(result.seconds for result in done.values()),
        gmacs=first.gmacs,
        params=first.params,
        missing=missing,
    )


def is_chance(result: Result, classes: int) -> bool:
    """Whether it is right no more often than guessing could be (one-sided binomial test)."""
    bits = result.right["none"]
    return binomial_tail(bits.count("1"), len(bits), 1.0 / classes) >= SIGNIFICANT


def _controlled(results: Sequence[Result]) -> dict[str, float]:
    """Mean top-1 under each frame-order control that all seeds have."""
    return {
        control: statistics.fmean(result.top1(control) for result in results)
        for control in results[0].right
        if control != "none" and all(control in result.right for result in results)
    }


def _difference(
    first: Mapping[int, Result], second: Mapping[int, Result], control: str = "none"
) -> Difference | None:
    """The second less the first, over the seeds that both were tested with; None if there is none."""
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


def _verdict(
    row: str, against: str, cells: Sequence[Cell], control: str = "none", paired: bool = False
) -> Verdict:
    """Clear only if it is clear on every data set, and the same way."""
    own = [cell for cell in cells if cell.row == row]
    others = [cell for cell in cells if cell.row == against]
    found = {cell.dataset: cell.paired if paired else cell.under(control) for cell in own}
    word, why = _judge(own, others, found)
    return Verdict(row, word, why, control, against, found)


def _judge(
    own: Sequence[Cell], others: Sequence[Cell], found: Mapping[str, Difference | None]
) -> tuple[str, str]:
    """Word and reason of a verdict."""
    lacking = [cell for cell in (*own, *others) if cell.missing]
    if lacking:
        return "not settled", f"{lacking[0].row} lacks seeds on {lacking[0].dataset}"
    differences = [difference for difference in found.values() if difference]
    if not differences or len(differences) < len(found):
        return "not settled", "the reference was not trained, or not tested so"
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
