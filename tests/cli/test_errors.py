"""Bad input: the promised exit code, one clear message on stderr, no traceback, nothing written."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from ogreg_core.video import write_video
from tests.conftest import moving_frames


def check(done, code: int, *words: str) -> None:
    assert done.returncode == code, done.stderr
    assert done.stderr.lstrip().lower().startswith(("error:", "usage:", "weights:"))
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["trian"], 2, ["Did you mean 'train'"]),
        (["train", "recipes/dmo.toml"], 2, ["did you mean 'demo'"]),
        (["train", "demo", "train.lrr=1"], 2, ["did you mean 'train.lr'"]),
        (["train", "demo", "train.epochs=two"], 2, ["train.epochs", "integer"]),
        (["train", "demo", "model.name=ogreg_t"], 2, ["did you mean 'ogreg-t'"]),
        (["train", "train.lr=1", "--resume", "x"], 3, ["not a run folder"]),
        (["train", "--seed", "1", "--resume", "x"], 2, ["--resume continues a run exactly"]),
        (["train", "--resume", "nowhere"], 3, ["not a run folder"]),
        (["train", "kinetics400"], 3, ["has not been prepared", "ogreg prepare kinetics400"]),
        (["train", "folder", "data.root=nowhere"], 3, ["no prepared data set"]),
        (["train", "folder"], 3, ["names no data set"]),
        (["train", "demo", "--device", "warp"], 4, ["'warp' is not available"]),
        (["prepare", "demmo", "x"], 2, ["did you mean 'demo'"]),
        (["prepare", "demo", "x", "--val-share", "0.5"], 2, ["--val-share", "demo"]),
        (["prepare", "folder", "nowhere"], 3, ["not a folder"]),
        (["profile", "--model", "ogreg_n"], 2, ["did you mean 'ogreg-n'"]),
        (["profile", "--option", "stm=patch"], 2, ["stm"]),
        (["profile", "--compare", "ogreg-t,swin3d"], 2, ["did you mean 'swin3d-t'"]),
        (
            ["profile", "--compare", "all", "--depth", "2"],
            2,
            ["--depth does not go with --compare"],
        ),
        (["profile", "--select", "time:1"], 2, ["KIND:PLACE:RATIO", "--select time:1:0.5"]),
        (["profile", "--select", "depth:1:0.5"], 2, ["KIND is time or space"]),
        (["profile", "--model", "s3d", "--select", "time:1:0.5"], 2, ["no place", "mvit-v1-b"]),
        (["eval", "nowhere"], 3, ["does not exist"]),
        (["eval", "x", "--crops", "2"], 2, ["--crops"]),
        (["predict", "nowhere.mp4"], 3, ["nowhere.mp4 does not exist"]),
        (["predict", "*.mp4", "-c", "x"], 2, ["names no videos"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input(arguments, code, words, ogreg, tmp_path):
    check(ogreg(*arguments), code, *words)
    assert not list(tmp_path.iterdir())


def test_json_tells_failures_too(ogreg):
    done = ogreg("train", "demo", "train.lrr=1", "--json")
    assert done.returncode == 2
    document = json.loads(done.stdout)
    assert document["schema"] == "ogreg.error.v1"
    assert document["error"]["code"] == 2
    assert "train.lr" in document["error"]["why"]


def test_checkpoints_of_others_are_refused(ogreg, tmp_path):
    save_file({"a": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    write_video(tmp_path / "clip.mp4", moving_frames(8, 48, 64), 10)
    check(
        ogreg("predict", "clip.mp4", "-c", "other.safetensors"),
        3,
        "not written by ogreg",
        "--init-from",
    )


def test_starting_weights_of_another_model(ogreg, tmp_path, demo_root):
    save_file({"a": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    done = ogreg("train", "demo", f"data.root={demo_root}", "--init-from", "other.safetensors")
    assert done.returncode == 3
    assert "fit none of the model's layers" in done.stderr
    assert "Traceback" not in done.stderr


def test_existing_folders_are_not_overwritten(ogreg, tmp_path, demo_root):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    done = ogreg("train", "demo", f"data.root={demo_root}", "--out", "mine")
    check(done, 2, "not an empty folder")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_debug_shows_the_traceback(ogreg):
    done = ogreg("train", "nope.toml", OGREG_DEBUG="1")
    assert done.returncode == 2
    assert "Traceback" in done.stderr
