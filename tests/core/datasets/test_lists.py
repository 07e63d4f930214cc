from __future__ import annotations

import csv
import io
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ogreg_core.datasets.listing import UNLABELLED, Entry
from ogreg_core.datasets.lists import list_lists
from ogreg_core.errors import DataError


def make(root, videos=(), **files):
    """Lists by name (``train_csv`` is train.csv), and empty video files."""
    root.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        stem, _, suffix = name.rpartition("_")
        (root / f"{stem}.{suffix}").write_bytes(text.encode("utf-8"))
    for name in videos:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def pairs(listing):
    return [(entry.path, entry.label) for entry in listing.entries]


def refused(root, **options):
    with pytest.raises(DataError) as caught:
        list_lists(root, None, **options)
    return caught.value


VIDEOS = ["a/1.mp4", "a/2, 3.mp4", "b/ü [4].mp4"]


@pytest.mark.parametrize("delimiter", ["\t", " "])
def test_tab_and_space(tmp_path, delimiter):
    text = "".join(f"{video}{delimiter}{i}\n" for i, video in enumerate(VIDEOS))
    make(tmp_path, [*VIDEOS, "c/5.mp4"], train_txt=text, val_v2_txt=f"./a//1.mp4{delimiter}2\n")
    listing = list_lists(tmp_path, None)
    assert listing.entries == [
        Entry("a/1.mp4", 0, "train"),
        Entry("a/2, 3.mp4", 1, "train"),
        Entry("b/ü [4].mp4", 2, "train"),
        Entry("a/1.mp4", 2, "val"),
    ]
    assert listing.dataset == tmp_path.name
    assert listing.labels == ["0", "1", "2"]
    assert listing.annotated == {"train": 3, "val": 1}
    assert listing.extra == ["c/5.mp4"]
    assert listing.notes == ["1 clips are annotated in two splits, for example a/1.mp4"]
    assert listing.options == {"annotations": ["train.txt", "val_v2.txt"]}


def test_comma_with_and_without_quotes(tmp_path):
    make(tmp_path, VIDEOS, train_csv='"a/2, 3.mp4",1\r\na/1.mp4, 0\r\nb/ü [4].mp4,1\r\n')
    assert pairs(list_lists(tmp_path, None)) == [
        ("a/2, 3.mp4", 1),
        ("a/1.mp4", 0),
        ("b/ü [4].mp4", 1),
    ]
    # Written by hand, without the quotes: the last field still is the label.
    make(tmp_path, train_csv="a/2, 3.mp4,1\na/1.mp4,0\n")
    assert pairs(list_lists(tmp_path, None)) == [("a/2, 3.mp4", 1), ("a/1.mp4", 0)]


def test_mark_comments_empty_lines_and_header(tmp_path):
    make(tmp_path, VIDEOS, train_csv="\ufeff# made by me\r\n\r\npath,label\r\na/1.mp4,0\r\n  \r\n")
    listing = list_lists(tmp_path, None)
    assert pairs(listing) == [("a/1.mp4", 0)]
    assert listing.notes == ["1 lines that start with '#' were taken for comments"]


@pytest.mark.parametrize(
    "names",
    [
        ("train.csv", "val.csv", "test.csv"),
        ("kinetics400_train_list_videos.txt", "kinetics400_val_list_videos.txt", "test_v2.txt"),
        ("Diving48-TRAIN.txt", "my validation.csv", "hmdb_test1.txt"),
    ],
)
def test_names_of_lists(tmp_path, names):
    make(tmp_path, VIDEOS)
    for video, name in zip(VIDEOS, names, strict=True):
        (tmp_path / name).write_text(f"{video}\t0\n")
    # Words that only contain one of the three, and files that are no lists.
    for name in ("training_notes.md", "latest.txt", "evaluation.csv", "README_train"):
        (tmp_path / name).write_text("nonsense")
    listing = list_lists(tmp_path, None)
    assert listing.annotated == {"train": 1, "val": 1, "test": 1}
    assert listing.options["annotations"] == list(names)


def test_two_lists_for_one_split(tmp_path):
    make(tmp_path, VIDEOS, train_csv="a/1.mp4,0\n", val_csv="a/1.mp4,0\n", my_val_txt="a/1.mp4 0\n")
    error = refused(tmp_path)
    assert "two lists for the val split" in error.what
    assert "val.csv" in error.where
    assert "my_val.txt" in error.where


def test_train_is_required(tmp_path):
    make(tmp_path, VIDEOS, val_csv="a/1.mp4,0\n")
    assert "no train list" in refused(tmp_path).what
    with pytest.raises(DataError, match="not a folder"):
        list_lists(tmp_path, tmp_path / "none")


def test_lists_in_a_folder_of_their_own_and_the_name(tmp_path):
    make(tmp_path / "videos", VIDEOS)
    make(tmp_path / "lists", train_csv="a/1.mp4,0\n", labels_txt="jump\nrun\n")
    listing = list_lists(tmp_path / "videos", tmp_path / "lists", name="mine")
    assert (listing.dataset, listing.root) == ("mine", tmp_path / "videos")
    assert listing.labels == ["jump", "run"]
    assert listing.options == {"annotations": ["train.csv"], "labels": "labels.txt"}


def test_what_prepare_wrote_is_no_list(tmp_path):
    make(
        tmp_path,
        VIDEOS,
        my_train_txt="a/1.mp4 0\n",
        classes_txt="jump\n",
        train_csv="path,label,frames,fps,duration,width,height,decoder\n",
        labels_txt="old\n",
        dataset_json="{}",
    )
    listing = list_lists(tmp_path, None)
    assert listing.options["annotations"] == ["my_train.txt"]
    assert listing.labels == ["jump"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("labels_txt", "jump\nride, fast\n"),
        ("classes_txt", "\ufeffjump\r\nride, fast\r\n\r\n"),
        ("label_map_k400_txt", "jump\nride, fast\n"),
        ("my_2_labels_csv", 'id,name\n1,"ride, fast"\n0,jump\n'),
        # By hand, without quotes.
        ("my_2_labels_csv", "id,name\n0,jump\n1,ride, fast\n"),
    ],
)
def test_class_names(tmp_path, name, text):
    make(tmp_path, VIDEOS, train_csv="a/1.mp4,0\nb/ü [4].mp4,1\n", **{name: text})
    assert list_lists(tmp_path, None).labels == ["jump", "ride, fast"]


def test_files_of_class_names_that_do_not_fit(tmp_path):
    make(tmp_path, VIDEOS, train_csv="a/1.mp4,0\n", labels_txt="a\nb\n", classes_txt="a\nc\n")
    assert "two files of class names" in refused(tmp_path).what
    (tmp_path / "classes.txt").write_text("a\nb\n")
    assert list_lists(tmp_path, None).labels == ["a", "b"]
    (tmp_path / "classes.txt").unlink()
    (tmp_path / "labels.txt").write_text("a\n\nb\n")
    assert refused(tmp_path).where.endswith("labels.txt line 2")
    (tmp_path / "labels.txt").write_text("a\nb\na\n")
    assert list_lists(tmp_path, None).notes == ["labels.txt has several classes called 'a'"]
    (tmp_path / "labels.txt").unlink()
    (tmp_path / "x_labels.csv").write_text("id,name\n1,a\n2,b\n")
    assert "from 0 to 1" in refused(tmp_path).what


def test_labels_that_are_names(tmp_path):
    make(
        tmp_path,
        VIDEOS,
        train_csv="path,label\na/1.mp4,ride a bike\nb/ü [4].mp4,jump\n",
        val_csv='"a/2, 3.mp4",Ride_a_Bike\n',
    )
    listing = list_lists(tmp_path, None)
    assert listing.labels == ["jump", "ride a bike"]
    assert pairs(listing) == [("a/1.mp4", 1), ("b/ü [4].mp4", 0), ("a/2, 3.mp4", 1)]
    assert listing.notes == ["class names taken to be the same: 'Ride_a_Bike' = 'ride a bike'"]
    make(tmp_path, labels_txt="Walk\nRide a bike\n")
    error = refused(tmp_path)
    assert "'jump' is not in" in error.what
    assert error.where.endswith("train.csv line 3")
    make(tmp_path, labels_txt="Walk\nRide a bike\njump\n")
    assert [label for _, label in pairs(list_lists(tmp_path, None))] == [1, 2, 1]


def test_names_with_spaces_need_another_delimiter(tmp_path):
    make(tmp_path, VIDEOS, train_txt="a/1.mp4 jump\na/2, 3.mp4 ride a bike\n")
    error = refused(tmp_path)
    assert error.where.endswith("train.txt line 2")
    assert "a tab or a comma" in error.fix
    make(tmp_path, train_txt="a/1.mp4\tjump\na/2, 3.mp4\tride a bike\n")
    assert pairs(list_lists(tmp_path, None)) == [("a/1.mp4", 0), ("a/2, 3.mp4", 1)]


def test_names_of_one_word_after_a_space(tmp_path):
    # Every path has a comma: the delimiter is the one after the extension.
    make(tmp_path, VIDEOS, train_txt="a/2, 3.mp4 jump\n")
    listing = list_lists(tmp_path, None)
    assert (listing.labels, pairs(listing)) == (["jump"], [("a/2, 3.mp4", 0)])


def test_names_in_another_script_stay_apart(tmp_path):
    make(tmp_path, VIDEOS, train_csv="a/1.mp4,跑步\nb/ü [4].mp4,走路\n")
    assert len(list_lists(tmp_path, None).labels) == 2


def test_numbers_in_one_list_and_names_in_the_other(tmp_path):
    make(tmp_path, VIDEOS, train_csv="a/1.mp4,0\n", val_csv="a/1.mp4,jump\n")
    assert "some lists have numbers" in refused(tmp_path).what


@pytest.mark.parametrize(
    "line", ["a/1.mp4", "b/ü [4].mp4", "a/1.mp4 1", "a/1.mp4,", "a/1.mp4,jump", ",1"]
)
@pytest.mark.parametrize("first", [True, False])
def test_lines_that_differ_are_named(tmp_path, line, first):
    lines = [line, "a/1.mp4,0", "a/2.mp4,1"] if first else ["a/1.mp4,0", line, "a/2.mp4,1"]
    make(tmp_path, VIDEOS, train_csv="".join(f"{text}\n" for text in lines))
    error = refused(tmp_path)
    assert error.where.endswith(f"train.csv line {1 if first else 2}")
    assert repr(line) in error.what


def test_lists_without_labels_are_refused(tmp_path):
    make(tmp_path, VIDEOS, train_csv="a/1.mp4,0\n", test_txt="a/1.mp4\nb/ü [4].mp4\n")
    error = refused(tmp_path)
    assert error.where.endswith("test.txt line 1")
    assert error.why == "it has no label"
    make(tmp_path, test_txt="# nothing\n")
    assert "lists no videos" in refused(tmp_path).what


@pytest.mark.parametrize("delimiter", [" ", "\t", ","])
@pytest.mark.parametrize("fields", [["30", "0"], ["7", "30", "0"], ["0"]])
def test_frame_lists_are_refused(tmp_path, delimiter, fields):
    make(tmp_path, ["a/1.mp4", "frames of/clip/img_00001.mp4"])
    line = delimiter.join(["frames of/clip", *fields])
    make(tmp_path, train_txt=f"{delimiter.join(['a/1.mp4', '0'])}\n{line}\n")
    error = refused(tmp_path)
    assert "folder of frames" in error.what
    assert error.where.endswith("train.txt line 2")
    assert "frame folders are not supported" in error.why


def test_frame_lists_whose_frames_are_elsewhere_are_refused(tmp_path):
    make(tmp_path, VIDEOS, train_txt="clip_a 30 0\nclip_b 41 1\n")
    error = refused(tmp_path)
    assert "clip_a is no video" in error.what
    assert error.where.endswith("line 1")


def test_a_path_that_ends_with_a_number_and_has_a_file(tmp_path):
    make(tmp_path, ["my clip 12.mp4"], train_txt="my clip 12 0\n")
    assert pairs(list_lists(tmp_path, None)) == [("my clip 12.mp4", 0)]


def test_labels_that_count_from_one(tmp_path):
    make(tmp_path, VIDEOS, train_csv="a/1.mp4,1\n", val_csv="b/ü [4].mp4,2\n")
    error = refused(tmp_path)
    assert "count from 1 (1 to 2)" in error.what
    assert "subtract 1 from every label" in error.fix
    assert "labels.txt" in error.fix
    make(tmp_path, labels_txt="a\nb\n")
    assert "count from 1" in refused(tmp_path).what
    # Class 0 has no video, which the names tell.
    make(tmp_path, labels_txt="a\nb\nc\n")
    assert pairs(list_lists(tmp_path, None)) == [("a/1.mp4", 1), ("b/ü [4].mp4", 2)]
    (tmp_path / "labels.txt").unlink()
    # A 0 in any split tells the same.
    make(tmp_path, val_csv="b/ü [4].mp4,0\n")
    assert list_lists(tmp_path, None).labels == ["0", "1"]


def test_labels_beyond_the_names(tmp_path):
    make(tmp_path, VIDEOS, train_csv="a/1.mp4,0\nb/ü [4].mp4,2\n", labels_txt="a\nb\n")
    error = refused(tmp_path)
    assert "label 2 is not one of 2 classes" in error.what
    assert error.where.endswith("train.csv line 2")
    make(tmp_path, train_csv="a/1.mp4,0\nb/ü [4].mp4,-1\n")
    assert "label -1" in refused(tmp_path).what


def test_withheld_test_labels(tmp_path):
    make(tmp_path, VIDEOS, train_csv="a/1.mp4,0\n", test_csv="b/ü [4].mp4,-1\n")
    assert list_lists(tmp_path, None).entries[1] == Entry("b/ü [4].mp4", UNLABELLED, "test")


def test_paths_outside(tmp_path):
    root, other = tmp_path / "root", tmp_path / "other"
    make(other, ["x.mp4", "y.webm"])
    make(root, VIDEOS)
    (tmp_path / "link").symlink_to(root)
    # Inside, although it does not look like it.
    make(
        root,
        train_csv=f"{root}/a/1.mp4,0\na/../b/ü [4].mp4,1\n"
        f'"{tmp_path}/link/a/2, 3.mp4",1\n../root/a/1.mp4,1\n',
    )
    listing = list_lists(root, None)
    assert pairs(listing) == [("a/1.mp4", 0), ("b/ü [4].mp4", 1), ("a/2, 3.mp4", 1)]
    assert [(item.path, item.code) for item in listing.left_out] == [("a/1.mp4", "duplicate")]
    for path in ("../other/x.mp4", f"{other}/x.mp4", "a/../../other/x.mp4"):
        make(root, train_csv=f"a/1.mp4,0\n{path},1\n")
        error = refused(root)
        assert error.what == f"{path} is outside {root}"
        assert error.where.endswith("train.csv line 2")
        listing = list_lists(root, None, allow_outside=True)
        assert pairs(listing) == [("a/1.mp4", 0), (f"{other}/x.mp4", 1)]
        assert listing.options["allow_outside"] is True
    make(root, train_csv="a/1.mp4,0\n../other/y.mp4,1\n../none/z.mp4,0\n")
    listing = list_lists(root, None, allow_outside=True)
    assert pairs(listing)[1] == (f"{other}/y.webm", 1)
    assert [item.path for item in listing.left_out] == [f"{tmp_path}/none/z.mp4"]


def test_a_neighbour_with_a_longer_name_is_outside(tmp_path):
    make(tmp_path / "set", VIDEOS, train_csv=f"{tmp_path}/set2/x.mp4,0\n")
    assert "is outside" in refused(tmp_path / "set").what


def test_other_extensions_missing_files_and_repetitions(tmp_path):
    make(
        tmp_path,
        ["a/1.webm", "a/1.mkv", "b/2.mp4", "c/3.avi"],
        train_csv="a/1.mp4,0\nb/1.mp4,0\nb/2.mp4,0\nb/2.mp4,1\nb/2.avi,1\nc/3,1\n",
    )
    listing = list_lists(tmp_path, None)
    assert pairs(listing) == [("a/1.mkv", 0), ("b/2.mp4", 0), ("c/3.avi", 1)]
    assert [(item.path, item.code, item.split) for item in listing.left_out] == [
        ("b/1.mp4", "missing", "train"),
        ("b/2.mp4", "duplicate", "train"),
        ("b/2.avi", "duplicate", "train"),
        ("a/1.webm", "duplicate", "train"),
    ]
    assert listing.annotated == {"train": 6}
    assert listing.notes == ["2 files have another extension than in the lists"]


def test_a_file_that_another_row_uses_is_no_duplicate(tmp_path):
    make(tmp_path, ["a.mkv", "a.webm"], train_csv="a.mp4,0\na.webm,1\n")
    listing = list_lists(tmp_path, None)
    assert pairs(listing) == [("a.mkv", 0), ("a.webm", 1)]
    assert listing.left_out == []


def test_blanks_that_are_part_of_a_name(tmp_path):
    # Only spaces and tabs around a line are nobody's: a no-break space may start a file name.
    make(tmp_path, ["\u00a0x.mp4"], train_txt=" \u00a0x.mp4\t0 \n")
    assert pairs(list_lists(tmp_path, None)) == [("\u00a0x.mp4", 0)]


def test_linked_folders(tmp_path):
    # The walk enters the folder once, under its first name; the list uses the other.
    make(tmp_path, ["a_real/1.mp4", "a_real/2.mp4"], train_csv="link/1.mp4,0\n")
    (tmp_path / "link").symlink_to(tmp_path / "a_real")
    listing = list_lists(tmp_path, None)
    assert pairs(listing) == [("link/1.mp4", 0)]
    assert listing.extra == ["a_real/2.mp4"]


def test_nothing_matched(tmp_path):
    make(tmp_path, VIDEOS, train_csv="train/a/1.mp4,0\n")
    error = refused(tmp_path)
    assert "0 of 1 annotated" in error.what
    assert "first annotation: train/a/1.mp4" in error.why


NAMES = st.text(st.sampled_from("aZ0 ,;[](){}'\"#!&%@~+=-_.éü走🎬\u00a0\u2028\x0b"), max_size=12)
# Neither comment nor hidden file; blanks at both ends are stripped from any list.
PATHS = st.builds(lambda middle, dot: f"x{middle}{dot}", NAMES, st.sampled_from([".mp4", ".AVI"]))
QUOTED = st.builds(lambda middle: f'"{middle}".webm', NAMES)


@settings(max_examples=150)
@given(
    paths=st.lists(
        PATHS | QUOTED, min_size=1, max_size=8, unique_by=lambda p: p.rpartition(".")[0]
    ),
    delimiter=st.sampled_from("\t, "),
    labels=st.lists(st.integers(0, 9), min_size=8, max_size=8),
    end=st.sampled_from(["\n", "\r\n"]),
    mark=st.sampled_from(["", "\ufeff"]),
    header=st.booleans(),
)
def test_any_path_is_read_back(paths, delimiter, labels, end, mark, header):
    rows = list(zip(paths, [0, *labels], strict=False))
    buffer = io.StringIO()
    if delimiter == ",":
        csv.writer(buffer, lineterminator=end).writerows(rows)
    else:
        buffer.write("".join(f"{path}{delimiter}{label}{end}" for path, label in rows))
    first = f"path{delimiter}label{end}" if header else ""
    with tempfile.TemporaryDirectory() as folder:
        for path in paths:
            (Path(folder) / path).touch()
        (Path(folder) / "train.txt").write_bytes(f"{mark}{first}{buffer.getvalue()}".encode())
        assert pairs(list_lists(Path(folder), None)) == rows
