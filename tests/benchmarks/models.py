"""Latency of ogreg-t beside torchvision's swin3d_t, interleaved in one process; prints medians and their ratio.

Run by name, not by pytest: ``python tests/benchmarks/models.py [--frames 16 32] [--repeats 5]``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from torchvision.models.video import swin3d_t

from ogreg_core.models.registry import create_model


def seconds(model: torch.nn.Module, clip: torch.Tensor) -> float:
    """Wall time of one forward pass."""
    started = time.perf_counter()
    model(clip)
    return time.perf_counter() - started


def main() -> None:
    """Time both models in turn at each clip length."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    models = {
        "ogreg-t": create_model("ogreg-t", 400).eval(),
        "ogreg-t stem=patch": create_model("ogreg-t", 400, stem="patch").eval(),
        "swin3d_t": swin3d_t().eval(),
    }
    for frames in arguments.frames:
        clip = torch.randn(1, 3, frames, 224, 224)
        times: dict[str, list[float]] = {name: [] for name in models}
        with torch.inference_mode():
            for repeat in range(arguments.repeats + 1):
                for name, model in models.items():
                    taken = seconds(model, clip)
                    if repeat:  # the first round warms up
                        times[name].append(taken)
        medians = {name: statistics.median(values) for name, values in times.items()}
        ratios = {name: medians["swin3d_t"] / value for name, value in medians.items()}
        result = {
            "frames": frames,
            "size_px": 224,
            "threads": torch.get_num_threads(),
            "repeats": arguments.repeats,
            "seconds_p50": medians,
            "swin3d_t_over": ratios,
        }
        print(json.dumps(result))  # noqa: T201


if __name__ == "__main__":
    main()
