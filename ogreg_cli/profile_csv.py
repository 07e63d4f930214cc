"""The documents of ``ogreg profile`` as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Mapping
from typing import Any

__all__ = ["csv_of"]


def csv_of(document: Mapping[str, Any]) -> str:
    """A line per model or point; of one model a line per figure, as its parts have different ones."""
    lines = list(_CSV_LINES[document["schema"]](document))
    names = list(dict.fromkeys(name for line in lines for name in line))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return buffer.getvalue()


def _profile_lines(document: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for key, value in document.items():
        if isinstance(value, list):
            names = {"modules": "name", "throughput": "batch", "operators": "name"}
            for row in value:
                yield from _figures(key, row[names[key]], row, names[key])
        elif isinstance(value, dict):
            for name in ("blocks", "selections") if key == "clip" else ():
                for row in value[name]:
                    yield from _figures(f"clip {name}", row["name"], row, "name")
            yield from _figures(key, "", value, "")
        else:
            yield {"part": "model", "name": "", "figure": key, "value": value}


def _figures(
    part: str, name: object, row: Mapping[str, Any], leave_out: str
) -> Iterator[dict[str, Any]]:
    for figure, value in row.items():
        if figure != leave_out and not isinstance(value, list):
            yield {"part": part, "name": name, "figure": figure, "value": value}


def _compare_lines(document: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for row in document["models"]:
        nested = ("throughput", "best", "uncounted_operators")
        line = {key: value for key, value in row.items() if key not in nested}
        for cost in row["throughput"]:
            line[f"clips_per_s_batch_{cost['batch']}"] = cost.get("clips_per_s")
        yield line | {f"best_{key}": value for key, value in row["best"].items()}
    for row in document["left_out"]:
        yield dict(row)


def _sweep_lines(document: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for model in document["models"]:
        for point in model["points"]:
            yield {"model": model["model"], "over": document["over"], **point}


_CSV_LINES: dict[str, Callable[[Mapping[str, Any]], Iterator[dict[str, Any]]]] = {
    "ogreg.profile.v2": _profile_lines,
    "ogreg.profile-compare.v2": _compare_lines,
    "ogreg.profile-sweep.v1": _sweep_lines,
}
