"""MDConv on CUDA, in Triton: the forward kernels and what they share with the backward ones.

Everything is accumulated in float32 whatever the inputs are. A program owns a tile of positions and
of channels and walks along time: what it has loaded of a frame serves the frame before, the frame
itself and the frame after, so each feature is loaded nine times (from L1), not twenty-seven.

Notation: B batch, T frames, H W rows and columns, C channels; P positions and c channels of a tile;
d dissimilarity ``[B, T-1, H, W]``, m modulation, a sharpness, b offset. Taps are numbered as in the
weight ``[C, 1, 3, 3, 3]``: 9 * frame + 3 * row + column.
"""

# Triton lets tuples grow; mypy does not.
# mypy: disable-error-code=assignment

from __future__ import annotations

from typing import NamedTuple

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

__all__ = ["EPSILON", "PROGRAMS", "ROWS", "Tile", "before", "channels_of", "forward", "mask_of"]
__all__ += ["opening", "place_of", "span_of", "tiles_of"]


class Tile(NamedTuple):
    """What a program works on at once: positions P, channels c; and its number of warps."""

    positions: int
    channels: int
    warps: int


# 32 channels divide the widths of all our sizes. Two channels per thread: their 54 weights stay in
# registers (103 to 135 of them for sm_80 and sm_90, nothing spilled).
GAZE_TILE = Tile(8, 32, 4)
DISSIMILARITY_TILE = Tile(16, 32, 4)
# Positions run down a band of so many rows before they run right: a tile is 4 x 2, not 1 x 8, and
# neighbouring tiles share more.
ROWS = 4
# Below this a norm counts as this, as in frame_dissimilarity.
EPSILON = 1e-8
# So many programs fill the largest GPUs several times. A constant, because partial sums per program
# must not depend on the device.
PROGRAMS = 4096

# --- parts of kernels ----------------------------------------------------------------------------


@triton.jit
def place_of(
    tile: tl.tensor, height: tl.tensor, width: tl.tensor, rows: tl.constexpr, block_p: tl.constexpr
) -> tl.tensor:
    """Row and column of the positions of a tile, each [P]; those past the last row are outside."""
    index = tile * block_p + tl.arange(0, block_p)
    band = index // (rows * width)
    index -= band * (rows * width)
    return band * rows + index % rows, index // rows


@triton.jit
def channels_of(block: tl.tensor, channels: tl.constexpr, block_c: tl.constexpr) -> tl.tensor:
    """Channels of a tile, and which of them exist: [c], [c]."""
    channel = block * block_c + tl.arange(0, block_c)
    return channel, channel < channels


@triton.jit
def mask_of(
    place: tl.tensor, channel: tl.tensor, channels: tl.constexpr, block_c: tl.constexpr
) -> tl.tensor:
    """Mask [P, c], without a comparison of channels where they all exist."""
    mask = place[:, None]
    if channels % block_c != 0:
        mask = mask & channel[None, :]
    return mask


@triton.jit
def before(number: tl.tensor, other: tl.tensor, place: tl.tensor) -> tl.tensor:
    """Mask [P] of ``number < other``; the interpreter spreads numbers rightly, but no conditions."""
    return tl.zeros_like(place) + number < other


@triton.jit
def opening(x: tl.tensor, floor: tl.tensor) -> tl.tensor:
    """m of x = a d + b, exactly 0 at d = 0; ``floor`` is sigmoid(b)."""
    return (tl.sigmoid(x) - floor) / (1.0 - floor)


# --- frame dissimilarity -------------------------------------------------------------------------


@triton.jit(do_not_specialize=["frames", "positions"])
def dissimilarity_kernel(
    y: tl.tensor,
    norm: tl.tensor,
    dissimilarity: tl.tensor,
    frames: tl.tensor,
    positions: tl.tensor,
    channels: tl.constexpr,
    least: tl.constexpr,
    block_p: tl.constexpr,
    block_c: tl.constexpr,
) -> None:
    """Norm of every feature [B, T, H, W] and d; one program per tile of positions and frame."""
    tiles = tl.cdiv(positions, block_p)
    frame = tl.program_id(0) // tiles
    place = (tl.program_id(0) % tiles) * block_p + tl.arange(0, block_p)
    inside = place < positions
    time = frame % frames
    has_next = inside & before(time, frames - 1, place)
    here = y + frame.to(tl.int64) * positions * channels
    own = tl.zeros([block_p, block_c], tl.float32)
    other = tl.zeros([block_p, block_c], tl.float32)
    product = tl.zeros([block_p, block_c], tl.float32)
    for block in range(tl.cdiv(channels, block_c)):
        channel, exists = channels_of(block, channels, block_c)
        offset = place[:, None] * channels + channel[None, :]
        mask = mask_of(inside, exists, channels, block_c)
        x = tl.load(here + offset, mask=mask, other=0.0).to(tl.float32)
        after = here + positions.to(tl.int64) * channels
        mask = mask_of(has_next, exists, channels, block_c)
        z = tl.load(after + offset, mask=mask, other=0.0).to(tl.float32)
        own += x * x
        other += z * z
        product += x * z
    # Of equal frames all three sums are the same number, and each quotient is exactly 1.
    own_square = tl.sum(own, axis=1)
    norm_here = tl.sqrt_rn(own_square)
    tl.store(norm + frame.to(tl.int64) * positions + place, norm_here, mask=inside)
    norm_after = tl.maximum(tl.sqrt_rn(tl.sum(other, axis=1)), least)
    square = tl.maximum(own_square, least * least)
    cosine = tl.div_rn(tl.sum(product, axis=1), square)
    cosine *= tl.div_rn(tl.maximum(norm_here, least), norm_after)
    pair = (frame // frames * (frames - 1) + time).to(tl.int64)
    tl.store(dissimilarity + pair * positions + place, 1.0 - cosine, mask=has_next)


# --- forward -------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["frames", "height", "width", "span"])
def gaze_kernel(
    y: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    sharpness: tl.tensor,
    offset: tl.tensor,
    dissimilarity: tl.tensor,
    out: tl.tensor,
    frames: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    span: tl.tensor,
    channels: tl.constexpr,
    rows: tl.constexpr,
    block_p: tl.constexpr,
    block_c: tl.constexpr,
) -> None:
    """out[t] = K0 * y[t] + m[t-1].(K- * y[t-1]) + m[t].(K+ * y[t+1]) + bias, for ``span`` frames."""
    blocks: tl.constexpr = (channels + block_c - 1) // block_c
    tiles = tl.cdiv(tl.cdiv(height, rows) * rows * width, block_p)
    chunks = tl.cdiv(frames, span)
    rest = tl.program_id(0) // blocks
    batch = (rest // tiles // chunks).to(tl.int64)
    start = rest // tiles % chunks * span
    channel, exists = channels_of(tl.program_id(0) % blocks, channels, block_c)
    row, column = place_of(rest % tiles, height, width, rows, block_p)
    inside = row < height
    mask = mask_of(inside, exists, channels, block_c)
    place = row * width + column
    at = place[:, None] * channels + channel[None, :]
    positions = height * width

    taps = ()
    for tap in tl.static_range(27):
        k = tl.load(weight + channel * 27 + tap, mask=exists, other=0.0).to(tl.float32)
        taps = taps + (k[None, :],)  # noqa: RUF005
    a = tl.load(sharpness + channel, mask=exists, other=0.0).to(tl.float32)[None, :]
    b = tl.load(offset + channel, mask=exists, other=0.0).to(tl.float32)[None, :]
    constant = tl.load(bias + channel, mask=exists, other=0.0).to(tl.float32)[None, :]
    floor = tl.sigmoid(b)

    behind = tl.zeros([block_p, block_c], tl.float32)
    pending = tl.zeros([block_p, block_c], tl.float32)
    stop = tl.minimum(start + span + 1, frames)
    for t in range(tl.maximum(start - 1, 0), stop):
        frame = y + (batch * frames + t) * positions * channels
        earlier = tl.zeros([block_p, block_c], tl.float32)
        same = tl.zeros([block_p, block_c], tl.float32)
        later = tl.zeros([block_p, block_c], tl.float32)
        for tap in tl.static_range(9):
            down = tap // 3 - 1
            right = tap % 3 - 1
            near = inside & (row + down >= 0) & (row + down < height)
            near = near & (column + right >= 0) & (column + right < width)
            x = tl.load(
                frame + at + (down * width * channels + right * channels),
                mask=mask_of(near, exists, channels, block_c),
                other=0.0,
            ).to(tl.float32)
            earlier += taps[tap] * x
            same += taps[9 + tap] * x
            later += taps[18 + tap] * x
        pair = (batch * (frames - 1) + t - 1) * positions
        d = tl.load(dissimilarity + pair + place, mask=inside & before(0, t, place), other=0.0)
        m = opening(d[:, None] * a + b, floor)
        to = out + (batch * frames + t - 1) * positions * channels
        now = mask & before(start, t, place)[:, None]
        tl.store(to + at, (pending + m * later).to(out.dtype.element_ty), now)
        pending = constant + same + m * behind
        behind = earlier
    to = out + (batch * frames + stop - 1) * positions * channels
    # The last frame has none after it; in front of the last chunk it was stored above.
    mask = mask & before(frames - 1, start + span, place)[:, None]
    tl.store(to + at, pending.to(out.dtype.element_ty), mask)


# --- launches ------------------------------------------------------------------------------------


def tiles_of(height: int, width: int, tile: Tile) -> int:
    """Tiles of positions in a frame; the last band of rows may hang over."""
    return triton.cdiv(triton.cdiv(height, ROWS) * ROWS * width, tile.positions)


def span_of(frames: int, walks: int) -> int:
    """Frames that a program walks along: all of them, fewer where there are few walks.

    A shorter walk loads the frames at its ends twice, so it has at least four.
    """
    span = frames
    while span > 7 and walks * triton.cdiv(frames, span) < PROGRAMS // 4:
        span = triton.cdiv(span, 2)
    return span


def forward(
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    sharpness: Tensor,
    offset: Tensor,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The Gaze, and what its backward needs.

    Args:
        y: features ``[B, T, H, W, C]``, contiguous.
        weight: ``[C, 1, 3, 3, 3]``, contiguous.
        bias, sharpness, offset: ``[C]``, contiguous.
        out_dtype: of the result.

    Returns:
        ``[B, T, H, W, C]``; dissimilarity ``[B, T-1, H, W]`` and norms ``[B, T, H, W]``, float32.
    """
    batch, frames, height, width, channels = y.shape
    out = torch.empty_like(y, dtype=out_dtype)
    norm = y.new_empty((batch, frames, height, width), dtype=torch.float32)
    dissimilarity = y.new_empty((batch, frames - 1, height, width), dtype=torch.float32)
    tile, other = GAZE_TILE, DISSIMILARITY_TILE
    walks = batch * tiles_of(height, width, tile) * triton.cdiv(channels, tile.channels)
    span = span_of(frames, walks)
    with torch.cuda.device_of(y):
        dissimilarity_kernel[(triton.cdiv(height * width, other.positions) * batch * frames,)](
            y,
            norm,
            dissimilarity,
            frames,
            height * width,
            channels=channels,
            least=EPSILON,
            block_p=other.positions,
            block_c=other.channels,
            num_warps=other.warps,
            enable_fp_fusion=True,
        )
        gaze_kernel[(walks * triton.cdiv(frames, span),)](
            y,
            weight,
            bias,
            sharpness,
            offset,
            dissimilarity,
            out,
            frames,
            height,
            width,
            span,
            channels=channels,
            rows=ROWS,
            block_p=tile.positions,
            block_c=tile.channels,
            num_warps=tile.warps,
            enable_fp_fusion=True,
        )
    return out, dissimilarity, norm
