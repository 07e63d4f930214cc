"""RandAugment for clips: one draw of operations and strengths for all frames.

Cubuk et al., "RandAugment" (https://arxiv.org/abs/1909.13719), in the two forms that video recipes
use. ``rand-m7-n4-mstd0.5-inc1`` is the policy of timm, which PySlowFast, MViT and UniFormer share:
fifteen operations, each applied with probability 0.5, at a strength with normal noise.
``torchvision-n2-m9`` is torchvision's: fourteen operations, always applied, at a fixed strength.

timm's policy is written here from its definition rather than taken from torchvision, whose
operations differ from Pillow's in rounding, in the border of a warp and in having no bicubic one.
What each operation does to a frame is what Pillow does to a picture: see ``tests/core/data/
test_rand_augment.py``. Three choices make it fast on uint8 clips in a loader worker. Operations
that map a value to a value are a 256-entry table. A warp is one sparse matrix, computed once and
applied to all frames and channels. The rest works frame by frame, which stays in the cache.

Importing this module imports neither torch nor torchvision, so that a recipe can be checked
without them.
"""

from __future__ import annotations

import functools
import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "OPERATIONS",
    "Operation",
    "RandAugmentSpec",
    "apply_operation",
    "draw_operations",
    "parse_rand_augment",
    "rand_augment",
]

_STRONGEST = 10.0  # timm's magnitudes run from 0 to this
_APPLIED = 0.5
_GREY = 128


@dataclass(frozen=True)
class RandAugmentSpec:
    """A RandAugment policy.

    Args:
        kind: whose policy: ``timm`` or ``torchvision``.
        num_ops: operations drawn per clip, with replacement.
        magnitude: strength, 0 to 10 for timm and 0 to 30 for torchvision.
        noise: standard deviation of the strength between operations (timm only).
        increasing: whether a higher magnitude always changes the clip more (timm only); see
            :func:`draw_operations`.
    """

    kind: Literal["timm", "torchvision"]
    num_ops: int
    magnitude: int
    noise: float = 0.0
    increasing: bool = False


_PARTS: dict[str, tuple[re.Pattern[str], dict[str, float]]] = {
    "rand": (
        re.compile(r"(mstd|inc|m|n)(\d+(?:\.\d+)?)"),
        {"m": 10, "n": 2, "mstd": 0.0, "inc": 0},
    ),
    "torchvision": (re.compile(r"(m|n)(\d+)"), {"m": 9, "n": 2}),
}
_STRONGEST_OF = {"rand": 10, "torchvision": 30}


def parse_rand_augment(text: str) -> RandAugmentSpec | None:
    """Read a policy as recipes write it.

    Args:
        text: empty for none; ``rand-m7-n4-mstd0.5-inc1`` for timm's policy, where every part after
            ``rand`` may be left out (m10, n2, mstd0, inc0) and the order is free; or
            ``torchvision-n2-m9`` for torchvision's, likewise (n2, m9).

    Raises:
        ValueError: the text is neither; one sentence that names both forms.
    """
    if not text:
        return None
    head, *parts = text.split("-")
    if head not in _PARTS:
        raise _unreadable(text)
    pattern, values = _PARTS[head][0], dict(_PARTS[head][1])
    seen: set[str] = set()
    for part in parts:
        match = pattern.fullmatch(part)
        if match is None or match[1] in seen or ("." in match[2] and match[1] != "mstd"):
            raise _unreadable(text)
        seen.add(match[1])
        values[match[1]] = float(match[2]) if match[1] == "mstd" else int(match[2])
    noise, increasing = values.get("mstd", 0.0), values.get("inc", 0)
    in_range = values["n"] >= 1 and values["m"] <= _STRONGEST_OF[head]
    # timm reads a deviation above 100 as "uniform"; nobody should get that by a slip.
    if not in_range or increasing > 1 or noise > _STRONGEST:
        raise _unreadable(text)
    kind: Literal["timm", "torchvision"] = "timm" if head == "rand" else "torchvision"
    return RandAugmentSpec(kind, int(values["n"]), int(values["m"]), noise, bool(increasing))


def _unreadable(text: str) -> ValueError:
    return ValueError(
        f"{text!r} is neither timm's rand-m<0 to 10>-n<1 or more>-mstd<0 to 10>-inc<0 or 1>, as in"
        " rand-m7-n4-mstd0.5-inc1, nor torchvision-n<1 or more>-m<0 to 30>, as in"
        " torchvision-n2-m9"
    )


def rand_augment(frames: Tensor, spec: RandAugmentSpec, rng: random.Random) -> Tensor:
    """One random view of a clip; the same operations at the same strength for all frames.

    Autocontrast, equalize and contrast use the statistics of each frame, as Pillow does when it is
    given the frames one by one; on a changing scene their effect therefore varies a little.

    Args:
        frames: uint8 ``[T, 3, H, W]`` on the CPU, not changed.
        spec: the policy.
        rng: source of every random draw; torch's global generator is left as it was found.

    Returns:
        uint8 ``[T, 3, H, W]``; the input itself if no operation was drawn.
    """
    if spec.kind == "torchvision":
        return _torchvision_rand_augment(frames, spec, rng)
    for operation in draw_operations(spec, rng):
        frames = apply_operation(frames, operation)
    return frames


def _torchvision_rand_augment(frames: Tensor, spec: RandAugmentSpec, rng: random.Random) -> Tensor:
    import torch

    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would also reset every GPU's generator.
        torch.default_generator.manual_seed(rng.getrandbits(63))
        augmented: Tensor = _torchvision_policy(spec.num_ops, spec.magnitude)(frames)
    return augmented


@functools.lru_cache(maxsize=8)
def _torchvision_policy(num_ops: int, magnitude: int) -> Any:
    from torchvision.transforms import v2

    return v2.RandAugment(num_ops=num_ops, magnitude=magnitude)


# --- timm's policy: what is drawn -----------------------------------------------------------------


@dataclass(frozen=True)
class Operation:
    """One operation as drawn.

    Args:
        name: one of :data:`OPERATIONS`.
        argument: Rotate: degrees counter-clockwise; Posterize: bits kept; Solarize: threshold;
            SolarizeAdd: amount; Color, Contrast, Brightness, Sharpness: factor, 1 for no change;
            Shear: pixels per pixel; Translate: share of the side. Unused by the others.
        bicubic: warp with the bicubic instead of the bilinear kernel.
    """

    name: str
    argument: float = 0.0
    bicubic: bool = False


def draw_operations(spec: RandAugmentSpec, rng: random.Random) -> list[Operation]:
    """Draw the operations for a clip by timm's policy.

    ``spec.num_ops`` of :data:`OPERATIONS` are drawn with replacement and each is kept with
    probability 0.5. Its level is the magnitude with normal noise, clipped to 0..10, over 10. With
    that level v, and the sign drawn where one is written:

    ================  =========================  ==========================
    operation         not increasing             increasing
    ================  =========================  ==========================
    Rotate            ±30 v degrees              the same
    ShearX, ShearY    ±0.3 v                     the same
    TranslateX/YRel   ±0.45 v                    the same
    SolarizeAdd       110 v                      the same
    Posterize         4 v bits kept (weaker)     4 - 4 v bits kept
    Solarize          above 256 v (weaker)       above 256 - 256 v
    Color, Contrast,  0.1 + 1.8 v, which is no   1 ± 0.9 v
    Brightness,       change at v = 0.5
    Sharpness
    ================  =========================  ==========================

    Whole numbers are rounded down before they are subtracted. "Weaker" means that a higher
    magnitude changes the clip less. A warp is bilinear or bicubic with equal probability. Source:
    timm, ``timm/data/auto_augment.py``.
    """
    operations = []
    for _ in range(spec.num_ops):
        name = rng.choice(OPERATIONS)
        if rng.random() >= _APPLIED:
            continue
        magnitude = rng.gauss(spec.magnitude, spec.noise) if spec.noise else spec.magnitude
        level = min(max(magnitude, 0.0), _STRONGEST) / _STRONGEST
        argument = _argument(name, level, spec.increasing, rng)
        bicubic = name in _MATRICES and rng.random() < 0.5
        operations.append(Operation(name, argument, bicubic))
    return operations


def _argument(name: str, level: float, increasing: bool, rng: random.Random) -> float:
    if name in _SIGNED_RANGE:
        return rng.choice((-1, 1)) * _SIGNED_RANGE[name] * level
    if name in ("Color", "Contrast", "Brightness", "Sharpness"):
        return 1 + rng.choice((-1, 1)) * 0.9 * level if increasing else 0.1 + 1.8 * level
    if name in ("Posterize", "Solarize"):
        whole = 4 if name == "Posterize" else 256
        return whole - int(whole * level) if increasing else int(whole * level)
    return int(110 * level) if name == "SolarizeAdd" else 0.0


_SIGNED_RANGE = {
    "Rotate": 30.0,
    "ShearX": 0.3,
    "ShearY": 0.3,
    "TranslateXRel": 0.45,
    "TranslateYRel": 0.45,
}


# --- timm's policy: what is done ------------------------------------------------------------------


def apply_operation(frames: Tensor, operation: Operation) -> Tensor:
    """Apply one operation to all frames as Pillow does to one picture.

    Args:
        frames: uint8 ``[T, 3, H, W]`` on the CPU, not changed.
        operation: what to do; a warp fills what it uncovers with grey (128).

    Returns:
        uint8 ``[T, 3, H, W]``.
    """
    name, argument = operation.name, operation.argument
    if name in _MATRICES:
        matrix = _MATRICES[name](argument, frames.shape[-1], frames.shape[-2])
        return _warp(frames, matrix, _cubic if operation.bicubic else _linear)
    return _COLOURS[name](frames, argument)


def _look_up(frames: Tensor, tables: Sequence[bytes]) -> Tensor:
    """Replace each value by its table's entry; as many tables as equal parts of the clip."""
    import torch

    # bytes.translate takes 1 ms for 16 frames of 224 x 224, torch.take 5.
    parts = frames.reshape(len(tables), -1).numpy()
    found = bytearray().join(
        bytearray(part).translate(table) for part, table in zip(parts, tables, strict=True)
    )
    return torch.frombuffer(found, dtype=torch.uint8).view(frames.shape)


def _invert(frames: Tensor, _: float) -> Tensor:
    return 255 - frames


def _posterize(frames: Tensor, bits: float) -> Tensor:
    return frames & (256 - 2 ** (8 - int(bits)))


def _solarize(frames: Tensor, threshold: float) -> Tensor:
    return _look_up(frames, [bytes(v if v < threshold else 255 - v for v in range(256))])


def _solarize_add(frames: Tensor, amount: float) -> Tensor:
    return _look_up(
        frames, [bytes(min(v + int(amount), 255) if v < 128 else v for v in range(256))]
    )


def _brightness(frames: Tensor, factor: float) -> Tensor:
    return _look_up(frames, [_blend_table(0, factor)])


def _contrast(frames: Tensor, factor: float) -> Tensor:
    means = [math.floor(float(_grey(frame).float().mean()) + 0.5) for frame in frames]
    return _look_up(frames, [_blend_table(mean, factor) for mean in means])


def _blend_table(degenerate: int, factor: float) -> bytes:
    blended = (degenerate + factor * (v - degenerate) for v in range(256))
    return bytes(int(min(max(value, 0.0), 255.0)) for value in blended)


def _autocontrast(frames: Tensor, _: float) -> Tensor:
    import torch

    planes = frames.flatten(0, 1).flatten(1)
    low, high = planes.amin(1, keepdim=True).double(), planes.amax(1, keepdim=True).double()
    scale = 255.0 / (high - low)
    values = torch.arange(256, dtype=torch.float64)
    stretched = (values * scale - low * scale).clamp_(0, 255)
    tables = torch.where(high > low, stretched, values).to(torch.uint8)
    return _look_up(frames, [table.numpy().tobytes() for table in tables])


def _equalize(frames: Tensor, _: float) -> Tensor:
    import torch

    planes = frames.flatten(0, 1).flatten(1)
    counts = torch.stack([torch.bincount(plane, minlength=256) for plane in planes])
    highest = planes.amax(1, keepdim=True).long()
    step = (planes.shape[1] - counts.gather(1, highest)) // 255
    below = counts.cumsum(1) - counts
    spread = ((below + step // 2) // step.clamp(min=1)).clamp_(max=255)
    # Too few different values to spread: Pillow leaves such a picture as it is.
    tables = torch.where(step > 0, spread, torch.arange(256)).to(torch.uint8)
    return _look_up(frames, [table.numpy().tobytes() for table in tables])


def _grey(frame: Tensor) -> Tensor:
    """Luma of ITU-R BT.601 in Pillow's fixed point: uint8 ``[3, H, W]`` to int32 ``[H, W]``."""
    red, green, blue = frame.int()
    return (red * 19595).add_(green, alpha=38470).add_(blue, alpha=7471).add_(32768) >> 16


def _blend(degenerate: Tensor, frame: Tensor, factor: float) -> Tensor:
    """Float, clipped; the caller's copy to uint8 rounds down, as Pillow does."""
    return (frame.float() - degenerate).mul_(factor).add_(degenerate).clamp_(0, 255)


def _color(frames: Tensor, factor: float) -> Tensor:
    result = frames.new_empty(frames.shape)
    for frame, target in zip(frames, result, strict=True):
        target.copy_(_blend(_grey(frame).float(), frame, factor))
    return result


def _sharpness(frames: Tensor, factor: float) -> Tensor:
    result = frames.clone()  # Pillow's filter leaves the outermost pixels alone
    for frame, target in zip(frames, result, strict=True):
        wide = frame.short()
        rows = wide[:, :-2] + wide[:, 1:-1] + wide[:, 2:]
        smooth = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
        centre = wide[:, 1:-1, 1:-1]
        # The kernel is 1 all round and 5 in the middle, over 13.
        smooth = smooth.add_(centre, alpha=4).float().div_(13).round_()
        target[:, 1:-1, 1:-1] = _blend(smooth, centre, factor)
    return result


_COLOURS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "AutoContrast": _autocontrast,
    "Equalize": _equalize,
    "Invert": _invert,
    "Posterize": _posterize,
    "Solarize": _solarize,
    "SolarizeAdd": _solarize_add,
    "Color": _color,
    "Contrast": _contrast,
    "Brightness": _brightness,
    "Sharpness": _sharpness,
}

# Where an output pixel comes from: x' = a x + b y + c, y' = d x + e y + f, with pixel centres at
# .5 and the origin at the top left corner, about which a shear turns, too.
Matrix = tuple[float, float, float, float, float, float]


def _rotation(degrees: float, width: int, height: int) -> Matrix:
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = width / 2, height / 2
    return cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y


_MATRICES: dict[str, Callable[[float, int, int], Matrix]] = {
    "Rotate": _rotation,
    "ShearX": lambda factor, width, height: (1, factor, 0, 0, 1, 0),
    "ShearY": lambda factor, width, height: (1, 0, 0, factor, 1, 0),
    "TranslateXRel": lambda share, width, height: (1, 0, share * width, 0, 1, 0),
    "TranslateYRel": lambda share, width, height: (1, 0, 0, 0, 1, share * height),
}

OPERATIONS: tuple[str, ...] = (*_COLOURS, *_MATRICES)
"""The names of timm's fifteen operations."""


def _linear(position: Tensor) -> tuple[Tensor, Tensor]:
    """The pixels that a position lies between, and their weights: ``[N] -> [N, 2], [N, 2]``."""
    import torch

    start = position.floor()
    weight = (position - start).float()
    taps = start.int()[:, None] + torch.arange(2, dtype=torch.int32)
    return taps, torch.stack([1 - weight, weight], 1)


def _cubic(position: Tensor) -> tuple[Tensor, Tensor]:
    """Pillow's cubic convolution, whose parameter a is -1: ``[N] -> [N, 4], [N, 4]``."""
    import torch

    start = position.floor()
    steps = torch.arange(-1, 3, dtype=torch.int32)
    taps = start.int()[:, None] + steps
    distance = ((position - start).float()[:, None] - steps).abs()
    near = (distance - 2) * distance * distance + 1
    far = ((5 - distance) * distance - 8) * distance + 4
    return taps, torch.where(distance <= 1, near, far)


def _warp(
    frames: Tensor, matrix: Matrix, kernel: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> Tensor:
    """Affine warp; pixels that come from outside become grey, the border repeats for kernels.

    Every output pixel is a weighted sum of a few input pixels, the same for all frames and
    channels. ``embedding_bag`` does just that, with a pixel's values in all of them as its row.
    ``grid_sample`` works the weights out anew for every frame, which makes it half as fast when
    bicubic, and has another bicubic kernel than Pillow. Values are rounded to the nearest; Pillow
    rounds down, so that each of its warps darkens a picture by half a grey level.
    """
    import torch
    import torch.nn.functional as F

    height, width = frames.shape[-2:]
    a, b, c, d, e, f = matrix
    # Double, as in Pillow, so that pixels on the border fall to the same side.
    y = torch.arange(height, dtype=torch.float64)[:, None] + 0.5
    x = torch.arange(width, dtype=torch.float64) + 0.5
    from_x = (a * x + b * y + c).flatten()
    from_y = (d * x + e * y + f).flatten()
    outside = (from_x < 0) | (from_x >= width) | (from_y < 0) | (from_y >= height)

    # An axis along which nothing moves needs one pixel instead of two or four.
    columns, across = kernel(from_x - 0.5) if (a, b, c) != (1, 0, 0) else _still(from_x)
    rows, down = kernel(from_y - 0.5) if (d, e, f) != (0, 1, 0) else _still(from_y)
    columns, rows = columns.clamp_(0, width - 1), rows.clamp_(0, height - 1).mul_(width)
    # What comes from outside weighs nothing and gets grey; the half rounds what is cut off below.
    down.masked_fill_(outside[:, None], 0)
    offset = torch.where(outside, _GREY + 0.5, 0.5).float()[:, None]

    values = frames.reshape(-1, height * width).t().contiguous().float()
    result = frames.new_empty(values.shape[1], height * width)
    # In blocks that fit the cache, because each is written back transposed.
    blocks = (t.split(16 * width) for t in (rows, columns, down, across, offset))
    for target, row, column, row_weight, column_weight, add in zip(
        result.split(16 * width, 1), *blocks, strict=True
    ):
        index = (row[:, :, None] + column[:, None]).flatten(1)
        weight = (row_weight[:, :, None] * column_weight[:, None]).flatten(1)
        block = F.embedding_bag(index, values, mode="sum", per_sample_weights=weight)
        target.copy_(block.add_(add).clamp_(0, 255).t())
    return result.view(frames.shape)


def _still(position: Tensor) -> tuple[Tensor, Tensor]:
    return position.int()[:, None], position.new_ones(len(position), 1).float()
