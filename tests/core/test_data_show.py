"""What the picture of the data shows is what the training step and the test get."""

from __future__ import annotations

import csv
import random
import shutil
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from ogreg_core.data.loader import ClipDataset, Views, load_views
from ogreg_core.data.manifest import Row, write_dataset
from ogreg_core.data.order import sample_rng
from ogreg_core.data.sampling import ClipSampling
from ogreg_core.data.transforms import TestCrops
from ogreg_core.data_picture import CAPTION_INCHES, DPI, save_sheet
from ogreg_core.data_show import DataSheet, collect
from ogreg_core.errors import DataError, UsageError
from ogreg_core.progress import ignore_progress
from ogreg_core.recipe import load_recipe
from ogreg_core.runs import RunFolder
from ogreg_core.training.assemble import build_trainer
from ogreg_core.training.settings import augmentation_of
from ogreg_core.training.splits import load_splits
from ogreg_core.video import read_frames, write_video
from tests.conftest import moving_frames

SMALL = [
    "seed=3",
    "data.frames=4",
    "data.size=32",
    "data.short_side=40",
    "train.batch_size=9",
    "train.warmup_epochs=0",
    "model.options.strides=[2,1,1,1]",
]
PLAIN = ["augment.color_jitter=0.0", "augment.scale=[1.0,1.0]", "augment.ratio=[1.0,1.0]"]


def recipe_for(root, *overrides):
    return load_recipe("demo", [f"data.root={root}", *SMALL, *overrides])


class Stop(Exception):
    pass


def first_model_input(loaded, folder, epoch):
    """What the model gets in the first step of an epoch of a real training, and the batch's rows."""
    splits = load_splits(loaded.recipe)
    device = torch.device("cpu")
    run = RunFolder(folder)
    trainer = build_trainer(
        loaded, splits, run, device=device, workers=0, on_progress=ignore_progress
    )
    seen = []

    def keep(_module, inputs):
        seen.append(inputs[0].clone())
        raise Stop

    trainer.step.model.register_forward_pre_hook(keep)
    trainer.position.epoch = epoch
    with pytest.raises(Stop):
        trainer.fit()
    return seen[0], trainer.order.samples(epoch)[: loaded.recipe.train.batch_size]


@pytest.mark.parametrize(
    "augment",
    [
        ["mixup=0.8", "erasing=0.6"],
        ["cutmix=1.0", "repeats=2", "color_jitter=0.4"],
        ["mixup=0.8", "cutmix=1.0", "mix_probability=0.5", "rand_augment=rand-m7-n2"],
        [],
    ],
    ids=lambda words: " ".join(words) or "none",
)
@pytest.mark.parametrize("epoch", [0, 2])
def test_samples_are_what_the_model_is_trained_on(augment, epoch, demo_root, tmp_path):
    loaded = recipe_for(demo_root, *(f"augment.{text}" for text in augment))
    trained, rows = first_model_input(loaded, tmp_path, epoch)
    repeats = loaded.recipe.augment.repeats
    sheet = collect(loaded, samples=9, videos=0, epoch=epoch)
    assert [sample.index for sample in sheet.samples] == [
        row for row in rows for _ in range(repeats)
    ]
    for sample, clip in zip(sheet.samples, trained, strict=True):
        torch.testing.assert_close(sample.model_input, clip, rtol=0, atol=1e-6)
        assert sample.batch == 0


def test_clips_are_those_of_the_dataset_and_frames_those_of_the_file(demo_root):
    loaded = recipe_for(demo_root, "augment.mixup=0.4")
    recipe, splits = loaded.recipe, load_splits(loaded.recipe)
    augmentation = augmentation_of(recipe, splits.train.mirror)
    sheet = collect(loaded, samples=3, videos=0, epoch=5)
    for sample in sheet.samples:
        rng = sample_rng(3, 5, sample.index, "frames")
        row = splits.train.rows[sample.index]
        expected = [int(row.frames / 4 * (i + rng.random())) for i in range(4)]
        assert sample.frames == expected
        assert sample.seconds == pytest.approx([frame / row.fps for frame in expected])
        assert sample.path == row.path
        assert sample.label == splits.train.labels[row.label]
        dataset = ClipDataset(splits.train, ClipSampling("uniform", 4), augmentation, seed=3)
        assert torch.equal(sample.clip, dataset[5, sample.index].clips[0])
        assert sample.decode_ms > 0
        assert sample.augment_ms > 0


def test_frames_are_the_pixels_shown(demo_root):
    """Without random changes a shown frame is that frame of the file."""
    loaded = recipe_for(demo_root, "data.size=112", "data.short_side=112", *PLAIN)
    (sample,) = collect(loaded, samples=1, videos=0).samples
    assert sample.partner is None
    assert sample.share == 1
    assert np.array_equal(sample.pictures, sample.clip.permute(1, 2, 3, 0).numpy())
    file = demo_root / sample.path
    assert np.abs(sample.pictures - read_frames(file, sample.frames).numpy().astype(int)).max() <= 1


def test_mixed_clips_name_both_and_their_shares(demo_root):
    plain = collect(recipe_for(demo_root), samples=9, videos=0).samples
    mixed = collect(recipe_for(demo_root, "augment.mixup=0.4"), samples=9, videos=0).samples
    kept = sample_rng(3, 0, 0, "step")
    kept.random()
    share = kept.betavariate(0.4, 0.4)
    for place, (alone, sample) in enumerate(zip(plain, mixed, strict=True)):
        other = plain[8 - place]
        if place == 4:  # the middle of an odd batch is its own partner
            assert sample.partner is None
            assert torch.equal(sample.model_input, alone.model_input)
            continue
        assert sample.partner is not None
        assert (sample.partner.index, sample.partner.path) == (other.index, other.path)
        assert sample.partner.label == other.label
        assert sample.share == pytest.approx(share, abs=1e-6)
        blend = share * alone.model_input + (1 - share) * other.model_input
        torch.testing.assert_close(sample.model_input, blend, rtol=0, atol=1e-5)


def test_erased_boxes_and_rows_by_number(demo_root):
    loaded = recipe_for(demo_root, "augment.erasing=1.0")
    samples = collect(loaded, videos=0, indices=[40, 3]).samples
    assert [sample.index for sample in samples] == [40, 3]
    for sample in samples:
        top, left, height, width = sample.box
        changed = (sample.pictures != sample.clip.permute(1, 2, 3, 0).numpy()).any(axis=(0, 3))
        rows, columns = np.nonzero(changed)
        assert (rows.min(), columns.min()) == (top, left)
        assert (rows.max() + 1, columns.max() + 1) == (top + height, left + width)


def test_left_over_videos_are_not_mixed(demo_root):
    """48 videos in batches of 9 leave 3, which the loader drops."""
    loaded = recipe_for(demo_root, "augment.mixup=0.4")
    samples = collect(loaded, videos=0, indices=range(48)).samples
    left = [sample for sample in samples if sample.batch is None]
    assert len(left) == 3
    assert all(sample.share == 1 and sample.partner is None for sample in left)
    assert {sample.batch for sample in samples} == {None, 0, 1, 2, 3, 4}


def test_views_are_those_of_the_test(demo_root):
    loaded = recipe_for(demo_root, "eval.clips=2", "eval.crops=3")
    splits = load_splits(loaded.recipe)
    sheet = collect(loaded, samples=0, videos=3)
    assert [video.index for video in sheet.videos] == [5, 16, 26]
    views = Views(ClipSampling("uniform", 4), 2, TestCrops(32, 40, 3))
    for video in sheet.videos:
        row = splits.val.rows[video.index]
        expected = load_views(splits.val, row, views).permute(0, 2, 3, 4, 1)
        assert np.array_equal(video.pictures.reshape(expected.shape), expected.numpy())
        assert video.label == splits.val.labels[row.label]
        segment = row.frames / 4
        for clip, share in enumerate((1 / 3, 2 / 3)):
            frames = [int(segment * (i + share)) for i in range(4)]
            assert video.frames[clip] == frames
            assert video.seconds[clip] == pytest.approx([frame / row.fps for frame in frames])
        listed = video.to_json()["views"]
        assert [(view["clip"], view["crop"], view["place"]) for view in listed] == [
            (clip, crop, place)
            for clip in (1, 2)
            for crop, place in enumerate(("left", "centre", "right"), 1)
        ]


def frame_pixels(path):
    """The picture without the column of captions, where the times of loading stand."""
    return np.asarray(Image.open(path).convert("RGB"))[:, int(CAPTION_INCHES * DPI) :]


def test_two_pictures_are_alike_and_show_the_frames(demo_root, tmp_path):
    loaded = recipe_for(demo_root, "augment.cutmix=1.0", "augment.erasing=0.5", "eval.crops=3")
    for name in ("a.png", "b.png"):
        save_sheet(collect(loaded, samples=3, videos=1), tmp_path / name)
    first, second = frame_pixels(tmp_path / "a.png"), frame_pixels(tmp_path / "b.png")
    assert np.array_equal(first, second)
    other = collect(loaded, samples=3, videos=1, epoch=1)
    save_sheet(other, tmp_path / "c.png")
    assert not np.array_equal(first, frame_pixels(tmp_path / "c.png"))
    # Four frames in each of three rows of samples, and three of each of three crops.
    inked = (first < 250).any(axis=2).mean()
    assert 0.3 < inked < 0.9
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["a.png", "b.png", "c.png"]


def test_unreadable_videos_are_named_not_fatal(tmp_path):
    root = tmp_path / "set"
    for split, count in (("train", 4), ("val", 2)):
        for number in range(count):
            folder = root / split / "[red] $a_1$ \u6f22"
            folder.mkdir(parents=True, exist_ok=True)
            write_video(folder / f"{number}.mp4", moving_frames(8, 40, 56, number), 10)
    splits = {
        split: [
            Row(str(path.relative_to(root)), 0, 8, 10.0, 0.8, 56, 40, "pyav")
            for path in sorted((root / split).rglob("*.mp4"))
        ]
        for split in ("train", "val")
    }
    write_dataset(
        root,
        dataset="set",
        video_root=root,
        labels=["[red] $a_1$ \u6f22 " + "long " * 40],
        splits=splits,
        version="0",
    )
    (root / splits["train"][1].path).write_text("no video")
    (root / splits["val"][0].path).write_text("no video")
    sheet = collect(recipe_for(root), videos=2, indices=[1])
    (sample,) = sheet.samples
    assert sample.index != 1
    assert [video.index for video in sample.stands_for] == [1]
    # The generator is that of the sample which it replaces.
    rng = sample_rng(3, 0, 1, "frames")
    assert sample.frames == [int(2 * (i + rng.random())) for i in range(4)]
    assert [video.index for video in sheet.unreadable] == [0]
    assert [video.index for video in sheet.videos] == [1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the font lacks a sign of the label
        save_sheet(sheet, tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").format == "PNG"


def test_what_cannot_be_shown(demo_root, tmp_path):
    with pytest.raises(UsageError, match="no row 48"):
        collect(recipe_for(demo_root), indices=[48])
    missing = tmp_path / "not here"
    with pytest.raises(DataError) as caught:
        collect(recipe_for(missing))
    assert caught.value.fix == f"ogreg prepare demo '{missing}'"
    broken = tmp_path / "broken"
    shutil.copytree(demo_root, broken)
    (broken / "val.csv").unlink()
    with pytest.raises(DataError, match="no split 'val'"):
        collect(recipe_for(broken))


def test_threads_and_random_numbers_are_left_alone(demo_root):
    threads, state, python = torch.get_num_threads(), torch.get_rng_state(), random.getstate()
    sheet = collect(recipe_for(demo_root, "augment.mixup=0.4"), samples=1, videos=1)
    assert isinstance(sheet, DataSheet)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python
    with open(demo_root / "train.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert sheet.samples[0].path == rows[sheet.samples[0].index]["path"]
