"""From what blocks of a model show to maps over a clip.

The gaze of OG-ReG, the dissimilarity of neighbouring frames, is shown of its first stage unless blocks
are chosen. There a feature depends on the pixels around it alone (the block's input comes from the stem);
every Glance mixes tokens of the whole clip, so that in later stages features change everywhere when
anything moves anywhere. Measured on 24 clips whose only motion is one shape, which sweeps a fifth of the
picture: within the swept area lie of the mass of the first stage 94 % (ogreg-n, untrained, 112 pixels) and
79 % (trained, 64 pixels, where a token is a sixteenth of the picture wide; 99 % within three pixels of it,
which is as far as the stem sees), of the trained last stage 24 %.

Notation: T frames, H W rows and columns of the clip; t h w of a token grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ogreg_core.errors import UsageError
from ogreg_core.gaze.geometry import Lattice, Reduction, lattices_of, to_pixels
from ogreg_core.models.layers import captured_inputs
from ogreg_core.models.mdconv import MDConv
from ogreg_core.models.protocol import BlockMaps, VideoModel

__all__ = ["Canvas", "select_blocks", "shown_blocks", "with_openings"]

_FINEST = "stage1"


def select_blocks(maps: Mapping[str, BlockMaps], chosen: Sequence[str]) -> dict[str, BlockMaps]:
    """The blocks whose names start with one of ``chosen`` (``stage2``, ``stage3.block1``); all if
    empty.

    Raises:
        UsageError: a name that fits no block.
    """
    for name in chosen:
        if not any(_belongs(block, name) for block in maps):
            raise UsageError(f"the model has no block {name!r}", why=f"blocks: {', '.join(maps)}")
    return {
        block: found
        for block, found in maps.items()
        if not chosen or any(_belongs(block, name) for name in chosen)
    }


def _belongs(block: str, name: str) -> bool:
    return block == name or block.startswith(f"{name}.")


def shown_blocks(
    maps: Mapping[str, BlockMaps], kind: str, chosen: Sequence[str]
) -> dict[str, BlockMaps]:
    """The blocks that make a map of a kind (``gaze``, ``opening``, ``glance``, ``kept``): the chosen
    ones; by default all, but of dissimilarities the first stage.

    Args:
        maps: of all blocks.
        kind: field of :class:`BlockMaps`; ``opening`` counts as ``gaze``.
        chosen: names, see :func:`select_blocks`.
    """
    part = "gaze" if kind == "opening" else kind
    having = {
        name: found
        for name, found in select_blocks(maps, chosen).items()
        if getattr(found, part) is not None
    }
    if part == "gaze" and not chosen and any(found.between for found in having.values()):
        return {name: found for name, found in having.items() if _belongs(name, _FINEST)}
    return having


@torch.no_grad()
def with_openings(
    model: VideoModel, clip: Tensor
) -> tuple[dict[str, BlockMaps], dict[str, Tensor]]:
    """:meth:`VideoModel.forward_with_maps`, and the modulation m of OG-ReG's blocks at each position.

    Returns:
        The maps of each block, and by block m, the mean over channels, between neighbouring token
        frames: ``[t - 1, h, w]``. Empty for other models and where tokens were selected.
    """
    gazes = _gazes(model)
    with captured_inputs(gazes) as inputs:
        _, maps = model.forward_with_maps(clip)
    openings = {}
    for name, y in inputs.items():
        if name in maps:
            openings[name] = _opening(gazes[name], y[:1])
    return maps, openings


def _gazes(model: VideoModel) -> dict[str, MDConv]:
    found = {}
    for s, stage in enumerate(model.stage_blocks(), 1):
        for b, block in enumerate(stage, 1):
            gaze = getattr(block, "gaze", None)
            if isinstance(gaze, MDConv):
                found[f"stage{s}.block{b}"] = gaze
    return found


def _opening(gaze: MDConv, y: Tensor) -> Tensor:
    frames, rows, columns = y.shape[1:4]
    m = gaze.modulation(y)
    if m is None:
        return torch.zeros(max(frames - 1, 0), rows, columns)
    return m.float().mean(dim=-1).expand(1, frames - 1, rows, columns)[0].cpu()


@dataclass(frozen=True)
class Canvas:
    """Draws token maps of a model over a clip.

    Args:
        size: T, H, W of the clip.
        reduction: of the model.
    """

    size: tuple[int, int, int]
    reduction: Reduction

    def draw(self, tokens: Tensor, *, between: bool = False) -> Tensor:
        """A map ``[t, h, w]`` over the clip, ``[T, H, W]``.

        Of a map between token frames, ``[t - 1, h, w]``, a token frame gets the mean of the intervals
        before and after it; the first and the last have one each.
        """
        if len(tokens) == 0:
            return torch.zeros(self.size)
        if between:
            padded = torch.cat([tokens[:1], tokens, tokens[-1:]])
            tokens = (padded[:-1] + padded[1:]) / 2
        return to_pixels(tokens, lattices_of(tokens.shape, self.size, self.reduction))

    def of_blocks(self, kind: str, blocks: Mapping[str, BlockMaps]) -> np.ndarray:
        """The mean over blocks of their maps of a kind; a glance is scaled so that an even spread is
        1.
        """
        drawn = []
        for found in blocks.values():
            tokens: Tensor = getattr(found, kind)[0]
            if kind == "glance":
                tokens = tokens * tokens.numel()
            drawn.append(self.draw(tokens, between=kind == "gaze" and found.between))
        # One minus a cosine may fall below 0 by rounding.
        return torch.stack(drawn).mean(dim=0).clamp_min(0).numpy()

    def curve_positions(self, points: int, *, between: bool) -> np.ndarray:
        """Where the points of a curve over token frames, or between them, lie in the clip: positions of
        frames from 0, ``[points]``.
        """
        tokens = points + between
        lattice = Lattice.over(self.size[0], tokens, self.reduction.time)
        centres = np.array([lattice.centre(token) for token in range(tokens)]) - 0.5
        return (centres[:-1] + centres[1:]) / 2 if between else centres
