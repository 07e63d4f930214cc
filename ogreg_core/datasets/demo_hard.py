"""The harder variant of the demo data set: more motions, distractors, and a camera that moves.

Twenty-four classes in twelve pairs, each pair again one motion and its exact time reversal: the
eight of the demo and four in which several moments count. Smaller and dimmer shapes move about on
their own, and the whole scene pans, zooms and rolls: what moves, moves against the backdrop, and goes
another way in the picture. What the distractors and the camera do is as likely backwards as
forwards.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ogreg_core.datasets.demo_scene import (
    PAIRS,
    Pose,
    Shape,
    draw_shape,
    noise_texture,
    poses,
    random_shape,
    sample,
)

__all__ = ["HARD_PAIRS", "HARD_SIZE", "render_hard_clip", "render_scene"]

HARD_PAIRS = (
    *PAIRS,
    ("speed_up", "slow_down"),
    ("swing_wider", "swing_narrower"),
    ("spiral_out", "spiral_in"),
    ("pulse_then_slide", "slide_then_pulse"),
)
HARD_SIZE = 80
# Half the picture's side in the scene: room for an actor that moves against the camera.
_VIEW = 1.25


@dataclass(frozen=True)
class _Camera:
    """Where it looks, ``[T, 2]``, how much it shows and how it is turned (radians), ``[T]`` each."""

    pan: np.ndarray
    view: np.ndarray
    roll: np.ndarray

    def places(self, t: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Coordinates in the scene of each pixel of frame ``t``, ``[size, size]`` each."""
        axis = ((np.arange(size) + 0.5) / size * 2 - 1) * self.view[t]
        x, y = np.meshgrid(axis, axis)
        cos, sin = np.cos(self.roll[t]), np.sin(self.roll[t])
        return cos * x - sin * y + self.pan[t, 0], sin * x + cos * y + self.pan[t, 1]


def _camera(rng: np.random.Generator, moment: np.ndarray) -> _Camera:
    """A steady pan, zoom and roll with a slow wobble; ``moment`` runs from 0 to 1."""
    direction, length = rng.uniform(0, 2 * np.pi), rng.uniform(0.15, 0.6)
    zoom, roll = rng.uniform(-0.12, 0.12), rng.uniform(-0.2, 0.2)
    phases, cycles = rng.uniform(0, 2 * np.pi, size=3), rng.uniform(0.7, 1.5, size=3)
    wobble = np.sin(phases + 2 * np.pi * cycles * (moment[:, None] - 0.5))
    steady = moment - 0.5
    towards = np.array([np.cos(direction), np.sin(direction)])
    return _Camera(
        pan=length * steady[:, None] * towards + 0.06 * wobble[:, :2],
        view=_VIEW * np.exp(zoom * steady),
        roll=roll * steady + 0.04 * wobble[:, 2],
    )


def _progress(rng: np.random.Generator, moment: np.ndarray) -> np.ndarray:
    """How far the motion is at each moment: perhaps a pause before and after, and an easing that is
    its own reversal.
    """
    before, after = rng.uniform(0.0, 0.18, size=2) * rng.integers(0, 2, size=2)
    progress = np.clip((moment - before) / (1.0 - before - after), 0.0, 1.0)
    return progress + rng.uniform(-0.5, 0.5) * np.sin(2 * np.pi * progress) / (2 * np.pi)


def _actors(motion: str, rng: np.random.Generator, progress: np.ndarray) -> list[list[Pose]]:
    """For each acting shape, its pose at each moment."""
    if motion.startswith("move_"):
        # With room for the camera's own way.
        return poses(motion, rng, 0.5 + 0.75 * (progress - 0.5))
    if any(motion == forward for forward, _ in PAIRS):
        return poses(motion, rng, progress)
    place = rng.uniform(-0.2, 0.2, size=2)
    radius, angle = rng.uniform(0.3, 0.42), rng.uniform(0, 2 * np.pi)
    heading = rng.uniform(0, 2 * np.pi)
    swell = np.ones_like(progress)
    if motion == "speed_up":
        way = rng.uniform(1.1, 1.4) * (progress ** rng.uniform(2.4, 3.2) - 0.5)
    elif motion == "swing_wider":
        swings = np.sin(2 * np.pi * rng.uniform(1.4, 1.9) * progress)
        way = rng.uniform(0.65, 0.9) * progress * swings
    elif motion == "spiral_out":
        turn = rng.choice([-1.0, 1.0]) * rng.uniform(2.2, 3.0) * np.pi
        heading = heading + turn * progress
        way = 0.08 + rng.uniform(0.5, 0.65) * progress
        radius *= 0.8
    elif motion == "pulse_then_slide":
        beat, slide = np.clip(progress / 0.45, 0.0, 1.0), np.clip(progress / 0.45 - 1.2, 0.0, 1.0)
        swell = 1.0 + rng.uniform(0.6, 0.8) * np.sin(np.pi * beat) ** 2
        way = rng.uniform(0.8, 1.1) * (slide - 0.5)
        radius *= 0.8
    else:
        raise ValueError(f"no motion called {motion!r}")
    x, y = place[0] + way * np.cos(heading), place[1] + way * np.sin(heading)
    return [[Pose(*at, angle) for at in zip(x, y, radius * swell, strict=True)]]


def _distractor(rng: np.random.Generator, moment: np.ndarray) -> tuple[Shape, list[Pose]]:
    """A small dim shape that goes straight, turns on the spot or circles."""
    shape = random_shape(rng)
    (x, y), radius = rng.uniform(-0.9, 0.9, size=2), rng.uniform(0.12, 0.18)
    angle, heading = rng.uniform(0, 2 * np.pi, size=2)
    way, turn = rng.uniform(0.3, 1.2), rng.uniform(-1.6, 1.6) * np.pi
    kind = rng.choice(["straight", "turning", "circling"])
    steady = moment - 0.5
    if kind == "straight":
        dx, dy = way * steady * np.cos(heading), way * steady * np.sin(heading)
    else:
        orbit = 0.35 * way if kind == "circling" else 0.0
        dx, dy = orbit * np.cos(heading + turn * steady), orbit * np.sin(heading + turn * steady)
    angles = angle + (turn * steady if kind == "turning" else 0.0 * steady)
    track = [Pose(x + a, y + b, radius, c) for a, b, c in zip(dx, dy, angles, strict=True)]
    return replace(shape, tint=0.6 * shape.tint), track


def render_scene(motion: str, rng: np.random.Generator, size: int) -> np.ndarray:
    """One clip of a motion, forwards.

    Args:
        motion: the first name of one of ``HARD_PAIRS``.
        rng: of everything in it.
        size: side in pixels.

    Returns:
        uint8 ``[T, size, size, 3]``, 24 to 40 frames.
    """
    moment = np.linspace(0.0, 1.0, int(rng.integers(24, 41)))
    backdrop, tint = noise_texture(rng, 6), rng.uniform(0.3, 1.0, size=3)
    noise = rng.uniform(0.0, 0.02)
    camera = _camera(rng, moment)
    # Drawn in this order: nothing covers the actors.
    cast = [_distractor(rng, moment) for _ in range(rng.integers(1, 4))]
    for track in _actors(motion, rng, _progress(rng, moment)):
        cast.append((random_shape(rng), track))
    clip = np.empty((len(moment), size, size, 3), dtype=np.uint8)
    for t in range(len(moment)):
        x, y = camera.places(t, size)
        # Strong patches: what the scene does is seen against them.
        patches = np.clip(2.0 * sample(backdrop, x, y) - 0.5, 0.0, 1.0)
        image = (0.03 + 0.38 * patches)[..., None] * tint
        for shape, track in cast:
            draw_shape(image, shape, track[t], x, y, 2 * camera.view[t] / size)
        image += rng.normal(scale=noise, size=image.shape)
        clip[t] = np.clip(image * 255, 0, 255).astype(np.uint8)
    return clip


def render_hard_clip(label: str, seed: int, size: int = HARD_SIZE) -> np.ndarray:
    """One clip of a class.

    Args:
        label: one of the names in ``HARD_PAIRS``.
        seed: scene, camera, distractors and timing; both classes of a pair draw from one
            distribution.
        size: side in pixels.

    Returns:
        uint8 ``[T, size, size, 3]``, 24 to 40 frames.
    """
    motion, reverse = next((a, label == b) for a, b in HARD_PAIRS if label in (a, b))
    clip = render_scene(motion, np.random.default_rng([seed, *f"hard {label}".encode()]), size)
    return clip[::-1] if reverse else clip
