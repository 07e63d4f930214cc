from __future__ import annotations

import math

import numpy as np
import pytest

from ogreg_core.gaze.motion import centre_bias, moving_pixels, score_maps, share_on


def noisy_square(sigma: float, drift: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A grey noisy clip with a bright square that moves right, and where it is or has just been."""
    rng = np.random.default_rng(5)
    frames = rng.normal(100, sigma, (6, 60, 80, 1)).repeat(3, axis=-1)
    swept = np.zeros((6, 60, 80), bool)
    for t in range(6):
        frames[t, 20:32, 10 + 12 * t : 10 + 12 * t + 12] += 90
        swept[t, 20:32, max(0, 12 * t - 2) : 12 * t + 34] = True
        frames[t] += drift * t
    return frames.clip(0, 255).astype(np.uint8), swept


@pytest.mark.parametrize("sigma", [0, 3, 9])
@pytest.mark.parametrize("drift", [0, 12])
def test_moving_pixels_are_found_above_noise_and_changes_of_exposure(sigma, drift):
    frames, swept = noisy_square(sigma, drift)
    moving = moving_pixels(frames)
    assert moving.shape == swept.shape
    assert (moving & swept).sum() > 0.9 * 12 * 24 * 6
    assert (moving & ~swept).mean() < 0.002


def test_where_everything_moves_everything_is_found():
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (8, 8)).repeat(12, 0).repeat(12, 1)
    frames = np.stack([np.roll(blocks, 12 * t, axis=1) for t in range(4)])
    moving = moving_pixels(frames[..., None].repeat(3, -1).astype(np.uint8))
    assert moving.mean() > 0.9


def test_still_and_single_frames_do_not_move():
    frame = np.random.default_rng(1).integers(0, 256, (1, 16, 16, 3), dtype=np.uint8)
    assert not moving_pixels(frame).any()
    assert not moving_pixels(frame.repeat(5, 0)).any()
    assert score_maps({"gaze": np.ones((1, 16, 16))}, moving_pixels(frame)) is None


def test_centre_bias_is_the_published_gaussian():
    bias = centre_bias(48, 64)
    assert bias.sum() == pytest.approx(1)
    y, x = np.mgrid[0:480, 0:640] + 0.5
    dx, dy = (x - 320) / 320, (y - 240) / 320
    wide = np.exp(-(dx**2) / (2 * 0.22)) * np.exp(-(dy**2) / (2 * 0.45 * 0.22))
    pooled = (wide / wide.sum()).reshape(48, 10, 64, 10).sum((1, 3))
    np.testing.assert_allclose(bias, pooled, rtol=4e-3)


def test_shares_by_hand():
    moving = np.zeros((2, 4, 4), bool)
    moving[:, :2, :2] = True
    maps = {"all": np.ones((2, 4, 4)), "there": moving * 2.0, "none": np.zeros((2, 4, 4))}
    maps["half"] = np.zeros((2, 4, 4))
    maps["half"][0, 0, 0] = maps["half"][1, 3, 3] = 5
    score = score_maps(maps, moving)
    assert score.uniform == 0.25
    assert score.centre == pytest.approx(0.25)
    assert score.maps["all"] == 0.25
    assert score.maps["there"] == 1
    assert score.maps["half"] == 0.5
    assert math.isnan(score.maps["none"])
    assert share_on(np.ones((4, 4)), moving) == 0.25
