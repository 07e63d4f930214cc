from __future__ import annotations

import hashlib

import numpy as np
import pytest

from ogreg_core.data.manifest import load_manifest
from ogreg_core.datasets.demo import MIRROR, PAIRS, prepare_demo, render_clip
from ogreg_core.errors import DataError
from ogreg_core.progress import ignore_progress

LABELS = [name for pair in PAIRS for name in pair]
# Of seed 1 at 48 pixels: frames, mean of all, mean of the first. Written down from the renderer that
# the weights in the package were trained on.
RENDERED = {
    "move_right": (31, 39.743, 34.298),
    "move_left": (28, 44.499, 43.126),
    "move_down": (27, 53.872, 55.161),
    "move_up": (31, 48.943, 48.559),
    "turn_clockwise": (28, 48.853, 48.593),
    "turn_counterclockwise": (26, 38.778, 38.259),
    "orbit_clockwise": (33, 29.899, 29.787),
    "orbit_counterclockwise": (31, 41.469, 42.592),
    "grow": (25, 52.024, 45.544),
    "shrink": (37, 63.868, 72.041),
    "appear": (24, 44.515, 38.473),
    "vanish": (38, 48.155, 54.369),
    "approach": (34, 47.693, 46.043),
    "retreat": (26, 49.521, 49.231),
    "open": (26, 43.714, 47.672),
    "close": (27, 46.012, 41.485),
}


def test_sixteen_classes_in_reversed_pairs(demo_root):
    train, val = load_manifest(demo_root, "train"), load_manifest(demo_root, "val")
    assert sorted(LABELS) == list(train.labels)
    assert len(train.rows) == 48
    assert len(val.rows) == 32
    assert train.dataset == "demo"
    left, right = train.labels.index("move_left"), train.labels.index("move_right")
    assert train.mirror[left] == right
    assert train.mirror[right] == left
    assert {row.decoder for row in train.rows} == {"pyav"}


@pytest.mark.parametrize("label", LABELS)
def test_clips_are_reproducible_move_and_differ_by_seed(label):
    clip = render_clip(label, 1, size=48)
    assert clip.dtype == np.uint8
    assert clip.shape[1:] == (48, 48, 3)
    frames, mean, first = RENDERED[label]
    assert len(clip) == frames
    # Sines differ in their last bit between processors, and a texel may then be its neighbour.
    assert [clip.mean(), clip[0].mean()] == pytest.approx([mean, first], abs=0.02)
    assert np.array_equal(clip, render_clip(label, 1, size=48))
    assert not np.array_equal(clip[0], render_clip(label, 2, size=48)[0])
    assert np.abs(clip[0].astype(int) - clip[-1]).mean() > 2


def centroid(frame: np.ndarray) -> tuple[float, float]:
    """Centre of the pixels that stand out from the dim backdrop."""
    bright = frame.max(axis=-1).astype(float)
    mask = bright > np.percentile(bright, 96)
    y, x = np.nonzero(mask)
    return float(x.mean()), float(y.mean())


def test_directions_are_what_their_names_say():
    def moves(label, axis):
        shifts = []
        for seed in range(12):
            clip = render_clip(label, seed, size=64)
            shifts.append(centroid(clip[-4])[axis] - centroid(clip[3])[axis])
        return np.median(shifts)

    assert moves("move_right", 0) > 5
    assert moves("move_left", 0) < -5
    assert moves("move_down", 1) > 5
    assert moves("move_up", 1) < -5


def test_mirror_pairs_each_direction_once():
    assert all(MIRROR[MIRROR[name]] == name for name in MIRROR)
    assert set(MIRROR) <= set(LABELS)


def test_second_run_renders_nothing_and_changes_nothing(tmp_path):
    def run(**options):
        prepare_demo(
            tmp_path / "d",
            train_per_class=1,
            val_per_class=1,
            on_progress=ignore_progress,
            **options,
        )
        return {
            p.relative_to(tmp_path): (
                hashlib.sha256(p.read_bytes()).hexdigest(),
                p.stat().st_mtime_ns,
            )
            for p in (tmp_path / "d").rglob("*.mp4")
        }

    first = run()
    assert len(first) == 32
    assert run() == first
    other = run(seed=1)
    assert {k: v[0] for k, v in other.items()} != {k: v[0] for k, v in first.items()}


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(DataError, match="not empty"):
        prepare_demo(tmp_path, on_progress=ignore_progress)
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["mine.txt"]
