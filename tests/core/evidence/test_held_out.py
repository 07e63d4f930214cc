"""Videos held out of a training split."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ogreg_core.data.manifest import Row, load_manifest, write_dataset
from ogreg_core.errors import DataError
from ogreg_core.evidence.held_out import hold_out, split_rows


def rows_of(counts):
    return tuple(
        Row(f"{label}/{n}.mp4", label, 10, 10.0, 1.0, 8, 8, "pyav")
        for label, count in enumerate(counts)
        for n in range(count)
    )


@given(st.lists(st.integers(0, 12), min_size=1, max_size=6), st.floats(0.05, 0.9))
def test_each_class_is_parted_by_itself(counts, share):
    rows = rows_of(counts)
    kept, held = split_rows(rows, share)
    assert sorted(kept + held, key=rows.index) == list(rows)
    left, out = (Counter(row.label for row in part) for part in (kept, held))
    for label, count in enumerate(counts):
        assert out[label] == min(max(1, round(share * count)), max(count - 1, 0))
        assert left[label] == count - out[label]


def test_the_order_of_the_manifest_changes_nothing():
    rows = rows_of([7, 5])
    held = {row.path for row in split_rows(rows, 0.3)[1]}
    assert {row.path for row in split_rows(rows[::-1], 0.3)[1]} == held


def test_the_manifest_leads_to_the_same_videos_and_leaves_the_test_split_alone(demo_root, tmp_path):
    folder = hold_out(demo_root, tmp_path, 0.34)
    train, val = (load_manifest(folder, split) for split in ("train", "val"))
    original = load_manifest(demo_root, "train")
    assert {row.path for row in (*train.rows, *val.rows)} == {row.path for row in original.rows}
    assert len(val.rows) == 16
    assert all(val.video(row).is_file() for row in val.rows)
    assert (val.labels, val.mirror) == (original.labels, original.mirror)
    assert val.dataset == "demo-tuning"
    # Who looks again changes nothing, and another share is another folder.
    before = (folder / "dataset.json").stat().st_mtime_ns
    assert hold_out(demo_root, tmp_path, 0.34) == folder
    assert (folder / "dataset.json").stat().st_mtime_ns == before
    assert hold_out(demo_root, tmp_path, 0.6) != folder


def test_videos_that_have_moved_are_found_again(tmp_path):
    for place in ("old", "new"):
        write_dataset(
            tmp_path / place / "list",
            dataset="list",
            video_root=tmp_path / place,
            labels=["a"],
            splits={"train": rows_of([3]), "val": rows_of([3])},
            version="0",
        )
    before = load_manifest(hold_out(tmp_path / "old" / "list", tmp_path, 0.34), "train")
    after = load_manifest(hold_out(tmp_path / "new" / "list", tmp_path, 0.34), "train")
    assert (before.root, after.root) == (tmp_path / "old", tmp_path / "new")
    assert after.sha256 == before.sha256


def test_videos_outside_the_folder_stay_allowed(tmp_path):
    rows = [replace(row, path=f"../{row.path}") for row in rows_of([3])]
    write_dataset(
        tmp_path / "list",
        dataset="list",
        video_root=tmp_path / "videos",
        labels=["a"],
        splits={"train": rows, "val": rows},
        options={"allow_outside": True},
        version="0",
    )
    folder = hold_out(tmp_path / "list", tmp_path / "tuning", 0.34)
    assert len(load_manifest(folder, "val").rows) == 1


def test_nothing_to_hold_out_is_an_error(demo_root, tmp_path, monkeypatch):
    monkeypatch.setattr("ogreg_core.evidence.held_out.split_rows", lambda rows, share: ([], []))
    with pytest.raises(DataError, match="no class with two"):
        hold_out(demo_root, tmp_path / "x", 0.2)
