"""Jobs that crash or hang cost themselves alone; a killed main process leaves no workers behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from ogreg_core.processes import Lost, run_isolated
from tests.ranks import all_ended


def work(job: int) -> int:
    """Crashes on 3, hangs on 5, raises on 99."""
    if job == 3:
        os.kill(os.getpid(), signal.SIGSEGV)
    if job == 5:
        time.sleep(60)
    if job == 99:
        raise ValueError("job 99")
    return job * job


def test_crash_and_hang_cost_one_job_each():
    found = dict(run_isolated(work, range(20), 2, deadline=lambda _: 1.5))
    assert found.pop(3) == Lost("crash", "the process that opened it died (signal 11)")
    assert found.pop(5) == Lost("time-out", "not done after 1.5 s")
    assert found == {job: job * job for job in range(20) if job not in (3, 5)}


def test_jobs_are_taken_as_needed():
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield 1

    results = run_isolated(work, endless(), 2)
    assert next(results) == (1, 1)
    results.close()
    assert taken <= 16


@pytest.mark.parametrize("workers", [0, 2])
def test_exceptions_arrive_here(workers):
    with pytest.raises(ValueError, match="job 99"):
        list(run_isolated(work, [1, 99], workers))


SLEEPERS = """
import os, sys, time
from ogreg_core.processes import run_isolated
from tests.core.test_processes import report_and_sleep
if __name__ == "__main__":
    list(run_isolated(report_and_sleep, [sys.argv[1]] * 4, 2))
"""


def report_and_sleep(folder: str) -> None:
    """Leaves its process number behind and stays."""
    open(os.path.join(folder, str(os.getpid())), "w").close()
    time.sleep(120)


def test_a_killed_main_process_takes_its_workers_along(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(SLEEPERS)
    (tmp_path / "pids").mkdir()
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    process = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path / "pids")],
        env={**os.environ, "PYTHONPATH": root},
    )
    deadline = time.monotonic() + 60
    while len(os.listdir(tmp_path / "pids")) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    workers = [int(name) for name in os.listdir(tmp_path / "pids")]
    assert len(workers) == 2
    process.kill()
    process.wait()
    assert all_ended(workers)
