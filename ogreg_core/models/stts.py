"""STTS: spatial-temporal token selection, as a wrapper over a backbone.

Paper: Wang, Yang, Li, Liu, Wu, Jiang, "Efficient Video Transformers with Spatial-Temporal Token
Selection", arXiv 2111.11591 (ECCV 2022). Upstream: github.com/wangjk666/STTS, commit 6ae3404. Written
from a description of that code and its measured outputs.

A small network scores the token frames, or square windows of each frame (anchors); the best are kept
and the backbone goes on with fewer tokens, which stay a dense grid. In training the choice is
smoothed by noise, so that the scorer gets a gradient; the noise fades to nothing, and at test the
choice is hard. This file holds the selection; :mod:`ogreg_core.models.stts_backbones` says where it
stands in each backbone.

Differs from the released code in:

- The gradient of the smoothed choice. Released is the diagonal of the Jacobian alone, which is biased
  (the authors of the operator's source acknowledged the slip). Default here is the whole Jacobian as
  the sample covariance of choice and noise over sigma, which is unbiased (Berthet et al.,
  arXiv 2002.08676; the covariance subtracts the mean as a baseline). Measured with 500 samples and
  sigma 0.1 over random scores and upstream gradients, root mean square error as a share of the true
  gradient: choosing 5 of 8 frames 0.19 (0.33 without the baseline) against 0.82 of the released one,
  which scatters less (standard deviation 0.13 against 0.19) but around the wrong value (mean cosine
  0.43 against 0.94); choosing 1 of 16 windows 0.28 (0.45) against 0.61.
  ``gradient = "official"`` gives the released one.
- The noise: drawn clip by clip before the backbone runs, so that a clip's noise depends on its place
  in the batch but not on the size of the batch.
- Windows of frames that are not square keep the frame's aspect; released are square frames only.
- Scores and choice are computed in float32 also under autocast. Among equal scores the earlier item
  wins.
- The scorer's norms and biases are exempt from weight decay, like the backbones'.

Notation: B clips, T token frames, H W rows and columns of tokens, C channels, N independent rankings
(clips, or frames of clips), d ranked items, k kept items, M noise samples, a b rows and columns of a
window. Features are channels last, ``[B, T, H, W, C]``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, cast, get_args

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch import Tensor, nn

from ogreg_core.errors import UsageError
from ogreg_core.models.protocol import BlockMaps

__all__ = [
    "AnchorSelector",
    "Anchors",
    "FrameSelector",
    "Grid",
    "Keep",
    "KeptTokens",
    "Perturbation",
    "Scorer",
    "Selection",
    "anchors_of",
    "keep_count",
    "normalise_scores",
    "perturbed_top_k",
    "top_k",
]

Gradient = Literal["unbiased", "official"]


# --- configuration -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Keep:
    """One selection.

    Args:
        before: block (MViT) or stage (Swin, OG-ReG) in front of which it stands, from 0: the b of the
            paper's T^b and S^b.
        ratio: share of the frames, or of each frame's positions, that is kept at most; in (0, 1].
    """

    before: int
    ratio: float

    def __post_init__(self) -> None:
        if not 0.0 < self.ratio <= 1.0:
            raise UsageError(
                f"token_selection keeps a ratio of {self.ratio:g}", why="it must lie in (0, 1]"
            )


@dataclass(frozen=True)
class Selection:
    """What is kept where, and how the scorers learn.

    Args:
        time: selections of frames.
        space: selections of one window per frame; after those of frames where both stand at the same
            place.
        sigma: standard deviation of the noise at the start of training, on scores that span 0..1.
        samples: M, noise samples per ranking.
        gradient: of the smoothed choice, ``unbiased`` or ``official``; see the top of this file.
    """

    time: tuple[Keep, ...] = ()
    space: tuple[Keep, ...] = ()
    sigma: float = 0.1
    samples: int = 500
    gradient: Gradient = "unbiased"

    def __post_init__(self) -> None:
        for name, keeps in (("time", self.time), ("space", self.space)):
            places = [keep.before for keep in keeps]
            if len(set(places)) < len(places):
                raise UsageError(f"token_selection.{name} names a place twice: {places}")
        if not self.sigma > 0.0:
            raise UsageError(f"token_selection.sigma is {self.sigma:g}", why="it must be positive")
        if self.samples < 2:
            raise UsageError(f"token_selection.samples is {self.samples}", why="2 is the least")
        if self.gradient not in get_args(Gradient):
            raise UsageError(
                f"token_selection.gradient is {self.gradient!r}",
                why=f"it must be one of {', '.join(get_args(Gradient))}",
            )


class Grid(NamedTuple):
    """Token frames, rows and columns."""

    frames: int
    height: int
    width: int

    def halved(self) -> Grid:
        """After a merging or pooling by 2 in space."""
        return Grid(self.frames, (self.height + 1) // 2, (self.width + 1) // 2)


# --- choosing ----------------------------------------------------------------------------------


def keep_count(items: int, ratio: float) -> int:
    """How many of ``items`` are kept: rounded down, at least 1."""
    # The small addend is for products such as 100 * 0.29, which is 28.999... in floating point.
    return max(1, int(items * ratio + 1e-9))


def normalise_scores(scores: Tensor) -> Tensor:
    """Scores ``[..., d]`` shifted and scaled to 0 .. (almost) 1 over the ranked items."""
    low, high = scores.amin(-1, keepdim=True), scores.amax(-1, keepdim=True)
    return (scores - low) / (high - low + 1e-5)


def top_k(scores: Tensor, k: int) -> Tensor:
    """Indices of the k largest, in ascending order of index: ``[..., d] -> [..., k]``."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    return order[..., :k].sort(dim=-1).values


def perturbed_top_k(
    scores: Tensor, k: int, noise: Tensor, sigma: Tensor | float, gradient: Gradient = "unbiased"
) -> Tensor:
    """The choice of the k largest, averaged over noise: a differentiable top-k.

    With ``Y_m`` the one-hot rows of ``top_k(s + sigma Z_m)``, the value is the mean of the ``Y_m``.
    Its Jacobian with respect to ``s_e`` is ``E[Y Z_e] / sigma``; ``unbiased`` estimates it as the
    sample covariance of Y and Z over sigma, ``official`` keeps the uncentred entries with d = e alone.
    At ``sigma <= 1e-20`` the gradient is 0.

    Args:
        scores: s, ``[N, d]``.
        k: how many to keep.
        noise: Z, standard normal, ``[N, M, d]``.
        sigma: scale of the noise, one number.
        gradient: ``unbiased`` or ``official``.

    Returns:
        ``[N, k, d]``: row i says how often each item came i-th, in the order of the items.
    """
    samples, items = noise.shape[1:]
    with torch.no_grad():
        sigma = torch.as_tensor(sigma, dtype=scores.dtype, device=scores.device)
        chosen = F.one_hot(top_k(scores.unsqueeze(1) + sigma * noise, k), items).to(scores.dtype)
        mean = chosen.mean(1)
        steepness = torch.where(sigma > 1e-20, 1.0 / sigma.clamp_min(1e-20), 0.0)
        if gradient == "official":
            slope = steepness * (chosen * noise.unsqueeze(2)).mean(1)
        else:
            covariance = torch.einsum("nmkd,nme->nkde", chosen - mean.unsqueeze(1), noise)
            slope = steepness / (samples - 1) * covariance
    # Zero in value. Its derivative is 1, which gives the average the slope just computed, and only
    # the slope [N, k, d, d] is kept for the backward pass, not the samples.
    change = scores - scores.detach()
    if gradient == "official":
        return mean + slope * change.unsqueeze(1)
    return mean + torch.einsum("nkde,ne->nkd", slope, change)


@dataclass(frozen=True)
class Anchors:
    """The windows that may be kept of a frame: equal in size, in rows from the top left corner.

    Args:
        height, width: a and b, of a window.
        tops: first rows.
        lefts: first columns.
    """

    height: int
    width: int
    tops: tuple[int, ...]
    lefts: tuple[int, ...]

    @property
    def corners(self) -> list[tuple[int, int]]:
        """Top left corners, row by row."""
        return [(top, left) for top in self.tops for left in self.lefts]


def anchors_of(height: int, width: int, ratio: float) -> Anchors:
    """Anchors for frames of ``height x width`` tokens, of which ``ratio`` is kept at most.

    The window has the frame's aspect; windows are half the free play apart, at least one token.
    """
    kept = keep_count(height * width, ratio)
    # Of a strip that is less than a window wide, as much of its length as is kept.
    rows = min(kept, max(1, math.isqrt(kept * height // width)))
    columns = max(1, min(kept // rows, math.isqrt(kept * width // height)))
    return Anchors(rows, columns, _starts(height, rows), _starts(width, columns))


def _starts(length: int, window: int) -> tuple[int, ...]:
    stride = max((length - window) // 2, 1)
    return tuple(range(0, length - window + 1, stride))


# --- the selectors -----------------------------------------------------------------------------


class Scorer(nn.Module):
    """Scores items, each seen beside the mean of all: ``[N, d, C] -> [N, d]``.

    Half of the channels of a hidden layer is replaced by its mean over the items (as in DynamicViT).

    Args:
        dim: C, a multiple of 4.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.in_conv = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU())
        self.out_conv = nn.Sequential(
            nn.Linear(dim, dim // 2),
            nn.GELU(),
            nn.Linear(dim // 2, dim // 4),
            nn.GELU(),
            nn.Linear(dim // 4, 1),
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        local, shared = self.in_conv(x).chunk(2, dim=-1)
        shared = shared.mean(1, keepdim=True).expand_as(local)
        return self.out_conv(torch.cat([local, shared], dim=-1)).squeeze(-1)


@dataclass(frozen=True)
class Perturbation:
    """What smooths a choice in training.

    Args:
        noise: standard normal, of the selector's ``noise_shape`` with the clips before it.
        sigma: its scale.
        gradient: see :class:`Selection`.
    """

    noise: Tensor
    sigma: Tensor
    gradient: Gradient = "unbiased"


def _full_precision(device: str) -> AbstractContextManager[object]:
    """Autocast switched off, where there is such a thing (not on the meta device)."""
    if torch.amp.is_autocast_available(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


class FrameSelector(nn.Module):
    """Keeps whole token frames, in their order.

    A frame is described by the mean and the maximum of its tokens.

    Args:
        dim: C.
        ratio: see :class:`Keep`.
    """

    kind = "time"

    def __init__(self, dim: int, ratio: float) -> None:
        super().__init__()
        self.ratio = ratio
        self.score_network = Scorer(2 * dim)

    def left(self, grid: Grid) -> Grid:
        """The grid after the selection."""
        return grid._replace(frames=keep_count(grid.frames, self.ratio))

    def noise_shape(self, grid: Grid, samples: int) -> tuple[int, ...]:
        """Of the noise for one clip."""
        return samples, grid.frames

    def scores(self, x: Tensor) -> Tensor:
        """Normalised score per frame: ``[B, T, H, W, C] -> [B, T]``."""
        mean = reduce(x, "b t h w c -> b t c", "mean")
        peak = reduce(x, "b t h w c -> b t c", "max")
        return normalise_scores(self.score_network(torch.cat([mean, peak], dim=-1).float()))

    def forward(self, x: Tensor, soft: Perturbation | None = None) -> tuple[Tensor, Tensor]:
        """Select.

        Args:
            x: features ``[B, T, H, W, C]``.
            soft: None for the hard choice.

        Returns:
            Features ``[B, k, H, W, C]``, in the soft choice mixtures of frames; scores ``[B, T]``.
        """
        with _full_precision(x.device.type):
            scores = self.scores(x)
            k = keep_count(x.shape[1], self.ratio)
            if soft is None:
                clips = torch.arange(x.shape[0], device=x.device).unsqueeze(1)
                return x[clips, top_k(scores, k)], scores
            weights = perturbed_top_k(scores, k, soft.noise, soft.sigma, soft.gradient)
            mixed = weights.to(x.dtype) @ rearrange(x, "b t h w c -> b t (h w c)")
            height, width = x.shape[2:4]
            return rearrange(mixed, "b k (h w c) -> b k h w c", h=height, w=width), scores


class AnchorSelector(nn.Module):
    """Keeps one window of each frame; see :func:`anchors_of`. A window's score is the mean of its
    tokens' scores.

    Args:
        dim: C.
        ratio: see :class:`Keep`.
    """

    kind = "space"

    def __init__(self, dim: int, ratio: float) -> None:
        super().__init__()
        self.ratio = ratio
        self.score_network = Scorer(dim)

    def left(self, grid: Grid) -> Grid:
        """The grid after the selection."""
        anchors = anchors_of(grid.height, grid.width, self.ratio)
        return Grid(grid.frames, anchors.height, anchors.width)

    def noise_shape(self, grid: Grid, samples: int) -> tuple[int, ...]:
        """Of the noise for one clip."""
        corners = anchors_of(grid.height, grid.width, self.ratio).corners
        return grid.frames, samples, len(corners)

    def scores(self, x: Tensor, anchors: Anchors) -> Tensor:
        """Normalised score per window: ``[B, T, H, W, C] -> [B, T, d]``."""
        batch, frames, height, width, _ = x.shape
        tokens = self.score_network(rearrange(x, "b t h w c -> (b t) (h w) c").float())
        scores = rearrange(tokens, "(b t) (h w) -> b t h w", b=batch, t=frames, h=height, w=width)
        windows = [_window(scores, anchors, corner).mean((2, 3)) for corner in anchors.corners]
        return normalise_scores(torch.stack(windows, dim=-1))

    def forward(self, x: Tensor, soft: Perturbation | None = None) -> tuple[Tensor, Tensor]:
        """Select.

        Args:
            x: features ``[B, T, H, W, C]``.
            soft: None for the hard choice.

        Returns:
            Features ``[B, T, a, b, C]``, in the soft choice mixtures of windows; scores
            ``[B, T, d]``.
        """
        anchors = anchors_of(x.shape[2], x.shape[3], self.ratio)
        with _full_precision(x.device.type):
            scores = self.scores(x, anchors)
            if soft is None:
                return _cut(x, anchors, top_k(scores, 1).squeeze(-1)), scores
            weights = perturbed_top_k(
                rearrange(scores, "b t d -> (b t) d"),
                1,
                rearrange(soft.noise, "b t m d -> (b t) m d"),
                soft.sigma,
                soft.gradient,
            )
            weights = rearrange(weights, "(b t) 1 d -> d b t 1 1 1", b=len(x)).to(x.dtype)
            # A sum over views: all windows at once would be a copy of each.
            parts = zip(weights, anchors.corners, strict=True)
            mixed = sum(weight * _window(x, anchors, corner) for weight, corner in parts)
            return cast(Tensor, mixed), scores


def _window(x: Tensor, anchors: Anchors, corner: tuple[int, int]) -> Tensor:
    """A view of one window of every frame of ``[B, T, H, W, ...]``."""
    top, left = corner
    return x[:, :, top : top + anchors.height, left : left + anchors.width]


def _cut(x: Tensor, anchors: Anchors, index: Tensor) -> Tensor:
    """Each frame's own window, numbered by ``index`` ``[B, T]``: ``[B, T, a, b, C]``."""
    corners = torch.tensor(anchors.corners, device=x.device)[index]
    rows = corners[..., :1] + torch.arange(anchors.height, device=x.device)
    columns = corners[..., 1:] + torch.arange(anchors.width, device=x.device)
    clips = rearrange(torch.arange(x.shape[0], device=x.device), "b -> b 1 1 1")
    frames = rearrange(torch.arange(x.shape[1], device=x.device), "t -> t 1 1")
    return x[clips, frames, rows.unsqueeze(-1), columns.unsqueeze(-2)]


# --- which tokens are left ---------------------------------------------------------------------


@dataclass
class KeptTokens:
    """Where the tokens that are left lie in the clip; collects a map per selection.

    Args:
        frames: numbers of the token frames that are left, ``[B, T]``.
        boxes: the part of each that is left: top, left, height and width as shares of the picture,
            ``[B, T, 4]``.
        total: token frames at the beginning.
        maps: by the name of the selection.
    """

    frames: Tensor
    boxes: Tensor
    total: int
    maps: dict[str, BlockMaps] = field(default_factory=dict)

    @classmethod
    def all_of(cls, clip: Tensor, grid: Grid) -> KeptTokens:
        """Nothing is dropped yet of clips ``[B, 3, ...]`` with that grid of tokens."""
        frames = repeat(torch.arange(grid.frames, device=clip.device), "t -> b t", b=len(clip))
        box = torch.tensor([0.0, 0.0, 1.0, 1.0], device=clip.device)
        boxes = repeat(box, "side -> b t side", b=len(clip), t=grid.frames)
        return cls(frames, boxes, grid.frames)

    def keep(
        self,
        name: str,
        selector: FrameSelector | AnchorSelector,
        scores: Tensor,
        grids: Sequence[Grid],
    ) -> None:
        """Note what a selector keeps.

        Args:
            name: of the map.
            selector: which one.
            scores: as it returned them.
            grids: of the tokens in front of it, and of the whole picture at that resolution.
        """
        before, picture = grids
        profiles = {}
        if isinstance(selector, FrameSelector):
            curve = scores.new_zeros(len(scores), self.total).scatter(1, self.frames, scores)
            profiles["score"] = curve
            kept = top_k(scores, keep_count(before.frames, selector.ratio))
            self.frames = self.frames.gather(1, kept)
            self.boxes = self.boxes.take_along_dim(kept.unsqueeze(-1), dim=1)
        else:
            anchors = anchors_of(before.height, before.width, selector.ratio)
            corners = torch.tensor(anchors.corners, device=scores.device)[scores.argmax(-1)]
            sides = torch.tensor([before.height, before.width], device=scores.device)
            size = torch.tensor([anchors.height, anchors.width], device=scores.device)
            start, extent = self.boxes.chunk(2, dim=-1)
            self.boxes = torch.cat(
                [start + corners / sides * extent, size / sides * extent], dim=-1
            )
        self.maps[name] = BlockMaps(kept=self._drawn(picture), profiles=profiles)

    def _drawn(self, picture: Grid) -> Tensor:
        """1 where a token is left, else 0: ``[B, total, H, W]``."""
        start, extent = self.boxes.chunk(2, dim=-1)
        inside = []
        for axis, length in enumerate((picture.height, picture.width)):
            centre = (torch.arange(length, device=start.device) + 0.5) / length
            first = start[..., axis : axis + 1]
            inside.append((centre > first) & (centre < first + extent[..., axis : axis + 1]))
        windows = (inside[0].unsqueeze(-1) & inside[1].unsqueeze(-2)).float()
        drawn = windows.new_zeros(len(windows), self.total, picture.height, picture.width)
        index = repeat(self.frames, "b t -> b t h w", h=picture.height, w=picture.width)
        return drawn.scatter(1, index, windows)
