"""``ogreg compare`` and ``ogreg fuse`` on the scores of two evaluations."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from ogreg_core.data.loader import Unreadable
from ogreg_core.evaluation import Scores
from ogreg_core.evaluation_report import EvaluationReport
from ogreg_core.runs import RunFolder
from ogreg_core.saved_scores import SavedScores, fuse, read_scores
from tests.cli.test_errors import check
from tests.cli.test_start_up import PROBE

VIDEOS, CLASSES = 90, 5


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
    done = ogreg("compare", "a", "b/scores.safetensors", "--json", "--out", "x/changed.csv")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["schema"] == "ogreg.compare.v1"
    assert (document["videos"], document["left_out_videos"]) == (89, 1)
    right = []
    for saved in pair:
        hits = saved.found.scores.argmax(1) == saved.found.labels
        right.append(dict(zip(saved.found.indices.tolist(), hits.tolist(), strict=True)))
    both = [row for row in range(VIDEOS) if row != 7]
    only_a = [row for row in both if right[0][row] and not right[1][row]]
    only_b = [row for row in both if right[1][row] and not right[0][row]]
    assert (document["only_a"], document["only_b"]) == (len(only_a), len(only_b))
    assert document["both_right"] == sum(right[0][row] and right[1][row] for row in both)
    assert sum(document[k] for k in ("only_a", "only_b", "both_right", "both_wrong")) == 89
    assert document["a"]["top1_pct"] == pytest.approx(100 * sum(right[0][r] for r in both) / 89)
    difference = 100 * (len(only_b) - len(only_a)) / 89
    assert document["difference_pct"] == pytest.approx(difference)
    assert 0 < document["p_value"] < 0.05
    with open(tmp_path / "x/changed.csv", newline="") as file:
        changed = list(csv.DictReader(file))
    assert [row["path"] for row in changed] == [f"v{row}.mp4" for row in sorted(only_a + only_b)]
    assert [row["right"] for row in changed].count("a") == len(only_a)
    for row, item in zip(changed, document["changed"], strict=True):
        assert (row[row["right"]], row["label"]) == (item["label"], item["label"])
        assert float(row["b_probability"]) == pytest.approx(item["b_probability"], abs=1e-6)


def test_compare_for_a_person(pair, ogreg, tmp_path):
    done = ogreg("compare", "a", "b")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[1].startswith("A\ta\togreg-n\t16 uniform, 1x1 views, short side 72\t")
    assert lines[3].startswith("B - A: +")
    assert ", p = " in lines[3]
    assert lines[4].startswith("both right ")
    # The list is bounded; all of it comes with -v.
    assert len(lines) == 5 + 1 + 20
    assert "class [" in lines[7]
    assert "more: --out FILE.csv, or ogreg -v compare" in done.stderr
    assert "videos left out, not scored by both: 1" in done.stderr
    everything = ogreg("-v", "compare", "a", "b").stdout.splitlines()
    assert len(everything) > len(lines)
    assert everything[: len(lines)] == lines
    same = ogreg("compare", "a", "a")
    assert same.stdout.splitlines()[3] == "B - A: +0.00 points, p = 1"
    assert len(same.stdout.splitlines()) == 5


@pytest.mark.slow
def test_what_cannot_be_paired_is_refused(pair, ogreg, tmp_path):
    evaluation(tmp_path / "c", 1, manifest="ef" * 32)
    changed = replace(pair[0], labels=tuple("vwxyz"))
    (tmp_path / "d").mkdir()
    changed.write(tmp_path / "d/scores.safetensors")
    for command in ("compare", "fuse"):
        done = ogreg(command, "a", "c")
        check(done, 3, "c was scored on other manifest rows than a", "efefefefefef")
    check(
        ogreg("compare", "a", "d"), 3, "other classes", "class 0 is 'class [0]' in a and 'v' in d"
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
    assert document == EvaluationReport.of(expected).document
    assert [part["weight"] for part in document["fused"]] == pytest.approx([1 / 3, 2 / 3])
    assert document["summary"].startswith(
        f"top-1 {document['top1_pct']:.1f} (fusion of 2, 16 uniform"
    )
    files = {"report.json", "scores.safetensors", "scores.csv", "per_class.csv", "confusion.png"}
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
