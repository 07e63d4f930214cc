"""``ogreg predict`` through the real command line: lists of files, timelines, damage, interrupts."""

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
from pathlib import Path

import pytest
import torch
from PIL import Image

from ogreg_cli import predict_timeline
from ogreg_core.checkpoint import CheckpointInfo, save_checkpoint
from ogreg_core.data.sampling import ClipSampling
from ogreg_core.errors import VideoError
from ogreg_core.gaze import look
from ogreg_core.inference import Predictor
from ogreg_core.models.registry import create_model
from ogreg_core.timeline import TimelineOptions
from ogreg_core.video import write_video
from tests.conftest import moving_frames

LABELS = ["jump, high", "run", 'say "hi"']


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "c.safetensors"
    torch.manual_seed(3)
    model = create_model("ogreg-n", 3, strides=[2, 1, 1, 1])
    with torch.no_grad():
        model.get_parameter("head.weight").mul_(40)
    info = CheckpointInfo(
        model="ogreg-n",
        options={"strides": [2, 1, 1, 1]},
        labels=LABELS,
        sampling=ClipSampling("dense", 4, 2),
        size=32,
        short_side=36,
        mean=(0.4, 0.5, 0.6),
        std=(0.2, 0.3, 0.4),
    )
    save_checkpoint(path, model.state_dict(), info)
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write_video(path, moving_frames(60, 48, 64), 15)
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three clips, of which one, in the middle, is no video."""
    (tmp_path / "clips").mkdir()
    write_video(tmp_path / "clips" / "a.mp4", moving_frames(20, 48, 64), 10)
    (tmp_path / "clips" / "b, c.mp4").write_text("no video")
    write_video(tmp_path / "clips" / "d.mp4", moving_frames(30, 64, 48, seed=1), 10)
    return tmp_path / "clips"


class TestFiles:
    def test_csv(self, ogreg, checkpoint, folder):
        done = ogreg("predict", "clips", "-c", checkpoint, "--csv", "--top", "2")
        assert done.returncode == 1, done.stderr
        rows = list(csv.DictReader(done.stdout.splitlines()))
        assert [(Path(row["path"]).name, row["status"], row["rank"]) for row in rows] == [
            ("a.mp4", "ok", "1"),
            ("a.mp4", "ok", "2"),
            ("b, c.mp4", "error", ""),
            ("d.mp4", "ok", "1"),
            ("d.mp4", "ok", "2"),
        ]
        assert "not a video file" in rows[2]["reason"]
        assert all(row["label"] in LABELS for row in rows if row["status"] == "ok")
        assert done.stdout.count("path,status") == 1
        assert "not a video file" in done.stderr
        assert "1 of 3 files could not be read" in done.stderr

    def test_a_crash_and_a_hang_cost_one_file_each(self, checkpoint, clip, monkeypatch):
        """In worker processes, which import this module by name to be broken."""
        import ogreg_core.inference as inference

        monkeypatch.setattr(inference, "_load_apart", _load_or_break)
        predictor = Predictor.from_checkpoint(checkpoint, torch.device("cpu"))
        files = [str(clip), "crash.mp4", str(clip), "hang.mp4", str(clip)]
        found = list(predictor.predict_files(files, workers=2, batch=2, deadline=8.0))
        assert [file for file, _ in found] == files
        outcomes = [one.code if isinstance(one, VideoError) else "ok" for _, one in found]
        assert outcomes == ["ok", "crash", "ok", "time-out", "ok"]


def _load_or_break(job):
    from ogreg_core.inference import _load_apart

    if job.path == "crash.mp4":
        os.kill(os.getpid(), signal.SIGSEGV)
    if job.path == "hang.mp4":
        time.sleep(100)
    return _load_apart(job)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a.mp4", "--window", "2"], ["--window needs --timeline", "ogreg predict --timeline"]),
        (["a.mp4", "--overlay"], ["--overlay needs --timeline"]),
        (["a.mp4", "--smooth", "mean"], ["--smooth needs --timeline"]),
        (["a.mp4", "--timeline", "--csv"], ["--csv does not go with --timeline"]),
        (["a.mp4", "--timeline", "--workers", "1"], ["--workers does not go with --timeline"]),
        (["a.mp4", "--json", "--csv"], ["exclude each other"]),
        (["a.mp4", "--timeline", "--hop", "0"], ["--hop 0 is no length of time"]),
        (["a.mp4", "--crops", "2"], ["--crops is 1"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_wrong_usage(arguments, words, ogreg, tmp_path):
    done = ogreg("predict", *arguments)
    assert done.returncode == 2
    assert all(word in done.stderr for word in words), done.stderr
    assert not list(tmp_path.iterdir())


class TestTimeline:
    def test_all_files_of_a_timeline(self, ogreg, checkpoint, clip, tmp_path):
        options = ("--window", "1", "--hop", "0.5", "--threshold", "0.1", "--overlay", "--boxes")
        done = ogreg("predict", "--timeline", clip, "-c", checkpoint, "--json", *options)
        assert done.returncode == 0, done.stderr
        document = json.loads(done.stdout)
        assert document["schema"] == "ogreg.timeline.v1"
        assert document["status"] == "ok"
        assert [window["start_s"] for window in document["windows"]][:3] == pytest.approx(
            [0, 8 / 15, 1.0]
        )
        assert document["windows"][-1]["end_s"] == pytest.approx(4.0)
        assert document["events"]
        assert all(event["boxes"] for event in document["events"])
        run = tmp_path / "runs" / "predict" / "clip" / "1"
        assert Path(document["folder"]) == run
        assert sorted(path.name for path in run.iterdir()) == [
            *("events.csv", "events.vtt", "overlay.mp4"),
            *("timeline.json", "timeline.png", "windows.csv"),
        ]
        again = ogreg("predict", "--timeline", clip, "-c", checkpoint)
        assert again.returncode == 0, again.stderr
        assert "files: runs/predict/clip/2" in again.stdout
        # Without --window: what four frames, two apart, span at 15 frames per second.
        assert "windows of 0.533 s" in again.stderr

    def test_an_existing_folder_is_not_overwritten(self, ogreg, checkpoint, clip, tmp_path):
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "thesis.txt").write_text("precious")
        done = ogreg("predict", "--timeline", clip, "-c", checkpoint, "--out", "mine")
        assert done.returncode == 2
        assert "not an empty folder" in done.stderr
        assert [path.name for path in tmp_path.iterdir()] == ["mine"]

    def test_a_file_that_is_cut_off_gives_what_it_holds(self, ogreg, checkpoint, encode, tmp_path):
        whole = encode("whole.mkv", moving_frames(60, 48, 64), fps=15)
        content = whole.read_bytes()
        (tmp_path / "cut.mkv").write_bytes(content[: int(0.6 * len(content))])
        done = ogreg(
            "predict", "--timeline", "cut.mkv", "-c", checkpoint, "--json", "--out", "found"
        )
        assert done.returncode == 1, done.stderr
        document, error = map(json.loads, done.stdout.splitlines())
        assert document["status"] == "incomplete"
        assert 1 < document["read_to_s"] < 3.5
        assert "is cut off" in document["reason"]
        assert f"was read up to {document['read_to_s']:.2f} s" in error["error"]["what"]
        assert (tmp_path / "found" / "timeline.json").is_file()

    def test_an_image_among_videos_is_one_trouble(self, ogreg, checkpoint, clip, tmp_path):
        Image.new("RGB", (64, 48)).save(tmp_path / "photo.png")
        done = ogreg("predict", "--timeline", clip, "photo.png", clip, "-c", checkpoint, "--json")
        assert done.returncode == 1, done.stderr
        first, refused, second, last = map(json.loads, done.stdout.splitlines())
        assert first["events"] == second["events"]
        assert "has no timeline" in refused["error"]["what"]
        assert last["error"]["what"].startswith("1 of 3 files")

    def test_a_failing_overlay_costs_nothing_else(self, checkpoint, clip, tmp_path, monkeypatch):
        def fail(*_arguments):
            raise VideoError("it broke in the second pass", code="damaged")

        monkeypatch.setattr("ogreg_core.timeline.overlay.save_overlay", fail)
        predictor = Predictor.from_checkpoint(checkpoint, torch.device("cpu"))
        options = TimelineOptions(window_s=1.0)
        wishes = predict_timeline.Wishes("c", options, tmp_path / "out", 2, True, True)
        predict_timeline.run(predictor, [str(clip)], predictor.info.views(), wishes)
        document = json.loads((tmp_path / "out" / "timeline.json").read_text())
        assert document["overlay_error"] == "it broke in the second pass"
        assert "overlay" not in document

    def test_a_name_that_is_no_utf8(self, ogreg, checkpoint, clip, tmp_path):
        odd = os.fsencode(tmp_path) + b"/caf\xe9.mp4"
        shutil.copy(clip, odd)
        done = ogreg("predict", "--timeline", tmp_path, "-c", checkpoint, "--out", "found")
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "found" / "timeline.png").is_file()
        path = json.loads((tmp_path / "found" / "timeline.json").read_text())["path"]
        assert os.fsencode(path) == odd

    def test_lengths_without_sense(self, ogreg, checkpoint, clip):
        whole = ogreg("predict", "--timeline", clip, "-c", checkpoint, "--window", "inf", "--json")
        assert whole.returncode == 0, whole.stderr
        assert len(json.loads(whole.stdout)["windows"]) == 1
        short = ogreg("predict", "--timeline", clip, "-c", checkpoint, "--hop", "1e-6")
        assert short.returncode == 2
        assert "shorter than a frame" in short.stderr

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_interrupted(self, number, checkpoint, tmp_path):
        """While the overlay is being written, or before: nothing is left of it."""
        write_video(tmp_path / "long.mp4", moving_frames(3000, 48, 64), 15)
        command = ["predict", "--timeline", "long.mp4", "-c", str(checkpoint), "--overlay"]
        process = subprocess.Popen(
            [sys.executable, "-m", "ogreg_cli", "-v", *command, "--device", "cpu"],
            cwd=tmp_path,
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stderr is not None
        assert process.stderr.readline().startswith("weights:")
        time.sleep(1.0)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 128 + number, errors
        assert "Traceback" not in errors
        left = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert [path.name for path in left] == ["long.mp4"]


def mutants(content: bytes, count: int) -> list[bytes]:
    """Copies with bytes flipped, cut out, repeated or cut off, the same at every call."""
    copies = []
    for seed in range(count):
        rng = random.Random(seed)
        changed = bytearray(content)
        place = rng.randrange(len(changed))
        if seed % 4 == 0:
            for _ in range(rng.choice([1, 10, 100])):
                changed[rng.randrange(len(changed))] = rng.randrange(256)
        elif seed % 4 == 1:
            del changed[place : place + rng.randrange(1, 400)]
        elif seed % 4 == 2:
            changed[place:place] = changed[place : place + 64]
        else:
            del changed[place:]
        copies.append(bytes(changed))
    return copies


@pytest.fixture
def damaged(clip, tmp_path) -> Path:
    folder = tmp_path / "damaged"
    folder.mkdir()
    for number, content in enumerate(mutants(clip.read_bytes(), 20)):
        (folder / f"{number:02}.mp4").write_bytes(content)
    return folder


class TestDamage:
    def test_lists_of_files(self, ogreg, checkpoint, damaged):
        done = ogreg("predict", damaged, "-c", checkpoint, "--json")
        assert done.returncode == 1, done.stderr
        assert "Traceback" not in done.stderr
        *documents, last = map(json.loads, done.stdout.splitlines())
        assert [Path(document["path"]).name for document in documents] == [
            f"{number:02}.mp4" for number in range(20)
        ]
        bad = [document for document in documents if "error" in document]
        assert 5 <= len(bad) < 20
        assert all(document["error"]["code"] == 3 for document in bad)
        assert last["error"]["what"] == f"{len(bad)} of 20 files could not be read"

    def test_pictures(self, checkpoint, damaged):
        predictor = Predictor.from_checkpoint(checkpoint, torch.device("cpu"))
        refused = set()
        for file in sorted(damaged.iterdir()):
            try:
                assert look(predictor, file).maps
            except VideoError as error:
                refused.add(error.code)
        assert refused
        assert "internal" not in refused

    def test_timelines(self, ogreg, checkpoint, damaged):
        done = ogreg("predict", "--timeline", damaged, "-c", checkpoint, "--json")
        assert done.returncode == 1, done.stderr
        assert "Traceback" not in done.stderr
        *documents, last = map(json.loads, done.stdout.splitlines())
        assert len(documents) == 20
        found = [document for document in documents if "windows" in document]
        states = {document["status"] for document in found}
        assert states == {"ok", "incomplete"}
        for document in found:
            assert document["windows"]
            assert document["read_to_s"] <= document["duration_s"] + 1e-6
        for document in documents:
            assert "windows" in document or document["error"]["code"] == 3
        whole = sum(document["status"] == "ok" for document in found)
        assert last["error"]["what"].startswith(f"{20 - whole} of 20 files")
