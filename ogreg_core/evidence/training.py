"""One training of a study, and its test under the frame-order controls: what a worker process does."""

from __future__ import annotations

import hashlib
import time
import traceback
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

import ogreg_core
from ogreg_core.devices import pick_device
from ogreg_core.errors import (
    CheckpointError,
    DataError,
    EnvironmentFault,
    Interrupted,
    OgregError,
)
from ogreg_core.evaluate_checkpoint import open_evaluation
from ogreg_core.evaluation import ranks
from ogreg_core.evidence.results import Identity, Result
from ogreg_core.evidence.study import Control
from ogreg_core.profiling.counting import count_parameters
from ogreg_core.profiling.subject import Subject, count_costs
from ogreg_core.progress import Note, Progress, ignore_progress
from ogreg_core.recipe import LoadedRecipe
from ogreg_core.runs import RunFolder, environment
from ogreg_core.saved_scores import SavedScores
from ogreg_core.training.assemble import build_trainer
from ogreg_core.training.loop import Trainer
from ogreg_core.training.splits import Splits, describe_run, load_splits

__all__ = ["Job", "Means", "run_job"]


@dataclass(frozen=True)
class Means:
    """What trains.

    Args:
        device: ``cpu``, ``cuda`` ...
        jobs: trainings at a time, each in a process of its own; 0: one, in this process.
        threads: of torch in each; 0 leaves them as they are.
        workers: loader processes of each; only with ``jobs`` = 0 may there be any.
    """

    device: str
    jobs: int
    threads: int
    workers: int

    @property
    def clock(self) -> str:
        """What times a training: the ``processor``, for machines are shared, where one process on a CPU
        does all of it, or the clock on the ``wall``.
        """
        return "processor" if self.device == "cpu" and not self.workers else "wall"


@dataclass(frozen=True)
class Job:
    """One training, ready to be sent to a worker process.

    Args:
        identity: under which its result is found again.
        row: name of its row, for messages.
        loaded: the recipe with all overrides.
        changes: the overrides that are recorded: all but where the data lie.
        dataset: name of the data set.
        data: its folder.
        folder: run folder; a training that was interrupted there goes on.
        controls: frame-order controls it is tested under.
        known: its result, if only some controls are missing.
    """

    identity: Identity
    row: str
    loaded: LoadedRecipe
    changes: tuple[str, ...]
    dataset: str
    data: Path
    folder: Path
    controls: tuple[Control, ...]
    known: Result | None = None

    def failed(self, reason: str) -> Result:
        """What is recorded of it when it ends without a score."""
        recipe = self.loaded.recipe
        return Result(
            self.identity,
            self.dataset,
            recipe.model.name,
            self.changes,
            recipe.train.lr,
            clips=0,
            status="failed",
            reason=reason,
        )


def run_job(job: Job, means: Means) -> Result:
    """Train, test, count. A row that cannot be trained is a result as well; a signal, data that cannot be
    read and a machine that is at fault are none.

    Raises:
        Interrupted: a signal asked to stop; the state was saved.
        DataError: the data set is missing, broken, or another one than when the study began.
        EnvironmentFault, OSError: such as a full disk.
    """
    if means.threads:
        torch.set_num_threads(means.threads)
    try:
        return _train_and_test(job, means)
    except (Interrupted, DataError, EnvironmentFault, OSError):
        raise
    except OgregError as error:
        return job.failed(f"{error.what}: {error.why}" if error.why else error.what)
    except Exception as error:  # a finding about this row; the others go on
        job.folder.mkdir(parents=True, exist_ok=True)
        (job.folder / "failure.txt").write_text(traceback.format_exc(), encoding="utf-8")
        return job.failed(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")


def _train_and_test(job: Job, means: Means) -> Result:
    run = RunFolder(job.folder)
    splits = load_splits(job.loaded.recipe, job.data)
    if (splits.train.sha256, splits.val.sha256) != (job.identity.train, job.identity.val):
        raise DataError(
            f"{job.data} has changed since the study was started",
            why="its manifests are others",
            fix="start the study again",
        )
    if job.known is not None and run.last.is_file():
        return _with_controls(job, job.known, run, means)
    # First, since it may fail and takes a second only.
    costs = _costs(job.loaded, len(splits.train.labels))
    trainer = _trainer(job, splits, run, means)
    seconds = _fit(trainer, means)
    saved = _scores(trainer, splits)
    result = Result(
        job.identity,
        job.dataset,
        job.loaded.recipe.model.name,
        job.changes,
        job.loaded.recipe.train.lr,
        clips=trainer.position.step * trainer.order.batch_size,
        status="done",
        seconds=round(seconds, 2),
        loss=_cross_entropy(saved),
        right={"none": _bits(saved)},
        made=_circumstances(means, trainer.step.settings.precision),
        **costs,
    )
    result = _with_controls(job, result, run, means)
    # The optimiser's state is two thirds of the folder, and nothing is left to resume.
    run.state.unlink(missing_ok=True)
    run.best.unlink(missing_ok=True)
    return result


def _trainer(job: Job, splits: Splits, run: RunFolder, means: Means) -> Trainer:
    """Ready to go on where the run folder ends, or to begin."""
    run.path.mkdir(parents=True, exist_ok=True)

    def build(starting_weights: bool) -> Trainer:
        return build_trainer(
            job.loaded,
            splits,
            run,
            device=pick_device(means.device),
            workers=means.workers,
            on_progress=ignore_progress,
            starting_weights=starting_weights,
        )

    if run.state.is_file():
        trainer = build(starting_weights=False)
        try:
            trainer.resume()
        except CheckpointError:
            # Half a file, or of an older version: begin again.
            run.state.unlink()
            (run.path / "metrics.jsonl").unlink(missing_ok=True)
        else:
            return trainer
    describe_run(run, job.loaded, splits)
    return build(starting_weights=True)


class _Stopwatch:
    """Time of the optimiser's steps, from their progress events: without tests, and of a training that was
    resumed in proportion to its steps.
    """

    def __init__(self, clock: str) -> None:
        self.now = time.process_time if clock == "processor" else time.perf_counter
        self.first: tuple[int, float] | None = None
        self.last: tuple[int, float] | None = None

    def __call__(self, event: Progress | Note) -> None:
        if isinstance(event, Progress) and event.task == "training":
            self.last = event.done, self.now()
            self.first = self.first or self.last

    def seconds(self, steps: int) -> float:
        """Of so many steps; 0 if fewer than two were seen."""
        if self.first is None or self.last is None or self.first == self.last:
            return 0.0
        (start, before), (end, after) = self.first, self.last
        return (after - before) / (end - start) * steps


def _fit(trainer: Trainer, means: Means) -> float:
    """Train to the end; the seconds of all steps."""
    watch = _Stopwatch(means.clock)
    trainer.on_progress = watch
    trainer.fit()
    # A training that had only its tests to go knows its time by the clock alone.
    return watch.seconds(trainer.position.step) or trainer.position.seconds


def _scores(trainer: Trainer, splits: Splits) -> SavedScores:
    """Of the validation after the last epoch."""
    assert trainer.validation is not None
    return SavedScores.of(trainer.validation.scores, splits.val, {})


def _with_controls(job: Job, result: Result, run: RunFolder, means: Means) -> Result:
    """The result with those controls that it lacks: the last weights with frames in another order, or
    others.
    """
    right = dict(result.right)
    for control in job.controls:
        if control in right:
            continue
        evaluation = open_evaluation(
            run.last,
            data=job.data,
            split=None,
            clips=None,
            crops=None,
            control=control,
            device=pick_device(means.device),
        )
        report = evaluation.score(batch_size=8, workers=means.workers, on_progress=ignore_progress)
        right[control] = _bits(report.saved)
    return replace(result, right=right)


def _bits(saved: SavedScores) -> str:
    """Whether each video of the manifest is named rightly; one that cannot be read is not."""
    return "".join("1" if rank == 1 else "0" for rank in ranks(saved.table(), saved.targets))


def _cross_entropy(saved: SavedScores) -> float:
    """Mean over the videos that could be read, nats."""
    found = saved.found
    probability = found.scores.gather(1, found.labels[:, None]).clamp_min(1e-12)
    return round(float(-probability.log().mean()), 5)


def _costs(loaded: LoadedRecipe, classes: int) -> dict[str, Any]:
    """Parameters, and multiply-adds of one view."""
    recipe = loaded.recipe
    architecture = recipe.model.architecture()
    shape = recipe.data.frames, recipe.data.size
    subject = Subject.fresh(recipe.model.name, architecture, classes, *shape)
    model = subject.build()
    counts = count_costs(subject, model)
    return {"params": count_parameters(model), "gmacs": round(counts.flops.total / 1e9, 5)}


def _circumstances(means: Means, precision: str) -> dict[str, Any]:
    found = environment()
    versions = {name: found["packages"][name] for name in ("torch", "torchvision")}
    return {
        "device": means.device,
        "gpus": found["gpus"],
        "threads": found["threads"],
        "clock": means.clock,
        "precision": precision,
        "ogreg": found["ogreg"],
        "source": source_sha256(),
        "python": found["python"],
        **versions,
    }


@cache
def source_sha256() -> str:
    """Hash of the package's own code, by which results of different versions are told apart."""
    folder = Path(ogreg_core.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
