"""What a model looks at: maps out of a model, pictures out of maps."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ogreg_core.checkpoint import CheckpointInfo
from ogreg_core.data.loader import load_views, locate
from ogreg_core.data.sampling import positions
from ogreg_core.data.transforms import to_input
from ogreg_core.errors import UsageError
from ogreg_core.files import write_atomic
from ogreg_core.inference import Predictor, single_video
from ogreg_core.models.protocol import BlockMaps, VideoModel
from ogreg_core.models.registry import find_model
from ogreg_core.video import write_video

__all__ = [
    "GazeResult",
    "look",
    "meanings_of",
    "overlay",
    "save_overlay_video",
    "save_sheet",
    "select_blocks",
]

# matplotlib's "inferno" is perceptually uniform and stays readable in grey.
_COLOUR_MAP = "inferno"


@dataclass(frozen=True)
class GazeResult:
    """Maps of one clip, resampled to its pixels.

    Args:
        frames: the clip as the model saw it, uint8 ``[T, H, W, 3]``.
        indices: frame numbers in the file, ``[T]``.
        seconds: when they appear, ``[T]``.
        maps: those that the model has, mean over the chosen blocks, float32 ``[T, H, W]``: ``gaze``,
            not scaled, ``glance``, attention received relative to an even spread (1 = average), and
            ``kept``, the share of selections that a place gets through.
        profiles: per block name, curves over time, each ``[n]``.
        label, score: best class and its score.
        still: whether every gaze map is flat, as for a still clip.
    """

    frames: np.ndarray
    indices: list[int]
    seconds: list[float]
    maps: dict[str, np.ndarray]
    profiles: dict[str, dict[str, np.ndarray]]
    label: str
    score: float
    still: bool


# Below this mean dissimilarity the frames are the same up to rounding.
_STILL = 1e-5


def select_blocks(maps: dict[str, BlockMaps], chosen: Sequence[str]) -> dict[str, BlockMaps]:
    """The blocks whose names start with one of ``chosen`` (``stage2``, ``stage3.block1``); all if
    empty.

    Raises:
        UsageError: a name that fits no block.
    """
    for name in chosen:
        if not any(_belongs(block, name) for block in maps):
            raise UsageError(f"the model has no block {name!r}", why=f"blocks: {', '.join(maps)}")
    return {
        block: found
        for block, found in maps.items()
        if not chosen or any(_belongs(block, name) for name in chosen)
    }


def _belongs(block: str, name: str) -> bool:
    return block == name or block.startswith(f"{name}.")


def look(predictor: Predictor, path: str | Path, blocks: Sequence[str] = ()) -> GazeResult:
    """Run one centre clip of a video and collect its maps.

    Args:
        predictor: the checkpoint to look through.
        path: the video.
        blocks: which blocks' maps to average; all by default.

    Raises:
        VideoError: the file cannot be read.
        UsageError: the model has no such block.
    """
    _, manifest = single_video(path)
    views = predictor.info.views(clips=1, crops=1)
    clip = load_views(manifest, manifest.rows[0], views)
    row = manifest.rows[0]
    chosen = views.indices(positions(row, views.sampling))[0]
    located = locate(manifest, row, chosen, views.sampling)
    inputs = to_input(clip.to(predictor.device), predictor.info.mean, predictor.info.std)
    logits, maps = cast(VideoModel, predictor.model).forward_with_maps(inputs)
    shown = select_blocks(maps, blocks)
    scores = logits.float().softmax(dim=-1)[0].cpu()
    best = int(scores.argmax())
    frames, size = clip.shape[2], (clip.shape[3], clip.shape[4])
    pictures = {
        "gaze": [_gaze_per_frame(found, frames, size) for found in shown.values()],
        "glance": [_glance_per_frame(found, frames, size) for found in shown.values()],
        "kept": [
            None if found.kept is None else _resample(found.kept[0], frames, size)
            for found in shown.values()
        ],
    }
    means = {
        kind: torch.stack(existing).mean(0).numpy()
        for kind, found in pictures.items()
        if (existing := [picture for picture in found if picture is not None])
    }
    return GazeResult(
        frames=clip[0].permute(1, 2, 3, 0).numpy(),
        indices=[number for number, _ in located],
        seconds=[seconds for _, seconds in located],
        maps=means,
        profiles={
            name: {
                curve: values[0].float().cpu().numpy() for curve, values in found.profiles.items()
            }
            for name, found in shown.items()
        },
        label=predictor.info.labels[best],
        score=float(scores[best]),
        still="gaze" in means and float(means["gaze"].mean()) < _STILL,
    )


def meanings_of(info: CheckpointInfo, result: GazeResult) -> dict[str, str]:
    """What each map of a result shows, in words."""
    # Global temporal attention brings a glance to models that have none.
    words = {"glance": "attention received", "kept": "what token selection leaves"}
    words |= find_model(info.model).maps
    return {kind: words[kind] for kind in result.maps}


def _resample(maps: Tensor, frames: int, size: tuple[int, int]) -> Tensor:
    """``[T', h, w]`` token maps to ``[frames, H, W]``."""
    volume = maps[None, None].float().cpu()
    return F.interpolate(volume, size=(frames, *size), mode="trilinear")[0, 0]


def _gaze_per_frame(found: BlockMaps, frames: int, size: tuple[int, int]) -> Tensor | None:
    """The gaze of a clip as a map per input frame.

    Of a map between token frames a frame gets the mean of the intervals before and after it; the
    ends have one each.
    """
    if found.gaze is None:
        return None
    maps = found.gaze[0]
    if len(maps) == 0:
        return torch.zeros(frames, *size)
    if found.between:
        padded = torch.cat([maps[:1], maps, maps[-1:]])
        maps = (padded[:-1] + padded[1:]) / 2
    return _resample(maps, frames, size)


def _glance_per_frame(found: BlockMaps, frames: int, size: tuple[int, int]) -> Tensor | None:
    """Attention received as a map per input frame, scaled so that an even spread is 1."""
    if found.glance is None:
        return None
    received = found.glance[0]
    return _resample(received * received.numel(), frames, size)


def _scaled(maps: np.ndarray) -> np.ndarray:
    """To 0..1 over the whole clip; the top percent saturates; a flat map stays at 0."""
    low, high = float(np.min(maps)), float(np.percentile(maps, 99))
    if high - low < _STILL:
        # Less than a percent stands out at all, or nothing.
        high = float(np.max(maps))
    if high - low < _STILL:
        return np.zeros_like(maps)
    return np.clip((maps - low) / (high - low), 0.0, 1.0)


def overlay(frames: np.ndarray, maps: np.ndarray, strength: float = 0.6) -> np.ndarray:
    """Blend a colour-mapped map over frames; where the map is low the picture stays as it is.

    Args:
        frames: uint8 ``[T, H, W, 3]``.
        maps: ``[T, H, W]``, scaled over the clip.
        strength: opacity where the map is highest.

    Returns:
        uint8 ``[T, H, W, 3]``.
    """
    from matplotlib import colormaps

    scaled = _scaled(maps)
    colour = colormaps[_COLOUR_MAP](scaled)[..., :3] * 255
    opacity = (strength * scaled)[..., None]
    return (frames * (1 - opacity) + colour * opacity).round().astype(np.uint8)


def _enlarge(frames: np.ndarray, least: int = 224) -> np.ndarray:
    """Whole-number enlargement of small clips, so that a player shows more than a stamp."""
    factor = max(1, -(-least // frames.shape[1]))
    return frames.repeat(factor, axis=1).repeat(factor, axis=2)


def save_overlay_video(result: GazeResult, path: Path, fps: float = 8.0) -> None:
    """Frames and every map over them side by side as mp4."""
    panels = [result.frames, *(overlay(result.frames, maps) for maps in result.maps.values())]
    joined = np.concatenate([_enlarge(panel) for panel in panels], axis=2)
    write_video(path, joined, fps)


def save_sheet(result: GazeResult, path: Path, title: str, columns: int = 8) -> None:
    """One PNG: frames, every map over them, and the curves, d[t] and m[t] of OG-ReG."""
    from matplotlib.figure import Figure

    picked = (
        np.linspace(0, len(result.frames) - 1, min(columns, len(result.frames))).round().astype(int)
    )
    rows = [
        ("frames", result.frames),
        *((kind, overlay(result.frames, maps)) for kind, maps in result.maps.items()),
    ]
    curves = list(dict.fromkeys(name for found in result.profiles.values() for name in found))
    heights = [*[1.0] * len(rows), *[1.1] * len(curves)]
    # Wide enough for title and legend where there is a single frame.
    width = max(1.35 * len(picked) + 1.0, 5.0)
    figure = Figure(figsize=(width, 1.5 * sum(heights) + 0.4), layout="constrained", dpi=110)
    heading = f"{title}\n{result.label}  {100 * result.score:.1f} %"
    figure.suptitle(
        heading + ("  (still clip: the gaze map is flat)" if result.still else ""), fontsize=11
    )
    grid = figure.add_gridspec(len(heights), len(picked), height_ratios=heights)
    for r, (name, pictures) in enumerate(rows):
        for c, t in enumerate(picked):
            axes = figure.add_subplot(grid[r, c])
            axes.imshow(pictures[t])
            axes.set(xticks=[], yticks=[])
            if c == 0:
                axes.set_ylabel(name, fontsize=10)
            if r == 0:
                axes.set_title(f"{result.seconds[t]:.2f} s", fontsize=8)
    if curves:
        _plot_profiles(figure, grid, result, curves)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_atomic(path, lambda temporary: temporary.write_bytes(buffer.getvalue()))


_PROFILE_LABELS = {"d": "dissimilarity d[t]", "m": "modulation m[t]"}


def _plot_profiles(  # type: ignore[no-untyped-def]
    figure, grid, result: GazeResult, wanted: Sequence[str]
) -> None:
    from matplotlib import colormaps

    colours = colormaps["viridis"](np.linspace(0.0, 0.9, len(result.profiles)))
    ends = (result.seconds[0], result.seconds[-1])
    for row, curve in enumerate(wanted, start=1 + len(result.maps)):
        axes = figure.add_subplot(grid[row, :])
        for (name, curves), colour in zip(result.profiles.items(), colours, strict=True):
            values = curves.get(curve, np.empty(0))
            edges = np.linspace(*ends, len(values) + 1)
            axes.plot((edges[:-1] + edges[1:]) / 2, values, color=colour, label=name, marker=".")
        axes.set_ylabel(_PROFILE_LABELS.get(curve, curve), fontsize=9)
        axes.tick_params(labelsize=8)
        if ends[1] > ends[0]:
            axes.set_xlim(*ends)
        if axes.dataLim.ymin >= 0:  # Gates of Video-FocalNet have a sign.
            axes.set_ylim(bottom=0)
    axes.set_xlabel("seconds", fontsize=9)
    handles, names = axes.get_legend_handles_labels()
    # Below the curves, where it hides none of them.
    figure.legend(handles, names, fontsize=8, ncols=min(6, len(names)), loc="outside lower center")
