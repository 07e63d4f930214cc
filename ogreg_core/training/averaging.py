"""Moving average of the weights."""

from __future__ import annotations

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

__all__ = ["averaged", "decay_at"]


def decay_at(decay: float, updates: int) -> float:
    """The decay after a number of updates: ``(1 + n) / (10 + n)`` until ``decay`` is reached, so that
    a short training is not held back by its first weights (as TensorFlow's moving average does).
    """
    return min(decay, (1 + updates) / (10 + updates))


def averaged(model: nn.Module, decay: float) -> AveragedModel:
    """A copy of the model that follows it: ``average = decay average + (1 - decay) weights`` at every
    ``update_parameters``; buffers are those of the model.
    """

    def follow(
        average: tuple[Tensor, ...] | list[Tensor],
        current: tuple[Tensor, ...] | list[Tensor],
        updates: Tensor | int,
    ) -> None:
        get_ema_multi_avg_fn(decay_at(decay, int(updates)))(average, current, updates)

    return AveragedModel(model, multi_avg_fn=follow)
