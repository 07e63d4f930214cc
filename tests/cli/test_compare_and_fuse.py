"""``ogreg compare`` and ``ogreg fuse`` on the scores of two evaluations."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from ogreg_cli.common import check_new_file
from ogreg_cli.compare import _p
from ogreg_core.data.loader import Unreadable
from ogreg_core.errors import EnvironmentFault
from ogreg_core.evaluation import Scores
from ogreg_core.evaluation_report import EvaluationReport
from ogreg_core.runs import RunFolder
from ogreg_core.saved_scores import SavedScores, fuse, read_scores
from ogreg_core.statistics import paired_difference_interval
from tests.cli.test_errors import check
from tests.cli.test_start_up import PROBE

VIDEOS, CLASSES = 90, 6


def evaluation(folder, seed, manifest="ab" * 32, missing=()):
    """A folder as `ogreg eval` writes it."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(VIDEOS) % CLASSES
    logits = torch.randn(VIDEOS, CLASSES, generator=generator)
    logits[torch.arange(VIDEOS), targets] += 0.3 + seed
    rows = torch.tensor([row for row in range(VIDEOS) if row not in missing])
    found = Scores(
        logits.softmax(1)[rows],
        targets[rows],
        rows,
        tuple(Unreadable(row, f"v{row}.mp4", "broken") for row in missing),
    )
    about = {
        "checkpoint": f"{seed}.safetensors",
        "model": "ogreg-n",
        "recipe": "tiny",
        "seed": seed,
        "dataset": "demo",
        "split": "val",
        "manifest_sha256": manifest,
        "annotated_videos": None,
        "protocol": "16 uniform, 1x1 views, short side 72",
    }
    labels = tuple(f"class [{number}]" for number in range(CLASSES))
    paths = tuple(f"v{row}.mp4" for row in range(VIDEOS))
    saved = SavedScores(found, targets, labels, paths, about)
    folder.mkdir()
    EvaluationReport.of(saved).write(RunFolder(folder))
    return saved


@pytest.fixture
def pair(tmp_path):
    return evaluation(tmp_path / "a", 0), evaluation(tmp_path / "b", 1, missing=(7,))


def test_compare(pair, ogreg, tmp_path):
    done = ogreg("compare", "a", "b/scores.safetensors", "--json", "--out", "changed.csv")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["schema"] == "ogreg.compare.v1"
    assert document["videos"] == 90
    assert [document[side]["unreadable_videos"] for side in "ab"] == [0, 1]
    right = []
    for saved in pair:
        hits = saved.found.scores.argmax(1) == saved.found.labels
        right.append(dict(zip(saved.found.indices.tolist(), hits.tolist(), strict=True)))
    # What B could not read is wrong there.
    right[1][7] = False
    both = range(VIDEOS)
    only_a = [row for row in both if right[0][row] and not right[1][row]]
    only_b = [row for row in both if right[1][row] and not right[0][row]]
    assert (document["only_a"], document["only_b"]) == (len(only_a), len(only_b))
    assert document["both_right"] == sum(right[0][row] and right[1][row] for row in both)
    assert sum(document[k] for k in ("only_a", "only_b", "both_right", "both_wrong")) == 90
    for side, name in enumerate("ab"):
        report = json.loads((tmp_path / name / "report.json").read_text())
        assert document[name]["top1_pct"] == pytest.approx(report["top1_pct"])
        assert report["top1_pct"] == pytest.approx(100 * sum(right[side][r] for r in both) / 90)
    difference = 100 * (len(only_b) - len(only_a)) / 90
    assert document["difference_pct"] == pytest.approx(difference)
    interval = paired_difference_interval(len(only_a), len(only_b), 90)
    assert document["difference_interval_pct"] == pytest.approx([100 * x for x in interval])
    assert 0 < document["p_value"] < 0.05
    with open(tmp_path / "changed.csv", newline="") as file:
        changed = list(csv.DictReader(file))
    assert [row["path"] for row in changed] == [f"v{row}.mp4" for row in sorted(only_a + only_b)]
    assert [row["right"] for row in changed].count("a") == len(only_a)
    for row, item in zip(changed, document["changed"], strict=True):
        assert (row[row["right"]], row["label"]) == (item["label"], item["label"])
        if item["path"] == "v7.mp4":
            assert (row["b"], row["b_probability"], item["b_probability"]) == ("", "", None)
            continue
        assert float(row["b_probability"]) == pytest.approx(item["b_probability"], abs=1e-6)


def test_compare_for_a_person(pair, ogreg, tmp_path):
    done = ogreg("compare", "a", "b")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[1].startswith("A\ta\togreg-n\t16 uniform, 1x1 views, short side 72\t")
    assert lines[3].startswith("B - A: +")
    assert re.search(r" points, 95 % interval [+-][\d.]+ to \+[\d.]+, p = ", lines[3])
    assert lines[4].startswith("both right ")
    # The list is bounded; all of it comes with -v.
    assert len(lines) == 5 + 1 + 20
    assert "class [" in lines[7]
    assert "more: --out FILE.csv, or ogreg -v compare" in done.stderr
    assert "unreadable, counted as wrong: 0, 1 (A, B)" in done.stderr
    everything = ogreg("-v", "compare", "a", "b").stdout.splitlines()
    assert len(everything) > len(lines)
    assert everything[: len(lines)] == lines
    same = ogreg("compare", "a", "a")
    assert same.stdout.splitlines()[3].startswith("B - A: +0.00 points, 95 % interval -")
    assert same.stdout.splitlines()[3].endswith(", p = 1")
    assert len(same.stdout.splitlines()) == 5


def test_a_vanishing_probability_is_bounded():
    assert _p(0.0) == _p(1e-301) == "p < 1e-300"
    assert _p(0.0123) == "p = 0.012"


@pytest.mark.parametrize(
    ("out", "code", "words"),
    [
        ("file/x.csv", 2, "file is a file, not a folder"),
        ("no/x.csv", 2, "mkdir -p no"),
        ("file", 2, "exists already"),
    ],
)
@pytest.mark.parametrize("command", [["compare", "a", "b"], ["report", "a"]], ids=lambda c: c[0])
def test_a_file_that_cannot_be_written_is_told_at_once(command, out, code, words, tmp_path):
    """Before torch, with nothing read."""
    (tmp_path / "file").write_text("")
    if command[0] == "report":
        command = [*command, "--format", "csv"] if out == "file" else command
        out = out if out.endswith(".csv") else "file"
        if out == "file":
            (tmp_path / "file.csv").write_text("")
            out = "file.csv"
    code_text = PROBE.format(arguments=[*command, "--out", out])
    code_text = code_text.replace(
        "except SystemExit:\n    pass", "except SystemExit as e:\n    print(e.code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code_text], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(code)]
    assert words in done.stderr


def test_a_folder_where_nothing_may_be_written_is_told_at_once(tmp_path, monkeypatch):
    check_new_file(tmp_path / "x.csv")
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(EnvironmentFault, match="no permission"):
        check_new_file(tmp_path / "x.csv")


@pytest.mark.slow
def test_what_cannot_be_paired_is_refused(pair, ogreg, tmp_path):
    evaluation(tmp_path / "c", 1, manifest="ef" * 32)
    changed = replace(pair[0], labels=tuple("uvwxyz"))
    (tmp_path / "d").mkdir()
    changed.write(tmp_path / "d/scores.safetensors")
    for command in ("compare", "fuse"):
        done = ogreg(command, "a", "c")
        check(done, 3, "c was scored on other manifest rows than a", "efefefefefef")
    check(
        ogreg("compare", "a", "d"), 3, "other classes", "class 0 is 'class [0]' in a and 'u' in d"
    )
    check(ogreg("fuse", "a", "nowhere"), 3, "nowhere holds no scores")
    (tmp_path / "mine.csv").write_text("precious")
    check(ogreg("compare", "a", "b", "--out", "mine.csv"), 2, "exists already")
    assert (tmp_path / "mine.csv").read_text() == "precious"
    assert not (tmp_path / "runs").exists()


def test_fuse(pair, ogreg, tmp_path):
    done = ogreg("fuse", "a", "b", "--weights", "1,2", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    folder = tmp_path / document.pop("report_folder")
    assert folder == tmp_path / "runs/fuse/demo/1"
    assert document == json.loads((folder / "report.json").read_text())
    expected, partly = fuse(pair, [1 / 3, 2 / 3], ["a", "b"])
    assert partly == 1
    assert "videos with a score in some of the evaluations only, which is taken: 1" in done.stderr
    fused = read_scores(folder)
    torch.testing.assert_close(fused.found.scores, expected.found.scores)
    assert document.pop("finished").endswith("+00:00")
    assert document == EvaluationReport.of(expected).document
    assert [part["weight"] for part in document["fused"]] == pytest.approx([1 / 3, 2 / 3])
    assert document["summary"].startswith(
        f"top-1 {document['top1_pct']:.1f} (fusion of 2, 16 uniform"
    )
    files = {"report.json", "scores.safetensors", "scores.csv", "per_class.csv", "confusion.png"}
    files |= {"status.json", "env.json", "command.txt", "data.json"}
    assert json.loads((folder / "status.json").read_text())["state"] == "done"
    assert "--weights 1,2" in (folder / "command.txt").read_text()
    assert json.loads((folder / "data.json").read_text())["command"] == "fuse"
    assert {path.name for path in folder.iterdir()} == files
    # A fusion can be compared like any evaluation.
    done = ogreg("fuse", "a", "b", "--out", "equal")
    assert done.stdout.splitlines()[0].startswith("top-1 ")
    assert json.loads(ogreg("compare", "a", "equal", "--json").stdout)["videos"] == 90


@pytest.mark.parametrize("weights", ["1", "1,2,3", "1,x", "0,0", "1,-1", "1,nan", "inf,1", ""])
def test_weights_that_do_not_fit(weights, tmp_path):
    code = PROBE.format(arguments=["fuse", "a", "b", "--weights", weights])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert f"--weights {weights!r} does not fit 2 evaluations" in done.stderr
    assert "--weights 1,1" in done.stderr


@pytest.mark.parametrize("arguments", [["compare", "--help"], ["fuse", "--help"], ["fuse", "a"]])
def test_nothing_heavy_for_help_and_usage(arguments, tmp_path):
    code = PROBE.format(arguments=arguments)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "Examples: ogreg" in done.stdout or "at least two evaluations" in done.stderr
