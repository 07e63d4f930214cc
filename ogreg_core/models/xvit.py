"""X-ViT: Space-time Mixing Attention for Video Transformer.

Paper: arXiv 2106.05968 (Bulat et al., NeurIPS 2021). Code of the authors:
https://github.com/1adrianb/video-transformers, commit 82ca176; this file is written from its
description and reproduces its outputs (``tests/benchmarks/parity.py``).

A Vision Transformer runs over every frame. Before the attention product some channels of the keys
and values are exchanged with those of neighbouring frames, which costs nothing; the class tokens of
all frames meet in one more transformer block, the temporal attention.

Differs from the released code: three counts that disagree there are separate settings here, with
the values of the released Kinetics configuration as defaults (``segment`` 8, ``shift_divisor`` 8,
``time_rows`` 8); any number of frames runs (the last segment may be shorter, the temporal embedding
is repeated per clip); the linear layer that is never used does not exist; the average head averages
over the whole clip, not over each segment.

From the paper and not in the released code: temporal windows wider than one frame and summary
tokens. Ours there, since the paper leaves it open: a wider window divides the channels that a window
of one frame would exchange evenly among the distances, nearest first; a summary token is the mean of
a frame's patch tokens without the class token, taken before the exchange.

Notation: B batch, T frames, N tokens of a frame (the class token first), h w rows and columns of
patches, C channels, M heads, D = C/M, L frames of a segment. Layout inside the network:
``[B, T, N, C]``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from ogreg_core.errors import UsageError
from ogreg_core.models.layers import DropPath, Mlp, captured_inputs, drop_path_rates
from ogreg_core.models.protocol import BlockMaps

__all__ = [
    "VARIANTS",
    "Block",
    "MixingAttention",
    "TemporalAttention",
    "XViT",
    "XViTConfig",
    "blocks_of",
    "build_xvit",
    "mix_frames",
    "resize_positions",
    "window_parts",
]


# --- space-time mixing as pure functions of tensors ----------------------------------------------


def window_parts(channels: int, divisor: int, window: int) -> list[tuple[int, int]]:
    """Which channels come from which frame.

    Counted over all heads together, ``channels // divisor`` come from later frames, then as many
    from earlier ones, the rest from the frame itself.

    Args:
        channels: C.
        divisor: shift divisor, at least 2.
        window: largest distance in frames; 0 leaves every channel where it is.

    Returns:
        Pairs of temporal offset and number of channels, in the order of the channels. For a window
        of 1: ``[(1, f), (-1, f), (0, C - 2f)]``.
    """
    if window == 0:
        return [(0, channels)]
    share, extra = divmod(channels // divisor, window)
    counts = [share + (distance <= extra) for distance in range(1, window + 1)]
    later = list(enumerate(counts, 1))
    earlier = [(-distance, count) for distance, count in later]
    return [*later, *earlier, (0, channels - 2 * sum(counts))]


def mix_frames(x: Tensor, parts: Sequence[tuple[int, int]], segment: int = 0) -> Tensor:
    """Exchange channels between frames; a neighbour outside the segment counts as zeros.

    Args:
        x: keys or values ``[B, T, N, C]``.
        parts: see :func:`window_parts`; the counts sum to C.
        segment: frames L among which channels are exchanged; 0 is the whole clip.

    Returns:
        ``[B, T, N, C]``.
    """
    batch, frames = x.shape[:2]
    length = min(segment or frames, frames)
    whole = F.pad(x, (0, 0, 0, 0, 0, -frames % length))
    segments = rearrange(whole, "b (s l) n c -> (b s) l n c", l=length)
    chunks = segments.split([count for _, count in parts], dim=-1)
    mixed = [_take(chunk, offset) for chunk, (offset, _) in zip(chunks, parts, strict=True)]
    return rearrange(torch.cat(mixed, dim=-1), "(b s) l n c -> b (s l) n c", b=batch)[:, :frames]


def _take(x: Tensor, offset: int) -> Tensor:
    """Frame t + offset in the place of frame t of ``[B, L, N, C]``; zeros where there is none."""
    if offset == 0:
        return x
    if abs(offset) >= x.shape[1]:
        return torch.zeros_like(x)
    # A negative amount of padding cuts off.
    return F.pad(x, (0, 0, 0, 0, -offset, offset))


def resize_positions(table: Tensor, rows: int, columns: int) -> Tensor:
    """Bicubic interpolation of a position table ``[1, 1 + G*G, C]`` to ``[1, 1 + rows*columns, C]``;
    the first row, of the class token, stays.
    """
    side = math.isqrt(table.shape[1] - 1)
    if (rows, columns) == (side, side):
        return table
    grid = rearrange(table[:, 1:], "1 (h w) c -> 1 c h w", h=side)
    grid = F.interpolate(grid, size=(rows, columns), mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1], rearrange(grid, "1 c h w -> 1 (h w) c")], dim=1)


# --- configuration -----------------------------------------------------------------------------

Where = Literal["none", "first-half", "second-half", "odd", "all"]


@dataclass(frozen=True)
class XViTConfig:
    """All choices of the architecture.

    Args:
        dim, depth, heads, patch: of the Vision Transformer.
        table_size: picture size of the position table, pixels; other sizes interpolate it.
        time_rows: rows of the temporal embedding; frame t gets row t modulo this.
        segment: frames among which channels are exchanged; 0 is the whole clip.
        shift_divisor: one part in so many comes from later frames, and one from earlier ones.
        window: how many frames away channels are taken from; 0 is a Vision Transformer per frame.
        mixing: blocks that exchange channels, a word or indices; ``odd`` is the second, fourth ...
        summary: blocks whose keys and values also hold the summary tokens of all frames.
        aggregation: ``attention`` (transformer block over the frames) or ``average`` of the logits.
        hidden: width of the layer before the classifier of the attention; 0 is ``dim``.

    Raises:
        UsageError: a value that makes no sense, or a window that would leave a frame no channels.
    """

    dim: int
    depth: int
    heads: int
    patch: int
    table_size: int = 224
    time_rows: int = 8
    segment: int = 8
    shift_divisor: int = 8
    window: int = 1
    mixing: Where | Sequence[int] = "all"
    summary: Where | Sequence[int] = "none"
    aggregation: Literal["attention", "average"] = "attention"
    hidden: int = 0

    def __post_init__(self) -> None:
        least = {"time_rows": 1, "segment": 0, "shift_divisor": 2, "window": 0}
        for name, low in {**least, "table_size": self.patch}.items():
            if getattr(self, name) < low:
                raise UsageError(
                    f"model option {name} is {getattr(self, name)}", why=f"it must be {low} or more"
                )
        share = self.dim // self.shift_divisor
        if self.window > share:
            raise UsageError(
                f"model option window is {self.window}",
                why=f"{self.dim} channels divided by shift_divisor {self.shift_divisor} "
                f"are {share} for the frames on one side",
                fix=f"take a window of at most {share}",
            )

    def parts(self, block: int) -> list[tuple[int, int]]:
        """:func:`window_parts` of a block, counted from 0."""
        window = self.window if block in blocks_of(self.mixing, self.depth) else 0
        return window_parts(self.dim, self.shift_divisor, window)


def blocks_of(where: str | Sequence[int], depth: int) -> Sequence[int]:
    """Indices of the blocks that a word names."""
    if not isinstance(where, str):
        return where
    return {
        "none": range(0),
        "first-half": range(depth // 2),
        "second-half": range(depth // 2, depth),
        "odd": range(1, depth, 2),
        "all": range(depth),
    }[where]


# n is ours, at the size of ogreg-n: patches of 8 leave 8 x 8 tokens of 64 pixels. Segment and shift
# divisor are those that the authors released for motion, on Something-Something v2 with 16 frames.
VARIANTS = {
    "n": XViTConfig(
        dim=128,
        depth=4,
        heads=4,
        patch=8,
        table_size=64,
        time_rows=16,
        segment=16,
        shift_divisor=4,
    ),
    "b16": XViTConfig(dim=768, depth=12, heads=12, patch=16),
    "b32": XViTConfig(dim=768, depth=12, heads=12, patch=32),
    "l16": XViTConfig(dim=1024, depth=24, heads=16, patch=16),
    "l32": XViTConfig(dim=1024, depth=24, heads=16, patch=32),
}


# --- blocks ------------------------------------------------------------------------------------


class MixingAttention(nn.Module):
    """Attention inside each frame over keys and values that hold channels of its neighbours.

    Args:
        dim: channels C.
        heads: attention heads.
        bias: whether query, key and value have biases.
        parts: exchange of channels, see :func:`window_parts`; empty for none.
        segment: see :func:`mix_frames`.
        summary: append one summary token per frame of the clip to every frame's keys and values.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        bias: bool = True,
        parts: Sequence[tuple[int, int]] = (),
        segment: int = 0,
        summary: bool = False,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.parts = [part for part in parts if part[1]]
        self.mixes = any(offset for offset, _ in self.parts)
        self.segment = segment
        self.summary = summary
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.proj = nn.Linear(dim, dim)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``[B, T, N, C]`` to query ``[B*T, M, N, D]``, key and value ``[B*T, M, N or N + T, D]``."""
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (
            rearrange(z, "b t n (m d) -> (b t) m n d", m=self.heads)
            for z in (query, self._across_frames(key), self._across_frames(value))
        )
        return q, k, v

    def _across_frames(self, x: Tensor) -> Tensor:
        mixed = mix_frames(x, self.parts, self.segment) if self.mixes else x
        if not self.summary:
            return mixed
        # The projection is linear: the mean of projected tokens is the projected mean token.
        summaries = reduce(x[:, :, 1:], "b t n c -> b 1 t c", "mean")
        return torch.cat([mixed, summaries.expand(-1, x.shape[1], -1, -1)], dim=2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(rearrange(out, "(b t) m n d -> b t n (m d)", t=x.shape[1]))

    def class_attention(self, x: Tensor) -> Tensor:
        """How the class token's attention is spread over the tokens of its frame, mean over heads:
        ``[B, T, N]``, the class token first; summary tokens are left out.
        """
        q, k, _ = self.project(x)
        weights = torch.softmax(q[:, :, :1] @ k.transpose(-2, -1) * q.shape[-1] ** -0.5, dim=-1)
        row = reduce(weights, "bt m 1 k -> bt k", "mean")[:, : x.shape[2]]
        return rearrange(row, "(b t) n -> b t n", t=x.shape[1])


class Block(nn.Module):
    """Pre-norm transformer block: ``x + Attention(LN(x))``, then ``x + MLP(LN(x))``.

    Args:
        dim, heads: width and attention heads.
        eps: of the layer norms.
        drop_path: stochastic depth.
        attention: keyword arguments of :class:`MixingAttention`.
    """

    def __init__(
        self, dim: int, heads: int, *, eps: float, drop_path: float = 0.0, **attention: Any
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = MixingAttention(dim, heads, **attention)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class TemporalAttention(nn.Module):
    """Temporal attention: a class token and the frames' vectors through one block without positions,
    then LayerNorm, linear layer and GELU: ``[B, T, C] -> [B, hidden]``.
    """

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.block = Block(dim, heads, eps=1e-5, bias=False)
        self.norm = nn.LayerNorm(dim)
        self.hidden = nn.Linear(dim, hidden)

    def tokens(self, frames: Tensor) -> Tensor:
        """The block's input, the class token before the frames: ``[B, 1, 1 + T, C]``."""
        tokens = torch.cat([self.cls_token.expand(frames.shape[0], -1, -1), frames], dim=1)
        return rearrange(tokens, "b n c -> b 1 n c")

    def forward(self, frames: Tensor) -> Tensor:
        out = self.block(self.tokens(frames))
        return F.gelu(self.hidden(self.norm(out[:, 0, 0])))


# --- the model ---------------------------------------------------------------------------------


class XViT(nn.Module):
    """X-ViT: ``[B, 3, T, H, W]`` float, normalised, any T >= 1 and H, W of at least one patch (what
    exceeds whole patches is cut off), to logits ``[B, classes]``.

    Args:
        config: architecture.
        num_classes: size of the head.
        drop_path: stochastic depth of the last block; it grows linearly from 0 at the first.
        dropout: on the frames' vectors, and before the head's linear layer if there is another
            one before it.
    """

    def __init__(
        self, config: XViTConfig, num_classes: int, drop_path: float = 0.0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.config = config
        self.num_classes = num_classes
        dim, patches = config.dim, (config.table_size // config.patch) ** 2
        self.patch_embed = nn.Conv2d(3, dim, kernel_size=config.patch, stride=config.patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + patches, dim))
        self.temp_embed = nn.Parameter(torch.zeros(1, config.time_rows, 1, dim))
        rates = drop_path_rates(drop_path, config.depth)
        self.blocks = nn.ModuleList(
            Block(
                dim,
                config.heads,
                eps=1e-6,
                drop_path=rate,
                parts=config.parts(number),
                segment=config.segment,
                summary=number in blocks_of(config.summary, config.depth),
            )
            for number, rate in enumerate(rates)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.dropout = nn.Dropout(dropout)
        self.temporal: TemporalAttention | None = None
        width = dim
        if config.aggregation == "attention":
            width = config.hidden or dim
            self.temporal = TemporalAttention(dim, config.heads, width)
        self.head = nn.Linear(width, num_classes)
        self._initialise()

    def _initialise(self) -> None:
        """As released: the Vision Transformer as in timm, the temporal attention as torch does."""
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        if self.temporal is None:
            nn.init.normal_(self.head.weight, std=0.001)
            nn.init.zeros_(self.head.bias)

    def embed(self, clip: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Tokens of every frame ``[B, T, N, C]``, and rows and columns of the patches.

        Raises:
            UsageError: a picture smaller than a patch.
        """
        batch, _, frames, height, width = clip.shape
        if min(height, width) < self.config.patch:
            raise UsageError(
                f"the pictures have {height}x{width} pixels",
                why=f"a patch has {self.config.patch}x{self.config.patch}",
            )
        images = self.patch_embed(rearrange(clip, "b c t h w -> (b t) c h w"))
        rows, columns = images.shape[-2:]
        patches = rearrange(images, "(b t) c h w -> b t (h w) c", b=batch)
        cls_token = self.cls_token.unsqueeze(1).expand(batch, frames, -1, -1)
        x = torch.cat([cls_token, patches], dim=2)
        x = x + resize_positions(self.pos_embed, rows, columns).unsqueeze(1)
        times = self.temp_embed.repeat(1, math.ceil(frames / self.config.time_rows), 1, 1)
        return x + times[:, :frames], (rows, columns)

    def aggregate(self, frames: Tensor) -> Tensor:
        """Vectors of the frames ``[B, T, C]`` to logits ``[B, classes]``."""
        frames = self.dropout(frames)
        if self.temporal is None:
            return self.head(frames).mean(dim=1)
        return self.head(self.dropout(self.temporal(frames)))

    def forward(self, clip: Tensor) -> Tensor:
        x, _ = self.embed(clip)
        for block in self.blocks:
            x = block(x)
        return self.aggregate(self.norm(x[:, :, 0]))

    def forward_stages(self, clip: Tensor) -> list[Tensor]:
        """Patch tokens after each quarter of the blocks, ``[B, T, h, w, C]``."""
        x, (rows, _) = self.embed(clip)
        features = []
        for stage in self.stage_blocks():
            for block in stage:
                x = block(x)
            features.append(rearrange(x[:, :, 1:], "b t (h w) c -> b t h w c", h=rows))
        return features

    @torch.no_grad()
    def forward_with_maps(self, clip: Tensor) -> tuple[Tensor, dict[str, BlockMaps]]:
        """Logits and, per block, how the frames' class tokens spread their attention over the
        patches (glance); of the temporal attention the share of each frame (profile ``frames``,
        sums to 1). The normal path is left untouched.
        """
        blocks = self._named_blocks()
        with captured_inputs({name: block.attn for name, block in blocks.items()}) as inputs:
            logits = self(clip)
        rows = clip.shape[-2] // self.config.patch
        maps = {}
        for name, x in inputs.items():
            received = blocks[name].attn.class_attention(x)[:, :, 1:]
            received = received / received.sum(dim=(1, 2), keepdim=True)
            if name == "temporal":
                maps[name] = BlockMaps(profiles={"frames": received[:, 0]})
            else:
                maps[name] = BlockMaps(glance=rearrange(received, "b t (h w) -> b t h w", h=rows))
        return logits, maps

    def _named_blocks(self) -> dict[str, Block]:
        """All blocks in order, such as ``stage3.block2``, and the one of the temporal attention."""
        named = {
            f"stage{s}.block{b}": cast(Block, block)
            for s, stage in enumerate(self.stage_blocks(), 1)
            for b, block in enumerate(stage, 1)
        }
        if self.temporal is not None:
            named["temporal"] = self.temporal.block
        return named

    def no_weight_decay(self) -> set[str]:
        """Norms, biases, class tokens and both position tables, as is usual for Vision Transformers;
        the released training decays them.
        """
        tables = ("cls_token", "pos_embed", "temp_embed")
        return {
            name
            for name, parameter in self.named_parameters()
            if parameter.ndim <= 1 or name.endswith(tables)
        }

    def layers(self) -> list[list[str]]:
        """Embeddings, every block, temporal attention, classifier."""
        layers = [["patch_embed", "cls_token", "pos_embed", "temp_embed"]]
        layers += [[f"blocks.{number}"] for number in range(self.config.depth)]
        layers[-1].append("norm")
        if self.temporal is not None:
            layers.append(["temporal"])
        return [*layers, ["head"]]

    def stage_blocks(self) -> list[list[nn.Module]]:
        """The encoder's blocks in four quarters."""
        length = math.ceil(self.config.depth / 4)
        blocks = list(self.blocks)
        return [blocks[i : i + length] for i in range(0, len(blocks), length)]


# --- factory -----------------------------------------------------------------------------------


def build_xvit(
    variant: str,
    num_classes: int,
    *,
    drop_path: float = 0.0,
    dropout: float = 0.0,
    **choices: Any,
) -> XViT:
    """Build a named size.

    Args:
        variant: ``n``, ``b16``, ``b32``, ``l16`` or ``l32``.
        num_classes: size of the head.
        drop_path, dropout: see :class:`XViT`.
        choices: ``table_size``, ``time_rows``, ``segment``, ``shift_divisor``, ``window``,
            ``mixing``, ``summary``, ``aggregation``, see :class:`XViTConfig`.
    """
    return XViT(replace(VARIANTS[variant], **choices), num_classes, drop_path, dropout)
