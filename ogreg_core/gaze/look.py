"""What a model looks at: the maps of one clip of a video, resampled to its pixels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from ogreg_core.checkpoint import CheckpointInfo
from ogreg_core.data.loader import locate
from ogreg_core.data.manifest import Row
from ogreg_core.data.sampling import positions
from ogreg_core.data.transforms import to_input
from ogreg_core.errors import UsageError
from ogreg_core.gaze.geometry import ClipGeometry, reduction_of
from ogreg_core.gaze.glance import GlanceMode, Place, glance_of
from ogreg_core.gaze.gradcam import grad_cam, last_selection, spread_kept
from ogreg_core.gaze.maps import Canvas, select_blocks, shown_blocks, with_openings
from ogreg_core.gaze.motion import MotionScore, moving_pixels, score_maps
from ogreg_core.inference import Predictor, read_views
from ogreg_core.models.frame_times import given_times
from ogreg_core.models.protocol import VideoModel
from ogreg_core.models.registry import find_model, nearest

__all__ = ["GazeResult", "Query", "localising_map", "look", "meanings_of"]

# Instead of 0 where something is divided by the largest value of a map.
_SMALLEST = 1e-12
# A dissimilarity that opens the freshly initialised MDConv by a third; compression alone makes less.
_FAINT = 0.05
# A glance that differs by less from place to place is as good as even.
_UNEVEN = 0.1


@dataclass(frozen=True)
class Query:
    """A place to ask from: pixels of the upright video, and a frame of the file; by default the clip's
    middle one.
    """

    x: float
    y: float
    frame: int | None = None


@dataclass(frozen=True)
class GazeResult:
    """Maps of one clip, resampled to its pixels.

    Args:
        frames: the clip as the model saw it, uint8 ``[T, H, W, 3]``.
        indices: frame numbers in the file, ``[T]``.
        seconds: when they appear, ``[T]``.
        maps: those that the model has, float32 ``[T, H, W]``: ``gaze``, not scaled; ``opening``, the
            modulation m of OG-ReG; ``glance``, relative to an even spread (1 = average); ``kept``, the
            share of selections that a place gets through; ``gradcam``, its largest value 1.
        blocks: by kind, of which blocks a map is the mean.
        profiles: per block name, curves over time, each ``[n]``.
        positions: per block name, where in the clip the points of its curves lie: frames from 0, ``[n]``.
        label, score: best class and its score, as ``predict`` gives them for this view.
        labels, scores: of all classes, ``[classes]``.
        model: name in the registry.
        geometry: where the clip lies in the video.
        motion: share of each map on moving pixels; None where nothing moves.
        glance: what the glance shows.
        query: the place in the clip that was asked from.
        cam_label: class of the Grad-CAM.
        least_range: by kind, how far the ends of the colours have to lie apart at least, so that
            noise is not stretched to all colours.
    """

    frames: np.ndarray
    indices: list[int]
    seconds: list[float]
    maps: dict[str, np.ndarray]
    blocks: dict[str, list[str]]
    profiles: dict[str, dict[str, np.ndarray]]
    positions: dict[str, np.ndarray]
    label: str
    score: float
    labels: list[str]
    scores: np.ndarray
    model: str
    geometry: ClipGeometry
    motion: MotionScore | None
    glance: GlanceMode = "received"
    query: Place | None = None
    cam_label: str = ""
    least_range: dict[str, float] = field(default_factory=dict)

    @property
    def still(self) -> bool:
        """Whether no pixel changes by more than noise, so that there is nothing to gaze at."""
        return self.motion is None


def look(
    predictor: Predictor,
    path: str | Path,
    blocks: Sequence[str] = (),
    *,
    opening: bool = False,
    glance: GlanceMode = "received",
    query: Query | None = None,
    gradcam: bool = False,
    label: str | None = None,
) -> GazeResult:
    """Run one centre clip of a video and collect its maps.

    Args:
        predictor: the checkpoint to look through.
        path: the video.
        blocks: which blocks' maps to average; by default all, of OG-ReG's gaze those of stage 1.
        opening: also show the modulation m of OG-ReG.
        glance: attention that tokens receive, rolled out over the blocks, or of the ``query``.
        query: for ``query``, and optional for ``rollout``.
        gradcam: also compute Grad-CAM.
        label: its class; by default the predicted one.

    Raises:
        VideoError: the file cannot be read.
        UsageError: the model has no such block, class or glance, or its clip does not show the query.
    """
    info = predictor.info
    target = _class_index(label, info.labels)
    views = info.views(clips=1, crops=1)
    read = read_views(path, views)
    clip, row = read.views, read.manifest.rows[0]
    chosen = views.indices(positions(row, views.sampling))[0]
    located = locate(read.manifest, row, chosen, views.sampling)
    geometry = ClipGeometry.of(row, views.crops)
    place = _place(query, geometry, [number for number, _ in located], row)
    scores = predictor.score(clip[None], read.times[None])[0]
    best = int(scores.argmax())
    inputs = to_input(clip.to(predictor.device), info.mean, info.std)
    with given_times(predictor.model, read.times):
        found = _Maps(predictor, inputs, blocks)
        found.add_own(opening=opening, glance=glance == "received")
        if glance != "received":
            found.add_glance(glance, place)
        if gradcam:
            found.add_grad_cam(best if target is None else target)
    frames = clip[0].permute(1, 2, 3, 0).numpy()
    return GazeResult(
        frames=frames,
        indices=[number for number, _ in located],
        seconds=[seconds for _, seconds in located],
        maps=found.maps,
        blocks=found.of,
        profiles=found.profiles(),
        positions=found.positions(),
        label=info.labels[best],
        score=float(scores[best]),
        labels=info.labels,
        scores=scores.numpy(),
        model=info.model,
        geometry=geometry,
        motion=score_maps(found.maps, moving_pixels(frames)),
        glance=glance,
        query=place,
        cam_label=info.labels[best if target is None else target] if gradcam else "",
        least_range=found.least_range(),
    )


class _Maps:
    """Collects the maps of one clip by kind.

    Args:
        predictor: whose model.
        inputs: normalised clip ``[1, 3, T, H, W]``.
        chosen: names of blocks.
    """

    def __init__(self, predictor: Predictor, inputs: Tensor, chosen: Sequence[str]) -> None:
        self.model = cast(VideoModel, predictor.model)
        self.inputs = inputs
        self.reduction = reduction_of(predictor.info.model, predictor.info.options)
        frames, height, width = inputs.shape[2:]
        self.canvas = Canvas((frames, height, width), self.reduction)
        self.chosen = chosen
        self.maps: dict[str, np.ndarray] = {}
        self.of: dict[str, list[str]] = {}
        self.found, self.openings = with_openings(self.model, inputs)
        self.shown = select_blocks(self.found, chosen)

    def add_own(self, *, opening: bool, glance: bool) -> None:
        """What the blocks show by themselves."""
        for kind in ("gaze", "glance", "kept"):
            blocks = shown_blocks(self.found, kind, self.chosen)
            if blocks and (kind != "glance" or glance):
                self._keep(kind, self.canvas.of_blocks(kind, blocks), blocks)
            if kind == "gaze" and opening and any(name in self.openings for name in blocks):
                drawn = [self.canvas.draw(self.openings[name], between=True) for name in blocks]
                mean = torch.stack(drawn).mean(dim=0).clamp_min(0)
                self._keep("opening", mean.numpy(), blocks)

    def add_glance(self, mode: GlanceMode, place: Place | None) -> None:
        """Attention rolled out over the blocks, or of a query."""
        blocks = shown_blocks(self.found, "glance", self.chosen)
        picture = glance_of(
            cast(nn.Module, self.model), self.inputs, mode, list(blocks), self.reduction, place
        )
        self._keep("glance", picture.cpu().numpy(), blocks)

    def add_grad_cam(self, target: int) -> None:
        """Grad-CAM of a class, its largest value 1."""
        tokens = grad_cam(self.model, self.inputs, target).cpu()
        kept = last_selection(self.found)
        if kept is not None:
            tokens = spread_kept(tokens, kept.cpu())
        picture = self.canvas.draw(tokens).numpy()
        self._keep("gradcam", picture / max(float(picture.max()), _SMALLEST), ())

    def _keep(self, kind: str, picture: np.ndarray, blocks: Iterable[str]) -> None:
        self.maps[kind] = picture
        self.of[kind] = list(blocks)

    def least_range(self) -> dict[str, float]:
        """See :class:`GazeResult`; other maps have units of their own."""
        compared = [name for name in self.of.get("gaze", ()) if self.found[name].between]
        differences = dict.fromkeys(("gaze", "opening"), _FAINT) if compared else {}
        return {"glance": _UNEVEN, **differences}

    def profiles(self) -> dict[str, dict[str, np.ndarray]]:
        """The curves of the chosen blocks."""
        return {
            name: {
                curve: values[0].float().cpu().numpy() for curve, values in found.profiles.items()
            }
            for name, found in self.shown.items()
        }

    def positions(self) -> dict[str, np.ndarray]:
        """Where the points of the curves of the chosen blocks lie."""
        return {
            name: self.canvas.curve_positions(values.shape[1], between=found.between)
            for name, found in self.shown.items()
            for values in list(found.profiles.values())[:1]
        }


def _class_index(label: str | None, labels: Sequence[str]) -> int | None:
    if label is None:
        return None
    if label not in labels:
        raise UsageError(
            f"the checkpoint knows no class {label!r}",
            why=nearest(label, labels)
            or f"{len(labels)} classes, among them {', '.join(labels[:5])}",
        )
    return labels.index(label)


def _place(
    query: Query | None, geometry: ClipGeometry, indices: Sequence[int], row: Row
) -> Place | None:
    """A query in the clip: the frame of the clip nearest to the one that was named.

    Raises:
        UsageError: the clip does not show it, or the file has no such frame.
    """
    if query is None:
        return None
    if query.frame is not None and not 0 <= query.frame < row.frames:
        raise UsageError(
            f"the query is in frame {query.frame}", why=f"the file has frames 0 to {row.frames - 1}"
        )
    x, y = geometry.to_clip(query.x, query.y)
    if not (0 <= x < geometry.size and 0 <= y < geometry.size):
        right, bottom = geometry.left + geometry.width, geometry.top + geometry.height
        raise UsageError(
            f"the query {query.x:g},{query.y:g} lies outside of what the model sees",
            why=f"it sees x from {geometry.left:g} to {right:g} and y from {geometry.top:g} to "
            f"{bottom:g} of {row.width}x{row.height} pixels, its centre crop",
        )
    middle = (len(indices) - 1) // 2
    if query.frame is None:
        return Place(x, y, middle + 0.5)
    wanted = query.frame
    return Place(x, y, min(range(len(indices)), key=lambda t: abs(indices[t] - wanted)) + 0.5)


def localising_map(
    predictor: Predictor, clip: Tensor, times: Tensor | None = None
) -> tuple[str, np.ndarray]:
    """The map of a clip that says best where something happens: gaze, else glance, else what token
    selection keeps.

    Args:
        predictor: the checkpoint to look through.
        clip: uint8 ``[1, 3, T, H, W]``, as ``load_timed_views`` gives it.
        times: of its frames, ``[1, T]``, likewise; None if unknown.

    Returns:
        The kind, and float32 ``[T, H, W]``; see :class:`GazeResult`.
    """
    info = predictor.info
    with given_times(predictor.model, times):
        found = _Maps(predictor, to_input(clip.to(predictor.device), info.mean, info.std), ())
        found.add_own(opening=False, glance=True)
    return next(
        (kind, found.maps[kind]) for kind in ("gaze", "glance", "kept") if kind in found.maps
    )


_GLANCES = {
    "rollout": "attention rolled out over the blocks",
    "query": "where the marked token looks",
}


def meanings_of(info: CheckpointInfo, result: GazeResult) -> dict[str, str]:
    """What each map of a result shows, in words."""
    # Global temporal attention brings a glance to models that have none.
    words = {"glance": "attention received", "kept": "what token selection leaves"}
    words |= find_model(info.model).maps
    words["opening"] = "opening m towards neighbouring frames"
    words["gradcam"] = f"Grad-CAM of {result.cam_label}"
    if result.glance != "received":
        words["glance"] = _GLANCES[result.glance]
        if result.glance == "rollout" and result.query:
            words["glance"] += ", from the marked token"
    return {kind: words[kind] for kind in result.maps}
