"""``ogreg evidence``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ogreg_cli.common import Device, Json
from ogreg_cli.console import Reporter, emit_json, info, loading, print_table, result
from ogreg_core.errors import UsageError

if TYPE_CHECKING:
    from ogreg_core.evidence.runner import Plan
    from ogreg_core.evidence.training import Means

EXAMPLES = (
    "Examples: ogreg evidence models data/demo-hard ~/depth | "
    "ogreg evidence ablations data/demo-hard --rows 'OG-ReG,Gaze 2-D' --seeds 0 | "
    "ogreg evidence my-study.toml ~/videos --report"
)


def evidence(
    study: Annotated[
        str,
        typer.Argument(
            help="models, ablations, gaze, tokens, frame-times, budget, or a TOML file.",
            metavar="STUDY",
        ),
    ],
    data: Annotated[
        list[Path],
        typer.Argument(
            help="Folders of prepared data sets; rates are tuned on the first.", metavar="DATA..."
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of results and runs, shared by studies.")
    ] = Path("runs/evidence"),
    rows: Annotated[
        str | None, typer.Option(help="Only these rows, with commas between.", metavar="NAME,...")
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(help="Only these seeds, e.g. 0,1.", metavar="N,...")
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Trainings at a time, one thread each; 0: one, with all threads. "
            "Default: one per core, on a GPU 0.",
            metavar="N",
        ),
    ] = None,
    device: Device = "auto",
    retry: Annotated[bool, typer.Option("--retry", help="Run those again that failed.")] = False,
    report: Annotated[
        bool, typer.Option("--report", help="Train nothing; report what there is.")
    ] = False,
    json: Json = False,
) -> None:
    """Train the rows of a study on equal terms, several seeds each, and report what they show.

    Learning rates are tuned on clips held out of the training split. What has ended is kept in
    OUT/results.jsonl and not trained again; a study that was stopped goes on where it was.
    """
    from ogreg_core.evidence.study import load_study

    name, recipe, found = load_study(study)
    wanted = _names(rows, [row.name for row in found.rows])
    numbers = _numbers(seeds, found.tuning.seed)
    if report and retry:
        raise UsageError("--report and --retry exclude each other", why="--report trains nothing")
    loading()
    from ogreg_core.evidence.runner import DataSet, Plan, run_study

    sets = [DataSet.open(folder) for folder in data]
    _refuse_same(sets)
    plan = Plan(found, recipe, sets, out, wanted, numbers)
    if not report:
        with Reporter() as reporter:
            run_study(
                plan, _means(device, jobs), retry=retry, command=_command(), on_progress=reporter
            )
    _report(name, plan, json)


def _names(text: str | None, known: list[str]) -> list[str]:
    from ogreg_core.models.registry import nearest

    names = [part.strip() for part in text.split(",")] if text else []
    for name in names:
        if name not in known:
            hint = nearest(name, known) or f"rows: {', '.join(known)}"
            raise UsageError(f"the study has no row {name!r}", why=hint)
    return names


def _numbers(text: str | None, tuning: int) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")] if text else []
    except ValueError:
        raise UsageError(f"--seeds {text!r} are no numbers", fix="--seeds 0,1,2") from None
    if len(set(numbers)) < len(numbers) or tuning in numbers:
        why = f"each counts once, and {tuning} is the tuning's own"
        raise UsageError(f"--seeds {text} cannot be used", why=why, fix="--seeds 0,1,2")
    return numbers


def _refuse_same(sets: list[Any]) -> None:
    """Results are kept by the name of the data set."""
    names = [item.name for item in sets]
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice:
        folders = [str(item.folder) for item in sets if item.name == twice[0]]
        raise UsageError(
            f"two data sets are called {twice[0]}",
            why=" and ".join(folders),
            fix="ogreg prepare folder FOLDER --name ANOTHER",
        )


def _means(device: str, jobs: int | None) -> Means:
    """One thread for each of several trainings wastes nothing on small layers; a GPU trains one at a
    time, with processes that load for it.
    """
    from ogreg_cli.common import default_loader_workers
    from ogreg_core.devices import pick_device
    from ogreg_core.evidence.training import Means
    from ogreg_core.processes import default_workers

    chosen = pick_device(device)
    if jobs is None:
        jobs = default_workers() if chosen.type == "cpu" else 0
    if jobs == 0:
        return Means(str(chosen), 0, 0, default_loader_workers())
    return Means(str(chosen), jobs, 1, 0)


def _report(name: str, plan: Plan, json: bool) -> None:
    from ogreg_core.evidence.report import summary_of, write_report
    from ogreg_core.evidence.tables import terminal_tables

    summary = summary_of(name, plan)
    command = _repeating()
    whole = plan.rows == plan.study.rows and set(plan.seeds) >= set(plan.study.seeds)
    files = write_report(summary, plan.out, name if whole else f"{name}-part", command)
    if json:
        emit_json(summary.document(command))
        return
    for table in terminal_tables(summary):
        print_table(table.title, table.header, table.rows, right=table.right)
        for note in table.notes:
            info(note)
    for file in files:
        result(f"written: {file}")


def _command() -> str:
    return shlex.join(["ogreg", *sys.argv[1:]])


def _repeating() -> str:
    """The command line without what only says how to look at its result."""
    return shlex.join(["ogreg", *(a for a in sys.argv[1:] if a not in ("--report", "--json"))])
