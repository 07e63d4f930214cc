from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch

from ogreg_core.data.loader import (
    ClipDataset,
    ViewDataset,
    Views,
    load_views,
    test_loader,
    train_loader,
)
from ogreg_core.data.manifest import load_manifest
from ogreg_core.data.mixing import Erasing
from ogreg_core.data.order import BatchOrder
from ogreg_core.data.rand_augment import parse_rand_augment
from ogreg_core.data.sampling import ClipSampling
from ogreg_core.data.transforms import Augmentation, TestCrops
from ogreg_core.errors import DataError

SAMPLING = ClipSampling("uniform", 4)
AUGMENTATION = Augmentation(
    32,
    short_side=(36, 48),
    inverse=True,
    flip="swap",
    color_jitter=0.3,
    hue=0.1,
    color_probability=0.8,
    grayscale=0.2,
    rand_augment=parse_rand_augment("rand-m7-n4-mstd0.5-inc1"),
    erasing=Erasing(0.5),
    mirror={0: 1},
    repeats=2,
)


def batches(root, workers, epoch=2, start=0, batch=5):
    dataset = ClipDataset(load_manifest(root, "train"), SAMPLING, AUGMENTATION, seed=7)
    order = BatchOrder(len(dataset), 7, batch)
    order.set_position(epoch, start)
    return list(train_loader(dataset, order, workers))


def test_samples_do_not_depend_on_workers_or_restarts(demo_root):
    reference = batches(demo_root, workers=0)
    assert len(reference) == 48 // 5
    assert reference[0].clips.shape == (10, 3, 4, 32, 32)
    for found in (batches(demo_root, workers=3), batches(demo_root, workers=1)):
        for expected, batch in zip(reference, found, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(expected[:4], batch[:4], strict=True))
            assert torch.equal(expected.times, batch.times)
    resumed = batches(demo_root, workers=0, start=3)
    for (a, _, ia, *_), (b, _, ib, *_) in zip(reference[3:], resumed, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(ia, ib)


def test_epochs_differ_in_order_and_augmentation(demo_root):
    first, second = batches(demo_root, 0, epoch=0), batches(demo_root, 0, epoch=1)
    assert first[0][2].tolist() != second[0][2].tolist()
    dataset = ClipDataset(load_manifest(demo_root, "train"), SAMPLING, AUGMENTATION, seed=7)
    assert not torch.equal(dataset[0, 3][0], dataset[1, 3][0])
    assert torch.equal(dataset[1, 3][0], dataset[1, 3][0])


def test_few_videos_still_make_a_batch(demo_root):
    assert len(batches(demo_root, 0, batch=100)) == 1


def test_views_are_clips_times_crops(demo_root):
    manifest = load_manifest(demo_root, "val")
    views = Views(SAMPLING, 2, TestCrops(32, 40, 3))
    found = load_views(manifest, manifest.rows[0], views)
    assert found.shape == (6, 3, 4, 32, 32)
    alone = load_views(manifest, manifest.rows[0], Views(SAMPLING, 2, TestCrops(32, 40, 1)))
    assert torch.equal(found[1], alone[0])
    assert torch.equal(found[4], alone[1])
    loader = test_loader(ViewDataset(manifest, views), 3, 0)
    batch, labels, indices, unreadable, times = next(iter(loader))
    assert batch.shape == (3, 6, 3, 4, 32, 32)
    assert times.shape == (3, 6, 4)
    assert unreadable == ()
    assert indices.tolist() == [0, 1, 2]
    assert labels.tolist() == [row.label for row in manifest.rows[:3]]


def test_repeated_views_of_one_decoded_clip(demo_root):
    spec = replace(AUGMENTATION, repeats=3, erasing=Erasing(1.0), short_side=(40, 48))
    dataset = ClipDataset(load_manifest(demo_root, "train"), SAMPLING, spec, seed=7)
    (first, *_) = train_loader(dataset, BatchOrder(len(dataset), 7, 4), 0)
    assert first.clips.shape == (12, 3, 4, 32, 32)
    assert first.indices.tolist() == [i for i in first.indices[::3].tolist() for _ in range(3)]
    assert len({tuple(box) for box in first.boxes.tolist()}) == 12
    assert not torch.equal(first.clips[0], first.clips[1])


def broken_copy(demo_root, tmp_path, split, count):
    copy = tmp_path / "demo"
    shutil.copytree(demo_root, copy)
    manifest = load_manifest(copy, split)
    for row in manifest.rows[:count]:
        manifest.video(row).write_bytes(b"no video")
    return manifest


def test_an_unreadable_training_video_gives_way_to_the_next(demo_root, tmp_path):
    manifest = broken_copy(demo_root, tmp_path, "train", 2)
    dataset = ClipDataset(manifest, SAMPLING, AUGMENTATION, seed=7)
    for index in (0, 1):
        item = dataset[3, index]
        assert item.indices[0] > 1
        assert torch.equal(item.clips, dataset[3, index].clips)
        assert [video.path for video in item.unreadable] == [manifest.rows[index].path]
    assert not dataset[3, 2].unreadable


def test_broken_neighbours_are_each_counted_once(demo_root, tmp_path):
    """A class folder that is lost, in a manifest that is ordered by class."""
    manifest = broken_copy(demo_root, tmp_path, "train", 15)
    dataset = ClipDataset(manifest, SAMPLING, AUGMENTATION, seed=7)
    failed = [video.index for i in range(48) for video in dataset[0, i].unreadable]
    assert failed == list(range(15))


def test_an_option_changes_no_draw_of_another(demo_root):
    """So that runs with and without an option see the same clips otherwise."""
    manifest = load_manifest(demo_root, "train")
    plain = Augmentation(32, erasing=Erasing(1.0), repeats=2)
    one = ClipDataset(manifest, SAMPLING, plain, seed=7)[0, 3]
    changed = replace(plain, flip="random", short_side=(36, 48), erasing=Erasing(1.0))
    other = ClipDataset(manifest, SAMPLING, changed, seed=7)[0, 3]
    assert torch.equal(one.boxes, other.boxes)
    grey = ClipDataset(manifest, SAMPLING, replace(plain, grayscale=1.0), seed=7)[0, 3]
    weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1, 1)
    expected = (one.clips.float() * weights).sum(1)
    assert (grey.clips[:, 0].float() - expected).abs().max() < 1.5


def test_a_disk_that_is_gone_is_an_error(demo_root, tmp_path):
    manifest = broken_copy(demo_root, tmp_path, "train", 48)
    with pytest.raises(DataError, match="11 videos, drawn at random"):
        ClipDataset(manifest, SAMPLING, AUGMENTATION, seed=7)[0, 0]


def test_an_unreadable_test_video_is_named_and_the_others_stay(demo_root, tmp_path):
    manifest = broken_copy(demo_root, tmp_path, "val", 2)
    views = Views(SAMPLING, 1, TestCrops(32, 40))
    found = list(test_loader(ViewDataset(manifest, views), 2, 0))
    assert len(found[0].unreadable) == 2
    assert len(found[0].indices) == 0
    assert [index for batch in found for index in batch.indices.tolist()] == list(range(2, 32))
    assert [video.index for batch in found for video in batch.unreadable] == [0, 1]
