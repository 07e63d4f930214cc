"""Run folders in every state that a run leaves them in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from json import JSONDecoder

import pytest

from ogreg_core.run_records import (
    find_runs,
    read_metrics,
    read_run,
    share_text,
    thousands,
)

RECIPE = """
seed = 7
[data]
dataset = "demo"
val_split = "val"
[model]
name = "ogreg-n"
[train]
epochs = 3
"""


def train_line(step: int, epoch: int) -> str:
    return json.dumps({"kind": "train", "epoch": epoch, "step": step, "loss": 1.0}) + "\n"


def val_line(step: int, epoch: int, top1: float, **more) -> str:
    record = {"kind": "val", "epoch": epoch, "step": step, "top1": top1, "top5": 90.0, **more}
    return json.dumps(record) + "\n"


def make(folder, *, status=None, report=None, metrics=None, recipe=RECIPE):
    folder.mkdir(parents=True)
    for name, content in (("status.json", status), ("report.json", report)):
        if content is not None:
            text = content if isinstance(content, str) else json.dumps(content)
            (folder / name).write_text(text)
    if metrics is not None:
        (folder / "metrics.jsonl").write_text(metrics)
    if recipe:
        (folder / "recipe.toml").write_text(recipe)
        (folder / "env.json").write_text("{}")
    return folder


METRICS = (
    train_line(1, 1)
    + val_line(1, 1, 30.0, videos=10, unreadable=1)
    + train_line(2, 2)
    + val_line(2, 2, 50.0, videos=10, unreadable=1)
    + train_line(3, 3)
    + val_line(3, 3, 50.0, videos=10, unreadable=1)
)


def test_a_finished_training(tmp_path):
    report = {
        **{"schema": "ogreg.train.v1", "model": "ogreg-n", "train_seconds": 61.5},
        **{"best_top1_pct": 50.0, "val_annotated": 12, "val_videos": 10, "val_unreadable": 1},
    }
    run = read_run(
        make(tmp_path / "demo" / "1", status={"state": "done"}, report=report, metrics=METRICS)
    )
    assert (run.kind, run.state, run.model, run.recipe) == ("train", "done", "ogreg-n", "demo")
    assert (run.epoch, run.epochs, run.seconds) == (3, 3, 61.5)
    # Of equal ones the first, as the checkpoint is kept.
    assert (run.top1, run.best_epoch, run.last_top1) == (50.0, 2, 50.0)
    assert (run.videos, run.unreadable, run.annotated) == (10, 1, 12)
    assert run.coverage_pct == pytest.approx(75.0)
    assert run.dataset == "demo/val"


def test_a_killed_training_with_half_a_line(tmp_path):
    folder = make(
        tmp_path / "1",
        status={"state": "running", "resume": "ogreg train --resume x"},
        metrics=METRICS + train_line(4, 4) + train_line(5, 5)[:25],
    )
    assert read_run(folder).state == "running"
    assert (read_run(folder).epoch, len(list(read_metrics(folder / "metrics.jsonl")))) == (4, 7)
    long_ago = time.time() - 3600
    for path in (*folder.iterdir(), folder):
        os.utime(path, (long_ago, long_ago))
    run = read_run(folder)
    assert run.state == "silent"
    assert run.resume == "ogreg train --resume x"
    assert run.started == pytest.approx(long_ago)
    # A checkpoint or a line in the log is a sign of life.
    (folder / "run.log").write_text("")
    assert read_run(folder).state == "running"


@pytest.mark.parametrize("state", ["failed", "interrupted"])
def test_runs_that_ended_early_say_why(tmp_path, state):
    status = {"state": state, "reason": "the loss became nan", "code": 1}
    run = read_run(make(tmp_path / "1", status=status, metrics=train_line(1, 1)))
    assert (run.state, run.reason, run.top1, run.epoch) == (state, "the loss became nan", None, 1)


def test_a_validation_counts_once_after_a_resumption(tmp_path):
    metrics = val_line(1, 1, 10.0) + val_line(2, 2, 20.0) + val_line(2, 2, 25.0)
    run = read_run(make(tmp_path / "1", metrics=metrics))
    assert [record["top1"] for record in run.validations] == [10.0, 25.0]
    assert run.state == "unknown"


def test_an_evaluation_and_a_control(tmp_path):
    report = {
        **{"schema": "ogreg.eval.v1", "model": "ogreg-n", "recipe": "demo", "dataset": "demo"},
        **{"split": "test", "top1_pct": 91.5, "videos": 20, "annotated_videos": 20},
        **{"unreadable": [{"path": "a.mp4"}, {"path": "b.mp4"}], "frame_order": "none"},
        "protocol": "16 uniform, 1x1 views",
    }
    run = read_run(make(tmp_path / "1", report=report, recipe=""))
    assert (run.kind, run.state, run.top1, run.dataset) == ("eval", "done", 91.5, "demo/test")
    assert (run.videos, run.unreadable, run.coverage_pct) == (20, 2, 90.0)
    assert (run.frame_order, run.epoch, run.seconds) == ("", None, None)
    run = read_run(make(tmp_path / "2", report={**report, "frame_order": "shuffled"}, recipe=""))
    assert run.frame_order == "shuffled"
    older = {**report, "protocol": "16 uniform, 1x1 views, frames middle"}
    del older["frame_order"]
    assert read_run(make(tmp_path / "3", report=older, recipe="")).frame_order == "middle"
    fused = {**report, "fused": [{"path": "a"}]}
    assert read_run(make(tmp_path / "4", report=fused, recipe="")).kind == "fuse"


def test_an_interrupted_evaluation_is_listed_as_one(tmp_path):
    folder = make(tmp_path / "1", status={"state": "interrupted", "reason": "stopped"}, recipe="")
    data = {"command": "eval", "model": "ogreg-n", "dataset": "demo", "split": "test"}
    (folder / "data.json").write_text(json.dumps(data))
    assert list(find_runs(tmp_path)) == [folder]
    run = read_run(folder)
    assert (run.kind, run.state, run.model, run.dataset) == (
        *("eval", "interrupted", "ogreg-n", "demo/test"),
    )
    (folder / "data.json").write_text(json.dumps({**data, "command": "fuse"}))
    assert read_run(folder).kind == "fuse"


def test_more_rows_than_annotations_are_no_more_than_all(tmp_path):
    report = {"schema": "ogreg.eval.v1", "top1_pct": 1.0, "videos": 5, "annotated_videos": 4}
    run = read_run(make(tmp_path / "1", report=report, recipe=""))
    assert (run.scored, run.annotated, run.coverage_pct) == (5, 5, 100.0)


def test_when_it_finished_is_its_own_word(tmp_path):
    report = {"schema": "ogreg.eval.v1", "finished": "2026-02-28T23:30:00+00:00"}
    assert read_run(make(tmp_path / "1", report=report)).finished == 1772321400
    run = read_run(make(tmp_path / "2", report={**report, "finished": "yesterday"}))
    assert run.finished == run.started


def test_nearly_all_is_not_rounded_to_all():
    assert share_text(19998, 20005) == "99.9 %"
    assert share_text(20005, 20005) == "100.0 %"
    assert share_text(31, 32) == "96.9 %"
    assert thousands(1234567) == "1 234 567"


@pytest.mark.parametrize(
    "content",
    [
        {"status": "", "report": "{", "metrics": "\x00\n[]\n3\n", "recipe": "= broken"},
        {"status": [], "report": {"schema": ["x"]}, "metrics": "", "recipe": "train = 3"},
        {"status": {"state": 3}, "metrics": val_line(1, 1, "high")},
        {"status": {}, "report": {"schema": "ogreg.train.v9", "train_seconds": "long"}},
        {"metrics": train_line(1, 1), "recipe": ""},
        {"metrics": None},
    ],
)
def test_whatever_lies_in_a_folder_it_is_listed(tmp_path, content):
    run = read_run(make(tmp_path / "1", **content))
    assert run is not None
    assert run.top1 is None
    for name in ("model", "epochs", "last_top1", "videos", "coverage_pct", "dataset", "state"):
        getattr(run, name)


def test_folders_that_are_no_runs_are_passed_over(tmp_path):
    make(tmp_path / "runs" / "train" / "demo" / "2", metrics="")
    make(tmp_path / "runs" / "eval" / "demo" / "1", report={"schema": "ogreg.eval.v1"}, recipe="")
    make(tmp_path / "runs" / "elsewhere", metrics="")
    make(tmp_path / "runs" / ".hidden" / "1", metrics="")
    # Of `ogreg data show`: a recipe, but no run.
    picture = tmp_path / "runs" / "data" / "demo" / "1"
    picture.mkdir(parents=True)
    (picture / "recipe.toml").write_text(RECIPE)
    (picture / "report.json").write_text('{"schema": "something.else"}')
    (tmp_path / "runs" / "notes.txt").write_text("")
    found = [path.relative_to(tmp_path).as_posix() for path in find_runs(tmp_path)]
    assert found == ["runs/elsewhere", "runs/eval/demo/1", "runs/train/demo/2"]
    assert list(find_runs(tmp_path / "runs" / "elsewhere")) == [tmp_path / "runs" / "elsewhere"]
    assert read_run(picture) is None
    assert list(find_runs(tmp_path / "nowhere")) == []


def test_a_long_run_is_read_without_parsing_it_all(tmp_path, monkeypatch):
    metrics = "".join(train_line(n, 1) for n in range(1, 1001)) + val_line(1000, 1, 12.0)
    folder = make(tmp_path / "1", metrics=metrics)
    parsed = []
    monkeypatch.setattr(
        json,
        "loads",
        lambda text: (
            parsed.append(text)
            or JSONDecoder().decode(text if isinstance(text, str) else text.decode())
        ),
    )
    run = read_run(folder)
    assert (run.epoch, run.top1) == (1, 12.0)
    assert len(parsed) < 10


def test_torch_and_numpy_are_not_imported():
    code = """
import sys, ogreg_core.run_records
sys.exit(", ".join({"torch", "numpy", "matplotlib", "pydantic"} & set(sys.modules)) or 0)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
