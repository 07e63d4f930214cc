"""From a manifest to batches.

Every sample's augmentation is a function of (seed, epoch, index) alone: neither the number of
workers nor a restart changes what a sample looks like. The epoch travels with the index, so that
workers need no state.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from ogreg_core.data.manifest import Manifest, Row
from ogreg_core.data.sampling import ClipSampling, middle_only, test_indices, train_indices
from ogreg_core.data.transforms import Augmentation, TestCrops, augment, test_crops
from ogreg_core.errors import OgregError
from ogreg_core.video import read_frames

__all__ = [
    "ClipDataset",
    "EpochSampler",
    "FrameControl",
    "ViewDataset",
    "Views",
    "batches",
    "load_views",
    "sample_rng",
    "test_loader",
    "train_loader",
]

FrameControl = Literal["none", "shuffled", "reversed", "middle"]


def sample_rng(seed: int, epoch: int, index: int) -> random.Random:
    """A generator that depends on its three arguments alone, also across Python versions and
    machines.
    """
    digest = hashlib.sha256(f"{seed},{epoch},{index}".encode()).digest()
    return random.Random(int.from_bytes(digest[:8], "big"))


def _read_clip(manifest: Manifest, row: Row, indices: Sequence[int]) -> Tensor:
    """Decoded frames as the transforms want them: uint8 ``[T, 3, H, W]``."""
    return read_frames(manifest.video(row), indices, row.decoder).permute(0, 3, 1, 2)


class ClipDataset(Dataset[tuple[Tensor, int, int]]):
    """Training samples: one random clip per video and epoch.

    Items are addressed by (epoch, index) and are ``(uint8 [3, T, size, size], label, index)``.

    Raises:
        VideoError: on access, if the file cannot be read.
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

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, int]:
        epoch, index = key
        rng = sample_rng(self.seed, epoch, index)
        row = self.manifest.rows[index]
        frames = _read_clip(self.manifest, row, train_indices(row.frames, self.sampling, rng))
        clip, label = augment(frames, row.label, self.augmentation, rng)
        return clip, label, index


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
        """Frame indices of each clip for a video of ``total`` frames."""
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
    clips = views.indices(row.frames, seed)
    flat = [index for clip in clips for index in clip]
    frames = _read_clip(manifest, row, flat)
    return torch.cat([test_crops(part, views.crops) for part in frames.split(len(clips[0]))])


class ViewDataset(Dataset[tuple[Tensor, int, int]]):
    """Test samples: ``(uint8 [views, 3, T, size, size], label, index)`` per video, in manifest
    order.
    """

    def __init__(self, manifest: Manifest, views: Views) -> None:
        self.manifest = manifest
        self.views = views

    def __len__(self) -> int:
        return len(self.manifest.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        row = self.manifest.rows[index]
        return load_views(self.manifest, row, self.views, seed=index), row.label, index


class EpochSampler(Sampler[tuple[int, int]]):
    """A seeded permutation per epoch, as (epoch, index), from any position on.

    Args:
        length: number of samples.
        seed: of the permutations.
    """

    def __init__(self, length: int, seed: int) -> None:
        self.length = length
        self.seed = seed
        self.epoch = 0
        self.start = 0

    def set_position(self, epoch: int, start: int = 0) -> None:
        """Continue at sample ``start`` of ``epoch``."""
        self.epoch = epoch
        self.start = start

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = list(range(self.length))
        sample_rng(self.seed, self.epoch, -1).shuffle(order)
        return iter([(self.epoch, index) for index in order[self.start :]])

    def __len__(self) -> int:
        return max(self.length - self.start, 0)


def _quiet_worker(_worker: int) -> None:
    """One thread per worker; signals are the main process's to handle."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Terminals and launchers signal a whole process group: out of it, so that the main process decides
    # when the workers go. They must not ignore SIGTERM, by which it tells them.
    if hasattr(os, "setsid"):
        os.setsid()
    torch.set_num_threads(1)


class _Guarded(Dataset[Any]):
    """Hands errors over as values: torch would turn them into text on the way out of a worker."""

    def __init__(self, dataset: ClipDataset | ViewDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Any) -> Any:
        try:
            return self.dataset[key]
        except OgregError as error:
            return error


def _collate(items: list[Any]) -> Any:
    for item in items:
        if isinstance(item, OgregError):
            return item
    return default_collate(items)


def batches(loader: DataLoader[Any]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The batches of a loader made here.

    Raises:
        VideoError: a video cannot be read; raised in the calling process with all its fields.
    """
    for batch in loader:
        if isinstance(batch, OgregError):
            raise batch
        yield batch


def _loader(
    dataset: ClipDataset | ViewDataset, batch_size: int, workers: int, **options: Any
) -> DataLoader[Any]:
    return DataLoader(
        _Guarded(dataset),
        collate_fn=_collate,
        batch_size=batch_size,
        num_workers=workers,
        worker_init_fn=_quiet_worker,
        # Without one of its own, each pass would draw from the global generator and break resuming.
        generator=torch.Generator(),
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        **options,
    )


def train_loader(
    dataset: ClipDataset, sampler: EpochSampler, batch_size: int, workers: int
) -> DataLoader[Any]:
    """Batches ``(uint8 [B, 3, T, H, W], labels [B], indices [B])``; a last short batch is dropped."""
    drop_last = len(dataset) >= batch_size
    return _loader(dataset, batch_size, workers, sampler=sampler, drop_last=drop_last)


def test_loader(dataset: ViewDataset, batch_size: int, workers: int) -> DataLoader[Any]:
    """Batches ``(uint8 [B, V, 3, T, H, W], labels [B], indices [B])`` in manifest order."""
    return _loader(dataset, batch_size, workers, shuffle=False)


test_loader.__test__ = False  # type: ignore[attr-defined]  # pytest would collect it by its name
