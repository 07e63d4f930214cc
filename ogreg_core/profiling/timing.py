"""Wall times, alone and in turn, and where the time goes."""

from __future__ import annotations

import math
import os
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler import profile

from ogreg_core.progress import Progress, ProgressCallback, ignore_progress

__all__ = [
    "OperatorTime",
    "Timing",
    "matrix_product_share",
    "measure",
    "measure_in_turn",
    "operator_times",
]


@dataclass(frozen=True)
class Timing:
    """Wall times of repeated calls, in milliseconds, after warm-up.

    Args:
        median_ms, p90_ms: of the timed calls.
        repeats: how many were timed.
        warmup: how many were made before and not timed.
    """

    median_ms: float
    p90_ms: float
    repeats: int
    warmup: int


def measure(
    function: Callable[[], Any],
    device: torch.device,
    repeats: int = 10,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> Timing:
    """Time ``function``; on CUDA each call is waited for."""
    return measure_in_turn({"": function}, device, repeats, warmup, clock=clock)[""]


def measure_in_turn(
    functions: Mapping[str, Callable[[], Any]],
    device: torch.device,
    repeats: int = 10,
    warmup: int = 2,
    on_progress: ProgressCallback = ignore_progress,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time several functions in rounds, so that whatever else the machine does meets all of them."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    total = (warmup + repeats) * len(functions)
    for number in range(total):
        name, function = list(functions.items())[number % len(functions)]
        started = clock()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if number >= warmup * len(functions):
            times[name].append(1000 * (clock() - started))
        on_progress(Progress("time", number + 1, total))
    return {name: _timing(taken, warmup) for name, taken in times.items()}


def _timing(times: list[float], warmup: int) -> Timing:
    times = sorted(times)
    return Timing(
        median_ms=statistics.median(times),
        p90_ms=times[min(math.ceil(0.9 * len(times)), len(times)) - 1],
        repeats=len(times),
        warmup=warmup,
    )


# --- where the time goes -----------------------------------------------------------------------


@dataclass(frozen=True)
class OperatorTime:
    """What the calls of one operator took together, without those that it calls in turn.

    Args:
        name: as torch's profiler has it.
        calls: how many.
        ms: on the device that does the work.
        share: of all operators, 0..1.
    """

    name: str
    calls: int
    ms: float
    share: float


# Kernels of matrix products, convolutions and fused attention, as CPU and CUDA builds call them.
_PRODUCT = re.compile(
    r"(?<![a-z])(mm|addmm|bmm|baddbmm|addbmm|mv|addmv|dot)(?![a-z])"
    r"|conv(?:olution|_?transpose|_?depthwise|\dd|_)|slow_conv|mkldnn_linear|_linear_pointwise"
    r"|(?:flash|efficient|cudnn|fused)\w*attention|attention_forward"
)


def operator_times(function: Callable[[], Any], device: torch.device) -> list[OperatorTime]:
    """Profile one call: the operators with their own time, the most expensive first.

    Args:
        function: called once; warm it up before.
        device: on CUDA the time on the GPU counts, else that on the CPU.
    """
    on_gpu = device.type == "cuda"
    # The profiler's library writes to stderr what it does, and that there is no GPU.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profile(use_device="cuda" if on_gpu else None) as profiler:
        function()
        if on_gpu:
            torch.cuda.synchronize(device)
    # Kernels stand in the list once more, beside the operators that launched them.
    events = [e for e in profiler.key_averages() if e.device_type == DeviceType.CPU]
    taken = {e.key: e.self_device_time_total if on_gpu else e.self_cpu_time_total for e in events}
    calls = {e.key: e.count for e in events}
    total = sum(taken.values()) or 1.0
    found = [
        OperatorTime(name, calls[name], us / 1000, us / total) for name, us in taken.items() if us
    ]
    return sorted(found, key=lambda operator: -operator.ms)


def matrix_product_share(operators: Sequence[OperatorTime]) -> float:
    """Share of the time in matrix products, convolutions and fused attention, 0..1."""
    return sum(operator.share for operator in operators if _PRODUCT.search(operator.name))
