"""Cost of models against the length of a clip, its size, or the batch size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import nn

from ogreg_core.errors import OgregError, OutOfMemory, is_out_of_memory
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
from ogreg_core.progress import Progress, ProgressCallback, ignore_progress

__all__ = ["Over", "Point", "Sweep", "sweep_models"]

Over = Literal["frames", "size", "batch"]


@dataclass(frozen=True)
class Point:
    """A model at one value, or why there is nothing to say.

    Args:
        value: frames, pixels or clips.
        counts: of one clip.
        cost: of a pass.
        error: why the model does not take this value.
    """

    value: int
    counts: Counts | None = None
    cost: BatchCost | None = None
    error: str = ""

    def document(self) -> dict[str, Any]:
        """Ready for JSON."""
        if self.counts is None or self.cost is None or self.cost.timing is None:
            return {"value": self.value, "error": self.error}
        return {
            "value": self.value,
            **count_document(self.counts),
            "latency_ms_p50": self.cost.timing.median_ms,
            "latency_ms_p90": self.cost.timing.p90_ms,
            "clips_per_s": self.cost.clips_per_s,
            "peak_memory_mb": self.cost.peak_mb,
            "activations_m": self.counts.seen.activations.get("", 0) / 1e6,
        }


@dataclass(frozen=True)
class Sweep:
    """Models at several values.

    Args:
        over: what changes.
        values: in the order asked for.
        machine: where and how it was measured.
        subjects: the models; what is swept is that of the first value's.
        points: by model, one per value.
    """

    over: Over
    values: tuple[int, ...]
    machine: Machine
    subjects: tuple[Subject, ...]
    points: Mapping[str, Sequence[Point]]

    def document(self) -> dict[str, Any]:
        """``ogreg.profile-sweep.v1``."""
        settings = self.machine.settings
        return {
            "schema": "ogreg.profile-sweep.v1",
            "over": self.over,
            "values": list(self.values),
            "classes": self.subjects[0].classes,
            **self.machine.document(),
            "repeats": settings.repeats,
            "warmup": settings.warmup,
            "models": [
                {
                    "model": subject.model,
                    "options": dict(subject.options),
                    "frames": None if self.over == "frames" else subject.frames,
                    "size_px": None if self.over == "size" else subject.size,
                    "points": [point.document() for point in self.points[subject.model]],
                }
                for subject in self.subjects
            ],
        }


def sweep_models(
    subjects: Sequence[Subject],
    over: Over,
    values: Sequence[int],
    device: torch.device,
    settings: Settings,
    on_progress: ProgressCallback = ignore_progress,
) -> Sweep:
    """Count and time models at every value, in turn at each.

    Args:
        subjects: the models, each once.
        over: what changes: ``frames``, ``size``, or clips per ``batch``.
        values: to try.
        device: where.
        settings: how; its batches do not count.
        on_progress: receives progress events.

    Raises:
        UsageError: no model takes any of the values.
        OutOfMemory: nothing fits.
        EnvironmentFault: a model cannot be compiled here.
    """
    assert over in get_args(Over)
    points: dict[str, list[Point]] = {subject.model: [] for subject in subjects}
    refusals: list[OgregError] = []
    with compiling(settings.compile):
        for done, value in enumerate(values, 1):
            found = _at(subjects, over, value, device, settings, on_progress, refusals)
            for name, point in found.items():
                points[name].append(point)
            on_progress(Progress("sweep", done, len(values)))
    if not any(point.counts and not point.error for row in points.values() for point in row):
        raise refusals[0]
    return Sweep(over, tuple(values), Machine(device, settings), tuple(subjects), points)


def _changed(subject: Subject, over: Over, value: int) -> Subject:
    if over == "frames":
        return replace(subject, frames=value)
    return replace(subject, size=value) if over == "size" else subject


def _at(
    subjects: Sequence[Subject],
    over: Over,
    value: int,
    device: torch.device,
    settings: Settings,
    on_progress: ProgressCallback,
    refusals: list[OgregError],
) -> dict[str, Point]:
    """Every model at one value; what went wrong is added to ``refusals``."""
    batch = value if over == "batch" else 1
    points: dict[str, Point] = {}
    built: dict[str, tuple[Subject, nn.Module]] = {}
    for subject in subjects:
        changed = _changed(subject, over, value)
        try:
            model = changed.build().to(device)
            points[subject.model] = Point(value, count_costs(changed, model))
            built[subject.model] = (changed, model)
            if settings.compile:
                model.compile(dynamic=False)
        except OgregError as error:
            refusals.append(error)
            points[subject.model] = Point(value, error=error.why or error.what)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            words = out_of_memory_words(error)
            refusals.append(OutOfMemory(f"{changed.name} at {over} {value}", why=words))
            points[subject.model] = Point(value, error=words)
    makes = {
        name: partial(forward_pass, *pair, batch, device, settings.dtype)
        for name, pair in built.items()
    }
    for name, cost in time_batches(makes, batch, device, settings, on_progress).items():
        points[name] = replace(points[name], cost=cost, error=cost.error)
        if cost.error:
            refusals.append(OutOfMemory(f"{name} at {over} {value}", why=cost.error))
    return points
