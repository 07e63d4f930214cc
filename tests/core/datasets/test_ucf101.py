from __future__ import annotations

import pytest

from ogreg_core.datasets.listing import Entry
from ogreg_core.datasets.ucf101 import list_ucf101
from ogreg_core.errors import DataError, UsageError

# Official order, which is not sorted().
OFFICIAL = ["Hammering", "HammerThrow", "HandstandPushups", "JumpingJack", "JumpRope"]
TRAIN = [
    "Hammering/v_Hammering_g08_c01.avi 1",
    "HandstandPushups/v_HandStandPushups_g08_c01.avi 3",
    "JumpRope/v_JumpRope_g08_c01.avi 5",
]
TEST = ["HammerThrow/v_HammerThrow_g01_c01.avi", "HandstandPushups/v_HandStandPushups_g01_c01.avi"]


def make(
    root, videos=(), train=TRAIN, test=TEST, fold=1, classes=OFFICIAL, folder="ucfTrainTestlist"
):
    lists = root / folder
    lists.mkdir(parents=True, exist_ok=True)
    numbered = [f"{i} {name}" for i, name in enumerate(classes, start=1)]
    for name, lines in (
        ("classInd.txt", numbered),
        (f"trainlist{fold:02d}.txt", train),
        (f"testlist{fold:02d}.txt", test),
    ):
        # The official files end their lines in both ways.
        (lists / name).write_bytes("".join(f"{line}\r\n" for line in lines).encode() + b"\n")
    for name in videos:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def test_class_folders(tmp_path):
    make(
        tmp_path,
        [
            "UCF-101/Hammering/v_Hammering_g08_c01.avi",
            "UCF-101/HandstandPushups/v_HandStandPushups_g08_c01.avi",
            "UCF-101/HandstandPushups/v_HandstandPushups_g01_c01.avi",  # renamed by somebody
            "UCF-101/HammerThrow/v_HammerThrow_g01_c01.avi",
            "UCF-101/HammerThrow/v_HammerThrow_g99_c01.avi",
        ],
    )
    listing = list_ucf101(tmp_path, None)
    assert listing.dataset == "ucf101"
    assert listing.labels == OFFICIAL != sorted(OFFICIAL)
    assert listing.entries == [
        Entry("UCF-101/Hammering/v_Hammering_g08_c01.avi", 0, "train"),
        Entry("UCF-101/HandstandPushups/v_HandStandPushups_g08_c01.avi", 2, "train"),
        Entry("UCF-101/HammerThrow/v_HammerThrow_g01_c01.avi", 1, "test"),
        Entry("UCF-101/HandstandPushups/v_HandstandPushups_g01_c01.avi", 2, "test"),
    ]
    assert listing.annotated == {"train": 3, "test": 2}
    assert [(item.path, item.code, item.split) for item in listing.left_out] == [
        ("JumpRope/v_JumpRope_g08_c01.avi", "missing", "train")
    ]
    assert listing.extra == ["UCF-101/HammerThrow/v_HammerThrow_g99_c01.avi"]
    assert listing.notes == []
    assert listing.options == {
        "fold": 1,
        "annotations": ["classInd.txt", "trainlist01.txt", "testlist01.txt"],
    }


def test_flat_and_converted_files(tmp_path):
    make(tmp_path, ["v_handstandpushups_g08_c01.mp4", "v_JumpRope_g08_c01.avi"])
    assert [entry.path for entry in list_ucf101(tmp_path, None).entries] == [
        "v_handstandpushups_g08_c01.mp4",
        "v_JumpRope_g08_c01.avi",
    ]


def test_the_file_in_the_class_folder_is_preferred(tmp_path):
    name = "v_JumpRope_g08_c01.avi"
    make(tmp_path, [f"A/{name}", f"JUMPrope/{name}"])
    listing = list_ucf101(tmp_path, None)
    assert [entry.path for entry in listing.entries] == [f"JUMPrope/{name}"]
    assert [item.path for item in listing.left_out if item.code == "duplicate"] == [f"A/{name}"]


@pytest.mark.parametrize("fold", [2, 3])
def test_folds(tmp_path, fold):
    make(tmp_path, ["v_Hammering_g08_c01.avi"])
    make(
        tmp_path,
        train=["Hammering/v_Hammering_g01_c01.avi 1"],
        test=["Hammering/v_Hammering_g08_c01.avi"],
        fold=fold,
    )
    listing = list_ucf101(tmp_path, None, fold=fold)
    assert listing.dataset == f"ucf101-{fold}"
    assert listing.entries == [Entry("v_Hammering_g08_c01.avi", 0, "test")]
    assert listing.options["fold"] == fold
    with pytest.raises(UsageError, match="no fold 4"):
        list_ucf101(tmp_path, None, fold=4)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("JumpRope/v_JumpRope_g01_c01.avi 4", "label 4 contradicts the folder JumpRope"),
        ("Flying/v_Flying_g01_c01.avi 1", "'Flying' is no class"),
        ("v_JumpRope_g01_c01.avi 5", "'v_JumpRope_g01_c01.avi' is no class"),
        ("JumpRope/v_JumpRope_g01_c01.avi", "train line without a label"),
    ],
)
def test_broken_lines_are_named(tmp_path, train, message):
    make(tmp_path, train=[TRAIN[0], train])
    with pytest.raises(DataError, match=message) as caught:
        list_ucf101(tmp_path, None)
    assert caught.value.where.endswith("trainlist01.txt line 2")


def test_class_numbers_must_be_complete(tmp_path):
    make(tmp_path)
    classes = tmp_path / "ucfTrainTestlist" / "classInd.txt"
    classes.write_text("1 A\n3 B\n")
    with pytest.raises(DataError, match="from 1 to 2"):
        list_ucf101(tmp_path, None)
    classes.write_text("1 A\nB\n")
    with pytest.raises(DataError, match="not `number name`") as caught:
        list_ucf101(tmp_path, None)
    assert caught.value.where.endswith("line 2")


def test_missing_lists_are_named(tmp_path):
    make(tmp_path, ["v_Hammering_g08_c01.avi"], folder="lists")
    with pytest.raises(DataError, match=r"no trainlist02\.txt") as caught:
        list_ucf101(tmp_path, None, fold=2)
    assert "UCF101TrainTestSplits-RecognitionTask.zip" in caught.value.fix
    other = tmp_path / "elsewhere"
    other.mkdir()
    with pytest.raises(DataError, match=r"no classInd\.txt"):
        list_ucf101(tmp_path, other)
    with pytest.raises(DataError, match="0 of 5 annotated"):
        list_ucf101(other, tmp_path / "lists")
