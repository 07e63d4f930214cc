"""ogreg-t beside its peers: latency, training step, throughput, memory, and time over its matrix products'.

Run by name, not by pytest: ``PYTHONPATH=. python tests/benchmarks/models.py [--models ogreg-t,swin3d-t]
[--frames 16 32] [--device cuda] [--dtype bf16] [--best-batch]``. One process, all models in turn in each
round, medians; ratios are to the first model's. Latency is of batch 1 in evaluation mode. A training step is
forward, backward and AdamW on one clip of the first length. ``--best-batch`` doubles the batch until
a clip no longer takes less time or memory ends, and gives the best throughput in inference.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ogreg_core.errors import is_out_of_memory
from ogreg_core.models.registry import create_model
from ogreg_core.profiling import measure, measure_in_turn
from tests.benchmarks.products import products_of, replay
from tests.benchmarks.record import build_parser, finish

MODELS = "ogreg-t,swin3d-t,mvit-v2-s"
CLASSES = 400
LARGEST_BATCH = 256
# A batch is better only by so much.
MARGIN = 0.98


class Bench:
    """Models by name at one input size.

    Args:
        names: of the registry.
        frames, size: of the clip.
        device: where to run.
        dtype: ``fp32``, or ``bf16`` by autocast, as in training.
    """

    def __init__(
        self, names: list[str], frames: int, size: int, device: torch.device, dtype: str
    ) -> None:
        self.device, self.dtype, self.shape = device, dtype, (3, frames, size, size)
        self.models = {
            name: create_model(name, CLASSES, frames=frames, size=size).eval().to(device)
            for name in names
        }

    def clip(self, batch: int = 1) -> Tensor:
        """Random input ``[B, 3, T, H, W]``."""
        return torch.randn(batch, *self.shape, device=self.device)

    def cast(self) -> AbstractContextManager[None]:
        """The precision."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == "bf16")

    def forward(self, model: nn.Module, clip: Tensor) -> Tensor:
        """One pass without gradients."""
        with torch.inference_mode(), self.cast():
            logits: Tensor = model(clip)
        return logits

    def train_step(self, model: nn.Module, clip: Tensor) -> Callable[[], None]:
        """A call that makes one step of AdamW."""
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
        labels = torch.zeros(len(clip), dtype=torch.long, device=self.device)

        def step() -> None:
            model.train()
            optimizer.zero_grad(set_to_none=True)
            with self.cast():
                loss = F.cross_entropy(model(clip), labels)
            loss.backward()
            optimizer.step()
            model.eval()

        return step


def timed_in_turn(
    bench: Bench, passes: Mapping[str, Callable[[], Any]], what: str, repeats: int
) -> list[dict[str, Any]]:
    """A row per model: median, ratio to the first, and what a pass adds to the memory on a GPU."""
    memory = {name: _peak_mb(bench.device, run) for name, run in passes.items()}
    timings = measure_in_turn(passes, bench.device, repeats, warmup=1)
    first = next(iter(timings.values())).median_ms
    return [
        {
            "model": name,
            "what": what,
            "frames": bench.shape[1],
            "ms_p50": timing.median_ms,
            "ms_p90": timing.p90_ms,
            "times_first": timing.median_ms / first,
        }
        | ({"peak_mb": memory[name]} if bench.device.type == "cuda" else {})
        for name, timing in timings.items()
    ]


def _peak_mb(device: torch.device, run: Callable[[], Any]) -> float:
    """Megabytes that a pass needs beside what is there before it; not measured on a CPU."""
    if device.type != "cuda":
        return 0.0
    run()  # what libraries keep from then on is not the pass's
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def over_products(bench: Bench, name: str, repeats: int) -> dict[str, Any]:
    """The forward pass beside the sum of its matrix products, timed in turn."""
    model, clip = bench.models[name], bench.clip()
    with bench.cast():
        products = products_of(model, clip)
    passes: dict[str, Callable[[], Any]] = {"forward": partial(bench.forward, model, clip)}
    calls = {str(product): replay(product, bench.device) for product in products}
    with torch.no_grad():
        timings = measure_in_turn(passes | calls, bench.device, repeats, warmup=1)
    alone = sum(timings[str(product)].median_ms * times for product, times in products.items())
    return {
        "model": name,
        "what": "forward over its matrix products",
        "frames": bench.shape[1],
        "ms_p50": timings["forward"].median_ms,
        "products_ms": alone,
        "products": products.total(),
        "products_gmacs": sum(p.multiply_adds * times for p, times in products.items()) / 1e9,
        "times_products": timings["forward"].median_ms / alone,
    }


def best_batch(bench: Bench, name: str, repeats: int) -> dict[str, Any]:
    """The batch with the most clips per second in inference."""
    best = {"batch": 0, "clips_per_s": 0.0}
    batch = 1
    while batch <= LARGEST_BATCH:
        try:
            run = partial(bench.forward, bench.models[name], bench.clip(batch))
            median = measure(run, bench.device, repeats, warmup=1).median_ms
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            break
        rate = 1000 * batch / median
        if rate * MARGIN <= best["clips_per_s"]:
            break
        best = {"batch": batch, "clips_per_s": rate}
        batch *= 2
    return {"model": name, "what": "throughput", "frames": bench.shape[1], **best}


def run(options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """All measurements at all clip lengths."""
    rows: list[dict[str, Any]] = []
    names = options.models.split(",")
    for frames in options.frames:
        bench = Bench(names, frames, options.size, device, options.dtype)
        clip = bench.clip()
        passes = {name: partial(bench.forward, model, clip) for name, model in bench.models.items()}
        rows += timed_in_turn(bench, passes, "inference", options.repeats)
        rows += [over_products(bench, name, options.repeats) for name in names]
        if options.best_batch:
            rows += [best_batch(bench, name, options.repeats) for name in names]
        if frames == options.frames[0]:
            steps = {name: bench.train_step(model, clip) for name, model in bench.models.items()}
            rows += timed_in_turn(bench, steps, "training step", options.repeats)
    return rows


def main() -> None:
    """Measure and record."""
    parser = build_parser(__doc__, repeats=5)
    parser.add_argument("--models", default=MODELS, help="default: %(default)s")
    parser.add_argument("--frames", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--best-batch", action="store_true", help="the best throughput, too")
    options = parser.parse_args()
    device = torch.device(options.device)
    finish("models", options, run(options, device), device)


if __name__ == "__main__":
    main()
