"""Options that several commands share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from ogreg_core.errors import CheckpointError

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
        help="Checkpoint file or run folder. Default: $OGREG_CHECKPOINT, else the newest run under runs/train.",
        metavar="FILE|RUN",
    ),
]


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
        CheckpointError: none given and none found, or the given one does not exist.
    """
    from ogreg_core.runs import find_checkpoint

    if given:
        path, origin = find_checkpoint(given), "--checkpoint"
    elif variable := os.environ.get("OGREG_CHECKPOINT"):
        path, origin = find_checkpoint(variable), "$OGREG_CHECKPOINT"
    else:
        found = [*Path("runs/train").glob("*/*/checkpoints/best.safetensors")]
        if not found:
            raise CheckpointError(
                "there are no weights to use",
                why="no --checkpoint, no $OGREG_CHECKPOINT, no finished run under runs/train",
                fix="ogreg train recipes/demo.toml, or --checkpoint FILE",
            )
        path, origin = (
            max(found, key=lambda file: file.stat().st_mtime),
            "newest run under runs/train",
        )
    if not path.is_file():
        raise CheckpointError(
            f"checkpoint {path} does not exist", where=origin, fix="check the path"
        )
    return path, origin
