"""Maps over frames: colours, and the sheet with curves, frames and maps on one time axis."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ogreg_core.files import write_atomic
from ogreg_core.gaze.boxes import flat_frames, mass_boxes
from ogreg_core.gaze.look import GazeResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "COLOUR_MAP",
    "caption_of",
    "colour_range",
    "motion_words",
    "overlay",
    "range_words",
    "save_sheet",
]

# Perceptually uniform, and readable in grey.
COLOUR_MAP = "inferno"
_FLAT = 1e-5
BOX_SHARE = 0.7


def colour_range(maps: np.ndarray, least: float = 0.0) -> tuple[float, float]:
    """The values at both ends of the colours: the least, and the 99th percentile of the clip.

    Args:
        maps: ``[T, H, W]``.
        least: smallest distance of the two.
    """
    low, high = float(np.min(maps)), float(np.percentile(maps, 99))
    if high - low < _FLAT:
        # Less than a percent stands out at all, or nothing.
        high = float(np.max(maps))
    return low, max(high, low + least)


def overlay(
    frames: np.ndarray, maps: np.ndarray, strength: float = 0.6, least: float = 0.0
) -> np.ndarray:
    """Blend a colour-mapped map over frames; where the map is low the picture stays as it is.

    Args:
        frames: uint8 ``[T, H, W, 3]``.
        maps: ``[T, H, W]``, scaled over the clip, see :func:`colour_range`; a flat one changes nothing.
        strength: opacity where the map is highest.
        least: see :func:`colour_range`.

    Returns:
        uint8 ``[T, H, W, 3]``.
    """
    from matplotlib import colormaps

    low, high = colour_range(maps, least)
    if high - low < _FLAT:
        return frames
    scaled = np.clip((maps - low) / (high - low), 0.0, 1.0)
    colour = colormaps[COLOUR_MAP](scaled)[..., :3] * 255
    opacity = (strength * scaled)[..., None]
    return (frames * (1 - opacity) + colour * opacity).round().astype(np.uint8)


def motion_words(result: GazeResult) -> str:
    """How much of each map lies where pixels move, in a line."""
    score = result.motion
    if score is None:
        return "still clip: nothing moves, and the gaze map is flat"
    parts = [f"{kind} {_percent(share)}" for kind, share in score.maps.items() if share == share]
    baselines = f"centre bias {_percent(score.centre)}, uniform {_percent(score.uniform)}"
    return f"mass on moving pixels: {', '.join(parts)} (baselines: {baselines})"


def _percent(share: float) -> str:
    return f"{100 * share:.{0 if share >= 0.01 else 1}f} %"


def range_words(maps: np.ndarray, least: float) -> tuple[str, str]:
    """The ends of :func:`colour_range` for the eye."""
    low, high = colour_range(maps, least)
    return f"{low:.3g}" if abs(low) > high / 100 else "0", f"{high:.3g}"


def caption_of(result: GazeResult) -> str:
    """Model, label and score in a line."""
    return f"{result.model}: {result.label}  {100 * result.score:.1f} %"


# --- the sheet ---------------------------------------------------------------------------------

# Inches.
_THUMB = 1.3
_GAP = 0.06
_CURVE = 0.95
_LEFT, _RIGHT, _MARGIN = 1.15, 1.0, 0.12
_LINE = 0.2
_LEAST_WIDTH = 5.0
_DPI = 110
_TEXT = 9.5
# Mean width of a letter of that size.
_LETTER = 0.078
_CURVE_NAMES = {"d": "dissimi-\nlarity\nd[t]", "m": "opening\nm[t]"}


class _Sheet:
    """A page that is filled from its upper end; all rows share one axis of time, the positions of
    frames in the clip.
    """

    def __init__(self, frames: int, columns: int, rows: Sequence[float], lines: int) -> None:
        from matplotlib.figure import Figure

        self.frames = frames
        self.columns = min(columns, frames)
        self.strip = self.columns * _THUMB
        self.width = max(_LEFT + self.strip + _RIGHT, _LEAST_WIDTH)
        self.height = 2 * _MARGIN + lines * _LINE + sum(row + _GAP for row in rows) + 0.15
        self.figure: Figure = Figure(figsize=(self.width, self.height), dpi=_DPI)
        self.y = _MARGIN

    @property
    def picked(self) -> list[int]:
        """The frame in the middle of each column."""
        return [int((c + 0.5) * self.frames / self.columns) for c in range(self.columns)]

    def text(self, line: str, bold: bool = False) -> None:
        """A line over the whole width."""
        y = 1 - self.y / self.height
        weight = "bold" if bold else "normal"
        # Labels and file names may hold the dollar signs of formulas.
        self.figure.text(
            _MARGIN / self.width, y, line, va="top", fontsize=_TEXT, weight=weight, parse_math=False
        )
        self.y += _LINE

    def axes(self, height: float, left: float = _LEFT, width: float | None = None) -> Axes:
        """A row of its own; on the axis of time if ``width`` is left out. Does not move on."""
        place = (
            left / self.width,
            1 - (self.y + height) / self.height,
            (self.strip if width is None else width) / self.width,
            height / self.height,
        )
        found = self.figure.add_axes(place)
        if width is None:
            found.set_xlim(-0.5, self.frames - 0.5)
            found.set_xticks([])
        return found

    def pictures(self, name: str, pictures: np.ndarray) -> Axes:
        """A strip of frames, each in the middle of its share of time."""
        axes = self.axes(_THUMB)
        step = self.frames / self.columns
        for column, t in enumerate(self.picked):
            left = column * step - 0.5
            axes.imshow(
                pictures[t], extent=(left + 0.01 * step, left + 0.99 * step, 0, 1), aspect="auto"
            )
        axes.set(xlim=(-0.5, self.frames - 0.5), ylim=(0, 1), yticks=[])
        axes.set_ylabel(name, fontsize=8.5, rotation=0, ha="right", va="center")
        axes.spines[:].set_visible(False)
        self.y += _THUMB + _GAP
        return axes

    def save(self, path: Path) -> None:
        """Write a PNG, atomically."""
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="png")
        write_atomic(path, lambda temporary: temporary.write_bytes(buffer.getvalue()))


def save_sheet(result: GazeResult, path: Path, title: str, columns: int = 8) -> None:
    """One PNG: model, label, score and shares of mass on motion; the curves over time, d[t] and m[t] of
    OG-ReG, under them the frames, and every map over them with its colours.
    """
    curves = list(dict.fromkeys(name for found in result.profiles.values() for name in found))
    frames = len(result.frames)
    width = max(_LEFT + min(columns, frames) * _THUMB + _RIGHT, _LEAST_WIDTH)
    letters = int((width - 2 * _MARGIN) / _LETTER)
    heading = textwrap.wrap(f"{title}  |  {caption_of(result)}", letters)
    words = textwrap.wrap(motion_words(result), letters)
    strips = [_THUMB] * (1 + len(result.maps))
    sheet = _Sheet(frames, columns, [_CURVE] * len(curves) + strips, len(heading) + len(words))
    for line in heading:
        sheet.text(line, bold=True)
    for line in words:
        sheet.text(line)
    sheet.y += 0.05
    for number, curve in enumerate(curves):
        _draw_curve(sheet, result, curve, legend=number == 0)
    sheet.y += 0.1
    _draw_frames(sheet, result)
    for kind, maps in result.maps.items():
        _draw_map(sheet, result, kind, maps)
    sheet.save(path)


def _draw_curve(sheet: _Sheet, result: GazeResult, curve: str, *, legend: bool) -> None:
    """A line per block, and a thick one for the mean of each stage."""
    from matplotlib import colormaps

    stages: dict[str, list[str]] = {}
    for name, found in result.profiles.items():
        if curve in found:
            stages.setdefault(name.partition(".")[0], []).append(name)
    axes = sheet.axes(_CURVE)
    colours = colormaps["viridis"](np.linspace(0.0, 0.9, len(stages)))
    for (stage, names), colour in zip(stages.items(), colours, strict=True):
        x = result.positions[names[0]]
        lines = [result.profiles[name][curve] for name in names]
        if len(lines) > 1:
            for values in lines:
                axes.plot(x, values, color=colour, linewidth=0.7, alpha=0.45)
        axes.plot(x, np.mean(lines, axis=0), color=colour, linewidth=1.8, marker=".", label=stage)
    axes.set_ylabel(
        _CURVE_NAMES.get(curve, "\n".join(textwrap.wrap(curve, 10))),
        fontsize=8.5,
        rotation=0,
        ha="right",
        va="center",
    )
    axes.yaxis.set_label_coords(-0.5 / sheet.strip, 0.5)
    axes.locator_params(axis="y", nbins=3)
    axes.tick_params(labelsize=7)
    axes.margins(y=0.08)
    if axes.dataLim.ymin >= 0:  # Gates of Video-FocalNet have a sign.
        axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    if curve in _CURVE_NAMES:
        # Noise of a still clip stays flat.
        axes.set_ylim(top=max(axes.get_ylim()[1], result.least_range.get("gaze", 0.0)))
    if legend and stages:
        axes.legend(
            loc="upper left",
            bbox_to_anchor=(1.0, 1.05),
            fontsize=7.5,
            frameon=False,
            handlelength=1.2,
        )
    sheet.y += _CURVE + _GAP


def _draw_frames(sheet: _Sheet, result: GazeResult) -> None:
    axes = sheet.pictures("frames", result.frames)
    step = sheet.frames / sheet.columns
    for column, t in enumerate(sheet.picked):
        middle = (column + 0.5) * step - 0.5
        axes.text(middle, 1.02, f"{result.seconds[t]:.2f} s", ha="center", va="bottom", fontsize=8)
    _mark_query(axes, sheet, result)


def _draw_map(sheet: _Sheet, result: GazeResult, kind: str, maps: np.ndarray) -> None:
    least = result.least_range.get(kind, 0.0)
    top = sheet.y
    axes = sheet.pictures(_row_name(result, kind), overlay(result.frames, maps, least=least))
    if kind == "gaze":
        _draw_boxes(axes, sheet, maps, least)
    if kind == "glance":
        _mark_query(axes, sheet, result)
    below, sheet.y = sheet.y, top
    _draw_colours(sheet, range_words(maps, least), kind)
    sheet.y = below


_UNITS = {"glance": "x mean", "gradcam": "of max"}


def _draw_colours(sheet: _Sheet, ends: tuple[str, str], kind: str) -> None:
    bar = sheet.axes(_THUMB - 0.1, _LEFT + sheet.strip + 0.1, 0.11)
    bar.imshow(np.linspace(1, 0, 128)[:, None], cmap=COLOUR_MAP, aspect="auto", extent=(0, 1, 0, 1))
    bar.set_xticks([])
    bar.yaxis.tick_right()
    low, high = ends
    bar.set_yticks([0, 1], [low, f"{high}\n{_UNITS.get(kind, '')}".rstrip()])
    bar.tick_params(labelsize=7.5, length=2)
    bar.get_yticklabels()[1].set_verticalalignment("top")


def _row_name(result: GazeResult, kind: str) -> str:
    if kind == "gradcam":
        words = textwrap.wrap(result.cam_label.replace("_", "_ "), 16)[:4]
        return "\n".join(["Grad-CAM", *(line.replace("_ ", "_") for line in words)])
    stages = list(dict.fromkeys(name.partition(".")[0] for name in result.blocks[kind]))
    where = stages[0] if len(stages) == 1 else f"{stages[0]} to\n{stages[-1]}"
    mode = "" if kind != "glance" or result.glance == "received" else f"\n({result.glance})"
    return f"{kind}{mode}\n{where}"


def _draw_boxes(axes: Axes, sheet: _Sheet, maps: np.ndarray, least: float) -> None:
    """The smallest box with most of the mass of each frame that is shown and has values of at least
    ``least``.
    """
    from matplotlib.patches import Rectangle

    rows, columns = maps.shape[1:]
    step = sheet.frames / sheet.columns
    shown = maps[sheet.picked]
    empty = flat_frames(shown) | (shown.max(axis=(1, 2)) < least)
    pairs = zip(mass_boxes(shown, BOX_SHARE), empty, strict=True)
    for column, ((x0, y0, x1, y1), nothing) in enumerate(pairs):
        if not nothing:
            corner = (column * step - 0.5 + x0 / columns * step, 1 - y1 / rows)
            size = ((x1 - x0) / columns * step, (y1 - y0) / rows)
            axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor="white", linewidth=0.9))


def _mark_query(axes: Axes, sheet: _Sheet, result: GazeResult) -> None:
    """A cross where the query lies, in the column of its frame."""
    if result.query is None:
        return
    step = sheet.frames / sheet.columns
    column = min(int(result.query.frame / step), sheet.columns - 1)
    size = result.geometry.size
    x = column * step - 0.5 + result.query.x / size * step
    for colour, width in (("black", 3.0), ("cyan", 1.4)):
        axes.scatter(x, 1 - result.query.y / size, 90, colour, marker="+", linewidths=width)
