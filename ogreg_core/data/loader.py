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
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ogreg_core.data.manifest import Manifest, Row
from ogreg_core.data.mixing import draw_erasing
from ogreg_core.data.order import BatchOrder, sample_rng
from ogreg_core.data.sampling import (
    ClipSampling,
    frame_numbers,
    middle_only,
    positions,
    test_indices,
    train_indices,
)
from ogreg_core.data.transforms import (
    Augmentation,
    TestCrops,
    augment,
    draw_short_side,
    scaled_size,
    test_crops,
)
from ogreg_core.data.watchdog import DEADLINE_SECONDS, Board, publish_to, reading, watched
from ogreg_core.distributed import SINGLE, World
from ogreg_core.errors import DataError, OgregError, VideoError
from ogreg_core.video import VideoReader

__all__ = [
    "ClipDataset",
    "FrameControl",
    "TrainBatch",
    "Unreadable",
    "ViewBatch",
    "ViewDataset",
    "Views",
    "batches",
    "load_views",
    "locate",
    "test_loader",
    "train_loader",
]

FrameControl = Literal["none", "shuffled", "reversed", "middle"]

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


def _read_clip(
    manifest: Manifest, row: Row, chosen: Sequence[int], sampling: ClipSampling, short_side: int
) -> Tensor:
    """Decoded frames as the transforms want them, uint8 ``[T, 3, H, W]``, scaled while decoding."""
    path = manifest.video(row)
    reader = VideoReader(path, row.decoder)
    size = scaled_size(row.height, row.width, short_side) if short_side else None
    try:
        numbers = frame_numbers(chosen, row, sampling, reader.indices_at)
        return reader.frames_at(numbers, size).permute(0, 3, 1, 2)
    except OSError as error:
        raise VideoError(
            f"{path} cannot be read", code="unreadable", why=str(error.strerror or error)
        ) from error


def locate(
    manifest: Manifest, row: Row, chosen: Sequence[int], sampling: ClipSampling
) -> list[tuple[int, float]]:
    """The frame at each chosen position and when it appears: (frame number, seconds)."""
    reader = VideoReader(manifest.video(row), row.decoder)
    numbers = frame_numbers(chosen, row, sampling, reader.indices_at)
    if row.variable_rate:
        return [(number, float(reader.index.seconds[number])) for number in numbers]
    return [(number, number / row.fps) for number in numbers]


class TrainBatch(NamedTuple):
    """A training batch; R is the number of views of each decoded clip.

    Args:
        clips: uint8 ``[B * R, 3, T, size, size]``.
        labels: int64 ``[B * R]``.
        indices: manifest rows, int64 ``[B * R]``.
        boxes: what to erase, int64 ``[B * R, 5]``, see :func:`ogreg_core.data.mixing.erase`.
        unreadable: videos that failed when it was their turn; for each another was drawn.
    """

    clips: Tensor
    labels: Tensor
    indices: Tensor
    boxes: Tensor
    unreadable: tuple[Unreadable, ...]


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
                    frames = self._read(epoch, index, number)
                except VideoError as error:
                    failed.append(Unreadable(number, self.manifest.rows[number].path, str(error)))
                    continue
                # Others that failed as replacements are counted when it is their turn.
                return self._views(frames, number, key, tuple(failed[:1]))
        raise DataError(
            f"{len(failed)} videos, drawn at random, cannot be read",
            where=f"{self.manifest.root}: {failed[0].path} and others",
            why=failed[0].reason,
            fix="check that the data set's disk is there, or run `ogreg prepare` again",
        )

    def _read(self, epoch: int, index: int, number: int) -> Tensor:
        """Frames of video ``number`` with the draws of sample ``index``."""
        row = self.manifest.rows[number]
        rng = sample_rng(self.seed, epoch, index, "frames")
        chosen = train_indices(positions(row, self.sampling), self.sampling, rng)
        rng = sample_rng(self.seed, epoch, index, "short side")
        short_side = draw_short_side(self.augmentation, rng)
        return _read_clip(self.manifest, row, chosen, self.sampling, short_side)

    def _views(
        self,
        frames: Tensor,
        number: int,
        key: tuple[int, int],
        unreadable: tuple[Unreadable, ...],
    ) -> TrainBatch:
        spec = self.augmentation
        label = self.manifest.rows[number].label
        clips, labels, boxes = [], [], []
        for view in range(spec.repeats):
            rng = sample_rng(self.seed, *key, "view", view)
            clip, changed = augment(frames, label, spec, rng)
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
        )


@dataclass(frozen=True)
class Views:
    """The test protocol: which clips and crops of a video are scored.

    Args:
        sampling: how a clip's frames are picked.
        clips: clips per video, spread over time.
        crops: how each is cropped.
        control: ``none``; or frames ``shuffled`` (seeded per video), ``reversed``, or the
            ``middle`` one repeated, to find out how much of a score needs the order of frames.
    """

    sampling: ClipSampling
    clips: int
    crops: TestCrops
    control: FrameControl = "none"

    @property
    def count(self) -> int:
        """Views per video."""
        return self.clips * self.crops.crops

    def indices(self, total: int, seed: int = 0) -> list[list[int]]:
        """Positions of each clip's frames out of ``total``; frames, for videos of even rate."""
        clips = [test_indices(total, self.sampling, clip, self.clips) for clip in range(self.clips)]
        if self.control == "reversed":
            return [clip[::-1] for clip in clips]
        if self.control == "middle":
            return [middle_only(clip) for clip in clips]
        if self.control == "shuffled":
            rng = sample_rng(seed, 0, total)
            return [rng.sample(clip, len(clip)) for clip in clips]
        return clips


def load_views(manifest: Manifest, row: Row, views: Views, seed: int = 0) -> Tensor:
    """All views of one video: uint8 ``[clips * crops, 3, T, size, size]``.

    Raises:
        VideoError: the file cannot be read.
    """
    clips = views.indices(positions(row, views.sampling), seed)
    flat = [index for clip in clips for index in clip]
    frames = _read_clip(manifest, row, flat, views.sampling, views.crops.short_side)
    return torch.cat([test_crops(part, views.crops) for part in frames.split(len(clips[0]))])


class ViewBatch(NamedTuple):
    """A test batch.

    Args:
        views: uint8 ``[B, V, 3, T, size, size]`` of the videos that could be read.
        labels: int64 ``[B]``.
        indices: manifest rows, int64 ``[B]``.
        unreadable: the others.
    """

    views: Tensor
    labels: Tensor
    indices: Tensor
    unreadable: tuple[Unreadable, ...]


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
                views = load_views(self.manifest, row, self.views, seed=index)[None]
        except VideoError as error:
            nothing = torch.empty(0, dtype=torch.int64)
            failed = Unreadable(index, row.path, str(error))
            return ViewBatch(torch.empty(0, dtype=torch.uint8), nothing, nothing, (failed,))
        return ViewBatch(views, torch.tensor([row.label]), torch.tensor([index]), ())


def _start_worker(board: Board, worker: int) -> None:
    _quiet_worker(worker)
    publish_to(board, worker)


def _quiet_worker(_worker: int) -> None:
    """One thread per worker; signals are the main process's to handle."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Terminals and launchers signal a whole process group: out of it, so that the main process decides
    # when the workers go. They must not ignore SIGTERM, by which it tells them.
    if hasattr(os, "setsid"):
        os.setsid()
    torch.set_num_threads(1)
    if not os.environ.get("OGREG_DEBUG"):
        # Native libraries write about damaged files straight to file descriptor 2.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)
        os.close(nowhere)


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
    *columns, unreadable = zip(*items, strict=True)
    # A video that could not be read has empty tensors, whose shapes fit nothing.
    filled = [[part for part in column if len(part)] or column[:1] for column in columns]
    failed = tuple(failure for found in unreadable for failure in found)
    return type(items[0])(*(torch.cat(list(column)) for column in filled), failed)


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
