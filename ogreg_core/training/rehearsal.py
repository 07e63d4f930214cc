"""A training step on invented clips, timed and weighed before the training begins."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path

import torch

from ogreg_core.data.loader import TrainBatch
from ogreg_core.profiling import available_mb as room_mb
from ogreg_core.profiling import peak_memory_mb

__all__ = ["Rehearsal", "invented_batch", "loading_rate", "rehearse"]

# A part of a micro-batch is enough to know the speed where the whole would take longer than this.
_SECONDS = 6.0
_REPEATS = 5
_LOADING_BATCHES = 40


@dataclass(frozen=True)
class Rehearsal:
    """What a step costs.

    Args:
        clips: of the micro-batch that was measured; 0 if not even one fits.
        seconds: of a step, median after a first one.
        peak_mb: most memory: allocated on a GPU; on a CPU, growth of this process's resident set.
        fits: whether the whole micro-batch has room: tried on a GPU, computed from one clip on a
            CPU, whose system does not say no but ends the process.
        needed_mb: memory of the whole micro-batch, measured or computed.
    """

    clips: int
    seconds: float
    peak_mb: float
    fits: bool
    needed_mb: float

    @property
    def clips_per_second(self) -> float:
        """How many the model trains on; 0 if it could not."""
        return self.clips / self.seconds if self.seconds else 0.0


def invented_batch(clips: int, frames: int, size: int, classes: int) -> TrainBatch:
    """Random pixels and labels in the shape of a training batch."""
    generator = torch.Generator().manual_seed(0)
    shape = (clips, 3, frames, size, size)
    return TrainBatch(
        torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator),
        torch.randint(0, classes, (clips,), generator=generator),
        torch.zeros(clips, dtype=torch.int64),
        torch.zeros((clips, 5), dtype=torch.int64),
        (),
    )


def rehearse(
    step: Callable[[TrainBatch], object],
    batch_of: Callable[[int], TrainBatch],
    clips: int,
    device: torch.device,
    *,
    seconds: float = _SECONDS,
    available_mb: float | None = None,
) -> Rehearsal:
    """Make a few steps.

    Args:
        step: a whole step: forward, backward, optimiser.
        batch_of: a micro-batch of so many clips.
        clips: of a whole micro-batch.
        device: where the step runs.
        seconds: on a CPU, how long the steps after the first may take together, roughly.
        available_mb: on a CPU, memory that may be used; None: ask the system.
    """
    if device.type == "cuda":
        return _rehearse_on_gpu(step, batch_of, clips, device)
    available = room_mb(device) if available_mb is None else available_mb
    before = _reset_peak()
    # The first step also makes the gradients and the optimiser's moments, which do not grow with
    # the batch.
    step(batch_of(1))
    lasting = max(_resident_mb() - before, 0.0)
    until = time.perf_counter() + seconds
    count, batch = 1, batch_of(1)
    took, grown = _weighed(step, batch)
    while count < clips:
        more = min(2 * count, clips)
        factor = more / count
        # Room for a repetition, and nothing near the limit: a CPU's system does not say no.
        if time.perf_counter() + 2 * factor * took > until or factor * grown > available / 2:
            break
        count, batch = more, batch_of(more)
        took, grown = _weighed(step, batch)
    times = [took]
    while len(times) < _REPEATS and time.perf_counter() + took < until:
        times.append(_timed(step, batch))
    needed = grown * clips / count
    return Rehearsal(
        clips=count,
        seconds=statistics.median(times),
        peak_mb=lasting + grown,
        fits=needed < available,
        needed_mb=lasting + needed,
    )


def _weighed(step: Callable[[TrainBatch], object], batch: TrainBatch) -> tuple[float, float]:
    """Seconds of a step, and by how many megabytes it made the resident set grow."""
    floor = _reset_peak()
    took = _timed(step, batch)
    return took, max(_peak_mb() - floor, 0.0)


def _rehearse_on_gpu(
    step: Callable[[TrainBatch], object],
    batch_of: Callable[[int], TrainBatch],
    clips: int,
    device: torch.device,
) -> Rehearsal:
    torch.cuda.reset_peak_memory_stats(device)
    try:
        batch = batch_of(clips)
        step(batch)
        times = [_timed(step, batch, device) for _ in range(_REPEATS)]
    except torch.cuda.OutOfMemoryError:
        peak = peak_memory_mb(device)
        return Rehearsal(0, 0.0, peak, False, peak)
    peak = peak_memory_mb(device)
    return Rehearsal(clips, statistics.median(times), peak, True, peak)


def _timed(
    step: Callable[[TrainBatch], object], batch: TrainBatch, device: torch.device | None = None
) -> float:
    started = time.perf_counter()
    step(batch)
    if device is not None:
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _reset_peak() -> float:
    """Begin to measure the peak anew, where the system can (Linux); returns the resident megabytes."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _resident_mb()


def _resident_mb() -> float:
    return _status_mb("VmRSS")


def _peak_mb() -> float:
    return _status_mb("VmHWM")


def _status_mb(name: str) -> float:
    """A line of Linux's account of this process; elsewhere its peak so far stands in."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) / 2**10
    return peak_memory_mb(torch.device("cpu"))


def loading_rate(
    batches_of: Callable[[int], Iterator[TrainBatch]],
    workers: int,
    *,
    seconds: float = _SECONDS,
    most: int = _LOADING_BATCHES,
) -> float:
    """Clips per second out of a loader, once it runs.

    Args:
        batches_of: the batches of an epoch, by its number; asked for one epoch after the other.
        workers: of the loader; the first batch of each is not counted.
        seconds: stop after so long.
        most: or after so many batches.
    """
    warm_up = max(workers, 1)
    started = since = time.perf_counter()
    clips = everything = 0
    for number, batch in enumerate(chain.from_iterable(map(batches_of, count())), 1):
        now = time.perf_counter()
        everything += len(batch.labels)
        if number > warm_up:
            clips += len(batch.labels)
            if now - since >= seconds or number - warm_up >= most:
                return clips / (now - since)
        elif now - started >= 2 * seconds:
            # So slow that there is no time for a warm-up.
            return everything / (now - started)
        if number == warm_up:
            since = now
    raise AssertionError("a training split has at least one batch")
