"""Shared fixtures: every video that a test needs is made here."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from multiprocessing import forkserver
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:
    # Two workers, and what they start, share two cores. Read by torch when it is imported.
    os.environ["OMP_NUM_THREADS"] = "1"

import av
import numpy as np
import pytest
import torch
from hypothesis import settings

from ogreg_core.datasets.demo import prepare_demo
from ogreg_core.progress import ignore_progress
from tests import ranks  # noqa: F401  It says what the fork server loads.
from tests.forked import Forks

# How long an example takes says something of the machine, not of the code.
settings.register_profile("ogreg", deadline=None)
settings.load_profile("ogreg")


@pytest.fixture(scope="session", autouse=True)
def _fork_server() -> None:
    """A test process has one, which keeps what it loaded at its start: that for ``tests.ranks``, before
    ``ogreg_core.processes`` starts it with less.
    """
    forkserver.ensure_running()


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests neither see nor change the user's remembered data sets, checkpoints or thread count."""
    monkeypatch.setenv("OGREG_HOME", str(tmp_path / "ogreg-home"))
    monkeypatch.delenv("OGREG_CHECKPOINT", raising=False)
    monkeypatch.delenv("OGREG_DEBUG", raising=False)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    """Of code that was compiled for other shapes before, torch makes shapes symbolic, which takes it
    minutes.
    """
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


def moving_frames(frames: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth gradients that drift, with the frame number readable from the mean grey: ``[T, H, W, 3]``."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    phase = rng.uniform(0, 6.28)
    clip = np.empty((frames, height, width, 3), np.uint8)
    for t in range(frames):
        wave = 40 * np.sin(2 * np.pi * (x / width + t / 12) + phase) + 20 * np.cos(y / height * 6)
        level = 60 + 120 * t / max(frames - 1, 1)
        clip[t] = np.clip(np.stack([level + wave, level - wave, level + 0 * wave], -1), 0, 255)
    return clip


WriteVideo = Callable[..., Path]


@pytest.fixture
def encode(tmp_path: Path) -> WriteVideo:
    """Encode frames with any codec and container, optionally with given timestamps in milliseconds."""

    def write(
        name: str,
        frames: np.ndarray,
        codec: str = "libx264",
        fps: int = 25,
        pts_ms: list[int] | None = None,
        options: dict[str, str] | None = None,
        pix_fmt: str = "yuv420p",
        gop: int = 12,
        format: str | None = None,
    ) -> Path:
        path = tmp_path / name
        with av.open(str(path), "w", format=format) as container:
            stream = container.add_stream(codec, rate=fps)
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt = pix_fmt
            stream.options = options or {}
            stream.gop_size = gop
            if pts_ms is not None:
                stream.codec_context.time_base = Fraction(1, 1000)
            for number, pixels in enumerate(frames):
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                if pts_ms is not None:
                    frame.time_base = Fraction(1, 1000)
                    frame.pts = pts_ms[number]
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        return path

    return write


def decode_all(path: Path) -> np.ndarray:
    """Reference: every frame in order by a plain PyAV loop, ``[T, H, W, 3]``."""
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


# Overrides that bring the demo recipe down to seconds.
TINY = [
    "data.frames=4",
    "data.size=32",
    "data.short_side=32",
    "train.batch_size=8",
    "eval.every=1",
    "train.warmup_epochs=0",
    "model.options.strides=[2,1,1,1]",
]


@pytest.fixture(scope="session")
def demo_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small demo data set: 3 training and 2 validation clips per class."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OGREG_HOME", str(tmp_path_factory.mktemp("home")))
        root = tmp_path_factory.mktemp("demo")
        prepare_demo(
            root, train_per_class=3, val_per_class=2, workers=2, on_progress=ignore_progress
        )
    return root


Ogreg = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    with Forks() as started:
        yield started


@pytest.fixture
def ogreg(forks: Forks, tmp_path: Path) -> Ogreg:
    """Run the command line in a folder and a process of its own."""

    def run(*arguments: str | Path, stdin: str = "", **environment: str):
        return forks.run(tmp_path, list(map(str, arguments)), stdin, **environment)

    return run
