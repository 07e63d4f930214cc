"""A decoder that crashes or hangs in a worker is named, and what is merely slow is left alone."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import threading
import time

import pytest

from ogreg_core.data.loader import (
    ClipDataset,
    ViewDataset,
    Views,
    batches,
    test_loader,
    train_loader,
)
from ogreg_core.data.manifest import load_manifest
from ogreg_core.data.order import BatchOrder
from ogreg_core.data.sampling import ClipSampling
from ogreg_core.data.transforms import Augmentation, TestCrops
from ogreg_core.data.watchdog import Board, LostFile, LostWorker, publish_to, reading
from ogreg_core.errors import DataError, VideoError
from tests import ranks

SAMPLING = ClipSampling("uniform", 4)
VICTIM = 5


def crash():
    os.kill(os.getpid(), signal.SIGSEGV)


def crash_soon():
    time.sleep(1)
    crash()


def hang():
    """As native code does: nothing but SIGKILL is heard."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    while True:
        time.sleep(1)


def be_slow():
    time.sleep(0.3)


def fail():
    raise RuntimeError("a bug")


class Bad(ClipDataset):
    """Does something else on reading one manifest row, or (``None``) on every row."""

    def __init__(self, root, action, victim=VICTIM):
        super().__init__(load_manifest(root, "train"), SAMPLING, Augmentation(32), seed=7)
        self.action = action
        self.victim = victim

    def _read(self, epoch, index, number):
        if self.victim in (None, number):
            self.action()
        return super()._read(epoch, index, number)


def loader_of(dataset, workers=2, batch=4, **options):
    return train_loader(dataset, BatchOrder(len(dataset), 7, batch), workers, **options)


def children():
    return {child.pid for child in multiprocessing.active_children()}


def check_workers_are_gone():
    """Killed, not asked: a decoder that hangs would not hear."""
    deadline = time.monotonic() + 20
    while children() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not children()


def check_named(error, dataset, code):
    assert isinstance(error, LostFile)
    assert isinstance(error, (VideoError, RuntimeError))
    assert error.exit_code == DataError.exit_code
    assert error.code == code
    row = dataset.manifest.rows[VICTIM]
    assert str(dataset.manifest.video(row)) in error.what
    assert "ogreg prepare" in error.fix


def read_once(root):
    """Import the decoders here, so that a worker's first file takes no longer than the others."""
    Bad(root, be_slow, victim=-1)[0, 0]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_crash_names_the_file(workers, demo_root):
    dataset = Bad(demo_root, crash)
    with pytest.raises(LostFile) as caught:
        list(batches(loader_of(dataset, workers)))
    check_named(caught.value, dataset, "crash")
    assert "SIGSEGV" in caught.value.what
    check_workers_are_gone()


def test_a_crash_is_named_while_the_main_process_computes(demo_root):
    """Torch raises from a signal handler then, far from the loader."""
    dataset = Bad(demo_root, crash_soon)
    order = BatchOrder(len(dataset), 7, 1)
    order.samples = lambda _: [0, VICTIM, *range(6, 20)]
    found = batches(train_loader(dataset, order, 1))
    next(found)
    with pytest.raises(LostFile) as caught:
        time.sleep(60)
    check_named(caught.value, dataset, "crash")
    # What is killed in the wake of it is not complained of again.
    check_workers_are_gone()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_hang_is_ended_and_names_the_file(workers, demo_root):
    read_once(demo_root)
    dataset = Bad(demo_root, hang)
    before = set(threading.enumerate())
    started = time.monotonic()
    with pytest.raises(LostFile, match=r"did not end within 2 s") as caught:
        list(batches(loader_of(dataset, workers, deadline=2.0)))
    check_named(caught.value, dataset, "time-out")
    assert time.monotonic() - started < 15
    check_workers_are_gone()
    assert "loader watch" not in {thread.name for thread in set(threading.enumerate()) - before}


def test_hangs_of_all_workers_name_all_files_and_doubt_the_disk(demo_root):
    dataset = Bad(demo_root, hang, victim=None)
    with pytest.raises(LostFile, match=r"mp4, .*mp4") as caught:
        list(batches(loader_of(dataset, deadline=0.5)))
    assert "disk" in caught.value.why


def test_a_test_video_that_hangs_is_named(demo_root):
    manifest = load_manifest(demo_root, "val")
    read_once(demo_root)
    dataset = BadViews(manifest, Views(SAMPLING, 1, TestCrops(32, 40)))
    with pytest.raises(LostFile) as caught:
        list(batches(test_loader(dataset, 2, 2, deadline=2.0)))
    assert str(manifest.video(manifest.rows[VICTIM])) in caught.value.what


class BadViews(ViewDataset):
    def __getitem__(self, index):
        with reading(index):
            if index == VICTIM:
                hang()
        return super().__getitem__(index)


def test_many_slow_files_are_no_hang(demo_root):
    """A batch takes longer than the deadline, none of its files does."""
    read_once(demo_root)
    order = BatchOrder(12, 7, 12)
    started = time.monotonic()
    (batch,) = batches(train_loader(Bad(demo_root, be_slow, None), order, 1, deadline=2.0))
    assert time.monotonic() - started > 3
    assert len(batch.labels) == 12


def test_a_busy_main_process_is_no_hang(demo_root):
    """The workers have filled their queues and wait, as during a validation."""
    read_once(demo_root)
    count = 0
    for _ in batches(loader_of(Bad(demo_root, be_slow, victim=-1), 1, batch=16, deadline=1.0)):
        time.sleep(2.5)
        count += 1
    assert count == 3


def very_slow():
    time.sleep(2.0)


def test_the_deadline_counts_only_while_a_batch_is_waited_for(demo_root):
    read_once(demo_root)
    dataset = Bad(demo_root, very_slow)
    order = BatchOrder(len(dataset), 7, 1)
    order.samples = lambda _: [0, VICTIM, 1, 2]
    order.batches_per_epoch = 4
    count = 0
    for _ in batches(train_loader(dataset, order, 1, deadline=1.0)):
        time.sleep(3.0 if count == 0 else 0)
        count += 1
    assert count == 4
    with pytest.raises(LostFile):
        list(batches(train_loader(dataset, order, 1, deadline=1.0)))
    assert len(list(batches(train_loader(dataset, order, 1, deadline=0)))) == 4


@pytest.mark.parametrize("context", ["spawn", "forkserver"])
def test_other_ways_to_start_workers(context, demo_root):
    dataset = Bad(demo_root, crash)
    loader = loader_of(dataset, 1)
    loader.multiprocessing_context = context
    with pytest.raises(LostFile) as caught:
        list(batches(loader))
    check_named(caught.value, dataset, "crash")


def load_for_ever(root, folder, context):
    loader = loader_of(Bad(root, be_slow, victim=None), 2)
    loader.multiprocessing_context = context
    for _ in batches(loader):
        workers = loader.dataset.board.processes().values()
        (folder / "workers").write_text(" ".join(map(str, workers)))
    time.sleep(600)


@pytest.mark.parametrize("context", ["fork", "forkserver"])
def test_workers_end_with_a_main_process_that_was_killed(context, demo_root, tmp_path):
    """Also those of a fork server, which lives as long as they do."""
    (process,), _ = ranks.start(1, load_for_ever, demo_root, tmp_path, context)
    file, deadline = tmp_path / "workers", time.monotonic() + 100
    try:
        workers = []
        while len(workers) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
            workers = [int(pid) for pid in file.read_text().split()] if file.exists() else []
        assert len(workers) == 2
        assert all(map(ranks.alive, workers))
    finally:
        process.kill()
        process.join()
    assert ranks.all_ended(workers)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_worker_that_others_end_does_not_blame_its_file(number, demo_root):
    """Still a RuntimeError: of a signal to all processes this may be heard of first."""
    loader = loader_of(Bad(demo_root, be_slow, victim=None), 2)
    found = batches(loader)
    next(found)
    victim = loader.dataset.board.processes()[1]
    subprocess.run(["kill", f"-{number.value}", str(victim)], check=True)
    with pytest.raises(LostWorker, match=number.name) as caught:
        list(found)
    assert isinstance(caught.value, RuntimeError)
    assert caught.value.exit_code == 4
    assert ("memory" in caught.value.why) == (number == signal.SIGKILL)


def test_a_resting_loader_that_loses_a_worker_is_no_bug(demo_root):
    resting = loader_of(Bad(demo_root, be_slow, victim=-1), 1)
    list(batches(resting))
    found = batches(loader_of(Bad(demo_root, be_slow, victim=None), 1, batch=1))
    next(found)
    os.kill(resting.dataset.board.processes()[0], signal.SIGKILL)
    with pytest.raises(LostWorker):
        list(found)


def test_errors_of_the_program_stay_what_they_are(demo_root):
    with pytest.raises(RuntimeError, match="a bug") as caught:
        list(batches(loader_of(Bad(demo_root, fail))))
    assert type(caught.value) is RuntimeError


def test_the_replacement_is_named_and_not_what_it_replaces(demo_root):
    """The row that is being read is published, not the one that was asked for."""

    class Replacing(Bad):
        def _read(self, epoch, index, number):
            if number != VICTIM and index == number:
                raise VideoError("broken")
            return super()._read(epoch, index, number)

    dataset = Replacing(demo_root, crash)
    with pytest.raises(LostFile) as caught:
        list(batches(loader_of(dataset, 1)))
    check_named(caught.value, dataset, "crash")


def test_without_workers_nothing_is_watched(demo_root):
    loader = loader_of(Bad(demo_root, be_slow, victim=-1), 0)
    for _ in batches(loader):
        assert "loader watch" not in {thread.name for thread in threading.enumerate()}
    assert loader.dataset.board is None


def test_passes_repeat_with_the_same_workers(demo_root):
    loader = loader_of(Bad(demo_root, be_slow, victim=-1), 2)
    assert len(list(batches(loader))) == 12
    processes = loader.dataset.board.processes()
    assert len(list(batches(loader))) == 12
    assert loader.dataset.board.processes() == processes
    assert not loader.dataset.board.open_rows()


def test_publishing_costs_microseconds(monkeypatch):
    board = Board(1)
    monkeypatch.setattr("ogreg_core.data.watchdog._place", None)
    publish_to(board, 0)
    started = time.perf_counter()
    for row in range(1000):
        with reading(row):
            pass
    assert (time.perf_counter() - started) / 1000 < 1e-3
    assert board.processes() == {0: os.getpid()}
    assert board.open_rows() == {}
    assert board.cells[0, 1] == 1000
