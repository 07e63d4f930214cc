"""Images in class folders, against torchvision's ImageFolder; and the way of the data after it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from ogreg_core.data.loader import ClipDataset, ViewDataset, Views
from ogreg_core.data.manifest import load_manifest
from ogreg_core.data.sampling import ClipSampling
from ogreg_core.data.transforms import Augmentation, TestCrops
from ogreg_core.datasets import imagefolder
from ogreg_core.datasets.catalogue import list_dataset
from ogreg_core.datasets.imagefolder import list_imagefolder, list_imagenet1k
from ogreg_core.datasets.locations import find_dataset
from ogreg_core.datasets.prepare import REASONS, PrepareOptions, prepare_listing
from ogreg_core.errors import DataError, UsageError
from ogreg_core.progress import ignore_progress


def make(root: Path, names: list[str], size: tuple[int, int] = (40, 30)) -> None:
    """Images of one grey each, which numbers them."""
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (number, number, number)).save(path, "PNG")


def prepare(root: Path, *, verify: str = "quick", workers: int = 0, **options):
    how = PrepareOptions(verify=verify, workers=workers)
    return prepare_listing(list_imagefolder(root, **options), how, ignore_progress)


NAMES = [
    "train/n02/b.JPEG",
    "train/n02/deeper/a.png",
    "train/n01/z.jpg",
    "train/-x ü/1.webp",
    "train/N03/1.bmp",
    "train/n01/clip.mp4",
    "train/n01/notes.txt",
    "val/n01/1.jpeg",
    "val/n02/1.JPG",
    "test/unknown.jpg",
]


def test_files_classes_and_their_order_are_torchvisions(tmp_path):
    root = tmp_path / "photos"
    make(root, NAMES)
    report = prepare(root, workers=2)
    expected = ImageFolder(root / "train")
    assert report.classes == expected.classes == ["-x ü", "N03", "n01", "n02"]
    train = load_manifest(root, "train")
    found = {(str(train.video(row)), row.label) for row in train.rows}
    assert found == set(expected.samples)
    val = load_manifest(root, "val")
    assert [(row.path, row.label) for row in val.rows] == [
        ("val/n01/1.jpeg", 2),
        ("val/n02/1.JPG", 3),
    ]
    assert report.extra == ["test/unknown.jpg"]
    assert find_dataset("photos", "") == root
    row = train.rows[0]
    assert (row.frames, row.fps, row.duration, row.decoder) == (1, 1.0, 1.0, "image")
    assert (row.width, row.height, row.codec) == (40, 30, "png")
    assert (root / "overview.png").is_file()


def test_class_folders_get_a_seeded_split(tmp_path):
    root = tmp_path / "photos"
    make(root, [f"{label}/{i}.png" for label in "ab" for i in range(10)])
    report = prepare(root, val_share=0.3)
    assert report.videos == {"train": 14, "val": 6}
    assert list_imagefolder(root, val_share=0.3) == list_imagefolder(root, val_share=0.3)


@pytest.mark.parametrize("verify", ["quick", "full"])
def test_broken_images_are_listed_and_left_out(verify, tmp_path):
    root = tmp_path / "photos"
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))
    for label in "ab":
        (root / "train" / label).mkdir(parents=True)
        noise.save(root / "train" / label / "good.jpg")
    content = (root / "train/a/good.jpg").read_bytes()
    (root / "train/a/cut.jpg").write_bytes(content[: len(content) // 2])
    (root / "train/a/empty.jpg").touch()
    (root / "train/b/page.jpg").write_text("<html>404</html>")
    report = prepare(root, verify=verify)
    assert report.videos == {"train": 2}
    assert {(item.path, item.code) for item in report.left_out} == {
        ("train/a/cut.jpg", "truncated"),
        ("train/a/empty.jpg", "empty"),
        ("train/b/page.jpg", "not-an-image"),
    }
    assert set(report.reasons()) <= set(REASONS)
    assert str(tmp_path) not in (root / "quarantine.csv").read_text()


def test_a_second_run_opens_no_image(tmp_path):
    root = tmp_path / "photos"
    make(root, NAMES)
    assert prepare(root).checked == 7
    assert prepare(root).checked == 0


@pytest.mark.parametrize("out", ["", "ogreg-manifest"])
def test_the_overview_that_prepare_draws_is_no_image_of_the_data_set(out, tmp_path):
    root = tmp_path / "photos"
    make(root, [f"{label}/{name}.png" for label in "ab" for name in ("1", "2", "overview")])
    before = list_imagefolder(root)
    assert len(before.entries) == 6
    prepare_listing(before, PrepareOptions(out=root / out), ignore_progress)
    assert (root / out / "overview.png").is_file()
    assert list_imagefolder(root) == before


def test_validation_images_without_classes_are_not_passed_over(tmp_path):
    root = tmp_path / "imagenet"
    make(root, ["train/a/1.jpg", "train/b/1.jpg", "val/1.JPEG", "val/2.JPEG"])
    with pytest.raises(DataError, match="holds 2 images and no class folders") as caught:
        list_imagefolder(root)
    assert str(root / "val") in caught.value.what
    with pytest.raises(DataError, match="no class folders"):
        list_imagenet1k(root)


def test_videos_and_images_do_not_mix(tmp_path):
    make(tmp_path / "photos", ["a/1.jpg", "b/1.jpg"])
    with pytest.raises(DataError, match="0 classes of training videos"):
        list_dataset("folder", tmp_path / "photos")
    make(tmp_path / "clips", ["a/1.mp4", "b/1.mp4"])
    with pytest.raises(DataError, match="0 classes of training images"):
        list_dataset("imagefolder", tmp_path / "clips")


def test_the_official_name_is_for_the_official_classes(tmp_path, monkeypatch):
    monkeypatch.setattr(imagefolder, "_IMAGENET_CLASSES", 2)
    root = tmp_path / "imagenet1k"
    make(root, ["train/n01440764/1.jpg", "train/n01443537/1.jpg", "val/n01440764/1.jpg"])
    with pytest.raises(UsageError, match="belongs to the official data set"):
        list_dataset("imagefolder", root)
    listing = list_dataset("imagenet1k", root)
    assert listing.dataset == "imagenet1k"
    # Coverage is of all official images, not of those that were downloaded.
    assert listing.annotated == {"train": 1_281_167, "val": 50_000}
    make(root, ["train/more/1.jpg"])
    with pytest.raises(DataError, match="not hold the classes of ImageNet-1K") as caught:
        list_dataset("imagenet1k", root)
    assert "2 of 3 class folders" in caught.value.why
    assert caught.value.fix == f"ogreg prepare imagefolder {root}"
    with pytest.raises(UsageError, match="--val-share cannot be used with imagenet1k"):
        list_dataset("imagenet1k", root, val_share=0.1)


SAMPLINGS = [
    ClipSampling("uniform", 1),
    ClipSampling("uniform", 4),
    ClipSampling("dense", 4, 2),
    ClipSampling("dense", 4, 2, fps=30.0, short="clamp"),
]


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_clips_and_views_are_the_image_as_often_as_frames_are_wanted(sampling, tmp_path):
    root = tmp_path / "photos"
    make(root, ["train/a/1.jpg", "train/b/1.jpg"], size=(60, 40))
    prepare(root)
    manifest = load_manifest(root, "train")
    batch = ClipDataset(manifest, sampling, Augmentation(32), seed=0)[0, 1]
    assert batch.clips.shape == (1, 3, sampling.frames, 32, 32)
    assert torch.equal(batch.clips, torch.ones_like(batch.clips))
    views = Views(sampling, clips=2, crops=TestCrops(32, 36, 3))
    found = ViewDataset(manifest, views)[1].views
    assert found.shape == (1, 6, 3, sampling.frames, 32, 32)
    assert torch.equal(found, torch.ones_like(found))
