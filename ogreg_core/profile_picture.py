"""Pictures of what models cost, drawn from the documents of ``ogreg profile --json``."""

from __future__ import annotations

import io
import shlex
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ogreg_core.errors import DataError, UsageError
from ogreg_core.files import write_atomic
from ogreg_core.models.option_words import model_words
from ogreg_core.profile_compare_picture import compare_figure
from ogreg_core.profile_picture_parts import (
    BAR_INCHES,
    COLOURS,
    CONVENTION,
    SMALL_PT,
    TEXT_PT,
    amount,
    digits,
    draw_bars,
    entitle,
    input_of,
    machine_of,
    name_bars,
    new_figure,
    settle,
)
from ogreg_core.profile_sweep_picture import sweep_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["check_picture", "costs_figure", "draw_costs"]

_ENDINGS, _STEM = (".png", ".pdf", ".svg"), "costs"
_COSTS = ("gmacs", "params", "activations_m")
_MOST_PARTS = 16
_MOST_OPERATORS = 10
# So many batch sizes have room for their numbers.
_MOST_NUMBERS = 10
# A part with a larger share is drawn as its own parts, where they are known.
_DOMINANT_SHARE = 0.7
# What a module does itself, beside its parts, is drawn above this share of the total.
_OWN_SHARE = 0.005


def check_picture(path: Path) -> None:
    """Refuse a file whose ending names no format of a picture, before any work; imports nothing.

    Raises:
        UsageError: it is not .png, .pdf or .svg.
    """
    if path.suffix.lower() not in _ENDINGS:
        raise UsageError(
            f"{path} has no known ending of a picture",
            why=f"known: {', '.join(_ENDINGS)}",
            fix=f"--plot {shlex.quote(str(path.parent / f'{path.stem or _STEM}.png'))}",
        )


def draw_costs(document: Mapping[str, Any], path: Path) -> None:
    """Draw a document of ``ogreg profile`` into a file, atomically.

    Args:
        document: of the schema ``ogreg.profile.v2``, ``ogreg.profile-compare.v2`` or
            ``ogreg.profile-sweep.v1``.
        path: where to; its ending says which format.

    Raises:
        UsageError: ``path`` is not .png, .pdf or .svg.
        DataError: the document is of another schema, or there is nothing to draw in it.
    """
    check_picture(path)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # Signs that the font lacks become boxes; no reason to talk to the user.
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure = costs_figure(document)
        figure.savefig(buffer, format=path.suffix[1:].lower())
    write_atomic(path, lambda temporary: temporary.write_bytes(buffer.getvalue()))


def costs_figure(document: Mapping[str, Any]) -> Figure:
    """The picture as a figure of matplotlib.

    Args:
        document: see :func:`draw_costs`.

    Raises:
        DataError: see :func:`draw_costs`.
    """
    drawers = {
        "ogreg.profile.v2": _profile_figure,
        "ogreg.profile-compare.v2": compare_figure,
        "ogreg.profile-sweep.v1": sweep_figure,
    }
    schema = document.get("schema")
    if schema not in drawers:
        raise DataError(
            f"a document of the schema {schema!r} has no picture",
            why=f"known: {', '.join(drawers)}",
            fix="ogreg profile --plot costs.png",
        )
    return drawers[schema](document)


def _profile_figure(document: Mapping[str, Any]) -> Figure:
    parts = _parts(document["modules"])
    passes = document["throughput"] if _timed(document["throughput"]) > 0 else []
    passes = passes if len(passes) > 1 else []
    operators = sorted(document["operators"], key=lambda row: -row["share_pct"])[:_MOST_OPERATORS]
    inches = [0.45 + BAR_INCHES * len(parts)]
    if passes or operators:
        inches.append(max(2.1, 0.45 + BAR_INCHES * len(operators)))
    heading = model_words(document["model"], document["options"])
    figure = new_figure(sum(inches), heading, _profile_facts(document), _profile_notes(document))
    # Of their own layout each: names of modules do not make room beside other panels.
    pages: Any = figure.subfigures(len(inches), 1, height_ratios=inches, squeeze=False)[:, 0]
    _draw_parts(pages[0], parts, document)
    panels = [(_draw_throughput, passes), (_draw_operators, operators)]
    panels = [(draw, rows) for draw, rows in panels if rows]
    if panels:
        axes = np.ravel(pages[1].subplots(1, len(panels)))
        for ax, (draw, rows) in zip(axes, panels, strict=True):
            draw(ax, rows)
    settle(figure)
    return figure


def _timed(passes: Sequence[Mapping[str, Any]]) -> int:
    return sum("error" not in row for row in passes)


def _profile_notes(document: Mapping[str, Any]) -> list[str]:
    """What could not be measured, and why."""
    failed = [row for row in document["throughput"] if "error" in row]
    notes = [f"× batch {row['batch']}: {row['error']}" for row in failed]
    if document.get("training_error"):
        notes.append(f"training step: {document['training_error']}")
    return notes


def _profile_facts(document: Mapping[str, Any]) -> list[str]:
    costs = (
        f"{amount(document['params'])} parameters; per view "
        f"{amount(1e9 * document['gmacs_per_view'])} multiply-adds "
        f"({amount(1e9 * document['attention_gmacs'])} of them fused attention) and "
        f"{amount(1e6 * document['activations_m'])} activations"
    )
    passes = document["throughput"]
    # More of them are a curve.
    times = [
        f"{digits(row['clips_per_s'])} clips/s at batch {row['batch']}"
        for row in passes[: 1 if len(passes) == 1 else 0]
        if "error" not in row
    ]
    if latency := document.get("latency"):
        times.insert(0, f"latency {digits(latency['ms_p50'])} ms")
    if document["training"]:
        times.append(f"training step {digits(document['training']['ms_p50'])} ms")
    return [
        "; ".join([f"input {input_of(document)} (frames × pixels)", machine_of(document), *times]),
        costs,
        CONVENTION,
    ]


def _parts(modules: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Modules of depth 1, the most expensive first; one that has nearly all gives way to its parts."""
    parts = [dict(row) for row in modules if row["depth"] == 1]
    total = sum(row["gmacs"] for row in parts)
    while largest := [row for row in parts if row["gmacs"] > _DOMINANT_SHARE * total > 0]:
        inner = _inner(largest[0], modules, total)
        if not inner:
            break
        parts.remove(largest[0])
        parts += inner
    parts = [row for row in parts if any(row[key] for key in _COSTS)]
    parts.sort(key=lambda row: -row["gmacs"])
    if len(parts) > _MOST_PARTS:
        rest = parts[_MOST_PARTS - 1 :]
        sums = {key: sum(row[key] for row in rest) for key in _COSTS}
        parts = [*parts[: _MOST_PARTS - 1], {"name": f"{len(rest)} others", **sums}]
    return parts


def _inner(
    row: Mapping[str, Any], modules: Sequence[Mapping[str, Any]], total: float
) -> list[dict[str, Any]]:
    """The parts of a module, and what it does beside them; none where they are not known."""
    found = [
        dict(other)
        for other in modules
        if other["depth"] == row["depth"] + 1 and other["name"].startswith(f"{row['name']}.")
    ]
    own = {key: row[key] - sum(other[key] for other in found) for key in _COSTS}
    if found and (own["gmacs"] > _OWN_SHARE * total or own["params"] > 0):
        # It has no parts of its own, at any depth.
        found.append({"name": f"{row['name']}.(own)", "depth": row["depth"] + 1, **own})
    return found


def _draw_parts(page: Any, parts: Sequence[Mapping[str, Any]], document: Mapping[str, Any]) -> None:
    """Three columns of bars, each of shares of the model's total."""
    totals = (
        ("multiply-adds", 1e9, document["gmacs_per_view"]),
        ("parameters", 1.0, document["params"]),
        ("activations", 1e6, document["activations_m"]),
    )
    axes = page.subplots(1, len(totals))
    for column, ((title, unit, total), key) in enumerate(zip(totals, _COSTS, strict=True)):
        shares = [100 * row[key] / (total or 1.0) for row in parts]
        texts = [
            f"{share:.1f} %   {amount(unit * row[key])}"
            for share, row in zip(shares, parts, strict=True)
        ]
        draw_bars(axes[column], shares, texts, [COLOURS[column]] * len(parts))
        entitle(axes[column], f"{title}, {amount(unit * total)}")
        name_bars(axes[column], [row["name"] for row in parts] if column == 0 else [])
        _hide_scale(axes[column])


def _hide_scale(ax: Any) -> None:
    """The numbers stand beside the bars."""
    ax.set_xticks([])
    ax.spines["bottom"].set_visible(False)


def _draw_throughput(ax: Any, passes: Sequence[Mapping[str, Any]]) -> None:
    places = np.arange(len(passes))
    rates = np.array([row.get("clips_per_s", np.nan) for row in passes], dtype=float)
    ax.plot(places, rates, color=COLOURS[0], marker="o", markersize=4, label="throughput")
    failed = places[np.isnan(rates)]
    if len(failed):
        ax.plot(failed, np.zeros(len(failed)), "x", color="black", label="failed", clip_on=False)
    every = -(-len(passes) // _MOST_NUMBERS)
    above = {"xytext": (0, 5), "textcoords": "offset points", "ha": "center"}
    for place in places[::every][~np.isnan(rates[::every])]:
        ax.annotate(digits(rates[place]), (place, rates[place]), fontsize=SMALL_PT, **above)
    ax.set_xlim(-0.5, len(passes) - 0.5)
    ax.set_ylim(0, 1.2 * np.nanmax(rates))
    ax.set_xticks(places[::every], [str(row["batch"]) for row in passes[::every]])
    ax.set_xlabel("clips per batch", fontsize=TEXT_PT)
    ax.grid(axis="y", alpha=0.25)
    entitle(ax, "throughput, clips/s")


def _draw_operators(ax: Any, operators: Sequence[Mapping[str, Any]]) -> None:
    texts = [
        f"{row['share_pct']:.1f} %  {digits(row['ms'])} ms, {row['calls']}×" for row in operators
    ]
    draw_bars(ax, [row["share_pct"] for row in operators], texts, ["0.45"] * len(operators))
    name_bars(ax, [row["name"] for row in operators])
    entitle(ax, "operators by share of time: ms and calls")
    _hide_scale(ax)
