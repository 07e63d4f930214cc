"""``ogreg predict``."""

from __future__ import annotations

import glob
import sys
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ogreg_cli.common import Checkpoint, Device, Json, choose_checkpoint
from ogreg_cli.console import (
    bar,
    emit_json,
    error_document,
    fail,
    info,
    loading,
    print_table,
    result,
)
from ogreg_cli.imports import uncollected
from ogreg_core.errors import UsageError, VideoError, WorkFailed

if TYPE_CHECKING:
    from ogreg_core.inference import Prediction

EXAMPLES = (
    "Examples: ogreg predict clip.mp4 | ogreg predict clips/ --json | "
    "ogreg predict photo.jpg -c runs/train/imagenet1k/1 | "
    "find . -name '*.mp4' | ogreg predict - -c runs/train/demo/1"
)


def predict(
    videos: Annotated[
        list[str],
        typer.Argument(
            help="Video or image files, folders, glob patterns, or - for a list on stdin.",
            metavar="VIDEO...",
        ),
    ],
    checkpoint: Checkpoint = None,
    top: Annotated[int, typer.Option(min=1, help="How many classes to name.")] = 5,
    clips: Annotated[
        int | None, typer.Option(min=1, help="Clips per video; default: as in validation.")
    ] = None,
    crops: Annotated[int | None, typer.Option(min=1, max=3, help="Crops per clip, 1 or 3.")] = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Name the action in video files, or the class of images. One line of JSON per file with --json."""
    if crops == 2:
        raise UsageError("--crops is 1 (centre) or 3 (start, centre, end)")
    files = list_videos(videos)
    path, origin = choose_checkpoint(checkpoint)
    loading()
    with uncollected():
        from ogreg_core.devices import pick_device
        from ogreg_core.inference import Predictor

    predictor = Predictor.from_checkpoint(path, pick_device(device))
    info(f"weights: {path} ({origin})")
    views = predictor.info.views(clips, crops)
    failed = 0
    for file in files:
        try:
            prediction = predictor.predict(file, views, top)
        except VideoError as error:
            if len(files) == 1:
                raise
            failed += 1
            if json:
                emit_json({**error_document(error), "path": str(file)})
            else:
                fail(error)
            continue
        _show(file, prediction, json)
    if failed:
        raise WorkFailed(f"{failed} of {len(files)} files could not be read")


def list_videos(arguments: list[str]) -> list[str]:
    """Files meant by the arguments, in order. A folder stands for its videos; for its images if there
    are none, since beside videos these are mostly previews.

    Raises:
        UsageError: a folder or pattern without videos or images.
    """
    from ogreg_core.files import IMAGE_SUFFIXES, VIDEO_SUFFIXES

    files: list[str] = []
    for argument in arguments:
        path = Path(argument)
        if argument == "-":
            found = [line for line in (raw.rstrip("\n") for raw in sys.stdin) if line]
        elif path.is_dir():
            inside = sorted(str(file) for file in path.rglob("*"))
            found = _ending_in(VIDEO_SUFFIXES, inside) or _ending_in(IMAGE_SUFFIXES, inside)
        elif glob.has_magic(argument) and not path.exists():
            found = sorted(glob.glob(argument, recursive=True))
        else:
            found = [argument]
        if not found:
            raise UsageError(f"{argument} names no videos")
        files += found
    return files


def _ending_in(suffixes: Collection[str], files: list[str]) -> list[str]:
    return [file for file in files if Path(file).suffix.lower() in suffixes]


def _show(file: str, prediction: Prediction, json: bool) -> None:
    video = prediction.video
    if json:
        emit_json(
            {
                "schema": "ogreg.predict.v1",
                "path": str(Path(file).resolve()),
                "status": "ok",
                "duration_s": video.duration,
                "decoder": video.reader,
                "top": [{"label": label, "score": score} for label, score in prediction.top],
            }
        )
        return
    if not sys.stdout.isatty():
        for label, score in prediction.top:
            result(f"{file}\t{100 * score:.1f} %\t{label}")
        return
    rows = [[f"{100 * score:.1f} %", bar(score), label] for label, score in prediction.top]
    length = "image" if video.decoder == "image" else f"{video.duration:.1f} s"
    print_table(f"{file}  ({length})", ["score", "", "label"], rows, right=(0,))
