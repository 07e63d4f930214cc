"""What the options of ``ogreg profile`` mean, and which go together. Imports nothing heavy."""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import Enum
from pathlib import Path

import typer

from ogreg_cli.common import check_new_file, is_typed
from ogreg_core.errors import UsageError

__all__ = [
    "ALL",
    "Dtype",
    "Format",
    "check_plot",
    "names_in",
    "numbers_in",
    "refuse_nonsense",
    "sweep_in",
    "views_in",
]

ALL = "all"
_SWEPT = ("frames", "size", "batch")
_SMALLEST_SIZE = 32


class Format(str, Enum):
    """What the tables are written in."""

    table = "table"
    markdown = "markdown"
    csv = "csv"


class Dtype(str, Enum):
    """What computes; all but float32 by autocast, as in evaluation."""

    float32 = "float32"
    bf16 = "bf16"
    fp16 = "fp16"


# What says the same, or nothing, beside an option.
_NOT_BESIDE = {
    "checkpoint": ("model", "option", "select", "frames", "size", "classes"),
    "compare": (
        *("model", "option", "select", "checkpoint", "clip", "depth", "operators", "views"),
    ),
    "sweep": ("checkpoint", "clip", "depth", "operators", "views", "batches", "train"),
    "json": ("format",),
}


def refuse_nonsense(ctx: typer.Context) -> None:
    """Refuse options that say what is said already, or that would do nothing.

    Raises:
        UsageError: names all of them.
    """
    for given, others in _NOT_BESIDE.items():
        wrong = [f"--{name}" for name in others if is_typed(ctx, name)]
        if wrong and is_typed(ctx, given):
            do = "does" if len(wrong) == 1 else "do"
            raise UsageError(
                f"{_listed(wrong)} {do} not go with --{given}", fix=f"leave out {_listed(wrong)}"
            )
    if is_typed(ctx, "clip") and not is_typed(ctx, "checkpoint"):
        raise UsageError(
            "--clip needs --checkpoint",
            why="a checkpoint says how its model takes clips from a file",
            fix="--checkpoint FILE|RUN",
        )


def _listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def names_in(text: str) -> list[str]:
    """Models by name, each once, in the order given.

    Raises:
        UsageError: tells every name that is no model's, with the nearest one.
    """
    from ogreg_core.models.registry import MODELS, find_model, nearest

    names = list(MODELS) if text == ALL else [name.strip() for name in text.split(",")]
    unknown = [name for name in dict.fromkeys(names) if name not in MODELS]
    if len(unknown) == 1:
        find_model(unknown[0])
    if unknown:
        hints = {name: nearest(name.lower().replace("_", "-"), MODELS) for name in unknown}
        raise UsageError(
            f"there are no models {', '.join(map(repr, unknown))}",
            why="; ".join(f"{name}: {hint}" for name, hint in hints.items() if hint)
            or f"models: {', '.join(MODELS)}",
            fix="ogreg models",
        )
    return list(dict.fromkeys(names))


def numbers_in(option: str, text: str, example: str, least: int = 1) -> tuple[int, ...]:
    """Integers between commas, each once, in the order given.

    Raises:
        UsageError: tells every part that is none.
    """
    parts = [part.strip() for part in text.split(",")]
    wrong = [
        part for part in parts if not (part.isascii() and part.isdigit() and int(part) >= least)
    ]
    if wrong:
        raise UsageError(
            f"{option}: {', '.join(map(repr, wrong))} {'is' if len(wrong) == 1 else 'are'} no "
            f"number from {least} on",
            fix=example,
        )
    return tuple(dict.fromkeys(int(part) for part in parts))


def views_in(text: str) -> tuple[int, int]:
    """Clips and crops out of ``4x3``.

    Raises:
        UsageError: not of that form, or crops are not 1 or 3.
    """
    found = re.fullmatch(r"([1-9]\d*)x([13])", text)
    if found is None:
        raise UsageError(
            f"--views {text} is not of the form CLIPSxCROPS",
            why="crops are 1 (centre) or 3 (start, centre, end)",
            fix="--views 4x3",
        )
    return int(found[1]), int(found[2])


def sweep_in(text: str) -> tuple[str, tuple[int, ...]]:
    """What is swept and its values, out of ``frames=8,16,32``.

    Raises:
        UsageError: not of that form; names the nearest one.
    """
    from ogreg_core.models.registry import nearest

    over, equals, values = text.partition("=")
    example = "--sweep frames=8,16,32"
    if over not in _SWEPT:
        why = nearest(over, _SWEPT) or f"what can be swept: {', '.join(_SWEPT)}"
        raise UsageError(f"--sweep {text}: {over!r} cannot be swept", why=why, fix=example)
    if not equals:
        raise UsageError(f"--sweep {text} names no values", fix=example)
    least = _SMALLEST_SIZE if over == "size" else 1
    example = example if over == "frames" else f"--sweep {over}={'112,224' if least > 1 else '1,4'}"
    return over, numbers_in(f"--sweep {over}", values, example, least)


def check_plot(path: Path | None) -> None:
    """Refuse a picture that cannot be written, before any work is done.

    Raises:
        UsageError: unknown ending, or the file exists, or its folder does not.
        EnvironmentFault: nothing may be written there.
    """
    if path is None:
        return
    from ogreg_core.profile_picture import check_picture

    check_picture(path)
    check_new_file(path, "--plot")
