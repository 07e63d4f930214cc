from __future__ import annotations

import hashlib

import numpy as np
import pytest

from ogreg_core.data.manifest import load_manifest
from ogreg_core.datasets.demo import MIRROR, PAIRS, prepare_demo, render_clip
from ogreg_core.errors import DataError
from ogreg_core.progress import ignore_progress

LABELS = [name for pair in PAIRS for name in pair]


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
    assert 24 <= len(clip) <= 40
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
