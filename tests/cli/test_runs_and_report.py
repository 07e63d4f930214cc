"""``ogreg runs`` and ``ogreg report`` from outside."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ogreg_cli import console
from ogreg_cli import report as report_command
from ogreg_cli import runs as runs_command
from ogreg_core.report import Cost
from tests.cli.test_errors import check
from tests.cli.test_start_up import PROBE
from tests.core.test_report import write_evaluation, write_training


@pytest.fixture
def some_runs(tmp_path):
    """Under ``runs``: two seeds, a killed run, a control, and things that are no runs."""
    base = tmp_path / "runs"
    write_training(base / "train" / "demo" / "1", 0, [50.0, 71.0, 70.0])
    write_training(base / "train" / "demo" / "2", 1, [50.0, 73.0])
    killed = write_training(
        base / "train" / "demo" / "3", 2, [5.0], state="failed", reason="the loss became nan"
    )
    with open(killed / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "epoch": 2, "step": 2}\n{"kind": "tra')
    write_evaluation(
        *(base / "eval" / "demo" / "1", base / "train" / "demo" / "1", 9.0),
        frame_order="shuffled",
    )
    (base / "data" / "demo" / "1").mkdir(parents=True)
    (base / "notes.txt").write_text("")
    return base


def test_runs_lists_every_run_newest_first(ogreg, some_runs):
    done = ogreg("runs")
    assert done.returncode == 0, done.stderr
    header, *lines = (line.split("\t") for line in done.stdout.splitlines())
    assert header == [
        *("run", "kind", "model", "state", "epoch", "best top-1", "last top-1", "videos"),
        *("data set", "when", "duration"),
    ]
    rows = [dict(zip(header, line, strict=True)) for line in lines]
    assert [row["run"] for row in rows] == [
        "runs/eval/demo/1",
        *(f"runs/train/demo/{n}" for n in (3, 2, 1)),
    ]
    evaluation, killed, _, first = rows
    assert (evaluation["kind"], evaluation["best top-1"]) == ("eval", "9.0 %")
    assert evaluation["data set"] == "demo/test, shuffled"
    assert evaluation["videos"] == "98 (98.0 %)"
    assert (killed["state"], killed["epoch"]) == ("failed", "2/4")
    assert (first["state"], first["epoch"]) == ("done", "3/4")
    assert (first["best top-1"], first["last top-1"]) == ("71.0 % (2)", "70.0 %")
    assert (first["videos"], first["kind"]) == ("128 (100.0 %)", "train")
    verbose = ogreg("-v", "runs")
    assert "runs/train/demo/3: failed; the loss became nan; continue: ogreg train" in verbose.stderr


def test_runs_as_json(ogreg, some_runs):
    document = json.loads(ogreg("runs", "--json", "--sort", "top1").stdout)
    assert document["schema"] == "ogreg.runs.v1"
    found = [(run["run"], run["best_top1_pct"], run["state"]) for run in document["runs"]]
    assert found == [
        ("runs/train/demo/2", 73.0, "done"),
        ("runs/train/demo/1", 71.0, "done"),
        ("runs/eval/demo/1", 9.0, "done"),
        ("runs/train/demo/3", 5.0, "failed"),
    ]
    assert document["runs"][0]["coverage_pct"] == 100.0
    assert document["runs"][3]["reason"] == "the loss became nan"


def test_runs_of_one_folder_and_of_none(ogreg, some_runs, tmp_path):
    done = ogreg("runs", some_runs / "eval")
    assert len(done.stdout.splitlines()) == 2
    done = ogreg("runs", tmp_path / "runs" / "data")
    assert done.returncode == 0
    assert "there are no runs" in done.stderr
    check(ogreg("runs", tmp_path / "nowhere"), 3, "not a folder")


def test_large_numbers_are_set_apart_by_spaces(tmp_path, ogreg):
    folder = tmp_path / "runs" / "eval" / "demo"
    write_evaluation(folder / "1", None, 9.0, videos=20000, annotated_videos=20005)
    write_evaluation(folder / "2", None, 9.0, videos=5, unreadable=[], annotated_videos=4)
    lines = ogreg("runs").stdout.splitlines()
    cells = [line.split("\t")[7] for line in lines[1:]]
    assert sorted(cells) == ["19 998 (99.9 %)", "5 (100.0 %)"]


def test_without_any_run_the_way_to_one_is_named(ogreg):
    done = ogreg("runs")
    assert done.returncode == 0
    assert "ogreg train recipes/demo.toml" in done.stderr
    assert json.loads(ogreg("runs", "--json").stdout) == {"schema": "ogreg.runs.v1", "runs": []}


def test_runs_says_how_many_more(ogreg, tmp_path):
    for number in range(23):
        write_training(tmp_path / "runs" / "train" / "demo" / f"{number}", number, [1.0])
    done = ogreg("runs")
    assert len(done.stdout.splitlines()) == 21
    assert "3 more: --all" in done.stderr
    assert len(ogreg("runs", "--all").stdout.splitlines()) == 24
    assert len(json.loads(ogreg("runs", "--json").stdout)["runs"]) == 23


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("columns", [60, 80, 120, 200])
def test_runs_fit_the_terminal(columns, some_runs, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.chdir(some_runs.parent)
    monkeypatch.setattr(sys, "stdout", Terminal())
    runs_command.runs(Path("runs"))
    lines = re.sub(r"\x1b\[[0-9;]*m", "", sys.stdout.getvalue()).splitlines()
    assert max(map(len, lines)) <= columns
    # Every run on one line: nothing is folded.
    assert sum("runs/" in line for line in lines) == sum("│" in line for line in lines) == 4
    assert ("no room for: " in capsys.readouterr().err) == (columns < 160)
    monkeypatch.setattr(console.settings, "verbose", True)
    monkeypatch.setattr(sys, "stdout", Terminal())
    runs_command.runs(Path("runs"))
    assert "no room" not in capsys.readouterr().err


@pytest.mark.slow
def test_report_on_stdout(ogreg, some_runs):
    done = ogreg("report", "runs/train/demo")
    assert done.returncode == 0, done.stderr
    assert "| 72.0 ± 1.4 <sup>a</sup> | 98.5 ± 0.7 |" in done.stdout
    assert "runs/train/demo/3 (failed): the loss became nan" in done.stdout


def test_report_in_files(some_runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ogreg_core.report._count", lambda *_key: Cost(1_674_432, 12_345_678))
    for name, words in (
        ("table.tex", r"72.0 $\pm$ 1.4$^{a}$"),
        ("table.md", "72.0 ± 1.4 <sup>a</sup>"),
        ("table.csv", "1.4142135623730951"),
        ("table.json", '"top1_deviation_pct": 1.4142135623730951'),
    ):
        report_command.report([Path("runs/train/demo")], out=Path(name))
        assert capsys.readouterr().out == f"{name}\n"
        assert words in Path(name).read_text(encoding="utf-8")


def test_report_as_json(some_runs, capsys):
    report_command.report([some_runs], json=True)
    text = capsys.readouterr().out
    document = json.loads(text)
    assert sorted(row["count"] for row in document["rows"]) == [1, 2]
    training = next(row for row in document["rows"] if row["split"] == "val")
    # ogreg-n for three classes, 8 x 32 x 32.
    assert training["params"] > 1_600_000
    assert 0 < training["gmacs_per_view"] < 0.1
    report_command.report([some_runs], format=report_command.Format.json)
    assert capsys.readouterr().out == text
    file = some_runs / "x.json"
    report_command.report([some_runs], json=True, out=file)
    assert capsys.readouterr().out == file.read_text() == text


@pytest.mark.parametrize("arguments", [["--format", "json"], ["--json"]], ids=" ".join)
def test_failures_are_one_document_too(arguments, ogreg):
    done = ogreg("report", "nowhere", *arguments)
    assert done.returncode == 3
    assert json.loads(done.stdout)["error"]["code"] == 3
    assert done.stderr.count("error:") == 1


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["nowhere"], 3, ["no such folder", "ogreg runs"]),
        (["file/x", "--out", "file/x.md"], 2, ["is a file, not a folder"]),
        (["."], 3, ["holds no run", "ogreg runs"]),
        ([".", "--out", "table.doc"], 2, ["table.doc", ".tex"]),
        ([".", "--out", "table.tex", "--format", "csv"], 2, ["csv and latex contradict"]),
        ([".", "--json", "--format", "csv"], 2, ["csv and json contradict"]),
        ([".", "--out", "nowhere/table.tex"], 2, ["mkdir -p nowhere"]),
        ([".", "--format", "html"], 2, ["html"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_report_refuses(arguments, code, words, ogreg, tmp_path):
    (tmp_path / "file").write_text("")
    done = ogreg("report", *arguments)
    # With --json the error stands on stdout too.
    check(done, code, *words)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_report_overwrites_nothing(ogreg, some_runs, tmp_path):
    (tmp_path / "table.md").write_text("mine")
    check(ogreg("report", "runs", "--out", "table.md"), 2, "exists")
    assert (tmp_path / "table.md").read_text() == "mine"


@pytest.mark.parametrize(
    "arguments",
    [
        *(["runs"], ["runs", "--json"], ["runs", "--help"], ["report", "--help"], ["report"]),
        ["report", "x", "--out", "y.doc"],
    ],
    ids=" ".join,
)
def test_neither_torch_nor_numpy_is_imported(arguments, some_runs, tmp_path):
    code = PROBE.format(arguments=arguments)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", ["runs", "report"])
def test_help_ends_with_examples(command, ogreg):
    done = ogreg(command, "--help")
    assert "Examples: ogreg" in done.stdout
    assert done.stderr == ""
