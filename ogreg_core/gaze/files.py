"""Maps as files: a video, a small animation, and numbers with their places and times."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ogreg_core.files import write_atomic
from ogreg_core.gaze.boxes import boxes_in_video, flat_frames, mass_boxes
from ogreg_core.gaze.look import GazeResult
from ogreg_core.gaze.pictures import (
    BOX_SHARE,
    COLOUR_MAP,
    caption_of,
    motion_words,
    overlay,
    range_words,
)
from ogreg_core.video import write_video

__all__ = ["save_gif", "save_maps", "save_overlay_video"]

_LEAST_SIDE = 240
_BACKGROUND, _INK = (16, 16, 16), (235, 235, 235)
_TEXT_PX = 14
_BAR_PX = 8
_GIF_BYTES = 3_000_000
_GIF_SCALES = (1.0, 0.75, 0.6, 0.45, 0.3, 0.2)
_FPS = 8.0


# --- pictures in time --------------------------------------------------------------------------


class _Panels:
    """Frames and every map over them side by side, with model, label, score, names, colours and time.

    Args:
        result: what to show.
    """

    def __init__(self, result: GazeResult) -> None:
        from matplotlib import colormaps, font_manager

        self.result = result
        frames = result.frames
        side = frames.shape[1]
        # Whole numbers, so that a player shows the model's pixels.
        self.factor = max(1, -(-_LEAST_SIDE // side))
        self.side = side * self.factor
        self.panels = [
            overlay(frames, maps, least=result.least_range.get(kind, 0.0))
            for kind, maps in result.maps.items()
        ]
        self.font = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), _TEXT_PX)
        self.line = _TEXT_PX + 6
        # Columns of the colours' bar.
        shades = colormaps[COLOUR_MAP](np.linspace(0, 1, self.side // 3))[None, :, :3]
        self.bar = Image.fromarray((shades.repeat(_BAR_PX, axis=0) * 255).astype(np.uint8))
        self.page = self._page()

    def _page(self) -> Image.Image:
        """What does not change over time."""
        count = 1 + len(self.panels)
        page = Image.new("RGB", (count * self.side, self.side + 4 * self.line), _BACKGROUND)
        draw = ImageDraw.Draw(page)
        for row, text in enumerate((caption_of(self.result), motion_words(self.result))):
            self._write(draw, 6, row * self.line, text, page.width - 12)
        for column, (kind, maps) in enumerate(self.result.maps.items(), 1):
            left = column * self.side
            name = f"Grad-CAM {self.result.cam_label}" if kind == "gradcam" else kind
            self._write(draw, left + 6, 2 * self.line, name, self.side - 12)
            low, high = range_words(maps, self.result.least_range.get(kind, 0.0))
            below = 3 * self.line + self.side
            self._write(draw, left + 6, below, low, self.side)
            start = left + 12 + int(draw.textlength(low, self.font))
            page.paste(self.bar, (start, below + self.line // 2 - _BAR_PX // 2))
            self._write(draw, start + self.bar.width + 6, below, high, self.side)
        self._write(draw, 6, 2 * self.line, "frames", self.side - 12)
        return page

    def _write(self, draw: ImageDraw.ImageDraw, x: int, y: int, text: str, room: int) -> None:
        """A line of text, its end cut off where there is no room."""
        short = text
        while len(short) > 1 and draw.textlength(short, self.font) > room:
            short = short.removesuffix("…")[:-1] + "…"
        draw.text((x, y + 2), short, fill=_INK, font=self.font)

    def __iter__(self) -> Iterator[np.ndarray]:
        for t, seconds in enumerate(self.result.seconds):
            page = self.page.copy()
            row = np.concatenate([panel[t] for panel in (self.result.frames, *self.panels)], axis=1)
            large = row.repeat(self.factor, axis=0).repeat(self.factor, axis=1)
            page.paste(Image.fromarray(large), (0, 3 * self.line))
            words = f"frame {self.result.indices[t]}, {seconds:.2f} s"
            self._write(ImageDraw.Draw(page), 6, 3 * self.line + self.side, words, self.side - 12)
            yield np.asarray(page)


def save_overlay_video(result: GazeResult, path: Path, fps: float = _FPS) -> None:
    """Frames and every map over them side by side as mp4."""
    write_video(path, _Panels(result), fps)


def save_gif(result: GazeResult, path: Path, fps: float = _FPS) -> None:
    """The same as an animation that repeats, scaled down until it has at most three megabytes."""
    pages = [Image.fromarray(page) for page in _Panels(result)]
    for scale in _GIF_SCALES:
        size = (round(pages[0].width * scale), round(pages[0].height * scale))
        small = [
            page.resize(size, Image.Resampling.LANCZOS).quantize(128, dither=Image.Dither.NONE)
            for page in pages
        ]
        buffer = io.BytesIO()
        small[0].save(
            buffer,
            format="GIF",
            save_all=True,
            append_images=small[1:],
            duration=round(1000 / fps),
            loop=0,
        )
        if buffer.tell() <= _GIF_BYTES:
            break
    write_atomic(path, lambda temporary: temporary.write_bytes(buffer.getvalue()))


# --- numbers -----------------------------------------------------------------------------------


def save_maps(result: GazeResult, path: Path) -> None:
    """Maps, places, times, scores and curves as arrays, in NumPy's npz or in safetensors by the suffix.

    * ``maps/KIND``: float32 ``[T, h, w]``; cell (i, j) covers ``x_edges[j]`` to ``x_edges[j + 1]`` and
      ``y_edges[i]`` to ``y_edges[i + 1]`` in pixels of the upright original video, continuous (pixel n
      covers n to n + 1);
    * ``frame_indices``, ``seconds``: ``[T]``, of the file;
    * ``boxes/KIND``: ``[T, 4]``, x0, y0, x1, y1 of the smallest box with 70 % of a frame's mass, in the
      same pixels; ``flat/KIND``: ``[T]``, where a map has no place and the box is everything;
    * ``scores``: ``[classes]``; ``curves/BLOCK/NAME``, ``[n]``, at the frame positions of
      ``positions/BLOCK`` in the clip;
    * ``description``, in safetensors its metadata: JSON with model, label, class names, blocks of each
      map, shares on moving pixels, crop and size of the video.

    Args:
        result: what to keep.
        path: ending in ``.npz`` or ``.safetensors``.
    """
    arrays, words = _arrays(result), json.dumps(_description(result), ensure_ascii=False)
    if path.suffix == ".safetensors":
        from safetensors.numpy import save

        content = save(arrays, metadata={"ogreg_gaze": words})
    else:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, description=np.array(words), **arrays)  # type: ignore[arg-type]
        content = buffer.getvalue()
    write_atomic(path, lambda temporary: temporary.write_bytes(content))


def _arrays(result: GazeResult) -> dict[str, np.ndarray]:
    x_edges, y_edges = result.geometry.edges(result.frames.shape[1])
    arrays = {
        "frame_indices": np.array(result.indices, dtype=np.int64),
        "seconds": np.array(result.seconds, dtype=np.float64),
        "x_edges": np.array(x_edges),
        "y_edges": np.array(y_edges),
        "scores": result.scores,
    }
    for kind, maps in result.maps.items():
        arrays[f"maps/{kind}"] = np.ascontiguousarray(maps, dtype=np.float32)
        boxes = mass_boxes(maps, BOX_SHARE)
        arrays[f"boxes/{kind}"] = boxes_in_video(boxes, maps.shape[1:], result.geometry)
        arrays[f"flat/{kind}"] = flat_frames(maps)
    for block, curves in result.profiles.items():
        if curves:
            arrays[f"positions/{block}"] = result.positions[block]
        arrays |= {f"curves/{block}/{name}": values for name, values in curves.items()}
    return arrays


def _without_nan(shares: dict[str, Any]) -> dict[str, Any]:
    """JSON knows no not-a-number: the share of a map without mass is null."""
    maps = {kind: None if math.isnan(share) else share for kind, share in shares["maps"].items()}
    return shares | {"maps": maps}


def _description(result: GazeResult) -> dict[str, Any]:
    motion = result.motion
    return {
        "schema": "ogreg.gaze.maps.v1",
        "model": result.model,
        "label": result.label,
        "score": result.score,
        "labels": result.labels,
        "gradcam_label": result.cam_label,
        "glance": result.glance,
        "blocks": result.blocks,
        "motion": _without_nan(asdict(motion)) if motion else None,
        "geometry": asdict(result.geometry),
        "box_share": BOX_SHARE,
    }
