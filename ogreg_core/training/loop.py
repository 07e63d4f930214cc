"""The training loop."""

from __future__ import annotations

import logging
import math
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from ogreg_core.data.loader import EpochSampler, TrainBatch, Unreadable, batches, step_rng
from ogreg_core.data.mixing import Mixing, erase, mix
from ogreg_core.data.transforms import to_input
from ogreg_core.errors import DataError, Interrupted, WorkFailed
from ogreg_core.evaluation import Metrics, autocast
from ogreg_core.progress import Note, Progress, ProgressCallback
from ogreg_core.runs import RunFolder
from ogreg_core.signals import StopRequest
from ogreg_core.training.state import Position, load_state, restore_random_states, save_state

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["TrainSettings", "Trainer"]

log = logging.getLogger("ogreg.train")

_SIGNAL_GRACE_SECONDS = 0.5


@dataclass(frozen=True)
class TrainSettings:
    """Plain arguments of the loop; see the recipe's ``[train]`` and ``[eval]`` tables for their
    meaning.
    """

    epochs: int
    batch_size: int
    clip_grad: float
    mixing: Mixing
    seed: int
    max_unreadable: float
    precision: str
    eval_every: int
    mean: Sequence[float]
    std: Sequence[float]


class Trainer:
    """Trains one model and keeps the run folder's metrics and checkpoints.

    Args:
        model: on its device.
        optimizer, schedule: of the model; the schedule steps once per batch.
        loader, sampler: training batches and their order.
        settings: plain arguments.
        run: where everything is written.
        validate: gives metrics of the validation split; calls its argument after every batch.
        save_model: writes a checkpoint file from the finished epochs and their metrics.
        name_of: the file name of a training sample's index, for error messages.
        on_progress: receives a ``Progress`` per step.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        schedule: LambdaLR,
        loader: DataLoader[Any],
        sampler: EpochSampler,
        settings: TrainSettings,
        run: RunFolder,
        validate: Callable[[Callable[[], None]], Metrics],
        save_model: Callable[[Any, int, dict[str, float]], None],
        name_of: Callable[[int], str],
        on_progress: ProgressCallback,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.schedule = schedule
        self.loader = loader
        self.sampler = sampler
        self.settings = settings
        self.run = run
        self.validate = validate
        self.save_model = save_model
        self.name_of = name_of
        self.on_progress = on_progress
        self.device = next(model.parameters()).device
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.precision == "fp16")
        self.position = Position()
        self.metrics: Metrics | None = None

    def fit(self) -> Position:
        """Train from the current position to the last epoch.

        Raises:
            Interrupted: a signal asked to stop; the state was saved, unless the same signal ended the
                loader's workers or a second one insisted.
            DataError: more videos of an epoch than allowed cannot be read.
            WorkFailed: the loss is not finite; names the videos of the batch.
        """
        from torch.utils.tensorboard import SummaryWriter

        folder = str(self.run.path / "tensorboard")
        # Curves beyond the position belong to epochs that are about to be repeated.
        purge = self.position.epoch + 1 if self.position.epoch else None
        with StopRequest() as stop, SummaryWriter(folder, purge_step=purge) as board:
            try:
                while self.position.epoch < self.settings.epochs:
                    self._train_epoch(stop)
                    self._finish_epoch(stop, board)
            except RuntimeError as error:
                # Of a signal to all processes, the death of a worker may be heard of first.
                time.sleep(_SIGNAL_GRACE_SECONDS)
                if not stop.number:
                    raise
                # The signal went to every process of the job and ended the loader's workers, perhaps in
                # the middle of a step: what is in memory may be half a step ahead, so it is not saved.
                raise Interrupted(
                    "stopped with the loader's workers; the last checkpoint stays",
                    signal_number=stop.number,
                    fix=f"ogreg train --resume {shlex.quote(str(self.run.path))}",
                ) from error
        if self.metrics is None:
            # Nothing was left to train: the run had ended just before its report.
            self.metrics = self.validate(lambda: None)
        return self.position

    def _train_epoch(self, stop: StopRequest) -> None:
        position = self.position
        self.model.train()
        self.sampler.set_position(position.epoch, position.batch * self.settings.batch_size)
        total = position.batch + len(self.loader)
        budget = self.settings.max_unreadable * len(self.loader.dataset)  # type: ignore[arg-type]
        task = f"epoch {position.epoch + 1}/{self.settings.epochs}"
        already = position.seconds
        started = before = time.perf_counter()
        waited, clips = 0.0, 0
        for batch in batches(self.loader):
            waited += time.perf_counter() - before
            self._count_unreadable(batch.unreadable, budget)
            loss, correct = self._step(batch)
            count = len(batch.labels)
            position.batch += 1
            position.step += 1
            position.loss_sum += loss * count
            position.clips += count
            clips += count
            elapsed = time.perf_counter() - started
            position.seconds = already + elapsed
            record: dict[str, Any] = {
                "kind": "train",
                "epoch": position.epoch + 1,
                "step": position.step,
                "loss": loss,
                "top1_batch": 100.0 * correct / count,
                "lr": self.schedule.get_last_lr()[0],
                "clips_per_s": clips / elapsed,
                "data_wait_pct": 100.0 * waited / elapsed,
            }
            if batch.unreadable:
                record["unreadable"] = [video.path for video in batch.unreadable]
            self.run.append_metrics(record)
            shown = {key: record[key] for key in ("loss", "lr", "clips_per_s", "data_wait_pct")}
            self.on_progress(Progress(task, position.batch, total, shown))
            self._stop_if_asked(stop)
            before = time.perf_counter()

    def _count_unreadable(self, videos: Sequence[Unreadable], budget: float) -> None:
        """Another clip was trained on in place of each; say so, and stop where it becomes a habit."""
        for video in videos:
            self.position.unreadable += 1
            self.on_progress(Note(f"left out of this epoch: {video.reason}"))
            log.warning("unreadable: %s", video.reason)
        if videos and self.position.unreadable > budget:
            raise DataError(
                f"{self.position.unreadable} training videos of one epoch cannot be read",
                where=f"epoch {self.position.epoch + 1}; the last one: {videos[-1].reason}",
                why=f"train.max_unreadable = {self.settings.max_unreadable:g} allows {budget:.0f}",
                fix="run `ogreg prepare` again to leave them out, or raise train.max_unreadable",
            )

    def _step(self, batch: TrainBatch) -> tuple[float, int]:
        settings = self.settings
        clips = batch.clips.to(self.device, non_blocking=True)
        labels = batch.labels.to(self.device, non_blocking=True)
        clips = erase(to_input(clips, settings.mean, settings.std), batch.boxes)
        rng = step_rng(settings.seed, self.position.epoch, self.position.batch)
        classes: int = self.model.num_classes  # type: ignore[assignment]
        clips, targets = mix(clips, labels, classes, settings.mixing, rng)
        with autocast(self.device, settings.precision):
            logits = self.model(clips)
        loss = F.cross_entropy(logits.float(), targets)
        value = loss.item()
        if not math.isfinite(value):
            self._fail_on_loss(value, batch.indices)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        if settings.clip_grad:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        # Of a mixed clip the class that has the larger share.
        return value, int((logits.argmax(dim=1) == targets.argmax(dim=1)).sum())

    def _fail_on_loss(self, value: float, indices: Tensor) -> None:
        names = ", ".join(self.name_of(int(i)) for i in indices)
        raise WorkFailed(
            f"the training loss became {value}",
            where=f"epoch {self.position.epoch + 1}, batch of {names}",
            fix="lower train.lr, or set train.clip_grad=1.0",
        )

    def _finish_epoch(self, stop: StopRequest, board: SummaryWriter) -> None:
        position = self.position
        epoch = position.epoch + 1
        train_loss = position.loss_sum / position.clips
        figures: dict[str, float] = {}
        if epoch == self.settings.epochs or epoch % self.settings.eval_every == 0:
            # Validation can take long; stopped or killed in it, only it is repeated.
            self.save()
            self.metrics = self.validate(lambda: self._stop_if_asked(stop))
            figures = self.metrics.figures()
            self.run.append_metrics(
                {
                    "kind": "val",
                    "epoch": epoch,
                    "step": position.step,
                    **figures,
                    "videos": self.metrics.videos,
                    "unreadable": self.metrics.unreadable,
                }
            )
            log.info("epoch %d: %s", epoch, figures)
            if self.metrics.top1 > position.best_top1:
                position.best_top1, position.best_epoch = self.metrics.top1, epoch
                self.save_model(self.run.best, epoch, figures)
        self._write_tensorboard(board, epoch, {"train/loss": train_loss, **figures})
        self.save_model(self.run.last, epoch, figures)
        position.start_epoch(epoch)
        self.save()
        shown = {"train_loss": train_loss, **figures}
        self.on_progress(Progress("epochs", epoch, self.settings.epochs, shown))

    def _write_tensorboard(
        self, board: SummaryWriter, epoch: int, figures: dict[str, float]
    ) -> None:
        board.add_scalar("train/lr", self.schedule.get_last_lr()[0], epoch)
        for name, value in figures.items():
            board.add_scalar(name if "/" in name else f"val/{name}", value, epoch)
        board.flush()

    def _stop_if_asked(self, stop: StopRequest) -> None:
        if stop.number:
            self.save()
            raise Interrupted(
                f"stopped at step {self.position.step}, state saved",
                signal_number=stop.number,
                fix=f"ogreg train --resume {shlex.quote(str(self.run.path))}",
            )

    def save(self) -> None:
        """Write the state for resuming."""
        parts = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        save_state(self.run.state, self.position, parts)

    def resume(self) -> None:
        """Continue from the run folder's state file.

        Raises:
            CheckpointError: none there, or unreadable.
        """
        self.position, parts = load_state(self.run.state)
        self.model.load_state_dict(parts["model"])
        self.optimizer.load_state_dict(parts["optimizer"])
        self.schedule.load_state_dict(parts["schedule"])
        self.scaler.load_state_dict(parts["scaler"])
        restore_random_states(parts["random"])
        self.run.drop_metrics_after(self.position.step)
