"""The whole path through the real command line: prepare, train, resume, eval, predict, look, profile."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ogreg_core.video import write_video
from tests.conftest import TINY, moving_frames


@pytest.fixture(scope="module")
def run(demo_root, tmp_path_factory) -> Path:
    """A finished training of two epochs."""
    folder = tmp_path_factory.mktemp("trained")
    subprocess.run(
        [
            *(sys.executable, "-m", "ogreg_cli", "train", "demo", f"data.root={demo_root}", *TINY),
            *("train.epochs=2", "--workers", "0", "--json"),
        ],
        cwd=folder,
        check=True,
        capture_output=True,
        env={**os.environ, "OGREG_HOME": str(folder / "home")},
    )
    return folder / "runs" / "train" / "demo" / "1"


def val_clip(demo_root: Path) -> tuple[str, Path]:
    with open(demo_root / "val.csv", newline="") as file:
        row = list(csv.DictReader(file))[5]
    return row["path"], demo_root / row["path"]


def test_run_folder_is_complete(run):
    assert (run / "checkpoints" / "best.safetensors").is_file()
    assert json.loads((run / "status.json").read_text())["state"] == "done"
    report = json.loads((run / "report.json").read_text())
    assert report["epochs"] == 2
    assert report["val_videos"] == 32


@pytest.mark.slow
def test_eval_equals_validation_and_predict_equals_eval(run, demo_root, ogreg, tmp_path):
    done = ogreg("eval", run / "checkpoints" / "last.safetensors", "--json", "--out", "report")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [record for record in records if record["kind"] == "val"][-1]
    assert document["top1_pct"] == pytest.approx(last["top1"])
    assert document["loss"] == pytest.approx(last["loss"], abs=1e-5)
    assert document["videos"] == 32

    path, clip = val_clip(demo_root)
    done = ogreg(
        "predict", clip, "-c", run / "checkpoints" / "last.safetensors", "--json", "--top", "16"
    )
    assert done.returncode == 0, done.stderr
    predicted = {item["label"]: item["score"] for item in json.loads(done.stdout)["top"]}
    with open(tmp_path / "report" / "scores.csv", newline="") as file:
        row = next(row for row in csv.DictReader(file) if row["path"] == path)
    assert len(predicted) == 16
    for label, score in predicted.items():
        assert float(row[f"score:{label}"]) == pytest.approx(score, abs=1e-5)


@pytest.mark.slow
def test_killed_run_resumes_and_finishes(demo_root, ogreg, tmp_path):
    command = [sys.executable, "-m", "ogreg_cli", "train", "demo", f"data.root={demo_root}", *TINY]
    environment = {**os.environ, "OGREG_HOME": str(tmp_path / "home")}
    process = subprocess.Popen(
        [*command, "train.epochs=6", "--workers", "1"],
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    folder = tmp_path / "runs/train/demo/1"
    deadline = time.monotonic() + 120
    metrics = folder / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count('"val"') >= 2):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    # The recipe of the run is part of the run.
    other = ogreg("train", "demo", f"data.root={demo_root}", *TINY, "--resume", folder)
    assert other.returncode == 3
    assert "train.epochs: 6 then, 32 now" in other.stderr
    done = ogreg("train", "--resume", folder, "--workers", "0", "--json")
    assert done.returncode == 0, done.stderr
    assert "continuing after epoch" in done.stderr
    assert json.loads(done.stdout)["epochs"] == 6
    steps = [
        json.loads(line)["step"] for line in metrics.read_text().splitlines() if '"train"' in line
    ]
    assert steps == list(range(1, 37))


@pytest.mark.slow
def test_a_finished_run_resumes_to_its_report(run, ogreg, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    done = ogreg("train", "--resume", copy, "--json")
    assert done.returncode == 0, done.stderr
    expected = json.loads((run / "report.json").read_text())
    assert json.loads(done.stdout)["last_top1_pct"] == expected["last_top1_pct"]
    assert len((copy / "command.txt").read_text().splitlines()) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_save_and_say_how_to_go_on(number, code, demo_root, tmp_path):
    """Sent to the whole process group, loader workers included, as terminals and launchers do."""
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "ogreg_cli", "train", "demo", f"data.root={demo_root}", *TINY),
            *("train.epochs=500", "--workers", "1"),
        ],
        cwd=tmp_path,
        env={**os.environ, "OGREG_HOME": str(tmp_path / "home")},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    metrics = tmp_path / "runs/train/demo/1/metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    assert "ogreg train --resume runs/train/demo/1" in stderr
    assert "Traceback" not in stderr
    status = json.loads((tmp_path / "runs/train/demo/1/status.json").read_text())
    assert (status["state"], status["code"]) == ("interrupted", code)
    assert status["resume"] == "ogreg train --resume runs/train/demo/1"


@pytest.mark.slow
def test_resume_refuses_other_data(run, demo_root, ogreg, tmp_path):
    copy, data = tmp_path / "copy", tmp_path / "data"
    shutil.copytree(run, copy)
    shutil.copytree(demo_root, data)
    manifest = data / "train.csv"
    manifest.write_text("".join(manifest.read_text().splitlines(keepends=True)[:-1]))
    state = (copy / "checkpoints/state.pt").read_bytes()
    done = ogreg("train", "--resume", copy, f"data.root={data}")
    assert done.returncode == 3
    assert "training manifest: 48 videos" in done.stderr
    assert "47 videos" in done.stderr
    assert (copy / "checkpoints/state.pt").read_bytes() == state


def test_choices_that_cannot_be_built_begin_no_run(demo_root, ogreg, tmp_path):
    done = ogreg("train", "demo", f"data.root={demo_root}", *TINY, "model.gta.stages=[7]")
    assert done.returncode == 2
    assert "stage" in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_predict_over_many_files(run, demo_root, ogreg, tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    write_video(folder / "[red] ü 'x'.mp4", moving_frames(12, 48, 64), 10)
    write_video(folder / "-b.mkv.mp4", moving_frames(12, 48, 64), 10)
    (folder / "broken.mp4").write_text("no video")
    done = ogreg("predict", "clips", "-c", run, "--json")
    assert done.returncode == 1
    documents = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(documents) == 4
    by_name = {Path(d["path"]).name: d for d in documents if "path" in d}
    assert by_name["broken.mp4"]["error"]["code"] == 3
    assert by_name["[red] ü 'x'.mp4"]["status"] == "ok"
    assert "1 of 3 files" in done.stderr
    listed = ogreg("predict", "-", "-c", run, stdin="clips/[red] ü 'x'.mp4\n")
    assert listed.returncode == 0, listed.stderr
    lines = [line.split("\t") for line in listed.stdout.splitlines()]
    assert len(lines) == 5
    assert {line[0] for line in lines} == {"clips/[red] ü 'x'.mp4"}
    alone = ogreg("predict", folder / "broken.mp4", "-c", run)
    assert alone.returncode == 3
    assert "not a video file" in alone.stderr
    chosen = ogreg("predict", "clips/[red] ü 'x'.mp4", OGREG_CHECKPOINT=str(run))
    assert chosen.returncode == 0
    assert "$OGREG_CHECKPOINT" in chosen.stderr


@pytest.mark.slow
def test_look_and_profile(run, demo_root, ogreg, tmp_path):
    _, clip = val_clip(demo_root)
    done = ogreg("visualize-gaze", clip, "-c", run, "--out", "look", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert Path(document["sheet"]).is_file()
    assert Path(document["overlay"]).is_file()
    assert len(document["profiles"]) == 6
    wrong = ogreg("visualize-gaze", clip, "-c", run, "--blocks", "stage7")
    assert wrong.returncode == 2
    done = ogreg(
        *(
            "profile",
            "--model",
            "ogreg-n",
            "--frames",
            "4",
            "--size",
            "64",
            "--repeats",
            "1",
            "--json",
        ),
        *("--option", "stem=patch"),
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["params"] == 1_770_256 + 0
    assert document["uncounted_operators"] == {}
    assert document["gmacs_per_view"] > 0.01
    done = ogreg(
        *("profile", "--compare", "ogreg-n,r2plus1d-18", "--frames", "4", "--size", "32"),
        *("--repeats", "1", "--json"),
    )
    assert done.returncode == 0, done.stderr
    first, second = json.loads(done.stdout)["models"]
    assert (first["model"], second["model"]) == ("ogreg-n", "r2plus1d-18")
    assert first["latency_ratio"] == 1
    assert second["latency_ratio"] == second["latency_ms_p50"] / first["latency_ms_p50"]


@pytest.mark.slow
def test_prepare_folder_and_train_on_it(ogreg, tmp_path):
    for label in ("a", "b"):
        (tmp_path / "set" / label).mkdir(parents=True)
        for number in range(6):
            write_video(tmp_path / "set" / label / f"{number}.mp4", moving_frames(8, 40, 56), 10)
    done = ogreg("prepare", "folder", "set", "--val-share", "0.34", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["videos"] == {"train": 8, "val": 4}
    done = ogreg(
        *("train", "folder", "data.dataset=set", "train.epochs=1", "train.batch_size=4"),
        *("data.frames=2", "data.size=32", "data.short_side=32", "--workers", "0", "--json"),
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["val_videos"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["kinetics400", "ssv2", "diving48"])
def test_dry_run_without_data_says_what_is_missing(recipe, ogreg, tmp_path):
    done = ogreg(
        *("train", recipe, "--dry-run", "--json"),
        *("data.size=32", "data.short_side=32", "data.frames=4", "init.weights=none.safetensors"),
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["figures"]["params_m"] == pytest.approx(28.06, abs=0.05)
    missing = " ".join(document["missing"])
    assert f"ogreg prepare {recipe}" in missing
    assert "none.safetensors" in missing
    assert not list(tmp_path.glob("runs"))


def test_eval_counts_an_unreadable_video_as_wrong_and_names_it(run, demo_root, ogreg, tmp_path):
    data = tmp_path / "demo"
    shutil.copytree(demo_root, data)
    path, clip = val_clip(data)
    clip.write_bytes(b"no video")
    command = ["eval", run / "checkpoints" / "last.safetensors", "--data", data]
    done = ogreg(*command, "--json", "--out", tmp_path / "report")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["videos"] == 32
    assert [video["path"] for video in report["unreadable"]] == [path]
    assert report["annotated_videos"] == 32
    assert report["coverage_pct"] == pytest.approx(100 * 31 / 32)
    with open(tmp_path / "report/scores.csv", newline="") as file:
        lines = list(csv.reader(file))
    assert {len(line) for line in lines} == {5 + 16}
    with open(data / "val.csv", newline="") as file:
        assert [line[0] for line in lines[1:]] == [row["path"] for row in csv.DictReader(file)]
    assert lines[6][0] == path
    assert set(lines[6][2:]) == {""}
    right = sum(line[1] == line[2] for line in lines[1:])
    assert report["top1_pct"] == pytest.approx(100 * right / 32)
    done = ogreg(*command)
    assert "32, 1 of them unreadable and counted as wrong (96.9 % of 32 annotated)" in done.stdout
    assert path in done.stderr
