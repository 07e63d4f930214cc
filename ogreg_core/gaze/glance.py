"""Glance beyond the attention that tokens receive: rolled out over the blocks, and of one query.

Costs are those of the attention itself, N x N x C per block for N tokens that attend to each other, with
at most 64 MB of weights at a time; the normal pass is not slowed, since all of it happens afterwards from
the inputs of the attention modules. At 32x224 ogreg-t has N = 16 x 7 x 7 = 784 in every block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from ogreg_core.errors import UsageError
from ogreg_core.gaze.geometry import Lattices, Reduction, lattices_of, to_pixels
from ogreg_core.models.attention_maps import TokenAttention, rollout
from ogreg_core.models.layers import captured_inputs, split_heads
from ogreg_core.models.ogreg import Block, OGReG, SoDA
from ogreg_core.models.xvit import Block as XViTBlock
from ogreg_core.models.xvit import MixingAttention, XViT

__all__ = ["MOST_TOKENS", "GlanceMode", "Place", "glance_of"]

GlanceMode = Literal["received", "rollout", "query"]

# Beyond it a block alone would take minutes; ogreg-t reaches it with 668 frames of 224 pixels.
MOST_TOKENS = 2**15


@dataclass(frozen=True)
class Place:
    """A point of the clip: pixels x and y, and the position of a frame, continuous."""

    x: float
    y: float
    frame: float


@torch.no_grad()
def glance_of(
    model: nn.Module,
    clip: Tensor,
    mode: GlanceMode,
    chosen: Sequence[str],
    reduction: Reduction,
    place: Place | None = None,
) -> Tensor:
    """A glance map of one clip.

    ``query``: where the token at ``place`` looks, mean over the chosen blocks. ``rollout``: attention
    followed from the last chosen block to the first, from the token at ``place``, or else from all of
    them (of X-ViT: from the class tokens of all frames). The Gaze path of OG-ReG and X-ViT's exchange of
    channels between frames, which move information too, are no attention and left out.

    Args:
        model: OG-ReG or X-ViT.
        clip: normalised, ``[1, 3, T, H, W]``.
        mode: ``rollout`` or ``query``.
        chosen: names of blocks; others are left out.
        reduction: of the model.
        place: where the query lies; needed for ``query``.

    Returns:
        ``[T, H, W]``, interpolated to the clip; 1 is an even spread.

    Raises:
        UsageError: a model whose attention does not connect all tokens of a clip or frame, none of the
            chosen blocks has any, or more tokens than can be paired.
    """
    layers = _layers(model, clip, chosen, mode)
    tokens = max(layer.shape[1] for layer in layers)
    if tokens > MOST_TOKENS:
        raise UsageError(
            f"glance {mode} among {tokens} tokens is too much",
            why=f"every token is compared with every other one; the most is {MOST_TOKENS}",
            fix="--glance received",
        )
    size = tuple(clip.shape[2:])
    where = [lattices_of(layer.grid, size, reduction) for layer in layers]
    if mode == "rollout":
        carried = rollout(layers, _start(layers[-1], where[-1], place))
        return _drawn(layers[0], carried, where[0])
    pictures = [
        _drawn(layer, layer.carry(_start(layer, lattices, place)), lattices)
        for layer, lattices in zip(layers, where, strict=True)
    ]
    return torch.stack(pictures).mean(dim=0)


def _drawn(layer: TokenAttention, mass: Tensor, lattices: Lattices) -> Tensor:
    volume = layer.volume(mass)
    return to_pixels(volume * volume.numel(), lattices)


def _start(layer: TokenAttention, lattices: Lattices, place: Place | None) -> Tensor:
    """Mass 1 on the token at a place; without one, spread over all tokens or all class tokens."""
    mass = torch.zeros(layer.shape, device=layer.query.device)
    if place is None:
        asking = mass[:, : layer.leading] if layer.leading else mass
        asking.fill_(1 / asking.numel())
        return mass
    t, row, column = (
        lattice.token_at(value)
        for lattice, value in zip(lattices, (place.frame, place.y, place.x), strict=True)
    )
    _, rows, columns = layer.grid
    # Groups are frames where there are class tokens, otherwise there is one.
    frame = mass[t, layer.leading :] if layer.leading else mass[0].view(layer.grid)[t].view(-1)
    frame.view(rows, columns)[row, column] = 1
    return mass


def _layers(
    model: nn.Module, clip: Tensor, chosen: Sequence[str], mode: GlanceMode
) -> list[TokenAttention]:
    """The attention of the chosen blocks, in order, seen in one more pass."""
    if not isinstance(model, (OGReG, XViT)):
        raise UsageError(
            f"glance {mode} is for OG-ReG without token selection and for X-ViT",
            why="the attention of other models stays in windows, pools its keys, or is none",
            fix="--glance received",
        )
    blocks = {
        name: block
        for s, stage in enumerate(model.stage_blocks(), 1)
        for b, block in enumerate(stage, 1)
        if (name := f"stage{s}.block{b}") in chosen
    }
    if not blocks:
        raise UsageError(
            f"glance {mode} needs blocks with attention", why=f"chosen: {', '.join(chosen)}"
        )
    if isinstance(model, OGReG):
        glances = {name: cast(Block, block).glance for name, block in blocks.items()}
        with captured_inputs(glances) as inputs:
            model(clip)
        return [_soda(glances[name], y) for name, y in inputs.items()]
    attentions = {name: cast(XViTBlock, block).attn for name, block in blocks.items()}
    with captured_inputs(attentions) as inputs:
        model(clip)
    rows = clip.shape[-2] // model.config.patch
    return [_mixing(attentions[name], x, rows) for name, x in inputs.items()]


def _soda(glance: SoDA, y: Tensor) -> TokenAttention:
    """Glance of OG-ReG: one group of all coarse tokens."""
    coarse = glance.coarse(y)
    query, key, _ = split_heads(glance.project(coarse), glance.heads)
    frames, rows, columns = coarse.shape[1:4]
    edges = (
        _borders(frames, frames),
        _borders(rows, y.shape[2] / glance.stride),
        _borders(columns, y.shape[3] / glance.stride),
    )
    return TokenAttention(query.float(), key.float(), edges)


def _mixing(attention: MixingAttention, x: Tensor, rows: int) -> TokenAttention:
    """Attention of X-ViT: a group per frame, the class token first."""
    query, key, _ = attention.project(x)
    frames, columns = x.shape[1], (x.shape[2] - 1) // rows
    edges = (_borders(frames, frames), _borders(rows, rows), _borders(columns, columns))
    return TokenAttention(query.float(), key.float(), edges, leading=1)


def _borders(cells: int, whole: float) -> Tensor:
    """Borders of cells as shares; the last cell is cut at ``whole`` cells."""
    return (torch.arange(cells + 1, dtype=torch.float64) / whole).clamp(max=1)
