"""Grad-CAM (Selvaraju et al. 2017, arXiv 1610.02391) of any model, the baseline to compare maps with.

Over the features of the last stage in space and time: ``relu(sum_c alpha_c A_c)``, where ``alpha_c`` is
the mean gradient of a class's logit with respect to channel c. Models that classify by a class token
alone (MViT, X-ViT) drop the other tokens behind the last block, so that their gradient is zero there;
of them the input of the last block is taken.

Notation: B batch, T frames, H W rows and columns of tokens, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ogreg_core.models.protocol import BlockMaps, VideoModel

__all__ = ["grad_cam", "last_selection", "spread_kept"]


def grad_cam(model: VideoModel, clip: Tensor, target: int) -> Tensor:
    """Grad-CAM of one clip.

    Args:
        model: in evaluation mode; on its parameters nothing is changed, also no gradient.
        clip: normalised, ``[1, 3, T, H, W]``.
        target: class index.

    Returns:
        The map on the grid of the last stage, ``[t, h, w]``, not negative; with token selection, on
        that of the tokens that are left.
    """
    block = [block for stage in model.stage_blocks() for block in stage][-1]
    with torch.no_grad():
        shape = tuple(model.forward_stages(clip)[-1].shape)
    seen: dict[str, Any] = {}
    hooks = [
        block.register_forward_pre_hook(lambda _module, given: seen.update(given=given)),
        block.register_forward_hook(lambda _module, _given, out: seen.update(out=out)),
    ]
    try:
        with torch.inference_mode(False), torch.enable_grad():
            logits = model(clip.clone().requires_grad_())
            features, gradient = _at_last_stage(logits[0, target], seen, shape)
    finally:
        for hook in hooks:
            hook.remove()
    alpha = gradient.mean(dim=(1, 2, 3), keepdim=True)
    return F.relu((alpha * features).sum(dim=-1))[0].detach().float()


def _at_last_stage(
    score: Tensor, seen: dict[str, Any], shape: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Features before the classifier and the score's gradient with respect to them, ``[1, T, H, W,
    C]`` both.
    """
    out, given = seen["out"], seen["given"]
    plain = out[0] if isinstance(out, tuple) else out
    if _class_tokens(plain, shape):
        # Blocks of MViT get their tokens' grid beside them.
        grid = tuple(given[1]) if len(given) > 1 else shape[1:4]
        plain, shape = given[0], (1, *grid, plain.shape[-1])
    gradient = torch.autograd.grad(score, plain)[0]
    return _channels_last(plain, shape), _channels_last(gradient, shape)


def _class_tokens(tokens: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether ``[1, 1 + T H W, C]`` or ``[1, T, 1 + H W, C]`` stands for features of that shape."""
    _, frames, rows, columns, channels = shape
    joint, apart = (
        (1, 1 + frames * rows * columns, channels),
        (1, frames, 1 + rows * columns, channels),
    )
    return tuple(tokens.shape) in (joint, apart)


def _channels_last(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Features in any layout of our models as ``[1, T, H, W, C]``, without class tokens."""
    _, frames, rows, columns, _ = shape
    if x.ndim == 5:
        return x if tuple(x.shape) == shape else rearrange(x, "b c t h w -> b t h w c")
    if x.ndim == 3:
        return rearrange(x[:, 1:], "b (t h w) c -> b t h w c", t=frames, h=rows)
    if tuple(x.shape[:3]) == (1, frames, 1 + rows * columns):
        return rearrange(x[:, :, 1:], "b t (h w) c -> b t h w c", h=rows)
    return rearrange(x, "(b t) c h w -> b t h w c", t=frames)


def spread_kept(volume: Tensor, kept: Tensor) -> Tensor:
    """A map of what token selection leaves, put where it was in the clip.

    Args:
        volume: over the tokens that are left, ``[t, h, w]``.
        kept: of the last selection, see :class:`ogreg_core.models.protocol.BlockMaps`, ``[T, H, W]``;
            in each frame that is left a window, all of one size.

    Returns:
        ``[T, H, W]``, 0 where no token is left.
    """
    spread = torch.zeros_like(kept, dtype=volume.dtype)
    frames = kept.flatten(1).any(dim=1).nonzero().flatten().tolist()
    for frame, part in zip(frames, volume, strict=True):
        rows, columns = kept[frame].any(dim=1).nonzero(), kept[frame].any(dim=0).nonzero()
        top, left = int(rows.min()), int(columns.min())
        size = (int(rows.max()) + 1 - top, int(columns.max()) + 1 - left)
        window = F.interpolate(part[None, None], size=size, mode="bilinear")[0, 0]
        spread[frame, top : top + size[0], left : left + size[1]] = window
    return spread


def last_selection(maps: dict[str, BlockMaps]) -> Tensor | None:
    """What the last token selection leaves, ``[T, H, W]``; None without one."""
    found = [block.kept[0] for block in maps.values() if block.kept is not None]
    return found[-1] if found else None
