"""A model's options in words, the same wherever they are shown. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["model_words", "option_words", "selection_words"]


def selection_words(selection: Mapping[str, Any]) -> list[str]:
    """Token selection as ``--select`` takes it: ``["time:1:0.5", "space:2:0.7367"]``."""
    return [
        f"{kind}:{keep['before']}:{keep['ratio']:g}"
        for kind in ("time", "space")
        for keep in selection.get(kind, ())
    ]


def option_words(options: Mapping[str, Any]) -> Iterator[str]:
    """Options of a model for the eye: ``stem=patch``, ``strides=4-2-1-1``, ``select=time:1:0.5
    space:2:0.7367``, ``gta after stage 3``. How a selection learns is no part of the architecture.
    """
    for key, value in options.items():
        if key == "token_selection":
            yield f"select={' '.join(selection_words(value))}"
        elif key == "gta":
            stages = ", ".join(map(str, value["stages"]))
            choices = " ".join(f"{name}={choice}" for name, choice in value["options"].items())
            yield f"gta after stage {stages}" + (f" ({choices})" if choices else "")
        elif isinstance(value, (list, tuple)):
            yield f"{key}={'-'.join(map(str, value))}"
        else:
            yield f"{key}={value}"


def model_words(model: str, options: Mapping[str, Any]) -> str:
    """A model with its options: ``ogreg-t, stem=patch``."""
    return ", ".join([model, *option_words(options)])
