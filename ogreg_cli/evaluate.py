"""``ogreg eval``."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ogreg_cli.common import Device, Gpus, Json, Workers, default_loader_workers
from ogreg_cli.console import Reporter, emit_json, info, loading, print_table, result
from ogreg_cli.launch import launch, wants_launch
from ogreg_core.errors import UsageError, WorkFailed

if TYPE_CHECKING:
    from ogreg_core.evaluation_report import EvaluationReport
    from ogreg_core.runs import RunFolder

EXAMPLES = (
    "Examples: ogreg eval runs/train/demo/1 | ogreg eval best.safetensors --data data/demo --clips 4 --crops 3 | "
    "ogreg eval runs/train/demo/1 --frame-order shuffled | ogreg eval runs/train/demo/1 --expect 'top1>=90'"
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
    expect: Annotated[
        list[str] | None,
        typer.Option(
            help="Exit with 1 unless the score is so: top1=78.8+-0.3 or 'top1>=78.5'; also top5, "
            "mean_class, ece. Repeatable.",
            metavar="FIGURE=VALUE+-TOLERANCE",
        ),
    ] = None,
    gpus: Gpus = None,
    device: Device = "auto",
    workers: Workers = None,
    json: Json = False,
) -> None:
    """Score a checkpoint on a prepared data set: top-1, top-5, mean-class accuracy, calibration, per
    class and per video. Scores are saved for `ogreg compare` and `ogreg fuse`.
    """
    from ogreg_core.expectations import parse_expectation

    if crops == 2:
        raise UsageError("--crops is 1 (centre) or 3 (start, centre, end)")
    expectations = [parse_expectation(text) for text in expect or []]
    if gpus is not None and wants_launch(gpus):
        raise typer.Exit(launch(gpus))
    loading()
    from ogreg_core.distributed import join
    from ogreg_core.evaluate_checkpoint import evaluate_checkpoint
    from ogreg_core.runs import RunFolder, find_checkpoint

    RunFolder.check_free(out)
    path = find_checkpoint(checkpoint)
    with join(device) as (world, chosen):
        if world.is_main:
            info(f"weights: {path}")
        with Reporter(silent=not world.is_main) as reporter:
            report = evaluate_checkpoint(
                path,
                data=data,
                split=split,
                clips=clips,
                crops=crops,
                control="none" if frame_order is FrameOrder.normal else frame_order.value,
                batch_size=batch_size,
                workers=default_loader_workers() if workers is None else workers,
                device=chosen,
                on_progress=reporter,
                world=world,
            )
    if not world.is_main:
        return
    report = report.expecting(expectations)
    run = RunFolder.create("eval", report.document["recipe"] or "checkpoint", out)
    show_report(report, run, json=json)


def show_report(report: EvaluationReport, run: RunFolder, *, json: bool) -> None:
    """Write a report's files, then show it.

    Raises:
        WorkFailed: an expectation was not met.
        typer.Exit: the same with ``--json``, whose one document says so.
    """
    report.write(run)
    missed = report.missed_expectations()
    if json:
        emit_json({**report.document, "report_folder": run.path})
        for sentence in missed:
            info(sentence)
        if missed:
            raise typer.Exit(WorkFailed.exit_code)
        return
    _print_report(report)
    result(f"reports: {run.path}")
    if missed:
        raise WorkFailed(
            "the score is not as expected",
            where=str(run.path / "report.json"),
            why="\n".join(missed),
        )


def _print_report(report: EvaluationReport) -> None:
    document, metrics = report.document, report.metrics
    low, high = document["top1_interval_pct"]
    result(f"{document['summary']}, 95 % interval {low:.1f} to {high:.1f}")
    low5, high5 = document["top5_interval_pct"]
    print_table(
        f"{document['model']} on {document['dataset']}/{document['split']}",
        ["top-1", "top-5", "mean class", "calibration error", "loss", "videos"],
        [
            [
                f"{metrics.top1:.2f} % ({low:.1f} to {high:.1f})",
                f"{metrics.top5:.2f} % ({low5:.1f} to {high5:.1f})",
                f"{metrics.mean_class:.2f} %",
                f"{metrics.ece:.2f} %",
                f"{metrics.loss:.4f}",
                _videos(report),
            ]
        ],
        right=(0, 1, 2, 3, 4, 5),
    )
    for item in document.get("expectations", []):
        if item["met"]:
            result(f"as expected: {item['expected']}, reached {item['reached_pct']:.2f}")
    for video in report.scores.unreadable:
        info(f"counted as wrong: {video.reason}")


def _videos(report: EvaluationReport) -> str:
    """How many videos the figures stand for, and of how many annotated ones."""
    count = thousands(report.metrics.videos)
    if report.metrics.unreadable:
        count += f", {report.metrics.unreadable} of them unreadable and counted as wrong"
    share = report.document["coverage_pct"]
    if share is None:
        return count
    return f"{count} ({share:.1f} % of {thousands(report.document['annotated_videos'])} annotated)"


def thousands(number: int) -> str:
    """With spaces: ``19 796``."""
    return f"{number:,}".replace(",", " ")
