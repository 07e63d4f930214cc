"""``ogreg profile``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ogreg_cli.common import Device, Json
from ogreg_cli.console import emit_json, info, loading, print_table

EXAMPLES = "Examples: ogreg profile --frames 16 | ogreg profile --model ogreg-n --size 112 --batch 8 --json"


def profile(
    model: Annotated[str, typer.Option(help="Name, see `ogreg models`.")] = "ogreg-t",
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
    option: Annotated[
        list[str] | None,
        typer.Option(help="Architecture choice, e.g. stem=patch; repeatable.", metavar="KEY=VALUE"),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed passes.")] = 5,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Cost of a model: parameters, multiply-adds, latency, throughput, peak memory."""
    from ogreg_core.models.registry import find_model
    from ogreg_core.recipe import parse_model_options

    entry = find_model(model)
    options = parse_model_options(model, option or [])
    loading()
    import torch

    from ogreg_core import profiling
    from ogreg_core.devices import pick_device
    from ogreg_core.models.registry import create_model

    chosen = pick_device(device)
    frames, size = frames or entry.frames, size or entry.size
    built = create_model(model, classes, frames=frames, size=size, **options).eval()
    clip = torch.randn(1, 3, frames, size, size)
    flops = profiling.count_multiply_adds(built, clip)
    built.to(chosen)
    single, many = clip.to(chosen), torch.randn(batch, 3, frames, size, size, device=chosen)
    info("timing ...")
    with torch.inference_mode():
        latency = profiling.measure(lambda: built(single), chosen, repeats)
        loaded = profiling.measure(lambda: built(many), chosen, repeats)
    document: dict[str, Any] = {
        "schema": "ogreg.profile.v1",
        "model": model,
        "frames": frames,
        "size_px": size,
        "classes": classes,
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
    rows = [
        ["input", f"{frames}x{size}x{size}, {classes} classes"],
        ["parameters", f"{document['params'] / 1e6:.2f} M"],
        [
            "multiply-adds per view",
            f"{document['gmacs_per_view']:.2f} G (one multiply-add counts once)",
        ],
        ["of which fused attention", f"{document['attention_share_pct']:.1f} %"],
        *([f"  {name}", f"{gmacs:.2f} G"] for name, gmacs in document["gmacs_by_module"].items()),
        [
            "latency, batch 1",
            f"{latency.median_ms:.1f} ms median, {latency.p90_ms:.1f} ms p90 ({repeats} passes)",
        ],
        [f"throughput, batch {batch}", f"{document['throughput_clips_per_s']:.2f} clips/s"],
        [
            "peak memory",
            f"{document['peak_memory_mb']:.0f} MB ({'allocated' if chosen.type == 'cuda' else 'process'})",
        ],
        ["device", f"{chosen}, float32, {document['threads']} threads"],
    ]
    if flops.uncounted:
        rows.append(
            [
                "not counted",
                ", ".join(f"{name} x{calls}" for name, calls in flops.uncounted.items()),
            ]
        )
    print_table(model, ["", "figure"], rows)
