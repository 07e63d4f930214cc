"""The Typer app. A command's module is imported when the command is called, not before: help, completion
and usage errors need no more than the tables below.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from ogreg_core import __version__
from ogreg_core.launching import is_silent

__all__ = ["COMMANDS", "DATA_COMMANDS", "app"]

# Boxes and colours where a person reads; plain lines where a log or a pipe does.
_MARKUP = "rich" if sys.stdout.isatty() else None
_HELP_OPTIONS = {"help_option_names": ["-h", "--help"]}

# By name, in the order of the help: module and function, and the first paragraph of its docstring.
COMMANDS = {
    "prepare": (
        "prepare:prepare",
        "Make a data set ready: match annotations and files, check each file, write the "
        "manifest. Your videos are never changed.",
    ),
    "train": (
        "train:train",
        "Train a model by a recipe, validate it, and keep everything in a run folder.",
    ),
    "eval": (
        "evaluate:evaluate",
        "Score a checkpoint on a prepared data set: top-1, top-5, mean-class accuracy, "
        "calibration, per class and per video. Scores are saved for `ogreg compare` and "
        "`ogreg fuse`.",
    ),
    "compare": (
        "compare:compare",
        "Compare two evaluations video by video: the difference with Tango's 95 % interval, "
        "McNemar's exact test, and which videos changed. A video that one could not read is "
        "wrong there.",
    ),
    "fuse": (
        "fuse:fuse",
        "Late fusion: score the weighted mean of saved scores, without any model.",
    ),
    "profile": (
        "profile:profile",
        "Cost of a model: parameters, multiply-adds, latency, throughput, peak memory.",
    ),
    "predict": (
        "predict:predict",
        "Name the action in video files, or the class of images; with --timeline, what happens "
        "when in long videos.",
    ),
    "visualize-gaze": (
        "visualize_gaze:visualize_gaze",
        "Draw what the model looks at: an overlay video, and a sheet with gaze, glance, "
        "d[t] and m[t].",
    ),
    "models": (
        "models:models",
        "List the models by name: usual input, parameters, GFLOPs, pretrained weights, source.",
    ),
    "convert": (
        "convert:convert",
        "Turn a foreign checkpoint into one of ours, which describes its model, labels and "
        "protocol.",
    ),
    "export": (
        "export:export",
        "Write a checkpoint as a program that runs without ogreg: torch.export or ONNX, with "
        "labels and preprocessing inside, compared with the model before it is kept.",
    ),
    "runs": (
        "runs:runs",
        "List training and evaluation runs with their scores, whatever state they are in.",
    ),
    "evidence": (
        "evidence:evidence",
        "Train the rows of a study on equal terms, several seeds each, and report what they show.",
    ),
    "report": (
        "report:report",
        "Write the table of a paper: a row per experiment and protocol, seeds averaged.",
    ),
}
DATA_COMMANDS = {
    "show": (
        "data:show",
        "Draw training samples as the model gets them, and test views, with labels and timings.",
    ),
}


class _Deferred(TyperCommand):
    """Stands for a command in help and completion, and makes way for it when it is called."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any
    ) -> Any:
        assert self.name is not None
        return _load(self.name).make_context(info_name, args, parent, **extra)


class _Group(TyperGroup):
    """Typer's group, whose own flags are off where Typer leaves them None."""

    def get_params(self, ctx: Any) -> list[Any]:
        # --help and those of completion. To convert None, Typer imports pydantic: 60 ms on each call.
        params = super().get_params(ctx)
        for option in params:
            if getattr(option, "is_flag", False) and option.default is None:
                option.default = False
        return params


def _load(name: str) -> Any:
    """The command proper, out of its module, which also holds its examples."""
    module_name, function = (COMMANDS | DATA_COMMANDS)[name][0].split(":")
    module = importlib.import_module(f"ogreg_cli.{module_name}")
    alone = typer.Typer(
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=_MARKUP,  # type: ignore[arg-type]
    )
    alone.command(name, epilog=module.EXAMPLES)(getattr(module, function))
    return typer.main.get_command(alone)


def _defer(group: typer.Typer, commands: Mapping[str, tuple[str, str]]) -> None:
    """Add commands by what the tables say of them."""
    for name, (_, summary) in commands.items():
        group.command(name, cls=_Deferred, help=summary)(_never_called)


def _never_called() -> None:
    raise AssertionError("a deferred command makes the context of the command proper")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ogreg {__version__}")
        raise typer.Exit


app = typer.Typer(
    name="ogreg",
    cls=_Group,
    help="Video action recognition from the shell: prepare, train, evaluate, profile, predict, look.",
    epilog="Start here: ogreg train recipes/demo.toml",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=_MARKUP,  # type: ignore[arg-type]
    context_settings=_HELP_OPTIONS,
)


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
    from ogreg_cli.console import settings

    # Of several processes of a job one speaks.
    settings.quiet = quiet or is_silent()
    settings.verbose = verbose


data_app = typer.Typer(
    cls=_Group,
    help="Look at data as a model is trained and tested on them.",
    epilog="Start here: ogreg data show recipes/demo.toml",
    no_args_is_help=True,
    rich_markup_mode=_MARKUP,  # type: ignore[arg-type]
    context_settings=_HELP_OPTIONS,
)
_defer(app, COMMANDS)
_defer(data_app, DATA_COMMANDS)
app.add_typer(data_app, name="data")
