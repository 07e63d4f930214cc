"""The files of a timeline, read by others' readers, and its picture."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ogreg_core.data.manifest import Row
from ogreg_core.errors import VideoError
from ogreg_core.timeline.documents import (
    document_of,
    save_csv_of_events,
    save_csv_of_windows,
    save_json,
    save_web_vtt,
)
from ogreg_core.timeline.events import Box, Event, EventRules
from ogreg_core.timeline.overlay import save_overlay
from ogreg_core.timeline.picture import leading_classes, save_picture
from ogreg_core.timeline.run import Timeline
from ogreg_core.timeline.source import Source, open_source
from tests.conftest import decode_all, moving_frames

LABELS = ["<b>jump</b> & run", 'say "hi"\n--> $x$', "Ωμέγα"]
VTT_TIME = r"(\d\d):([0-5]\d):([0-5]\d)\.(\d\d\d)"


def timeline_of(source: Source, events: list[Event]) -> Timeline:
    scores = np.array([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]], np.float32)
    third = source.row.duration / 3
    return Timeline(
        source=source,
        labels=LABELS,
        window_s=third,
        hop_s=third,
        window_from="as asked for",
        smoothing="gaussian",
        rules=EventRules(0.5, 0.0, 0.0),
        starts=np.arange(3) * third,
        ends=np.arange(1, 4) * third,
        scores=scores,
        borders=np.arange(4) * third,
        curves=scores,
        events=events,
        read_to_s=source.row.duration,
        missing=0,
        frames=9,
        trouble=None,
        seconds=1.0,
    )


@pytest.fixture
def source(encode) -> Source:
    return open_source(encode("clip.mp4", np.full((30, 72, 128, 3), 90, np.uint8), fps=10))


@pytest.fixture
def found(source) -> Timeline:
    boxes = (Box(1.1, 40.0, 30.0, 80.0, 60.0),)
    return timeline_of(source, [Event(0.0, 1.0, 0, 0.7, 0.7), Event(1.0, 2.0, 1, 0.8, 0.8, boxes)])


def best_of(scores: np.ndarray) -> list[tuple[str, float]]:
    best = torch.from_numpy(scores).topk(2)
    return [(LABELS[i], float(s)) for s, i in zip(best.values, best.indices, strict=True)]


def test_json(found, tmp_path):
    save_json(document_of(found, best_of), tmp_path / "t.json")
    content = json.loads((tmp_path / "t.json").read_text(encoding="utf-8"))
    assert content["schema"] == "ogreg.timeline.v1"
    assert content["status"] == "ok"
    assert [event["label"] for event in content["events"]] == LABELS[:2]
    assert "boxes" not in content["events"][0]
    box = {"time_s": 1.1, "x0": 40.0, "y0": 30.0, "x1": 80.0, "y1": 60.0}
    assert content["events"][1]["boxes"] == [box]
    assert [window["top"][0]["label"] for window in content["windows"]] == LABELS
    broken = replace(found, trouble=VideoError("clip.mp4 breaks off"), read_to_s=1.5)
    content = document_of(broken, best_of)
    assert (content["status"], content["read_to_s"]) == ("incomplete", 1.5)
    assert "breaks off" in content["reason"]


def test_tables(found, tmp_path):
    save_csv_of_windows(found, best_of, tmp_path / "w.csv")
    with open(tmp_path / "w.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["label_1"] for row in rows] == LABELS
    assert [float(row["score_1"]) for row in rows] == pytest.approx([0.7, 0.8, 0.6], abs=1e-6)
    assert [(row["start_s"], row["end_s"]) for row in rows][1] == ("1.000", "2.000")
    save_csv_of_events(found, tmp_path / "e.csv")
    with open(tmp_path / "e.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["label"] for row in rows] == LABELS[:2]
    assert list(rows[0]) == ["start_s", "end_s", "label", "score", "peak"]


def test_web_vtt(source, tmp_path):
    """By the grammar of the standard: header, blank lines between cues, times, escaped text."""
    events = [Event(0.0, 59.9996, 0, 0.71, 0.8), Event(3599.0, 36000.25, 1, 0.8, 0.8)]
    save_web_vtt(timeline_of(source, events), tmp_path / "e.vtt")
    header, *cues = (tmp_path / "e.vtt").read_text(encoding="utf-8").split("\n\n")
    assert header == "WEBVTT"
    times, texts = [], []
    for cue in cues:
        _, timing, text = cue.strip("\n").split("\n")
        match = re.fullmatch(f"{VTT_TIME} --> {VTT_TIME}", timing)
        assert match, timing
        numbers = [int(group) for group in match.groups()]
        times.append(
            [3600 * h + 60 * m + s + t / 1000 for h, m, s, t in (numbers[:4], numbers[4:])]
        )
        texts.append(text)
    assert times == [[0.0, 60.0], [3599.0, 36000.25]]
    assert texts == ["&lt;b&gt;jump&lt;/b&gt; &amp; run 71%", 'say "hi" --&gt; $x$ 80%']


def test_picture(found, tmp_path):
    assert leading_classes(found, 2) == [0, 1]
    save_picture(found, tmp_path / "p.png", "clip $1.mp4")
    with Image.open(tmp_path / "p.png") as picture:
        assert picture.width > 1000
        colours = {colour for _, colour in picture.convert("RGB").getcolors(2**24)}
    # The curves and bars of both events, the first two of matplotlib's colours.
    assert {(31, 119, 180), (255, 127, 14)} <= colours
    silent = replace(found, events=[], trouble=VideoError("x"), read_to_s=1.0)
    save_picture(silent, tmp_path / "q.png", "x")
    assert (tmp_path / "q.png").stat().st_size > 5000


def test_overlay(found, tmp_path):
    save_overlay(found, tmp_path / "o.mp4", lambda: None, 30.0)
    frames = decode_all(tmp_path / "o.mp4").astype(int)
    assert frames.shape == (30, 72, 128, 3)
    changed = np.abs(frames - 90).max(axis=-1) > 40
    top, box = changed[:, :14].any(axis=(1, 2)), changed[:, 30:60, 40:80].any(axis=(1, 2))
    # Text from 0 to 2 s, a box from 1 to 2 s, and nothing on what follows.
    assert top.tolist() == [True] * 20 + [False] * 10
    assert box.tolist() == [False] * 10 + [True] * 10 + [False] * 10
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".tmp"]


def test_overlay_of_uneven_frame_times(encode, tmp_path):
    """Constant rate, and at every moment the picture that was on screen then."""
    times = [0, 100, 200, 300, 400, 1000, 1100, 1200, 2000, 2100]
    path = encode("v.mkv", moving_frames(10, 48, 64), pts_ms=times)
    source = open_source(path)
    assert source.row.variable_rate
    save_overlay(timeline_of(source, []), tmp_path / "o.mp4", lambda: None, 30.0)
    original = decode_all(path).mean(axis=(1, 2, 3))
    found = decode_all(tmp_path / "o.mp4").mean(axis=(1, 2, 3))
    fps = source.row.fps
    assert len(found) == pytest.approx(2.1 * fps + 1, abs=1)
    for tick, level in enumerate(found):
        at = tick / fps
        near = [i for i, ms in enumerate(times) if abs(ms / 1000 - at) <= 0.5 / fps + 1e-6]
        before = [i for i, ms in enumerate(times) if ms / 1000 <= at]
        allowed = {*near, before[-1]}
        assert min(abs(level - original[i]) for i in allowed) < 2


def test_stopped_overlay_leaves_nothing(found, tmp_path):
    calls: list[int] = []

    def heed() -> None:
        calls.append(1)
        if len(calls) > 10:
            raise KeyboardInterrupt

    target = tmp_path / "out"
    target.mkdir()
    with pytest.raises(KeyboardInterrupt):
        save_overlay(found, target / "o.mp4", heed, 30.0)
    assert list(Path(target).iterdir()) == []


def test_row_is_that_of_predict(source):
    assert isinstance(source.row, Row)
    assert source.trouble is None
