"""GTA: Global Temporal Attention (on ResNet-50: gta_resnet.py; in other models: gta_insertion.py).

Paper: He, Yang, Wu, Chen, Lim, Shrivastava, "GTA: Global Temporal Attention for Video Action
Understanding", BMVC 2021, arXiv 2012.08510. The authors have published no code, and only the abstracts
were at hand: this file is a reconstruction after them, and no figure of the paper is claimed for it.

Published: attention over space and time is decoupled, spatial attention first and temporal attention on
top of it; the temporal attention is a learned T x T matrix, randomly initialised and shared by all samples
instead of computed from one; it works on pixels and on regions, which a learned transformation finds; a
cross-channel multi-head extension lets channels interact; it serves 2-D and 3-D networks.

Ours, everything else, with the alternatives in :class:`GTAConfig`: the form of the spatial attention
(that of a non-local block, within each frame), a matrix of unconstrained numbers, every head reading every
head, 16 regions by a softmax over pixels whose transpose leads back, pixel and region matrices of their
own, the sum of both; one residual around all of it behind a batch norm that starts at 0 (so that a
pretrained network stays what it was); two modules in the second stage and three in the third, where
non-local blocks are put; frames averaged before the classifier; no weight decay on the matrices.

The matrix fixes T: a model runs with the number of frames that it was built for.

Notation: B batch, T frames, H W rows and columns, S = H W positions, C channels, D inner channels, M
heads, N regions. Layout of the module: channels last, ``[B, T, H, W, C]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from ogreg_core.errors import UsageError
from ogreg_core.models.layers import (
    DropPath,
    attend,
    attention_weights,
    captured_inputs,
)
from ogreg_core.models.protocol import BlockMaps

__all__ = [
    "GTAConfig",
    "GlobalTemporalAttention",
    "matrix_names",
    "mix_frames",
    "pool_regions",
    "run_with_maps",
    "spread_regions",
]


# --- pure functions ----------------------------------------------------------------------------


def mix_frames(y: Tensor, matrix: Tensor) -> Tensor:
    """Every output frame as a fixed combination of all input frames, at each position by itself.

    Plain heads: ``Z^i = A^i Y^i``. Cross-channel heads: ``Z^i = sum_j A^ij Y^j``.

    Args:
        y: ``[B, T, S, D]``; head i holds the i-th D/M channels.
        matrix: A, ``[M, T, T]`` for plain heads, ``[M, M, T, T]`` for cross-channel heads; rows are
            output frames.

    Returns:
        ``[B, T, S, D]``.
    """
    heads, positions = len(matrix), y.shape[2]
    if matrix.ndim == 3:
        tokens = rearrange(y, "b u s (m d) -> b m (s d) u", m=heads)
        return rearrange(
            tokens @ matrix.transpose(-2, -1), "b m (s d) t -> b t s (m d)", s=positions
        )
    weight = rearrange(matrix, "i j t u -> (i t) (j u)")
    tokens = F.linear(rearrange(y, "b u s (j d) -> b (s d) (j u)", j=heads), weight)
    return rearrange(tokens, "b (s d) (i t) -> b t s (i d)", i=heads, s=positions)


def pool_regions(y: Tensor, share: Tensor) -> Tensor:
    """Region features of each frame: means over its positions, weighted by R.

    Args:
        y: ``[B, T, S, D]``.
        share: R, not negative, ``[B, T, S, N]``; where it sums to 1 over S, the mean is ``R_t Y_t``.

    Returns:
        ``[B, T, N, D]``.
    """
    # An empty region gives 0, not 0/0.
    weights = share / share.sum(dim=2, keepdim=True).clamp_min(1e-6)
    return weights.transpose(-2, -1) @ y


def spread_regions(v: Tensor, share: Tensor) -> Tensor:
    """Region features back at the positions, ``Z_t = R_t^T V_t``: ``[B, T, N, D], [B, T, S, N] -> [B,
    T, S, D]``.
    """
    return share @ v


# --- configuration -----------------------------------------------------------------------------


@dataclass(frozen=True)
class GTAConfig:
    """What the abstracts leave open, and the steps of an ablation.

    Args:
        attention: spatial attention within each ``frame``; ``joint`` attends over all frames at once,
            as a non-local block does (with ``temporal="none"`` and no regions it is one).
        temporal: the ``global`` learned matrix; ``instance`` computes attention over time from each
            sample; ``none``.
        heads: M, groups of channels with matrices of their own.
        mixing: every head reads every head (``cross``, M^2 matrices), or itself (``plain``, M; the
            output projection is all that mixes channels then).
        matrix: ``raw`` numbers, or a ``softmax`` over all that a row reads.
        bias: ``frame`` adds a learned number per head and output frame.
        regions: N; 0 leaves the region branch out.
        assignment: the softmax that finds regions runs over the ``pixels`` of a frame, or over the
            ``regions`` at each pixel.
        distribution: back to the pixels by the ``same`` weights as there, or by ``separate`` ones, a
            softmax over the regions at each pixel. Weights that sum to 1 over the pixels bring back
            little: the region branch starts at 2 % of the pixel branch's size on 28 x 28 positions,
            8 % on 14 x 14, with ``separate`` at 90 % (measured on random features).
        fusion: pixel and region branch as ``sum``, side by side (``concat``), or the regions on top
            of the pixels with a residual (``serial``).
        reduction: C / D.

    Raises:
        UsageError: a choice that would do nothing beside the others.
    """

    attention: Literal["frame", "joint"] = "frame"
    temporal: Literal["global", "instance", "none"] = "global"
    heads: int = 8
    mixing: Literal["cross", "plain"] = "cross"
    matrix: Literal["raw", "softmax"] = "raw"
    bias: Literal["none", "frame"] = "none"
    regions: int = 16
    assignment: Literal["pixels", "regions"] = "pixels"
    distribution: Literal["same", "separate"] = "same"
    fusion: Literal["sum", "concat", "serial"] = "sum"
    reduction: int = 2

    def __post_init__(self) -> None:
        defaults = {field.name: field.default for field in fields(self)}
        idle = []
        if self.temporal != "global":
            why = "it belongs to the learned matrix"
            idle += [(name, why) for name in ("heads", "mixing", "matrix", "bias")]
        if not self.regions:
            why = "there is no region branch"
            idle += [(name, why) for name in ("assignment", "distribution", "fusion")]
        for name, why in idle:
            if getattr(self, name) != defaults[name]:
                raise UsageError(
                    f"model option {name} has no effect here", why=why, fix=f"leave out {name}"
                )


# --- attention over time -----------------------------------------------------------------------


class GlobalMix(nn.Module):
    """Temporal attention by a learned matrix that all samples share: ``[B, T, S, D] -> [B, T, S, D]``.

    Args:
        dim: D.
        frames: T, fixed from now on.
        config: ``heads``, ``mixing``, ``matrix`` and ``bias`` are read.

    Raises:
        UsageError: the heads do not divide D, or a clip has other than T frames.
    """

    def __init__(self, dim: int, frames: int, config: GTAConfig) -> None:
        super().__init__()
        if config.heads < 1 or dim % config.heads:
            raise UsageError(
                f"{config.heads} heads of global temporal attention do not divide {dim} channels",
                fix="choose heads among 1, 2, 4, 8",
            )
        self.frames = frames
        self.heads = config.heads
        self.kind = config.matrix
        read = config.heads if config.mixing == "cross" else 1
        pairs = (config.heads,) * (2 if config.mixing == "cross" else 1)
        # Keeps the size of the features: each output is a sum over all that a row reads.
        self.matrix = nn.Parameter(
            torch.randn(*pairs, frames, frames) / math.sqrt(read * frames),
        )
        self.bias = (
            nn.Parameter(torch.zeros(frames, config.heads)) if config.bias == "frame" else None
        )

    def weights(self) -> Tensor:
        """The matrix that is applied, ``[M, M, T, T]`` or ``[M, T, T]``."""
        if self.kind == "raw":
            return self.matrix
        if self.matrix.ndim == 3:
            return self.matrix.softmax(dim=-1)
        rows = rearrange(self.matrix, "i j t u -> i t (j u)").softmax(dim=-1)
        return rearrange(rows, "i t (j u) -> i j t u", j=self.heads)

    def forward(self, y: Tensor) -> Tensor:
        if y.shape[1] != self.frames:
            raise UsageError(
                f"global temporal attention learned for {self.frames} frames gets {y.shape[1]}",
                why="its matrix has a row and a column for each frame",
                fix="give the clip as many frames as the model was built for",
            )
        z = mix_frames(y, self.weights())
        if self.bias is None:
            return z
        return z + self.bias.repeat_interleave(z.shape[-1] // self.heads, dim=1)[:, None]

    def strength(self, y: Tensor) -> Tensor:
        """How strongly frame t reads frame u, root mean square over the heads: ``[B, T, T]``."""
        squares = reduce(self.weights().square(), "... t u -> t u", "mean")
        return squares.sqrt().expand(len(y), -1, -1)


class InstanceMix(nn.Module):
    """Temporal attention computed from each sample, for comparison: ``[B, T, S, D] -> [B, T, S, D]``,
    over the frames of each position.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)

    def forward(self, y: Tensor) -> Tensor:
        z = attend(self.qkv(rearrange(y, "b t s d -> (b s) t d")), heads=1)
        return rearrange(z, "(b s) t d -> b t s d", b=len(y))

    def strength(self, y: Tensor) -> Tensor:
        """How strongly frame t reads frame u, mean over the positions: ``[B, T, T]``."""
        weights = attention_weights(self.qkv(rearrange(y, "b t s d -> (b s) t d")), heads=1)
        return reduce(weights, "(b s) one t u -> b t u", "mean", b=len(y))


def _temporal(dim: int, frames: int, config: GTAConfig) -> nn.Module:
    if config.temporal == "global":
        return GlobalMix(dim, frames, config)
    return InstanceMix(dim) if config.temporal == "instance" else nn.Identity()


class RegionMix(nn.Module):
    """Temporal attention between regions: pooled from each frame by weights learned from the block's
    input, mixed over time region by region, and spread over the pixels again.

    Args:
        channels: C, of the block's input.
        dim: D.
        frames: T.
        config: ``regions``, ``assignment`` and ``distribution`` are read, and what :class:`GlobalMix`
            reads.
    """

    def __init__(self, channels: int, dim: int, frames: int, config: GTAConfig) -> None:
        super().__init__()
        self.axis = 2 if config.assignment == "pixels" else 3
        # A softmax over pixels does not see what is added to all of them.
        self.assign = nn.Linear(channels, config.regions, bias=self.axis == 3)
        self.distribute = (
            nn.Linear(channels, config.regions) if config.distribution == "separate" else None
        )
        self.temporal = _temporal(dim, frames, config)

    def assignment(self, x: Tensor) -> Tensor:
        """R as ``[B, T, S, N]`` from features ``[B, T, S, C]``; sums to 1 over S, or over N."""
        return self.assign(x).softmax(dim=self.axis)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """From the block's input ``[B, T, S, C]`` and the attended features ``[B, T, S, D]``."""
        share = self.assignment(x)
        scatter = share if self.distribute is None else self.distribute(x).softmax(dim=3)
        return spread_regions(self.temporal(pool_regions(y, share)), scatter)


# --- the module --------------------------------------------------------------------------------


class GlobalTemporalAttention(nn.Module):
    """``x + BN(Out(Temporal(Spatial(x))))``, the identity when built, since its batch norm starts at 0.

    Args:
        channels: C.
        frames: T of the features, which is fixed from now on if ``config.temporal`` is ``global``.
        config: everything that is open.
        drop_path: stochastic depth of the branch.
        layout: features ``[B, T, H, W, C]`` (``last``) or ``[B, C, T, H, W]`` (``first``), both ways.

    Raises:
        UsageError: D is not a whole number, or the heads do not divide it.
    """

    def __init__(
        self,
        channels: int,
        frames: int,
        config: GTAConfig | None = None,
        drop_path: float = 0.0,
        layout: Literal["last", "first"] = "last",
    ) -> None:
        super().__init__()
        config = config or GTAConfig()
        if config.reduction < 1 or channels % config.reduction:
            raise UsageError(
                f"{channels} channels are not divisible by reduction {config.reduction}",
                fix="choose reduction 1, 2 or 4",
            )
        dim = channels // config.reduction
        self.config = config
        self.layout = layout
        self.qkv = nn.Linear(channels, 3 * dim)
        self.pixel = _temporal(dim, frames, config)
        self.region = RegionMix(channels, dim, frames, config) if config.regions else None
        self.out = nn.Linear((1 + (config.fusion == "concat")) * dim, channels, bias=False)
        self.norm = nn.BatchNorm3d(channels)
        self.drop_path = DropPath(drop_path)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.zeros_(self.norm.weight)

    def spatial(self, x: Tensor) -> Tensor:
        """Spatial attention alone: ``[B, T, S, C] -> [B, T, S, D]``."""
        qkv, frames = self._tokens(self.qkv(x)), x.shape[1]
        out = attend(qkv, heads=1)
        if self.config.attention == "joint":
            return rearrange(out, "b (t s) d -> b t s d", t=frames)
        return rearrange(out, "(b t) s d -> b t s d", t=frames)

    def _tokens(self, qkv: Tensor) -> Tensor:
        joint = self.config.attention == "joint"
        return rearrange(qkv, "b t s c -> b (t s) c" if joint else "b t s c -> (b t) s c")

    def mixed(self, x: Tensor) -> Tensor:
        """Both attentions, before the output projection: ``[B, T, S, C] -> [B, T, S, D]`` (2 D where
        pixels and regions stand side by side).
        """
        y = self.spatial(x)
        z = self.pixel(y)
        if self.region is None:
            return z
        if self.config.fusion == "serial":
            return z + self.region(x, z)
        if self.config.fusion == "concat":
            return torch.cat([z, self.region(x, y)], dim=-1)
        return z + self.region(x, y)

    def forward(self, x: Tensor) -> Tensor:
        last = x if self.layout == "last" else rearrange(x, "b c t h w -> b t h w c")
        branch = self.out(self.mixed(last.flatten(2, 3)))
        rows = last.shape[2]
        branch = self.norm(rearrange(branch, "b t (h w) c -> b c t h w", h=rows))
        if self.layout == "last":
            branch = rearrange(branch, "b c t h w -> b t h w c")
        return x + self.drop_path(branch)

    def maps(self, x: Tensor) -> BlockMaps:
        """What the module looks at, from its input.

        The glance is the spatial attention that each position receives, mean over its queries. The
        profiles are the first, middle and last row of the temporal matrix, ``A[t]``, how strongly output
        frame t reads each input frame, and ``read`` (``read by regions``), the share of all reading that
        an input frame receives; each ``[B, T]``.
        """
        last = x if self.layout == "last" else rearrange(x, "b c t h w -> b t h w c")
        tokens, rows = last.flatten(2, 3), last.shape[2]
        weights = attention_weights(self._tokens(self.qkv(tokens)), heads=1)
        received = reduce(weights, "n one query key -> n key", "mean")
        glance = received.reshape(len(last), last.shape[1], rows, -1)
        y = self.spatial(tokens)
        profiles = {}
        if self.config.temporal != "none":
            strength = self.pixel.strength(y)  # type: ignore[operator]
            frames = strength.shape[1]
            profiles = {f"A[{t}]": strength[:, t] for t in (0, frames // 2, frames - 1)}
            profiles["read"] = _share(strength)
            if self.region is not None:
                source = self.pixel(y) if self.config.fusion == "serial" else y
                v = pool_regions(source, self.region.assignment(tokens))
                profiles["read by regions"] = _share(self.region.temporal.strength(v))  # type: ignore[operator]
        return BlockMaps(glance=glance / glance.sum((1, 2, 3), keepdim=True), profiles=profiles)


def _share(strength: Tensor) -> Tensor:
    """Share of all reading that an input frame receives: ``[B, T, T] -> [B, T]``, sums to 1."""
    return strength.sum(1) / strength.sum((1, 2)).unsqueeze(-1)


def matrix_names(module: nn.Module) -> set[str]:
    """Names of the temporal matrices and their biases in ``module``."""
    return {
        f"{name}.{own}"
        for name, found in module.named_modules()
        if isinstance(found, GlobalMix)
        for own, _ in found.named_parameters()
    }


def run_with_maps(
    run: Callable[[Tensor], Any], clip: Tensor, modules: Mapping[str, GlobalTemporalAttention]
) -> tuple[Any, dict[str, BlockMaps]]:
    """What ``run`` gives for the clip, and the maps of the modules that it passes."""
    with captured_inputs(modules) as inputs:
        result = run(clip)
    return result, {name: modules[name].maps(x) for name, x in inputs.items()}
