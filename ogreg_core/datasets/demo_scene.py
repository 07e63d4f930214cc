"""What the clips of the demo data set are made of: textured shapes and the eight motions that both
its variants have.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = [
    "MIRROR",
    "PAIRS",
    "Pose",
    "Shape",
    "draw_shape",
    "noise_texture",
    "poses",
    "random_shape",
    "sample",
]

# (name as rendered, name of the reversed clip)
PAIRS = (
    ("move_right", "move_left"),
    ("move_down", "move_up"),
    ("turn_clockwise", "turn_counterclockwise"),
    ("orbit_clockwise", "orbit_counterclockwise"),
    ("grow", "shrink"),
    ("appear", "vanish"),
    ("approach", "retreat"),
    ("open", "close"),
)
# What a left-right flip of the picture turns each class into.
MIRROR = {
    "move_right": "move_left",
    "move_left": "move_right",
    "turn_clockwise": "turn_counterclockwise",
    "turn_counterclockwise": "turn_clockwise",
    "orbit_clockwise": "orbit_counterclockwise",
    "orbit_counterclockwise": "orbit_clockwise",
}


@dataclass(frozen=True)
class Shape:
    """A textured polygon."""

    corners: int
    texture: np.ndarray
    tint: np.ndarray


@dataclass(frozen=True)
class Pose:
    """Where a shape is, in units of half the picture's side; ``angle`` and ``gap`` in radians."""

    x: float
    y: float
    radius: float
    angle: float = 0.0
    opacity: float = 1.0
    gap: float = 0.0


def noise_texture(rng: np.random.Generator, cells: int) -> np.ndarray:
    """Smooth periodic noise ``[256, 256]`` in 0..1: random Fourier components up to ``cells`` per
    side.
    """
    spectrum = np.zeros((256, 256), dtype=np.complex128)
    low = rng.normal(size=(2 * cells, 2 * cells)) + 1j * rng.normal(size=(2 * cells, 2 * cells))
    spectrum[:cells, :cells] = low[:cells, :cells]
    spectrum[-cells:, :cells] = low[cells:, :cells]
    noise = np.fft.ifft2(spectrum).real
    return (noise - noise.min()) / (noise.max() - noise.min())


def random_shape(rng: np.random.Generator) -> Shape:
    """A triangle or a square; its brightest channel is full."""
    tint = rng.uniform(0.5, 1.0, size=3)
    # Triangles and squares: of a disc or a many-cornered shape one cannot see where it turns.
    return Shape(int(rng.choice([3, 4])), noise_texture(rng, 6), tint / tint.max())


def sample(texture: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Nearest texel of a periodic texture; coordinate 1 is a quarter of the texture."""
    columns = np.floor(x * 64).astype(np.int64) & 255
    rows = np.floor(y * 64).astype(np.int64) & 255
    return texture[rows, columns]


def draw_shape(
    image: np.ndarray, shape: Shape, pose: Pose, x: np.ndarray, y: np.ndarray, pixel: float
) -> None:
    """Blend a shape into a picture in place; edges are one pixel soft.

    Args:
        image: ``[H, W, 3]``, 0..1.
        shape, pose: what, and where in the scene.
        x, y: place of each pixel in the scene, ``[H, W]``.
        pixel: side of a pixel in the scene.
    """
    cos, sin = np.cos(pose.angle), np.sin(pose.angle)
    dx, dy = x - pose.x, y - pose.y
    u, v = (cos * dx + sin * dy) / pose.radius, (-sin * dx + cos * dy) / pose.radius
    distance, theta = np.hypot(u, v), np.arctan2(v, u)
    sector = 2 * np.pi / shape.corners
    within = (theta + np.pi) % sector - sector / 2
    outline = distance * np.cos(within) - np.cos(sector / 2)
    if pose.gap:
        # A wedge cut out of the shape: positive inside the wedge.
        outline = np.maximum(outline, (pose.gap - np.abs(theta)) * distance)
    softness = pixel / pose.radius
    alpha = np.clip(0.5 - outline / softness, 0.0, 1.0) * pose.opacity
    shade = 0.6 + 0.4 * sample(shape.texture, u, v)
    colour = shade[..., None] * shape.tint
    image += alpha[..., None] * (colour - image)


def poses(motion: str, rng: np.random.Generator, progress: np.ndarray) -> list[list[Pose]]:
    """For each shape, its pose at each moment.

    Args:
        motion: the first name of one of ``PAIRS``.
        rng: place, size, speed.
        progress: of the motion at each moment, 0..1, ``[T]``.
    """
    x, y = rng.uniform(-0.35, 0.35, size=2)
    radius = rng.uniform(0.32, 0.46)
    angle = rng.uniform(0, 2 * np.pi)
    travel = rng.uniform(0.5, 0.8)
    sweep = progress - 0.5
    if motion == "move_right":
        return [[Pose(x + 2 * travel * s, y, radius, angle) for s in sweep]]
    if motion == "move_down":
        return [[Pose(x, y + 2 * travel * s, radius, angle) for s in sweep]]
    if motion == "turn_clockwise":
        turn = rng.uniform(0.4, 0.7) * np.pi
        return [[Pose(x, y, radius * 1.3, angle + turn * s) for s in progress]]
    if motion == "orbit_clockwise":
        turn, orbit = rng.uniform(1.0, 1.6) * np.pi, rng.uniform(0.35, 0.5)
        return [
            [
                Pose(
                    0.3 * x + orbit * np.cos(angle + turn * s),
                    0.3 * y + orbit * np.sin(angle + turn * s),
                    radius * 0.7,
                )
                for s in progress
            ]
        ]
    if motion == "grow":
        factor = rng.uniform(2.2, 3.0)
        return [[Pose(x, y, 0.25 * factor**s, angle) for s in progress]]
    if motion == "appear":
        return [[Pose(x, y, radius * 1.2, angle, opacity=float(s)) for s in progress]]
    if motion == "approach":
        direction = rng.uniform(0, np.pi)
        dx, dy = np.cos(direction), np.sin(direction)
        gaps = 0.25 + (0.5 + 0.15 * travel) * (1.0 - progress)
        return [
            [
                Pose(0.3 * x + side * dx * g, 0.3 * y + side * dy * g, radius * 0.7, angle)
                for g in gaps
            ]
            for side in (-1.0, 1.0)
        ]
    if motion == "open":
        widest = rng.uniform(0.5, 0.8) * np.pi
        return [[Pose(x, y, radius * 1.3, angle, gap=0.02 + widest * s) for s in progress]]
    raise ValueError(f"no motion called {motion!r}")
