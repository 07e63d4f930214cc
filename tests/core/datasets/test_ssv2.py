from __future__ import annotations

import json
import subprocess
import tarfile

import pytest

from ogreg_core.datasets.listing import UNLABELLED, Entry
from ogreg_core.datasets.ssv2 import list_ssv2
from ogreg_core.errors import DataError

NAMES = [
    "Holding something next to something",
    "Pulling something from left to right",
    "Pulling something from right to left",
    "Pushing something from left to right",
    "Putting number of something, something and something onto something",
    "Turning the camera left while filming something",
    "Turning the camera right while filming something",
]
LABELS = {name: str(i) for i, name in enumerate(NAMES)}
TRAIN = [
    {
        "id": "78687",
        "label": "holding potato next to vicks vaporub bottle",
        "template": "Holding [something] next to [something]",
        "placeholders": ["potato", "vicks vaporub bottle"],
    },
    {"id": "2", "template": "Turning the camera left while filming [something]"},
]
VALIDATION = [
    {
        "id": "3",
        "template": "Putting [number of] [something], [something] and [something] onto [something]",
    }
]
TEST = [{"id": "1420"}, {"id": "1421"}]


def make(root, videos=(), folder="labels", prefix="", answers=None, **changes):
    content = {"labels": LABELS, "train": TRAIN, "validation": VALIDATION, "test": TEST} | changes
    (root / folder).mkdir(parents=True, exist_ok=True)
    for name, value in content.items():
        if value is not None:
            (root / folder / f"{prefix}{name}.json").write_text(json.dumps(value))
    if answers is not None:
        (root / folder / f"{prefix}test-answers.csv").write_text(answers)
    for name in videos:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


@pytest.mark.parametrize(("folder", "prefix"), [("labels", ""), (".", "something-something-v2-")])
def test_both_packagings(tmp_path, folder, prefix):
    videos = "20bn-something-something-v2"
    make(
        tmp_path,
        [f"{videos}/78687.webm", f"{videos}/3.webm", f"{videos}/1420.webm", f"{videos}/99.webm"],
        folder,
        prefix,
        answers="1420;Putting number of something, something and something onto something\n",
    )
    listing = list_ssv2(tmp_path, None)
    assert listing.dataset == "ssv2"
    assert listing.labels == NAMES
    assert listing.entries == [
        Entry(f"{videos}/78687.webm", 0, "train"),
        Entry(f"{videos}/3.webm", 4, "val"),
        Entry(f"{videos}/1420.webm", 4, "test"),
    ]
    assert listing.annotated == {"train": 2, "val": 1, "test": 2}
    assert [(item.path, item.code, item.split) for item in listing.left_out] == [
        ("2", "missing", "train"),
        ("1421", "missing", "test"),
    ]
    assert listing.extra == [f"{videos}/99.webm"]
    assert listing.notes == ["1 test videos have no answer in " + f"{prefix}test-answers.csv"]
    assert listing.options == {
        "annotations": [
            f"{prefix}{name}"
            for name in (
                "labels.json", "train.json", "validation.json", "test.json", "test-answers.csv"
            )
        ]
    }  # fmt: skip


def test_labels_follow_the_indices_not_the_order_of_the_file(tmp_path):
    shuffled = dict(reversed(LABELS.items()))
    make(tmp_path, ["78687.webm"], labels=shuffled)
    listing = list_ssv2(tmp_path, None)
    assert listing.labels == NAMES
    assert listing.entries[0].label == 0


def test_mirror_holds_both_directions_of_the_classes_there_are(tmp_path):
    make(tmp_path, ["78687.webm"])
    left = "Turning the camera left while filming something"
    right = "Turning the camera right while filming something"
    assert list_ssv2(tmp_path, None).mirror == {
        "Pulling something from left to right": "Pulling something from right to left",
        "Pulling something from right to left": "Pulling something from left to right",
        left: right,
        right: left,
    }


def test_test_videos_without_answers(tmp_path):
    make(tmp_path, ["flat/78687.webm", "flat/1420.mp4"])
    listing = list_ssv2(tmp_path, None)
    assert listing.entries[1] == Entry("flat/1420.mp4", UNLABELLED, "test")
    assert listing.notes == []


def test_the_original_is_preferred_to_a_conversion(tmp_path):
    make(tmp_path, ["a/78687.mp4", "b/78687.webm"])
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "78687.webm").symlink_to(tmp_path / "b" / "78687.webm")
    listing = list_ssv2(tmp_path, None)
    assert [entry.path for entry in listing.entries] == ["b/78687.webm"]
    assert [item.path for item in listing.left_out if item.code == "duplicate"] == ["a/78687.mp4"]


def test_a_video_annotated_twice(tmp_path):
    make(tmp_path, ["78687.webm"], train=[*TRAIN, TRAIN[0]], validation=[TRAIN[0]])
    listing = list_ssv2(tmp_path, None)
    assert [(entry.path, entry.split) for entry in listing.entries] == [
        ("78687.webm", "train"),
        ("78687.webm", "val"),
    ]
    assert ("78687", "duplicate") in [(item.path, item.code) for item in listing.left_out]
    assert listing.notes == ["1 clips are annotated in two splits, for example 78687"]


def test_other_files_called_train_json(tmp_path):
    make(tmp_path, ["78687.webm"])
    (tmp_path / "train.json").write_text("{}")
    assert list_ssv2(tmp_path, None).annotated["train"] == 2


def test_parts_that_were_never_joined(tmp_path):
    root = tmp_path / "it's here"
    make(root)
    # A real archive, cut in two: the line in the error has to work as printed.
    video = tmp_path / "20bn-something-something-v2" / "78687.webm"
    video.parent.mkdir()
    video.touch()
    with tarfile.open(tmp_path / "whole", "w:gz") as archive:
        archive.add(video, "20bn-something-something-v2/78687.webm")
    whole = (tmp_path / "whole").read_bytes()
    (root / "20bn-something-something-v2-00").write_bytes(whole[:70])
    (root / "20bn-something-something-v2-01").write_bytes(whole[70:])
    with pytest.raises(DataError, match=r"2 parts .* were never joined") as caught:
        list_ssv2(root, None)
    subprocess.run(caught.value.fix, shell=True, check=True)
    # The parts still lie there; with videos nobody minds.
    assert [entry.path for entry in list_ssv2(root, None).entries] == [
        "20bn-something-something-v2/78687.webm"
    ]


def test_annotations_that_do_not_fit_are_refused(tmp_path):
    make(tmp_path, ["78687.webm"], train=[{"id": "5", "template": "Eating [something]"}])
    with pytest.raises(DataError, match=r"'Eating \[something\]' of video 5 is not in") as caught:
        list_ssv2(tmp_path, None)
    assert caught.value.where.endswith("train.json item 0")
    make(tmp_path, train=[{"id": "5"}])
    with pytest.raises(DataError, match="without id or template"):
        list_ssv2(tmp_path, None)
    make(tmp_path, train={"id": "5"})
    with pytest.raises(DataError, match=r"train\.json is not the file"):
        list_ssv2(tmp_path, None)
    make(tmp_path, answers="1420;Holding something next to something\n1421;Flying\n")
    with pytest.raises(DataError, match="'Flying' of video 1421") as caught:
        list_ssv2(tmp_path, None)
    assert caught.value.where.endswith("test-answers.csv line 2")
    for numbers in (["1", "2"], ["0", "0"], ["0", "2"]):
        make(tmp_path, labels=dict(zip(NAMES[:2], numbers, strict=True)))
        with pytest.raises(DataError, match="from 0 to 1"):
            list_ssv2(tmp_path, None)
    make(tmp_path, labels={NAMES[0]: "zero"})
    with pytest.raises(DataError, match="no number"):
        list_ssv2(tmp_path, None)
    (tmp_path / "labels" / "labels.json").write_text("{")
    with pytest.raises(DataError, match="not valid JSON"):
        list_ssv2(tmp_path, None)


def test_missing_annotations_say_where_to_get_them(tmp_path):
    with pytest.raises(DataError, match=r"no labels\.json") as caught:
        list_ssv2(tmp_path, None)
    assert "download-package-labels.zip" in caught.value.fix
    make(tmp_path, train=None, validation=None, test=None)
    with pytest.raises(DataError, match=r"no train\.json"):
        list_ssv2(tmp_path, None)
    make(tmp_path, ["x.webm"])
    with pytest.raises(DataError, match="0 of 5 annotated"):
        list_ssv2(tmp_path, None)
