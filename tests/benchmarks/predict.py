"""``ogreg predict clip.mp4`` from the shell, beside the parts that nobody can do without.

Run by name, not by pytest: ``PYTHONPATH=. python tests/benchmarks/predict.py [--repeats 9]``. Makes a clip
(340x256, ten seconds) and an untrained checkpoint. Each measurement is a process of its own, all in turn,
with a warm file cache; medians of wall time and of processor time. The parts: starting an interpreter and
importing torch; then, in processes that have imported all they need, reading the clip and one forward pass,
each for the first time. Loading the model is measured, too, but not counted among the parts.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from ogreg_core.checkpoint import CheckpointInfo, save_checkpoint
from ogreg_core.data.sampling import ClipSampling
from ogreg_core.models.registry import create_model, find_model
from tests.benchmarks.loader import make_video
from tests.benchmarks.record import Seconds, build_parser, finish, process_medians

HEIGHT, WIDTH, CLASSES = 256, 340, 400
INTERPRETER, TORCH, WHOLE = "interpreter", "interpreter and torch", "ogreg predict"
LOAD, DECODE, FORWARD = "load the model", "decode", "forward"

_REPORT = "print(time.perf_counter() - started, time.process_time() - used)"
# Each prints its seconds; what is imported before the clock starts is not counted.
_PREPARE = """
import sys, time
import torch
from ogreg_core.checkpoint import load_model
from ogreg_core.evaluation import resolve_precision, score_views
from ogreg_core.data.loader import load_views
from ogreg_core.inference import single_video
clip, checkpoint = sys.argv[1:]
"""
_TIMED = {
    LOAD: """
started, used = time.perf_counter(), time.process_time()
load_model(checkpoint)
""",
    DECODE: """
from ogreg_core.checkpoint import load_checkpoint
views = load_checkpoint(checkpoint)[1].views()
started, used = time.perf_counter(), time.process_time()
video, manifest = single_video(clip)
load_views(manifest, manifest.rows[0], views)
""",
    FORWARD: """
model, info = load_model(checkpoint)
video, manifest = single_video(clip)
views = load_views(manifest, manifest.rows[0], info.views())
precision = resolve_precision(info.precision, torch.device("cpu"))
started, used = time.perf_counter(), time.process_time()
score_views(model, views[None], info.mean, info.std, precision)
""",
}


def make_checkpoint(path: Path, model: str, frames: int, size: int) -> None:
    """An untrained model with as many classes as Kinetics-400 has."""
    entry = find_model(model)
    info = CheckpointInfo(
        model=model,
        options={},
        labels=[f"class {number}" for number in range(CLASSES)],
        sampling=ClipSampling("dense", frames, 2),
        size=size,
        short_side=size * 8 // 7,
        mean=entry.mean,
        std=entry.std,
    )
    built = create_model(model, CLASSES, frames=frames, size=size)
    save_checkpoint(path, built.state_dict(), info)


def medians(clip: Path, checkpoint: Path, repeats: int) -> dict[str, Seconds]:
    """Seconds of the command and of its parts."""
    files = [str(clip), str(checkpoint)]
    commands: dict[str, list[str]] = {
        INTERPRETER: [sys.executable, "-c", "pass"],
        TORCH: [sys.executable, "-c", "import torch"],
        WHOLE: [
            *(sys.executable, "-m", "ogreg_cli", "predict", files[0]),
            *("--checkpoint", files[1], "--device", "cpu"),
        ],
    }
    for name, code in _TIMED.items():
        timed = f"{_PREPARE}{code}{_REPORT}"
        commands[name] = [sys.executable, "-c", timed, *files]
    return process_medians(commands, repeats, _TIMED)


def results_of(seconds: dict[str, Seconds]) -> list[dict[str, Any]]:
    """A row per part; the last compares the whole with the sum of the parts."""
    rows = [_row(name, taken) for name, taken in seconds.items()]
    parts = (TORCH, DECODE, FORWARD)
    total = Seconds(*(sum(column) for column in zip(*map(seconds.__getitem__, parts), strict=True)))
    return [
        *rows,
        _row(", ".join(parts), total)
        | {"whole_over_parts": seconds[WHOLE].wall / total.wall}
        | {"whole_over_parts_processor": seconds[WHOLE].processor / total.processor},
    ]


def _row(what: str, taken: Seconds) -> dict[str, Any]:
    return {
        "what": what,
        "wall_ms_p50": 1000 * taken.wall,
        "processor_ms_p50": 1000 * taken.processor,
    }


def main() -> None:
    """Make the files and time everything."""
    parser = build_parser(__doc__, repeats=9)
    parser.add_argument("--model", default="ogreg-t")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--size", type=int, default=224)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        clip, checkpoint = Path(folder, "clip.mp4"), Path(folder, "model.safetensors")
        make_video(clip, HEIGHT, WIDTH, noise=3.0)
        make_checkpoint(checkpoint, options.model, options.frames, options.size)
        seconds = medians(clip, checkpoint, options.repeats)
    finish("predict", options, results_of(seconds))


if __name__ == "__main__":
    main()
