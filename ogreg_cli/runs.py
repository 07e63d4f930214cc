"""``ogreg runs``."""

from __future__ import annotations

import shutil
import sys
from datetime import datetime, timezone
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from ogreg_cli.common import Json
from ogreg_cli.console import clock, emit_json, info, print_table, settings
from ogreg_core.errors import DataError
from ogreg_core.run_records import RunRecord, find_runs, read_run, share_text, thousands

EXAMPLES = "Examples: ogreg runs | ogreg runs runs/train/demo --sort top1 | ogreg runs --all --json"

_DEFAULT = Path("runs")
_MOST = 20
_HEADER = (
    *("run", "kind", "model", "state", "epoch", "best top-1", "last top-1", "videos", "data set"),
    *("when", "duration"),
)
_NUMBERS = ("epoch", "best top-1", "last top-1", "videos", "duration")
# A narrow terminal gets the columns that have room, tried in this order.
_BY_IMPORTANCE = (
    *("run", "best top-1", "state", "epoch", "data set", "last top-1", "when", "model", "videos"),
    *("duration", "kind"),
)


class Order(str, Enum):
    """What the list is sorted by."""

    time = "time"
    top1 = "top1"


def runs(
    folder: Annotated[Path, typer.Argument(help="Folder with runs in it.")] = _DEFAULT,
    sort: Annotated[
        Order, typer.Option(help="Newest first, or the best top-1 first.")
    ] = Order.time,
    everything: Annotated[bool, typer.Option("--all", help=f"More than {_MOST} rows.")] = False,
    json: Json = False,
) -> None:
    """List training and evaluation runs with their scores, whatever state they are in.

    State silent: by its own words it is running, but for ten minutes it has written nothing. --json
    lists all, with the reasons of failures and the commands that resume; on a table -v tells them.
    """
    if not folder.is_dir() and folder != _DEFAULT:
        raise DataError(f"{folder} is not a folder", fix="ogreg runs FOLDER")
    found = [run for path in find_runs(folder) if (run := read_run(path)) is not None]
    found.sort(key=lambda run: run.started, reverse=True)
    if sort is Order.top1:
        found.sort(key=lambda run: -1.0 if run.top1 is None else run.top1, reverse=True)
    if json:
        emit_json({"schema": "ogreg.runs.v1", "runs": [_document(run) for run in found]})
        return
    if not found:
        info(f"there are no runs in {folder}; start one: ogreg train recipes/demo.toml")
    shown = found if everything else found[:_MOST]
    _print([_row(run) for run in shown])
    if len(found) > len(shown):
        info(f"{thousands(len(found) - len(shown))} more: --all")
    if settings.verbose:
        for run in shown:
            if run.state not in ("done", "running"):
                told = [run.reason, run.resume and f"continue: {run.resume}"]
                info(f"{run.path}: {run.state}; {'; '.join(text for text in told if text)}")


def _print(rows: list[list[str]]) -> None:
    """The table; on a narrow terminal only the columns that have room."""
    kept = list(range(len(_HEADER)))
    if sys.stdout.isatty() and not settings.verbose:
        widths = [max(map(len, column)) for column in zip(_HEADER, *rows, strict=True)]
        # A column costs a border and a space at either side.
        room = shutil.get_terminal_size().columns - 1
        kept = []
        for name in _BY_IMPORTANCE:
            i = _HEADER.index(name)
            if not kept or widths[i] + 3 <= room:
                kept.append(i)
                room -= widths[i] + 3
        kept.sort()
    right = [place for place, i in enumerate(kept) if _HEADER[i] in _NUMBERS]
    print_table("Runs", [_HEADER[i] for i in kept], [[row[i] for i in kept] for row in rows], right)
    left_out = [name for i, name in enumerate(_HEADER) if i not in kept]
    if left_out:
        info(f"no room for: {', '.join(left_out)}; all of it: ogreg -v runs")


def _row(run: RunRecord) -> list[str]:
    train = run.kind == "train"
    epoch = f"{run.epoch or 0}/{run.epochs or '?'}" if train else ""
    best = _percent(run.top1)
    if train and best and run.best_epoch is not None:
        best += f" ({run.best_epoch})"
    data = f"{run.dataset}, {run.frame_order}" if run.frame_order else run.dataset
    return [
        str(run.path),
        run.kind,
        run.model,
        run.state,
        epoch,
        best,
        _percent(run.last_top1) if train else "",
        _videos(run),
        data,
        f"{datetime.fromtimestamp(run.started):%Y-%m-%d %H:%M}",
        "" if run.seconds is None else clock(run.seconds),
    ]


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} %"


def _videos(run: RunRecord) -> str:
    """Readable videos, and of how many annotated ones where that is known."""
    if run.videos is None or run.scored is None:
        return ""
    text = thousands(run.scored)
    if run.annotated:
        return f"{text} ({share_text(run.scored, run.annotated)})"
    return f"{text} of {thousands(run.videos)}" if run.unreadable else text


def _document(run: RunRecord) -> dict[str, Any]:
    return {
        "run": run.path,
        "kind": run.kind,
        "state": run.state,
        "reason": run.reason,
        "resume": run.resume,
        "recipe": run.recipe,
        "model": run.model,
        "epoch": run.epoch,
        "epochs": run.epochs,
        "validations": len(run.validations),
        "best_top1_pct": run.top1,
        "best_epoch": run.best_epoch,
        "last_top1_pct": run.last_top1,
        "dataset": run.dataset,
        "frame_order": run.frame_order or "none",
        "videos": run.videos,
        "scored_videos": run.scored,
        "unreadable": run.unreadable,
        "annotated_videos": run.annotated,
        "coverage_pct": run.coverage_pct,
        "started": datetime.fromtimestamp(run.started, timezone.utc).isoformat(timespec="seconds"),
        "seconds": run.seconds,
    }
