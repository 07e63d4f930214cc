"""Trading time for memory: activations that are recomputed instead of kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from ogreg_core.errors import UsageError

__all__ = ["checkpoint_activations"]


def checkpoint_activations(model: nn.Module, stages: Sequence[int]) -> None:
    """Let the blocks of the given stages keep only their input, and compute the rest once more in
    the backward pass (Chen et al. 2016). Results stay the same to the bit, drop path included.

    Args:
        model: changed in place; names of parameters stay.
        stages: from 1.

    Raises:
        UsageError: the model has no such stage.
    """
    blocks: list[list[nn.Module]] = model.stage_blocks()  # type: ignore[operator]
    for number in sorted(set(stages)):
        if number > len(blocks):
            raise UsageError(
                f"train.checkpoint_stages names stage {number}",
                why=f"the model has {len(blocks)} stages",
            )
        for block in blocks[number - 1]:
            norms = [module for module in block.modules() if isinstance(module, _BatchNorm)]
            block.forward = partial(_recomputed, block.forward, norms)


def _recomputed(forward: Callable[..., Any], norms: list[_BatchNorm], *arguments: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*arguments)
    if not norms:
        return checkpoint(forward, *arguments, use_reentrant=False)

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return nullcontext(), _without_tracking(norms)

    return checkpoint(forward, *arguments, use_reentrant=False, context_fn=contexts)


@contextmanager
def _without_tracking(norms: list[_BatchNorm]) -> Iterator[None]:
    """The second forward pass must not move the running statistics once more."""
    # A momentum of 0 leaves them where they are; not to track them would save other tensors.
    momenta = [norm.momentum for norm in norms]
    counts = [_count_of(norm) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum, count in zip(norms, momenta, counts, strict=True):
            norm.momentum = momentum
            if norm.num_batches_tracked is not None and count is not None:
                norm.num_batches_tracked.copy_(count)


def _count_of(norm: _BatchNorm) -> torch.Tensor | None:
    return None if norm.num_batches_tracked is None else norm.num_batches_tracked.clone()
