"""The training loop."""

from __future__ import annotations

import logging
import math
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn
from torch.utils.data import DataLoader

from ogreg_core.data.loader import TrainBatch, Unreadable, batches
from ogreg_core.data.order import BatchOrder
from ogreg_core.distributed import World
from ogreg_core.errors import (
    DataError,
    Interrupted,
    OutOfMemory,
    WorkFailed,
    is_out_of_memory,
)
from ogreg_core.evaluation import Metrics, Scores, confusion_matrix
from ogreg_core.files import remove_leftovers
from ogreg_core.profiling import peak_memory_mb
from ogreg_core.progress import Note, Progress, ProgressCallback
from ogreg_core.runs import RunFolder
from ogreg_core.signals import StopRequest
from ogreg_core.training.board import Board
from ogreg_core.training.prefetch import on_device
from ogreg_core.training.state import Position, load_state, save_state
from ogreg_core.training.step import StepResult, TrainStep

__all__ = ["LoopSettings", "Trainer", "Validation"]

log = logging.getLogger("ogreg.train")

_SIGNAL_GRACE_SECONDS = 0.5


@dataclass(frozen=True)
class LoopSettings:
    """Plain arguments of the loop.

    Args:
        epochs: passes over the training split.
        max_unreadable: share of an epoch's videos that may fail.
        eval_every: epochs between validations.
        save_seconds: longest time between two saved states within an epoch.
        identity: what a training must agree in to be continued, see
            :func:`ogreg_core.training.splits.identity_of`.
    """

    epochs: int
    max_unreadable: float
    eval_every: int
    save_seconds: float
    identity: dict[str, Any]


class Validation(NamedTuple):
    """What a validation found."""

    metrics: Metrics
    scores: Scores


class Trainer:
    """Trains one model and keeps the run folder's metrics and checkpoints.

    Every process of a job has one; all make the same steps, the main one writes and reports.

    Args:
        step: makes the optimiser steps.
        loader, order: this process's micro-batches and the order they come in.
        settings: plain arguments.
        run: where everything is written.
        world: the processes of the job.
        labels: names of the classes.
        validate: scores a model on the validation split; calls its second argument after every
            batch.
        save_model: writes a checkpoint file of a model with what is to be noted in its description.
        name_of: the file name of a training sample's index, for error messages.
        memory_advice: the error to raise when memory runs out, from torch's sentence.
        on_progress: receives a ``Progress`` per step.
    """

    def __init__(
        self,
        step: TrainStep,
        loader: DataLoader[Any],
        order: BatchOrder,
        settings: LoopSettings,
        run: RunFolder,
        world: World,
        labels: Sequence[str],
        validate: Callable[[nn.Module, Callable[[], None]], Validation],
        save_model: Callable[[Path, nn.Module, dict[str, Any]], None],
        name_of: Callable[[int], str],
        memory_advice: Callable[[str], OutOfMemory],
        on_progress: ProgressCallback,
    ) -> None:
        self.step = step
        self.loader = loader
        self.order = order
        self.settings = settings
        self.run = run
        self.world = world
        self.labels = labels
        self.validate = validate
        self.save_model = save_model
        self.name_of = name_of
        self.memory_advice = memory_advice
        self.on_progress = on_progress
        self.position = Position()
        self.resumed = False
        self.validation: Validation | None = None
        self._saved = time.monotonic()

    def fit(self) -> Position:
        """Train from the current position to the last epoch.

        Raises:
            Interrupted: a signal asked to stop; the state was saved, unless the same signal ended the
                loader's workers or another process, or a second one insisted.
            DataError: more videos of an epoch than allowed cannot be read.
            WorkFailed: the loss is not finite; names the videos of the step.
            OutOfMemory: a step does not fit; says what to lower.
        """
        board = None
        if self.world.is_main:
            board = Board(self.run.path / "tensorboard", self._first_to_repeat())
        with StopRequest() as stop:
            try:
                if not self.position.step:
                    # From here on a kill at any moment leaves something to continue.
                    self.save()
                while self.position.epoch < self.settings.epochs:
                    self._train_epoch(stop, board)
                    self._finish_epoch(stop, board)
            except RuntimeError as error:
                # Of a signal to all processes, the death of a worker may be heard of first.
                time.sleep(_SIGNAL_GRACE_SECONDS)
                if not stop.number:
                    raise
                # The signal has ended the loader's workers or another process too, perhaps in the middle
                # of a step: what is in memory may be half a step ahead, so it is not saved.
                raise self._interrupted(
                    "stopped, since another process of the job has ended; the last state stays",
                    stop.number,
                ) from error
            finally:
                if board is not None:
                    board.close()
        if self.validation is None:
            # Nothing was left to train: the run had ended just before its report.
            self.validation = self.validate(self.step.best_model, lambda: None)
        return self.position

    def _first_to_repeat(self) -> int | None:
        """The step from which on curves of an earlier process are about to be written again."""
        if not self.resumed:
            return None
        in_validation = self.position.batch == self.order.batches_per_epoch
        return self.position.step + (0 if in_validation else 1)

    def _train_epoch(self, stop: StopRequest, board: Board | None) -> None:
        position, order = self.position, self.order
        order.set_position(position.epoch, position.batch)
        meter = _Meter(position)
        micro_batches = on_device(batches(self.loader), self.step.device)
        while position.batch < order.batches_per_epoch:
            before = time.perf_counter()
            parts = list(islice(micro_batches, order.accumulate))
            meter.waited(time.perf_counter() - before)
            if board is not None and not position.step:
                _show_samples(board, parts[0], self.name_of)
            result = self._step(parts)
            unreadable = [video for part in parts for video in part.unreadable]
            asked, save, figures = self._exchange(result, parts, unreadable, stop)
            meter.count(int(figures["clips"]))
            self._record(figures, meter, board)
            if asked:
                self.save()
                raise self._interrupted(f"stopped at step {position.step}, state saved", asked)
            if save:
                self.save()

    def _step(self, parts: Sequence[TrainBatch]) -> StepResult:
        try:
            return self.step(parts, self.position.epoch, self.position.batch)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise self.memory_advice(str(error).partition("\n")[0]) from error

    def _exchange(
        self,
        result: StepResult,
        parts: Sequence[TrainBatch],
        unreadable: Sequence[Unreadable],
        stop: StopRequest,
    ) -> tuple[int, bool, dict[str, Any]]:
        """Add up the step over all processes and agree on what comes next.

        Returns:
            the number of a signal that asked to stop or 0; whether it is time to save; the figures.
        """
        due = time.monotonic() - self._saved >= self.settings.save_seconds
        loss_sum, correct, clips, failed, asked, save = self.world.sum(
            [
                result.loss_sum,
                result.correct,
                result.clips,
                len(unreadable),
                bool(stop.number),
                due and self.world.is_main,
            ]
        )
        # In fp16 gradients overflow now and then; the scaler leaves the step out.
        overflows = self.step.scaler.is_enabled()
        if not math.isfinite(loss_sum) or not (overflows or math.isfinite(result.grad_norm)):
            self._fail_on_loss(result.loss_sum, parts)
        position = self.position
        position.batch += 1
        position.step += 1
        position.loss_sum += loss_sum
        position.correct += int(correct)
        position.clips += int(clips)
        figures: dict[str, Any] = {
            "loss": loss_sum / clips,
            "top1_batch": 100.0 * correct / clips,
            "clips": clips,
            "lr": result.lr,
        }
        if math.isfinite(result.grad_norm):
            figures["grad_norm"] = result.grad_norm
        if failed:
            found = [video for share in self.world.gather(unreadable) for video in share]
            self._count_unreadable(found)
            figures["unreadable"] = [video.path for video in found]
        # Another process may have heard a signal that this one has not.
        return (stop.number or 15) if asked else 0, bool(save), figures

    def _record(self, figures: dict[str, Any], meter: _Meter, board: Board | None) -> None:
        """Metrics file, TensorBoard and progress."""
        position = self.position
        position.seconds = meter.seconds
        clips = figures.pop("clips")
        speed = {
            "clips_per_s": meter.clips_per_s,
            "data_wait_pct": meter.wait_pct,
            "memory_mb": peak_memory_mb(self.step.device),
        }
        if self.world.is_main:
            place = {"kind": "train", "epoch": position.epoch + 1, "step": position.step}
            self.run.append_metrics({**place, **figures, **speed})
        if board is not None:
            shown = {key: value for key, value in figures.items() if key != "unreadable"}
            scalars = {**shown, "clips_per_s": speed["clips_per_s"]}
            board.scalars(position.step, {f"train/{key}": v for key, v in scalars.items()})
        top1 = 100.0 * position.correct / position.clips
        total = self.order.batches_per_epoch
        task = f"epoch {position.epoch + 1}/{self.settings.epochs}"
        fields = {"loss": figures["loss"], "top1": top1, "lr": figures["lr"], **speed}
        self.on_progress(Progress(task, position.batch, total, fields))
        self.on_progress(Progress("training", position.step, total * self.settings.epochs))
        log.debug("step %d: %d clips, loss %.6g", position.step, clips, figures["loss"])

    def _count_unreadable(self, videos: Sequence[Unreadable]) -> None:
        """Another clip was trained on in place of each; say so, and stop where it becomes a habit."""
        budget = self.settings.max_unreadable * self.order.length
        for video in videos:
            self.position.unreadable += 1
            self.on_progress(Note(f"left out of this epoch: {video.reason}"))
            log.warning("unreadable: %s", video.reason)
        if self.position.unreadable > budget:
            raise DataError(
                f"{self.position.unreadable} training videos of one epoch cannot be read",
                where=f"epoch {self.position.epoch + 1}; the last one: {videos[-1].reason}",
                why=f"train.max_unreadable = {self.settings.max_unreadable:g} allows {budget:.0f}",
                fix="run `ogreg prepare` again to leave them out, or raise train.max_unreadable",
            )

    def _fail_on_loss(self, own: float, parts: Sequence[TrainBatch]) -> None:
        """Nothing of this step is saved: the last state from before it stays."""
        names = [self.name_of(i) for i in dict.fromkeys(int(i) for p in parts for i in p.indices)]
        shares = self.world.gather((own, names))
        guilty = [share for share in shares if not math.isfinite(share[0])]
        what = f"training loss became {guilty[0][0]}" if guilty else "gradient is not finite"
        named = [name for _, found in guilty or shares for name in found]
        raise WorkFailed(
            f"the {what}",
            where=f"epoch {self.position.epoch + 1}, step of {', '.join(named)}",
            fix="begin anew with a lower train.lr, or with train.clip_grad=1.0",
        )

    def _finish_epoch(self, stop: StopRequest, board: Board | None) -> None:
        position = self.position
        epoch = position.epoch + 1
        figures: dict[str, float] = {}
        if epoch == self.settings.epochs or epoch % self.settings.eval_every == 0:
            # Validation can take long; stopped or killed in it, only it is repeated.
            self.save()
            self.validation = self._validate(stop)
            figures = self.validation.metrics.figures()
            self._keep_validation(epoch, figures, board)
        if self.world.is_main:
            self._save_model("last", epoch, figures)
        shown = {"train_loss": position.loss_sum / position.clips, **figures}
        position.start_epoch(epoch)
        self.save()
        self.on_progress(Progress("epochs", epoch, self.settings.epochs, shown))

    def _save_model(self, role: str, epoch: int, figures: dict[str, float]) -> None:
        path = self.run.best if role == "best" else self.run.last
        notes = {
            "role": role,
            "epoch": epoch,
            "metrics": figures,
            "validations": self.position.validations,
        }
        self.save_model(path, self.step.best_model, notes)

    def _validate(self, stop: StopRequest) -> Validation:
        def leave_if_asked() -> None:
            # Processes are not in step here; the state was saved before.
            if stop.number:
                raise self._interrupted("stopped in validation, state saved", stop.number)

        return self.validate(self.step.best_model, leave_if_asked)

    def _keep_validation(self, epoch: int, figures: dict[str, float], board: Board | None) -> None:
        position, found = self.position, self.validation
        assert found is not None
        metrics = found.metrics
        position.validations += 1
        is_best = metrics.top1 > position.best_top1
        if is_best:
            position.best_top1, position.best_epoch = metrics.top1, epoch
        if not self.world.is_main or board is None:
            return
        self.run.append_metrics(
            {
                "kind": "val",
                "epoch": epoch,
                "step": position.step,
                **figures,
                "videos": metrics.videos,
                "unreadable": metrics.unreadable,
            }
        )
        log.info("epoch %d: %s", epoch, figures)
        coverage = {"videos": metrics.videos, "unreadable": metrics.unreadable}
        values = {f"val/{name}": float(v) for name, v in {**figures, **coverage}.items()}
        board.scalars(position.step, values)
        if is_best:
            matrix = confusion_matrix(found.scores.scores, found.scores.labels)
            board.confusion(position.step, matrix, self.labels)
            self._save_model("best", epoch, figures)
        board.flush()

    def _interrupted(self, what: str, number: int) -> Interrupted:
        return Interrupted(
            what,
            signal_number=number,
            fix=f"ogreg train --resume {shlex.quote(str(self.run.path))}",
        )

    def save(self) -> None:
        """Write the state for resuming."""
        if self.world.is_main:
            save_state(
                self.run.state, self.position, self.settings.identity, self.step.state_dict()
            )
        self._saved = time.monotonic()

    def resume(self) -> None:
        """Continue from the run folder's state file.

        Raises:
            CheckpointError: none there, unreadable, or of another training.
        """
        self.position, parts = load_state(self.run.state, self.settings.identity)
        self.step.load_state_dict(parts)
        self.resumed = True
        if self.world.is_main:
            # A kill in the middle of writing leaves its temporary file.
            remove_leftovers(self.run.state)
            self.run.drop_metrics_after(self.position.step, self.position.epoch)


class _Meter:
    """Time of an epoch, and the share of it spent waiting for data."""

    def __init__(self, position: Position) -> None:
        self._already = position.seconds
        self._started = time.perf_counter()
        self._waited = 0.0
        self._clips = 0

    @property
    def _elapsed(self) -> float:
        return time.perf_counter() - self._started

    @property
    def seconds(self) -> float:
        """Training time of the whole run so far."""
        return self._already + self._elapsed

    @property
    def clips_per_s(self) -> float:
        return self._clips / self._elapsed

    @property
    def wait_pct(self) -> float:
        return 100.0 * self._waited / self._elapsed

    def count(self, clips: int) -> None:
        self._clips += clips

    def waited(self, seconds: float) -> None:
        self._waited += seconds


def _show_samples(board: Board, batch: TrainBatch, name_of: Callable[[int], str]) -> None:
    board.clips(0, batch.clips.cpu(), [name_of(int(i)) for i in batch.indices])
