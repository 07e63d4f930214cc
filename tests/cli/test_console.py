"""Rendering: escaping, exit codes of foreign exceptions, and lines off a terminal."""

from __future__ import annotations

import errno
import io
import json
import math
import re
import sys
import time

import pytest
from rich.console import Console

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
    now = Clock(monkeypatch)
    with console.Reporter() as reporter:
        reporter(Note("hello [red]"))
        for step in range(1, 5):
            now.seconds += 20
            reporter(Progress("epoch 1/2", step, 4, FIGURES))
            reporter(Progress("training", step, 8))
        reporter(Progress("epochs", 1, 2, {"train_loss": 2.5, "top1": 50.0, "loss": 1.25}))
    first, second, *more, last = capsys.readouterr().err.splitlines()
    assert first == "hello [red]"
    assert second == (
        "epoch 1/2  2/4  loss 1.235  top-1 25.0 %  lr 1.00e-03  1,234.5 clips/s  2,048 MB  "
        "waiting 2 %  eta 0:00:40"
    )
    # The epoch has ended; what is still under way is the whole training.
    assert more == ["training  4/8  eta 0:01:20"]
    assert last == "epoch 1/2  train loss 2.500  top-1 50.0 %  val loss 1.250"


def test_lines_off_a_terminal_tell_the_end_of_the_whole_training_too(capsys, monkeypatch):
    now = Clock(monkeypatch)
    monkeypatch.setattr(console.settings, "verbose", True)
    with console.Reporter() as reporter:
        # Resumed in the middle: the 100 steps before are nobody's pace.
        for step in range(101, 104):
            now.seconds += 10
            reporter(Progress("training", step, 203))
            reporter(Progress("epoch 2/3", step - 100, 50))
            now.seconds += 1
        reporter(Progress("training", 104, 203))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "epoch 2/3  1/50"
    assert lines[1] == "epoch 2/3  2/50  eta 0:08:48  whole training eta 0:18:31"
    assert lines[2] == "epoch 2/3  3/50  eta 0:08:37  whole training eta 0:18:20"
    assert len(lines) == 3


def test_the_whole_training_alone_gets_lines(capsys, monkeypatch):
    now = Clock(monkeypatch)
    with console.Reporter() as reporter:
        for step in range(1, 4):
            now.seconds += 40
            reporter(Progress("training", step, 4))
    assert capsys.readouterr().err.splitlines()[-1] == "training  3/4  eta 0:00:40"


class Clock:
    """Time that passes when the test says so."""

    def __init__(self, monkeypatch):
        self.seconds = 1000.0
        monkeypatch.setattr("time.monotonic", lambda: self.seconds)


FIGURES = {
    "loss": 1.23456,
    "top1": 25.0,
    "lr": 1e-3,
    "clips_per_s": 1234.5,
    "memory_mb": 2048.0,
    "data_wait_pct": 1.6,
}
FIGURES_LINE = "loss 1.235  top-1 25.0 %  lr 1.00e-03  1,234.5 clips/s  2,048 MB  waiting 2 %"


def drawn(width: int, *events: Progress | Note, seconds: float = 0.4) -> str:
    """What a terminal of that width gets: the text with its control sequences."""
    stream = io.StringIO()
    screen = Console(file=stream, force_terminal=True, width=width, height=30)
    with console.Reporter(console=screen) as reporter:
        for event in events:
            reporter(event)
        time.sleep(seconds)
    return stream.getvalue()


def plain_lines(text: str) -> list[str]:
    """The lines without colours and cursor movements."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    return [line.rstrip() for line in re.split(r"[\r\n]+", text)]


UNDER_WAY = [
    Progress("training", 128, 12_288),
    Progress("epoch 1/32", 126, 384, {}),
    Progress("training", 130, 12_288),
    Progress("epoch 1/32", 128, 384, FIGURES),
]


@pytest.mark.parametrize("width", [24, 40, 80, 100, 160])
def test_live_view_never_passes_the_edge(width):
    lines = plain_lines(drawn(width, *UNDER_WAY))
    assert max(map(len, lines)) <= width
    if width >= 40:
        assert any(line.startswith("epoch 1/32") for line in lines)
    if width >= 80:
        rows = [line for line in lines if line.startswith("epoch 1/32")]
        assert re.fullmatch(r"epoch 1/32 +━+[╸╺━ ]* +128/384 +eta 0:00:0\d.*", rows[-1])
        assert any(re.match(r"training +.* 130/12,288 eta 0:0\d:\d\d", line) for line in lines)
    if width >= 80:
        names = [line.split()[0] for line in lines if line.startswith(("epoch", "training"))]
        assert names[-2:] == ["epoch", "training"], "the whole training stands below its parts"
    if width == 160:
        assert all(row.endswith(FIGURES_LINE) for row in rows[-1:])
    elif width >= 80:
        assert FIGURES_LINE in lines


def test_finished_epochs_and_notes_scroll_above_folded_between_figures():
    fields = {"train_loss": 1.0, "top1": 50.0, "top5": 90.0, "mean_class": 50.0, "loss": 0.9}
    text = drawn(60, *UNDER_WAY, Note("left [b]out"), Progress("epochs", 1, 32, fields))
    lines = plain_lines(text)
    assert "left [b]out" in lines
    at = lines.index("epoch 1/32  train loss 1.000  top-1 50.0 %  top-5 90.0 %")
    assert lines[at + 1] == "  mean class 50.0 %  val loss 0.900"


def test_live_view_does_not_flicker_and_leaves_nothing():
    text = drawn(80, *UNDER_WAY, *UNDER_WAY * 500, seconds=1.0)
    frames = text.count("epoch 1/32")
    assert 2 <= frames <= 6
    # The last frame is wiped, and the cursor is shown again.
    assert "\x1b[?25l" in text
    assert text.endswith("\x1b[2K\x1b[?25h\r")


def test_tasks_that_end_leave_the_view():
    text = drawn(80, Progress("validate", 1, 2), Progress("validate", 2, 2))
    assert "validate" not in text


def test_a_terminal_that_cannot_move_its_cursor_gets_lines(monkeypatch, capsys):
    monkeypatch.setenv("TERM", "dumb")
    assert "\x1b" not in drawn(80, *UNDER_WAY, seconds=0)
    assert "\x1b" not in capsys.readouterr().err


def test_other_processes_of_a_job_are_silent(capsys, monkeypatch):
    now = Clock(monkeypatch)
    with console.Reporter(silent=True) as reporter:
        reporter(Note("hello"))
        now.seconds += 100
        reporter(Progress("epoch 1/2", 1, 4, FIGURES))
        reporter(Progress("epochs", 1, 2, FIGURES))
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


def test_figures_that_are_not_numbers_are_left_out(capsys):
    with console.Reporter() as reporter:
        reporter(Progress("epochs", 1, 2, {"memory_mb": math.nan, "grad_norm": 1.5}))
    assert capsys.readouterr().err == "epoch 1/2  grad_norm 1.5\n"


def test_quiet_says_nothing_but_errors(capsys, monkeypatch):
    monkeypatch.setattr(console.settings, "quiet", True)
    console.info("hello")
    assert capsys.readouterr().err == ""
