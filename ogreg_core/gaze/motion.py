"""A number beside the picture: how much of a map's mass lies where pixels move.

Baselines: a uniform map, and the centre bias of viewers of pictures, the anisotropic Gaussian that
Clarke and Tatler (2014, Vision Research 102) propose for any data set: variance 0.22 along x and 0.45
times that along y, in half widths of the picture.

Notation: T frames, H W rows and columns of pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["MotionScore", "centre_bias", "moving_pixels", "score_maps", "share_on"]

# So many standard deviations of the noise, and so many levels of 255, does a pixel have to change.
_SIGMAS = 5.0
_LEVELS = 8.0
_VARIANCE_X, _VARIANCE_RATIO = 0.22, 0.45
# Median absolute value of a standard normal distribution.
_MEDIAN_OF_NORMAL = 0.6745


@dataclass(frozen=True)
class MotionScore:
    """Shares of mass on moving pixels, 0..1, over all frames of a clip.

    Args:
        maps: by kind; not-a-number for a map without mass.
        centre: of the centre bias.
        uniform: of a uniform map, which is the share of pixels that move.
    """

    maps: dict[str, float]
    centre: float
    uniform: float


def moving_pixels(frames: np.ndarray) -> np.ndarray:
    """Which pixels change between neighbouring frames by more than noise does.

    Per interval, differences of grey levels, less their median (a change of exposure). Their noise is
    estimated as Donoho and Johnstone (1994) do it, from the diagonal details of the finest Haar
    wavelets: median absolute value over 0.6745, which moving objects hardly enter, also where most of
    the picture moves. A pixel moves if it changes by more than five times that, and by more than eight
    levels, which compression alone does not.

    Args:
        frames: uint8 ``[T, H, W, 3]``.

    Returns:
        bool ``[T, H, W]``: moving in the interval before or after the frame.
    """
    grey = frames.astype(np.float32).mean(axis=-1)
    found = np.zeros(grey.shape, dtype=bool)
    if len(frames) < 2:
        return found
    change = np.diff(grey, axis=0)
    change -= np.median(change, axis=(1, 2), keepdims=True)
    even = change[:, : change.shape[1] // 2 * 2, : change.shape[2] // 2 * 2]
    top, bottom = even[:, ::2], even[:, 1::2]
    details = (top[..., ::2] - top[..., 1::2] - bottom[..., ::2] + bottom[..., 1::2]) / 2
    sigma = np.median(np.abs(details), axis=(1, 2)) / _MEDIAN_OF_NORMAL
    moving = np.abs(change) > np.maximum(_SIGMAS * sigma, _LEVELS)[:, None, None]
    found[1:] |= moving
    found[:-1] |= moving
    return found


def centre_bias(height: int, width: int) -> np.ndarray:
    """The Gaussian of the centre bias, ``[H, W]``, sums to 1; see the head of this file."""
    y, x = np.mgrid[0:height, 0:width] + 0.5
    x, y = (2 * x - width) / width, (2 * y - height) / width
    exponent = x**2 / _VARIANCE_X + y**2 / (_VARIANCE_RATIO * _VARIANCE_X)
    bias = np.exp(-exponent / 2)
    return bias / bias.sum()


def share_on(maps: np.ndarray, places: np.ndarray) -> float:
    """Share of the mass of ``[T, H, W]`` (or ``[H, W]``, the same in every frame) on ``places``, bool
    ``[T, H, W]``; not-a-number if there is no mass.
    """
    mass = np.broadcast_to(maps, places.shape).astype(np.float64)
    total = float(mass.sum())
    return float(mass[places].sum()) / total if total > 0 else float("nan")


def score_maps(maps: dict[str, np.ndarray], moving: np.ndarray) -> MotionScore | None:
    """Score maps over a clip; None where nothing moves.

    Args:
        maps: by kind, ``[T, H, W]``.
        moving: see :func:`moving_pixels`.
    """
    if not moving.any():
        return None
    return MotionScore(
        {kind: share_on(found, moving) for kind, found in maps.items()},
        share_on(centre_bias(*moving.shape[1:]), moving),
        float(moving.mean()),
    )
