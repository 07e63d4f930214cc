"""``ogreg profile``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from ogreg_cli.common import Device, Json, Option, Select, choose_checkpoint, is_typed, read_options
from ogreg_cli.console import Reporter, emit_json, info, loading
from ogreg_cli.profile_arguments import (
    Dtype,
    Format,
    check_plot,
    names_in,
    numbers_in,
    refuse_nonsense,
    sweep_in,
    views_in,
)
from ogreg_cli.profile_show import notes_on, show

if TYPE_CHECKING:
    from ogreg_core.profiling.passes import Settings
    from ogreg_core.profiling.subject import Subject
    from ogreg_core.profiling.sweep import Over

EXAMPLES = (
    "Examples: ogreg profile --frames 16 | ogreg profile --model ogreg-n --size 112 --batches 1,8 --json | "
    "ogreg profile --select time:1:0.5 --depth 2 | ogreg profile --checkpoint runs/train/demo/1 | "
    "ogreg profile --compare ogreg-t,swin3d-t,mvit-v2-s --frames 16 --plot cost.png | "
    "ogreg profile --compare ogreg-t,swin3d-t --sweep frames=8,16,32 | "
    "ogreg profile -c runs/train/demo/1 --clip clip.mp4 | ogreg profile --train --dtype bf16 --compile"
)

_WHAT, _HOW, _OUTPUT = "What is profiled", "How it is measured", "What is shown"


def profile(
    ctx: typer.Context,
    model: Annotated[
        str, typer.Option(help="Name, see `ogreg models`.", rich_help_panel=_WHAT)
    ] = "ogreg-t",
    checkpoint: Annotated[
        str | None,
        typer.Option(
            "--checkpoint",
            "-c",
            help="What was trained, with its options, classes, input and views.",
            metavar="FILE|RUN",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(
            help="Several models side by side, timed in turn; ratios are to the first.",
            metavar="NAME,NAME,...|all",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    sweep: Annotated[
        str | None,
        typer.Option(
            help="Cost of --model or --compare at several frames, size or batch.",
            metavar="WHAT=N,N,...",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    clip: Annotated[
        Path | None,
        typer.Option(
            help="Run on the centre view of this video, and say what it decides about the work; with "
            "--checkpoint.",
            metavar="VIDEO",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    frames: Annotated[
        int | None,
        typer.Option(
            min=1, help="Frames per clip; default: the model's usual.", rich_help_panel=_WHAT
        ),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(
            min=32, help="Side in pixels; default: the model's usual.", rich_help_panel=_WHAT
        ),
    ] = None,
    classes: Annotated[
        int, typer.Option(min=1, help="Size of the head.", rich_help_panel=_WHAT)
    ] = 400,
    views: Annotated[
        str | None,
        typer.Option(
            help="Clips x crops per video; default: as in the checkpoint's validation, or in the model's "
            "recipe for Kinetics-400.",
            metavar="CLIPSxCROPS",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    option: Option = None,
    select: Select = None,
    batches: Annotated[
        str | None,
        typer.Option(
            help="Clips per pass for the throughput; default: 1,4, with --compare 1.",
            metavar="N,N,...",
            rich_help_panel=_HOW,
        ),
    ] = None,
    train: Annotated[
        bool,
        typer.Option(
            "--train",
            help="Training steps, too: forward, backward, AdamW, at the largest of --batches that fits.",
            rich_help_panel=_HOW,
        ),
    ] = False,
    dtype: Annotated[
        Dtype, typer.Option(help="bf16 and fp16 by autocast.", rich_help_panel=_HOW)
    ] = Dtype.float32,
    compile: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="Compile for each shape; the first pass is told apart.",
            rich_help_panel=_HOW,
        ),
    ] = False,
    repeats: Annotated[int, typer.Option(min=1, help="Timed passes.", rich_help_panel=_HOW)] = 5,
    warmup: Annotated[
        int,
        typer.Option(
            min=1,
            help="Passes before them; memory is that of the first.",
            rich_help_panel=_HOW,
        ),
    ] = 2,
    device: Device = "auto",
    depth: Annotated[
        int,
        typer.Option(min=1, help="Levels of modules in the table.", rich_help_panel=_OUTPUT),
    ] = 1,
    operators: Annotated[
        int,
        typer.Option(
            min=0, help="So many operators that take the most time.", rich_help_panel=_OUTPUT
        ),
    ] = 0,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw it: .png, .pdf or .svg.", metavar="FILE", rich_help_panel=_OUTPUT),
    ] = None,
    format: Annotated[
        Format, typer.Option(help="How tables are written.", rich_help_panel=_OUTPUT)
    ] = Format.table,
    json: Json = False,
) -> None:
    """Cost of a model: parameters, multiply-adds, latency, throughput, peak memory.

    One multiply-add counts once, as in papers' GFLOPs, and twice as FLOPs. Fused attention is counted;
    element-wise work and pooling are not.
    """
    refuse_nonsense(ctx)
    check_plot(plot)
    given = ctx.params
    if sweep is not None or compare is not None:
        document = _sweep(ctx, given) if sweep is not None else _compare(given)
    else:
        document = _profile(given)
    if plot is not None:
        from ogreg_core.profile_picture import draw_costs

        draw_costs(document, plot)
        info(f"picture: {plot}")
    for note in notes_on(document):
        info(note)
    if json:
        emit_json(document)
    else:
        show(document, format.value)


def _profile(given: Mapping[str, Any]) -> dict[str, Any]:
    """One model in detail."""
    from dataclasses import replace

    batches = _batches(given, "1,4")
    asked = views_in(given["views"]) if given["views"] else None
    if given["checkpoint"] is not None:
        path, _ = choose_checkpoint(given["checkpoint"])
    else:
        names_in(given["model"])
        options = read_options(given["model"], given["option"], given["select"])
    loading()
    from ogreg_core.devices import pick_device
    from ogreg_core.profiling.one_model import profile_model
    from ogreg_core.profiling.subject import Subject, ViewCount, usual_views

    device = pick_device(given["device"])
    if given["checkpoint"] is not None:
        subject, built = Subject.trained(str(path), given["clip"])
    else:
        shape = given["frames"], given["size"]
        subject = Subject.fresh(given["model"], options, given["classes"], *shape)
        subject = replace(subject, views=usual_views(subject.model))
        built = subject.build()
    if asked is not None:
        subject = replace(subject, views=ViewCount(*asked, "--views"))
    with Reporter() as reporter:
        found = profile_model(subject, built, device, _settings(given, batches), reporter)
    document = found.document()
    if given["clip"] is not None:
        document["clip"]["path"] = str(given["clip"])
    return document


def _compare(given: Mapping[str, Any]) -> dict[str, Any]:
    """Several models in one process, timed in turn."""
    names, batches = names_in(given["compare"]), _batches(given, "1")
    loading()
    from ogreg_core.devices import pick_device
    from ogreg_core.profiling.comparison import compare_models

    subjects = _subjects(names, {}, given)
    device = pick_device(given["device"])
    with Reporter() as reporter:
        return compare_models(subjects, device, _settings(given, batches), reporter).document()


def _sweep(ctx: typer.Context, given: Mapping[str, Any]) -> dict[str, Any]:
    """One model or several at several values."""
    from ogreg_core.errors import UsageError

    over, values = sweep_in(given["sweep"])
    if over != "batch" and is_typed(ctx, over):
        raise UsageError(f"--{over} does not go with --sweep {over}", fix=f"leave out --{over}")
    names = names_in(given["compare"] or given["model"])
    options = {}
    if given["compare"] is None:
        options = read_options(given["model"], given["option"], given["select"])
    loading()
    from ogreg_core.devices import pick_device
    from ogreg_core.profiling.sweep import sweep_models

    subjects = _subjects(names, options, given)
    device, settings = pick_device(given["device"]), _settings(given, (1,))
    with Reporter() as reporter:
        kind = cast("Over", over)
        return sweep_models(subjects, kind, values, device, settings, reporter).document()


def _subjects(
    names: list[str], options: Mapping[str, Any], given: Mapping[str, Any]
) -> list[Subject]:
    from ogreg_core.profiling.subject import Subject

    shape = given["frames"], given["size"]
    return [Subject.fresh(name, options, given["classes"], *shape) for name in names]


def _batches(given: Mapping[str, Any], usual: str) -> tuple[int, ...]:
    return numbers_in("--batches", given["batches"] or usual, "--batches 1,4,8")


def _settings(given: Mapping[str, Any], batches: tuple[int, ...]) -> Settings:
    from ogreg_core.profiling.passes import Settings

    return Settings(
        batches=batches,
        repeats=given["repeats"],
        warmup=given["warmup"],
        dtype=given["dtype"].value,
        compile=given["compile"],
        train=given["train"],
        depth=given["depth"],
        operators=given["operators"],
    )
