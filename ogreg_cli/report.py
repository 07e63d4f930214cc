"""``ogreg report``."""

from __future__ import annotations

import shlex
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ogreg_cli.common import Json
from ogreg_cli.console import loading, result
from ogreg_core.errors import UsageError

EXAMPLES = (
    "Examples: ogreg report runs/eval/demo | ogreg report runs/eval --out table.tex | "
    "ogreg report runs/train/demo/1 runs/train/demo/2 --format csv"
)

_ENDINGS = {
    ".md": "markdown",
    ".markdown": "markdown",
    ".csv": "csv",
    ".tex": "latex",
    ".json": "json",
}


class Format(str, Enum):
    """What the table is written in."""

    markdown = "markdown"
    csv = "csv"
    latex = "latex"
    json = "json"


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Run folders, or folders with runs in them.", metavar="RUN..."),
    ],
    format: Annotated[
        Format | None, typer.Option(help="Default: by the ending of --out, else markdown.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="File .md, .csv, .tex or .json instead of stdout."),
    ] = None,
    json: Json = False,
) -> None:
    """Write the table of a paper: a row per experiment and protocol, seeds averaged.

    Model, parameters, multiply-adds x views, top-1 and top-5, protocol, coverage, seeds. A training
    counts by its best checkpoint unless that has been evaluated. Runs that are not finished are listed
    below with the reason.
    """
    chosen = _choose(format, out, json)
    _check_out(out)
    loading()
    from ogreg_core.files import write_text_atomic
    from ogreg_core.report import build_report
    from ogreg_core.report_formats import render

    text = render(build_report(runs), chosen)
    if out is None:
        result(text.rstrip("\n"))
    else:
        write_text_atomic(out, text)
        result(str(out))


def _choose(format: Format | None, out: Path | None, json: bool) -> str:
    """The format by --format, --json and the ending of --out, which must not contradict each other."""
    ending = _ENDINGS.get(out.suffix.lower(), "") if out else ""
    if out is not None and not ending:
        raise UsageError(f"--out {out} has no known ending", why=f"known: {', '.join(_ENDINGS)}")
    wanted = {"json" if json else "", format.value if format else "", ending} - {""}
    if len(wanted) > 1:
        raise UsageError(
            f"{' and '.join(sorted(wanted))} contradict each other",
            why="--format, --json and the ending of --out all say what to write",
        )
    return wanted.pop() if wanted else "markdown"


def _check_out(out: Path | None) -> None:
    """Refuse a file that cannot or must not be written, before any work is done."""
    if out is None:
        return
    if out.exists():
        raise UsageError(f"{out} exists", fix="choose another --out")
    if not out.parent.is_dir():
        raise UsageError(
            f"the folder {out.parent} does not exist",
            fix=f"mkdir -p {shlex.quote(str(out.parent))}",
        )
