"""From decoded frames to model input.

Frames stay uint8 until :func:`to_input`, which runs on the training device: four times less memory
to move than float. All pictures of a clip get the same random draw, because torchvision's v2
transforms draw once per call and a clip ``[T, 3, H, W]`` is one call.

Test-time transforms use torch alone; torchvision, which costs a second to import, is needed for
training only.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ogreg_core.data.mixing import Erasing
from ogreg_core.data.rand_augment import RandAugmentSpec, rand_augment

__all__ = [
    "Augmentation",
    "TestCrops",
    "augment",
    "draw_short_side",
    "resize_short_side",
    "scaled_size",
    "test_crops",
    "to_input",
]


def to_input(clips: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Scale and normalise: uint8 ``[..., 3, T, H, W]`` in 0..255 to float32, channel-wise ``(x /
    255 - mean) / std``.
    """
    shape = (3, 1, 1, 1)
    offset = torch.tensor(mean, device=clips.device, dtype=torch.float32).view(shape) * 255
    scale = torch.tensor(std, device=clips.device, dtype=torch.float32).view(shape) * 255
    return (clips.float() - offset) / scale


def scaled_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """(height, width) with the shorter at ``short_side`` pixels and the aspect ratio kept."""
    if min(height, width) == short_side:
        return height, width
    # The short side exactly, the long one rounded down, as torchvision's Resize does.
    if width < height:
        return short_side * height // width, short_side
    return short_side, short_side * width // height


def resize_short_side(frames: Tensor, short_side: int) -> Tensor:
    """Bilinear, antialiased: uint8 ``[T, 3, H, W]`` so that min(H, W) = ``short_side``, aspect
    ratio kept.
    """
    height, width = frames.shape[-2:]
    size = scaled_size(height, width, short_side)
    if size == (height, width):
        return frames
    return F.interpolate(frames, size=size, mode="bilinear", antialias=True)


@dataclass(frozen=True)
class TestCrops:
    """The spatial half of the test protocol.

    Args:
        size: side of the square crop in pixels.
        short_side: frames are resized to this first.
        crops: 1 (centre) or 3 (start, centre and end of the long side).
    """

    __test__ = False

    size: int
    short_side: int
    crops: int = 1


def test_crops(frames: Tensor, spec: TestCrops) -> Tensor:
    """Resize and crop: uint8 ``[T, 3, H, W] -> [crops, 3, T, size, size]``."""
    frames = resize_short_side(frames, spec.short_side)
    height, width = frames.shape[-2:]
    top, left = (height - spec.size) // 2, (width - spec.size) // 2
    if spec.crops == 1:
        corners = [(top, left)]
    elif width >= height:
        corners = [(top, 0), (top, left), (top, width - spec.size)]
    else:
        corners = [(0, left), (top, left), (height - spec.size, left)]
    crops = [frames[:, :, y : y + spec.size, x : x + spec.size] for y, x in corners]
    return torch.stack(crops).transpose(1, 2)


test_crops.__test__ = False  # type: ignore[attr-defined]  # pytest would collect it by its name


@dataclass(frozen=True)
class Augmentation:
    """Random changes to a training clip; those of a whole batch are in
    :mod:`ogreg_core.data.mixing`.

    Args:
        size: side of the square result in pixels.
        short_side: frames are scaled to a short side drawn from lowest to highest before they are
            cropped; (0, 0): as stored.
        inverse: draw the reciprocal of the short side evenly, as PySlowFast does for SSv2.
        crop: ``resized`` takes a random share of the picture and scales it to ``size``; ``random``
            cuts ``size`` pixels out anywhere.
        scale: share of the picture's area that a resized crop keeps, lowest and highest.
        ratio: aspect ratio of a resized crop, lowest and highest.
        flip: ``none``; ``random`` flips half of the clips; ``skip`` leaves classes alone that a flip
            turns into another class (PST); ``swap`` flips them too and changes the label.
        color_jitter: strength of brightness, contrast and saturation changes, 0 for none.
        hue: strength of hue changes, 0 to 0.5.
        color_probability: share of the clips that get them.
        grayscale: share of the clips that lose their colours.
        rand_augment: None, or which operations.
        erasing: box to blank after normalisation, drawn here, done on the training device.
        mirror: class index after a flip, for classes that a flip turns into another.
        repeats: views made of each decoded clip.
    """

    size: int
    short_side: tuple[int, int] = (0, 0)
    inverse: bool = False
    crop: Literal["resized", "random"] = "resized"
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: Literal["none", "random", "skip", "swap"] = "none"
    color_jitter: float = 0.0
    hue: float = 0.0
    color_probability: float = 1.0
    grayscale: float = 0.0
    rand_augment: RandAugmentSpec | None = None
    erasing: Erasing = field(default_factory=lambda: Erasing(0.0))
    mirror: Mapping[int, int] = field(default_factory=dict)
    repeats: int = 1


def draw_short_side(spec: Augmentation, rng: random.Random) -> int:
    """The short side to which a clip's frames are scaled before cropping; 0: as stored."""
    low, high = spec.short_side
    if low == high:
        return low
    if spec.inverse:
        return round(1 / rng.uniform(1 / high, 1 / low))
    return rng.randint(low, high)


@functools.lru_cache(maxsize=8)
def _crop(
    kind: str, size: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> torch.nn.Module:
    from torchvision.transforms import v2

    if kind == "random":
        return v2.RandomCrop(size)
    return v2.RandomResizedCrop(size, scale=scale, ratio=ratio, antialias=True)


@functools.lru_cache(maxsize=8)
def _colour(strength: float, hue: float, probability: float, grayscale: float) -> torch.nn.Module:
    from torchvision.transforms import v2

    jitter = v2.ColorJitter(brightness=strength, contrast=strength, saturation=strength, hue=hue)
    steps: list[torch.nn.Module] = []
    if strength or hue:
        steps.append(v2.RandomApply([jitter], p=probability))
    if grayscale:
        steps.append(v2.RandomGrayscale(grayscale))
    compose: torch.nn.Module = v2.Compose(steps)
    return compose


def augment(
    frames: Tensor, label: int, spec: Augmentation, rng: random.Random
) -> tuple[Tensor, int]:
    """One random view of a clip, the same for all its frames.

    Args:
        frames: uint8 ``[T, 3, H, W]``, already at the short side that was drawn for them.
        label: class index.
        spec: what to do.
        rng: source of every random draw; torch's global generator is left as it was found.

    Returns:
        uint8 ``[3, T, size, size]`` and the label, changed if a flip turned the class into its
        mirror image.
    """
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would also reset every GPU's generator.
        torch.default_generator.manual_seed(rng.getrandbits(63))
        frames = _crop(spec.crop, spec.size, spec.scale, spec.ratio)(frames)
        if spec.color_jitter or spec.hue or spec.grayscale:
            colour = (spec.color_jitter, spec.hue, spec.color_probability, spec.grayscale)
            frames = _colour(*colour)(frames)
    frames, label = _flip(frames, label, spec, flip=rng.random() < 0.5)
    if spec.rand_augment:
        frames = rand_augment(frames, spec.rand_augment, rng)
    return frames.transpose(0, 1).contiguous(), label


def _flip(frames: Tensor, label: int, spec: Augmentation, *, flip: bool) -> tuple[Tensor, int]:
    if spec.flip == "none" or not flip:
        return frames, label
    if spec.flip == "skip" and label in spec.mirror:
        return frames, label
    if spec.flip == "swap":
        label = spec.mirror.get(label, label)
    return frames.flip(-1), label
