"""``ogreg predict --timeline``."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ogreg_cli.console import (
    Reporter,
    clock,
    emit_json,
    error_document,
    fail,
    info,
    print_table,
    result,
)
from ogreg_core.errors import Interrupted, UsageError, VideoError, WorkFailed
from ogreg_core.files import printable

if TYPE_CHECKING:
    from ogreg_core.data.loader import Views
    from ogreg_core.inference import Predictor
    from ogreg_core.signals import StopRequest
    from ogreg_core.timeline import Timeline, TimelineOptions
    from ogreg_core.timeline.source import Heed

__all__ = ["Wishes", "run"]


@dataclass(frozen=True)
class Wishes:
    """What the command line asks for.

    Args:
        checkpoint: the file, as it is to be named in the documents.
        options: of the timelines.
        out: folder of a single video's files; None: ``runs/predict/<video>/<n>``.
        top: classes named per window.
        overlay: whether to write the video with its events.
        json: whether to write the document to stdout.
    """

    checkpoint: str
    options: TimelineOptions
    out: Path | None
    top: int
    overlay: bool
    json: bool


def run(predictor: Predictor, files: list[str], views: Views, wishes: Wishes) -> None:
    """A timeline of every file; one that cannot be read does not stop the others.

    Raises:
        UsageError: one folder for several files, or one that is not empty.
        VideoError: the only file cannot be read.
        WorkFailed: some files could not be read, or not to their end.
        Interrupted: asked to stop.
    """
    from ogreg_core.runs import RunFolder
    from ogreg_core.signals import StopRequest
    from ogreg_core.timeline import make_timeline

    if wishes.out is not None and len(files) > 1:
        raise UsageError(
            f"--out is a folder for one video, and there are {len(files)}",
            fix="leave out --out: each gets its own folder below runs/predict",
        )
    RunFolder.check_free(wishes.out)
    troubles = 0
    with StopRequest() as stop, Reporter() as reporter:
        for file in files:
            heed = partial(_heed, stop)
            try:
                found = make_timeline(
                    predictor, file, views, wishes.options, on_progress=reporter, heed=heed
                )
            # An image among videos, or a window that does not suit one of them, is that one's trouble.
            except (VideoError, UsageError) as error:
                if len(files) == 1:
                    raise
                troubles += 1
                if wishes.json:
                    emit_json({**error_document(error), "path": file})
                else:
                    fail(error)
                continue
            document, folder = _write(found, predictor, file, wishes, heed)
            _show(found, document, folder, json=wishes.json, several=len(files) > 1)
            troubles += found.trouble is not None
    if troubles and len(files) > 1:
        raise WorkFailed(f"{troubles} of {len(files)} files could not be read to their end")
    if troubles:
        raise _incomplete(found)


def _incomplete(found: Timeline) -> WorkFailed:
    """The verdict on the only file, which was read in part."""
    trouble, path = found.trouble, found.source.info.path
    assert trouble is not None
    missing = f"; {found.missing} frames before are missing" if found.missing else ""
    return WorkFailed(
        f"{path} was read up to {found.read_to_s:.2f} s of {found.source.row.duration:.2f} s{missing}",
        why=f"{trouble.what}: {trouble.why}" if trouble.why else trouble.what,
        fix=trouble.fix,
    )


def _heed(stop: StopRequest) -> None:
    if stop.number:
        raise Interrupted(
            "stopped; of the video under way nothing is kept", signal_number=stop.number
        )


def _write(
    found: Timeline, predictor: Predictor, file: str, wishes: Wishes, heed: Heed
) -> tuple[dict[str, Any], Path]:
    """All files of a timeline; each appears whole or not at all, the overlay, which takes long, first."""
    from ogreg_core.runs import RunFolder
    from ogreg_core.timeline.documents import (
        document_of,
        save_csv_of_events,
        save_csv_of_windows,
        save_json,
        save_web_vtt,
    )
    from ogreg_core.timeline.picture import save_picture

    def name(scores: Any) -> list[tuple[str, float]]:
        import torch

        return predictor.name(torch.from_numpy(scores), wishes.top)

    existed = wishes.out is not None and wishes.out.exists()
    folder = RunFolder.create("predict", Path(file).stem, wishes.out).path
    document = document_of(found, name) | {
        "checkpoint": wishes.checkpoint,
        "model": predictor.info.model,
    }
    try:
        if wishes.overlay:
            document |= _overlay(found, folder, heed, wishes.options.deadline)
        title = f"{printable(Path(file).name)}, {predictor.info.model}"
        save_picture(found, folder / "timeline.png", title)
        save_csv_of_windows(found, name, folder / "windows.csv")
        save_csv_of_events(found, folder / "events.csv")
        save_web_vtt(found, folder / "events.vtt")
        save_json(document, folder / "timeline.json")
    except BaseException:
        if not existed and not any(folder.iterdir()):
            folder.rmdir()
        raise
    return document, folder


def _overlay(found: Timeline, folder: Path, heed: Heed, deadline: float) -> dict[str, str]:
    """Write the overlay; a file that breaks in this second pass does not cost what the first one found."""
    from ogreg_core.timeline.overlay import save_overlay

    try:
        save_overlay(found, folder / "overlay.mp4", heed, deadline)
    except VideoError as error:
        fail(error)
        return {"overlay_error": str(error)}
    return {"overlay": "overlay.mp4"}


def _show(
    found: Timeline, document: dict[str, Any], folder: Path, *, json: bool, several: bool
) -> None:
    row = found.source.row
    pace = found.source.row.duration / max(found.seconds, 1e-9)
    info(
        f"{len(found.starts)} windows of {found.window_s:.3g} s ({found.window_from}), one every "
        f"{found.hop_s:.3g} s; {found.frames} of {row.frames} frames taken; {clock(row.duration)} of "
        f"video in {clock(found.seconds)}, {pace:.1f} times real time"
    )
    if found.trouble is not None and several:
        info(f"error: {_incomplete(found)}")
    if json:
        emit_json({**document, "folder": str(folder.resolve())})
        return
    rows = [
        [
            f"{event.start_s:.2f}",
            f"{event.end_s:.2f}",
            f"{100 * event.score:.1f} %",
            found.labels[event.label],
        ]
        for event in found.events
    ]
    print_table(
        found.source.info.path, ["start s", "end s", "score", "event"], rows, right=(0, 1, 2)
    )
    result(f"files: {shlex.quote(str(folder))}")
