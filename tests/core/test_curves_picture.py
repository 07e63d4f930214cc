"""The picture of a training's curves, from metrics in every state that a run leaves them in."""

from __future__ import annotations

import json
import statistics

import matplotlib.figure
import numpy as np
import pytest
from matplotlib.image import imread

from ogreg_core.curves_picture import save_curves, smooth
from ogreg_core.errors import DataError
from ogreg_core.run_records import read_metrics


def train_record(step: int, epoch: int, **more) -> dict:
    return {
        **{"kind": "train", "epoch": epoch, "step": step, "loss": 3.0 / step, "top1_batch": step},
        **{"lr": 1e-3 * step, "clips_per_s": 30.0 + step, "data_wait_pct": 100.0 / step, **more},
    }


def val_record(step: int, epoch: int, top1: float) -> dict:
    return {"kind": "val", "epoch": epoch, "step": step, "top1": top1, "top5": 90.0, "loss": 1.0}


def write(path, records, tail: str = ""):
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + tail)
    return path


@pytest.fixture
def drawn(monkeypatch):
    """The figure that is saved."""
    figures = []
    save = matplotlib.figure.Figure.savefig

    def keep(self, *args, **kwargs):
        figures.append(self)
        return save(self, *args, **kwargs)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", keep)
    return figures


def whole_run() -> list[dict]:
    records = []
    for epoch in (1, 2, 3):
        records += [train_record(10 * (epoch - 1) + n, epoch) for n in range(1, 11)]
        records.append(val_record(10 * epoch, epoch, 20.0 * epoch))
    return records


def curves(figure, title: str) -> dict[str, tuple[list[float], list[float]]]:
    (ax,) = (ax for ax in figure.axes if ax.get_title(loc="left") == title)
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in ax.lines}


def test_every_curve_has_the_recorded_values_over_epochs(tmp_path, drawn):
    save_curves(write(tmp_path / "metrics.jsonl", whole_run()), tmp_path / "c.png", "a $ b")
    picture = imread(tmp_path / "c.png")
    assert picture.shape[0] > 600
    assert picture.shape[1] > 1000
    (figure,) = drawn
    steps = np.arange(1, 31)
    x, y = curves(figure, "learning rate")["_child0"]
    np.testing.assert_allclose(x, steps / 10)
    np.testing.assert_allclose(y, 1e-3 * steps)
    loss = curves(figure, "loss")
    np.testing.assert_allclose(loss["_child0"][1], 3.0 / steps)
    assert loss["validation"] == ([1, 2, 3], [1, 1, 1])
    # Inside, the smoothed curve is the median of five neighbours.
    smoothed = loss["training batches, median"][1]
    assert smoothed[10] == pytest.approx(statistics.median(3.0 / n for n in range(9, 14)))
    accuracy = curves(figure, "accuracy, %")
    assert accuracy["validation top-1, best 60.0"] == ([1, 2, 3], [20, 40, 60])
    assert accuracy["validation top-5, best 90.0"] == ([1, 2, 3], [90, 90, 90])
    np.testing.assert_allclose(accuracy["_child0"][1], steps)
    speed = curves(figure, "clips per second")
    np.testing.assert_allclose(speed["_child0"][1], 30.0 + steps)
    wait = next(ax for ax in figure.axes if ax.get_title(loc="right").startswith("waiting"))
    np.testing.assert_allclose(wait.lines[0].get_ydata(), 100.0 / steps)


def test_a_killed_run_has_its_picture(tmp_path, drawn):
    tail = json.dumps(train_record(31, 4))[:40]
    metrics = write(tmp_path / "metrics.jsonl", [*whole_run()], tail)
    assert len(list(read_metrics(metrics))) == 33
    save_curves(metrics, tmp_path / "c.png", "killed")
    assert len(curves(drawn[0], "loss")["_child0"][0]) == 30


def test_steps_where_no_epoch_is_complete(tmp_path, drawn):
    save_curves(
        write(tmp_path / "m.jsonl", [train_record(n, 1) for n in (1, 2, 3)]), tmp_path / "c.png", ""
    )
    x, _ = curves(drawn[0], "learning rate")["_child0"]
    assert x == [1, 2, 3]
    assert {ax.get_xlabel() for ax in drawn[0].axes} == {"step", ""}


def test_of_steps_written_twice_the_later_counts(tmp_path, drawn):
    records = [train_record(1, 1), train_record(2, 1, loss=9.0), train_record(2, 1, loss=5.0)]
    save_curves(write(tmp_path / "m.jsonl", records), tmp_path / "c.png", "")
    assert curves(drawn[0], "loss")["_child0"][1] == [3.0, 5.0]


@pytest.mark.parametrize(
    "records",
    [
        [train_record(1, 1)],
        [val_record(10, 1, 50.0)],
        [{"kind": "train", "epoch": 1, "step": 1, "loss": float("nan")}],
        [{"kind": "train", "epoch": 1, "step": 1}, {"kind": "val", "epoch": 1, "step": 1}],
    ],
    ids=["one step", "validation only", "not a number", "other version"],
)
def test_draws_what_there_is(tmp_path, records):
    save_curves(write(tmp_path / "m.jsonl", records), tmp_path / "c.png", "title")
    assert imread(tmp_path / "c.png").shape[2] in (3, 4)


@pytest.mark.parametrize("text", [None, "", '{"kind": "tr', "[1]\n3\n"])
def test_nothing_to_draw_is_said(tmp_path, text):
    metrics = tmp_path / "metrics.jsonl"
    if text is not None:
        metrics.write_text(text)
    with pytest.raises(DataError, match="no record"):
        save_curves(metrics, tmp_path / "c.png", "")
    assert not (tmp_path / "c.png").exists()


def test_smoothing_is_the_average_of_the_neighbourhood():
    values = np.random.default_rng(0).normal(size=400)
    for average, reference in ((np.median, statistics.median), (np.mean, statistics.fmean)):
        found = smooth(values, average)
        assert len(found) == 400
        for i in (5, 100, 394):
            assert found[i] == pytest.approx(reference(values[i - 5 : i + 6]))
    np.testing.assert_array_equal(smooth(values[:3]), values[:3])


def test_a_long_training_is_thinned(tmp_path, drawn):
    records = [train_record(n, 1 + n // 20_001) for n in range(1, 40_001)]
    save_curves(write(tmp_path / "m.jsonl", records), tmp_path / "c.png", "")
    x, y = curves(drawn[0], "loss")["_child0"]
    assert len(x) == 4000
    np.testing.assert_allclose(y, [3.0 / n for n in range(1, 40_001, 10)])
