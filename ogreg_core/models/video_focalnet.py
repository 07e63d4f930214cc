"""Video-FocalNet: spatio-temporal focal modulation.

Paper: "Video-FocalNets: Spatio-Temporal Focal Modulation for Video Action Recognition" (Wasim et al.,
ICCV 2023), arXiv 2307.06947. Upstream: github.com/TalalWasim/Video-FocalNets at 39eba99; image model:
github.com/microsoft/FocalNet. Written from the equations, not from their code; same outputs
(tests/benchmarks/parity.py).

A block has no attention. Each token's query is multiplied by two modulators of its own position: one
gathers context in its frame (depthwise convolutions of growing kernel, each level gated, and the
frame's mean), one gathers context along time at its pixel (convolutions that are *dense* over
channels, and the clip's mean). Both read the same normalised features.

Differs from the released code: the clip is ``[B, C, T, H, W]`` (theirs ``[B, T, C, H, W]``). Any number of
frames runs: nothing in the network depends on it, theirs takes it from the configuration; with tubelets, a
clip that is no multiple of them is filled up with its last frame. Temporal convolutions are computed
as convolutions of kernel k x 1 over time and pixels, which saves regrouping to one sequence per pixel.
As released: stochastic depth drops single frames of a clip, and height and width are rounded down to
what the strides reach (remainders at the bottom and right are not seen).

At initialisation both modulators are small and their product is nearly zero, so that a fresh network
hardly sees its neighbours, in space or time; weights of the image model do not change that.

Notation: B batch, T token frames (input frames, or tubelets), H W rows and columns, C channels,
L focal levels, N independent images or clips, P Q the two axes of a plane: rows and columns, or frames
and pixels. Layout inside the network: channels last, ``[B, T, H, W, C]``.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from ogreg_core.errors import UsageError
from ogreg_core.models.layers import DropPath, Mlp, captured_inputs, drop_path_rates
from ogreg_core.models.protocol import BlockMaps
from ogreg_core.models.staged import StagedNetwork
from ogreg_core.models.stems import ConvStem
from ogreg_core.models.weights import rename

__all__ = [
    "VARIANTS",
    "Block",
    "FocalModulation",
    "Stage",
    "VideoFocalNet",
    "VideoFocalNetConfig",
    "build_video_focalnet",
    "focal_context",
    "map_video_focalnet",
]


# --- gathering context as a pure function of tensors ---------------------------------------------


def focal_context(
    context: Tensor,
    gates: Tensor,
    kernels: Sequence[Tensor],
    *,
    groups: int,
    pooled: tuple[int, ...],
) -> Tensor:
    """Context of growing reach, each level weighted by its gate, and its mean as the last level.

    ``c <- GELU(conv_l(c))`` for each kernel l, zeros beyond the borders;
    ``sum_l c_l g_l + GELU(mean(c_L)) g_L``.

    Args:
        context: ``[N, C, P, Q]``.
        gates: ``[N, L+1, P, Q]``.
        kernels: L of them, ``[C, C / groups, p, q]``, p and q odd.
        groups: C for depthwise, 1 for dense convolutions.
        pooled: axes of the mean: 2 and 3 for images, 2 for time.

    Returns:
        ``[N, C, P, Q]``.
    """
    levels = []
    for kernel in kernels:
        padding = (kernel.shape[2] // 2, kernel.shape[3] // 2)
        context = F.gelu(F.conv2d(context, kernel, padding=padding, groups=groups))
        levels.append(context)
    levels.append(F.gelu(context.mean(pooled, keepdim=True)))
    gated = [level * gates[:, i : i + 1] for i, level in enumerate(levels)]
    return sum(gated[1:], gated[0])


# --- configuration -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """One stage: width, number of blocks, focal levels, and kernel size of the first level."""

    dim: int
    depth: int
    levels: int = 2
    window: int = 3


@dataclass(frozen=True)
class VideoFocalNetConfig:
    """All choices of the architecture; the defaults are those of all released weights.

    Args:
        stages: from fine to coarse; each is half the spatial size of the one before.
        tubelet: input frames per token frame.
        stem: its ``own`` patches, or ``conv`` for :class:`ogreg_core.models.stems.ConvStem`, whose token
            frames are tubelets of 2.
        focal_factor: by how much the kernel grows from level to level.
        conv_embed: overlapping convolutions (7, and 3 between stages) instead of patches (4, and 2).
        layerscale: learnt factors on the branches, 1e-4 at first.
        postln: norms after modulation and MLP instead of before.
        postln_in_modulation: a norm on the modulated query.
        normalize_modulator: the sum over levels divided by their number.
    """

    stages: tuple[Stage, ...]
    tubelet: int = 1
    stem: Literal["own", "conv"] = "own"
    focal_factor: int = 2
    conv_embed: bool = False
    layerscale: bool = False
    postln: bool = False
    postln_in_modulation: bool = False
    normalize_modulator: bool = False


def _stages(width: int, depths: Sequence[int]) -> tuple[Stage, ...]:
    return tuple(Stage(dim=width << i, depth=depth) for i, depth in enumerate(depths))


# n is ours, at the size of ogreg-n: of clips of 64 pixels the authors' one frame per token frame would
# make twice the tokens of every other network of that size.
VARIANTS = {
    "n": VideoFocalNetConfig(_stages(24, (1, 1, 3, 1)), tubelet=2),
    "t": VideoFocalNetConfig(_stages(96, (2, 2, 6, 2))),
    "s": VideoFocalNetConfig(_stages(96, (2, 2, 18, 2))),
    "b": VideoFocalNetConfig(_stages(128, (2, 2, 18, 2))),
}

_LAYERSCALE = 1e-4


# --- stem and downsampling ---------------------------------------------------------------------


class PatchEmbed(nn.Module):
    """Strided convolution of each frame, then LayerNorm: ``[B, T, H, W, C] -> [B, T, H / stride, W /
    stride, dim]``.
    """

    def __init__(self, channels: int, dim: int, kernel: int, stride: int, padding: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, kernel, stride, padding)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        images = self.proj(rearrange(x, "b t h w c -> (b t) c h w"))
        return self.norm(rearrange(images, "(b t) c h w -> b t h w c", b=x.shape[0]))


class TubeletEmbed(nn.Module):
    """Non-overlapping patches of several frames, then LayerNorm: ``[B, T, H, W, 3] -> [B, T / tubelet,
    H / 4, W / 4, dim]``.
    """

    def __init__(self, dim: int, tubelet: int) -> None:
        super().__init__()
        self.tubelet = tubelet
        self.proj = nn.Conv3d(3, dim, (tubelet, 4, 4), (tubelet, 4, 4))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        missing = -x.shape[1] % self.tubelet
        x = torch.cat([x, *[x[:, -1:]] * missing], dim=1) if missing else x
        volume = self.proj(rearrange(x, "b t h w c -> b c t h w"))
        return self.norm(rearrange(volume, "b c t h w -> b t h w c"))


def _stem(config: VideoFocalNetConfig) -> nn.Module:
    dim = config.stages[0].dim
    if config.stem == "conv":
        _check_conv_stem(config)
        return ConvStem(dim)
    if config.tubelet == 1:
        return PatchEmbed(3, dim, 7, 4, 2) if config.conv_embed else PatchEmbed(3, dim, 4, 4, 0)
    if config.conv_embed:
        raise UsageError(
            f"Video-FocalNet cannot have tubelets of {config.tubelet} frames and conv_embed",
            why="the stem of tubelets is a convolution without overlap",
            fix="leave one of the two at its default",
        )
    return TubeletEmbed(dim, config.tubelet)


def _check_conv_stem(config: VideoFocalNetConfig) -> None:
    if config.tubelet != 2 or config.conv_embed:
        other = "conv_embed" if config.conv_embed else f"tubelets of {config.tubelet} frames"
        raise UsageError(
            f"Video-FocalNet cannot have the stem conv and {other}",
            why="that stem makes one token frame of 2 frames by itself",
            fix="model.options.tubelet=2",
        )


# --- the block ---------------------------------------------------------------------------------


class FocalModulation(nn.Module):
    """Spatio-temporal focal modulation: ``Proj(query * spatial * temporal)``.

    Args:
        stage: width, levels and first kernel.
        config: focal factor, and norms inside the modulation.
    """

    def __init__(self, stage: Stage, config: VideoFocalNetConfig) -> None:
        super().__init__()
        dim, self.levels = stage.dim, stage.levels
        self.normalize = config.normalize_modulator
        sizes = [stage.window + config.focal_factor * level for level in range(stage.levels)]
        self.f = nn.Linear(dim, 2 * dim + stage.levels + 1)
        self.focal_layers = nn.ModuleList(
            nn.Conv2d(dim, dim, size, groups=dim, bias=False) for size in sizes
        )
        self.h = nn.Conv2d(dim, dim, 1)
        self.f_temporal = nn.Linear(dim, dim + stage.levels + 1)
        self.focal_layers_temporal = nn.ModuleList(
            nn.Conv1d(dim, dim, size, bias=False) for size in sizes
        )
        self.h_temporal = nn.Conv1d(dim, dim, 1)
        self.ln = nn.LayerNorm(dim) if config.postln_in_modulation else None
        self.proj = nn.Linear(dim, dim)

    def _modulator(self, total: Tensor, h: nn.Conv1d | nn.Conv2d) -> Tensor:
        if self.normalize:
            total = total / (self.levels + 1)
        return F.linear(total, h.weight.flatten(1), h.bias)

    def query_and_spatial(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Query and spatial modulator of features ``[B, T, H, W, C]``, each of the same shape."""
        dim = u.shape[-1]
        query, context, gates = self.f(u).split([dim, dim, self.levels + 1], dim=-1)
        total = focal_context(
            # Channels-last memory read as NCHW: no copy, and the fast kernels on CPU and GPU.
            rearrange(context, "b t h w c -> (b t) c h w"),
            rearrange(gates, "b t h w level -> (b t) level h w"),
            [cast(Tensor, layer.weight) for layer in self.focal_layers],
            groups=dim,
            pooled=(2, 3),
        )
        images = rearrange(total, "(b t) c h w -> b t h w c", b=u.shape[0])
        return query, self._modulator(images, self.h)

    def temporal(self, u: Tensor) -> Tensor:
        """Temporal modulator of features ``[B, T, H, W, C]``, of the same shape."""
        context, gates = self.f_temporal(u).split([u.shape[-1], self.levels + 1], dim=-1)
        total = focal_context(
            rearrange(context, "b t h w c -> b c t (h w)"),
            rearrange(gates, "b t h w level -> b level t (h w)"),
            [cast(Tensor, layer.weight).unsqueeze(-1) for layer in self.focal_layers_temporal],
            groups=1,
            pooled=(2,),
        )
        volume = rearrange(total, "b c t (h w) -> b t h w c", h=u.shape[2])
        return self._modulator(volume, self.h_temporal)

    def temporal_gates(self, u: Tensor) -> Tensor:
        """Weights of the temporal levels, the clip's mean last: ``[B, T, H, W, L+1]``."""
        return self.f_temporal(u)[..., u.shape[-1] :]

    def forward(self, u: Tensor) -> Tensor:
        query, spatial = self.query_and_spatial(u)
        modulated = query * spatial * self.temporal(u)
        return self.proj(modulated if self.ln is None else self.ln(modulated))


class Block(nn.Module):
    """``x + Mod(LN(x))``, then ``x + MLP(LN(x))``; with ``postln``, ``x + LN(Mod(x))`` and so on.

    Stochastic depth drops the branch of single frames.
    """

    def __init__(self, stage: Stage, config: VideoFocalNetConfig, drop_path: float) -> None:
        super().__init__()
        self.postln = config.postln
        self.norm1 = nn.LayerNorm(stage.dim)
        self.modulation = FocalModulation(stage, config)
        self.norm2 = nn.LayerNorm(stage.dim)
        self.mlp = Mlp(stage.dim, 4 * stage.dim)
        self.drop_path = DropPath(drop_path)
        scales = torch.full((2, stage.dim), _LAYERSCALE)
        self.gamma_1 = nn.Parameter(scales[0].clone()) if config.layerscale else None
        self.gamma_2 = nn.Parameter(scales[1].clone()) if config.layerscale else None

    def _branch(self, x: Tensor, norm: nn.Module, function: nn.Module) -> Tensor:
        return norm(function(x)) if self.postln else function(norm(x))

    def _add(self, x: Tensor, branch: Tensor, gamma: Tensor | None) -> Tensor:
        branch = branch if gamma is None else gamma * branch
        frames = self.drop_path(rearrange(branch, "b t h w c -> (b t) h w c"))
        return x + rearrange(frames, "(b t) h w c -> b t h w c", b=x.shape[0])

    def forward(self, x: Tensor) -> Tensor:
        x = self._add(x, self._branch(x, self.norm1, self.modulation), self.gamma_1)
        return self._add(x, self._branch(x, self.norm2, self.mlp), self.gamma_2)


# --- the model ---------------------------------------------------------------------------------


class VideoFocalNet(StagedNetwork):
    """Video-FocalNet: ``[B, 3, T, H, W]`` float, normalised, any T >= 1 and H, W >= 32, to logits ``[B,
    classes]``.

    Args:
        config: architecture.
        num_classes: size of the head.
        drop_path: stochastic depth of the last block; it grows linearly from 0 at the first.
            Released weights were trained with 0.2 (t), 0.3 (s) and 0.5 (b).
        dropout: before the head's linear layer.

    Raises:
        UsageError: tubelets together with ``conv_embed``, or a stem ``conv`` without tubelets of 2.
    """

    def __init__(
        self,
        config: VideoFocalNetConfig,
        num_classes: int,
        drop_path: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.config = config
        self.num_classes = num_classes
        dims = [stage.dim for stage in config.stages]
        depth = sum(stage.depth for stage in config.stages)
        rates = iter(drop_path_rates(drop_path, depth))
        kernel, padding = (3, 1) if config.conv_embed else (2, 0)
        self.stem = _stem(config)
        self.stages = nn.ModuleList(
            nn.Sequential(*(Block(stage, config, next(rates)) for _ in range(stage.depth)))
            for stage in config.stages
        )
        self.merges = nn.ModuleList(
            PatchEmbed(fine, coarse, kernel, 2, padding)
            for fine, coarse in itertools.pairwise(dims)
        )
        self.norm = nn.LayerNorm(dims[-1])
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(dims[-1], num_classes)
        self.apply(_init_weights)

    def embed(self, clip: Tensor) -> Tensor:
        if self.config.stem == "conv":
            return self.stem(clip)
        return self.stem(rearrange(clip, "b c t h w -> b t h w c"))

    @torch.no_grad()
    def forward_with_maps(self, clip: Tensor) -> tuple[Tensor, dict[str, BlockMaps]]:
        """Logits and, per block, what its queries are multiplied by; the normal path is untouched.

        The gaze is the norm over channels of spatial times temporal modulator. The authors show the
        magnitude of the spatial modulator and have published no code for it; the product is our
        choice: it is what acts, and equals theirs where the temporal modulator is one. Profiles:
        mean norm of either modulator per frame, ``spatial`` and ``temporal``, and the temporal gate
        of each level, ``gate 3 frames``, ``gate 7 frames`` (by their reach) and ``gate clip``.
        """
        blocks = self.blocks()
        with captured_inputs({name: block.modulation for name, block in blocks.items()}) as inputs:
            logits = self(clip)
        return logits, {name: _block_maps(blocks[name].modulation, u) for name, u in inputs.items()}

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that must not decay: norms, biases and layer scales."""
        return {name for name, parameter in self.named_parameters() if parameter.ndim <= 1}


def _block_maps(modulation: FocalModulation, u: Tensor) -> BlockMaps:
    spatial = modulation.query_and_spatial(u)[1].float()
    temporal = modulation.temporal(u).float()
    profiles = {
        name: reduce(modulator.norm(dim=-1), "b t h w -> b t", "mean")
        for name, modulator in (("spatial", spatial), ("temporal", temporal))
    }
    reach, names = 1, []
    for layer in modulation.focal_layers_temporal:
        reach += cast(nn.Conv1d, layer).kernel_size[0] - 1
        names.append(f"gate {reach} frames")
    gates = reduce(modulation.temporal_gates(u).float(), "b t h w level -> level b t", "mean")
    profiles |= zip([*names, "gate clip"], gates, strict=True)
    return BlockMaps(gaze=(spatial * temporal).norm(dim=-1), profiles=profiles)


def _init_weights(module: nn.Module) -> None:
    # Convolutions keep torch's initialisation, as released.
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


# --- foreign checkpoints -----------------------------------------------------------------------

_NAMES = (
    (r"^patch_embed\.", "stem."),
    (r"^layers\.(\d+)\.blocks\.(\d+)\.", r"stages.\1.\2."),
    (r"^layers\.(\d+)\.downsample\.", r"merges.\1."),
    (r"(\.focal_layers(?:_temporal)?\.\d+)\.0\.", r"\1."),
    (r"\.mlp\.fc1\.", ".mlp.0."),
    (r"\.mlp\.fc2\.", ".mlp.3."),
    (r"^head\.fc\.", "head."),
)


def map_video_focalnet(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of the released video checkpoints, and of image FocalNets with small receptive field
    (SRF) as released or from timm, to ours; other names stay as they are.

    All parameters of both have a place. Image models lack the temporal branch, six tensors per block;
    the patches of their stem are inflated over a tubelet by ``weights.initialise``.

    Args:
        state: a state dict, as ``weights.load_state_file`` takes it out of ``model``.
    """
    # timm puts a downsampling at the beginning of a stage, and linear layers as 1x1 convolutions.
    timm = "stem.proj.weight" in state and "layers.1.downsample.proj.weight" in state
    renamed = {}
    for name, tensor in state.items():
        if timm:
            name = re.sub(r"^layers\.(\d+)\.downsample", _one_stage_earlier, name)
            if re.search(r"(modulation\.(f|proj)|mlp\.fc[12])\.weight$", name):
                tensor = tensor.flatten(1)
        renamed[rename(name, _NAMES)] = tensor
    return renamed


def _one_stage_earlier(match: re.Match[str]) -> str:
    return f"layers.{int(match[1]) - 1}.downsample"


# --- factory -----------------------------------------------------------------------------------


def build_video_focalnet(
    variant: str,
    num_classes: int,
    *,
    drop_path: float = 0.0,
    dropout: float = 0.0,
    **choices: Any,
) -> VideoFocalNet:
    """Build a named size.

    Args:
        variant: ``n``, ``t``, ``s`` or ``b``.
        num_classes: size of the head.
        drop_path, dropout: see :class:`VideoFocalNet`.
        choices: ``tubelet``, ``stem`` and other fields of :class:`VideoFocalNetConfig`.
    """
    return VideoFocalNet(replace(VARIANTS[variant], **choices), num_classes, drop_path, dropout)
