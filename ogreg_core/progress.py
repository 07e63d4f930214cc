"""How core reports progress: plain events to a callback. Core knows no terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

__all__ = ["Note", "Progress", "ProgressCallback", "ignore_progress"]


@dataclass(frozen=True)
class Progress:
    """``done`` of ``total`` items of ``task``; ``fields`` are figures worth showing beside it."""

    task: str
    done: int
    total: int
    fields: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Note:
    """A sentence worth one line."""

    text: str


ProgressCallback = Callable[[Progress | Note], None]


def ignore_progress(_event: Progress | Note) -> None:
    """The callback of callers that do not care."""
