from __future__ import annotations

import json
from dataclasses import replace

import av
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from safetensors import safe_open

from ogreg_core.gaze import (
    GazeResult,
    files,
    overlay,
    pictures,
    save_gif,
    save_maps,
    save_overlay_video,
    save_sheet,
)
from ogreg_core.gaze.geometry import ClipGeometry
from ogreg_core.gaze.glance import Place
from ogreg_core.gaze.motion import MotionScore
from tests.conftest import moving_frames


def made(frames: int = 8, side: int = 64) -> GazeResult:
    """A result with every kind of map, out of nothing but shapes."""
    rng = np.random.default_rng(0)
    gaze = np.zeros((frames, side, side), np.float32)
    for t in range(frames):
        gaze[t, 10:20, 5 * t : 5 * t + 10] = 0.8
    maps = {
        "gaze": gaze,
        "opening": gaze**2,
        "glance": (1 + 0.2 * rng.random((frames, side, side))).astype(np.float32),
        "gradcam": np.zeros((frames, side, side), np.float32),
    }
    blocks = {"stage1.block1": 0.1, "stage1.block2": 0.2, "stage2.block1": 0.3}
    return GazeResult(
        frames=moving_frames(frames, side, side),
        indices=list(range(3, 3 + 2 * frames, 2)),
        seconds=[0.5 * t for t in range(frames)],
        maps=maps,
        blocks={"gaze": ["stage1.block1"], "opening": ["stage1.block1"], "gradcam": []}
        | {"glance": list(blocks)},
        profiles={
            name: {"d": height * np.arange(3), "m": -height * np.ones(3)}
            for name, height in blocks.items()
        },
        positions={name: np.array([1.0, 3.0, 5.0]) for name in blocks},
        label="[red] $x_1$ Übung",
        score=0.75,
        labels=["[red] $x_1$ Übung", "b"],
        scores=np.array([0.75, 0.25], np.float32),
        model="ogreg-n",
        geometry=ClipGeometry(40, 0, 240, 240, 320, 240, side),
        motion=MotionScore({"gaze": 0.7, "gradcam": float("nan")}, 0.2, 0.004),
        glance="query",
        query=Place(20.0, 30.0, 2.5),
        cam_label="a_very_long_name_of_a_class_that_does_not_fit_into_a_line",
        least_range={"gaze": 0.05, "opening": 0.05},
    )


def test_overlay_leaves_flat_and_faint_maps_alone():
    frames = moving_frames(3, 16, 16)
    assert np.array_equal(overlay(frames, np.full((3, 16, 16), 0.7)), frames)
    maps = np.zeros((3, 16, 16))
    maps[1, 4, 4] = 1
    painted = overlay(frames, maps)
    changed = (painted != frames).any(-1)
    assert changed[1, 4, 4]
    assert changed.sum() == 1
    noise = 1e-3 * np.random.default_rng(0).random((3, 16, 16))
    assert np.abs(overlay(frames, noise).astype(int) - frames).max() > 40
    assert np.abs(overlay(frames, noise, least=0.05).astype(int) - frames).max() < 5


def figure_of(result: GazeResult, path, monkeypatch) -> Figure:
    figures: list[Figure] = []
    draw = Figure.savefig

    def watched(figure, *arguments, **choices):
        figures.append(figure)
        draw(figure, *arguments, **choices)

    monkeypatch.setattr(Figure, "savefig", watched)
    save_sheet(result, path, "clip [x].mp4")
    return figures[0]


def texts_of(figure: Figure) -> str:
    parts = [text.get_text() for text in figure.texts]
    for axes in figure.axes:
        parts += [axes.get_ylabel(), *(text.get_text() for text in axes.texts)]
        parts += [label.get_text() for label in axes.get_yticklabels()]
        if axes.get_legend():
            parts += [text.get_text() for text in axes.get_legend().get_texts()]
    return " ".join(parts)


def test_sheet_says_what_it_shows(tmp_path, monkeypatch):
    result = made()
    figure = figure_of(result, tmp_path / "sheet.png", monkeypatch)
    text = texts_of(figure)
    for words in ("ogreg-n: [red] $x_1$ Übung  75.0 %", "clip [x].mp4", "gaze 70 %"):
        assert words in text
    assert "uniform 0.4 %" in text
    assert "nan" not in text
    for words in ("0.50 s", "d[t]", "m[t]", "stage2", "(query)", "x mean", "of max", "Grad-CAM"):
        assert words in text
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.width > 1000
        assert len(image.convert("RGB").getcolors(2**24)) > 1000
    for axes in figure.axes:
        low, high = axes.get_ylim()
        assert all(low <= y <= high for line in axes.lines for y in line.get_ydata())


def test_curves_and_frames_share_the_axis_of_time(tmp_path, monkeypatch):
    figure = figure_of(made(), tmp_path / "sheet.png", monkeypatch)
    figure.canvas.draw()
    curve = next(axes for axes in figure.axes if "d[t]" in axes.get_ylabel())
    strip = next(axes for axes in figure.axes if axes.get_ylabel() == "frames")
    assert curve.get_xlim() == strip.get_xlim() == (-0.5, 7.5)
    assert curve.get_position().x0 == strip.get_position().x0
    assert curve.get_position().x1 == strip.get_position().x1
    assert curve.get_position().y0 > strip.get_position().y1
    # Each frame in the middle of its share of time.
    middles = [sum(image.get_extent()[:2]) / 2 for image in strip.images]
    assert middles == pytest.approx(range(8))


@pytest.mark.parametrize("change", ["single", "still", "bare"])
def test_sheet_of_odd_results(change, tmp_path, monkeypatch):
    result = made(frames=1 if change == "single" else 8)
    if change == "still":
        result = replace(result, motion=None, maps={"gaze": 0 * result.maps["gaze"]})
    if change == "bare":
        result = replace(result, profiles={}, positions={}, query=None, maps={})
    figure = figure_of(result, tmp_path / "sheet.png", monkeypatch)
    assert ("still clip" in texts_of(figure)) == (change == "still")
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.width > 500


def test_overlay_video_holds_every_map_and_the_words(tmp_path):
    result = made()
    save_overlay_video(result, tmp_path / "overlay.mp4")
    with av.open(str(tmp_path / "overlay.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 8
    height, width, _ = frames[0].shape
    assert width == 5 * 256
    assert 256 < height < 400
    # The caption is light on dark, and the time below the frames changes.
    assert frames[0][:20].max() > 180
    assert np.abs(frames[0][-18:, :256].astype(int) - frames[5][-18:, :256]).max() > 60
    # The first panel is the clip itself, enlarged.
    top = height - 20 - 256
    shown = frames[3][top : top + 256, :256].astype(int)
    expected = result.frames[3].repeat(4, 0).repeat(4, 1)
    assert np.abs(shown - expected).mean() < 6


def test_gif_repeats_and_stays_small(tmp_path, monkeypatch):
    result = made()
    save_gif(result, tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as image:
        assert image.n_frames == 8
        assert image.info["loop"] == 0
        size = image.size
    limit = (tmp_path / "a.gif").stat().st_size // 2
    monkeypatch.setattr(files, "_GIF_BYTES", limit)
    save_gif(result, tmp_path / "b.gif")
    assert (tmp_path / "b.gif").stat().st_size <= limit
    with Image.open(tmp_path / "b.gif") as image:
        assert image.size < size


def arrays_in(path) -> tuple[dict[str, np.ndarray], dict]:
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
        return found, json.loads(str(found.pop("description")))
    with safe_open(path, framework="np") as file:
        words = file.metadata()["ogreg_gaze"]
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(words)  # noqa: SIM118


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_numbers_and_where_they_belong(suffix, tmp_path):
    result = made()
    path = tmp_path / f"maps.{suffix}"
    save_maps(result, path)
    arrays, words = arrays_in(path)
    for kind, maps in result.maps.items():
        assert arrays[f"maps/{kind}"].dtype == np.float32
        np.testing.assert_array_equal(arrays[f"maps/{kind}"], maps)
    assert arrays["frame_indices"].tolist() == result.indices
    assert arrays["seconds"].tolist() == result.seconds
    # The clip's 64 cells are 240 of the video's pixels, from 40 on.
    assert arrays["x_edges"].tolist() == pytest.approx(np.linspace(40, 280, 65))
    assert arrays["y_edges"].tolist() == pytest.approx(np.linspace(0, 240, 65))
    boxes, scale = arrays["boxes/gaze"], 240 / 64
    assert boxes.shape == (8, 4)
    x0, y0, x1, y1 = boxes[2]
    assert x0 >= 40 + 10 * scale - 1e-9
    assert x1 <= 40 + 20 * scale + 1e-9
    assert y0 >= 10 * scale - 1e-9
    assert y1 <= 20 * scale + 1e-9
    assert not arrays["flat/gaze"].any()
    assert arrays["flat/gradcam"].all()
    assert boxes_are_whole(arrays["boxes/gradcam"])
    np.testing.assert_array_equal(arrays["curves/stage2.block1/d"], [0, 0.3, 0.6])
    assert arrays["positions/stage2.block1"].tolist() == [1, 3, 5]
    assert arrays["scores"].tolist() == [0.75, 0.25]
    assert words["label"] == result.label
    assert words["blocks"]["glance"] == ["stage1.block1", "stage1.block2", "stage2.block1"]
    assert words["geometry"]["video_width"] == 320


def boxes_are_whole(boxes: np.ndarray) -> bool:
    return np.allclose(boxes, [40, 0, 280, 240])


@pytest.mark.parametrize("suffix", ["png", "mp4", "gif", "npz", "safetensors"])
def test_an_interrupted_file_leaves_nothing(suffix, tmp_path, monkeypatch):
    """Stopped in the middle: no file, no part of one."""

    def stop(*_arguments, **_choices):
        raise KeyboardInterrupt

    save = {"png": lambda r, p: save_sheet(r, p, ""), "mp4": save_overlay_video, "gif": save_gif}
    monkeypatch.setattr(files._Panels, "_write", stop)
    monkeypatch.setattr(files, "mass_boxes", stop)
    monkeypatch.setattr(pictures, "mass_boxes", stop)
    with pytest.raises(KeyboardInterrupt):
        save.get(suffix, save_maps)(made(), tmp_path / f"x.{suffix}")
    assert list(tmp_path.iterdir()) == []
