"""``ogreg convert``."""

from __future__ import annotations

import shlex
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ogreg_cli.common import Json
from ogreg_cli.console import emit_json, loading, print_table
from ogreg_core.errors import UsageError

if TYPE_CHECKING:
    from ogreg_core.checkpoint import CheckpointInfo
    from ogreg_core.models.conversion import ClassNames, Conversion, Fit

EXAMPLES = (
    "Examples: ogreg convert swin3d_t --model swin3d-t --to swin3d-t.safetensors | "
    "ogreg convert official.pth --model swin3d-b --labels kinetics400 --stride 2 --clips 4 --crops 3 "
    "--to swin3d-b.safetensors | ogreg convert ssv2.pth --model swin3d-b --option window=16 --labels labels.txt "
    "--sampling uniform --to ssv2.safetensors"
)

# Of the field's usual resize and crop, 256 and 224.
_RESIZE = 256 / 224
_USUAL_STRIDE = 2


class Sampling(str, Enum):
    """How a clip's frames are picked."""

    dense = "dense"
    uniform = "uniform"


def convert(
    ctx: typer.Context,
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="File (.pth, .pt, .safetensors), or torchvision's name of pretrained weights.",
            metavar="CHECKPOINT",
        ),
    ],
    to: Annotated[Path, typer.Option("--to", help="File to write, .safetensors.", metavar="FILE")],
    model: Annotated[str, typer.Option(help="Name, see `ogreg models`.")],
    labels: Annotated[
        str | None,
        typer.Option(
            help="Class names in the order of the classifier: a file with one per line, or a prepared data "
            "set, or kinetics400. Default: those of torchvision's weights, else numbers.",
            metavar="FILE|DATASET",
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(help="Architecture choice, e.g. stem=patch; repeatable.", metavar="KEY=VALUE"),
    ] = None,
    sampling: Annotated[
        Sampling, typer.Option(help="How the frames of a clip are picked.")
    ] = Sampling.dense,
    frames: Annotated[
        int | None, typer.Option(min=1, help="Frames per clip; default: the model's usual.")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(min=1, help="Distance between frames, dense only; default 2.")
    ] = None,
    fps: Annotated[
        float, typer.Option(min=0, help="Rate at which the stride counts; 0: the file's own.")
    ] = 0.0,
    size: Annotated[
        int | None, typer.Option(min=32, help="Crop in pixels; default: the model's usual.")
    ] = None,
    short_side: Annotated[
        int | None, typer.Option(min=32, help="Resize before the crop; default: 256 for 224.")
    ] = None,
    clips: Annotated[int, typer.Option(min=1, help="Clips per video in a test.")] = 1,
    crops: Annotated[int, typer.Option(min=1, max=3, help="Crops per clip, 1 or 3.")] = 1,
    json: Json = False,
) -> None:
    """Turn a foreign checkpoint into one of ours, which describes its model, labels and protocol.

    Weights of another model are refused, naming the nearest match; so are weights without a classifier
    or for other classes, which are starting weights: ogreg train RECIPE --init-from CHECKPOINT.
    """
    from ogreg_core.models.registry import find_model
    from ogreg_core.recipe import parse_model_options

    entry = find_model(model)
    options = parse_model_options(model, option or [])
    _check_target(to)
    side = size or entry.size
    resize = short_side or round(side * _RESIZE)
    _check_protocol(sampling, stride, fps, crops, side, resize)
    loading()
    from ogreg_core.checkpoint import CheckpointInfo
    from ogreg_core.data.sampling import ClipSampling
    from ogreg_core.models import conversion

    given = conversion.find_class_names(labels) if labels else None
    state, own, configuration = conversion.read_foreign(checkpoint)
    # What the checkpoint tells of itself, unless the command says otherwise.
    options = {**conversion.settings_in(model, state, configuration), **options}
    names = given or own or conversion.ClassNames([], "none given: numbers")
    step = (stride or _USUAL_STRIDE) if sampling is Sampling.dense else 1
    info = CheckpointInfo(
        model=model,
        options=options,
        labels=names.names,
        sampling=ClipSampling(sampling.value, frames or entry.frames, step, fps),
        size=side,
        short_side=resize,
        mean=entry.mean,
        std=entry.std,
        clips=clips,
        crops=crops,
        dataset=names.dataset,
        data_folder=names.folder,
        recipe=Path(checkpoint).stem,
    )
    done = conversion.convert(
        state, info, to, source=checkpoint, again=lambda fit: _again(ctx, fit, model, options)
    )
    _show(checkpoint, to, done, names, info, _assumed(ctx), json)


def _check_protocol(
    sampling: Sampling, stride: int | None, fps: float, crops: int, side: int, resize: int
) -> None:
    """Refuse what contradicts itself."""
    if crops == 2:
        raise UsageError("--crops is 1 (centre) or 3 (start, centre, end)")
    if sampling is Sampling.uniform and (stride or fps):
        raise UsageError("--stride and --fps go with --sampling dense")
    if resize < side:
        raise UsageError(f"--short-side {resize} is smaller than the crop of {side}")


def _check_target(target: Path) -> None:
    """Refuse a file that cannot or must not be written, before any work is done."""
    if target.suffix != ".safetensors":
        raise UsageError(f"--to {target} does not end in .safetensors")
    if target.exists():
        raise UsageError(f"{target} exists", fix="choose another --to")
    if not target.parent.is_dir():
        raise UsageError(
            f"the folder {target.parent} does not exist",
            fix=f"mkdir -p {shlex.quote(str(target.parent))}",
        )


def _typed(ctx: typer.Context, name: str) -> bool:
    """Whether an option was given, rather than left at its default."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _again(ctx: typer.Context, fit: Fit, model: str, options: dict[str, Any]) -> str:
    """The same command for the model that fits."""
    changed = {"model", "option"}
    if fit.model == model and fit.options == options:
        # Then it is the clips that differ from those that the weights are made for.
        changed |= {"frames", "size", "short_side"}
    words = ["ogreg", "convert"]
    for parameter in ctx.command.params:
        name = str(parameter.name)
        if name in changed or not _typed(ctx, name):
            continue
        value = ctx.params[name]
        text = str(value.value if isinstance(value, Enum) else value)
        flag = [] if parameter.param_type_name == "argument" else [parameter.opts[0]]
        words += flag if value is True else [*flag, text]
    words += ["--model", fit.model]
    for key, value in fit.options.items():
        words += ["--option", f"{key}={value}"]
    return shlex.join(words)


_PROTOCOL = ("sampling", "frames", "stride", "size", "short_side", "clips", "crops")


def _assumed(ctx: typer.Context) -> list[str]:
    """What of the protocol was not said."""
    uniform = ctx.params["sampling"] is Sampling.uniform
    return [
        name for name in _PROTOCOL if not _typed(ctx, name) and not (uniform and name == "stride")
    ]


def _show(
    checkpoint: str,
    to: Path,
    done: Conversion,
    names: ClassNames,
    info: CheckpointInfo,
    assumed: list[str],
    json: bool,
) -> None:
    from ogreg_core.evaluate_checkpoint import protocol

    phrase = protocol(info.views())
    if json:
        emit_json(
            {
                "schema": "ogreg.convert.v1",
                "source": checkpoint,
                "checkpoint": str(to),
                "model": done.model,
                "options": done.options,
                "classes": done.classes,
                "labels_from": names.origin,
                "tensors": done.tensors,
                "params": done.parameters,
                "left_out": done.left_out,
                "protocol": phrase,
                "assumed": assumed,
                "mean": info.mean,
                "std": info.std,
            }
        )
        return
    rows = [
        ["model", ", ".join([done.model, *(f"{k}={v}" for k, v in done.options.items())])],
        ["tensors", f"{done.tensors}, all from {checkpoint}"],
        ["parameters", f"{done.parameters / 1e6:.2f} M"],
        ["left out", _listed(done.left_out)],
        ["classes", f"{done.classes}, names: {names.origin}"],
        ["protocol", phrase],
        ["of which assumed", ", ".join(name.replace("_", "-") for name in assumed) or "nothing"],
        ["normalisation", f"mean {_numbers(info.mean)}, std {_numbers(info.std)}"],
        ["next", f"ogreg eval {shlex.quote(str(to))} --data FOLDER"],
    ]
    print_table(str(to), ["", "converted"], rows)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more if names else "nothing"


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)
