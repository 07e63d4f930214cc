"""What a training step costs: forward, backward and optimiser, as training makes them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ogreg_core.data.mixing import Mixing
from ogreg_core.distributed import SINGLE
from ogreg_core.models.registry import find_model
from ogreg_core.profiling.passes import DTYPES, Settings
from ogreg_core.profiling.subject import Subject
from ogreg_core.training.optim import OptimSettings, build_optimizer, build_schedule
from ogreg_core.training.rehearsal import invented_batch
from ogreg_core.training.step import StepSettings, TrainStep

__all__ = ["training_passes"]

# Neither changes what a step costs.
_LEARNING_RATE = 1e-4
_OPTIMISER = OptimSettings(lr=_LEARNING_RATE, weight_decay=0.05)
_GRADIENT_NORM = 1.0


def training_passes(
    subject: Subject, device: torch.device, settings: Settings
) -> Callable[[int], Callable[[], object]]:
    """Steps of a freshly initialised model with AdamW on random clips, by their number of clips.

    A step is a whole :class:`TrainStep`: clips go to the device and are normalised there, forward,
    backward, gradient norm, optimiser, schedule.

    Args:
        subject: the model; its weights do not matter.
        device: where.
        settings: dtype and whether to compile.
    """
    model = subject.build().to(device)
    optimizer = build_optimizer(model, _OPTIMISER)
    schedule = build_schedule(
        optimizer,
        steps_per_epoch=1,
        epochs=1,
        warmup_epochs=0,
        lr=_LEARNING_RATE,
        min_lr=_LEARNING_RATE,
    )
    entry = find_model(subject.model)
    step = TrainStep(
        model,
        optimizer,
        schedule,
        StepSettings(
            clips_per_step=1,
            clip_grad=_GRADIENT_NORM,
            mixing=Mixing(),
            seed=0,
            precision=DTYPES[settings.dtype],
            mean=entry.mean,
            std=entry.std,
            compile=settings.compile,
        ),
        SINGLE,
    )

    def passes(batch: int) -> Callable[[], object]:
        clips = invented_batch(batch, subject.frames, subject.size, subject.classes)
        return lambda: step([clips], 0, 0)

    return passes
