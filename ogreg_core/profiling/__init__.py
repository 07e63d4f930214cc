"""Cost of a model: parameters, multiply-adds, activations, latency, throughput, memory.

What counts and times stands here. The measurements of ``ogreg profile`` put together are imported by
module, as they need the whole of training and inference: ``one_model``, ``comparison``, ``sweep``.
"""

from ogreg_core.profiling.counting import FlopReport, count_multiply_adds, count_parameters
from ogreg_core.profiling.memory import PeakMeter, available_mb, peak_memory_mb
from ogreg_core.profiling.timing import Timing, measure, measure_in_turn

__all__ = [
    "FlopReport",
    "PeakMeter",
    "Timing",
    "available_mb",
    "count_multiply_adds",
    "count_parameters",
    "measure",
    "measure_in_turn",
    "peak_memory_mb",
]
