"""Models without initial weights, for those who load others at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

__all__ = ["without_random_weights"]

# What draws; constants are cheap, and buffers are often made of them.
_DRAWING = (
    *("uniform_", "normal_", "trunc_normal_", "xavier_uniform_", "xavier_normal_"),
    *("kaiming_uniform_", "kaiming_normal_", "orthogonal_", "sparse_"),
)


@contextmanager
def without_random_weights() -> Iterator[None]:
    """While active, ``torch.nn.init`` draws nothing: parameters of a model that is built hold whatever was
    in their memory.

    Drawing the weights of ogreg-t takes most of a second, which ``ogreg predict`` would wait for at each
    call. Everything else is built as ever, buffers included, which the meta device would lose. The
    functions of ``torch.nn.init`` are replaced for the whole process: build no other model meanwhile in
    another thread.
    """
    own = {name: getattr(nn.init, name) for name in _DRAWING}
    try:
        for name in _DRAWING:
            setattr(nn.init, name, _keep)
        yield
    finally:
        for name, function in own.items():
            setattr(nn.init, name, function)


def _keep(tensor: Tensor, *_arguments: Any, **_settings: Any) -> Tensor:
    return tensor
