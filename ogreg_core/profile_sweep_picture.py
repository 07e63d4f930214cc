"""The picture of costs over a range of inputs: multiply-adds and latency, a line for each model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ogreg_core.errors import DataError
from ogreg_core.label_places import spread
from ogreg_core.models.option_words import model_words
from ogreg_core.profile_picture_parts import (
    COLOURS,
    CONVENTION,
    LINE_INCHES,
    TEXT_PT,
    entitle,
    is_ours,
    is_wide,
    machine_of,
    make_logarithmic,
    new_figure,
    settle,
    short,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["sweep_figure"]

_DASHES = ("-", "--", "-.", ":")
_MARKERS = "os^DvP<>"
# What is swept, in words.
_SWEPT = {
    "frames": "frames per clip",
    "size": "side of the picture in pixels",
    "batch": "clips per batch",
}


def sweep_figure(document: Mapping[str, Any]) -> Figure:
    """Draw a document of the schema ``ogreg.profile-sweep.v1``.

    Raises:
        DataError: none of its points has figures.
    """
    models = document["models"]
    drawn = [row for row in models if _good(row)]
    if not drawn:
        raise DataError(
            "the sweep holds no figure",
            why="; ".join(_failures(models)[:1]),
            fix="ogreg profile --sweep frames=8,16 --plot costs.png",
        )
    inches = max(2.6, 0.7 + LINE_INCHES * len(drawn))
    over = document["over"]
    varied = f"{_SWEPT[over]}: {', '.join(map(str, document['values']))}; {_kept(models)}"
    names = [model_words(row["model"], row.get("options", {})) for row in models]
    figure = new_figure(
        2 * inches,
        f"Cost against {over}" + (f": {names[0]}" if len(names) == 1 else ""),
        [f"{varied}; {machine_of(document)}", f"{CONVENTION}; latency: median, line to p90"],
        [f"× {text}" for text in _failures(models)],
    )
    top, bottom = figure.subplots(2, 1, sharex=True)
    for ax, key, title in (
        (top, "gmacs_per_view", "multiply-adds per view, G"),
        (bottom, "latency_ms_p50", "latency, ms"),
    ):
        _draw_lines(ax, drawn, key)
        entitle(ax, title)
        ax.grid(alpha=0.25)
    _draw_values(bottom, document)
    _mark_failures((top, bottom), models)
    ends = [_name_lines(ax, drawn) for ax in (top, bottom)]
    settle(figure)
    for ax, labels in zip((top, bottom), ends, strict=True):
        _spread_names(ax, labels)
    return figure


def _kept(models: Sequence[Mapping[str, Any]]) -> str:
    """What of the input is not swept."""
    inputs = {(row.get("frames"), row.get("size_px")) for row in models}
    frames, size = inputs.pop()
    words = [f"{frames} frames"] * bool(frames) + [f"{size}×{size} pixels"] * bool(size)
    return "all else as each model's input" if inputs or not words else ", ".join(words)


def _failures(models: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line for each reason: which models at which values it kept from having figures."""
    by_reason: dict[str, dict[str, list[str]]] = {}
    for row in models:
        for point in row["points"]:
            if "error" in point:
                at = by_reason.setdefault(point["error"], {}).setdefault(row["model"], [])
                at.append(str(point["value"]))
    return [
        f"{reason}: " + "; ".join(f"{model} at {', '.join(at)}" for model, at in cases.items())
        for reason, cases in by_reason.items()
    ]


def _good(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return sorted((p for p in row["points"] if "error" not in p), key=lambda p: p["value"])


def _style(place: int, model: str) -> dict[str, Any]:
    """Colour, dashes and marker of a line, of which at least one differs from all others'."""
    return {
        "color": COLOURS[place % len(COLOURS)],
        "linestyle": _DASHES[place // len(COLOURS) % len(_DASHES)],
        "marker": _MARKERS[place % len(_MARKERS)],
        "linewidth": 2.2 if is_ours(model) else 1.3,
    }


def _draw_lines(ax: Any, models: Sequence[Mapping[str, Any]], key: str) -> None:
    for place, row in enumerate(models):
        points = _good(row)
        x, y = [p["value"] for p in points], [p[key] for p in points]
        style = _style(place, row["model"])
        ax.plot(x, y, label=row["model"], markersize=4, **style)
        if key == "latency_ms_p50":
            slow = [p["latency_ms_p90"] for p in points]
            ax.vlines(x, y, slow, color=style["color"], linewidth=1)
    keys = [key, "latency_ms_p90"] if key == "latency_ms_p50" else [key]
    values = [p[k] for row in models for p in _good(row) for k in keys]
    if is_wide(values):
        ax.set_ylim(min(values) / 1.5, max(values) * 1.5)
        make_logarithmic(ax.yaxis)
    else:
        ax.set_ylim(0, 1.05 * max(values) or 1.0)


def _draw_values(ax: Any, document: Mapping[str, Any]) -> None:
    """The axis of what is swept, with all its values, also those that failed."""
    from matplotlib.ticker import FixedLocator, NullLocator

    values = sorted(document["values"])
    if values[-1] >= 4 * values[0]:
        ax.set_xscale("log", base=2)
        around = (values[-1] / values[0]) ** 0.05
        ax.set_xlim(values[0] / around, values[-1] * around)
    else:
        around = 0.05 * (values[-1] - values[0]) or 0.5
        ax.set_xlim(values[0] - around, values[-1] + around)
    ax.xaxis.set_major_locator(FixedLocator(values))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xticks(values, [str(value) for value in values])
    ax.set_xlabel(_SWEPT[document["over"]], fontsize=TEXT_PT)


def _mark_failures(axes: Sequence[Any], models: Sequence[Mapping[str, Any]]) -> None:
    """A cross at the lower edge wherever a model has no figures; the notes say which."""
    failed = sorted({p["value"] for row in models for p in row["points"] if "error" in p})
    for ax in axes if failed else ():
        ax.plot(
            failed,
            [0.0] * len(failed),
            "x",
            color="black",
            label="failed",
            transform=ax.get_xaxis_transform(),
            clip_on=False,
        )


def _name_lines(ax: Any, models: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Names at the right of the axes, each led to by its line's end."""
    labels = []
    lines = {line.get_label(): line for line in ax.lines}
    for place, row in enumerate(models):
        model = row["model"]
        x, y = lines[model].get_data()
        colour = _style(place, model)["color"]
        labels.append(
            ax.annotate(
                short(model),
                (x[-1], y[-1]),
                xytext=(1.03, 0.5),
                textcoords="axes fraction",
                va="center",
                fontsize=TEXT_PT,
                fontweight="bold" if is_ours(model) else "normal",
                color=colour,
                arrowprops={
                    "arrowstyle": "-",
                    "color": colour,
                    "linewidth": 0.7,
                    "linestyle": (0, (1, 2)),
                    "relpos": (0, 0.5),
                    "shrinkA": 0,
                    "shrinkB": 3,
                },
                annotation_clip=False,
                parse_math=False,
                gid="model",
            )
        )
    return labels


def _spread_names(ax: Any, labels: Sequence[Any]) -> None:
    """Move the names to the heights of their lines' ends, as far as they have room there."""
    ends = ax.transData.transform([label.xy for label in labels])
    heights = ax.transAxes.inverted().transform(ends)[:, 1]
    line = LINE_INCHES * ax.figure.dpi / ax.get_window_extent().height
    for label, height in zip(labels, spread(heights, line, line / 2, 1 - line / 2), strict=True):
        label.xyann = (1.03, height)
