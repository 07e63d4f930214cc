"""Cost of a model: parameters, multiply-adds, latency, throughput, peak memory.

One multiply-add counts once, as in the field's tables ("GFLOPs" there). fvcore counts operators in
a trace; its count of fused attention is zero, so a handler is added here and checked by a test
against the unfused formula.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ogreg_core.progress import Progress, ProgressCallback, ignore_progress

__all__ = [
    "FlopReport",
    "Timing",
    "count_multiply_adds",
    "count_parameters",
    "measure",
    "measure_in_turn",
    "peak_memory_mb",
]

# Operators that move, compare or combine elements without multiplying them in a matrix product or
# convolution. fvcore's convention leaves them out; listing them keeps the list of uncounted
# operators meaningful.
_ELEMENTWISE_NAMES = """
    adaptive_avg_pool3d add add_ addcmul addcmul_ amax amin avg_pool2d avg_pool3d clamp_min cosine_similarity div div_
    dropout_ exp expand_as fill_ gelu linalg_vector_norm max_pool2d max_pool3d mean mul mul_ ne neg pad
    pow repeat repeat_interleave rsub sigmoid softmax sort sqrt sub sum tensor_split upsample_bicubic2d
"""
_ELEMENTWISE = frozenset(f"aten::{name}" for name in _ELEMENTWISE_NAMES.split())


@dataclass(frozen=True)
class FlopReport:
    """Multiply-adds of one forward pass.

    Args:
        total: of everything counted.
        by_operator: per operator kind.
        by_module: per top-level module.
        attention_share: share of ``total`` inside fused attention, 0..1.
        uncounted: operators without a counter that are not plain element-wise work, with their
            number of calls.
    """

    total: int
    by_operator: dict[str, int]
    by_module: dict[str, int]
    attention_share: float
    uncounted: dict[str, int]


def count_parameters(model: nn.Module) -> int:
    """All parameters, trainable or not."""
    return sum(parameter.numel() for parameter in model.parameters())


def _attention_multiply_adds(inputs: list[Any], _outputs: list[Any]) -> Counter[str]:
    """Query times keys and weights times values of ``F.scaled_dot_product_attention``."""
    query, key, value = (inputs[i].type().sizes() for i in range(3))
    scores = math.prod(query) * key[-2]
    mixed = math.prod(query[:-1]) * key[-2] * value[-1]
    return Counter({"attention": scores + mixed})


def count_multiply_adds(model: nn.Module, clip: Tensor) -> FlopReport:
    """Count with fvcore, fused attention included.

    Args:
        model: left in the mode it was in.
        clip: one input batch, ``[B, 3, T, H, W]``.
    """
    with warnings.catch_warnings():
        # fvcore traces with torch.jit, which newer versions of torch announce as deprecated at
        # import and use.
        warnings.simplefilter("ignore")
        from fvcore.nn import FlopCountAnalysis

        was_training = model.training
        model.eval()
        analysis = FlopCountAnalysis(model, clip)
        analysis.set_op_handle("aten::scaled_dot_product_attention", _attention_multiply_adds)
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings(
            "none"
        )
        total = int(analysis.total())
        operators = {name: int(count) for name, count in analysis.by_operator().items()}
        modules = {
            name: int(count)
            for name, count in analysis.by_module().items()
            if name and "." not in name and count
        }
        unsupported = dict(analysis.unsupported_ops())
        model.train(was_training)
    return FlopReport(
        total=total,
        by_operator=operators,
        by_module=modules,
        attention_share=operators.get("attention", 0) / total if total else 0.0,
        uncounted={name: calls for name, calls in unsupported.items() if name not in _ELEMENTWISE},
    )


@dataclass(frozen=True)
class Timing:
    """Wall times of repeated calls, in milliseconds, after warm-up."""

    median_ms: float
    p90_ms: float
    repeats: int
    warmup: int


def measure(
    function: Callable[[], Any], device: torch.device, repeats: int = 10, warmup: int = 2
) -> Timing:
    """Time ``function``; on CUDA each call is waited for."""
    return measure_in_turn({"": function}, device, repeats, warmup)[""]


def measure_in_turn(
    functions: Mapping[str, Callable[[], Any]],
    device: torch.device,
    repeats: int = 10,
    warmup: int = 2,
    on_progress: ProgressCallback = ignore_progress,
) -> dict[str, Timing]:
    """Time several functions in rounds, so that whatever else the machine does meets all of them."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    total = (warmup + repeats) * len(functions)
    for number in range(total):
        name, function = list(functions.items())[number % len(functions)]
        started = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if number >= warmup * len(functions):
            times[name].append(1000 * (time.perf_counter() - started))
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


def peak_memory_mb(device: torch.device) -> float:
    """Peak megabytes so far: allocated on the GPU, or resident in this process on a CPU; not a
    number where the system does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
