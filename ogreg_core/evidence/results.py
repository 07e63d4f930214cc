"""The record of a study's trainings: one JSON line each, appended when it ends, well or not.

Results are found again by what was learnt, from what, and with which seed, so that studies share them
and an interrupted study goes on where it was.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ogreg_core.errors import DataError

__all__ = ["Identity", "Result", "append_result", "latest", "read_results"]

SCHEMA = "ogreg.evidence.v1"


@dataclass(frozen=True)
class Identity:
    """What makes two trainings the same one.

    Args:
        experiment: hash of what is learnt, see ``Recipe.experiment_sha256``.
        train, val: hashes of the manifests.
        seed: of the training.
    """

    experiment: str
    train: str
    val: str
    seed: int


@dataclass(frozen=True)
class Result:
    """How one training ended.

    Args:
        identity: see there.
        dataset: name of the data set; ``-tuning`` at its end if it was held out of the training split.
        model: registry name.
        changes: overrides of the shared recipe.
        lr: peak learning rate.
        clips: seen in training.
        status: ``done`` or ``failed``.
        reason: of a failure, one sentence.
        seconds: of training, without tests; on ``threads`` threads of ``device``.
        params: trainable numbers.
        gmacs: billions of multiply-adds of one view.
        loss: mean cross-entropy on the validation split, nats.
        right: by frame-order control, ``1`` or ``0`` per video in manifest order.
        made: versions and device.
    """

    identity: Identity
    dataset: str
    model: str
    changes: tuple[str, ...]
    lr: float
    clips: int
    status: str
    reason: str = ""
    seconds: float = 0.0
    params: int = 0
    gmacs: float = 0.0
    loss: float = 0.0
    right: dict[str, str] = field(default_factory=dict)
    made: dict[str, Any] = field(default_factory=dict)

    def top1(self, control: str = "none") -> float:
        """Percent of the videos, all of which count."""
        bits = self.right[control]
        return 100.0 * bits.count("1") / len(bits)

    @property
    def is_done(self) -> bool:
        return self.status == "done"


def append_result(file: Path, result: Result) -> None:
    """Write one line, in one call and flushed to the disk; a line that a kill cut off makes way."""
    line = json.dumps({"schema": SCHEMA, **asdict(result)})
    with open(file, "ab+") as out:
        out.seek(0)
        before = out.read()
        out.truncate(before.rfind(b"\n") + 1)
        out.write(line.encode() + b"\n")
        out.flush()
        os.fsync(out.fileno())


def read_results(file: Path) -> list[Result]:
    """All lines in order; none if the file is missing. A last line that a kill cut off is left out.

    Raises:
        DataError: another line is broken.
    """
    if not file.exists():
        return []
    lines = file.read_bytes().rstrip(b"\n").split(b"\n")
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(_parse(json.loads(line)))
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise DataError(
                f"{file} cannot be read",
                where=f"line {number}",
                why=str(error),
                fix="take that line out of it",
            ) from error
    return found


def _parse(values: dict[str, Any]) -> Result:
    known = {item.name for item in fields(Result)}
    rest = {key: value for key, value in values.items() if key in known}
    identity = Identity(**rest.pop("identity"))
    changes = tuple(rest.pop("changes"))
    return Result(identity=identity, changes=changes, **rest)


def latest(results: Iterable[Result]) -> dict[Identity, Result]:
    """The last line of each training that ended with a score, of the others the last one."""
    found: dict[Identity, Result] = {}
    for result in results:
        before = found.get(result.identity)
        if before is None or result.is_done or not before.is_done:
            found[result.identity] = result
    return found
