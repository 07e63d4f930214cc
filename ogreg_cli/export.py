"""``ogreg export``."""

from __future__ import annotations

import shlex
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ogreg_cli.common import Json, check_new_file
from ogreg_cli.console import Reporter, emit_json, loading, print_table
from ogreg_core.errors import CheckpointError, EnvironmentFault, UsageError
from ogreg_core.export_formats import FORMATS, format_of, require_packages
from ogreg_core.models.option_words import model_words

if TYPE_CHECKING:
    from ogreg_core.checkpoint import CheckpointInfo
    from ogreg_core.export import Agreement, Traced

EXAMPLES = (
    "Examples: ogreg export runs/train/demo/1 | "
    "ogreg export runs/train/demo/1 --to demo.onnx --clip clip.mp4 | "
    "ogreg export swin3d-t.safetensors --format onnx --batch 1 --licence 'CC BY-NC 4.0' | "
    "ogreg export swin3d-t.safetensors --to swin3d-t.pt2 --input clip --json"
)


class FileFormat(str, Enum):
    """What is written."""

    torch = "torch"
    onnx = "onnx"


class Input(str, Enum):
    """What the exported program takes."""

    frames = "frames"
    clip = "clip"


def export(
    checkpoint: Annotated[
        str, typer.Argument(help="Checkpoint file or run folder.", metavar="CHECKPOINT|RUN")
    ],
    to: Annotated[
        Path | None,
        typer.Option(
            "--to", help="File to write. Default: runs/export/NAME/N/NAME.pt2.", metavar="FILE"
        ),
    ] = None,
    format: Annotated[
        FileFormat | None,
        typer.Option(
            help="torch: an archive of torch.export, .pt2. onnx: needs pip install 'ogreg[onnx]'. "
            "Default: as --to ends, else torch."
        ),
    ] = None,
    input: Annotated[
        Input,
        typer.Option(
            help="frames: uint8 [B, T, H, W, 3] in, scores out. clip: normalised float32 "
            "[B, 3, T, H, W] in, logits out."
        ),
    ] = Input.frames,
    batch: Annotated[str, typer.Option(help="Clips at a time.", metavar="N|dynamic")] = "dynamic",
    clip: Annotated[
        str | None,
        typer.Option(
            help="Video on which the file is compared with the model. Default: a rendered one.",
            metavar="FILE",
        ),
    ] = None,
    licence: Annotated[
        str, typer.Option(help="Licence of the weights, kept in the file.", metavar="TEXT")
    ] = "",
    json: Json = False,
) -> None:
    """Write a checkpoint as a program that runs without ogreg: torch.export or ONNX, with labels and
    preprocessing inside, compared with the model before it is kept.
    """
    size = _batch(batch)
    kind = _format(to, format)
    check_new_file(to, "--to")
    require_packages(FORMATS[kind.value].writes_with)
    from ogreg_core.runs import find_checkpoint

    path = find_checkpoint(checkpoint)
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} does not exist", fix="check the path")
    loading()
    from ogreg_core.checkpoint import load_checkpoint
    from ogreg_core.export import Choice, test_clips, trace_checkpoint

    choice = Choice(kind.value, input.value, size, licence)
    # Before the tracing, which takes a minute.
    clips = test_clips(load_checkpoint(path)[1], clip)
    with Reporter() as reporter:
        traced = trace_checkpoint(path, choice, reporter)
        target = to or _usual_target(traced.info, FORMATS[kind.value].suffix)
        try:
            found = traced.write(target, clips)
        finally:
            if to is None and not any(target.parent.iterdir()):
                target.parent.rmdir()
    _show(traced, target, found, clip, json)


def _batch(text: str) -> int | None:
    if text == "dynamic":
        return None
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise UsageError(
        f"--batch {text} is neither a number from 1 nor dynamic", fix="--batch dynamic"
    )


def _format(to: Path | None, wanted: FileFormat | None) -> FileFormat:
    """What is written, by ``--format`` and by the suffix."""
    if to is None:
        return wanted or FileFormat.torch
    found = format_of(to)
    if not found:
        raise UsageError(f"--to {to} ends neither in .pt2 (torch) nor in .onnx")
    if wanted and wanted.value != found:
        raise UsageError(
            f"--to {to} is not a name for --format {wanted.value}",
            fix=f"--to {shlex.quote(str(to.with_suffix(FORMATS[wanted.value].suffix)))}",
        )
    return FileFormat(found)


def _usual_target(info: CheckpointInfo, suffix: str) -> Path:
    from ogreg_core.runs import RunFolder

    name = Path(info.recipe or info.model).stem
    try:
        return RunFolder.create("export", name).path / f"{name}{suffix}"
    except EnvironmentFault as error:
        raise EnvironmentFault(error.what, why=error.why, fix=f"--to FILE{suffix}") from error


def _show(
    traced: Traced, target: Path, found: list[Agreement], clip: str | None, json: bool
) -> None:
    from ogreg_core.evaluate_checkpoint import protocol
    from ogreg_core.export import TOLERANCE

    document = traced.document()
    size_bytes = target.stat().st_size
    if json:
        emit_json(
            {
                "schema": "ogreg.export.v1",
                "source": str(traced.checkpoint),
                "path": str(target.resolve()),
                "size_bytes": size_bytes,
                "trace_s": traced.seconds,
                "clip": clip,
                "tolerance": TOLERANCE,
                "agreement": [
                    {
                        "batch": one.batch,
                        "difference": one.difference,
                        "range": one.range,
                        "allowed": one.allowed,
                    }
                    for one in found
                ],
                **{key: document[key] for key in ("format", "input", "output", "weights")},
                "model": traced.info.model,
                "options": traced.info.options,
                "classes": len(traced.info.labels),
            }
        )
        return
    rows = [
        ["file", str(target)],
        ["model", model_words(traced.info.model, traced.info.options)],
        ["input", _tensor(document["input"])],
        ["output", _tensor(document["output"])],
        ["inside", _inside(traced.choice.input, traced.info)],
        ["tested as", protocol(traced.info.views())],
        *(["compared", _agreed(one, TOLERANCE)] for one in found),
        ["compared on", clip or "a rendered motion"],
        ["size", f"{size_bytes / 1e6:.1f} MB, with labels and preprocessing as JSON"],
        ["licence of the weights", traced.choice.licence or "not stated (--licence)"],
    ]
    print_table(str(target), ["", "exported"], rows)


def _tensor(about: dict[str, Any]) -> str:
    shape = ", ".join("any" if length is None else str(length) for length in about["shape"])
    return f"{about['name']}: {about['dtype']} [{shape}]"


def _inside(input: str, info: CheckpointInfo) -> str:
    if input == "clip":
        return "the model alone; normalise before, softmax after"
    return f"normalisation (mean {_numbers(info.mean)}, std {_numbers(info.std)}) and softmax"


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _agreed(one: Agreement, tolerance: float) -> str:
    return (
        f"batch of {one.batch}: logits within {one.difference:.2g} of the model's, of a range of "
        f"{one.range:.3g} (allowed: {tolerance:g} of it)"
    )
