"""Trading time for memory: activations that are recomputed instead of kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
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
    for number in stages:
        if number > len(blocks):
            raise UsageError(
                f"train.checkpoint_stages names stage {number}",
                why=f"the model has {len(blocks)} stages",
            )
        for block in blocks[number - 1]:
            block.forward = partial(_recomputed, block.forward)


def _recomputed(forward: Callable[..., Any], *arguments: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*arguments)
    return checkpoint(forward, *arguments, use_reentrant=False)
