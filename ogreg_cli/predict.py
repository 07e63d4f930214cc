"""``ogreg predict``."""

from __future__ import annotations

import glob
import sys
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ogreg_cli.common import (
    Checkpoint,
    Device,
    Pretrained,
    PretrainedModel,
    Workers,
    choose_weights,
    default_loader_workers,
    is_typed,
)
from ogreg_cli.console import (
    Reporter,
    bar,
    emit_json,
    error_document,
    fail,
    loading,
    print_table,
    result,
)
from ogreg_core.errors import Interrupted, OgregError, UsageError, VideoError, WorkFailed
from ogreg_core.progress import Progress

if TYPE_CHECKING:
    from ogreg_core.data.loader import Views
    from ogreg_core.inference import Prediction, Predictor

EXAMPLES = (
    "Examples: ogreg predict clip.mp4 | ogreg predict clips/ --json | "
    "ogreg predict 'clips/*.mp4' --csv > top5.csv | "
    "ogreg predict photo.jpg -c runs/train/imagenet1k/1 | "
    "ogreg predict clip.mp4 --model swin3d-t --pretrained | "
    "find . -name '*.mp4' | ogreg predict - -c runs/train/demo/1 | "
    "ogreg predict --timeline match.mp4 --window 4 --hop 1 --overlay"
)

Show = Callable[[str, "Prediction | VideoError"], None]

# Options by parameter name: what a timeline needs, and what lists of files have.
_OF_TIMELINES = {
    "window": "--window",
    "hop": "--hop",
    "smooth": "--smooth",
    "threshold": "--threshold",
    "min_length": "--min-length",
    "max_gap": "--max-gap",
    "out": "--out",
    "overlay": "--overlay",
    "boxes": "--boxes",
}
_OF_FILES = {"csv": "--csv", "workers": "--workers"}

_PANEL = "Timelines"


def predict(
    ctx: typer.Context,
    videos: Annotated[
        list[str],
        typer.Argument(
            help="Video or image files, folders, glob patterns, or - for a list on stdin.",
            metavar="VIDEO...",
        ),
    ],
    checkpoint: Checkpoint = None,
    model: PretrainedModel = None,
    pretrained: Pretrained = False,
    top: Annotated[int, typer.Option(min=1, help="How many classes to name.")] = 5,
    clips: Annotated[
        int | None, typer.Option(min=1, help="Clips per video; default: as in validation.")
    ] = None,
    crops: Annotated[int | None, typer.Option(min=1, max=3, help="Crops per clip, 1 or 3.")] = None,
    batch: Annotated[
        int, typer.Option(min=1, help="Files, or windows, in one pass of the model.")
    ] = 8,
    workers: Workers = None,
    device: Device = "auto",
    json: Annotated[
        bool, typer.Option("--json", help="A JSON document per file, one a line.")
    ] = False,
    csv: Annotated[bool, typer.Option("--csv", help="A row per file and class.")] = False,
    timeline: Annotated[
        bool,
        typer.Option(
            "--timeline",
            help="Slide windows over long videos: scores over time, and events, as JSON, CSV, WebVTT, PNG.",
            rich_help_panel=_PANEL,
        ),
    ] = False,
    window: Annotated[
        float | None,
        typer.Option(
            help="Length; default: what a training clip spans.",
            metavar="SECONDS",
            rich_help_panel=_PANEL,
        ),
    ] = None,
    hop: Annotated[
        float | None,
        typer.Option(
            help="Distance of windows; default: half a window.",
            metavar="SECONDS",
            rich_help_panel=_PANEL,
        ),
    ] = None,
    smooth: Annotated[
        Literal["mean", "gaussian", "none"],
        typer.Option(help="How the windows over an instant are averaged.", rich_help_panel=_PANEL),
    ] = "gaussian",
    threshold: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            help="Score that an event reaches; it lasts down to half of that.",
            rich_help_panel=_PANEL,
        ),
    ] = 0.5,
    min_length: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Drop shorter events; default: half a window.",
            metavar="SECONDS",
            rich_help_panel=_PANEL,
        ),
    ] = None,
    max_gap: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Join events of a class this close; default: half a window.",
            metavar="SECONDS",
            rich_help_panel=_PANEL,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Folder instead of runs/predict/VIDEO/N.", rich_help_panel=_PANEL
        ),
    ] = None,
    overlay: Annotated[
        bool,
        typer.Option(
            "--overlay",
            help="Write the video with its events drawn in, too.",
            rich_help_panel=_PANEL,
        ),
    ] = False,
    boxes: Annotated[
        bool,
        typer.Option(
            "--boxes",
            help="Give each event a box around most of the gaze, over time.",
            rich_help_panel=_PANEL,
        ),
    ] = False,
) -> None:
    """Name the action in video files, or the class of images; with --timeline, what happens when in
    long videos.

    Exit code 1 if some files cannot be read, 3 if it is the only one.
    """
    if crops == 2:
        raise UsageError("--crops is 1 (centre) or 3 (start, centre, end)")
    if json and csv:
        raise UsageError("--json and --csv exclude each other")
    _check_belonging(ctx, timeline)
    for name, seconds in (("--window", window), ("--hop", hop)):
        if seconds is not None and not seconds > 0:
            raise UsageError(f"{name} {seconds:g} is no length of time", fix=f"{name} 2")
    files = list_videos(videos)
    if len(files) == 1 and not Path(files[0]).exists():
        # Known before anything is loaded.
        raise VideoError(f"{files[0]} does not exist", code="missing", fix="check the path")
    weights = choose_weights(checkpoint, model, pretrained)
    loading()
    predictor = weights.load(device)
    views = predictor.info.views(clips, crops)
    if timeline:
        from ogreg_cli import predict_timeline
        from ogreg_core.timeline import TimelineOptions

        options = TimelineOptions(
            window_s=window,
            hop_s=hop,
            smoothing=smooth,
            threshold=threshold,
            min_length_s=min_length,
            max_gap_s=max_gap,
            batch=batch,
            boxes=boxes,
        )
        wishes = predict_timeline.Wishes(weights.name, options, out, top, overlay, json)
        predict_timeline.run(predictor, files, views, wishes)
        return
    show = _json_lines if json else _csv_rows(top) if csv else _table
    if len(files) == 1:
        # No worker process, whose start takes longer than most files.
        show(files[0], predictor.predict(files[0], views, top))
        return
    _predict_many(predictor, files, views, (top, batch, workers), show)


def _check_belonging(ctx: typer.Context, timeline: bool) -> None:
    """Refuse options that would be ignored."""
    foreign = _OF_FILES if timeline else _OF_TIMELINES
    for name, option in foreign.items():
        if is_typed(ctx, name):
            raise UsageError(
                f"{option} does not go with --timeline"
                if timeline
                else f"{option} needs --timeline",
                fix=f"leave out {option}" if timeline else "ogreg predict --timeline VIDEO",
            )


def _predict_many(
    predictor: Predictor,
    files: list[str],
    views: Views,
    numbers: tuple[int, int, int | None],
    show: Show,
) -> None:
    """Files in batches, read ahead by worker processes; a bad one does not stop the others."""
    from ogreg_core.signals import StopRequest

    top, batch, workers = numbers
    if workers is None:
        workers = default_loader_workers()
    failed: list[VideoError] = []
    begun = time.monotonic()
    with StopRequest() as stop, Reporter() as reporter:
        found = predictor.predict_files(
            files, views, top, batch=batch, workers=workers, stopping=lambda: bool(stop.number)
        )
        done = 0
        for done, (file, prediction) in enumerate(found, start=1):
            show(file, prediction)
            if isinstance(prediction, VideoError):
                failed.append(prediction)
            pace = done / max(time.monotonic() - begun, 1e-9)
            reporter(Progress("files", done, len(files), {"files_per_s": pace}))
    if stop.number:
        raise Interrupted(f"stopped after {done} of {len(files)} files", signal_number=stop.number)
    if failed:
        raise WorkFailed(f"{len(failed)} of {len(files)} files could not be read")


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


def _json_lines(file: str, found: Prediction | VideoError) -> None:
    if isinstance(found, OgregError):
        emit_json({**error_document(found), "path": str(file)})
        return
    emit_json(
        {
            "schema": "ogreg.predict.v1",
            "path": str(Path(file).resolve()),
            "status": "ok",
            "duration_s": found.video.duration,
            "decoder": found.video.reader,
            "top": [{"label": label, "score": score} for label, score in found.top],
        }
    )


def _csv_rows(top: int) -> Show:
    """A row per file and rank, in a form that needs no parsing of lists; of a file that cannot be read
    one row with the reason. Each is written at once.
    """
    import csv

    writer = csv.writer(sys.stdout, lineterminator="\n")
    header = ["path", "status", "rank", "label", "score", "reason"]
    begun: list[bool] = []

    def rows(file: str, found: Prediction | VideoError) -> Iterator[list[object]]:
        if isinstance(found, OgregError):
            yield [file, "error", "", "", "", str(found)]
            return
        for rank, (label, score) in enumerate(found.top[:top], start=1):
            yield [file, "ok", rank, label, f"{score:.6f}", ""]

    def show(file: str, found: Prediction | VideoError) -> None:
        if not begun:
            writer.writerow(header)
            begun.append(True)
        writer.writerows(rows(file, found))
        sys.stdout.flush()
        if isinstance(found, OgregError):
            fail(found)

    return show


def _table(file: str, found: Prediction | VideoError) -> None:
    if isinstance(found, OgregError):
        fail(found)
        return
    if not sys.stdout.isatty():
        for label, score in found.top:
            result(f"{file}\t{100 * score:.1f} %\t{label}")
        return
    video = found.video
    rows = [[f"{100 * score:.1f} %", bar(score), label] for label, score in found.top]
    length = "image" if video.decoder == "image" else f"{video.duration:.1f} s"
    print_table(f"{file}  ({length})", ["score", "", "label"], rows, right=(0,))
