from __future__ import annotations

import os
import subprocess

import pytest

from ogreg_core.datasets.hmdb51 import list_hmdb51
from ogreg_core.datasets.listing import Entry
from ogreg_core.errors import DataError, UsageError

FOLDER = "testTrainMulti_7030_splits"
ODD = "#20_(a)+[b]-c;d@e!~&_wave_u_cm_np1_fr_goo_1.avi"
SPLITS = {
    "wave": [f"{ODD} 1 ", "same name.avi 2 ", "unused.avi 0 "],
    "brush_hair": ["same name.avi 1 ", "April_09_brush_hair.avi 2 "],
}


def make(root, videos=(), splits=SPLITS, fold=1):
    folder = root / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for label, lines in splits.items():
        (folder / f"{label}_test_split{fold}.txt").write_text("".join(f"{x}\n" for x in lines))
    for name in videos:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def test_listing(tmp_path):
    make(
        tmp_path,
        [
            f"hmdb51/wave/{ODD}",
            "hmdb51/wave/same name.avi",
            "hmdb51/wave/unused.avi",
            "hmdb51/wave/nobody's.avi",
            "hmdb51/brush_hair/same name.avi",
        ],
    )
    listing = list_hmdb51(tmp_path, None)
    assert listing.dataset == "hmdb51"
    assert listing.labels == ["brush_hair", "wave"]
    assert listing.entries == [
        Entry("hmdb51/brush_hair/same name.avi", 0, "train"),
        Entry(f"hmdb51/wave/{ODD}", 1, "train"),
        Entry("hmdb51/wave/same name.avi", 1, "test"),
    ]
    assert listing.annotated == {"train": 2, "test": 2}
    assert [(item.path, item.code, item.split) for item in listing.left_out] == [
        ("brush_hair/April_09_brush_hair.avi", "missing", "test")
    ]
    assert listing.extra == ["hmdb51/wave/nobody's.avi"]
    assert listing.notes == [
        "there are split files of 2 classes; HMDB51 has 51",
        "1 clips are in neither train nor test of split 1",
    ]
    assert listing.options == {"fold": 1, "annotations": ["<class>_test_split1.txt"]}


def test_flat_files_are_found_by_a_unique_name(tmp_path):
    make(tmp_path, [f"all/{ODD[:-4]}.mp4", "a/same name.avi", "b/same name.avi"])
    listing = list_hmdb51(tmp_path, None)
    assert [(entry.path, entry.label) for entry in listing.entries] == [(f"all/{ODD[:-4]}.mp4", 1)]
    # Nobody can say which class these are of.
    assert listing.extra == ["a/same name.avi", "b/same name.avi"]


def test_a_file_of_another_class_is_not_taken(tmp_path):
    make(tmp_path, ["wave/same name.avi"])
    listing = list_hmdb51(tmp_path, None)
    assert listing.entries == [Entry("wave/same name.avi", 1, "test")]
    assert "brush_hair/same name.avi" in [item.path for item in listing.left_out]


def test_folds(tmp_path):
    make(tmp_path, ["wave/unused.avi"])
    make(tmp_path, splits={"wave": ["unused.avi 1"], "run": []}, fold=3)
    listing = list_hmdb51(tmp_path, None, fold=3)
    assert listing.dataset == "hmdb51-3"
    assert listing.labels == ["run", "wave"]
    assert listing.entries == [Entry("wave/unused.avi", 1, "train")]
    assert listing.options["fold"] == 3
    with pytest.raises(DataError, match=r"no split files <class>_test_split2\.txt") as caught:
        list_hmdb51(tmp_path, None, fold=2)
    assert "unrar x test_train_splits.rar" in caught.value.fix
    with pytest.raises(UsageError, match="no fold 0"):
        list_hmdb51(tmp_path, None, fold=0)


def test_all_classes_need_no_note(tmp_path):
    make(tmp_path, ["c00/a.avi"], {f"c{i:02d}": ["a.avi 1"] for i in range(51)})
    listing = list_hmdb51(tmp_path, None)
    assert listing.notes == []
    assert listing.annotated == {"train": 51}


@pytest.mark.parametrize("line", ["a.avi 3", "a.avi", "1", "a.avi 1 x"])
def test_broken_lines_are_named(tmp_path, line):
    make(tmp_path, splits={"wave": ["b.avi 1", line]})
    with pytest.raises(DataError, match="not `file tag`") as caught:
        list_hmdb51(tmp_path, None)
    assert caught.value.where.endswith("wave_test_split1.txt line 2")
    assert line in caught.value.why


def test_archives_that_were_never_unpacked(tmp_path):
    root = tmp_path / "it's here"
    make(root, ["hmdb51_org.rar", "test_train_splits.rar"])
    with pytest.raises(DataError, match="have not been unpacked") as caught:
        list_hmdb51(root, None)
    assert caught.value.why == "there are no videos yet, but hmdb51_org.rar"
    # The line is run with an unrar that writes down what it is asked for.
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "unrar").write_text('#!/bin/sh\necho "$@" >> called\n')
    (tools / "unrar").chmod(0o755)
    path = {"PATH": f"{tools}:{os.environ['PATH']}"}
    (root / "wave.rar").touch()
    subprocess.run(caught.value.fix, shell=True, check=True, env=path)
    called = (root / "called").read_text().splitlines()
    assert called[0] == "x -o- hmdb51_org.rar"
    assert "x -o- wave.rar" in called
    (root / "hmdb51_org.rar").unlink()
    with pytest.raises(DataError) as caught:
        list_hmdb51(root, None)
    assert "hmdb51_org" not in caught.value.fix
    make(root, ["wave/unused.avi", f"wave/{ODD}"])
    assert len(list_hmdb51(root, None).entries) == 1


def test_the_archive_of_the_splits_is_not_meant(tmp_path):
    make(tmp_path, ["test_train_splits.rar"])
    with pytest.raises(DataError, match="0 of 4 annotated"):
        list_hmdb51(tmp_path, None)
