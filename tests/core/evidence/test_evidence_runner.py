"""Running a study: equal terms, nothing trained twice, nothing lost."""

from __future__ import annotations

import os
import signal
from dataclasses import replace

import pytest
import torch

from ogreg_core.data.manifest import load_manifest, write_dataset
from ogreg_core.errors import DataError, EnvironmentFault, Interrupted, UsageError
from ogreg_core.evaluate_checkpoint import evaluate_checkpoint
from ogreg_core.evidence import runner, training
from ogreg_core.evidence.report import summary_of, write_report
from ogreg_core.evidence.results import read_results
from ogreg_core.evidence.runner import DataSet, Plan, run_study
from ogreg_core.evidence.study import load_study
from ogreg_core.evidence.training import Means
from ogreg_core.files import lock_file
from ogreg_core.processes import Lost
from ogreg_core.progress import Note, ignore_progress
from ogreg_core.training.step import TrainStep

HERE = Means("cpu", 0, 1, 0)
RECIPE = """
[data]
frames = 4
size = 32
short_side = 32
[train]
batch_size = 8
[model]
name = "ogreg-n"
options = { strides = [2, 1, 1, 1] }
"""
STUDY = """
title = "Two stems"
recipe = "shared.toml"
clips = 16
seeds = [0]
reference = "conv"
[tuning]
lrs = [1e-3, 2e-3]
clips = 8
held_out = 0.34
[[rows]]
name = "conv"
[[rows]]
name = "patch"
changes = ["model.options.stem=patch"]
[[rows]]
name = "flat"
changes = ["model.options.gaze=2d"]
lr_of = "conv"
"""


def four_classes(folder, source, classes=4):
    """A data set of the first classes of another one; of four: 12 videos to train on, 8 to test."""
    manifests = {split: load_manifest(source, split) for split in ("train", "val")}
    train = manifests["train"]
    write_dataset(
        folder,
        dataset="four",
        video_root=train.root,
        labels=train.labels[:classes],
        splits={name: [r for r in m.rows if r.label < classes] for name, m in manifests.items()},
        version="0",
    )
    return folder


@pytest.fixture
def plan_in(tmp_path, demo_root):
    four_classes(tmp_path / "four", demo_root)
    (tmp_path / "shared.toml").write_text(RECIPE)
    (tmp_path / "stems.toml").write_text(STUDY)
    _, recipe, study = load_study(str(tmp_path / "stems.toml"))

    def plan(out, rows=(), seeds=()):
        return Plan(study, recipe, [DataSet.open(tmp_path / "four")], tmp_path / out, rows, seeds)

    return plan


def run(plan, retry=False, on_progress=ignore_progress):
    run_study(plan, HERE, retry=retry, command="ogreg evidence", on_progress=on_progress)
    return read_results(plan.results_file)


def learnt(result):
    """What must be the same however often the training was interrupted."""
    return replace(result, seconds=0.0, made={})


def test_every_row_gets_the_same_budget_and_the_rate_that_did_best_on_held_out_videos(
    plan_in, tmp_path
):
    plan = plan_in("out")
    results = run(plan)
    tuning = [result for result in results if result.dataset == "four-tuning"]
    tests = [result for result in results if result.dataset == "four"]
    assert len(tuning) == 4  # two rows choose, of two rates
    assert len(tests) == 3
    assert {result.clips for result in tests} == {16}
    assert all(result.is_done and result.params and result.gmacs for result in results)
    assert all(len(bits) == 8 for result in tests for bits in result.right.values())
    assert not any("data.root" in change for result in results for change in result.changes)

    ended = plan.results()
    for row in plan.rows:
        choice = plan.tuned(row, plan.data[0], ended)
        tried = {lr: (r.top1(), -r.loss) for lr, r in choice.tried.items()}
        assert choice.lr == max(tried, key=lambda lr: tried[lr])
    flat, conv = (
        plan.test_job(plan.study.row(n), plan.data[0], 0, ended) for n in ("flat", "conv")
    )
    assert ended[flat.identity].lr == ended[conv.identity].lr

    found = evaluate_checkpoint(
        conv.folder / "checkpoints" / "last.safetensors",
        data=tmp_path / "four",
        split="val",
        clips=1,
        crops=1,
        control="shuffled",
        batch_size=5,
        workers=0,
        device=torch.device("cpu"),
        on_progress=ignore_progress,
    )
    assert found.metrics.top1 == pytest.approx(ended[conv.identity].top1("shuffled"))

    before = plan.results_file.read_bytes()
    run(plan)
    assert plan.results_file.read_bytes() == before

    summary = summary_of("stems", plan)
    files = write_report(summary, tmp_path / "report", "stems", "ogreg evidence stems")
    assert [file.name for file in files] == ["stems.md", "stems.json", "stems.png"]
    text = files[0].read_text()
    assert plan.data[0].val.sha256[:12] in text
    assert "ogreg evidence stems" in text


def test_the_search_goes_on_while_the_best_rate_lies_at_an_end(plan_in, monkeypatch):
    """Of 12, the rate 4e-3 is the best; the scores of what is not trained here are made up."""
    plan = plan_in("out", ["conv", "patch", "flat"])
    tuning = plan.study.tuning.model_copy(
        update={"lrs": [5e-4, 1e-3, 2e-3, 4e-3, 8e-3], "first": [1e-3, 2e-3]}
    )
    plan.study = plan.study.model_copy(update={"tuning": tuning})
    right = {5e-4: 3, 1e-3: 2, 2e-3: 7, 4e-3: 9, 8e-3: 1}
    trained = []

    def scored(job, means):
        lr = job.loaded.recipe.train.lr
        trained.append((job.row, lr, job.dataset))
        bits = (
            "1" * right[lr] + "0" * (12 - right[lr]) if job.dataset == "four-tuning" else "10" * 4
        )
        scores = dict.fromkeys(["none", *job.controls], bits)
        return replace(job.failed(""), status="done", right=scores)

    monkeypatch.setattr(runner, "run_job", scored)
    run(plan)
    for row in ("conv", "patch"):
        rates = [lr for name, lr, data in trained if (name, data) == (row, "four-tuning")]
        assert rates == [1e-3, 2e-3, 4e-3, 8e-3]
    tests = [lr for _, lr, data in trained if data == "four"]
    assert tests == [4e-3] * 3
    count = len(trained)
    run(plan)
    assert len(trained) == count
    assert not any(item.is_blind for item in summary_of("stems", plan).tuned)

    # Five of 12 are no more than luck among four classes, which shows no way: the whole grid is tried.
    right |= {2e-3: 5, 4e-3: 5}
    plan.out = plan.out / "elsewhere"
    trained.clear()
    run(plan)
    for row in ("conv", "patch"):
        rates = [lr for name, lr, data in trained if (name, data) == (row, "four-tuning")]
        assert rates == [1e-3, 2e-3, 5e-4, 4e-3, 8e-3]
    assert {item.row for item in summary_of("stems", plan).tuned if item.is_blind} == {
        *("conv", "patch", "flat")
    }


def test_what_was_interrupted_goes_on_to_the_same_end(plan_in, monkeypatch):
    whole = [learnt(result) for result in run(plan_in("whole", ["conv"], [0]))]
    plan = plan_in("parts", ["conv"], [0])

    def stop_after_one(event):
        if isinstance(event, Note):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted) as caught:
        run(plan, on_progress=stop_after_one)
    assert "goes on" in caught.value.fix
    assert len(read_results(plan.results_file)) == 1

    step = TrainStep.__call__

    def signalled(self, parts, epoch, number):
        """In the second epoch of the training that counts."""
        if (epoch, number) == (1, 0):
            monkeypatch.setattr(TrainStep, "__call__", step)
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, parts, epoch, number)

    monkeypatch.setattr(TrainStep, "__call__", signalled)
    with pytest.raises(Interrupted) as caught:
        run(plan)
    assert "goes on" in caught.value.fix
    assert "ogreg train" not in caught.value.fix
    assert len(read_results(plan.results_file)) == 2
    assert [learnt(result) for result in run(plan)] == whole


def test_controls_that_are_missing_are_tested_without_training_again(plan_in, monkeypatch):
    plan = plan_in("out", ["conv"], [0])
    run(plan)
    plan.study = plan.study.model_copy(update={"controls": ["reversed"]})
    monkeypatch.setattr(training, "build_trainer", None)  # nobody needs it
    (*_, before, after) = run(plan)
    assert after.right.keys() == {"none", "shuffled", "middle", "reversed"}
    assert replace(after, right=before.right) == before
    assert len(run(plan)) == 4


def test_what_is_no_fault_of_a_row_ends_the_study_and_is_not_recorded(plan_in, tmp_path):
    plan = plan_in("out", ["conv"], [0])
    # The data set is prepared again under the study.
    four_classes(tmp_path / "four", load_manifest(tmp_path / "four", "train").root, classes=3)
    with pytest.raises(DataError, match="has changed since"):
        run_study_tests(plan)
    assert not plan.results_file.exists()
    killed = Lost("crash", "the process died (signal 9)", from_outside=True)
    with pytest.raises(EnvironmentFault, match="was killed"):
        runner._lost(next(plan.tuning_jobs({})), killed, HERE)
    crashed = runner._lost(next(plan.tuning_jobs({})), Lost("crash", "signal 11"), HERE)
    assert (crashed.status, crashed.reason) == (
        *("failed", "its process died (a crash in a native library)"),
    )


def run_study_tests(plan):
    """One training that counts, at a rate that nobody tuned."""
    job = plan._job(plan.rows[0], plan.data[0], 16, 1e-3, 0)
    return training.run_job(job, HERE)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"clips": 5}, "does not fit four"),
        ({"clips": 28, "controls": ["double"]}, ""),
    ],
)
def test_a_budget_that_no_epochs_meet_is_refused(plan_in, changes, words):
    plan = plan_in("out")
    study = plan.study.model_copy(update=changes)
    if not words:
        assert Plan(study, plan.recipe, plan.data, plan.out)
        return
    with pytest.raises(UsageError, match=words):
        Plan(study, plan.recipe, plan.data, plan.out)


def test_a_failure_is_listed_and_the_others_go_on(plan_in, monkeypatch, tmp_path):
    build = training.build_trainer

    def fails_for_patches(loaded, *arguments, **rest):
        if loaded.recipe.model.options.get("stem") == "patch":
            raise ValueError("no such luck\nat all")
        return build(loaded, *arguments, **rest)

    monkeypatch.setattr(training, "build_trainer", fails_for_patches)
    plan = plan_in("out", ["conv", "patch"], [0])
    results = run(plan)
    failed = [result for result in results if not result.is_done]
    assert [result.reason for result in failed] == ["ValueError: no such luck"] * 2
    assert sum(result.is_done for result in results) == 3
    # Without a rate there is nothing to test; the report says so.
    summary = summary_of("stems", plan)
    assert summary.cell("patch", "four").missing == {
        0: "cannot start: no rate of the grid could be trained"
    }
    # Of the row that failed, and not of others.
    assert {failure.row for failure in summary.failures} == {"patch"}
    # Whose rate a row takes is told of even where only the row is asked for.
    alone = summary_of("stems", plan_in("out", ["flat"], [0]))
    assert {item.row for item in alone.tuned if item.accuracies} == {"conv"}
    report = write_report(alone, tmp_path / "report", "stems-part", "ogreg evidence stems")[0]
    assert "learning rates from 0.001, 0.002." in report.read_text()

    assert len(run(plan)) == len(results)
    monkeypatch.setattr(training, "build_trainer", build)
    again = run(plan, retry=True)
    assert len(again) == len(results) + 3
    assert summary_of("stems", plan).cell("patch", "four").mean is not None


def test_two_studies_do_not_share_a_folder_at_a_time(plan_in):
    plan = plan_in("out", ["conv"], [0])
    plan.out.mkdir()
    with lock_file(plan.out / "lock"), pytest.raises(UsageError, match="another process"):
        run(plan)
