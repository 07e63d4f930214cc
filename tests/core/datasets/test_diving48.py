from __future__ import annotations

import json

import pytest

from ogreg_core.datasets.diving48 import list_diving48
from ogreg_core.datasets.listing import Entry
from ogreg_core.errors import DataError, UsageError

VOCAB = [
    ["Back", "15som", "05Twis", "FREE"],
    ["Back", "15som", "15Twis", "FREE"],
    ["Forward", "Dive", "NoTwis", "STR"],
]
LABELS = ["Back+15som+05Twis+FREE", "Back+15som+15Twis+FREE", "Forward+Dive+NoTwis+STR"]
TRAIN = [("-mmq0PT-u8k_00155", 0), ("-mmq0PT-u8k_00156", 1), ("a_b_00001", 1)]
TEST = [("zzz_00003", 0)]


def rows(pairs):
    return [
        {"vid_name": name, "label": label, "start_frame": 0, "end_frame": 48}
        for name, label in pairs
    ]


def make(root, videos=(), train=TRAIN, test=TEST, vocab=VOCAB, version="_V2"):
    root.mkdir(parents=True, exist_ok=True)
    (root / f"Diving48{version}_train.json").write_text(json.dumps(rows(train)))
    (root / f"Diving48{version}_test.json").write_text(json.dumps(rows(test)))
    (root / "Diving48_vocab.json").write_text(json.dumps(vocab))
    for name in videos:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def test_listing(tmp_path):
    make(tmp_path, ["rgb/-mmq0PT-u8k_00155.mp4", "rgb/zzz_00003.mp4", "rgb/unused_00001.mp4"])
    listing = list_diving48(tmp_path, None)
    assert listing.dataset == "diving48"
    assert listing.labels == LABELS
    assert listing.entries == [
        Entry("rgb/-mmq0PT-u8k_00155.mp4", 0, "train"),
        Entry("rgb/zzz_00003.mp4", 0, "test"),
    ]
    assert listing.annotated == {"train": 3, "test": 1}
    assert [(item.path, item.code) for item in listing.left_out] == [
        ("-mmq0PT-u8k_00156", "missing"),
        ("a_b_00001", "missing"),
    ]
    assert listing.extra == ["rgb/unused_00001.mp4"]
    assert listing.notes == [
        "the annotations have 3 train and 1 test clips; the official V2 release has 15,027 and "
        "1,970",
        "classes without any clip: 2 Forward+Dive+NoTwis+STR",
    ]
    assert listing.options["annotations"] == [
        "Diving48_V2_train.json",
        "Diving48_V2_test.json",
        "Diving48_vocab.json",
    ]
    assert listing.mirror == {}


def test_official_counts_and_full_classes_need_no_note(tmp_path):
    train = [(f"v{i:05d}_00001", i % 3) for i in range(15_027)]
    test = [(f"w{i:05d}_00001", 0) for i in range(1_970)]
    make(tmp_path, ["v00000_00001.mp4"], train, test)
    assert list_diving48(tmp_path, None).notes == []


def test_the_first_labels_are_refused(tmp_path):
    make(tmp_path, ["rgb/zzz_00003.mp4"], version="")
    with pytest.raises(DataError, match=r"V1\), which are not used") as caught:
        list_diving48(tmp_path, None)
    assert "wrong" in caught.value.why
    assert "Diving48_V2_train.json, Diving48_V2_test.json" in caught.value.fix
    assert "http://www.svcl.ucsd.edu" in caught.value.fix
    # Beside V2 they do no harm.
    make(tmp_path)
    assert list_diving48(tmp_path, None).annotated == {"train": 3, "test": 1}


def test_a_missing_file_is_named(tmp_path):
    make(tmp_path)
    (tmp_path / "Diving48_V2_test.json").unlink()
    with pytest.raises(DataError, match=r"^Diving48_V2_test\.json not found"):
        list_diving48(tmp_path, None)
    # V1 beside one half of V2: still a file that is missing, not the wrong release.
    (tmp_path / "Diving48_test.json").write_text("[]")
    with pytest.raises(DataError, match=r"^Diving48_V2_test\.json not found"):
        list_diving48(tmp_path, None)


def sources(listing, split):
    return {entry.path.rpartition("_")[0] for entry in listing.entries if entry.split == split}


def test_whole_source_videos_are_held_out(tmp_path):
    # Ten source videos of ten clips each, whose names have underscores of their own.
    train = [(f"s_{source}_{clip:05d}", 0) for source in range(10) for clip in range(10)]
    make(tmp_path, [f"{name}.mp4" for name, _ in train], train)
    listing = list_diving48(tmp_path, None, val_share=0.25, seed=1)
    assert listing.annotated == {"train": 70, "val": 30, "test": 1}
    assert len(sources(listing, "val")) == 3
    assert not sources(listing, "val") & sources(listing, "train")
    assert [entry.split for entry in listing.entries] == ["train"] * 70 + ["val"] * 30
    assert "30 train clips of 3 source videos are held out as val" in listing.notes
    assert (listing.options["val_share"], listing.options["seed"]) == (0.25, 1)
    again = list_diving48(tmp_path, None, val_share=0.25, seed=1)
    assert again.entries == listing.entries
    seeds = {
        frozenset(sources(list_diving48(tmp_path, None, val_share=0.25, seed=seed), "val"))
        for seed in range(5)
    }
    assert len(seeds) > 1
    exact = list_diving48(tmp_path, None, val_share=0.3, seed=1)
    assert exact.annotated["val"] == 30
    # Something is always left to train on, and test is never touched.
    assert list_diving48(tmp_path, None, val_share=0.99).annotated == {
        "train": 10,
        "val": 90,
        "test": 1,
    }


def test_the_choice_does_not_depend_on_the_files_there(tmp_path):
    train = [(f"s{source}_{clip:05d}", 0) for source in range(10) for clip in range(10)]
    make(tmp_path / "all", [f"{name}.mp4" for name, _ in train], train)
    make(tmp_path / "some", [f"{name}.mp4" for name, _ in train[::2]], train)
    held = [
        sources(list_diving48(tmp_path / name, None, val_share=0.4), "val")
        for name in ("all", "some")
    ]
    assert held[0] == held[1] != set()


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_senseless_shares_are_refused(tmp_path, share):
    make(tmp_path)
    with pytest.raises(UsageError, match="not between 0 and 1"):
        list_diving48(tmp_path, None, val_share=share)


def test_broken_annotations_are_named(tmp_path):
    make(tmp_path, train=[("a_1", 3)])
    with pytest.raises(DataError, match="label 3 of a_1 is not one of 3 classes"):
        list_diving48(tmp_path, None)
    make(tmp_path, vocab=["Back+15som"])
    with pytest.raises(DataError, match="not a list of lists"):
        list_diving48(tmp_path, None)
    make(tmp_path)
    (tmp_path / "Diving48_V2_train.json").write_text('[{"vid_name": "a"}]')
    with pytest.raises(DataError, match="without vid_name and label"):
        list_diving48(tmp_path, None)
    (tmp_path / "Diving48_V2_train.json").write_text("<html>")
    with pytest.raises(DataError, match="not valid JSON"):
        list_diving48(tmp_path, None)
