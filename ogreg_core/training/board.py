"""TensorBoard: curves, samples and confusion of a run."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["Board", "clip_grid"]

_MOST_CLIPS = 4
_MOST_FRAMES = 8
# A line of text above the frames of a clip, in pixels.
_CAPTION_PX = 18
_CAPTION_FONT_PX = 11
_CHARACTER_PX = 7
_GAP_PX = 2
_DPI = 100


class Board:
    """Writes TensorBoard events; a context manager.

    TensorBoard is imported, and the event file made, when the first thing is written.

    Args:
        folder: where the event files lie.
        purge_step: forget what earlier event files say from this step on, for a run that was resumed
            and writes it again; None keeps everything.
    """

    def __init__(self, folder: Path, purge_step: int | None) -> None:
        self._folder = folder
        self._purge_step = purge_step

    def __enter__(self) -> Board:
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self.close()

    @cached_property
    def _writer(self) -> SummaryWriter:
        with warnings.catch_warnings():
            # Of its own dependencies, at import.
            warnings.simplefilter("ignore", DeprecationWarning)
            from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self._folder), purge_step=self._purge_step)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One point of each curve.

        Args:
            step: optimiser steps so far.
            values: by name; a slash groups curves, as in ``train/loss``.
        """
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def clips(self, step: int, clips: Tensor, names: Sequence[str]) -> None:
        """The first clips of a batch as one picture.

        Args:
            step: optimiser steps so far.
            clips: as the model gets them before normalisation, uint8 ``[B, 3, T, H, W]``.
            names: one for each clip, such as its class or file.
        """
        self._writer.add_image("train/clips", clip_grid(clips, names), step, dataformats="HWC")

    def confusion(self, step: int, matrix: Tensor, labels: Sequence[str]) -> None:
        """A confusion matrix as a picture.

        Args:
            step: optimiser steps so far.
            matrix: videos of each true class (rows) by predicted class (columns), int ``[K, K]``.
            labels: class names by index.
        """
        from ogreg_core.confusion_picture import confusion_pixels

        pixels = confusion_pixels(np.asarray(matrix), labels)
        self._writer.add_image("val/confusion", pixels, step, dataformats="HWC")

    def flush(self) -> None:
        """Send to disk what has been written so far."""
        if "_writer" in self.__dict__:
            self._writer.flush()

    def close(self) -> None:
        """Flush and close the event file; writing again begins another one."""
        if "_writer" in self.__dict__:
            self._writer.close()
            del self.__dict__["_writer"]


def clip_grid(clips: Tensor, names: Sequence[str]) -> np.ndarray:
    """Up to four clips, a row of up to eight frames each, evenly spread in time, under its name.

    Args:
        clips: uint8 ``[B, 3, T, H, W]``.
        names: one for each clip.

    Returns:
        The picture, uint8 ``[H, W, 3]``; frames keep their pixels.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = clips[:_MOST_CLIPS].cpu().permute(0, 2, 3, 4, 1).numpy()
    times = np.linspace(0, shown.shape[1] - 1, min(shown.shape[1], _MOST_FRAMES)).round()
    shown = shown[:, times.astype(int)]
    rows, columns, height, width = shown.shape[:4]
    size = (
        rows * (height + _CAPTION_PX + _GAP_PX),
        max(columns * (width + _GAP_PX) - _GAP_PX, 20 * _CHARACTER_PX),
    )
    figure = Figure(figsize=(size[1] / _DPI, size[0] / _DPI), dpi=_DPI, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    for row, name in enumerate(names[:rows]):
        top = row * (height + _CAPTION_PX + _GAP_PX)
        figure.text(
            2 / size[1],
            1 - (top + _CAPTION_PX / 2) / size[0],
            _shorten(name, size[1] // _CHARACTER_PX - 1),
            va="center",
            fontsize=_CAPTION_FONT_PX * 72 / _DPI,
            # A dollar sign in a name would begin a formula.
            parse_math=False,
        )
    with warnings.catch_warnings():
        # Signs that the font lacks become boxes; no reason to talk to the user.
        warnings.filterwarnings("ignore", "Glyph .* missing")
        canvas.draw()
    picture = np.array(canvas.buffer_rgba())[..., :3]
    for row in range(rows):
        top = row * (height + _CAPTION_PX + _GAP_PX) + _CAPTION_PX
        for column in range(columns):
            left = column * (width + _GAP_PX)
            picture[top : top + height, left : left + width] = shown[row, column]
    return picture


def _shorten(name: str, longest: int) -> str:
    """A name without its beginning, if need be: the end of a path tells most."""
    text = "".join(s if s.isprintable() else "\N{REPLACEMENT CHARACTER}" for s in name)
    return text if len(text) <= longest else f"…{text[-(longest - 1) :]}"
