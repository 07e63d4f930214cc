"""Predictions from a checkpoint on video files, along the same way as evaluation."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ogreg_core.checkpoint import CheckpointInfo, load_model
from ogreg_core.data.loader import TimedViews, Views, load_timed_views
from ogreg_core.data.manifest import Manifest, Row
from ogreg_core.errors import VideoError
from ogreg_core.evaluation import resolve_precision, score_views
from ogreg_core.processes import Lost, run_isolated
from ogreg_core.video import VideoInfo, probe

__all__ = [
    "DEADLINE_SECONDS",
    "FileViews",
    "Prediction",
    "Predictor",
    "read_views",
    "single_video",
    "within",
]

# How long a file may take to be read; a long one on a slow disk needs a minute for its packets.
DEADLINE_SECONDS = 120.0

Result = TypeVar("Result")


@dataclass(frozen=True)
class Prediction:
    """Scores of one video.

    Args:
        video: what was found out about the file.
        scores: float32 ``[classes]``, sums to 1.
        top: the best classes as (label, score), best first.
    """

    video: VideoInfo
    scores: Tensor
    top: list[tuple[str, float]]


def single_video(path: str | Path) -> tuple[VideoInfo, Manifest]:
    """Probe a file and wrap it as a manifest of one row, so that it takes the way of every other
    video.

    Raises:
        VideoError: the file cannot be read.
    """
    info = probe(path)
    file = Path(path)
    row = Row.from_probe(file.name, info)
    return info, Manifest(root=file.parent, split="", rows=(row,), labels=("",))


def within(function: Callable[[], Result], path: str, deadline: float) -> Result:
    """The result of a function that reads a file, unless it hangs.

    In a thread, which costs nothing, where a process would have to import torch first. A hanging
    decoder hears of nothing: its thread is left behind.

    Args:
        function: what to do; its exceptions are raised here.
        path: the file, for the error.
        deadline: seconds.

    Raises:
        VideoError: with the code ``time-out``.
    """
    found: list[Result] = []
    failed: list[BaseException] = []

    def work() -> None:
        try:
            found.append(function())
        except BaseException as error:  # raised again where somebody waits
            failed.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(deadline)
    if failed:
        raise failed[0]
    if not found:
        raise _too_slow(path, f"reading did not end within {deadline:g} s")
    return found[0]


class FileViews(NamedTuple):
    """A file that has been read.

    Args:
        video: what was found out about it.
        manifest: with it as the only row.
        views: uint8 ``[V, 3, T, size, size]``.
        times: of their frames, float32 ``[V, T]``, see :class:`ogreg_core.data.loader.TimedViews`.
    """

    video: VideoInfo
    manifest: Manifest
    views: Tensor
    times: Tensor


def read_views(path: str | Path, views: Views, deadline: float = DEADLINE_SECONDS) -> FileViews:
    """The views of a file, unless reading it hangs.

    Raises:
        VideoError: the file cannot be read, or not in time.
    """
    return within(lambda: _load(path, views), str(path), deadline)


def _load(path: str | Path, views: Views) -> FileViews:
    video, manifest = single_video(path)
    return FileViews(video, manifest, *load_timed_views(manifest, manifest.rows[0], views))


def _too_slow(path: str, why: str) -> VideoError:
    return VideoError(
        f"{path} cannot be read in time",
        code="time-out",
        why=f"{why}: its decoder hangs, or its disk does",
        fix="re-encode the file with ffmpeg, or leave it out",
    )


class _Loaded(NamedTuple):
    """A file that waits for the model.

    Args:
        video: what was found out about it.
        timed: its views.
    """

    video: VideoInfo
    timed: TimedViews


class _Job(NamedTuple):
    number: int
    path: str
    views: Views


def _load_apart(job: _Job) -> tuple[VideoInfo, Any, Any] | VideoError:
    """In a worker process: views and times as NumPy arrays, as tensors would pass through shared memory
    that goes with the worker; errors as values, which keep their fields.
    """
    if multiprocessing.parent_process() is not None:
        torch.set_num_threads(1)
    try:
        loaded = _load(job.path, job.views)
    except VideoError as error:
        return error
    return loaded.video, loaded.views.numpy(), loaded.times.numpy()


class Predictor:
    """A model with everything its checkpoint says about input and labels.

    Args:
        model: in evaluation mode.
        info: the checkpoint's description.
        device: where to run; the precision is the checkpoint's.
    """

    def __init__(self, model: nn.Module, info: CheckpointInfo, device: torch.device) -> None:
        self.model = model.to(device).eval()
        self.info = info
        self.device = device
        self.precision = resolve_precision(info.precision, device)

    @classmethod
    def from_checkpoint(cls, path: str | Path, device: torch.device) -> Predictor:
        """Load a checkpoint file.

        Raises:
            CheckpointError: missing, broken or not ours.
        """
        model, info = load_model(path)
        return cls(model, info, device)

    def score(self, views: Tensor, times: Tensor | None = None) -> Tensor:
        """Scores of videos.

        Args:
            views: uint8 ``[B, V, 3, T, size, size]``.
            times: of their frames, ``[B, V, T]``; None if unknown.

        Returns:
            float32 ``[B, classes]`` on the CPU, rows sum to 1.
        """
        mean, std = self.info.mean, self.info.std
        return score_views(self.model, views, mean, std, self.precision, times)

    def name(self, scores: Tensor, top: int) -> list[tuple[str, float]]:
        """The best classes of scores ``[classes]`` as (label, score), best first."""
        best = scores.topk(min(top, len(scores)))
        return [
            (self.info.labels[i], float(s))
            for s, i in zip(best.values, best.indices.tolist(), strict=True)
        ]

    def predict(
        self,
        path: str | Path,
        views: Views | None = None,
        top: int = 5,
        deadline: float = DEADLINE_SECONDS,
    ) -> Prediction:
        """Scores of one video file.

        Args:
            path: the file.
            views: test protocol; default: the checkpoint's.
            top: how many classes to name.
            deadline: seconds that reading may take.

        Raises:
            VideoError: the file cannot be read.
        """
        chosen = views or self.info.views()
        read = read_views(path, chosen, deadline)
        timed = TimedViews(read.views, read.times)
        return self._predictions([_Loaded(read.video, timed)], top)[0]

    def predict_files(
        self,
        files: Sequence[str],
        views: Views | None = None,
        top: int = 5,
        *,
        batch: int = 8,
        workers: int = 1,
        deadline: float = DEADLINE_SECONDS,
        stopping: Callable[[], bool] = lambda: False,
    ) -> Iterator[tuple[str, Prediction | VideoError]]:
        """Scores of many video files, in their order, each as soon as it and those before are known.

        Files are read ahead in worker processes, so that one that crashes or hangs its decoder is
        one without a score.

        Args:
            files: as given by the user; repeats allowed.
            views, top: as for :meth:`predict`.
            batch: files whose views pass through the model together.
            workers: processes that read; 0 reads here, without protection.
            deadline: seconds that a file may take.
            stopping: asked twice a second; once it is true the results end.
        """
        chosen = views or self.info.views()
        jobs = (_Job(number, file, chosen) for number, file in enumerate(files))
        results = run_isolated(
            _load_apart,
            jobs,
            min(workers, len(files)),
            deadline=lambda _job: deadline,
            preload=["ogreg_core.inference"],
            stopping=stopping,
        )
        done: dict[int, Prediction | VideoError] = {}
        following = 0
        for known in self._score_in_batches(results, top, batch):
            done.update(known)
            while following in done:
                yield files[following], done.pop(following)
                following += 1

    def _score_in_batches(
        self,
        results: Iterator[tuple[_Job, tuple[VideoInfo, Any, Any] | VideoError | Lost]],
        top: int,
        batch: int,
    ) -> Iterator[dict[int, Prediction | VideoError]]:
        """What becomes known at a time, by the number of the file."""
        waiting: dict[int, _Loaded] = {}
        for job, result in results:
            if isinstance(result, Lost):
                yield {job.number: _lost_file(job.path, result)}
            elif isinstance(result, VideoError):
                yield {job.number: result}
            else:
                video, *arrays = result
                loaded = _Loaded(video, TimedViews(*map(torch.from_numpy, arrays)))
                shape = loaded.timed.views.shape
                if any(other.timed.views.shape != shape for other in waiting.values()):
                    yield self._predict_batch(waiting, top)
                    waiting = {}
                waiting[job.number] = loaded
                if len(waiting) == batch:
                    yield self._predict_batch(waiting, top)
                    waiting = {}
        if waiting:
            yield self._predict_batch(waiting, top)

    def _predict_batch(
        self, loaded: dict[int, _Loaded], top: int
    ) -> dict[int, Prediction | VideoError]:
        return dict(zip(loaded, self._predictions(list(loaded.values()), top), strict=True))

    def _predictions(self, loaded: Sequence[_Loaded], top: int) -> list[Prediction]:
        views, times = zip(*(file.timed for file in loaded), strict=True)
        scores = self.score(torch.stack(views), torch.stack(times))
        return [
            Prediction(file.video, row, self.name(row, top))
            for file, row in zip(loaded, scores, strict=True)
        ]


def _lost_file(path: str, lost: Lost) -> VideoError:
    if lost.code == "time-out":
        return _too_slow(path, f"reading was {lost.detail}")
    if lost.from_outside:
        return VideoError(
            f"{path} was not read",
            code="crash",
            why=f"{lost.detail}: somebody ended it, or memory ran out",
            fix="fewer --workers, or the file by itself",
        )
    return VideoError(
        f"{path} crashes its decoder",
        code="crash",
        why=lost.detail,
        fix="re-encode the file with ffmpeg, or leave it out",
    )
