"""Batch norm over all processes of a job, on CPUs.

torch's ``SyncBatchNorm`` works on GPUs only; without this, two processes with half a batch each
would normalise by other statistics than one process with the whole.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["SyncedBatchNorm", "synchronise_batch_norm"]


class _Sum(Function):
    """The sum of a tensor over all processes; so are the gradients summed on the way back.

    torch's own is deprecated in some of the versions that are supported and not there in others.
    """

    @staticmethod
    def forward(_context: Any, value: Tensor) -> Tensor:
        total = value.contiguous().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(_context: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        return total


class SyncedBatchNorm(nn.BatchNorm3d):
    """``BatchNorm3d`` whose training statistics are those of every process's batch together.

    Input and output ``[B, C, ...]``; every process must hold as many elements.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least [B, C], got {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        dims = [0, *range(2, input.dim())]
        world = dist.get_world_size()
        shape = [1, -1] + [1] * (input.dim() - 2)
        x = input.float()
        mean = _Sum.apply(x.mean(dims)) / world
        # From the common mean, not from the sum of squares, which would cancel.
        centred = x - mean.view(shape)
        variance = _Sum.apply(centred.square().mean(dims)) / world
        self._follow(mean.detach(), variance.detach(), input.numel() // input.shape[1] * world)
        out = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(input.dtype)

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor, count: int) -> None:
        """Move the running statistics, with the unbiased variance, as torch does."""
        if self.running_mean is None or self.running_var is None:
            return
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        share = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum  # type: ignore[arg-type]
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance * count / max(count - 1, 1), share)


def synchronise_batch_norm(model: nn.Module, device: torch.device) -> nn.Module:
    """The model with every batch norm replaced by one that is common to all processes: torch's own
    on GPUs, :class:`SyncedBatchNorm` on CPUs. Parameters and their names stay.
    """
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if isinstance(model, _BatchNorm):
        synced = SyncedBatchNorm(
            model.num_features,
            model.eps,
            model.momentum,
            model.affine,
            model.track_running_stats,
        )
        synced.__dict__.update(
            {key: model.__dict__[key] for key in ("_parameters", "_buffers", "training")}
        )
        return synced
    for name, child in model.named_children():
        setattr(model, name, synchronise_batch_norm(child, device))
    return model
