"""Jobs of two processes on CPUs through the real command line: --gpus, torchrun, signals, restarts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import ranks
from tests.conftest import TINY

pytestmark = pytest.mark.slow


def start(folder: Path, *command: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, command)],
        cwd=folder,
        env={**os.environ, "OGREG_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def train(demo_root: Path, *options: str) -> list[str]:
    return ["train", "demo", f"data.root={demo_root}", *TINY, "--device", "cpu", *options]


def wait_for(metrics: Path, steps: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count('"train"') >= steps):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def trained_steps(run: Path) -> list[int]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines if '"train"' in line]


def children_of(pid: int) -> list[int]:
    """Direct children, the oldest first."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # gone in the meantime
            continue
        if parent == pid:
            found.append(int(folder.name))
    return sorted(found)


def test_two_processes_train_and_evaluate(demo_root, tmp_path, ogreg):
    done = ogreg(*train(demo_root, "--gpus", "2", "train.epochs=1", "--workers", "1", "--json"))
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["processes"] == 2
    assert document["val_videos"] == 32
    assert "2 processes on " in done.stderr
    assert "step: 8 videos (4 videos x 2 processes)" in done.stderr
    # One process speaks, and the launcher is silent.
    assert done.stderr.count("run runs/train/demo/1") == 1
    assert "torch.distributed" not in done.stderr
    run = tmp_path / "runs/train/demo/1"
    assert trained_steps(run) == list(range(1, 7))
    last = run / "checkpoints" / "last.safetensors"
    both = ogreg("eval", last, "--gpus", "2", "--device", "cpu", "--json", "--workers", "0")
    alone = ogreg("eval", last, "--device", "cpu", "--json", "--workers", "0")
    found, expected = json.loads(both.stdout), json.loads(alone.stdout)
    for key in ("top1_pct", "top5_pct", "videos", "protocol"):
        assert found[key] == expected[key]
    assert found["loss"] == pytest.approx(expected["loss"], abs=1e-5)
    assert found["top1_pct"] == document["last_top1_pct"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGUSR1, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_both_and_the_run_goes_on(number, code, demo_root, tmp_path, ogreg):
    process = start(
        tmp_path, "ogreg_cli", *train(demo_root, "--gpus", "2", "train.epochs=3", "--workers", "0")
    )
    run = tmp_path / "runs/train/demo/1"
    wait_for(run / "metrics.jsonl", 2, process)
    process.send_signal(number)
    _, said = process.communicate(timeout=100)
    assert process.returncode == code, said
    assert said.count("error: stopped at step") == 1
    assert "--resume" in said
    assert "Traceback" not in said
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["code"]) == ("interrupted", code)
    # Two processes may be continued by one: the step stays what it was.
    done = ogreg("train", "--resume", run, "--workers", "0", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert trained_steps(run) == list(range(1, 19))


def torchrun(*options: str) -> list[str]:
    return ["torch.distributed.run", "--monitor-interval", "0.2", "--max-restarts", "2", *options]


def test_torchrun_starts_anew_and_the_run_continues(demo_root, tmp_path):
    """A killed worker: torchrun restarts the job, which goes on in the same run folder."""
    process = start(
        tmp_path,
        *torchrun("--standalone", "--nproc-per-node", "2", "-m", "ogreg_cli"),
        *train(demo_root, "train.epochs=3", "--workers", "0", "--save-minutes", "0"),
    )
    run = tmp_path / "runs/train/demo/1"
    wait_for(run / "metrics.jsonl", 3, process)
    os.kill(children_of(process.pid)[-1], signal.SIGKILL)
    out, said = process.communicate(timeout=200)
    assert process.returncode == 0, said
    assert "continuing after epoch" in said
    assert [path.name for path in run.parent.iterdir()] == ["1"]
    assert trained_steps(run) == list(range(1, 19))
    assert "best top-1" in out


def test_two_machines_start_anew(demo_root, tmp_path):
    """Two launchers, as on two machines, which count restarts differently."""
    port = ranks.free_port()
    meeting = ("--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "7")
    agents = [
        start(
            tmp_path,
            *torchrun(*meeting, "--rdzv-endpoint", f"127.0.0.1:{port}", "-m", "ogreg_cli"),
            *train(demo_root, "train.epochs=3", "--workers", "0", "--save-minutes", "0"),
        )
        for _ in range(2)
    ]
    run = tmp_path / "runs/train/demo/1"
    wait_for(run / "metrics.jsonl", 3, agents[0])
    os.kill(children_of(agents[1].pid)[-1], signal.SIGKILL)
    said = [agent.communicate(timeout=200)[1] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert "continuing after epoch" in "".join(said)
    assert [path.name for path in run.parent.iterdir()] == ["1"]
    assert trained_steps(run) == list(range(1, 19))


def test_a_killed_process_is_named(demo_root, tmp_path):
    process = start(
        tmp_path, "ogreg_cli", *train(demo_root, "--gpus", "2", "train.epochs=9", "--workers", "0")
    )
    wait_for(tmp_path / "runs/train/demo/1/metrics.jsonl", 2, process)
    os.kill(children_of(process.pid)[-1], signal.SIGKILL)
    _, said = process.communicate(timeout=100)
    assert process.returncode == 137, said
    assert "was ended by SIGKILL" in said


def test_a_wrong_batch_is_said_once(demo_root, tmp_path, ogreg):
    done = ogreg(*train(demo_root, "--gpus", "3", "train.epochs=1"))
    assert done.returncode == 2
    assert done.stderr.count("error: train.batch_size = 8 does not fit the job") == 1
    assert "train.batch_size=6" in done.stderr
    # Nothing was begun.
    assert not (tmp_path / "runs").exists()


def test_torchrun_and_gpus_exclude_each_other(demo_root, ogreg):
    done = ogreg(*train(demo_root, "--gpus", "2"), RANK="0", WORLD_SIZE="2")
    assert done.returncode == 2
    assert "exclude each other" in done.stderr


def test_gpus_that_are_not_there_are_not_replaced_by_cpus(demo_root, ogreg):
    done = ogreg("train", "demo", f"data.root={demo_root}", *TINY, "--gpus", "2")
    assert done.returncode == 4
    assert "2 processes need as many GPUs; this machine has 0" in done.stderr
    assert "--device cpu" in done.stderr


def test_a_refused_resume_leaves_the_run_as_it_is(demo_root, tmp_path, ogreg):
    done = ogreg(*train(demo_root, "train.epochs=1", "--workers", "0"))
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs/train/demo/1"
    before = (run / "status.json").read_text()
    done = ogreg("train", "train.lr=1e-5", "--resume", run)
    assert done.returncode == 3
    assert "train.lr: 0.0008 then, 1e-05 now" in done.stderr
    assert (run / "status.json").read_text() == before
    done = ogreg("train", "train.checkpoint_stages=[1]", "--resume", run, "--workers", "0")
    assert done.returncode == 0, done.stderr
