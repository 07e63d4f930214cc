"""``ogreg eval``."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ogreg_cli.common import Device, Gpus, Json, Workers, default_loader_workers
from ogreg_cli.console import Reporter, emit_json, explain, info, loading, print_table, result
from ogreg_cli.launch import launch, wants_launch
from ogreg_core.errors import CheckpointError, Interrupted, UsageError, WorkFailed
from ogreg_core.progress import Note, Progress
from ogreg_core.run_records import share_text, thousands

if TYPE_CHECKING:
    from ogreg_core.evaluation_report import EvaluationReport
    from ogreg_core.runs import RunFolder
    from ogreg_core.signals import StopRequest

EXAMPLES = (
    "Examples: ogreg eval runs/train/demo/1 | ogreg eval best.safetensors --data data/demo --clips 4 --crops 3 | "
    "ogreg eval runs/train/demo/1 --frame-order shuffled | ogreg eval runs/train/demo/1 --expect 'top1>=90'"
)

_NOTHING = "–"


class FrameOrder(str, Enum):
    """Which of a clip's frames the model gets, and in which order."""

    normal = "normal"
    shuffled = "shuffled"
    reversed = "reversed"
    middle = "middle"
    half = "half"
    double = "double"
    irregular = "irregular"


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
        typer.Option(
            "--frame-order",
            "--frames-as",
            help="Control: shuffled or reversed frames, or the middle one repeated; or another rate over "
            "the same span: half or double as many frames, or as many at irregular times.",
        ),
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
    from ogreg_core.runs import RunFolder

    if crops == 2:
        raise UsageError("--crops is 1 (centre) or 3 (start, centre, end)")
    expectations = [parse_expectation(text) for text in expect or []]
    RunFolder.check_free(out)
    if gpus is not None and wants_launch(gpus):
        raise typer.Exit(launch(gpus))
    loading()
    from ogreg_core.distributed import join
    from ogreg_core.evaluate_checkpoint import open_evaluation
    from ogreg_core.signals import StopRequest

    path = _find_checkpoint(checkpoint)
    count = default_loader_workers() if workers is None else workers
    with join(device) as (world, chosen):
        evaluation = open_evaluation(
            path,
            data=data,
            split=split,
            clips=clips,
            crops=crops,
            control="none" if frame_order is FrameOrder.normal else frame_order.value,
            device=chosen,
        )
        about = evaluation.about()
        info(f"weights: {path}")
        run = world.on_main(lambda: RunFolder.create("eval", about["recipe"] or "checkpoint", out))
        written = run if world.is_main else None
        with tracked(written, "eval", about), StopRequest() as stop:
            with Reporter(silent=not world.is_main) as reporter:
                report = evaluation.score(
                    batch_size=batch_size,
                    workers=count,
                    on_progress=lambda event: _heed(stop, reporter, event),
                    world=world,
                )
            report = report.expecting(expectations).finished()
            if written is not None:
                report.write(written)
    if written is not None:
        show_report(report, written, json=json)


def _find_checkpoint(given: str) -> Path:
    """The checkpoint file meant; of an evaluation's folder the one that it scored is named.

    Raises:
        CheckpointError: nothing there.
    """
    from ogreg_core.run_records import read_run
    from ogreg_core.runs import find_checkpoint

    try:
        return find_checkpoint(given)
    except CheckpointError as error:
        run = read_run(Path(given))
        scored = str(run.report.get("checkpoint") or "") if run and run.kind == "eval" else ""
        fix = f"ogreg eval {shlex.quote(scored)}" if scored else "ogreg runs"
        raise CheckpointError(error.what, why=error.why, fix=error.fix or fix) from error


def _heed(stop: StopRequest, reporter: Reporter, event: Progress | Note) -> None:
    """Pass an event on; between two batches is the time to stop.

    Raises:
        Interrupted: a signal asked for it.
    """
    reporter(event)
    if stop.number:
        raise Interrupted("stopped; nothing was scored", signal_number=stop.number)


@contextmanager
def tracked(run: RunFolder | None, command: str, about: Mapping[str, Any]) -> Iterator[None]:
    """Let a run folder tell what is done in it, and how that ended unless it went well.

    ``command.txt``, ``env.json``, ``data.json`` and ``status.json``, as of a training.

    Args:
        run: the folder; None for processes that write nothing.
        command: ``eval`` or ``fuse``.
        about: circumstances of the scores.
    """
    if run is None:
        yield
        return
    from ogreg_core.runs import environment

    try:
        run.note_command()
        run.write_json("env.json", environment())
        keys = ("checkpoint", "model", "recipe", "dataset", "split", "manifest_sha256", "protocol")
        run.write_json("data.json", {"command": command, **{key: about.get(key) for key in keys}})
        run.status("running", 0)
        yield
    except BaseException as error:
        known = explain(error)
        state = "interrupted" if isinstance(known, Interrupted) else "failed"
        # A full disk may be what went wrong: the first error is the one to be told.
        with suppress(OSError):
            run.status(state, known.exit_code, known.what)
        raise


def show_report(report: EvaluationReport, run: RunFolder, *, json: bool) -> None:
    """Show a report that has been written, and note in its folder how it ended.

    Raises:
        WorkFailed: an expectation was not met.
        typer.Exit: the same with ``--json``, whose one document says so.
    """
    missed = report.missed_expectations()
    if missed:
        run.status("failed", WorkFailed.exit_code, "; ".join(missed))
    else:
        run.status("done", 0)
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
    top5 = _NOTHING
    if document["top5_pct"] is not None:
        low5, high5 = document["top5_interval_pct"]
        top5 = f"{metrics.top5:.2f} % ({low5:.1f} to {high5:.1f})"
    print_table(
        f"{document['model']} on {document['dataset']}/{document['split']}",
        ["top-1", "top-5", "mean class", "calibration error", "loss", "videos"],
        [
            [
                f"{metrics.top1:.2f} % ({low:.1f} to {high:.1f})",
                top5,
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
    annotated = report.document["annotated_videos"]
    if not annotated:
        return count
    if annotated < report.metrics.videos:
        return f"{count} (the annotations list only {thousands(annotated)})"
    share = share_text(report.document["scored_videos"], annotated)
    return f"{count} ({share} of {thousands(annotated)} annotated)"
