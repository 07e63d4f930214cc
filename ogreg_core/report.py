"""The table of a paper from run folders: one row per experiment, its seeds averaged.

An experiment is a recipe without its seed, scored by one protocol on one manifest. Only finished runs
are averaged; all others are listed with the reason.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ogreg_core.errors import DataError, UsageError
from ogreg_core.run_records import RunRecord, find_runs, read_run
from ogreg_core.run_results import Member, Result, read_result

__all__ = [
    "Average",
    "Cost",
    "LeftOut",
    "Report",
    "Row",
    "average",
    "build_report",
]


@dataclass(frozen=True)
class Cost:
    """What a model costs, or those of a fusion together.

    Args:
        params: number of parameters.
        multiply_adds: of one view; one multiply-add counts once. None of a fusion whose members have
            different numbers of views.
    """

    params: int
    multiply_adds: int | None


@dataclass(frozen=True)
class Average:
    """A figure over runs, in percent.

    Args:
        mean: arithmetic mean.
        deviation: standard deviation of the sample (n - 1); None for one run.
        interval: lowest and highest of a single run's 95 % Wilson interval, if it was reported.
    """

    mean: float
    deviation: float | None = None
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class LeftOut:
    """A run that is in no row.

    Args:
        path: its folder.
        state: as in :class:`RunRecord`, or ``repeated``.
        reason: why, in words.
    """

    path: Path
    state: str
    reason: str


@dataclass(frozen=True)
class Row:
    """One experiment.

    Args:
        results: of its runs, by seed.
        cost: of its model; None if it cannot be built here.
        top1, top5: over the runs.
    """

    results: tuple[Result, ...]
    cost: Cost | None
    top1: Average
    top5: Average | None

    @property
    def coverage_pct(self) -> tuple[float, float] | None:
        """Lowest and highest share of the annotated videos that the runs scored."""
        shares = [result.run.coverage_pct for result in self.results]
        known = [share for share in shares if share is not None]
        return (min(known), max(known)) if len(known) == len(shares) else None


@dataclass(frozen=True)
class Report:
    """Rows, best first within each data set, and the runs that are in none."""

    rows: tuple[Row, ...]
    left_out: tuple[LeftOut, ...]


def build_report(paths: Sequence[Path]) -> Report:
    """Read runs and average them.

    Args:
        paths: run folders, or folders with run folders in them.

    Raises:
        DataError: one of them holds no run.
    """
    results: list[Result] = []
    left_out: list[LeftOut] = []
    for run in _read_runs(paths):
        try:
            results.append(read_result(run))
        except DataError as error:
            left_out.append(LeftOut(run.path, run.state, error.what))
    results, displaced = _prefer_evaluations(results)
    groups: dict[tuple[str, ...], list[Result]] = {}
    # Of runs that repeat each other the one that read the most videos counts, then the newest.
    for result in sorted(results, key=lambda r: (r.run.scored or 0, r.run.finished), reverse=True):
        group = groups.setdefault(result.group, [])
        before = next((other for other in group if _repeats(result, other)), None)
        if before is None:
            group.append(result)
        else:
            displaced.append(LeftOut(result.run.path, "repeated", _why_repeated(result, before)))
    costs: dict[str, Cost | None] = {}
    rows = [_row(group, costs) for group in groups.values()]
    rows.sort(key=lambda row: (_data(row.results[0]), -row.top1.mean))
    return Report(tuple(rows), (*left_out, *displaced))


def _read_runs(paths: Iterable[Path]) -> list[RunRecord]:
    found: dict[Path, RunRecord] = {}
    for path in paths:
        if not path.is_dir():
            raise DataError(
                f"{path} is not a run folder", why="there is no such folder", fix="ogreg runs"
            )
        inside = [run for folder in find_runs(path) if (run := read_run(folder)) is not None]
        if not inside:
            raise DataError(f"{path} holds no run", fix="ogreg runs")
        for run in inside:
            found.setdefault(run.path.resolve(), run)
    return list(found.values())


def _prefer_evaluations(results: Sequence[Result]) -> tuple[list[Result], list[LeftOut]]:
    """Leave out trainings whose best checkpoint has been evaluated in the way and on the data of its
    validation. What else it was evaluated on, a control or another split, stands beside it.
    """
    evaluated = {
        (result.checkpoint, result.group): result.run.path
        for result in results
        if result.run.kind == "eval"
    }
    kept, left_out = [], []
    for result in results:
        known = evaluated.get((result.checkpoint, result.group))
        if result.run.kind == "train" and known is not None:
            reason = f"its best checkpoint is evaluated in the same way in {known}"
            left_out.append(LeftOut(result.run.path, "repeated", reason))
        else:
            kept.append(result)
    return kept, left_out


def _repeats(result: Result, other: Result) -> bool:
    """Whether two results of a group are no independent runs."""
    if result.checkpoint and result.checkpoint == other.checkpoint:
        return True
    return result.seed is not None and result.seed == other.seed


def _why_repeated(result: Result, kept: Result) -> str:
    if result.checkpoint == kept.checkpoint:
        return f"the same checkpoint, protocol and data as {kept.run.path}"
    return f"the same experiment and seed {result.seed} as {kept.run.path}"


def average(
    values: Sequence[float], intervals: Sequence[tuple[float, float] | None] = (None,)
) -> Average:
    """Mean and standard deviation (n - 1), or a single value with its interval."""
    if len(values) == 1:
        return Average(values[0], interval=intervals[0])
    return Average(statistics.fmean(values), statistics.stdev(values))


def _row(group: list[Result], costs: dict[str, Cost | None]) -> Row:
    results = tuple(sorted(group, key=lambda r: (r.seed is None, r.seed or 0)))
    top5 = [result.top5 for result in results if result.top5 is not None]
    return Row(
        results=results,
        cost=_cost(results[0], costs),
        top1=average([r.top1 for r in results], [r.intervals[0] for r in results]),
        top5=average(top5, [r.intervals[1] for r in results])
        if len(top5) == len(results)
        else None,
    )


def _data(result: Result) -> str:
    return f"{result.dataset}/{result.split}"


def _cost(result: Result, known: dict[str, Cost | None]) -> Cost | None:
    """Of a fusion each checkpoint's parameters count once and each way of scoring it too; None if the
    cost of one member is unknown.
    """
    if not result.members:
        return None
    # Members without a path to their weights are taken for different ones.
    weights, passes = {}, {}
    for place, member in enumerate(result.members):
        cost = _member_cost(member, known)
        if cost is None or cost.multiply_adds is None:
            return None
        weights[member.checkpoint or place] = cost.params
        passes[member.checkpoint or place, member.protocol] = cost.multiply_adds
    alike = len({member.views for member in result.members}) == 1
    return Cost(sum(weights.values()), sum(passes.values()) if alike else None)


def _member_cost(member: Member, known: dict[str, Cost | None]) -> Cost | None:
    """Built once per distinct model and input; None for what is not in the registry or not told."""
    frames, size, classes = member.frames, member.size, member.classes
    if frames is None or size is None or classes is None:
        return None
    key = json.dumps([member.model, member.options, classes, frames, size], sort_keys=True)
    if key not in known:
        known[key] = _count(member.model, member.options, classes, frames, size)
    return known[key]


def _count(
    model: str, options: dict[str, Any], classes: int, frames: int, size: int
) -> Cost | None:
    import torch

    from ogreg_core.models.registry import create_model
    from ogreg_core.profiling import count_multiply_adds, count_parameters

    try:
        built = create_model(model, classes, frames=frames, size=size, **options)
    except (UsageError, TypeError, ValueError):
        return None
    flops = count_multiply_adds(built, torch.zeros(1, 3, frames, size, size))
    return Cost(count_parameters(built), flops.total)
