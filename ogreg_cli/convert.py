"""``ogreg convert``."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ogreg_cli.common import (
    Json,
    Option,
    Select,
    check_new_file,
    is_typed,
    read_options,
)
from ogreg_cli.console import emit_json, loading, print_table
from ogreg_core.errors import UsageError
from ogreg_core.models.option_words import model_words, selection_words
from ogreg_core.pretrained import PUBLISHED, UsualTest

if TYPE_CHECKING:
    from ogreg_core.checkpoint import CheckpointInfo
    from ogreg_core.models.conversion import ClassNames, Conversion, Fit

EXAMPLES = (
    "Examples: ogreg convert swin3d_t --model swin3d-t --to swin3d-t.safetensors | "
    "ogreg convert official.pth --model video-focalnet-b --labels kinetics400 --to focalnet.safetensors | "
    "ogreg convert stts.pth --model swin3d-b --select time:0:0.375 --labels kinetics400 --to stts.safetensors | "
    "ogreg convert ssv2.pth --model swin3d-b --option window=16 --labels labels.txt --sampling uniform "
    "--clips 1 --to ssv2.safetensors"
)


class Sampling(str, Enum):
    """How a clip's frames are picked."""

    dense = "dense"
    uniform = "uniform"


class Short(str, Enum):
    """What a dense clip does at the end of a short video."""

    loop = "loop"
    clamp = "clamp"


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
    option: Option = None,
    select: Select = None,
    sampling: Annotated[
        Sampling | None, typer.Option(help="How the frames of a clip are picked.")
    ] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Frames per clip.")] = None,
    stride: Annotated[
        int | None, typer.Option(min=1, help="Distance between frames, dense only.")
    ] = None,
    fps: Annotated[
        float | None,
        typer.Option(min=0, help="Rate at which the stride counts, dense only; 0: the file's own."),
    ] = None,
    short: Annotated[
        Short | None,
        typer.Option(help="A dense clip in a short video begins again, or holds the last frame."),
    ] = None,
    size: Annotated[int | None, typer.Option(min=32, help="Crop in pixels.")] = None,
    short_side: Annotated[
        int | None, typer.Option(min=32, help="Resize before the crop, in pixels.")
    ] = None,
    clips: Annotated[int | None, typer.Option(min=1, help="Clips per video in a test.")] = None,
    crops: Annotated[int | None, typer.Option(min=1, max=3, help="Crops per clip, 1 or 3.")] = None,
    json: Json = False,
) -> None:
    """Turn a foreign checkpoint into one of ours, which describes its model, labels and protocol.

    The protocol is the published one of the model's Kinetics weights where there is one, unless said
    otherwise; the result lists what was assumed.

    Weights of another model are refused, naming the nearest match; so are weights without a classifier
    or for other classes, which are starting weights: ogreg train RECIPE --init-from CHECKPOINT.
    """
    options = read_options(model, option, select)
    _check_target(to)
    test = settle_test(ctx.params)
    loading()
    from ogreg_core.models import conversion

    given = conversion.find_class_names(labels) if labels else None
    state, own, configuration = conversion.read_foreign(checkpoint)
    # What the checkpoint tells of itself, unless the command says otherwise.
    options = {**conversion.settings_in(model, state, configuration), **options}
    names = given or own or conversion.ClassNames([], "none given: numbers")
    info = _describe(model, options, names, test, Path(checkpoint).stem)
    done = conversion.convert(
        state, info, to, source=checkpoint, again=lambda fit: _again(ctx, fit, model, options)
    )
    _show(checkpoint, to, done, names, info, _assumed(ctx, info), json)


def settle_test(params: Mapping[str, Any]) -> dict[str, Any]:
    """The protocol: what was typed, else how weights of the model are usually tested.

    Args:
        params: of the command line, by name; None is not typed.

    Returns:
        ``sampling``, ``frames``, ``stride``, ``fps``, ``short``, ``size``, ``short_side``, ``clips``
        and ``crops``, as a checkpoint holds them.

    Raises:
        UsageError: it contradicts itself.
    """
    from ogreg_core.models.registry import find_model

    entry = find_model(params["model"])
    usual = PUBLISHED.get(params["model"], UsualTest())

    def typed(name: str, default: Any) -> Any:
        value = params[name]
        return default if value is None else value.value if isinstance(value, Enum) else value

    size = typed("size", entry.size)
    dense = typed("sampling", usual.sampling) == "dense"
    test = {
        "sampling": "dense" if dense else "uniform",
        "frames": typed("frames", entry.frames),
        "stride": typed("stride", usual.stride) if dense else 1,
        "fps": typed("fps", usual.fps) if dense else 0.0,
        "short": typed("short", usual.short) if dense else "loop",
        "size": size,
        "short_side": typed("short_side", round(size * usual.resize)),
        "clips": typed("clips", usual.clips),
        "crops": typed("crops", usual.crops),
    }
    if not dense and any(params[name] is not None for name in _DENSE):
        raise UsageError("--stride, --fps and --short go with --sampling dense")
    if test["crops"] == 2:
        raise UsageError("--crops is 1 (centre) or 3 (start, centre, end)")
    if test["short_side"] < size:
        raise UsageError(f"--short-side {test['short_side']} is smaller than the crop of {size}")
    return test


def _describe(
    model: str, options: dict[str, Any], names: ClassNames, test: Mapping[str, Any], recipe: str
) -> CheckpointInfo:
    from ogreg_core.checkpoint import CheckpointInfo
    from ogreg_core.data.sampling import ClipSampling
    from ogreg_core.models.registry import find_model

    entry = find_model(model)
    return CheckpointInfo(
        model=model,
        options=options,
        labels=names.names,
        sampling=ClipSampling(
            test["sampling"], test["frames"], test["stride"], test["fps"], test["short"]
        ),
        size=test["size"],
        short_side=test["short_side"],
        mean=entry.mean,
        std=entry.std,
        clips=test["clips"],
        crops=test["crops"],
        dataset=names.dataset,
        data_folder=names.folder,
        recipe=recipe,
    )


def _check_target(target: Path) -> None:
    """Refuse a file that cannot or must not be written, before any work is done."""
    if target.suffix != ".safetensors":
        raise UsageError(f"--to {target} does not end in .safetensors")
    check_new_file(target, "--to")


def _again(ctx: typer.Context, fit: Fit, model: str, options: dict[str, Any]) -> str:
    """The same command for the model that fits, with its options and its token selection."""
    changed = {"model", "option", "select"}
    if fit.model == model and fit.options == options:
        # Then it is the clips that differ from those that the weights are made for.
        changed |= {"frames", "size", "short_side"}
    words = ["ogreg", "convert"]
    for parameter in ctx.command.params:
        name = str(parameter.name)
        if name in changed or not is_typed(ctx, name):
            continue
        flag = [] if parameter.param_type_name == "argument" else [parameter.opts[0]]
        words += _repeated(flag, ctx.params[name])
    words += ["--model", fit.model]
    for key, value in fit.options.items():
        if key == "token_selection":
            words += _repeated(["--select"], selection_words(value))
        else:
            words += ["--option", f"{key}={value}"]
    return shlex.join(words)


def _repeated(flag: list[str], value: Any) -> list[str]:
    """An option as it was typed."""
    if value is True:
        return flag
    values = value if isinstance(value, list) else [value]
    return [
        word
        for item in values
        for word in (*flag, str(item.value if isinstance(item, Enum) else item))
    ]


_DENSE = ("stride", "fps", "short")
_PROTOCOL = ("sampling", "frames", *_DENSE, "size", "short_side", "clips", "crops")


def _assumed(ctx: typer.Context, info: CheckpointInfo) -> list[str]:
    """What of the protocol was not said."""
    idle = _DENSE if info.sampling.kind == "uniform" else ()
    return [name for name in _PROTOCOL if not is_typed(ctx, name) and name not in idle]


_ORIGIN = {True: "the published test of its Kinetics weights", False: "what is usual"}


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
        ["model", model_words(done.model, done.options)],
        ["tensors", f"{done.tensors}, all from {checkpoint}"],
        ["parameters", f"{done.parameters / 1e6:.2f} M"],
        ["left out", _listed(done.left_out)],
        ["classes", f"{done.classes}, names: {names.origin}"],
        ["protocol", phrase],
        ["of which assumed", ", ".join(name.replace("_", "-") for name in assumed) or "nothing"],
        *([["assumed from", _ORIGIN[done.model in PUBLISHED]]] if assumed else []),
        ["normalisation", f"mean {_numbers(info.mean)}, std {_numbers(info.std)}"],
        ["next", f"ogreg eval {shlex.quote(str(to))} --data FOLDER"],
    ]
    print_table(str(to), ["", "converted"], rows)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more if names else "nothing"


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)
