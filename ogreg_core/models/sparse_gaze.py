"""Sparse Gaze: MDConv for inference that executes its temporal taps only where they open.

Not in the paper (arXiv 2604.06783); ours, see :mod:`ogreg_core.models.ogreg`. The 2-D tap runs
everywhere. At a place, a pair of neighbouring frames at one position, both temporal taps are skipped
unless some channel's ``|m|`` exceeds a threshold. The largest channel decides and not their mean: what
is left out is then at most the threshold times the tap itself in every channel, and the signs of m of
several channels cannot cancel.

Open places are computed one by one: their 3x3 neighbourhoods are gathered, multiplied and added where
they belong. MDConv's own ``|m|`` rises with the dissimilarity d in every channel, so that d alone says
whether a place is open (:func:`smallest_opening`), and m is computed at open places only.

What that saves of time: MDConv of ogreg-t's first stage at 16x224, one core, processor time: 13 ms
dense; with 0, 2, 10 and 28 % of scattered places open 5.7, 7.5, 14 and 35 ms. A gathered multiply-add
costs some fourteen times one of a dense convolution, so fewer than about 9 % of the places must be open.
The other way, cropping each pair of frames to the box around its open places, took 9 to 16 ms for the
convolution alone wherever anything was open; the dense one takes 9.

Notation: B batch, T frames, H W rows and columns, C channels, N open places. Layout: channels last,
``[B, T, H, W, C]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ogreg_core.errors import UsageError
from ogreg_core.models.gaze_forms import GazeForm, NoGaze, Open
from ogreg_core.models.mdconv import MDConv, depthwise_tap, modulation

__all__ = [
    "SparseWork",
    "TapWork",
    "add_temporal_taps",
    "is_modulated",
    "open_places",
    "smallest_opening",
    "sparse_gaze",
    "sparse_modulated_conv",
]

# Of both temporal taps at one place and channel.
PRODUCTS_AT_A_PLACE = 2 * 9
# Gathered at a time, so that sums stay in the cache.
PLACES_AT_ONCE = 1024


# --- pure functions of tensors ------------------------------------------------------------------


def sparse_modulated_conv(
    y: Tensor, weight: Tensor, m: Tensor | None, bias: Tensor | None, threshold: float
) -> Tensor:
    """:func:`ogreg_core.models.mdconv.modulated_conv` without the temporal taps at places where no
    channel's ``|m|`` exceeds ``threshold``.

    Args:
        y: features ``[B, T, H, W, C]``.
        weight: ``[C, 1, 3, 3, 3]``.
        m: modulation, broadcastable to ``[B, T-1, H, W, C]``; None leaves all temporal taps out.
        bias: ``[C]`` or None.
        threshold: of ``|m|``; 0 skips what adds nothing, and 1 everything, as m of MDConv is below 1.

    Returns:
        ``[B, T, H, W, C]``.
    """
    out = depthwise_tap(y, weight[:, :, 1], bias)
    if m is None or y.shape[1] == 1:
        return out
    m, is_open = _open_by_m(m, y, threshold)
    add_temporal_taps(out, y, weight, m, is_open.nonzero())
    return out


def add_temporal_taps(out: Tensor, y: Tensor, weight: Tensor, m: Tensor, places: Tensor) -> None:
    """Add ``m . (K- * y[t])`` to frame t+1 and ``m . (K+ * y[t+1])`` to frame t, at some places only.

    Args:
        out: ``[B, T, H, W, C]``, contiguous; changed in place.
        y: features ``[B, T, H, W, C]``.
        weight: ``[C, 1, 3, 3, 3]``.
        m: modulation at the places, ``[N, C]``.
        places: batch, earlier frame t, row and column of each, ``[N, 4]``, in any order, each once.
    """
    if not len(places):
        return
    # Of the earlier frame's tap and the later one's: [3, 3, 2, 1, C].
    taps = weight[:, 0, ::2].permute(2, 3, 1, 0).unsqueeze(3)
    for some, opened in zip(places.split(PLACES_AT_ONCE), m.split(PLACES_AT_ONCE), strict=True):
        _add_taps_at(out, y, taps, opened, some)


def _add_taps_at(out: Tensor, y: Tensor, taps: Tensor, m: Tensor, places: Tensor) -> None:
    frames, height, width, channels = y.shape[1:]
    pixels = y.reshape(-1, channels)
    batch, frame, row, column = places.unbind(dim=1)
    earlier = ((batch * frames + frame) * height + row) * width + column
    centre = torch.stack((earlier, earlier + height * width))
    sums = pixels.new_zeros(*centre.shape, channels)
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            beside_row, beside_column = row + down, column + right
            inside = (beside_row >= 0) & (beside_row < height)
            inside &= (beside_column >= 0) & (beside_column < width)
            near = pixels[centre + (down * width + right) * inside]
            # Beyond the edge there is zero, not what was read instead.
            sums.addcmul_(near * inside.unsqueeze(1), taps[down + 1, right + 1])
    # What the earlier frame shows goes to the later one, and the other way round.
    to_pixels = centre.flip(0).flatten()
    out.view(-1, channels).index_add_(0, to_pixels, (sums * m).flatten(0, 1).to(out.dtype))


def _open_by_m(m: Tensor, y: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """m where it is open, ``[N, C]``, and where that is, ``[B, T-1, H, W]``."""
    batch, frames, height, width, channels = y.shape
    m = m.expand(batch, frames - 1, height, width, channels)
    is_open = m.abs().amax(dim=-1) > threshold
    return m[is_open], is_open


def smallest_opening(sharpness: Tensor, offset: Tensor, threshold: float) -> Tensor:
    """The dissimilarity above which ``|m|`` of some channel exceeds ``threshold``.

    :func:`ogreg_core.models.mdconv.modulation` solved for d: it is monotone, rising where a > 0 and
    falling where a < 0.

    Args:
        sharpness: a, ``[C]``.
        offset: b, ``[C]``.
        threshold: of ``|m|``, at least 0.

    Returns:
        a scalar; infinite if no d opens any channel.
    """
    floor = torch.sigmoid(offset)
    raised = floor + sharpness.sign() * threshold * (1.0 - floor)
    d = (raised.clamp(0.0, 1.0).logit() - offset) / sharpness
    # a = 0 never opens.
    return d.where(sharpness != 0, math.inf).amin()


# --- a model's blocks ---------------------------------------------------------------------------


@dataclass
class TapWork:
    """What a block's temporal taps have done so far.

    Args:
        channels: C.
        places: pairs of neighbouring frames times positions, of all clips.
        open: those of them where temporal taps were executed.
    """

    channels: int
    places: int = 0
    open: int = 0

    @property
    def share(self) -> float:
        """Of the places, 0..1; 0 where there are none."""
        return self.open / self.places if self.places else 0.0

    @property
    def multiply_adds(self) -> int:
        """Executed in temporal taps."""
        return PRODUCTS_AT_A_PLACE * self.channels * self.open

    @property
    def dense_multiply_adds(self) -> int:
        """What the temporal taps would have been without skipping any, as fvcore counts them."""
        return PRODUCTS_AT_A_PLACE * self.channels * self.places


@dataclass(frozen=True)
class SparseWork:
    """What the temporal taps of a model have done since :func:`sparse_gaze` began.

    Args:
        blocks: by the path of the MDConv in the model.
    """

    blocks: Mapping[str, TapWork]

    @property
    def share(self) -> float:
        """Share of open places, mean over blocks, 0..1."""
        return sum(block.share for block in self.blocks.values()) / len(self.blocks)

    @property
    def multiply_adds(self) -> int:
        """Executed in the temporal taps of all blocks."""
        return sum(block.multiply_adds for block in self.blocks.values())

    @property
    def dense_multiply_adds(self) -> int:
        """Of the temporal taps of all blocks without skipping any."""
        return sum(block.dense_multiply_adds for block in self.blocks.values())


@contextmanager
def sparse_gaze(model: nn.Module, threshold: float) -> Iterator[SparseWork]:
    """Let all MDConv blocks of a model skip their temporal taps where they hardly open.

    Args:
        model: changed in place until the context ends; its parameters stay what they are.
        threshold: of ``|m|``, see :func:`sparse_modulated_conv`.

    Yields:
        what is done meanwhile, block by block.

    Raises:
        UsageError: the threshold is negative, the model has no MDConv, or one of another formula.
    """
    if not threshold >= 0:
        raise UsageError(
            f"threshold {threshold} of the sparse Gaze is no number of at least 0",
            why="it is compared with the modulation's absolute value",
        )
    gazes = _modulated_blocks(model)
    work = SparseWork({name: TapWork(gaze.weight.shape[0]) for name, gaze in gazes.items()})
    opened = {name: _opener(gaze, threshold) for name, gaze in gazes.items()}
    before = {name: vars(gaze).get("forward") for name, gaze in gazes.items()}
    try:
        for name, gaze in gazes.items():
            vars(gaze)["forward"] = partial(_look, gaze, opened[name], work.blocks[name])
        yield work
    finally:
        for name, gaze in gazes.items():
            vars(gaze).pop("forward", None)
            if before[name] is not None:
                vars(gaze)["forward"] = before[name]


def _modulated_blocks(model: nn.Module) -> dict[str, MDConv]:
    """By path.

    Raises:
        UsageError: there is none, or the taps of one are not what is skipped here.
    """
    modules = model.named_modules()
    gazes = {name: part for name, part in modules if isinstance(part, MDConv)}
    if not gazes:
        raise UsageError(
            f"{type(model).__name__} has no MDConv",
            why="sparse Gaze skips temporal taps of OG-ReG's blocks",
            fix="choose an ogreg model: ogreg models",
        )
    for name, gaze in gazes.items():
        if not is_modulated(gaze):
            raise UsageError(
                f"the Gaze of {type(model).__name__} has no temporal taps that close",
                where=name,
                why=f"it was built with model.options.gaze={gaze.gaze!r}",
                fix="choose a model with gaze='modulated'",
            )
    return gazes


def is_modulated(gaze: MDConv) -> bool:
    """Whether it computes :func:`ogreg_core.models.mdconv.modulated_conv` with an m that differs."""
    if isinstance(gaze, GazeForm):
        return type(gaze).convolve is GazeForm.convolve and not isinstance(gaze, Open)
    return not isinstance(gaze, NoGaze) and gaze.gaze == "modulated"


def open_places(gaze: MDConv, y: Tensor, threshold: float) -> Tensor:
    """Where the sparse Gaze executes the temporal taps of a block.

    Args:
        gaze: of a formula with taps that close, see :func:`is_modulated`.
        y: features ``[B, T, H, W, C]`` of at least two frames.
        threshold: of ``|m|``.

    Returns:
        booleans ``[B, T-1, H, W]``.
    """
    return _opener(gaze, threshold)(y)[1]


def _look(gaze: MDConv, opened: _Opened, work: TapWork, y: Tensor) -> Tensor:
    """What a block's Gaze sees of ``[B, T, H, W, C]``."""
    out = depthwise_tap(y, gaze.weight[:, :, 1], gaze.bias)
    if y.shape[1] == 1:
        return out
    m, is_open = opened(y)
    places = is_open.nonzero()
    work.places += is_open.numel()
    work.open += len(places)
    add_temporal_taps(out, y, gaze.weight, m, places)
    return out


# Features to m where it is open, ``[N, C]``, and where that is, ``[B, T-1, H, W]``.
_Opened = Callable[[Tensor], tuple[Tensor, Tensor]]


def _opener(gaze: MDConv, threshold: float) -> _Opened:
    if isinstance(gaze, GazeForm):
        return partial(_open_form, gaze, threshold)
    parameters = gaze.sharpness.detach(), gaze.offset.detach()
    # A number, as the model may be moved to another device before it is called.
    return partial(_open_by_d, gaze, smallest_opening(*parameters, threshold).item())


def _open_form(gaze: GazeForm, threshold: float, y: Tensor) -> tuple[Tensor, Tensor]:
    m = gaze.modulation(y)
    assert m is not None  # there are two frames
    return _open_by_m(m, y, threshold)


def _open_by_d(gaze: MDConv, smallest: float, y: Tensor) -> tuple[Tensor, Tensor]:
    d = gaze.dissimilarity(y)
    if gaze.similarity == "frame":
        d = d.mean(dim=(2, 3), keepdim=True).expand_as(d)
    is_open = d > smallest
    return modulation(d[is_open], gaze.sharpness, gaze.offset), is_open
