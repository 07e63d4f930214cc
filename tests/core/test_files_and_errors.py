from __future__ import annotations

import errno
import pickle

import pytest

from ogreg_core.errors import (
    CheckpointError,
    DataError,
    EnvironmentFault,
    Interrupted,
    OgregError,
    OutOfMemory,
    UsageError,
    VideoError,
    WorkFailed,
)
from ogreg_core.files import write_atomic, write_text_atomic


def test_atomic_writing_replaces_or_leaves_alone(tmp_path):
    target = tmp_path / "file.txt"
    write_text_atomic(target, "first")
    assert target.stat().st_mode & 0o777 in (0o644, 0o664, 0o600, 0o666)

    def fails(path):
        path.write_text("half")
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_atomic(target, fails)
    assert target.read_text() == "first"
    write_text_atomic(target, "ünï")
    assert target.read_text(encoding="utf-8") == "ünï"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]


def test_a_full_disk_is_called_so(tmp_path, monkeypatch):
    class Usage:
        free = 0

    monkeypatch.setattr("shutil.disk_usage", lambda _path: Usage)

    def fails(_path):
        raise RuntimeError("unexpected pos 704 vs 598")

    with pytest.raises(OSError, match="No space left") as caught:
        write_atomic(tmp_path / "x", fails)
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (OgregError, 1),
        (WorkFailed, 1),
        (UsageError, 2),
        (DataError, 3),
        (VideoError, 3),
        (CheckpointError, 3),
        (EnvironmentFault, 4),
        (OutOfMemory, 5),
    ],
)
def test_exit_codes_are_those_of_the_readme(kind, code):
    assert kind("what").exit_code == code


def test_errors_survive_the_way_out_of_a_worker_process():
    error = VideoError("a", code="empty", where="b", why="c", fix="d")
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.what, copy.code, copy.where, copy.why, copy.fix) == ("a", "empty", "b", "c", "d")
    copy = pickle.loads(pickle.dumps(UsageError("a", fix="d")))
    assert isinstance(copy, UsageError)
    assert str(copy) == "a; fix: d"


def test_interruptions_carry_the_signal():
    assert Interrupted("x", signal_number=2).exit_code == 130
    assert Interrupted("x", signal_number=15).exit_code == 143
