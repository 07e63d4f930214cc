"""Options that several commands share."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ogreg_cli.console import info
from ogreg_core.errors import CheckpointError, EnvironmentFault, UsageError
from ogreg_core.pretrained import BUILT_IN, check_pretrained

if TYPE_CHECKING:
    from ogreg_core.inference import Predictor

Json = Annotated[
    bool, typer.Option("--json", help="One JSON document on stdout instead of a table.")
]
Device = Annotated[
    str, typer.Option("--device", help="auto, cpu, cuda, cuda:1 ...", metavar="DEVICE")
]
Workers = Annotated[
    int | None,
    typer.Option("--workers", min=0, help="Loader processes; default: up to four.", metavar="N"),
]
Gpus = Annotated[
    int | None,
    typer.Option(
        "--gpus",
        min=1,
        help="Processes on this machine, one per GPU; with --device cpu, CPU processes.",
        metavar="N",
    ),
]
Checkpoint = Annotated[
    str | None,
    typer.Option(
        "--checkpoint",
        "-c",
        help="Checkpoint file or run folder. Default: $OGREG_CHECKPOINT, else the weights in the package.",
        metavar="FILE|RUN",
    ),
]
Pretrained = Annotated[
    bool,
    typer.Option(
        "--pretrained",
        help="With --model: torchvision's weights for Kinetics-400, from its cache or the network.",
    ),
]
PretrainedModel = Annotated[
    str | None,
    typer.Option("--model", help="Model whose published weights to use.", metavar="NAME"),
]

Option = Annotated[
    list[str] | None,
    typer.Option(
        "--option", help="Architecture choice, e.g. stem=patch; repeatable.", metavar="KEY=VALUE"
    ),
]
Select = Annotated[
    list[str] | None,
    typer.Option(
        "--select",
        help="Token selection: keep that share of the frames (time) or of each frame (space) before that "
        "stage or block, e.g. time:1:0.5; repeatable.",
        metavar="KIND:PLACE:RATIO",
    ),
]


def is_typed(ctx: typer.Context, name: str) -> bool:
    """Whether an option was given, rather than left at its default."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def read_options(
    model: str, option: Sequence[str] | None, select: Sequence[str] | None
) -> dict[str, Any]:
    """Options of a model as a checkpoint would hold them, out of ``--option`` and ``--select``.

    Raises:
        UsageError: not of their form, or not for this model.
    """
    from ogreg_core.recipe import parse_model_options

    options = parse_model_options(model, option or [])
    if select:
        options["token_selection"] = _selection_of(model, select)
    return options


def _selection_of(model: str, texts: Sequence[str]) -> dict[str, Any]:
    """Token selection out of ``time:1:0.5``, as a recipe would hold it."""
    from pydantic import ValidationError

    from ogreg_core.models.registry import check_places
    from ogreg_core.recipe_tables import TokenSelectionTable

    check_places(model)
    keeps: dict[str, list[dict[str, Any]]] = {}
    for text in texts:
        try:
            kind, place, ratio = text.split(":")
            keeps.setdefault(kind, []).append({"before": int(place), "ratio": float(ratio)})
            TokenSelectionTable.model_validate(keeps)
        except (ValueError, ValidationError) as error:
            raise UsageError(
                f"--select {text} is not of the form KIND:PLACE:RATIO",
                why="KIND is time or space, PLACE a number from 0, RATIO a share up to 1",
                fix="--select time:1:0.5",
            ) from error
    return TokenSelectionTable.model_validate(keeps).model_dump()


def check_new_file(out: Path | None, option: str = "--out") -> None:
    """Refuse a file that cannot or must not be written, before any work is done.

    Args:
        out: the file; None is none.
        option: which names it.

    Raises:
        UsageError: it exists, or its folder does not.
        EnvironmentFault: nothing may be written there.
    """
    if out is None:
        return
    if os.path.lexists(out):
        raise UsageError(f"{out} exists already", fix=f"choose another {option}")
    above = next(folder for folder in out.parents if os.path.lexists(folder))
    if not above.is_dir():
        raise UsageError(f"{above} is a file, not a folder", fix=f"choose another {option}")
    if above != out.parent:
        raise UsageError(
            f"the folder {out.parent} does not exist",
            fix=f"mkdir -p {shlex.quote(str(out.parent))}",
        )
    if not os.access(above, os.W_OK | os.X_OK):
        raise EnvironmentFault(f"no permission for {above}", fix=f"choose another {option}")


def default_loader_workers() -> int:
    """Enough processes to keep the model busy, no more than there are cores for every process of
    the job on this machine.
    """
    from ogreg_core.processes import default_workers

    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(4, default_workers() // sharing))


def choose_checkpoint(given: str | None) -> tuple[Path, str]:
    """The checkpoint file to use and the words for where it came from.

    Raises:
        CheckpointError: the given one does not exist.
    """
    from ogreg_core.runs import find_checkpoint

    if given:
        path, origin = find_checkpoint(given), "--checkpoint"
    elif variable := os.environ.get("OGREG_CHECKPOINT"):
        path, origin = find_checkpoint(variable), "$OGREG_CHECKPOINT"
    else:
        return BUILT_IN, "ogreg-n on sixteen motions of drawn shapes; knows no human actions"
    if not path.is_file():
        raise CheckpointError(
            f"checkpoint {path} does not exist", where=origin, fix="check the path"
        )
    return path, origin


@dataclass(frozen=True)
class Weights:
    """What is to predict: a checkpoint, or published weights of a model.

    Args:
        path: checkpoint file; None for published weights.
        model: whose published weights; empty for a checkpoint.
        origin: words for where they come from.
    """

    path: Path | None
    model: str
    origin: str

    @property
    def name(self) -> str:
        """For people and documents; a file in the package has no place that means anything."""
        if self.path is None:
            return f"{self.model}, published"
        return "built in" if self.path == BUILT_IN else str(self.path)

    def load(self, device: str) -> Predictor:
        """The predictor; says in one line which weights speak. Torch is imported before.

        Raises:
            UsageError: no published weights of this model.
            CheckpointError: missing or broken.
            EnvironmentFault: no such device.
        """
        from ogreg_core.devices import pick_device
        from ogreg_core.inference import Predictor
        from ogreg_core.pretrained import load_pretrained

        chosen = pick_device(device)
        if self.path is None:
            predictor = Predictor(*load_pretrained(self.model), chosen)
        else:
            predictor = Predictor.from_checkpoint(self.path, chosen)
        info(f"weights: {self.name} ({self.origin})")
        return predictor


def choose_weights(checkpoint: str | None, model: str | None, pretrained: bool) -> Weights:
    """What is to predict, out of ``--checkpoint``, ``--model`` and ``--pretrained``.

    Raises:
        UsageError: they contradict each other, or there are no published weights.
        CheckpointError: the checkpoint does not exist.
    """
    if not (pretrained or model):
        path, origin = choose_checkpoint(checkpoint)
        return Weights(path, "", origin)
    if checkpoint:
        raise UsageError("--checkpoint and --pretrained exclude each other")
    if not (pretrained and model):
        raise UsageError(
            "--model and --pretrained go together",
            why="a model has no weights by itself",
            fix="--model swin3d-t --pretrained, or --checkpoint FILE",
        )
    check_pretrained(model)
    return Weights(None, model, "torchvision's for Kinetics-400, --pretrained")
