"""Runs a study: first the grid of learning rates, then every row with every seed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from ogreg_core.data.manifest import Manifest, load_manifest
from ogreg_core.data.sampling import check_rate
from ogreg_core.errors import EnvironmentFault, Interrupted, UsageError
from ogreg_core.evidence.comparison import is_chance
from ogreg_core.evidence.held_out import hold_out
from ogreg_core.evidence.results import Identity, Result, append_result, latest, read_results
from ogreg_core.evidence.study import Row, Study, best_rate, clips_per_epoch
from ogreg_core.evidence.training import Job, Means, run_job
from ogreg_core.files import lock_file
from ogreg_core.processes import Lost, run_isolated
from ogreg_core.progress import Note, Progress, ProgressCallback
from ogreg_core.recipe import load_recipe
from ogreg_core.signals import StopRequest
from ogreg_core.training.settings import sampling_of

__all__ = ["RESULTS_FILE", "Choice", "DataSet", "Plan", "run_study"]

RESULTS_FILE = "results.jsonl"
# A budget is met if so many times too many or too few clips are seen at most.
_NEAR = 1.25


@dataclass(frozen=True)
class DataSet:
    """A prepared data set."""

    folder: Path
    train: Manifest
    val: Manifest

    @classmethod
    def open(cls, folder: Path) -> DataSet:
        """Read both splits.

        Raises:
            DataError: not prepared, or broken.
        """
        found = cls(folder, load_manifest(folder, "train"), load_manifest(folder, "val"))
        for manifest in (found.train, found.val):
            manifest.require_labels()
        return found

    @property
    def name(self) -> str:
        return self.train.dataset


@dataclass(frozen=True)
class Choice:
    """The learning rate of a row on a data set, and the trainings it was chosen by; the rate is None as
    long as they are not done, or where all of them failed, and given where the study names it.
    """

    row: Row
    data: DataSet
    lr: float | None
    tried: dict[float, Result]
    is_given: bool = False


class Plan:
    """The trainings of a study on its data sets.

    Args:
        study: rows and terms.
        recipe: file of the recipe that all rows have in common, whose content is ``shared``.
        data: the data sets; on the first the rates are tuned unless the study says each.
        out: folder of results and run folders, shared by studies.
        rows: names of the rows that are wanted; empty: all.
        seeds: that are wanted; empty: the study's.
    """

    def __init__(
        self,
        study: Study,
        recipe: Path,
        data: Sequence[DataSet],
        out: Path,
        rows: Sequence[str] = (),
        seeds: Sequence[int] = (),
    ) -> None:
        self.study = study
        self.recipe = recipe
        self.data = data
        self.out = out
        self.rows = [row for row in study.rows if not rows or row.name in rows]
        self.seeds = tuple(seeds or study.seeds)
        self.shared = load_recipe(str(recipe)).recipe
        self._held_out: dict[str, DataSet] = {}
        # Asked for again with every seed, and each reads its recipe.
        self._tuning: dict[tuple[str, str, float], Job] = {}
        for item in data:
            self._check(item)

    def _check(self, data: DataSet) -> None:
        """Refuse what would only show when the first training is over.

        Raises:
            UsageError: no whole number of epochs is near the budget, or a control asks for frames that
                clips of the recipe do not have.
        """
        videos = len(data.train.rows)
        each = clips_per_epoch(videos, self.shared.train.batch_size)
        clips = self.epochs(data) * each
        if not 1 / _NEAR <= clips / self.study.clips <= _NEAR:
            raise UsageError(
                f"the study's budget of {self.study.clips} clips does not fit {data.name}",
                why=f"an epoch of its {videos} videos sees {each}",
                fix="a study of your own with more clips",
            )
        for control in self.study.controls:
            if control in ("half", "double", "irregular"):
                check_rate(sampling_of(self.shared), control)

    @property
    def results_file(self) -> Path:
        return self.out / RESULTS_FILE

    def results(self) -> dict[Identity, Result]:
        """What has ended so far."""
        return latest(read_results(self.results_file))

    def epochs(self, data: DataSet) -> int:
        """Of each training that counts."""
        batch = self.shared.train.batch_size
        return self.study.epochs(len(data.train.rows), batch, self.study.clips)

    def held_out(self, data: DataSet) -> DataSet:
        """The data set on which the rates of ``data`` are tuned; its manifest is written."""
        if data.name not in self._held_out:
            folder = self.out / "tuning" / _slug(data.name)
            self._held_out[data.name] = DataSet.open(
                hold_out(data.folder, folder, self.study.tuning.held_out)
            )
        return self._held_out[data.name]

    def tuned_on(self, data: DataSet) -> DataSet:
        """The data set whose training split tunes the rates for ``data``."""
        return data if self.study.tuning.each else self.data[0]

    def tuning_jobs(self, results: Mapping[Identity, Result]) -> Iterator[Job]:
        """What every row that chooses its own rate asks for, as far as the results tell by now."""
        choosing = {row.name: row for row in map(self.chooser, self.rows)}
        data = {self.tuned_on(item).name: self.tuned_on(item) for item in self.data}
        for item in data.values():
            for row in choosing.values():
                for lr in self._reached(row, item, results) if not row.lr else ():
                    yield self._tuning_job(row, item, lr)

    def _reached(
        self, row: Row, data: DataSet, results: Mapping[Identity, Result]
    ) -> dict[float, Result | None]:
        """The rates that the search of a row asks for; None where the training has not ended."""
        tuning = self.study.tuning
        jobs = {lr: self._tuning_job(row, data, lr) for lr in sorted(tuning.lrs)}
        found = {lr: results.get(job.identity) for lr, job in jobs.items()}
        known = {lr: result for lr, result in found.items() if result is not None}
        scores = {lr: _score(result) for lr, result in known.items()}
        classes = len(data.train.labels)
        done = {lr: result for lr, result in known.items() if result.is_done}
        at_chance = {lr for lr, result in done.items() if is_chance(result, classes)}
        return {lr: found[lr] for lr in tuning.reached(scores, at_chance)}

    def _tuning_job(self, row: Row, data: DataSet, lr: float) -> Job:
        key = row.name, data.name, lr
        if key not in self._tuning:
            tuning = self.study.tuning
            job = self._job(row, self.held_out(data), tuning.clips, lr, tuning.seed)
            self._tuning[key] = replace(job, controls=())
        return self._tuning[key]

    def chooser(self, row: Row) -> Row:
        """The row whose rate ``row`` takes."""
        return self.study.row(row.lr_of) if row.lr_of else row

    def tuned(self, row: Row, data: DataSet, results: Mapping[Identity, Result]) -> Choice:
        """The best rate by held-out top-1, then by cross-entropy."""
        chooser = self.chooser(row)
        if chooser.lr:
            return Choice(row, data, chooser.lr, {}, is_given=True)
        source = self.tuned_on(data)
        reached = self._reached(chooser, source, results)
        tried = {lr: result for lr, result in reached.items() if result is not None}
        best = best_rate({lr: _score(result) for lr, result in tried.items()})
        return Choice(row, source, best if len(tried) == len(reached) else None, tried)

    def test_jobs(self, results: Mapping[Identity, Result]) -> Iterator[Job]:
        """Every row with every seed on every data set; the first seed of all of them first, so that
        what is there at any time is as even as can be.
        """
        for seed in self.seeds:
            for data in self.data:
                for row in self.rows:
                    job = self.test_job(row, data, seed, results)
                    if job is not None:
                        yield job

    def test_job(
        self, row: Row, data: DataSet, seed: int, results: Mapping[Identity, Result]
    ) -> Job | None:
        """One training that counts; None as long as it has no learning rate."""
        lr = self.tuned(row, data, results).lr
        return self._job(row, data, self.study.clips, lr, seed) if lr else None

    def _job(self, row: Row, data: DataSet, clips: int, lr: float, seed: int) -> Job:
        batch = self.shared.train.batch_size
        changes = self.study.changes(row, len(data.train.rows), batch, clips, lr)
        changes.append(f"seed={seed}")
        # Whole, so that the run's recipe can be trained from any folder.
        where = f"data.root={data.folder.resolve()}"
        loaded = load_recipe(str(self.recipe), [*changes, where])
        experiment = loaded.recipe.experiment_sha256
        identity = Identity(experiment, data.train.sha256, data.val.sha256, seed)
        place = f"{_slug(data.name)}-{identity.train[:8]}-{identity.val[:8]}"
        name = f"{_slug(row.name)}-{experiment[:8]}-seed{seed}"
        return Job(
            identity,
            row.name,
            loaded,
            tuple(changes),
            data.name,
            data.folder,
            self.out / "runs" / place / name,
            tuple(self.study.controls),
        )


def run_study(
    plan: Plan, means: Means, *, retry: bool, command: str, on_progress: ProgressCallback
) -> None:
    """Run what has not ended yet, and record each training as it ends.

    Args:
        plan: the trainings.
        means: what trains.
        retry: run those again that failed.
        command: this command line, for messages.
        on_progress: receives progress events.

    Raises:
        Interrupted: by a signal; trainings under way go on from their last epoch next time.
        DataError, EnvironmentFault: data or machine are at fault, not a row; nothing is recorded of it.
    """
    plan.out.mkdir(parents=True, exist_ok=True)
    signal_number = 0
    with _alone(plan.out), StopRequest() as stop:
        try:
            asked: set[Identity] = set()
            # What is asked for next may depend on what was tried.
            while tuning := [
                job for job in plan.tuning_jobs(plan.results()) if job.identity not in asked
            ]:
                _run(plan, tuning, "learning rates", means, retry, stop, on_progress)
                asked |= {job.identity for job in tuning}
            tests = list(plan.test_jobs(plan.results()))
            _run(plan, tests, "trainings", means, retry, stop, on_progress)
        except Interrupted as error:
            # A training in this process, or a worker that heard the signal first.
            signal_number = error.signal_number
    if stop.number or signal_number:
        raise Interrupted(
            "stopped; trainings that have ended are recorded",
            signal_number=stop.number or signal_number,
            fix=f"{command}   # goes on where it stopped",
        )


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder for this process.

    Raises:
        UsageError: another process has it.
    """
    try:
        file = lock_file(folder / "lock")
    except BlockingIOError as error:
        raise UsageError(
            f"another process trains for a study in {folder}",
            fix="wait for it, or choose another --out; --report may look at any time",
        ) from error
    with file:
        yield


def _run(
    plan: Plan,
    jobs: Sequence[Job],
    task: str,
    means: Means,
    retry: bool,
    stop: StopRequest,
    on_progress: ProgressCallback,
) -> None:
    if stop.number:
        return
    known = plan.results()
    # Rows may be one and the same training.
    waiting = {
        job.identity: replace(job, known=_scored(known.get(job.identity)))
        for job in jobs
        if not _has_ended(job, known, retry)
    }
    in_all = len({job.identity for job in jobs})
    done = in_all - len(waiting)
    on_progress(Progress(task, done, in_all))
    for job, outcome in run_isolated(
        partial(run_job, means=means),
        waiting.values(),
        means.jobs,
        preload=["ogreg_core.evidence.training"],
        stopping=lambda: stop.number > 0,
    ):
        result = _lost(job, outcome, means) if isinstance(outcome, Lost) else outcome
        append_result(plan.results_file, result)
        done += 1
        on_progress(Note(f"{task} {done}/{in_all}: {_sentence(job, result)}"))
        on_progress(Progress(task, done, in_all))


def _lost(job: Job, outcome: Lost, means: Means) -> Result:
    """The result of a training whose process died.

    Raises:
        EnvironmentFault: somebody else ended it, which tells nothing of the row.
    """
    if outcome.from_outside:
        raise EnvironmentFault(
            f"the process that trained {job.row!r} was killed",
            why="by the system if memory ran out, or by somebody",
            fix=f"the same command with --jobs {max(1, means.jobs - 1)}; what has ended is kept",
        )
    return job.failed("its process died (a crash in a native library)")


def _scored(result: Result | None) -> Result | None:
    return result if result is not None and result.is_done else None


def _score(result: Result) -> tuple[float, float] | None:
    """Held-out top-1, then cross-entropy; None where the training failed."""
    return (result.top1(), -result.loss) if result.is_done else None


def _has_ended(job: Job, known: Mapping[Identity, Result], retry: bool) -> bool:
    result = known.get(job.identity)
    if result is None or not result.is_done:
        return result is not None and not retry
    # Another study may have trained the same and asked for less.
    return result.right.keys() >= set(job.controls)


def _sentence(job: Job, result: Result) -> str:
    who = f"{job.row}, {job.dataset}, lr {result.lr:g}, seed {job.identity.seed}"
    if not result.is_done:
        return f"{who}: failed, {result.reason}"
    return f"{who}: top-1 {result.top1():.1f} %, {result.seconds:.0f} s"


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
