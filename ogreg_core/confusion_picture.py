"""The picture of a confusion matrix: which class is taken for which."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ogreg_core.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["confusion_pixels", "most_confused", "save_confusion"]

_DPI = 100
_SIDE_PX = 840
# Cells are whole pixels, so that all look alike.
_SMALLEST_CELL_PX, _LARGEST_CELL_PX = 2, 90
_NUMBERED_CLASSES = 20
_NAMED_CLASSES = 60
_LONGEST_NAME = 30
_LISTED_PAIRS = 40
_LONGEST_LISTED_NAME = 48
_LINE_PX = 18
# Places beside the matrix of the colour bar and of the list.
_BAR_PX, _BAR_WIDTH_PX, _LIST_PX = 20, 15, 110
# Square roots of the shares are drawn: one video of fifty has to be seen.
_GAMMA = 0.5
_SHARES = (0.0, 0.01, 0.05, 0.2, 0.5, 1.0)


def save_confusion(
    path: Path, matrix: np.ndarray, labels: Sequence[str], title: str = "confusion matrix"
) -> None:
    """Write a PNG, atomically.

    Args:
        path: where to.
        matrix: videos of each true class (rows) by predicted class (columns), int ``[C, C]``.
        labels: class names by index.
        title: above the picture.
    """
    picture = _render(matrix, labels, title)
    write_atomic(path, lambda temporary: temporary.write_bytes(picture))


def confusion_pixels(
    matrix: np.ndarray, labels: Sequence[str], title: str = "confusion matrix"
) -> np.ndarray:
    """The same picture as uint8 ``[H, W, 3]``, for TensorBoard's ``add_image(..., dataformats="HWC")``."""
    from matplotlib.image import imread

    pixels = imread(io.BytesIO(_render(matrix, labels, title)), format="png")
    return (pixels[..., :3] * 255).round().astype(np.uint8)


def most_confused(matrix: np.ndarray, most: int = _LISTED_PAIRS) -> list[tuple[int, int, int]]:
    """Pairs (true class, predicted class, videos) off the diagonal, the most frequent first, of equal
    ones that with the larger share of its class.
    """
    wrong = np.array(matrix)
    np.fill_diagonal(wrong, 0)
    rows, columns = wrong.nonzero()
    videos = wrong[rows, columns]
    order = np.lexsort((columns, rows, matrix.sum(axis=1)[rows], -videos))[:most]
    return [(int(rows[i]), int(columns[i]), int(videos[i])) for i in order]


def _render(matrix: np.ndarray, labels: Sequence[str], title: str) -> bytes:
    figure = _draw(np.asarray(matrix), labels, title)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # Signs that the font lacks become boxes; no reason to talk to the user.
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure.savefig(buffer, format="png", bbox_inches="tight", pad_inches=0.15)
    return buffer.getvalue()


def _short(label: str, longest: int = _LONGEST_NAME) -> str:
    """A name without its middle, if need be; names of data sets often begin alike."""
    text = "".join(s if s.isprintable() else "\N{REPLACEMENT CHARACTER}" for s in label)
    half = longest // 2
    return text if len(text) <= longest else f"{text[: longest - half - 1]}…{text[-half:]}"


def _name(number: int, label: str, longest: int = _LONGEST_NAME) -> str:
    """A class's name, behind its number where the font lacks some of its characters."""
    text = _short(label, longest)
    return text if _characters().issuperset(map(ord, text)) else f"{number} {text}"


@cache
def _characters() -> frozenset[int]:
    """What the default font can draw, as Unicode code points."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    return frozenset(get_font(findfont(FontProperties())).get_charmap())


def _draw(matrix: np.ndarray, labels: Sequence[str], title: str) -> Figure:
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    classes = len(labels)
    side = classes * int(np.clip(_SIDE_PX // classes, _SMALLEST_CELL_PX, _LARGEST_CELL_PX))
    figure = Figure(figsize=(side / _DPI, side / _DPI), dpi=_DPI)
    FigureCanvasAgg(figure)
    # The matrix fills the figure; names, list and colour bar lie outside and widen the saved picture.
    axes = figure.add_axes((0, 0, 1, 1))
    totals = matrix.sum(axis=1, keepdims=True)
    shares = np.ma.masked_invalid(
        np.divide(matrix, totals, out=np.full(matrix.shape, np.nan), where=totals > 0)
    )
    # Classes without videos have no shares: grey.
    cmap = colormaps["magma"].with_extremes(bad="0.75")
    image = axes.imshow(shares, cmap=cmap, norm=PowerNorm(_GAMMA, 0, 1), interpolation="none")
    _name_axes(axes, labels)
    if classes <= _NUMBERED_CLASSES:
        _write_numbers(axes, matrix, shares)
    else:
        _list_pairs(axes, matrix, labels, side)
    legend = figure.add_axes((1 + _BAR_PX / side, 0, _BAR_WIDTH_PX / side, 1))
    bar = figure.colorbar(image, cax=legend, ticks=_SHARES)
    bar.ax.set_yticklabels([f"{share:.0%}" for share in _SHARES], fontsize=8)
    bar.set_label("share of the true class", fontsize=8)
    axes.set_title(title, loc="left", fontsize=11, parse_math=False)
    return figure


def _name_axes(axes: Any, labels: Sequence[str]) -> None:
    axes.set_xlabel("predicted class", fontsize=9)
    axes.set_ylabel("true class", fontsize=9)
    if len(labels) > _NAMED_CLASSES:
        axes.tick_params(labelsize=8)
        return
    size = 9 if len(labels) <= _NUMBERED_CLASSES else 7
    names = [_name(number, label) for number, label in enumerate(labels)]
    places = np.arange(len(names))
    # A dollar sign in a name would begin a formula.
    options = {"fontsize": size, "parse_math": False}
    axes.set_xticks(places, names, rotation=60, ha="right", rotation_mode="anchor", **options)
    axes.set_yticks(places, names, **options)


def _write_numbers(axes: Any, matrix: np.ndarray, shares: Any) -> None:
    largest = int(matrix.max())
    size = 10 if largest < 1000 else 7
    for row, column in zip(*matrix.nonzero(), strict=True):
        colour = "black" if shares[row, column] > 0.4 else "white"
        text = f"{matrix[row, column]}"
        axes.text(column, row, text, ha="center", va="center", fontsize=size, color=colour)


def _list_pairs(axes: Any, matrix: np.ndarray, labels: Sequence[str], side: int) -> None:
    """The most confused pairs beside the matrix, which is ``side`` pixels large."""
    totals = matrix.sum(axis=1)

    def name(number: int) -> str:
        if len(labels) <= _NAMED_CLASSES:
            return _name(number, labels[number], _LONGEST_LISTED_NAME)
        # Where the axes are not named their numbers lead to the place.
        return f"{number} {_short(labels[number], _LONGEST_LISTED_NAME)}"

    lines = [
        "most confused, by number of videos: share of the true class, videos, true > predicted class"
    ]
    lines += [
        f"{videos / totals[true]:>4.0%} {videos:>5}   {name(true)}  >  {name(predicted)}"
        for true, predicted, videos in most_confused(matrix)
    ]
    for number, line in enumerate(lines):
        axes.text(
            1 + _LIST_PX / side,
            1 - number * _LINE_PX / side,
            line,
            transform=axes.transAxes,
            va="top",
            fontsize=8,
            fontweight="bold" if number == 0 else "normal",
            parse_math=False,
        )
