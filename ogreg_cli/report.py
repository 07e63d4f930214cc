"""``ogreg report``."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ogreg_cli.common import Json, check_new_file
from ogreg_cli.console import emit_json, error_document, loading, result
from ogreg_core.errors import OgregError, UsageError

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
    try:
        _report(runs, format, out, json)
    except OgregError as error:
        # With --json the error becomes a document where all errors end.
        if format is Format.json and not json:
            emit_json(error_document(error))
        raise


def _report(runs: list[Path], format: Format | None, out: Path | None, json: bool) -> None:
    chosen = _choose(format, out, json)
    check_new_file(out)
    loading()
    from ogreg_core.files import write_text_atomic
    from ogreg_core.report import build_report
    from ogreg_core.report_formats import render

    text = render(build_report(runs), chosen)
    if out is not None:
        write_text_atomic(out, text)
    # With --json stdout holds one document, also beside a file.
    result(text.rstrip("\n") if out is None or json else str(out))


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
