"""Forward passes that are warmed up, weighed and timed, alone or in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ogreg_core.errors import EnvironmentFault, OgregError, is_out_of_memory
from ogreg_core.evaluation import autocast
from ogreg_core.profiling.memory import PeakMeter, available_mb
from ogreg_core.profiling.subject import Subject
from ogreg_core.profiling.timing import Timing, measure_in_turn
from ogreg_core.progress import ProgressCallback

__all__ = [
    "DTYPES",
    "BatchCost",
    "Settings",
    "compiling",
    "expect_room",
    "forward_pass",
    "out_of_memory_words",
    "time_batches",
    "warm_up",
]

# What computes, as recipes call it.
DTYPES = {"float32": "fp32", "bf16": "bf16", "fp16": "fp16"}
# Of one piece of code: every model and batch size is compiled by itself.
_MOST_COMPILATIONS = 1024


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Args:
        batches: clips per pass, for the throughput; 1 is always measured, for the latency.
        repeats: timed passes.
        warmup: passes before them, at least 1; memory is that of the first.
        dtype: key of ``DTYPES``; all but float32 by autocast, as in evaluation.
        compile: whether to compile the model for each shape.
        train: whether to time training steps, too.
        depth: levels of modules.
        operators: how many of the most expensive to list.
    """

    batches: tuple[int, ...] = (1, 4)
    repeats: int = 5
    warmup: int = 2
    dtype: str = "float32"
    compile: bool = False
    train: bool = False
    depth: int = 1
    operators: int = 0


@dataclass(frozen=True)
class BatchCost:
    """Passes of one batch size, or why there are none.

    Args:
        batch: clips per pass.
        timing: of the passes; None where memory did not suffice.
        peak_mb: memory, see :class:`PeakMeter`; None where the system does not tell.
        compile_s: of the very first pass, compilation included; None without it.
        error: why there is no timing.
    """

    batch: int
    timing: Timing | None = None
    peak_mb: float | None = None
    compile_s: float | None = None
    error: str = ""

    @property
    def clips_per_s(self) -> float:
        """Throughput; 0 without a timing."""
        return 1000 * self.batch / self.timing.median_ms if self.timing else 0.0

    def document(self) -> dict[str, Any]:
        """Ready for JSON."""
        if self.timing is None:
            return {"batch": self.batch, "error": self.error}
        return {
            "batch": self.batch,
            "clips_per_s": self.clips_per_s,
            "ms_p50": self.timing.median_ms,
            "ms_p90": self.timing.p90_ms,
            "peak_memory_mb": self.peak_mb,
        }


def forward_pass(
    subject: Subject, model: nn.Module, batch: int, device: torch.device, dtype: str
) -> Callable[[], object]:
    """One inference pass over a batch that lies on the device already."""
    clip = subject.clip(batch, device)

    def run() -> object:
        with torch.inference_mode(), autocast(device, DTYPES[dtype]):
            return model(clip)

    return run


@contextmanager
def compiling(wanted: bool) -> Iterator[None]:
    """While active, torch compiles every model and shape anew instead of giving up after a few.

    Raises:
        EnvironmentFault: it cannot compile here.
    """
    if not wanted:
        yield
        return
    import torch._dynamo.config as config

    limits = {"recompile_limit": _MOST_COMPILATIONS, "fail_on_recompile_limit_hit": True}
    try:
        with config.patch(limits):
            yield
    except OgregError:
        raise
    except Exception as error:
        ours = type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))
        if not ours or is_out_of_memory(error):
            raise
        cause = getattr(error, "inner_exception", error)
        raise EnvironmentFault(
            "the model cannot be compiled here",
            why=next((line for line in str(cause).splitlines() if line.strip()), ""),
            fix="install a C++ compiler (g++ or clang), or leave out --compile",
        ) from error


def out_of_memory_words(error: BaseException) -> str:
    """One line for a table."""
    return f"out of memory: {str(error).partition('. ')[0].splitlines()[0]}"


def expect_room(batch: int, known: BatchCost | None, device: torch.device) -> None:
    """Refuse a batch that would not fit, judged by a smaller one: on a CPU the system does not say no
    but ends the process.

    Raises:
        MemoryError: with the figures.
    """
    if known is None or known.peak_mb is None:
        return
    needed, free = known.peak_mb * batch / known.batch, available_mb(device)
    if needed > free:
        raise MemoryError(f"about {needed / 2**10:.1f} GB needed, {free / 2**10:.1f} GB free")


def warm_up(
    run: Callable[[], object], batch: int, device: torch.device, settings: Settings
) -> BatchCost:
    """The first pass, weighed; with ``compile`` the compilation before it is timed apart."""
    compile_s = None
    if settings.compile:
        started = time.perf_counter()
        run()
        _wait_for(device)
        compile_s = time.perf_counter() - started
    meter = PeakMeter(device)
    run()
    _wait_for(device)
    return BatchCost(batch, peak_mb=meter.peak_mb(), compile_s=compile_s)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_batches(
    prepare: Mapping[str, Callable[[], Callable[[], object]]],
    batch: int,
    device: torch.device,
    settings: Settings,
    on_progress: ProgressCallback,
    known: Mapping[str, BatchCost] | None = None,
) -> dict[str, BatchCost]:
    """Passes of one batch size of several models, timed in turn; one for which memory does not
    suffice leaves the round, with the reason.

    Args:
        prepare: by name what makes a pass, input included.
        batch: clips per pass.
        device: where.
        settings: how.
        on_progress: receives progress events.
        known: a smaller batch of each.
    """
    passes: dict[str, Callable[[], object]] = {}
    found: dict[str, BatchCost] = {}
    for name, make in prepare.items():
        try:
            expect_room(batch, (known or {}).get(name), device)
            run = make()
            found[name] = warm_up(run, batch, device, settings)
            passes[name] = run
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            found[name] = BatchCost(batch, error=out_of_memory_words(error))
            if device.type == "cuda":
                torch.cuda.empty_cache()
    if passes:
        more = settings.warmup - 1
        timings = measure_in_turn(passes, device, settings.repeats, more, on_progress)
        for name, timing in timings.items():
            timing = replace(timing, warmup=settings.warmup)
            found[name] = replace(found[name], timing=timing)
    return found
