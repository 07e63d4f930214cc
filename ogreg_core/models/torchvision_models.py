"""Baselines through torchvision: Video-Swin and MViT, and the factory of these and of the convolutional
ones (convnets.py).

Papers: "Video Swin Transformer" (arXiv 2106.13230), "Multiscale Vision Transformers" (2104.11227),
"MViTv2" (2112.01526).
Upstream: github.com/pytorch/vision, ``torchvision.models.video``, whose modules are used as they are.

The wrappers answer our protocol and add nothing to the computation: with the same weights the logits
are torchvision's to the bit. Names of parameters are torchvision's, except that every classifier is
called ``head``. Differs from torchvision in what can be asked for:

* Video-Swin has a dropout before the classifier, as in its paper (off by default);
* Video-Swin may have windows of 16 token frames, as its authors used on Something-Something v2;
* MViT takes other frame counts and sizes, which are then built into its position tables;
* both may begin with the convolutional stem of OG-ReG instead of their own, on the same grid;
* position tables and the class token do not decay.

The sizes ``n`` are ours: the same modules at the size of ogreg-n, for clips of 48 to 112 pixels.

Maps: the attention that each token receives, taken from the softmax weights of the normal pass.

Notation: B batch, T frames (after the stem: token frames), H W rows and columns, C channels.
Features between stages are given channels last, ``[B, T, H, W, C]``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Literal, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torchvision.models.video import MViT as TorchvisionMViT
from torchvision.models.video import SwinTransformer3d
from torchvision.models.video.mvit import MSBlockConfig

from ogreg_core.errors import UsageError
from ogreg_core.models.attention_maps import (
    Grid,
    attention_maps,
    received_by_pooled,
    received_in_windows,
)
from ogreg_core.models.convnets import S3D, R2Plus1D
from ogreg_core.models.protocol import BlockMaps
from ogreg_core.models.stems import ConvStem
from ogreg_core.models.weights import map_swin, rename

__all__ = ["SWIN", "MViT", "VideoSwin", "build_torchvision", "map_torchvision"]

StemKind = Literal["own", "conv"]

# --- shared ------------------------------------------------------------------------------------


def _block_names(stages: Sequence[Sequence[nn.Module]]) -> dict[str, nn.Module]:
    """Blocks by names such as ``stage3.block2``."""
    return {
        f"stage{s}.block{b}": block
        for s, stage in enumerate(stages, 1)
        for b, block in enumerate(stage, 1)
    }


def _exempt(model: nn.Module, tables: Sequence[str] = ()) -> set[str]:
    """Norms, biases and the named position tables."""
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim <= 1 or any(table in name for table in tables)
    }


# --- Video-Swin --------------------------------------------------------------------------------


@dataclass(frozen=True)
class SwinSize:
    """Width of the first stage, blocks and heads of each, and rows and columns of a window."""

    dim: int
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    side: int = 7


# Of n: a pair of blocks in every stage, the second with shifted windows. Its windows are an eighth of
# the grid of 224 pixels in rows and columns at the others, a quarter of that of 64 pixels here: the
# third stage sees all of a clip of 64 pixels at once, as the last one does of 224.
SWIN = {
    "swin3d_n": SwinSize(32, (2, 2, 2, 2), (1, 2, 4, 8), side=4),
    "swin3d_t": SwinSize(96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "swin3d_s": SwinSize(96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "swin3d_b": SwinSize(128, (2, 2, 18, 2), (4, 8, 16, 32)),
}


class _SwinConvStem(ConvStem):
    """Tells its grid as torchvision's patch embedding does."""

    tuple_patch_size = (2, 4, 4)


class VideoSwin(nn.Module):
    """Video Swin Transformer: ``[B, 3, T, H, W]``, any T >= 1 and H, W >= 32, to ``[B, classes]``.

    Args:
        variant: key of ``SWIN``.
        num_classes: size of the head.
        drop_path: stochastic depth of the last block; it grows linearly from 0 at the first.
        dropout: before the head.
        window: token frames in a window.
        stem: ``own`` patches, or ``conv`` for :class:`ogreg_core.models.stems.ConvStem`.
    """

    def __init__(
        self,
        variant: str,
        num_classes: int,
        drop_path: float = 0.0,
        dropout: float = 0.0,
        window: int = 8,
        stem: StemKind = "own",
    ) -> None:
        super().__init__()
        size = SWIN[variant]
        body = SwinTransformer3d(
            patch_size=[2, 4, 4],
            embed_dim=size.dim,
            depths=list(size.depths),
            num_heads=list(size.heads),
            window_size=[window, size.side, size.side],
            stochastic_depth_prob=drop_path,
            num_classes=num_classes,
        )
        self.num_classes = num_classes
        self.patch_embed = _SwinConvStem(size.dim) if stem == "conv" else body.patch_embed
        self.features = body.features
        self.norm = body.norm
        self.avgpool = body.avgpool
        self.dropout = nn.Dropout(dropout)
        self.head = body.head

    def forward_stages(self, clip: Tensor) -> list[Tensor]:
        """Features after each stage, ``[B, T/2, H/4, W/4, C]`` halving in space."""
        x = self.patch_embed(clip)
        features = []
        # Stages at even places, mergings between them.
        for number, part in enumerate(self.features):
            x = part(x)
            if number % 2 == 0:
                features.append(x)
        return features

    def forward(self, clip: Tensor) -> Tensor:
        x = self.norm(self.forward_stages(clip)[-1])
        x = self.avgpool(rearrange(x, "b t h w c -> b c t h w"))
        return self.head(self.dropout(torch.flatten(x, 1)))

    @torch.no_grad()
    def forward_with_maps(self, clip: Tensor) -> tuple[Tensor, dict[str, BlockMaps]]:
        """Logits, and the attention that each token receives within its window, per block."""
        attentions = {
            name: cast(nn.Module, block.attn)
            for name, block in _block_names(self.stage_blocks()).items()
        }

        def received(module: Any, arguments: tuple[Any, ...], weights: Tensor) -> Tensor:
            grid = cast(Grid, tuple(arguments[0].shape[1:4]))
            return received_in_windows(weights, grid, module.window_size, module.shift_size)

        with attention_maps(attentions, received) as maps:
            logits = self(clip)
        return logits, maps

    def no_weight_decay(self) -> set[str]:
        """Norms, biases and relative position tables."""
        return _exempt(self, ("relative_position_bias_table",))

    def layers(self) -> list[list[str]]:
        """Patch embedding, every block (the first of a stage with the merging before it), head."""
        layers = [["patch_embed"]]
        for s, stage in enumerate(self.stage_blocks()):
            blocks = [[f"features.{2 * s}.{b}"] for b in range(len(stage))]
            if s:
                blocks[0].append(f"features.{2 * s - 1}")
            layers += blocks
        layers[-1].append("norm")
        return [*layers, ["head"]]

    def stage_blocks(self) -> list[list[nn.Module]]:
        """The blocks of each stage."""
        return [list(stage.children()) for stage in list(self.features)[::2]]


# --- MViT --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MViTStage:
    """Blocks and heads of a stage, and the stride of its pooled keys and values; queries are pooled by 2
    where it begins.
    """

    depth: int
    heads: int
    key_stride: int


@dataclass(frozen=True)
class MViTSize:
    """Stages, channels of a head in all of them, and whether it is of the second version."""

    stages: tuple[MViTStage, ...]
    head_dim: int
    second: bool


_LARGE = (MViTStage(1, 1, 8), MViTStage(2, 2, 4), MViTStage(11, 4, 2), MViTStage(2, 8, 1))
# Of n: keys and values keep 4 x 4 positions of a clip of 64 pixels, 7 x 7 of one of 112. Two blocks in
# the last stage: of what the last block makes only the class token is read.
_SMALL = (MViTStage(1, 1, 4), MViTStage(1, 2, 2), MViTStage(2, 4, 1), MViTStage(2, 8, 1))
MVIT = {
    "mvit_v1_n": MViTSize(_SMALL, head_dim=32, second=False),
    "mvit_v1_b": MViTSize(_LARGE, head_dim=96, second=False),
    "mvit_v2_n": MViTSize(_SMALL, head_dim=32, second=True),
    "mvit_v2_s": MViTSize(_LARGE, head_dim=96, second=True),
}


def _mvit_blocks(size: MViTSize) -> list[MSBlockConfig]:
    """MViT-v1 widens in the MLP before a stage and pools queries only where one begins; v2 widens in
    the attention that begins it and has a pooling everywhere.
    """
    widths = [size.head_dim * stage.heads for stage in size.stages for _ in range(stage.depth)]
    before, after = [widths[0], *widths[:-1]], [*widths[1:], widths[-1]]
    blocks: list[MSBlockConfig] = []
    for stage in size.stages:
        for place in range(stage.depth):
            number = len(blocks)
            starts = place == 0 and number > 0
            pools = starts or size.second
            blocks.append(
                MSBlockConfig(
                    num_heads=stage.heads,
                    input_channels=before[number] if size.second else widths[number],
                    output_channels=widths[number] if size.second else after[number],
                    kernel_q=[3, 3, 3] if pools else [],
                    kernel_kv=[3, 3, 3],
                    stride_q=([1, 2, 2] if starts else [1, 1, 1]) if pools else [],
                    stride_kv=[1, stage.key_stride, stage.key_stride],
                )
            )
    return blocks


class _MViTConvStem(ConvStem):
    """Channels first, as the convolution in whose place it stands: ``[B, 3, T, H, W] -> [B, C, T/2, H/4,
    W/4]``.
    """

    def forward(self, clip: Tensor) -> Tensor:
        return rearrange(super().forward(clip), "b t h w c -> b c t h w")


class MViT(nn.Module):
    """Multiscale Vision Transformer: ``[B, 3, frames, size, size]`` to ``[B, classes]``.

    Args:
        variant: key of ``MVIT``.
        num_classes: size of the head.
        drop_path: stochastic depth of the last block; it grows linearly from 0 at the first.
        dropout: before the head.
        frames, size: of the clips; the position tables are made for them.
        stem: its ``own`` convolution, or ``conv`` for :class:`ogreg_core.models.stems.ConvStem`; the
            class token and the positions stay.

    Raises:
        UsageError: frames or pixels that the patches do not divide.
    """

    def __init__(
        self,
        variant: str,
        num_classes: int,
        drop_path: float = 0.0,
        dropout: float = 0.0,
        frames: int = 16,
        size: int = 224,
        stem: StemKind = "own",
    ) -> None:
        super().__init__()
        if frames % 2 or size % 4:
            raise UsageError(
                f"{variant} cannot be built for {frames}x{size}x{size}",
                why="its patches are 2 frames deep and 4 pixels wide",
                fix="an even number of frames, and a size that 4 divides",
            )
        layout = MVIT[variant]
        body = TorchvisionMViT(
            spatial_size=(size, size),
            temporal_size=frames,
            block_setting=_mvit_blocks(layout),
            residual_pool=layout.second,
            residual_with_cls_embed=False,
            rel_pos_embed=layout.second,
            proj_after_attn=layout.second,
            dropout=dropout,
            stochastic_depth_prob=drop_path,
            num_classes=num_classes,
        )
        self.num_classes = num_classes
        self.input = (frames, size, size)
        width = layout.stages[0].heads * layout.head_dim
        self.conv_proj = _MViTConvStem(width) if stem == "conv" else body.conv_proj
        self.pos_encoding = body.pos_encoding
        self.blocks = body.blocks
        self.norm = body.norm
        self.head = body.head
        self._starts = [0, *accumulate(stage.depth for stage in layout.stages)]

    def _run(self, clip: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The class token after the last block, ``[B, C]``, and the features after each stage."""
        if tuple(clip.shape[2:]) != self.input:
            given = "x".join(str(n) for n in clip.shape[2:])
            raise UsageError(
                f"a clip of {given} does not fit",
                why=f"the position tables are made for {'x'.join(map(str, self.input))}",
                fix="build the model for clips of that shape",
            )
        x = self.pos_encoding(rearrange(self.conv_proj(clip), "b c t h w -> b (t h w) c"))
        grid = (self.pos_encoding.temporal_size, *self.pos_encoding.spatial_size)
        features = []
        for stage in self.stage_blocks():
            for block in stage:
                x, grid = block(x, grid)
            t, h, w = grid
            features.append(rearrange(x[:, 1:], "b (t h w) c -> b t h w c", t=t, h=h, w=w))
        return x, features

    def forward_stages(self, clip: Tensor) -> list[Tensor]:
        """Features after each stage without the class token, ``[B, T/2, H/4, W/4, C]`` halving in
        space.
        """
        return self._run(clip)[1]

    def forward(self, clip: Tensor) -> Tensor:
        return self.head(self.norm(self._run(clip)[0])[:, 0])

    @torch.no_grad()
    def forward_with_maps(self, clip: Tensor) -> tuple[Tensor, dict[str, BlockMaps]]:
        """Logits, and the attention that each token receives, per block, on the grid that the block
        gets; keys are pooled, so the map is smoother than that.
        """
        attentions = {
            name: cast(nn.Module, block.attn)
            for name, block in _block_names(self.stage_blocks()).items()
        }

        def received(module: Any, arguments: tuple[Any, ...], weights: Tensor) -> Tensor:
            grid = arguments[1]
            strides = module.pool_k.pool.stride
            keys = cast(Grid, tuple(math.ceil(n / s) for n, s in zip(grid, strides, strict=True)))
            return received_by_pooled(weights, keys, grid)

        with attention_maps(attentions, received) as maps:
            logits = self(clip)
        return logits, maps

    def no_weight_decay(self) -> set[str]:
        """Norms, biases, position tables and the class token."""
        return _exempt(self, ("pos_encoding.", ".rel_pos_"))

    def layers(self) -> list[list[str]]:
        """Patch embedding with its positions, every block, head."""
        blocks = [[f"blocks.{b}"] for b in range(len(self.blocks))]
        blocks[-1].append("norm")
        return [["conv_proj", "pos_encoding"], *blocks, ["head"]]

    def stage_blocks(self) -> list[list[nn.Module]]:
        """The blocks of each stage; each is called with tokens and their grid."""
        blocks = list(self.blocks)
        return [blocks[a:b] for a, b in pairwise(self._starts)]


# --- foreign checkpoints -----------------------------------------------------------------------


def map_torchvision(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of foreign checkpoints to those of this file.

    * torchvision's own video models: only the classifier has another name;
    * Swin and Video-Swin in all spellings of :func:`map_swin`; the position tables of an image model
      are repeated over time, its index buffers are left out;
    * MViT as in SlowFast (github.com/facebookresearch/SlowFast), with joint query, key and value.
    """
    plain = {name.removeprefix("backbone."): tensor for name, tensor in state.items()}
    if "cls_token" in plain:
        return _from_slowfast(plain)
    if "patch_embed.proj.weight" in plain or "features.0.0.weight" in plain:
        return _from_swin(plain)
    return {re.sub(r"^(fc|classifier)\.", "head.", name): tensor for name, tensor in state.items()}


# Rows of the position table of a window of 7x7 patches, and offsets in time of one of 8 frames.
_IMAGE_TABLE_ROWS = 13 * 13
_TIME_OFFSETS = 2 * 8 - 1


def _from_swin(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By way of OG-ReG's names, which :func:`map_swin` knows how to reach from every spelling."""
    mapped = {}
    image = any(
        name.endswith("relative_position_bias_table") and tensor.shape[0] == _IMAGE_TABLE_ROWS
        for name, tensor in state.items()
    )
    for name, tensor in map_swin(state).items():
        if image and name.endswith(("relative_position_index", "attn_mask")):
            continue
        if image and name.endswith("relative_position_bias_table"):
            tensor = tensor.repeat(_TIME_OFFSETS, 1)
        name = re.sub(r"^stem\.", "patch_embed.", name)
        name = re.sub(
            r"^stages\.(\d+)\.(\d+)\.", lambda m: f"features.{2 * int(m[1])}.{m[2]}.", name
        )
        name = re.sub(r"^merges\.(\d+)\.", lambda m: f"features.{2 * int(m[1]) + 1}.", name)
        name = name.replace(".glance.qkv.", ".attn.qkv.")
        mapped[re.sub(r"^(features\.\d+\.\d+)\.proj\.", r"\1.attn.proj.", name)] = tensor
    return mapped


_SLOWFAST = (
    (r"^cls_token$", "pos_encoding.class_token"),
    (r"^pos_embed_class$", "pos_encoding.class_pos"),
    (r"^pos_embed_(spatial|temporal)$", r"pos_encoding.\1_pos"),
    (r"^patch_embed\.proj\.", "conv_proj."),
    (r"^(blocks\.\d+)\.proj\.", r"\1.project."),
    (r"\.attn\.proj\.", ".attn.project.0."),
    (r"\.attn\.pool_([qkv])\.", r".attn.pool_\1.pool."),
    (r"\.attn\.norm_([qkv])\.", r".attn.pool_\1.norm_act.0."),
    (r"\.mlp\.fc1\.", ".mlp.0."),
    (r"\.mlp\.fc2\.", ".mlp.3."),
    (r"^head\.projection\.", "head.1."),
)


def _from_slowfast(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    mapped = {}
    for name, tensor in state.items():
        name = rename(name, _SLOWFAST)
        if name in ("pos_encoding.class_token", "pos_encoding.class_pos"):
            tensor = tensor.flatten()
        elif name.startswith("pos_encoding."):
            tensor = tensor.squeeze(0)
        mapped[name] = tensor
    return mapped


# --- factory -----------------------------------------------------------------------------------


def build_torchvision(
    variant: str,
    num_classes: int,
    *,
    drop_path: float = 0.0,
    dropout: float = 0.0,
    frames: int | None = None,
    size: int | None = None,
    window: int = 8,
    stem: StemKind = "own",
) -> nn.Module:
    """Build a model by torchvision's name.

    Args:
        variant: key of ``SWIN`` or ``MVIT``, ``r2plus1d_18``, ``s3d``, or one of ours, ``r2plus1d_n``
            and ``s3d_n``.
        num_classes: size of the head.
        drop_path: stochastic depth of the last block; transformers only.
        dropout: before the head.
        frames, size: of the clips; MViT only, by default 16 and 224.
        window: token frames in a window; Video-Swin only.
        stem: ``own`` or ``conv``; transformers only.

    Raises:
        UsageError: no such variant, or an argument that it does not have.
    """
    mvit, swin = variant in MVIT, variant in SWIN
    if not swin and window != 8:
        raise _has_no(variant, "window")
    if not mvit and (frames or size):
        raise _has_no(variant, "frames or size of its own")
    if swin:
        return VideoSwin(variant, num_classes, drop_path, dropout, window, stem)
    if mvit:
        return MViT(variant, num_classes, drop_path, dropout, frames or 16, size or 224, stem)
    if stem != "own":
        raise _has_no(variant, "other stem")
    if drop_path:
        raise _has_no(variant, "drop_path", fix="model.drop_path=0.0")
    family = R2Plus1D if variant.startswith("r2plus1d_") else S3D
    return family(variant, num_classes, dropout)


def _has_no(variant: str, what: str, fix: str = "") -> UsageError:
    return UsageError(
        f"{variant} has no {what}", why="its architecture knows no such thing", fix=fix
    )
