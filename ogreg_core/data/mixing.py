"""Random erasing, mixup and cutmix: changes to a normalised batch on the training device.

The loader ships uint8 and these run after :func:`ogreg_core.data.transforms.to_input`, where they
cost next to nothing. Both :func:`erase` and :func:`mix` write into the clips they are given, which
the training step has just made and nobody else holds; a batch of clips is too large to copy for
tidiness.

Sources: Zhong et al., "Random Erasing" (https://arxiv.org/abs/1708.04896), with PySlowFast's
"cube" of one box through all frames; Zhang et al., "mixup" (https://arxiv.org/abs/1710.09412); Yun
et al., "CutMix" (https://arxiv.org/abs/1905.04899), with one lambda per batch and the flipped batch
as partner as in timm and PySlowFast.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Erasing", "Mixing", "draw_erasing", "erase", "mix"]

_TRIES = 10


@dataclass(frozen=True)
class Erasing:
    """Which box to blank.

    Args:
        probability: share of the clips that lose a box.
        area: share of the picture that the box covers, lowest and highest; uniform between.
        aspect: height over width of the box, lowest and highest; log-uniform between.
    """

    probability: float
    area: tuple[float, float] = (0.02, 1 / 3)
    aspect: tuple[float, float] = (0.3, 1 / 0.3)


def draw_erasing(
    spec: Erasing, height: int, width: int, rng: random.Random
) -> tuple[int, int, int, int, int]:
    """Draw the box for one clip, in the loader, from the generator of that sample.

    Args:
        spec: what to draw.
        height, width: size of the picture in pixels.
        rng: source of every random draw.

    Returns:
        ``(top, left, height, width, noise seed)`` in pixels, a row of the boxes of :func:`erase`.
        Height 0 means no box: not drawn, or ten boxes in a row did not fit inside the picture.
    """
    if rng.random() >= spec.probability:
        return 0, 0, 0, 0, 0
    for _ in range(_TRIES):
        area = rng.uniform(*spec.area) * height * width
        aspect = math.exp(rng.uniform(math.log(spec.aspect[0]), math.log(spec.aspect[1])))
        box_height, box_width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < box_height < height and 0 < box_width < width:
            top = rng.randint(0, height - box_height)
            left = rng.randint(0, width - box_width)
            return top, left, box_height, box_width, rng.getrandbits(63)
    return 0, 0, 0, 0, 0


def erase(clips: Tensor, boxes: Tensor) -> Tensor:
    """Fill each clip's box with standard normal noise, anew for every frame, channel and pixel.

    A clip's noise depends on its own seed and the kind of device, not on the rest of the batch.

    Args:
        clips: float ``[B, 3, T, H, W]``, normalised; **changed in place**.
        boxes: int64 ``[B, 5]``, rows of :func:`draw_erasing`. Best on the CPU: a GPU tensor would
            make the program wait for the GPU.

    Returns:
        ``clips``.
    """
    generator = torch.Generator(clips.device)
    for clip, (top, left, height, width, seed) in zip(clips, boxes.tolist(), strict=True):
        if height == 0:
            continue
        box = clip[:, :, top : top + height, left : left + width]
        generator.manual_seed(seed)
        # Drawn as float32 whatever the clips are, so that bfloat16 gets the same noise, rounded.
        box.copy_(torch.randn(box.shape, generator=generator, device=clips.device))
    return clips


@dataclass(frozen=True)
class Mixing:
    """How clips and labels of a batch are mixed.

    Args:
        mixup: alpha of mixup's Beta(alpha, alpha); 0 for no mixup.
        cutmix: alpha of cutmix's; 0 for no cutmix.
        probability: share of the batches that are mixed.
        switch: share of cutmix among them if both are on.
        smoothing: label smoothing, folded into the targets.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    probability: float = 1.0
    switch: float = 0.5
    smoothing: float = 0.0


def mix(
    clips: Tensor, labels: Tensor, num_classes: int, spec: Mixing, rng: random.Random
) -> tuple[Tensor, Tensor]:
    """Mix each clip with its partner in the flipped batch: the first with the last, and so on.

    One draw for the whole batch. Mixup: ``lambda clip + (1 - lambda) partner``. Cutmix: a box of
    the share ``1 - lambda`` around a random centre, cut off at the border, comes from the partner
    on all frames; lambda is then what the box really left. Targets are mixed by the same lambda. A
    batch of one has no partner and is left as it is.

    The targets are always probabilities, so that one call of ``F.cross_entropy(logits, targets)``
    serves every setting. Without mixing it equals ``F.cross_entropy(logits, labels,
    label_smoothing=spec.smoothing)``.

    Args:
        clips: float ``[B, 3, T, H, W]``; **changed in place**.
        labels: int64 ``[B]``, on the same device.
        num_classes: K, the length of a target.
        spec: what to do.
        rng: source of every random draw.

    Returns:
        ``clips`` and the float32 targets ``[B, K]``, whose rows sum to 1.
    """
    kept = 1.0
    if clips.shape[0] > 1 and (spec.mixup or spec.cutmix) and rng.random() < spec.probability:
        if spec.cutmix and (not spec.mixup or rng.random() < spec.switch):
            kept = _cutmix(clips, spec.cutmix, rng)
        else:
            kept = rng.betavariate(spec.mixup, spec.mixup)
            # Flipping copies, so no clip is read after it was overwritten.
            clips.lerp_(clips.flip(0), 1 - kept)

    share = spec.smoothing / num_classes
    targets = torch.full(
        (labels.shape[0], num_classes), share, dtype=torch.float32, device=labels.device
    )
    targets.scatter_(1, labels[:, None], 1 - spec.smoothing + share)
    if kept < 1:
        targets.lerp_(targets.flip(0), 1 - kept)
    return clips, targets


def _cutmix(clips: Tensor, alpha: float, rng: random.Random) -> float:
    """Exchange a box in place; returns the share of each clip that is still its own."""
    height, width = clips.shape[-2:]
    side = math.sqrt(1 - rng.betavariate(alpha, alpha))
    y, x = rng.randrange(height), rng.randrange(width)
    half_height, half_width = int(height * side) // 2, int(width * side) // 2
    top, bottom = max(y - half_height, 0), min(y + half_height, height)
    left, right = max(x - half_width, 0), min(x + half_width, width)
    box = clips[..., top:bottom, left:right]
    box.copy_(box.flip(0))  # copies the box alone
    return 1 - (bottom - top) * (right - left) / (height * width)
