"""What a study's trainings show: a cell for each row on each data set, and a verdict for each row."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ogreg_core.errors import DataError
from ogreg_core.evidence.comparison import (
    LEAST_SEEDS,
    MARGIN_POINTS,
    SIGNIFICANT,
    Cell,
    Verdict,
    difference_of,
    is_chance,
    judge,
)
from ogreg_core.evidence.results import Result
from ogreg_core.evidence.study import Study
from ogreg_core.recipe import Recipe
from ogreg_core.statistics import mean_interval

__all__ = ["DataFacts", "Failure", "Summary", "Tests", "Tuned", "summarise"]

SCHEMA = "ogreg.evidence-report.v1"
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
        is_given: whether it stands in the study, so that there was nothing to choose.
    """

    row: str
    dataset: str
    lr: float | None
    accuracies: Mapping[float, float | None] = field(default_factory=dict)
    is_blind: bool = False
    is_given: bool = False


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
        judge(row, study.reference, cells, control)
        for control in ("none", *study.judged)
        for row in names
        if row != study.reference
    ]
    verdicts += [judge(row, against, cells, paired=True) for row, against in pairs.items()]
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
        difference=difference_of(reference, done),
        judged={
            control: difference
            for control in judged
            if (difference := difference_of(reference, done, control)) is not None
        },
        paired=difference_of(partner, done),
        controls=_controlled(list(done.values())),
        seconds=statistics.median(result.seconds for result in done.values()),
        gmacs=first.gmacs,
        params=first.params,
        missing=missing,
    )


def _controlled(results: Sequence[Result]) -> dict[str, float]:
    """Mean top-1 under each frame-order control that all seeds have."""
    return {
        control: statistics.fmean(result.top1(control) for result in results)
        for control in results[0].right
        if control != "none" and all(control in result.right for result in results)
    }
