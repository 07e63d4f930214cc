"""The documents of ``ogreg profile`` as tables."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ogreg_cli.console import print_table, result
from ogreg_cli.profile_csv import csv_of
from ogreg_core.models.option_words import model_words

__all__ = ["Table", "notes_on", "show", "tables_of"]

_NOTHING = "–"
# Above this the two counters do not count the same.
_MOST_DIFFERENCE_PCT = 1.0
_BYTES = {"float32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Table:
    """Cells as they are shown.

    Args:
        title: above the table.
        header: names of the columns.
        rows: cells.
        right: columns of numbers.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    right: Sequence[int] = ()


def show(document: Mapping[str, Any], format: str) -> None:
    """Print a document.

    Args:
        document: of any form of the command.
        format: ``table``, ``markdown`` or ``csv``.
    """
    if format == "csv":
        result(csv_of(document).rstrip("\n"))
        return
    # A person sees by the indentation whose part a module is.
    indented = format == "table" and sys.stdout.isatty()
    for number, table in enumerate(tables_of(document, indented=indented)):
        if number:
            result("")
        if format == "markdown":
            result(_markdown(table))
        else:
            print_table(table.title, table.header, table.rows, table.right)


def tables_of(document: Mapping[str, Any], *, indented: bool = False) -> list[Table]:
    """The tables of a document by its schema.

    Args:
        document: of any form of the command.
        indented: name modules within their surrounding one, instead of by their whole path.
    """
    if document["schema"] == "ogreg.profile.v2":
        return list(_profile_tables(document, indented))
    if document["schema"] == "ogreg.profile-compare.v2":
        return list(_compare_tables(document))
    return list(_sweep_tables(document))


def notes_on(document: Mapping[str, Any]) -> Iterator[str]:
    """What a reader of the figures must know beside them."""
    if document["schema"] == "ogreg.profile.v2":
        check = document["counter_check"]
        if abs(check["difference_pct"]) > _MOST_DIFFERENCE_PCT:
            yield (
                f"warning: fvcore counts {_g(document['products_gmacs'])} G in matrix products and "
                f"convolutions, torch {_g(check['torch_gmacs'])} G"
            )
        if document["training_error"]:
            yield f"training step: {document['training_error']}"
    if document["schema"] == "ogreg.profile-compare.v2":
        for row in document["models"]:
            if row["uncounted_operators"]:
                yield f"{row['model']}: not counted: {_calls(row['uncounted_operators'])}"
            if row["training_error"]:
                yield f"{row['model']}: training step: {row['training_error']}"


# --- figures -----------------------------------------------------------------------------------


def _g(value: float) -> str:
    """Four digits."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _mb(value: float | None) -> str:
    if value is None:
        return "unknown"
    return f"{value / 1024:.2f} GB" if value >= 1024 else f"{value:.4g} MB"


def _ms(value: float | None) -> str:
    return _NOTHING if value is None else f"{value:,.1f}"


def _ratio(value: float | None) -> str:
    return _NOTHING if value is None else f"{value:.2f}"


def _calls(uncounted: Mapping[str, int]) -> str:
    return ", ".join(f"{name} x{calls}" for name, calls in uncounted.items())


def _machine(document: Mapping[str, Any]) -> str:
    compiled = ", compiled" if document["compiled"] else ""
    return (
        f"{document['device']}, {document['dtype']}{compiled}, {document['threads']} "
        f"thread{'s' if document['threads'] != 1 else ''}"
    )


def _passes(document: Mapping[str, Any]) -> str:
    repeats = document["repeats"]
    return f"{repeats} pass{'' if repeats == 1 else 'es'} after {document['warmup']} to warm up"


_CONVENTION = "one multiply-add counts once, as in papers' GFLOPs"


# --- one model ---------------------------------------------------------------------------------


def _profile_tables(document: Mapping[str, Any], indented: bool) -> Iterator[Table]:
    name = model_words(document["model"], document["options"])
    yield Table(name, ["", "figure"], list(_overview(name, document)))
    yield _modules(document, indented)
    yield _throughput(document)
    if document["operators"]:
        yield Table(
            "operators by their own time, one pass",
            ["operator", "calls", "ms", "share (%)"],
            [
                [row["name"], str(row["calls"]), f"{row['ms']:.2f}", f"{row['share_pct']:.1f}"]
                for row in document["operators"]
            ],
            right=(1, 2, 3),
        )
    if document["clip"] and document["clip"]["blocks"]:
        yield _gazes(document["clip"])


def _overview(name: str, document: Mapping[str, Any]) -> Iterator[list[str]]:
    shape = f"{document['frames']}x{document['size_px']}x{document['size_px']}"
    yield ["model", name]
    if document["checkpoint"]:
        yield ["checkpoint", document["checkpoint"]]
    yield ["input", f"{shape}, {document['classes']} classes"]
    yield ["parameters", f"{document['params'] / 1e6:.2f} M"]
    yield from _counted(document)
    elements = document["activations_m"]
    size = elements * 1e6 * _BYTES[document["dtype"]] / 2**20
    yield [
        "activations per view",
        f"{_g(elements)} M elements out of matrix products and convolutions, "
        f"{_mb(size)} in {document['dtype']}",
    ]
    yield from _timed(document)
    yield ["device", _machine(document)]
    if document["clip"]:
        yield from _decided(document["clip"], document["gmacs_per_view"])


def _counted(document: Mapping[str, Any]) -> Iterator[list[str]]:
    total, products = document["gmacs_per_view"], document["products_gmacs"]
    yield [
        "multiply-adds per view",
        f"{_g(total)} G ({_g(document['gflops_per_view'])} GFLOPs at 2 per multiply-add)",
    ]
    rest = 100 * (1 - products / total) if total else 0.0
    yield [
        "counted so",
        f"{_CONVENTION}; norms and interpolation are {rest:.1f} % of it, pooling and other "
        "element-wise work is not counted",
    ]
    check = document["counter_check"]
    note = f", {check['note']}" if check["note"] else ""
    yield [
        "torch's counter",
        f"{_g(check['torch_gmacs'])} G in matrix products and convolutions "
        f"(difference {abs(check['difference_pct']):.2f} %{note})",
    ]
    attention = document["attention_gmacs"]
    if attention:
        yield [
            "of which fused attention",
            f"{_g(attention)} G, {100 * attention / total:.1f} % "
            f"(torch, taken apart: {_g(document['attention_check_gmacs'])} G)",
        ]
    if document["uncounted_operators"]:
        yield ["not counted", _calls(document["uncounted_operators"])]
    origin = document["views_from"] or "no test protocol of this model is known: one view"
    yield ["views per video", f"{document['views']} ({document['views_protocol']}, {origin})"]
    yield [
        "multiply-adds per video",
        f"{_g(document['gmacs_per_video'])} G ({_g(document['gflops_per_video'])} GFLOPs)",
    ]


def _timed(document: Mapping[str, Any]) -> Iterator[list[str]]:
    latency = document["latency"]
    yield [
        "latency, batch 1",
        f"{_ms(latency['ms_p50'])} ms median, {_ms(latency['ms_p90'])} ms p90 ({_passes(latency)})",
    ]
    if latency["compile_s"] is not None:
        yield ["first pass, compiling", f"{latency['compile_s']:.1f} s"]
    rows = [row for row in document["throughput"] if "error" not in row]
    if rows:
        best = max(rows, key=lambda row: row["clips_per_s"])
        yield ["best throughput", f"{_g(best['clips_per_s'])} clips/s at batch {best['batch']}"]
    training = document["training"]
    if training:
        yield [
            f"training step, batch {training['batch']}",
            f"{_ms(training['ms_p50'])} ms median, {_ms(training['ms_p90'])} ms p90, "
            f"{_g(training['clips_per_s'])} clips/s, {_mb(training['peak_memory_mb'])} "
            f"({document['peak_memory_is']}); forward, backward, AdamW",
        ]
    elif document["training_error"]:
        yield ["training step", document["training_error"]]
    yield [
        "time in matrix products",
        f"{document['matrix_product_share_pct']:.1f} % (with convolutions and fused attention)",
    ]


def _decided(clip: Mapping[str, Any], total: float) -> Iterator[list[str]]:
    yield ["clip", clip["path"]]
    if not clip["data_dependent"]:
        yield ["what it decides", "nothing: this model does the same work for every clip"]
    if clip["blocks"]:
        skippable = clip["skippable_gmacs"]
        yield [
            "temporal taps that m closes",
            f"{_g(skippable)} G multiply-adds, {100 * skippable / total:.2f} % of the view, where m is "
            f"at most {clip['threshold']:g} in every channel; they are computed all the same",
        ]
    for row in clip["selections"]:
        yield [
            f"left by selection {row['name']}",
            f"{row['kept_pct']:.1f} % of the clip's tokens; their number is fixed, the clip decides which",
        ]


def _modules(document: Mapping[str, Any], indented: bool) -> Table:
    total = document["gmacs_per_view"] or 1.0
    size = _BYTES[document["dtype"]] / 2**20

    def row(name: str, kind: str, cost: Mapping[str, Any], gmacs: float) -> list[str]:
        return [
            name,
            kind,
            f"{cost['params'] / 1e6:.3f}",
            _g(gmacs),
            f"{100 * gmacs / total:.1f}",
            _g(cost["activations_m"]),
            _g(cost["activations_m"] * 1e6 * size),
        ]

    rows, above = [], [""]
    for part in document["modules"]:
        depth = part["depth"]
        above[depth:] = [part["name"]]
        name = "  " * (depth - 1) + part["name"].removeprefix(above[depth - 1])
        rows.append(row(name if indented else part["name"], part["type"], part, part["gmacs"]))
    rows.append(row("total", "", document, document["gmacs_per_view"]))
    return Table(
        "modules in the order in which they run, with all that is inside them: parameters, multiply-adds, "
        "activations",
        [
            *("module", "type", "params (M)", "GMACs", "share (%)", "activ. (M)", "(MB)"),
        ],
        rows,
        right=(2, 3, 4, 5, 6),
    )


def _throughput(document: Mapping[str, Any]) -> Table:
    return Table(
        f"throughput; memory: {document['peak_memory_is']} in one pass",
        ["batch", "clips/s", "ms median", "ms p90", "memory (MB)"],
        [
            [str(row["batch"]), row["error"], *[_NOTHING] * 3]
            if "error" in row
            else [
                str(row["batch"]),
                _g(row["clips_per_s"]),
                _ms(row["ms_p50"]),
                _ms(row["ms_p90"]),
                _NOTHING if row["peak_memory_mb"] is None else _g(row["peak_memory_mb"]),
            ]
            for row in document["throughput"]
        ],
        right=(0, 1, 2, 3, 4),
    )


def _gazes(clip: Mapping[str, Any]) -> Table:
    return Table(
        "what the clip decides in each block; closed: m at most "
        f"{clip['threshold']:g} in every channel",
        ["block", "mean m", "closed (%)", "temporal taps (G)", "of which closed (G)"],
        [
            [
                row["name"],
                f"{row['mean_modulation']:.3f}",
                f"{row['positions_below_pct']:.1f}",
                _g(row["temporal_gmacs"]),
                _g(row["skippable_gmacs"]),
            ]
            for row in clip["blocks"]
        ],
        right=(1, 2, 3, 4),
    )


# --- several models ----------------------------------------------------------------------------


def _compare_tables(document: Mapping[str, Any]) -> Iterator[Table]:
    rows = document["models"]
    first = rows[0]["model"]
    yield Table(
        f"batch 1, {_machine(document)}, {_passes(document)} in turn, {document['classes']} classes; "
        f"GMACs: {_CONVENTION}",
        [
            *("model", "input", "params (M)", "GMACs", "GFLOPs", "ms median", "ms p90"),
            f"times {first}",
        ],
        [
            [
                row["model"],
                f"{row['frames']}x{row['size_px']}x{row['size_px']}",
                f"{row['params'] / 1e6:.2f}",
                _g(row["gmacs_per_view"]),
                _g(row["gflops_per_view"]),
                _ms(row["latency_ms_p50"]),
                _ms(row["latency_ms_p90"]),
                _ratio(row["latency_ratio"]),
            ]
            for row in rows
        ],
        right=(2, 3, 4, 5, 6, 7),
    )
    if document["batches"] != [1]:
        yield _best_batches(document, first)
    if document["training_batch"]:
        yield Table(
            f"training step of {document['training_batch']} clips, in turn: forward, backward, AdamW",
            ["model", "ms median", f"times {first}"],
            [
                [row["model"], _ms(row["training_ms_p50"]), _ratio(row["training_ratio"])]
                for row in rows
            ],
            right=(1, 2),
        )

    if document["left_out"]:
        yield Table(
            "left out",
            ["model", "why"],
            [[row["model"], row["error"]] for row in document["left_out"]],
        )


def _best_batches(document: Mapping[str, Any], first: str) -> Table:
    def cell(row: Mapping[str, Any]) -> str:
        return row["error"] if "error" in row else _g(row["clips_per_s"])

    batches = [row["batch"] for row in document["models"][0]["throughput"]]
    return Table(
        "throughput in clips/s by batch",
        ["model", *map(str, batches), "best batch", "clips/s", f"times {first}"],
        [
            [
                row["model"],
                *(cell(cost) for cost in row["throughput"]),
                str(row["best"]["batch"]),
                _g(row["best"]["clips_per_s"]),
                _ratio(row["best"]["ratio"]),
            ]
            for row in document["models"]
        ],
        right=range(1, len(batches) + 4),
    )


def _sweep_tables(document: Mapping[str, Any]) -> Iterator[Table]:
    points = [(model, point) for model in document["models"] for point in model["points"]]
    failed = [(model, point) for model, point in points if "error" in point]
    yield Table(
        f"{_machine(document)}, {_passes(document)} in turn, {document['classes']} classes; GMACs: "
        f"{_CONVENTION}",
        [
            *("model", document["over"], "GMACs", "GFLOPs", "activ. (M)"),
            *("ms median", "ms p90", "clips/s"),
        ],
        [_swept(model, point) for model, point in points],
        right=(1, 2, 3, 4, 5, 6, 7),
    )
    if failed:
        yield Table(
            "left out",
            ["model", document["over"], "why"],
            [[model["model"], str(point["value"]), point["error"]] for model, point in failed],
            right=(1,),
        )


def _swept(model: Mapping[str, Any], point: Mapping[str, Any]) -> list[str]:
    name = model_words(model["model"], model["options"])
    if "error" in point:
        return [name, str(point["value"]), *[_NOTHING] * 6]
    return [
        name,
        str(point["value"]),
        _g(point["gmacs_per_view"]),
        _g(point["gflops_per_view"]),
        _g(point["activations_m"]),
        _ms(point["latency_ms_p50"]),
        _ms(point["latency_ms_p90"]),
        _g(point["clips_per_s"]),
    ]


def _markdown(table: Table) -> str:
    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

    rule = ["--:" if number in table.right else "---" for number in range(len(table.header))]
    return "\n".join(
        [f"{table.title}:", "", line(table.header), line(rule), *map(line, table.rows)]
    )
