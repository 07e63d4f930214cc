"""The table of a paper: which runs are averaged, and what comes out."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import statistics
from pathlib import Path

import pytest
import torch

from ogreg_core import report as report_module
from ogreg_core.checkpoint import CheckpointInfo, save_checkpoint
from ogreg_core.data.sampling import ClipSampling
from ogreg_core.errors import DataError
from ogreg_core.models.registry import create_model
from ogreg_core.profiling import count_multiply_adds
from ogreg_core.report import average, build_report
from ogreg_core.report_formats import CAPTION, FORMATS, render
from ogreg_core.statistics import wilson_interval

LABELS = ["open", "close", "push", "pull", "lift", "drop"]
CLOCK = iter(range(1_700_000_000, 1_800_000_000, 60))


def stamp(folder: Path) -> Path:
    """Give a run a time of its own, later than that of all runs before."""
    now = next(CLOCK)
    for path in folder.iterdir():
        os.utime(path, (now, now))
    return folder


def write_training(
    folder: Path,
    seed: int,
    top1: list[float],
    *,
    experiment: str = "e" * 64,
    state: str = "done",
    reason: str = "",
    **info,
) -> Path:
    """A training's run folder with a best checkpoint that holds no weights worth the name."""
    (folder / "checkpoints").mkdir(parents=True)
    described = {
        **{"model": "ogreg-n", "options": {"strides": [4, 2, 1, 1]}, "labels": LABELS},
        **{"sampling": ClipSampling("uniform", 8), "size": 32, "short_side": 32},
        **{"mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2), "dataset": "demo", "recipe": "demo"},
        **{"experiment_sha256": experiment, "seed": seed},
        "metrics": {"top1": max(top1), "top5": 99.0 - seed},
        **info,
    }
    save_checkpoint(
        folder / "checkpoints" / "best.safetensors",
        {"a": torch.zeros(1)},
        CheckpointInfo(**described),
    )
    (folder / "recipe.toml").write_text("[train]\nepochs = 4\n")
    (folder / "env.json").write_text("{}")
    (folder / "data.json").write_text(json.dumps({"recipe": "demo", "val": {"sha256": "m" * 64}}))
    (folder / "metrics.jsonl").write_text(
        "".join(
            json.dumps({"kind": "val", "epoch": n, "step": n, "top1": value, "videos": 128}) + "\n"
            for n, value in enumerate(top1, 1)
        )
    )
    status = {"state": state, "reason": reason, "resume": f"ogreg train --resume {folder}"}
    (folder / "status.json").write_text(json.dumps(status))
    if state == "done":
        document = {"schema": "ogreg.train.v1", "val_annotated": 128, "val_videos": 128}
        (folder / "report.json").write_text(json.dumps(document))
    return stamp(folder)


def write_evaluation(folder: Path, training: Path | None, top1: float, **changes) -> Path:
    """An evaluation's run folder, of a training's best checkpoint."""
    folder.mkdir(parents=True)
    checkpoint = training.resolve() / "checkpoints" / "best.safetensors" if training else ""
    document = {
        **{"schema": "ogreg.eval.v1", "checkpoint": str(checkpoint), "model": "ogreg-n"},
        **{"options": {"strides": [4, 2, 1, 1]}, "recipe": "demo", "seed": 0},
        **{"experiment_sha256": "e" * 64, "dataset": "demo", "split": "test"},
        **{"manifest_sha256": "t" * 64, "annotated_videos": 100, "coverage_pct": 98.0},
        **{"protocol": "8 uniform, 4x3 views, short side 32", "frames": 8, "size": 32},
        **{"clips": 4, "crops": 3, "frame_order": "none", "top1_pct": top1, "top5_pct": 95.0},
        **{"top1_interval_pct": [top1 - 5, top1 + 4], "top5_interval_pct": [90.0, 97.0]},
        **{"videos": 100, "unreadable": [{"path": "a"}, {"path": "b"}], **changes},
    }
    (folder / "report.json").write_text(json.dumps(document))
    return stamp(folder)


@pytest.fixture(autouse=True)
def counted(monkeypatch) -> list[tuple]:
    """Costs that are counted, without building large models again and again."""
    calls: list[tuple] = []

    def count(*key):
        calls.append(key)
        return report_module.Cost(1_674_432, 198_158_336)

    monkeypatch.setattr(report_module, "_count", count)
    return calls


def test_seeds_of_an_experiment_share_a_row(tmp_path, counted):
    scores = [[10.0, 71.25], [70.5, 60.0], [68.75, 50.0]]
    runs = [write_training(tmp_path / str(n), n, top1) for n, top1 in enumerate(scores)]
    other = write_training(tmp_path / "other", 0, [90.0, 91.0], experiment="f" * 64)
    found = build_report([*runs, other])
    assert found.left_out == ()
    best, row = found.rows
    assert [result.run.path for result in best.results] == [other]
    assert [result.seed for result in row.results] == [0, 1, 2]
    values = [71.25, 70.5, 68.75]
    assert row.top1.mean == pytest.approx(sum(values) / 3)
    assert row.top1.deviation == pytest.approx(statistics.stdev(values))
    assert row.top1.deviation == pytest.approx(1.2829, abs=1e-4)
    assert row.top5.mean == pytest.approx(98.0)
    assert row.top5.deviation == pytest.approx(1.0)
    assert row.coverage_pct == (100.0, 100.0)
    assert (best.top1.mean, best.top1.deviation) == (91.0, None)
    # A single training has the interval of its 128 videos.
    low, high = wilson_interval(round(0.91 * 128), 128)
    assert best.top1.interval == pytest.approx((100 * low, 100 * high))
    assert best.top5.interval == pytest.approx([100 * x for x in wilson_interval(127, 128)])
    assert len(counted) == 1, "one model and input, counted once"


@pytest.mark.parametrize(
    "changes",
    [
        {"experiment_sha256": "f" * 64},
        {"protocol": "8 uniform, 1x1 views, short side 32"},
        {"protocol": "8 uniform, 4x3 views, short side 32, frames shuffled"},
        {"split": "val"},
        {"dataset": "other"},
        {"manifest_sha256": "u" * 64},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_differs_is_not_averaged(tmp_path, changes):
    a, b = (write_training(tmp_path / name, 0, [1.0, 2.0]) for name in "ab")
    first = write_evaluation(tmp_path / "1", a, 60.0)
    second = write_evaluation(tmp_path / "2", b, 62.0, seed=1)
    assert len(build_report([first, second]).rows) == 1
    (row,) = build_report([first, second]).rows
    assert row.top1.mean == 61.0
    assert row.top1.deviation == pytest.approx(statistics.stdev([60, 62]))
    third = write_evaluation(tmp_path / "3", b, 62.0, seed=1, **changes)
    assert len(build_report([first, third]).rows) == 2


def test_the_last_checkpoint_is_not_averaged_with_the_best(tmp_path):
    training = write_training(tmp_path / "train", 0, [1.0, 2.0])
    last = str(training / "checkpoints" / "last.safetensors")
    best = write_evaluation(tmp_path / "1", training, 60.0)
    other = write_evaluation(tmp_path / "2", training, 55.0, checkpoint=last, seed=1)
    found = build_report([best, other])
    assert [row.top1.mean for row in found.rows] == [60.0, 55.0]
    assert "demo, last" in render(found, "markdown")


def test_an_evaluation_stands_for_its_training(tmp_path):
    training = write_training(tmp_path / "train" / "1", 0, [70.0, 71.0])
    same = {"split": "val", "manifest_sha256": "m" * 64}
    same["protocol"] = "8 uniform, 1x1 views, short side 32"
    evaluation = write_evaluation(tmp_path / "eval" / "1", training, 60.0, **same)
    found = build_report([tmp_path])
    assert [row.results[0].run.path for row in found.rows] == [evaluation]
    (item,) = found.left_out
    assert (item.path, item.state) == (training, "repeated")
    assert str(evaluation) in item.reason
    # What was scored otherwise stands beside it: another split or protocol, rows changed, a control.
    for number, change in enumerate(
        [
            {"split": "test"},
            {"protocol": "8 uniform, 4x3 views, short side 32"},
            {"manifest_sha256": "n" * 64},
            {"protocol": f"{same['protocol']}, frames shuffled", "frame_order": "shuffled"},
        ]
    ):
        other = write_evaluation(tmp_path / f"o{number}", training, 9.0, **{**same, **change})
        found = build_report([training, other])
        assert {row.results[0].run.path for row in found.rows} == {training, other}
        assert found.left_out == ()


def test_repetitions_are_not_taken_for_seeds(tmp_path):
    training = write_training(tmp_path / "1", 0, [70.0, 71.0])
    again = write_training(tmp_path / "2", 0, [70.0, 72.0])
    found = build_report([training, again])
    assert [row.top1.mean for row in found.rows] == [72.0]
    assert "same experiment and seed 0" in found.left_out[0].reason
    first = write_evaluation(tmp_path / "e1", training, 60.0)
    second = write_evaluation(tmp_path / "e2", training, 60.0)
    found = build_report([second, first, first])
    assert [result.run.path for result in found.rows[0].results] == [second]
    assert [item.path for item in found.left_out] == [first]


def test_of_repetitions_the_fuller_one_counts_then_the_later(tmp_path):
    """By what the reports say: files that were copied have other times."""
    training = write_training(tmp_path / "1", 0, [70.0, 71.0])
    partly = [{"path": "a"}, {"path": "b"}, {"path": "c"}]
    times = {"day": "2026-02-03T00:00:00+00:00", "after": "2026-02-04T00:00:00+00:00"}
    later = write_evaluation(tmp_path / "a", training, 61.0, finished=times["after"])
    earlier = write_evaluation(tmp_path / "b", training, 60.0, finished=times["day"])
    worse = write_evaluation(
        tmp_path / "c", training, 59.0, finished="2026-03-01T00:00:00+00:00", unreadable=partly
    )
    for given in ([later, earlier, worse], [worse, earlier, later]):
        (row,) = build_report(given).rows
        assert [result.run.path for result in row.results] == [later]
    (row,) = build_report([earlier, worse]).rows
    assert [result.run.path for result in row.results] == [earlier]


def test_runs_without_a_score_are_listed_with_their_reason(tmp_path):
    failed = write_training(
        tmp_path / "1", 0, [50.0], state="failed", reason="the training loss became nan"
    )
    broken = write_training(tmp_path / "2", 0, [50.0])
    (broken / "checkpoints" / "best.safetensors").write_bytes(b"half")
    missing = write_training(tmp_path / "3", 0, [50.0])
    (missing / "checkpoints" / "best.safetensors").unlink()
    nothing = write_evaluation(tmp_path / "4", None, 0.0, top1_pct=None)
    found = build_report([tmp_path])
    assert found.rows == ()
    reasons = {item.path: item.reason for item in found.left_out}
    assert reasons[failed].startswith("the training loss became nan; epoch 1 of 4; continue: ogreg")
    assert "best.safetensors" in reasons[broken]
    assert "best.safetensors" in reasons[missing]
    assert "does not tell a score" in reasons[nothing]
    for name in FORMATS:
        text = render(found, name)
        assert text.count("the training loss became nan") == 1
        assert all(path.name in text for path in reasons)


def test_reports_of_older_versions_and_fusions_have_rows_of_their_own(tmp_path, counted):
    training = write_training(tmp_path / "t", 3, [50.0, 51.0], recipe_sha256="r" * 64)
    older = write_evaluation(tmp_path / "1", training, 60.0)
    document = json.loads((older / "report.json").read_text())
    for name in ("options", "frames", "size", "clips", "crops", "seed", "experiment_sha256"):
        del document[name]
    (older / "report.json").write_text(json.dumps(document))
    fused = write_evaluation(
        *(tmp_path / "2", None, 65.0),
        **{"model": "ogreg-n + ogreg-t", "experiment_sha256": "", "frames": None, "fused": [{}]},
    )
    found = build_report([older, fused])
    (of_fusion, of_older) = found.rows
    # The checkpoint tells what the report does not.
    assert counted == [("ogreg-n", {"strides": [4, 2, 1, 1]}, 6, 8, 32)]
    assert (of_older.results[0].seed, of_older.results[0].experiment) == (3, "e" * 64)
    assert of_fusion.cost is None
    (training / "checkpoints" / "best.safetensors").unlink()
    assert [row.cost for row in build_report([older]).rows] == [None]


def test_a_checkpoint_chosen_on_the_scored_split_is_marked(tmp_path):
    three = write_training(tmp_path / "1", 0, [1.0, 2.0, 3.0])
    two = write_training(tmp_path / "2", 1, [4.0, 5.0])
    one = write_training(tmp_path / "3", 0, [4.0], experiment="1" * 64)
    text = render(build_report([three, two, one]), "markdown")
    assert "best of 2 to 3 validations on this split" in text
    assert re.search(r"4\.0 ± 1\.4 <sup>a</sup>", text)
    assert text.count("<sup>") == 2, "one validation leaves no choice"
    on_val = write_evaluation(tmp_path / "v", three, 60.0, split="val")
    on_test = write_evaluation(tmp_path / "t", three, 50.0)
    found = build_report([on_val, on_test])
    chosen = {row.results[0].split: row.results[0].chosen_from for row in found.rows}
    assert chosen == {"val": 3, "test": 0}


def test_the_mark_survives_the_training(tmp_path):
    """What the evaluation wrote down stands when the training is gone."""
    training = write_training(tmp_path / "1", 0, [1.0, 2.0, 3.0])
    place = {"dataset": "demo", "split": "val"}

    def text(role, chosen_on, **changes):
        folder = tmp_path / f"e{len(list(tmp_path.iterdir()))}"
        changes = {"split": "val", "checkpoint": "/gone/model.safetensors", **changes}
        run = write_evaluation(folder, training, 5.0, role=role, chosen_on=chosen_on, **changes)
        return render(build_report([run]), "markdown")

    exact = {**place, "validations": 12, "or_more": False}
    assert "as the best of 12 validations on this split" in text("best", exact)
    assert "best of at least 12 validations" in text("best", {**exact, "or_more": True})
    unknown = text("best", {**place, "validations": None, "or_more": True})
    assert "best of validations on this split" in unknown
    assert "not known whether" in text("", None)
    for fine in (
        text("best", exact, split="test"),
        text("best", exact, dataset="other"),
        text("last", {**place, "validations": 0, "or_more": False}),
        text("best", {**place, "validations": 1, "or_more": False}),
    ):
        assert "<sup>" not in fine


def member(path, weight=1.0, **changes):
    """A part of a fusion, as it is written down."""
    return {
        **{"path": "e", "weight": weight, "checkpoint": path, "model": "ogreg-n", "options": {}},
        **{"protocol": "8x2", "classes": 6, "frames": 8, "size": 32, "clips": 4, "crops": 3},
        **{"role": "last", "chosen_on": {"dataset": "demo", "split": "test", "validations": 0}},
        **changes,
    }


@pytest.mark.parametrize(
    ("members", "params", "gmacs"),
    [
        (["a", "b", "c"], 3, 3),
        (["a", "b", "a"], 2, 2),
        ([member("a"), member("a", protocol="8x2, frames reversed")], 1, 2),
        ([member("a"), member("b", 0.0)], 1, 1),
        ([member("a"), {"path": "f", "weight": 1.0, "fused": [member("b"), member("c")]}], 3, 3),
        ([member("a"), member("b", clips=1)], 2, None),
        (["", ""], 2, 2),
        ([member("a"), member("b", frames=None)], None, None),
    ],
    ids=range(8),
)
def test_a_fusion_costs_all_of_its_models(members, params, gmacs, tmp_path):
    parts = [member(part) if isinstance(part, str) else part for part in members]
    names = {"checkpoint": "", "experiment_sha256": "", "model": "together", "role": ""}
    run = write_evaluation(tmp_path / "f", None, 60.0, **names, fused=parts)
    report = build_report([run])
    (row,) = report.rows
    (document,) = json.loads(render(report, "json"))["rows"]
    assert document["params"] == (params and params * 1_674_432)
    assert document["gmacs_per_view"] == (gmacs and pytest.approx(gmacs * 0.198158336))
    assert row.results[0].seed is None
    for name in FORMATS:
        render(report, name)


def test_a_fusion_is_chosen_where_a_member_was(tmp_path):
    chosen = {"dataset": "demo", "split": "test", "validations": 9, "or_more": False}

    def note(*parts):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        names = {"checkpoint": "", "model": "together", "role": "", "chosen_on": None}
        run = write_evaluation(folder, None, 60.0, **names, fused=list(parts))
        return render(build_report([run]), "markdown")

    best = member("b", role="best", chosen_on=chosen)
    elsewhere = member("b", role="best", chosen_on={**chosen, "split": "val"})
    assert "a checkpoint chosen as the best of 9 validations" in note(member("a"), best)
    assert "not known whether" in note(member("a"), member("b", role="", chosen_on=None))
    assert "<sup>" not in note(member("a"), elsewhere)


NONSENSE = ["x", -1, 1.5, [], {}, [1], ["a", "b"], {"a": 1}, True, None, 10**400]


@pytest.mark.parametrize("value", NONSENSE, ids=lambda value: str(value)[:8])
def test_nonsense_in_a_report_ends_nothing(value, tmp_path):
    """Whatever stands in a report, the others keep their rows and every format can be written."""
    training = write_training(tmp_path / "t", 0, [1.0, 2.0])
    fine = write_evaluation(tmp_path / "fine", training, 60.0, recipe="fine")
    document = json.loads((fine / "report.json").read_text())
    more = ("chosen_on", "fused", "role", "finished", "classes")
    for name in (*document, *more):
        if name not in ("schema", "recipe"):
            write_evaluation(tmp_path / name, training, 50.0, **{name: value})
    found = build_report([tmp_path])
    for name in FORMATS:
        assert "fine" in render(found, name)


@pytest.mark.parametrize(
    "changes",
    [
        {"top5_pct": "high"},
        {"clips": "4"},
        {"top1_interval_pct": 5},
        {"options": "none"},
        {"chosen_on": "val", "role": "best"},
        {"fused": 3},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_nonsense_is_left_out_with_its_reason(changes, tmp_path):
    run = write_evaluation(tmp_path / "1", None, 60.0, **changes)
    found = build_report([run])
    assert found.rows == ()
    assert "makes no sense" in found.left_out[0].reason


def test_a_missed_expectation_is_still_a_score(tmp_path):
    run = write_evaluation(tmp_path / "1", None, 60.0)
    status = {"state": "failed", "code": 1, "reason": "expected top1>=99.9, reached 60.00"}
    (run / "status.json").write_text(json.dumps(status))
    assert len(build_report([run]).rows) == 1
    (run / "report.json").unlink()
    (run / "data.json").write_text('{"command": "eval"}')
    assert build_report([run]).left_out[0].state == "failed"


def test_top5_of_few_classes_is_no_figure(tmp_path):
    run = write_training(tmp_path / "1", 0, [1.0, 2.0], labels=LABELS[:5])
    evaluation = write_evaluation(tmp_path / "2", run, 60.0, classes=5)
    found = build_report([run, evaluation])
    assert [row.top5 for row in found.rows] == [None, None]
    cells = [line.split(" | ")[6] for line in render(found, "markdown").splitlines()[2:4]]
    assert cells == ["–", "–"]


def test_coverage_is_counted_and_never_more_than_all(tmp_path):
    nearly = {"annotated_videos": 20005, "videos": 20000, "experiment_sha256": "1"}
    edited = {"annotated_videos": 4, "videos": 5, "unreadable": [], "experiment_sha256": "2"}
    a = write_evaluation(tmp_path / "1", None, 60.0, **nearly)
    b = write_evaluation(tmp_path / "2", None, 50.0, **edited)
    c = write_evaluation(tmp_path / "3", None, 40.0, annotated_videos=None, recipe="c")
    text = render(build_report([a, b, c]), "markdown")
    assert "| 19 998 of 20 005 |" in text
    assert "| 5 of 5 |" in text
    assert "| 98 of 100 listed |" in text
    rows = json.loads(render(build_report([a, b]), "json"))["rows"]
    assert [row["scored_videos"] for row in rows] == [[19998], [5]]
    assert rows[1]["coverage_interval_pct"] == [100.0, 100.0]


def test_costs_are_those_of_the_model(tmp_path, monkeypatch):
    monkeypatch.undo()
    run = write_training(tmp_path / "1", 0, [1.0, 2.0])
    (row,) = build_report([run]).rows
    model = create_model("ogreg-n", 6, strides=[4, 2, 1, 1])
    assert row.cost.params == sum(weight.numel() for weight in model.parameters())
    assert row.cost.multiply_adds == count_multiply_adds(model, torch.zeros(1, 3, 8, 32, 32)).total
    unknown = write_evaluation(tmp_path / "2", run, 1.0, model="of another version")
    assert build_report([unknown]).rows[0].cost is None


def test_a_folder_without_runs_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no run"):
        build_report([tmp_path / "empty"])
    with pytest.raises(DataError, match="no such folder"):
        build_report([tmp_path / "nowhere"])


def test_averages_are_those_of_the_statistics_module():
    values = [92.97, 91.41, 93.75, 90.62]
    found = average(values)
    assert found.mean == pytest.approx(statistics.mean(values))
    assert found.deviation == pytest.approx(statistics.stdev(values))
    assert average([50.0], [(40.0, 60.0)]).interval == (40.0, 60.0)


@pytest.fixture
def two_rows(tmp_path):
    """Two seeds on one side, one evaluation with awkward names on the other, one failure."""
    write_training(tmp_path / "1", 0, [50.0, 71.0])
    write_training(tmp_path / "2", 1, [50.0, 73.0])
    write_training(
        tmp_path / "3_&", 2, [5.0], state="failed", reason='a | b\nc 5 % #1 the "best" one'
    )
    elsewhere = {"dataset": "demo", "split": "val", "validations": 2, "or_more": False}
    awkward = {"recipe": "my_50%|&#{x}$^~\\<", "role": "best", "chosen_on": elsewhere}
    write_evaluation(tmp_path / "4", None, 60.0, **awkward)
    return build_report([tmp_path])


def test_markdown(two_rows):
    text = render(two_rows, "markdown")
    table = [line for line in text.splitlines() if line.startswith("|")]
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in table]
    assert {len(line) for line in cells} == {10}
    assert [cell.strip() for cell in cells[0]][:4] == ["model", "recipe", "data", "params (M)"]
    evaluation, training = ([cell.strip() for cell in line] for line in cells[2:])
    if "demo/val" in evaluation:
        evaluation, training = training, evaluation
    assert training[3:] == [
        *("1.67", "0.198 × 1", "72.0 ± 1.4 <sup>a</sup>", "98.5 ± 0.7"),
        *("8 uniform, 1x1 views, short side 32", "128 of 128", "2 (0, 1)"),
    ]
    assert training[0] == "ogreg-n (strides=4-2-1-1)"
    assert evaluation[1] == "my\\_50%\\|&#{x}\\$^\\~\\\\\\<"
    assert evaluation[4:7] == ["–", "60.0 \\[55.0, 64.0]", "95.0 \\[90.0, 97.0]"]
    assert evaluation[8:] == ["98 of 100", "1"]
    assert CAPTION in text
    assert "multiply-add counted once" in CAPTION
    assert '(failed): a \\| b c 5 % #1 the "best" one; epoch 1 of 4' in text


def test_latex(two_rows):
    text = render(two_rows, "latex")
    for name in ("toprule", "midrule", "bottomrule", "end{tabular}", "end{table}"):
        assert text.count(f"\\{name}") == 1
    body = text[text.index("\\midrule") : text.index("\\bottomrule")].splitlines()[1:]
    assert len(body) == 2
    for line in body:
        assert line.endswith(" \\\\")
        assert len(re.split(r"(?<!\\)&", line)) == 10
    # Ten columns have to fit a page, and quotes need no other font encoding.
    assert "\\small\n" in text
    assert "\\resizebox{\\textwidth}{!}{\\begin{tabular}" in text
    assert "\\end{tabular}}\n" in text
    assert "graphicx" in text.splitlines()[0]
    assert "the ''best'' one" in text
    assert "textquotedbl" not in text
    assert (
        r"my\_50\%\textbar{}\&\#\{x\}\$\textasciicircum{}\textasciitilde{}\textbackslash{}"
        r"\textless{}" in text
    )
    assert r"72.0 $\pm$ 1.4$^{a}$" in text
    assert r"0.198 $\times$ 1" in text
    # Outside of commands and escapes nothing is left that TeX would trip over.
    rest = re.sub(r"\\[%_&#${}]|\$[^$]*\$", "", text.split("\n", 1)[1])
    assert not re.search(r"[%#$_^~±×−–<>|]", rest)
    assert rest.count("{") == rest.count("}")


def test_csv_and_json_hold_the_same_numbers(two_rows):
    document = json.loads(render(two_rows, "json"))
    lines = list(csv.DictReader(io.StringIO(render(two_rows, "csv"))))
    assert document["schema"] == "ogreg.report.v1"
    assert [line["state"] for line in lines] == ["done", "done", "failed"]
    assert lines[2]["reason"].startswith("a | b")
    for row, line in zip(document["rows"], lines, strict=False):
        for name in ("top1_pct", "params", "gmacs_per_view", "count"):
            assert (line[name] or "None") == str(row[name])
        assert line["seeds"].split() == [str(seed) for seed in row["seeds"]]
    training = next(row for row in document["rows"] if row["split"] == "val")
    assert training["top1_pct"] == 72.0
    assert training["top1_deviation_pct"] == pytest.approx(statistics.stdev([71, 73]))
    assert training["seeds"] == [0, 1]
    assert training["gmacs_per_view"] == pytest.approx(0.198158336)
    assert document["left_out"][0]["state"] == "failed"
    single = next(line for line in lines if line["split"] == "test")
    assert (single["top1_low_pct"], single["top1_high_pct"]) == ("55.0", "64.0")


def test_rows_that_look_alike_are_told_apart(tmp_path):
    a = write_training(tmp_path / "1", 0, [1.0, 2.0], experiment="1234567890")
    b = write_training(tmp_path / "2", 0, [1.0, 3.0], experiment="abcdefghij")
    text = render(build_report([a, b]), "markdown")
    assert "demo (1234567)" in text
    assert "demo (abcdefg)" in text
    c = write_evaluation(tmp_path / "3", a, 4.0)
    d = write_evaluation(tmp_path / "4", b, 4.0, manifest_sha256="0987654321")
    text = render(build_report([c, d]), "markdown")
    assert "demo/test (ttttttt)" in text
    assert "demo/test (0987654)" in text
    assert "demo (" not in text
