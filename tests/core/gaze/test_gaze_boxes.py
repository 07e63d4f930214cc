from __future__ import annotations

import numpy as np
import pytest

from ogreg_core.gaze.boxes import boxes_in_video, flat_frames, mass_boxes
from ogreg_core.gaze.geometry import ClipGeometry


def brute_force(mass: np.ndarray, share: float) -> tuple[int, float]:
    """Area of the smallest box, and the most mass that any box of that area holds."""
    wanted = share * mass.sum() * (1 - 1e-9)
    height, width = mass.shape
    found: list[tuple[int, float]] = []
    for y0 in range(height):
        for y1 in range(y0 + 1, height + 1):
            for x0 in range(width):
                for x1 in range(x0 + 1, width + 1):
                    held = mass[y0:y1, x0:x1].sum()
                    if held >= wanted:
                        found.append(((y1 - y0) * (x1 - x0), held))
    least = min(area for area, _ in found)
    return least, max(held for area, held in found if area == least)


@pytest.mark.parametrize("share", [0.3, 0.7, 0.95, 1.0])
@pytest.mark.parametrize("kind", ["noise", "sparse", "blob", "wide"])
def test_no_smaller_box_holds_the_share(kind, share):
    rng = np.random.default_rng(3)
    shape = (3, 5, 13) if kind == "wide" else (3, 8, 7)
    maps = rng.random(shape) ** 3
    if kind == "sparse":
        maps *= rng.random(shape) < 0.15
    if kind == "blob":
        y, x = np.mgrid[0:8, 0:7]
        maps = 0.02 * maps + np.exp(-((y - 2) ** 2 + (x - 4) ** 2) / 3)
    for mass, (x0, y0, x1, y1) in zip(maps, mass_boxes(maps, share), strict=True):
        area, _ = brute_force(mass, share)
        assert (x1 - x0) * (y1 - y0) == area
        assert mass[y0:y1, x0:x1].sum() >= share * mass.sum() * (1 - 1e-8)


def test_of_equally_large_places_the_one_with_most_mass():
    mass = np.zeros((1, 4, 9))
    mass[0, 1, 1:3] = 1
    mass[0, 2, 5:7] = 1.1
    assert mass_boxes(mass, 0.5).tolist() == [[5, 2, 7, 3]]


def test_a_square_is_found_in_a_large_map():
    maps = np.full((2, 224, 224), 1e-4)
    maps[0, 40:90, 100:180] = 1
    maps[1, 200:224, :30] = 1
    boxes = mass_boxes(maps, 0.97)
    assert boxes.dtype == np.int64
    for found, wanted in zip(boxes, ([100, 40, 180, 90], [0, 200, 30, 224]), strict=True):
        assert np.abs(found - wanted).max() <= 2


def test_flat_maps_get_the_whole_picture_and_are_marked():
    rng = np.random.default_rng(0)
    maps = np.stack(
        [np.zeros((6, 9)), np.full((6, 9), 3.0), 1e-6 * rng.random((6, 9)), rng.random((6, 9))]
    )
    assert flat_frames(maps).tolist() == [True, True, True, False]
    boxes = mass_boxes(maps)
    assert boxes[:3].tolist() == [[0, 0, 9, 6]] * 3
    assert boxes[3].tolist() != [0, 0, 9, 6]


def test_rounding_below_zero_is_no_mass_and_more_is_refused():
    maps = np.zeros((1, 4, 4))
    maps[0, 2, 2] = 1
    maps[0, 0] = -1e-7
    assert mass_boxes(maps).tolist() == [[2, 2, 3, 3]]
    with pytest.raises(ValueError, match="negative"):
        mass_boxes(maps - 0.1)
    with pytest.raises(ValueError, match="not-a-number"):
        mass_boxes(np.full((1, 2, 2), np.nan))
    with pytest.raises(ValueError, match="share 0"):
        mass_boxes(maps, 0)


def test_boxes_in_pixels_of_the_video():
    geometry = ClipGeometry(100, 20, 480, 440, 680, 480, size=112)
    boxes = boxes_in_video(np.array([[0, 0, 28, 28], [7, 14, 14, 21]]), (28, 28), geometry)
    assert boxes.tolist() == [[100, 20, 580, 460], [220, 240, 340, 350]]
