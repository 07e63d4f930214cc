from __future__ import annotations

import os
import shutil

import pytest

from ogreg_core.data.manifest import load_manifest
from ogreg_core.datasets.folder import list_folder
from ogreg_core.datasets.locations import find_dataset, known_datasets
from ogreg_core.datasets.prepare import PrepareOptions, prepare_listing
from ogreg_core.errors import DataError, EnvironmentFault
from ogreg_core.progress import ignore_progress
from ogreg_core.video import write_video
from tests.conftest import moving_frames


def make(root, names):
    source = root.parent / "one.mp4"
    if not source.exists():
        write_video(source, moving_frames(8, 48, 64), 10)
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, root / name)


def prepare(root, **options):
    how = {key: options.pop(key) for key in ("out", "workers") if key in options}
    return prepare_listing(list_folder(root, **options), PrepareOptions(**how), ignore_progress)


def test_split_folders(tmp_path):
    root = tmp_path / "set"
    make(
        root,
        [
            "train/wave/a.mp4",
            "train/wave/deeper/b [1].mp4",
            "train/-kick/ü '\".mkv.mp4",
            "validation/wave/c.mp4",
            "test/-kick/d.mp4",
            "train/wave/notes.txt",
            ".hidden/x/y.mp4",
        ],
    )
    report = prepare(root)
    assert report.classes == ["-kick", "wave"]
    assert report.videos == {"train": 3, "val": 1, "test": 1}
    manifest = load_manifest(root, "train")
    assert [(row.path, row.label) for row in manifest.rows] == [
        ("train/-kick/ü '\".mkv.mp4", 0),
        ("train/wave/a.mp4", 1),
        ("train/wave/deeper/b [1].mp4", 1),
    ]
    assert all(manifest.video(row).is_file() for row in manifest.rows)
    assert manifest.rows[0].frames == 8
    assert find_dataset("set", "") == root


def test_class_folders_get_a_seeded_split_per_class(tmp_path):
    root = tmp_path / "set"
    make(root, [f"{c}/{i}.mp4" for c in ("a", "b", "c") for i in range(10)])
    report = prepare(root, val_share=0.3, seed=1)
    assert report.videos == {"train": 21, "val": 9}
    first = load_manifest(root, "val")
    assert [row.label for row in first.rows] == [0] * 3 + [1] * 3 + [2] * 3
    train = {row.path for row in load_manifest(root, "train").rows}
    assert not train & {row.path for row in first.rows}
    prepare(root, val_share=0.3, seed=1, workers=2)
    assert load_manifest(root, "val") == first
    prepare(root, val_share=0.3, seed=2)
    assert load_manifest(root, "val").rows != first.rows


def test_every_class_with_two_videos_is_validated(tmp_path):
    root = tmp_path / "set"
    make(root, ["a/1.mp4", "a/2.mp4", "b/1.mp4", "b/2.mp4", "c/1.mp4"])
    assert prepare(root).videos == {"train": 3, "val": 2}


def test_two_folders_for_one_split_are_refused(tmp_path):
    root = tmp_path / "set"
    make(root, ["train/a/1.mp4", "val/a/1.mp4", "validation/a/1.mp4"])
    with pytest.raises(DataError, match="two val splits"):
        prepare(root)


def test_broken_files_are_listed_and_left_out(tmp_path):
    root = tmp_path / "set"
    make(root, ["train/a/1.mp4", "train/b/2.mp4"])
    (root / "train/a/empty.mp4").touch()
    (root / "train/b/text.mp4").write_text("hello")
    report = prepare(root)
    assert report.videos == {"train": 2}
    assert {(item.path, item.code) for item in report.left_out} == {
        ("train/a/empty.mp4", "empty"),
        ("train/b/text.mp4", "not-a-video"),
    }
    lines = (root / "quarantine.csv").read_text().splitlines()
    assert lines[0] == "path,split,reason,detail"
    assert len(lines) == 3


def test_names_that_are_no_utf8_are_left_out(tmp_path):
    root = tmp_path / "set"
    make(root, ["train/a/1.mp4", "train/b/1.mp4"])
    odd = os.fsencode(root / "train" / "a") + b"/\xff.mp4"
    with open(odd, "wb") as file:
        file.write((root / "train/a/1.mp4").read_bytes())
    report = prepare(root)
    assert report.videos == {"train": 2}
    assert report.left_out[0].code == "name"


def test_read_only_root_needs_out(tmp_path):
    root = tmp_path / "set"
    make(root, ["a/1.mp4", "a/2.mp4", "b/1.mp4", "b/2.mp4"])
    root.chmod(0o555)
    try:
        with pytest.raises(EnvironmentFault, match="read-only") as caught:
            prepare(root)
        assert "--out" in caught.value.fix
        report = prepare(root, out=tmp_path / "manifest", name="mine")
    finally:
        root.chmod(0o755)
    assert report.folder == tmp_path / "manifest"
    manifest = load_manifest(tmp_path / "manifest", "train")
    assert manifest.video(manifest.rows[0]).is_file()
    assert known_datasets() == {"mine": tmp_path / "manifest"}
    assert not (root / "dataset.json").exists()


def test_senseless_folders_are_refused(tmp_path):
    with pytest.raises(DataError, match="not a folder"):
        prepare(tmp_path / "none")
    with pytest.raises(DataError, match="0 classes"):
        prepare(tmp_path)
    root = tmp_path / "set"
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
        (root / name / "x.mp4").write_text("no")
    with pytest.raises(DataError, match="none of the videos"):
        prepare(root)


def test_unknown_names_say_how_to_prepare():
    with pytest.raises(DataError) as caught:
        find_dataset("ssv2", "")
    assert "ogreg prepare ssv2" in caught.value.fix
    with pytest.raises(DataError, match="names no data set"):
        find_dataset("", "")


def test_a_folder_without_train_is_refused(tmp_path):
    root = tmp_path / "set"
    make(root, ["val/a/1.mp4", "test/b/1.mp4"])
    with pytest.raises(DataError, match="no train folder"):
        prepare(root)


def test_classes_that_cannot_be_learnt_are_left_out_and_told(tmp_path):
    root = tmp_path / "set"
    make(root, ["train/a/1.mp4", "train/b/1.mp4", "val/a/2.mp4", "val/c/2.mp4"])
    (root / "train/empty").mkdir()
    report = prepare(root)
    assert report.classes == ["a", "b"]
    assert report.extra == ["val/c/2.mp4"]
    assert sorted(report.notes) == [
        "class 'c' has no training videos and is left out",
        "class folder 'train/empty' is empty",
    ]


def test_links_that_lead_to_themselves_end_nothing(tmp_path):
    root = tmp_path / "set"
    make(root, ["train/a/1.mp4", "train/b/1.mp4"])
    os.symlink("loop.mp4", root / "train/a/loop.mp4")
    os.symlink("..", root / "train/b/up")
    report = prepare(root)
    assert report.videos == {"train": 2}
    assert [(item.path, item.code) for item in report.left_out] == [("train/a/loop.mp4", "missing")]
