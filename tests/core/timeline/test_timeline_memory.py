"""Memory and frames of long videos: flat, and each frame decoded once."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

FPS = 5
PROBE = """
import resource, sys
import torch
from ogreg_core.checkpoint import CheckpointInfo
from ogreg_core.data.sampling import ClipSampling
from ogreg_core.inference import Predictor
from ogreg_core.models.registry import create_model
from ogreg_core.timeline import TimelineOptions, make_timeline
torch.set_num_threads(1)
info = CheckpointInfo(
    "ogreg-n", {"strides": [2, 1, 1, 1]}, ["a", "b"], ClipSampling("uniform", 4), 32, 36,
    (0.4, 0.5, 0.6), (0.2, 0.3, 0.4),
)
predictor = Predictor(create_model("ogreg-n", 2, **info.options), info, torch.device("cpu"))
options = TimelineOptions(window_s=4.0, hop_s=4.0, batch=4)
found = make_timeline(predictor, sys.argv[1], options=options, on_progress=lambda event: None)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(peak, len(found.starts), found.frames, len(found.events))
"""


def write_long(path: Path, minutes: int) -> Path:
    """A block that moves over a still ground; 96 x 128 pixels."""
    ground = np.full((96, 128, 3), 80, np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.height, stream.width, stream.pix_fmt = 96, 128, "yuv420p"
        stream.options = {"preset": "ultrafast"}
        for t in range(60 * minutes * FPS):
            picture = ground.copy()
            x = (3 * t) % 100
            picture[30:60, x : x + 20] = 200
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = t, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="peak memory is asked of the system")
def test_ten_minutes_take_the_memory_of_one(tmp_path):
    found = {}
    for minutes in (1, 10):
        path = write_long(tmp_path / f"{minutes}.mp4", minutes)
        done = subprocess.run(
            [sys.executable, "-c", PROBE, path], capture_output=True, text=True, check=True
        )
        found[minutes] = [int(word) for word in done.stdout.split()]
    assert found[10][1:3] == [150, 600]
    assert found[1][1:3] == [15, 60]
    assert found[10][0] < 1.1 * found[1][0], found
