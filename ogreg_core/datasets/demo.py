"""The demo data set: textured shapes that move in reversible ways, rendered to real H.264 files.

Sixteen classes in eight pairs. Each pair is one motion and its exact time reversal (left and right,
clockwise and counter-clockwise, ...), rendered from the same distribution of scenes: one frame, or
frames out of order, cannot tell the two apart. The background is textured and drifts in a random
direction, so that motion alone is no cue either. The harder variant is in ``demo_hard``.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from ogreg_core.datasets.demo_hard import HARD_PAIRS, render_hard_clip
from ogreg_core.datasets.demo_scene import (
    MIRROR,
    PAIRS,
    draw_shape,
    noise_texture,
    poses,
    random_shape,
    sample,
)
from ogreg_core.datasets.folder import list_folder
from ogreg_core.datasets.prepare import PrepareOptions, PrepareReport, prepare_listing
from ogreg_core.errors import DataError, Interrupted, WorkFailed
from ogreg_core.processes import Lost, run_isolated
from ogreg_core.progress import Progress, ProgressCallback
from ogreg_core.signals import StopRequest

__all__ = ["MIRROR", "PAIRS", "prepare_demo", "render_clip"]

SIZE = 112
FPS = 16.0
# How the marker file of the harder variant begins.
_HARD = "hard, "
# File, class, seed, harder variant.
_Job = tuple[Path, str, int, bool]


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
    shapes = [random_shape(rng), random_shape(rng)]
    backdrop, tint = noise_texture(rng, 4), rng.uniform(0.3, 1.0, size=3)
    drift, origin = rng.uniform(-0.4, 0.4, size=2), rng.uniform(0, 4, size=2)
    noise = rng.uniform(0.0, 0.03)
    axis = (np.arange(size) + 0.5) / size * 2 - 1
    x, y = np.meshgrid(axis, axis)
    progress = np.linspace(0.0, 1.0, frames)
    tracks = poses(motion, rng, progress)
    clip = np.empty((frames, size, size, 3), dtype=np.uint8)
    for t, s in enumerate(progress):
        shade = 0.08 + 0.3 * sample(
            backdrop, x + origin[0] + drift[0] * s, y + origin[1] + drift[1] * s
        )
        image = shade[..., None] * tint
        for shape, track in zip(shapes, tracks, strict=False):
            draw_shape(image, shape, track[t], x, y, 2.0 / size)
        image += rng.normal(scale=noise, size=image.shape)
        clip[t] = np.clip(image * 255, 0, 255).astype(np.uint8)
    return clip[::-1] if reverse else clip


def _render_file(job: _Job) -> None:
    from ogreg_core.video import write_video

    path, label, seed, hard = job
    write_video(path, render_hard_clip(label, seed) if hard else render_clip(label, seed), FPS)


def prepare_demo(
    root: Path,
    *,
    hard: bool = False,
    train_per_class: int = 24,
    val_per_class: int = 8,
    seed: int = 0,
    workers: int = 0,
    command: str = "ogreg prepare demo FOLDER",
    on_progress: ProgressCallback,
) -> PrepareReport:
    """Render the data set under ``root`` and write its manifest.

    Args:
        root: target folder; must be empty, missing, or an earlier demo of the same kind (files that
            exist are kept if they were rendered with the same settings).
        hard: the harder variant, of the name ``demo-hard``.
        train_per_class, val_per_class: clips per class.
        seed: of all scenes.
        workers: processes; 0: this one.
        command: this command line, for messages.
        on_progress: receives progress events.

    Raises:
        DataError: the folder holds something else, or the other variant.
        Interrupted: by a signal; what was rendered is kept.
    """
    root = root.expanduser().resolve()
    settings = f"seed {seed}, {train_per_class} train and {val_per_class} val clips per class\n"
    _claim(root, settings, hard)
    counts = {"train": train_per_class, "val": val_per_class}
    _render_missing(list(_missing(root, counts, seed, hard)), workers, command, on_progress)
    made = {"seed": seed, "train_per_class": train_per_class, "val_per_class": val_per_class}
    name = "demo-hard" if hard else "demo"
    listing = replace(list_folder(root, name=name), mirror=MIRROR, options=made)
    options = PrepareOptions(workers=workers, command=command)
    return prepare_listing(listing, options, on_progress)


def _claim(root: Path, settings: str, hard: bool) -> None:
    """Mark the folder as ours, and empty it if it was rendered with other settings.

    Raises:
        DataError: it holds something else, or the other variant.
    """
    marker = root / ".ogreg-demo"
    if root.exists() and any(root.iterdir()) and not marker.exists():
        raise DataError(
            f"{root} is not empty",
            why="the demo data set gets a folder of its own",
            fix="choose a new folder",
        )
    before = marker.read_text() if marker.exists() else None
    if before and before.startswith(_HARD) != hard:
        other = root.with_name(root.name + ("-hard" if hard else "-plain"))
        raise DataError(
            f"{root} holds the {'plain' if hard else 'harder'} demo data set",
            why="each variant gets a folder of its own",
            fix=f"ogreg prepare demo {shlex.quote(str(other))}{' --hard' if hard else ''}",
        )
    settings = _HARD + settings if hard else settings
    if before is not None and before != settings:
        (root / "dataset.json").unlink(missing_ok=True)
        for split in ("train", "val"):
            shutil.rmtree(root / split, ignore_errors=True)
    root.mkdir(parents=True, exist_ok=True)
    marker.write_text(settings)


def _missing(root: Path, counts: dict[str, int], seed: int, hard: bool) -> Iterable[_Job]:
    """The clips that are not there yet."""
    for split, count in counts.items():
        for label in (name for pair in (HARD_PAIRS if hard else PAIRS) for name in pair):
            folder = root / split / label
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                # Validation scenes come from seeds that training never uses.
                clip_seed = seed * 1_000_000 + number + (500_000 if split == "val" else 0)
                path = folder / f"{label}_{number:03d}.mp4"
                if not path.exists():
                    yield path, label, clip_seed, hard


def _render_missing(
    jobs: list[_Job], workers: int, command: str, on_progress: ProgressCallback
) -> None:
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
