"""What the training engine costs beside a bare loop on the same batches, and what its knobs change.

Run by name, not by pytest: ``PYTHONPATH=. python tests/benchmarks/engine.py [--repeats 7] [--steps 8]``.
Times are compared within this process only, in turn; ratios are of medians of processor time and of wall
time.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ogreg_core.data.loader import ClipDataset, TrainBatch, train_loader
from ogreg_core.data.mixing import Mixing
from ogreg_core.data.transforms import to_input
from ogreg_core.datasets.demo import prepare_demo
from ogreg_core.distributed import SINGLE
from ogreg_core.models.registry import create_model
from ogreg_core.progress import ignore_progress
from ogreg_core.recipe import load_recipe
from ogreg_core.runs import RunFolder
from ogreg_core.signals import StopRequest
from ogreg_core.training.assemble import build_trainer
from ogreg_core.training.board import Board
from ogreg_core.training.loop import Trainer
from ogreg_core.training.optim import OptimSettings, build_optimizer, build_schedule
from ogreg_core.training.rehearsal import invented_batch
from ogreg_core.training.splits import describe_run, load_splits
from ogreg_core.training.step import StepSettings, TrainStep
from tests.benchmarks.record import build_parser, finish


class Remembered(ClipDataset):
    """Decodes every clip once: the engine is measured, not the decoder."""

    _items: dict[int, TrainBatch]

    def __getitem__(self, key: tuple[int, int]) -> TrainBatch:
        self._items = getattr(self, "_items", {})
        if key[1] not in self._items:
            self._items[key[1]] = super().__getitem__(key)
        return self._items[key[1]]


def demo_trainer(folder: Path, steps: int) -> Trainer:
    """A trainer of the demo recipe, at its own size, on so many batches."""
    prepare_demo(
        folder / "demo",
        train_per_class=steps,
        val_per_class=1,
        workers=2,
        on_progress=ignore_progress,
    )
    loaded = load_recipe("demo", [f"data.root={folder / 'demo'}", "model.drop_path=0.0"])
    splits = load_splits(loaded.recipe)
    run = RunFolder(folder / "run")
    run.path.mkdir()
    describe_run(run, loaded, splits)
    trainer = build_trainer(
        loaded,
        splits,
        run,
        device=torch.device("cpu"),
        workers=0,
        on_progress=ignore_progress,
    )
    known = trainer.loader.dataset.dataset  # type: ignore[attr-defined]
    remembered = Remembered(known.manifest, known.sampling, known.augmentation, known.seed)
    trainer.loader = train_loader(remembered, trainer.order, 0)
    return trainer


def bare_epoch(trainer: Trainer, batches: list[TrainBatch]) -> None:
    """Forward, backward and step, and nothing else."""
    step = trainer.step
    model, optimizer, schedule = step.model.train(), step.optimizer, step.schedule
    for batch in batches:
        clips = to_input(batch.clips, step.settings.mean, step.settings.std)
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(model(clips), batch.labels, label_smoothing=0.05)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), step.settings.clip_grad)
        optimizer.step()
        schedule.step()
        loss.item()


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Wall and processor seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def overhead(repeats: int, steps: int) -> dict[str, Any]:
    """An epoch of the trainer, with loader, metrics file and TensorBoard, over one of a bare loop."""
    with tempfile.TemporaryDirectory() as name, StopRequest() as stop:
        trainer = demo_trainer(Path(name), steps)
        board = Board(trainer.run.path / "tensorboard", None)
        batches = [
            trainer.loader.collate_fn([trainer.loader.dataset[key] for key in keys])
            for keys in trainer.order
        ]

        def engine_epoch() -> None:
            trainer.position.start_epoch(0)
            trainer._train_epoch(stop, board)

        times: dict[str, list[tuple[float, float]]] = {"engine": [], "bare": []}
        for repeat in range(repeats + 1):
            for label, work in (
                ("engine", engine_epoch),
                ("bare", lambda: bare_epoch(trainer, batches)),
            ):
                taken = timed(work)
                if repeat:  # the first round warms up
                    times[label].append(taken)
        board.close()
    wall, cpu = (
        {label: statistics.median(t[kind] for t in taken) for label, taken in times.items()}
        for kind in (0, 1)
    )
    return {
        "measured": "engine over a bare loop",
        "steps": len(batches),
        "clips_per_step": trainer.step.settings.clips_per_step,
        "bare_step_s": wall["bare"] / len(batches),
        "wall_ratio": wall["engine"] / wall["bare"],
        "processor_ratio": cpu["engine"] / cpu["bare"],
    }


def make_step(settings: StepSettings, stem: str) -> TrainStep:
    torch.manual_seed(0)
    model = create_model("ogreg-n", 16, stem=stem, strides=[4, 2, 1, 1])
    optimizer = build_optimizer(model, OptimSettings(1e-4, 0.05))
    schedule = build_schedule(
        optimizer, steps_per_epoch=100, epochs=1, warmup_epochs=0, lr=1e-4, min_lr=0.0
    )
    return TrainStep(model, optimizer, schedule, settings, SINGLE)


def kept_mb(step: TrainStep, batches: list[TrainBatch]) -> float:
    """Megabytes of activations that the forward passes keep for the backward passes at a time."""
    own = {parameter.untyped_storage().data_ptr() for parameter in step.model.parameters()}
    total = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal total
        if tensor.untyped_storage().data_ptr() not in own:
            total += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step(batches, 0, 0)
    return total / len(batches) / 2**20


def knobs(repeats: int, stem: str) -> dict[str, Any]:
    """Time and activations of a step of sixteen demo clips with each knob, over those without."""
    plain = StepSettings(16, 5.0, Mixing(), 0, "fp32", (0.5,) * 3, (0.2,) * 3)
    whole = invented_batch(16, 16, 64, 16)
    halves = [TrainBatch(*(part[n * 8 : n * 8 + 8] for part in whole[:4]), ()) for n in range(2)]
    variants = {
        "plain": (plain, [whole]),
        "accumulate=2": (plain, halves),
        "checkpoint_stages=[1]": (replace(plain, checkpoint_stages=[1]), [whole]),
        "checkpoint_stages=[1,2,3,4]": (replace(plain, checkpoint_stages=[1, 2, 3, 4]), [whole]),
        "ema": (replace(plain, ema=0.999), [whole]),
        "channels_last": (replace(plain, channels_last=True), [whole]),
        "precision=bf16": (replace(plain, precision="bf16"), [whole]),
        "compile": (replace(plain, compile=True), [whole]),
    }
    activations = {
        name: kept_mb(make_step(replace(settings, compile=False), stem), batches)
        for name, (settings, batches) in variants.items()
    }
    steps = {name: make_step(settings, stem) for name, (settings, _) in variants.items()}
    times: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in range(repeats + 1):
        for name, step in steps.items():
            taken, _ = timed(lambda step=step, name=name: step(variants[name][1], 0, 0))
            if repeat:  # the first round warms up, and compiles
                times[name].append(taken)
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    return {
        "measured": "knobs over a plain step",
        "stem": stem,
        "time_ratio": {name: value / medians["plain"] for name, value in medians.items()},
        "activations_ratio": {
            name: value / activations["plain"] for name, value in activations.items()
        },
    }


def rows_of(measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row per knob."""
    ratios = {key: value for key, value in measured.items() if isinstance(value, dict)}
    about = {key: value for key, value in measured.items() if key not in ratios}
    names = ratios["time_ratio"]
    return [about | {"knob": n} | {key: r[n] for key, r in ratios.items()} for n in names]


def main() -> None:
    """Measure the overhead, then the knobs with both stems."""
    parser = build_parser(__doc__, repeats=7)
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    rows = [overhead(options.repeats, options.steps)]
    for stem in ("conv", "patch"):
        rows += rows_of(knobs(options.repeats, stem))
    finish("engine", options, rows)


if __name__ == "__main__":
    main()
