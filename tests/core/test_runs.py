from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from ogreg_core.errors import UsageError
from ogreg_core.runs import RunFolder, environment


def test_runs_that_start_together_get_different_folders(tmp_path):
    with ThreadPoolExecutor(16) as pool:
        runs = list(pool.map(lambda _: RunFolder.create("train", "x", base=tmp_path), range(40)))
    assert len({run.path for run in runs}) == 40
    assert sorted(int(run.path.name) for run in runs) == list(range(1, 41))


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(UsageError, match="not an empty folder"):
        RunFolder.create("train", "x", out=tmp_path / "full")
    assert RunFolder.create("train", "x", out=tmp_path / "new").path == tmp_path / "new"


def test_metrics_after_a_step_are_forgotten_with_half_lines(tmp_path):
    run = RunFolder(tmp_path)
    run.drop_metrics_after(3, 1)
    for step in range(1, 6):
        run.append_metrics({"kind": "train", "step": step, "loss": float("0.5")})
        # A validation that is about to be repeated has the step of the saved state.
        run.append_metrics({"kind": "val", "step": step, "epoch": step - 1})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lo')
    run.drop_metrics_after(3, 1)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if record["kind"] == "train"] == [1, 2, 3]
    assert [record["step"] for record in records if record["kind"] == "val"] == [1, 2]


def test_status_and_environment(tmp_path):
    run = RunFolder(tmp_path)
    run.status("failed", 3, "no data", "ogreg train --resume x")
    assert run.read_json("status.json") == {
        "state": "failed",
        "code": 3,
        "reason": "no data",
        "resume": "ogreg train --resume x",
    }
    assert environment()["packages"]["torch"] != "not installed"
