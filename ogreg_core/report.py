"""The table of a paper from run folders: one row per experiment, its seeds averaged.

An experiment is a recipe without its seed, scored by one protocol on one manifest. Only finished runs
are averaged; all others are listed with the reason.
"""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ogreg_core.errors import DataError, UsageError
from ogreg_core.run_records import RunRecord, find_runs, read_run

__all__ = ["Average", "Cost", "LeftOut", "Report", "Result", "Row", "average", "build_report"]


@dataclass(frozen=True)
class Cost:
    """What a model costs.

    Args:
        params: number of parameters.
        multiply_adds: of one view; one multiply-add counts once.
    """

    params: int
    multiply_adds: int


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
class Result:
    """What one run scored, and how.

    Args:
        run: its record.
        checkpoint: absolute path of the weights; empty for fused scores.
        experiment: hash of the recipe without its seed, or what stands for it in older runs.
        seed: of the training; None if unknown.
        recipe, model, options: names and architecture options.
        classes, frames, size: of the model's input and head; None if unknown.
        views: clips x crops.
        dataset, split, manifest: what was scored; the manifest by its hash.
        protocol: how, in words.
        top1, top5: in percent.
        intervals: Wilson intervals of both, None where not reported.
        chosen_from: validations on this very split of which the best gave the checkpoint; 0 if it
            was not chosen on it, -1 if it was and their number is unknown.
    """

    run: RunRecord
    checkpoint: str
    experiment: str
    seed: int | None
    recipe: str
    model: str
    options: dict[str, Any]
    classes: int | None
    frames: int | None
    size: int | None
    views: int | None
    dataset: str
    split: str
    manifest: str
    protocol: str
    top1: float
    top5: float | None
    intervals: tuple[tuple[float, float] | None, tuple[float, float] | None]
    chosen_from: int

    @property
    def group(self) -> tuple[str, ...]:
        """Results that agree in this are averaged."""
        weights = Path(self.checkpoint).name
        return (self.experiment, self.protocol, self.dataset, self.split, self.manifest, weights)


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
            results.append(_result(run))
        except DataError as error:
            left_out.append(LeftOut(run.path, run.state, error.what))
    results, displaced = _prefer_evaluations(results)
    groups: dict[tuple[str, ...], list[Result]] = {}
    # Of runs that repeat each other the newest counts.
    for result in sorted(results, key=lambda r: r.run.started, reverse=True):
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
            raise DataError(f"{path} is not a run folder", why="there is no such folder")
        inside = [run for folder in find_runs(path) if (run := read_run(folder)) is not None]
        if not inside:
            raise DataError(f"{path} holds no run", fix="ogreg runs")
        for run in inside:
            found.setdefault(run.path.resolve(), run)
    return list(found.values())


def _result(run: RunRecord) -> Result:
    """What a run scored.

    Raises:
        DataError: it is not finished, or its figures are not there.
    """
    if run.state != "done":
        raise DataError(_why_unfinished(run))
    return _of_training(run) if run.kind == "train" else _of_evaluation(run)


def _why_unfinished(run: RunRecord) -> str:
    parts = [run.reason, f"epoch {run.epoch} of {run.epochs}" if run.epoch and run.epochs else ""]
    if run.state != "running" and run.resume:
        parts.append(f"continue: {run.resume}")
    return "; ".join(" ".join(part.split()) for part in parts if part) or "it has no score"


def _of_training(run: RunRecord) -> Result:
    from ogreg_core.checkpoint import CheckpointInfo
    from ogreg_core.evaluate_checkpoint import protocol

    file = run.path / "checkpoints" / "best.safetensors"
    text = _description(file)
    if not text:
        raise DataError(f"{file} is missing or cannot be read")
    try:
        info = CheckpointInfo.from_json(text)
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{file} describes itself in words of another version: {error}") from error
    views = info.views()
    top1, top5 = info.metrics.get("top1", run.top1), info.metrics.get("top5")
    if top1 is None:
        raise DataError(f"{file} does not tell its score")
    return Result(
        run=run,
        checkpoint=str(file.resolve()),
        experiment=info.experiment_sha256 or info.recipe_sha256 or str(file.resolve()),
        seed=info.seed if info.experiment_sha256 else _seed(run),
        recipe=info.recipe,
        model=info.model,
        options=info.options,
        classes=len(info.labels),
        frames=info.sampling.frames,
        size=info.size,
        views=views.count,
        dataset=info.dataset,
        split=info.split,
        manifest=str((run.data.get("val") or {}).get("sha256", "")),
        protocol=protocol(views),
        top1=top1,
        top5=top5,
        intervals=(None, None),
        chosen_from=len(run.validations) or -1,
    )


def _seed(run: RunRecord) -> int | None:
    seed = run.values.get("seed")
    return seed if isinstance(seed, int) else None


def _of_evaluation(run: RunRecord) -> Result:
    report = run.report
    if run.top1 is None:
        raise DataError(f"{run.path / 'report.json'} does not tell a score")
    checkpoint = str(report.get("checkpoint") or "")
    text = _description(Path(checkpoint)) if checkpoint else ""
    # Reports of older versions say less; the checkpoint, if it is still there, says the rest.
    described: dict[str, Any] = json.loads(text) if text else {}
    about = {**described, "frames": described.get("sampling", {}).get("frames"), **report}
    experiment = about.get("experiment_sha256") or about.get("recipe_sha256")
    clips, crops = about.get("clips"), about.get("crops")
    classes = len(described.get("labels", ())) or _count_classes(run.path / "per_class.csv")
    return Result(
        run=run,
        checkpoint=checkpoint,
        experiment=str(experiment or checkpoint or run.path.resolve()),
        seed=about.get("seed") if checkpoint else None,
        recipe=str(about.get("recipe") or ""),
        model=run.model,
        options=about.get("options") or {},
        classes=classes,
        frames=about.get("frames"),
        size=about.get("size"),
        views=clips * crops if clips and crops and "clips" in report else None,
        dataset=str(report.get("dataset") or ""),
        split=str(report.get("split") or ""),
        manifest=str(report.get("manifest_sha256") or ""),
        protocol=str(report.get("protocol") or ""),
        top1=run.top1,
        top5=report.get("top5_pct"),
        intervals=(
            _interval(report.get("top1_interval_pct")),
            _interval(report.get("top5_interval_pct")),
        ),
        chosen_from=_chosen_from(Path(checkpoint), described, report),
    )


def _chosen_from(checkpoint: Path, described: dict[str, Any], report: dict[str, Any]) -> int:
    """See ``Result.chosen_from``: validations of the training whose best checkpoint was scored."""
    same = all(described.get(key) == report.get(key) for key in ("dataset", "split"))
    if not described or not same or checkpoint.name != "best.safetensors":
        return 0
    training = read_run(checkpoint.parent.parent)
    return len(training.validations) if training and training.validations else -1


def _interval(value: Any) -> tuple[float, float] | None:
    return (
        (float(value[0]), float(value[1])) if isinstance(value, list) and len(value) == 2 else None
    )


def _count_classes(path: Path) -> int | None:
    if not path.is_file():
        return None
    with open(path, newline="", encoding="utf-8") as file:
        return sum(1 for _ in csv.DictReader(file)) or None


def _description(checkpoint: Path) -> str:
    """The JSON text in which a checkpoint describes itself; empty if there is none to be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(checkpoint, framework="np") as file:
            return str((file.metadata() or {}).get("ogreg", ""))
    except (SafetensorError, OSError):
        return ""


def _prefer_evaluations(results: Sequence[Result]) -> tuple[list[Result], list[LeftOut]]:
    """Leave out trainings whose best checkpoint has been evaluated; a control does not count."""
    evaluated = {
        result.checkpoint: result.run.path
        for result in results
        if result.run.kind == "eval" and not result.run.frame_order
    }
    kept, left_out = [], []
    for result in results:
        if result.run.kind == "train" and result.checkpoint in evaluated:
            reason = f"its best checkpoint is evaluated in {evaluated[result.checkpoint]}"
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
    """Built once per distinct model and input; None for what is not in the registry or not told."""
    frames, size, classes = result.frames, result.size, result.classes
    if frames is None or size is None or classes is None:
        return None
    key = json.dumps([result.model, result.options, classes, frames, size], sort_keys=True)
    if key not in known:
        known[key] = _count(result.model, result.options, classes, frames, size)
    return known[key]


def _count(
    model: str, options: dict[str, Any], classes: int, frames: int, size: int
) -> Cost | None:
    import torch

    from ogreg_core.models.registry import create_model
    from ogreg_core.profiling import count_multiply_adds, count_parameters

    try:
        built = create_model(model, classes, **options)
    except UsageError:
        return None
    flops = count_multiply_adds(built, torch.zeros(1, 3, frames, size, size))
    return Cost(count_parameters(built), flops.total)
