"""Of every architecture: batches score as single files, a window over a whole clip as the clip, and
events get boxes where there is a gaze.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ogreg_core.checkpoint import CheckpointInfo
from ogreg_core.data.loader import ViewDataset
from ogreg_core.data.loader import test_loader as loader_of
from ogreg_core.data.manifest import Manifest, Row
from ogreg_core.data.sampling import ClipSampling
from ogreg_core.errors import UsageError
from ogreg_core.evaluation import score_dataset
from ogreg_core.inference import Prediction, Predictor
from ogreg_core.models.registry import MODELS, create_model
from ogreg_core.progress import ignore_progress
from ogreg_core.timeline import TimelineOptions, make_timeline
from ogreg_core.video import probe, write_video
from tests.conftest import moving_frames
from tests.every_model import CPU, architectures, one_thread

# The smallest of each architecture, with the smallest input that suits it.
SIZES = {
    "ogreg-n": 32,
    "video-focalnet-n": 32,
    "xvit-n": 32,
    "gta-n": 32,
    "swin3d-n": 32,
    "mvit-v1-n": 32,
    "mvit-v2-n": 32,
    "r2plus1d-n": 32,
    "s3d-n": 32,
}
SELECTING = {"time": [{"before": 1, "ratio": 0.5}]}
LABELS = ["bend", "jump", "run", "sit", "wave"]
# Frames of the clips.
LENGTHS = (12, 17, 24, 9, 12)


@pytest.fixture(scope="module", autouse=True)
def small_layers() -> Iterator[None]:
    with one_thread():
        yield


def sharp_predictor(model: str, size: int, sampling: ClipSampling, **options: Any) -> Predictor:
    """Untrained, and of different opinions on different clips."""
    torch.manual_seed(1)
    built = create_model(model, len(LABELS), frames=sampling.frames, size=size, **options).eval()
    (head,) = (w for n, w in built.named_parameters() if n.startswith("head.") and w.ndim > 1)
    with torch.inference_mode():
        flat = torch.linspace(-2, 2, 4).view(4, 1, 1, 1, 1).expand(4, 3, 8, size, size)
        spread = built(flat).std(dim=0).max()
    head.data.mul_(2 / spread)
    info = CheckpointInfo(
        model=model,
        options=options,
        labels=LABELS,
        sampling=sampling,
        size=size,
        short_side=size + 4,
        mean=(0.4, 0.5, 0.6),
        std=(0.2, 0.3, 0.4),
    )
    return Predictor(built, info, CPU)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("clips")
    paths = []
    for number, frames in enumerate(LENGTHS):
        paths.append(folder / f"{number}.mp4")
        write_video(paths[-1], moving_frames(frames, 72, 96, seed=number), 12)
    return paths


def test_every_architecture_is_here() -> None:
    assert architectures(SIZES) == architectures(MODELS)


@pytest.mark.parametrize(("model", "size"), SIZES.items())
class TestEveryModel:
    def test_batches_score_as_single_files_and_as_eval(self, model, size, clips) -> None:
        predictor = sharp_predictor(model, size, ClipSampling("dense", 8, 2))
        views = predictor.info.views(clips=2, crops=1)
        rows = [Row.from_probe(path.name, probe(path)) for path in clips]
        manifest = Manifest(clips[0].parent, "val", tuple(rows), tuple(LABELS))
        info = predictor.info
        expected = score_dataset(
            predictor.model,
            loader_of(ViewDataset(manifest, views), 3, 0),
            info.mean,
            info.std,
            on_progress=ignore_progress,
        ).scores
        assert expected.std(dim=0).max() > 1e-3  # else every wrong way would pass, too
        files = [str(path) for path in clips]
        for batch in (2, 5):
            found = list(predictor.predict_files(files, views, batch=batch, workers=0))
            assert [file for file, _ in found] == files
            scores = torch.stack([one.scores for _, one in found if isinstance(one, Prediction)])
            torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)
        single = predictor.predict(clips[1], views)
        torch.testing.assert_close(single.scores, expected[1], atol=1e-5, rtol=0)

    @pytest.mark.parametrize("kind", ["dense", "uniform"])
    def test_a_window_over_the_whole_clip_is_the_prediction(self, model, size, kind, clips) -> None:
        """Read as a window of many would be: streamed."""
        predictor = sharp_predictor(model, size, ClipSampling(kind, 8, 2))
        expected = predictor.predict(clips[2])
        seconds = expected.video.duration
        streamed = streamed_windows(predictor, clips[2], seconds)
        torch.testing.assert_close(streamed[0], expected.scores, atol=1e-5, rtol=0)
        options = TimelineOptions(window_s=seconds)
        found = make_timeline(predictor, clips[2], options=options, on_progress=ignore_progress)
        assert found.scores.shape == (1, len(LABELS))
        torch.testing.assert_close(
            torch.from_numpy(found.scores[0]), expected.scores, atol=1e-5, rtol=0
        )

    def test_events_get_boxes_where_there_is_a_gaze(self, model, size, clips) -> None:
        predictor = sharp_predictor(model, size, ClipSampling("dense", 8, 1))
        options = TimelineOptions(threshold=0.0, min_length_s=0.0, boxes=True)
        if "gaze" not in MODELS[model].maps:
            with pytest.raises(UsageError, match="no gaze maps"):
                make_timeline(predictor, clips[2], options=options, on_progress=ignore_progress)
            return
        found = make_timeline(predictor, clips[2], options=options, on_progress=ignore_progress)
        assert found.events
        for event in found.events:
            assert event.boxes
            times = [box.time_s for box in event.boxes]
            assert times == sorted(set(times))
            for box in event.boxes:
                assert event.start_s <= box.time_s < event.end_s
                # The centre crop of 96 x 72 pixels.
                assert 12 <= box.x0 < box.x1 <= 84.5
                assert 0 <= box.y0 < box.y1 <= 72


def streamed_windows(predictor: Predictor, path: Path, window_s: float) -> torch.Tensor:
    """Scores of the windows by the pass over all frames, also where there is one window only."""
    from ogreg_core.timeline.source import open_source, read_windows
    from ogreg_core.timeline.windows import Plan

    source = open_source(path)
    views = predictor.info.views()
    plan = Plan(source.row, views, window_s, window_s, source.reader.indices_at)
    items = list(read_windows(source, plan, lambda: None, lambda number: None))
    assert len(items) == len(plan)
    return predictor.score(torch.stack([item.views for item in items]))


def test_token_selection_has_no_boxes(clips) -> None:
    predictor = sharp_predictor("ogreg-n", 32, ClipSampling("dense", 8, 1))
    predictor.info = replace(predictor.info, options={"token_selection": SELECTING})
    with pytest.raises(UsageError, match="token selection"):
        make_timeline(
            predictor,
            clips[0],
            options=TimelineOptions(boxes=True),
            on_progress=ignore_progress,
        )


def test_windows_must_leave_nothing_out(clips) -> None:
    predictor = sharp_predictor("ogreg-n", 32, ClipSampling("dense", 8, 1))
    options = TimelineOptions(window_s=1.0, hop_s=1.5)
    with pytest.raises(UsageError, match=r"--hop 1.5 is longer") as caught:
        make_timeline(predictor, clips[2], options=options, on_progress=ignore_progress)
    assert caught.value.fix == "--hop 0.5"


def test_boxes_find_what_moves(tmp_path: Path) -> None:
    """A bright square moves over a still ground, beside the centre: the box of each moment meets it."""
    rng = torch.Generator().manual_seed(0)
    ground = torch.randint(60, 120, (96, 128, 3), generator=rng, dtype=torch.uint8)
    frames = ground.repeat(32, 1, 1, 1)
    for t in range(32):
        frames[t, 20:40, 24 + t : 44 + t] = 240
    write_video(tmp_path / "square.mp4", frames, 8, crf=5)
    predictor = sharp_predictor("ogreg-n", 64, ClipSampling("dense", 8, 1), strides=[2, 1, 1, 1])
    options = TimelineOptions(threshold=0.0, min_length_s=0.0, boxes=True, hop_s=1.0)
    found = make_timeline(
        predictor, tmp_path / "square.mp4", options=options, on_progress=ignore_progress
    )
    boxes = [box for event in found.events for box in event.boxes or ()]
    assert len(boxes) >= 24
    for box in boxes:
        left = 24 + 8 * box.time_s
        assert box.x0 < left + 20
        assert box.x1 > left
        assert box.y0 < 40
        assert box.y1 > 20
        assert (box.x1 - box.x0) * (box.y1 - box.y0) < 0.35 * 96 * 128
