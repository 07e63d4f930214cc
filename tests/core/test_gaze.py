from __future__ import annotations

from dataclasses import replace

import av
import numpy as np
import pytest
import torch
from PIL import Image

from ogreg_core.checkpoint import CheckpointInfo
from ogreg_core.data.sampling import ClipSampling
from ogreg_core.errors import UsageError
from ogreg_core.gaze import (
    look,
    meanings_of,
    overlay,
    save_overlay_video,
    save_sheet,
    select_blocks,
)
from ogreg_core.inference import Predictor
from ogreg_core.models.registry import create_model
from ogreg_core.video import write_video
from tests.conftest import moving_frames


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    torch.manual_seed(0)
    info = CheckpointInfo(
        model="ogreg-n",
        options={"strides": [2, 1, 1, 1]},
        labels=["[red] one", "two"],
        sampling=ClipSampling("uniform", 8),
        size=64,
        short_side=64,
        mean=(0.45, 0.45, 0.45),
        std=(0.225, 0.225, 0.225),
    )
    return Predictor(create_model(info.model, 2, **info.options), info, torch.device("cpu"))


def square_clip(tmp_path):
    """A bright square that moves along the top of a still picture."""
    frames = np.full((16, 64, 64, 3), 60, np.uint8)
    for t in range(16):
        frames[t, 4:20, 2 * t + 4 : 2 * t + 20] = 220
    path = tmp_path / "square [x].mp4"
    write_video(path, frames, 8, crf=10)
    return path


def test_gaze_lies_where_something_moves(predictor, tmp_path):
    found = look(predictor, square_clip(tmp_path), ["stage1"])
    assert found.maps["gaze"].shape == found.maps["glance"].shape == (8, 64, 64)
    assert found.indices == [1, 3, 5, 7, 9, 11, 13, 15]
    moving = found.maps["gaze"][:, :28].sum() / found.maps["gaze"].sum()
    assert moving > 0.7
    assert not found.still
    assert list(found.profiles) == ["stage1.block1"]
    assert found.profiles["stage1.block1"]["d"].shape == (3,)
    assert found.maps["glance"].mean() == pytest.approx(1, abs=0.05)


def test_still_video_is_flat_and_said_to_be(predictor, tmp_path):
    write_video(tmp_path / "still.mp4", np.repeat(moving_frames(1, 64, 64), 12, 0), 8)
    frames = torch.full((1, 3, 8, 64, 64), 0.3)
    _, maps = predictor.model.forward_with_maps(frames)
    assert all(found.gaze.abs().max() < 1e-5 for found in maps.values())
    found = look(predictor, tmp_path / "still.mp4")
    assert found.maps["gaze"].mean() < 1e-3


def test_overlay_leaves_flat_maps_alone():
    frames = moving_frames(3, 16, 16)
    assert np.array_equal(overlay(frames, np.full((3, 16, 16), 0.7)), frames)
    maps = np.zeros((3, 16, 16))
    maps[1, 4, 4] = 1
    painted = overlay(frames, maps)
    changed = (painted != frames).any(-1)
    assert changed[1, 4, 4]
    assert changed.sum() == 1


def test_pictures_are_written_and_readable(predictor, tmp_path):
    found = look(predictor, square_clip(tmp_path))
    save_sheet(found, tmp_path / "sheet.png", "square [x].mp4")
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.width > 800
        assert np.asarray(image.convert("RGB")).std() > 20
    save_overlay_video(found, tmp_path / "overlay.mp4")
    with av.open(str(tmp_path / "overlay.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 8
    assert frames[0].shape == (256, 768, 3)


def test_unknown_blocks_are_refused(predictor):
    maps = predictor.model.forward_with_maps(torch.zeros(1, 3, 4, 32, 32))[1]
    assert list(select_blocks(maps, ["stage3"])) == [f"stage3.block{i}" for i in (1, 2, 3)]
    assert list(select_blocks(maps, ["stage3.block2", "stage1"])) == [
        "stage1.block1",
        "stage3.block2",
    ]
    with pytest.raises(UsageError, match="no block 'stage9'"):
        select_blocks(maps, ["stage9"])


def test_single_frame_video(predictor, tmp_path):
    write_video(tmp_path / "one.mp4", moving_frames(1, 64, 64), 8)
    found = look(predictor, tmp_path / "one.mp4")
    save_sheet(found, tmp_path / "one.png", "one")
    assert found.still


def test_every_kind_of_map_has_a_meaning(predictor, tmp_path):
    """Global temporal attention gives a glance to models without one, token selection what is kept."""
    found = look(predictor, square_clip(tmp_path))
    maps = dict.fromkeys(("gaze", "glance", "kept"), found.maps["gaze"])
    info = replace(predictor.info, model="r2plus1d-18")
    meanings = meanings_of(info, replace(found, maps=maps))
    assert meanings["gaze"] == "strength of the features"
    assert meanings["glance"] == "attention received"
    assert "selection" in meanings["kept"]
