"""Several models in one process, timed in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from ogreg_core.errors import OgregError, OutOfMemory, is_out_of_memory
from ogreg_core.profiling.counting import count_parameters
from ogreg_core.profiling.memory import available_mb
from ogreg_core.profiling.one_model import Machine, count_document
from ogreg_core.profiling.passes import (
    BatchCost,
    Settings,
    compiling,
    forward_pass,
    out_of_memory_words,
    time_batches,
)
from ogreg_core.profiling.subject import Counts, Subject, count_costs
from ogreg_core.profiling.training import training_passes
from ogreg_core.progress import Progress, ProgressCallback, ignore_progress

__all__ = ["Compared", "Comparison", "compare_models"]

# Weights, their gradients and the optimiser's two moments, in float32.
_BYTES_PER_TRAINED_PARAMETER = 16


@dataclass(frozen=True)
class Compared:
    """One model of a comparison.

    Args:
        subject: the model and its input.
        params: number of parameters.
        counts: of one clip.
        costs: by batch size; 1 is always there.
        training: a training step; None if none was asked for.
    """

    subject: Subject
    params: int
    counts: Counts
    costs: Mapping[int, BatchCost]
    training: BatchCost | None = None

    @property
    def latency_ms(self) -> float:
        """Median of one clip."""
        timing = self.costs[1].timing
        assert timing is not None
        return timing.median_ms

    @property
    def best(self) -> BatchCost:
        """The batch size with the highest throughput."""
        return max(self.costs.values(), key=lambda cost: cost.clips_per_s)


@dataclass(frozen=True)
class Comparison:
    """Models side by side; ratios are to the first.

    Args:
        machine: where and how it was measured.
        classes: size of the heads.
        models: those that could be measured, in the order asked for.
        left_out: the reason by model for the others.
        training_batch: clips of a training step.
    """

    machine: Machine
    classes: int
    models: tuple[Compared, ...]
    left_out: dict[str, str] = field(default_factory=dict)
    training_batch: int = 1

    def document(self) -> dict[str, Any]:
        """``ogreg.profile-compare.v2``."""
        settings = self.machine.settings
        return {
            "schema": "ogreg.profile-compare.v2",
            "classes": self.classes,
            **self.machine.document(),
            "batch": 1,
            "batches": list(settings.batches),
            "training_batch": self.training_batch if settings.train else None,
            "repeats": settings.repeats,
            "warmup": settings.warmup,
            "models": [self._row(model) for model in self.models],
            "left_out": [{"model": name, "error": error} for name, error in self.left_out.items()],
        }

    def _row(self, model: Compared) -> dict[str, Any]:
        first, latency = self.models[0], model.costs[1]
        assert latency.timing is not None
        training = model.training.timing if model.training else None
        reference = first.training.timing if first.training else None
        return {
            "model": model.subject.model,
            "frames": model.subject.frames,
            "size_px": model.subject.size,
            "params": model.params,
            **count_document(model.counts),
            "uncounted_operators": model.counts.flops.uncounted,
            "latency_ms_p50": latency.timing.median_ms,
            "latency_ms_p90": latency.timing.p90_ms,
            "latency_ratio": model.latency_ms / first.latency_ms,
            "compile_s": latency.compile_s,
            "throughput": [
                model.costs[batch].document()
                for batch in sorted(set(self.machine.settings.batches))
            ],
            "best": {
                "batch": model.best.batch,
                "clips_per_s": model.best.clips_per_s,
                "ratio": model.best.clips_per_s / first.best.clips_per_s,
            },
            "training_ms_p50": training.median_ms if training else None,
            "training_ratio": training.median_ms / reference.median_ms
            if training and reference
            else None,
            "training_error": model.training.error or None if model.training else None,
        }


def compare_models(
    subjects: Sequence[Subject],
    device: torch.device,
    settings: Settings,
    on_progress: ProgressCallback = ignore_progress,
) -> Comparison:
    """Count and time several models, every batch size and the training step in turn.

    A model that does not take its input, or does not fit into memory, is left out with the reason.

    Args:
        subjects: the models, each once.
        device: where; all of them lie there together.
        settings: how.
        on_progress: receives progress events.

    Raises:
        UsageError: no model takes its input.
        OutOfMemory: no model fits.
        EnvironmentFault: one cannot be compiled here.
    """
    counted, left_out = _count_all(subjects, device, settings, on_progress)
    with compiling(settings.compile):
        costs = _time_all(counted, device, settings, on_progress)
        for name, found in costs.items():
            if found[1].timing is None:
                left_out[name] = found[1].error
        built = {name: model for name, model in counted.items() if name not in left_out}
        if not built:
            raise OutOfMemory("not one model fits into memory", where=str(device))
        batch = max(settings.batches)
        trained = _train_all(built, device, settings, on_progress, batch) if settings.train else {}
    models = tuple(
        Compared(subject, params, counts, costs[name], trained.get(name))
        for name, (subject, _, params, counts) in built.items()
    )
    return Comparison(Machine(device, settings), subjects[0].classes, models, left_out, batch)


_Built = tuple[Subject, nn.Module, int, Counts]


def _count_all(
    subjects: Sequence[Subject],
    device: torch.device,
    settings: Settings,
    on_progress: ProgressCallback,
) -> tuple[dict[str, _Built], dict[str, str]]:
    """Models on the device with their counts, and why others are not."""
    built: dict[str, _Built] = {}
    left_out: dict[str, str] = {}
    refusals: list[OgregError] = []
    for done, subject in enumerate(subjects, 1):
        try:
            model = subject.build().to(device)
            built[subject.model] = (
                subject,
                model,
                count_parameters(model),
                count_costs(subject, model),
            )
            if settings.compile:
                model.compile(dynamic=False)
        except OgregError as error:
            refusals.append(error)
            left_out[subject.model] = f"{error.what}: {error.why}" if error.why else error.what
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            refusals.append(OutOfMemory(f"{subject.name} does not fit", why=str(error)))
            left_out[subject.model] = out_of_memory_words(error)
        on_progress(Progress("count", done, len(subjects)))
    if not built:
        raise refusals[0]
    return built, left_out


def _time_all(
    built: Mapping[str, _Built],
    device: torch.device,
    settings: Settings,
    on_progress: ProgressCallback,
) -> dict[str, dict[int, BatchCost]]:
    """By model and batch size; who has failed at one is not tried at a larger one."""
    costs: dict[str, dict[int, BatchCost]] = {name: {} for name in built}
    known: dict[str, BatchCost] = {}
    for batch in sorted({1, *settings.batches}):
        running = [name for name in built if all(not c.error for c in costs[name].values())]
        makes: dict[str, Callable[[], Callable[[], object]]] = {
            name: partial(forward_pass, *built[name][:2], batch, device, settings.dtype)
            for name in running
        }
        known = time_batches(makes, batch, device, settings, on_progress, known)
        for name in built:
            before = list(costs[name].values())
            costs[name][batch] = known.get(name) or BatchCost(batch, error=before[-1].error)
    return costs


def _train_all(
    built: Mapping[str, _Built],
    device: torch.device,
    settings: Settings,
    on_progress: ProgressCallback,
    batch: int,
) -> dict[str, BatchCost]:
    """Training steps in turn."""

    def make(subject: Subject, params: int) -> Callable[[], object]:
        needed = params * _BYTES_PER_TRAINED_PARAMETER / 2**20
        if needed > available_mb(device):
            raise MemoryError(f"about {needed / 2**10:.1f} GB needed for weights and moments alone")
        return training_passes(subject, device, settings)(batch)

    makes = {
        name: partial(make, subject, params) for name, (subject, _, params, _) in built.items()
    }
    return time_batches(makes, batch, device, settings, on_progress)
