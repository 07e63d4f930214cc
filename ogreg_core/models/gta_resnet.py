"""GTA on torchvision's ResNet-50, and on a thin one of ours; see :mod:`ogreg_core.models.gta`.

Notation: B batch, T frames, H W rows and columns, C channels. Features between stages are given
channels last, ``[B, T, H, W, C]``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from einops import rearrange, reduce
from torch import Tensor, nn
from torchvision.models import resnet50
from torchvision.models.resnet import Bottleneck, ResNet

from ogreg_core.errors import UsageError
from ogreg_core.models.gta import (
    GlobalTemporalAttention,
    GTAConfig,
    matrix_names,
    run_with_maps,
)
from ogreg_core.models.layers import drop_path_rates
from ogreg_core.models.protocol import BlockMaps
from ogreg_core.models.weights import rename

__all__ = ["PLACEMENTS", "GTAResNet", "ThinResNet", "build_gta", "map_gta"]


class ThinResNet(ResNet):
    """ResNet with a quarter of the usual channels, the stem included.

    Args:
        depths: bottlenecks per stage; two make 26 layers.
    """

    inplanes: int

    def __init__(self, depths: Sequence[int] = (2, 2, 2, 2)) -> None:
        super().__init__(Bottleneck, list(depths))
        dim = 16
        self.conv1 = nn.Conv2d(3, dim, 7, stride=2, padding=3, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.bn1 = nn.BatchNorm2d(dim)
        self.fc = nn.Linear(8 * dim * Bottleneck.expansion, 1)

    def _make_layer(
        self, block: Any, planes: int, blocks: int, stride: int = 1, dilate: bool = False
    ) -> nn.Sequential:
        planes //= 4
        # The constructor counts on a stem of 64 channels.
        if self.inplanes == 64 and stride == 1:
            self.inplanes = planes
        return super()._make_layer(block, planes, blocks, stride, dilate)


# Blocks of ResNet-50's stages (both from 0) that a module follows: where PySlowFast puts non-local
# blocks, and the cheaper half of it; for our small network, after every block of the same stages.
PLACEMENTS: dict[str, tuple[tuple[int, int], ...]] = {
    "nl5": ((1, 1), (1, 3), (2, 1), (2, 3), (2, 5)),
    "res4": ((2, 1), (2, 3), (2, 5)),
    "nl4": ((1, 0), (1, 1), (2, 0), (2, 1)),
}

# With the placement that is usual for it.
_BACKBONES: dict[str, tuple[Callable[[], ResNet], str]] = {
    "r50": (resnet50, "nl5"),
    "n": (ThinResNet, "nl4"),
}


class GTAResNet(nn.Module):
    """torchvision's ResNet-50, frame by frame, with global temporal attention after some of its
    blocks: ``[B, 3, T, H, W]`` float, normalised, H, W >= 32, to logits ``[B, classes]``.

    Args:
        config: of the modules.
        num_classes: size of the head.
        frames: T, fixed if ``config.temporal`` is ``global``.
        placement: key of ``PLACEMENTS``; None for the backbone's own.
        drop_path: stochastic depth of the last module; it grows linearly from 0 at the first. The
            blocks of ResNet have none.
        dropout: before the head's linear layer.
        backbone: ``r50``, or ``n``, a ResNet-26 with a quarter of the channels.

    Raises:
        UsageError: a placement after a block that the backbone does not have.
    """

    def __init__(
        self,
        config: GTAConfig,
        num_classes: int,
        frames: int,
        placement: str | None = None,
        drop_path: float = 0.0,
        dropout: float = 0.0,
        backbone: str = "r50",
    ) -> None:
        super().__init__()
        self.config = config
        self.num_classes = num_classes
        build, usual = _BACKBONES[backbone]
        net = build()
        self.stem = nn.Sequential(
            OrderedDict(conv1=net.conv1, bn1=net.bn1, relu=net.relu, maxpool=net.maxpool)
        )
        self.stages = nn.ModuleList([net.layer1, net.layer2, net.layer3, net.layer4])
        self.places = PLACEMENTS[placement or usual]
        if any(block >= len(self.stages[stage]) for stage, block in self.places):  # type: ignore[arg-type]
            raise UsageError(
                f"placement {placement} does not fit into the backbone {backbone}",
                why="it has fewer blocks",
                fix=f"model.options.placement={usual}",
            )
        rates = drop_path_rates(drop_path, len(self.places))
        widths = [stage[-1].conv3.out_channels for stage in (net.layer1, net.layer2, net.layer3)]
        self.gta = nn.ModuleList(
            GlobalTemporalAttention(widths[stage], frames, config, rate)
            for (stage, _), rate in zip(self.places, rates, strict=True)
        )
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(net.fc.in_features, num_classes)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward_stages(self, clip: Tensor) -> list[Tensor]:
        """Features after each stage, ``[B, T, H/4, W/4, C]`` halving in space, doubling in channels."""
        batch = clip.shape[0]
        x = self.stem(rearrange(clip, "b c t h w -> (b t) c h w"))
        features = []
        for s, stage in enumerate(self.stages):
            for b, block in enumerate(stage.children()):
                x = block(x)
                if (s, b) in self.places:
                    volume = rearrange(x, "(b t) c h w -> b t h w c", b=batch)
                    volume = self.gta[self.places.index((s, b))](volume)
                    x = rearrange(volume, "b t h w c -> (b t) c h w")
            features.append(rearrange(x, "(b t) c h w -> b t h w c", b=batch))
        return features

    def forward(self, clip: Tensor) -> Tensor:
        pooled = reduce(self.forward_stages(clip)[-1], "b t h w c -> b c", "mean")
        return self.head(self.dropout(pooled))

    @torch.no_grad()
    def forward_with_maps(self, clip: Tensor) -> tuple[Tensor, dict[str, BlockMaps]]:
        """Logits, and the maps of each module under the name of the block it follows, such as
        ``stage2.block4``; the normal path is left untouched.
        """
        names = [f"stage{stage + 1}.block{block + 1}" for stage, block in self.places]
        return run_with_maps(self, clip, dict(zip(names, self.gta, strict=True)))  # type: ignore[arg-type]

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that must not decay: norms, biases, and the temporal matrices."""
        flat = {name for name, parameter in self.named_parameters() if parameter.ndim <= 1}
        return flat | matrix_names(self)

    def layers(self) -> list[list[str]]:
        """Stem, every block (with the module that follows it), classifier."""
        layers = [["stem"]]
        for s, stage in enumerate(self.stages):
            for b in range(len(stage)):  # type: ignore[arg-type]
                follower = [f"gta.{self.places.index((s, b))}"] if (s, b) in self.places else []
                layers.append([f"stages.{s}.{b}", *follower])
        return [*layers, ["head"]]

    def stage_blocks(self) -> list[list[nn.Module]]:
        """The blocks of each stage, each module after the block it follows."""
        stages = []
        for s, stage in enumerate(self.stages):
            blocks: list[nn.Module] = []
            for b, block in enumerate(stage.children()):
                blocks.append(block)
                if (s, b) in self.places:
                    blocks.append(self.gta[self.places.index((s, b))])
            stages.append(blocks)
        return stages


# --- weights and factory -----------------------------------------------------------------------


_NAMES = (
    (r"^(conv1|bn1)\.", r"stem.\1."),
    *((rf"^layer{stage + 1}\.", f"stages.{stage}.") for stage in range(4)),
    (r"^fc\.", "head."),
)


def map_gta(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of torchvision's ``resnet50`` to ours; our own and unknown names stay as they are.

    Every name of ``resnet50`` has its place, the classifier ``fc`` as ``head``. What stays at its
    initialisation is the modules, ``gta``.
    """
    return {rename(name, _NAMES): tensor for name, tensor in state.items()}


def build_gta(
    variant: str,
    num_classes: int,
    *,
    drop_path: float = 0.0,
    dropout: float = 0.0,
    frames: int = 8,
    size: int = 224,
    placement: Literal["nl5", "res4", "nl4"] | None = None,
    **choices: Any,
) -> GTAResNet:
    """Build GTA on a named backbone.

    Args:
        variant: ``r50``, or ``n``, ours, a ResNet-26 with a quarter of the channels.
        num_classes: size of the head.
        drop_path, dropout: see :class:`GTAResNet`.
        frames: T.
        size: side of the picture; any from 32 on, the architecture does not fix it.
        placement: five modules in stages 2 and 3 as non-local blocks (``nl5``), or the three of stage 3
            (``res4``); of ``n`` one after every block of stages 2 and 3 (``nl4``). None for the usual one.
        choices: see :class:`GTAConfig`.

    Raises:
        UsageError: no such backbone, pictures too small, or choices that do not fit together.
    """
    if variant not in _BACKBONES:
        raise UsageError(
            f"GTA has no backbone {variant!r}", why=f"it is built on {' or '.join(_BACKBONES)}"
        )
    if size < 32:
        raise UsageError(f"pictures of {size} pixels are too small", why="the least is 32")
    config = GTAConfig(**choices)
    return GTAResNet(config, num_classes, frames, placement, drop_path, dropout, variant)
