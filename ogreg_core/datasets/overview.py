"""One picture of a data set: how many videos per class, how long, how fast, how large."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ogreg_core.data.manifest import UNLABELLED, Row
from ogreg_core.files import write_atomic

__all__ = ["save_overview"]

# More class names than this cannot be read side by side.
_NAMED_CLASSES = 40
_COMMON_SIZES = 8


def save_overview(
    path: Path, dataset: str, labels: Sequence[str], splits: Mapping[str, Sequence[Row]]
) -> None:
    """Write a PNG: class histogram by split, durations, frame rates and picture sizes; of images no
    durations and rates.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 3)
    rows = [row for found in splits.values() for row in found]
    images = all(row.decoder == "image" for row in rows)
    kind = "images" if images else "videos"
    _classes(figure.add_subplot(grid[0, :]), labels, splits, kind)
    if images:
        _sizes(figure.add_subplot(grid[1, :], ylabel=kind), rows)
    else:
        _durations(figure.add_subplot(grid[1, 0], ylabel=kind), rows)
        _rates(figure.add_subplot(grid[1, 1]), rows)
        _sizes(figure.add_subplot(grid[1, 2]), rows)
    counts = ", ".join(f"{split} {len(found):,}" for split, found in splits.items())
    # A dollar sign in a name would begin a formula.
    figure.suptitle(f"{dataset}: {len(labels)} classes; {counts} {kind}", parse_math=False)
    with warnings.catch_warnings():
        # Signs that the font lacks become boxes; no reason to talk to the user.
        warnings.filterwarnings("ignore", "Glyph .* missing")
        write_atomic(path, lambda temporary: figure.savefig(temporary, format="png", dpi=100))


def _classes(
    axes: Any, labels: Sequence[str], splits: Mapping[str, Sequence[Row]], kind: str
) -> None:
    counts = {
        split: np.bincount(
            [row.label for row in rows if row.label != UNLABELLED], minlength=len(labels)
        )
        for split, rows in splits.items()
    }
    total = sum(counts.values(), np.zeros(len(labels), dtype=np.int64))
    few = len(labels) <= _NAMED_CLASSES
    # Few classes by name; many from the largest to the smallest, where the shape is what can be read.
    order = np.arange(len(labels)) if few else np.argsort(-total, kind="stable")
    bottom = np.zeros(len(labels), dtype=np.int64)
    for split, count in counts.items():
        width = 0.9 if few else 1.0  # gaps between many thin bars would make a pattern
        axes.bar(np.arange(len(labels)), count[order], bottom=bottom, width=width, label=split)
        bottom = bottom + count[order]
    axes.set_ylabel(kind)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(counts), frameon=False)
    axes.margins(x=0.01)
    _whole_numbers(axes)
    if few:
        axes.set_xticks(
            np.arange(len(labels)),
            _short(labels),
            rotation=60,
            ha="right",
            fontsize=8,
            parse_math=False,
        )
    else:
        most, least = labels[order[0]], labels[order[-1]]
        axes.set_xlabel(
            f"classes by size, from {most!r} ({total.max()}) to {least!r} ({total.min()})",
            parse_math=False,
        )


def _short(labels: Sequence[str]) -> list[str]:
    return [label if len(label) <= 30 else f"{label[:29]}…" for label in labels]


def _durations(axes: Any, rows: Sequence[Row]) -> None:
    seconds = np.array([row.duration for row in rows])
    axes.hist(seconds, bins=40, color="tab:grey")
    axes.set_xlabel(f"duration, seconds (median {np.median(seconds):.1f})")
    _whole_numbers(axes)


def _rates(axes: Any, rows: Sequence[Row]) -> None:
    rates = Counter("variable" if row.variable_rate else f"{row.fps:.3g}" for row in rows)
    _bars(axes, rates.most_common(_COMMON_SIZES), len(rows))
    axes.set_xlabel("frames per second")


def _sizes(axes: Any, rows: Sequence[Row]) -> None:
    sizes = Counter(f"{row.width}x{row.height}" for row in rows)
    _bars(axes, sizes.most_common(_COMMON_SIZES), len(rows))
    axes.set_xlabel("picture size, pixels")


def _bars(axes: Any, counts: list[tuple[str, int]], total: int) -> None:
    if (rest := total - sum(count for _, count in counts)) > 0:
        counts = [*counts, ("other", rest)]
    axes.bar(range(len(counts)), [count for _, count in counts], color="tab:grey")
    axes.set_xlim(-0.6, max(len(counts), _COMMON_SIZES // 2) - 0.4)
    _whole_numbers(axes)
    axes.set_xticks(
        range(len(counts)), [name for name, _ in counts], rotation=45, ha="right", fontsize=8
    )


def _whole_numbers(axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
