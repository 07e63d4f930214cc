"""The complete state of a training, for resuming: plain tensors and numbers, loaded without running
code.

No state of a random generator is among it: everything drawn is a function of the seed and of the
place in the training.
"""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ogreg_core.errors import CheckpointError
from ogreg_core.files import write_atomic

__all__ = ["Position", "differences", "load_state", "save_state"]

_SHOWN_DIFFERENCES = 8


@dataclass
class Position:
    """Where a training stands.

    Args:
        epoch: epochs finished.
        batch: steps of the current epoch that are done.
        step: optimiser steps in total.
        best_top1: best validation top-1 so far, percent.
        best_epoch: the epoch that reached it.
        validations: made so far.
        seconds: training time so far.
        loss_sum, correct, clips: over the current epoch, for its mean loss and top-1.
        unreadable: videos of the current epoch that could not be read.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    best_top1: float = -1.0
    best_epoch: int = 0
    validations: int = 0
    seconds: float = 0.0
    loss_sum: float = 0.0
    correct: int = 0
    clips: int = 0
    unreadable: int = 0

    def start_epoch(self, finished: int) -> None:
        """Begin to count anew after ``finished`` epochs."""
        self.epoch = finished
        self.batch = self.correct = self.clips = self.unreadable = 0
        self.loss_sum = 0.0


def save_state(
    path: Path, position: Position, identity: dict[str, Any], parts: dict[str, Any]
) -> None:
    """Write one self-contained file atomically: a kill leaves the previous one.

    Args:
        path: target.
        position: where the training stands.
        identity: what it must agree in to be continued, by name.
        parts: state dicts of everything that moves.
    """
    content = {"position": asdict(position), "identity": identity, "parts": parts}
    write_atomic(path, lambda temporary: torch.save(content, temporary))


def load_state(path: Path, identity: dict[str, Any]) -> tuple[Position, dict[str, Any]]:
    """Read a state file for a training that agrees in everything with the one that wrote it.

    Raises:
        CheckpointError: missing, broken, or of another training; says in what they differ.
    """
    run = path.parent.parent
    if not path.is_file():
        raise CheckpointError(f"{run} has no state to resume from", why=f"{path} does not exist")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        before = content["identity"]
        position = Position(**content["position"])
        parts = content["parts"]
    except (
        Exception
    ) as error:  # torch.load raises from several families; each means an unusable file
        raise CheckpointError(f"{path} cannot be read", why=str(error).splitlines()[0]) from error
    found = differences(before, identity)
    if found:
        rest = len(found) - _SHOWN_DIFFERENCES
        raise CheckpointError(
            f"{run} cannot be continued: it began with other settings or data",
            why="\n".join(found[:_SHOWN_DIFFERENCES] + ([f"and {rest} more"] if rest > 0 else [])),
            fix="restore them, or take its weights into a new run: ogreg train RECIPE "
            f"--init-from {shlex.quote(str(run))}",
        )
    return position, parts


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What has changed from one identity to another, one sentence each."""
    nothing = "nothing"
    return [
        f"{name}: {before.get(name, nothing)} then, {now.get(name, nothing)} now"
        for name in {**before, **now}
        if before.get(name, nothing) != now.get(name, nothing)
    ]
