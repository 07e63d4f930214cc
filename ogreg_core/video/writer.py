"""Writing H.264 files through PyAV."""

from __future__ import annotations

import os
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from torch import Tensor

__all__ = ["write_video"]


def _even(frame: np.ndarray) -> np.ndarray:
    """H.264 with 4:2:0 chroma needs even sides: repeat the last row or column."""
    return np.pad(frame, ((0, frame.shape[0] % 2), (0, frame.shape[1] % 2), (0, 0)), mode="edge")


def write_video(
    path: str | Path,
    frames: Iterable[Tensor | np.ndarray],
    fps: float,
    *,
    crf: int = 20,
    preset: str = "veryfast",
    gop: int = 30,
) -> None:
    """Encode frames to an mp4, atomically: the file appears complete or not at all.

    Closed groups of pictures and ``tune fastdecode``, so that every decoder reads it exactly and
    fast.

    Args:
        path: target; its folder must exist.
        frames: uint8 ``[H, W, 3]`` RGB each, all of one size; odd sides are padded by one pixel.
        fps: frames per second.
        crf: constant rate factor; lower is better and larger.
        preset: x264 preset.
        gop: largest distance between key frames.

    Raises:
        ValueError: no frames.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    options = {"crf": str(crf), "preset": preset, "tune": "fastdecode", "x264-params": "open-gop=0"}
    stream = None
    try:
        with av.open(
            str(temporary), "w", format="mp4", options={"movflags": "+faststart"}
        ) as container:
            for frame in frames:
                pixels = _even(np.ascontiguousarray(frame))
                if stream is None:
                    stream = container.add_stream(
                        "libx264", rate=Fraction(fps).limit_denominator(1001)
                    )
                    stream.height, stream.width = pixels.shape[:2]
                    stream.pix_fmt = "yuv420p"
                    stream.gop_size = gop
                    stream.options = options
                    stream.thread_count = 1
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            if stream is None:
                raise ValueError("no frames to write")
            container.mux(stream.encode(None))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
