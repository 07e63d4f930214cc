"""TensorBoard events, read back as TensorBoard reads them."""

from __future__ import annotations

import io
import subprocess
import sys
import time

import matplotlib.image
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ogreg_core.confusion_picture import confusion_pixels
from ogreg_core.training.board import Board, clip_grid


def read(folder) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    return events


def pixels(image) -> np.ndarray:
    found = matplotlib.image.imread(io.BytesIO(image.encoded_image_string), format="png")
    return (found[..., :3] * 255).round().astype(np.uint8)


@pytest.fixture
def clips() -> torch.Tensor:
    """Six clips of 20 frames; the red of a frame tells its time, the blue its clip."""
    clips = torch.randint(0, 255, (6, 3, 20, 40, 56), dtype=torch.uint8)
    clips[:, 0] = torch.arange(20, dtype=torch.uint8)[:, None, None]
    clips[:, 2] = torch.arange(6, dtype=torch.uint8)[:, None, None, None]
    return clips


def test_scalars_keep_names_steps_and_values(tmp_path):
    with Board(tmp_path, None) as board:
        for step in (1, 2, 30):
            board.scalars(step, {"train/loss": 1.5 / step, "val/top1": 10.0 * step})
    events = read(tmp_path)
    assert set(events.Tags()["scalars"]) == {"train/loss", "val/top1"}
    found = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert found == [(step, pytest.approx(1.5 / step)) for step in (1, 2, 30)]
    assert [event.value for event in events.Scalars("val/top1")] == [10.0, 20.0, 300.0]


def test_a_resumed_run_forgets_what_it_writes_again(tmp_path):
    with Board(tmp_path, None) as board:
        for step in (1, 2, 3):
            board.scalars(step, {"train/loss": 100.0 + step})
    # Files are read in the order of their names, which begin with the second.
    time.sleep(1.1)
    with Board(tmp_path, purge_step=2) as board:
        board.scalars(2, {"train/loss": 7.0})
    found = [(event.step, event.value) for event in read(tmp_path).Scalars("train/loss")]
    assert found == [(1, 101.0), (2, 7.0)]


def test_flush_makes_events_readable_while_the_run_goes_on(tmp_path):
    board = Board(tmp_path, None)
    board.flush()
    assert not list(tmp_path.iterdir())
    board.scalars(5, {"a": 1.0})
    board.flush()
    assert read(tmp_path).Scalars("a")[0].step == 5
    board.close()
    board.close()


def test_clips_show_names_and_frames_spread_in_time(tmp_path, clips):
    with Board(tmp_path, None) as board:
        board.clips(3, clips, [f"class {n}" for n in range(6)])
    (event,) = read(tmp_path).Images("train/clips")
    assert event.step == 3
    picture = pixels(event)
    np.testing.assert_array_equal(picture, clip_grid(clips, [f"class {n}" for n in range(6)]))
    assert picture.shape == (4 * (40 + 18 + 2), 8 * (56 + 2) - 2, 3)
    times = np.linspace(0, 19, 8).round().astype(int)
    for row in range(4):
        for column, t in enumerate(times):
            top, left = row * 60 + 18, column * 58
            frame = picture[top : top + 40, left : left + 56]
            np.testing.assert_array_equal(frame, clips[row, :, t].permute(1, 2, 0).numpy())
        caption = picture[row * 60 : row * 60 + 17]
        assert (caption < 100).any(), "no text above the frames"


def test_captions_are_the_names(clips):
    names = ["a$b$", "", "x" * 500 + "end", "\x00"]
    picture = clip_grid(clips, names)
    captions = [picture[row * 60 : row * 60 + 17] for row in range(4)]
    dark = [int((caption < 128).any(axis=(0, 2)).sum()) for caption in captions]
    assert dark[1] == 0
    assert 0 < dark[0] < 50 < dark[2]
    # Nothing is written past the right edge.
    assert (captions[2][:, -2:] > 200).all()


def test_few_frames_and_small_clips_still_have_room_for_text():
    picture = clip_grid(torch.zeros(1, 3, 2, 32, 32, dtype=torch.uint8), ["shaking hands"])
    assert picture.shape == (52, 140, 3)


def test_confusion_is_the_picture_of_the_matrix(tmp_path):
    matrix, labels = torch.tensor([[5, 1], [0, 4]]), ["open", "close"]
    with Board(tmp_path, None) as board:
        board.confusion(9, matrix, labels)
    (event,) = read(tmp_path).Images("val/confusion")
    assert event.step == 9
    np.testing.assert_array_equal(pixels(event), confusion_pixels(matrix.numpy(), labels))


def test_tensorboard_is_imported_when_something_is_written(tmp_path):
    code = f"""
import sys
from pathlib import Path
from ogreg_core.training.board import Board
board = Board(Path({str(tmp_path)!r}), None)
assert not any(name.split(".")[0] in ("tensorboard", "matplotlib") for name in sys.modules)
board.scalars(1, {{"a": 1.0}})
assert "tensorboard" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
