"""The report as Markdown, LaTeX, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ogreg_core.models.option_words import option_words
from ogreg_core.report import Average, Report, Row
from ogreg_core.run_records import thousands

__all__ = ["CAPTION", "FORMATS", "render"]

CAPTION = (
    "Accuracy in %: mean ± standard deviation (n − 1) over seeds, or a single run with its 95 % "
    "Wilson interval. GFLOPs: billions of multiply-adds of one view, a multiply-add counted once, "
    "× views (clips × crops), of a fusion the sum of its models. Coverage: videos that could be read, of "
    "those annotated."
)
_HEADER = (
    *("model", "recipe", "data", "params (M)", "GFLOPs × views", "top-1", "top-5", "protocol"),
    *("coverage", "seeds"),
)
_TOP1 = _HEADER.index("top-1")
_NAMES = tuple(_HEADER.index(name) for name in ("model", "recipe", "data", "protocol"))
_NUMBERS = frozenset({"params (M)", "GFLOPs × views", "top-1", "top-5"})
_MISSING = "–"
_LEFT_OUT = "Not in the table:"
_MARKS = "abcdefghijklmnopqrstuvwxyz"
# Longer lists of seeds are only counted.
_MOST_SEEDS = 5
_HASH_DIGITS = 7


def render(report: Report, format: str) -> str:
    """The report as text.

    Args:
        report: what :func:`ogreg_core.report.build_report` returns.
        format: key of ``FORMATS``.
    """
    return FORMATS[format](report)


def _markdown(report: Report) -> str:
    escape = _MARKDOWN.translate
    notes = _notes(report.rows)
    lines = [" | ".join(_HEADER), " | ".join("--:" if n in _NUMBERS else "---" for n in _HEADER)]
    for row, cells in zip(report.rows, _cells(report.rows), strict=True):
        texts = [escape(cell) for cell in cells]
        if mark := notes.get(_note(row)):
            texts[_TOP1] += f" <sup>{mark}</sup>"
        lines.append(" | ".join(texts))
    parts = ["\n".join(f"| {line} |" for line in lines) if report.rows else "No finished run."]
    if report.rows:
        parts.append(escape(CAPTION))
    parts += [f"<sup>{mark}</sup> {escape(note)}" for note, mark in notes.items()]
    if report.left_out:
        items = [f"- {escape(text)}" for text in _left_out(report)]
        parts.append("\n".join([_LEFT_OUT, "", *items]))
    return "\n\n".join(parts) + "\n"


def _latex(report: Report) -> str:
    escape = _LATEX.translate
    notes = _notes(report.rows)
    lines = ["% needs \\usepackage{booktabs,graphicx}", "\\begin{table}", "\\centering", "\\small"]
    lines.append(f"\\caption{{{escape(CAPTION)}}}")
    columns = "".join("r" if name in _NUMBERS else "l" for name in _HEADER)
    # Ten columns are wider than a page: scaled to the width of the text.
    lines += ["\\resizebox{\\textwidth}{!}{" + f"\\begin{{tabular}}{{{columns}}}", "\\toprule"]
    lines += [" & ".join(escape(name) for name in _HEADER) + " \\\\", "\\midrule"]
    for row, cells in zip(report.rows, _cells(report.rows), strict=True):
        texts = [escape(cell) for cell in cells]
        if mark := notes.get(_note(row)):
            texts[_TOP1] += f"$^{{{mark}}}$"
        lines.append(" & ".join(texts) + " \\\\")
    lines += ["\\bottomrule", "\\end{tabular}}"]
    below = [f"$^{{{mark}}}$ {escape(note)}" for note, mark in notes.items()]
    if report.left_out:
        below += [_LEFT_OUT, *(escape(text) for text in _left_out(report))]
    if below:
        lines += ["", "\\footnotesize", *(f"{text}\\par" for text in below)]
    return "\n".join([*lines, "\\end{table}"]) + "\n"


def _csv(report: Report) -> str:
    """A line per row and per run that is in none; lists are separated by spaces."""
    lines = []
    for row in report.rows:
        document = _row_document(row)
        document["options"] = json.dumps(document["options"])
        for name in ("seeds", "runs"):
            document[name] = " ".join(str(item) for item in document[name])
        for name in ("top1", "top5", "coverage"):
            low, high = document.pop(f"{name}_interval_pct") or (None, None)
            document |= {f"{name}_low_pct": low, f"{name}_high_pct": high}
        lines.append({"state": "done", **document})
    for item in report.left_out:
        lines.append({"state": item.state, "reason": item.reason, "runs": str(item.path)})
    names = list(dict.fromkeys(name for line in lines for name in line))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return buffer.getvalue()


def _json(report: Report) -> str:
    document = {
        "schema": "ogreg.report.v1",
        "caption": CAPTION,
        "rows": [_row_document(row) for row in report.rows],
        "left_out": [
            {"run": str(item.path), "state": item.state, "reason": item.reason}
            for item in report.left_out
        ],
    }
    return json.dumps(document, ensure_ascii=False) + "\n"


FORMATS: dict[str, Callable[[Report], str]] = {
    "markdown": _markdown,
    "csv": _csv,
    "latex": _latex,
    "json": _json,
}


def _row_document(row: Row) -> dict[str, Any]:
    first = row.results[0]
    cost = row.cost
    top5 = row.top5 or Average(float("nan"))
    return {
        "model": first.model,
        "options": first.options,
        "recipe": first.recipe,
        "experiment_sha256": first.experiment,
        "checkpoint": first.role or None,
        "members": len(first.members),
        "dataset": first.dataset,
        "split": first.split,
        "manifest_sha256": first.manifest,
        "params": cost.params if cost else None,
        "gmacs_per_view": _gmacs(row),
        "views": first.views,
        "top1_pct": row.top1.mean,
        "top1_deviation_pct": row.top1.deviation,
        "top1_interval_pct": row.top1.interval,
        "top5_pct": top5.mean if row.top5 else None,
        "top5_deviation_pct": top5.deviation,
        "top5_interval_pct": top5.interval,
        "protocol": first.protocol,
        "coverage_interval_pct": row.coverage_pct,
        "videos": first.run.videos,
        "scored_videos": [result.run.scored for result in row.results],
        "annotated_videos": first.run.annotated,
        "count": len(row.results),
        "seeds": [result.seed for result in row.results if result.seed is not None],
        "runs": [str(result.run.path) for result in row.results],
        "note": _note(row),
    }


def _cells(rows: Sequence[Row]) -> list[list[str]]:
    """The texts of each row, without markup; rows that would look alike are told apart by hashes."""
    everything = [_row_cells(row) for row in rows]
    names = [tuple(cells[i] for i in _NAMES) for cells in everything]
    for name, count in Counter(names).items():
        if count > 1:
            alike = [i for i, other in enumerate(names) if other == name]
            firsts = [rows[i].results[0] for i in alike]
            for column, hashes in (
                (_HEADER.index("recipe"), [first.experiment for first in firsts]),
                (_HEADER.index("data"), [first.manifest for first in firsts]),
            ):
                for i, digits in zip(alike, hashes, strict=True):
                    if len(set(hashes)) > 1:
                        everything[i][column] += f" ({digits[:_HASH_DIGITS]})"
    return everything


def _row_cells(row: Row) -> list[str]:
    first = row.results[0]
    options = ", ".join(option_words(first.options))
    recipe = first.recipe
    if first.role not in ("", "best"):
        recipe = f"{recipe}, {first.role}"
    gflops = _MISSING
    gmacs = _gmacs(row)
    if gmacs is not None:
        gflops = f"{gmacs:.3g}" + (f" × {first.views}" if first.views else "")
    return [
        f"{first.model} ({options})" if options else first.model,
        recipe,
        f"{first.dataset}/{first.split}",
        f"{row.cost.params / 1e6:.2f}" if row.cost else _MISSING,
        gflops,
        _average(row.top1),
        _average(row.top5) if row.top5 else _MISSING,
        first.protocol,
        _coverage(row),
        _seeds(row),
    ]


def _gmacs(row: Row) -> float | None:
    """Billions of multiply-adds of one view."""
    if row.cost is None or row.cost.multiply_adds is None:
        return None
    return row.cost.multiply_adds / 1e9


def _average(figure: Average) -> str:
    if figure.deviation is not None:
        return f"{figure.mean:.1f} ± {figure.deviation:.1f}"
    if figure.interval is not None:
        low, high = figure.interval
        return f"{figure.mean:.1f} [{low:.1f}, {high:.1f}]"
    return f"{figure.mean:.1f}"


def _coverage(row: Row) -> str:
    """Counts, as a share would round nearly all to all."""
    first = row.results[0].run
    counts = [result.run.scored for result in row.results if result.run.scored is not None]
    whole = first.annotated or first.videos
    if not counts or not whole:
        return _MISSING
    text = "–".join(thousands(count) for count in sorted({min(counts), max(counts)}))
    return f"{text} of {thousands(whole)}" + ("" if first.annotated else " listed")


def _seeds(row: Row) -> str:
    count = len(row.results)
    seeds = [str(result.seed) for result in row.results if result.seed is not None]
    known = len(seeds) == count and count <= _MOST_SEEDS
    return f"{count} ({', '.join(seeds)})" if known else str(count)


def _note(row: Row) -> str:
    """What a reader must know of how the checkpoints were chosen; empty if there is nothing."""
    chosen = {result.chosen_from for result in row.results} - {0}
    known = {count for count in chosen if count is not None}
    or_more = any(result.or_more for result in row.results)
    if not known or (max(known) == 1 and not or_more and min(known) == 1):
        unknown = "it is not known whether the checkpoint was chosen on this split"
        return unknown if None in chosen else ""
    words = "validations"
    if min(known) > 0:
        words = ("at least " if or_more else "") + f"{_range(known)} validations"
    which = "a checkpoint" if any(len(r.members) > 1 for r in row.results) else "checkpoint"
    return f"{which} chosen as the best of {words} on this split: an optimistic figure"


def _range(numbers: set[int]) -> str:
    return f"{min(numbers)}" if len(numbers) == 1 else f"{min(numbers)} to {max(numbers)}"


def _notes(rows: Sequence[Row]) -> dict[str, str]:
    """The letter of each distinct note, in the order of the rows."""
    found = dict.fromkeys(note for row in rows if (note := _note(row)))
    return {note: _MARKS[i % len(_MARKS)] for i, note in enumerate(found)}


def _left_out(report: Report) -> Iterator[str]:
    for item in report.left_out:
        yield f"{item.path} ({item.state}): {' '.join(item.reason.split())}"


class _Escape:
    """Replaces the characters that have a meaning in a markup language."""

    def __init__(self, meanings: dict[str, str]) -> None:
        self._meanings = str.maketrans(meanings)

    def translate(self, text: str) -> str:
        return " ".join(text.split()).translate(self._meanings)


_MARKDOWN = _Escape({sign: f"\\{sign}" for sign in "\\|*`<$_~["})
_LATEX = _Escape(
    {sign: f"\\{sign}" for sign in "%_&#${}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': "''"}
    | {"±": r"$\pm$", "×": r"$\times$", "−": "$-$", "–": "--"}
)
