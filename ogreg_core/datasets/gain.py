"""What re-encoding has gained: measured, not promised."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ogreg_core.datasets.journal import Journal
from ogreg_core.errors import VideoError

if TYPE_CHECKING:
    from ogreg_core.video.transcode import TranscodeSettings

__all__ = ["measure_speedup"]

# Files on which the gain of re-encoding is measured, and repeats of each.
_MEASURED_FILES, _MEASURED_REPEATS = 5, 3


def measure_speedup(
    root: Path, folder: Path, paths: list[str], journal: Journal, resize: TranscodeSettings
) -> float | None:
    """Median over a few files of how many times faster a training clip (32 frames at stride 2, at the
    copies' size) is read from the copy than from the original; None if that cannot be measured.
    """
    ratios: list[float] = []
    for path in paths[:: max(1, len(paths) // _MEASURED_FILES)]:
        record = journal.get(path) or {}
        if "row" in record and len(ratios) < _MEASURED_FILES:
            try:
                copy = folder / record["row"]["path"]
                ratios.append(_seconds(root / path, resize) / _seconds(copy, resize))
            except (VideoError, OSError):
                continue  # gone since; the figure is a courtesy
    return statistics.median(ratios) if ratios else None


def _seconds(file: Path, resize: TranscodeSettings) -> float:
    """Median time to read a training clip from a file."""
    from ogreg_core.data.transforms import scaled_size
    from ogreg_core.video import VideoReader, probe

    info = probe(file)
    size = scaled_size(info.height, info.width, resize.short_side)
    indices = [min(2 * i + info.frames // 4, info.frames - 1) for i in range(32)]
    times = []
    for _ in range(_MEASURED_REPEATS):
        started = time.perf_counter()
        VideoReader(file, info.reader).frames_at(indices, size)
        times.append(time.perf_counter() - started)
    return statistics.median(times)
