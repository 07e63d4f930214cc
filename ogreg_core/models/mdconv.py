"""MDConv, the Gaze of OG-ReG: Modulated 2D/3D Convolution guided by the similarity of frames.

Paper: arXiv 2604.06783, of which only the abstract and public summaries are known; the formulas are
ours, see :mod:`ogreg_core.models.ogreg`.

Three ways to the same result. Pure functions of tensors (:func:`frame_dissimilarity`,
:func:`modulation`, :func:`modulated_conv`), which are the definition and which torch differentiates;
the same with its gradient written out (:class:`_Gaze`), for training without a GPU kernel; and the
kernel for CUDA in :mod:`ogreg_core.models.kernels.mdconv`.

What the written-out gradient buys, forward and backward of all twelve blocks of ogreg-t at 16x224,
processor time on one core: 380 ms by torch's own differentiation, 245 ms here. The difference is
memory traffic: slices are differentiated by filling a whole tensor with zeros, and additions in
place by copying one.

Notation: B batch, T frames, H W rows and columns, C channels. Layout: channels last,
``[B, T, H, W, C]``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ogreg_core.models.kernels import mdconv as kernels
from ogreg_core.models.stems import repeat_edge_frames

__all__ = [
    "INITIAL_OFFSET",
    "INITIAL_SHARPNESS",
    "MDConv",
    "depthwise_tap",
    "depthwise_volume",
    "frame_dissimilarity",
    "modulated_conv",
    "modulation",
    "opening",
]

SMALLEST_NORM = 1e-8

# Features change little from frame to frame (measured at initialisation on the demo motions, per
# position: median 0.001 to 0.02, 99th percentile 0.2 to 0.7), so the sigmoid must be steep to answer
# where something moves: m is 0.3 at d = 0.05 and 0.98 at d = 0.2. Measured on the demo motions, one
# seed each, 25 epochs: a = 6 reaches 80 % top-1, 15 84 %, 30 90 %, 60 91 %; fixed to 3-D 81 %.
INITIAL_SHARPNESS = 30.0
INITIAL_OFFSET = -2.0


# --- pure functions of tensors: the definition -------------------------------------------------


def frame_dissimilarity(y: Tensor) -> Tensor:
    """One minus the cosine of each position's feature with the same position one frame later.

    Args:
        y: features ``[B, T, H, W, C]``.

    Returns:
        ``[B, T-1, H, W]`` in [0, 2]; 0 where two frames agree up to a positive factor.
    """
    return 1.0 - _cosine(y)[0]


def _cosine(y: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine of neighbouring frames, ``[B, T-1, H, W]``, and the norms, ``[B, T, H, W]``."""
    # Each norm once: F.cosine_similarity takes both sides' and makes normalised copies of them.
    norm = torch.linalg.vector_norm(y, dim=-1).clamp_min(SMALLEST_NORM)
    product = (y[:, :-1] * y[:, 1:]).sum(dim=-1)
    return product / (norm[:, :-1] * norm[:, 1:]), norm


def modulation(dissimilarity: Tensor, sharpness: Tensor, offset: Tensor) -> Tensor:
    """How far a block opens towards its temporal neighbours, per channel.

    A sigmoid in the dissimilarity, shifted and rescaled so that it starts at exactly 0:
    ``m = (sigmoid(a d + b) - sigmoid(b)) / (1 - sigmoid(b))``. For a > 0, m rises from 0 (two-
    dimensional) towards 1 (three-dimensional).

    Args:
        dissimilarity: d, any shape ``[...]``.
        sharpness: a, ``[C]``.
        offset: b, ``[C]``.

    Returns:
        m, ``[..., C]``.
    """
    return opening(dissimilarity.unsqueeze(-1), sharpness, offset)


def opening(dissimilarity: Tensor, sharpness: Tensor, offset: Tensor) -> Tensor:
    """:func:`modulation` for a dissimilarity that may differ between channels, ``[..., C]`` or
    ``[..., 1]``.
    """
    floor = torch.sigmoid(offset)
    raised = torch.addcmul(offset, dissimilarity, sharpness).sigmoid()
    if torch.is_grad_enabled():
        return (raised - floor) / (1.0 - floor)
    return raised.sub_(floor).div_(1.0 - floor)


def depthwise_tap(frames: Tensor, kernel: Tensor, bias: Tensor | None = None) -> Tensor:
    """Depthwise 3x3 convolution of every frame, zero padding: ``[B, T, H, W, C]`` with ``kernel``
    ``[C, 1, 3, 3]``.
    """
    out = F.conv2d(_as_images(frames), kernel, bias, padding=1, groups=frames.shape[-1])
    return rearrange(out, "(b t) c h w -> b t h w c", b=frames.shape[0])


def depthwise_volume(y: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Depthwise 3x3x3 convolution, ``[B, T, H, W, C]`` with ``weight`` ``[C, 1, 3, 3, 3]``, that pads
    with zeros in space and repeats the edge frames in time, so that a still clip stays still.

    As three convolutions of images: torch's own is up to five times as slow on a small grid, with its
    gradient.
    """
    frames = repeat_edge_frames(y, 1, 1, dim=1)
    past, centre, future = (frames.narrow(1, start, y.shape[1]) for start in range(3))
    kernels = weight.unbind(dim=2)
    out = depthwise_tap(centre, kernels[1], bias)
    return out + depthwise_tap(past, kernels[0]) + depthwise_tap(future, kernels[2])


def _as_images(frames: Tensor) -> Tensor:
    """``[B, T, H, W, C]`` read as ``[B T, C, H, W]`` in channels-last memory, of which CPU and GPU have
    the fast depthwise kernels. Flattened first: where frames are cut off from a batch a copy is made,
    and it should be one of this kind.
    """
    return rearrange(frames.flatten(0, 1), "n h w c -> n c h w")


def modulated_conv(
    y: Tensor, weight: Tensor, m: Tensor | None, bias: Tensor | None = None
) -> Tensor:
    """Depthwise 3x3x3 convolution whose temporal taps are scaled by ``m``; zero padding in space
    and time.

    ``out[t] = K0 * y[t] + m[t-1] . (K- * y[t-1]) + m[t] . (K+ * y[t+1])``

    Args:
        y: features ``[B, T, H, W, C]``.
        weight: ``[C, 1, 3, 3, 3]``, as a depthwise ``conv3d`` holds it.
        m: modulation between frames t and t+1, broadcastable to ``[B, T-1, H, W, C]``; None leaves
            the temporal taps out, which is the two-dimensional convolution.
        bias: ``[C]``, added everywhere.

    Returns:
        ``[B, T, H, W, C]``.
    """
    out = depthwise_tap(y, weight[:, :, 1], bias)
    if m is None or y.shape[1] == 1:
        return out
    # In place: padding and summing out of place would go through all features six more times.
    out[:, 1:].addcmul_(m, depthwise_tap(y[:, :-1], weight[:, :, 0]))
    out[:, :-1].addcmul_(m, depthwise_tap(y[:, 1:], weight[:, :, 2]))
    return out


# --- the same with its gradient written out ----------------------------------------------------


class _Gaze(torch.autograd.Function):
    """``modulated_conv(y, weight, modulation(frame_dissimilarity(y), a, b), bias)``.

    With s = sigmoid(a d + b) and f = sigmoid(b), so that m = (s - f) / (1 - f)::

        dm/dz = s (1 - m)        for z = a d + b
        dm/df = (m - 1) / (1 - f)
        dcos/dy[t] = y[t+1] / (|y[t]| |y[t+1]|) - cos y[t] / |y[t]|^2, and likewise for y[t+1]
    """

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, weight: Tensor, bias: Tensor, sharpness: Tensor, offset: Tensor
    ) -> Tensor:
        cosine, norm = _cosine(y)
        m = modulation(1.0 - cosine, sharpness, offset)
        before = depthwise_tap(y[:, :-1], weight[:, :, 0])
        after = depthwise_tap(y[:, 1:], weight[:, :, 2])
        out = depthwise_tap(y, weight[:, :, 1], bias)
        out[:, 1:].addcmul_(m, before)
        out[:, :-1].addcmul_(m, after)
        ctx.save_for_backward(y, weight, sharpness, offset, cosine, norm, m, before, after)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        y, weight, sharpness, offset, cosine, norm, m, before, after = ctx.saved_tensors
        early, late = gradient[:, :-1], gradient[:, 1:]
        opening = (late * before).addcmul_(early, after)
        opening *= 1.0 - m
        floor = torch.sigmoid(offset)
        to_floor = opening.sum(dim=(0, 1, 2, 3)) / (floor - 1.0)
        opening *= torch.addcmul(floor, m, 1.0 - floor)
        to_offset = opening.sum(dim=(0, 1, 2, 3)) + to_floor * floor * (1.0 - floor)
        channels = opening.shape[-1]
        to_sharpness = (1.0 - cosine).reshape(-1) @ opening.reshape(-1, channels)
        to_cosine = -(opening @ sharpness)

        to_y, centre = _tap_gradient(gradient, y, weight[:, :, 1])
        to_tap, past = _tap_gradient(late * m, y[:, :-1], weight[:, :, 0])
        to_y[:, :-1] += to_tap
        to_tap, future = _tap_gradient(early * m, y[:, 1:], weight[:, :, 2])
        to_y[:, 1:] += to_tap
        _add_cosine_gradient(to_y, y, to_cosine, cosine, norm)
        to_weight = torch.stack((past, centre, future), dim=2)
        return to_y, to_weight, gradient.sum(dim=(0, 1, 2, 3)), to_sharpness, to_offset


def _tap_gradient(gradient: Tensor, frames: Tensor, kernel: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`depthwise_tap` for its frames and its kernel."""
    to_images, to_kernel, _ = torch.ops.aten.convolution_backward(
        _as_images(gradient),
        _as_images(frames),
        kernel,
        None,
        stride=(1, 1),
        padding=(1, 1),
        dilation=(1, 1),
        transposed=False,
        output_padding=(0, 0),
        groups=frames.shape[-1],
        output_mask=(True, True, False),
    )
    return rearrange(to_images, "(b t) c h w -> b t h w c", b=frames.shape[0]), to_kernel


def _add_cosine_gradient(
    to_y: Tensor, y: Tensor, to_cosine: Tensor, cosine: Tensor, norm: Tensor
) -> None:
    """Add to ``to_y`` what reaches the features through the cosine of neighbouring frames."""
    to_product = (to_cosine / (norm[:, :-1] * norm[:, 1:])).unsqueeze(-1)
    to_y[:, :-1].addcmul_(y[:, 1:], to_product)
    to_y[:, 1:].addcmul_(y[:, :-1], to_product)
    shrink = torch.zeros_like(norm)
    shrink[:, :-1] += to_cosine * cosine
    shrink[:, 1:] += to_cosine * cosine
    # A norm below the smallest is a constant.
    shrink = torch.where(norm > SMALLEST_NORM, shrink / norm.square(), 0.0)
    to_y.addcmul_(y, shrink.unsqueeze(-1), value=-1.0)


# --- the module --------------------------------------------------------------------------------


class MDConv(nn.Module):
    """Gaze: Modulated 2D/3D Convolution.

    A depthwise 3x3x3 convolution whose temporal taps open with the dissimilarity of neighbouring
    frames (:func:`frame_dissimilarity`, :func:`modulation`, :func:`modulated_conv`).

    Args:
        dim: channels C.
        gaze, similarity: see :class:`ogreg_core.models.ogreg.OGReGConfig`.
        sharpness, offset: initial a and b of every channel.
    """

    def __init__(
        self,
        dim: int,
        gaze: str = "modulated",
        similarity: str = "position",
        *,
        sharpness: float = INITIAL_SHARPNESS,
        offset: float = INITIAL_OFFSET,
    ) -> None:
        super().__init__()
        self.gaze = gaze
        self.similarity = similarity
        self.weight = nn.Parameter(torch.empty(dim, 1, 3, 3, 3))
        self.bias = nn.Parameter(torch.zeros(dim))
        if gaze == "modulated":
            self.sharpness = nn.Parameter(torch.full((dim,), float(sharpness)))
            self.offset = nn.Parameter(torch.full((dim,), float(offset)))

    def init_weights(self) -> None:
        """Draw the kernel; sharpness and offset keep what they were built with."""
        nn.init.normal_(self.weight, std=math.sqrt(2.0 / 27.0))

    def dissimilarity(self, y: Tensor) -> Tensor:
        """What the modulation listens to, at each position: ``[B, T, H, W, C] -> [B, T-1, H, W]``."""
        return frame_dissimilarity(y)

    def modulation(self, y: Tensor) -> Tensor | None:
        """m for features ``[B, T, H, W, C]``, broadcastable to ``[B, T-1, H, W, C]``; None is 0."""
        if self.gaze == "2d" or y.shape[1] == 1:
            return None
        if self.gaze == "3d":
            return y.new_ones(1)
        dissimilarity = frame_dissimilarity(y)
        if self.similarity == "frame":
            dissimilarity = dissimilarity.mean(dim=(2, 3), keepdim=True)
        return modulation(dissimilarity, self.sharpness, self.offset)

    def forward(self, y: Tensor) -> Tensor:
        if self.gaze == "modulated" and self.similarity == "position" and y.shape[1] > 1:
            parameters = self.weight, self.bias, self.sharpness, self.offset
            if kernels.can_use(y):
                return kernels.gaze(y, *parameters)
            if self._gradient_is_written_out(y):
                return _Gaze.apply(y, *parameters)
        return modulated_conv(y, self.weight, self.modulation(y), self.bias)

    def _gradient_is_written_out(self, y: Tensor) -> bool:
        # A compiler and a trace see through torch's own operators only.
        seen_through = torch.compiler.is_compiling() or torch.jit.is_tracing()
        # Under autocast the convolution changes type between what is saved.
        kind = y.device.type
        autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        mixed = y.dtype != self.weight.dtype or autocast
        return torch.is_grad_enabled() and not seen_through and not mixed
