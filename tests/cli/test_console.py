"""Rendering: escaping, exit codes of foreign exceptions, and lines off a terminal."""

from __future__ import annotations

import errno
import io
import json
import sys

import pytest

from ogreg_cli import console
from ogreg_core.errors import Interrupted
from ogreg_core.progress import Note, Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_names_are_never_read_as_markup(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Terminal())
    console.print_table("clip[/b].mp4", ["[red]"], [["[/x] 'q'"]])
    text = sys.stdout.getvalue()
    assert "clip[/b].mp4" in text
    assert "[/x] 'q'" in text


def test_off_a_terminal_tables_are_tab_separated_and_never_cut(capsys):
    long = "x" * 300
    console.print_table("title", ["a", "b"], [[long, "1"]])
    assert capsys.readouterr().out == f"a\tb\n{long}\t1\n"


def test_json_is_one_line_with_null_for_not_a_number(capsys):
    console.emit_json({"a": float("nan"), "b": [float("inf"), 1.5], "ü": "[x]"})
    out = capsys.readouterr().out
    assert json.loads(out) == {"a": None, "b": [None, 1.5], "ü": "[x]"}
    assert out.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "x"), 4),
        (OSError(errno.EROFS, "Read-only file system", "x"), 4),
        (PermissionError(errno.EACCES, "Permission denied", "x"), 4),
        (MemoryError(), 5),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"), 5),
        (KeyboardInterrupt(), 130),
        (Interrupted("x", signal_number=15), 143),
    ],
)
def test_exceptions_of_others_get_their_code(error, code):
    assert console.explain(error).exit_code == code


def test_bugs_are_owned_up_to(capsys):
    with pytest.raises(ZeroDivisionError) as caught:
        1 / 0  # noqa: B018 - raised for its traceback
    assert console.fail(caught.value) == 70
    assert "bug in ogreg" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("share", "text"), [(0, ""), (1, "█" * 24), (0.5, "█" * 12), (1 / 192, "▏")]
)
def test_bars(share, text):
    assert console.bar(share) == text


def test_progress_off_a_terminal_is_lines(capsys, monkeypatch):
    clock = iter(range(0, 10_000, 20))
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    with console.Reporter() as reporter:
        reporter(Note("hello [red]"))
        for step in range(1, 5):
            reporter(Progress("epoch 1/2", step, 4, {"loss": 1.23456, "lr": 1e-3}))
        reporter(Progress("epochs", 1, 2, {"top1": 50.0}))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "hello [red]"
    assert lines[-1] == "epoch 1/2  top1 50.0 %"
    assert any("loss 1.23  lr 1.00e-03" in line for line in lines[1:-1])
    assert not any("4/4" in line for line in lines)


def test_quiet_says_nothing_but_errors(capsys, monkeypatch):
    monkeypatch.setattr(console.settings, "quiet", True)
    console.info("hello")
    assert capsys.readouterr().err == ""
