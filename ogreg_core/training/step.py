"""One optimiser step: micro-batches in, weights changed, figures out."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

from ogreg_core.data.loader import TrainBatch
from ogreg_core.data.mixing import Mixing, erase, mix
from ogreg_core.data.order import step_rng
from ogreg_core.data.transforms import to_input
from ogreg_core.distributed import World
from ogreg_core.evaluation import autocast
from ogreg_core.models.protocol import logits_of, takes_times
from ogreg_core.models.stts_backbones import TokenSelecting
from ogreg_core.training.averaging import averaged
from ogreg_core.training.batch_norm import synchronise_batch_norm
from ogreg_core.training.memory import checkpoint_activations

__all__ = ["StepResult", "StepSettings", "TrainStep"]


@dataclass(frozen=True)
class StepSettings:
    """Plain arguments of a step.

    Args:
        clips_per_step: of all processes and micro-batches together.
        clip_grad: largest gradient norm; 0 for no clipping.
        mixing: of clips and labels.
        seed: of everything drawn.
        precision: ``fp32``, ``tf32``, ``bf16`` or ``fp16``.
        mean, std: normalisation of pixels in 0..1.
        steps_per_epoch, epochs: of the whole training, over which the noise of token selection fades.
        ema: decay of the moving average of the weights; 0 for none.
        checkpoint_stages: stages whose activations are recomputed.
        channels_last: memory layout of clips and convolution weights.
        compile: whether to compile the model.
        still: whether clips are so short that temporal parameters may get no gradient.
    """

    clips_per_step: int
    clip_grad: float
    mixing: Mixing
    seed: int
    precision: str
    mean: Sequence[float]
    std: Sequence[float]
    steps_per_epoch: int = 1
    epochs: int = 1
    ema: float = 0.0
    checkpoint_stages: Sequence[int] = ()
    channels_last: bool = False
    compile: bool = False
    still: bool = False


@dataclass(frozen=True)
class StepResult:
    """Figures of one process's share of a step.

    Args:
        loss_sum: over its clips.
        correct: clips whose larger label is the best guess.
        clips: how many.
        grad_norm: before clipping, of the whole step. It may be infinite or no number in fp16, whose
            step is left out then.
        lr: learning rate of the step, for a parameter whose group has no factor of its own.
    """

    loss_sum: float
    correct: int
    clips: int
    grad_norm: float
    lr: float


class TrainStep:
    """Model, optimiser, schedule, loss scaler and moving average, and how they move.

    The loss of a step is the mean over the clips of all its micro-batches on all processes, so that
    neither their number nor that of the processes changes the step (but for rounding; drop path and
    dropout draw anew per process and micro-batch, and batch norm sees one micro-batch at a time).

    Args:
        model: on its device, with its starting weights; wrapped here as the settings say.
        optimizer, schedule: of its parameters; the schedule moves once per step.
        settings: plain arguments.
        world: the processes that share a step.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        schedule: LambdaLR,
        settings: StepSettings,
        world: World,
    ) -> None:
        self.device = next(model.parameters()).device
        self.settings = settings
        self.world = world
        self.optimizer = optimizer
        self.schedule = schedule
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.precision == "fp16")
        self.memory_format = (
            torch.channels_last_3d if settings.channels_last else torch.contiguous_format
        )
        if world.size > 1:
            model = synchronise_batch_norm(model, self.device)
        # Behind it, as it has to know the norms that are used.
        checkpoint_activations(model, settings.checkpoint_stages)
        if settings.channels_last:
            model = model.to(memory_format=torch.channels_last_3d)
        self.model = model
        self.average: AveragedModel | None = averaged(model, settings.ema) if settings.ema else None
        if settings.compile:
            # Shapes are few and fixed; reasoning about symbolic ones takes minutes (torch 2.15).
            model.compile(dynamic=False)
        self._forward: nn.Module = model if world.size == 1 else self._distributed(model)

    def _distributed(self, model: nn.Module) -> DistributedDataParallel:
        cuda = self.device.type == "cuda"
        # Of depthwise weights, whose gradients come out channels last: a copy of a few kilobytes.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        return DistributedDataParallel(
            model,
            device_ids=[self.device] if cuda else None,
            find_unused_parameters=self.settings.still,
            gradient_as_bucket_view=True,
        )

    @property
    def best_model(self) -> nn.Module:
        """What is validated and kept: the moving average where there is one."""
        return self.model if self.average is None else self.average.module

    @property
    def learning_rate(self) -> float:
        """The current learning rate of a parameter whose group has no factor of its own."""
        return float(self.optimizer.defaults["lr"] * self._progress)

    @property
    def _progress(self) -> float:
        return float(self.schedule.get_last_lr()[0] / self.schedule.base_lrs[0])

    def __call__(self, batches: Sequence[TrainBatch], epoch: int, number: int) -> StepResult:
        """Make step ``number`` of ``epoch`` with this process's micro-batches."""
        self.model.train()
        self._fade_noise(epoch, number)
        self.optimizer.zero_grad(set_to_none=True)
        # Sums stay on the device: asking for a number would wait for it once per micro-batch.
        loss_sum = torch.zeros((), device=self.device)
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        for micro, batch in enumerate(batches):
            with self._gradients_stay(micro < len(batches) - 1):
                loss, logits, targets = self._loss(batch, epoch, number, micro)
                share = loss * (self.world.size / self.settings.clips_per_step)
                self.scaler.scale(share).backward()
            loss_sum += loss.detach()
            # Of a mixed clip the class that has the larger share.
            correct += (logits.argmax(dim=1) == targets.argmax(dim=1)).sum()
        lr = self.learning_rate
        norm = self._update()
        return StepResult(
            loss_sum.item(),
            int(correct.item()),
            sum(len(batch.labels) for batch in batches),
            norm.item(),
            lr,
        )

    def _fade_noise(self, epoch: int, number: int) -> None:
        if isinstance(self.model, TokenSelecting):
            done = epoch * self.settings.steps_per_epoch + number
            self.model.set_progress(done / (self.settings.epochs * self.settings.steps_per_epoch))

    def _gradients_stay(self, wanted: bool) -> AbstractContextManager[Any]:
        """Whether gradients are kept to this process until a later micro-batch."""
        if wanted and isinstance(self._forward, DistributedDataParallel):
            return self._forward.no_sync()
        return nullcontext()

    def _loss(
        self, batch: TrainBatch, epoch: int, number: int, micro: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Summed cross entropy, logits and targets of one micro-batch."""
        settings = self.settings
        clips = batch.clips.to(self.device, non_blocking=True)
        labels = batch.labels.to(self.device, non_blocking=True)
        clips = erase(to_input(clips, settings.mean, settings.std), batch.boxes)
        rng = step_rng(settings.seed, epoch, number)
        classes: int = self.model.num_classes  # type: ignore[assignment]
        clips, targets = mix(clips, labels, classes, settings.mixing, rng)
        times = self._times(batch, epoch, number)
        clips = clips.contiguous(memory_format=self.memory_format)
        # What the model draws depends on the place in the training alone, so that no state of a
        # random generator has to survive a kill.
        place = step_rng(settings.seed, epoch, number, "model", self.world.rank, micro)
        torch.manual_seed(place.getrandbits(63))
        with autocast(self.device, settings.precision):
            logits = logits_of(self._forward, clips, times, asked=self.model)
        return F.cross_entropy(logits.float(), targets, reduction="sum"), logits, targets

    def _times(self, batch: TrainBatch, epoch: int, number: int) -> Tensor | None:
        """Frame times of the micro-batch for models that take them, ``[B, T]``; of a mixed clip those of
        the clip that has the larger share.
        """
        if batch.times is None or not takes_times(self.model):
            return None
        # The draws once more, on a class of its own for each clip: the targets are then the shares.
        place = torch.arange(len(batch.clips))
        still = torch.zeros(len(place), 1, 1, *batch.clips.shape[-2:])
        rng = step_rng(self.settings.seed, epoch, number)
        mixing = replace(self.settings.mixing, smoothing=0.0)
        _, shares = mix(still, place, len(place), mixing, rng)
        return batch.times[shares.argmax(dim=1).to(batch.times.device)]

    def _update(self) -> Tensor:
        self.scaler.unscale_(self.optimizer)
        limit = self.settings.clip_grad or math.inf
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        # The scaler leaves out a step whose gradients overflowed, and lowers its scale.
        if self.scaler.get_scale() >= scale:
            self.schedule.step()
            if self.average is not None:
                self.average.update_parameters(self.model)
        return norm

    def state_dict(self) -> dict[str, Any]:
        """Everything that moves."""
        parts = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        if self.average is not None:
            parts["average"] = self.average.state_dict()
        return parts

    def load_state_dict(self, parts: dict[str, Any]) -> None:
        """Undo :meth:`state_dict`."""
        self.model.load_state_dict(parts["model"])
        self.optimizer.load_state_dict(parts["optimizer"])
        self.schedule.load_state_dict(parts["schedule"])
        self.scaler.load_state_dict(parts["scaler"])
        if self.average is not None:
            self.average.load_state_dict(parts["average"])
