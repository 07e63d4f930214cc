from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ogreg_cli.visualize_gaze import (
    FORMATS,
    Glance,
    choose_glance,
    read_formats,
    read_query,
    visualize_gaze,
)
from ogreg_core import gaze
from ogreg_core.data.manifest import load_manifest
from ogreg_core.errors import Interrupted, UsageError
from tests.tiny import tiny_checkpoint


def test_formats_are_a_comma_list_in_any_order():
    assert read_formats("mp4,png") == ["png", "mp4"]
    assert read_formats(" GIF , npz,npz") == ["gif", "npz"]
    for text in ("avi", "png,avi", ",", ""):
        with pytest.raises(UsageError) as caught:
            read_formats(text)
        assert all(name in caught.value.why for name in FORMATS)


def test_query_is_two_or_three_numbers():
    assert read_query(None) is None
    assert read_query("10.5,20") == (10.5, 20.0, None)
    assert read_query("10,20,30") == (10.0, 20.0, 30)
    for text in ("10", "a,b", "1,2,3,4", "1,2,3.5"):
        with pytest.raises(UsageError, match="X,Y"):
            read_query(text)


def test_a_query_and_a_glance_that_do_not_go_together():
    assert choose_glance(None, asked=False) is Glance.received
    assert choose_glance(None, asked=True) is Glance.query
    assert choose_glance(Glance.rollout, asked=True) is Glance.rollout
    with pytest.raises(UsageError, match="needs a place"):
        choose_glance(Glance.query, asked=False)
    with pytest.raises(UsageError, match="does not go with"):
        choose_glance(Glance.received, asked=True)


@pytest.fixture
def clip(demo_root: Path) -> Path:
    manifest = load_manifest(demo_root, "val")
    return manifest.video(manifest.rows[0])


def test_every_option_in_one_call(demo_root, clip, ogreg, tmp_path, capsys):
    checkpoint = str(tiny_checkpoint(tmp_path / "tiny.safetensors", demo_root))
    visualize_gaze(
        str(clip),
        checkpoint,
        blocks=["stage1"],
        query="56,50,3",
        glance=Glance.rollout,
        label="open",
        formats="npz,gif,png",
        out=tmp_path / "seen",
        json=True,
    )
    document = json.loads(capsys.readouterr().out)
    written = sorted(path.name for path in (tmp_path / "seen").iterdir())
    assert written == [f"{clip.stem}_gaze.{name}" for name in ("gif", "npz", "png")]
    named = {Path(document[key]).name for key in ("animation", "numbers", "sheet")}
    assert named == set(written)
    assert document["gradcam_label"] == "open"
    assert document["maps"]["gradcam"] == "Grad-CAM of open"
    assert document["maps"]["glance"].startswith("attention rolled out")
    assert document["blocks"]["gaze"] == ["stage1.block1"]
    assert set(document["maps"]) == {"gaze", "opening", "glance", "gradcam"}
    assert document["crop_px"]["width"] == pytest.approx(112 * 32 / 36)
    scores = document["mass_on_moving_pixels"]
    assert 0 < scores["uniform"] < 1
    assert set(scores["maps"]) == set(document["maps"])
    with np.load(tmp_path / "seen" / f"{clip.stem}_gaze.npz") as file:
        assert file["maps/gaze"].shape == (4, 32, 32)
    # The same label and score as predict's for this view.
    told = ogreg("predict", clip, "-c", checkpoint, "--clips", "1", "--crops", "1", "--json")
    best = json.loads(told.stdout)["top"][0]
    assert (best["label"], best["score"]) == (document["label"], document["score"])


def test_plain_output_has_scores_and_files(demo_root, clip, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = str(tiny_checkpoint(tmp_path / "tiny.safetensors", demo_root))
    visualize_gaze(str(clip), checkpoint)
    out = capsys.readouterr().out
    lines = dict(line.split("\t") for line in out.splitlines() if "\t" in line)
    assert {"gaze on moving pixels", "centre bias on moving pixels"} < set(lines)
    folder = Path("runs/visualize-gaze") / clip.stem / "1"
    for name, suffix in (("sheet", "png"), ("overlay", "mp4")):
        path = folder / f"{clip.stem}_gaze.{suffix}"
        assert f"{name}: {path}" in out
        assert path.stat().st_size > 1000


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"label": "opn"}, "did you mean 'open'"),
        ({"query": "1,50"}, "outside of what the model sees"),
        ({"blocks": ["stage7"]}, "no block 'stage7'"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_made(
    options, words, demo_root, clip, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    checkpoint = str(tiny_checkpoint(tmp_path / "tiny.safetensors", demo_root))
    with pytest.raises(UsageError, match=words):
        visualize_gaze(str(clip), checkpoint, **options)
    assert not Path("runs").exists()


def test_broken_file_is_exit_code_3(demo_root, ogreg, tmp_path):
    checkpoint = tiny_checkpoint(tmp_path / "tiny.safetensors", demo_root)
    (tmp_path / "broken.mp4").write_bytes(b"not a video")
    done = ogreg("visualize-gaze", "broken.mp4", "-c", checkpoint)
    assert (done.returncode, done.stdout) == (3, "")
    assert "broken.mp4" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_signal_stops_before_files_are_half_written(
    demo_root, clip, tmp_path, monkeypatch, capsys
):
    checkpoint = str(tiny_checkpoint(tmp_path / "tiny.safetensors", demo_root))
    save = gaze.save_sheet

    def terminated(*arguments, **choices):
        os.kill(os.getpid(), signal.SIGTERM)
        save(*arguments, **choices)

    monkeypatch.setattr(gaze, "save_sheet", terminated)
    with pytest.raises(Interrupted) as caught:
        visualize_gaze(str(clip), checkpoint, out=tmp_path / "seen")
    assert caught.value.exit_code == 143
    # The sheet was under way and is whole; the overlay was not begun.
    assert [path.suffix for path in (tmp_path / "seen").iterdir()] == [".png"]
    with Image.open(next((tmp_path / "seen").iterdir())) as image:
        image.load()
