"""Image pre-training through the command line: prepare images, train at one frame, predict, and
start a video run from the checkpoint.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from tests.conftest import Ogreg
from tests.forked import Forks

CLASSES = ("blue disc", "green stripes", "red box")
SMALL = [
    "data.size=32",
    "data.short_side=32",
    "model.name=ogreg-n",
    "model.options.strides=[2,1,1,1]",
    "train.warmup_epochs=0",
]


def draw(label: str, seed: int) -> Image.Image:
    """A shape on noise, 64 x 80 pixels; its colour tells the class as well as its form."""
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(90, 160, (64, 80, 3), dtype=np.uint8))
    pen = ImageDraw.Draw(image)
    x, y = (int(value) for value in rng.integers(4, 14, 2))
    if label == "red box":
        pen.rectangle((x, y, x + 50, y + 40), fill=(230, 30, 30))
    elif label == "blue disc":
        pen.ellipse((x, y, x + 48, y + 48), fill=(30, 40, 230))
    else:
        for row in range(y, 64, 12):
            pen.rectangle((0, row, 80, row + 5), fill=(20, 220, 40))
    return image


def make(root: Path) -> None:
    """8 training and 4 validation images per class."""
    for number, label in enumerate(CLASSES):
        for i in range(12):
            folder = root / ("train" if i < 8 else "val") / label
            folder.mkdir(parents=True, exist_ok=True)
            draw(label, 100 * number + i).save(folder / f"{i}.JPEG", quality=90)


@pytest.fixture(scope="module")
def ogreg(forks: Forks) -> Ogreg:
    """Run the command line in a given folder; it must succeed."""

    def run(folder: Path, *arguments: str):
        done = forks.run(folder, list(arguments))
        assert done.returncode == 0, done.stderr
        return done

    return run


@pytest.fixture(scope="module")
def work(tmp_path_factory, ogreg) -> Path:
    """A folder with prepared images and a finished image run."""
    folder = tmp_path_factory.mktemp("images")
    make(folder / "shapes")
    (folder / "shapes/train/red box/broken.JPEG").write_text("<html>not found")
    prepared = ogreg(folder, "prepare", "imagefolder", "shapes", "--json")
    document = json.loads(prepared.stdout)
    assert document["videos"] == {"train": 24, "val": 12}
    assert document["left_out"] == {"not-an-image": 1}
    trained = ogreg(
        folder,
        *("train", "imagenet1k", "data.dataset=shapes", *SMALL, "train.epochs=12"),
        *("train.batch_size=8", "train.reference_batch=0", "train.lr=2e-3", "model.drop_path=0"),
        *("augment.scale=[0.5,1.0]", 'augment.rand_augment=""', "augment.mixup=0"),
        *("augment.cutmix=0", "train.label_smoothing=0", "augment.erasing=0", "eval.every=12"),
        *("--workers", "0", "--json"),
    )
    (folder / "report.json").write_text(trained.stdout)
    return folder


RUN = "runs/train/imagenet1k/1"


@pytest.mark.slow
def test_it_learns_from_single_images(work):
    report = json.loads((work / "report.json").read_text())
    assert report["val_videos"] == 12
    # Chance is 33 %; measured 100 %.
    assert report["last_top1_pct"] >= 75


@pytest.mark.slow
def test_predict_names_what_is_in_a_picture(work, ogreg):
    (work / "mine").mkdir()
    draw("blue disc", 7).save(work / "mine" / "photo.png")
    draw("blue disc", 8).save(work / "mine" / "other.jpg")
    done = ogreg(work, "predict", "mine", "mine/photo.png", "-c", RUN, "--json")
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [Path(item["path"]).name for item in found] == ["other.jpg", "photo.png", "photo.png"]
    assert {item["decoder"] for item in found} == {"image"}
    assert found[1] == found[2]
    assert {item["top"][0]["label"] for item in found} == {"blue disc"}


@pytest.mark.slow
def test_eval_of_images(work, ogreg):
    done = ogreg(work, "eval", RUN, "--crops", "3", "--json", "--out", "report")
    document = json.loads(done.stdout)
    assert document["videos"] == 12
    assert document["top1_pct"] >= 75


@pytest.mark.slow
def test_its_checkpoint_starts_a_video_run(work, demo_root, ogreg):
    """All but the classifier is taken (6 blocks of 18 tensors, 3 mergings of 3, stem 4, norm 2), and the
    report says so.
    """
    done = ogreg(
        work,
        *("train", "demo", f"data.root={demo_root}", *SMALL, "data.frames=4", "train.epochs=1"),
        # So small that what was taken can be recognised after an epoch.
        *("model.options.stem=patch", "eval.every=1", "train.lr=1e-9", "--init-from", RUN),
        *("--workers", "0", "--json"),
    )
    assert json.loads(done.stdout)["val_videos"] == 32
    assert (
        f"weights from {RUN}: 123 taken; 0 inflated over time; "
        "left at initialisation: head (2), of other classes"
    ) in done.stderr
    report = json.loads((work / "runs/train/demo/1/init.json").read_text())
    assert report["other_classes"] == ["head.bias", "head.weight"]
    assert report["counts"]["taken"] == len(report["taken"]) == 123
    image = load_file(work / RUN / "checkpoints/best.safetensors")
    video = load_file(work / "runs/train/demo/1/checkpoints/last.safetensors")
    assert sorted(report["taken"] + report["other_classes"]) == sorted(image) == sorted(video)
    for name in report["taken"]:
        torch.testing.assert_close(video[name], image[name], atol=1e-6, rtol=0)
