"""``ogreg eval``: what it prints, what it expects, and several processes for one evaluation."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from ogreg_cli.evaluate import _videos
from ogreg_core.errors import EnvironmentFault
from ogreg_core.saved_scores import read_scores
from tests.cli.test_start_up import PROBE
from tests.tiny import seven_videos, tiny_checkpoint


@pytest.fixture
def checkpoint(demo_root, tmp_path):
    return tiny_checkpoint(tmp_path / "a.safetensors", demo_root)


@pytest.fixture
def seven(demo_root, tmp_path):
    return seven_videos(tmp_path / "seven", demo_root, missing=3, annotated=1009)


@pytest.mark.slow
def test_score_with_its_protocol_and_expectations(checkpoint, seven, ogreg, tmp_path):
    command = ["eval", checkpoint, "--data", seven, "--device", "cpu", "--workers", "0"]
    done = ogreg(*command, "--out", "one", "--expect", "top5<=100", "--expect", "top1>=99.9")
    assert done.returncode == 1
    report = json.loads((tmp_path / "one/report.json").read_text())
    lines = done.stdout.splitlines()
    low, high = report["top1_interval_pct"]
    assert lines[0] == f"{report['summary']}, 95 % interval {low:.1f} to {high:.1f}"
    assert "(4 uniform, 1x1 views, short side 36, crop 32, 6 of 1 009 videos)" in lines[0]
    assert lines[1].startswith("top-1\ttop-5\tmean class\tcalibration error\tloss\tvideos")
    assert lines[2].endswith(
        "7, 1 of them unreadable and counted as wrong (0.6 % of 1 009 annotated)"
    )
    assert f"as expected: top5<=100, reached {report['top5_pct']:.2f}" in lines
    assert lines[-1] == "reports: one"
    assert f"expected top1>=99.9, reached {report['top1_pct']:.2f}" in done.stderr
    assert "missing.mp4" in done.stderr
    assert "Traceback" not in done.stderr
    files = {"report.json", "scores.safetensors", "scores.csv", "per_class.csv", "confusion.png"}
    files |= {"status.json", "env.json", "command.txt", "data.json"}
    status = json.loads((tmp_path / "one/status.json").read_text())
    assert (status["state"], status["code"]) == ("failed", 1)
    assert "expected top1>=99.9" in status["reason"]
    assert "--expect" in (tmp_path / "one/command.txt").read_text()
    assert "torch" in json.loads((tmp_path / "one/env.json").read_text())["packages"]
    assert {path.name for path in (tmp_path / "one").iterdir()} == files

    done = ogreg(*command, "--json", "--out", "two", "--expect", "top1=99.9±0.05")
    assert done.returncode == 1
    document = json.loads(done.stdout)
    assert document.pop("report_folder") == "two"
    assert document == json.loads((tmp_path / "two/report.json").read_text())
    (outcome,) = document.pop("expectations")
    assert outcome["reached_pct"] == document["top1_pct"]
    assert outcome["met"] is False
    for each in (report, document):
        each.pop("expectations", None)
        assert each.pop("finished").endswith("+00:00")
    assert document == report
    assert json.loads((tmp_path / "two/status.json").read_text())["code"] == 1


def test_other_rates_are_named_in_the_report(checkpoint, seven, ogreg):
    """Also by the option's other name."""
    command = ["eval", checkpoint, "--data", seven, "--device", "cpu", "--workers", "0"]
    done = ogreg(*command, "--json", "--out", "half", "--frames-as", "half")
    assert done.returncode == 0
    document = json.loads(done.stdout)
    assert document["protocol"].endswith("crop 32, at half rate (2 frames)")
    assert (document["frame_order"], document["frames"]) == ("half", 2)
    done = ogreg(*command, "--frame-order", "third")
    assert done.returncode == 2
    assert "irregular" in done.stderr


def test_a_video_that_breaks_off_leaves_its_reason(checkpoint, seven, ogreg, tmp_path):
    """Not one video can be read: the folder says so; nothing is reported."""
    lines = (seven / "val.csv").read_text().splitlines(keepends=True)
    (seven / "val.csv").write_text("".join([lines[0], *(n for n in lines if "missing" in n)]))
    done = ogreg("eval", checkpoint, "--data", seven, "--device", "cpu", "--workers", "0")
    assert done.returncode == 3
    folder = tmp_path / "runs/eval/tiny/1"
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["code"]) == ("failed", 3)
    assert "not one video" in status["reason"]
    assert not (folder / "report.json").exists()
    (run,) = json.loads(ogreg("runs", "--json").stdout)["runs"]
    assert (run["kind"], run["state"], run["model"]) == ("eval", "failed", "ogreg-n")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_evaluation_says_so(number, code, checkpoint, seven, ogreg, tmp_path):
    """The signal comes with the third batch, as surely as it can be timed."""
    script = f"""
import os, sys
from ogreg_cli import evaluate
heed, seen = evaluate._heed, []
def interrupt(stop, reporter, event):
    seen.append(event)
    if len(seen) == 3:
        os.kill(os.getpid(), {int(number)})
    heed(stop, reporter, event)
evaluate._heed = interrupt
sys.argv = ["ogreg", "eval", {str(checkpoint)!r}, "--data", {str(seven)!r}, "--device", "cpu",
            "--workers", "0", "--batch-size", "1"]
from ogreg_cli.__main__ import main
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    status = json.loads((tmp_path / "runs/eval/tiny/1/status.json").read_text())
    assert (status["state"], status["code"]) == ("interrupted", code)
    (run,) = json.loads(ogreg("runs", "--json").stdout)["runs"]
    assert (run["kind"], run["state"], run["dataset"]) == ("eval", "interrupted", "seven/val")


def test_a_place_that_cannot_be_used_is_told_before_scoring(
    checkpoint, seven, tmp_path, monkeypatch
):
    from ogreg_cli.evaluate import evaluate
    from ogreg_core import evaluate_checkpoint

    def never(*_, **__):
        raise AssertionError("scored before the folder was there")

    monkeypatch.setattr(evaluate_checkpoint, "score_dataset", never)
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFault, match="cannot be created"):
        evaluate(str(checkpoint), data=seven, out=tmp_path / "file" / "x", device="cpu", workers=0)


def test_mistakes_come_with_a_fix(checkpoint, seven, ogreg, tmp_path):
    done = ogreg("eval", "nosuch")
    assert done.returncode == 3
    assert done.stderr.startswith("error: ")
    done = ogreg("eval", checkpoint, "--data", seven, "--split", "nosuch")
    assert done.returncode == 3
    assert "fix    --split val" in done.stderr
    assert not (tmp_path / "runs").exists()
    (tmp_path / "before").mkdir()
    document = {"schema": "ogreg.eval.v1", "checkpoint": str(checkpoint)}
    (tmp_path / "before/report.json").write_text(json.dumps(document))
    done = ogreg("eval", "before")
    assert done.returncode == 3
    assert f"ogreg eval {checkpoint}" in done.stderr


def test_the_cell_of_videos_never_exceeds_all():
    def cell(videos, unreadable, annotated):
        metrics = SimpleNamespace(videos=videos, unreadable=unreadable)
        document = {"annotated_videos": annotated, "scored_videos": videos - unreadable}
        return _videos(SimpleNamespace(metrics=metrics, document=document))

    assert cell(5, 0, 4) == "5 (the annotations list only 4)"
    assert cell(20000, 0, 20005) == "20 000 (99.9 % of 20 005 annotated)"
    assert cell(20005, 0, 20005) == "20 005 (100.0 % of 20 005 annotated)"
    assert cell(7, 0, None) == "7"


def test_wrong_expectations_are_told_before_anything_is_loaded(ogreg, tmp_path):
    done = ogreg("eval", "x", "--expect", "top1=78.8", "--json")
    assert done.returncode == 2
    assert "--expect 'top1>=78.5'" in done.stderr
    assert json.loads(done.stdout)["error"]["code"] == 2
    assert not list(tmp_path.iterdir())
    code = PROBE.format(arguments=["eval", "x", "--expect", "topp1>=3"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "did you mean 'top1'?" in done.stderr


def launch_by_hand(arguments, processes, folder):
    """What torchrun does: the same command with the job in the environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    job = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = []
    for rank in range(processes):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", "ogreg_cli", *map(str, arguments)],
                cwd=folder,
                env={**os.environ, **job, **place},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return [(*process.communicate(timeout=200), process.returncode) for process in started]


@pytest.mark.slow
def test_two_processes_give_the_scores_of_one(checkpoint, seven, ogreg, tmp_path):
    """Seven videos, one unreadable: every row once, in manifest order; one process speaks."""
    command = ["eval", checkpoint, "--data", seven, "--device", "cpu", "--workers", "0"]
    command += ["--batch-size", "2", "--json", "--out"]
    alone = ogreg(*command, "one")
    assert alone.returncode == 0, alone.stderr
    main, other = launch_by_hand([*command, "two"], 2, tmp_path)
    assert (main[2], other[2]) == (0, 0), main[1] + other[1]
    assert other[:2] == ("", "")
    one, two = json.loads(alone.stdout), json.loads(main[0])
    for key, value in one.items():
        if key in ("report_folder", "finished"):
            continue
        assert two[key] == (pytest.approx(value, abs=1e-4) if isinstance(value, float) else value)
    first, second = read_scores(tmp_path / "one"), read_scores(tmp_path / "two")
    torch.testing.assert_close(second.found.scores, first.found.scores, atol=1e-5, rtol=0)
    assert second.found.indices.tolist() == [0, 1, 2, 4, 5, 6]
    assert second.paths == first.paths
    for name in ("per_class.csv", "confusion.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.slow
def test_gpus_option_starts_processes_also_on_cpus(checkpoint, demo_root, ogreg, tmp_path):
    """And one that finds no video left for it does no harm; nor does a missed threshold."""
    data = seven_videos(tmp_path / "seven", demo_root)
    lines = (data / "val.csv").read_text().splitlines(keepends=True)
    (data / "val.csv").write_text("".join(lines[:2]))
    command = ["eval", checkpoint, "--data", data, "--device", "cpu", "--workers", "0", "--json"]
    done = ogreg(*command, "--gpus", "2", "--out", "two", "--expect", "top5>=0")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["videos"] == 1
    assert document["expectations"][0]["met"] is True
    assert read_scores(tmp_path / "two").found.indices.tolist() == [0]
    done = ogreg(*command, "--gpus", "2", "--expect", "ece<=0")
    assert done.returncode == 1, done.stderr
    assert json.loads(done.stdout)["expectations"][0]["met"] is False
