"""Attention maps of models whose attention stores its weights nowhere.

While the normal pass runs, the result of every softmax is seen by a torch function mode; hooks tell which
attention module it belongs to. Nothing is computed twice, and nothing of the model is copied here.

Notation: B batch, T frames, H W rows and columns (all of tokens), M heads, Q K query and key tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ogreg_core.models.protocol import BlockMaps

__all__ = ["Grid", "attention_maps", "received_by_pooled", "received_in_windows"]

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
