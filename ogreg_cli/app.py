"""The Typer app. Imports nothing heavy: help and usage errors never load torch."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from ogreg_cli import (
    compare,
    convert,
    data,
    evaluate,
    fuse,
    models,
    predict,
    prepare,
    profile,
    report,
    runs,
    train,
    visualize_gaze,
)
from ogreg_cli.console import settings
from ogreg_core import __version__
from ogreg_core.launching import is_silent

# Boxes and colours where a person reads; plain lines where a log or a pipe does.
_MARKUP = "rich" if sys.stdout.isatty() else None

app = typer.Typer(
    name="ogreg",
    help="Video action recognition from the shell: prepare, train, evaluate, profile, predict, look.",
    epilog="Start here: ogreg train recipes/demo.toml",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=_MARKUP,  # type: ignore[arg-type]
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ogreg {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only results and errors.")] = False,
    verbose: Annotated[
        bool,
        typer.Option("--verbose", "-v", help="Progress lines every two seconds; nothing abridged."),
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if quiet and verbose:
        raise typer.BadParameter("--quiet and --verbose exclude each other")
    # Of several processes of a job one speaks.
    settings.quiet = quiet or is_silent()
    settings.verbose = verbose


app.command("prepare", epilog=prepare.EXAMPLES)(prepare.prepare)
app.command("train", epilog=train.EXAMPLES)(train.train)
app.command("eval", epilog=evaluate.EXAMPLES)(evaluate.evaluate)
app.command("compare", epilog=compare.EXAMPLES)(compare.compare)
app.command("fuse", epilog=fuse.EXAMPLES)(fuse.fuse)
app.command("profile", epilog=profile.EXAMPLES)(profile.profile)
app.command("predict", epilog=predict.EXAMPLES)(predict.predict)
app.command("visualize-gaze", epilog=visualize_gaze.EXAMPLES)(visualize_gaze.visualize_gaze)
app.command("models", epilog=models.EXAMPLES)(models.models)
app.command("convert", epilog=convert.EXAMPLES)(convert.convert)
app.command("runs", epilog=runs.EXAMPLES)(runs.runs)
app.command("report", epilog=report.EXAMPLES)(report.report)

data_app = typer.Typer(
    help="Look at data as a model is trained and tested on them.",
    epilog="Start here: ogreg data show recipes/demo.toml",
    no_args_is_help=True,
    rich_markup_mode=_MARKUP,  # type: ignore[arg-type]
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app.command("show", epilog=data.EXAMPLES)(data.show)
app.add_typer(data_app, name="data")
