from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ogreg_core.data.manifest import Row, load_manifest, read_dataset_info, write_dataset
from ogreg_core.errors import DataError


def row(path="a.mp4", label=0):
    return Row(path, label, 10, 25.0, 0.4, 64, 48, "decord")


def write(folder: Path, rows=None, **changes):
    arguments = {
        "dataset": "toy",
        "video_root": folder,
        "labels": ["cat", "dog"],
        "splits": {"train": rows or [row(), row("b.mp4", 1)]},
        "mirror": {"cat": "dog", "dog": "cat"},
        "version": "1",
    }
    return write_dataset(folder, **{**arguments, **changes})


names = st.text(st.characters(blacklist_categories=("Cs", "Cc")), min_size=1).filter(
    lambda name: not name.startswith(("/", "..", "./..")) and "/.." not in name
)


@given(path=names, fps=st.floats(1, 240), frames=st.integers(1, 10**6))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rows_survive_a_round_trip(path, fps, frames, tmp_path):
    rows = [Row(path, 1, frames, fps, frames / fps, 64, 48, "pyav")]
    write(tmp_path, rows)
    assert load_manifest(tmp_path, "train").rows == tuple(rows)


def test_root_inside_is_relative_so_that_the_folder_can_move(tmp_path):
    info = write(tmp_path / "a")
    assert info["root"] == "."
    (tmp_path / "a").rename(tmp_path / "b")
    manifest = load_manifest(tmp_path / "b", "train")
    assert manifest.video(manifest.rows[0]) == tmp_path / "b" / "a.mp4"
    assert manifest.mirror == {0: 1, 1: 0}
    assert write(tmp_path / "m", video_root=tmp_path / "b")["root"] == str(tmp_path / "b")


def test_hash_changes_with_content(tmp_path):
    write(tmp_path)
    first = load_manifest(tmp_path, "train").sha256
    write(tmp_path, [row(label=1)])
    assert load_manifest(tmp_path, "train").sha256 != first


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("a.mp4,x,10,25,0.4,64,48,decord,0,0,h264", "cannot be read"),
        ("a.mp4,2,10,25,0.4,64,48,decord,0,0,h264", "not one of 2 classes"),
        ("a.mp4,-2,10,25,0.4,64,48,decord,0,0,h264", "not one of 2 classes"),
        ("a.mp4,0,10,25,0.4,64,48,decord,maybe,0,h264", "cannot be read"),
        ("../a.mp4,0,10,25,0.4,64,48,decord,0,0,h264", "outside"),
        ("/etc/a.mp4,0,10,25,0.4,64,48,decord,0,0,h264", "outside"),
        ("b/../../a.mp4,0,10,25,0.4,64,48,decord,0,0,h264", "outside"),
        ("a.mp4,0,0,25,0.4,64,48,decord,0,0,h264", "without frames"),
        ("a.mp4,0", "cannot be read"),
    ],
)
def test_a_bad_line_is_named_by_its_number(line, words, tmp_path):
    write(tmp_path)
    with open(tmp_path / "train.csv", "a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=words) as caught:
        load_manifest(tmp_path, "train")
    assert caught.value.where.endswith("train.csv line 4")


def test_splits_of_an_earlier_preparation_are_removed(tmp_path):
    write(tmp_path, splits={"train": [row()], "val": [row()]})
    write(tmp_path, splits={"train": [row()]})
    assert not (tmp_path / "val.csv").exists()


def test_files_edited_by_hand(tmp_path):
    write(tmp_path)
    before = load_manifest(tmp_path, "train")
    content = (tmp_path / "train.csv").read_bytes()
    (tmp_path / "train.csv").write_bytes(b"\xef\xbb\xbf" + content)
    assert load_manifest(tmp_path, "train").rows == before.rows
    (tmp_path / "labels.txt").write_text("dog\ncat\n")
    assert load_manifest(tmp_path, "train").sha256 != before.sha256
    (tmp_path / "labels.txt").write_text("cat\nwolf\n")
    with pytest.raises(DataError, match="mirror table"):
        load_manifest(tmp_path, "train")
    (tmp_path / "labels.txt").unlink()
    with pytest.raises(DataError, match=r"labels\.txt cannot be read"):
        load_manifest(tmp_path, "train")
    write(tmp_path)
    (tmp_path / "train.csv").write_bytes(content.replace(b"a.mp4", b"\xe4.mp4"))
    with pytest.raises(DataError, match=r"train\.csv cannot be read"):
        load_manifest(tmp_path, "train")


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(DataError, match="no prepared data set") as caught:
        read_dataset_info(tmp_path)
    assert "ogreg prepare" in caught.value.fix
    write(tmp_path)
    with pytest.raises(DataError, match="no split 'val'") as caught:
        load_manifest(tmp_path, "val")
    assert "train" in caught.value.why
    (tmp_path / "train.csv").write_text("path,label\n")
    with pytest.raises(DataError, match="lacks the columns"):
        load_manifest(tmp_path, "train")
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(DataError, match="not valid JSON"):
        load_manifest(tmp_path, "train")
    (tmp_path / "dataset.json").write_text(json.dumps({"root": "."}))
    with pytest.raises(DataError, match="lacks dataset"):
        load_manifest(tmp_path, "train")
