from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from ogreg_core.profiling import PeakMeter, available_mb, peak_memory_mb

CPU = torch.device("cpu")


def test_peak_of_the_process():
    assert peak_memory_mb(CPU) > 50


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux sets its high-water mark back")
def test_the_rise_of_a_piece_of_work_alone():
    large = torch.ones(128 * 2**18)  # 128 MB, freed before the meter starts
    del large
    meter = PeakMeter(CPU)
    work = torch.ones(64 * 2**18)
    del work
    assert meter.peak_mb() == pytest.approx(64, abs=8)
    assert PeakMeter(CPU).peak_mb() == pytest.approx(0, abs=8)


def account(folder: Path, resident: int, peak: int) -> None:
    text = f"Name:\tpython\nVmHWM:\t{peak * 1024} kB\nVmRSS:\t{resident * 1024} kB\n"
    (folder / "status").write_text(text)


def test_the_kernels_account_is_read(tmp_path):
    account(tmp_path, 300, 900)
    meter = PeakMeter(CPU, tmp_path)
    assert (tmp_path / "clear_refs").read_text() == "5"
    account(tmp_path, 310, 420)
    assert meter.peak_mb() == 120
    account(tmp_path, 200, 200)
    assert meter.peak_mb() == 0


def test_where_the_mark_cannot_be_set_back_nothing_is_claimed(tmp_path):
    account(tmp_path, 300, 900)
    (tmp_path / "clear_refs").mkdir()  # cannot be written to
    assert PeakMeter(CPU, tmp_path).peak_mb() is None
    assert PeakMeter(CPU, tmp_path / "none").peak_mb() is None


def test_memory_that_is_left():
    assert available_mb(CPU) > 100
    assert available_mb(torch.device("cuda")) == float("inf")
