"""The engine behind ``ogreg prepare``: checks, journal, copies, shards; against files and by killing it."""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ogreg_core.data.manifest import load_manifest, read_dataset_info
from ogreg_core.datasets import prepare as engine
from ogreg_core.datasets.catalogue import list_dataset, parse_shard, shard_of_environment
from ogreg_core.datasets.folder import list_folder
from ogreg_core.datasets.journal import Journal
from ogreg_core.datasets.listing import Entry, Listing
from ogreg_core.datasets.locations import find_dataset
from ogreg_core.datasets.prepare import REASONS, PrepareOptions, prepare_listing
from ogreg_core.errors import DataError, EnvironmentFault, UsageError, VideoError
from ogreg_core.progress import ignore_progress
from ogreg_core.video import probe, write_video
from ogreg_core.video.transcode import TranscodeSettings
from tests import ranks
from tests.conftest import decode_all, moving_frames
from tests.core.video.test_reader import edit_list_file

SMALL = TranscodeSettings(short_side=32)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes, two splits, six readable videos of 48 x 64 pixels."""
    folder = tmp_path / "set"
    names = ("train/a/1", "train/a/2", "train/b/3", "val/a/4", "val/b/5", "val/b/6")
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_video(folder / f"{name}.mp4", moving_frames(12, 48, 64, seed=number), 10)
    return folder


def prepare(folder: Path, **options):
    return prepare_listing(list_folder(folder), PrepareOptions(**options), ignore_progress)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def quarantine(folder: Path) -> dict[str, str]:
    with open(folder / "quarantine.csv", newline="") as file:
        return {row["path"]: row["reason"] for row in csv.DictReader(file)}


def test_a_second_run_opens_no_file(root, tmp_path):
    out = tmp_path / "out"
    first = prepare(root, out=out)
    before = tree(out)
    # Same size, same time, other content: looking into one would show.
    for path in root.rglob("*.mp4"):
        status = path.stat()
        path.write_bytes(bytes(status.st_size))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    second = prepare(root, out=out)
    assert (first.checked, second.checked) == (6, 0)
    assert tree(out) == before
    changed = root / "val/b/6.mp4"
    os.utime(changed, (1, 1))
    third = prepare(root, out=out)
    assert third.checked == 1
    assert quarantine(out) == {"val/b/6.mp4": "not-a-video"}


def test_every_reason_is_told_apart(root, encode):
    frames = moving_frames(40, 64, 96)
    bad = root / "train/a"
    (bad / "zero.mp4").touch()
    (bad / "text.mp4").write_text("hello")
    os.symlink("nowhere.mp4", bad / "dangling.mp4")
    whole = encode("whole.mkv", frames)
    (bad / "cut.mkv").write_bytes(whole.read_bytes()[: whole.stat().st_size * 6 // 10])
    fast = root.parent / "fast.mp4"
    write_video(fast, frames, 25)
    (bad / "cut.mp4").write_bytes(fast.read_bytes()[: fast.stat().st_size * 7 // 10])
    listing = list_folder(root)
    report = prepare_listing(listing, PrepareOptions(workers=2), ignore_progress)
    found = quarantine(root)
    assert found["train/a/zero.mp4"] == "empty"
    assert found["train/a/text.mp4"] == "not-a-video"
    assert found["train/a/dangling.mp4"] == "missing"
    assert found["train/a/cut.mkv"] == "truncated"
    assert found["train/a/cut.mp4"] in ("truncated", "damaged")
    assert len(found) == 5
    assert set(found.values()) <= set(REASONS)
    assert report.coverage["train"] == {"annotated": 8, "found": 8, "videos": 3}
    assert read_dataset_info(root)["coverage"]["train"]["videos"] == 3
    assert load_manifest(root, "train").annotated == 8


def fragile(job):
    """Stands in for a decoder: crashes on one file, hangs on another."""
    if job.path.endswith("1.mp4"):
        os.kill(os.getpid(), signal.SIGSEGV)
    if job.path.endswith("2.mp4"):
        time.sleep(60)
    return engine_check(job)


engine_check = engine.check_file


def test_a_crash_and_a_hang_cost_one_file_each(root, monkeypatch):
    monkeypatch.setattr(engine, "check_file", fragile)
    report = prepare(root, workers=2, deadline=4.0)
    assert quarantine(root) == {"train/a/1.mp4": "crash", "train/a/2.mp4": "time-out"}
    assert report.videos == {"train": 1, "val": 3}
    monkeypatch.setattr(engine, "check_file", engine_check)
    assert prepare(root, workers=0, deadline=4.0).checked == 0
    patient = prepare(root, workers=0, deadline=5.0)
    assert patient.checked == 1
    assert quarantine(root) == {"train/a/1.mp4": "crash"}


def test_full_verification_finds_what_a_glance_misses(root, encode):
    frames = np.concatenate([moving_frames(30, 96, 128, seed) for seed in range(4)])
    path = encode("clip.mp4", frames, gop=30)
    content = bytearray(path.read_bytes())
    # The picture data begin after some 48 bytes of 'mdat' and its header; hit the second quarter.
    start = content.index(b"mdat") + (len(content) - content.index(b"mdat")) // 3
    content[start : start + 400] = bytes(400)
    (root / "train/a/hole.mp4").write_bytes(content)
    assert quarantine_after(root, "quick") == {}
    assert set(quarantine_after(root, "full").values()) <= {
        "damaged",
        "frame-count",
        "seek-unstable",
    }
    assert set(quarantine_after(root, "full")) == {"train/a/hole.mp4"}


def quarantine_after(root: Path, verify: str) -> dict[str, str]:
    prepare(root, verify=verify)
    return quarantine(root)


def test_what_is_known_about_each_video(root, encode):
    shutil.copy(encode("v.webm", moving_frames(20, 60, 80), "libvpx-vp9", fps=12), root / "train/a")
    uneven = [0, 40, 80, 120, 500, 900, 1300]
    path = encode("uneven.mkv", moving_frames(7, 64, 96), pts_ms=uneven)
    shutil.copy(path, root / "train/b")
    shutil.copy(edit_list_file(root.parent), root / "train/b/cut.mp4")
    prepare(root)
    rows = {row.path: row for row in load_manifest(root, "train").rows}
    webm = rows["train/a/v.webm"]
    assert (webm.frames, webm.codec, webm.width, webm.height) == (20, "vp9", 80, 60)
    assert webm.fps == pytest.approx(12, abs=0.05)
    assert not webm.variable_rate
    assert rows["train/b/uneven.mkv"].variable_rate
    assert rows["train/b/cut.mp4"].decoder == "pyav"


def test_unstable_files_go_to_the_decoder_that_is_right_or_to_quarantine(encode, monkeypatch):
    """A decoder whose frames depend on what it read before, as decord's do on some AVI files."""
    from ogreg_core.video.reader import VideoReader

    exact = VideoReader.frames_at
    liars = {"decord"}

    def moody(self, indices, size=None):
        frames = exact(self, indices, size)
        if self.decoder in liars and len(indices) > 1 and indices[0] > indices[-1]:
            return frames.roll(1, 0)
        return frames

    monkeypatch.setattr(VideoReader, "frames_at", moody)
    clip = encode("clip.webm", moving_frames(12, 48, 64), "libvpx-vp9")
    info = probe(clip)
    assert info.decoder == "pyav"
    assert "another order" in info.reason
    liars.add("pyav")
    with pytest.raises(VideoError) as caught:
        probe(clip)
    assert caught.value.code == "seek-unstable"


def test_copies(root, tmp_path):
    (root / "val/b/5.mp4").rename(root / "val/b/it's [5] -x.avi")
    originals = tree(root)
    out = tmp_path / "fast"
    report = prepare(root, out=out, resize=SMALL, workers=2)
    assert tree(root) == originals
    assert report.originals_bytes == sum(map(len, originals.values()))
    assert report.copies_bytes == sum(p.stat().st_size for p in out.rglob("*.mp4"))
    assert report.read_speedup is not None
    manifest = load_manifest(out, "val")
    assert [row.path for row in manifest.rows] == [
        "resized-32px/val/a/4.mp4",
        "resized-32px/val/b/6.mp4",
        "resized-32px/val/b/it's [5] -x.avi.mp4",
    ]
    for row in manifest.rows:
        assert (row.height, row.width, row.frames, row.decoder) == (32, 42, 12, "pyav")
        assert decode_all(manifest.video(row)).shape == (12, 32, 42, 3)
    kept = {path: path.stat().st_mtime_ns for path in out.rglob("*.mp4")}
    again = prepare(root, out=out, resize=SMALL)
    assert again.checked == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.mp4")} == kept
    next(out.rglob("4.mp4")).unlink()
    assert prepare(root, out=out, resize=SMALL).checked == 1


def test_copies_beside_the_originals_are_not_taken_for_a_class(root):
    prepare(root, resize=SMALL)
    report = prepare(root)
    assert report.classes == ["a", "b"]
    assert report.videos == {"train": 3, "val": 3}


def test_official_annotations_are_never_overwritten(root, tmp_path):
    (root / "train.csv").write_text("label,youtube_id\n")
    report = prepare(root)
    assert report.folder == root / "ogreg-set"
    assert (root / "train.csv").read_text() == "label,youtube_id\n"
    assert (
        load_manifest(report.folder, "train")
        .video(load_manifest(report.folder, "train").rows[0])
        .is_file()
    )
    other = tmp_path / "other"
    other.mkdir()
    (other / "labels.txt").write_text("mine")
    with pytest.raises(DataError, match="would be overwritten"):
        prepare(root, out=other)
    assert tree(other) == {"labels.txt": b"mine"}


def test_annotations_that_come_later_are_not_overwritten_either(root):
    assert prepare(root).folder == root
    (root / "train.csv").write_text("label,youtube_id\n")
    assert prepare(root).folder == root / "ogreg-set"
    assert (root / "train.csv").read_text() == "label,youtube_id\n"


@pytest.mark.parametrize("name", ["extra.txt", "quarantine.csv", "overview.png", "dataset.json"])
def test_no_file_of_the_user_is_lost(name, root):
    content = '{"dataset": "other", "root": "."}' if name == "dataset.json" else "mine"
    (root / name).write_text(content)
    assert prepare(root).folder == root / "ogreg-set"
    assert (root / name).read_text() == content


def test_two_data_sets_do_not_share_a_folder(root, tmp_path):
    prepare(root, out=tmp_path / "out")
    other = replace(list_folder(root), dataset="other")
    with pytest.raises(DataError, match="would be overwritten"):
        prepare_listing(other, PrepareOptions(out=tmp_path / "out"), ignore_progress)
    prepare(root)
    report = prepare_listing(other, PrepareOptions(), ignore_progress)
    assert report.folder == root / "ogreg-other"
    assert find_dataset("set", "") == root


def test_a_remembered_folder_with_another_data_set_is_refused(root):
    prepare(root)
    info = json.loads((root / "dataset.json").read_text())
    (root / "dataset.json").write_text(json.dumps({**info, "dataset": "else"}))
    with pytest.raises(DataError, match="no longer holds set"):
        find_dataset("set", "")


def test_a_name_that_moves_is_told(root, tmp_path):
    assert prepare(root).notes == []
    assert any(str(root) in note for note in prepare(root, out=tmp_path / "out").notes)


def test_two_processes_do_not_work_in_one_folder(root):
    claim = Journal(root, "quick")
    with claim, pytest.raises(EnvironmentFault, match="another"):
        prepare(root)
    assert prepare(root).checked == 6


def test_a_journal_torn_within_a_character_is_read(root):
    (root / "val/b/6.mp4").rename(root / "val/b/é.mp4")
    prepare(root)
    journal = root / ".ogreg/v1-quick.jsonl"
    content = journal.read_bytes()
    journal.write_bytes(content[: content.rindex("é".encode()) + 1])
    assert prepare(root).checked == 1
    assert journal.read_bytes() == content


def test_copies_that_would_share_a_name_are_told_apart(root, encode):
    shutil.copy(encode("x.avi", moving_frames(5, 48, 64), "mpeg4"), root / "train/a/x.avi")
    shutil.copy(root / "train/a/1.mp4", root / "train/a/x.avi.mp4")
    report = prepare(root, resize=SMALL)
    assert report.videos["train"] == 4
    assert quarantine(root) == {"train/a/x.avi.mp4": "duplicate"}
    assert prepare(root, resize=SMALL).checked == 0


def test_what_full_verification_found_holds_for_a_quick_one(root, monkeypatch):
    monkeypatch.setattr(engine, "check_file", pessimist)
    prepare(root, verify="full")
    monkeypatch.setattr(engine, "check_file", engine_check)
    assert prepare(root).checked == 0
    assert quarantine(root) == {"train/a/1.mp4": "frame-count"}
    assert prepare(root, resize=SMALL).checked == 5
    assert quarantine(root) == {"train/a/1.mp4": "frame-count"}


def pessimist(job):
    """Finds fault with one file."""
    if job.path.endswith("1.mp4"):
        return VideoError("x", code="frame-count", why="11 of 12 frames decode")
    return engine_check(job)


def test_rights_are_no_verdict_on_a_video(root, monkeypatch):
    monkeypatch.setattr(engine, "check_file", forbidden)
    prepare(root)
    assert quarantine(root) == {"train/a/1.mp4": "unreadable"}
    monkeypatch.setattr(engine, "check_file", engine_check)
    assert prepare(root).checked == 1
    assert quarantine(root) == {}


def forbidden(job):
    """Has no right to read one file."""
    if job.path.endswith("1.mp4"):
        return VideoError("x", code="unreadable", why="Permission denied")
    return engine_check(job)


def test_if_nothing_can_be_read_the_reasons_are_written_all_the_same(root):
    prepare(root)
    for path in root.rglob("*.mp4"):
        path.write_bytes(b"no video")
    with pytest.raises(DataError, match="none of the videos") as caught:
        prepare(root)
    assert "quarantine.csv" in caught.value.fix
    assert len(quarantine(root)) == 6
    assert not (root / "dataset.json").exists()


def test_names_that_a_formula_or_a_font_would_trip_over(root, capfd):
    (root / "train/a").rename(root / "train/a $x^ 跑步")
    (root / "val/a").rename(root / "val/a $x^ 跑步")
    listing = replace(list_folder(root), dataset="f$\\3$")
    prepare_listing(listing, PrepareOptions(), ignore_progress)
    assert (root / "overview.png").stat().st_size > 1000
    assert "Glyph" not in capfd.readouterr().err


class TestShards:
    def test_merged_shards_equal_one_run(self, root, tmp_path):
        whole, parts = tmp_path / "whole", tmp_path / "parts"
        prepare(root, out=whole)
        for number in (3, 1, 2):
            report = prepare(root, out=parts, shard=(number, 3))
            assert report.checked == 2
            assert not (parts / "dataset.json").exists()
        merged = prepare(root, out=parts, merge=True)
        assert merged.checked == 0
        assert tree(parts) == tree(whole)
        prepare(root, out=parts, merge=True)
        assert tree(parts) == tree(whole)

    def test_incomplete_shards_are_refused_by_name(self, root):
        command = "ogreg prepare folder X"
        with pytest.raises(DataError, match="no shards"):
            prepare(root, merge=True)
        assert not (root / "dataset.json").exists()
        prepare(root, shard=(1, 3))
        with pytest.raises(DataError, match="2 of 3 shards") as caught:
            prepare(root, merge=True, command=command)
        assert caught.value.fix == f"{command} --shard 2/3\n{command} --shard 3/3"
        for number in (2, 3):
            prepare(root, shard=(number, 3))
        shutil.copy(root / "val/b/5.mp4", root / "val/b/7.mp4")
        with pytest.raises(DataError, match="3 of 3 shards") as caught:
            prepare(root, merge=True)
        assert "changed since" in caught.value.fix

    def test_a_killed_shard_is_not_complete(self, root):
        prepare(root, shard=(1, 2))
        prepare(root, shard=(2, 2))
        journal = root / ".ogreg/v1-quick.2-of-2.jsonl"
        lines = journal.read_text().splitlines(keepends=True)
        journal.write_text("".join(lines[:-2]) + lines[-2][:40])
        with pytest.raises(DataError, match="1 of 2"):
            prepare(root, merge=True)
        assert prepare(root, shard=(2, 2)).checked == 1
        assert prepare(root, merge=True).videos == {"train": 3, "val": 3}

    def test_changed_files_are_refused_in_a_merge(self, root):
        for number in (1, 2):
            prepare(root, shard=(number, 2))
        os.utime(root / "val/b/5.mp4", (1, 1))
        with pytest.raises(DataError, match="1 files have changed"):
            prepare(root, merge=True)

    def test_shares_from_words_and_environment(self):
        assert parse_shard("2/4") == (2, 4)
        for text in ("0/4", "5/4", "2", "a/b", "-1/2", "1/0"):
            with pytest.raises(UsageError):
                parse_shard(text)
        assert shard_of_environment({"RANK": "1", "WORLD_SIZE": "4"}) == (2, 4)
        steps = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8", "SLURM_NTASKS": "8"}
        assert shard_of_environment(steps) == (4, 8)
        assert shard_of_environment({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}) is None
        assert shard_of_environment({"RANK": "0", "WORLD_SIZE": "1"}) is None
        assert shard_of_environment({}) is None


def test_unlabelled_videos_are_kept_and_not_learnt_from(root):
    listing = list_folder(root)
    entries = [replace(e, label=-1) if e.split == "val" else e for e in listing.entries]
    withheld = replace(listing, entries=entries)
    prepare_listing(withheld, PrepareOptions(), ignore_progress)
    manifest = load_manifest(root, "val")
    assert [row.label for row in manifest.rows] == [-1] * 3
    with pytest.raises(DataError, match="without a label"):
        manifest.require_labels()


def test_options_that_a_data_set_lacks_are_refused(root):
    with pytest.raises(UsageError, match="--fold cannot be used with kinetics400"):
        list_dataset("kinetics400", root, fold=2)
    with pytest.raises(UsageError, match="--annotations cannot be used with folder"):
        list_dataset("folder", root, root)
    with pytest.raises(DataError, match="not a folder"):
        list_dataset("ssv2", root / "none")


def checked(folder: Path, home: str, out: Path, workers: int) -> int:
    """Files that a run in a process of its own opened."""
    os.environ["OGREG_HOME"] = home
    return prepare(folder, out=out, workers=workers, resize=SMALL).checked


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_at_twenty_random_moments_it_ends_with_the_same_bytes(root, tmp_path):
    """Five times with two workers, which need as long to start as the rest takes, else without."""
    for number in range(30):
        os.link(root / "train/a/1.mp4", root / f"train/a/more {number}.mp4")
    (root / "train/b/empty.mp4").touch()
    home = os.environ["OGREG_HOME"]
    usual = {}
    ranks.run(1, os.getpid)  # The first process waits for the server that forks it.
    for workers in (0, 2):
        began = time.monotonic()
        assert ranks.run(1, checked, root, home, tmp_path / f"whole{workers}", workers) == [37]
        usual[workers] = time.monotonic() - began
    whole = tree(tmp_path / "whole0")
    assert tree(tmp_path / "whole2") == whole
    rng = random.Random(3)
    out = tmp_path / "broken"
    kills = 0
    while kills < 20:
        workers = 2 if kills % 4 == 3 else 0
        (process,), _ = ranks.start(1, checked, root, home, out, workers)
        process.join(rng.uniform(0.05, 0.9) * usual[workers])
        if process.is_alive():
            process.kill()
            kills += 1
        else:
            # It got to its end, helped by what was left from before: from the start again.
            shutil.rmtree(out)
        process.join()
    ranks.run(1, checked, root, home, out, 2)
    assert tree(out) == whole
    assert ranks.run(1, checked, root, home, out, 2) == [0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["int", "term"])
def test_a_signal_to_the_whole_group_keeps_what_was_found(number, root, tmp_path):
    """As from Ctrl-C in a terminal, `timeout` and batch systems: no healthy video is blamed for it."""
    for extra in range(300):
        os.link(root / "train/a/1.mp4", root / f"train/a/more {extra}.mp4")
    command = [sys.executable, "-m", "ogreg_cli", "prepare", "folder", str(root), "--resize", "32"]
    command += ["--out", str(tmp_path / "out"), "--workers", "2"]
    process = subprocess.Popen(
        [*command, "--shard", "1/2"], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    journal = tmp_path / "out/.ogreg"
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size > 999 for path in journal.glob("*.jsonl")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    asked = time.monotonic()
    os.killpg(process.pid, number)
    stderr = process.communicate()[1]
    assert time.monotonic() - asked < 15
    assert process.returncode == (130 if number == signal.SIGINT else 143)
    assert "--shard 1/2   # goes on where it stopped" in stderr
    assert "Traceback" not in stderr
    done = subprocess.run([*command, "--json"], capture_output=True, text=True)
    report = json.loads(done.stdout)
    assert report["quarantined"] == []
    assert report["videos"] == {"train": 303, "val": 3}
    assert 0 < report["checked_files"] < 306
    assert not list((tmp_path / "out").rglob(".*.tmp"))


MEASURED = """
import resource, sys
from pathlib import Path
from ogreg_core.datasets.folder import list_folder
from ogreg_core.datasets.prepare import PrepareOptions, prepare_listing
from ogreg_core.progress import ignore_progress

if __name__ == "__main__":
    options = PrepareOptions(out=Path(sys.argv[2]), workers=2)
    prepare_listing(list_folder(Path(sys.argv[1])), options, ignore_progress)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_memory_hardly_grows_with_the_number_of_rows(root, tmp_path):
    script = tmp_path / "measured.py"
    script.write_text(MEASURED)

    def peak_kib(out: str) -> int:
        arguments = [sys.executable, str(script), str(root), str(tmp_path / out)]
        return int(subprocess.run(arguments, capture_output=True, text=True, check=True).stdout)

    few = peak_kib("few")
    for number in range(3000):
        os.link(root / "train/a/1.mp4", root / f"train/a/{number:05d}.mp4")
    many = peak_kib("many")
    assert len(load_manifest(tmp_path / "many", "train").rows) == 3003
    # The manifest itself: some 1.5 KiB a row, in the listing, the journal and the table.
    assert many - few < 3000 * 3


def test_names_of_all_kinds_arrive_unchanged(root):
    names = ["-rf", "a b", "q\"uote's", "[x]*?", "$(touch pwned)", "ü 日本 🎬", "a;b,c", "# no"]
    for name in names:
        shutil.copy(root / "val/a/4.mp4", root / f"train/a/{name}.mp4")
    prepare(root, workers=2)
    found = {Path(row.path).stem for row in load_manifest(root, "train").rows}
    assert found == {*names, "1", "2", "3"}
    assert not list(root.parent.rglob("pwned"))
    assert not Path("pwned").exists()


def test_paths_outside_are_read_only_if_allowed(root, tmp_path):
    outside = tmp_path / "elsewhere.mp4"
    shutil.copy(root / "train/a/1.mp4", outside)
    entries = [Entry(str(outside), 0, "train"), Entry("train/b/3.mp4", 1, "train")]
    listing = Listing("x", root, ["a", "b"], entries, {"train": 2})
    prepare_listing(listing, PrepareOptions(), ignore_progress)
    with pytest.raises(DataError, match="outside"):
        load_manifest(root, "train")
    allowed = replace(listing, options={"allow_outside": True})
    prepare_listing(allowed, PrepareOptions(), ignore_progress)
    manifest = load_manifest(root, "train")
    assert manifest.video(manifest.rows[0]) == outside
    copies = prepare_listing(allowed, PrepareOptions(resize=SMALL), ignore_progress)
    assert copies.videos == {"train": 2}
    row = load_manifest(root, "train").rows[0]
    assert row.path == f"resized-32px{outside}"


def test_journal_lines_are_json(root):
    prepare(root)
    lines = (root / ".ogreg/v1-quick.jsonl").read_text().splitlines()
    assert [json.loads(line)["path"] for line in lines] == [
        entry.path for entry in list_folder(root).entries
    ]
