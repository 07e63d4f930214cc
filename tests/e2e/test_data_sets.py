"""Miniatures of the data sets, with their file names, annotation dialects, containers, codecs, rates and
known defects, prepared by the command of the README; against truth written by hand.
"""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import moving_frames


@pytest.fixture
def clips(encode) -> dict[str, Path]:
    """One short video per container, codec and rate that the data sets use."""
    frames = moving_frames(12, 48, 64)
    return {
        "mp4": encode("c25.mp4", frames, fps=25),
        "mp4-30": encode("c30.mp4", frames, fps=30),
        "mkv": encode("c.mkv", frames, fps=30),
        "webm": encode("c.webm", frames, "libvpx-vp9", fps=12),
        "avi": encode("c.avi", frames, "mpeg4", fps=25, gop=4),
    }


def put(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, target)


def table(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def rows(folder: Path, split: str) -> list[tuple[str, int]]:
    return [(row["path"], int(row["label"])) for row in table(folder / f"{split}.csv")]


def left_out(folder: Path) -> set[tuple[str, str, str]]:
    return {(r["path"], r["split"], r["reason"]) for r in table(folder / "quarantine.csv")}


def prepared(ogreg, *arguments):
    # Workers start with an import of torch; tests of the engine have some.
    done = ogreg("prepare", *arguments, "--workers", "0", "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") <= 3
    return json.loads(done.stdout)


def test_kinetics400(ogreg, clips, tmp_path):
    root = tmp_path / "k400"
    put(clips["mp4"], root / "train/---QUuC4vJs_000084_000094.mp4")
    put(clips["mp4-30"], root / "train/_dbcJuKJQNs_000040_000050.mp4")
    (root / "train/AAAAAAAAAA1_000001_000011.mp4").write_bytes(clips["mp4"].read_bytes()[:300])
    put(
        clips["mp4"],
        root / "replacement/replacement_for_corrupted_k400/AAAAAAAAAA1_000001_000011.mp4",
    )
    (root / "train/AAAAAAAAAA2_000001_000011.mp4").touch()
    put(clips["mkv"], root / "val/-3B32lodo2M_000059_000069.mkv")
    put(clips["webm"], root / "val/AAAAAAAAAA3.webm")
    put(clips["mp4"], root / "test/AAAAAAAAAA4_000000_000010.mp4")
    put(clips["mp4"], root / "val/XXXXXXXXXXX_000000_000010.mp4")
    notes = root / "annotations"
    notes.mkdir()
    (notes / "train.csv").write_text(
        "label,youtube_id,time_start,time_end,split,is_cc\n"
        "testifying,---QUuC4vJs,84,94,train,0\n"
        '"air drumming",_dbcJuKJQNs,40,50,train,0\n'
        "abseiling,AAAAAAAAAA1,1,11,train,1\n"
        "abseiling,AAAAAAAAAA2,1,11,train,0\n"
        "abseiling,AAAAAAAAAA5,1,11,train,0\n"
    )
    (notes / "validate.csv").write_text(
        "label,youtube_id,time_start,time_end,split\n"
        "abseiling,-3B32lodo2M,59.0,69.0,validate\n"
        "air drumming,AAAAAAAAAA3,5,15,validate\n"
    )
    (notes / "test.csv").write_text("youtube_id,time_start,time_end,split\nAAAAAAAAAA4,0,10,test\n")
    report = prepared(ogreg, "kinetics400", root)
    assert (root / "labels.txt").read_text() == "abseiling\nair drumming\ntestifying\n"
    assert rows(root, "train") == [
        ("train/---QUuC4vJs_000084_000094.mp4", 2),
        ("train/_dbcJuKJQNs_000040_000050.mp4", 1),
        ("replacement/replacement_for_corrupted_k400/AAAAAAAAAA1_000001_000011.mp4", 0),
    ]
    assert rows(root, "val") == [
        ("val/-3B32lodo2M_000059_000069.mkv", 0),
        ("val/AAAAAAAAAA3.webm", 1),
    ]
    assert rows(root, "test") == [("test/AAAAAAAAAA4_000000_000010.mp4", -1)]
    assert ("train/AAAAAAAAAA2_000001_000011.mp4", "train", "empty") in left_out(root)
    assert ("AAAAAAAAAA5_000001_000011", "train", "missing") in left_out(root)
    assert (root / "extra.txt").read_text() == "val/XXXXXXXXXXX_000000_000010.mp4\n"
    assert report["coverage"] == {
        "train": {"annotated": 5, "found": 4, "videos": 3},
        "val": {"annotated": 2, "found": 2, "videos": 2},
        "test": {"annotated": 1, "found": 1, "videos": 1},
    }
    assert report["extra"] == 1
    first = table(root / "train.csv")[0]
    assert {key: first[key] for key in ("frames", "fps", "width", "height", "codec")} == {
        "frames": "12",
        "fps": "25.0",
        "width": "64",
        "height": "48",
        "codec": "h264",
    }
    assert any("3 classes" in note for note in report["notes"])


def test_kinetics600_in_class_folders(ogreg, clips, tmp_path):
    root = tmp_path / "k600"
    put(clips["mp4"], root / "videos/train/pull_ups/AAAAAAAAAA1_000001_000011.mp4")
    put(clips["mp4"], root / "videos/val/abseiling/0wR5jVB-WPk_000417_000427.mp4")
    for split, line in (
        ("train", "pull ups,AAAAAAAAAA1,1,11,train"),
        ("val", "abseiling,0wR5jVB-WPk,417,427,val"),
    ):
        (root / f"kinetics-600_{split}.csv").write_text(
            f"label,youtube_id,time_start,time_end,split\n{line}\n"
        )
    prepared(ogreg, "kinetics600", root)
    assert rows(root, "train") == [("videos/train/pull_ups/AAAAAAAAAA1_000001_000011.mp4", 1)]
    assert rows(root, "val") == [("videos/val/abseiling/0wR5jVB-WPk_000417_000427.mp4", 0)]


def ssv2(root: Path, clips: dict[str, Path]) -> None:
    for number in (78687, 42326, 1420, 5, 6):
        put(clips["webm"], root / f"20bn-something-something-v2/{number}.webm")
    labels = root / "labels"
    labels.mkdir()
    names = [
        "Holding something next to something",
        "Pushing something from left to right",
        "Pushing something from right to left",
        "Throwing something",
    ]
    documents = {
        "labels": {name: str(i) for i, name in enumerate(names)},
        "train": [
            {
                "id": "78687",
                "label": "holding potato next to vicks vaporub bottle",
                "template": "Holding [something] next to [something]",
                "placeholders": ["potato", "vicks vaporub bottle"],
            },
            {"id": "42326", "label": "x", "template": "Pushing [something] from left to right"},
            {"id": "5", "label": "x", "template": "Throwing [something]"},
        ],
        "validation": [
            {"id": "6", "label": "x", "template": "Pushing [something] from right to left"}
        ],
        "test": [{"id": "1420"}],
    }
    for name, document in documents.items():
        (labels / f"{name}.json").write_text(json.dumps(document))
    (labels / "test-answers.csv").write_text("1420;Throwing something\n")


def test_ssv2_and_a_recipe_that_finds_it(ogreg, clips, tmp_path):
    root = tmp_path / "ssv2"
    ssv2(root, clips)
    prepared(ogreg, "ssv2", root)
    folder = "20bn-something-something-v2"
    assert rows(root, "train") == [
        (f"{folder}/78687.webm", 0),
        (f"{folder}/42326.webm", 1),
        (f"{folder}/5.webm", 3),
    ]
    assert rows(root, "val") == [(f"{folder}/6.webm", 2)]
    assert rows(root, "test") == [(f"{folder}/1420.webm", 3)]
    mirror = json.loads((root / "dataset.json").read_text())["mirror"]
    assert mirror == {
        "Pushing something from left to right": "Pushing something from right to left",
        "Pushing something from right to left": "Pushing something from left to right",
    }
    small = ["data.frames=4", "data.size=32", "data.short_side=32", "augment.short_side=[32,40]"]
    small += ["model.name=ogreg-n", "model.options={}", "init.weights=", "train.epochs=1"]
    done = ogreg("train", "recipes/ssv2.toml", *small, "train.batch_size=2", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["val_videos"] == 1


def test_ssv2_parts_that_were_never_joined(ogreg, tmp_path):
    root = tmp_path / "ssv2"
    root.mkdir()
    for part in ("00", "01"):
        (root / f"20bn-something-something-v2-{part}").write_bytes(b"\x1f\x8b")
    (root / "labels.json").write_text('{"Throwing something": "0"}')
    (root / "train.json").write_text('[{"id": "1", "template": "Throwing [something]"}]')
    (root / "validation.json").write_text('[{"id": "2", "template": "Throwing [something]"}]')
    done = ogreg("prepare", "ssv2", root)
    assert done.returncode == 3
    assert "joined" in done.stderr
    assert "cat " in done.stderr
    assert "tar " in done.stderr
    assert not (root / "dataset.json").exists()


def diving48(root: Path, clips: dict[str, Path], version: str) -> None:
    for name in ("-mmq0PT-u8k_00155", "abcdefghijk_00001", "abcdefghijk_00002", "unused_00001"):
        put(clips["mp4"], root / f"rgb/{name}.mp4")
    vocabulary = [["Back", "15som", "05Twis", "FREE"], ["Forward", "Dive", "NoTwis", "STR"]]
    vocabulary.append(["Inward", "15som", "NoTwis", "TUCK"])
    (root / "Diving48_vocab.json").write_text(json.dumps(vocabulary))
    span = {"start_frame": 0, "end_frame": 12}
    train = [
        {"vid_name": "-mmq0PT-u8k_00155", "label": 2, **span},
        {"vid_name": "abcdefghijk_00001", "label": 0, **span},
    ]
    test = [{"vid_name": "abcdefghijk_00002", "label": 0, **span}]
    (root / f"Diving48{version}_train.json").write_text(json.dumps(train))
    (root / f"Diving48{version}_test.json").write_text(json.dumps(test))


def test_diving48(ogreg, clips, tmp_path):
    root = tmp_path / "diving48"
    diving48(root, clips, "_V2")
    report = prepared(ogreg, "diving48", root)
    assert (root / "labels.txt").read_text().splitlines() == [
        "Back+15som+05Twis+FREE",
        "Forward+Dive+NoTwis+STR",
        "Inward+15som+NoTwis+TUCK",
    ]
    assert rows(root, "train") == [
        ("rgb/-mmq0PT-u8k_00155.mp4", 2),
        ("rgb/abcdefghijk_00001.mp4", 0),
    ]
    assert rows(root, "test") == [("rgb/abcdefghijk_00002.mp4", 0)]
    assert not (root / "val.csv").exists()
    assert report["extra"] == 1
    assert any("Forward+Dive+NoTwis+STR" in note for note in report["notes"])


def test_diving48_v1_labels_are_refused(ogreg, clips, tmp_path):
    root = tmp_path / "diving48"
    diving48(root, clips, "")
    done = ogreg("prepare", "diving48", root)
    assert done.returncode == 3
    assert "V2" in done.stderr
    assert not (root / "train.csv").exists()


def test_ucf101(ogreg, clips, tmp_path):
    root = tmp_path / "ucf"
    lists = root / "ucfTrainTestlist"
    lists.mkdir(parents=True)
    (lists / "classInd.txt").write_bytes(b"1 Hammering\r\n2 HammerThrow\r\n3 HandstandPushups\r\n")
    names = {
        "Hammering": "v_Hammering_g01_c01.avi",
        "HammerThrow": "v_HammerThrow_g08_c01.avi",
        "HandstandPushups": "v_HandStandPushups_g09_c01.avi",
    }
    for folder, name in names.items():
        put(clips["avi"], root / f"UCF-101/{folder}/{name}")
    (lists / "trainlist01.txt").write_bytes(
        b"HammerThrow/v_HammerThrow_g08_c01.avi 2\r\n"
        b"HandstandPushups/v_HandStandPushups_g09_c01.avi 3\r\n"
    )
    (lists / "testlist01.txt").write_bytes(b"Hammering/v_Hammering_g01_c01.avi\r\n")
    prepared(ogreg, "ucf101", root)
    assert (root / "labels.txt").read_text() == "Hammering\nHammerThrow\nHandstandPushups\n"
    assert rows(root, "train") == [
        ("UCF-101/HammerThrow/v_HammerThrow_g08_c01.avi", 1),
        ("UCF-101/HandstandPushups/v_HandStandPushups_g09_c01.avi", 2),
    ]
    assert rows(root, "test") == [("UCF-101/Hammering/v_Hammering_g01_c01.avi", 0)]
    assert table(root / "train.csv")[0]["decoder"] == "pyav"


def test_hmdb51(ogreg, clips, tmp_path):
    root = tmp_path / "hmdb"
    splits = root / "testTrainMulti_7030_splits"
    splits.mkdir(parents=True)
    odd = "Fancy_(x)_[1]_#1&2;-_@~!+_cartwheel_f_cm_np1.avi"
    put(clips["avi"], root / f"cartwheel/{odd}")
    put(clips["avi"], root / "cartwheel/unused.avi")
    put(clips["avi"], root / "wave/-w.avi")
    (splits / "cartwheel_test_split1.txt").write_text(f"{odd} 1 \nunused.avi 0 \n")
    (splits / "wave_test_split1.txt").write_text("-w.avi 2 \n")
    prepared(ogreg, "hmdb51", root)
    assert rows(root, "train") == [(f"cartwheel/{odd}", 0)]
    assert rows(root, "test") == [("wave/-w.avi", 1)]
    assert not (root / "extra.txt").exists()


def test_lists(ogreg, clips, tmp_path):
    root, lists = tmp_path / "videos", tmp_path / "lists"
    put(clips["mp4"], root / "a/one two.mp4")
    put(clips["mp4"], root / "b/-three, [4].mp4")
    lists.mkdir()
    (lists / "train.txt").write_bytes("\ufeffa/one two.mp4 0\r\nb/-three, [4].mp4 1\r\n".encode())
    (lists / "val.txt").write_text("b/-three, [4].mp4 1\n")
    prepared(ogreg, "list", root, "--annotations", lists, "--name", "mine", "--out", lists / "out")
    assert rows(lists / "out", "train") == [("a/one two.mp4", 0), ("b/-three, [4].mp4", 1)]
    (lists / "val.txt").write_text("../../etc/passwd.mp4 1\n")
    done = ogreg("prepare", "list", root, "--annotations", lists, "--out", lists / "out")
    assert done.returncode == 3
    assert "outside" in done.stderr or "leads out" in done.stderr
    assert "--allow-outside" in done.stderr


def test_shards_on_the_command_line(ogreg, clips, tmp_path):
    root = tmp_path / "ssv2"
    ssv2(root, clips)
    done = ogreg("prepare", "ssv2", root, "--shard", "1/2")
    assert done.returncode == 0
    assert "--merge" in done.stderr
    done = ogreg("prepare", "ssv2", root, "--merge")
    assert done.returncode == 3
    assert "--shard 2/2" in done.stderr
    assert ogreg("prepare", "ssv2", root, RANK="1", WORLD_SIZE="2").returncode == 0
    done = ogreg("prepare", "ssv2", root, "--merge", RANK="0", WORLD_SIZE="2")
    assert done.returncode == 0, done.stderr
    assert len(rows(root, "train")) == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["kinetics401", "."], "did you mean"),
        (["ssv2", ".", "--fps", "25"], "--resize"),
        (["ssv2", ".", "--resize", "255"], "odd"),
        (["ssv2", ".", "--shard", "3/2"], "--shard 1/4"),
        (["ssv2", ".", "--shard", "1/2", "--merge"], "exclude"),
        (["ssv2", ".", "--fold", "2"], "--fold cannot be used with ssv2"),
        (["demo", ".", "--resize", "256"], "--resize cannot be used with demo"),
        (["folder", ".", "--train-clips", "3"], "--train-clips cannot be used"),
    ],
)
def test_wrong_usage_is_refused_before_anything_starts(ogreg, arguments, words):
    done = ogreg("prepare", *arguments)
    assert done.returncode == 2
    assert words in done.stderr
