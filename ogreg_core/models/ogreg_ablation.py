"""OG-ReG with choices that were measured against the model's own, for the ablation study.

The model itself (:mod:`ogreg_core.models.ogreg`) has the choices that are in use; here every other one
stays repeatable. Paper: arXiv 2604.06783, of which only the abstract and public summaries are known: all
choices are ours. With none made the network is OG-ReG, with the same names of parameters.

Notation: B batch, T frames, H W rows and columns, C channels, h w rows and columns of the coarse grid,
N = T h w coarse tokens. Layout: channels last, ``[B, T, H, W, C]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torchvision.models.convnext import LayerNorm2d

from ogreg_core.errors import UsageError
from ogreg_core.models.frame_times import Clock, given_times
from ogreg_core.models.gaze_forms import FORMS, SIMILARITIES, GazeForm, Heard, Listening, NoGaze
from ogreg_core.models.layers import Mlp
from ogreg_core.models.mdconv import INITIAL_OFFSET, INITIAL_SHARPNESS, MDConv
from ogreg_core.models.ogreg import (
    Block,
    OGReG,
    OGReGConfig,
    SoDA,
    Stage,
    configure,
    gaze_maps,
)
from ogreg_core.models.protocol import BlockMaps
from ogreg_core.models.stems import ConvStem

__all__ = ["AblatedBlock", "AblatedOGReG", "Choices", "GlanceForm", "build_ogreg_ablation"]


# --- the choices --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choices:
    """What is chosen otherwise; the defaults are OG-ReG's.

    Args:
        glance: ``soda`` or ``none``.
        gaze: ``none``, ``2d`` and ``3d`` of MDConv, or a form of :mod:`ogreg_core.models.gaze_forms`.
        similarity, modulation, listens, sharpness, offset, channels: see
            :class:`ogreg_core.models.gaze_forms.Listening`.
        gaze_spread: how many times as large as OG-ReG's the kernels of the Gaze begin.
        gaze_projection: a ``linear`` map of the features before the Gaze, or ``none``.
        fusion: the ``sum`` of Glance and Gaze; ``split``: each sees one half of the channels, and both
            lie side by side; ``learnt``: their sum with a learned scale per path and channel.
        position: positional encoding of the Glance by ``conv``, ``rotary`` or ``none``; or
            ``rotary-seconds``, whose time is not counted in frames, see
            :mod:`ogreg_core.models.frame_times`.
        pooling: of the Glance, by ``average`` or by a ``strided`` depthwise convolution, which starts
            as the average.
        interpolation: of the Glance, ``bilinear`` or ``nearest``.
        stem_norm: between the convolutions of the stem, over a ``batch`` or over the channels of each
            position by itself (``layer``).
    """

    glance: str = "soda"
    gaze: str = "modulated"
    similarity: str = "position"
    modulation: str = "position"
    listens: str = "features"
    sharpness: float = INITIAL_SHARPNESS
    offset: float = INITIAL_OFFSET
    channels: str = "own"
    gaze_spread: float = 1.0
    gaze_projection: str = "none"
    fusion: str = "sum"
    position: str = "conv"
    pooling: str = "average"
    interpolation: str = "bilinear"
    stem_norm: str = "batch"

    def listening(self) -> Listening:
        """What the modulation is made of."""
        return Listening(**{field.name: getattr(self, field.name) for field in fields(Listening)})


_LISTENING = {field.name for field in fields(Listening)}
# Choices that a form of the Gaze does not look at.
_DEAF = {
    **dict.fromkeys(["2d", "3d", "difference-3d", "3d-repeating"], _LISTENING),
    "none": _LISTENING | {"gaze_projection", "gaze_spread", "fusion"},
    "excitation": _LISTENING - {"modulation"},
}


def check_choices(choices: Choices, config: OGReGConfig) -> None:
    """Refuse what contradicts or would change nothing.

    Args:
        choices: each value by itself is one that there is.
        config: stages and stem.

    Raises:
        UsageError: names the choice.
    """
    if choices.glance == "none" and choices.gaze == "none":
        raise UsageError(
            "model options glance and gaze are both 'none'",
            why="nothing is left to look with",
            fix="take one of them out of the recipe",
        )
    idle = dict.fromkeys(_DEAF.get(choices.gaze, ()), f"gaze is {choices.gaze!r}")
    if choices.similarity in ("frame", "pooled"):
        idle["modulation"] = f"with similarity={choices.similarity!r} it is one per frame already"
    if choices.similarity == "channel":
        idle["listens"] = "the stem has other channels than the block"
    if max(stage.stride for stage in config.stages) == 1:
        idle |= dict.fromkeys(["pooling", "interpolation"], "all strides are 1")
    if config.stem == "patch":
        idle["stem_norm"] = "stem is 'patch'"
    if choices.glance == "none":
        names = ("position", "pooling", "interpolation", "fusion")
        idle |= dict.fromkeys(names, "glance is 'none'")
    default = Choices()
    for name, why in idle.items():
        if getattr(choices, name) != getattr(default, name):
            raise UsageError(
                f"model option {name}={getattr(choices, name)!r} has no effect here",
                why=why,
                fix=f"take model.options.{name} out of the recipe",
            )


# --- Glance -------------------------------------------------------------------------------------

# Of the rotary encoding: the slowest pair of channels turns about this many times more slowly than the
# fastest, one radian per cell; coarse grids are some ten cells long.
ROTARY_BASE = 100.0


def rotary_angles(
    grid: tuple[int, int, int], pairs: int, device: torch.device, times: Tensor | None = None
) -> Tensor:
    """Angles of a rotary encoding over time, rows and columns (RoFormer, arXiv 2104.09864, per axis).

    Each axis turns a third of the pairs of channels by its coordinate times a frequency, so that a
    product of a query and a key depends on the distance of their cells alone, whatever the grid's size.

    Args:
        grid: T, h, w.
        pairs: of channels of a head.
        device: of the result.
        times: coordinates of the frames instead of their numbers, ``[B, T]``.

    Returns:
        ``[T h w, pairs]``; with ``times``, ``[B, T h w, pairs]``.
    """
    third = pairs // 3
    coordinates = [torch.arange(cells, device=device)[None] for cells in grid]
    if times is not None:
        coordinates[0] = times
    angles = []
    for axis, count in enumerate((pairs - 2 * third, third, third)):
        exponents = torch.arange(count, device=device) / max(count, 1)
        shape = [len(coordinates[axis]), 1, 1, 1, count]
        shape[axis + 1] = grid[axis]
        along = (coordinates[axis][..., None] * ROTARY_BASE**-exponents).view(shape)
        angles.append(along.expand(len(coordinates[0]), *grid, count))
    found = torch.cat(angles, dim=-1).flatten(1, 3)
    return found[0] if times is None else found


def rotate(tokens: Tensor, angles: Tensor) -> Tensor:
    """Turn the pairs of channels (i, i + D/2): ``[B, N, ..., D]`` by ``[N, D/2]`` or ``[B, N, D/2]``."""
    shape = (*angles.shape[:-1], *[1] * (tokens.ndim - 3), angles.shape[-1])
    cosine, sine = angles.cos().view(shape), angles.sin().view(shape)
    first, second = tokens.chunk(2, dim=-1)
    turned = (first * cosine - second * sine, first * sine + second * cosine)
    return torch.cat(turned, dim=-1).to(tokens.dtype)


class GlanceForm(SoDA):
    """SoDA with another positional encoding, pooling or interpolation, see :class:`Choices`.

    Args:
        dim: channels C.
        heads: attention heads.
        stride: spatial stride of the pooling.
        choices: ``position``, ``pooling`` and ``interpolation``.
        clock: when frames appear, for ``rotary-seconds``.
    """

    def __init__(
        self, dim: int, heads: int, stride: int, choices: Choices, clock: Clock | None = None
    ) -> None:
        super().__init__(dim, heads, stride, position=choices.position == "conv")
        self.rotary = choices.position in ("rotary", "rotary-seconds")
        self.clock = clock
        self.interpolation = choices.interpolation
        self.reduction: nn.Conv2d | None = None
        if choices.pooling == "strided" and stride > 1:
            self.reduction = nn.Conv2d(dim, dim, stride, stride, groups=dim, bias=False)

    def init_weights(self) -> None:
        """As SoDA; the strided convolution starts as the average."""
        super().init_weights()
        if self.reduction is not None:
            nn.init.constant_(self.reduction.weight, 1.0 / self.stride**2)

    def pool(self, images: Tensor) -> Tensor:
        """``[N, C, H, W] -> [N, C, h, w]``; what a window of the convolution lacks at the border is the
        border repeated.
        """
        if self.reduction is None:
            return super().pool(images)
        height, width = images.shape[2:]
        beyond = (0, -width % self.stride, 0, -height % self.stride)
        return self.reduction(F.pad(images, beyond, mode="replicate"))

    def project(self, coarse: Tensor) -> Tensor:
        """Query, key and value of the coarse tokens: ``[B, T, h, w, C] -> [B, N, 3C]``."""
        qkv = super().project(coarse)
        if not self.rotary:
            return qkv
        tokens = rearrange(qkv, "b n (three m d) -> b n three m d", three=3, m=self.heads)
        _, frames, rows, columns, channels = coarse.shape
        pairs = channels // self.heads // 2
        times = None if self.clock is None else self.clock.now(coarse)
        angles = rotary_angles((frames, rows, columns), pairs, coarse.device, times)
        turned = torch.cat([rotate(tokens[:, :, :2], angles), tokens[:, :, 2:]], dim=2)
        return turned.flatten(2)

    def unpool(self, images: Tensor) -> Tensor:
        """``[N, C, h, w] -> [N, C, h * stride, w * stride]``."""
        if self.interpolation == "bilinear":
            return super().unpool(images)
        return F.interpolate(images, scale_factor=float(self.stride), mode="nearest")


class NoGlance(SoDA):
    """No Glance: nothing is seen, without parameters."""

    def __init__(self) -> None:
        nn.Module.__init__(self)

    def init_weights(self) -> None:
        """There is nothing to draw."""

    def coarse(self, y: Tensor) -> Tensor:
        """There are no coarse tokens.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            "this model has no Glance", why="it was built with model.options.glance='none'"
        )

    def forward(self, y: Tensor) -> Tensor:
        return y.new_zeros(1)


# --- the block ----------------------------------------------------------------------------------


class _Rotation(nn.Linear):
    """Begins as one, whatever the start of other linear layers is."""

    keeps_its_start = True


class AblatedBlock(Block):
    """Block with another fusion, a projection before the Gaze, or one path only, see
    :class:`Choices`.

    Args:
        stage: width, heads and stride; with ``fusion="split"`` each path has half of the channels and,
            where there are several, half of the heads, and the MLP is wider by the multiply-adds that
            the projections of the Glance save.
        choices: the choices.
        heard: what the stem says, if the Gaze listens to it.
        drop_path: rate of both residuals.
        clock: when frames appear, if the Glance asks for it.
    """

    def __init__(
        self,
        stage: Stage,
        choices: Choices,
        heard: Heard | None,
        drop_path: float,
        clock: Clock | None = None,
    ) -> None:
        halves = 2 if choices.fusion == "split" else 1
        dim, heads = stage.dim // halves, max(1, stage.heads // halves)
        unseeing = choices.glance == "none"
        glance = NoGlance() if unseeing else GlanceForm(dim, heads, stage.stride, choices, clock)
        super().__init__(stage.dim, glance, make_gaze(dim, choices, heard), drop_path)
        self.fusion = choices.fusion
        self.gaze_projection: nn.Linear | None = None
        if choices.gaze_projection == "linear":
            self.gaze_projection = _Rotation(dim, dim)
        if choices.fusion == "split":
            # Three maps of C x C to queries, keys and values became three of half the sides.
            saved = 9 * stage.dim // (8 * stage.stride**2)
            self.mlp = Mlp(stage.dim, 4 * stage.dim + saved)
        if choices.fusion == "learnt":
            self.glance_scale = nn.Parameter(torch.ones(dim))
            self.gaze_scale = nn.Parameter(torch.ones(dim))

    def init_weights(self) -> None:
        """The projection starts as a rotation, which leaves the features' scale and cosines alone."""
        if self.gaze_projection is not None:
            nn.init.orthogonal_(self.gaze_projection.weight)

    def inputs(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """What Glance and Gaze are given of the normalised features ``[B, T, H, W, C]``."""
        for_glance, for_gaze = y.chunk(2, dim=-1) if self.fusion == "split" else (y, y)
        if self.gaze_projection is not None:
            for_gaze = self.gaze_projection(for_gaze)
        return for_glance, for_gaze

    def look(self, y: Tensor) -> Tensor:
        """What both paths see together: ``[B, T, H, W, C]`` to the same."""
        for_glance, for_gaze = self.inputs(y)
        glance, gaze = self.glance(for_glance), self.gaze(for_gaze)
        if self.fusion == "split":
            return torch.cat([glance, gaze], dim=-1)
        if self.fusion == "learnt":
            return torch.addcmul(glance * self.glance_scale, gaze, self.gaze_scale)
        return glance + gaze

    def maps(self, y: Tensor) -> BlockMaps:
        """What the paths look at that there are."""
        for_glance, for_gaze = self.inputs(y)
        blind, unseeing = isinstance(self.gaze, NoGaze), isinstance(self.glance, NoGlance)
        return BlockMaps(
            glance=None if unseeing else self.glance.attention(for_glance),
            **({} if blind else gaze_maps(self.gaze, for_gaze)),
            between=not blind,
        )


def make_gaze(dim: int, choices: Choices, heard: Heard | None) -> MDConv:
    """The Gaze of a block: MDConv itself, with its kernels, where it has the choices."""
    if choices.gaze == "none":
        return NoGaze()
    if choices.gaze in ("2d", "3d"):
        return MDConv(dim, choices.gaze)
    listening = choices.listening()
    own = Listening(listening.similarity, sharpness=listening.sharpness, offset=listening.offset)
    if choices.gaze == "modulated" and own == listening and own.similarity in ("position", "frame"):
        return MDConv(dim, similarity=own.similarity, sharpness=own.sharpness, offset=own.offset)
    form: type[GazeForm] = FORMS[choices.gaze]
    return form(dim, listening, heard)


@torch.no_grad()
def spread_kernels(network: nn.Module, factor: float) -> None:
    """Multiply the kernels that were drawn for every Gaze, in place."""
    for gaze in network.modules():
        if isinstance(gaze, MDConv):
            for parameter in gaze.parameters(recurse=False):
                # Its own others are one number per channel.
                if parameter.ndim > 1:
                    parameter.mul_(factor)


# --- the model ----------------------------------------------------------------------------------


class AblatedOGReG(OGReG):
    """OG-ReG with choices made otherwise.

    Args:
        config: stages and stem.
        choices: the choices.
        num_classes, drop_path, dropout: see :class:`ogreg_core.models.ogreg.OGReG`.

    Raises:
        UsageError: choices that contradict or would change nothing.
    """

    def __init__(
        self,
        config: OGReGConfig,
        choices: Choices,
        num_classes: int,
        drop_path: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        check_choices(choices, config)
        heard = Heard() if choices.listens == "stem" else None
        clock = Clock() if choices.position == "rotary-seconds" else None
        super().__init__(
            config, num_classes, drop_path, dropout, partial(_make_block, choices, heard, clock)
        )
        if choices.stem_norm == "layer":
            assert isinstance(self.stem, ConvStem)
            self.stem.bn1 = LayerNorm2d(self.stem.conv2.in_channels)
        spread_kernels(self, choices.gaze_spread)
        self.choices = choices
        self.heard = heard
        self.clock = clock
        self.takes_times = clock is not None

    def forward(self, clip: Tensor, times: Tensor | None = None) -> Tensor:
        """Logits; ``times`` of the frames, ``[B, T]`` in seconds, where it takes them."""
        with given_times(self, times):
            return super().forward(clip)

    def embed(self, clip: Tensor) -> Tensor:
        if self.clock is not None:
            self.clock.read(clip)
        x = super().embed(clip)
        if self.heard is not None:
            self.heard.dissimilarity = SIMILARITIES[self.choices.similarity](x)
        return x


def _make_block(
    choices: Choices,
    heard: Heard | None,
    clock: Clock | None,
    stage: Stage,
    _config: OGReGConfig,
    drop_path: float,
) -> AblatedBlock:
    return AblatedBlock(stage, choices, heard, drop_path, clock)


# --- factory ------------------------------------------------------------------------------------


def build_ogreg_ablation(
    variant: str,
    num_classes: int,
    *,
    drop_path: float = 0.0,
    dropout: float = 0.0,
    strides: Sequence[int] | None = None,
    stem: str = "conv",
    **choices: Any,
) -> AblatedOGReG:
    """Build a named size.

    Args:
        variant, num_classes, drop_path, dropout, strides: see
            :func:`ogreg_core.models.ogreg.build_ogreg`.
        stem: ``conv`` or ``patch``.
        choices: fields of :class:`Choices`.

    Raises:
        UsageError: choices that contradict or would change nothing.
    """
    config = configure(variant, strides, stem=stem)
    return AblatedOGReG(config, Choices(**choices), num_classes, drop_path, dropout)
