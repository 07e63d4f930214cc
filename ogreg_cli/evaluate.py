"""``ogreg eval``."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ogreg_cli.common import Device, Json, Workers, default_loader_workers
from ogreg_cli.console import Reporter, emit_json, info, loading, print_table, result

if TYPE_CHECKING:
    from ogreg_core.evaluate_checkpoint import EvaluationReport

EXAMPLES = (
    "Examples: ogreg eval runs/train/demo/1 | ogreg eval best.safetensors --data data/demo --clips 4 --crops 3 | "
    "ogreg eval runs/train/demo/1 --frame-order shuffled"
)


class FrameOrder(str, Enum):
    """Order in which the model gets a clip's frames."""

    normal = "normal"
    shuffled = "shuffled"
    reversed = "reversed"
    middle = "middle"


def evaluate(
    checkpoint: Annotated[
        str,
        typer.Argument(help="Checkpoint file, or run folder (its best).", metavar="CHECKPOINT|RUN"),
    ],
    data: Annotated[
        Path | None, typer.Option(help="Prepared data set; default: the one it was trained on.")
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Split to score; default: as in validation.")
    ] = None,
    clips: Annotated[
        int | None, typer.Option(min=1, help="Clips per video; default: as in validation.")
    ] = None,
    crops: Annotated[
        int | None,
        typer.Option(min=1, max=3, help="Crops per clip, 1 or 3; default as in validation."),
    ] = None,
    frame_order: Annotated[
        FrameOrder,
        typer.Option(help="Control: shuffled or reversed frames, or the middle one repeated."),
    ] = FrameOrder.normal,
    batch_size: Annotated[int, typer.Option(min=1, help="Videos at a time.")] = 8,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the reports instead of runs/eval/RECIPE/N.")
    ] = None,
    device: Device = "auto",
    workers: Workers = None,
    json: Json = False,
) -> None:
    """Score a checkpoint on a prepared data set: top-1, top-5, mean-class accuracy, per class and
    per video.
    """
    from ogreg_core.errors import UsageError

    if crops == 2:
        raise UsageError("--crops is 1 (centre) or 3 (start, centre, end)")
    loading()
    from ogreg_core.devices import pick_device
    from ogreg_core.evaluate_checkpoint import evaluate_checkpoint
    from ogreg_core.runs import RunFolder, find_checkpoint

    RunFolder.check_free(out)
    path = find_checkpoint(checkpoint)
    info(f"weights: {path}")
    with Reporter() as reporter:
        report = evaluate_checkpoint(
            path,
            data=data,
            split=split,
            clips=clips,
            crops=crops,
            control="none" if frame_order is FrameOrder.normal else frame_order.value,
            batch_size=batch_size,
            workers=default_loader_workers() if workers is None else workers,
            device=pick_device(device),
            on_progress=reporter,
        )
    run = RunFolder.create("eval", report.document["recipe"] or "checkpoint", out)
    report.write(run)
    if json:
        emit_json({**report.document, "report_folder": run.path})
        return
    print_table(
        f"{report.document['model']} on {report.document['dataset']}/{report.document['split']}",
        ["protocol", "top-1", "top-5", "mean class", "loss", "videos"],
        [
            [
                report.document["protocol"],
                f"{report.metrics.top1:.2f} %",
                f"{report.metrics.top5:.2f} %",
                f"{report.metrics.mean_class:.2f} %",
                f"{report.metrics.loss:.4f}",
                _videos(report),
            ]
        ],
        right=(1, 2, 3, 4, 5),
    )
    for video in report.scores.unreadable:
        info(f"counted as wrong: {video.reason}")
    result(f"reports: {run.path}")


def _videos(report: EvaluationReport) -> str:
    """How many videos the figures stand for, and of how many annotated ones."""
    count = f"{report.metrics.videos:,}"
    if report.metrics.unreadable:
        count += f", {report.metrics.unreadable} of them unreadable and counted as wrong"
    share = report.document["coverage_pct"]
    if share is None:
        return count
    return f"{count} ({share:.1f} % of {report.document['annotated_videos']:,} annotated)"
