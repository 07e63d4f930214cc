"""OG-ReG: Overall Glance and Refined Gaze Transformer.

Paper: "Insights from Visual Cognition: Understanding Human Action Dynamics with Overall Glance and
Refined Gaze Transformer", arXiv 2604.06783. The authors have published neither code nor weights;
only the abstract and public summaries are known. This file is an independent reconstruction.

Published: every block runs two parallel paths. Glance is *Spatial-only Downsampling Attention*
(SoDA): coarse space-time attention over tokens that are downsampled in space and never in time.
Gaze is *Modulated 2D/3D Convolution* (MDConv): fine local detail, modulated by the similarity of
frames. The code builds on Video-Swin.

Ours, everything else: the sum of both paths under one output projection, the pooling, the
positional encoding, the strides, the form of the modulation, the stems, and Swin's widths and
depths (chosen so that Swin weights fit). What these were measured against is built by
:mod:`ogreg_core.models.ogreg_ablation`.

Measured so far, ogreg-n from scratch on two small data sets, three seeds (README, "Controlled
comparisons"), as it is 58.9 and 17.4 % top-1: without the Gaze (14.9, 5.8), with a 2-D one (16.1,
6.0), or with the similarity of pooled features (22.6, 7.2) it is worse. A plain 3-D convolution is worse
on the one and, with repeated edge frames, better on the other (39.9, 30.3); (1 + m) times that
convolution is better than it on both (59.5, 39.0), but not clearly so where kernels begin larger, and
with no clear difference between m and m of another place (51.2, 37.9). Not settled: kernels of the
Gaze that begin twice as large (66.7, 24.3), d per position against its mean over the frame (43.5,
21.1), the Glance against none (61.3, 20.7), fusion, positional encoding, pooling, interpolation,
strides, and the stem (patches: 51.8, 34.6; layer norm in place of its batch norm: 60.7, 24.7).

Two details follow from the demand that a still clip must stay still through the whole network (its
frames identical in every block, hence dissimilarity 0 everywhere): the modulation is exactly 0 at
dissimilarity 0, and convolutions that are not modulated (stem, positional encoding) repeat the edge
frames in time instead of padding with zeros.

Notation: B batch, T frames (after the stem: token frames, two input frames each), H W rows and
columns, C channels, h w rows and columns of the coarse grid. Layout inside the network: channels
last, ``[B, T, H, W, C]``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from ogreg_core.models.layers import (
    DropPath,
    Mlp,
    attend,
    attention_weights,
    captured_inputs,
    drop_path_rates,
    in_pieces,
)
from ogreg_core.models.mdconv import MDConv, depthwise_volume
from ogreg_core.models.protocol import BlockMaps
from ogreg_core.models.staged import StagedNetwork
from ogreg_core.models.stems import ConvStem, PatchStem

__all__ = [
    "VARIANTS",
    "Block",
    "MDConv",
    "OGReG",
    "OGReGConfig",
    "SoDA",
    "Stage",
    "build_block",
    "build_ogreg",
    "configure",
    "gaze_maps",
]


# --- configuration -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """One stage: width, number of blocks, attention heads, and the stride of its Glance."""

    dim: int
    depth: int
    heads: int
    stride: int


@dataclass(frozen=True)
class OGReGConfig:
    """All choices of the architecture.

    Args:
        stages: from fine to coarse; each is half the spatial size of the one before.
        stem: ``conv`` (overlapping convolutions; learns from scratch) or ``patch`` (Swin-compatible
            patch embedding).
        gaze: ``modulated`` as published; ``2d`` and ``3d`` fix the modulation to 0 and 1.
        similarity: what the modulation listens to: the mean over the ``frame``, or each
            ``position`` by itself.
    """

    stages: tuple[Stage, ...]
    stem: Literal["conv", "patch"] = "conv"
    gaze: Literal["modulated", "2d", "3d"] = "modulated"
    similarity: Literal["frame", "position"] = "position"


def _swin_stages(width: int, depths: Sequence[int]) -> tuple[Stage, ...]:
    heads = width // 32
    return tuple(
        Stage(dim=width << i, depth=depth, heads=heads << i, stride=8 >> i)
        for i, depth in enumerate(depths)
    )


VARIANTS = {
    "n": OGReGConfig(_swin_stages(32, (1, 1, 3, 1))),
    "t": OGReGConfig(_swin_stages(96, (2, 2, 6, 2))),
    "s": OGReGConfig(_swin_stages(96, (2, 2, 18, 2))),
    "b": OGReGConfig(_swin_stages(128, (2, 2, 18, 2))),
}


# Evaluated at a time where pieces pay, see layers.in_pieces. Measured on two cores with ogreg-t at
# 32x224: 1024 to 4096 tokens are equally fast.
TOKENS_AT_ONCE = 2048


# --- the network's parts ------------------------------------------------------------------------


class PatchMerging(nn.Module):
    """Halve H and W, double C: 2x2 neighbours side by side, LayerNorm, linear; odd sides padded
    with zeros.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:4]
        x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
        # Column before row: the channel order of Swin's weights.
        x = rearrange(x, "b t (h row) (w column) c -> b t h w (column row c)", row=2, column=2)
        return self.reduction(self.norm(x))


# --- the block ---------------------------------------------------------------------------------


class SoDA(nn.Module):
    """Glance: Spatial-only Downsampling Attention.

    Average pooling over ``stride`` x ``stride`` in space, never in time (partial windows at the
    border average what they hold); a relative positional encoding by depthwise 3x3x3 convolution on
    the coarse grid; self-attention over all T*h*w coarse tokens at once; bilinear interpolation
    back. The output projection is shared with the Gaze and lives in :class:`Block`.

    Args:
        dim: channels C.
        heads: attention heads.
        stride: spatial stride of the pooling.
        position: whether to add the positional encoding.
    """

    def __init__(self, dim: int, heads: int, stride: int, position: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.stride = stride
        self.position = nn.Conv3d(dim, dim, 3, padding=(0, 1, 1), groups=dim) if position else None
        self.qkv = nn.Linear(dim, 3 * dim)

    def init_weights(self) -> None:
        """Starts small: at first the coarse tokens are what they are, wherever they lie."""
        if self.position is not None:
            nn.init.trunc_normal_(self.position.weight, std=0.02)
            nn.init.constant_(cast(Tensor, self.position.bias), 0.0)

    def coarse(self, y: Tensor) -> Tensor:
        """Pooled tokens with their positional encoding: ``[B, T, H, W, C] -> [B, T, h, w, C]``."""
        if self.stride > 1:
            images = self.pool(rearrange(y, "b t h w c -> (b t) c h w"))
            y = rearrange(images, "(b t) c h w -> b t h w c", b=y.shape[0])
        if self.position is not None:
            y = y + depthwise_volume(y, self.position.weight, self.position.bias)
        return y

    def pool(self, images: Tensor) -> Tensor:
        """``[N, C, H, W] -> [N, C, h, w]``."""
        return F.avg_pool2d(images, self.stride, ceil_mode=True, count_include_pad=False)

    def project(self, coarse: Tensor) -> Tensor:
        """Query, key and value of the coarse tokens: ``[B, T, h, w, C] -> [B, N, 3C]``."""
        return self.qkv(rearrange(coarse, "b t h w c -> b (t h w) c"))

    def unpool(self, images: Tensor) -> Tensor:
        """``[N, C, h, w] -> [N, C, h * stride, w * stride]``."""
        return F.interpolate(images, scale_factor=float(self.stride), mode="bilinear")

    def forward(self, y: Tensor) -> Tensor:
        batch, frames, height, width, _ = y.shape
        coarse = self.coarse(y)
        rows = coarse.shape[2]
        out = attend(self.project(coarse), self.heads)
        if self.stride == 1:
            return rearrange(out, "b (t h w) c -> b t h w c", t=frames, h=rows)
        images = self.unpool(rearrange(out, "b (t h w) c -> (b t) c h w", t=frames, h=rows))
        return rearrange(images[:, :, :height, :width], "(b t) c h w -> b t h w c", b=batch)

    def attention(self, y: Tensor) -> Tensor:
        """Share of attention that each coarse token receives, mean over queries and heads: ``[B, T,
        h, w]``.
        """
        coarse = self.coarse(y)
        weights = attention_weights(self.project(coarse), self.heads)
        received = reduce(weights, "b heads query key -> b key", "mean")
        return rearrange(received, "b (t h w) -> b t h w", t=coarse.shape[1], h=coarse.shape[2])


class Block(nn.Module):
    """Pre-norm block: ``x + Proj(Glance(y) + Gaze(y))`` with ``y = LN(x)``, then ``x +
    MLP(LN(x))``.

    Args:
        dim: channels C.
        glance, gaze: the two paths.
        drop_path: rate of both residuals.
    """

    def __init__(self, dim: int, glance: SoDA, gaze: MDConv, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.glance = glance
        self.gaze = gaze
        self.proj = nn.Linear(dim, dim)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim)

    def init_weights(self) -> None:
        """Draw what is the block's own; its parts draw for themselves."""

    def look(self, y: Tensor) -> Tensor:
        """What both paths see together: ``[B, T, H, W, C]`` to the same."""
        return self.glance(y) + self.gaze(y)

    def maps(self, y: Tensor) -> BlockMaps:
        """What both paths look at, for the features that they are given."""
        return BlockMaps(glance=self.glance.attention(y), **gaze_maps(self.gaze, y), between=True)

    def forward(self, x: Tensor) -> Tensor:
        seen = self.look(self.norm1(x))
        if self.training:  # drop path draws per clip
            return self._digest(x, seen)
        tokens = in_pieces(
            self._digest, x.flatten(0, -2), seen.flatten(0, -2), length=TOKENS_AT_ONCE
        )
        return tokens.view_as(x)

    def _digest(self, x: Tensor, seen: Tensor) -> Tensor:
        """What follows the two paths and treats each token by itself: ``[..., C]``."""
        x = x + self.drop_path(self.proj(seen))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def gaze_maps(gaze: MDConv, y: Tensor) -> dict[str, Any]:
    """Fields of :class:`BlockMaps`: frame dissimilarity per position, its profile d[t], and m[t]."""
    dissimilarity = gaze.dissimilarity(y)
    profile = dissimilarity.mean(dim=(2, 3))
    m = gaze.modulation(y)
    if m is None:
        opening = torch.zeros_like(profile)
    else:
        opening = m.expand(*dissimilarity.shape, y.shape[-1]).mean(dim=(2, 3, 4))
    return {"gaze": dissimilarity, "profiles": {"d": profile, "m": opening}}


def build_block(stage: Stage, config: OGReGConfig, drop_path: float) -> Block:
    """A block of a stage as the configuration says."""
    glance = SoDA(stage.dim, stage.heads, stage.stride)
    return Block(stage.dim, glance, MDConv(stage.dim, config.gaze, config.similarity), drop_path)


# --- the model ---------------------------------------------------------------------------------


class OGReG(StagedNetwork):
    """OG-ReG Transformer: ``[B, 3, T, H, W]`` float, normalised, any T >= 1 and H, W >= 32, to
    logits ``[B, classes]``.

    Args:
        config: architecture.
        num_classes: size of the head.
        drop_path: stochastic depth of the last block; it grows linearly from 0 at the first.
        dropout: before the head's linear layer.
        make_block: called for every block with its stage, the architecture and its drop path rate.
    """

    def __init__(
        self,
        config: OGReGConfig,
        num_classes: int,
        drop_path: float = 0.0,
        dropout: float = 0.0,
        make_block: Callable[[Stage, OGReGConfig, float], Block] = build_block,
    ) -> None:
        super().__init__()
        self.config = config
        self.num_classes = num_classes
        dims = [stage.dim for stage in config.stages]
        self.stem = ConvStem(dims[0]) if config.stem == "conv" else PatchStem(dims[0])
        rates = iter(drop_path_rates(drop_path, sum(stage.depth for stage in config.stages)))
        self.stages = nn.ModuleList(
            nn.Sequential(*(make_block(stage, config, next(rates)) for _ in range(stage.depth)))
            for stage in config.stages
        )
        self.merges = nn.ModuleList(PatchMerging(dim) for dim in dims[:-1])
        self.norm = nn.LayerNorm(dims[-1])
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(dims[-1], num_classes)
        self.apply(_init_weights)

    def embed(self, clip: Tensor) -> Tensor:
        return self.stem(clip)

    @torch.no_grad()
    def forward_with_maps(self, clip: Tensor) -> tuple[Tensor, dict[str, BlockMaps]]:
        """Logits and, per block, what Glance and Gaze look at; the normal path is left untouched.

        The Gaze map of a block is its frame dissimilarity per position, its temporal profile d[t]
        and m[t].
        """
        blocks = self.blocks()
        with captured_inputs(blocks) as inputs:
            logits = self(clip)
        maps = {name: blocks[name].maps(blocks[name].norm1(x)) for name, x in inputs.items()}
        return logits, maps

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that must not decay: norms, biases, and MDConv's sharpness and
        offset.
        """
        return {name for name, parameter in self.named_parameters() if parameter.ndim <= 1}


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, (Block, MDConv, SoDA)):
        module.init_weights()


# --- factory -----------------------------------------------------------------------------------


def build_ogreg(
    variant: str,
    num_classes: int,
    *,
    drop_path: float = 0.0,
    dropout: float = 0.0,
    strides: Sequence[int] | None = None,
    **choices: Any,
) -> OGReG:
    """Build a named size.

    Args:
        variant: ``n``, ``t``, ``s`` or ``b``.
        num_classes: size of the head.
        drop_path, dropout: see :class:`OGReG`.
        strides: Glance strides per stage instead of (8, 4, 2, 1), for inputs smaller than 224.
        choices: ``stem``, ``gaze``, ``similarity``, see :class:`OGReGConfig`.
    """
    config = configure(variant, strides, **choices)
    return OGReG(config, num_classes, drop_path, dropout)


def configure(variant: str, strides: Sequence[int] | None, **choices: Any) -> OGReGConfig:
    """A named size with some choices made otherwise, see :func:`build_ogreg`."""
    config = replace(VARIANTS[variant], **choices)
    if strides is None:
        return config
    pairs = zip(config.stages, strides, strict=True)
    return replace(config, stages=tuple(replace(stage, stride=stride) for stage, stride in pairs))
