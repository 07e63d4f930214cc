"""``ogreg profile``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ogreg_cli.common import Device, Json
from ogreg_cli.console import Reporter, emit_json, info, loading, print_table
from ogreg_core.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch import nn

EXAMPLES = (
    "Examples: ogreg profile --frames 16 | ogreg profile --model ogreg-n --size 112 --batch 8 --json | "
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
    option: Annotated[
        list[str] | None,
        typer.Option(help="Architecture choice, e.g. stem=patch; repeatable.", metavar="KEY=VALUE"),
    ] = None,
    select: Annotated[
        list[str] | None,
        typer.Option(
            help="Token selection: keep that share of the frames (time) or of each frame (space) before that "
            "stage or block, e.g. time:1:0.5; repeatable.",
            metavar="KIND:PLACE:RATIO",
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed passes.")] = 5,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Cost of a model: parameters, multiply-adds, latency, throughput, peak memory."""
    from ogreg_core.models.registry import find_model
    from ogreg_core.recipe import parse_model_options

    if compare is not None:
        _refuse_beside_compare(ctx)
        names = _names_in(compare)
        loading()
        _compare(names, frames, size, classes, repeats, device, json)
        return
    entry = find_model(model)
    options = parse_model_options(model, option or [])
    if select:
        options["token_selection"] = _selection_of(model, select)
    loading()
    _profile(
        model,
        options,
        frames or entry.frames,
        size or entry.size,
        classes,
        batch,
        repeats,
        device,
        json,
    )


def _refuse_beside_compare(ctx: typer.Context) -> None:
    """Refuse options that belong to one model."""
    for name in ("model", "batch", "option", "select"):
        source = ctx.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise UsageError(f"--{name} does not go with --compare", fix=f"leave out --{name}")


def _names_in(text: str) -> list[str]:
    """Models by name, each once, in the order given."""
    from ogreg_core.models.registry import MODELS, find_model

    names = list(MODELS) if text == _ALL else [name.strip() for name in text.split(",")]
    for name in names:
        find_model(name)
    return list(dict.fromkeys(names))


def _selection_of(model: str, texts: Sequence[str]) -> dict[str, Any]:
    """Token selection out of ``time:1:0.5``, as a recipe would hold it."""
    from pydantic import ValidationError

    from ogreg_core.models.registry import check_places
    from ogreg_core.recipe_tables import TokenSelectionTable

    check_places(model)
    keeps: dict[str, list[dict[str, Any]]] = {}
    for text in texts:
        try:
            kind, place, ratio = text.split(":")
            keeps.setdefault(kind, []).append({"before": int(place), "ratio": float(ratio)})
            TokenSelectionTable.model_validate(keeps)
        except (ValueError, ValidationError) as error:
            raise UsageError(
                f"--select {text} is not of the form KIND:PLACE:RATIO",
                why="KIND is time or space, PLACE a number from 0, RATIO a share up to 1",
                fix="--select time:1:0.5",
            ) from error
    return TokenSelectionTable.model_validate(keeps).model_dump()


def _build(
    model: str, options: dict[str, Any], classes: int, frames: int, size: int
) -> tuple[nn.Module, torch.Tensor]:
    """The model in evaluation mode, and a clip for it."""
    import torch

    from ogreg_core.models.registry import create_model

    built = create_model(model, classes, frames=frames, size=size, **options).eval()
    return built, torch.randn(1, 3, frames, size, size)


def _profile(
    model: str,
    options: dict[str, Any],
    frames: int,
    size: int,
    classes: int,
    batch: int,
    repeats: int,
    device: str,
    json: bool,
) -> None:
    """One model in detail."""
    import torch

    from ogreg_core import profiling
    from ogreg_core.devices import pick_device

    chosen = pick_device(device)
    built, clip = _build(model, options, classes, frames, size)
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
        "options": options,
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
    _show(document)


def _show(document: dict[str, Any]) -> None:
    on_gpu = document["device"].startswith("cuda")
    rows = [
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
    print_table(document["model"], ["", "figure"], rows)


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

    from ogreg_core import profiling
    from ogreg_core.devices import pick_device
    from ogreg_core.models.registry import find_model
    from ogreg_core.progress import Progress

    chosen = pick_device(device)
    rows: list[dict[str, Any]] = []
    passes: dict[str, Any] = {}
    with Reporter() as reporter, torch.inference_mode():
        for done, name in enumerate(names, 1):
            entry = find_model(name)
            shape = frames or entry.frames, size or entry.size
            built, clip = _build(name, {}, classes, *shape)
            flops = profiling.count_multiply_adds(built, clip)
            rows.append(
                {
                    "model": name,
                    "frames": shape[0],
                    "size_px": shape[1],
                    "params": profiling.count_parameters(built),
                    "gmacs_per_view": flops.total / 1e9,
                    "uncounted_operators": flops.uncounted,
                }
            )
            built.to(chosen)
            passes[name] = partial(built, clip.to(chosen))
            reporter(Progress("count", done, len(names)))
        timings = profiling.measure_in_turn(passes, chosen, repeats, on_progress=reporter)
    first = timings[names[0]].median_ms
    for row in rows:
        timing = timings[row["model"]]
        row |= {"latency_ms_p50": timing.median_ms, "latency_ms_p90": timing.p90_ms}
        row["latency_ratio"] = timing.median_ms / first
    threads = torch.get_num_threads()
    if json:
        emit_json(
            {
                "schema": "ogreg.profile-compare.v1",
                "classes": classes,
                "device": str(chosen),
                "dtype": "float32",
                "threads": threads,
                "batch": 1,
                "repeats": timings[names[0]].repeats,
                "warmup": timings[names[0]].warmup,
                "models": rows,
            }
        )
        return
    print_table(
        f"batch 1, float32, {chosen}, {threads} threads, {repeats} passes in turn, {classes} classes; "
        "GFLOPs are multiply-adds per view, each counted once",
        ["model", "input", "params (M)", "GFLOPs", "ms median", "ms p90", f"times {names[0]}"],
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
