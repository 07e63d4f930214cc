"""Stems: from pixels to tokens of two frames by 4x4 pixels, for every network that begins on that grid.

Layout: a clip ``[B, 3, T, H, W]`` becomes tokens, channels last, ``[B, T/2, H/4, W/4, C]``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ogreg_core.models.layers import in_pieces

__all__ = ["ConvStem", "PatchStem", "repeat_edge_frames"]

# Evaluated at a time where pieces pay, see layers.in_pieces: 1 to 4 frames of 224x224 are equally fast.
PIXELS_AT_ONCE = 2 * 224 * 224


def repeat_edge_frames(x: Tensor, before: int, after: int, dim: int) -> Tensor:
    """Pad in time by repeating the first and last frame, so that a still clip stays still."""
    parts = [x.narrow(dim, 0, 1)] * before + [x] + [x.narrow(dim, x.shape[dim] - 1, 1)] * after
    return torch.cat(parts, dim) if len(parts) > 1 else x


def _pad_input(clip: Tensor) -> Tensor:
    """Make T even by repeating the last frame, H and W multiples of 4 by zeros at the bottom and
    right.
    """
    _, _, frames, height, width = clip.shape
    clip = F.pad(clip, (0, -width % 4, 0, -height % 4))
    return repeat_edge_frames(clip, 0, frames % 2, dim=2)


class PatchStem(nn.Module):
    """Non-overlapping 2x4x4 patches, as in Video-Swin: ``[B, 3, T, H, W] -> [B, T/2, H/4, W/4,
    C]``.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv3d(3, dim, kernel_size=(2, 4, 4), stride=(2, 4, 4))
        self.norm = nn.LayerNorm(dim)

    def forward(self, clip: Tensor) -> Tensor:
        return self.norm(rearrange(self.proj(_pad_input(clip)), "b c t h w -> b t h w c"))


class ConvStem(nn.Module):
    """Two overlapping convolutions onto the same grid: ``[B, 3, T, H, W] -> [B, T/2, H/4, W/4,
    C]``.

    3x3x3 with stride (2, 2, 2) to C/2, batch norm, GELU, then 1x3x3 with stride (1, 2, 2) to C. The
    parameters are those of three-dimensional convolutions; they are evaluated as two-dimensional ones
    over the three frames that a token frame sees, side by side as channels, which libraries do faster.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(3, dim // 2, kernel_size=3, stride=2, padding=(0, 1, 1), bias=False)
        # Another norm in an ablation.
        self.bn1: nn.Module = nn.BatchNorm2d(dim // 2)
        self.conv2 = nn.Conv3d(
            dim // 2, dim, kernel_size=(1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, clip: Tensor) -> Tensor:
        clip = repeat_edge_frames(_pad_input(clip), 1, 0, dim=2)
        batch, _, _, height, width = clip.shape
        triples = rearrange(clip.unfold(2, 3, 2), "b c t h w k -> (b t) h w (c k)")
        if self.training:  # batch norm looks at all frames together
            tokens = self._embed(triples)
        else:
            length = max(1, PIXELS_AT_ONCE // (height * width))
            tokens = in_pieces(self._embed, triples, length=length)
        return rearrange(tokens, "(b t) h w c -> b t h w c", b=batch)

    def _embed(self, triples: Tensor) -> Tensor:
        """Three frames each, ``[N, H, W, 9]``, to tokens ``[N, H/4, W/4, C]``."""
        # Channels-last memory read as NCHW: no copy, and the fast kernels on CPU and GPU.
        x = rearrange(triples, "n h w c -> n c h w")
        x = F.conv2d(x, self.conv1.weight.flatten(1, 2), stride=2, padding=1)
        x = F.gelu(self.bn1(x))
        x = F.conv2d(x, self.conv2.weight.squeeze(2), self.conv2.bias, stride=2, padding=1)
        return self.norm(rearrange(x, "n c h w -> n h w c"))
