"""An evaluation's document, its files, and the protocol that it names."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from datetime import datetime, timedelta, timezone

import pytest
import torch
from PIL import Image

from ogreg_core.data.loader import Views
from ogreg_core.data.manifest import load_manifest, write_dataset
from ogreg_core.data.sampling import ClipSampling
from ogreg_core.data.transforms import TestCrops
from ogreg_core.errors import DataError
from ogreg_core.evaluate_checkpoint import evaluate_checkpoint, open_evaluation, protocol
from ogreg_core.evaluation import Scores
from ogreg_core.evaluation_report import EvaluationReport
from ogreg_core.expectations import parse_expectation
from ogreg_core.progress import ignore_progress
from ogreg_core.runs import RunFolder
from ogreg_core.saved_scores import SavedScores, read_scores
from ogreg_core.statistics import wilson_interval
from tests.tiny import seven_videos, tiny_checkpoint


def evaluate(checkpoint, data=None, **options):
    options = {"clips": None, "crops": None, "control": "none", "batch_size": 3} | options
    return evaluate_checkpoint(
        checkpoint,
        data=data,
        split=None,
        workers=0,
        device=torch.device("cpu"),
        on_progress=ignore_progress,
        **options,
    )


@pytest.fixture
def report(demo_root, tmp_path) -> EvaluationReport:
    """Of seven videos, of which one is missing, out of nine annotated ones."""
    data = seven_videos(tmp_path / "seven", demo_root, missing=2, annotated=9)
    checkpoint = tiny_checkpoint(tmp_path / "a.safetensors", demo_root, seed=3)
    return evaluate(checkpoint, data, clips=2, crops=3)


@pytest.mark.parametrize(
    ("sampling", "crops", "control", "text"),
    [
        (("dense", 32, 2), (224, 224, 3), "none", "32x2, 4x3 views, short side 224"),
        (("dense", 16, 4, 30.0), (224, 256, 1), "none", "16x4 at 30 fps, 4x1 views, short side 256, crop 224"),
        (("dense", 8, 8, 0.0, "clamp"), (160, 160, 1), "none", "8x8 clamped, 4x1 views, short side 160"),
        (("uniform", 16), (64, 72, 1), "shuffled", "16 uniform, 4x1 views, short side 72, crop 64, frames shuffled"),
        (("uniform", 16), (64, 64, 1), "half", "16 uniform, 4x1 views, short side 64, at half rate (8 frames)"),
        (("dense", 32, 2), (224, 224, 3), "double", "32x2, 4x3 views, short side 224, at double rate (64 frames)"),
        (("uniform", 8), (64, 64, 1), "irregular", "8 uniform, 4x1 views, short side 64, at irregular rate (8 frames)"),
    ],
)  # fmt: skip
def test_protocol(sampling, crops, control, text):
    assert protocol(Views(ClipSampling(*sampling), 4, TestCrops(*crops), control)) == text


def test_document(report, tmp_path):
    document, metrics = report.document, report.metrics
    expected = {
        "schema": "ogreg.eval.v1",
        "model": "ogreg-n",
        "options": {"strides": [2, 1, 1, 1]},
        "recipe": "tiny",
        "seed": 3,
        "experiment_sha256": "34",
        "recipe_sha256": "12",
        "dataset": "seven",
        "split": "val",
        "protocol": "4 uniform, 2x3 views, short side 36, crop 32",
        "frames": 4,
        "size": 32,
        "clips": 2,
        "crops": 3,
        "frame_order": "none",
        "precision": "fp32",
        "role": "",
        "chosen_on": None,
        "classes": 16,
        "videos": 7,
        "scored_videos": 6,
        "annotated_videos": 9,
    }
    assert {key: document[key] for key in expected} == expected
    assert document["manifest_sha256"] == load_manifest(tmp_path / "seven", "val").sha256
    assert document["coverage_pct"] == pytest.approx(100 * 6 / 9)
    assert [video["path"] for video in document["unreadable"]] == ["missing.mp4"]
    assert document["summary"] == (
        f"top-1 {metrics.top1:.1f} (4 uniform, 2x3 views, short side 36, crop 32, 6 of 9 videos)"
    )
    for name in ("top1", "top5"):
        hits = round(getattr(metrics, name) * 7 / 100)
        low, high = wilson_interval(hits, 7)
        assert document[f"{name}_interval_pct"] == pytest.approx([100 * low, 100 * high])
    assert document["ece_pct"] == metrics.ece
    json.dumps(document, allow_nan=False)


def test_thousands_are_set_apart_by_spaces(report):
    scores = report.saved.found
    many = replace(
        scores,
        scores=scores.scores.repeat(200, 1),
        labels=scores.labels.repeat(200),
        indices=torch.arange(1200),
        unreadable=(),
    )
    saved = replace(
        report.saved, found=many, about={**report.saved.about, "annotated_videos": 19881}
    )
    summary = EvaluationReport.of(saved).document["summary"]
    assert summary.endswith("1 200 of 19 881 videos)")


def test_files(report, tmp_path):
    report.write(RunFolder(tmp_path))
    assert json.loads((tmp_path / "report.json").read_text()) == report.document
    with Image.open(tmp_path / "confusion.png") as picture:
        assert picture.format == "PNG"
    saved = read_scores(tmp_path)
    assert EvaluationReport.of(saved).document == report.document
    manifest = load_manifest(tmp_path / "seven", "val")
    with open(tmp_path / "scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == [row.path for row in manifest.rows]
    for number, row in enumerate(rows):
        assert row.pop("label") == manifest.labels[manifest.rows[number].label]
        if number == 2:
            assert {value for key, value in row.items() if key != "path"} == {""}
            continue
        scores = {name: float(row[f"score:{name}"]) for name in manifest.labels}
        assert sum(scores.values()) == pytest.approx(1, abs=1e-4)
        assert row["predicted"] == max(scores, key=scores.__getitem__)
        assert float(row["probability"]) == max(scores.values())
        order = sorted(scores.values(), reverse=True)
        own = scores[manifest.labels[manifest.rows[number].label]]
        assert order[int(row["rank"]) - 1] == own
    with open(tmp_path / "per_class.csv", newline="") as file:
        per_class = {row["class"]: row for row in csv.DictReader(file)}
    assert list(per_class) == list(manifest.labels)
    # Every fourth of two per class: the first of each second class, but for the last ones.
    videos = [int(row["videos"]) for row in per_class.values()]
    assert videos == [1, 0] * 7 + [0, 0]
    assert {row["top1_pct"] for row in per_class.values() if row["videos"] == "0"} == {""}


def test_a_manifest_with_more_rows_than_annotations_is_covered_once(report):
    saved = replace(report.saved, about={**report.saved.about, "annotated_videos": 4})
    document = EvaluationReport.of(saved).document
    assert document["coverage_pct"] == pytest.approx(100 * 6 / 7)
    assert document["summary"].endswith(" 6 of 7 videos)")
    assert document["annotated_videos"] == 4


def tables(videos, classes):
    """Random scores as an evaluation of as many classes as are asked for."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(videos, classes, generator=generator).softmax(1)
    targets = torch.arange(videos) % classes
    labels = tuple(f"class {number}" for number in range(classes))
    about = {
        **{"model": "m", "dataset": "d", "split": "val", "protocol": "p"},
        **{"annotated_videos": None, "manifest_sha256": "0"},
    }
    found = Scores(scores, targets, torch.arange(videos))
    return SavedScores(found, targets, labels, tuple(f"{n}.mp4" for n in range(videos)), about)


@pytest.mark.parametrize(("classes", "columns"), [(50, 5 + 50), (51, 5 + 2 * 5)])
def test_of_many_classes_the_table_lists_the_best(classes, columns, tmp_path):
    saved = tables(20, classes)
    saved.found.scores[3] = torch.nan
    EvaluationReport.of(saved).write(RunFolder(tmp_path))
    with open(tmp_path / "scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {len(row) for row in rows} == {columns}
    if classes > 50:
        assert set(list(rows[3].values())[2:]) == {""}
        for number in (0, 19):
            best = sorted(range(classes), key=lambda c: -float(saved.found.scores[number, c]))[:5]
            listed = [rows[number][f"class_{place}"] for place in range(1, 6)]
            assert listed == [saved.labels[c] for c in best]
            shares = [float(rows[number][f"score_{place}"]) for place in range(1, 6)]
            assert shares == pytest.approx(saved.found.scores[number, best].tolist(), abs=1e-6)
            assert rows[number]["predicted"] == listed[0]
            assert rows[number]["probability"] == rows[number]["score_1"]


@pytest.mark.parametrize("classes", [5, 6])
def test_top5_of_five_classes_says_nothing(classes):
    report = EvaluationReport.of(tables(20, classes))
    assert (report.document["top5_pct"] is None) == (classes == 5)
    assert (report.document["top5_interval_pct"] is None) == (classes == 5)
    report = report.expecting([parse_expectation("top5>=10")])
    assert len(report.missed_expectations()) == (classes == 5)


def test_the_time_is_noted_in_utc(report):
    moment = datetime(2026, 3, 1, 1, 30, tzinfo=timezone(timedelta(hours=2)))
    assert report.finished(moment).document["finished"] == "2026-02-28T23:30:00+00:00"
    now = datetime.fromisoformat(report.finished().document["finished"])
    assert abs((datetime.now(timezone.utc) - now).total_seconds()) < 60


def test_scores_are_written_first(report, tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space")

    monkeypatch.setattr("ogreg_core.evaluation_report._write_csv", full)
    with pytest.raises(OSError, match="no space"):
        report.write(RunFolder(tmp_path))
    assert EvaluationReport.of(read_scores(tmp_path)).document == report.document


def test_the_picture_says_how_many_videos_it_lacks(report, tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr(
        "ogreg_core.evaluation_report.save_confusion",
        lambda path, matrix, labels, title: titles.append(title),
    )
    report.write(RunFolder(tmp_path))
    assert titles[0].endswith("\n1 unreadable not shown")


@pytest.mark.parametrize(
    ("role", "validations", "chosen"),
    [
        ("best", 4, {"validations": 4, "or_more": True}),
        ("best", 0, {"validations": None, "or_more": True}),
        ("last", 4, {"validations": 0, "or_more": False}),
        ("", 0, None),
    ],
)
def test_how_the_checkpoint_was_chosen_is_written_down(
    role, validations, chosen, demo_root, tmp_path
):
    """From the file itself: it may have been moved and renamed."""
    path = tiny_checkpoint(
        tmp_path / "renamed.safetensors", demo_root, role=role, validations=validations
    )
    about = open_evaluation(
        path,
        data=demo_root,
        split=None,
        clips=None,
        crops=None,
        control="none",
        device=torch.device("cpu"),
    ).about()
    assert about["role"] == role
    assert about["chosen_on"] == (chosen and {"dataset": "demo", "split": "val", **chosen})


def test_the_run_folder_knows_of_later_validations(demo_root, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    lines = [{"kind": "val", "epoch": n, "step": n, "top1": 5.0} for n in range(1, 7)]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    path = tmp_path / "checkpoints" / "best.safetensors"
    # Of a version that wrote no role: in its run folder the name tells it.
    for changes in ({"role": "best", "validations": 4}, {}):
        tiny_checkpoint(path, demo_root, **changes)
        document = evaluate(path, seven_videos(tmp_path / f"d{len(changes)}", demo_root)).document
        assert document["role"] == "best"
        assert document["chosen_on"]["validations"] == 6
        assert document["chosen_on"]["or_more"] is False


def test_a_split_that_is_not_there_names_one_that_is(demo_root, tmp_path):
    path = tiny_checkpoint(tmp_path / "a.safetensors", demo_root)
    with pytest.raises(DataError, match="no split 'test'") as caught:
        open_evaluation(
            path,
            data=demo_root,
            split="test",
            clips=None,
            crops=None,
            control="none",
            device=torch.device("cpu"),
        )
    assert caught.value.fix == "--split train"


def test_class_names_cannot_take_the_place_of_columns(demo_root, tmp_path):
    """Classes named like the table's own columns keep columns of their own."""
    manifest = load_manifest(demo_root, "val")
    labels = ["path", "label", "predicted", "rank", *manifest.labels[4:]]
    write_dataset(
        tmp_path / "odd",
        dataset="odd",
        video_root=manifest.root,
        labels=labels,
        splits={"val": list(manifest.rows[:2])},
        version="0",
    )
    checkpoint = tiny_checkpoint(tmp_path / "a.safetensors", tmp_path / "odd")
    evaluate(checkpoint).write(RunFolder(tmp_path))
    with open(tmp_path / "scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == [row.path for row in manifest.rows[:2]]
    assert float(rows[0]["score:path"]) + float(rows[0]["score:rank"]) < 1.1
    assert len(rows[0]) == 5 + len(labels)


def test_expectations(report):
    assert report.expecting([]) is report
    top5 = report.metrics.top5
    texts = [f"top5={top5:.2f}+-0.1", f"top1<={report.metrics.top1 + 1.5:.1f}", "mean_class>=99.9"]
    found = report.expecting([parse_expectation(text) for text in texts])
    assert [item["met"] for item in found.document["expectations"]] == [True, True, False]
    assert found.document["expectations"][0]["reached_pct"] == top5
    (sentence,) = found.missed_expectations()
    assert sentence == f"expected mean_class>=99.9, reached {report.metrics.mean_class:.2f}"
    assert "expectations" not in report.document


def test_what_is_no_number_is_null(report, tmp_path):
    found = report.saved.found
    broken = replace(found, scores=torch.full_like(found.scores, torch.nan))
    result = EvaluationReport.of(replace(report.saved, found=broken))
    result = result.expecting([parse_expectation("ece<=100")])
    assert result.document["loss"] is result.document["ece_pct"] is None
    assert result.document["top1_pct"] == 0
    assert result.missed_expectations() == ["expected ece<=100, reached no number"]
    json.dumps(result.document, allow_nan=False)
    result.write(RunFolder(tmp_path))
    with open(tmp_path / "scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["predicted"] for row in rows} == {""}
    assert rows[0]["score:" + report.saved.labels[0]] == "nan"
