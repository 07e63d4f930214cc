"""From a manifest to batches.

Every sample's augmentation is a function of (seed, epoch, index) alone: neither the number of
workers nor a restart changes what a sample looks like. The epoch travels with the index, so that
workers need no state.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ogreg_core.data.manifest import Manifest, Row
from ogreg_core.data.mixing import draw_erasing
from ogreg_core.data.order import BatchOrder, sample_rng
from ogreg_core.data.sampling import (
    ClipSampling,
    clip_seconds,
    fold,
    frame_numbers,
    positions,
    train_places,
)
from ogreg_core.data.transforms import (
    Augmentation,
    augment,
    draw_short_side,
    scaled_size,
    test_crops,
)
from ogreg_core.data.views import FrameControl, Views
from ogreg_core.data.watchdog import DEADLINE_SECONDS, Board, publish_to, reading, watched
from ogreg_core.distributed import SINGLE, World
from ogreg_core.errors import DataError, OgregError, VideoError
from ogreg_core.processes import end_with_parent, silence_native_code
from ogreg_core.video import VideoReader

__all__ = [
    "ClipDataset",
    "FrameControl",
    "TimedViews",
    "TrainBatch",
    "Unreadable",
    "ViewBatch",
    "ViewDataset",
    "Views",
    "batches",
    "load_timed_views",
    "load_views",
    "locate",
    "shown_at",
    "test_loader",
    "train_loader",
]

# So many videos drawn at random fail only when something is wrong with the disk, not with a video.
_REPLACEMENTS = 10


@dataclass(frozen=True)
class Unreadable:
    """A video that failed while it was needed.

    Args:
        index: manifest row.
        path: as in the manifest.
        reason: one sentence.
    """

    index: int
    path: str
    reason: str


class _Read(NamedTuple):
    """Clips of a video that have been decoded together.

    Args:
        frames: uint8 ``[clips * T, 3, H, W]``, as the transforms want them.
        times: of each clip, float32 ``[clips, T]``, see :class:`TrainBatch`.
    """

    frames: Tensor
    times: Tensor


def _read_clips(
    manifest: Manifest,
    row: Row,
    chosen: Sequence[int],
    places: Sequence[Sequence[int]],
    sampling: ClipSampling,
    short_side: int,
) -> _Read:
    """Decode the frames at the chosen positions, scaled while decoding, and time clips by places."""
    path = manifest.video(row)
    reader = VideoReader(path, row.decoder)
    size = scaled_size(row.height, row.width, short_side) if short_side else None
    total = positions(row, sampling)
    try:
        numbers = frame_numbers(chosen, row, sampling, reader.indices_at)
        frames = reader.frames_at(numbers, size).permute(0, 3, 1, 2)
        times = []
        for clip in places:
            played = frame_numbers(fold(clip, total, sampling), row, sampling, reader.indices_at)
            times.append(clip_seconds(clip, shown_at(reader, row, played), total, row, sampling))
        return _Read(frames, torch.tensor(times))
    except OSError as error:
        raise VideoError(
            f"{path} cannot be read", code="unreadable", why=str(error.strerror or error)
        ) from error


def shown_at(reader: VideoReader, row: Row, numbers: Sequence[int]) -> list[float]:
    """When frames appear, in seconds from the video's first: as the file says where its frame times are
    uneven, otherwise by the rate, without a look into the file.
    """
    if row.variable_rate:
        return [float(reader.index.seconds[number]) for number in numbers]
    return [number / row.fps for number in numbers]


def locate(
    manifest: Manifest, row: Row, chosen: Sequence[int], sampling: ClipSampling
) -> list[tuple[int, float]]:
    """The frame at each chosen position and when it appears: (frame number, seconds)."""
    reader = VideoReader(manifest.video(row), row.decoder)
    numbers = frame_numbers(chosen, row, sampling, reader.indices_at)
    return list(zip(numbers, shown_at(reader, row, numbers), strict=True))


class TrainBatch(NamedTuple):
    """A training batch; R is the number of views of each decoded clip.

    Args:
        clips: uint8 ``[B * R, 3, T, size, size]``.
        labels: int64 ``[B * R]``.
        indices: manifest rows, int64 ``[B * R]``.
        boxes: what to erase, int64 ``[B * R, 5]``, see :func:`ogreg_core.data.mixing.erase`.
        unreadable: videos that failed when it was their turn; for each another was drawn.
        times: when each frame appears as the clip is played, in seconds from its first one, float32
            ``[B * R, T]``; None where nothing was read from videos.
    """

    clips: Tensor
    labels: Tensor
    indices: Tensor
    boxes: Tensor
    unreadable: tuple[Unreadable, ...]
    times: Tensor | None = None


class ClipDataset(Dataset[TrainBatch]):
    """Training samples: one random clip per video and epoch, in one or more views.

    Items are addressed by (epoch, index) and are batches of one clip. Where a video cannot be read
    another one, drawn at random, takes its place, and the item says so.

    Raises:
        DataError: on access, if many videos in a row cannot be read.
    """

    def __init__(
        self, manifest: Manifest, sampling: ClipSampling, augmentation: Augmentation, seed: int
    ):
        self.manifest = manifest
        self.sampling = sampling
        self.augmentation = augmentation
        self.seed = seed

    def __len__(self) -> int:
        return len(self.manifest.rows)

    def __getitem__(self, key: tuple[int, int]) -> TrainBatch:
        epoch, index = key
        others = sample_rng(self.seed, epoch, index, "replacement")
        places = [index, *(others.randrange(len(self)) for _ in range(_REPLACEMENTS))]
        failed: list[Unreadable] = []
        for number in places:
            with reading(number):
                try:
                    read = self._read(epoch, index, number)
                except VideoError as error:
                    failed.append(Unreadable(number, self.manifest.rows[number].path, str(error)))
                    continue
                # Others that failed as replacements are counted when it is their turn.
                return self._views(read, number, key, tuple(failed[:1]))
        raise DataError(
            f"{len(failed)} videos, drawn at random, cannot be read",
            where=f"{self.manifest.root}: {failed[0].path} and others",
            why=failed[0].reason,
            fix="check that the data set's disk is there, or run `ogreg prepare` again",
        )

    def _read(self, epoch: int, index: int, number: int) -> _Read:
        """A clip of video ``number`` with the draws of sample ``index``."""
        row = self.manifest.rows[number]
        rng = sample_rng(self.seed, epoch, index, "frames")
        total = positions(row, self.sampling)
        places = train_places(total, self.sampling, rng)
        chosen = fold(places, total, self.sampling)
        rng = sample_rng(self.seed, epoch, index, "short side")
        short_side = draw_short_side(self.augmentation, rng)
        return _read_clips(self.manifest, row, chosen, [places], self.sampling, short_side)

    def _views(
        self,
        read: _Read,
        number: int,
        key: tuple[int, int],
        unreadable: tuple[Unreadable, ...],
    ) -> TrainBatch:
        spec = self.augmentation
        label = self.manifest.rows[number].label
        clips, labels, boxes = [], [], []
        for view in range(spec.repeats):
            rng = sample_rng(self.seed, *key, "view", view)
            clip, changed = augment(read.frames, label, spec, rng)
            clips.append(clip)
            labels.append(changed)
            rng = sample_rng(self.seed, *key, "erasing", view)
            boxes.append(draw_erasing(spec.erasing, spec.size, spec.size, rng))
        return TrainBatch(
            torch.stack(clips),
            torch.tensor(labels),
            torch.full((spec.repeats,), number),
            torch.tensor(boxes),
            unreadable,
            read.times.repeat(spec.repeats, 1),
        )


class TimedViews(NamedTuple):
    """All views of one video.

    Args:
        views: uint8 ``[clips * crops, 3, T, size, size]``.
        times: when each frame is due as its clip is played, in seconds from the clip's first one,
            float32 ``[clips * crops, T]``, ascending: shuffled or repeated pictures are shown at the
            times of the clip that is in order; of a reversed one the distances are reversed too.
    """

    views: Tensor
    times: Tensor


def load_timed_views(manifest: Manifest, row: Row, views: Views, seed: int = 0) -> TimedViews:
    """All views of one video, and the times of their frames.

    Raises:
        VideoError: the file cannot be read.
    """
    total = positions(row, views.sampling)
    flat = [index for clip in views.indices(total, seed, row.path) for index in clip]
    places = views.places(total, row.path)
    short_side = views.crops.short_side
    frames, times = _read_clips(manifest, row, flat, places, views.sampling, short_side)
    if views.control == "reversed":
        times = times[:, -1:] - times.flip(1)
    crops = [test_crops(part, views.crops) for part in frames.split(views.frames)]
    return TimedViews(torch.cat(crops), times.repeat_interleave(views.crops.crops, dim=0))


def load_views(manifest: Manifest, row: Row, views: Views, seed: int = 0) -> Tensor:
    """The pixels of :func:`load_timed_views`."""
    return load_timed_views(manifest, row, views, seed).views


class ViewBatch(NamedTuple):
    """A test batch.

    Args:
        views: uint8 ``[B, V, 3, T, size, size]`` of the videos that could be read.
        labels: int64 ``[B]``.
        indices: manifest rows, int64 ``[B]``.
        unreadable: the others.
        times: of the views, float32 ``[B, V, T]``, see :class:`TimedViews`; None where nothing was
            read from videos.
    """

    views: Tensor
    labels: Tensor
    indices: Tensor
    unreadable: tuple[Unreadable, ...]
    times: Tensor | None = None


class ViewDataset(Dataset[ViewBatch]):
    """Test samples: a batch of one video each, in manifest order."""

    def __init__(self, manifest: Manifest, views: Views) -> None:
        self.manifest = manifest
        self.views = views

    def __len__(self) -> int:
        return len(self.manifest.rows)

    def __getitem__(self, index: int) -> ViewBatch:
        row = self.manifest.rows[index]
        try:
            with reading(index):
                views, times = load_timed_views(self.manifest, row, self.views, seed=index)
        except VideoError as error:
            nothing = torch.empty(0, dtype=torch.int64)
            failed = Unreadable(index, row.path, str(error))
            pixels, times = torch.empty(0, dtype=torch.uint8), torch.empty(0)
            return ViewBatch(pixels, nothing, nothing, (failed,), times)
        label = torch.tensor([row.label])
        return ViewBatch(views[None], label, torch.tensor([index]), (), times[None])


def _start_worker(board: Board, worker: int) -> None:
    _quiet_worker(worker)
    publish_to(board, worker)


def _quiet_worker(_worker: int) -> None:
    """One thread per worker; signals are the main process's to handle."""
    import signal

    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Terminals and launchers signal a whole process group: out of it, so that the main process decides
    # when the workers go. They must not ignore SIGTERM, by which it tells them.
    if hasattr(os, "setsid"):
        os.setsid()
    torch.set_num_threads(1)
    if not os.environ.get("OGREG_DEBUG"):
        silence_native_code()


class _Guarded(Dataset[Any]):
    """Hands errors over as values: torch would turn them into text on the way out of a worker."""

    def __init__(self, dataset: ClipDataset | ViewDataset, board: Board | None) -> None:
        self.dataset = dataset
        self.board = board

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Any) -> Any:
        try:
            return self.dataset[key]
        except OgregError as error:
            return error

    def file(self, row: int) -> str:
        """Where the video of a manifest row lies."""
        manifest = self.dataset.manifest
        return str(manifest.video(manifest.rows[row]))


def _collate(items: list[Any]) -> Any:
    """Join batches of one; an error takes the whole batch's place."""
    for item in items:
        if isinstance(item, OgregError):
            return item
    kind = type(items[0])
    return kind(*(_join(column) for column in zip(*items, strict=True)))


def _join(column: tuple[Any, ...]) -> Any:
    """One field of several batches: tensors, unreadable videos, or None in every batch."""
    if column[0] is None:
        return None
    if isinstance(column[0], tuple):
        return tuple(failure for failed in column for failure in failed)
    # A video that could not be read has empty tensors, whose shapes fit nothing.
    filled = [part for part in column if len(part)] or column[:1]
    return torch.cat(list(filled))


def batches(loader: DataLoader[Any]) -> Iterator[Any]:
    """The batches of a loader made here: :class:`TrainBatch` or :class:`ViewBatch`.

    Raises:
        DataError: too many videos cannot be read; raised in the calling process with all its fields.
        LostFile: a file made its worker crash or hang; all workers have been ended.
        LostWorker: a worker was ended from outside.
    """
    guarded = loader.dataset
    assert isinstance(guarded, _Guarded)
    passed = watched(loader, guarded.board, guarded.file) if guarded.board else loader
    for batch in passed:
        if isinstance(batch, OgregError):
            raise batch
        yield batch


def _loader(
    dataset: ClipDataset | ViewDataset, workers: int, deadline: float, **options: Any
) -> DataLoader[Any]:
    board = Board(workers, deadline) if workers else None
    return DataLoader(
        _Guarded(dataset, board),
        collate_fn=_collate,
        num_workers=workers,
        worker_init_fn=partial(_start_worker, board) if board else None,
        # Without one of its own, each pass would draw from the global generator and break resuming.
        generator=torch.Generator(),
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        **options,
    )


def train_loader(
    dataset: ClipDataset, order: BatchOrder, workers: int, *, deadline: float = DEADLINE_SECONDS
) -> DataLoader[Any]:
    """This process's micro-batches in the given order; read them with :func:`batches`.

    Args:
        dataset, order: what to load, and when.
        workers: processes; 0 loads in this one, without protection from files that crash or hang.
        deadline: seconds that a worker may sit on one file while a batch is waited for; 0: for
            ever.
    """
    return _loader(dataset, workers, deadline, batch_sampler=order)


def test_loader(
    dataset: ViewDataset,
    batch_size: int,
    workers: int,
    world: World = SINGLE,
    *,
    deadline: float = DEADLINE_SECONDS,
) -> DataLoader[Any]:
    """Batches of ``batch_size`` videos in manifest order; of several processes each gets every
    so-manieth video, none gets one twice. ``workers`` and ``deadline`` as for :func:`train_loader`.
    """
    own = range(world.rank, len(dataset), world.size)
    return _loader(dataset, workers, deadline, batch_size=batch_size, sampler=own)


test_loader.__test__ = False  # type: ignore[attr-defined]  # pytest would collect it by its name
