"""The matrix products in one forward pass of a model, and how long they take by themselves.

The time of a model over the time of its products says how much everything else costs it: norms, activations,
copies, depthwise convolutions. Dense convolutions count as the products that they are (output positions by
inputs under the kernel), fused attention as its two; a depthwise convolution is no matrix product.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Product", "products_of", "replay"]


class Product(NamedTuple):
    """``batch`` products of ``[rows, inner]`` by ``[inner, columns]``."""

    batch: int
    rows: int
    inner: int
    columns: int
    dtype: torch.dtype

    @property
    def multiply_adds(self) -> int:
        """Of all of them."""
        return self.batch * self.rows * self.inner * self.columns


class _Recorder(TorchDispatchMode):
    """Counts the products among the operators that run while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[Product] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        read = _READERS.get(func.overloadpacket.__name__)
        if read is not None:
            self.found.update(read(args, out))
        elif "attention" in func.overloadpacket.__name__:
            self.found.update(_attention(args))
        return out


def _two_factors(left: Tensor, right: Tensor) -> list[Product]:
    batch = left.shape[0] if left.ndim == 3 else 1
    return [Product(batch, left.shape[-2], left.shape[-1], right.shape[-1], left.dtype)]


def _convolution(args: Sequence[Any], out: Tensor) -> list[Product]:
    weight, groups = args[1], args[8]
    if weight.shape[1] == 1 and groups > 1:
        return []
    positions = out.shape[0] * math.prod(out.shape[2:])
    inner = math.prod(weight.shape[1:])
    return [Product(groups, positions, inner, weight.shape[0] // groups, out.dtype)]


def _attention(args: Sequence[Any]) -> list[Product]:
    query, key, value = args[:3]
    batch = math.prod(query.shape[:-2])
    queries, keys, dim = query.shape[-2], key.shape[-2], query.shape[-1]
    return [
        Product(batch, queries, dim, keys, query.dtype),
        Product(batch, queries, keys, value.shape[-1], query.dtype),
    ]


_READERS: dict[str, Callable[[Sequence[Any], Any], list[Product]]] = {
    "mm": lambda args, _out: _two_factors(args[0], args[1]),
    "bmm": lambda args, _out: _two_factors(args[0], args[1]),
    "addmm": lambda args, _out: _two_factors(args[1], args[2]),
    "baddbmm": lambda args, _out: _two_factors(args[1], args[2]),
    "convolution": _convolution,
}


def products_of(model: nn.Module, clip: Tensor) -> Counter[Product]:
    """How often each product is computed in one forward pass.

    Args:
        model: in evaluation mode.
        clip: ``[B, 3, T, H, W]``; not from inference mode, in which convolutions have other names.
    """
    with _Recorder() as recorder, torch.no_grad():
        model(clip)
    return recorder.found


def replay(product: Product, device: torch.device) -> Callable[[], Tensor]:
    """A call that computes one product of random numbers into memory that it already has."""
    batch, rows, inner, columns, dtype = product
    make = partial(torch.randn, device=device, dtype=dtype)
    if batch == 1:
        # The right factor lies as a linear layer holds it.
        left, right = make(rows, inner), make(columns, inner).T
        return partial(torch.mm, left, right, out=left.new_empty(rows, columns))
    left, right = make(batch, rows, inner), make(batch, inner, columns)
    return partial(torch.bmm, left, right, out=left.new_empty(batch, rows, columns))
