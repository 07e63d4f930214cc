from __future__ import annotations

import re

import numpy as np
import pytest

from ogreg_core.data.manifest import load_manifest
from ogreg_core.datasets import demo
from ogreg_core.datasets.demo import MIRROR, PAIRS, prepare_demo
from ogreg_core.datasets.demo_hard import HARD_PAIRS, render_hard_clip, render_scene
from ogreg_core.errors import DataError
from ogreg_core.progress import ignore_progress

LABELS = [name for pair in HARD_PAIRS for name in pair]


def render(label: str, seed: int) -> np.ndarray:
    return render_hard_clip(label, seed, size=16)


def test_twelve_pairs_begin_with_the_eight_of_the_demo():
    assert HARD_PAIRS[:8] == PAIRS
    assert len(set(LABELS)) == 24
    assert set(MIRROR) <= set(LABELS)


@pytest.mark.parametrize("pair", HARD_PAIRS, ids=lambda pair: pair[0])
def test_the_second_of_a_pair_is_the_first_reversed(pair):
    forward, backward = pair
    for label in pair:
        clip = render(label, 4)
        assert clip.dtype == np.uint8
        assert clip.shape[1:] == (16, 16, 3)
        assert 24 <= len(clip) <= 40
        scene = render_scene(forward, np.random.default_rng([4, *f"hard {label}".encode()]), 16)
        assert np.array_equal(clip, scene[::-1] if label == backward else scene)
        assert np.abs(clip[0].astype(int) - clip[-1]).mean() > 2


def test_every_clip_is_its_own():
    clips = {render(label, seed).tobytes() for label in LABELS for seed in (0, 1)}
    assert len(clips) == 48
    assert np.array_equal(render("spiral_in", 3), render("spiral_in", 3))


def held_out_accuracy(first: np.ndarray, second: np.ndarray) -> float:
    """Of ridge regression on each clip in turn, trained on the others: ``[clips, features]`` each."""
    rows = np.concatenate([first, second])
    rows = (rows - rows.mean(0)) / (rows.std(0) + 1e-6)
    sides = np.repeat([1.0, -1.0], [len(first), len(second)])
    kernel = rows @ rows.T / rows.shape[1]
    hat = kernel @ np.linalg.inv(kernel + 0.3 * np.eye(len(rows)))
    left_out = (hat @ sides - np.diag(hat) * sides) / (1 - np.diag(hat))
    return float(np.mean(left_out * sides > 0))


@pytest.mark.parametrize("pair", [("move_right", "move_left"), ("grow", "shrink")])
def test_without_their_order_the_frames_of_a_pair_look_alike(pair):
    clips = [[render(label, seed).astype(float) for seed in range(40)] for label in pair]

    def accuracy(feature):
        return held_out_accuracy(
            *(np.stack([feature(c).ravel() for c in of_one]) for of_one in clips)
        )

    # Three standard deviations of a guess on 80 clips.
    assert accuracy(lambda clip: clip.mean(0)) < 0.67
    assert accuracy(lambda clip: clip.std(0)) < 0.67
    # The same regression sees the difference once it is told what came first.
    assert accuracy(lambda clip: clip[-6:].mean(0) - clip[:6].mean(0)) > 0.8


def test_the_camera_moves_whatever_the_shape_does():
    """A shape that moves right goes up or down in the picture only as the camera does."""

    def shift(seed: int) -> float:
        clip = render_hard_clip("move_right", seed, size=32)
        rows = []
        for frame in (clip[0], clip[-1]):
            bright = frame.max(axis=-1).astype(float)
            rows.append(np.nonzero(bright > np.percentile(bright, 96))[0].mean())
        return rows[1] - rows[0]

    shifts = np.array([shift(seed) for seed in range(24)])
    assert 2 < shifts.std() < 10
    assert abs(shifts.mean()) < shifts.std()


def made(root, **options):
    return prepare_demo(
        root, train_per_class=1, val_per_class=1, on_progress=ignore_progress, **options
    )


def test_a_folder_of_one_kind_is_not_made_the_other(tmp_path):
    root = tmp_path / "d"
    (root / "train").mkdir(parents=True)
    for marker, hard, fix in (
        ("seed 0, 1 train and 1 val clips per class\n", True, f"{root}-hard --hard"),
        ("hard, seed 0, 1 train and 1 val clips per class\n", False, f"{root}-plain"),
    ):
        (root / ".ogreg-demo").write_text(marker)
        with pytest.raises(DataError, match=re.escape(str(root))) as error:
            made(root, hard=hard)
        assert error.value.fix == f"ogreg prepare demo {fix}"
        assert (root / "train").is_dir()
        assert (root / ".ogreg-demo").read_text() == marker


def test_prepared_and_kept(tmp_path, monkeypatch):
    # Those that a flip of the picture changes; all of them in tests/cli.
    pairs = [pair for pair in HARD_PAIRS if pair[0] in MIRROR]
    monkeypatch.setattr(demo, "HARD_PAIRS", pairs)
    report = made(tmp_path / "d", hard=True)
    assert report.dataset == "demo-hard"
    manifest = load_manifest(tmp_path / "d", "train")
    assert manifest.dataset == "demo-hard"
    assert list(manifest.labels) == sorted(MIRROR)
    assert {(row.width, row.height, row.fps) for row in manifest.rows} == {(80, 80, 16.0)}
    left, right = manifest.labels.index("move_left"), manifest.labels.index("move_right")
    assert (manifest.mirror[left], manifest.mirror[right]) == (right, left)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "d").rglob("*.mp4")}
    assert len(times) == 12
    made(tmp_path / "d", hard=True)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "d").rglob("*.mp4")} == times
