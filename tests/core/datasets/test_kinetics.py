from __future__ import annotations

import pytest

from ogreg_core.datasets.kinetics import list_kinetics
from ogreg_core.datasets.listing import UNLABELLED, Entry
from ogreg_core.errors import DataError

TRAIN = """\
label,youtube_id,time_start,time_end,split
testifying,---QUuC4vJs,84,94,train
eating spaghetti,--3ouPhoy2A,20,30,train
skiing (not slalom or crosscountry),--TBx-Spzis,148,158,train
abseiling,a_b_c_d_e_f,7.0,17.0,train
"""
# The dialect of the crawler: is_cc, quotes, another word for the split.
VAL = """\
label,youtube_id,time_start,time_end,split,is_cc
abseiling,-3B32lodo2M,59,69,val,0
"eating spaghetti",_dbcJuKJQNs,40,50,validate,0
"""
LABELS = ["abseiling", "eating spaghetti", "skiing (not slalom or crosscountry)", "testifying"]


def make(root, names, **annotations):
    for name, text in annotations.items():
        (root / "annotations").mkdir(parents=True, exist_ok=True)
        (root / "annotations" / f"{name}.csv").write_text(text, encoding="utf-8")
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def listed(root, dataset="kinetics400", annotations=None):
    return list_kinetics(root, annotations, dataset=dataset)


def left_out(listing):
    return [(item.path, item.code, item.split) for item in listing.left_out]


def test_flat_split_folders_of_cvdf(tmp_path):
    make(
        tmp_path,
        [
            "train/---QUuC4vJs_000084_000094.mp4",
            "train/--3ouPhoy2A_000020_000030.mkv",
            "train/a_b_c_d_e_f_7_17.mp4",  # no zero padding
            "train/notInTheCsv_000001_000011.mp4",
            "train/---QUuC4vJs_000184_000194.mp4",  # other times of an annotated id
            "val/-3B32lodo2M.webm",  # no times
        ],
        train=TRAIN,
        val=VAL,
    )
    listing = listed(tmp_path)
    assert listing.dataset == "kinetics400"
    assert listing.labels == LABELS
    assert listing.entries == [
        Entry("train/---QUuC4vJs_000084_000094.mp4", 3, "train"),
        Entry("train/--3ouPhoy2A_000020_000030.mkv", 1, "train"),
        Entry("train/a_b_c_d_e_f_7_17.mp4", 0, "train"),
        Entry("val/-3B32lodo2M.webm", 0, "val"),
    ]
    assert listing.annotated == {"train": 4, "val": 2}
    assert left_out(listing) == [
        ("--TBx-Spzis_000148_000158", "missing", "train"),
        ("_dbcJuKJQNs_000040_000050", "missing", "val"),
    ]
    assert listing.extra == [
        "train/---QUuC4vJs_000184_000194.mp4",
        "train/notInTheCsv_000001_000011.mp4",
    ]
    assert listing.notes == ["the annotations name 4 classes; kinetics400 has 400"]
    assert listing.options == {"annotations": ["train.csv", "val.csv"]}


@pytest.mark.parametrize(
    ("dataset", "names"),
    [
        ("kinetics400", ["train", "validate"]),
        ("kinetics400", ["kinetics400_train", "kinetics-400_val"]),
        ("kinetics600", ["kinetics_600_train", "kinetics600_validation"]),
    ],
)
def test_names_of_the_annotation_files(tmp_path, dataset, names):
    make(tmp_path, ["x/-3B32lodo2M_59_69.mp4"], **dict(zip(names, (TRAIN, VAL), strict=True)))
    listing = listed(tmp_path, dataset)
    assert listing.annotated == {"train": 4, "val": 2}
    assert listing.options == {"annotations": [f"{name}.csv" for name in names]}


def test_annotations_of_the_other_kinetics_are_not_taken(tmp_path):
    make(tmp_path, ["x/-3B32lodo2M_59_69.mp4"], **{"kinetics-600_val": VAL})
    with pytest.raises(DataError, match="no annotations of kinetics400"):
        listed(tmp_path)
    assert listed(tmp_path, "kinetics600").annotated == {"val": 2}


def test_files_of_the_same_name_that_are_no_annotations(tmp_path):
    # `ogreg prepare` writes its manifest into the same folder.
    make(tmp_path, ["train/---QUuC4vJs_000084_000094.mp4"], train=TRAIN)
    (tmp_path / "train.csv").write_text("path,label,frames\n")
    assert listed(tmp_path).annotated == {"train": 4}
    with pytest.raises(DataError) as caught:
        listed(tmp_path, annotations=tmp_path / "train")
    assert "expected train.csv" in caught.value.why
    (tmp_path / "annotations" / "train.csv").unlink()
    with pytest.raises(DataError) as caught:
        listed(tmp_path)
    assert "no column youtube_id" in caught.value.why


def test_the_file_names_the_split_only_where_the_column_is_missing(tmp_path):
    make(
        tmp_path,
        ["a/aaaaaaaaaaa_0_10.mp4", "a/bbbbbbbbbbb_0_10.mp4", "a/ccccccccccc_0_10.mp4"],
        train="label,youtube_id,time_start,time_end\na,aaaaaaaaaaa,0,10\n",
        validation="label,youtube_id,time_start,time_end,split\n"
        "b,bbbbbbbbbbb,0,10,train\nb,ccccccccccc,0,10,validation\n",
    )
    assert [entry.split for entry in listed(tmp_path).entries] == ["train", "train", "val"]


def test_a_test_list_without_labels(tmp_path):
    make(
        tmp_path,
        ["test/ttttttttttt_000001_000011.mp4", "train/--3ouPhoy2A_000020_000030.mp4"],
        train=TRAIN,
        test="youtube_id,time_start,time_end,split\nttttttttttt,1,11,test\n",
    )
    listing = listed(tmp_path)
    assert listing.entries[-1] == Entry("test/ttttttttttt_000001_000011.mp4", UNLABELLED, "test")
    (tmp_path / "annotations" / "train.csv").unlink()
    with pytest.raises(DataError, match="name no classes"):
        listed(tmp_path)


def test_quotes_inside_labels_do_not_change_the_order(tmp_path):
    # As text the quote sorts before every letter: "zumba would come first.
    make(
        tmp_path,
        ["a/aaaaaaaaaaa_0_10.mp4"],
        train='label,youtube_id,time_start,time_end,split\n"""zumba dance""",aaaaaaaaaaa,0,10,train\n'
        "abseiling,bbbbbbbbbbb,0,10,train\n",
    )
    listing = listed(tmp_path)
    assert listing.labels == ["abseiling", "zumba dance"]
    assert listing.entries[0].label == 1


def test_spellings_of_one_class(tmp_path):
    make(
        tmp_path,
        ["a/bbbbbbbbbbb_0_10.mp4"],
        train="label,youtube_id,time_start,time_end,split\n"
        "using remote controller (not gaming),aaaaaaaaaaa,0,10,train\n",
        val="label,youtube_id,time_start,time_end,split\n"
        "Using_remote_controller_not_gaming,bbbbbbbbbbb,0,10,val\n"
        "b_c,ccccccccccc,0,10,val\nb c,ddddddddddd,0,10,val\n",
    )
    listing = listed(tmp_path)
    assert listing.labels == ["b c", "using remote controller (not gaming)"]
    assert listing.entries == [Entry("a/bbbbbbbbbbb_0_10.mp4", 1, "val")]


def test_replacements_and_links(tmp_path):
    clip = "--3ouPhoy2A_000020_000030.mp4"
    other = "---QUuC4vJs_000084_000094.mp4"
    replacement = "replacement/replacement_for_corrupted_k400"
    make(
        tmp_path,
        [
            f"train/{clip}",
            f"{replacement}/{clip}",
            f"train/{other}",
            f"{replacement}/--TBx-Spzis_000001_000011.mp4",  # by id, whatever its times
        ],
        train=TRAIN,
    )
    links = tmp_path / "videos" / "train" / "testifying"
    links.mkdir(parents=True)
    (links / other).symlink_to(tmp_path / "train" / other)
    (links / clip).symlink_to(tmp_path / replacement / clip)
    listing = listed(tmp_path)
    assert [entry.path for entry in listing.entries] == [
        f"train/{other}",
        f"{replacement}/{clip}",
        f"{replacement}/--TBx-Spzis_000001_000011.mp4",
    ]
    assert left_out(listing) == [
        ("a_b_c_d_e_f_000007_000017", "missing", "train"),
        (f"train/{clip}", "duplicate", "train"),
    ]
    assert f"{replacement}/{clip} is used" in listing.left_out[1].detail
    assert listing.extra == []


def test_a_tree_of_links_alone(tmp_path):
    store, root = tmp_path / "store", tmp_path / "root"
    make(store, ["--3ouPhoy2A_000020_000030.mp4"])
    make(root, [], train=TRAIN)
    links = root / "videos" / "train" / "eating spaghetti"
    links.mkdir(parents=True)
    (links / "--3ouPhoy2A_000020_000030.mp4").symlink_to(store / "--3ouPhoy2A_000020_000030.mp4")
    assert listed(root).entries == [
        Entry("videos/train/eating spaghetti/--3ouPhoy2A_000020_000030.mp4", 1, "train")
    ]


def test_the_folder_of_the_split_is_preferred(tmp_path):
    clip = "-3B32lodo2M_000059_000069"
    make(tmp_path, [f"a/{clip}.mp4", f"Validate/x/{clip}.mp4", f"train/{clip}.mkv"], val=VAL)
    listing = listed(tmp_path)
    assert [entry.path for entry in listing.entries] == [f"Validate/x/{clip}.mp4"]
    assert left_out(listing)[1:] == [
        (f"a/{clip}.mp4", "duplicate", "val"),
        (f"train/{clip}.mkv", "duplicate", "val"),
    ]


def test_a_dangling_link_is_worse_than_any_file(tmp_path):
    clip = "-3B32lodo2M_000059_000069.mp4"
    make(tmp_path, [f"other/{clip}"], val=VAL)
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / clip).symlink_to(tmp_path / "gone.mp4")
    assert [entry.path for entry in listed(tmp_path).entries] == [f"other/{clip}"]


def test_clips_annotated_twice(tmp_path):
    head = "label,youtube_id,time_start,time_end,split\n"
    make(
        tmp_path,
        ["train/aaaaaaaaaaa_0_10.mp4", "val/aaaaaaaaaaa_0_10.mp4", "train/bbbbbbbbbbb.mp4"],
        train=f"{head}a,aaaaaaaaaaa,0,10,train\na,aaaaaaaaaaa,0.0,10.0,train\n"
        "a,bbbbbbbbbbb,0,10,train\na,bbbbbbbbbbb,20,30,train\n",
        val=f"{head}a,aaaaaaaaaaa,0,10,val\n",
    )
    listing = listed(tmp_path)
    assert listing.entries == [
        Entry("train/aaaaaaaaaaa_0_10.mp4", 0, "train"),
        Entry("val/aaaaaaaaaaa_0_10.mp4", 0, "val"),
    ]
    assert listing.annotated == {"train": 4, "val": 1}
    assert left_out(listing) == [
        ("aaaaaaaaaaa_000000_000010", "duplicate", "train"),
        # Without times, its file could be either clip.
        ("bbbbbbbbbbb_000000_000010", "missing", "train"),
        ("bbbbbbbbbbb_000020_000030", "missing", "train"),
    ]
    assert listing.extra == ["train/bbbbbbbbbbb.mp4"]
    assert listing.notes[1] == (
        "1 clips are annotated in two splits, for example aaaaaaaaaaa_000000_000010"
    )


def test_one_file_for_a_clip_of_two_splits(tmp_path):
    head = "label,youtube_id,time_start,time_end,split\n"
    make(
        tmp_path,
        ["all/aaaaaaaaaaa_0_10.mp4"],
        train=f"{head}a,aaaaaaaaaaa,0,10,train\n",
        val=f"{head}a,aaaaaaaaaaa,0,10,val\n",
    )
    listing = listed(tmp_path)
    assert [(entry.path, entry.split) for entry in listing.entries] == [
        ("all/aaaaaaaaaaa_0_10.mp4", "train"),
        ("all/aaaaaaaaaaa_0_10.mp4", "val"),
    ]
    assert listing.left_out == []


def test_nothing_matched_and_nothing_there(tmp_path):
    make(tmp_path, ["abseiling/holiday.mp4"], train=TRAIN)
    with pytest.raises(DataError, match="0 of 4 annotated") as caught:
        listed(tmp_path)
    assert "abseiling/holiday.mp4" in caught.value.why
    assert "---QUuC4vJs_000084_000094" in caught.value.why
    with pytest.raises(DataError, match="no annotations") as caught:
        listed(tmp_path, annotations=tmp_path / "abseiling")
    assert "train.csv, validate.csv (or val.csv) and test.csv" in caught.value.why
    for words in (
        "kinetics400.tar.gz of DeepMind, or the CVDF repository's annotations",
        "`ogreg prepare folder ROOT`",
    ):
        assert words in caught.value.fix


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("a,aaaaaaaaaaa,x,10,train", "no numbers"),
        ("a,aaaaaaaaaaa,inf,10,train", "no numbers"),
        ("a,aaaaaaaaaaa,0,10,holdout", "'holdout' is no split"),
        (",aaaaaaaaaaa,0,10,train", "without a label"),
    ],
)
def test_broken_rows_are_named(tmp_path, row, message):
    make(
        tmp_path,
        [],
        train=f"label,youtube_id,time_start,time_end,split\na,bbbbbbbbbbb,0,10,train\n{row}\n",
    )
    with pytest.raises(DataError, match=message) as caught:
        listed(tmp_path)
    assert caught.value.where.endswith("train.csv line 3")


def test_missing_columns_are_named(tmp_path):
    make(tmp_path, [], train="label,youtube_id,split\na,aaaaaaaaaaa,train\n")
    with pytest.raises(DataError, match="lacks the columns time_start, time_end"):
        listed(tmp_path)
