"""What a clip decides about the work of a model: how far OG-ReG's Gaze opens, which tokens are kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ogreg_core.models.layers import captured_inputs
from ogreg_core.models.mdconv import MDConv
from ogreg_core.models.protocol import VideoModel
from ogreg_core.models.sparse_gaze import TapWork, is_modulated, open_places

__all__ = ["CLOSED_BELOW", "BlockWork", "ClipWork", "clip_work"]

# A position whose modulation is lower in every channel adds next to nothing from its neighbours.
CLOSED_BELOW = 0.05


@dataclass(frozen=True)
class BlockWork:
    """How far one Gaze opens over a clip.

    Args:
        name: of its block, as a path in the model.
        mean_modulation: m, mean over positions and channels, 0..1.
        taps: what the sparse Gaze would do with a threshold of ``CLOSED_BELOW``.
    """

    name: str
    mean_modulation: float
    taps: TapWork

    @property
    def closed(self) -> float:
        """Share of places, positions between neighbouring frames, whose taps could be skipped, 0..1."""
        return 1.0 - self.taps.share if self.taps.places else 0.0

    @property
    def closed_multiply_adds(self) -> int:
        """Of the temporal taps that could be skipped."""
        return self.taps.dense_multiply_adds - self.taps.multiply_adds


@dataclass(frozen=True)
class ClipWork:
    """What a clip decides.

    Args:
        gazes: per block whose Gaze is modulated.
        kept: share of the clip's tokens that is left behind each token selection, 0..1.
    """

    gazes: tuple[BlockWork, ...]
    kept: dict[str, float]

    @property
    def closed_multiply_adds(self) -> int:
        """What could be skipped in all blocks."""
        return sum(gaze.closed_multiply_adds for gaze in self.gazes)

    def document(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "threshold": CLOSED_BELOW,
            "data_dependent": bool(self.gazes or self.kept),
            "blocks": [
                {
                    "name": gaze.name,
                    "mean_modulation": gaze.mean_modulation,
                    "positions_below_pct": 100 * gaze.closed,
                    "temporal_gmacs": gaze.taps.dense_multiply_adds / 1e9,
                    "skippable_gmacs": gaze.closed_multiply_adds / 1e9,
                }
                for gaze in self.gazes
            ],
            "selections": [
                {"name": name, "kept_pct": 100 * share} for name, share in self.kept.items()
            ],
            "skippable_gmacs": self.closed_multiply_adds / 1e9,
        }


@torch.inference_mode()
def clip_work(model: nn.Module, clip: Tensor) -> ClipWork:
    """Run a clip once and see what it decides; the normal pass is left untouched.

    Args:
        model: in evaluation mode.
        clip: on its device, ``[1, 3, T, H, W]``.
    """
    gazes = {
        name.removesuffix(".gaze"): module
        for name, module in model.named_modules()
        if isinstance(module, MDConv) and is_modulated(module)
    }
    with captured_inputs(gazes) as inputs:
        _, maps = cast(VideoModel, model).forward_with_maps(clip)
    return ClipWork(
        gazes=tuple(_block_work(name, gazes[name], y) for name, y in inputs.items()),
        kept={
            name: float(found.kept.mean()) for name, found in maps.items() if found.kept is not None
        },
    )


def _block_work(name: str, gaze: MDConv, y: Tensor) -> BlockWork:
    channels = y.shape[-1]
    m = gaze.modulation(y)
    if m is None:  # A single token frame has no neighbours.
        return BlockWork(name, 0.0, TapWork(channels))
    is_open = open_places(gaze, y, CLOSED_BELOW)
    taps = TapWork(channels, places=is_open.numel(), open=int(is_open.sum()))
    return BlockWork(name, float(m.mean()), taps)
