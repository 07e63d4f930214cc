"""``ogreg profile``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ogreg_cli.common import (
    Device,
    Json,
    Option,
    Select,
    choose_checkpoint,
    is_typed,
    option_words,
    read_options,
)
from ogreg_cli.console import Reporter, emit_json, info, loading, print_table
from ogreg_core.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ogreg_core.profiling import Timing

EXAMPLES = (
    "Examples: ogreg profile --frames 16 | ogreg profile --model ogreg-n --size 112 --batch 8 --json | "
    "ogreg profile --select time:1:0.5 | ogreg profile --checkpoint runs/train/demo/1 | "
    "ogreg profile --compare ogreg-t,swin3d-t,mvit-v2-s --frames 16"
)
_ALL = "all"


def profile(
    ctx: typer.Context,
    model: Annotated[str, typer.Option(help="Name, see `ogreg models`.")] = "ogreg-t",
    compare: Annotated[
        str | None,
        typer.Option(
            help="Several models side by side, timed in turn; ratios are to the first.",
            metavar="NAME,NAME,...|all",
        ),
    ] = None,
    frames: Annotated[
        int | None, typer.Option(min=1, help="Frames per clip; default: the model's usual.")
    ] = None,
    size: Annotated[
        int | None, typer.Option(min=32, help="Side in pixels; default: the model's usual.")
    ] = None,
    classes: Annotated[int, typer.Option(min=1, help="Size of the head.")] = 400,
    batch: Annotated[
        int, typer.Option(min=1, help="Clips per forward pass for the throughput.")
    ] = 4,
    option: Option = None,
    select: Select = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            "--checkpoint",
            "-c",
            help="What was trained, with its options, classes and input.",
            metavar="FILE|RUN",
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed passes.")] = 5,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Cost of a model: parameters, multiply-adds, latency, throughput, peak memory."""
    from ogreg_core.models.registry import find_model

    if compare is not None:
        _refuse_beside(ctx, "compare", "model", "batch", "option", "select", "checkpoint")
        names = _names_in(compare)
        loading()
        _compare(names, frames, size, classes, repeats, device, json)
        return
    if checkpoint is not None:
        _refuse_beside(ctx, "checkpoint", "model", "option", "select", "frames", "size", "classes")
        path, _ = choose_checkpoint(checkpoint)
        loading()
        subject = _trained(str(path))
    else:
        entry = find_model(model)
        options = read_options(model, option, select)
        loading()
        subject = _fresh(model, options, classes, frames or entry.frames, size or entry.size)
    _profile(subject, batch, repeats, device, json)


def _refuse_beside(ctx: typer.Context, given: str, *others: str) -> None:
    """Refuse options that say what is said already."""
    for name in others:
        if is_typed(ctx, name):
            raise UsageError(f"--{name} does not go with --{given}", fix=f"leave out --{name}")


def _names_in(text: str) -> list[str]:
    """Models by name, each once, in the order given."""
    from ogreg_core.models.registry import MODELS, find_model

    names = list(MODELS) if text == _ALL else [name.strip() for name in text.split(",")]
    for name in names:
        find_model(name)
    return list(dict.fromkeys(names))


@dataclass(frozen=True)
class Subject:
    """What is profiled: a model in evaluation mode, and what it was built from.

    Args:
        model, options, classes: see :func:`ogreg_core.models.registry.create_model`.
        frames, size: of the clip.
        built: the model.
        checkpoint: file it came from; empty if it is freshly initialised.
    """

    model: str
    options: dict[str, Any]
    classes: int
    frames: int
    size: int
    built: nn.Module
    checkpoint: str = ""

    def clip(self, batch: int = 1) -> torch.Tensor:
        """Random input: ``[B, 3, T, H, W]``."""
        import torch

        return torch.randn(batch, 3, self.frames, self.size, self.size)


def _fresh(model: str, options: dict[str, Any], classes: int, frames: int, size: int) -> Subject:
    from ogreg_core.models.registry import create_model

    built = create_model(model, classes, frames=frames, size=size, **options).eval()
    return Subject(model, options, classes, frames, size, built)


def _trained(path: str) -> Subject:
    from ogreg_core.checkpoint import load_model

    built, about = load_model(path)
    shape = about.sampling.frames, about.size
    return Subject(about.model, about.options, len(about.labels), *shape, built, path)


def _profile(subject: Subject, batch: int, repeats: int, device: str, json: bool) -> None:
    """One model in detail."""
    import torch

    from ogreg_core import profiling
    from ogreg_core.devices import pick_device

    chosen, built = pick_device(device), subject.built
    flops = profiling.count_multiply_adds(built, subject.clip())
    built.to(chosen)
    single, many = subject.clip().to(chosen), subject.clip(batch).to(chosen)
    info("timing ...")
    with torch.inference_mode():
        latency = profiling.measure(lambda: built(single), chosen, repeats)
        loaded = profiling.measure(lambda: built(many), chosen, repeats)
    document: dict[str, Any] = {
        "schema": "ogreg.profile.v1",
        "model": subject.model,
        "options": subject.options,
        "checkpoint": subject.checkpoint or None,
        "frames": subject.frames,
        "size_px": subject.size,
        "classes": subject.classes,
        "device": str(chosen),
        "dtype": "float32",
        "threads": torch.get_num_threads(),
        "params": profiling.count_parameters(built),
        "gmacs_per_view": flops.total / 1e9,
        "attention_share_pct": 100 * flops.attention_share,
        "gmacs_by_module": {name: count / 1e9 for name, count in flops.by_module.items()},
        "uncounted_operators": flops.uncounted,
        "latency_ms_p50": latency.median_ms,
        "latency_ms_p90": latency.p90_ms,
        "repeats": latency.repeats,
        "warmup": latency.warmup,
        "batch": batch,
        "throughput_clips_per_s": 1000 * batch / loaded.median_ms,
        "peak_memory_mb": profiling.peak_memory_mb(chosen),
    }
    if json:
        emit_json(document)
        return
    _show(document)


def _show(document: dict[str, Any]) -> None:
    on_gpu = document["device"].startswith("cuda")
    name = ", ".join([document["model"], *option_words(document["options"])])
    rows = [
        ["model", name],
        *([["checkpoint", document["checkpoint"]]] if document["checkpoint"] else []),
        [
            "input",
            f"{document['frames']}x{document['size_px']}x{document['size_px']}, {document['classes']} classes",
        ],
        ["parameters", f"{document['params'] / 1e6:.2f} M"],
        [
            "multiply-adds per view",
            f"{document['gmacs_per_view']:.2f} G (one multiply-add counts once)",
        ],
        ["of which fused attention", f"{document['attention_share_pct']:.1f} %"],
        *([f"  {name}", f"{gmacs:.2f} G"] for name, gmacs in document["gmacs_by_module"].items()),
        [
            "latency, batch 1",
            f"{document['latency_ms_p50']:.1f} ms median, {document['latency_ms_p90']:.1f} ms p90 "
            f"({document['repeats']} passes)",
        ],
        [
            f"throughput, batch {document['batch']}",
            f"{document['throughput_clips_per_s']:.2f} clips/s",
        ],
        [
            "peak memory",
            f"{document['peak_memory_mb']:.0f} MB ({'allocated' if on_gpu else 'process'})",
        ],
        ["device", f"{document['device']}, float32, {document['threads']} threads"],
    ]
    if document["uncounted_operators"]:
        rows.append(["not counted", _calls(document["uncounted_operators"])])
    print_table(name, ["", "figure"], rows)


def _calls(uncounted: dict[str, int]) -> str:
    return ", ".join(f"{name} x{calls}" for name, calls in uncounted.items())


def _compare(
    names: Sequence[str],
    frames: int | None,
    size: int | None,
    classes: int,
    repeats: int,
    device: str,
    json: bool,
) -> None:
    """Several models in one process, timed in turn."""
    import torch

    from ogreg_core.devices import pick_device

    chosen = pick_device(device)
    rows, timings = _measure_in_turn(names, frames, size, classes, repeats, chosen)
    first = timings[names[0]]
    for row in rows:
        timing = timings[row["model"]]
        row |= {"latency_ms_p50": timing.median_ms, "latency_ms_p90": timing.p90_ms}
        row["latency_ratio"] = timing.median_ms / first.median_ms
    document = {
        "schema": "ogreg.profile-compare.v1",
        "classes": classes,
        "device": str(chosen),
        "dtype": "float32",
        "threads": torch.get_num_threads(),
        "batch": 1,
        "repeats": first.repeats,
        "warmup": first.warmup,
        "models": rows,
    }
    if json:
        emit_json(document)
    else:
        _show_comparison(document)


def _measure_in_turn(
    names: Sequence[str],
    frames: int | None,
    size: int | None,
    classes: int,
    repeats: int,
    device: torch.device,
) -> tuple[list[dict[str, Any]], dict[str, Timing]]:
    """What each model costs in counts, and in time by name."""
    import torch

    from ogreg_core import profiling
    from ogreg_core.models.registry import find_model
    from ogreg_core.progress import Progress

    rows: list[dict[str, Any]] = []
    passes: dict[str, Any] = {}
    with Reporter() as reporter, torch.inference_mode():
        for done, name in enumerate(names, 1):
            entry = find_model(name)
            subject = _fresh(name, {}, classes, frames or entry.frames, size or entry.size)
            clip = subject.clip()
            flops = profiling.count_multiply_adds(subject.built, clip)
            rows.append(
                {
                    "model": name,
                    "frames": subject.frames,
                    "size_px": subject.size,
                    "params": profiling.count_parameters(subject.built),
                    "gmacs_per_view": flops.total / 1e9,
                    "uncounted_operators": flops.uncounted,
                }
            )
            subject.built.to(device)
            passes[name] = partial(subject.built, clip.to(device))
            reporter(Progress("count", done, len(names)))
        return rows, profiling.measure_in_turn(passes, device, repeats, on_progress=reporter)


def _show_comparison(document: dict[str, Any]) -> None:
    rows = document["models"]
    print_table(
        f"batch 1, float32, {document['device']}, {document['threads']} threads, "
        f"{document['repeats']} passes in turn, {document['classes']} classes; "
        "GFLOPs are multiply-adds per view, each counted once",
        [
            *("model", "input", "params (M)", "GFLOPs", "ms median", "ms p90"),
            f"times {rows[0]['model']}",
        ],
        [
            [
                row["model"],
                f"{row['frames']}x{row['size_px']}x{row['size_px']}",
                f"{row['params'] / 1e6:.2f}",
                f"{row['gmacs_per_view']:.2f}",
                f"{row['latency_ms_p50']:.1f}",
                f"{row['latency_ms_p90']:.1f}",
                f"{row['latency_ratio']:.2f}",
            ]
            for row in rows
        ],
        right=(2, 3, 4, 5, 6),
    )
    for row in rows:
        if row["uncounted_operators"]:
            info(f"{row['model']}: not counted: {_calls(row['uncounted_operators'])}")
