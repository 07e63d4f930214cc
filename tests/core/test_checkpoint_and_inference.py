"""Checkpoints describe themselves; predict, eval and validation give the same scores."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from ogreg_core.checkpoint import CheckpointInfo, load_checkpoint, load_model, save_checkpoint
from ogreg_core.data.manifest import load_manifest
from ogreg_core.data.sampling import ClipSampling
from ogreg_core.errors import CheckpointError
from ogreg_core.evaluate_checkpoint import evaluate_checkpoint
from ogreg_core.inference import Predictor
from ogreg_core.models.registry import create_model
from ogreg_core.progress import ignore_progress
from ogreg_core.runs import RunFolder, find_checkpoint


def score(checkpoint, data=None, clips=None, crops=None, control="none"):
    """Evaluate on the validation split, on the CPU."""
    return evaluate_checkpoint(
        checkpoint,
        data=data,
        split="val",
        clips=clips,
        crops=crops,
        control=control,
        batch_size=5,
        workers=0,
        device=torch.device("cpu"),
        on_progress=ignore_progress,
    )


@pytest.fixture
def info(demo_root) -> CheckpointInfo:
    return CheckpointInfo(
        model="ogreg-n",
        options={"strides": [2, 1, 1, 1]},
        labels=list(load_manifest(demo_root, "val").labels),
        sampling=ClipSampling("uniform", 4),
        size=32,
        short_side=36,
        mean=(0.4, 0.5, 0.6),
        std=(0.2, 0.3, 0.4),
        data_folder=str(demo_root),
        dataset="demo",
        metrics={"top1": 12.5},
    )


@pytest.fixture
def checkpoint(info, tmp_path):
    torch.manual_seed(2)
    model = create_model(info.model, len(info.labels), **info.options)
    with torch.no_grad():
        model.head.weight.mul_(40)
    save_checkpoint(tmp_path / "best.safetensors", model.state_dict(), info)
    return tmp_path / "best.safetensors"


def test_description_survives_the_file(checkpoint, info):
    state, found = load_checkpoint(checkpoint)
    assert found == info
    model, _ = load_model(checkpoint)
    assert not model.training
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_predict_equals_the_row_of_eval(checkpoint, demo_root):
    for clips, crops in ((1, 1), (2, 3)):
        report = score(checkpoint, clips=clips, crops=crops)
        predictor = Predictor.from_checkpoint(checkpoint, torch.device("cpu"))
        manifest = load_manifest(demo_root, "val")
        for index in (0, 13, 31):
            path = manifest.video(manifest.rows[index])
            prediction = predictor.predict(path, predictor.info.views(clips, crops))
            torch.testing.assert_close(
                prediction.scores, report.scores.scores[index], atol=1e-5, rtol=1e-5
            )
            best = int(report.scores.scores[index].argmax())
            assert prediction.top[0][0] == manifest.labels[best]


def test_frame_controls_change_scores(checkpoint):
    found = {}
    for control in ("none", "shuffled", "reversed", "middle"):
        found[control] = score(checkpoint, control=control)
    plain = found.pop("none")
    for control, report in found.items():
        assert not torch.allclose(report.scores.scores, plain.scores.scores)
        assert control in report.document["protocol"]


def test_report_files(checkpoint, tmp_path):
    report = score(checkpoint)
    report.write(RunFolder(tmp_path))
    lines = (tmp_path / "per_class.csv").read_text().splitlines()
    assert lines[0] == "class,videos,top1_pct"
    assert len(lines) == 17
    scores = (tmp_path / "scores.csv").read_text().splitlines()
    assert len(scores) == 33
    row = scores[1].split(",")
    assert sum(float(value) for value in row[5:]) == pytest.approx(1, abs=1e-4)


class TestRefused:
    def test_missing_and_broken(self, tmp_path):
        with pytest.raises(CheckpointError, match="does not exist"):
            load_checkpoint(tmp_path / "none.safetensors")
        (tmp_path / "x.safetensors").write_bytes(b"12345678nonsense")
        with pytest.raises(CheckpointError, match="not a readable"):
            load_checkpoint(tmp_path / "x.safetensors")

    def test_weights_of_somebody_else(self, tmp_path):
        save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
        with pytest.raises(CheckpointError, match="not written by ogreg"):
            load_checkpoint(tmp_path / "a.safetensors")
        save_file({"a": torch.zeros(2)}, tmp_path / "b.safetensors", metadata={"ogreg": "{}"})
        with pytest.raises(CheckpointError, match="cannot be read"):
            load_checkpoint(tmp_path / "b.safetensors")

    def test_weights_and_description_of_different_models(self, info, tmp_path):
        other = create_model("ogreg-n", 3)
        save_checkpoint(tmp_path / "c.safetensors", other.state_dict(), info)
        with pytest.raises(CheckpointError, match="do not fit"):
            load_model(tmp_path / "c.safetensors")

    def test_other_classes(self, info, tmp_path, demo_root):
        changed = CheckpointInfo(**{**vars(info), "labels": [*info.labels[1:], "zebra"]})
        model = create_model(info.model, 16, **info.options)
        save_checkpoint(tmp_path / "d.safetensors", model.state_dict(), changed)
        with pytest.raises(CheckpointError, match="other classes") as caught:
            score(tmp_path / "d.safetensors", data=demo_root)
        assert "class 0" in caught.value.why


def test_run_folders_stand_for_their_best_checkpoint(tmp_path):
    run = RunFolder.create("train", "x", base=tmp_path / "runs")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        find_checkpoint(run.path)
    run.checkpoints.mkdir()
    run.last.touch()
    assert find_checkpoint(run.path) == run.last
    run.best.touch()
    assert find_checkpoint(run.path) == run.best
    assert find_checkpoint(run.best) == run.best
