"""The picture of a training: loss, learning rate, accuracy and speed over its epochs.

Everything comes from ``metrics.jsonl``, so a run that was stopped or killed has its picture too.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ogreg_core.errors import DataError
from ogreg_core.files import write_atomic
from ogreg_core.run_records import read_metrics

__all__ = ["save_curves", "smooth"]

_DPI = 110
_SIZE_INCHES = (11.0, 7.2)
# A picture has about a thousand pixels from left to right.
_MOST_POINTS = 4000
_TRAIN, _VAL, _VAL_TOP5 = "tab:blue", "tab:red", "tab:green"


def save_curves(metrics: Path, target: Path, title: str) -> None:
    """Draw the curves of a run.

    Args:
        metrics: its ``metrics.jsonl``; a last line that was cut off is passed over.
        target: PNG to write, atomically.
        title: above the picture.

    Raises:
        DataError: there is no record to draw.
    """
    records = list(read_metrics(metrics))
    train = _Series([r for r in records if r.get("kind") == "train"])
    val = _Series([r for r in records if r.get("kind") == "val"])
    if not train.records and not val.records:
        raise DataError(
            f"{metrics} holds no record of a training",
            why="the run ended before its first step",
            fix=f"see {metrics.with_name('run.log')}",
        )
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    per_epoch = _steps_per_epoch(train, val)
    figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
    FigureCanvasAgg(figure)
    # File and class names may hold the dollar signs of formulas.
    figure.suptitle(title, fontsize=11, parse_math=False)
    axes = figure.subplots(2, 2, sharex=True)
    _draw_loss(axes[0, 0], train, val, per_epoch)
    _draw_accuracy(axes[0, 1], train, val, per_epoch)
    _draw_rate(axes[1, 0], train, per_epoch)
    _draw_speed(axes[1, 1], train, per_epoch)
    for ax in axes.flat:
        ax.grid(alpha=0.25)
        ax.margins(x=0.02)
    for ax in axes[1]:
        ax.set_xlabel("epoch" if per_epoch else "step")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    write_atomic(target, lambda temporary: temporary.write_bytes(buffer.getvalue()))


class _Series:
    """Records of one kind by rising step; of those written twice, the later ones."""

    def __init__(self, records: list[dict[str, Any]]) -> None:
        by_step = {record["step"]: record for record in records}
        self.records = [by_step[step] for step in sorted(by_step)]

    def points(self, name: str, per_epoch: float) -> tuple[np.ndarray, np.ndarray]:
        """Place on the epoch (or step) axis and value, where there is one, ``[N]`` each."""
        found = [
            (record["step"] / (per_epoch or 1), float(record[name]))
            for record in self.records
            if isinstance(record.get(name), (int, float))
        ]
        x, y = np.array(found, dtype=float).reshape(-1, 2).T
        return x, y


def _steps_per_epoch(train: _Series, val: _Series) -> float:
    """From the last epoch that is known to be complete; 0 where none is."""
    ends = {record["epoch"]: record["step"] for record in val.records if record.get("epoch")}
    by_epoch = {record["epoch"]: record["step"] for record in train.records if record.get("epoch")}
    if by_epoch:
        by_epoch.pop(max(by_epoch))
    ends |= by_epoch
    return ends[max(ends)] / max(ends) if ends else 0.0


def smooth(values: np.ndarray, average: Callable[..., np.ndarray] = np.median) -> np.ndarray:
    """Each value's neighbourhood averaged: a fortieth of all values, at least five; the ends mirrored.

    Args:
        values: ``[N]``.
        average: ``np.median``, or ``np.mean`` where the values have few steps.

    Returns:
        ``[N]``.
    """
    window = 2 * (max(len(values) // 40, 4) // 2) + 1
    if len(values) < window:
        return values
    padded = np.pad(values, window // 2, mode="reflect")
    return average(np.lib.stride_tricks.sliding_window_view(padded, window), axis=1)


def _plot_noisy(
    ax: Any,
    points: tuple[np.ndarray, np.ndarray],
    colour: str,
    label: str,
    average: Callable[..., np.ndarray] = np.median,
) -> None:
    """The values lightly, and smoothed ones strongly."""
    every = max(-(-len(points[0]) // _MOST_POINTS), 1)
    x, y = (column[::every] for column in points)
    if not len(x):
        return
    ax.plot(x, y, color=colour, alpha=0.25, linewidth=0.8)
    marker = "." if len(x) == 1 else None
    ax.plot(x, smooth(y, average), color=colour, linewidth=1.6, marker=marker, label=label)


def _plot_val(ax: Any, points: tuple[np.ndarray, np.ndarray], colour: str, label: str) -> None:
    if len(points[0]):
        ax.plot(*points, color=colour, linewidth=1.6, marker="o", markersize=3.5, label=label)


def _legend(ax: Any) -> None:
    if ax.get_legend_handles_labels()[0]:
        ax.legend(fontsize=8, framealpha=0.8)
    else:
        ax.text(0.5, 0.5, "no record", transform=ax.transAxes, ha="center", color="0.5")


def _draw_loss(ax: Any, train: _Series, val: _Series, per_epoch: float) -> None:
    ax.set_title("loss", loc="left", fontsize=10)
    _plot_noisy(ax, train.points("loss", per_epoch), _TRAIN, "training batches, median")
    _plot_val(ax, val.points("loss", per_epoch), _VAL, "validation")
    _legend(ax)


def _draw_accuracy(ax: Any, train: _Series, val: _Series, per_epoch: float) -> None:
    ax.set_title("accuracy, %", loc="left", fontsize=10)
    points = train.points("top1_batch", per_epoch)
    _plot_noisy(ax, points, _TRAIN, "training batches top-1, mean", np.mean)
    for name, colour in (("top1", _VAL), ("top5", _VAL_TOP5)):
        points = val.points(name, per_epoch)
        if len(points[1]):
            text = f"validation {name.replace('top', 'top-')}, best {points[1].max():.1f}"
            _plot_val(ax, points, colour, text)
    ax.set_ylim(-2, 102)
    _legend(ax)


def _draw_rate(ax: Any, train: _Series, per_epoch: float) -> None:
    ax.set_title("learning rate", loc="left", fontsize=10)
    x, y = train.points("lr", per_epoch)
    if len(x):
        every = -(-len(x) // _MOST_POINTS)
        ax.plot(
            x[::every], y[::every], color="tab:purple", linewidth=1.6, marker="." * (len(x) == 1)
        )
        ax.set_ylim(bottom=0)
        ax.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    else:
        _legend(ax)


def _draw_speed(ax: Any, train: _Series, per_epoch: float) -> None:
    ax.set_title("clips per second", loc="left", fontsize=10, color="tab:blue")
    _plot_noisy(ax, train.points("clips_per_s", per_epoch), "tab:blue", "clips/s")
    waits = train.points("data_wait_pct", per_epoch)
    if not len(waits[0]):
        _legend(ax)
        return
    ax.set_ylim(bottom=0)
    right = ax.twinx()
    right.set_title("waiting for data, %", loc="right", fontsize=10, color="tab:orange")
    _plot_noisy(right, waits, "tab:orange", "waiting")
    right.set_ylim(0, 105)
