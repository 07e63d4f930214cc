"""``ogreg visualize-gaze``."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ogreg_cli.common import (
    Checkpoint,
    Device,
    Json,
    Pretrained,
    PretrainedModel,
    choose_weights,
)
from ogreg_cli.console import emit_json, info, loading, result
from ogreg_core.errors import Interrupted, UsageError

if TYPE_CHECKING:
    from ogreg_core.gaze import GazeResult
    from ogreg_core.signals import StopRequest

EXAMPLES = (
    "Examples: ogreg visualize-gaze clip.mp4 | ogreg visualize-gaze clip.mp4 --blocks stage1 --blocks stage2.block1 "
    "-o gaze/ -c runs/train/demo/1 | ogreg visualize-gaze clip.mp4 --gradcam --format png,gif,npz | "
    "ogreg visualize-gaze clip.mp4 --query 160,120,30"
)

# In the order in which they are written, with what is said of them.
FORMATS = {
    "png": "sheet",
    "mp4": "overlay",
    "gif": "animation",
    "npz": "numbers",
    "safetensors": "tensors",
}


class Glance(str, Enum):
    """What is shown of the attention."""

    received = "received"
    rollout = "rollout"
    query = "query"


def visualize_gaze(
    video: Annotated[str, typer.Argument(help="Video file.", metavar="VIDEO")],
    checkpoint: Checkpoint = None,
    model: PretrainedModel = None,
    pretrained: Pretrained = False,
    blocks: Annotated[
        list[str] | None,
        typer.Option(
            help="Stage or block to look at, e.g. stage2; repeatable. Default: all; of OG-ReG's gaze stage1, the "
            "only one that sees no more than a place's surroundings.",
            metavar="NAME",
        ),
    ] = None,
    glance: Annotated[
        Glance | None,
        typer.Option(
            help="Attention that tokens receive (default), rolled out over the blocks, or where the token at --query "
            "looks; the last two for OG-ReG and X-ViT."
        ),
    ] = None,
    query: Annotated[
        str | None,
        typer.Option(
            help="Place to ask from, in pixels of the video, and a frame of the file; default: the clip's middle.",
            metavar="X,Y[,FRAME]",
        ),
    ] = None,
    gradcam: Annotated[
        bool, typer.Option("--gradcam", help="Also Grad-CAM, of the predicted class.")
    ] = False,
    label: Annotated[
        str | None,
        typer.Option(help="Also Grad-CAM, of this class.", metavar="NAME"),
    ] = None,
    formats: Annotated[
        str,
        typer.Option(
            "--format",
            help=f"What to write: {', '.join(FORMATS)}. The last two hold the maps as numbers.",
            metavar="LIST",
        ),
    ] = "mp4,png",
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder instead of runs/visualize-gaze/CLIP/N."),
    ] = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Draw what the model looks at: an overlay video, and a sheet with gaze, glance, d[t] and m[t]."""
    wanted = read_formats(formats)
    place = read_query(query)
    shown = choose_glance(glance, asked=place is not None)
    weights = choose_weights(checkpoint, model, pretrained)
    loading()
    from ogreg_core import gaze
    from ogreg_core.runs import RunFolder
    from ogreg_core.signals import StopRequest

    RunFolder.check_free(out)
    predictor = weights.load(device)
    with StopRequest() as stop:
        found = gaze.look(
            predictor,
            video,
            blocks or (),
            opening=True,
            glance=shown.value,
            query=gaze.Query(*place) if place else None,
            gradcam=gradcam or label is not None,
            label=label,
        )
        meanings = gaze.meanings_of(predictor.info, found)
        for kind, meaning in meanings.items():
            info(f"{kind}: {meaning}")
        _heed(stop)
        folder = RunFolder.create("visualize-gaze", Path(video).stem, out).path
        files = _write(found, folder, Path(video), wanted, stop)
    if json:
        emit_json(_document(video, found, meanings, files))
    else:
        _show(found, files)


def read_formats(text: str) -> list[str]:
    """The formats of a comma list, in the order of writing.

    Raises:
        UsageError: an unknown one, or none.
    """
    words = [word.strip().lower() for word in text.split(",") if word.strip()]
    unknown = [word for word in words if word not in FORMATS]
    if unknown or not words:
        raise UsageError(
            f"--format {text!r} names {unknown[0]!r}" if unknown else "--format names nothing",
            why=f"the formats are {', '.join(FORMATS)}",
            fix="--format mp4,png",
        )
    return [name for name in FORMATS if name in words]


def read_query(text: str | None) -> tuple[float, float, int | None] | None:
    """``x,y`` or ``x,y,frame``.

    Raises:
        UsageError: not of that form.
    """
    if text is None:
        return None
    try:
        x, y, *frame = text.split(",")
        (number,) = map(int, frame) if frame else (None,)
        return float(x), float(y), number
    except ValueError as error:
        raise UsageError(
            f"--query {text!r} is not of the form X,Y or X,Y,FRAME",
            why="pixels from the left and from the top of the video, and a whole frame number from 0",
            fix="--query 160,120,30",
        ) from error


def choose_glance(glance: Glance | None, *, asked: bool) -> Glance:
    """What the glance shows; a query alone asks for its own attention.

    Raises:
        UsageError: a query where none is looked at, or none where one is needed.
    """
    if glance is None:
        return Glance.query if asked else Glance.received
    if glance is Glance.query and not asked:
        raise UsageError("--glance query needs a place to ask from", fix="--query 160,120")
    if glance is Glance.received and asked:
        raise UsageError(
            "--query does not go with --glance received",
            why="that is the mean over all places to ask from",
            fix="--glance query, or --glance rollout",
        )
    return glance


def _heed(stop: StopRequest) -> None:
    if stop.number:
        raise Interrupted(
            "stopped; files that were written are complete", signal_number=stop.number
        )


def _write(
    found: GazeResult, folder: Path, video: Path, formats: list[str], stop: StopRequest
) -> dict[str, Path]:
    """Each format's file."""
    from ogreg_core import gaze

    files = {}
    for name in formats:
        path = folder / f"{video.stem}_gaze.{name}"
        if name == "png":
            gaze.save_sheet(found, path, video.name)
        elif name == "mp4":
            gaze.save_overlay_video(found, path)
        elif name == "gif":
            gaze.save_gif(found, path)
        else:
            gaze.save_maps(found, path)
        files[name] = path
        _heed(stop)
    return files


def _document(
    video: str, found: GazeResult, meanings: dict[str, str], files: dict[str, Path]
) -> dict[str, Any]:
    geometry, motion = found.geometry, found.motion
    return {
        "schema": "ogreg.gaze.v1",
        "path": str(Path(video).resolve()),
        **{FORMATS[name]: path.resolve() for name, path in files.items()},
        "label": found.label,
        "score": found.score,
        "still": found.still,
        "maps": meanings,
        "blocks": found.blocks,
        "gradcam_label": found.cam_label or None,
        "mass_on_moving_pixels": motion
        and {"maps": motion.maps, "centre_bias": motion.centre, "uniform": motion.uniform},
        "crop_px": {
            "left": geometry.left,
            "top": geometry.top,
            "width": geometry.width,
            "height": geometry.height,
        },
        "frame_indices": found.indices,
        "frame_times_s": found.seconds,
        "profiles": {
            name: {curve: values.tolist() for curve, values in curves.items()}
            for name, curves in found.profiles.items()
        },
    }


def _show(found: GazeResult, files: dict[str, Path]) -> None:
    if found.still:
        info("nothing moves in these frames: the gaze map is flat")
    result(f"{found.label}\t{100 * found.score:.1f} %")
    if "gradcam" in found.maps and not found.maps["gradcam"].any():
        info(f"Grad-CAM is 0 everywhere: no place of the last stage speaks for {found.cam_label}")
    if found.motion:
        for kind, share in found.motion.maps.items():
            words = f"{100 * share:.1f} %" if share == share else "the map is 0 everywhere"
            result(f"{kind} on moving pixels\t{words}")
        result(f"centre bias on moving pixels\t{100 * found.motion.centre:.1f} %")
        result(f"uniform on moving pixels\t{100 * found.motion.uniform:.1f} %")
    for name, path in files.items():
        result(f"{FORMATS[name]}: {path}")
