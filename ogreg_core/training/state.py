"""The complete state of a training, for resuming: plain tensors and numbers, loaded without running
code.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ogreg_core.errors import CheckpointError
from ogreg_core.files import write_atomic

__all__ = ["Position", "load_state", "random_states", "restore_random_states", "save_state"]


@dataclass
class Position:
    """Where a training stands.

    Args:
        epoch: epochs finished.
        batch: batches of the current epoch that are done.
        step: optimiser steps in total.
        best_top1: best validation top-1 so far, percent.
        best_epoch: the epoch that reached it.
        seconds: training time so far.
        loss_sum, clips: over the current epoch, for its mean loss.
        unreadable: videos of the current epoch that could not be read.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    best_top1: float = -1.0
    best_epoch: int = 0
    seconds: float = 0.0
    loss_sum: float = 0.0
    clips: int = 0
    unreadable: int = 0

    def start_epoch(self, finished: int) -> None:
        """Begin to count anew after ``finished`` epochs."""
        self.epoch = finished
        self.batch = self.clips = self.unreadable = 0
        self.loss_sum = 0.0


def random_states() -> dict[str, torch.Tensor]:
    """States of torch's global generators; every sample's augmentation has a seed of its own and
    needs none.
    """
    states = {"cpu": torch.get_rng_state()}
    for device in range(torch.cuda.device_count()):
        states[f"cuda{device}"] = torch.cuda.get_rng_state(device)
    return states


def restore_random_states(states: dict[str, torch.Tensor]) -> None:
    """Undo :func:`random_states`; devices that are not there are left out."""
    torch.set_rng_state(states["cpu"])
    for device in range(torch.cuda.device_count()):
        if f"cuda{device}" in states:
            torch.cuda.set_rng_state(states[f"cuda{device}"], device)


def save_state(path: Path, position: Position, parts: dict[str, Any]) -> None:
    """Write one self-contained file atomically: a kill leaves the previous one.

    Args:
        path: target.
        position: where the training stands.
        parts: state dicts of model, optimiser, schedule and scaler.
    """
    content = {"position": asdict(position), "random": random_states(), **parts}
    write_atomic(path, lambda temporary: torch.save(content, temporary))


def load_state(path: Path) -> tuple[Position, dict[str, Any]]:
    """Read a state file.

    Raises:
        CheckpointError: missing or broken.
    """
    if not path.is_file():
        raise CheckpointError(
            f"{path.parent.parent} has no state to resume from", why=f"{path} does not exist"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        return Position(**content.pop("position")), content
    except (
        Exception
    ) as error:  # torch.load raises from several families; each means an unusable file
        raise CheckpointError(f"{path} cannot be read", why=str(error).splitlines()[0]) from error
