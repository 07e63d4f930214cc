"""One training of a study, and its test under the frame-order controls: what a worker process does."""

from __future__ import annotations

import logging
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ogreg_core.devices import pick_device
from ogreg_core.errors import Interrupted, OgregError, UsageError
from ogreg_core.evaluate_checkpoint import open_evaluation
from ogreg_core.evaluation import ranks
from ogreg_core.evidence.results import Identity, Result
from ogreg_core.evidence.study import Control
from ogreg_core.profiling.counting import count_parameters
from ogreg_core.profiling.subject import Subject, count_costs
from ogreg_core.progress import ignore_progress
from ogreg_core.recipe import LoadedRecipe, load_recipe
from ogreg_core.runs import RunFolder, environment
from ogreg_core.saved_scores import SavedScores
from ogreg_core.training.assemble import Splits, build_trainer, describe_run, load_splits
from ogreg_core.training.loop import Trainer

__all__ = ["Job", "Means", "run_job"]

log = logging.getLogger("ogreg.evidence")


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


@dataclass(frozen=True)
class Job:
    """One training, ready to be sent to a worker process.

    Args:
        identity: under which its result is found again.
        row: name of its row, for messages.
        recipe: file of the shared recipe.
        changes: overrides, with the learning rate and the seed.
        dataset: name of the data set.
        data: its folder.
        folder: run folder; a training that was interrupted there goes on.
        controls: frame-order controls it is tested under.
    """

    identity: Identity
    row: str
    recipe: Path
    changes: tuple[str, ...]
    dataset: str
    data: Path
    folder: Path
    controls: tuple[Control, ...]

    def load(self) -> LoadedRecipe:
        """The recipe with all overrides."""
        return load_recipe(str(self.recipe), self.changes)

    @property
    def kept_changes(self) -> tuple[str, ...]:
        """The overrides that are recorded: all but where the data lie."""
        return tuple(change for change in self.changes if not change.startswith("data.root="))

    def failed(self, reason: str) -> Result:
        """What is recorded of it when it ends without a score."""
        recipe = self.load().recipe
        return Result(
            self.identity,
            self.dataset,
            recipe.model.name,
            self.kept_changes,
            recipe.train.lr,
            clips=0,
            status="failed",
            reason=reason,
        )


def run_job(job: Job, means: Means) -> Result:
    """Train, test, count. What goes wrong is a result as well; only a signal is not.

    Raises:
        Interrupted: a signal asked to stop; the state was saved.
    """
    if means.threads:
        torch.set_num_threads(means.threads)
    try:
        return _train_and_test(job, means)
    except Interrupted:
        raise
    except OgregError as error:
        return job.failed(f"{error.what}: {error.why}" if error.why else error.what)
    except Exception as error:  # a row that cannot be trained is a finding, the others go on
        job.folder.mkdir(parents=True, exist_ok=True)
        (job.folder / "failure.txt").write_text(traceback.format_exc(), encoding="utf-8")
        return job.failed(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")


def _train_and_test(job: Job, means: Means) -> Result:
    loaded = job.load()
    if loaded.recipe.experiment_sha256 != job.identity.experiment:
        raise UsageError(f"{job.recipe} has changed since the study was started")
    splits = load_splits(loaded.recipe, job.data)
    run = RunFolder(job.folder)
    run.path.mkdir(parents=True, exist_ok=True)
    resumes = run.state.is_file()
    if not resumes:
        describe_run(run, loaded, splits)
    trainer = build_trainer(
        loaded,
        splits,
        run,
        device=pick_device(means.device),
        workers=means.workers,
        on_progress=ignore_progress,
        starting_weights=not resumes,
    )
    if resumes:
        trainer.resume()
    seconds = _fit(trainer)
    saved = _scores(trainer, splits)
    right = {"none": _bits(saved)}
    for control in job.controls:
        right[control] = _bits(_controlled(job, run, control, means))
    result = Result(
        job.identity,
        job.dataset,
        loaded.recipe.model.name,
        job.kept_changes,
        loaded.recipe.train.lr,
        clips=trainer.position.step * trainer.order.batch_size,
        status="done",
        seconds=round(seconds, 2),
        loss=_cross_entropy(saved),
        right=right,
        made=_circumstances(means),
        **_costs(loaded, len(splits.train.labels)),
    )
    # The optimiser's state is two thirds of the folder, and nothing is left to resume.
    run.state.unlink(missing_ok=True)
    run.best.unlink(missing_ok=True)
    return result


def _circumstances(means: Means) -> dict[str, Any]:
    found = environment()
    versions = {name: found["packages"][name] for name in ("torch", "torchvision")}
    return {
        "device": means.device,
        "gpus": found["gpus"],
        "threads": found["threads"],
        "ogreg": found["ogreg"],
        "python": found["python"],
        **versions,
    }


def _fit(trainer: Trainer) -> float:
    """Train to the end; seconds of the whole training: of the processor where that is what trains, for
    machines are shared, and by the clock on other devices. Of a resumed training in proportion; of one
    that had only its tests to go, by the clock.
    """
    on_cpu = trainer.step.device.type == "cpu" and trainer.loader.num_workers == 0
    clock = time.process_time if on_cpu else time.perf_counter
    before, start = clock(), trainer.position.step
    trainer.fit()
    steps = trainer.position.step
    if steps == start:
        return trainer.position.seconds
    return (clock() - before) * steps / (steps - start)


def _scores(trainer: Trainer, splits: Splits) -> SavedScores:
    """Of the validation after the last epoch."""
    assert trainer.validation is not None
    return SavedScores.of(trainer.validation.scores, splits.val, {})


def _controlled(job: Job, run: RunFolder, control: Control, means: Means) -> SavedScores:
    """Of the last weights with frames out of order, or the middle one only."""
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
    return report.saved


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
