"""The demo data set: textured shapes that move in reversible ways, rendered to real H.264 files.

Sixteen classes in eight pairs. Each pair is one motion and its exact time reversal (left and right,
clockwise and counter-clockwise, ...), rendered from the same distribution of scenes: one frame, or
frames out of order, cannot tell the two apart. The background is textured and drifts in a random
direction, so that motion alone is no cue either.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ogreg_core.datasets.folder import list_folder
from ogreg_core.datasets.prepare import PrepareOptions, PrepareReport, prepare_listing
from ogreg_core.errors import DataError, Interrupted, WorkFailed
from ogreg_core.processes import Lost, run_isolated
from ogreg_core.progress import Progress, ProgressCallback
from ogreg_core.signals import StopRequest

__all__ = ["MIRROR", "PAIRS", "prepare_demo", "render_clip"]

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
SIZE = 112
FPS = 16.0


@dataclass(frozen=True)
class _Shape:
    """A textured polygon."""

    corners: int
    texture: np.ndarray
    tint: np.ndarray


@dataclass(frozen=True)
class _Pose:
    x: float
    y: float
    radius: float
    angle: float = 0.0
    opacity: float = 1.0
    gap: float = 0.0


def _texture(rng: np.random.Generator, cells: int) -> np.ndarray:
    """Smooth periodic noise ``[256, 256]`` in 0..1: random Fourier components up to ``cells`` per
    side.
    """
    spectrum = np.zeros((256, 256), dtype=np.complex128)
    low = rng.normal(size=(2 * cells, 2 * cells)) + 1j * rng.normal(size=(2 * cells, 2 * cells))
    spectrum[:cells, :cells] = low[:cells, :cells]
    spectrum[-cells:, :cells] = low[cells:, :cells]
    noise = np.fft.ifft2(spectrum).real
    return (noise - noise.min()) / (noise.max() - noise.min())


def _shape(rng: np.random.Generator) -> _Shape:
    tint = rng.uniform(0.5, 1.0, size=3)
    # Triangles and squares: of a disc or a many-cornered shape one cannot see where it turns.
    return _Shape(int(rng.choice([3, 4])), _texture(rng, 6), tint / tint.max())


def _sample(texture: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Nearest texel of a periodic texture; coordinate 1 is a quarter of the texture."""
    columns = np.floor(x * 64).astype(np.int64) & 255
    rows = np.floor(y * 64).astype(np.int64) & 255
    return texture[rows, columns]


def _draw(image: np.ndarray, shape: _Shape, pose: _Pose, x: np.ndarray, y: np.ndarray) -> None:
    """Blend a shape into ``image`` ``[H, W, 3]`` in place; edges are one pixel soft."""
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
    softness = 2.0 / image.shape[0] / pose.radius
    alpha = np.clip(0.5 - outline / softness, 0.0, 1.0) * pose.opacity
    shade = 0.6 + 0.4 * _sample(shape.texture, u, v)
    colour = shade[..., None] * shape.tint
    image += alpha[..., None] * (colour - image)


def _poses(motion: str, rng: np.random.Generator, progress: np.ndarray) -> list[list[_Pose]]:
    """For each shape, its pose at each moment; ``progress`` runs from 0 to 1."""
    x, y = rng.uniform(-0.35, 0.35, size=2)
    radius = rng.uniform(0.32, 0.46)
    angle = rng.uniform(0, 2 * np.pi)
    travel = rng.uniform(0.5, 0.8)
    sweep = progress - 0.5
    if motion == "move_right":
        return [[_Pose(x + 2 * travel * s, y, radius, angle) for s in sweep]]
    if motion == "move_down":
        return [[_Pose(x, y + 2 * travel * s, radius, angle) for s in sweep]]
    if motion == "turn_clockwise":
        turn = rng.uniform(0.4, 0.7) * np.pi
        return [[_Pose(x, y, radius * 1.3, angle + turn * s) for s in progress]]
    if motion == "orbit_clockwise":
        turn, orbit = rng.uniform(1.0, 1.6) * np.pi, rng.uniform(0.35, 0.5)
        return [
            [
                _Pose(
                    0.3 * x + orbit * np.cos(angle + turn * s),
                    0.3 * y + orbit * np.sin(angle + turn * s),
                    radius * 0.7,
                )
                for s in progress
            ]
        ]
    if motion == "grow":
        factor = rng.uniform(2.2, 3.0)
        return [[_Pose(x, y, 0.25 * factor**s, angle) for s in progress]]
    if motion == "appear":
        return [[_Pose(x, y, radius * 1.2, angle, opacity=float(s)) for s in progress]]
    if motion == "approach":
        direction = rng.uniform(0, np.pi)
        dx, dy = np.cos(direction), np.sin(direction)
        gaps = 0.25 + (0.5 + 0.15 * travel) * (1.0 - progress)
        return [
            [
                _Pose(0.3 * x + side * dx * g, 0.3 * y + side * dy * g, radius * 0.7, angle)
                for g in gaps
            ]
            for side in (-1.0, 1.0)
        ]
    if motion == "open":
        widest = rng.uniform(0.5, 0.8) * np.pi
        return [[_Pose(x, y, radius * 1.3, angle, gap=0.02 + widest * s) for s in progress]]
    raise ValueError(f"no motion called {motion!r}")


def render_clip(label: str, seed: int, size: int = SIZE) -> np.ndarray:
    """One clip of a class.

    Args:
        label: one of the names in ``PAIRS``.
        seed: scene, timing and texture; both classes of a pair draw from one distribution.
        size: side in pixels.

    Returns:
        uint8 ``[T, size, size, 3]``, 24 to 40 frames.
    """
    motion, reverse = next((a, label == b) for a, b in PAIRS if label in (a, b))
    rng = np.random.default_rng([seed, *label.encode()])
    frames = int(rng.integers(24, 41))
    shapes = [_shape(rng), _shape(rng)]
    backdrop, tint = _texture(rng, 4), rng.uniform(0.3, 1.0, size=3)
    drift, origin = rng.uniform(-0.4, 0.4, size=2), rng.uniform(0, 4, size=2)
    noise = rng.uniform(0.0, 0.03)
    axis = (np.arange(size) + 0.5) / size * 2 - 1
    x, y = np.meshgrid(axis, axis)
    progress = np.linspace(0.0, 1.0, frames)
    tracks = _poses(motion, rng, progress)
    clip = np.empty((frames, size, size, 3), dtype=np.uint8)
    for t, s in enumerate(progress):
        shade = 0.08 + 0.3 * _sample(
            backdrop, x + origin[0] + drift[0] * s, y + origin[1] + drift[1] * s
        )
        image = shade[..., None] * tint
        for shape, track in zip(shapes, tracks, strict=False):
            _draw(image, shape, track[t], x, y)
        image += rng.normal(scale=noise, size=image.shape)
        clip[t] = np.clip(image * 255, 0, 255).astype(np.uint8)
    return clip[::-1] if reverse else clip


def _render_file(job: tuple[Path, str, int]) -> None:
    from ogreg_core.video import write_video

    path, label, seed = job
    write_video(path, render_clip(label, seed), FPS)


def prepare_demo(
    root: Path,
    *,
    train_per_class: int = 24,
    val_per_class: int = 8,
    seed: int = 0,
    workers: int = 0,
    command: str = "ogreg prepare demo FOLDER",
    on_progress: ProgressCallback,
) -> PrepareReport:
    """Render the data set under ``root`` and write its manifest.

    Args:
        root: target folder; must be empty, missing, or an earlier demo (files that exist are kept).
        train_per_class, val_per_class: clips per class.
        seed: of all scenes.
        workers: processes; 0: this one.
        command: this command line, for messages.
        on_progress: receives progress events.

    Raises:
        DataError: the folder holds something else.
        Interrupted: by a signal; what was rendered is kept.
    """
    root = root.expanduser().resolve()
    marker = root / ".ogreg-demo"
    if root.exists() and any(root.iterdir()) and not marker.exists():
        raise DataError(
            f"{root} is not empty",
            why="the demo data set gets a folder of its own",
            fix="choose a new folder",
        )
    root.mkdir(parents=True, exist_ok=True)
    settings = f"seed {seed}, {train_per_class} train and {val_per_class} val clips per class\n"
    if marker.exists() and marker.read_text() != settings:
        (root / "dataset.json").unlink(missing_ok=True)
        for split in ("train", "val"):
            shutil.rmtree(root / split, ignore_errors=True)
    marker.write_text(settings)
    jobs = []
    for split, count in (("train", train_per_class), ("val", val_per_class)):
        for label in (name for pair in PAIRS for name in pair):
            folder = root / split / label
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                # Validation scenes come from seeds that training never uses.
                clip_seed = seed * 1_000_000 + number + (500_000 if split == "val" else 0)
                path = folder / f"{label}_{number:03d}.mp4"
                if not path.exists():
                    jobs.append((path, label, clip_seed))
    with StopRequest() as stop:
        results = run_isolated(
            _render_file,
            jobs,
            workers,
            preload=["ogreg_core.video"],
            stopping=lambda: stop.number > 0,
        )
        for done, (job, result) in enumerate(results, 1):
            if isinstance(result, Lost):
                raise WorkFailed(f"{job[0]} could not be rendered", why=result.detail, fix=command)
            on_progress(Progress("render", done, len(jobs)))
    if stop.number:
        raise Interrupted(
            "stopped while rendering; finished clips are kept",
            signal_number=stop.number,
            fix=f"{command}   # goes on where it stopped",
        )
    made = {"seed": seed, "train_per_class": train_per_class, "val_per_class": val_per_class}
    listing = replace(list_folder(root, name="demo"), mirror=MIRROR, options=made)
    options = PrepareOptions(workers=workers, command=command)
    return prepare_listing(listing, options, on_progress)
