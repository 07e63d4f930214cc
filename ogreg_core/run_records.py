"""What run folders tell about themselves, in whatever state they are. Does not import torch.

A run may be under way, finished, failed, interrupted, killed with half a line in its metrics, or
written by another version: what is missing is left out, nothing raises.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found,unused-ignore]

__all__ = ["RunRecord", "find_runs", "read_metrics", "read_run", "share_text", "thousands"]

_KINDS = {"ogreg.train.v1": "train", "ogreg.eval.v1": "eval"}
# What the data.json of an evaluation that has not ended says.
_COMMANDS = ("eval", "fuse")
# A run that says it is running and has written nothing for so long may have been killed.
_SILENT_SECONDS = 600.0
# runs/<command>/<recipe>/<n>, and one folder around it.
_DEEPEST = 4


@dataclass(frozen=True)
class RunRecord:
    """One run folder.

    Args:
        path: the folder.
        kind: ``train``, ``eval``, or ``fuse`` for fused scores.
        state: ``done``, ``running``, ``silent`` (running by its own words, but nothing was written
            for ten minutes: killed, or in a long validation), ``interrupted``, ``failed``, or
            ``unknown``.
        reason: why it failed or was interrupted.
        resume: the command that continues it.
        started: when, in seconds since 1970, by the times of its files.
        seconds: of training if it has finished, else from its start to its last sign of life.
        recipe: name of the recipe.
        values: content of ``recipe.toml``, unvalidated.
        data: content of ``data.json``.
        report: content of ``report.json``.
        epoch: of the last step.
        validations: records of all validations, by rising epoch.
    """

    path: Path
    kind: str
    state: str
    reason: str
    resume: str
    started: float
    seconds: float | None
    recipe: str
    values: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)
    epoch: int | None = None
    validations: Sequence[dict[str, Any]] = ()

    @property
    def model(self) -> str:
        """Registry name, empty if unknown."""
        name = self.report.get("model") or self._value("model", "name") or self.data.get("model")
        return str(name or "")

    @property
    def epochs(self) -> int | None:
        """How many the recipe asks for."""
        return _number(self._value("train", "epochs"), int)

    @property
    def best(self) -> dict[str, Any]:
        """The validation with the highest top-1, the first of equal ones; empty if there is none."""
        scored = [record for record in self.validations if _number(record.get("top1")) is not None]
        return max(scored, key=lambda record: record["top1"], default={})

    @property
    def top1(self) -> float | None:
        """In percent: of an evaluation, or of the best validation."""
        if self.kind == "train":
            return _number(self.best.get("top1") or self.report.get("best_top1_pct"))
        return _number(self.report.get("top1_pct"))

    @property
    def best_epoch(self) -> int | None:
        """Epoch of the best validation."""
        return _number(self.best.get("epoch") or self.report.get("best_epoch"), int)

    @property
    def last_top1(self) -> float | None:
        """In percent, of the last validation of a training."""
        last = self.validations[-1] if self.validations else {}
        return _number(last.get("top1", self.report.get("last_top1_pct")))

    @property
    def dataset(self) -> str:
        """Data set and split of the score, for example ``demo/val``; empty if unknown."""
        name = self.report.get("dataset") or self.data.get("dataset")
        name = name or self._value("data", "dataset") or ""
        split = self.report.get("split") or self._value("data", "val_split")
        split = split or self.data.get("split")
        return f"{name}/{split}" if name and split else str(name)

    @property
    def frame_order(self) -> str:
        """``shuffled``, ``reversed`` or ``middle`` of an evaluation that is a control, else empty."""
        order = self.report.get("frame_order")
        if order is None:
            # Older reports tell it in the protocol's words only.
            _, found, order = str(self.report.get("protocol", "")).rpartition(", frames ")
            order = order if found else ""
        return "" if order == "none" else str(order)

    @property
    def videos(self) -> int | None:
        """Videos of the split that was scored."""
        last = self.validations[-1] if self.validations else {}
        return _number(last.get("videos", self._reported("videos")), int)

    @property
    def unreadable(self) -> int:
        """How many of them could not be read."""
        last = self.validations[-1] if self.validations else {}
        found = last.get("unreadable", self._reported("unreadable"))
        return len(found) if isinstance(found, list) else _number(found, int) or 0

    @property
    def scored(self) -> int | None:
        """How many of them have a score."""
        return None if self.videos is None else max(self.videos - self.unreadable, 0)

    @property
    def annotated(self) -> int | None:
        """Videos that the annotations list for the split, if they do; never fewer than the manifest,
        to which somebody may have added rows.
        """
        name = "val_annotated" if self.kind == "train" else "annotated_videos"
        listed = _number(self.report.get(name), int)
        return max(listed, self.videos or 0) if listed else None

    @property
    def coverage_pct(self) -> float | None:
        """Share of the annotated videos that could be read."""
        if not self.annotated or self.scored is None:
            return None
        return 100.0 * self.scored / self.annotated

    @property
    def finished(self) -> float:
        """When, in seconds since 1970: by its own words, or else by the times of its files."""
        try:
            return datetime.fromisoformat(str(self.report.get("finished"))).timestamp()
        except (ValueError, OverflowError):
            return self.started

    def _reported(self, name: str) -> Any:
        return self.report.get(f"val_{name}" if self.kind == "train" else name)

    def _value(self, table: str, key: str) -> Any:
        content = self.values.get(table)
        return content.get(key) if isinstance(content, dict) else None


def thousands(number: int) -> str:
    """With spaces: ``19 796``."""
    return f"{number:,}".replace(",", " ")


def share_text(part: int, whole: int) -> str:
    """A share in percent with one decimal, which says 100.0 only of all: ``99.9 %`` of nearly all."""
    share = 100.0 * part / whole
    return f"{share if part >= whole else min(share, 99.9):.1f} %"


def find_runs(folder: Path) -> Iterator[Path]:
    """The run folders at or below a folder, at most four levels deep; hidden folders are left out."""
    yield from _find(folder, _DEEPEST)


def _find(folder: Path, deeper: int) -> Iterator[Path]:
    if _looks_like_run(folder):
        yield folder
    elif deeper:
        try:
            inside = sorted(path for path in folder.iterdir() if path.is_dir())
        except OSError:
            return
        for path in inside:
            if not path.name.startswith("."):
                yield from _find(path, deeper - 1)


def _looks_like_run(folder: Path) -> bool:
    if any((folder / name).is_file() for name in ("status.json", "metrics.jsonl")):
        return True
    if (folder / "recipe.toml").is_file() and (folder / "env.json").is_file():
        return True
    return str(_read_json(folder / "report.json").get("schema")) in _KINDS


def read_run(folder: Path) -> RunRecord | None:
    """Read a run folder; None for a folder that is none."""
    if not _looks_like_run(folder):
        return None
    report = _read_json(folder / "report.json")
    status = _read_json(folder / "status.json")
    data = _read_json(folder / "data.json")
    command = data.get("command")
    kind = _KINDS.get(str(report.get("schema")), command if command in _COMMANDS else "train")
    if kind == "eval" and report.get("fused"):
        kind = "fuse"
    epoch, validations = _read_progress(folder / "metrics.jsonl")
    files = [folder / name for name in ("recipe.toml", "env.json", "data.json", "report.json")]
    times = [file.stat().st_mtime for file in files if file.is_file()]
    last = _last_sign(folder)
    started = min(times, default=last)
    taken = report.get("train_seconds", last - started) if kind == "train" else None
    return RunRecord(
        path=folder,
        kind=kind,
        state=_state(report, status, last),
        reason=str(status.get("reason") or ""),
        resume=str(status.get("resume") or ""),
        started=started,
        seconds=_number(taken),
        recipe=str(report.get("recipe") or data.get("recipe") or folder.resolve().parent.name),
        values=_read_toml(folder / "recipe.toml"),
        data=data,
        report=report,
        epoch=epoch,
        validations=validations,
    )


def _state(report: dict[str, Any], status: dict[str, Any], last: float) -> str:
    state = str(status.get("state") or "")
    if state == "running":
        return "running" if time.time() - last < _SILENT_SECONDS else "silent"
    return state or ("done" if report else "unknown")


def _last_sign(folder: Path) -> float:
    """When the run wrote something last, in seconds since 1970."""
    names = ("metrics.jsonl", "run.log", "status.json", "report.json", "checkpoints")
    files = [file for name in names if (file := folder / name).exists()]
    return max(file.stat().st_mtime for file in files or [folder])


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a ``metrics.jsonl``; lines that are no records, such as one cut off by a kill,
    are passed over, and so is a file that does not exist.
    """
    if path.is_file():
        with open(path, "rb") as file:
            for line in file:
                if record := _record(line):
                    yield record


def _record(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError):
        return {}
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else {}


def _read_progress(path: Path) -> tuple[int | None, list[dict[str, Any]]]:
    """The epoch of the last step, and the validations. Of a file of millions of lines only those that
    may be a validation's are parsed.
    """
    by_epoch: dict[int, dict[str, Any]] = {}
    epoch: int | None = None
    if not path.is_file():
        return None, []
    last = b""
    with open(path, "rb") as file:
        for line in file:
            if b'"val"' in line:
                record = _record(line)
                if record.get("kind") == "val" and isinstance(record.get("epoch"), int):
                    by_epoch[record["epoch"]] = record
            elif line.endswith(b"\n"):
                last = line
    epoch = _number(_record(last).get("epoch"), int)
    if by_epoch:
        epoch = max(epoch or 0, max(by_epoch))
    return epoch, [by_epoch[number] for number in sorted(by_epoch)]


def _number(value: Any, kind: type = float) -> Any:
    """The value as ``kind`` if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return kind(value) if abs(value) <= sys.float_info.max else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
