"""The picture of a study: top-1 against multiply-adds, a dot for each row, its seeds as whiskers."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ogreg_core.errors import DataError
from ogreg_core.evidence.comparison import Cell
from ogreg_core.evidence.summary import DataFacts, Summary
from ogreg_core.files import write_atomic
from ogreg_core.label_places import place_labels
from ogreg_core.profile_picture import check_picture
from ogreg_core.profile_picture_parts import (
    CONVENTION,
    SMALL_PT,
    TEXT_PT,
    colour_of,
    entitle,
    is_ours,
    make_logarithmic,
    new_figure,
    settle,
    short,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_evidence", "evidence_figure"]

_PANEL_INCHES = 3.3
# More rows need more room for their names.
_INCHES_PER_ROW, _ROOMY_ROWS = 0.12, 8
_TICK_PT = 4.0
# An axis of less than this ratio of its ends has numbers at 1, 2, 3 ... instead of 1, 2, 5.
_NARROW = 5.0
# What names keep clear of, to either side of a whisker or a small dot.
_LINE_PIXELS = 2.0
# Between a name and its dot, beside what all labels keep: pixels to the right.
_GAP = np.array([4.0, 0.0])
_LONGEST_NAME = 26


def draw_evidence(summary: Summary, path: Path) -> None:
    """Draw what has been found so far into a file, atomically.

    Args:
        summary: of the study.
        path: where to; its ending says which format.

    Raises:
        UsageError: ``path`` is not .png, .pdf or .svg.
        DataError: no training has ended.
    """
    check_picture(path)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # Signs that the font lacks become boxes; no reason to talk to the user.
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure = evidence_figure(summary)
        figure.savefig(buffer, format=path.suffix[1:].lower())
    write_atomic(path, lambda temporary: temporary.write_bytes(buffer.getvalue()))


def evidence_figure(summary: Summary) -> Figure:
    """The picture as a figure of matplotlib: a panel for each data set with results.

    Raises:
        DataError: no training has ended.
    """
    panels = [(facts, cells) for facts in summary.data if (cells := _drawn(summary, facts))]
    if not panels:
        raise DataError(
            f"no training of {summary.name} has ended yet", why="there is nothing to draw"
        )
    most = max(len(cells) for _, cells in panels)
    inches = _PANEL_INCHES + _INCHES_PER_ROW * max(most - _ROOMY_ROWS, 0)
    figure = new_figure(
        inches * len(panels), summary.study.title, _facts(summary, panels), [*_notes(summary)]
    )
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    hollow = _hollow_rows(summary)
    for ax, (facts, cells) in zip(axes, panels, strict=True):
        _draw_panel(ax, facts, cells, hollow)
    renderer = settle(figure)
    for ax, (_, cells) in zip(axes, panels, strict=True):
        _label_dots(ax, cells, renderer)
    return figure


def _drawn(summary: Summary, facts: DataFacts) -> list[Cell]:
    """The cells of a data set that have a dot."""
    return [cell for cell in summary.cells if cell.dataset == facts.name and cell.gmacs]


def _facts(summary: Summary, panels: Sequence[tuple[DataFacts, Sequence[Cell]]]) -> list[str]:
    """What the signs mean."""
    seeds = len(summary.study.seeds)
    signs = f"dots: mean of {seeds} seeds; whiskers: from the lowest to the highest, a tick each"
    if seeds == 1:
        signs = "dots: one seed"
    if any("shuffled" in cell.controls for _, cells in panels for cell in cells):
        signs += "; small grey dots: shuffled frames"
    lines = [signs, CONVENTION]
    if _hollow_rows(summary):
        lines.insert(1, "filled: conv stem; hollow: another stem, which the table names")
    return lines


def _hollow_rows(summary: Summary) -> set[str]:
    """Rows that begin with another stem than the convolutional one, where notes tell of it."""
    rows = summary.study.rows
    sharing = {row.name for row in rows if "conv stem" in row.note.lower()}
    return {row.name for row in rows} - sharing if sharing else set()


def _notes(summary: Summary) -> Iterator[str]:
    """What is not in the picture, or not in full."""
    for facts in summary.data:
        cells = [cell for cell in summary.cells if cell.dataset == facts.name]
        without = [cell.row for cell in cells if cell.mean is None]
        if without:
            yield f"{facts.name}: no result yet of {', '.join(without)}"
        seeds = len(summary.study.seeds)
        partly = [f"{c.row} ({len(c.top1s)} of {seeds})" for c in cells if c.top1s and c.missing]
        if partly:
            yield f"{facts.name}: not all seeds yet of {', '.join(partly)}"


def _draw_panel(ax: Any, facts: DataFacts, cells: Sequence[Cell], hollow: set[str]) -> None:
    from matplotlib.ticker import LogLocator

    gmacs = [cell.gmacs for cell in cells if cell.gmacs]
    heights = [facts.chance, *(top1 for cell in cells for top1 in cell.top1s.values())]
    heights += [cell.controls["shuffled"] for cell in cells if "shuffled" in cell.controls]
    room = 0.08 * (max(heights) - min(heights)) or 5.0
    left, right = min(gmacs) / 1.35, max(gmacs) * 1.5
    ax.set_xlim(left, right)
    ax.set_ylim(max(min(heights) - room, 0.0), max(heights) + room)
    make_logarithmic(ax.xaxis)
    if right / left < _NARROW:
        ax.xaxis.set_major_locator(LogLocator(subs=range(1, 10)))
    ax.axhline(facts.chance, color="0.5", linewidth=0.8, linestyle="--", zorder=1, label="_chance")
    for cell in cells:
        _draw_row(ax, cell, cell.row in hollow)
    about = f"{facts.classes} classes, {facts.val_videos} test videos"
    entitle(ax, f"{facts.name}, {about}; dashed: chance, {facts.chance:.1f} %")
    ax.set_xlabel("multiply-adds per view, G", fontsize=TEXT_PT)
    ax.set_ylabel("top-1, %", fontsize=TEXT_PT)
    ax.grid(axis="y", color="0.92", linewidth=0.6)
    ax.set_axisbelow(True)


def _draw_row(ax: Any, cell: Cell, is_hollow: bool) -> None:
    """Small grey dot, whisker with ticks, and dot."""
    colour, ours = colour_of(cell.model), is_ours(cell.model)
    seeds = list(cell.top1s.values())
    right = [cell.gmacs] * len(seeds)
    if "shuffled" in cell.controls:
        shuffled = cell.controls["shuffled"]
        style: dict[str, Any] = {"marker": ".", "markersize": 4.5, "color": "0.6", "zorder": 2}
        ax.plot([cell.gmacs], [shuffled], linestyle="", label=f"_shuffled {cell.row}", **style)
    whisker = {"color": colour, "linewidth": 1.0, "alpha": 0.7, "zorder": 2.5}
    ticks = {"marker": "_", "markersize": _TICK_PT, "markeredgewidth": 1.0}
    ax.plot(right, seeds, label=f"_seeds {cell.row}", **whisker, **ticks)
    # A shape, too, where colours are not seen.
    dot: dict[str, Any] = {"marker": "D" if ours else "o", "markersize": 5.5 if ours else 6.0}
    dot |= {"markerfacecolor": "white" if is_hollow else colour, "zorder": 3.5 if ours else 3}
    edge = {"markeredgecolor": colour, "markeredgewidth": 1.3 if is_hollow else 0.5}
    if not is_hollow:
        edge["markeredgecolor"] = "white"
    ax.plot([cell.gmacs], [cell.mean], linestyle="", label=cell.row, color=colour, **dot, **edge)


def _label_dots(ax: Any, cells: Sequence[Cell], renderer: Any) -> None:
    """Each row's name beside its dot, with a leader where it had to go further."""
    styles = [
        {"fontsize": SMALL_PT, "fontweight": "bold" if is_ours(cell.model) else "normal"}
        for cell in cells
    ]
    names = [short(cell.row, _LONGEST_NAME) for cell in cells]
    sizes = []
    for name, style in zip(names, styles, strict=True):
        probe = ax.text(0, 0, name, parse_math=False, **style)
        sizes.append(probe.get_window_extent(renderer).size + 2 * _GAP)
        probe.remove()
    dots = ax.transData.transform([(cell.gmacs, cell.mean) for cell in cells])
    extents = np.array(sizes)
    frame = ax.get_window_extent(renderer).extents
    corners = place_labels(dots, extents, frame, _lines(ax, cells))
    nearest = np.clip(dots, corners, corners + extents)
    points = 72 / ax.figure.dpi
    for cell, name, style, dot, corner, end, size in zip(
        cells, names, styles, dots, corners, nearest, extents, strict=True
    ):
        line: dict[str, Any] = {"arrowstyle": "-", "color": colour_of(cell.model)}
        # Dotted, other than whiskers.
        line |= {"linewidth": 0.6, "linestyle": (0, (1, 1.5)), "shrinkA": 0, "shrinkB": 3}
        line["relpos"] = tuple((end - corner) / size)
        far = np.linalg.norm(end - dot) * points > TEXT_PT
        ax.annotate(
            name,
            (cell.gmacs, cell.mean),
            xytext=tuple((corner + _GAP - dot) * points),
            textcoords="offset points",
            va="bottom",
            color=colour_of(cell.model),
            arrowprops=line if far else None,
            parse_math=False,
            zorder=4,
            **style,
        )


def _lines(ax: Any, cells: Sequence[Cell]) -> np.ndarray:
    """Boxes of the whiskers, of the small dots and of the line of chance, in pixels, ``[M, 4]``."""
    spans = [(cell.gmacs, min(cell.top1s.values()), max(cell.top1s.values())) for cell in cells]
    shuffled = [(cell.gmacs, cell.controls.get("shuffled")) for cell in cells]
    spans += [(gmacs, top1, top1) for gmacs, top1 in shuffled if top1 is not None]
    low = ax.transData.transform([(x, y) for x, y, _ in spans]) - _LINE_PIXELS
    high = ax.transData.transform([(x, y) for x, _, y in spans]) + _LINE_PIXELS
    (chance,) = (line for line in ax.lines if line.get_label() == "_chance")
    (left, right), height = ax.get_xlim(), chance.get_ydata()[0]
    ends = ax.transData.transform([(left, height), (right, height)])
    boxes: np.ndarray = np.vstack([np.hstack([low, high]), ends.reshape(1, 4)])
    return boxes
