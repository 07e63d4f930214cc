"""Places and times: cells of a token grid in the model's clip, and the clip in the video.

Coordinates are continuous: pixel i covers [i, i + 1). "Video" means the upright picture, after the
rotation that the file asks for, as it is displayed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ogreg_core.data.manifest import Row
from ogreg_core.data.transforms import TestCrops, scaled_size

__all__ = [
    "ClipGeometry",
    "Lattice",
    "Lattices",
    "Reduction",
    "lattices_of",
    "reduction_of",
    "to_pixels",
]


@dataclass(frozen=True)
class ClipGeometry:
    """The part of the video that the model's clip shows, in pixels of the video.

    Args:
        left, top: upper left corner.
        width, height: of the part.
        video_width, video_height: of the whole picture.
        size: side of the square clip, in its own pixels.
    """

    left: float
    top: float
    width: float
    height: float
    video_width: int
    video_height: int
    size: int

    @classmethod
    def of(cls, row: Row, crops: TestCrops) -> ClipGeometry:
        """Undo resizing and centre crop of :func:`ogreg_core.data.transforms.test_crops`."""
        height, width = scaled_size(row.height, row.width, crops.short_side)
        x, y = row.width / width, row.height / height
        left, top = (width - crops.size) // 2, (height - crops.size) // 2
        return cls(
            left * x, top * y, crops.size * x, crops.size * y, row.width, row.height, crops.size
        )

    def to_video(self, x: float, y: float) -> tuple[float, float]:
        """A place in the clip as a place in the video."""
        return self.left + x * self.width / self.size, self.top + y * self.height / self.size

    def to_clip(self, x: float, y: float) -> tuple[float, float]:
        """A place in the video as a place in the clip; outside of 0..size where the crop lacks it."""
        return (x - self.left) * self.size / self.width, (y - self.top) * self.size / self.height

    def edges(self, cells: int) -> tuple[list[float], list[float]]:
        """Borders of a ``cells`` x ``cells`` map over the clip, x and y, in pixels of the video."""
        shares = [i / cells for i in range(cells + 1)]
        return (
            [self.left + share * self.width for share in shares],
            [self.top + share * self.height for share in shares],
        )


# --- token grids in the clip -------------------------------------------------------------------


@dataclass(frozen=True)
class Reduction:
    """How a network thins out its input: where the tokens of a grid lie.

    Patches and mergings put tokens on the middle of cells of n pixels or frames; padded strided
    convolutions and poolings on every n-th pixel or frame, (n - 1) / 2 before the middle of the cell.

    Args:
        time, space: up to these steps the reduction is by convolution, beyond it by cells; 1 is cells
            throughout, 0 convolution throughout.
    """

    time: int = 1
    space: int = 1


def reduction_of(model: str, options: Mapping[str, Any]) -> Reduction:
    """That of a model of the registry, checked against receptive fields in the tests."""
    if model.startswith("s3d"):
        return Reduction(4, 16)
    if model.startswith(("mvit", "r2plus1d", "gta")):
        return Reduction(0, 0)
    usual = "conv" if model.startswith("ogreg") else "own"
    return Reduction(2, 4) if options.get("stem", usual) == "conv" else Reduction()


@dataclass(frozen=True)
class Lattice:
    """Where tokens lie along one axis: number i covers [i * step, (i + 1) * step) - shift.

    Args:
        tokens: how many.
        step: pixels or frames from one to the next.
        shift: how far they lie before the middle of their cells.
        extent: pixels or frames of the clip; the last token may reach beyond.
    """

    tokens: int
    step: float
    shift: float
    extent: int

    @classmethod
    def over(cls, extent: int, tokens: int, convolved: int) -> Lattice:
        """That of ``tokens`` tokens over ``extent`` pixels or frames.

        Steps of our networks are powers of two, or multiples of four where the strides of OG-ReG's
        Glance are chosen so; an incomplete cell at the end is padded or, by X-ViT, left out.

        Args:
            extent, tokens: see the class.
            convolved: see :class:`Reduction`.
        """
        powers = [2**n for n in range(extent.bit_length() + 1)]
        fitting = [step for step in powers if -(-extent // step) == tokens]
        fitting += [step for step in powers if extent // step == tokens]
        fitting += [step for step in range(4, extent + 4, 4) if -(-extent // step) == tokens]
        step = next(iter(fitting), 0)
        if not step:
            # No grid of ours: spread evenly.
            return cls(tokens, extent / tokens, 0.0, extent)
        reach = min(step, convolved) if convolved else step
        return cls(tokens, step, (reach - 1) / 2, extent)

    def centre(self, token: float) -> float:
        """The middle of a token."""
        return (token + 0.5) * self.step - self.shift

    def token_at(self, place: float) -> int:
        """The token nearest to a place."""
        nearest = round((place + self.shift) / self.step - 0.5)
        return min(max(int(nearest), 0), self.tokens - 1)

    def interpolation(self) -> Tensor:
        """Linear interpolation from tokens to pixels or frames, ``[extent, tokens]``; rows sum to 1.
        Before the first and after the last token their values go on.
        """
        places = torch.arange(self.extent, dtype=torch.float64) + 0.5
        position = ((places + self.shift) / self.step - 0.5).clamp(0, self.tokens - 1)
        below = position.floor().clamp(max=max(self.tokens - 2, 0))
        above = position - below
        matrix = torch.zeros(self.extent, self.tokens, dtype=torch.float64)
        rows = torch.arange(self.extent)
        matrix[rows, below.long()] = 1 - above
        matrix[rows, (below.long() + 1).clamp(max=self.tokens - 1)] += above
        return matrix.float()


Lattices = tuple[Lattice, Lattice, Lattice]


def lattices_of(tokens: Sequence[int], clip: Sequence[int], reduction: Reduction) -> Lattices:
    """Those of a token grid T, H, W over a clip of T, H, W."""
    convolved = (reduction.time, reduction.space, reduction.space)
    time, rows, columns = (
        Lattice.over(extent, count, reach)
        for extent, count, reach in zip(clip, tokens, convolved, strict=True)
    )
    return time, rows, columns


def to_pixels(maps: Tensor, lattices: Lattices) -> Tensor:
    """Token maps ``[t, h, w]`` interpolated to frames and pixels, ``[T, H, W]``."""
    time, rows, columns = (lattice.interpolation() for lattice in lattices)
    # One axis after the other: a joint product would make all pairs of tokens and pixels.
    wide = rows @ (maps.float().cpu() @ columns.T)
    return torch.einsum("Tt,thw->Thw", time, wide)
