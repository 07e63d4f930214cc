"""Baselines through torchvision: Video-Swin, MViT, R(2+1)D and S3D.

Papers: "Video Swin Transformer" (arXiv 2106.13230), "Multiscale Vision Transformers" (2104.11227),
"MViTv2" (2112.01526), "A Closer Look at Spatiotemporal Convolutions for Action Recognition"
(1711.11248), "Rethinking Spatiotemporal Feature Learning" (1712.04851).
Upstream: github.com/pytorch/vision, ``torchvision.models.video``, whose modules are used as they are.

The wrappers answer our protocol and add nothing to the computation: with the same weights the logits
are torchvision's to the bit. Names of parameters are torchvision's, except that every classifier is
called ``head``. Differs from torchvision in what can be asked for:

* Video-Swin and R(2+1)D have a dropout before the classifier, as in their papers (off by default);
* Video-Swin may have windows of 16 token frames, as its authors used on Something-Something v2;
* MViT takes other frame counts and sizes, which are then built into its position tables;
* S3D takes clips that are smaller than its last pooling window, which is cut to the grid;
* position tables and the class token do not decay.

Maps: the transformers give the attention that each token receives, taken from the softmax weights of
the normal pass. A convolution has no attention; the norm of its activations after each stage stands
in as ``gaze``.

Notation: B batch, T frames (after the stem: token frames), H W rows and columns, C channels.
Features between stages are given channels last, ``[B, T, H, W, C]``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torchvision.models.video import MViT as TorchvisionMViT
from torchvision.models.video import SwinTransformer3d, r2plus1d_18, s3d
from torchvision.models.video.mvit import MSBlockConfig

from ogreg_core.errors import UsageError
from ogreg_core.models.attention_maps import (
    Grid,
    attention_maps,
    received_by_pooled,
    received_in_windows,
)
from ogreg_core.models.protocol import BlockMaps
from ogreg_core.models.weights import map_swin, rename

__all__ = ["S3D", "MViT", "R2Plus1D", "VideoSwin", "build_torchvision", "map_torchvision"]

# --- shared by the transformers and the convolutional networks -------------------------------


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

# Width, depth and heads per stage of swin3d_t, _s and _b.
_SWIN: dict[str, tuple[int, tuple[int, ...], tuple[int, ...]]] = {
    "swin3d_t": (96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "swin3d_s": (96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "swin3d_b": (128, (2, 2, 18, 2), (4, 8, 16, 32)),
}


class VideoSwin(nn.Module):
    """Video Swin Transformer: ``[B, 3, T, H, W]``, any T >= 1 and H, W >= 32, to ``[B, classes]``.

    Args:
        variant: ``swin3d_t``, ``swin3d_s`` or ``swin3d_b``.
        num_classes: size of the head.
        drop_path: stochastic depth of the last block; it grows linearly from 0 at the first.
        dropout: before the head.
        window: token frames in a window.
    """

    def __init__(
        self,
        variant: str,
        num_classes: int,
        drop_path: float = 0.0,
        dropout: float = 0.0,
        window: int = 8,
    ) -> None:
        super().__init__()
        width, depths, heads = _SWIN[variant]
        body = SwinTransformer3d(
            patch_size=[2, 4, 4],
            embed_dim=width,
            depths=list(depths),
            num_heads=list(heads),
            window_size=[window, 7, 7],
            stochastic_depth_prob=drop_path,
            num_classes=num_classes,
        )
        self.num_classes = num_classes
        self.patch_embed = body.patch_embed
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

# Both sizes: heads, and the stride of the pooled keys and values, of each of the 16 blocks; queries
# are pooled by 2 where a stage begins.
_MVIT_HEADS = (1, *(2,) * 2, *(4,) * 11, *(8,) * 2)
_MVIT_KEY_STRIDES = (8, *(4,) * 2, *(2,) * 11, *(1,) * 2)
_MVIT_STAGE_STARTS = (1, 3, 14)
_MVIT_HEAD_DIM = 96


def _mvit_blocks(variant: str) -> list[MSBlockConfig]:
    """MViT-v1 widens in the MLP before a stage and pools queries only where one begins; v2 widens in
    the attention that begins it and has a pooling everywhere.
    """
    second = variant == "mvit_v2_s"
    widths = [_MVIT_HEAD_DIM * heads for heads in _MVIT_HEADS]
    before, after = [widths[0], *widths[:-1]], [*widths[1:], widths[-1]]
    blocks = []
    for number, (heads, stride) in enumerate(zip(_MVIT_HEADS, _MVIT_KEY_STRIDES, strict=True)):
        starts = number in _MVIT_STAGE_STARTS
        pools = starts or second
        blocks.append(
            MSBlockConfig(
                num_heads=heads,
                input_channels=before[number] if second else widths[number],
                output_channels=widths[number] if second else after[number],
                kernel_q=[3, 3, 3] if pools else [],
                kernel_kv=[3, 3, 3],
                stride_q=([1, 2, 2] if starts else [1, 1, 1]) if pools else [],
                stride_kv=[1, stride, stride],
            )
        )
    return blocks


class MViT(nn.Module):
    """Multiscale Vision Transformer: ``[B, 3, frames, size, size]`` to ``[B, classes]``.

    Args:
        variant: ``mvit_v1_b`` or ``mvit_v2_s``.
        num_classes: size of the head.
        drop_path: stochastic depth of the last block; it grows linearly from 0 at the first.
        dropout: before the head.
        frames, size: of the clips; the position tables are made for them.

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
    ) -> None:
        super().__init__()
        if frames % 2 or size % 4:
            raise UsageError(
                f"{variant} cannot be built for {frames}x{size}x{size}",
                why="its patches are 2 frames deep and 4 pixels wide",
                fix="an even number of frames, and a size that 4 divides",
            )
        second = variant == "mvit_v2_s"
        body = TorchvisionMViT(
            spatial_size=(size, size),
            temporal_size=frames,
            block_setting=_mvit_blocks(variant),
            residual_pool=second,
            residual_with_cls_embed=False,
            rel_pos_embed=second,
            proj_after_attn=second,
            dropout=dropout,
            stochastic_depth_prob=drop_path,
            num_classes=num_classes,
        )
        self.num_classes = num_classes
        self.input = (frames, size, size)
        self.conv_proj = body.conv_proj
        self.pos_encoding = body.pos_encoding
        self.blocks = body.blocks
        self.norm = body.norm
        self.head = body.head

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
        starts = [0, *_MVIT_STAGE_STARTS, len(self.blocks)]
        blocks = list(self.blocks)
        return [blocks[a:b] for a, b in pairwise(starts)]


# --- convolutional networks --------------------------------------------------------------------


class _ConvNet(nn.Module):
    """What R(2+1)D and S3D share: parts that are run one after the other, grouped into stages."""

    num_classes: int

    def parts(self) -> list[dict[str, nn.Module]]:
        """The parts of each stage by name, in order; the stem belongs to the first."""
        raise NotImplementedError

    def classify(self, x: Tensor) -> Tensor:
        """Features ``[B, C, T, H, W]`` of the last stage to logits."""
        raise NotImplementedError

    def check(self, clip: Tensor) -> None:
        """Refuse clips that the network cannot take."""

    def forward_stages(self, clip: Tensor) -> list[Tensor]:
        """Features after each stage, ``[B, T, H, W, C]``."""
        self.check(clip)
        x = clip
        features = []
        for stage in self.parts():
            for part in stage.values():
                x = part(x)
            features.append(rearrange(x, "b c t h w -> b t h w c"))
        return features

    def forward(self, clip: Tensor) -> Tensor:
        return self.classify(rearrange(self.forward_stages(clip)[-1], "b t h w c -> b c t h w"))

    @torch.no_grad()
    def forward_with_maps(self, clip: Tensor) -> tuple[Tensor, dict[str, BlockMaps]]:
        """Logits, and the norm of the activations after each stage: where the network responds. It
        is no attention.
        """
        features = self.forward_stages(clip)
        maps = {
            f"stage{s}": BlockMaps(gaze=torch.linalg.vector_norm(x.float(), dim=-1))
            for s, x in enumerate(features, 1)
        }
        return self.classify(rearrange(features[-1], "b t h w c -> b c t h w")), maps

    def no_weight_decay(self) -> set[str]:
        """Norms and biases."""
        return _exempt(self)

    def layers(self) -> list[list[str]]:
        """Every part that has parameters, then the head."""
        own = {name.rpartition(".")[0] for name, _ in self.named_parameters()}
        names = [name for stage in self.parts() for name in stage]
        learnt = [
            name for name in names if any(f"{found}.".startswith(f"{name}.") for found in own)
        ]
        return [*([name] for name in learnt), ["head"]]

    def stage_blocks(self) -> list[list[nn.Module]]:
        """The parts of each stage."""
        return [list(stage.values()) for stage in self.parts()]


class R2Plus1D(_ConvNet):
    """R(2+1)D-18: ``[B, 3, T, H, W]``, any T >= 1 and H, W >= 32, to ``[B, classes]``.

    Args:
        num_classes: size of the head.
        dropout: before the head.
    """

    def __init__(self, num_classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        body = r2plus1d_18(num_classes=num_classes)
        self.num_classes = num_classes
        self.stem = body.stem
        self.layer1, self.layer2 = body.layer1, body.layer2
        self.layer3, self.layer4 = body.layer3, body.layer4
        self.avgpool = body.avgpool
        self.dropout = nn.Dropout(dropout)
        self.head = body.fc

    def parts(self) -> list[dict[str, nn.Module]]:
        stages: list[dict[str, nn.Module]] = [
            {f"layer{number}.{b}": block for b, block in enumerate(layer)}
            for number, layer in enumerate((self.layer1, self.layer2, self.layer3, self.layer4), 1)
        ]
        stages[0] = {"stem": self.stem, **stages[0]}
        return stages

    def classify(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.avgpool(x).flatten(1)))


class S3D(_ConvNet):
    """S3D: ``[B, 3, T, H, W]``, any T >= 5 and H, W >= 32, to ``[B, classes]``.

    Args:
        num_classes: size of the head.
        dropout: before the head.
    """

    def __init__(self, num_classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        body = s3d(num_classes=num_classes, dropout=dropout)
        self.num_classes = num_classes
        self.features = body.features
        self.avgpool = body.avgpool
        self.head = body.classifier

    def parts(self) -> list[dict[str, nn.Module]]:
        named = [(f"features.{n}", part) for n, part in enumerate(self.features)]
        # A stage ends before the pooling that begins the next one.
        borders = (0, 4, 7, 13, len(named))
        return [dict(named[a:b]) for a, b in pairwise(borders)]

    def check(self, clip: Tensor) -> None:
        if clip.shape[2] < _S3D_FRAMES:
            raise UsageError(
                f"S3D cannot take a clip of {clip.shape[2]} frames",
                why=f"its poolings leave nothing of less than {_S3D_FRAMES}",
                fix=f"{_S3D_FRAMES} frames or more",
            )

    def classify(self, x: Tensor) -> Tensor:
        window = [min(k, n) for k, n in zip(self.avgpool.kernel_size, x.shape[2:], strict=True)]
        pooled = F.avg_pool3d(x, window, stride=self.avgpool.stride)
        return self.head(pooled).mean(dim=(2, 3, 4))


_S3D_FRAMES = 5


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
) -> nn.Module:
    """Build a model by torchvision's name.

    Args:
        variant: ``swin3d_t``, ``swin3d_s``, ``swin3d_b``, ``mvit_v1_b``, ``mvit_v2_s``,
            ``r2plus1d_18`` or ``s3d``.
        num_classes: size of the head.
        drop_path: stochastic depth of the last block; transformers only.
        dropout: before the head.
        frames, size: of the clips; MViT only, by default 16 and 224.
        window: token frames in a window; Video-Swin only.

    Raises:
        UsageError: no such variant, or an argument that it does not have.
    """
    mvit, swin = variant.startswith("mvit_"), variant in _SWIN
    if not swin and window != 8:
        raise _has_no(variant, "window")
    if not mvit and (frames or size):
        raise _has_no(variant, "frames or size of its own")
    if swin:
        return VideoSwin(variant, num_classes, drop_path, dropout, window)
    if mvit:
        return MViT(variant, num_classes, drop_path, dropout, frames or 16, size or 224)
    if drop_path:
        raise _has_no(variant, "drop_path", fix="model.drop_path=0.0")
    return {"r2plus1d_18": R2Plus1D, "s3d": S3D}[variant](num_classes, dropout)


def _has_no(variant: str, what: str, fix: str = "") -> UsageError:
    return UsageError(
        f"{variant} has no {what}", why="its architecture knows no such thing", fix=fix
    )
