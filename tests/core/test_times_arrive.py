"""The times of a file of uneven frames reach the model, whichever way its clips take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ogreg_core.checkpoint import CheckpointInfo, save_checkpoint
from ogreg_core.data.loader import ClipDataset, TrainBatch, batches, train_loader
from ogreg_core.data.manifest import Row, load_manifest, write_dataset
from ogreg_core.data.mixing import Mixing
from ogreg_core.data.order import BatchOrder
from ogreg_core.data.sampling import ClipSampling
from ogreg_core.data.transforms import Augmentation
from ogreg_core.distributed import SINGLE
from ogreg_core.errors import UsageError
from ogreg_core.evaluate_checkpoint import evaluate_checkpoint
from ogreg_core.evaluation import score_views
from ogreg_core.export import Choice, trace_checkpoint
from ogreg_core.gaze import localising_map, look
from ogreg_core.inference import Predictor, read_views
from ogreg_core.models.frame_times import Clock
from ogreg_core.models.registry import create_model
from ogreg_core.progress import ignore_progress
from ogreg_core.timeline.run import TimelineOptions, make_timeline
from ogreg_core.training.optim import OptimSettings, build_optimizer, build_schedule
from ogreg_core.training.prefetch import on_device
from ogreg_core.training.step import StepSettings, TrainStep
from ogreg_core.video import probe
from tests.conftest import WriteVideo, moving_frames

CPU = torch.device("cpu")
FRAMES = 4
SAMPLING = ClipSampling("dense", FRAMES, 2)
UNEVEN = [40 * i for i in range(12)] + [600 + 130 * i for i in range(8)]
OPTIONS = {"position": "rotary-seconds", "strides": [2, 1, 1, 1]}
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
INFO = CheckpointInfo(
    model="ogreg-n-ablation",
    options=OPTIONS,
    labels=["a", "b"],
    sampling=SAMPLING,
    size=32,
    short_side=32,
    mean=MEAN,
    std=STD,
    dataset="uneven",
)


@pytest.fixture
def data(encode: WriteVideo, tmp_path: Path) -> Path:
    """Two videos, of which one is uneven."""
    encode("a.mkv", moving_frames(20, 40, 48), pts_ms=UNEVEN)
    encode("b.mp4", moving_frames(30, 40, 48, seed=1), fps=20)
    rows = [
        Row.from_probe(name, probe(tmp_path / name), label)
        for label, name in enumerate(("a.mkv", "b.mp4"))
    ]
    assert [row.variable_rate for row in rows] == [True, False]
    write_dataset(
        tmp_path / "data",
        dataset="uneven",
        video_root=tmp_path,
        labels=INFO.labels,
        splits={"train": rows, "val": rows},
        version="0",
    )
    return tmp_path / "data"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = create_model(INFO.model, 2, **OPTIONS)
    save_checkpoint(tmp_path / "model.safetensors", model.state_dict(), INFO)
    return tmp_path / "model.safetensors"


@pytest.fixture
def arrived(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor | None]]:
    """The times of every pass through a model, as its stem sees them."""
    seen: list[Tensor | None] = []
    read = Clock.read

    def noting(clock: Clock, clip: Tensor) -> None:
        seen.append(None if clock.given is None else clock.given.clone())
        read(clock, clip)

    monkeypatch.setattr(Clock, "read", noting)
    return seen


def presented(path: Path) -> np.ndarray:
    """When each frame is shown, by a plain decoder."""
    with av.open(str(path)) as container:
        return np.array([float(frame.time) for frame in container.decode(video=0)])


def expected(path: Path) -> Tensor:
    """Times of the frames of the centre clip: every second position of the file's mean rate."""
    seconds = presented(path)
    duration = probe(path).duration
    start = (len(seconds) - 2 * FRAMES + 1) // 2
    at = [(start + 2 * i) * duration / len(seconds) for i in range(FRAMES)]
    shown = np.array([seconds[seconds <= t + 1e-6].max() for t in at])
    return torch.from_numpy(shown - shown[0]).float()


def assert_times(found: Tensor | None, *paths: Path) -> None:
    assert found is not None
    torch.testing.assert_close(
        found.cpu(), torch.stack([expected(path) for path in paths]), atol=1e-6, rtol=0
    )


def test_evaluation(data, checkpoint, tmp_path, arrived):
    evaluate_checkpoint(
        checkpoint,
        data=data,
        split=None,
        clips=None,
        crops=None,
        control="none",
        batch_size=2,
        workers=1,
        device=CPU,
        on_progress=ignore_progress,
    )
    (found,) = arrived
    assert_times(found, tmp_path / "a.mkv", tmp_path / "b.mp4")


@pytest.mark.parametrize("control", ["half", "double", "irregular"])
def test_evaluation_at_other_rates(data, checkpoint, arrived, control):
    report = evaluate_checkpoint(
        checkpoint,
        data=data,
        split=None,
        clips=None,
        crops=None,
        control=control,
        batch_size=2,
        workers=0,
        device=CPU,
        on_progress=ignore_progress,
    )
    frames = {"half": 2, "double": 8, "irregular": 4}[control]
    assert report.document["frames"] == frames
    assert report.document["frame_order"] == control
    (found,) = arrived
    assert found is not None
    assert found.shape == (2, frames)
    # Of the first video a frame may be on screen at two of the moments.
    assert (found[0].diff() >= 0).all()
    assert (found[1].diff() > 0).all()


def test_prediction(data, checkpoint, tmp_path, arrived):
    predictor = Predictor.from_checkpoint(checkpoint, CPU)
    path = tmp_path / "a.mkv"
    predictor.predict(path)
    assert_times(arrived.pop(), path)
    list(predictor.predict_files([str(path), str(tmp_path / "b.mp4")], workers=0))
    assert_times(arrived.pop(), path, tmp_path / "b.mp4")
    assert not arrived


def test_many_views(checkpoint, monkeypatch, arrived):
    """More than pass through the model at once."""
    monkeypatch.setattr("ogreg_core.evaluation._VIEWS_AT_ONCE", 3)
    model = Predictor.from_checkpoint(checkpoint, CPU).model
    views = torch.zeros(2, 4, 3, FRAMES, 32, 32, dtype=torch.uint8)
    times = torch.rand(2, 4, FRAMES)
    score_views(model, views, MEAN, STD, times=times)
    assert [len(found) for found in arrived] == [3, 3, 2]
    assert torch.equal(torch.cat(arrived), times.flatten(0, 1))


@pytest.mark.parametrize("window_s", [None, 100.0], ids=["streamed", "whole"])
def test_timeline(data, checkpoint, tmp_path, arrived, window_s):
    """Also the pass that looks for boxes knows the times."""
    predictor = Predictor.from_checkpoint(checkpoint, CPU)
    path = tmp_path / "a.mkv"
    options = TimelineOptions(window_s=window_s, threshold=0.0, boxes=True, batch=100)
    timeline = make_timeline(predictor, path, options=options, on_progress=ignore_progress)
    scored, *looked = arrived
    assert scored is not None
    assert len(looked) == len(scored) == len(timeline.starts)
    assert torch.equal(torch.cat(looked), scored)
    if window_s:
        return assert_times(scored, path)
    seconds, row = presented(path), timeline.source.row
    assert len(timeline.starts) > 2
    for start_s, times in zip(timeline.starts, scored, strict=True):
        at = [start_s + 2 * i / row.fps for i in range(FRAMES)]
        shown = np.array([seconds[seconds <= t + 1e-6].max() for t in at])
        np.testing.assert_allclose(times.numpy(), shown - shown[0], atol=1e-6)
    assert not torch.allclose(scored[0], scored[-1])


def test_looking(data, checkpoint, tmp_path, arrived):
    predictor = Predictor.from_checkpoint(checkpoint, CPU)
    path = tmp_path / "a.mkv"
    look(predictor, path, glance="rollout", gradcam=True)
    read = read_views(path, predictor.info.views())
    localising_map(predictor, read.views, read.times)
    assert len(arrived) > 4
    for found in arrived:
        assert_times(found, path)


def test_export_is_refused(checkpoint):
    with pytest.raises(UsageError, match="cannot be exported"):
        trace_checkpoint(checkpoint, Choice(), ignore_progress)


# --- training ----------------------------------------------------------------------------------


SETTINGS = StepSettings(4, 5.0, Mixing(), 0, "fp32", MEAN, STD)


def make_step(settings: StepSettings = SETTINGS, **options: object) -> TrainStep:
    torch.manual_seed(3)
    model = create_model(INFO.model, 2, **{**OPTIONS, **options})
    optimizer = build_optimizer(model, OptimSettings(1e-3, 0.05))
    schedule = build_schedule(
        optimizer, steps_per_epoch=4, epochs=2, warmup_epochs=0, lr=1e-3, min_lr=0.0
    )
    return TrainStep(model, optimizer, schedule, settings, SINGLE)


def test_training(data, tmp_path, arrived):
    """Two views of each clip, in micro-batches of one video."""
    manifest = load_manifest(data, "train")
    augmentation = Augmentation(32, short_side=(32, 36), repeats=2)
    dataset = ClipDataset(manifest, SAMPLING, augmentation, seed=0)
    order = BatchOrder(len(dataset), 0, 2, accumulate=2)
    parts: list[TrainBatch] = list(on_device(batches(train_loader(dataset, order, 0)), CPU))
    make_step()(parts, 0, 0)
    assert sorted(int(part.indices[0]) for part in parts) == [0, 1]
    for part, found in zip(parts, arrived, strict=True):
        # Against the file's own times: test_rates.py.
        own = dataset[0, int(part.indices[0])].times
        assert own is not None
        assert torch.equal(found, own)
        assert (own[:, 1:] > 0).all()


def invented(times: Tensor | None) -> TrainBatch:
    clips = torch.randint(256, (4, 3, FRAMES, 32, 32), dtype=torch.uint8)
    labels = torch.tensor([0, 1, 0, 1])
    boxes = torch.zeros(4, 5, dtype=torch.int64)
    return TrainBatch(clips, labels, torch.arange(4), boxes, (), times)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixed_clips_keep_the_times_of_the_larger_share(kind):
    """Against the share of white in what the model is given, of black and white clips."""
    mixing = Mixing(**{kind: 1.0}, smoothing=0.1)
    step = make_step(replace(SETTINGS, mixing=mixing, mean=(0,) * 3, std=(1,) * 3))
    times = torch.arange(4.0)[:, None] + torch.rand(4, FRAMES)
    batch = invented(times)
    batch.clips[:2], batch.clips[2:] = 255, 0
    given: list[tuple[Tensor, Tensor]] = []

    def note(clips: Tensor, times: Tensor) -> Tensor:
        given.append((clips, times))
        return torch.zeros(4, 2)

    step._forward = note  # type: ignore[assignment]
    own: set[bool] = set()
    for number in range(40):
        step._loss(batch, 0, number, 0)
        clips, found = given[-1]
        # Clips 0 and 1 are white, their partners 3 and 2 black.
        kept = bool(clips[0].mean() > 0.5)
        own.add(kept)
        assert torch.equal(found, times if kept else times.flip(0))
    assert own == {True, False}


def test_unknown_times_are_those_of_the_reference_rate(arrived):
    usual = torch.arange(FRAMES).expand(4, -1) / 8
    batch = invented(None)
    found = [make_step()([batch._replace(times=t)], 0, 0) for t in (None, usual, 2 * usual)]
    assert [times is None for times in arrived] == [True, False, False]
    assert found[0] == found[1]
    assert found[0].loss_sum != found[2].loss_sum


def test_models_that_take_no_times_get_none():
    """Neither in training nor in evaluation is there a second argument, and nothing else changes."""
    times = torch.rand(4, FRAMES)
    batch = invented(times)
    results, counts = [], []
    for given in (None, times):
        step = make_step(position="conv")
        step.model.register_forward_pre_hook(lambda _module, args: counts.append(len(args)))
        results.append(step([batch._replace(times=given)], 0, 0))
        model: nn.Module = step.model.eval()
        score_views(model, batch.clips[:, None], MEAN, STD, times=times[:, None])
    assert results[0] == results[1]
    assert counts == [1] * 4


def test_asking_for_the_shares_changes_no_draw():
    """A mixed step of a model that takes times is, at the reference rate, that of one that counts."""
    settings = replace(SETTINGS, mixing=Mixing(mixup=0.8, cutmix=1.0))
    timing, counting = make_step(settings), make_step(settings, position="rotary")
    batch = invented(torch.arange(FRAMES).expand(4, -1) / 8)
    assert timing([batch], 0, 0) == counting([batch], 0, 0)
