"""The picture of a timeline: scores of the leading classes over time, and the events as bars."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from ogreg_core.files import write_atomic
from ogreg_core.timeline.events import LOW_SHARE
from ogreg_core.timeline.run import Timeline

__all__ = ["colours_of", "leading_classes", "save_picture"]

_DPI = 110
_SIZE_INCHES = (11.0, 5.2)
# matplotlib's ten qualitative colours; more classes would not be told apart.
_COLOURS = 10
_LEGEND_LETTERS = 28
# A bar narrower than this share of the picture has no room for its label.
_LABEL_SHARE = 0.05


def leading_classes(found: Timeline, most: int = 8) -> list[int]:
    """Classes worth a curve: those of the events, longest first, then those with the highest scores."""
    lengths: dict[int, float] = {}
    for event in found.events:
        lengths[event.label] = lengths.get(event.label, 0.0) + event.end_s - event.start_s
    by_length = sorted(lengths, key=lambda label: -lengths[label])
    peaks = np.nanmax(found.curves, axis=0)
    by_peak = np.argsort(-peaks, kind="stable").tolist()
    return list(dict.fromkeys([*by_length, *by_peak]))[: min(most, len(found.labels))]


def colours_of(classes: list[int]) -> dict[int, tuple[float, float, float]]:
    """A colour for each class, red, green, blue in 0..1."""
    from matplotlib import colormaps

    palette = colormaps["tab10"].colors  # type: ignore[attr-defined]
    return {label: palette[place % _COLOURS] for place, label in enumerate(classes)}


def save_picture(found: Timeline, target: Path, title: str) -> None:
    """Draw a timeline.

    Args:
        found: the timeline.
        target: PNG to write, atomically.
        title: above the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
    FigureCanvasAgg(figure)
    # File and class names may hold the dollar signs of formulas.
    figure.suptitle(title, fontsize=11, parse_math=False)
    curves, bars = figure.subplots(2, 1, sharex=True, height_ratios=[3.2, 1.0])
    classes = leading_classes(found)
    colours = colours_of(list(dict.fromkeys([*classes, *(e.label for e in found.events)])))
    _draw_curves(curves, found, classes, colours)
    _draw_events(bars, found, colours)
    bars.set_xlim(0, found.source.row.duration)
    bars.set_xlabel("time, " + ("s" if found.source.row.duration < 120 else "min:s"))
    if found.source.row.duration >= 120:
        bars.xaxis.set_major_formatter(lambda x, _: f"{int(x) // 60}:{int(x) % 60:02}")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    write_atomic(target, lambda temporary: temporary.write_bytes(buffer.getvalue()))


def _draw_curves(
    ax: Any, found: Timeline, classes: list[int], colours: dict[int, tuple[float, float, float]]
) -> None:
    ax.set_title("smoothed score, %", loc="left", fontsize=10)
    for label in classes:
        # Constant within a cell, a step at each border; a gap where nothing was read.
        ax.stairs(
            100 * found.curves[:, label],
            found.borders,
            baseline=None,
            color=colours[label],
            linewidth=1.6,
            label=_short(found.labels[label]),
        )
    for share, style in ((1.0, "--"), (LOW_SHARE, ":")):
        ax.axhline(100 * share * found.rules.threshold, color="0.4", linewidth=0.9, linestyle=style)
    if found.trouble is not None:
        ax.axvspan(found.read_to_s, found.source.row.duration, color="0.85", label="not read")
    ax.set_ylim(-2, 102)
    ax.grid(alpha=0.25)
    legend = ax.legend(
        fontsize=8, framealpha=0.8, loc="upper left", bbox_to_anchor=(1.0, 1.02), borderaxespad=0.3
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def _draw_events(ax: Any, found: Timeline, colours: dict[int, tuple[float, float, float]]) -> None:
    count = len(found.events)
    ax.set_title(f"{count} event{'' if count == 1 else 's'}", loc="left", fontsize=10)
    for event in found.events:
        length = event.end_s - event.start_s
        ax.barh(
            0,
            length,
            left=event.start_s,
            height=0.8,
            color=colours[event.label],
            edgecolor="white",
            linewidth=0.8,
        )
        if length >= _LABEL_SHARE * found.source.row.duration:
            letters = max(int(110 * length / found.source.row.duration), 3)
            ax.text(
                event.start_s + length / 2,
                0,
                f"{_short(found.labels[event.label], letters)}\n{100 * event.score:.0f} %",
                ha="center",
                va="center",
                fontsize=8,
                color="white",
                parse_math=False,
                clip_on=True,
            )
    if not count:
        ax.text(0.5, 0.5, "no event", transform=ax.transAxes, ha="center", color="0.5")
    ax.set(yticks=[], ylim=(-0.5, 0.5))


def _short(label: str, most: int = _LEGEND_LETTERS) -> str:
    return label if len(label) <= most else label[: most - 1] + "…"
