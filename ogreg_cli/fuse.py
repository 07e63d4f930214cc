"""``ogreg fuse``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from ogreg_cli.common import Json
from ogreg_cli.console import info, loading
from ogreg_cli.evaluate import show_report, tracked
from ogreg_core.errors import UsageError

EXAMPLES = (
    "Examples: ogreg fuse runs/eval/demo/1 runs/eval/demo/2 | "
    "ogreg fuse runs/eval/demo/1 runs/eval/demo/2 --weights 1,2 --json"
)


def fuse(
    evaluations: Annotated[
        list[Path],
        typer.Argument(
            help="Two or more folders of evaluations, or their scores.", metavar="EVAL EVAL..."
        ),
    ],
    weights: Annotated[
        str | None,
        typer.Option(help="Weight of each, for example 1,2; default: all alike.", metavar="W,W..."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the reports instead of runs/fuse/DATASET/N.")
    ] = None,
    json: Json = False,
) -> None:
    """Late fusion: score the weighted mean of saved scores, without any model."""
    if len(evaluations) < 2:
        raise UsageError("fusion needs at least two evaluations", fix="ogreg fuse --help")
    shares = _weights(weights, len(evaluations))
    from ogreg_core.runs import RunFolder

    RunFolder.check_free(out)
    loading()
    from ogreg_core.evaluation_report import EvaluationReport
    from ogreg_core.saved_scores import fuse as fuse_scores
    from ogreg_core.saved_scores import read_scores

    members = [read_scores(path) for path in evaluations]
    names = [str(path) for path in evaluations]
    saved, partly = fuse_scores(members, shares, names)
    if partly:
        info(f"videos with a score in some of the evaluations only, which is taken: {partly}")
    run = RunFolder.create("fuse", saved.about["dataset"] or "scores", out)
    with tracked(run, "fuse", saved.about):
        report = EvaluationReport.of(saved).finished()
        report.write(run)
    show_report(report, run, json=json)


def _weights(text: str | None, count: int) -> list[float]:
    """``1,2`` as shares that sum to 1.

    Raises:
        UsageError: not so many numbers, or no positive ones.
    """
    if text is None:
        return [1 / count] * count
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError:
        weights = []
    fine = all(weight >= 0 and math.isfinite(weight) for weight in weights) and sum(weights) > 0
    if len(weights) != count or not fine:
        raise UsageError(
            f"--weights {text!r} does not fit {count} evaluations",
            why="it is a number of at least 0 for each, with commas between, not all 0",
            fix=f"--weights {','.join(['1'] * count)}",
        )
    return [weight / sum(weights) for weight in weights]
