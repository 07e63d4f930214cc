"""Locks against real processes."""

import multiprocessing
import sys
import time

import pytest

from ogreg_core.files import lock_file

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no such locks")


def test_a_lock_is_held_until_it_is_closed(tmp_path):
    path = tmp_path / "lock"
    held = lock_file(path)
    with pytest.raises(BlockingIOError):
        lock_file(path)
    held.close()
    lock_file(path).close()


def test_a_forked_child_that_outlives_its_parent_does_not_hold_the_lock(tmp_path):
    path = tmp_path / "lock"
    held = lock_file(path)
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    child.start()
    try:
        deadline = time.monotonic() + 10
        held.close()
        while True:
            try:
                lock_file(path).close()
                break
            except BlockingIOError:
                # Until the child has run its first line, it still has the file.
                assert time.monotonic() < deadline
                time.sleep(0.01)
        assert child.is_alive()
    finally:
        child.kill()
        child.join()
