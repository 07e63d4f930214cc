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

from ogreg_core.data.loader import EpochSampler, batches
from ogreg_core.data.transforms import to_input
from ogreg_core.errors import Interrupted, WorkFailed
from ogreg_core.evaluation import Metrics, autocast
from ogreg_core.progress import Progress, ProgressCallback
from ogreg_core.runs import RunFolder
from ogreg_core.training.signals import StopRequest
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
    label_smoothing: float
    mixup: float
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
            Interrupted: a signal asked to stop; the state was saved.
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
        task = f"epoch {position.epoch + 1}/{self.settings.epochs}"
        already = position.seconds
        started = before = time.perf_counter()
        waited, clips = 0.0, 0
        for batch, labels, indices in batches(self.loader):
            waited += time.perf_counter() - before
            loss, correct = self._step(batch, labels, indices)
            position.batch += 1
            position.step += 1
            position.loss_sum += loss * len(labels)
            position.clips += len(labels)
            clips += len(labels)
            elapsed = time.perf_counter() - started
            position.seconds = already + elapsed
            record: dict[str, Any] = {
                "kind": "train",
                "epoch": position.epoch + 1,
                "step": position.step,
                "loss": loss,
                "top1_batch": 100.0 * correct / len(labels),
                "lr": self.schedule.get_last_lr()[0],
                "clips_per_s": clips / elapsed,
                "data_wait_pct": 100.0 * waited / elapsed,
            }
            self.run.append_metrics(record)
            shown = {key: record[key] for key in ("loss", "lr", "clips_per_s", "data_wait_pct")}
            self.on_progress(Progress(task, position.batch, total, shown))
            self._stop_if_asked(stop)
            before = time.perf_counter()

    def _step(self, batch: Tensor, labels: Tensor, indices: Tensor) -> tuple[float, int]:
        settings = self.settings
        clips = to_input(batch.to(self.device, non_blocking=True), settings.mean, settings.std)
        labels = labels.to(self.device, non_blocking=True)
        clips, targets = mix(clips, labels, self.model.num_classes, settings.mixup)  # type: ignore[arg-type]
        with autocast(self.device, settings.precision):
            logits = self.model(clips)
        loss = F.cross_entropy(logits.float(), targets, label_smoothing=settings.label_smoothing)
        value = loss.item()
        if not math.isfinite(value):
            self._fail_on_loss(value, indices)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        if settings.clip_grad:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        return value, int((logits.argmax(dim=1) == labels).sum())

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
                {"kind": "val", "epoch": epoch, "step": position.step, **figures}
            )
            log.info("epoch %d: %s", epoch, figures)
            if self.metrics.top1 > position.best_top1:
                position.best_top1, position.best_epoch = self.metrics.top1, epoch
                self.save_model(self.run.best, epoch, figures)
        self._write_tensorboard(board, epoch, {"train/loss": train_loss, **figures})
        self.save_model(self.run.last, epoch, figures)
        position.epoch, position.batch, position.loss_sum, position.clips = epoch, 0, 0.0, 0
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


def mix(clips: Tensor, labels: Tensor, num_classes: int, alpha: float) -> tuple[Tensor, Tensor]:
    """Mixup (Zhang et al. 2018): each clip with its mirror in the batch, one share per batch.

    Args:
        clips: ``[B, ...]`` float.
        labels: ``[B]``.
        num_classes: size of the head.
        alpha: of the Beta distribution; 0 leaves everything as it is.

    Returns:
        Clips and class probabilities ``[B, num_classes]``; the plain labels if alpha is 0.
    """
    if alpha == 0:
        return clips, labels
    share = float(torch.distributions.Beta(alpha, alpha).sample())
    targets = F.one_hot(labels, num_classes).to(clips.dtype)
    return share * clips + (1 - share) * clips.flip(0), share * targets + (
        1 - share
    ) * targets.flip(0)
