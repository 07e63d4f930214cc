"""The picture of several models' costs: latency against multiply-adds, and ratios to the first."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ogreg_core.errors import DataError
from ogreg_core.label_places import place_labels
from ogreg_core.profile_picture_parts import (
    BAR_INCHES,
    CONVENTION,
    SMALL_PT,
    TEXT_PT,
    colour_of,
    digits,
    draw_bars,
    entitle,
    input_of,
    is_ours,
    is_wide,
    machine_of,
    make_logarithmic,
    name_bars,
    new_figure,
    settle,
    short,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["compare_figure"]

_MOST_SPEEDS = 9
# A linear axis begins at zero if the smallest value is below this share of the largest.
_NEAR_ZERO = 0.4


def compare_figure(document: Mapping[str, Any]) -> Figure:
    """Draw a document of the schema ``ogreg.profile-compare.v2``.

    Raises:
        DataError: it holds no model.
    """
    models = document["models"]
    if not models:
        raise DataError(
            "the comparison holds no model",
            why="; ".join(_missing(document)),
            fix="ogreg profile --compare ogreg-t,swin3d-t --plot costs.png",
        )
    below = 0.55 + BAR_INCHES * len(models)
    above = 4.0 + 0.07 * max(len(models) - 8, 0)
    same = len({input_of(row) for row in models}) == 1
    clip = f"input {input_of(models[0])} (frames × pixels)" if same else "inputs: see the bars"
    repeats = document["repeats"]
    timing = f"{repeats} pass" + ("es in turn" if repeats != 1 else " in turn")
    figure = new_figure(
        above + below,
        "Latency against multiply-adds" + (f": {models[0]['model']}" if len(models) == 1 else ""),
        [
            "; ".join([clip, machine_of(document), timing]),
            f"{CONVENTION}; grey lines: equal speed",
            f"bars: ratio to {short(models[0]['model'])}",
        ],
        _missing(document),
    )
    # Of their own layout each: the names of the bars do not narrow the axes of the dots.
    pages: Any = figure.subfigures(2, 1, height_ratios=[above, below])
    ax = pages[0].subplots()
    _draw_dots(ax, models)
    _draw_ratios(pages[1], models, same)
    renderer = settle(figure)
    _drop_covered(ax, renderer)
    _label_dots(ax, models, renderer)
    return figure


def _draw_dots(ax: Any, models: Sequence[Mapping[str, Any]]) -> None:
    x = [row["gmacs_per_view"] for row in models]
    y = [row["latency_ms_p50"] for row in models]
    slow = [row["latency_ms_p90"] for row in models]
    if is_wide(x) or is_wide([*y, *slow]):
        ax.set_xlim(min(x) / 1.7, max(x) * 2.0)
        ax.set_ylim(min(y) / 1.6, max(slow) * 1.6)
        make_logarithmic(ax.xaxis)
        make_logarithmic(ax.yaxis)
    else:
        ax.set_xlim(_limits(min(x), max(x)))
        ax.set_ylim(_limits(min(y), max(slow)))
    _draw_speeds(ax, np.array(x) / np.array(y) * 1000)
    for row, right, up, late in zip(models, x, y, slow, strict=True):
        colour = colour_of(row["model"])
        ax.plot(
            [right, right],
            [up, late],
            color=colour,
            linewidth=1,
            alpha=0.6,
            zorder=2,
            label="_to p90",
        )
        # A shape, too, where colours are not seen.
        style = {
            "marker": "D" if is_ours(row["model"]) else "o",
            "markersize": 6.0,
            "markeredgecolor": "white",
        }
        style |= {"markeredgewidth": 0.5, "zorder": 3.5 if is_ours(row["model"]) else 3}
        ax.plot([right], [up], linestyle="", color=colour, label=row["model"], **style)
    ax.set_xlabel("multiply-adds per view, G", fontsize=TEXT_PT)
    ax.set_ylabel("latency of one clip, ms (median; line to p90)", fontsize=TEXT_PT)
    ax.tick_params(labelsize=SMALL_PT)


def _limits(low: float, high: float) -> tuple[float, float]:
    """Ends of a linear axis with room for names around the dots; from zero if that is near."""
    room = 0.25 * (high - low) or 0.25 * high or 1.0
    return (0.0 if low < _NEAR_ZERO * high else max(low - room, 0.0)), high + room


def _draw_speeds(ax: Any, speeds: np.ndarray) -> None:
    """Lines of constant speed, in G multiply-adds per second, each named where it leaves the axes."""
    (left, right), (low, high) = ax.get_xlim(), ax.get_ylim()
    decades = 10.0 ** np.arange(-6, 9)
    near = [
        speed
        for speed in (decades[:, None] * np.array([1, 2, 5])).ravel()
        if speeds.min() / 3 <= speed <= speeds.max() * 3
    ]
    for speed in near if len(near) <= _MOST_SPEEDS else [s for s in near if s in decades]:
        latency = 1000 * np.array([left, right]) / speed
        ax.plot([left, right], latency, color="0.85", linewidth=0.9, zorder=1, label="_speed")
        place: dict[str, Any] = {"xy": (right, latency[1]), "xytext": (3, 0), "va": "center"}
        if latency[1] > high:
            place = {"xy": (high * speed / 1000, high), "xytext": (0, 2), "ha": "center"}
        if latency[1] > low and latency[0] < high:
            place |= {"textcoords": "offset points", "annotation_clip": False, "gid": "speed"}
            ax.annotate(f"{speed:g} GMAC/s", fontsize=SMALL_PT - 0.5, color="0.45", **place)


def _drop_covered(ax: Any, renderer: Any) -> None:
    """Of the names of speeds that lie on one another only the first stays."""
    kept: list[Any] = []
    for text in [text for text in ax.texts if text.get_gid() == "speed"]:
        box = text.get_window_extent(renderer)
        if any(box.overlaps(other) for other in kept):
            text.remove()
        else:
            kept.append(box.padded(3))


def _label_dots(ax: Any, models: Sequence[Mapping[str, Any]], renderer: Any) -> None:
    """Each model's name beside its dot, with a leader where it had to go further."""
    names = [row["model"] for row in models]
    styles = [
        {"fontsize": TEXT_PT, "fontweight": "bold" if is_ours(name) else "normal"} for name in names
    ]
    sizes = []
    for name, style in zip(names, styles, strict=True):
        probe = ax.text(0, 0, short(name), parse_math=False, **style)
        sizes.append(probe.get_window_extent(renderer).size)
        probe.remove()
    values = [(row["gmacs_per_view"], row["latency_ms_p50"]) for row in models]
    dots, extents = ax.transData.transform(values), np.array(sizes)
    slow = [(row["gmacs_per_view"], row["latency_ms_p90"]) for row in models]
    lines = np.hstack([dots, ax.transData.transform(slow)])
    corners = place_labels(dots, extents, ax.get_window_extent(renderer).extents, lines)
    nearest = np.clip(dots, corners, corners + extents)
    points = 72 / ax.figure.dpi
    for name, style, value, dot, corner, end, size in zip(
        names, styles, values, dots, corners, nearest, extents, strict=True
    ):
        line = {
            "arrowstyle": "-",
            "color": colour_of(name),
            "linewidth": 0.6,
            "shrinkA": 0,
            "shrinkB": 3,
        }
        # Dotted, other than the lines to p90.
        line["linestyle"] = (0, (1, 1.5))
        line["relpos"] = tuple((end - corner) / size)
        far = np.linalg.norm(end - dot) * points > TEXT_PT
        ax.annotate(
            short(name),
            value,
            xytext=tuple((corner - dot) * points),
            textcoords="offset points",
            va="bottom",
            color=colour_of(name),
            arrowprops=line if far else None,
            parse_math=False,
            gid="model",
            zorder=4,
            **style,
        )


def _draw_ratios(page: Any, models: Sequence[Mapping[str, Any]], same_input: bool) -> None:
    """Bars of each ratio to the first model, in the order of the latency."""
    rows = sorted(models, key=lambda row: row["latency_ratio"])
    latencies = [(row["latency_ratio"], f"{digits(row['latency_ms_p50'])} ms") for row in rows]
    columns = [("latency", latencies), *_other_columns(rows, models[0])]
    colours = [colour_of(row["model"]) for row in rows]
    axes = np.ravel(page.subplots(1, len(columns)))
    for column, (ax, (title, bars)) in enumerate(zip(axes, columns, strict=True)):
        ratios = [ratio for ratio, _ in bars]
        texts = [
            "no figure" if math.isnan(ratio) else f"{_times(ratio)}   {text}"
            for ratio, text in bars
        ]
        draw_bars(ax, ratios, texts, colours, base=1.0)
        entitle(ax, title)
        names = [row["model"] if same_input else f"{row['model']}  {input_of(row)}" for row in rows]
        strong = [i for i, row in enumerate(rows) if is_ours(row["model"])]
        name_bars(ax, names if column == 0 else [], strong)


def _other_columns(
    rows: Sequence[Mapping[str, Any]], first: Mapping[str, Any]
) -> list[tuple[str, list[tuple[float, str]]]]:
    """Bars of the training step and of the throughput, where they were measured; NaN where not."""
    columns = []
    if first.get("training_ms_p50"):
        times = [row.get("training_ms_p50") or math.nan for row in rows]
        bars = [(time / first["training_ms_p50"], f"{digits(time)} ms") for time in times]
        columns.append(("training step", bars))
    if any(row.get("best") for row in rows):
        none: Mapping[str, Any] = {"ratio": math.nan, "clips_per_s": math.nan, "batch": ""}
        best = [row.get("best") or none for row in rows]
        bars = [(b["ratio"], f"{digits(b['clips_per_s'])}/s at {b['batch']}") for b in best]
        columns.append(("throughput", bars))
    return columns


def _missing(document: Mapping[str, Any]) -> list[str]:
    """Which models could not be measured, or not be trained, and why."""
    lines = [f"{row['model']}: {row['error']}" for row in document.get("left_out", [])]
    return lines + [
        f"training step of {row['model']}: {row['training_error']}"
        for row in document["models"]
        if row.get("training_error")
    ]


def _times(ratio: float) -> str:
    return f"{ratio:.2f}×" if 0.1 <= ratio < 100 else f"{digits(ratio)}×"
