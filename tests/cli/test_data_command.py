"""``ogreg data show`` from outside."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from ogreg_core.data.loader import locate
from ogreg_core.data.manifest import load_manifest
from ogreg_core.data.order import BatchOrder, sample_rng
from ogreg_core.data.sampling import ClipSampling, positions, train_indices
from tests.cli.test_errors import check
from tests.cli.test_start_up import PROBE

SMALL = ["data.frames=4", "data.size=32", "data.short_side=32"]


@pytest.mark.slow
def test_picture_and_document(ogreg, demo_root, tmp_path):
    command = (
        *("data", "show", "demo", f"data.root={demo_root}", *SMALL, "seed=1", "augment.mixup=0.4"),
        *("eval.clips=2", "eval.crops=3", "--samples", "3", "--views", "2", "--epoch", "2"),
    )
    done = ogreg(*command, "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["schema"] == "ogreg.data-show.v1"
    folder = tmp_path / "runs" / "data" / "demo" / "1"
    assert Path(document["picture"]) == folder / "samples.png"
    assert {path.name for path in folder.iterdir()} == {
        *("command.txt", "recipe.toml", "samples.json", "samples.png")
    }
    with Image.open(folder / "samples.png") as picture:
        picture.load()
        assert picture.format == "PNG"
        assert picture.width > 1200
        assert 800 < picture.height < 3000

    manifest, sampling = load_manifest(demo_root, "train"), ClipSampling("uniform", 4)
    order = BatchOrder(len(manifest.rows), 1, 16).samples(1)
    assert [sample["index"] for sample in document["samples"]] == order[:3]
    for place, sample in enumerate(document["samples"]):
        row = manifest.rows[sample["index"]]
        rng = sample_rng(1, 1, sample["index"], "frames")
        located = locate(
            manifest, row, train_indices(positions(row, sampling), sampling, rng), sampling
        )
        assert list(zip(sample["frames"], sample["seconds"], strict=True)) == located
        assert (sample["path"], sample["label"]) == (row.path, manifest.labels[row.label])
        partner = manifest.rows[order[15 - place]]
        assert sample["mixed_with"]["path"] == partner.path
        assert sample["mixed_with"]["label"] == manifest.labels[partner.label]
        assert sample["share"] + sample["mixed_with"]["share"] == pytest.approx(1)
        assert sample["decode_ms"] > 0
        assert sample["augment_ms"] > 0
    with open(demo_root / "val.csv", newline="") as file:
        listed = [row["path"] for row in csv.DictReader(file)]
    assert [video["path"] for video in document["videos"]] == [listed[8], listed[24]]
    assert [len(video["views"]) for video in document["videos"]] == [6, 6]
    assert "decode" in done.stderr

    again = ogreg(*command)
    assert again.returncode == 0, again.stderr
    assert again.stdout == "runs/data/demo/2/samples.png\n"
    pixels = [frames_of(tmp_path / f"runs/data/demo/{number}/samples.png") for number in (1, 2)]
    assert pixels[0] == pixels[1]


def frames_of(path: Path) -> bytes:
    """Everything right of the captions, in which the times of loading stand."""
    from ogreg_core.data_picture import CAPTION_INCHES, DPI

    with Image.open(path) as picture:
        box = (int(CAPTION_INCHES * DPI), 0, picture.width, picture.height)
        return picture.convert("RGB").crop(box).tobytes()


def test_out_split_and_rows(ogreg, demo_root, tmp_path):
    done = ogreg(
        *("data", "show", "demo", f"data.root={demo_root}", *SMALL, "--index", "7", "--index", "2"),
        *("--views", "1", "--split", "train", "--out", "a b.png", "--json"),
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert [sample["index"] for sample in document["samples"]] == [7, 2]
    assert document["val_split"] == "train"
    assert document["videos"][0]["path"].startswith("train/")
    assert [sample["mixed_with"] for sample in document["samples"]] == [None, None]
    assert [path.name for path in tmp_path.iterdir()] == ["a b.png"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["nope.toml"], 2, ["there is no recipe"]),
        (["demo", "augment.mixpu=0.4"], 2, ["did you mean 'augment.mixup'"]),
        (["demo", "--samples", "0", "--views", "0"], 2, ["nothing to show"]),
        (["demo", "--out", "a.jpg"], 2, [".png"]),
        (["demo", "--out", "no where/a.png"], 2, ["mkdir -p 'no where'"]),
        (["demo"], 3, ["no prepared data set", "ogreg prepare demo data/demo"]),
        (["kinetics400"], 3, ["has not been prepared", "ogreg prepare kinetics400"]),
        (["demo", "data.root={root}", "--split", "nope"], 3, ["no split 'nope'"]),
        (["demo", "data.root={root}", "--index", "48"], 2, ["no row 48", "0 to 47"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input(arguments, code, words, ogreg, demo_root, tmp_path):
    arguments = [text.format(root=demo_root) for text in arguments]
    check(ogreg("data", "show", *arguments), code, *words)
    assert not list(tmp_path.iterdir())


def test_existing_files_are_not_overwritten(ogreg, demo_root, tmp_path):
    (tmp_path / "a.png").write_text("precious")
    done = ogreg("data", "show", "demo", f"data.root={demo_root}", "--out", "a.png", "--json")
    check(done, 2, "a.png exists")
    assert json.loads(done.stdout)["error"]["code"] == 2
    assert (tmp_path / "a.png").read_text() == "precious"


@pytest.mark.parametrize(
    "arguments",
    [
        ["data"],
        ["data", "--help"],
        ["data", "show"],
        ["data", "show", "--help"],
        ["data", "show", "demo", "data.sizze=3"],
        ["data", "show", "demo", "--out", "a.jpg"],
    ],
    ids=" ".join,
)
def test_nothing_heavy_is_imported(arguments, tmp_path):
    code = PROBE.format(arguments=arguments)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr


def test_help(ogreg):
    done = ogreg("data", "show", "--help")
    assert done.returncode == 0
    assert "Examples: ogreg data show" in done.stdout
    alone = ogreg("data")
    assert "show" in alone.stdout + alone.stderr
    assert "Usage: ogreg data" in alone.stdout + alone.stderr
