"""The picture of training samples and test views that ``ogreg data show`` makes."""

from __future__ import annotations

import io
import textwrap
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ogreg_core.data_show import DataSheet, TestVideo, TrainSample
from ogreg_core.files import write_atomic
from ogreg_core.recipe_tables import AugmentTable

__all__ = ["CAPTION_INCHES", "DPI", "save_sheet"]

# The picture, in inches: a column of captions, then the frames of a row.
DPI = 120
CAPTION_INCHES = 2.75
_MARGIN = 0.15
_GAP = 0.07
_GROUP_GAP = 0.22
_FRAMES_INCHES = 10.6
_WIDTH = CAPTION_INCHES + _FRAMES_INCHES + _MARGIN
_LINE = 0.155
_TEXT_PT = 8.0
_FRAME_PT = 7.0
# Agg draws no picture that is taller.
_TALLEST_PX = 2**16 - 1


class _Page:
    """A page that grows downwards; places are inches from the upper left corner."""

    def __init__(self) -> None:
        from matplotlib.figure import Figure

        self.y = _MARGIN
        self._figure = Figure()
        self._axes = self._figure.add_axes((0.0, 0.0, 1.0, 1.0))
        self._axes.set_axis_off()

    def text(
        self, x: float, y: float, text: str, room: float, size: float = _TEXT_PT, bold: bool = False
    ) -> None:
        """One line from ``x``, its upper edge at ``y``, shortened to ``room``."""
        weight = "bold" if bold else "normal"
        fitting = _fit(_clean(text), lambda t: _text_inches(t, size, weight) <= room)
        # Labels and file names may hold the dollar signs of formulas.
        self._axes.text(x, y, fitting, va="top", fontsize=size, fontweight=weight, parse_math=False)

    def heading(self, text: str, size: float = 10.0) -> None:
        """A bold line over the whole width."""
        self.text(_MARGIN, self.y, text, _WIDTH - 2 * _MARGIN, size, bold=True)
        self.y += size / 72 + 0.1

    def paragraph(self, text: str) -> None:
        """Text over the whole width, on as many lines as it needs."""
        for line in textwrap.wrap(text, 170):
            self.text(_MARGIN, self.y, line, _WIDTH - 2 * _MARGIN)
            self.y += _LINE

    def caption(self, lines: Sequence[tuple[str, bool]]) -> float:
        """Lines (text, bold) in the left column; returns their lower edge."""
        y = self.y
        for text, bold in lines:
            self.text(_MARGIN, y, text, CAPTION_INCHES - 2 * _MARGIN, bold=bold)
            y += _LINE
        return y

    def frames(
        self, x: float, side: float, clip: np.ndarray, times: Sequence[tuple[int, float]], most: int
    ) -> None:
        """Evenly chosen frames of a clip side by side, each under its number and time."""
        for column, t in enumerate(_chosen(len(clip), most)):
            left, top = x + column * (side + _GAP), self.y + _LINE
            number, seconds = times[t]
            self.text(left, self.y, f"#{number}  {seconds:.2f} s", side, _FRAME_PT)
            extent = (left, left + side, top + side, top)
            self._axes.imshow(clip[t], extent=extent, aspect="auto", interpolation="auto")

    def save(self, path: Path) -> None:
        """Write a PNG, atomically."""
        height = self.y + _MARGIN
        self._figure.set_size_inches(_WIDTH, height)
        self._axes.set_xlim(0, _WIDTH)
        self._axes.set_ylim(height, 0)
        buffer = io.BytesIO()
        self._figure.savefig(buffer, format="png", dpi=min(DPI, int(_TALLEST_PX / height)))
        write_atomic(path, lambda temporary: temporary.write_bytes(buffer.getvalue()))


def _chosen(total: int, most: int) -> list[int]:
    """At most ``most`` of the places 0 .. total - 1, evenly, with the first and the last."""
    return [int(t) for t in np.linspace(0, total - 1, min(total, most)).round()]


def _text_inches(text: str, size: float, weight: str) -> float:
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    properties = FontProperties(size=size, weight=weight)
    width: float = text_to_path.get_text_width_height_descent(text, properties, ismath=False)[0]
    return width / 72


def _clean(text: str) -> str:
    return "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in text)


def _fit(text: str, fits: Callable[[str], bool]) -> str:
    """The text with its middle left out as far as it must be; the end of a path tells most."""
    kept, short = len(text), text
    while kept > 1 and not fits(short):
        kept -= 1
        short = f"{text[: kept // 2]}…{text[len(text) - (kept - kept // 2) :]}"
    return short


def save_sheet(sheet: DataSheet, path: Path, columns: int = 8) -> None:
    """Draw everything into one PNG.

    Args:
        sheet: what to draw.
        path: where to.
        columns: most frames of a training clip side by side.
    """
    with warnings.catch_warnings():
        # A script that the font lacks shows as boxes; the labels are in the JSON document.
        warnings.filterwarnings("ignore", message="Glyph")
        page = _Page()
        _draw_title(page, sheet)
        if sheet.samples:
            split = sheet.splits.train.split
            page.heading(
                f"Training samples as the model gets them: {split}, epoch {sheet.epoch + 1}"
            )
            if any(sample.partner for sample in sheet.samples):
                page.paragraph("Frame numbers and times are those of the first of two mixed files.")
                page.y += 0.08
            side = (_FRAMES_INCHES - (columns - 1) * _GAP) / columns
            for sample in sheet.samples:
                _draw_sample(page, sample, side, columns)
        if sheet.videos:
            clips, crops = sheet.videos[0].pictures.shape[:2]
            protocol = f"{_count(clips, 'clip')} x {_count(crops, 'crop')} per video"
            short_side = sheet.recipe.recipe.data.short_side
            page.heading(
                f"Test views: {sheet.splits.val.split}, {protocol}, short side {short_side} px"
            )
            for video in sheet.videos:
                _draw_video(page, video, columns)
        page.save(path)


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" + ("s" if number > 1 else "")


def _draw_title(page: _Page, sheet: DataSheet) -> None:
    recipe, data = sheet.recipe.recipe, sheet.recipe.recipe.data
    page.heading(f"{sheet.recipe.name}: data of {sheet.splits.train.dataset}", size=12)
    sampling = f"{data.frames} frames, {data.sampling}"
    if data.sampling == "dense":
        sampling += f", stride {data.stride}" + (f" at {data.fps:g} fps" if data.fps else "")
    page.paragraph(
        f"seed {recipe.seed}; {sampling}; crop {data.size} x {data.size} px; "
        f"batch {recipe.train.batch_size}; model {recipe.model.name}"
    )
    page.paragraph(f"augment: {_settings(recipe.augment)}")
    page.y += 0.1


def _settings(table: AugmentTable) -> str:
    """What differs from the defaults, and what matters always."""
    usual = AugmentTable().model_dump()
    return "  ".join(
        f"{key}={_value(value)}"
        for key, value in table.model_dump().items()
        if value != usual[key] or key in ("crop", "scale", "flip")
    )


def _value(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(_value, value))}]"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _draw_sample(page: _Page, sample: TrainSample, side: float, columns: int) -> None:
    size = sample.pictures.shape[1]
    partner = sample.partner
    lines = [(sample.label if partner is None else f"{sample.share:.2f} {sample.label}", True)]
    if partner is not None:
        lines.append((f"+ {1 - sample.share:.2f} {partner.label}", True))
    lines.append((f"row {sample.index}: {sample.path}", False))
    if partner is not None:
        lines.append((f"+ row {partner.index}: {partner.path}", False))
    lines.append((f"{sample.fps:.4g} fps, crop {size} x {size} px", False))
    if sample.repeats > 1:
        lines.append((f"view {sample.view + 1} of {sample.repeats}", False))
    if sample.box:
        lines.append((f"erased {sample.box[3]} x {sample.box[2]} px", False))
    if sample.stands_for:
        lines.append((f"in place of unreadable {sample.stands_for[0].path}", False))
    if sample.batch is None:
        lines.append(("left over, not trained on in this epoch", False))
    lines.append((f"decode {sample.decode_ms:.1f} ms, augment {sample.augment_ms:.1f} ms", False))
    bottom = page.caption(lines)
    times = list(zip(sample.frames, sample.seconds, strict=True))
    page.frames(CAPTION_INCHES, side, sample.pictures, times, columns)
    page.y = max(page.y + _LINE + side, bottom) + 0.12


def _draw_video(page: _Page, video: TestVideo, columns: int) -> None:
    clips, crops, frames, size = video.pictures.shape[:4]
    most = columns if crops == 1 else max(2, (columns + 1) // crops)
    group = (_FRAMES_INCHES - (crops - 1) * _GROUP_GAP) / crops
    side = (group - (most - 1) * _GAP) / most
    bottom = page.caption(
        [
            (video.label, True),
            (f"row {video.index}: {video.path}", False),
            (f"{video.fps:.4g} fps, {frames} frames, crop {size} x {size} px", False),
            (f"load {video.load_ms:.1f} ms for {_count(clips * crops, 'view')}", False),
        ]
    )
    for clip in range(clips):
        lefts = [CAPTION_INCHES + crop * (group + _GROUP_GAP) for crop in range(crops)]
        for crop, x in enumerate(lefts):
            name = f"clip {clip + 1} of {clips}, crop {crop + 1} of {crops} ({video.crops[crop]})"
            page.text(x, page.y, name, group, _FRAME_PT, bold=True)
        page.y += _LINE
        times = list(zip(video.frames[clip], video.seconds[clip], strict=True))
        for crop, x in enumerate(lefts):
            page.frames(x, side, video.pictures[clip, crop], times, most)
        page.y += _LINE + side + 0.1
    page.y = max(page.y, bottom) + 0.08
