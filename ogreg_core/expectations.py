"""Scores that an evaluation is expected to reach: ``--expect top1=78.8+-0.3``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ogreg_core.errors import UsageError
from ogreg_core.models.registry import nearest

__all__ = ["FIGURES", "Expectation", "check_expectations", "parse_expectation"]

FIGURES = ("top1", "top5", "mean_class", "ece")

_NUMBER = r"(?:\d+(?:\.\d*)?|\.\d+)"
_FORM = re.compile(
    rf"(?P<figure>\w+)\s*(?:(?P<side>>=|<=)\s*(?P<bound>{_NUMBER})"
    rf"|==?\s*(?P<value>{_NUMBER})\s*(?:\+-|\+/-|±)\s*(?P<tolerance>{_NUMBER}))",
    re.ASCII,
)
_PERCENT = 100.0
# Those that are never meant to be a percent or less; 0 is the same as a share.
_ACCURACIES = ("top1", "top5", "mean_class")
_SPELLING = "--expect 'top1=78.8+-0.3', or --expect 'top1>=78.5'"
# Decimal borders such as 78.8 - 0.3 are no binary numbers.
_SLACK = 1e-9


@dataclass(frozen=True)
class Expectation:
    """A figure and where it has to lie.

    Args:
        text: as it was written.
        figure: one of ``FIGURES``.
        low, high: borders in percent, which belong to it.
    """

    text: str
    figure: str
    low: float
    high: float

    def met(self, reached: float) -> bool:
        """Whether a figure in percent is as expected; not-a-number never is."""
        return self.low - _SLACK <= reached <= self.high + _SLACK


def parse_expectation(text: str) -> Expectation:
    """Read ``FIGURE=VALUE+-TOLERANCE`` (also ``±``), ``FIGURE>=VALUE`` or ``FIGURE<=VALUE``, in percent.

    Raises:
        UsageError: another form, no such figure, or a border that is no percentage; says the right
            spelling.
    """
    match = _FORM.fullmatch(text.strip())
    if match is None:
        raise UsageError(
            f"--expect {text!r} cannot be read",
            why="it is FIGURE=VALUE+-TOLERANCE, FIGURE>=VALUE or FIGURE<=VALUE, in percent",
            fix=_SPELLING,
        )
    figure = match["figure"]
    if figure not in FIGURES:
        raise UsageError(
            f"--expect {text!r}: there is no figure {figure!r}",
            why=nearest(figure.lower(), FIGURES) or f"figures: {', '.join(FIGURES)}",
            fix=_SPELLING,
        )
    _check_percent(text, match)
    if match["side"] == ">=":
        return Expectation(text, figure, float(match["bound"]), 100.0)
    if match["side"] == "<=":
        return Expectation(text, figure, 0.0, float(match["bound"]))
    value, tolerance = float(match["value"]), float(match["tolerance"])
    return Expectation(text, figure, value - tolerance, value + tolerance)


def _check_percent(text: str, match: re.Match[str]) -> None:
    """Refuse shares in 0..1 where percent are meant, and more than all.

    Raises:
        UsageError: says what was probably meant.
    """
    number = match["bound"] or match["value"]
    if max(float(number), float(match["tolerance"] or 0)) > _PERCENT:
        raise UsageError(f"--expect {text!r} asks for more than 100 percent", fix=_SPELLING)
    if match["figure"] in _ACCURACIES and 0 < float(number) <= 1:
        meant = f"{100 * float(number):g}"
        place = match.start("bound") if match["bound"] else match.start("value")
        stripped = text.strip()
        right = stripped[:place] + meant + stripped[place + len(number) :]
        tolerance = match["tolerance"]
        if tolerance and float(tolerance) <= 1:
            right = right[: -len(tolerance)] + f"{100 * float(tolerance):g}"
        raise UsageError(
            f"--expect {text!r} is a share, not a percentage",
            why=f"figures are in percent: did you mean {meant}?",
            fix=f"--expect {right!r}",
        )


def check_expectations(
    expectations: Sequence[Expectation], figures: Mapping[str, float]
) -> list[dict[str, Any]]:
    """The outcome of each, ready for JSON: ``expected``, ``figure``, ``reached_pct``, ``met``."""
    return [
        {
            "expected": expectation.text,
            "figure": expectation.figure,
            "reached_pct": figures[expectation.figure],
            "met": expectation.met(figures[expectation.figure]),
        }
        for expectation in expectations
    ]
