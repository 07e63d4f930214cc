"""Everything that one model costs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ogreg_core.errors import OutOfMemory, is_out_of_memory
from ogreg_core.models.frame_times import given_times
from ogreg_core.profiling.clip_work import ClipWork, clip_work
from ogreg_core.profiling.counting import count_parameters
from ogreg_core.profiling.memory import PeakMeter
from ogreg_core.profiling.modules import ModuleCost, module_costs
from ogreg_core.profiling.passes import (
    BatchCost,
    Settings,
    compiling,
    forward_pass,
    out_of_memory_words,
    time_batches,
    warm_up,
)
from ogreg_core.profiling.subject import Counts, Subject, count_costs
from ogreg_core.profiling.timing import OperatorTime, matrix_product_share, operator_times
from ogreg_core.profiling.training import training_passes
from ogreg_core.progress import ProgressCallback, ignore_progress

__all__ = ["Machine", "Profile", "count_document", "profile_model"]


@dataclass(frozen=True)
class Machine:
    """Where and how it was measured."""

    device: torch.device
    settings: Settings

    def document(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "device": str(self.device),
            "dtype": self.settings.dtype,
            "compiled": self.settings.compile,
            "threads": torch.get_num_threads(),
        }


@dataclass(frozen=True)
class Profile:
    """What a model costs.

    Args:
        subject: the model and its input.
        machine: where and how it was measured.
        params: number of parameters.
        counts: of one clip.
        modules: see :func:`module_costs`.
        latency: of one clip.
        throughput: by batch size, in ascending order.
        memory_is: what the peaks are, in words.
        training: a training step; None if none was asked for.
        operators: of a pass, the most expensive first.
        clip: what a real clip decided; None for random input.
    """

    subject: Subject
    machine: Machine
    params: int
    counts: Counts
    modules: list[ModuleCost]
    latency: BatchCost
    throughput: list[BatchCost]
    memory_is: str
    training: BatchCost | None
    operators: list[OperatorTime]
    clip: ClipWork | None

    def document(self) -> dict[str, Any]:
        """``ogreg.profile.v2``."""
        timing = self.latency.timing
        assert timing is not None
        training = self.training
        trained = training.document() if training else None
        return {
            "schema": "ogreg.profile.v2",
            **_subject_document(self.subject),
            **self.machine.document(),
            "params": self.params,
            **_counts_document(self.subject, self.counts),
            "modules": [_module_document(row) for row in self.modules],
            "latency": {
                "batch": 1,
                "ms_p50": timing.median_ms,
                "ms_p90": timing.p90_ms,
                "repeats": timing.repeats,
                "warmup": timing.warmup,
                "compile_s": self.latency.compile_s,
            },
            "throughput": [cost.document() for cost in self.throughput],
            "peak_memory_is": self.memory_is,
            "training": trained if trained and "error" not in trained else None,
            "training_error": training.error if training and training.error else None,
            "operators": [
                {"name": o.name, "calls": o.calls, "ms": o.ms, "share_pct": 100 * o.share}
                for o in self.operators[: self.machine.settings.operators]
            ],
            "matrix_product_share_pct": 100 * matrix_product_share(self.operators),
            "clip": self.clip.document() if self.clip else None,
        }


def _subject_document(subject: Subject) -> dict[str, Any]:
    return {
        "model": subject.model,
        "options": dict(subject.options),
        "checkpoint": subject.checkpoint or None,
        "frames": subject.frames,
        "size_px": subject.size,
        "classes": subject.classes,
    }


def count_document(counts: Counts) -> dict[str, Any]:
    """Multiply-adds and FLOPs of one view, ready for JSON."""
    return {
        "gmacs_per_view": counts.flops.total / 1e9,
        "gflops_per_view": 2 * counts.flops.total / 1e9,
    }


def _counts_document(subject: Subject, counts: Counts) -> dict[str, Any]:
    views = subject.views
    total = counts.flops.total / 1e9
    return {
        **count_document(counts),
        "views": views.views,
        "views_protocol": f"{views.clips}x{views.crops}",
        "views_from": views.origin or None,
        "gmacs_per_video": total * views.views,
        "gflops_per_video": 2 * total * views.views,
        # fvcore counts norms and interpolation, torch does not.
        "products_gmacs": counts.flops.products / 1e9,
        "counter_check": {
            "torch_gmacs": counts.seen.multiply_adds / 1e9,
            "difference_pct": 100 * counts.difference,
            "note": counts.note or None,
        },
        "attention_gmacs": counts.flops.attention / 1e9,
        "attention_check_gmacs": counts.seen.attention / 1e9,
        "activations_m": counts.seen.activations.get("", 0) / 1e6,
        "uncounted_operators": counts.flops.uncounted,
    }


def _module_document(row: ModuleCost) -> dict[str, Any]:
    return {
        "name": row.name,
        "type": row.type,
        "depth": row.depth,
        "params": row.params,
        "gmacs": row.multiply_adds / 1e9,
        "activations_m": row.activations / 1e6,
    }


def profile_model(
    subject: Subject,
    model: nn.Module,
    device: torch.device,
    settings: Settings,
    on_progress: ProgressCallback = ignore_progress,
) -> Profile:
    """Count and time one model.

    Args:
        subject: what is profiled.
        model: built from it, in evaluation mode; goes to the device, and is compiled if asked for.
        device: where.
        settings: how.
        on_progress: receives progress events.

    Raises:
        UsageError: the model does not take this input.
        OutOfMemory: not even one clip fits.
        EnvironmentFault: it cannot be compiled here.
    """
    model.to(device)
    counts = count_costs(subject, model)
    modules = module_costs(model, counts.flops, counts.seen, settings.depth)
    clip = None
    if subject.real is not None:
        with given_times(model, subject.times):
            clip = clip_work(model, subject.clip(1, device))
    params = count_parameters(model)
    with compiling(settings.compile):
        if settings.compile:
            # Shapes are few and fixed, as in training.
            model.compile(dynamic=False)
        costs = _time_all(subject, model, device, settings, on_progress)
        run = forward_pass(subject, model, 1, device, settings.dtype)
        operators = operator_times(run, device)
        training = _train(subject, device, settings, on_progress) if settings.train else None
    return Profile(
        subject=subject,
        machine=Machine(device, settings),
        params=params,
        counts=counts,
        modules=modules,
        latency=costs[1],
        throughput=[costs[batch] for batch in sorted(set(settings.batches))],
        memory_is=PeakMeter.meaning_on(device),
        training=training,
        operators=operators,
        clip=clip,
    )


def _time_all(
    subject: Subject,
    model: nn.Module,
    device: torch.device,
    settings: Settings,
    on_progress: ProgressCallback,
) -> dict[int, BatchCost]:
    """Every batch size, the smallest first; after one that does not fit a larger one is not tried."""
    costs: dict[int, BatchCost] = {}
    known: dict[str, BatchCost] = {}
    failed = ""
    for batch in sorted({1, *settings.batches}):
        if failed:
            costs[batch] = BatchCost(batch, error=failed)
            continue
        make = partial(forward_pass, subject, model, batch, device, settings.dtype)
        cost = time_batches({"": make}, batch, device, settings, on_progress, known)[""]
        if cost.timing is None and batch == 1:
            raise OutOfMemory(
                f"one clip of {subject.shape} does not fit into memory",
                where=str(device),
                why=cost.error,
                fix=f"ogreg profile --model {subject.model} --size {max(subject.size // 2, 32)}",
            )
        costs[batch], failed = cost, cost.error
        known = {"": cost}
    return costs


def _train(
    subject: Subject, device: torch.device, settings: Settings, on_progress: ProgressCallback
) -> BatchCost:
    """A training step of the largest batch that fits."""
    batches = sorted(set(settings.batches), reverse=True)
    found = BatchCost(batches[-1], error="out of memory")
    try:
        steps = training_passes(subject, device, settings)
        meter = PeakMeter(device)
        known = {"": warm_up(steps(1), 1, device, settings)} if batches[0] > 1 else {}
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return replace(found, error=out_of_memory_words(error))
    for batch in batches:
        make = partial(steps, batch)
        found = time_batches({"": make}, batch, device, settings, on_progress, known)[""]
        if found.timing is not None:
            # From before the first step, which also makes the gradients and the optimiser's moments.
            return replace(found, peak_mb=meter.peak_mb())
    return found
