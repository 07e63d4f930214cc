"""What networks of stages with a merging between them have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from einops import reduce
from torch import Tensor, nn

__all__ = ["StagedNetwork"]


class StagedNetwork(nn.Module, ABC):
    """Stem, stages of blocks with a merging in front of each but the first, and the mean of the last
    features through a linear classifier. Layout inside: channels last, ``[B, T, H, W, C]``.

    A subclass makes the parts: ``stages``, each an ``nn.Sequential`` of blocks, ``merges``, ``norm``,
    ``dropout``, ``head`` and the stem.
    """

    stages: nn.ModuleList
    merges: nn.ModuleList
    norm: nn.Module
    dropout: nn.Module
    head: nn.Module

    @abstractmethod
    def embed(self, clip: Tensor) -> Tensor:
        """The stem: ``[B, 3, T, H, W] -> [B, T', H', W', C]``."""

    def forward_stages(self, clip: Tensor) -> list[Tensor]:
        """Features after each stage, ``[B, T', H', W', C]`` halving in space."""
        x = self.embed(clip)
        features = []
        for index, stage in enumerate(self.stages):
            if index:
                x = self.merges[index - 1](x)
            x = stage(x)
            features.append(x)
        return features

    def forward(self, clip: Tensor) -> Tensor:
        x = self.norm(self.forward_stages(clip)[-1])
        return self.head(self.dropout(reduce(x, "b t h w c -> b c", "mean")))

    def blocks(self) -> dict[str, Any]:
        """All blocks in order, by a short name such as ``stage3.block2``."""
        return {
            f"stage{s}.block{b}": block
            for s, stage in enumerate(self.stage_blocks(), 1)
            for b, block in enumerate(stage, 1)
        }

    def layers(self) -> list[list[str]]:
        """Stem, every block (the first of a stage with the merging before it), classifier."""
        layers = [["stem"]]
        for s, stage in enumerate(self.stage_blocks()):
            blocks = [[f"stages.{s}.{b}"] for b in range(len(stage))]
            if s:
                blocks[0].append(f"merges.{s - 1}")
            layers += blocks
        layers[-1].append("norm")
        return [*layers, ["head"]]

    def stage_blocks(self) -> list[list[nn.Module]]:
        """The blocks of each stage."""
        return [list(stage.children()) for stage in self.stages]
