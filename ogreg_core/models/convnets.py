"""Convolutional baselines: R(2+1)D and S3D, of torchvision's modules.

Papers: "A Closer Look at Spatiotemporal Convolutions for Action Recognition" (arXiv 1711.11248),
"Rethinking Spatiotemporal Feature Learning" (1712.04851).
Upstream: github.com/pytorch/vision, ``torchvision.models.video``, whose modules are used as they are.

With the same weights the logits are torchvision's to the bit. Names of parameters are torchvision's,
except that every classifier is called ``head``. Differs from torchvision in what can be asked for:

* R(2+1)D has a dropout before the classifier, as in its paper (off by default);
* S3D takes clips that are smaller than its last pooling window, which is cut to the grid.

The sizes ``n`` are ours: the same layers with a fraction of the channels, the stem included. Their
batch norms move the statistics by a tenth per step, torchvision's S3D by a thousandth: trainings of a
few thousand steps would end with those of the beginning.

Maps: a convolution has no attention; the norm of its activations after each stage stands in as
``gaze``.

Notation: B batch, T frames, H W rows and columns, C channels. Features between stages are given
channels last, ``[B, T, H, W, C]``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import partial
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torchvision.models.video import r2plus1d_18, s3d
from torchvision.models.video.resnet import BasicBlock, Conv2Plus1D, VideoResNet
from torchvision.models.video.s3d import SepInceptionBlock3D, TemporalSeparableConv
from torchvision.ops.misc import Conv3dNormActivation

from ogreg_core.errors import UsageError
from ogreg_core.models.protocol import BlockMaps

__all__ = ["S3D", "R2Plus1D", "ThinR2Plus1D"]


# --- thinner networks of torchvision's modules ---------------------------------------------------


class _ThinStem(nn.Sequential):
    """torchvision's stem of R(2+1)D, thinner."""

    def __init__(self, middle: int, dim: int) -> None:
        super().__init__(
            nn.Conv3d(3, middle, (1, 7, 7), stride=(1, 2, 2), padding=(0, 3, 3), bias=False),
            nn.BatchNorm3d(middle),
            nn.ReLU(inplace=True),
            nn.Conv3d(middle, dim, (3, 1, 1), padding=(1, 0, 0), bias=False),
            nn.BatchNorm3d(dim),
            nn.ReLU(inplace=True),
        )


class ThinR2Plus1D(VideoResNet):
    """R(2+1)D-18 with three sixteenths of its channels."""

    inplanes: int

    def __init__(self, num_classes: int) -> None:
        stem = partial(_ThinStem, 8, 12)
        super().__init__(BasicBlock, [Conv2Plus1D] * 4, [2] * 4, stem)
        self.fc = nn.Linear(96, num_classes)
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)

    def _make_layer(
        self, block: Any, conv_builder: Any, planes: int, blocks: int, stride: int = 1
    ) -> nn.Sequential:
        planes = planes * 3 // 16
        # The constructor counts on a stem of 64 channels.
        self.inplanes = min(self.inplanes, planes)
        return super()._make_layer(block, conv_builder, planes, blocks, stride)


# Channels of S3D's inception blocks, of which the thin one has three eighths: in, the first branch, middle and
# out of the second and the third, the fourth.
_INCEPTIONS = (
    (
        (192, 64, 96, 128, 16, 32, 32),
        (256, 128, 128, 192, 32, 96, 64),
    ),
    (
        (480, 192, 96, 208, 16, 48, 64),
        (512, 160, 112, 224, 24, 64, 64),
        (512, 128, 128, 256, 24, 64, 64),
        (512, 112, 144, 288, 32, 64, 64),
        (528, 256, 160, 320, 32, 128, 128),
    ),
    (
        (832, 256, 160, 320, 32, 128, 128),
        (832, 384, 192, 384, 48, 128, 128),
    ),
)


def _thin_s3d_features() -> nn.Sequential:
    """The layers of torchvision's ``s3d().features`` with three eighths of the channels."""
    norm = partial(nn.BatchNorm3d, eps=1e-3)
    first, second, third = (
        [SepInceptionBlock3D(*(width * 3 // 8 for width in widths), norm) for widths in stage]
        for stage in _INCEPTIONS
    )
    return nn.Sequential(
        TemporalSeparableConv(3, 24, 7, 2, 3, norm),
        nn.MaxPool3d((1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1)),
        Conv3dNormActivation(24, 24, kernel_size=1, norm_layer=norm),
        TemporalSeparableConv(24, 72, 3, 1, 1, norm),
        nn.MaxPool3d((1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1)),
        *first,
        nn.MaxPool3d((3, 3, 3), stride=(2, 2, 2), padding=(1, 1, 1)),
        *second,
        nn.MaxPool3d((2, 2, 2), stride=(2, 2, 2), padding=(0, 0, 0)),
        *third,
    )


# --- the networks --------------------------------------------------------------------------------


class _ConvNet(nn.Module, ABC):
    """What R(2+1)D and S3D share: parts that are run one after the other, grouped into stages."""

    num_classes: int

    @abstractmethod
    def parts(self) -> list[dict[str, nn.Module]]:
        """The parts of each stage by name, in order; the stem belongs to the first."""

    @abstractmethod
    def classify(self, x: Tensor) -> Tensor:
        """Features ``[B, C, T, H, W]`` of the last stage to logits."""

    def check(self, clip: Tensor) -> None:
        """Refuse clips that the network cannot take."""

    def forward_stages(self, clip: Tensor) -> list[Tensor]:
        """Features after each stage, ``[B, T, H, W, C]``."""
        self.check(clip)
        x = clip
        features = []
        for stage in self.parts():
            for part in stage.values():
                x = part(x)
            features.append(rearrange(x, "b c t h w -> b t h w c"))
        return features

    def forward(self, clip: Tensor) -> Tensor:
        return self.classify(rearrange(self.forward_stages(clip)[-1], "b t h w c -> b c t h w"))

    @torch.no_grad()
    def forward_with_maps(self, clip: Tensor) -> tuple[Tensor, dict[str, BlockMaps]]:
        """Logits, and the norm of the activations after each stage: where the network responds. It
        is no attention.
        """
        features = self.forward_stages(clip)
        maps = {
            f"stage{s}": BlockMaps(gaze=torch.linalg.vector_norm(x.float(), dim=-1))
            for s, x in enumerate(features, 1)
        }
        return self.classify(rearrange(features[-1], "b t h w c -> b c t h w")), maps

    def no_weight_decay(self) -> set[str]:
        """Norms and biases."""
        return {name for name, parameter in self.named_parameters() if parameter.ndim <= 1}

    def layers(self) -> list[list[str]]:
        """Every part that has parameters, then the head."""
        own = {name.rpartition(".")[0] for name, _ in self.named_parameters()}
        names = [name for stage in self.parts() for name in stage]
        learnt = [
            name for name in names if any(f"{found}.".startswith(f"{name}.") for found in own)
        ]
        return [*([name] for name in learnt), ["head"]]

    def stage_blocks(self) -> list[list[nn.Module]]:
        """The parts of each stage."""
        return [list(stage.values()) for stage in self.parts()]


class R2Plus1D(_ConvNet):
    """R(2+1)D-18: ``[B, 3, T, H, W]``, any T >= 1 and H, W >= 32, to ``[B, classes]``.

    Args:
        variant: ``r2plus1d_18``, or ``r2plus1d_n`` with three sixteenths of its channels.
        num_classes: size of the head.
        dropout: before the head.
    """

    def __init__(self, variant: str, num_classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        body = (
            ThinR2Plus1D(num_classes)
            if variant == "r2plus1d_n"
            else r2plus1d_18(num_classes=num_classes)
        )
        self.num_classes = num_classes
        self.stem = body.stem
        self.layer1, self.layer2 = body.layer1, body.layer2
        self.layer3, self.layer4 = body.layer3, body.layer4
        self.avgpool = body.avgpool
        self.dropout = nn.Dropout(dropout)
        self.head = body.fc

    def parts(self) -> list[dict[str, nn.Module]]:
        stages: list[dict[str, nn.Module]] = [
            {f"layer{number}.{b}": block for b, block in enumerate(layer)}
            for number, layer in enumerate((self.layer1, self.layer2, self.layer3, self.layer4), 1)
        ]
        stages[0] = {"stem": self.stem, **stages[0]}
        return stages

    def classify(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.avgpool(x).flatten(1)))


class S3D(_ConvNet):
    """S3D: ``[B, 3, T, H, W]``, any T >= 5 and H, W >= 32, to ``[B, classes]``.

    Args:
        variant: ``s3d``, or ``s3d_n`` with three eighths of its channels.
        num_classes: size of the head.
        dropout: before the head.
    """

    def __init__(self, variant: str, num_classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.avgpool = nn.AvgPool3d((2, 7, 7), stride=1)
        if variant == "s3d_n":
            self.features = _thin_s3d_features()
            classifier = nn.Conv3d(384, num_classes, kernel_size=1)
            self.head = nn.Sequential(nn.Dropout(dropout), classifier)
        else:
            body = s3d(num_classes=num_classes, dropout=dropout)
            self.features, self.avgpool, self.head = body.features, body.avgpool, body.classifier

    def parts(self) -> list[dict[str, nn.Module]]:
        named = [(f"features.{n}", part) for n, part in enumerate(self.features)]
        # A stage ends before the pooling that begins the next one.
        borders = (0, 4, 7, 13, len(named))
        return [dict(named[a:b]) for a, b in pairwise(borders)]

    def check(self, clip: Tensor) -> None:
        if clip.shape[2] < _S3D_FRAMES:
            raise UsageError(
                f"S3D cannot take a clip of {clip.shape[2]} frames",
                why=f"its poolings leave nothing of less than {_S3D_FRAMES}",
                fix=f"{_S3D_FRAMES} frames or more",
            )

    def classify(self, x: Tensor) -> Tensor:
        kernel = cast(tuple[int, int, int], self.avgpool.kernel_size)
        window = [min(k, n) for k, n in zip(kernel, x.shape[2:], strict=True)]
        pooled = F.avg_pool3d(x, window, stride=self.avgpool.stride)
        return self.head(pooled).mean(dim=(2, 3, 4))


_S3D_FRAMES = 5
