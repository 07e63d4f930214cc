"""MDConv on CUDA, in Triton: the backward kernels. Notation as in ``mdconv_forward.py``.

Gradients of parameters are summed per program, and those sums by ``torch.sum``: in a fixed order and
without atomics, so that the same step gives the same bits again.
"""

# Triton lets tuples grow; mypy does not.
# mypy: disable-error-code=assignment

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from ogreg_core.models.kernels.mdconv_forward import (
    EPSILON,
    PROGRAMS,
    ROWS,
    Tile,
    before,
    channels_of,
    mask_of,
    opening,
    place_of,
    span_of,
    tiles_of,
)

__all__ = ["backward"]

# Two channels per thread with their 18 sums (80 to 128 registers), and one with its 27 weights and
# nine openings (96 to 161): two would need 223 and leave a multiprocessor nearly empty.
PARAMETER_TILE = Tile(8, 32, 4)
FEATURE_TILE = Tile(4, 32, 4)


@triton.jit(do_not_specialize=["batches", "frames", "height", "width"])
def parameter_kernel(
    grad: tl.tensor,
    y: tl.tensor,
    weight: tl.tensor,
    sharpness: tl.tensor,
    offset: tl.tensor,
    dissimilarity: tl.tensor,
    weight_part: tl.tensor,
    vector_part: tl.tensor,
    opening_part: tl.tensor,
    batches: tl.tensor,
    frames: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    channels: tl.constexpr,
    rows: tl.constexpr,
    block_p: tl.constexpr,
    block_c: tl.constexpr,
) -> None:
    """Partial sums of the gradients of the weight [N, C, 27], of bias, a and b [N, 3, 3, C], and of d
    [3 C/c, B, T-1, H, W].

    A program takes one row of taps, because all 27 would need more registers than there are, and
    every N-th tile.
    """
    blocks: tl.constexpr = (channels + block_c - 1) // block_c
    tap_row = tl.program_id(0) % 3
    down = tap_row - 1
    block = tl.program_id(0) // 3 % blocks
    program = tl.program_id(0) // (3 * blocks)
    programs = tl.num_programs(0) // (3 * blocks)
    channel, exists = channels_of(block, channels, block_c)
    tiles = tl.cdiv(tl.cdiv(height, rows) * rows * width, block_p)
    positions = height * width

    minus = ()
    plus = ()
    for tap in tl.static_range(3):
        first = weight + channel * 27 + 3 * tap_row + tap
        k = tl.load(first, mask=exists, other=0.0).to(tl.float32)
        minus = minus + (k[None, :],)  # noqa: RUF005
        k = tl.load(first + 18, mask=exists, other=0.0).to(tl.float32)
        plus = plus + (k[None, :],)  # noqa: RUF005
    a = tl.load(sharpness + channel, mask=exists, other=0.0).to(tl.float32)[None, :]
    b = tl.load(offset + channel, mask=exists, other=0.0).to(tl.float32)[None, :]
    floor = tl.sigmoid(b)

    zero = tl.zeros([block_p, block_c], tl.float32)
    bias_sum, a_sum, b_sum = zero, zero, zero
    sums = (zero, zero, zero, zero, zero, zero, zero, zero, zero)
    for item in range(program, batches * tiles, programs):
        batch = (item // tiles).to(tl.int64)
        row, column = place_of(item % tiles, height, width, rows, block_p)
        inside = row < height
        mask = mask_of(inside, exists, channels, block_c)
        place = row * width + column
        at = place[:, None] * channels + channel[None, :]
        near = inside & (row + down >= 0) & (row + down < height)

        g_before, m_before, half = zero, zero, zero
        d_before = tl.zeros([block_p], tl.float32)
        g = tl.load(grad + batch * frames * positions * channels + at, mask, 0.0).to(tl.float32)
        for t in range(frames):
            start = (batch * frames + t) * positions * channels
            next_g = grad + start + positions.to(tl.int64) * channels
            goes_on = before(t, frames - 1, place)
            g_after = tl.load(next_g + at, mask & goes_on[:, None], 0.0).to(tl.float32)
            pair = (batch * (frames - 1) + t) * positions
            d = tl.load(dissimilarity + pair + place, inside & goes_on, 0.0)
            m = opening(d[:, None] * a + b, floor)
            scaled_after = m * g_after
            scaled_before = m_before * g_before
            earlier = zero
            later = zero
            fresh = ()
            for tap in tl.static_range(3):
                right = tap - 1
                x = tl.load(
                    y + start + at + (down * width * channels + right * channels),
                    mask=mask_of(
                        near & (column + right >= 0) & (column + right < width),
                        exists,
                        channels,
                        block_c,
                    ),
                    other=0.0,
                ).to(tl.float32)
                earlier += minus[tap] * x
                later += plus[tap] * x
                fresh = fresh + (  # noqa: RUF005
                    sums[3 * tap] + scaled_after * x,
                    sums[3 * tap + 1] + g * x,
                    sums[3 * tap + 2] + scaled_before * x,
                )
            sums = fresh
            bias_sum += g
            # Of the opening between the frame before and this one: both frames have now been seen.
            closed = (half + g_before * later) * (1.0 - m_before)
            steep = closed * (m_before * (1.0 - floor) + floor)
            a_sum += steep * d_before[:, None]
            b_sum += closed * m_before * (1.0 - floor)
            part = (3 * block + tap_row).to(tl.int64) * batches * (frames - 1) * positions
            tl.store(
                opening_part + part + pair - positions + place,
                tl.sum(steep * a, axis=1),
                mask=inside & before(0, t, place),
            )
            half = g_after * earlier
            g_before, g, m_before, d_before = g, g_after, m, d

    for tap in tl.static_range(3):
        for k in tl.static_range(3):
            to = weight_part + (program * channels + channel) * 27 + 9 * k + 3 * tap_row + tap
            tl.store(to, tl.sum(sums[3 * tap + k], axis=0), mask=exists)
    vectors = vector_part + (program * 3 + tap_row) * 3 * channels + channel
    # The three rows see the same gradient; it counts once.
    tl.store(vectors, tl.sum(bias_sum, axis=0) * (tap_row == 0).to(tl.float32), mask=exists)
    tl.store(vectors + channels, tl.sum(a_sum, axis=0), mask=exists)
    tl.store(vectors + 2 * channels, tl.sum(b_sum, axis=0), mask=exists)


@triton.jit(do_not_specialize=["batches", "frames", "positions"])
def cosine_kernel(
    opening_part: tl.tensor,
    dissimilarity: tl.tensor,
    norm: tl.tensor,
    cross: tl.tensor,
    own: tl.tensor,
    batches: tl.tensor,
    frames: tl.tensor,
    positions: tl.tensor,
    parts: tl.constexpr,
    least: tl.constexpr,
    block_p: tl.constexpr,
) -> None:
    """What the gradient of d does to the features: ``cross[t] (y[t+1] to frame t, y[t] to frame t+1)
    + own[t] y[t]``; cross [B, T-1, H, W], own [B, T, H, W].
    """
    tiles = tl.cdiv(positions, block_p)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    place = (tl.program_id(0) % tiles) * block_p + tl.arange(0, block_p)
    inside = place < positions
    pairs = batches.to(tl.int64) * (frames - 1) * positions
    along_before = tl.zeros([block_p], tl.float32)
    for t in range(frames):
        here = norm + (batch * frames + t) * positions + place
        pair = (batch * (frames - 1) + t) * positions + place
        open_end = inside & before(t, frames - 1, place)
        raw = tl.load(here, mask=inside, other=1.0)
        after = tl.load(here + positions, mask=open_end, other=1.0)
        grad = tl.zeros([block_p], tl.float32)
        for part in range(parts):
            grad += tl.load(opening_part + part * pairs + pair, mask=open_end, other=0.0)
        length = tl.maximum(raw, least)
        tl.store(cross + pair, -grad / length / tl.maximum(after, least), mask=open_end)
        along = grad * (1.0 - tl.load(dissimilarity + pair, mask=open_end, other=0.0))
        # A norm that was raised to the least one is a constant (clamp_min lets equality pass).
        turn = tl.where(raw >= least, (along + along_before) / length / length, 0.0)
        tl.store(own + (batch * frames + t) * positions + place, turn, mask=inside)
        along_before = along


@triton.jit(do_not_specialize=["frames", "height", "width", "span"])
def feature_kernel(
    grad: tl.tensor,
    y: tl.tensor,
    weight: tl.tensor,
    sharpness: tl.tensor,
    offset: tl.tensor,
    dissimilarity: tl.tensor,
    cross: tl.tensor,
    own: tl.tensor,
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
    """Gradient of y: the transposed convolution of g, m[t-1].g and m[t].g, and the path through d.

    m belongs to the place of g, hence to each of nine neighbours. Each is computed once and kept for
    the next frame: the exponentials, not the memory, are what costs.
    """
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
    floor = tl.sigmoid(b)

    zero = tl.zeros([block_p, block_c], tl.float32)
    openings_before = (zero, zero, zero, zero, zero, zero, zero, zero, zero)
    ahead, pending = zero, zero
    stop = tl.minimum(start + span + 1, frames)
    for t in range(tl.maximum(start - 1, 0), stop):
        frame = grad + (batch * frames + t) * positions * channels
        pair = (batch * (frames - 1) + t) * positions
        earlier = zero
        same = zero
        later = zero
        openings = ()
        for tap in tl.static_range(9):
            down = 1 - tap // 3
            right = 1 - tap % 3
            near = inside & (row + down >= 0) & (row + down < height)
            near = near & (column + right >= 0) & (column + right < width)
            g = tl.load(
                frame + at + (down * width * channels + right * channels),
                mask=mask_of(near, exists, channels, block_c),
                other=0.0,
            ).to(tl.float32)
            d = tl.load(
                dissimilarity + pair + place + (down * width + right),
                mask=near & before(t, frames - 1, place),
                other=0.0,
            )
            m = opening(d[:, None] * a + b, floor)
            earlier += taps[tap] * (openings_before[tap] * g)
            same += taps[9 + tap] * g
            later += taps[18 + tap] * (m * g)
            openings = openings + (m,)  # noqa: RUF005
        openings_before = openings
        value = pending + earlier
        value += _through_cosine(
            y, cross, own, batch, t - 1, frames, positions, at, place, inside, mask, channels
        )
        to = out + (batch * frames + t - 1) * positions * channels
        now = mask & before(start, t, place)[:, None]
        tl.store(to + at, value.to(out.dtype.element_ty), mask=now)
        pending = same + ahead
        ahead = later
    pending += _through_cosine(
        y, cross, own, batch, stop - 1, frames, positions, at, place, inside, mask, channels
    )
    to = out + (batch * frames + stop - 1) * positions * channels
    now = mask & before(frames - 1, start + span, place)[:, None]
    tl.store(to + at, pending.to(out.dtype.element_ty), mask=now)


@triton.jit
def _through_cosine(
    y: tl.tensor,
    cross: tl.tensor,
    own: tl.tensor,
    batch: tl.tensor,
    t: tl.tensor,
    frames: tl.tensor,
    positions: tl.tensor,
    at: tl.tensor,
    place: tl.tensor,
    inside: tl.tensor,
    mask: tl.tensor,
    channels: tl.constexpr,
) -> tl.tensor:
    """Gradient of d with respect to y[t] times the gradient of d, [P, c]; 0 in front of frame 0."""
    now = inside & before(-1, t, place)
    has_before = inside & before(0, t, place)
    has_after = now & before(t, frames - 1, place)
    frame = y + (batch * frames + t) * positions * channels + at
    step = positions.to(tl.int64) * channels
    pair = cross + (batch * (frames - 1) + t) * positions + place
    turn = tl.load(own + (batch * frames + t) * positions + place, now, 0.0)
    value = turn[:, None] * tl.load(frame, mask & now[:, None], 0.0).to(tl.float32)
    turn = tl.load(pair, has_after, 0.0)
    value += turn[:, None] * tl.load(frame + step, mask & has_after[:, None], 0.0).to(tl.float32)
    turn = tl.load(pair - positions, has_before, 0.0)
    value += turn[:, None] * tl.load(frame - step, mask & has_before[:, None], 0.0).to(tl.float32)
    return value


# --- launches ------------------------------------------------------------------------------------


def _parameter_sums(
    grad: Tensor,
    y: Tensor,
    weight: Tensor,
    sharpness: Tensor,
    offset: Tensor,
    dissimilarity: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Partial sums [N, C, 27], [N, 3, 3, C] and [parts, B, T-1, H, W], see the kernel."""
    batch, frames, height, width, channels = y.shape
    tile = PARAMETER_TILE
    blocks = triton.cdiv(channels, tile.channels)
    items = batch * tiles_of(height, width, tile)
    programs = min(items, max(1, PROGRAMS // (3 * blocks)))
    weights = y.new_empty((programs, channels, 27), dtype=torch.float32)
    vectors = y.new_empty((programs, 3, 3, channels), dtype=torch.float32)
    openings = y.new_empty((3 * blocks, *dissimilarity.shape), dtype=torch.float32)
    with torch.cuda.device_of(y):
        parameter_kernel[(3 * blocks * programs,)](
            grad,
            y,
            weight,
            sharpness,
            offset,
            dissimilarity,
            weights,
            vectors,
            openings,
            batch,
            frames,
            height,
            width,
            channels=channels,
            rows=ROWS,
            block_p=tile.positions,
            block_c=tile.channels,
            num_warps=tile.warps,
            enable_fp_fusion=True,
        )
    return weights, vectors, openings


def backward(
    grad: Tensor,
    y: Tensor,
    weight: Tensor,
    sharpness: Tensor,
    offset: Tensor,
    dissimilarity: Tensor,
    norm: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of y (in its dtype), weight, bias, sharpness and offset (float32).

    Args:
        grad: of the Gaze, ``[B, T, H, W, C]``, contiguous.
        y, weight, sharpness, offset: as given to :func:`forward`.
        dissimilarity, norm: as it returned them.
    """
    batch, frames, height, width, channels = y.shape
    weights, vectors, openings = _parameter_sums(grad, y, weight, sharpness, offset, dissimilarity)
    cross, own = torch.empty_like(dissimilarity), torch.empty_like(norm)
    grad_y = torch.empty_like(y)
    tile = FEATURE_TILE
    walks = batch * tiles_of(height, width, tile) * triton.cdiv(channels, tile.channels)
    span = span_of(frames, walks)
    with torch.cuda.device_of(y):
        cosine_kernel[(batch * triton.cdiv(height * width, 128),)](
            openings,
            dissimilarity,
            norm,
            cross,
            own,
            batch,
            frames,
            height * width,
            parts=len(openings),
            least=EPSILON,
            block_p=128,
            num_warps=4,
            enable_fp_fusion=True,
        )
        feature_kernel[(walks * triton.cdiv(frames, span),)](
            grad,
            y,
            weight,
            sharpness,
            offset,
            dissimilarity,
            cross,
            own,
            grad_y,
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
    grad_weight = weights.sum(dim=0).view(channels, 1, 3, 3, 3)
    grad_bias, grad_sharpness, grad_offset = vectors.sum(dim=(0, 1)).unbind(0)
    return grad_y, grad_weight, grad_bias, grad_sharpness, grad_offset
