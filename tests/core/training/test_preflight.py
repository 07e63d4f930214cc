"""What manifests, disk and a few invented steps say before a training starts."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch

from ogreg_core.data.loader import TrainBatch
from ogreg_core.errors import EnvironmentFault
from ogreg_core.models.registry import create_model
from ogreg_core.recipe import load_recipe
from ogreg_core.training.preflight import check_recipe, quick_checks, waiting_share
from ogreg_core.training.rehearsal import invented_batch, loading_rate, rehearse
from ogreg_core.training.splits import load_splits

CPU = torch.device("cpu")
TINY = ["data.frames=4", "data.size=32", "data.short_side=32", "train.batch_size=8"]


def recipe_of(root, *overrides):
    return load_recipe("demo", [f"data.root={root}", *TINY, *overrides])


def sentences(root, tmp_path, *overrides, train=lambda row: row, val=lambda row: row, drop=None):
    """The quick checks on changed manifests."""
    recipe = recipe_of(root, *overrides).recipe
    splits = load_splits(recipe)
    changed = replace(
        splits,
        train=replace(
            splits.train,
            rows=tuple(train(row) for row in splits.train.rows if row.label not in (drop or ())),
        ),
        val=replace(splits.val, rows=tuple(val(row) for row in splits.val.rows)),
    )
    return list(quick_checks(recipe, changed, tmp_path / "runs" / "train" / "demo"))


def test_a_sound_data_set_gives_no_cause_for_words(demo_root, tmp_path):
    (decoders,) = sentences(demo_root, tmp_path)
    assert decoders.startswith("decoders: 80 ")


def test_classes_without_training_videos_are_named(demo_root, tmp_path):
    labels = load_splits(recipe_of(demo_root).recipe).train.labels
    never, asked, _ = sentences(demo_root, tmp_path, drop=[2, 3, 5, 7, 11, 13])
    assert never.startswith("6 of 16 classes have no training video")
    assert all(labels[i] in never for i in (2, 3, 5, 7, 11))
    assert labels[13] not in never
    assert "and 1 more" in never
    assert "6 classes are validated but never trained on" in asked


@pytest.mark.parametrize("short", ["loop", "clamp"])
def test_dense_clips_longer_than_a_video(short, demo_root, tmp_path):
    overrides = ["data.sampling=dense", "data.frames=8", "data.stride=2", f"data.short={short}"]

    def cut(row):
        return replace(row, frames=14 if row.label == 4 else 15)

    (text,) = [s for s in sentences(demo_root, tmp_path, *overrides, train=cut) if "shorter" in s]
    assert text.startswith("3 of 48 videos in train are shorter than a clip of 15 frames")
    assert ("begin again" in text) == (short == "loop")
    assert "the shortest has 14: train/" in text


def test_uniform_clips_longer_than_a_video(demo_root, tmp_path):
    def cut(row):
        return replace(row, frames=3)

    (text,) = [s for s in sentences(demo_root, tmp_path, val=cut) if "shorter" in s]
    assert text.startswith("32 of 32 videos in val")
    assert "repeat frames" in text


def test_a_nominal_rate_counts_in_its_own_frames(demo_root, tmp_path):
    """Two seconds at 10 frames a second are 60 of 30."""
    overrides = ["data.sampling=dense", "data.frames=30", "data.stride=2"]

    def two_seconds(row):
        return replace(row, frames=20, fps=10.0, duration=2.0)

    def shorter(*more):
        found = sentences(
            demo_root, tmp_path, *overrides, *more, train=two_seconds, val=two_seconds
        )
        return [text for text in found if "shorter" in text]

    assert len(shorter()) == 2
    assert not shorter("data.fps=30.0")


def test_videos_in_both_splits(demo_root, tmp_path):
    shared = load_splits(recipe_of(demo_root).recipe).train.rows[0].path
    found = sentences(demo_root, tmp_path, val=lambda row: replace(row, path=shared))
    assert f"1 videos are in both train and val: {shared}" in found


def test_decoders_are_counted(demo_root, tmp_path, monkeypatch):
    def mixed(row):
        return replace(row, decoder="decord" if row.label < 4 else "image")

    monkeypatch.setattr("ogreg_core.training.preflight.decord_available", lambda: True)
    found = sentences(demo_root, tmp_path, train=mixed, val=mixed)
    assert found[-1] == "decoders: 60 image, 20 decord"
    monkeypatch.setattr("ogreg_core.training.preflight.decord_available", lambda: False)
    found = sentences(demo_root, tmp_path, train=mixed, val=mixed)
    assert found[-1] == "decoders: 60 image, 20 pyav (decord is not installed)"


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def bytes_needed(average):
    """The same count from a real model: best, last, and weights, two moments, average; twice."""
    model = create_model("ogreg-n", 16)
    return 2 * (5 + average) * 4 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("ema", "average"), [(0.0, 0), (0.999, 1)])
def test_disk_space(ema, average, demo_root, tmp_path, monkeypatch):
    needed = bytes_needed(average)

    def check(free):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, free))
        found = sentences(demo_root, tmp_path, f"train.ema={ema}", "model.options={}")
        return [text for text in found if "checkpoints" in text]

    assert not check(2 * needed)
    assert len(check(2 * needed - 1)) == 1
    assert len(check(needed)) == 1
    with pytest.raises(EnvironmentFault, match="checkpoints and state need"):
        check(needed - 1)


def test_what_a_resumed_run_has_written_is_not_needed_again(demo_root, tmp_path, monkeypatch):
    folder = tmp_path / "runs" / "train" / "demo" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "state.pt").write_bytes(bytes(10**6))
    free = bytes_needed(0) - 10**6
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, free))
    assert sentences(demo_root, tmp_path, "model.options={}")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, free - 1))
    with pytest.raises(EnvironmentFault):
        sentences(demo_root, tmp_path, "model.options={}")


def test_quick_checks_are_quick(demo_root, tmp_path):
    sentences(demo_root, tmp_path)
    started = time.process_time()
    sentences(demo_root, tmp_path)
    assert time.process_time() - started < 2


def test_waiting_for_data():
    assert waiting_share(12.1, 21.3, workers=2) == pytest.approx(1 - 12.1 / 21.3)
    assert waiting_share(30.0, 21.3, workers=2) == 0
    # In turns: 1/10 s of loading and 1/30 s of training for each clip.
    assert waiting_share(10.0, 30.0, workers=0) == pytest.approx(0.1 / (0.1 + 1 / 30))


def slow_batches(clips, pause, count):
    batch = invented_batch(clips, 1, 32, 2)
    for _ in range(count):
        time.sleep(pause)
        yield batch


def test_loading_rate_leaves_the_start_out():
    def epochs(epoch):
        if epoch == 0:
            time.sleep(0.5)
        return slow_batches(4, 0.02, 10)

    # 80 clips in 0.4 s at best; with the start 0.9 s.
    assert 80 / 0.8 < loading_rate(epochs, 2, most=20) < 80 / 0.39


def test_loading_rate_ends_in_time():
    started = time.monotonic()
    rate = loading_rate(lambda _: slow_batches(4, 0.1, 10**9), 1, seconds=0.5)
    assert time.monotonic() - started < 2
    assert 20 < rate < 45
    # A first batch that takes longer than everything may take.
    assert 0 < loading_rate(lambda _: slow_batches(4, 0.3, 10), 50, seconds=0.1) < 20


def test_a_rehearsal_makes_whole_micro_batches_where_time_allows():
    seen = []
    found = rehearse(seen.append, lambda n: n, 12, CPU, seconds=20, available_mb=1e9)
    assert seen[0] == 1
    assert sorted(set(seen)) == [1, 2, 4, 8, 12]
    assert found.clips == 12
    assert found.fits
    assert found.clips_per_second > 0


def test_a_slow_model_is_rehearsed_with_fewer_clips():
    found = rehearse(lambda n: time.sleep(0.1 * n), lambda n: n, 64, CPU, seconds=1.5)
    assert 1 < found.clips < 16
    assert found.clips_per_second == pytest.approx(10, rel=0.3)


def test_memory_on_a_cpu_is_computed_before_it_is_used():
    held = []

    def step(clips):
        held[:] = [torch.ones(clips * 2**22 * 10)]  # 160 MB a clip
        held.clear()

    found = rehearse(step, lambda n: n, 64, CPU, seconds=30, available_mb=2000)
    assert not found.fits
    assert found.clips < 16
    assert found.needed_mb == pytest.approx(64 * 160, rel=0.2)
    # What the first step freed may still be the process's: one clip more.
    assert 0.8 * 160 * found.clips < found.peak_mb < 1.2 * 160 * (found.clips + 1)


class FullGpu:
    """A step whose device says no."""

    def __init__(self, limit):
        self.limit = limit
        self.count = 0

    def __call__(self, clips):
        self.count += 1
        if clips > self.limit:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")


def test_a_gpu_that_says_no_is_a_finding(monkeypatch):
    for name in ("reset_peak_memory_stats", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda _: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 7 * 2**20)
    found = rehearse(FullGpu(4), lambda n: n, 8, torch.device("cuda"))
    assert not found.fits
    assert found.clips == 0
    assert found.clips_per_second == 0
    step = FullGpu(8)
    found = rehearse(step, lambda n: n, 8, torch.device("cuda"))
    assert found.fits
    assert (found.clips, found.peak_mb) == (8, 7)
    assert step.count > 3


def test_an_invented_batch_has_the_shape_of_a_real_one():
    batch = invented_batch(3, 4, 32, 5)
    assert isinstance(batch, TrainBatch)
    assert batch.clips.shape == (3, 3, 4, 32, 32)
    assert batch.clips.dtype == torch.uint8
    assert batch.boxes.shape == (3, 5)
    assert int(batch.labels.max()) < 5


@pytest.fixture
def hurry(monkeypatch):
    """The same measurements within fractions of a second."""
    from ogreg_core.training import preflight

    monkeypatch.setattr(
        preflight,
        "loading_rate",
        lambda batches_of, workers: loading_rate(batches_of, workers, most=2),
    )
    monkeypatch.setattr(preflight, "rehearse", lambda *arguments: rehearse(*arguments, seconds=2.0))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_dry_run_measures_a_step_and_the_loader(workers, demo_root, hurry, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = check_recipe(
        recipe_of(demo_root, "train.accumulate=2", "augment.repeats=3", "train.ema=0.9"),
        CPU,
        workers=workers,
    )
    figures = found.figures
    assert not found.missing
    assert not found.problems
    assert figures["clips_per_micro_batch"] == 12
    assert figures["clips_per_step"] == 24
    assert figures["steps_per_epoch"] == 6
    assert figures["fits_into_memory"] is True
    assert figures["loaded_clips_per_s"] > 0
    speed = figures["rehearsed_clips"] / figures["step_s"]
    assert figures["trained_clips_per_s"] == pytest.approx(speed)
    waiting = figures["data_wait_pct"] / 100
    assert waiting == pytest.approx(waiting_share(figures["loaded_clips_per_s"], speed, workers))
    minutes = 6 * 24 / speed / (1 - waiting) / 60
    assert figures["epoch_without_validation_min"] == pytest.approx(minutes)
    assert figures["training_without_validation_h"] == pytest.approx(minutes * 32 / 60)
    assert "the model will" in found.notes[-1]
    assert not list(tmp_path.iterdir())


def test_out_of_memory_is_a_finding_with_advice(demo_root, hurry, monkeypatch):
    monkeypatch.setattr("ogreg_core.training.rehearsal.room_mb", lambda _device: 0.0)
    found = check_recipe(recipe_of(demo_root), CPU)
    assert found.figures["fits_into_memory"] is False
    (problem,) = found.problems
    assert "train.accumulate=2" in problem
    assert "train.checkpoint_stages" in problem


def test_a_full_disk_is_a_finding(demo_root, hurry, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 0))
    found = check_recipe(recipe_of(demo_root), CPU)
    assert "checkpoints and state need" in found.problems[0]


def test_without_data_the_model_is_rehearsed_all_the_same(hurry, tmp_path):
    found = check_recipe(recipe_of(tmp_path / "none"), CPU)
    assert "ogreg prepare" in found.missing[0]
    assert found.figures["step_s"] > 0
    assert "loaded (clips/s)" not in found.figures
    assert not found.problems
