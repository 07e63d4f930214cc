"""Attention maps of models whose attention stores its weights nowhere.

While the normal pass runs, the result of every softmax is seen by a torch function mode; hooks tell which
attention module it belongs to. Nothing is computed twice, and nothing of the model is copied here.

Where attention goes from chosen tokens, and through several layers (attention rollout, Abnar and Zuidema
2020, arXiv 2005.00928), is computed from queries and keys by :class:`TokenAttention`: weights of so many
queries at a time that they fit into a fixed memory, never the matrix of all pairs.

Notation: B batch, T frames, H W rows and columns (all of tokens), M heads, Q K query and key tokens, D
channels of a head, G groups of tokens that attend to each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ogreg_core.models.protocol import BlockMaps

__all__ = [
    "Grid",
    "TokenAttention",
    "attention_maps",
    "overlap",
    "received_by_pooled",
    "received_in_windows",
    "rollout",
]

Grid = tuple[int, int, int]


def received_in_windows(
    weights: Tensor, grid: Grid, window: Sequence[int], shift: Sequence[int]
) -> Tensor:
    """Share of attention that each token gets in (shifted) window attention.

    Args:
        weights: softmax weights ``[(B windows), M, Q, K]``, windows in row-major order of the padded
            and rolled grid.
        grid: T, H, W of the tokens.
        window: full window size; cut to the grid where that is smaller.
        shift: by how much the windows are displaced; none in a dimension that one window covers.

    Returns:
        ``[B, T, H, W]``, mean over heads, sums to 1. Padding neither asks nor counts.
    """
    size = [min(w, g) for w, g in zip(window, grid, strict=True)]
    roll = [0 if g <= w else s for s, w, g in zip(shift, window, grid, strict=True)]
    counts = [math.ceil(g / w) for g, w in zip(grid, size, strict=True)]
    axes = dict(zip(("t", "h", "w"), size, strict=True))
    blocks = dict(zip(("nt", "nh", "nw"), counts, strict=True))
    beyond = [n * w - g for n, w, g in zip(counts, size, grid, strict=True)]
    real = F.pad(weights.new_ones(grid), (0, beyond[2], 0, beyond[1], 0, beyond[0]))
    real = torch.roll(real, [-s for s in roll], (0, 1, 2))
    asking = rearrange(real, "(nt t) (nh h) (nw w) -> (nt nh nw) (t h w)", **axes)
    by_clip = rearrange(weights, "(b n) m q k -> b n m q k", n=math.prod(counts))
    got = torch.einsum("bnmqk,nq->bnk", by_clip.float(), asking.float())
    got = rearrange(got, "b (nt nh nw) (t h w) -> b (nt t) (nh h) (nw w)", **axes, **blocks)
    got = torch.roll(got, roll, (1, 2, 3))[:, : grid[0], : grid[1], : grid[2]]
    return got / got.sum(dim=(1, 2, 3), keepdim=True)


def received_by_pooled(weights: Tensor, keys: Grid, grid: Grid) -> Tensor:
    """Share of attention that each token gets where keys are pooled and led by a class token.

    Args:
        weights: softmax weights ``[B, M, 1 + Q, 1 + K]``; all queries count, the class token's too.
        keys: T, H, W of the pooled keys.
        grid: T, H, W to bring the map to, trilinearly.

    Returns:
        ``[B, T, H, W]``, mean over heads, sums to 1; what the class token gets is left out.
    """
    got = weights.float().mean(dim=(1, 2))[:, 1:]
    got = rearrange(got, "b (t h w) -> b 1 t h w", t=keys[0], h=keys[1], w=keys[2])
    got = F.interpolate(got, size=grid, mode="trilinear")[:, 0]
    return got / got.sum(dim=(1, 2, 3), keepdim=True)


_SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)


class _SoftmaxWatch(TorchFunctionMode):
    """Keeps the result of the last softmax; torchvision's attention stores its weights nowhere."""

    weights: Tensor | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _SOFTMAX:
            self.weights = result
        return result


@contextmanager
def attention_maps(
    attentions: Mapping[str, nn.Module],
    received: Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor],
) -> Iterator[dict[str, BlockMaps]]:
    """Collect the maps of attention modules while a model runs.

    Args:
        attentions: modules by the name of their block.
        received: turns a module, its arguments and its softmax weights into a map.
    """
    maps: dict[str, BlockMaps] = {}
    watch = _SoftmaxWatch()

    def note(name: str, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        assert watch.weights is not None, f"no softmax in the attention of {name}"
        maps[name] = BlockMaps(glance=received(module, arguments, watch.weights))
        watch.weights = None

    hooks = [
        module.register_forward_hook(lambda found, given, _, name=name: note(name, found, given))
        for name, module in attentions.items()
    ]
    try:
        with watch:
            yield maps
    finally:
        for hook in hooks:
            hook.remove()


# --- from chosen tokens, and through layers ----------------------------------------------------

# Softmax weights, with what the softmax itself needs, that exist at a time.
_WEIGHTS_BYTES = 2**26


@dataclass(frozen=True)
class TokenAttention:
    """Self-attention of one clip.

    Args:
        query: ``[G, M, Q, D]``.
        key: ``[G, M, K, D]``; keys beyond Q belong to no token (summaries) and do not count.
        edges: borders of the tokens along T, H and W as shares of the clip, 0..1 each.
        leading: class tokens in front of the others in each group; then a group is a frame.
    """

    query: Tensor
    key: Tensor
    edges: tuple[Tensor, Tensor, Tensor]
    leading: int = 0

    @property
    def grid(self) -> Grid:
        """T, H, W of the tokens."""
        time, rows, columns = (len(edges) - 1 for edges in self.edges)
        return time, rows, columns

    @property
    def shape(self) -> tuple[int, int]:
        """Groups, and tokens of each."""
        return self.query.shape[0], self.query.shape[2]

    def weights(self, rows: Tensor) -> Tensor:
        """Softmax weights of some queries, mean over heads: ``[G, rows, Q]``, rows sum to 1."""
        scale = self.query.shape[-1] ** -0.5
        products = self.query[:, :, rows] @ self.key.transpose(-2, -1) * scale
        weights = products.softmax(dim=-1).mean(dim=1)[..., : self.query.shape[2]]
        return weights / weights.sum(dim=-1, keepdim=True)

    def carry(self, mass: Tensor) -> Tensor:
        """Mass on queries to where their attention goes: ``[G, Q] -> [G, Q]``, the sum stays.

        The product of a row vector and the matrix of weights, for which only rows with mass are
        computed, a fixed number of bytes of weights at a time.
        """
        groups, heads = self.query.shape[:2]
        asking = mass.any(dim=0).nonzero().flatten()
        at_once = max(1, _WEIGHTS_BYTES // (8 * groups * heads * self.key.shape[2]))
        carried = torch.zeros_like(mass)
        for rows in asking.split(at_once):
            carried += torch.einsum("gq,gqk->gk", mass[:, rows], self.weights(rows))
        return carried

    def volume(self, mass: Tensor) -> Tensor:
        """Mass ``[G, Q]`` as a map ``[T, H, W]`` that sums to 1; class tokens are left out."""
        volume = mass[:, self.leading :].reshape(self.grid)
        return volume / volume.sum()


def overlap(coarse: Tensor, fine: Tensor) -> Tensor:
    """How cells share their mass among the cells of another grid, along one axis.

    Args:
        coarse: borders of the cells that give, ``[n + 1]``, ascending.
        fine: borders of the cells that take, ``[m + 1]``, over the same range.

    Returns:
        ``[n, m]``: the share of each giving cell that lies in each taking one; rows sum to 1.
    """
    first = torch.maximum(coarse[:-1, None], fine[None, :-1])
    last = torch.minimum(coarse[1:, None], fine[None, 1:])
    common = (last - first).clamp_min(0)
    return common / common.sum(dim=1, keepdim=True)


def rollout(layers: Sequence[TokenAttention], mass: Tensor) -> Tensor:
    """Attention rollout: mass on tokens of the last layer, followed back to those of the first.

    Each layer's matrix is the mean over heads, mixed half and half with the identity for the residual
    connection. Between layers with different grids every token shares its mass among those of the grid
    before in proportion to the area they have in common.

    Args:
        layers: in the order of the network.
        mass: ``[G, Q]`` of the last layer.

    Returns:
        ``[G, Q]`` of the first layer; the sum stays.
    """
    later: TokenAttention | None = None
    for layer in reversed(layers):
        if later is not None and layer.grid != later.grid:
            mass = _regrid(mass, later, layer)
        mass = (mass + layer.carry(mass)) / 2
        later = layer
    return mass


def _regrid(mass: Tensor, giving: TokenAttention, taking: TokenAttention) -> Tensor:
    assert not giving.leading, "grids differ between layers with class tokens"
    time, rows, columns = (
        overlap(given, taken).to(mass)
        for given, taken in zip(giving.edges, taking.edges, strict=True)
    )
    volume = rows.T @ (mass.reshape(giving.grid) @ columns)
    return torch.einsum("tT,thw->Thw", time, volume).reshape(taking.shape)
