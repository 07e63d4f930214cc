"""What every model of the registry answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

__all__ = ["BlockMaps", "VideoModel", "logits_of", "takes_times"]


@dataclass(frozen=True)
class BlockMaps:
    """What one block looks at; coordinates are the block's own token grid.

    Args:
        gaze: fine map of what the block modulates by, ``[B, T, H, W]``; None if it has none.
        glance: attention received per token, ``[B, T, h, w]``, sums to 1 over T, h, w; None if it has
            none.
        kept: 1 where token selection leaves a token, else 0, ``[B, T, h, w]``; None if it is no
            selection.
        profiles: named curves over time, each ``[B, n]``.
        between: whether the gaze lies between neighbouring token frames, ``[B, T-1, H, W]``.
    """

    gaze: Tensor | None = None
    glance: Tensor | None = None
    kept: Tensor | None = None
    profiles: dict[str, Tensor] = field(default_factory=dict)
    between: bool = False


@runtime_checkable
class VideoModel(Protocol):
    """The one protocol; contract tests run it over the whole registry."""

    num_classes: int

    def __call__(self, clip: Tensor) -> Tensor:
        """Normalised clip ``[B, 3, T, H, W]`` to logits ``[B, num_classes]``."""
        ...

    def forward_stages(self, clip: Tensor) -> list[Tensor]:
        """Features after each stage, channels last."""
        ...

    def forward_with_maps(self, clip: Tensor) -> tuple[Tensor, dict[str, BlockMaps]]:
        """Logits, and the maps of each block by name."""
        ...

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay must leave alone."""
        ...

    def layers(self) -> list[list[str]]:
        """Names or prefixes of the parameters of each layer, from the input on; the classifier is
        the last.
        """
        ...

    def stage_blocks(self) -> list[list[nn.Module]]:
        """The blocks of each stage, the units whose activations can be recomputed."""
        ...


def takes_times(model: nn.Module) -> bool:
    """Whether a model wants to know when the frames of its clips appear: ``model(clip, times)``. It says
    so by an attribute of this name; the others know nothing of it.
    """
    return bool(getattr(model, "takes_times", False))


def logits_of(
    model: nn.Module, clip: Tensor, times: Tensor | None, asked: nn.Module | None = None
) -> Tensor:
    """The one place where a model is called on clips that were read from videos.

    Args:
        model: what is called.
        clip: normalised, ``[B, 3, T, H, W]``.
        times: of the frames, seconds from each clip's first, ``[B, T]`` on any device; None if unknown.
        asked: who says whether the model takes times, where it is wrapped.

    Returns:
        ``[B, num_classes]``.
    """
    if takes_times(asked or model):
        times = None if times is None else times.to(clip.device, non_blocking=True)
        timed: Tensor = model(clip, times)
        return timed
    logits: Tensor = model(clip)
    return logits
