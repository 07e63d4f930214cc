"""Parts that the pictures of costs share: page, logarithmic axes, named bars, words.

Pages are eight inches wide with texts of eight points, so that they can be read at 800 pixels.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "BAR_INCHES",
    "COLOURS",
    "CONVENTION",
    "LINE_INCHES",
    "SMALL_PT",
    "TEXT_PT",
    "amount",
    "clean",
    "colour_of",
    "digits",
    "draw_bars",
    "entitle",
    "input_of",
    "is_ours",
    "is_wide",
    "machine_of",
    "make_logarithmic",
    "name_bars",
    "new_figure",
    "settle",
    "short",
]

# Okabe and Ito's colours, which the colour-blind tell apart; the yellow is too light for lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
CONVENTION = "one multiply-add counts once, as in the GFLOPs of papers"
TEXT_PT, SMALL_PT = 8.0, 7.5
BAR_INCHES = 0.21
LINE_INCHES = 0.16
_HEADING_PT, _HEADING_INCHES = 10.5, 0.2
_DPI = 150
_WIDTH_INCHES, _MARGIN_INCHES = 8.0, 0.1
_TEXT_COLUMNS, _HEADING_COLUMNS = 118, 76
_MOST_NOTES = 20
_LONGEST_NAME = 34
# Values whose largest is so many times the smallest need a logarithmic axis.
_WIDE_RANGE = 15
# Up to this ratio of its ends an axis has room for 1, 2, 5, 10; beyond for 1, 10.
_MOST_FINE_TICKS = 500
# Bars keep at least this share of the width beside their texts.
_LEAST_BARS_SHARE = 0.2
_BAR_TEXT = "text of a bar"


def is_ours(model: str) -> bool:
    """Whether a model is an OG-ReG, which pictures bring out."""
    return model.startswith("ogreg")


def colour_of(model: str) -> str:
    """Of dots and bars: one colour for OG-ReG, another for all others."""
    return COLOURS[1] if is_ours(model) else COLOURS[0]


def machine_of(document: Mapping[str, Any]) -> str:
    """Device, number format and threads in words."""
    threads = document["threads"]
    words = [document["device"], document["dtype"], f"{threads} thread" + "s" * (threads != 1)]
    return ", ".join(words + ["compiled"] * bool(document.get("compiled")))


def input_of(row: Mapping[str, Any]) -> str:
    """Frames and pixels of a clip."""
    return f"{row['frames']}×{row['size_px']}×{row['size_px']}"


def new_figure(
    inches: float, heading: str, facts: Sequence[str], notes: Sequence[str] = ()
) -> Figure:
    """An empty page that lays out its axes between its heading and its notes.

    Args:
        inches: height of the room for axes; the page is higher by its texts.
        heading: bold, at the top.
        facts: lines below it; long ones are broken.
        notes: lines at the bottom; of many, the first ones and their number.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    headings = textwrap.wrap(clean(heading), _HEADING_COLUMNS)
    lines = _wrapped(facts)
    more = len(notes) - _MOST_NOTES
    feet = _wrapped(notes if more <= 0 else [*notes[:_MOST_NOTES], f"… and {more} more"])
    head = 0.16 + _HEADING_INCHES * len(headings) + LINE_INCHES * len(lines)
    foot = 0.08 + LINE_INCHES * len(feet)
    height = head + inches + foot
    figure = Figure(figsize=(_WIDTH_INCHES, height), dpi=_DPI)
    FigureCanvasAgg(figure)
    figure.set_layout_engine("constrained", rect=(0, foot / height, 1, inches / height))
    large = {"fontsize": _HEADING_PT, "fontweight": "bold"}
    y = _write(figure, height - 0.08, headings, _HEADING_INCHES, large)
    _write(figure, y, lines, LINE_INCHES, {"fontsize": TEXT_PT})
    _write(figure, foot, feet, LINE_INCHES, {"fontsize": TEXT_PT, "color": "0.25"})
    return figure


def _wrapped(texts: Sequence[str]) -> list[str]:
    return [line for text in texts for line in textwrap.wrap(clean(text), _TEXT_COLUMNS)]


def _write(
    figure: Figure, y: float, lines: Sequence[str], step: float, style: Mapping[str, Any]
) -> float:
    """Lines from ``y`` inches downwards; returns where the next one would be."""
    height = figure.get_size_inches()[1]
    for line in lines:
        # Names may hold the dollar signs of formulas.
        figure.text(
            _MARGIN_INCHES / _WIDTH_INCHES, y / height, line, va="top", parse_math=False, **style
        )
        y -= step
    return y


def settle(figure: Figure) -> Any:
    """Lay out the axes once and for all, then shorten the bars by the room of their texts.

    Returns:
        The renderer, which measures texts in pixels.
    """
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    for ax in figure.axes:
        _make_room(ax, renderer)
    return renderer


def _make_room(ax: Any, renderer: Any) -> None:
    """Move the right end of the axis of bars so that their texts stand clear of them."""
    boxes = [t.get_window_extent(renderer) for t in ax.texts if t.get_gid() == _BAR_TEXT]
    if not boxes:
        return
    whole = ax.get_window_extent(renderer)
    clear = min(box.x0 for box in boxes) - 0.03 * ax.figure.dpi - whole.x0
    share = max(clear / whole.width, _LEAST_BARS_SHARE)
    low, high = ax.get_xlim()
    logarithmic = ax.get_xscale() == "log"
    ax.set_xlim(right=low * (high / low) ** (1 / share) if logarithmic else high / share)


def clean(text: str) -> str:
    """The text with a sign in place of each that cannot be printed."""
    return "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in text)


def short(name: str, longest: int = _LONGEST_NAME) -> str:
    """A name without its middle, if need be: names differ in how they begin and in how they end."""
    text, half = clean(name), longest // 2
    return text if len(text) <= longest else f"{text[: longest - half - 1]}…{text[-half:]}"


def digits(value: float) -> str:
    """Three significant digits without an exponent."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def amount(value: float) -> str:
    """Three significant digits and the prefix of a power of thousand, such as ``67.2 G``."""
    for power, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        # 999.6 thousand would be written as 1000 k.
        if abs(value) >= 0.9995 * power:
            return f"{digits(value / power)} {letter}"
    return digits(value)


def is_wide(values: Sequence[float]) -> bool:
    """Whether positive values differ so much that their axis must be logarithmic."""
    return min(values) > 0 and max(values) / min(values) > _WIDE_RANGE


def make_logarithmic(axis: Any) -> None:
    """A logarithmic axis with plain numbers, whose limits are set already."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    getattr(axis.axes, f"set_{axis.axis_name}scale")("log")
    low, high = axis.get_view_interval()
    steps = (1, 2, 5) if high / low < _MOST_FINE_TICKS else (1,)
    axis.set_major_locator(LogLocator(subs=steps, numticks=20))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def entitle(ax: Any, title: str) -> None:
    """A title at the left, and the size of the numbers on the axes."""
    ax.set_title(title, loc="left", fontsize=TEXT_PT + 0.5, parse_math=False)
    ax.tick_params(labelsize=SMALL_PT)


def draw_bars(
    ax: Any,
    values: Sequence[float],
    texts: Sequence[str],
    colours: Sequence[str],
    base: float = 0.0,
) -> None:
    """Horizontal bars from the top downwards, the text of each at the right edge.

    Args:
        ax: where to.
        values: where the bars end, not negative; NaN for none, ``[N]``.
        texts: ``[N]``.
        colours: ``[N]``.
        base: marked by a line; if it is positive and the range wide, the axis is logarithmic and the
            bars begin there, else at zero.
    """
    places = np.arange(len(values))
    known = [value for value in values if not math.isnan(value)]
    wide = base > 0 and is_wide([*known, base])
    begin = base if wide else 0.0
    ax.barh(places, [value - begin for value in values], left=begin, height=0.7, color=colours)
    ax.set_ylim(len(values) - 0.4, -0.6)
    low, high = min([*known, base]), max([*known, base])
    # The texts get their room in settle().
    if wide:
        ax.set_xlim(low / 1.15, high)
        make_logarithmic(ax.xaxis)
    else:
        ax.set_xlim(0, high or 1.0)
    if base:
        ax.axvline(base, color="black", linewidth=0.8)
    style = {"ha": "right", "va": "center", "fontsize": SMALL_PT, "gid": _BAR_TEXT}
    for place, text in zip(places, texts, strict=True):
        ax.text(0.99, place, text, transform=ax.get_yaxis_transform(), **style)
    ax.spines[["top", "right"]].set_visible(False)


def name_bars(ax: Any, names: Sequence[str], strong: Collection[int] = ()) -> None:
    """Names of bars at the left.

    Args:
        ax: of :func:`draw_bars`.
        names: ``[N]``; none for bars that are named elsewhere.
        strong: places of those in bold letters.
    """
    ax.set_yticks(np.arange(len(names)), [short(name) for name in names], parse_math=False)
    ax.tick_params(axis="y", length=0, labelsize=TEXT_PT)
    for place, label in enumerate(ax.get_yticklabels()):
        label.set_fontweight("bold" if place in strong else "normal")
