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

__all__ = ["Augmentation", "TestCrops", "augment", "resize_short_side", "test_crops", "to_input"]


def to_input(clips: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Scale and normalise: uint8 ``[..., 3, T, H, W]`` in 0..255 to float32, channel-wise ``(x /
    255 - mean) / std``.
    """
    shape = (3, 1, 1, 1)
    offset = torch.tensor(mean, device=clips.device, dtype=torch.float32).view(shape) * 255
    scale = torch.tensor(std, device=clips.device, dtype=torch.float32).view(shape) * 255
    return (clips.float() - offset) / scale


def resize_short_side(frames: Tensor, short_side: int) -> Tensor:
    """Bilinear, antialiased: uint8 ``[T, 3, H, W]`` so that min(H, W) = ``short_side``, aspect
    ratio kept.
    """
    height, width = frames.shape[-2:]
    if min(height, width) == short_side:
        return frames
    scale = short_side / min(height, width)
    # The short side exactly, the long one rounded down, as torchvision's Resize does.
    size = (short_side, max(int(scale * width), short_side))
    if width < height:
        size = (max(int(scale * height), short_side), short_side)
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
    """Random changes to a training clip.

    Args:
        size: side of the square result in pixels.
        scale: share of the picture's area that the crop keeps, lowest and highest.
        ratio: aspect ratio of the crop, lowest and highest.
        flip: ``none``; ``random`` flips half of the clips; ``mirror`` also changes the label of
            classes that a flip turns into each other.
        color_jitter: strength of brightness, contrast and saturation changes, 0 for none.
        erasing: probability of blanking a rectangle through all frames.
        mirror: class index after a flip, for ``flip = "mirror"``.
    """

    size: int
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: Literal["none", "random", "mirror"] = "none"
    color_jitter: float = 0.0
    erasing: float = 0.0
    mirror: Mapping[int, int] = field(default_factory=dict)


@functools.lru_cache(maxsize=8)
def _spatial(
    size: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    jitter: float,
    erasing: float,
) -> torch.nn.Module:
    from torchvision.transforms import v2

    steps: list[torch.nn.Module] = [
        v2.RandomResizedCrop(size, scale=scale, ratio=ratio, antialias=True)
    ]
    if jitter:
        steps.append(v2.ColorJitter(brightness=jitter, contrast=jitter, saturation=jitter))
    if erasing:
        steps.append(v2.RandomErasing(p=erasing))
    compose: torch.nn.Module = v2.Compose(steps)
    return compose


def augment(
    frames: Tensor, label: int, spec: Augmentation, rng: random.Random
) -> tuple[Tensor, int]:
    """One random view of a clip, the same for all its frames.

    Args:
        frames: uint8 ``[T, 3, H, W]``.
        label: class index.
        spec: what to do.
        rng: source of every random draw; torch's global generator is left as it was found.

    Returns:
        uint8 ``[3, T, size, size]`` and the label, changed if a flip turned the class into its
        mirror image.
    """
    transform = _spatial(spec.size, spec.scale, spec.ratio, spec.color_jitter, spec.erasing)
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would also reset every GPU's generator.
        torch.default_generator.manual_seed(rng.getrandbits(63))
        frames = transform(frames)
    if spec.flip != "none" and rng.random() < 0.5:
        frames = frames.flip(-1)
        if spec.flip == "mirror":
            label = spec.mirror.get(label, label)
    return frames.transpose(0, 1).contiguous(), label
