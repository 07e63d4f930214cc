"""Layers shared by every model: one attention, one MLP, one drop path.

Plain torch on purpose: importing torchvision costs about a second, which ``ogreg predict`` would
pay at each call. ``DropPath`` and ``Mlp`` are tested against ``torchvision.ops.StochasticDepth``
and ``torchvision.ops.MLP``, and ``Mlp`` keeps the latter's parameter names so that Swin weights
load without renaming.

Notation: B batch, N tokens, C channels, M heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

__all__ = [
    "DropPath",
    "Mlp",
    "attend",
    "attention_weights",
    "captured_inputs",
    "drop_path_rates",
    "in_pieces",
    "split_heads",
]


def split_heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split a fused projection ``[B, N, 3C]`` into query, key and value, each ``[B, M, N, C/M]``."""
    q, k, v = rearrange(qkv, "b n (three m d) -> three b m n d", three=3, m=heads)
    return q, k, v


def attend(qkv: Tensor, heads: int) -> Tensor:
    """Multi-head self-attention on a fused projection: ``[B, N, 3C] -> [B, N, C]``."""
    q, k, v = split_heads(qkv, heads)
    return rearrange(F.scaled_dot_product_attention(q, k, v), "b m n d -> b n (m d)")


def attention_weights(qkv: Tensor, heads: int) -> Tensor:
    """The softmax weights that :func:`attend` uses without storing them: ``[B, N, 3C] -> [B, M, N,
    N]``.

    Quadratic in memory; meant for looking at attention, not for the forward pass.
    """
    q, k, _ = split_heads(qkv, heads)
    return torch.softmax(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5, dim=-1)


class DropPath(nn.Module):
    """Stochastic depth per sample (Huang et al. 2016): drops a residual branch, rescales what is
    kept.

    Args:
        rate: probability of dropping the branch of one sample, in [0, 1).
    """

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, branch: Tensor) -> Tensor:
        if self.rate == 0.0 or not self.training:
            return branch
        keep = 1.0 - self.rate
        mask = branch.new_empty((branch.shape[0],) + (1,) * (branch.ndim - 1)).bernoulli_(keep)
        return branch * (mask / keep)

    def extra_repr(self) -> str:
        return f"rate={self.rate:g}"


class Mlp(nn.Sequential):
    """Two linear layers with GELU between; parameter names as in ``torchvision.ops.MLP`` (0 and 3)."""

    def __init__(self, dim: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__(
            nn.Linear(dim, hidden),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, dim),
            nn.Dropout(dropout),
        )


def in_pieces(function: Callable[..., Tensor], *tensors: Tensor, length: int) -> Tensor:
    """``function(*tensors)``, evaluated ``length`` entries of the first dimension at a time where that
    is faster: on the CPU, without gradients.

    There an intermediate result of a whole clip goes out to main memory, into fresh pages, and comes
    back for every operator; one of a piece stays in the processor's cache. A module inside ``function``
    is then called once per piece, which its forward hooks see.

    Args:
        function: treats the entries independently of each other.
        tensors: of one first dimension, ``[N, ...]``.
        length: the most entries of a piece; the pieces are equally long to within one entry.
    """
    entries = tensors[0].shape[0]
    whole = torch.is_grad_enabled() or tensors[0].device.type != "cpu"
    # A compiler fuses by itself, and a trace should show every operator once.
    if whole or torch.compiler.is_compiling() or torch.jit.is_tracing() or entries <= length:
        return function(*tensors)
    pieces = -(-entries // length)
    out: Tensor | None = None
    done = 0
    for part in zip(*(tensor.tensor_split(pieces) for tensor in tensors), strict=True):
        result = function(*part)
        if out is None:
            out = result.new_empty(entries, *result.shape[1:])
        out[done : done + len(result)] = result
        done += len(result)
    assert out is not None
    return out


def drop_path_rates(last: float, blocks: int) -> list[float]:
    """Stochastic depth of every block, rising evenly from 0 at the first (Huang et al. 2016)."""
    # Named, because a model may be built on the meta device, whose tensors have no values.
    return torch.linspace(0, last, blocks, device="cpu").tolist()


@contextmanager
def captured_inputs(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """While active, the first argument of each module's latest call, by the module's name."""
    inputs: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _module, args, name=name: inputs.__setitem__(name, args[0])
        )
        for name, module in modules.items()
    ]
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()
