"""``ogreg compare``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ogreg_cli.common import Json, check_new_file
from ogreg_cli.console import emit_json, info, loading, print_table, result, settings
from ogreg_core.run_records import thousands

if TYPE_CHECKING:
    from ogreg_core.saved_scores import Comparison, SavedScores

EXAMPLES = (
    "Examples: ogreg compare runs/eval/demo/1 runs/eval/demo/2 | "
    "ogreg compare runs/eval/demo/1 runs/eval/demo/2 --out changed.csv"
)

_LISTED = 20
# Smaller probabilities are no numbers any more that a double can hold well.
_SMALLEST_P = 1e-300
_COLUMNS = ["path", "label", "right", "a", "a_probability", "b", "b_probability"]


def compare(
    first: Annotated[
        Path, typer.Argument(help="Folder of an evaluation, or its scores.", metavar="EVAL_A")
    ],
    second: Annotated[Path, typer.Argument(help="The other one.", metavar="EVAL_B")],
    out: Annotated[
        Path | None,
        typer.Option(help="CSV file for the videos that changed.", metavar="FILE"),
    ] = None,
    json: Json = False,
) -> None:
    """Compare two evaluations video by video: the difference with Tango's 95 % interval, McNemar's exact
    test, and which videos changed. A video that one could not read is wrong there.
    """
    check_new_file(out)
    loading()
    from ogreg_core.files import write_text_atomic
    from ogreg_core.saved_scores import compare as pair
    from ogreg_core.saved_scores import read_scores

    a, b = read_scores(first), read_scores(second)
    found = pair(a, b, (str(first), str(second)))
    changed = _changed(found, a)
    if out is not None:
        write_text_atomic(out, _csv(changed))
    document = {
        "schema": "ogreg.compare.v1",
        "a": _side(first, a, found.top1()[0], found.unreadable[0]),
        "b": _side(second, b, found.top1()[1], found.unreadable[1]),
        "difference_pct": found.top1()[1] - found.top1()[0],
        "difference_interval_pct": list(found.interval()),
        "p_value": found.p_value(),
        "videos": found.videos,
        **found.counts(),
        "changed": changed,
    }
    if json:
        emit_json(document)
        return
    _print(document)
    if out is not None:
        result(f"changed videos: {out}")
    else:
        _list(changed)


def _side(path: Path, saved: SavedScores, top1: float, unreadable: int) -> dict[str, Any]:
    keys = ("checkpoint", "model", "seed", "dataset", "split", "protocol")
    about = {key: saved.about.get(key) for key in keys}
    return {"path": str(path), **about, "top1_pct": top1, "unreadable_videos": unreadable}


def _changed(found: Comparison, saved: SavedScores) -> list[dict[str, Any]]:
    """The videos that one gets right and the other wrong, in manifest order."""
    changed = []
    for row in found.changed():
        names = [saved.labels[p] if p >= 0 else "" for p in found.predicted[:, row].tolist()]
        scores = [None if score != score else score for score in found.probability[:, row].tolist()]
        right = "a" if found.right[0, row] else "b"
        label = saved.labels[int(saved.targets[row])]
        cells = [saved.paths[row], label, right, names[0], scores[0], names[1], scores[1]]
        changed.append(dict(zip(_COLUMNS, cells, strict=True)))
    return changed


def _csv(changed: list[dict[str, Any]]) -> str:
    import csv
    import io

    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {key: f"{v:.6f}" if isinstance(v, float) else v for key, v in item.items()}
        for item in changed
    )
    return buffer.getvalue()


def _print(document: dict[str, Any]) -> None:
    a, b = document["a"], document["b"]
    print_table(
        f"{a['dataset']}/{a['split']}: {thousands(document['videos'])} videos",
        ["", "evaluation", "model", "protocol", "top-1"],
        [
            [name, side["path"], side["model"], side["protocol"], f"{side['top1_pct']:.2f} %"]
            for name, side in (("A", a), ("B", b))
        ],
        right=(4,),
    )
    low, high = document["difference_interval_pct"]
    difference = f"B - A: {document['difference_pct']:+.2f} points"
    result(f"{difference}, 95 % interval {low:+.2f} to {high:+.2f}, {_p(document['p_value'])}")
    names = {"both_right": "both right", "only_a": "only A", "only_b": "only B"}
    names["both_wrong"] = "both wrong"
    result(", ".join(f"{name} {thousands(document[key])}" for key, name in names.items()))
    counts = [side["unreadable_videos"] for side in (a, b)]
    if any(counts):
        info(f"unreadable, counted as wrong: {', '.join(map(thousands, counts))} (A, B)")


def _p(value: float) -> str:
    return f"p < {_SMALLEST_P:g}" if value < _SMALLEST_P else f"p = {value:.2g}"


def _list(changed: list[dict[str, Any]]) -> None:
    """The changed videos; no more than fit a screen, unless --verbose."""
    if not changed:
        return
    shown = changed if settings.verbose else changed[:_LISTED]
    print_table(
        "videos that changed",
        ["right", "video", "class", "A", "B"],
        [
            [
                item["right"].upper(),
                item["path"],
                item["label"],
                *(_guess(item[side], item[f"{side}_probability"]) for side in ("a", "b")),
            ]
            for item in shown
        ],
    )
    if len(shown) < len(changed):
        rest = thousands(len(changed) - len(shown))
        info(f"{rest} more: --out FILE.csv, or ogreg -v compare ...")


def _guess(name: str, probability: float | None) -> str:
    return "no score" if probability is None else f"{name} {probability:.2f}"
