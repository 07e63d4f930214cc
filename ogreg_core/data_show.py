"""What a model is trained and tested on: clips as the training step gets them, and test views.

Everything shown goes the way of the data in training: samples and their order come from
:class:`ClipDataset` and :class:`BatchOrder`, and are erased and mixed as the training step does,
with the partner that each has in its batch. The noise of erasing differs between a GPU and the CPU,
on which it is drawn here; all the rest is the same to the bit.
"""

from __future__ import annotations

import shlex
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ogreg_core.data.loader import (
    ClipDataset,
    TrainBatch,
    Unreadable,
    ViewDataset,
    Views,
    locate,
)
from ogreg_core.data.manifest import Manifest
from ogreg_core.data.mixing import erase, mix
from ogreg_core.data.order import BatchOrder, sample_rng, step_rng
from ogreg_core.data.sampling import positions, train_indices
from ogreg_core.data.transforms import Augmentation, TestCrops, augment, to_input
from ogreg_core.datasets.catalogue import CATALOGUE
from ogreg_core.datasets.locations import find_dataset
from ogreg_core.errors import DataError, UsageError
from ogreg_core.models.registry import find_model
from ogreg_core.recipe import LoadedRecipe, Recipe
from ogreg_core.training.settings import augmentation_of, mixing_of, sampling_of
from ogreg_core.training.splits import Splits, load_splits

__all__ = ["DataSheet", "Partner", "TestVideo", "TrainSample", "collect"]


@dataclass(frozen=True)
class Partner:
    """The clip that another one is mixed with: manifest row, file, class."""

    index: int
    path: str
    label: str


@dataclass(frozen=True)
class TrainSample:
    """A training clip as the model gets it; T frames of S x S pixels.

    Args:
        index: manifest row.
        path, fps: of the file.
        label: class; that of the mirror image if the clip was flipped into one.
        frames, seconds: frame numbers in the file, and when they appear, ``[T]``.
        view, repeats: which of the views of its decoded clip this is, from 0, and their number.
        batch: number of its batch in the epoch, from 0; None for the epoch's left-over videos,
            which it does not train on.
        box: (top, left, height, width) of what was erased; None if nothing was.
        share: how much of the clip is its own; the rest is the partner's.
        partner: what it is mixed with, if it is.
        stands_for: the videos in whose place it came, as they cannot be read.
        decode_ms, augment_ms: time to load the clip, in one thread.
        clip: as loaded, uint8 ``[3, T, S, S]``.
        model_input: erased and mixed, normalised, float32 ``[3, T, S, S]``.
        pictures: ``model_input`` for the eye, uint8 ``[T, S, S, 3]``.
    """

    index: int
    path: str
    fps: float
    label: str
    frames: list[int]
    seconds: list[float]
    view: int
    repeats: int
    batch: int | None
    box: tuple[int, int, int, int] | None
    share: float
    partner: Partner | None
    stands_for: tuple[Unreadable, ...]
    decode_ms: float
    augment_ms: float
    clip: Tensor
    model_input: Tensor
    pictures: np.ndarray

    def to_json(self) -> dict[str, Any]:
        """Everything but the pixels."""
        return {
            "index": self.index,
            "path": self.path,
            "label": self.label,
            "share": self.share,
            "mixed_with": None
            if self.partner is None
            else {**vars(self.partner), "share": 1 - self.share},
            "frames": self.frames,
            "seconds": self.seconds,
            "fps": self.fps,
            "view": self.view + 1,
            "batch": None if self.batch is None else self.batch + 1,
            "erased_px": self.box and dict(zip(_BOX, self.box, strict=True)),
            "in_place_of": [video.path for video in self.stands_for],
            "decode_ms": self.decode_ms,
            "augment_ms": self.augment_ms,
        }


_BOX = ("top", "left", "height", "width")


@dataclass(frozen=True)
class TestVideo:
    """All test views of a video.

    Args:
        index, path, fps, label: manifest row, file and class.
        frames, seconds: of each clip, ``[clips][T]``.
        crops: their places, as words.
        load_ms: time to load all views, in one thread.
        pictures: uint8 ``[clips, crops, T, S, S, 3]``.
    """

    __test__ = False

    index: int
    path: str
    fps: float
    label: str
    frames: list[list[int]]
    seconds: list[list[float]]
    crops: tuple[str, ...]
    load_ms: float
    pictures: np.ndarray

    def to_json(self) -> dict[str, Any]:
        """Everything but the pixels, view by view in the order of the test."""
        views = [
            {"clip": clip, "crop": crop, "place": place, "frames": frames, "seconds": seconds}
            for clip, (frames, seconds) in enumerate(zip(self.frames, self.seconds, strict=True), 1)
            for crop, place in enumerate(self.crops, 1)
        ]
        about = {name: getattr(self, name) for name in ("index", "path", "label", "fps", "load_ms")}
        return {**about, "views": views}


@dataclass(frozen=True)
class DataSheet:
    """What was collected, with the settings that made it.

    Args:
        recipe: with its name.
        splits: the data.
        epoch: from 0.
        samples: training clips.
        videos: test videos.
        unreadable: test videos that failed.
    """

    recipe: LoadedRecipe
    splits: Splits
    epoch: int
    samples: tuple[TrainSample, ...]
    videos: tuple[TestVideo, ...]
    unreadable: tuple[Unreadable, ...]

    @property
    def decode_ms(self) -> float | None:
        """Median time to read a training clip; None without samples."""
        return _median([sample.decode_ms for sample in self.samples])

    @property
    def augment_ms(self) -> float | None:
        """Median time to augment a training clip; None without samples."""
        return _median([sample.augment_ms for sample in self.samples])

    def to_json(self) -> dict[str, Any]:
        """Everything but the pixels."""
        recipe = self.recipe.recipe
        return {
            "schema": "ogreg.data-show.v1",
            "recipe": self.recipe.name,
            "recipe_sha256": recipe.sha256,
            "dataset": self.splits.train.dataset,
            "data_folder": str(self.splits.folder.resolve()),
            "train_split": self.splits.train.split,
            "val_split": self.splits.val.split,
            "seed": recipe.seed,
            "epoch": self.epoch + 1,
            "size_px": recipe.data.size,
            "augment": recipe.augment.model_dump(),
            "decode_ms_per_clip": self.decode_ms,
            "augment_ms_per_clip": self.augment_ms,
            "samples": [sample.to_json() for sample in self.samples],
            "videos": [video.to_json() for video in self.videos],
            "unreadable": [vars(video) for video in self.unreadable],
        }


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def collect(
    loaded: LoadedRecipe,
    *,
    samples: int = 4,
    videos: int = 2,
    epoch: int = 0,
    indices: Sequence[int] = (),
) -> DataSheet:
    """Load what a training by this recipe would.

    Args:
        loaded: the recipe.
        samples: how many training videos to show, in the order in which the epoch takes them.
        videos: how many test videos to show, spread over their split.
        epoch: from 0.
        indices: rows of the training manifest to show instead.

    Raises:
        DataError: the data set is not prepared, or its disk is gone.
        UsageError: no such row.
    """
    recipe = loaded.recipe
    splits = _load_splits(recipe)
    rows = len(splits.train.rows)
    for index in indices:
        if not 0 <= index < rows:
            raise UsageError(
                f"the {splits.train.split} split has no row {index}",
                where=str(splits.folder / f"{splits.train.split}.csv"),
                why=f"its {rows} videos count from 0 to {rows - 1}",
            )
    with _one_thread():
        shown = tuple(_train_samples(recipe, splits, samples, epoch, indices))
        found, unreadable = _test_videos(recipe, splits, videos)
    return DataSheet(loaded, splits, epoch, shown, found, unreadable)


@contextmanager
def _one_thread() -> Iterator[None]:
    """As in a loader worker, so that the times are those of one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _load_splits(recipe: Recipe) -> Splits:
    """The recipe's data; where they are missing, how to prepare this very data set."""
    name = recipe.data.dataset
    folder = find_dataset(name, recipe.data.root)
    try:
        return load_splits(recipe, folder)
    except DataError as error:
        if name not in (*CATALOGUE, "demo", "demo-hard") or (folder / "dataset.json").exists():
            raise
        fix = f"ogreg prepare {name} {shlex.quote(str(folder))}"
        if name == "demo-hard":
            fix = f"ogreg prepare demo {shlex.quote(str(folder))} --hard"
        raise DataError(error.what, where=error.where, why=error.why, fix=fix) from error


class _TimedClips(ClipDataset):
    """The same samples, with the time that each took."""

    augment_ms = 0.0

    def _views(self, *arguments: Any, **named: Any) -> TrainBatch:
        started = time.perf_counter()
        made = super()._views(*arguments, **named)
        self.augment_ms = _since(started)
        return made

    def timed(self, epoch: int, index: int) -> tuple[TrainBatch, float, float]:
        """A sample, and the milliseconds of decoding and of augmentation per view."""
        started = time.perf_counter()
        item = self[epoch, index]
        augment_ms = self.augment_ms
        return item, _since(started) - augment_ms, augment_ms / len(item.labels)


def _since(started: float) -> float:
    return 1000 * (time.perf_counter() - started)


# A view of a loaded training video, as (the video, number of the view).
_View = tuple[TrainBatch, int]


def _train_samples(
    recipe: Recipe, splits: Splits, samples: int, epoch: int, indices: Sequence[int]
) -> Iterator[TrainSample]:
    spec = augmentation_of(recipe, splits.train.mirror)
    dataset = _TimedClips(splits.train, sampling_of(recipe), spec, recipe.seed)
    order = BatchOrder(len(dataset), recipe.seed, recipe.train.batch_size).samples(epoch)
    _warm_up(spec)
    for index in indices or order[:samples]:
        batch, members = _batch_of(order, index, recipe.train.batch_size)
        item, decode_ms, augment_ms = dataset.timed(epoch, index)
        for view in range(spec.repeats):
            partner: _View | None = None
            if batch is not None and (recipe.augment.mixup or recipe.augment.cutmix):
                own = members.index(index) * spec.repeats + view
                # The first clip of a batch meets the last one, and so on.
                opposite = len(members) * spec.repeats - 1 - own
                other, other_view = divmod(opposite, spec.repeats)
                if opposite != own:
                    partner = dataset[epoch, members[other]], other_view
            sample = _train_sample(recipe, dataset, (epoch, index), (item, view), partner, batch)
            yield replace(sample, decode_ms=decode_ms, augment_ms=augment_ms)


def _warm_up(spec: Augmentation) -> None:
    """The first call imports torchvision, which is no part of a sample's time."""
    augment(torch.zeros(1, 3, spec.size, spec.size, dtype=torch.uint8), 0, spec, Random(0))


def _batch_of(order: list[int], index: int, batch_size: int) -> tuple[int | None, list[int]]:
    """The batch of a video, its number in the epoch and its videos, cut as by ``train_loader``: a
    last short one is dropped, for whose videos the number is None.
    """
    if len(order) < batch_size:
        return 0, order
    number = order.index(index) // batch_size
    members = order[number * batch_size : (number + 1) * batch_size]
    return number if len(members) == batch_size else None, members


def _train_sample(
    recipe: Recipe,
    dataset: ClipDataset,
    key: tuple[int, int],
    own: _View,
    partner: _View | None,
    batch: int | None,
) -> TrainSample:
    item, view = own
    manifest, sampling = dataset.manifest, dataset.sampling
    number = int(item.indices[view])
    row = manifest.rows[number]
    # The first draws of the dataset: which frames a clip has is a function of its key.
    rng = sample_rng(dataset.seed, *key, "frames")
    chosen = train_indices(positions(row, sampling), sampling, rng)
    located = locate(manifest, row, chosen, sampling)
    inputs, share = _as_trained(recipe, own, partner, key[0], batch)
    entry = find_model(recipe.model.name)
    top, left, height, width, _ = item.boxes[view].tolist()
    return TrainSample(
        index=number,
        path=row.path,
        fps=row.fps,
        label=manifest.labels[int(item.labels[view])],
        frames=[frame for frame, _ in located],
        seconds=[seconds for _, seconds in located],
        view=view,
        repeats=len(item.labels),
        batch=batch,
        box=(top, left, height, width) if height else None,
        share=share,
        partner=_describe(partner, manifest) if partner and share < 1 else None,
        stands_for=item.unreadable,
        decode_ms=0.0,
        augment_ms=0.0,
        clip=item.clips[view],
        model_input=inputs,
        pictures=_pictures(inputs, entry.mean, entry.std),
    )


def _describe(partner: _View, manifest: Manifest) -> Partner:
    item, view = partner
    index = int(item.indices[view])
    return Partner(index, manifest.rows[index].path, manifest.labels[int(item.labels[view])])


def _as_trained(
    recipe: Recipe, own: _View, partner: _View | None, epoch: int, batch: int | None
) -> tuple[Tensor, float]:
    """The training step up to the model, for one clip: what the model gets, and the clip's share.

    Mixing draws once for a batch, so a batch of a clip and its partner is mixed as the whole one.
    """
    entry = find_model(recipe.model.name)
    pair = [own, partner] if partner else [own]
    clips = torch.stack([item.clips[view] for item, view in pair])
    boxes = torch.stack([item.boxes[view] for item, view in pair])
    clips = erase(to_input(clips, entry.mean, entry.std), boxes)
    if partner is None or batch is None:
        return clips[0], 1.0
    rng = step_rng(recipe.seed, epoch, batch)
    # Without label smoothing targets are shares of the two clips.
    mixing = replace(mixing_of(recipe), smoothing=0.0)
    clips, targets = mix(clips, torch.tensor([0, 1]), 2, mixing, rng)
    return clips[0], float(targets[0, 0])


def _pictures(clip: Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Undo the normalisation: float ``[3, T, S, S]`` to uint8 ``[T, S, S, 3]``."""
    shape = (3, 1, 1, 1)
    pixels = clip * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)
    found: np.ndarray = (255 * pixels).round().clamp(0, 255).byte().permute(1, 2, 3, 0).numpy()
    return found


def _test_videos(
    recipe: Recipe, splits: Splits, videos: int
) -> tuple[tuple[TestVideo, ...], tuple[Unreadable, ...]]:
    data, protocol = recipe.data, recipe.eval
    crops = TestCrops(data.size, data.short_side, protocol.crops)
    views = Views(sampling_of(recipe), protocol.clips, crops)
    dataset = ViewDataset(splits.val, views)
    count = min(videos, len(dataset))
    found: list[TestVideo] = []
    unreadable: list[Unreadable] = []
    # Spread over the split, whose rows are often sorted by class.
    for index in [int((k + 0.5) * len(dataset) / count) for k in range(count)]:
        started = time.perf_counter()
        item = dataset[index]
        load_ms = _since(started)
        if item.unreadable:
            unreadable += item.unreadable
            continue
        row = splits.val.rows[index]
        clips = views.indices(positions(row, views.sampling), seed=index)
        located = [locate(splits.val, row, clip, views.sampling) for clip in clips]
        wide = row.width >= row.height
        sides = ("left", "centre", "right") if wide else ("top", "centre", "bottom")
        found.append(
            TestVideo(
                index=index,
                path=row.path,
                fps=row.fps,
                label=splits.val.labels[row.label],
                frames=[[frame for frame, _ in clip] for clip in located],
                seconds=[[seconds for _, seconds in clip] for clip in located],
                crops=sides if protocol.crops == 3 else ("centre",),
                load_ms=load_ms,
                pictures=item.views[0]
                .unflatten(0, (protocol.clips, protocol.crops))
                .permute(0, 1, 3, 4, 5, 2)
                .numpy(),
            )
        )
    return tuple(found), tuple(unreadable)
